#!/bin/sh
# Usage: apt-install.sh [COMMAND:]PACKAGE...
# Installs Debian packages that are not there yet. With a command, nothing is installed where that command
# is there already, whoever put it there. Fails, and says what to install, where apt is not to be had.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
missing=""
for wanted in "$@"; do
    package=${wanted#*:}
    case $wanted in
    *:*) command -v "${wanted%%:*}" >/dev/null && continue ;;
    esac
    dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing="$missing $package"
done
if [ -z "$missing" ]; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "No apt-get here; please install:$missing" >&2
    exit 1
fi
sudo=""
[ "$(id -u)" = 0 ] || sudo=sudo
$sudo env DEBIAN_FRONTEND=noninteractive apt-get update -q
# shellcheck disable=SC2086  # a list of packages
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
