// Package cluster shares the trusted and banned sets with other machines, over a
// Redis or Valkey. It learns of changes from the kernel, by whomever they are made,
// and no login waits for it.
//
// The engine holds for each address what the machines agree on: until when it is
// trusted or banned, or that it was removed. A script merges what they send
// (merge.lua); what it accepts goes into a log, which every machine reads. What a
// machine makes of it for its own sets is decided in reconcile.go.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

// list is a pair of sets: trusted or banned.
type list string

const (
	trusted list = "trusted"
	banned  list = "banned"
)

const (
	// pause is how long later changes wait for each other, so that they share an
	// entry of the log. The first goes out at once.
	pause = 100 * time.Millisecond
	// maxWaiting is how many addresses wait for the engine at most.
	maxWaiting = 1 << 16
	// maxElements is how many elements a transaction changes, and breath how long
	// others have then: a login waits for each transaction.
	maxElements = 1000
	breath      = 20 * time.Millisecond
	// patience is how long the kernel has to answer.
	patience = 10 * time.Second
	// compareEvery is how often a machine compares all that it has with all that
	// the others have. Nothing is found unless something went wrong.
	compareEvery = time.Hour
	// jitter keeps machines from reading the whole list at the same moment.
	jitter = 3 * time.Second
	// settle is how long a loaded ruleset has for a restore of its own.
	settle = time.Second
	// pollEvery is how often the banned sets are read: what a rule adds is not
	// reported. It takes at most a hundredth of the time.
	pollEvery = 10 * time.Second
	// maxPorts is how many ports, besides those configured, records can have.
	maxPorts = 32
	// lastWords is how long what was heard may still be sent at the end.
	lastWords = 2 * time.Second
	// most times between two attempts to reach the engine.
	minBackoff, maxBackoff = time.Second, 30 * time.Second
)

// Node is this machine's part.
type Node struct {
	// Problem is told what goes wrong, under one of a few words.
	Problem func(reason string, err error)
	// Connected is told that the engine answers again.
	Connected func()

	password string
	instance string // of this process, as two machines can have the same name
	configs  chan *config.Config
	wake     chan struct{} // has an item while there may be news from the kernel
	told     chan struct{} // has an item when heard may have changed
	metrics  *metrics

	mu      sync.Mutex // of what the watcher tells
	shares  []*share
	names   map[string]*share // by the name of a set
	overrun bool
	heard   uint32 // the generation of the ruleset up to which there are no more news

	// The rest is Run's alone.
	config    *config.Config
	node      string
	conn      *nftset.Conn // nil until dialled
	engine    *engine      // nil without a connection
	trouble   string       // why nothing can be sent; "" if it can
	retry     time.Time    // when to try again
	backoff   time.Duration
	readAfter time.Time     // when the log may be read
	unread    bool          // the last read failed
	began     time.Time     // of clock
	clock     int64         // the engine's time then, in milliseconds
	own       []netip.Addr  // the machine's addresses
	ownAt     time.Time     // when they were read
	reading   chan arrivals // nil unless a read is under way
}

// arrivals is what a read of the log brought.
type arrivals struct {
	entries []entry
	err     error
}

// share is a list that is shared.
type share struct {
	list       list
	send, take bool

	// Under Node.mu:
	changed map[netip.Addr]*news // since it was last looked at
	odd     map[uint16]bool      // ports of changes, besides those configured
	refill  time.Time            // when to fill sets that were replaced

	records map[field]record
	ports   map[uint16]bool // of records and elements, besides those configured
	position
	known    int64 // the log's sequence up to which records can have what an entry says, or newer
	cleared  int64 // when the list was emptied on all machines
	behind   bool  // the engine has entries that the log did not bring, once already
	merge    time.Time
	compared time.Time            // when all was compared last
	polled   time.Time            // when to read the banned sets again
	unsent   map[netip.Addr]*news // looked at while nothing could be sent
	work     []netip.Addr         // to look at, when nothing is newer
	routine  bool                 // merge is one that should find nothing
	repairs  bool                 // work is of such a one
	paused   time.Time            // when changes may be sent again
}

// news is what the watcher heard about an address.
type news struct {
	deleted map[uint16]deletion
	seen    time.Time
}

// New returns a node that shares as a configuration says, and counts in a registry.
// The hooks are set before Run is called.
func New(c *config.Config, password string, registry prometheus.Registerer) *Node {
	n := &Node{
		Problem:   func(string, error) {},
		Connected: func() {},
		password:  password,
		instance:  strconv.FormatUint(rand.Uint64(), 36),
		configs:   make(chan *config.Config, 1),
		wake:      make(chan struct{}, 1),
		told:      make(chan struct{}, 1),
		backoff:   minBackoff,
		began:     time.Now(),
		clock:     time.Now().UnixMilli(),
	}
	n.metrics = newMetrics(registry)
	n.use(c)
	return n
}

// Set has the node follow another configuration. The engine stays the one that New
// was given.
func (n *Node) Set(c *config.Config) {
	select {
	case <-n.configs: // which nobody has looked at
	default:
	}
	n.configs <- c
}

// use begins to follow a configuration.
func (n *Node) use(c *config.Config) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.config, n.node = c, NodeName(c.Cluster)
	n.names = make(map[string]*share)
	var shares []*share
	for _, l := range []list{trusted, banned} {
		s := &share{
			list:    l,
			changed: make(map[netip.Addr]*news), odd: make(map[uint16]bool), unsent: make(map[netip.Addr]*news),
			records: make(map[field]record), ports: make(map[uint16]bool),
		}
		for _, old := range n.shares {
			if old.list == l {
				s = old
			}
		}
		s.send, s.take = slices.Contains(c.Cluster.Send, string(l)), slices.Contains(c.Cluster.Take, string(l))
		s.merge = time.Now()
		if !s.send && !s.take {
			continue
		}
		shares = append(shares, s)
		for _, name := range l.names(c).Both() {
			n.names[name] = s
		}
	}
	n.shares = shares
}

// sender is how this process signs what it sends.
func (n *Node) sender() string { return n.node + "/" + n.instance }

// NodeName is the name of this machine.
func NodeName(c *config.Cluster) string {
	if c.Node != "" {
		return c.Node
	}
	host, err := os.Hostname()
	if err != nil || !config.IsName(host) {
		return "unnamed"
	}
	return host
}

func (l list) names(c *config.Config) config.Names {
	if l == banned {
		return c.Banned
	}
	return c.Trusted
}

// Run shares until the context is done.
func (n *Node) Run(ctx context.Context) {
	watching, stopWatching := context.WithCancel(context.Background())
	var watcher sync.WaitGroup
	watcher.Go(func() { n.watch(watching) })
	defer watcher.Wait()
	defer stopWatching()
	for ctx.Err() == nil {
		n.step(ctx)
		n.wait(ctx)
	}
	// What has just been heard is still sent.
	last, cancel := context.WithTimeout(context.Background(), lastWords)
	defer cancel()
	for _, s := range n.shares {
		for n.changes(last, s) && last.Err() == nil {
		}
	}
	if n.conn != nil {
		n.conn.Close()
	}
	if n.engine != nil {
		n.engine.close()
	}
}

// wait waits until there is something to do, at most a second.
func (n *Node) wait(ctx context.Context) {
	timeout := time.Second
	n.mu.Lock()
	for _, s := range n.shares {
		if len(s.work) > 0 {
			timeout = 0
		}
		if len(s.changed) > 0 {
			timeout = min(timeout, max(0, time.Until(s.paused)))
		}
	}
	n.mu.Unlock()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-n.wake:
	case c := <-n.configs:
		n.use(c)
	case a := <-n.reading:
		n.reading = nil
		n.arrived(ctx, a)
	}
}

// step does what there is to do, as far as it is short.
func (n *Node) step(ctx context.Context) {
	defer func() {
		if p := recover(); p != nil {
			n.Problem("internal", fmt.Errorf("internal error: %v", p))
		}
	}()
	n.connect(ctx)
	n.mu.Lock()
	overrun := n.overrun
	n.overrun = false
	n.mu.Unlock()
	if time.Since(n.ownAt) > time.Minute {
		n.own, n.ownAt = addresses(), time.Now()
	}
	for _, s := range n.shares {
		n.schedule(ctx, s, overrun)
		if time.Now().After(s.paused) {
			n.changes(ctx, s)
		}
		n.later(ctx, s)
	}
	n.read(ctx)
	n.metrics.entries(n.shares, n.now())
}

// now is the engine's time in milliseconds.
func (n *Node) now() int64 { return n.clock + time.Since(n.began).Milliseconds() }

// connect reaches the engine, if it is time to.
func (n *Node) connect(ctx context.Context) {
	if n.trouble != "" && time.Now().Before(n.retry) {
		return
	}
	if n.engine == nil {
		e, err := dial(n.config.Cluster, n.sender(), n.password)
		if err == nil {
			n.engine = e
			err = n.tick(ctx)
		}
		if err != nil {
			n.failed(err)
			return
		}
		n.metrics.evicts.Set(0)
		if n.engine.evicts(ctx) {
			n.metrics.evicts.Set(1)
			n.Problem("memory", errors.New("the engine throws away records when its memory is full; set its maxmemory-policy to noeviction"))
		}
		n.works()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	waiting := 0
	for _, s := range n.shares {
		// In trouble, some of them show whether it is over.
		most := maxWaiting
		if n.trouble != "" {
			most = atOnce
		}
		for addr, u := range s.unsent {
			if most--; most < 0 {
				break
			}
			s.note(addr).merge(u)
			delete(s.unsent, addr)
		}
		waiting += len(s.changed)
	}
	if waiting == 0 {
		n.works() // as nothing is left to fail
	}
}

// works notes that the engine can be used, unless it cannot be read.
func (n *Node) works() {
	if n.unread {
		return
	}
	n.metrics.connection("")
	if n.trouble != "" {
		n.trouble = ""
		n.Connected()
	}
}

// tick reads the engine's clock.
func (n *Node) tick(ctx context.Context) error {
	start := time.Now()
	now, err := n.engine.now(ctx)
	if err != nil {
		return err
	}
	if jump := now - n.now(); max(jump, -jump) > skew.Milliseconds() {
		for _, s := range n.shares {
			n.mergeSoon(s)
		}
	}
	n.began, n.clock = start.Add(time.Since(start)/2), now
	return nil
}

// failed notes that the engine cannot be used.
func (n *Node) failed(err error) {
	reason := why(err)
	if n.trouble == "" {
		n.backoff = minBackoff
	}
	n.trouble = reason
	n.retry = time.Now().Add(n.backoff/2 + rand.N(n.backoff/2))
	for _, s := range n.shares {
		if !s.merge.IsZero() && s.merge.Before(n.retry) {
			s.merge = n.retry
		}
	}
	n.backoff = min(2*n.backoff, maxBackoff)
	n.metrics.connection(reason)
	n.Problem("cluster", fmt.Errorf("%s: %w", n.config.Cluster.Server, err))
	// An engine that answers, if only with a refusal, can still be read.
	if n.engine != nil && !slices.Contains([]string{full, refusedKeys, odd}, reason) {
		n.engine.close()
		n.engine, n.reading = nil, nil
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

// read asks the engine for what is new, unless it is asked already.
func (n *Node) read(ctx context.Context) {
	if n.engine == nil || n.reading != nil || time.Now().Before(n.readAfter) {
		return
	}
	after := make(map[list]position)
	for _, s := range n.shares {
		if s.id != "" {
			after[s.list] = s.position
		}
	}
	if len(after) == 0 {
		return
	}
	n.reading = make(chan arrivals, 1)
	go func(reading chan<- arrivals, e *engine) {
		entries, err := e.read(ctx, after)
		reading <- arrivals{entries, err}
	}(n.reading, n.engine)
}

// arrived takes what a read has brought.
func (n *Node) arrived(ctx context.Context, a arrivals) {
	if n.engine == nil || ctx.Err() != nil {
		return
	}
	err := a.err
	if err == nil {
		err = n.tick(ctx)
	}
	brought := make(map[list]bool)
	if err == nil {
		for _, e := range a.entries {
			brought[e.list] = true
			n.entry(e)
		}
	}
	for _, s := range n.shares {
		if err != nil || brought[s.list] || s.id == "" {
			continue
		}
		// The log can have lost what came after the last entry.
		var p position
		if p, _, err = n.engine.meta(ctx, s.list); err != nil {
			break
		}
		behind := p.epoch != s.epoch || p.sequence != s.sequence
		if behind && s.behind {
			n.mergeSoon(s)
		}
		s.behind = behind
	}
	if err != nil {
		n.failed(err)
		n.readAfter = n.retry
	}
	n.unread = err != nil
}

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
		if f, ok := n.learn(s, name, value, old); ok && e.node != n.sender() {
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
// here. An old one can be older than what is known.
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
	if known, there := s.records[here]; there && (old || here != f) {
		r = merge(known, r)
	}
	s.records[here] = r
	return here, true
}

// laterID reports whether an entry's id is later than another.
func laterID(a, b string) bool {
	a1, a2, _ := strings.Cut(a, "-")
	b1, b2, _ := strings.Cut(b, "-")
	return longerOrGreater(a1, b1) || a1 == b1 && longerOrGreater(a2, b2)
}

// longerOrGreater compares decimal numbers.
func longerOrGreater(a, b string) bool { return len(a) > len(b) || len(a) == len(b) && a > b }

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

// readAll reads the whole list.
func (n *Node) readAll(ctx context.Context, s *share) error {
	p, cleared, err := n.engine.end(ctx, s.list)
	if err != nil {
		return err
	}
	if err := n.tick(ctx); err != nil {
		return err
	}
	known := make(map[field]record)
	for f, r := range s.records {
		every := f
		every.port = 0
		// No set tells of a removal, or when a permanent element was added.
		all := s.records[every]
		if r.alive(n.now()) && r.set > cleared && (r.removed && (all.removed || all.set <= r.set) || !r.removed && r.until == 0) {
			known[f] = r
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
	lost := s.keep(known, n.now())
	if err != nil {
		return err
	}
	if s.send {
		for some := range slices.Chunk(lost, atOnce) {
			if _, _, err := n.engine.send(ctx, s.list, some, n.now()); err != nil {
				return err
			}
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
func (s *share) keep(known map[field]record, now int64) (lost []change) {
	for f, r := range known {
		if there, ok := s.records[f]; ok && (!r.removed || merge(there, r) == there) {
			continue
		}
		s.records[f] = r
		lost = append(lost, change{field: f, removed: r.removed, age: max(0, now-r.set), left: max(-1, r.until-now), comment: r.comment})
	}
	return lost
}

// compare looks at each address that this machine or the others have.
func (n *Node) compare(s *share) {
	s.compared = time.Now()
	n.elements(s, func(e nftset.Element) { s.work = append(s.work, e.Addr) })
	s.work = s.addresses(s.work, nil)
}

// poll looks at banned elements of which nobody told.
func (n *Node) poll(s *share) {
	start := time.Now()
	v := n.view(s)
	n.elements(s, func(e nftset.Element) {
		at := newField(v.prefix(e.Addr), 0)
		every, all := s.records[at]
		at.port = e.Port
		one, alone := s.records[at]
		mine := v.local(e, time.Time{})
		enough := mine.ends() - max(most.Milliseconds(), gain(mine.timeout))
		if !(all && !every.removed && every.ends() >= enough || alone && !one.removed && one.ends() >= enough) {
			s.work = append(s.work, e.Addr)
		}
	})
	slices.SortFunc(s.work, netip.Addr.Compare)
	s.work = slices.Compact(s.work)
	s.polled = time.Now().Add(max(pollEvery, 100*time.Since(start)))
}

// elements calls f for every element of the list's sets, some of them twice. Those that cannot be read
// are told.
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

// kernel calls f with the lasting connection. After an error it is dialled again.
func (n *Node) kernel(f func(*nftset.Conn) error) (err error) {
	if n.conn == nil {
		if n.conn, err = nftset.DialAs(nftset.Local); err != nil {
			return err
		}
	}
	n.conn.SetTimeout(patience)
	if err = f(n.conn); err != nil && !errors.Is(err, nftset.ErrFull) {
		n.conn.Close()
		n.conn = nil
	}
	return err
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
		of := make(map[field]netip.Addr)
		err := n.kernel(func(conn *nftset.Conn) (err error) {
			plans, planned, err = n.plan(conn, s, addrs, some, of, planned)
			if err != nil {
				return err
			}
			return n.apply(conn, s, &plans)
		})
		if err != nil {
			n.Problem("kernel", err)
			if !errors.Is(err, nftset.ErrNoSet) && !errors.Is(err, nftset.ErrNoTable) && !errors.Is(err, nftset.ErrUnfit) {
				n.again(s, addrs, some)
				continue
			}
		}
		if s.send && len(plans.send) > 0 {
			n.send(ctx, s, &plans, of, some)
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
func (n *Node) plan(conn *nftset.Conn, s *share, addrs []netip.Addr, some map[netip.Addr]*news, of map[field]netip.Addr, planned int) (plan, int, error) {
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
	all.now = v.now
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
		for _, c := range p.send {
			of[c.field] = addr
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

// apply changes this machine's set.
func (n *Node) apply(conn *nftset.Conn, s *share, p *plan) error {
	if len(p.remove)+len(p.extend) == 0 {
		return nil
	}
	var addr netip.Addr
	if len(p.remove) > 0 {
		addr = p.remove[0].key.Addr
	} else {
		addr = p.extend[0].Addr
	}
	set, err := conn.Set(n.config.Table, s.list.names(n.config).For(addr))
	if err != nil {
		return err
	}
	by := make(map[nftset.Key]record)
	var keys []nftset.Key
	for _, r := range p.remove {
		by[r.key] = r.by
		keys = append(keys, r.key)
	}
	v := n.view(s)
	for some := range slices.Chunk(keys, maxElements) {
		conn.SetTimeout(patience)
		gone, err := conn.Remove(set, some, func(e nftset.Element) bool {
			return v.local(e, time.Time{}).set <= by[e.Key].set
		})
		if err != nil {
			return err
		}
		n.metrics.applied.WithLabelValues(string(s.list), "removed").Add(float64(len(gone)))
		time.Sleep(breath / maxElements * time.Duration(len(some)))
	}
	isFull := false
	for some := range slices.Chunk(p.extend, maxElements) {
		if err := n.extend(conn, s, set, some, &isFull); err != nil {
			return err
		}
		if isFull {
			break
		}
		time.Sleep(breath / maxElements * time.Duration(len(some)))
	}
	return nil
}

// extend adds elements, or renews them. Of a set without room for all, it fills what
// room there is.
func (n *Node) extend(conn *nftset.Conn, s *share, set *nftset.Set, elems []nftset.Element, isFull *bool) error {
	conn.SetTimeout(patience)
	outcomes, err := conn.Extend(set, elems, 0, addNames)
	if errors.Is(err, nftset.ErrFull) {
		if len(elems) == 1 {
			*isFull = true
			n.metrics.refused.WithLabelValues("full").Inc()
			n.Problem("full", fmt.Errorf("what other machines share is missing here: %w", err))
			return nil
		}
		for _, half := range [][]nftset.Element{elems[:len(elems)/2], elems[len(elems)/2:]} {
			if err := n.extend(conn, s, set, half, isFull); err != nil || *isFull {
				return err
			}
		}
		return nil
	}
	for _, o := range outcomes {
		if o != nftset.Unchanged {
			n.metrics.applied.WithLabelValues(string(s.list), o.String()).Inc()
		}
	}
	return err
}

// addNames puts the names of a comment before those of another.
func addNames(old, more string) string {
	if more == "" {
		return old
	}
	for name := range strings.SplitSeq(old, names) {
		if name != "" && !trust.HasName(more, name) && len(more)+len(names)+len(name) <= nftset.MaxComment {
			more += names + name
		}
	}
	return more
}

// send sends changes. Those that cannot be sent wait.
func (n *Node) send(ctx context.Context, s *share, p *plan, of map[field]netip.Addr, some map[netip.Addr]*news) {
	changes := p.send
	for len(changes) > 0 {
		batch := changes[:min(len(changes), atOnce)]
		if n.engine == nil || n.trouble != "" && time.Now().Before(n.retry) {
			break
		}
		replies, sequence, err := n.engine.send(ctx, s.list, batch, p.now)
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
		s.known = max(s.known, sequence)
		n.sent(s, batch, replies, of)
		changes = changes[len(batch):]
		s.paused = time.Now().Add(pause)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range changes {
		addr := of[c.field]
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
func (n *Node) sent(s *share, changes []change, replies []reply, of map[field]netip.Addr) {
	for i, c := range changes {
		r, err := parseRecord(replies[i].record)
		switch {
		case err != nil:
			n.Problem("record", fmt.Errorf("an answer about %s: %w", c.field, err))
			continue
		case replies[i].accepted:
			n.metrics.sent.WithLabelValues(string(s.list)).Inc()
		default: // the others know better
			n.metrics.stale.WithLabelValues(string(s.list)).Inc()
			if r != s.records[c.field] {
				s.work = append(s.work, of[c.field])
			}
		}
		s.records[c.field] = r
	}
}
