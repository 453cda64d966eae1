package main

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// Whoever presses Ctrl-C a second time wants it to end, whatever it waits for.
func TestDoctorInterruptedTwice(t *testing.T) {
	h := newHost(t)
	h.must(os.MkdirAll(filepath.Dir(socketPath), 0o755))
	server, err := net.ListenUnix("unix", &net.UnixAddr{Name: socketPath, Net: "unix"}) // for whose answer it waits
	h.must(err)
	defer server.Close()
	h.must(server.SetDeadline(time.Now().Add(30 * time.Second)))
	cmd := exec.Command("/usr/bin/nftwl", "doctor")
	h.must(cmd.Start())
	conn, err := server.Accept()
	h.must(err)
	defer conn.Close()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for deadline := time.After(30 * time.Second); ; {
		select {
		case err := <-ended:
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
				t.Errorf("nftwl doctor: %v", err)
			}
			return
		case <-time.After(10 * time.Millisecond):
			_ = cmd.Process.Signal(syscall.SIGINT) // it may have ended
		case <-deadline:
			_ = cmd.Process.Kill()
			t.Fatal("it goes on")
		}
	}
}
