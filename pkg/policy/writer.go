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
	// maxWaiting is how many addresses can wait for the kernel. So many wait only
	// while another program's transaction takes minutes.
	maxWaiting = 1 << 16
	// maxBatch is how many of them share a transaction. This many fit into a
	// socket's default buffer, even with the longest comments on five ports.
	maxBatch = 128
	// patience is how long the writer waits for the kernel's answer before it
	// considers it lost.
	patience = 10 * time.Second
)

var errWaiting = fmt.Errorf("%d addresses already wait for the kernel", maxWaiting)

// grant is an address to trust, because of one login or several.
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

// writer does all writing to the kernel, over one connection. What comes in while
// it writes goes into its next transaction.
type writer struct {
	server *Server

	mu       sync.Mutex
	grants   map[netip.Addr]*grant // by the address as in the sets
	suspects map[netip.Addr]*suspect
	wake     chan struct{} // has an item if something may be waiting

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

// trust queues a grant. Logins from one address that wait at the same time become
// one grant, with the longest of their timeouts and all their users' names.
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

// judge queues an address that may have failed too often.
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

// run writes until the context is done and nothing is waiting.
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

// some writes a part of what is waiting, and reports whether there was any.
// Logins come first, so that an address is not banned while its trust waits.
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

// take removes some of the waiting grants from the queue, all of one configuration
// and family, and returns them.
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

// write adds the grants' addresses to the trusted set.
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
		// One by one: there may be room for some, and others may be in the set.
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

// attempt calls f while w.conn is connected. After an error it closes the
// connection. If it was not a new one, it tries again at once with a new one.
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
