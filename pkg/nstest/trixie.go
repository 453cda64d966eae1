package nstest

import (
	"os"
	"path/filepath"
	"testing"
)

// Trixie returns the root of the Debian 13 tree that testdata/trixie.sh made,
// and skips the test where there is none.
func Trixie(t testing.TB) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	tree := filepath.Join(cache, "nftwl", "trixie")
	if !fileExists(filepath.Join(tree, "usr/sbin/nft")) {
		Skip(t, "no Debian 13 tree at %s: run testdata/trixie.sh as root", tree)
	}
	return tree
}
