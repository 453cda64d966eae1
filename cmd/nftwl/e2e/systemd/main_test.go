// Package systemd boots a real systemd as PID 1, and checks that the units in
// contrib/systemd lose nothing. systemd needs real root, so these tests use no user
// namespace.
package systemd

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// scratch is a tmpfs that ends with the tests' mount namespace.
const scratch = "NFTWL_TEST_SCRATCH"

// TestMain runs the tests as PID 1 of new namespaces, so that everything that they start
// and mount ends with them, even if they are killed.
func TestMain(m *testing.M) {
	switch {
	case os.Args[0] == bootName:
		fail(boot(os.Args[1:]))
	case os.Args[0] == cleanName:
		fail(clean())
		return
	case os.Geteuid() != 0:
		os.Exit(m.Run()) // newMachine skips
	case os.Getenv(scratch) != "":
		// Because a machine waits half of the time.
		nstest.Parallel(2 * runtime.GOMAXPROCS(0))
		fail(enter(os.Getenv(scratch)))
		os.Exit(m.Run())
	}

	dir, err := os.MkdirTemp("", "nftwl-systemd-")
	fail(err)
	before := hostRuleset()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), scratch+"="+dir, "TMPDIR="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	// The child gets Pdeathsig when the thread that started it ends.
	runtime.LockOSThread()
	interrupt := make(chan os.Signal, 1)
	signal.Notify(interrupt, os.Interrupt, syscall.SIGTERM)
	fail(cmd.Start())
	go func() {
		<-interrupt
		_ = cmd.Process.Kill() // fails if it has ended by itself
	}()
	err = cmd.Wait()
	if err != nil {
		// Because a test that was killed, or ran out of time, cleans up nothing.
		again := exec.Command("/proc/self/exe")
		again.Args[0], again.Env = cleanName, cmd.Env
		again.Stderr = os.Stderr
		again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
		err = errors.Join(fmt.Errorf("the tests: %w", err), again.Run())
	}
	err = errors.Join(err, os.Remove(dir))
	if after := hostRuleset(); after != before {
		err = errors.Join(err, fmt.Errorf("the host's ruleset has changed from\n%s\nto\n%s", before, after))
	}
	fail(err)
	os.Exit(0)
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// hostRuleset returns the host's ruleset without elements and counters, which packets
// change.
func hostRuleset() string {
	out, err := exec.Command("nft", "--stateless", "--terse", "list", "ruleset").CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return ""
	}
	fail(err)
	return string(out)
}

// enter mounts the file systems of the new namespaces.
func enter(dir string) error {
	// The tests also run inside, and must not do this again.
	err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if err == nil {
		err = unix.Mount("proc", "/proc", "proc", 0, "")
	}
	if err == nil {
		err = unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755")
	}
	if err == nil {
		err = os.Mkdir(groupRoot(), 0o755)
	}
	if err == nil {
		err = unix.Mount("cgroup2", groupRoot(), "cgroup2", 0, "")
	}
	return err
}

const cleanName = "nftwl-test-clean"

// clean removes what does not end with the namespaces.
func clean() error {
	err := enter(os.Getenv(scratch))
	if err != nil {
		return err
	}
	left, err := filepath.Glob(filepath.Join(groupRoot(), groupPrefix()+"*"))
	for _, dir := range left {
		err = errors.Join(err, removeGroup(dir))
	}
	return err
}

// onEach runs a test with this machine's systemd and with that of Debian 13, in parallel
// with other tests.
func onEach(t *testing.T, test func(t *testing.T, b nstest.Debian)) {
	t.Helper()
	t.Parallel()
	nstest.EachDebian(t, func(t *testing.T, b nstest.Debian) {
		b.Need(t, "usr/bin/systemctl", "systemd")
		b.Need(t, "usr/sbin/nft", "nftables")
		test(t, b)
	})
}

func lines(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == '\n' })
}
