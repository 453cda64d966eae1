package nstest

import (
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds each wait for something that must happen. It is no guess of
// how long that takes: every wait ends as soon as it has happened.
const patience = 30 * time.Second

// Tree moves the calling goroutine's thread into a mount namespace of its own,
// in which programs can run with their root in a Debian's tree: "/", or what
// Trixie returns. /run is empty, and the same there as here, so that a file in it
// has one path. Call New before it.
func Tree(t testing.TB, root string) {
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
	mount("none", filepath.Join(root, "run"), "tmpfs", 0, "mode=755")
	if root == "/" {
		return
	}
	for _, name := range []string{"dev", "proc"} {
		mount("/"+name, filepath.Join(root, name), "", unix.MS_BIND|unix.MS_REC, "")
	}
	mount("none", filepath.Join(root, "tmp"), "tmpfs", 0, "mode=1777")
	mount(filepath.Join(root, "run"), "/run", "", unix.MS_BIND, "")
}

// Dovecot is one that was started.
type Dovecot struct {
	Pid int

	t    testing.TB
	cmd  *exec.Cmd
	done chan struct{} // closed once all its processes have exited
}

// StartDovecot runs the Dovecot of a tree with a configuration, and waits until
// its IMAP answers at an address. What it prints is written to a file. It is stopped
// when the test ends. wrap is a command to run it under, and env more of its
// environment.
func StartDovecot(t testing.TB, root, conf, address, file string, wrap, env []string) *Dovecot {
	t.Helper()
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	argv := slices.Concat(wrap, []string{"/usr/sbin/dovecot", "-F", "-c", conf})
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Pdeathsig: syscall.SIGTERM}
	// Not the file itself but a pipe into it, so that Wait waits for every
	// process of Dovecot's, and with them for the last line of the log.
	cmd.Stdout = struct{ io.Writer }{out}
	cmd.Stderr = cmd.Stdout
	// As under systemd: a user's shell is not part of what a login gets.
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d := &Dovecot{cmd.Process.Pid, t, cmd, make(chan struct{})}
	go func() {
		_ = cmd.Wait() // the log says why it ended
		out.Close()
		close(d.done)
	}()
	t.Cleanup(d.Stop)
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		err := greeted(address)
		if err == nil {
			return d
		}
		select {
		case <-d.done:
			t.Fatal("Dovecot did not start")
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("waited %v for Dovecot: %v", patience, err)
		}
	}
}

// greeted waits for a greeting: Dovecot opens its ports one after the other,
// and all before it starts the process that sends one.
func greeted(address string) error {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return err
}

// Stop ends it, if it has not ended, and waits until it is gone.
func (d *Dovecot) Stop() {
	d.t.Helper()
	_ = d.cmd.Process.Signal(syscall.SIGTERM) // fails where it has exited
	select {
	case <-d.done:
	case <-time.After(patience):
		d.t.Error("Dovecot did not stop on SIGTERM")
		_ = d.cmd.Process.Kill() // fails where it has just exited
		<-d.done
	}
}
