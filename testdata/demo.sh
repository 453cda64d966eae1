#!/bin/sh
# make demo: a life of the sets, in a network namespace that is thrown away.
# The host's ruleset is not touched, and nothing but nftwl is needed.
set -eu

state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT

say() { printf '\n# %s\n' "$1"; }
run() {
	printf '$ %s\n' "$*"
	"$@"
}

# As Dovecot runs it after a login: with the client's address and the user's
# name in the environment, and with the command that it becomes.
login() { IP=$1 USER=$2 nftwl login echo "the mail process of $2"; }

say 'Make the sets, from the definitions that the firewall includes.'
run nftwl restore contrib/nftables/sets.nft
say 'Alice logs in from an IPv4 address,'
run login 192.0.2.7 alice
say 'and Bob from an IPv6 address.'
run login 2001:db8::7 bob
say 'The administrator bans an attacker, and trusts the office for good.'
run nftwl ban --timeout 2h --comment guessing 198.51.100.66
run nftwl add --timeout never --comment office 203.0.113.5
say 'Now the kernel holds:'
run nftwl list
if command -v nft >/dev/null 2>&1; then
	say 'The same, as nft sees it:'
	run nft list set inet filter trusted_ipv4
fi
say 'Save the sets, as before a reboot.'
run nftwl save "$state/sets.nft"
say 'The firewall is loaded anew, and has forgotten everything:'
run nftwl flush trusted
run nftwl flush banned
run nftwl list
say 'Restore them.'
run nftwl restore -v "$state/sets.nft"
say 'Everyone is back:'
run nftwl list
