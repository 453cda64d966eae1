#!/bin/sh
# Installs what the tests need, on Debian and as root. Elsewhere it reports what is
# missing; tests that need it are then skipped, or fail under CI.
set -eu
cd "$(dirname "$0")/.."

packages='nftables netbase iproute2 systemd dovecot-core dovecot-imapd dovecot-pop3d
	dovecot-submissiond dovecot-managesieved dovecot-sqlite postfix fail2ban ipcalc-ng iputils-ping debootstrap util-linux
	redis-server git lintian rpm man-db bash-completion strace iptables ipset'

missing=
for package in $packages; do
	case $(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null) in
	installed) ;;
	*) missing="$missing $package" ;;
	esac
done

if [ -n "$missing" ]; then
	if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
		echo "deps.sh: not installed, so tests will be skipped:$missing" >&2
		echo "deps.sh: hint: as root on Debian, this script installs them" >&2
		exit 0
	fi
	# Only the tests start the daemons of these packages.
	policy=/usr/sbin/policy-rc.d
	if [ ! -e $policy ]; then
		printf '#!/bin/sh\nexit 101\n' >$policy
		chmod 755 $policy
		trap 'rm -f $policy' EXIT
	fi
	apt-get update --quiet --quiet
	updated=yes
	# shellcheck disable=SC2086 # the list is meant to be split
	DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends $missing
fi

if [ "$(id -u)" = 0 ]; then
	sh testdata/trixie.sh >/dev/null
	[ -n "${updated-}" ] || [ -n "$(apt-cache madison openrc)" ] || apt-get update --quiet --quiet
	sh cmd/nftwl/e2e/systemd/testdata/openrc.sh >/dev/null
fi
# Now, because the tests' namespaces have no network.
sh contrib/packaging/nfpm.sh >/dev/null
