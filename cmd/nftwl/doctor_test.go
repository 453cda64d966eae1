package main

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Whoever presses Ctrl-C a second time wants it to end, whatever it waits for:
// here for what a program has started, which holds the pipe of its output.
func TestDoctorInterruptedTwice(t *testing.T) {
	h := newHost(t)
	h.must(unix.Mkfifo("/run/held", 0o600))
	h.write("/run/bin/doveconf", "")
	h.write("/run/bin/dovecot", "#!/bin/sh\ncat /run/held &\nwait\n")
	h.must(os.Chmod("/run/bin/doveconf", 0o755))
	h.must(os.Chmod("/run/bin/dovecot", 0o755))
	cmd := exec.Command("/usr/bin/nftwl", "doctor")
	cmd.Env = []string{"PATH=/run/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	h.must(cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	late := time.After(limit)
	for held := false; ; {
		select {
		case err := <-ended:
			var exit *exec.ExitError
			if !held || !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
				t.Errorf("nftwl doctor: %v, when it waited: %v", err, held)
			}
			return
		case <-late:
			_ = cmd.Process.Kill()
			t.Fatal("it goes on")
		case <-time.After(10 * time.Millisecond):
		}
		if !held {
			// Which fails until somebody reads, and whose close ends cat.
			f, err := os.OpenFile("/run/held", os.O_WRONLY|unix.O_NONBLOCK, 0)
			if err != nil {
				continue
			}
			defer f.Close()
			held = true
		}
		_ = cmd.Process.Signal(syscall.SIGINT) // it may have ended
	}
}
