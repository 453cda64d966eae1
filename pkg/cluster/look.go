package cluster

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"

	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

// schedule starts what is due: reading the whole list, comparing all, filling sets
// that were replaced.
func (n *Node) schedule(ctx context.Context, s *share, overrun bool) {
	now := time.Now()
	if n.engine != nil && !s.merge.IsZero() && now.After(s.merge) {
		err := n.readAll(ctx, s)
		n.unread = err != nil
		if err != nil {
			n.failed(err)
		} else {
			s.merge = time.Time{}
			s.repairs, s.routine = s.routine, false
			n.compare(s)
		}
	}
	n.mu.Lock()
	refill := !s.refill.IsZero() && now.After(s.refill)
	if refill {
		s.refill = time.Time{}
	}
	n.mu.Unlock()
	switch {
	case overrun && s.merge.IsZero():
		n.compare(s)
	case refill:
		s.work = s.addresses(s.work, nil)
	case len(s.work) == 0 && !s.compared.IsZero() && now.Sub(s.compared) > compareEvery+rand.N(time.Minute):
		s.compared = now
		s.merge = now.Add(rand.N(jitter))
		s.routine = true
	case s.list == banned && s.send && now.After(s.polled):
		n.poll(s)
	case s.list == trusted && now.After(s.polled):
		// Elsewhere permanent elements are given a timeout again and again.
		s.polled = now.Add(min(time.Minute, n.config.Timeout/4))
		s.work = s.addresses(s.work, func(r record) bool { return r.until == 0 && !r.removed })
	}
}

// addresses appends those whose records f accepts; a nil f accepts all.
func (s *share) addresses(work []netip.Addr, f func(record) bool) []netip.Addr {
	if f == nil {
		work = slices.Grow(work, len(s.records))
	}
	for at, r := range s.records {
		if f == nil || f(r) {
			work = append(work, at.Addr())
		}
	}
	slices.SortFunc(work, netip.Addr.Compare)
	return slices.Compact(work)
}

// compare looks at each address that this machine or the others have.
func (n *Node) compare(s *share) {
	s.compared = time.Now()
	n.elements(s, func(e nftset.Element) { s.work = append(s.work, e.Addr) })
	s.work = s.addresses(s.work, nil)
}

// poll finds banned elements that the kernel did not report, because a rule added them.
func (n *Node) poll(s *share) {
	start := time.Now()
	v := n.view(s)
	n.elements(s, func(e nftset.Element) {
		at := newField(v.prefix(e.Addr), 0)
		every, all := s.records[at]
		at.port = e.Port
		one, alone := s.records[at]
		mine := v.record(e, time.Time{})
		enough := mine.ends() - max(minLeft.Milliseconds(), gain(mine.timeout))
		if !(all && !every.removed && every.ends() >= enough || alone && !one.removed && one.ends() >= enough) {
			s.work = append(s.work, e.Addr)
		}
	})
	slices.SortFunc(s.work, netip.Addr.Compare)
	s.work = slices.Compact(s.work)
	s.polled = time.Now().Add(max(pollEvery, 100*time.Since(start)))
}

// elements calls f for every element of the list's sets, some of them twice. Sets that
// cannot be read are reported.
func (n *Node) elements(s *share, f func(nftset.Element)) {
	for _, name := range s.list.names(n.config).Both() {
		err := n.kernel(func(conn *nftset.Conn) error {
			set, err := conn.Set(n.config.Table, name)
			if err != nil {
				return err
			}
			// A dump can lack elements while the set changes; hardly twice the same.
			for range 2 {
				err = conn.Dump(set, func(e nftset.Element) {
					if e.CatchAll() {
						return
					}
					if e.Port != 0 && !slices.Contains(n.config.Ports, e.Port) && len(s.ports) < maxPorts {
						s.ports[e.Port] = true
					}
					f(e)
				})
				if !errors.Is(err, nftset.ErrInterrupted) {
					return err
				}
			}
			return nil
		})
		if err != nil {
			n.Problem("kernel", err)
		}
	}
}

// changes looks at some addresses of which there is news, and reports whether there
// were any.
func (n *Node) changes(ctx context.Context, s *share) bool {
	n.mu.Lock()
	some := make(map[netip.Addr]*news)
	for port := range s.odd {
		if len(s.ports) < maxPorts {
			s.ports[port] = true
		}
	}
	for addr, heard := range s.changed {
		some[addr] = heard
		delete(s.changed, addr)
		if len(some) == atOnce {
			break
		}
	}
	n.mu.Unlock()
	if len(some) > 0 {
		n.look(ctx, s, some)
	}
	return len(some) > 0
}

// later looks at some addresses of which there is no news.
func (n *Node) later(ctx context.Context, s *share) {
	if len(s.work) == 0 {
		return
	}
	some := make(map[netip.Addr]*news)
	for len(s.work) > 0 && len(some) < maxElements/5 {
		last := len(s.work) - 1
		some[s.work[last]] = new(news)
		s.work = s.work[:last]
	}
	if planned := n.look(ctx, s, some); s.repairs {
		n.metrics.repaired.Add(float64(planned))
	}
	if len(s.work) == 0 {
		s.work, s.repairs = nil, false
	}
}

// look compares what this machine and the others have of some addresses, and does
// what there is to do. It returns for how many that was anything.
func (n *Node) look(ctx context.Context, s *share, some map[netip.Addr]*news) (planned int) {
	for _, six := range []bool{false, true} {
		var addrs []netip.Addr
		for addr := range some {
			if addr.Is6() == six {
				addrs = append(addrs, addr)
			}
		}
		if len(addrs) == 0 {
			continue
		}
		var plans plan
		err := n.kernel(func(conn *nftset.Conn) (err error) {
			plans, planned, err = n.plan(conn, s, addrs, some, planned)
			if err != nil {
				return err
			}
			return n.apply(conn, s, &plans)
		})
		if err != nil {
			n.Problem("kernel", err)
			if errors.Is(err, nftset.ErrNoSet) || errors.Is(err, nftset.ErrNoTable) || errors.Is(err, nftset.ErrUnfit) {
				// Nothing is there. During a reload, what was removed just before counts.
				addrs = slices.DeleteFunc(addrs, func(addr netip.Addr) bool { return !some[addr].removedAfter(time.Now().Add(-time.Minute)) })
			}
			if len(addrs) > 0 {
				n.again(s, addrs, some)
			}
			continue
		}
		if s.send && len(plans.send) > 0 {
			n.send(ctx, s, &plans, some)
		}
	}
	return planned
}

// again has news looked at once more, in a second.
func (n *Node) again(s *share, addrs []netip.Addr, some map[netip.Addr]*news) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, addr := range addrs {
		if len(s.changed) < maxWaiting {
			s.note(addr).merge(some[addr])
		}
	}
	s.paused = time.Now().Add(time.Second)
}

// plan decides what to do for addresses of one family.
func (n *Node) plan(conn *nftset.Conn, s *share, addrs []netip.Addr, some map[netip.Addr]*news, planned int) (plan, int, error) {
	var all plan
	set, err := conn.Set(n.config.Table, s.list.names(n.config).For(addrs[0]))
	if err == nil {
		err = set.Writable()
	}
	if err != nil {
		return all, planned, err
	}
	ports := []uint16{0}
	if set.Key.Port {
		ports = append(slices.Clone(n.config.Ports), slices.Collect(maps.Keys(s.ports))...)
		slices.Sort(ports)
		ports = slices.Compact(ports)
	}
	var keys []nftset.Key
	for _, addr := range addrs {
		keys = append(keys, trust.Keys(set, addr, ports)...)
	}
	v := n.view(s)
	all.now, all.set = v.now, set
	there, err := conn.Lookup(set, keys...)
	if err == nil {
		err = n.catchUp(conn)
	}
	if err != nil {
		return all, planned, err
	}
	n.mu.Lock()
	// What changed since is looked at again.
	addrs = slices.DeleteFunc(addrs, func(addr netip.Addr) bool {
		later := s.changed[addr]
		if later != nil {
			later.merge(some[addr])
		}
		return later != nil
	})
	n.mu.Unlock()
	for _, addr := range addrs {
		heard := some[addr]
		if u := s.unsent[addr]; u != nil {
			heard.merge(u)
			delete(s.unsent, addr)
		}
		st := &state{set: set, there: make(map[uint16]nftset.Element), deleted: heard.deleted, seen: heard.seen, ports: ports}
		for _, key := range trust.Keys(set, addr, ports) {
			if e, ok := there[key]; ok {
				st.there[key.Port] = e
			}
		}
		p := v.reconcile(addr, st)
		if !s.take {
			p.remove, p.extend = nil, nil
		}
		if !s.send {
			p.send = nil
		}
		if !p.empty() {
			planned++
		}
		all.send = append(all.send, p.send...)
		all.remove = append(all.remove, p.remove...)
		all.extend = append(all.extend, p.extend...)
	}
	return all, planned, nil
}

func (n *Node) view(s *share) *view {
	return &view{
		config: n.config, list: s.list, node: n.node, own: n.own, now: n.now(), at: time.Now(), cleared: s.cleared,
		records: func(f field) (record, bool) { r, ok := s.records[f]; return r, ok },
	}
}

// addresses returns those of this machine, which are never trusted or banned.
func addresses() (own []netip.Addr) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			own = append(own, p.Addr().Unmap().WithZone(""))
		}
	}
	return own
}
