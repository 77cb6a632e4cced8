#!/usr/bin/env bash
# Runs every check: format, lints, unit, doc and end-to-end tests, documentation, dependencies.
# Installs what is missing (as root on Debian), and leaves nothing running. With --fuzz it runs the
# fuzzer alone, FUZZ_SECONDS (60) for each target or for those that are named.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tests/needs.sh
source tests/needs.sh
needs_cargo
needs cc gcc g++ g++ gcore gdb psql postgresql-client setpriv util-linux systemd-analyze systemd

if [[ ${1:-} == --fuzz ]]; then
    needs g++ g++
    exec tests/fuzz/run "${@:2}"
fi

# What end-to-end tests share, in a place that goes away with this script. Short: it holds
# sockets, whose paths end at 107 bytes.
CREDBROKER_E2E_DIR=$(mktemp -d /tmp/cbe-XXXXXX)
CREDBROKER_E2E_BIN_DIR=$(realpath -m "${CARGO_TARGET_DIR:-target}")/debug
export CREDBROKER_E2E_DIR CREDBROKER_E2E_BIN_DIR
chmod 0755 "$CREDBROKER_E2E_DIR"
# shellcheck disable=SC2317 # called by the trap
clean_up() {
    # The guardian of the shared PostgreSQL leaves a few seconds after the last test.
    for _ in {1..100}; do
        [[ -e $CREDBROKER_E2E_DIR/postgres.json ]] || break
        sleep 0.2
    done
    for _ in {1..50}; do
        rm -rf "$CREDBROKER_E2E_DIR" 2>/dev/null && break
        sleep 0.2
    done
}
trap clean_up EXIT

started=$SECONDS
step() {
    printf '\n== %s  (%ss)\n' "$1" "$((SECONDS - started))"
    shift
    "$@"
}

step "format" cargo fmt --all --check
step "lints" cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
step "lints of the test build" cargo clippy -p credbroker-sql-worker --features conformance-fixtures \
    --all-targets --locked --quiet -- -D warnings
step "build" cargo build --workspace --all-targets --locked --quiet
if cargo nextest --version >/dev/null 2>&1; then
    step "unit and end-to-end tests" cargo nextest run --workspace --locked --no-fail-fast \
        --status-level slow --final-status-level slow
else
    RUST_TEST_THREADS=${RUST_TEST_THREADS:-4} \
        step "unit and end-to-end tests" cargo test --workspace --all-targets --locked --quiet --no-fail-fast
fi
step "documentation tests" cargo test --workspace --doc --locked --quiet
RUSTDOCFLAGS="-D warnings" \
    step "documentation" cargo doc --workspace --no-deps --document-private-items --locked --quiet
FUZZ_SECONDS=${FUZZ_SECONDS:-5} step "fuzz, briefly" tests/fuzz/run
# Those that come from Debian and crates.io; the rest of clients.sh needs other registries.
step "foreign programs" env -u CREDBROKER_E2E_DIR -u CREDBROKER_E2E_BIN_DIR \
    tests/clients.sh --quick psql pgbench pg_dump tokio-postgres sqlx
# Those that tests/mcp-clients.sh has installed once: PyPI and npm are not asked.
if [[ $(id -u) == 0 ]]; then
    step "MCP clients" env -u CREDBROKER_E2E_DIR -u CREDBROKER_E2E_BIN_DIR \
        tests/mcp-clients.sh --quick --installed
fi
# Where there is a browser already: it is large.
if command -v chromium >/dev/null && command -v node >/dev/null && [[ $(id -u) == 0 ]]; then
    step "page in a browser" env -u CREDBROKER_E2E_DIR -u CREDBROKER_E2E_BIN_DIR tests/entry-page.sh
fi
if cargo deny --version >/dev/null 2>&1; then
    # Advisories need the network and change by themselves: not a property of this commit.
    step "dependencies" cargo deny --log-level error check bans licenses sources
fi
if command -v shellcheck >/dev/null; then
    step "scripts" shellcheck -x tests/run.sh tests/needs.sh tests/foreign.sh tests/clients.sh tests/mcp-clients.sh tests/clients/*.sh tests/entry-page.sh tests/bench.sh deploy/demo.sh .ci/run tests/fuzz/{run,build,instrument}
fi

printf '\nall checks passed in %ss\n' "$((SECONDS - started))"
