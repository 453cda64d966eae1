package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// What systemd and a service say to each other is a few lines: sd_listen_fds(3),
// sd_notify(3) and sd_watchdog_enabled(3). The library for it, go-systemd, would bring TLS into a
// binary that starts at every login.

// inherited returns the socket that systemd has opened for this process, or
// nil where there is none.
func inherited() (*net.UnixListener, error) {
	const first = 3 // SD_LISTEN_FDS_START
	pid, err := strconv.Atoi(os.Getenv("LISTEN_PID"))
	if err != nil || pid != os.Getpid() {
		return nil, nil
	}
	if n := os.Getenv("LISTEN_FDS"); n != "1" {
		return nil, fmt.Errorf("%s sockets from systemd; there must be one, so one ListenStream= in its unit", n)
	}
	f := os.NewFile(first, "the socket from systemd")
	defer f.Close() // FileListener has its own
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("the socket from systemd: %w", err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok || u.Addr().Network() != "unix" {
		return nil, errors.New("the socket from systemd is not a Unix stream socket; ListenStream= must be a path")
	}
	return u, nil
}

// listen makes a socket, which only root and this process's user can connect
// to. It takes the place of one that nobody listens on any more, at once: for
// Dovecot a path without a socket denies the login, while a socket without a
// listener makes it try again for a second. So it is not removed either.
func listen(path string) (*net.UnixListener, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("%s is there already, and is not a socket", path)
	default:
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil, fmt.Errorf("somebody listens on %s already", path)
		} else if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, err
		}
	}
	made := filepath.Join(filepath.Dir(path), fmt.Sprintf(".nftwl.%d", os.Getpid()))
	if err := os.Remove(made); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("%s is too long for a socket's path", path)
	}
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(made, 0o600); err == nil {
		err = os.Rename(made, path)
	}
	if err != nil {
		l.Close()
		os.Remove(made)
		return nil, err
	}
	return l, nil
}

// notify tells systemd the service's state, where it asked to be told.
func notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	// A name with @ is abstract, for net as for systemd.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err == nil {
		_, err = conn.Write([]byte(state))
		conn.Close()
	}
	if err != nil {
		complain("serve: systemd is not told: " + err.Error())
	}
}

// watchdog returns after how long without WATCHDOG=1 systemd takes this process
// for dead; 0 where it does not.
func watchdog() time.Duration {
	if pid := os.Getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0
	}
	us, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || us <= 0 {
		return 0
	}
	return time.Duration(us) * time.Microsecond
}
