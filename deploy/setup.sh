# shellcheck shell=bash
# Installs what ./run and ./test need: system packages, and .venv with the project in it. Source it, do not run it.
#
#   . deploy/setup.sh
#   setup_packages PACKAGE:COMMAND ...    installs the packages whose command is missing (root), or says how to
#   setup_venv [EXTRA]                    creates .venv, sets PYTHON; EXTRA is one of pyproject.toml's extras
#   setup_compiler                        installs what compiling for PYTHON needs (root); status 1 if that is missing
#
# All are silent and fast if there is nothing to do. Messages go to stderr. pip uses the settings of the environment
# and of its configuration files.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # Debian's PATH for users lacks the network tools

say() { printf '%s\n' "- $*" >&2; }
fail() {
    printf '%s\n' "error: $*" >&2
    exit 1
}

# quietly COMMAND ...: prints the output of the command only if it fails, and then all of it.
quietly() {
    local output status=0
    output=$("$@" 2>&1 </dev/null) || status=$?
    ((status == 0)) || printf '%s\n' "error: $* (exit status $status):" "$output" >&2
    return "$status"
}

install_packages() {
    say "installing packages: $*"
    export DEBIAN_FRONTEND=noninteractive
    local -a install=(apt-get install -qq -y --no-install-recommends)
    # The list of packages may exist and be recent enough. If not, fetch it and try again.
    "${install[@]}" "$@" >/dev/null 2>&1 </dev/null && return
    quietly apt-get update -qq && quietly "${install[@]}" "$@"
}

setup_packages() {
    local wanted
    local -a missing=()
    for wanted in "$@"; do
        command -v "${wanted#*:}" >/dev/null || missing+=("${wanted%%:*}")
    done
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || fail "missing: ${missing[*]} (the names are Debian's; there is no apt-get here)"
    ((EUID == 0)) || fail "missing packages. Run this once, as root: apt-get install --no-install-recommends ${missing[*]}"
    install_packages "${missing[@]}" || fail "the packages could not be installed"
}

# python_here: prints the path of a Python that is new enough; python3 is preferred.
python_here() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# find_python: sets BASE_PYTHON. As root, installs a Python if there is none.
find_python() {
    if BASE_PYTHON=$(python_here); then return; fi
    local found="none" name
    command -v python3 >/dev/null && found=$(python3 -V 2>&1)
    if command -v apt-get >/dev/null; then
        ((EUID != 0)) || apt-cache show python3 >/dev/null 2>&1 || quietly apt-get update -qq || true
        # On Debian 12 and Ubuntu 24.04, python3 is new enough; on Ubuntu 22.04 it is 3.10, but there is python3.11 too.
        local -a candidates=(python3.14 python3.13 python3.12 python3.11)
        command -v python3 >/dev/null || candidates=(python3 "${candidates[@]}")
        for name in "${candidates[@]}"; do
            apt-cache show "$name" >/dev/null 2>&1 || continue
            [[ $name != python3 || $(apt-cache policy python3) =~ Candidate:\ 3\.1[1-9] ]] || continue
            ((EUID == 0)) ||
                fail "needs Python 3.11 or newer, found $found. Run this once, as root: apt-get install $name $name-venv"
            install_packages "$name" "$name-venv" || fail "Python could not be installed"
            if BASE_PYTHON=$(python_here); then return; fi
        done
    fi
    fail "needs Python 3.11 or newer, found $found, and this system has no package of it (Debian 12 and Ubuntu 24.04 do)"
}

make_venv() {
    say "making .venv with $("$BASE_PYTHON" -V)"
    rm -rf "$ROOT/.venv"
    # On Debian, ensurepip is a package of its own. Without it and without root, use virtualenv or another pip.
    "$BASE_PYTHON" -m venv "$ROOT/.venv" >/dev/null 2>&1 && return
    local venv
    venv=$("$BASE_PYTHON" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv")')
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        install_packages "$venv" && quietly "$BASE_PYTHON" -m venv --clear "$ROOT/.venv" && return
    fi
    if "$BASE_PYTHON" -m virtualenv --version >/dev/null 2>&1; then
        quietly "$BASE_PYTHON" -m virtualenv --clear "$ROOT/.venv" && return
    elif "$BASE_PYTHON" -m pip --version >/dev/null 2>&1; then
        # pip can install itself into an environment without pip.
        quietly "$BASE_PYTHON" -m venv --clear --without-pip "$ROOT/.venv" &&
            quietly "$BASE_PYTHON" -m pip --python "$ROOT/.venv/bin/python" install pip && return
    fi
    rm -rf "$ROOT/.venv"
    fail "could not make .venv. Run this once, as root: apt-get install --no-install-recommends $venv"
}

setup_venv() {
    local extra=${1:-} stamp state
    PYTHON=$ROOT/.venv/bin/python
    # The stamp records what the environment was made from. If that is unchanged, there is nothing to do. An environment
    # with the extra also serves without it. One that was moved, or whose Python is gone, does not run.
    stamp=$ROOT/.venv/installed${extra:+-$extra}
    state="$ROOT $(cksum <"$ROOT/pyproject.toml")"
    [[ -e $stamp && $(<"$stamp") == "$state" ]] && "$PYTHON" -c '' 2>/dev/null && return
    command -v flock >/dev/null && { exec 9<"$ROOT" && flock 9; } # only one at a time
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        find_python
        make_venv
    fi
    say "installing the project and what it needs into .venv"
    # (An editable one is never compiled. This keeps the compiler's packages out of its build.)
    TRANSOCKS_PURE=1 quietly "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$ROOT${extra:+[$extra]}" ||
        fail "the project could not be installed"
    printf '%s\n' "$state" >"$stamp"
    [[ -z $extra ]] || printf '%s\n' "$state" >"$ROOT/.venv/installed"
    exec 9<&-
    # If root made it in another user's checkout, that user owns it.
    ((EUID != 0)) || chown -R --reference="$ROOT" "$ROOT/.venv"
}

setup_compiler() {
    local headers version
    headers=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    if ! command -v gcc >/dev/null || [[ ! -e $headers/Python.h ]]; then
        ((EUID == 0)) && command -v apt-get >/dev/null || return
        version=$("$PYTHON" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
        install_packages gcc libc6-dev "libpython$version-dev" || return
        [[ -e $headers/Python.h ]] || return
    fi
}
