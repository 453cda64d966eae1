package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

// kernel calls f with the lasting connection. After an error it is dialled again.
func (n *Node) kernel(f func(*nftset.Conn) error) (err error) {
	if n.conn == nil {
		if n.conn, err = nftset.DialAs(nftset.Local); err != nil {
			return err
		}
	}
	n.conn.SetTimeout(kernelTimeout)
	if err = f(n.conn); err != nil && !errors.Is(err, nftset.ErrFull) {
		n.conn.Close()
		n.conn = nil
	}
	return err
}

// apply changes this machine's set.
func (n *Node) apply(conn *nftset.Conn, s *share, p *plan) error {
	by := make(map[nftset.Key]record)
	var keys []nftset.Key
	for _, r := range p.remove {
		by[r.key] = r.by
		keys = append(keys, r.key)
	}
	v := n.view(s)
	for some := range slices.Chunk(keys, maxElements) {
		conn.SetTimeout(kernelTimeout)
		gone, err := conn.Remove(p.set, some, func(e nftset.Element) bool {
			return v.record(e, time.Time{}).since <= by[e.Key].since
		})
		if err != nil {
			return err
		}
		n.metrics.applied.WithLabelValues(string(s.list), "removed").Add(float64(len(gone)))
		time.Sleep(transactionPause / maxElements * time.Duration(len(some)))
	}
	isFull := false
	for some := range slices.Chunk(p.extend, maxElements) {
		if err := n.extend(conn, s, p.set, some, &isFull); err != nil {
			return err
		}
		if isFull {
			break
		}
		time.Sleep(transactionPause / maxElements * time.Duration(len(some)))
	}
	return nil
}

// extend adds elements, or renews them. Of a set without room for all, it fills what
// room there is.
func (n *Node) extend(conn *nftset.Conn, s *share, set *nftset.Set, elems []nftset.Element, isFull *bool) error {
	conn.SetTimeout(kernelTimeout)
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
	for name := range strings.SplitSeq(old, separator) {
		if name != "" && !trust.HasName(more, name) && len(more)+len(separator)+len(name) <= nftset.MaxComment {
			more += separator + name
		}
	}
	return more
}
