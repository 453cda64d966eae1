#!/bin/sh
# Compiles nfpm, which makes the packages, unless it exists already, and prints
# where it is.
set -eu

# Later versions are incomplete on the module proxy.
version=v2.45.0
dir=${XDG_CACHE_HOME:-$HOME/.cache}/nftwl/nfpm-$version
if [ ! -x "$dir/nfpm" ]; then
	mkdir -p "$dir"
	# In a module of its own, because it is not in this module's go.mod.
	CGO_ENABLED=0 GOFLAGS=-mod=mod GOOS='' GOARCH='' GOBIN=$dir \
		go install -trimpath "github.com/goreleaser/nfpm/v2/cmd/nfpm@$version" >&2
fi
echo "$dir/nfpm"
