#!/bin/sh
# Runs a command as the mail user, as Dovecot's script-login -d would, which
# would also take from nftwl the right to change the sets. "nftwl setup dovecot"
# installs it if it is needed. While 90-nftwl.conf names it, it must be there and
# executable, or Dovecot denies logins.
set -eu

# Dovecot's mail_uid and mail_gid, for users without their own.
default_uid='' default_gid=''

# $UID would be bash's own variable.
uid=$(command -p printenv UID) || uid=$default_uid
gid=$(command -p printenv GID) || gid=${default_gid:-$(command -p id -g "$uid")}
groups=$gid
if [ -n "${SYSTEM_GROUPS_USER-}" ]; then # as initgroups(3)
	own=$(command -p id -g "$SYSTEM_GROUPS_USER")
	for group in $(command -p id -G "$SYSTEM_GROUPS_USER"); do
		[ "$group" = "$own" ] || groups=$groups,$group
	done
fi
case $uid in
'' | 0 | root)
	echo "nftwl: error: the uid of user ${USER-} is \"$uid\"" >&2
	exit 1
	;;
esac
exec /usr/bin/setpriv --reuid="$uid" --regid="$gid" --groups="$groups" "$@"
