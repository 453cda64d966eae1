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
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// list is a pair of sets: trusted or banned.
type list string

const (
	trusted list = "trusted"
	banned  list = "banned"
)

const (
	// sendEvery is how long later changes wait for each other, so that they share an
	// entry of the log. The first goes out at once.
	sendEvery = 100 * time.Millisecond
	// maxWaiting bounds the addresses that wait for the engine.
	maxWaiting = 1 << 16
	// maxElements bounds a transaction, and transactionPause is how long to wait after
	// each, so that a login can commit.
	maxElements      = 1000
	transactionPause = 20 * time.Millisecond
	// kernelTimeout is how long the kernel has to answer.
	kernelTimeout = 10 * time.Second
	// compareEvery is how often a machine compares all that it has with all that
	// the others have. It should find nothing.
	compareEvery = time.Hour
	// jitter keeps machines from reading the whole list at the same moment.
	jitter = 3 * time.Second
	// refillAfter is how long to wait after a set was replaced, so that a restore can
	// fill it first.
	refillAfter = time.Second
	// pollEvery is how often the banned sets are read: what a rule adds is not
	// reported. It takes at most a hundredth of the time.
	pollEvery = 10 * time.Second
	// maxPorts is how many ports, besides those configured, records can have.
	maxPorts = 32
	// stopTimeout is how long what was heard may still be sent at the end.
	stopTimeout = 2 * time.Second
	// The times between two attempts to reach the engine.
	minBackoff, maxBackoff = time.Second, 30 * time.Second
)

// Node is this machine's part.
type Node struct {
	// Problem is told what goes wrong, under one of a few words.
	Problem func(reason string, err error)
	// Connected is told that the engine answers again.
	Connected func()

	password string
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
	inexact   time.Duration // how far clock can be off
	own       []netip.Addr  // the machine's addresses
	ownAt     time.Time     // when they were read
	reading   chan arrivals // nil unless a read is under way
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
	known    int64                // the log's sequence up to which records can have what an entry says, or newer
	cleared  int64                // when the list was emptied on all machines
	behind   bool                 // the engine has entries that the log did not bring, once already
	merge    time.Time            // when to read the whole list; zero: need not
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
	deleted map[uint16]deletion // by port
	seen    map[uint16]addition // the last one, by port
}

// New returns a node that shares as a configuration says, and counts in a registry.
// The hooks are set before Run is called.
func New(c *config.Config, password string, registry prometheus.Registerer) *Node {
	n := &Node{
		Problem:   func(string, error) {},
		Connected: func() {},
		password:  password,
		configs:   make(chan *config.Config, 1),
		wake:      make(chan struct{}, 1),
		told:      make(chan struct{}, 1),
		backoff:   minBackoff,
		began:     time.Now(),
		clock:     time.Now().UnixMilli(),
		inexact:   time.Hour,
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
	last, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	for _, s := range n.shares {
		n.mu.Lock()
		waiting := len(s.changed)
		n.mu.Unlock()
		for ; waiting > 0 && last.Err() == nil; waiting -= atOnce {
			n.changes(last, s)
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
