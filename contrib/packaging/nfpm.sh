#!/bin/sh
# Compiles nfpm, which makes the packages, unless it is there already, and
# prints where it is.
set -eu

# Later versions are not complete on the module proxy.
version=v2.45.0
dir=${XDG_CACHE_HOME:-$HOME/.cache}/nftwl/nfpm-$version
if [ ! -x "$dir/nfpm" ]; then
	mkdir -p "$dir"
	# Of its own module: this one's go.mod does not know it.
	CGO_ENABLED=0 GOFLAGS=-mod=mod GOOS='' GOARCH='' GOBIN=$dir \
		go install -trimpath "github.com/goreleaser/nfpm/v2/cmd/nfpm@$version" >&2
fi
echo "$dir/nfpm"
