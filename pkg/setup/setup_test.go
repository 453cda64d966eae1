package setup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// Whatever doveconf is, and leaves running.
func TestDoveconfHeldOpen(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "doveconf"), []byte("#!/bin/sh\nsleep 20 &\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	before := time.Now()
	new(Plan).notePostLogin(new(Options))
	if took := time.Since(before); took > 15*time.Second {
		t.Errorf("it took %v", took)
	}
}

// Whoever can write a folder above a program can put another in its place.
func TestOnlyRoots(t *testing.T) {
	dir := t.TempDir() // in /tmp, which is sticky
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	real, link := filepath.Join(dir, "opt/bin/nftwl"), filepath.Join(dir, "usr/nftwl")
	must(os.MkdirAll(filepath.Dir(real), 0o755))
	must(os.MkdirAll(filepath.Dir(link), 0o755))
	must(os.WriteFile(real, nil, 0o755))
	must(os.Symlink(real, link))
	for _, path := range []string{real, link} {
		must(OnlyRoots(path))
	}
	for _, v := range []struct {
		path     string
		mode     os.FileMode
		linkOnly bool
	}{
		{"opt/bin/nftwl", 0o775, false}, {"opt/bin/nftwl", 0o757 | os.ModeSticky, false},
		{"opt/bin", 0o775, false}, {"opt", 0o757, false}, {"usr", 0o775, true},
	} {
		path := filepath.Join(dir, v.path)
		must(os.Chmod(path, v.mode))
		if err := OnlyRoots(link); err == nil {
			t.Errorf("%s with mode %04o is well by its link", v.path, v.mode)
		}
		if err := OnlyRoots(real); (err == nil) != v.linkOnly {
			t.Errorf("%s with mode %04o: %v", v.path, v.mode, err)
		}
		must(os.Chmod(path, 0o755))
	}
	must(os.Chmod(filepath.Join(dir, "opt"), 0o777|os.ModeSticky))
	must(OnlyRoots(real))
	nstest.NeedUsers(t)
	for _, path := range []string{real, filepath.Dir(real), link} {
		must(os.Lchown(path, 1000, 0))
		if err := OnlyRoots(link); err == nil {
			t.Errorf("%s is user 1000's", path)
		}
		must(os.Lchown(path, 0, 0))
	}
}

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
