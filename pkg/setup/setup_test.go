package setup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// Someone else can put a file there after the plan was made.
func TestWriteReplacesNothing(t *testing.T) {
	dir := t.TempDir()
	first, second := filepath.Join(dir, "a/b/first"), filepath.Join(dir, "second")
	p := &Plan{Files: []File{{Path: first, Text: "ours"}, {Path: second, Text: "ours"}}}
	if err := os.WriteFile(second, []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	written, err := p.Write()
	if !errors.Is(err, fs.ErrExist) || written != nil {
		t.Errorf("%q, %v", written, err)
	}
	if text, err := os.ReadFile(second); err != nil || string(text) != "theirs" {
		t.Errorf("the second file has %q, %v", text, err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Errorf("%v are left, %v", left, err)
	}
}
