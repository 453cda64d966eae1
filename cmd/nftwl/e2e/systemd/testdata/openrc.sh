#!/bin/sh
# Unpacks Debian's OpenRC, without installing it, where the tests look for
# it, and prints where that is. Needs apt-get and a Debian mirror, not root.
#
#   openrc.sh [DIR]
set -eu

dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/nftwl/openrc}
if [ -d "$dir" ]; then
	echo "$dir"
	exit 0
fi

mkdir -p "$(dirname "$dir")"
new=$(mktemp -d "$dir.XXXXXX")
trap 'rm -rf "$new"' EXIT
trap 'exit 1' HUP INT TERM
mkdir "$new/debs" "$new/tree"
chmod 755 "$new/tree"
if ! (cd "$new/debs" && apt-get download --quiet openrc librc1 libeinfo1) >"$new/log" 2>&1; then
	cat "$new/log" >&2
	echo "openrc.sh: error: apt-get cannot download openrc" >&2
	echo "openrc.sh: hint: apt-get update" >&2
	exit 1
fi
for deb in "$new"/debs/*.deb; do
	dpkg-deb -x "$deb" "$new/tree"
done
# As on a machine whose /lib is a symlink to /usr/lib.
for d in bin sbin lib; do
	if [ -d "$new/tree/$d" ] && [ ! -L "$new/tree/$d" ]; then
		mkdir -p "$new/tree/usr/$d"
		cp -a "$new/tree/$d/." "$new/tree/usr/$d/"
		rm -r "${new:?}/tree/$d"
	fi
done
mv -T "$new/tree" "$dir" 2>/dev/null || [ -d "$dir" ]
echo "$dir"
