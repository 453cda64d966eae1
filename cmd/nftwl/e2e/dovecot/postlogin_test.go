package dovecot

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A postLogin asks on a post-login socket what a mail process asks after a
// login. It may be used by any goroutine.
type postLogin struct {
	path   string
	client *os.File // attached to each request, as the client's socket is
}

// postLogin returns one for a socket, at a path as Dovecot sees it.
func (s *server) postLogin(socket string) *postLogin {
	s.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(s.t, err)
	unix.Close(fds[1])
	p := &postLogin{s.elsewhere(socket), os.NewFile(uintptr(fds[0]), "client")}
	s.t.Cleanup(func() { p.client.Close() })
	return p
}

// elsewhere is a path that leads from every thread, and so from another mount
// namespace, to a file that Dovecot sees.
func (s *server) elsewhere(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", s.cmd.Process.Pid, path)
}

// errNoAnswer is what Dovecot takes for a no to the login.
var errNoAnswer = errors.New("no answer")

// request is a login's as Dovecot sends it, but for the descriptor.
func request(address, user string) string {
	return "VERSION\tscript-login\t1\t0\n" + server4 + "\t" + address + "\t" + user + "\tuid=1000\tgid=1000\n"
}

// ask sends a request and returns all that comes back. While nobody listens it
// tries again, for as long as Dovecot does (net_connect_unix_with_retries in
// its src/lib/net.c).
func (p *postLogin) ask(request string) (string, error) {
	var conn *net.UnixConn
	var err error
	for start := time.Now(); ; {
		conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: p.path, Net: "unix"})
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ECONNREFUSED) {
			break
		}
		time.Sleep(time.Duration(1+rand.IntN(10)) * 10 * time.Millisecond)
		if time.Since(start) >= time.Second {
			break
		}
	}
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, _, err := conn.WriteMsgUnix([]byte(request), unix.UnixRights(int(p.client.Fd())), nil); err != nil {
		return "", fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	// Dovecot reads until the line is whole.
	answer := make([]byte, 0, 4<<10)
	for len(answer) == 0 || answer[len(answer)-1] != '\n' {
		if len(answer) == cap(answer) {
			answer = append(answer, 0)[:len(answer)]
		}
		n, err := conn.Read(answer[len(answer):cap(answer)])
		answer = answer[:len(answer)+n]
		if err != nil {
			return string(answer), fmt.Errorf("%w: %w", errNoAnswer, err)
		}
	}
	return string(answer), nil
}

// ok asks and wants the answer that lets the user in: the request from the user on.
func (p *postLogin) ok(address, user string) error {
	r := request(address, user)
	answer, err := p.ask(r)
	if want := r[strings.Index(r, user+"\tuid="):]; err == nil && answer != want {
		err = fmt.Errorf("the answer is %q, want %q", answer, want)
	}
	return err
}

// An exchange is what one login's mail process and post-login service said.
type exchange struct {
	uid             int // of the mail process, as the service sees it
	request, answer string
}

// A recorder sits between Dovecot's mail processes and a post-login socket.
type recorder struct {
	path string // of its own socket
	mu   sync.Mutex
	seen []exchange
}

// record makes a recorder in front of a socket.
func (s *server) record(name, socket string) *recorder {
	s.t.Helper()
	r := &recorder{path: filepath.Join(dir, name)}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.path, Net: "unix"})
	must(s.t, err)
	s.t.Cleanup(func() { l.Close() })
	must(s.t, os.Chmod(r.path, 0o666))
	target := s.elsewhere(socket)
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return // the test is over
			}
			go func() {
				defer conn.Close()
				if err := r.pass(conn, target); err != nil {
					s.t.Errorf("recorder: %v", err)
				}
			}()
		}
	}()
	return r
}

// pass hands a request and its answer on, each of which is one message.
func (r *recorder) pass(conn *net.UnixConn, target string) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	if e := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); e != nil || err != nil {
		return errors.Join(e, err)
	}
	to, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: target, Net: "unix"})
	if err != nil {
		return err
	}
	defer to.Close()
	asked, err := passOne(conn, to)
	if err != nil {
		return err
	}
	answered, err := passOne(to, conn)
	if err != nil && err != io.EOF { // which is a no
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, exchange{int(peer.Uid), asked, answered})
	return nil
}

// passOne hands on a message, with the descriptor that may be attached to it.
func passOne(from, to *net.UnixConn) (string, error) {
	b, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := from.ReadMsgUnix(b, oob)
	if err != nil {
		return "", err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return "", err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return "", err
		}
		for _, fd := range fds {
			defer unix.Close(fd)
		}
	}
	_, _, err = to.WriteMsgUnix(b[:n], oob[:oobn], nil)
	return string(b[:n]), err
}

// take returns what has been recorded since the last take, and waits for so
// many.
func (r *recorder) take(t *testing.T, count int) []exchange {
	t.Helper()
	var seen []exchange
	poll(t, fmt.Sprintf("%d requests", count), func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.seen) < count {
			return false
		}
		seen, r.seen = r.seen, nil
		return true
	})
	return seen
}
