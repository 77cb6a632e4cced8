# shellcheck shell=bash
# Sourced by the scripts that build: makes sure that what they call is there.

# needs COMMAND PACKAGE...: pairs of a command and the Debian package that has it. Installs the
# packages whose commands are missing, as root on Debian; elsewhere says what to install.
needs() {
    local missing=()
    while (($# >= 2)); do
        command -v "$1" >/dev/null || missing+=("$2")
        shift 2
    done
    # Debian keeps PostgreSQL's server programs out of PATH.
    if ! command -v initdb >/dev/null && ! compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; then
        missing+=(postgresql)
    fi
    ((${#missing[@]} == 0)) && return
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        echo "missing: ${missing[*]} (Debian: apt-get install ${missing[*]})" >&2
        return 69
    fi
    echo "installing ${missing[*]}" >&2
    local log
    log=$(mktemp)
    # PostgreSQL's package would start a cluster of its own, which nobody here asks for.
    local no_cluster=/etc/postgresql-common/createcluster.conf
    if [[ -e $no_cluster ]]; then
        no_cluster=
    else
        mkdir -p "${no_cluster%/*}"
        echo 'create_main_cluster = false' >"$no_cluster"
    fi
    local status=0
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y \
        --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 || status=69
    ((status == 0)) || cat "$log" >&2
    rm -f "$log" ${no_cluster:+"$no_cluster"}
    return "$status"
}

# needs_cargo: Rust does not come from Debian, whose version is too old.
needs_cargo() {
    PATH=$PATH:$HOME/.cargo/bin
    command -v cargo >/dev/null && return
    echo "missing: cargo (https://rustup.rs)" >&2
    return 69
}
