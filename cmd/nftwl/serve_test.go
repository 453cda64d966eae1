package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// startServe runs a command that becomes nftwl serve, listening on s.sock in
// its folder, and returns when it listens. end sends it a signal, and returns
// what it wrote to stderr, unless that is the command's own.
func startServe(t *testing.T, cmd *exec.Cmd) (end func(syscall.Signal) string) {
	t.Helper()
	var stderr bytes.Buffer
	if cmd.Stderr == nil {
		cmd.Stderr = &stderr
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		conn, err := net.Dial("unix", filepath.Join(cmd.Dir, "s.sock"))
		if err == nil {
			conn.Close()
			break
		}
		if time.Now().After(end) {
			_ = cmd.Process.Kill() // unless it has ended by itself
			_ = cmd.Wait()
			t.Fatalf("nftwl serve does not listen: %v\n%s", err, stderr.String())
		}
	}
	return func(signal syscall.Signal) string {
		t.Helper()
		if err := cmd.Process.Signal(signal); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil && signal != unix.SIGKILL {
			t.Errorf("nftwl serve: %v", err)
		}
		return stderr.String()
	}
}

// escape is str_tabescape() of Dovecot's src/lib/strescape.c.
var escape = strings.NewReplacer("\x00", "\x010", "\x01", "\x011", "\t", "\x01t", "\r", "\x01r", "\n", "\x01n")

// request is what Dovecot asks after a login.
func request(localIP, ip, user string, fields ...string) string {
	line := escape.Replace(localIP) + "\t" + escape.Replace(ip) + "\t" + escape.Replace(user)
	for _, f := range fields {
		line += "\t" + escape.Replace(f)
	}
	return "VERSION\tscript-login\t1\t0\n" + line + "\n"
}

// ask makes a request, and returns the answer.
func ask(t *testing.T, socket, localIP, ip, user string, fields ...string) string {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, request(localIP, ip, user, fields...)); err != nil {
		t.Error(err)
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		t.Errorf("no answer: %v", err)
	}
	return answer
}

// Without a free descriptor the requests wait in the socket, and none is lost.
func TestServeOutOfDescriptors(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, sets)
	nstest.Need(t, "prlimit", "util-linux")
	// Its own are 7 or so.
	const descriptors = 20
	cmd := exec.Command("prlimit", fmt.Sprintf("--nofile=%d:%[1]d", descriptors),
		nstest.Build(t, "cmd/nftwl"), "serve", "--listen", "s.sock")
	cmd.Dir, cmd.Env = t.TempDir(), []string{}
	log, err := os.Create(filepath.Join(cmd.Dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	said := func() string {
		b, err := os.ReadFile(log.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	end := startServe(t, cmd)
	socket := filepath.Join(cmd.Dir, "s.sock")
	var idle []net.Conn
	for range descriptors {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		idle = append(idle, conn)
	}
	answered := make(chan string)
	go func() { answered <- ask(t, socket, "", client, "alice") }()
	for end := time.Now().Add(limit); said() == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it says nothing")
		}
	}
	for _, conn := range idle {
		conn.Close()
	}
	if got := <-answered; got != "alice\n" {
		t.Errorf("%q", got)
	}
	// It says so once, and once more at the end, however often accept failed.
	end(unix.SIGTERM)
	lines := strings.Split(strings.TrimSuffix(said(), "\n"), "\n")
	for _, line := range lines {
		if !strings.HasPrefix(line, "nftwl: error: requests wait: accept4: too many open files") {
			t.Errorf("stderr %q", line)
		}
	}
	if len(lines) > 2 {
		t.Errorf("stderr %q", lines)
	}
	if now := trustedNow(t, "trusted_ipv4"); strings.Count(now, " expires ") != 5 {
		t.Errorf("trusts\n%s", now)
	}
}
