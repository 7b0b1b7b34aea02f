#!/bin/sh
# Usage: make-venv.sh VENV UV_VERSION [--group NAME]
# Finds a Python that Havengate runs on, makes VENV from it and installs what uv.lock pins; with a
# group, that too.
set -eu
venv=$1
uv_version=$2
shift 2

is_usable() {
    "$1" -c 'import sys, ssl, sqlite3, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info < (3, 15))' 2>/dev/null
}

# pyenv's shims are on the PATH even for versions that are not selected, so each candidate is tried.
find_python() {
    for candidate in "${PYTHON:-}" python3.13 python3.14 python3.12 python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13.*/bin/python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.14.*/bin/python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python \
        /opt/homebrew/bin/python3 /usr/local/bin/python3; do
        if [ -n "$candidate" ] && is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "Havengate needs Python 3.12, 3.13 or 3.14 (with venv). None was found on PATH or under pyenv." >&2
    echo "Install one (Debian 13: apt-get install python3-venv; pyenv: pyenv install 3.13) or name it:" >&2
    echo "  make PYTHON=/path/to/python3.13 demo" >&2
    exit 1
}

if ! { [ -x "$venv/bin/python" ] && is_usable "$venv/bin/python"; }; then
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
if ! "$venv/bin/uv" --version 2>/dev/null | grep -qF "uv $uv_version "; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
fi
echo "Installing what uv.lock pins"
# --inexact leaves uv itself in place.
VIRTUAL_ENV="$venv" UV_PROJECT_ENVIRONMENT="$venv" UV_PYTHON_DOWNLOADS=never \
    "$venv/bin/uv" sync --quiet --locked --inexact --python "$venv/bin/python" "$@"
