package install

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// Whatever doveconf does, and whatever process it leaves running.
func TestDoveconfHeldOpen(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "doveconf"), []byte("#!/bin/sh\nsleep 20 &\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	before := time.Now()
	new(Plan).leaveOthers()
	if took := time.Since(before); took > 15*time.Second {
		t.Errorf("it took %v", took)
	}
}

// Someone who can write to a directory above a program can replace the program.
func TestOnlyRoots(t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	nstest.New(t)
	must(unix.Unshare(unix.CLONE_NEWNS))
	must(unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	const dir = "/opt"
	must(unix.Mount("none", dir, "tmpfs", 0, "mode=755"))
	real, link := filepath.Join(dir, "opt/bin/nftwl"), filepath.Join(dir, "usr/nftwl")
	between := filepath.Join(dir, "between/bin")
	for _, path := range []string{real, link, between} {
		must(os.MkdirAll(filepath.Dir(path), 0o755))
	}
	must(os.WriteFile(real, nil, 0o755))
	must(os.Symlink("../opt/bin", between))
	must(os.Symlink(between+"/nftwl", link))
	for _, path := range []string{real, link} {
		must(OnlyRoots(path))
	}
	for _, v := range []struct {
		path     string
		mode     os.FileMode
		linkOnly bool
	}{
		{"opt/bin/nftwl", 0o775, false}, {"opt/bin/nftwl", 0o757 | os.ModeSticky, false},
		{"opt/bin", 0o775, false}, {"opt", 0o757, false}, {"usr", 0o775, true}, {"between", 0o775, true},
		{"opt", 0o777 | os.ModeSticky, false}, {"", 0o777 | os.ModeSticky, false}, {"usr", 0o777 | os.ModeSticky, true},
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
	must(os.Symlink("loop", filepath.Join(dir, "loop")))
	if err := OnlyRoots(filepath.Join(dir, "loop")); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a link to itself: %v", err)
	}
	nstest.NeedUsers(t)
	for _, path := range []string{real, filepath.Dir(real), link, between, filepath.Dir(between), dir} {
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
	if _, err := os.Stat(first); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the first file is left: %v", err)
	}
}

// Includes in Dovecot's order, and files that include themselves.
func TestOverriding(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	main, dropIn := filepath.Join(dir, "dovecot.conf"), filepath.Join(dir, "conf.d/90-nftwl.conf")
	if read, lines := Overriding(main, dropIn); !read || lines != nil {
		t.Errorf("without a configuration: %v, %q", read, lines)
	}
	write("dovecot.conf", "executable = imap before\n#!include conf.d/*.conf\n")
	if read, lines := Overriding(main, dropIn); read || lines != nil {
		t.Errorf("without the include: %v, %q", read, lines)
	}
	const set = "service imap {\n  executable = imap x\n}\n"
	write("dovecot.conf", set+"!include conf.d/*.conf\n!include_try local.conf\n!include_try missing.conf\nservice x {\n  executable = script-login imap\n")
	write("conf.d/10-mail.conf", set)
	write("conf.d/95-more.conf", set)
	write("local.conf", "!include local.conf\n!include *.conf\n#executable = imap x\nservice pop3 {\n  executable = /usr/lib/dovecot/pop3 y\n")
	want := []string{
		`"executable = imap x" from ` + dir + "/conf.d/95-more.conf, line 2",
		`"executable = /usr/lib/dovecot/pop3 y" from ` + dir + "/local.conf, line 5",
	}
	read, lines := Overriding(main, dropIn)
	if !read || !slices.Equal(lines, want) {
		t.Errorf("%v, %q", read, lines)
	}
	write("conf.d/90-nftwl.conf", set)
	if read, again := Overriding(main, dropIn); !read || !slices.Equal(again, lines) {
		t.Errorf("with the drop-in: %v, %q", read, again)
	}
}
