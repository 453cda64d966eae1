package cluster

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// arrivals is what a read of the log brought.
type arrivals struct {
	entries []entry
	err     error
}

// now is the engine's time in milliseconds.
func (n *Node) now() int64 { return n.clock + time.Since(n.began).Milliseconds() }

// connect reaches the engine, if it is time to.
func (n *Node) connect(ctx context.Context) {
	if n.trouble != "" && time.Now().Before(n.retry) {
		return
	}
	if n.engine == nil {
		e, err := dial(n.config.Cluster, n.node, n.password)
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

// tick reads the engine's clock. What took long tells little: an answer is used if it is
// as exact as what is known, or if the clock was set.
func (n *Node) tick(ctx context.Context) error {
	start := time.Now()
	now, err := n.engine.now(ctx)
	if err != nil {
		return err
	}
	inexact := time.Since(start)/2 + time.Millisecond
	known := n.inexact + time.Since(n.began)/1000 // clocks drift
	jump := (time.Duration(now-n.now())*time.Millisecond + inexact).Abs()
	if jump > 2*inexact+known || inexact <= known {
		n.began, n.clock, n.inexact = start.Add(inexact), now, inexact
	}
	if jump > skew {
		for _, s := range n.shares {
			n.mergeSoon(s)
		}
	}
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
