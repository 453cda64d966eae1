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
	// pulse is how often Alive is called at least.
	pulse = 5 * time.Second
)

// statusRequest asks for the counters, in a protocol of our own.
const statusRequest = "VERSION\tnftwl-status\t1\t0\n"

// Server answers the requests. Its fields are set before Serve is called.
//
// Until SetConfig is called it lets every user in, and trusts none.
type Server struct {
	// Owner is the user, besides root, whose processes may ask: the one that
	// owns the socket.
	Owner uint32
	// Problem is told what goes wrong, and under which of a few words it is
	// counted. It must not block for long.
	Problem func(reason string, err error)
	// Trusted is told what became of every grant; nil where nobody cares.
	Trusted func(*trust.Grant, nftset.Outcome)
	// Alive is called before the first request, and every few seconds while
	// requests are taken; nil where nobody cares.
	Alive func()

	config  atomic.Pointer[config.Config]
	counter counter
	writer  *writer
}

// SetConfig has the next logins follow another configuration.
func (s *Server) SetConfig(c *config.Config) { s.config.Store(c) }

// Stats returns what has been counted since Serve was called.
func (s *Server) Stats() Stats { return s.counter.stats() }

// defect is a panic.
type defect struct{ value any }

func (d defect) Error() string { return fmt.Sprintf("a defect of nftwl's: %v", d.value) }

// Serve answers what comes in on the socket until the context is done, finishes
// what it has begun, and returns nil. It does not close the socket, in which
// requests can wait for another server. A Server serves once.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	s.counter.start()
	s.writer = newWriter(s.finished)
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
	past := time.Unix(1, 0)
	defer context.AfterFunc(ctx, func() { _ = l.SetDeadline(past) })() // an error is Accept's, too
	var handlers sync.WaitGroup
	defer handlers.Wait()
	places := make(chan struct{}, maxConns)
	var alive time.Time
	for {
		if s.Alive != nil && time.Since(alive) >= pulse {
			s.Alive()
			alive = time.Now()
		}
		if err := l.SetDeadline(time.Now().Add(pulse)); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		conn, err := l.AcceptUnix()
		switch {
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
		places <- struct{}{}
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
		s.trust(request)
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
func (s *Server) trust(r postlogin.Request) {
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
	wait := time.NewTimer(c.Deadline)
	defer wait.Stop()
	select {
	case <-j.done:
	case <-wait.C:
		s.counter.late()
		s.Problem("late", fmt.Errorf("%s: the login went on after %s without the kernel's answer; it is trusted as soon as the kernel has time", grant.Addr, nftset.FormatTimeout(c.Deadline)))
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
