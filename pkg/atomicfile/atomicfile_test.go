package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCreateAndReplace(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	for _, c := range []struct {
		write func(string, []byte, fs.FileMode) error
		text  string
		err   error
		want  string
	}{
		{Create, "first", nil, "first"},
		{Create, "second", fs.ErrExist, "first"},
		{Replace, "third", nil, "third"},
	} {
		if err := c.write(path, []byte(c.text), 0o644); !errors.Is(err, c.err) {
			t.Errorf("%s: %v", c.text, err)
		}
		text, err := os.ReadFile(path)
		info, e := os.Stat(path)
		if err != nil || e != nil || string(text) != c.want || info.Mode() != 0o644 {
			t.Errorf("after %s: %q, %v, %v, %v", c.text, text, err, info, e)
		}
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := Create(filepath.Join(dir, "link"), nil, 0o644); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a dangling link: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
		t.Errorf("%v are left, %v", left, err)
	}
}
