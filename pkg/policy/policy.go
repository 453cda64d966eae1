// Package policy learns of logins and failures from Dovecot's auth policy
// reports: a success trusts the client's address, many different failures ban
// it. No login waits for its report, so nothing here can delay or deny a login,
// with one exception: command=allow, which an administrator can tell Dovecot to
// ask before each login.
package policy

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

// maxBody is more than Dovecot sends: its login processes accept at most 8 KiB
// of user name and password (AUTH_REQUEST_MAX_SIZE in
// src/auth/auth-client-connection.h).
const maxBody = 32 << 10

// HTTPServer returns a server that limits the time and memory that one client
// can take.
func HTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       15 * time.Second, // Dovecot closes after 10 s (http_client_max_idle_time)
		MaxHeaderBytes:    8 << 10,
	}
}

// Server is an http.Handler that answers Dovecot's requests. New makes one; set
// its hooks before you call Run.
type Server struct {
	// Problem is called with each error, and with the word under which the
	// metrics count it. It must not block for long.
	Problem func(reason string, err error)
	// Trusted is called with the outcome of every grant, Banned with every ban.
	Trusted func(*trust.Grant, nftset.Outcome)
	Banned  func(Ban)

	key     atomic.Pointer[[sha256.Size]byte]
	config  atomic.Pointer[config.Config]
	metrics *metrics
	writer  *writer
	checks  chan *nftset.Conn // holds the one connection of allow, or nil until it is dialled

	mu      sync.Mutex
	tracker *Tracker // nil while the configuration has no failures
	changed bool     // since the last Save
}

// Ban is an address that was banned for its failures.
type Ban struct {
	Addr     netip.Addr    // as in the sets
	Timeout  time.Duration // more than 0
	Failures int           // different ones
	Login    string        // the user of the last failure
	Trusted  bool          // whether it was trusted until now
}

// New returns a server with a configuration and a key. It registers its metrics.
func New(c *config.Config, key string, registry prometheus.Registerer) *Server {
	s := &Server{
		Problem: func(string, error) {},
		Trusted: func(*trust.Grant, nftset.Outcome) {},
		Banned:  func(Ban) {},
		checks:  make(chan *nftset.Conn, 1),
	}
	s.checks <- nil
	s.metrics = newMetrics(registry, s)
	s.writer = newWriter(s)
	s.Set(c, key)
	return s
}

// Set replaces the configuration and the key, from the next request on.
func (s *Server) Set(c *config.Config, key string) {
	sum := sha256.Sum256([]byte(key))
	s.key.Store(&sum)
	s.config.Store(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case c.Failures == nil:
		s.tracker = nil
	case s.tracker == nil:
		s.tracker = NewTracker(*c.Failures)
	default:
		s.tracker.SetLimits(*c.Failures)
	}
}

// track calls f with the tracker, if there is one.
func (s *Server) track(f func(*Tracker)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tracker != nil {
		f(s.tracker)
	}
}

// Save writes what the server knows about failures. It writes nothing if nothing
// was reported since the last call, or if the configuration has no failures.
func (s *Server) Save(w io.Writer) (err error) {
	s.track(func(t *Tracker) {
		t.Sweep(now())
		if s.changed {
			err = t.Save(w)
			s.changed = false
		}
	})
	return err
}

// Load reads what Save wrote. On an error, it changes nothing.
func (s *Server) Load(r io.Reader) (err error) {
	s.track(func(t *Tracker) {
		var loaded *Tracker
		if loaded, err = LoadTracker(r, now(), t.limits); err == nil {
			s.tracker = loaded
		}
	})
	return err
}

var began = time.Now()

// now is the time of a clock that nobody can set: a jump of the wall clock must
// not end a ban, or the time in which failures count.
func now() time.Time { return began.Round(0).Add(time.Since(began)) }

// Run writes to the kernel until the context is done and everything that was
// reported is written.
func (s *Server) Run(ctx context.Context) { s.writer.run(ctx) }

// report is what Dovecot tells about an authentication: its default attributes,
// and those that contrib/dovecot/91-nftwl-policy-*.conf adds.
type report struct {
	Login    string `json:"login"`
	Hash     string `json:"pwhash"`
	Remote   string `json:"remote"`
	Local    string `json:"local"`
	Protocol string `json:"protocol"`
	Mech     string `json:"mech"`
	Trust    string `json:"nftwl_trust"`
	Timeout  string `json:"nftwl_timeout"`
	FailType string `json:"fail_type"` // since 2.4
	Proxy    string `json:"proxy"`     // "no" unless this Dovecot passes the login on to another

	Success  bool `json:"success"`
	Rejected bool `json:"policy_reject"` // by our answer to allow
}

// verified reports whether the client must have known a password to succeed. A
// proxy often accepts any password (nopassword) and leaves the check to its
// backend, and the report does not say whether it does. With nftwl_trust=yes the
// administrator confirms that the proxy itself checks passwords.
func (r *report) verified() bool {
	if r.Mech == "ANONYMOUS" {
		return false
	}
	return r.Proxy == "no" || r.Trust == "yes"
}

// attempt returns the user and the password's hash, if the report has a usable
// one.
func (r *report) attempt() Attempt {
	switch r.Mech {
	case "", "PLAIN", "LOGIN":
		return Attempt{r.Login, r.Hash}
	}
	// With the other mechanisms Dovecot hashes no password, and so sends the same
	// hash for all (auth_policy_create_json() in src/auth/auth-policy.c).
	return Attempt{Login: r.Login}
}

// ServeHTTP answers a request from Dovecot.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	refuse := func(status int, reason string, err error) {
		s.metrics.refused.WithLabelValues(reason).Inc()
		s.Problem(reason, fmt.Errorf("refused a request from %s: %w", r.RemoteAddr, err))
		w.Header().Set("Connection", "close")
		http.Error(w, err.Error(), status)
	}
	key := r.Header.Get("X-API-Key")
	sum := sha256.Sum256([]byte(key))
	if subtle.ConstantTimeCompare(sum[:], s.key.Load()[:]) != 1 || key == "" {
		refuse(http.StatusUnauthorized, "key", errors.New("wrong key in X-API-Key"))
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		refuse(http.StatusMethodNotAllowed, "request", errors.New("the method must be POST"))
		return
	}
	body := report{Proxy: "no"} // unless the report has it
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&body); err != nil {
		status := http.StatusBadRequest
		if errors.As(err, new(*http.MaxBytesError)) {
			status = http.StatusRequestEntityTooLarge
		}
		refuse(status, "request", err)
		return
	}
	answer := struct {
		Status int    `json:"status"`
		Msg    string `json:"msg"`
	}{}
	switch command := r.URL.Query().Get("command"); command {
	case "report":
		s.report(&body)
	case "allow":
		if !s.allow(r.Context(), &body) {
			// A status below 0 refuses; more than 0 is a delay in seconds
			// (auth_policy_parse_response() in src/auth/auth-policy.c).
			answer.Status, answer.Msg = -1, "too many failed logins"
		}
	default:
		refuse(http.StatusBadRequest, "request", fmt.Errorf("command %.20q is neither report nor allow", command))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // fails only if the client is gone
}

// report counts an authentication, and hands what must be written to the writer.
// It does not wait for the kernel.
func (s *Server) report(r *report) {
	s.metrics.report(r)
	c := s.config.Load()
	if r.Success {
		s.success(c, r)
		return
	}
	if c.Failures != nil {
		s.metrics.failures.WithLabelValues(string(s.failure(c, r))).Inc()
	}
}

func (s *Server) success(c *config.Config, r *report) {
	grant, err := trust.Decide(c, trust.Login{IP: r.Remote, LocalIP: r.Local, User: r.Login, Trust: r.Trust, Timeout: r.Timeout})
	if err != nil {
		s.problem("login", fmt.Errorf("login of %.60q from %.60q: %w", r.Login, r.Remote, err))
	}
	stolen := false
	if addr, err := trust.ParseAddr(r.Remote); err == nil && r.verified() {
		s.track(func(t *Tracker) {
			t.Success(now(), addr, r.attempt())
			s.changed = true
			stolen = t.Stolen(now(), addr)
		})
	}
	switch {
	case !r.verified():
		s.metrics.ignored.WithLabelValues("unverified").Inc()
	case grant == nil:
		s.metrics.ignored.WithLabelValues("exempt").Inc()
	case stolen:
		s.metrics.ignored.WithLabelValues("stolen").Inc()
	default:
		s.writer.trust(c, grant)
	}
}

// Outcomes of a failure that the Tracker does not see.
const (
	internal Outcome = "internal" // the password database failed, not the user
	rejected Outcome = "rejected" // by our own answer to allow
	exempt   Outcome = "exempt"   // the address is never banned
)

// failure counts a failed login, and has the writer judge its address.
func (s *Server) failure(c *config.Config, r *report) Outcome {
	switch {
	case r.Rejected, r.FailType == "policy":
		return rejected
	case r.FailType == "internal":
		return internal
	}
	addr, err := trust.ParseAddr(r.Remote)
	if err != nil || trust.RefuseBan(c, addr) != nil {
		return exempt // or no address, which is a client on a Unix socket
	}
	// A ban of the client's network must not include this server.
	if local, err := trust.ParseAddr(r.Local); err == nil && trust.NetworkOf(addr, c.IPv6Prefix).Contains(local) {
		return exempt
	}
	outcome := exempt // if a new configuration has just removed the tracker
	s.track(func(t *Tracker) {
		outcome = t.Failure(now(), addr, r.attempt())
		s.changed = true
		if outcome != Right && t.Judge(now(), addr).Ban > 0 {
			s.writer.judge(c, addr, r.Login)
		}
	})
	return outcome
}

// judge bans an address, if its failures still call for it. Only the writer calls
// it.
func (s *Server) judge(conn *nftset.Conn, c *config.Config, addr netip.Addr, login string) error {
	var v Verdict
	s.track(func(t *Tracker) { v = t.Judge(now(), addr) })
	if v.Ban == 0 {
		return nil
	}
	trusted, err := conn.Set(c.Table, c.Trusted.For(addr))
	if err != nil {
		return err
	}
	network := trust.Network(c, addr)
	keys := trust.Keys(trusted, network, c.Ports)
	there, err := conn.Lookup(trusted, keys...)
	if err != nil {
		return err
	}
	if len(there) > 0 && !v.Stolen {
		s.metrics.spared.Inc()
		return nil
	}
	banned, err := conn.Set(c.Table, c.Banned.For(addr))
	if err != nil {
		return err
	}
	ban := nftset.Element{Timeout: v.Ban}
	if c.Comment {
		ban.Comment = "nftwld"
	}
	if _, err := conn.Extend(banned, trust.Elements(banned, network, c.Ports, ban), 0, nil); err != nil {
		return err
	}
	if len(there) > 0 {
		if _, err := conn.Remove(trusted, keys, nil); err != nil {
			return err
		}
	}
	s.track(func(t *Tracker) {
		t.Ban(now(), addr, v)
		s.changed = true
	})
	kind := "stranger"
	if len(there) > 0 {
		kind = "trusted"
	}
	s.metrics.banned.WithLabelValues(kind).Inc()
	s.Banned(Ban{network, v.Ban, v.Failures, login, len(there) > 0})
	return nil
}

// allow reports whether an address may try a password. It refuses an address that
// is banned and not trusted, and allows every other. If anything fails, it allows.
func (s *Server) allow(ctx context.Context, r *report) bool {
	c := s.config.Load()
	refused, err := s.refuses(ctx, c, r)
	if err != nil {
		s.problem(reason(err), fmt.Errorf("allow from %.60q: %w", r.Remote, err))
	}
	answer := "accepted"
	if refused {
		answer = "refused"
	}
	s.metrics.allowed.WithLabelValues(answer).Inc()
	return !refused
}

func (s *Server) refuses(ctx context.Context, c *config.Config, r *report) (refused bool, err error) {
	defer func() {
		if p := recover(); p != nil {
			refused, err = false, internalError{p}
		}
	}()
	addr, err := trust.ParseAddr(r.Remote)
	if err != nil || trust.Refuse(c, addr) != nil {
		return false, nil
	}
	deadline := time.Now().Add(c.Deadline)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	var conn *nftset.Conn
	select {
	case conn = <-s.checks:
	case <-ctx.Done():
		return false, errors.New("the kernel has not answered others yet")
	}
	defer func() {
		if err != nil && conn != nil {
			conn.Close()
			conn = nil
		}
		s.checks <- conn
	}()
	if conn == nil {
		if conn, err = nftset.Dial(); err != nil {
			return false, err
		}
	}
	conn.SetDeadline(deadline)
	in := func(names config.Names, bits int) (bool, error) {
		set, err := conn.Set(c.Table, names.For(addr))
		if err != nil {
			return false, err
		}
		there, err := conn.Lookup(set, trust.LookupKeys(set, addr, bits, c.Ports)...)
		return len(there) > 0, err
	}
	if banned, err := in(c.Banned, trust.BanPrefix(c)); err != nil || !banned {
		return false, err
	}
	trusted, err := in(c.Trusted, c.IPv6Prefix)
	return !trusted && err == nil, err
}

// problem counts an error, and passes it to the hook.
func (s *Server) problem(reason string, err error) {
	s.metrics.errors.WithLabelValues(reason).Inc()
	s.Problem(reason, err)
}

// internalError is the value of a panic.
type internalError struct{ value any }

func (e internalError) Error() string { return fmt.Sprintf("internal error: %v", e.value) }

// reason is the word under which an error is counted.
func reason(err error) string {
	var e *nftset.Error
	switch {
	case errors.As(err, new(internalError)):
		return "internal"
	case errors.Is(err, errWaiting):
		return "busy"
	case !errors.As(err, &e):
		return "kernel"
	}
	switch e.Err {
	case nftset.ErrNoTable, nftset.ErrNoSet:
		return "missing"
	case nftset.ErrUnfit:
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
