#!/bin/sh
# Makes the Debian 13 tree in which the tests run a newer nft, Dovecot 2.4,
# systemd and fail2ban than Debian 12 has, and prints where it is.
#
#   testdata/trixie.sh [DIR]
#
# DIR is ${XDG_CACHE_HOME:-$HOME/.cache}/nftwl/trixie unless given, which is
# where the tests look. A tree that is there already is left alone: remove it
# to have a new one. Needs root, debootstrap, and a Debian mirror
# (DEBIAN_MIRROR chooses another than debootstrap's own).
set -eu

dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/nftwl/trixie}
packages='nftables netbase iproute2 systemd fail2ban
	dovecot-core dovecot-imapd dovecot-pop3d dovecot-submissiond dovecot-managesieved'

if [ -d "$dir" ]; then
	echo "$dir"
	exit 0
fi
if [ "$(id -u)" != 0 ]; then
	echo "trixie.sh: error: only root can make a Debian tree" >&2
	exit 1
fi
if ! command -v debootstrap >/dev/null; then
	echo "trixie.sh: error: debootstrap is not installed" >&2
	echo "trixie.sh: hint: apt-get install debootstrap" >&2
	exit 1
fi

# What a package leaves mounted or running goes with these namespaces, so
# that removing a failed tree cannot follow a mount out of it.
if [ -z "${NFTWL_TRIXIE_INSIDE-}" ]; then
	NFTWL_TRIXIE_INSIDE=1 exec unshare --mount --pid --fork --kill-child sh "$0" "$dir"
fi

# Built beside its final place and renamed: an interrupted build is never
# taken for a tree.
mkdir -p "$(dirname "$dir")"
new=$(mktemp -d "$dir.XXXXXX")
trap 'umount "$new/proc" 2>/dev/null || :; rm -rf --one-file-system "$new"' EXIT
trap 'exit 1' HUP INT TERM
chmod 755 "$new"
log=$new.log

if ! {
	debootstrap --variant=minbase trixie "$new" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} &&
	mkdir -p "$new/proc" &&
	{ mountpoint -q "$new/proc" || mount -t proc proc "$new/proc"; } &&
	# No package may start its daemon here.
	printf '#!/bin/sh\nexit 101\n' >"$new/usr/sbin/policy-rc.d" &&
	chmod 755 "$new/usr/sbin/policy-rc.d" &&
	# shellcheck disable=SC2086 # the list is meant to be split
	env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 \
		${http_proxy:+http_proxy="$http_proxy"} \
		chroot "$new" apt-get install --yes --quiet --no-install-recommends $packages &&
	chroot "$new" apt-get clean &&
	rm -rf "$new"/var/lib/apt/lists/* &&
	umount "$new/proc"
} >"$log" 2>&1; then
	tail -n 20 "$log" >&2
	echo "trixie.sh: error: no tree made; the whole output is in $log" >&2
	exit 1
fi
rm -f "$log"
# Two builds at once: the first to finish is kept.
mv -T "$new" "$dir" 2>/dev/null || [ -d "$dir" ]
echo "$dir"
