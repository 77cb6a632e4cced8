#!/usr/bin/env bash
# Opens the page of `credbroker entry` in a headless Chromium that runs under the uid of its person, with
# scripts switched off, types a password into it, and uses the connection. Checks headers, labels and that
# nothing else is fetched. Installs what is missing (as root on Debian), and leaves nothing running.
#
#   tests/entry-page.sh [--screenshot FILE]     FILE: tests/entry-page.png is made by it
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tests/needs.sh
source tests/needs.sh

screenshot=
case ${1:-} in
"") ;;
--screenshot) screenshot=$(realpath -m "${2:?--screenshot FILE}") ;;
*) echo "usage: tests/entry-page.sh [--screenshot FILE]" >&2 && exit 64 ;;
esac
[[ $(id -u) == 0 ]] || { echo "root is needed: the broker, the operator and the browser are three uids" >&2 && exit 77; }

needs_cargo
needs cc gcc psql postgresql-client setpriv util-linux chromium chromium node nodejs
bin=${CREDBROKER_E2E_BIN_DIR:-$(realpath -m "${CARGO_TARGET_DIR:-target}")/debug}
[[ -n ${CREDBROKER_E2E_BIN_DIR:-} ]] || cargo build --workspace --bins --locked --quiet

work=$(mktemp -d /tmp/cbe-XXXXXX)
chmod 0755 "$work"
stage=
entry=
# shellcheck disable=SC2317 # called by the trap
clean_up() {
    exec 9>&- || true
    [[ -z $entry ]] || kill "$entry" 2>/dev/null || true
    if [[ -n $stage ]]; then
        for _ in {1..100}; do kill -0 "$stage" 2>/dev/null || break; sleep 0.1; done
        kill "$stage" 2>/dev/null || true
        wait "$stage" 2>/dev/null || true
    fi
    for _ in {1..50}; do
        rm -rf "$work" 2>/dev/null && break
        sleep 0.1
    done
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# The stage stands for as long as descriptor 9 is open.
mkfifo "$work/hold"
TMPDIR=$work CREDBROKER_E2E_DIR=$work CREDBROKER_E2E_BIN_DIR=$bin \
    "$bin/credbroker-stage" <"$work/hold" >"$work/stage" 2>"$work/stage.err" &
stage=$!
exec 9>"$work/hold"
until grep -q STAGE_READY "$work/stage"; do
    kill -0 "$stage" 2>/dev/null || { cat "$work/stage" "$work/stage.err" >&2 && exit 70; }
    sleep 0.1
done
# shellcheck source=/dev/null
source "$work/stage"
export CREDBROKER_RUNTIME_DIR CREDBROKER_SERVER_UID=$STAGE_SERVER_UID

as_person() {
    setpriv --reuid="$STAGE_CLIENT_UID" --regid="$STAGE_CLIENT_UID" --groups="$STAGE_SOCKET_GROUP" -- "$@" 9>&-
}
query() {
    as_person "$STAGE_CREDBROKER" exec stored_db -- psql -XAtc 'SELECT current_user' 2>"$work/query.err"
}
if query >/dev/null; then echo "stored_db works before anything was stored" >&2 && exit 1; fi

"$STAGE_CREDBROKER" entry stored_db --opened-by "$STAGE_CLIENT_UID" >"$work/entry.out" 2>"$work/entry.err" 9>&- &
entry=$!
until grep -q ssh "$work/entry.err"; do
    kill -0 "$entry" 2>/dev/null || { cat "$work/entry.err" >&2 && exit 1; }
    sleep 0.1
done

mkdir "$work/home"
chown "$STAGE_CLIENT_UID:$STAGE_CLIENT_UID" "$work/home"
cp tests/entry-page.mjs "$work/"
# By standard input: an environment can be read by others of the same uid.
as_person env -i PATH="$PATH" HOME="$work/home" LANG=C.UTF-8 \
    timeout --kill-after=5 120 node "$work/entry-page.mjs" <<EOF
$(grep -o 'http://[^ ]*' "$work/entry.err")
$(sed -n 's/^ *code *\([^ ]*\).*/\1/p' "$work/entry.err")
$STAGE_DATABASE
$STAGE_PASSWORD
EOF

wait "$entry" || { cat "$work/entry.err" >&2 && exit 1; }
entry=
grep -q '^stored *stored_db$' "$work/entry.out"
if grep -rqF "$STAGE_PASSWORD" "$work/entry.out" "$work/entry.err"; then
    echo "the password was printed" >&2 && exit 1
fi
[[ $(query) == "$STAGE_DATABASE" ]] || { cat "$work/query.err" >&2 && exit 1; }
[[ -z $screenshot ]] || cp "$work/home/page.png" "$screenshot"
echo "the page was opened, filled in and sent without a script; stored_db works with what was typed"
