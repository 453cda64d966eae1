package cluster

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"nftwl/pkg/trust"
)

// mergeSoon has the whole list read.
func (n *Node) mergeSoon(s *share) {
	if s.merge.IsZero() {
		s.merge = time.Now().Add(rand.N(jitter))
	}
}

// entry takes an entry of a list's log.
func (n *Node) entry(e entry) {
	i := slices.IndexFunc(n.shares, func(s *share) bool { return s.list == e.list })
	if i < 0 {
		return
	}
	s := n.shares[i]
	if !laterID(e.id, s.id) {
		return // a merge has brought it already
	}
	if e.epoch != s.epoch && s.epoch != "" || e.sequence != s.sequence+1 {
		n.mergeSoon(s)
	}
	old := e.epoch == s.epoch && e.sequence <= s.known
	s.position = e.position
	if e.cleared != 0 {
		s.cleared = e.cleared
		s.merge = time.Now()
		return
	}
	n.metrics.lag.Set(max(0, float64(n.now()-millisecondsOf(e.id))/1000))
	var addrs []netip.Addr
	for name, value := range e.records {
		f, changed := n.learn(s, name, value, old)
		if changed { // its own is known, unless the engine's answer was lost
			addrs = append(addrs, f.Addr())
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, addr := range addrs {
		if len(s.changed) >= maxWaiting {
			n.overrun = true // all are looked at, then
			return
		}
		s.note(addr)
	}
}

// learn takes a record of the engine's, and returns the field for which it stands
// here, and whether that is news. An old one can be older than what is known.
func (n *Node) learn(s *share, name, value string, old bool) (field, bool) {
	f, err := parseField(name)
	var r record
	if err == nil {
		r, err = parseRecord(value)
	}
	if err != nil {
		n.metrics.refused.WithLabelValues("malformed").Inc()
		n.Problem("record", fmt.Errorf("a record about %s is refused: %w", trust.Quote(name), err))
		return f, false
	}
	v := n.view(s)
	here, ok := v.here(f)
	if !ok {
		n.metrics.refused.WithLabelValues("network").Inc()
		return f, false
	}
	if f.port != 0 && !slices.Contains(n.config.Ports, f.port) {
		if len(s.ports) == maxPorts && !s.ports[f.port] {
			n.metrics.refused.WithLabelValues("ports").Inc()
			return f, false
		}
		s.ports[f.port] = true
	}
	if reason := v.refuses(here); reason != "" && !r.removed && !strings.HasSuffix(r.comment, "@"+n.node) {
		n.metrics.refused.WithLabelValues(reason).Inc()
	}
	r = s.with(here, r, old || here != f)
	changed := s.records[here] != r
	s.records[here] = r
	return here, changed
}

// laterID reports whether an entry's id is later than another.
func laterID(a, b string) bool {
	a1, a2, _ := strings.Cut(a, "-")
	b1, b2, _ := strings.Cut(b, "-")
	return longerOrGreater(a1, b1) || a1 == b1 && longerOrGreater(a2, b2)
}

// longerOrGreater compares decimal numbers.
func longerOrGreater(a, b string) bool { return len(a) > len(b) || len(a) == len(b) && a > b }

// readAll reads the whole list.
func (n *Node) readAll(ctx context.Context, s *share) error {
	p, cleared, err := n.engine.end(ctx, s.list)
	if err != nil {
		return err
	}
	if err := n.tick(ctx); err != nil {
		return err
	}
	// No set tells of a removal, what it left of a ban, or when a permanent element was
	// added.
	removals, added := make(map[field]record), make(map[field]record)
	for f, r := range s.records {
		if r.alive(n.now()) && !r.removed && (r.until == 0 || r.removal > 0) && r.since > cleared {
			added[f] = r
		}
		every := f
		every.port = 0
		all := s.records[every]
		r = r.lastRemoval()
		if r.alive(n.now()) && r.since > cleared && (f == every || all.removed || all.since <= r.since) {
			removals[f] = r
		}
	}
	clear(s.records)
	clear(s.ports)
	var dead []string
	err = n.engine.all(ctx, s.list, func(name, value string) {
		f, ok := n.learn(s, name, value, true)
		if _, counts := s.records[f].at(n.now()); ok && !counts {
			delete(s.records, f)
			dead = append(dead, name)
		}
	})
	lost := append(s.keep(removals), s.keep(added)...)
	if err != nil {
		return err
	}
	if s.send {
		for some := range slices.Chunk(lost, atOnce) {
			replies, _, err := n.engine.send(ctx, s.list, some, n.now())
			if err != nil {
				return err
			}
			n.sent(s, some, replies)
		}
	}
	last, _, err := n.engine.meta(ctx, s.list)
	if err != nil {
		return err
	}
	s.position, s.cleared, s.behind, s.known = p, cleared, false, last.sequence
	n.metrics.merges.Inc()
	if s.send {
		for some := range slices.Chunk(dead, page) {
			if err := n.engine.sweep(ctx, s.list, some); err != nil {
				return err
			}
		}
	}
	return nil
}

// keep adds what was known to the records, and returns what the engine has lost: it
// counts against what the other machines still have.
func (s *share) keep(known map[field]record) (lost []change) {
	for f, r := range known {
		every := f
		every.port = 0
		if last := s.records[every].lastRemoval().since; !r.removed && last > 0 && r.since <= last {
			continue
		}
		after := r
		if there, ok := s.records[f]; ok {
			after = merge(there, r)
			if after == there || !r.removed && !there.removed && !after.outlasts(there) {
				continue
			}
		}
		s.records[f] = after
		if r.removed && r.whole > 0 {
			lost = append(lost, change{f, record{removed: true, since: r.whole, until: r.until}})
		}
		lost = append(lost, change{f, r})
	}
	return lost
}
