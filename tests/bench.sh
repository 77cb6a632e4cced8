#!/usr/bin/env bash
# Measures the broker against what does the same with less, and writes tests/BENCHMARKS.md and
# the chart beside it. As root on Debian, whose pgbouncer and pgbench are installed if they are
# missing; best on a machine that has nothing else to do. Leaves nothing running.
#
#   tests/bench.sh [--quick] [P1 P2 …]
#
# Everything takes about 15 minutes, with --quick about 4. What is not named is told from the run
# before, whose results are kept in target/bench. A quick run writes its report to
# target/bench/quick instead: it shows that everything works, and its figures mean little.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tests/needs.sh
source tests/needs.sh
needs_cargo
had_pgbouncer=$(command -v /usr/sbin/pgbouncer || true)
needs cc gcc setpriv util-linux psql postgresql-client pgbench postgresql-contrib \
    pg_config libpq-dev /usr/sbin/pgbouncer pgbouncer
if [[ -z $had_pgbouncer ]] && command -v systemctl >/dev/null; then
    # Debian starts one of its own, which nobody here asks for.
    systemctl disable --now pgbouncer >/dev/null 2>&1 || true
fi

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
results=$target/bench/full
report=tests/BENCHMARKS.md
for argument; do
    if [[ $argument == --quick ]]; then
        results=$target/bench/quick
        report=$results/BENCHMARKS.md
    fi
done
mkdir -p "$results"

commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
git diff --quiet HEAD -- . ':!tests/BENCHMARKS.*' 2>/dev/null || commit+=" and changes"

cargo build --release --workspace --bin credbrokerd --bin credbroker-sql-worker \
    --bin bench-run --locked --quiet

# What the programs share, in a place that goes away with this script. Short: it holds sockets,
# whose paths end at 107 bytes.
CREDBROKER_E2E_DIR=$(mktemp -d /tmp/cbb-XXXXXX)
CREDBROKER_E2E_BIN_DIR=$target/release
export CREDBROKER_E2E_DIR CREDBROKER_E2E_BIN_DIR
chmod 0755 "$CREDBROKER_E2E_DIR"
trap 'rm -rf "$CREDBROKER_E2E_DIR"' EXIT
cc -O2 -Wall -Wextra -Werror -I"$(pg_config --includedir)" tests/src/bench/libpq.c \
    -o "$CREDBROKER_E2E_DIR/libpq-client" -lpq

started=$SECONDS
status=0
"$CREDBROKER_E2E_BIN_DIR/bench-run" --results "$results" --report "$report" --commit "$commit" "$@" \
    || status=$?
printf '%s: %ss\n' "$report" "$((SECONDS - started))" >&2
exit "$status"
