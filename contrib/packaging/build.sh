#!/bin/sh
# Makes the packages: a .deb, an .rpm and an .apk for each architecture.
#
#   contrib/packaging/build.sh [DIR [ARCH…]]
#
# By default DIR is build/packages, and the architectures (in Go's words) are amd64
# and arm64. The version is the one that Go finds in git. VERSION=1.2.3 sets
# another, and is needed without git. The same source and the same Go make the same
# bytes: SOURCE_DATE_EPOCH, or else the commit, gives the time.
set -eu
umask 022
cd "$(dirname "$0")/../.."

out=${1:-build/packages}
[ $# = 0 ] || shift
[ $# != 0 ] || set -- amd64 arm64
mkdir -p "$out"
out=$(cd "$out" && pwd)
nfpm=$(sh contrib/packaging/nfpm.sh)
work=$(mktemp -d)
mkdir "$work/out" "$work/nfpm"
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# In a tarball, the time at which its files were packed.
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y go.mod)}
export SOURCE_DATE_EPOCH="$epoch"
export CGO_ENABLED=0 GOOS=linux GOAMD64=v1 GOARM64=v8.0
unset GOARCH

# put MODE FILE DESTINATION installs a file below the package's root.
put() { install -D -m "$1" "$2" "$root/$3"; }

# compressed FILE DESTINATION installs a compressed file without name and time, as
# Debian requires.
compressed() {
	mkdir -p "$(dirname "$root/$2")"
	gzip -9nc "$1" >"$root/$2"
}

# The files that are the same in all packages of an architecture.
common() {
	put 755 "$work/nftwl" usr/bin/nftwl
	put 755 "$work/nftwld" usr/bin/nftwld
	for file in contrib/dovecot/* contrib/nftables/*.nft contrib/nftables/nftables.conf \
		contrib/fail2ban/*/* contrib/openrc/*; do
		mode=644
		! grep -q '^#!' "$file" || mode=755
		put $mode "$file" "usr/share/nftwl/${file#contrib/}"
	done
	for file in contrib/man/*.[58]; do
		compressed "$file" "usr/share/man/man${file##*.}/${file##*/}.gz"
	done
	put 644 "$work/bash" usr/share/bash-completion/completions/nftwl
	put 644 "$work/fish" usr/share/fish/vendor_completions.d/nftwl.fish
	for file in README.md CHANGELOG.md SECURITY.md docs/*.md; do
		put 644 "$file" "usr/share/doc/nftwl/$file"
	done
	put 644 "$work/copyright" usr/share/doc/nftwl/copyright
}

units() {
	for file in contrib/systemd/nftwl[d-]* contrib/systemd/nftwl-.service.d/*; do
		[ ! -f "$file" ] || put 644 "$file" "usr/lib/systemd/system/${file#contrib/systemd/}"
	done
	# Files that an administrator can install instead of a unit, or beside one.
	for file in systemd/standalone/nftwl-persist.service systemd/dovecot.service.d/nftwl.conf systemd/nftwld.service.d/cluster.conf; do
		put 644 "contrib/$file" "usr/share/nftwl/$file"
	done
}

deb() {
	units
	put 644 "$work/zsh" usr/share/zsh/vendor-completions/_nftwl
	put 644 contrib/packaging/lintian-overrides usr/share/lintian/overrides/nftwl
	{
		echo "nftwl ($VERSION) unstable; urgency=medium"
		printf '\n  * See /usr/share/doc/nftwl/CHANGELOG.md.\n\n'
		echo " -- nftwl authors <nftwl@packages.invalid>  $(LC_ALL=C date -u -d "@$epoch" '+%a, %d %b %Y %H:%M:%S +0000')"
	} >"$work/changelog"
	compressed "$work/changelog" usr/share/doc/nftwl/changelog.gz
}

rpm() {
	units
	put 644 "$work/zsh" usr/share/zsh/site-functions/_nftwl
	put 644 LICENSE usr/share/licenses/nftwl/LICENSE
}

apk() {
	put 644 "$work/zsh" usr/share/zsh/site-functions/_nftwl
	put 644 LICENSE usr/share/licenses/nftwl/LICENSE
}

# indented FILE… prints files as the text of a field in Debian's format.
indented() { sed -e 's/^[[:space:]]*$/./' -e 's/^/ /' "$@"; }

for shell in bash zsh fish; do
	go run ./cmd/nftwl completion "$shell" >"$work/$shell"
done

# The modules in the programs. Their licenses must be included.
{
	cat contrib/packaging/copyright
	{
		echo "Go $(go env GOROOT)"
		go list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Dir}}{{end}}{{end}}' ./cmd/nftwl ./cmd/nftwld | sort -u
	} | while read -r module dir; do
		printf '\nFiles: %s\nCopyright: its authors\nLicense: %s\n' "$module" "$module"
		if grep -q 'Apache License' "$dir"/LICENSE*; then
			echo ' Apache License 2.0, as nftwl itself.'
			# Required by section 4 (d) of its license.
			[ ! -f "$dir/NOTICE" ] || indented "$dir/NOTICE"
		else
			indented "$dir"/LICENSE*
		fi
	done
} >"$work/copyright"

given=${VERSION-}
for arch; do
	if [ -n "$given" ]; then
		GOARCH=$arch go build -trimpath -buildvcs=false -ldflags "-s -w -X main.release=v${given#v}" -o "$work/" ./cmd/nftwl ./cmd/nftwld
		version=$given
	else
		GOARCH=$arch go build -trimpath -buildvcs=auto -ldflags '-s -w' -o "$work/" ./cmd/nftwl ./cmd/nftwld
		version=$(go version -m "$work/nftwl" | awk '$1 == "mod" { print $3 }')
	fi
	case $version in
	[0-9v]*) ;;
	*)
		echo "build.sh: error: this is not a git checkout, which would tell the version" >&2
		echo "build.sh: hint: make packages VERSION=1.2.3" >&2
		exit 1
		;;
	esac
	for format in deb rpm apk; do
		root=$work/root
		mkdir "$root"
		VERSION=$(sh contrib/packaging/version.sh "$format" "$version")
		export VERSION
		common
		"$format"
		# nfpm uses the files' times and modes.
		install -m 644 contrib/packaging/* "$work/nfpm"
		find "$root" "$work/nfpm" -exec touch --no-dereference --date="@$epoch" {} +
		(
			cd "$work/nfpm"
			ROOT=$root ARCH=$arch "$nfpm" package --config nfpm.yaml --packager "$format" --target "$work/out" >/dev/null
		)
		rm -r "$root"
	done
done
# Move everything at once, at the end, so that the source stays that of the commit
# during the build.
mv "$work/out"/* "$out"
ls -l "$out"
