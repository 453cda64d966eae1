package policy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

const (
	// maxWaiting is how many addresses wait for the kernel at most. Only a
	// transaction of another's that takes minutes makes so many wait.
	maxWaiting = 1 << 16
	// maxBatch is how many of them share a transaction. So many fit a socket's
	// buffer as it comes, even with the longest comments on five ports.
	maxBatch = 128
	// patience is how long the writer waits for the kernel's answer before it
	// takes it for lost.
	patience = 10 * time.Second
)

var errWaiting = fmt.Errorf("%d addresses wait for the kernel already", maxWaiting)

// grant is an address that one login or several want trusted.
type grant struct {
	config *config.Config
	grant  *trust.Grant
	since  time.Time // of the first login
}

// suspect is an address that may have failed too often.
type suspect struct {
	config *config.Config
	login  string
}

// writer is the one that writes to the kernel, over one connection. What comes
// in while it writes goes into its next transaction.
type writer struct {
	server *Server

	mu       sync.Mutex
	grants   map[netip.Addr]*grant // by the address as it stands in the sets
	suspects map[netip.Addr]*suspect
	wake     chan struct{} // has an item while something may be waiting

	conn *nftset.Conn // nil until dialled
}

func newWriter(s *Server) *writer {
	return &writer{
		server:   s,
		grants:   make(map[netip.Addr]*grant),
		suspects: make(map[netip.Addr]*suspect),
		wake:     make(chan struct{}, 1),
	}
}

// trust hands a grant over to be written. Logins from one address that wait
// together are one grant, for the longest of their timeouts and with all their
// users' names.
func (w *writer) trust(c *config.Config, g *trust.Grant) {
	w.mu.Lock()
	defer w.mu.Unlock()
	old := w.grants[g.Addr]
	switch {
	case old == nil && len(w.grants) == maxWaiting:
		w.server.problem("busy", fmt.Errorf("%s is not trusted: %w", g.Addr, errWaiting))
		return
	case old == nil:
		w.grants[g.Addr] = &grant{c, g, time.Now()}
	default:
		both := *g
		both.Timeout = max(g.Timeout, old.grant.Timeout)
		both.Comment = trust.AddName(old.grant.Comment, g.Comment)
		old.config, old.grant = c, &both
	}
	w.awake()
}

// judge hands over an address that may have failed too often.
func (w *writer) judge(c *config.Config, addr netip.Addr, login string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.suspects[addr] == nil && len(w.suspects) == maxWaiting {
		w.server.problem("busy", fmt.Errorf("%s is not banned: %w", addr, errWaiting))
		return
	}
	w.suspects[addr] = &suspect{c, login}
	w.awake()
}

func (w *writer) awake() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// run writes until the context is done and nothing waits any more.
func (w *writer) run(ctx context.Context) {
	for stopping := false; !stopping; {
		select {
		case <-w.wake:
		case <-ctx.Done():
			stopping = true
		}
		for w.some() {
		}
	}
	if w.conn != nil {
		w.conn.Close()
		w.conn = nil
	}
}

// some writes some of what waits: logins first, so that nobody is banned whose
// trust is on its way. It reports whether there was any.
func (w *writer) some() bool {
	if grants := w.take(); len(grants) > 0 {
		w.write(grants)
		return true
	}
	w.mu.Lock()
	var addr netip.Addr
	var s *suspect
	for addr, s = range w.suspects {
		delete(w.suspects, addr)
		break
	}
	w.mu.Unlock()
	if s == nil {
		return false
	}
	err := w.attempt(func() error { return w.server.judge(w.conn, s.config, addr, s.login) })
	if err != nil {
		w.server.problem(reason(err), fmt.Errorf("%s is not banned: %w", addr, err))
	}
	return true
}

// take returns some of the grants that wait, of one configuration and family.
func (w *writer) take() (some []*grant) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for addr, g := range w.grants {
		if len(some) > 0 && (g.config != some[0].config || addr.Is4() != some[0].grant.Addr.Is4()) {
			continue
		}
		some = append(some, g)
		delete(w.grants, addr)
		if len(some) == maxBatch {
			break
		}
	}
	return some
}

// write has the addresses of grants trusted.
func (w *writer) write(some []*grant) {
	grants := make([]*trust.Grant, len(some))
	for i, g := range some {
		grants[i] = g.grant
	}
	var outcomes []nftset.Outcome
	err := w.attempt(func() (err error) {
		outcomes, err = trust.Apply(w.conn, some[0].config, grants...)
		return err
	})
	if errors.Is(err, nftset.ErrFull) && len(some) > 1 {
		// Some of them may find room, or need none.
		for i := range some {
			w.write(some[i : i+1])
		}
		return
	}
	for i, g := range some {
		if err != nil {
			w.server.problem(reason(err), fmt.Errorf("%s is not trusted: %w", g.grant.Addr, err))
			continue
		}
		w.server.metrics.trust(outcomes[i], time.Since(g.since) > g.config.Deadline)
		w.server.Trusted(g.grant, outcomes[i])
	}
}

// attempt calls f with the lasting connection. After an error it starts with a
// new one, and tries again at once where it was the old one that failed.
func (w *writer) attempt(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = internalError{p}
		}
	}()
	for {
		old := w.conn != nil
		if !old {
			if w.conn, err = nftset.Dial(); err != nil {
				return err
			}
		}
		w.conn.SetDeadline(time.Now().Add(patience))
		if err = f(); err == nil {
			return nil
		}
		w.conn.Close()
		w.conn = nil
		if !old || errors.Is(err, nftset.ErrDeadline) {
			return err
		}
	}
}
