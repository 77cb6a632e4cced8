#!/usr/bin/env bash
# Shows credbroker at work, and proves on this machine what it promises. Installs what is missing
# (as root on Debian), builds, runs everything privately, and leaves nothing behind.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tests/needs.sh
source tests/needs.sh
needs_cargo
needs cc gcc psql postgresql-client setpriv util-linux

# A debug build: it takes half the time of a release build from nothing, and here nothing is
# measured. The secrets' handling is the same in both.
echo "building (minutes the first time, seconds later)"
cargo build --workspace --bins --locked --quiet

work=$(mktemp -d /tmp/cbd-XXXXXX)
chmod 0755 "$work"
demo=
# shellcheck disable=SC2317 # called by the trap
clean_up() {
    # All other processes are the demo's children, and end with it.
    if [[ -n $demo ]]; then
        kill "$demo" 2>/dev/null || true
        wait "$demo" 2>/dev/null || true
    fi
    for _ in {1..50}; do
        rm -rf "$work" 2>/dev/null && break
        sleep 0.1
    done
}
trap clean_up EXIT
trap 'exit 130' INT TERM

bin=$(realpath "${CARGO_TARGET_DIR:-target}")/debug
TMPDIR=$work CREDBROKER_E2E_DIR=$work CREDBROKER_E2E_BIN_DIR=$bin "$bin/credbroker-demo" &
demo=$!
wait "$demo" && status=0 || status=$?
demo=
exit "$status"
