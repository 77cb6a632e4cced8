#!/usr/bin/env bash
# Runs foreign programs, unmodified, against one database: direct, through the door with a handle, and
# through the door by an ambient grant. What they print must be the same. Installs what is missing (as
# root on Debian; from PyPI and npm into target/clients), and leaves nothing running.
#
#   tests/clients.sh [--quick] [NAME...]     --list prints the names
#
# CLIENTS_DUMP_MB (16; with --quick 4): how large the database is that pg_dump dumps.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tests/needs.sh
source tests/needs.sh

quick=(psql pgbench pg_dump psycopg asyncpg node-postgres tokio-postgres sqlx)
all=("${quick[@]}" sqlalchemy postgres-js dbhub postgres-mcp)
usual=("${all[@]}")
chosen=()
ambient_seconds=7
for argument in "$@"; do
    case $argument in
    --quick) usual=("${quick[@]}") && ambient_seconds=1 && : "${CLIENTS_DUMP_MB:=4}" ;;
    --list) printf '%s\n' "${all[@]}" && exit ;;
    -*) echo "usage: tests/clients.sh [--quick] [--list] [NAME...]" >&2 && exit 64 ;;
    *) chosen+=("$argument") ;;
    esac
done
((${#chosen[@]} > 0)) || chosen=("${usual[@]}")
for name in "${chosen[@]}"; do
    [[ " ${all[*]} " == *" $name "* ]] || { echo "no client $name; --list has them" >&2 && exit 64; }
done
export CLIENTS_DUMP_MB=${CLIENTS_DUMP_MB:-16}

needs_cargo
needs cc gcc psql postgresql-client pgbench postgresql-contrib setpriv util-linux sha256sum coreutils
cargo build --workspace --bins --locked --quiet

# shellcheck source=tests/foreign.sh
source tests/foreign.sh
sources=$PWD/tests/clients

# newer_python: one of 3.12 or later, which Debian 12 does not have. One of pyenv, below a home that other
# users may not enter, is copied to where they may.
newer_python() {
    local found copy=$cache/newer-python
    [[ ! -x $copy/bin/python3 ]] || { echo "$copy/bin/python3" && return; }
    for found in /usr/bin/python3.1[2-9] "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
        [[ -x $found ]] || continue
        [[ $found != /usr/bin/* ]] || { echo "$found" && return; }
        cp -r "${found%/bin/python3}" "$copy" && echo "$copy/bin/python3" && return
    done
    return 1
}

echo "installing what is missing" >&2
if wants psycopg asyncpg sqlalchemy; then
    python_packages /usr/bin/python3 python 'psycopg[binary,pool]' asyncpg sqlalchemy ||
        absent "not to be had from PyPI" psycopg asyncpg sqlalchemy
fi
if wants postgres-mcp; then
    if python=$(newer_python); then
        # It pins a pglast that PyPI does not have any more, and does not pin mcp, which it must.
        { python_packages "$python" mcp 'mcp[cli]<2' 'psycopg[binary,pool]' humanize attrs instructor 'pglast<8' &&
            { [[ -x $cache/mcp/bin/postgres-mcp ]] ||
                quietly "$cache/pip.log" "$cache/mcp/bin/pip" install --quiet --no-deps postgres-mcp; }; } ||
            absent "not to be had from PyPI" postgres-mcp
    else
        absent "it needs Python 3.12" postgres-mcp
    fi
fi
if wants node-postgres postgres-js dbhub; then
    command -v npm >/dev/null || needs npm npm
    node_packages node pg pg-copy-streams pg-cursor postgres ||
        absent "not to be had from npm" node-postgres postgres-js
fi
if wants dbhub; then
    node_packages dbhub @bytebase/dbhub || absent "not to be had from npm" dbhub
fi
node=
if wants node-postgres postgres-js dbhub; then
    node_22 || absent "no Node 22" node-postgres postgres-js dbhub
fi

start_stage

# The password as part of a URL.
encoded=$(printf %s "$STAGE_PASSWORD" | od -An -v -tx1 | tr -d '\n' | tr ' ' %)

# What the clients run stands where every user may look.
cp -r "$sources" "$work/clients"
cp "$bin/credbroker-clients" "$work/clients/"
ln -s "$cache/node/node_modules" "$work/clients/node_modules"
ln -s "$cache" "$work/cache"
mkdir "$work/bin"
ln -s "$STAGE_CREDBROKER" "$work/bin/credbroker"
[[ -z $node ]] || ln -s "$node" "$work/bin/node"
for pair in "direct-token $STAGE_PASSWORD" "no-token none"; do
    printf '#!/bin/sh\necho '\''{"token": "%s"}'\''\n' "${pair#* }" >"$work/bin/${pair% *}"
    chmod 0755 "$work/bin/${pair% *}"
done

# through WAY COMMAND...: as the client's user, with an environment that has nothing but the login.
through() {
    local way=$1 login=()
    shift
    local command=("$@")
    case $way in
    direct)
        login=(PGHOST="$STAGE_SOCKET_DIR" PGPORT="$STAGE_PORT" PGUSER="$STAGE_DATABASE"
            PGPASSWORD="$STAGE_PASSWORD" PGDATABASE="$STAGE_DATABASE"
            DATABASE_URL="postgresql:///$STAGE_DATABASE?host=$STAGE_SOCKET_DIR&port=$STAGE_PORT&user=$STAGE_DATABASE&password=$encoded"
            CLIENTS_EXPIRES=0 CLIENTS_POOL_SECONDS=1 CLIENTS_TOKEN_COMMAND=direct-token)
        ;;
    door)
        login=(CREDBROKER_RUNTIME_DIR="$CREDBROKER_RUNTIME_DIR" CREDBROKER_SERVER_UID="$STAGE_SERVER_UID"
            CLIENTS_EXPIRES=1 CLIENTS_TOKEN_COMMAND="credbroker --output json handle issue main_db --ttl 2s")
        command=(credbroker exec main_db -- "$@")
        ;;
    ambient)
        login=(PGHOST="$STAGE_DOOR" PGPORT=5432 PGUSER=ambient_db PGDATABASE="$STAGE_DATABASE" PGPASSWORD=
            DATABASE_URL="postgresql:///$STAGE_DATABASE?host=$STAGE_DOOR&user=ambient_db"
            CLIENTS_EXPIRES=0 CLIENTS_POOL_SECONDS="$ambient_seconds" CLIENTS_TOKEN_COMMAND=no-token)
        ;;
    esac
    setpriv --reuid="$STAGE_CLIENT_UID" --regid="$STAGE_CLIENT_UID" --groups="$STAGE_SOCKET_GROUP" -- \
        env -i PATH="$work/bin:$STAGE_PROGRAMS:$PATH" HOME="$PWD" LANG=C.UTF-8 TZ=UTC PYTHONDONTWRITEBYTECODE=1 \
        CLIENTS_WAY="$way" CLIENTS_DUMP_MB="$CLIENTS_DUMP_MB" STAGE_DATABASE="$STAGE_DATABASE" \
        "${login[@]}" timeout --kill-after=5 "${CLIENTS_TIMEOUT:-600}" "${command[@]}" 9>&-
}

# What is the way's own in a transcript: where psql is connected to, and numbers that never repeat.
normalise() {
    sed -E -e 's/as user "[a-z0-9_]+" via socket in "[^"]+" at port "[0-9]+"/as USER via SOCKET/' \
        -e 's/server process with PID [0-9]+/server process with PID N/' -e 's/^lo_(import|unlink) [0-9]+/lo_\1 N/' \
        -e "s/${STAGE_DATABASE}_(direct|door|ambient)/RESTORED/g" -e "s/$STAGE_DATABASE/DATABASE/g" \
        -e "s|($STAGE_DOOR\|$STAGE_SOCKET_DIR)/\.s\.PGSQL\.[0-9]+|SOCKET|g"
}

client() {
    local name=$1
    case $name in
    psql | pgbench | pg_dump) echo bash "$work/clients/$name.sh" ;;
    psycopg) echo "$work/cache/python/bin/python" "$work/clients/psycopg3.py" ;;
    asyncpg | sqlalchemy) echo "$work/cache/python/bin/python" "$work/clients/${name}_.py" ;;
    node-postgres | postgres-js) echo node "$work/clients/$name.mjs" ;;
    tokio-postgres | sqlx) echo "$work/clients/credbroker-clients" "$name" ;;
    dbhub | postgres-mcp) echo /usr/bin/python3 "$work/clients/mcp_.py" "$name" "$work/cache" ;;
    esac
}

version() {
    case $1 in
    psql | pgbench | pg_dump) "$1" --version | grep -oE '[0-9]+\.[0-9]+' | head -n 1 ;;
    *) sed -n 's/^note: version //p' "$work/$1.direct.err" | head -n 1 ;;
    esac
}

failed=0
row() { printf '%-15s %-26s %7s  %-7s %-7s %-7s  %s\n' "$@"; }
row client version checks direct door ambient verdict
for name in "${chosen[@]}"; do
    if [[ -n ${unavailable[$name]:-} ]]; then
        row "$name" - - - - - "not available: ${unavailable[$name]}"
        failed=1
        continue
    fi
    declare -A status=()
    read -ra command < <(client "$name")
    for way in direct door ambient; do
        mkdir "$work/$name.$way"
        chown "$STAGE_CLIENT_UID:$STAGE_CLIENT_UID" "$work/$name.$way"
        began=$SECONDS
        (cd "$work/$name.$way" && through "$way" "${command[@]}") \
            >"$work/$name.$way.out" 2>"$work/$name.$way.err" </dev/null && status[$way]=ok || status[$way]="exit $?"
        normalise <"$work/$name.$way.out" >"$work/$name.$way.txt"
        [[ ${CLIENTS_VERBOSE:-} != 1 ]] || echo "$name $way: $((SECONDS - began)) s" >&2
    done
    verdict=same
    for way in door ambient; do
        if ! diff -u "$work/$name.direct.txt" "$work/$name.$way.txt" >"$work/$name.$way.diff"; then
            verdict=DIFFERENT
            head -n 40 "$work/$name.$way.diff" >&2
        fi
    done
    [[ ${status[*]} == "ok ok ok" ]] || verdict=FAILED
    if [[ $verdict != same ]]; then
        failed=1
        for way in direct door ambient; do tail -n 15 "$work/$name.$way.err" | sed "s/^/$name $way: /" >&2; done
    fi
    row "$name" "$(version "$name")" "$(wc -l <"$work/$name.direct.txt")" \
        "${status[direct]}" "${status[door]}" "${status[ambient]}" "$verdict"
    sed -n "s/^note: /    door: /p" "$work/$name.door.err" | grep -v version | sort | uniq -c | sed 's/^ *1 //' || true
done
[[ -z ${CLIENTS_KEEP:-} ]] || cp "$work"/*.{out,err,txt} "$CLIENTS_KEEP"/
exit "$failed"
