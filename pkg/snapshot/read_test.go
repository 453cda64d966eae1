package snapshot

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// Reading takes little memory, however large the file is.
func TestReadTooLarge(t *testing.T) {
	sparse := filepath.Join(t.TempDir(), "sparse")
	must(t, os.WriteFile(sparse, nil, 0o600))
	must(t, os.Truncate(sparse, 1<<40))
	if _, err := Read(sparse); err == nil || err.Error() != sparse+" is larger than 1024 MiB" {
		t.Errorf("%v", err)
	}
	if _, err := Read(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if _, err := Read(t.TempDir()); err == nil {
		t.Error("a directory was read")
	}
}

// The owners and modes with which a snapshot is accepted.
func TestCheckOwner(t *testing.T) {
	nstest.NeedUsers(t)
	const service, mallory = 1000, 1001
	for _, test := range []struct {
		what      string
		mode      fs.FileMode // of the directory
		dir, file int         // their owners
		fileMode  fs.FileMode
		link      int // the owner of the link, if there is one
		err       string
	}{
		{"root's", 0o755, 0, 0, 0o600, 0, ""},
		{"the service's", 0o700, service, service, 0o600, 0, ""},
		{"root's in the service's dir", 0o700, service, 0, 0o600, 0, ""},
		{"for its group", 0o770, service, service, 0o660, 0, ""},
		{"a link of root's", 0o755, 0, 0, 0o600, 0, ""},
		{"in a dir for all", 0o777, 0, 0, 0o600, 0, "is in a directory that everyone can write to"},
		{"root's in /tmp", fs.ModeSticky | 0o777, 0, 0, 0o600, 0, ""},
		{"another's in /tmp", fs.ModeSticky | 0o777, 0, mallory, 0o600, 0, "belongs to user 1001, and neither to root nor to the owner of its directory"},
		{"another's link in /tmp", fs.ModeSticky | 0o777, 0, 0, 0o600, mallory, "belongs to user 1001"},
		{"another's in the service's dir", 0o700, service, mallory, 0o600, 0, "belongs to user 1001"},
		{"for all to write", 0o755, 0, 0, 0o666, 0, "is a file that everyone can write to"},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "sets.nft")
		must(t, os.WriteFile(path, nil, 0o600))
		must(t, os.Chown(path, test.file, test.file))
		must(t, os.Chmod(path, test.fileMode))
		if test.link != 0 || strings.Contains(test.what, "link") {
			must(t, os.Rename(path, path+".real"))
			must(t, os.Symlink(path+".real", path))
			must(t, os.Lchown(path, test.link, test.link))
		}
		must(t, os.Chown(dir, test.dir, test.dir))
		must(t, os.Chmod(dir, test.mode))
		err := CheckOwner(path)
		if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %v", test.what, err)
		}
	}
	if err := CheckOwner(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
