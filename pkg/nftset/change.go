package nftset

import (
	"cmp"
	"errors"
	"slices"
	"time"
)

// Outcome is what Extend did to an element.
type Outcome int

// The outcomes.
const (
	Unchanged Outcome = iota // its time left is long enough
	Added                    // it was not there
	Renewed                  // it was there, and has more time left now
)

func (o Outcome) String() string { return [...]string{"unchanged", "added", "renewed"}[o] }

// retry repeats a change, which is a lookup and then a transaction, while other
// transactions come between the two. After the deadline it fails with ErrBusy.
func (c *Conn) retry(s *Set, change func() error) error {
	for {
		err := change()
		if !errors.Is(err, ErrGeneration) && !errors.Is(err, ErrExists) && !errors.Is(err, ErrNotFound) {
			return err
		}
		if c.late() {
			return s.error(ErrBusy)
		}
	}
}

// Extend makes sure that every element is in the set and expires no sooner than
// asked: it adds those that are missing, gives those that would expire sooner
// the new timeout and comment, and leaves alone those whose time left is longer,
// or shorter by at most slack. It never shortens the time left, nor makes a
// permanent element expire, whatever others do at the same time. It returns the
// outcome of each element, in order. Of elements with the same key, the first
// counts.
//
// comment returns the comment of an element that is there, from the one that it
// has and the one that was asked for. If it is nil, an element that gets a new
// timeout gets the latter, and the others keep theirs.
//
// It is one transaction, with one exception: if the set has no room for all,
// Extend renews those that are there and returns ErrFull. If the ruleset keeps
// changing until the deadline, it fails with ErrBusy.
func (c *Conn) Extend(s *Set, elems []Element, slack time.Duration, comment func(old, new string) string) ([]Outcome, error) {
	if err := s.Writable(); err != nil {
		return nil, err
	}
	keys := make([]Key, len(elems))
	for i, e := range elems {
		keys[i] = e.Key
	}
	outcomes := make([]Outcome, len(elems))
	var there []Element // that would expire sooner
	// Between the lookup and the transaction another login can add an element,
	// or renew one for longer. So the transaction creates what was missing, which
	// fails if it exists by now; and if it renews any, it names the generation of
	// the lookup, and the kernel refuses it on another.
	err := c.retry(s, func() error {
		found, generation, err := c.lookup(s, keys)
		if err != nil {
			return err
		}
		var create, renew, replace []Element
		there = nil
		first := make(map[Key]int, len(elems))
		for i, e := range elems {
			if j, twice := first[e.Key]; twice {
				outcomes[i] = outcomes[j]
				continue
			}
			first[e.Key] = i
			old, ok := found[e.Key]
			if !ok {
				outcomes[i] = Added
				create = append(create, e)
				continue
			}
			if comment != nil {
				e.Comment = comment(old.Comment, e.Comment)
			}
			switch kept := old.Outlives(e, slack); {
			case kept && (comment == nil || old.Permanent() || old.Comment == e.Comment):
				outcomes[i] = Unchanged
				continue
			case kept && old.Outlives(e, 0): // it gets the comment alone
				e.Timeout, e.Expires = old.Timeout, old.Expires
			}
			outcomes[i] = Renewed
			there = append(there, elems[i])
			if !e.Permanent() && old.Comment == e.Comment && c.renewsInPlace() {
				e.Expires = e.left()
				renew = append(renew, e)
			} else {
				replace = append(replace, e)
			}
		}
		if len(there) == 0 {
			generation = 0
		}
		batch := c.BatchAt(generation)
		for _, e := range create {
			batch.Create(s, e)
		}
		for _, e := range renew {
			batch.Add(s, e)
		}
		batch.Replace(s, replace)
		return batch.Commit()
	})
	if errors.Is(err, ErrFull) && len(there) > 0 && len(there) < len(elems) {
		// The error that counts is the first.
		_, _ = c.Extend(s, there, slack, comment)
	}
	if err != nil {
		return nil, err
	}
	return outcomes, nil
}

// Outlives reports whether an element of a set expires no sooner than another
// that is to be written there, less slack.
func (e Element) Outlives(other Element, slack time.Duration) bool {
	if e.Permanent() || other.Permanent() {
		return e.Permanent()
	}
	return e.Expires >= other.left()-slack
}

// left is the time left of an element that is to be written.
func (e Element) left() time.Duration {
	if e.Expires > 0 {
		return e.Expires
	}
	return e.Timeout
}

// Replace gives elements a new timeout and comment on every kernel: it adds them,
// so that no deletion fails, deletes them, and adds them again.
func (b *Batch) Replace(s *Set, elems []Element) {
	for _, e := range elems {
		b.Add(s, e)
	}
	for _, e := range elems {
		b.Delete(s, e.Key)
	}
	for _, e := range elems {
		b.Add(s, e)
	}
}

// Remove deletes those of some elements that are in the set and that match
// accepts; a nil match accepts all. It returns those that it deleted. If they keep
// changing until the deadline, Remove fails with ErrBusy.
func (c *Conn) Remove(s *Set, keys []Key, match func(Element) bool) (removed []Element, err error) {
	err = c.retry(s, func() error {
		there, generation, err := c.lookup(s, keys)
		if err != nil {
			return err
		}
		if match == nil {
			generation = 0
		}
		batch := c.BatchAt(generation)
		removed = nil
		for _, k := range keys {
			if e, ok := there[k]; ok && (match == nil || match(e)) {
				batch.Delete(s, k)
				removed = append(removed, e)
				delete(there, k) // a key given twice is deleted once
			}
		}
		return batch.Commit()
	})
	if err != nil {
		return nil, err
	}
	return removed, nil
}

// Elements returns the elements of a set, each once, ordered by key, with the
// time left that they have when it returns.
//
// A dump during which the set changed can lack elements; see Dump. Then Elements
// dumps again and unites what it got, until it is unlikely that all dumps lack the
// same element.
func (c *Conn) Elements(s *Set) ([]Element, error) {
	const dumps = 8 // at most
	start := time.Now()
	all, err := c.dump(s, start)
	// How many are missing from each dump is estimated as animals are counted that
	// were caught twice: of n, a dump that lacks m lacks each with the probability
	// m/n.
	missing := 1.0
	for n := 1; errors.Is(err, ErrInterrupted) && n < dumps; n++ {
		// Elements go missing where one buffer ends and the next begins, so each
		// dump has buffers of another size. The kernel remembers the largest that
		// a socket has had, so each has a socket of its own.
		other, e := Dial()
		if e != nil {
			return nil, e
		}
		other.buf = make([]byte, dumpBuffer-n<<10)
		other.deadline, other.timeout = c.deadline, c.timeout
		one, e := other.dump(s, start)
		c.deadline = other.deadline
		other.Close()
		if errors.Is(e, ErrInterrupted) {
			var before, now int
			one, before, now, e = c.unite(s, all, one, start)
			if n == 1 {
				missing = float64(before + 1)
			}
			missing *= float64(now+1) / float64(len(one)+1)
			if e == nil && missing > 1e-3 {
				e = s.error(ErrInterrupted)
			}
		}
		all, err = one, e
	}
	if err != nil && !errors.Is(err, ErrInterrupted) {
		return nil, err
	}
	passed := time.Since(start)
	left := all[:0]
	for _, e := range all {
		if !e.Permanent() {
			if e.Expires = min(e.Expires-passed, e.Timeout); e.Expires <= 0 {
				continue
			}
		}
		left = append(left, e)
	}
	return left, nil
}

// dump returns the elements of a dump, each once, ordered by key, with their time
// left counted from start; with ErrInterrupted, those that did arrive.
//
// An element that came twice is another sign that some are missing: the kernel
// resizes the hash table a while after many elements were added.
func (c *Conn) dump(s *Set, start time.Time) ([]Element, error) {
	elems := make([]Element, 0, s.Count)
	err := c.Dump(s, func(e Element) { elems = append(elems, e.countedFrom(start, time.Now())) })
	slices.SortFunc(elems, func(a, b Element) int {
		if c := a.Compare(b.Key); c != 0 {
			return c
		}
		return cmp.Compare(b.Expires, a.Expires) // it can be renewed in between
	})
	n := len(elems)
	elems = slices.CompactFunc(elems, func(a, b Element) bool { return a.Key == b.Key })
	if err == nil && len(elems) < n {
		err = s.error(ErrInterrupted)
	}
	return elems, err
}

// countedFrom returns an element that was read at some time, with its time left
// counted from an earlier start.
func (e Element) countedFrom(start, read time.Time) Element {
	if !e.Permanent() {
		e.Expires += read.Sub(start)
	}
	return e
}

// unite returns those elements of earlier dumps (all) and of a later one that are
// in the set; it looks up what only one of the two has. Of that, before is how many
// the earlier ones lack that were there at start, and now how many the later one
// lacks.
func (c *Conn) unite(s *Set, all, one []Element, start time.Time) (both []Element, before, now int, err error) {
	in := func(list []Element, k Key) bool {
		_, ok := slices.BinarySearchFunc(list, k, func(e Element, k Key) int { return e.Compare(k) })
		return ok
	}
	var odd []Key
	for _, e := range all {
		if !in(one, e.Key) {
			odd = append(odd, e.Key)
		}
	}
	for _, e := range one {
		if in(all, e.Key) {
			both = append(both, e)
		} else {
			odd = append(odd, e.Key)
		}
	}
	read := time.Now()
	found, err := c.Lookup(s, odd...)
	if err != nil {
		return nil, 0, 0, err
	}
	for k, e := range found {
		switch {
		case in(all, k):
			now++
		case e.Permanent() || e.Timeout-e.Expires > read.Sub(start):
			before++
		}
		both = append(both, e.countedFrom(start, read))
	}
	slices.SortFunc(both, func(a, b Element) int { return a.Compare(b.Key) })
	return both, before, now, nil
}
