package cluster

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"nftwl/pkg/nftset"
)

// watch takes note of the changes of the sets until the context is done.
func (n *Node) watch(ctx context.Context) {
	for ctx.Err() == nil {
		if err := n.watchTable(ctx); err != nil {
			n.Problem("kernel", err)
			select {
			case <-ctx.Done():
			case <-time.After(maxBackoff):
			}
		}
	}
}

// watchTable is watch until the configuration names another table.
func (n *Node) watchTable(ctx context.Context) error {
	table := n.watched()
	w, err := nftset.Watch(table)
	if err != nil {
		return err
	}
	defer w.Close()
	conn, err := nftset.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	generation := func() error {
		g, err := conn.Generation()
		if err == nil {
			n.hasHeard(g)
		}
		return err
	}
	if err := generation(); err != nil {
		return err
	}
	n.missed()
	foreign := make(deletions)
	for ctx.Err() == nil && n.watched() == table {
		err := w.Read(time.Now().Add(block), func(e nftset.Event) {
			switch {
			case e.Generation != 0:
				foreign.end(conn, table, n.event)
				n.hasHeard(e.Generation)
			case e.Deleted && e.Meaning == nftset.Unknown:
				foreign[deleted{e.Set, e.Element.Key}] = e
			default:
				delete(foreign, deleted{e.Set, e.Element.Key}) // it is there again
				n.event(e)
			}
		})
		switch {
		case err == nil, errors.Is(err, nftset.ErrDeadline):
		case errors.Is(err, nftset.ErrOverrun):
			n.metrics.overruns.Inc()
			conn.SetTimeout(kernelTimeout)
			if err := generation(); err != nil {
				return err
			}
			n.missed()
		default:
			return err
		}
	}
	return nil
}

func (n *Node) watched() nftset.Table {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.config.Table
}

// deletions are those of a transaction of another program than nftwl. They are an
// administrator's decisions, or those of a flush of the set, which are lost here alone:
// the kernel reports both alike. Many, and those that leave a set empty, are a flush.
type deletions map[deleted]nftset.Event

type deleted struct {
	set string
	key nftset.Key
}

// maxDecisions is how many elements of a set another program deletes at once by
// decision.
const maxDecisions = 500

// end calls f for the deletions at the end of the transaction, and forgets them.
func (d deletions) end(conn *nftset.Conn, table nftset.Table, f func(nftset.Event)) {
	bySet := make(map[string]int)
	for at := range d {
		bySet[at.set]++
	}
	flushed := make(map[string]bool)
	for name, n := range bySet {
		flushed[name] = n > maxDecisions || isEmpty(conn, table, name)
	}
	for _, e := range d {
		if flushed[e.Set] {
			e.Meaning = nftset.Local
		}
		f(e)
	}
	clear(d)
}

// isEmpty reports whether a set has no elements, except those that were added since
// a transaction that has just been reported.
func isEmpty(conn *nftset.Conn, table nftset.Table, name string) bool {
	conn.SetTimeout(kernelTimeout)
	set, err := conn.Set(table, name)
	if err != nil {
		return true // absence is never removal
	}
	const many, recent = 10_000, 5 * time.Second
	if set.Count > many { // which would take long to read
		return false
	}
	empty := true
	err = conn.Dump(set, func(e nftset.Element) {
		empty = empty && !e.Permanent() && e.Timeout-e.Expires < recent
	})
	return empty || err != nil && !errors.Is(err, nftset.ErrInterrupted)
}

// hasHeard notes that there are no more news up to a generation of the ruleset.
func (n *Node) hasHeard(generation uint32) {
	n.mu.Lock()
	if int32(generation-n.heard) > 0 || n.heard == 0 {
		n.heard = generation
	}
	n.mu.Unlock()
	select {
	case n.told <- struct{}{}:
	default:
	}
}

// catchUp waits until the watcher has told all that happened up to now. Otherwise an
// element that was just removed would look like one that is missing here.
func (n *Node) catchUp(conn *nftset.Conn) error {
	generation, err := conn.Generation()
	if err != nil {
		return err
	}
	timer := time.NewTimer(kernelTimeout)
	defer timer.Stop()
	for {
		n.mu.Lock()
		heard := n.heard
		n.mu.Unlock()
		if heard != 0 && int32(heard-generation) >= 0 {
			return nil
		}
		select {
		case <-n.told:
		case <-timer.C:
			return errors.New("the kernel has not reported its latest changes")
		}
	}
}

// missed notes that there were changes that nobody told of.
func (n *Node) missed() {
	n.mu.Lock()
	n.overrun = true
	n.mu.Unlock()
	n.awake()
}

func (n *Node) awake() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// event takes note of a change.
func (n *Node) event(e nftset.Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.names[e.Set]
	if s == nil {
		return
	}
	defer n.awake()
	if e.Replaced {
		s.refill = time.Now().Add(refillAfter)
		return
	}
	key := e.Element.Key
	if key.CatchAll() || e.Meaning == nftset.Local && !e.Deleted {
		return
	}
	if len(s.changed) >= maxWaiting && (!e.Deleted || e.Meaning == nftset.Local) {
		n.overrun = true // all are looked at, then
		return
	}
	if key.Port != 0 && !slices.Contains(n.config.Ports, key.Port) && len(s.odd) < maxPorts {
		s.odd[key.Port] = true
	}
	heard := s.note(key.Addr)
	switch {
	case !e.Deleted:
		d, ok := heard.deleted[key.Port]
		if ok && d.after == n.heard {
			d, ok = d.replaced()
		}
		if d.again = true; ok {
			heard.deleted[key.Port] = d
		} else {
			delete(heard.deleted, key.Port)
		}
		if heard.seen == nil {
			heard.seen = make(map[uint16]addition)
		}
		heard.seen[key.Port] = addition{time.Now(), n.heard}
	case e.Meaning == nftset.Local:
		// It is lost here alone, and will be filled again.
	default:
		comment := "" // every part of a ban
		switch e.Meaning {
		case nftset.DecidedFor:
			comment = qualify(ownNames(e.Element.Comment), n.node)
		case nftset.Unknown:
			comment = qualify(e.Element.Comment, n.node)
		}
		if heard.deleted == nil {
			heard.deleted = make(map[uint16]deletion)
		}
		d := deletion{at: time.Now(), left: e.Element.Expires, comment: comment, after: n.heard}
		if earlier, ok := heard.deleted[key.Port]; ok {
			d = earlier.then(d)
		}
		heard.deleted[key.Port] = d
	}
}

// note returns what was heard of an address since it was last looked at.
func (s *share) note(addr netip.Addr) *news {
	heard := s.changed[addr]
	if heard == nil {
		heard = new(news)
		s.changed[addr] = heard
	}
	return heard
}

// removedAfter reports whether an element was deleted after a time.
func (h *news) removedAfter(t time.Time) bool {
	for _, d := range h.deleted {
		if d.at.After(t) {
			return true
		}
	}
	return false
}

// merge adds what was heard before.
func (h *news) merge(before *news) {
	for port, d := range before.deleted {
		added, again := h.seen[port]
		if again && added.after == d.after {
			var ok bool
			if d, ok = d.replaced(); !ok {
				continue
			}
		}
		d.again = d.again || again
		if later, ok := h.deleted[port]; ok {
			d = d.then(later)
		}
		if h.deleted == nil {
			h.deleted = make(map[uint16]deletion)
		}
		h.deleted[port] = d
	}
	for port, at := range before.seen {
		if h.seen == nil {
			h.seen = make(map[uint16]addition)
		}
		if h.seen[port].at.IsZero() {
			h.seen[port] = at
		}
	}
}

// millisecondsOf returns the time in an entry's id.
func millisecondsOf(id string) int64 {
	ms, _, _ := strings.Cut(id, "-")
	n, _ := strconv.ParseInt(ms, 10, 64) // the engine's own
	return n
}
