#!/bin/sh
# Makes a Debian 13 tree, and prints where it is. Its nft, Dovecot 2.4, Postfix,
# systemd and fail2ban are newer than those of Debian 12, and the tests run both.
#
#   testdata/trixie.sh [DIR]
#
# DIR is ${XDG_CACHE_HOME:-$HOME/.cache}/nftwl/trixie by default, which is where the
# tests look. If the tree exists already, this only adds packages that it lacks: remove
# it to get a new one. Needs root, debootstrap and a Debian mirror (DEBIAN_MIRROR, or
# else debootstrap's default).
set -eu

dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/nftwl/trixie}
packages='nftables netbase iproute2 systemd openssh-server fail2ban postfix dovecot-sqlite valkey-server
	dovecot-core dovecot-imapd dovecot-pop3d dovecot-submissiond dovecot-managesieved'

# lacking prints the packages that the tree lacks.
lacking() {
	for package in $packages; do
		grep -A 1 -x "Package: $package" "$dir/var/lib/dpkg/status" |
			grep -q -x 'Status: install ok installed' || echo "$package"
	done
}

if [ -d "$dir" ]; then
	packages=$(lacking)
	if [ -z "$packages" ]; then
		echo "$dir"
		exit 0
	fi
fi
if [ "$(id -u)" != 0 ]; then
	echo "trixie.sh: error: only root can make a Debian tree, or add packages to it" >&2
	exit 1
fi
if ! command -v debootstrap >/dev/null; then
	echo "trixie.sh: error: debootstrap is not installed" >&2
	echo "trixie.sh: hint: apt-get install debootstrap" >&2
	exit 1
fi

# Whatever a package leaves mounted or running ends with these namespaces, so that
# removing a failed tree cannot follow a mount out of it.
if [ -z "${NFTWL_TRIXIE_INSIDE-}" ]; then
	NFTWL_TRIXIE_INSIDE=1 exec unshare --mount --pid --fork --kill-child sh "$0" "$dir"
fi

# install adds the packages to a tree.
install() {
	mkdir -p "$1/proc" &&
	{ mountpoint -q "$1/proc" || mount -t proc proc "$1/proc"; } &&
	# No package must start its daemon here.
	printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d" &&
	chmod 755 "$1/usr/sbin/policy-rc.d" &&
	for command in update "install --yes --no-install-recommends $packages" clean; do
		# shellcheck disable=SC2086 # the command is meant to be split
		env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 \
			${http_proxy:+http_proxy="$http_proxy"} \
			chroot "$1" apt-get --quiet $command || return
	done &&
	rm -rf "$1"/var/lib/apt/lists/* &&
	umount "$1/proc"
}

failed() {
	tail -n 20 "$1" >&2
	echo "trixie.sh: error: $2; the whole output is in $1" >&2
	exit 1
}

if [ -d "$dir" ]; then
	install "$dir" >"$dir.log" 2>&1 || failed "$dir.log" "the tree lacks $(echo $packages)"
	rm -f "$dir.log"
	echo "$dir"
	exit 0
fi

# Build it under another name, and rename it, so that an interrupted build is never
# mistaken for a tree.
mkdir -p "$(dirname "$dir")"
new=$(mktemp -d "$dir.XXXXXX")
trap 'umount "$new/proc" 2>/dev/null || :; rm -rf --one-file-system "$new"' EXIT
trap 'exit 1' HUP INT TERM
chmod 755 "$new"
log=$new.log

{ debootstrap --variant=minbase trixie "$new" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} && install "$new"; } >"$log" 2>&1 ||
	failed "$log" "cannot make the tree"
rm -f "$log"
# If two builds run at once, the first one to finish is kept.
mv -T "$new" "$dir" 2>/dev/null || [ -d "$dir" ]
echo "$dir"
