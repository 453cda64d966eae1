// Package resident answers Dovecot's post-login requests on a socket, and
// trusts whom `nftwl login` would trust: the same decisions without a process
// per login.
package resident

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/postlogin"
	"nftwl/pkg/trust"
)

const (
	// maxConns is how many requests are in hand at once. Further ones wait in
	// the socket. It is the process_limit of Dovecot's mail services.
	maxConns = 1024
	// requestTimeout is how long a request may take to come in, as in
	// script-login (SCRIPT_LOGIN_READ_TIMEOUT_SECS), and an answer to go out.
	requestTimeout = 10 * time.Second
	// grace is what it takes when the server is to stop.
	grace = time.Second
)

// statusRequest asks for the counters, in a protocol of our own.
const statusRequest = "VERSION\tnftwl-status\t1\t0\n"

// Server answers the requests. New makes one, whose fields are set before Serve
// is called.
//
// Until SetConfig is called it lets every user in, and trusts none.
type Server struct {
	// Owner is the user, besides root, whose processes may ask: the one that
	// owns the socket.
	Owner uint32
	// OwnSocket says that no other server will answer what waits in the socket
	// when this one ends.
	OwnSocket bool
	// Problem is told what goes wrong, and under which of a few words it is
	// counted. It must not block for long.
	Problem func(reason string, err error)
	// Trusted is told what became of every grant; nil where nobody cares.
	Trusted func(*trust.Grant, nftset.Outcome)
	// Alive is called every so often while requests are taken, and before the
	// first; nil where nobody cares.
	Alive func()
	Pulse time.Duration // of Alive; more than 0 where that is not nil

	config  atomic.Pointer[config.Config]
	counter counter
	writer  *writer
}

// New returns a server that has counted nothing yet.
func New() *Server {
	s := &Server{}
	s.counter.start()
	s.writer = newWriter(s.finished)
	return s
}

// SetConfig has the next logins follow another configuration.
func (s *Server) SetConfig(c *config.Config) { s.config.Store(c) }

// Stats returns what has been counted since New.
func (s *Server) Stats() Stats { return s.counter.stats() }

// defect is a panic.
type defect struct{ value any }

func (d defect) Error() string { return fmt.Sprintf("a defect of nftwl's: %v", d.value) }

// Serve answers what comes in on the socket until the context is done, finishes
// what it has begun, and returns nil. It does not close the socket, in which
// requests can wait for another server. A Server serves once.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	if s.Alive == nil {
		s.Alive, s.Pulse = func() {}, time.Hour
	}
	// Before the descriptors can run out. An error is that of the first login.
	s.writer.conn, _ = nftset.Dial()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		s.writer.run(stop)
		close(stopped)
	}()

	err := s.accept(ctx, l)

	// The writer may be in a system call that waits for a transaction of
	// another's. Nobody waits for it any more, and its end is not ours to
	// wait for.
	close(stop)
	select {
	case <-stopped:
	case <-time.After(patience):
	}
	return err
}

// accept returns when the context is done and every request answered.
func (s *Server) accept(ctx context.Context, l *net.UnixListener) error {
	woken := make(chan struct{})
	defer context.AfterFunc(ctx, func() {
		_ = l.SetDeadline(time.Unix(1, 0)) // an error is Accept's, too
		close(woken)
	})()
	var handlers sync.WaitGroup
	defer handlers.Wait()
	places := make(chan struct{}, maxConns)
	var next time.Time // when Alive is due
	closed := false    // to further requests
	for {
		if now := time.Now(); !now.Before(next) {
			s.Alive()
			next = now.Add(s.Pulse)
		}
		// A place first: what is not accepted waits in the socket.
		select {
		case places <- struct{}{}:
		case <-time.After(time.Until(next)):
			continue
		}
		if err := l.SetDeadline(next); err != nil {
			return err
		}
		if ctx.Err() != nil {
			if !s.OwnSocket {
				return nil
			}
			// The end of the socket would deny the logins that wait in it. From
			// here on connect fails with ECONNREFUSED, upon which Dovecot tries
			// again (unix_stream_connect() in net/unix/af_unix.c), and who has
			// connected is there to be accepted.
			if !closed {
				closed = true
				<-woken
				if err := shutdown(l); err != nil {
					return err
				}
			}
			if err := l.SetDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
				return err
			}
		}
		conn, err := l.AcceptUnix()
		if err != nil {
			<-places
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && closed:
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
			// The requests stay in the socket until there is room again.
			var op *net.OpError
			if errors.As(err, &op) {
				err = op.Err // it names the socket as it was made
			}
			s.Problem("accept", fmt.Errorf("requests wait: %w", err))
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Millisecond):
			}
			continue
		case err != nil:
			return err
		}
		handlers.Add(1)
		go func() {
			defer handlers.Done()
			defer func() {
				if p := recover(); p != nil {
					s.refuse("defect", defect{p})
				}
				<-places
			}()
			s.handle(ctx, conn)
		}()
	}
}

// shutdown closes a socket to those who would connect.
func shutdown(l *net.UnixListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	if e := raw.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_RD) }); e != nil {
		return e
	}
	return err
}

// handle answers the requests of one connection, of which Dovecot makes one a
// login. To return without an answer denies the login: only who may not ask,
// or asks what is no login, is sent away so.
//
// The client's descriptor, which comes with the request, is never taken: the
// kernel closes what is attached to bytes that are read without asking for it
// (scm_recv() in net/core/scm.c).
func (s *Server) handle(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	if err := s.admit(conn); err != nil {
		s.refuse("peer", err)
		return
	}
	if err := conn.SetReadDeadline(time.Now().Add(requestTimeout)); err != nil {
		s.refuse("connection", err)
		return
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Now().Add(grace)) })()
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 0, 2<<10), postlogin.MaxLine)
	lines.Split(postlogin.ScanLines)

	if !lines.Scan() {
		if err := lines.Err(); err != nil { // or somebody only looked whether anyone is here
			s.refuse("request", incomplete(err))
		}
		return
	}
	if string(lines.Bytes()) == statusRequest {
		s.write(conn, s.counter.json())
		return
	}
	if err := postlogin.CheckVersion(lines.Bytes()); err != nil {
		s.refuse("request", err)
		return
	}
	asked := false
	for lines.Scan() {
		asked = true
		start := time.Now()
		request, err := postlogin.Parse(lines.Bytes())
		if err != nil {
			s.refuse("request", err)
			return
		}
		s.trust(ctx, request)
		if !s.write(conn, request.Answer) {
			return
		}
		s.counter.answered(time.Since(start))
	}
	err := lines.Err()
	switch {
	case err == nil && !asked:
		err = io.ErrUnexpectedEOF
	case err == nil, asked && errors.Is(err, os.ErrDeadlineExceeded), asked && errors.Is(err, unix.ECONNRESET):
		return // it has its answers
	}
	s.refuse("request", incomplete(err))
}

// admit looks who asks.
func (s *Server) admit(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	if e := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); e != nil {
		return e
	}
	if err != nil {
		return err
	}
	if peer.Uid != 0 && peer.Uid != s.Owner {
		return fmt.Errorf("process %d of user %d is neither root's nor user %d's, who owns the socket", peer.Pid, peer.Uid, s.Owner)
	}
	return nil
}

func incomplete(err error) error {
	switch {
	case errors.Is(err, bufio.ErrTooLong):
		return fmt.Errorf("a line of more than %d bytes", postlogin.MaxLine)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("the request did not come in")
	}
	return fmt.Errorf("an incomplete request: %w", err)
}

// write reports whether it went out.
func (s *Server) write(conn *net.UnixConn, b []byte) bool {
	err := conn.SetWriteDeadline(time.Now().Add(requestTimeout))
	if err == nil {
		_, err = conn.Write(b)
	}
	if err != nil {
		s.refuse("connection", fmt.Errorf("an answer: %w", err))
	}
	return err == nil
}

func (s *Server) refuse(reason string, err error) {
	s.counter.refused(reason)
	s.Problem(reason, fmt.Errorf("refused: %w", err))
}

// trust has the client of a login trusted, and returns when it is, or when the
// login has waited for as long as it may. Whatever happens in it, the login
// is answered.
func (s *Server) trust(ctx context.Context, r postlogin.Request) {
	failed := func(reason string, err error) {
		s.counter.failed(reason, 1)
		s.Problem(reason, err)
	}
	defer func() {
		if p := recover(); p != nil {
			failed("defect", defect{p})
		}
	}()
	c := s.config.Load()
	if c == nil {
		failed("config", errors.New("nobody is trusted until the configuration is mended and read again"))
		return
	}
	grant, err := trust.Decide(c, trust.Login{
		IP:      r.IP,
		LocalIP: r.LocalIP,
		User:    r.User,
		Trust:   r.Field("nftwl_trust"),
		Timeout: r.Field("nftwl_timeout"),
	})
	if err != nil {
		err = fmt.Errorf("login of %.60q: %w", r.User, err)
	}
	switch {
	case err != nil && grant == nil:
		failed("login", err)
		return
	case err != nil:
		s.Problem("login", err)
	case grant == nil:
		s.counter.ignored()
		return
	}
	j, err := s.writer.submit(c, grant)
	if err != nil {
		failed("busy", fmt.Errorf("%s is not trusted: %w", grant.Addr, err))
		return
	}
	start := time.Now()
	wait := time.NewTimer(c.Deadline)
	defer wait.Stop()
	// Nor does the end of the server wait for longer than it must.
	defer context.AfterFunc(ctx, func() { wait.Reset(min(c.Deadline-time.Since(start), grace)) })()
	select {
	case <-j.done:
	case <-wait.C:
		s.counter.late()
		s.Problem("late", fmt.Errorf("%s: the login went on without the kernel's answer; it is trusted as soon as the kernel has time", grant.Addr))
	}
}

// finished takes note of a job's end.
func (s *Server) finished(j *job) {
	if j.err != nil {
		s.counter.failed(reason(j.err), j.logins)
		s.Problem(reason(j.err), fmt.Errorf("%s is not trusted: %w", j.grant.Addr, j.err))
		return
	}
	s.counter.trusted(j.outcome, j.logins)
	if s.Trusted != nil {
		s.Trusted(j.grant, j.outcome)
	}
}

// reason is the word under which an error is counted.
func reason(err error) string {
	var e *nftset.Error
	switch {
	case errors.As(err, new(defect)):
		return "defect"
	case !errors.As(err, &e):
		return "kernel"
	}
	switch e.Err {
	case nftset.ErrNoTable, nftset.ErrNoSet:
		return "missing"
	case nftset.ErrKeyType, nftset.ErrInterval, nftset.ErrMap, nftset.ErrNoTimeout, nftset.ErrConstant:
		return "type"
	case nftset.ErrFull:
		return "full"
	case nftset.ErrPermission:
		return "permission"
	case nftset.ErrDeadline:
		return "deadline"
	}
	return "kernel"
}

// Ask returns what the server on a socket has counted.
func Ask(path string) (Stats, error) {
	var stats Stats
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return stats, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(requestTimeout)); err != nil {
		return stats, err
	}
	if _, err := io.WriteString(conn, statusRequest); err != nil {
		return stats, err
	}
	err = json.NewDecoder(conn).Decode(&stats)
	if err == io.EOF {
		err = errors.New("it was not answered; the server's log says why")
	}
	return stats, err
}
