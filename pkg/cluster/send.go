package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// send sends changes. Those that cannot be sent wait.
func (n *Node) send(ctx context.Context, s *share, p *plan, some map[netip.Addr]*news) {
	changes := p.send
	for len(changes) > 0 {
		batch := changes[:min(len(changes), atOnce)]
		if n.engine == nil || n.trouble != "" && time.Now().Before(n.retry) {
			break
		}
		replies, at, err := n.engine.send(ctx, s.list, batch, p.now)
		if isLate(err) { // it was not done, and is sent again
			err = n.tick(ctx)
			if err == nil {
				break
			}
		}
		if err != nil {
			n.failed(err)
			break
		}
		n.works()
		if s.lost(at, replies) {
			n.mergeSoon(s)
		} else {
			s.known = max(s.known, at.sequence)
		}
		n.sent(s, batch, replies)
		changes = changes[len(batch):]
		s.paused = time.Now().Add(sendEvery)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range changes {
		addr := c.field.Addr()
		if s.unsent[addr] == nil && len(s.unsent) == maxWaiting {
			n.mergeSoon(s)
			if c.removed {
				n.Problem("waiting", fmt.Errorf("%d addresses wait for the engine: the removal of %s is not shared", maxWaiting, addr))
			}
			continue
		}
		if s.unsent[addr] == nil {
			s.unsent[addr] = new(news)
		}
		s.unsent[addr].merge(some[addr])
	}
}

// sent notes what became of changes.
func (n *Node) sent(s *share, changes []change, replies []reply) {
	for i, c := range changes {
		r, err := parseRecord(replies[i].record)
		switch {
		case err != nil:
			n.Problem("record", fmt.Errorf("an answer about %s: %w", c.field, err))
			continue
		case replies[i].accepted:
			n.metrics.sent.WithLabelValues(string(s.list)).Inc()
			if c.removed && !r.removed { // another machine has added it again
				s.work = append(s.work, c.field.Addr())
			}
		default: // the others know better
			n.metrics.stale.WithLabelValues(string(s.list)).Inc()
			addr := c.field.Addr()
			if r != s.records[c.field] {
				s.work = append(s.work, addr)
			} else if !c.removed && r.lastRemoval().since > 0 {
				// This machine takes its element for newer than a removal that it knows:
				// its view of the engine's clock was wrong.
				n.again(s, []netip.Addr{addr}, map[netip.Addr]*news{addr: {}})
			}
		}
		s.records[c.field] = s.with(c.field, r, false)
	}
}

// lost reports whether an engine that gives these replies has lost what it had.
func (s *share) lost(at position, replies []reply) bool {
	known := max(s.known, s.sequence)
	accepted := slices.ContainsFunc(replies, func(r reply) bool { return r.accepted })
	return s.epoch != "" && (at.epoch != s.epoch || at.sequence < known || at.sequence == known && accepted)
}

// with returns what counts for a field when the engine says r. If r can be older than
// what is known, both are merged; also until the whole list is read, as the engine may
// have lost something, such as a removal.
func (s *share) with(f field, r record, old bool) record {
	if known, there := s.records[f]; there && (old || !s.merge.IsZero()) {
		return merge(known, r)
	}
	return r
}
