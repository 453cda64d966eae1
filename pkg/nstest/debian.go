package nstest

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A Debian is an installed system whose programs the tests run.
type Debian struct {
	Release string // "host" or "trixie"
	Root    string // "/", or what Trixie returns
}

// Host is this machine.
var Host = Debian{"host", "/"}

// EachDebian runs a test on this machine and on the Debian 13 tree, at the same
// time.
func EachDebian(t *testing.T, test func(t *testing.T, d Debian)) {
	t.Helper()
	t.Run("host", func(t *testing.T) {
		t.Parallel()
		test(t, Host)
	})
	t.Run("trixie", func(t *testing.T) {
		t.Parallel()
		test(t, Debian{"trixie", Trixie(t)})
	})
}

// Trixie returns the root of the Debian 13 tree that testdata/trixie.sh made,
// and skips the test if there is none.
func Trixie(t testing.TB) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	Must(t, err)
	tree := filepath.Join(cache, "nftwl", "trixie")
	if !fileExists(filepath.Join(tree, "usr/sbin/nft")) {
		Skip(t, "no Debian 13 tree at %s: run testdata/trixie.sh as root", tree)
	}
	return tree
}

// Path returns the path under which the test finds a file of the system.
func (d Debian) Path(name string) string { return filepath.Join(d.Root, name) }

// Need skips the test if the system lacks a file of a package.
func (d Debian) Need(t testing.TB, name, debianPackage string) {
	t.Helper()
	if !fileExists(d.Path(name)) {
		Skip(t, "%s lacks %s, of package %s: run testdata/deps.sh as root", d.Root, name, debianPackage)
	}
}

// Command returns a command that runs with the system as its root directory, and
// with the environment of a unit. It gets SIGTERM when the calling goroutine's
// thread ends.
func (d Debian) Command(name string, args ...string) *exec.Cmd {
	// env finds the program there, in the system's PATH.
	cmd := exec.Command("/usr/bin/env", append([]string{name}, args...)...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: d.Root, Pdeathsig: syscall.SIGTERM}
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "TZ=UTC"}
	return cmd
}

// Run runs a command that must succeed, and returns what it printed.
func (d Debian) Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	return output(t, d.Command(name, args...))
}

// Tree moves the calling goroutine's thread into a mount namespace of its own,
// in which the system's programs can run. The system and the test share an empty
// /run, so that a file in it has the same path for both. The other directories
// named are empty, too. Call New first.
func (d Debian) Tree(t testing.TB, empty ...string) {
	t.Helper()
	mount := func(source, target, kind string, flags uintptr, data string) {
		t.Helper()
		if err := unix.Mount(source, target, kind, flags, data); err != nil {
			t.Fatalf("mount %s: %v", target, err)
		}
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatalf("unshare mount namespace: %v", err)
	}
	mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	for _, name := range append(empty, "run") {
		mount("none", d.Path(name), "tmpfs", 0, "mode=755")
	}
	if d.Root == "/" {
		return
	}
	for _, name := range []string{"dev", "proc"} {
		mount("/"+name, d.Path(name), "", unix.MS_BIND|unix.MS_REC, "")
	}
	mount("none", d.Path("tmp"), "tmpfs", 0, "mode=1777")
	mount(d.Path("run"), "/run", "", unix.MS_BIND, "")
}

// Overlay mounts a directory over one of the system's, read-only. Call Tree
// first.
func (d Debian) Overlay(t testing.TB, directory, above string) {
	t.Helper()
	directory = d.Path(directory)
	Must(t, unix.Mount("overlay", directory, "overlay", unix.MS_RDONLY, "lowerdir="+above+":"+directory))
}

// Whiteout makes a device 0:0, which hides a file in an overlay
// (Documentation/filesystems/overlayfs.rst in the kernel's source).
func Whiteout(t testing.TB, name string) {
	t.Helper()
	Must(t, os.MkdirAll(filepath.Dir(name), 0o755))
	Must(t, unix.Mknod(name, unix.S_IFCHR, 0))
}
