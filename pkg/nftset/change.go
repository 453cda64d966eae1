package nftset

import (
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

// Extend makes sure that every element is in the set and expires no sooner than
// asked: it adds those that are missing, gives those that would expire sooner
// the new timeout and comment, and leaves alone those whose time left is longer,
// or shorter by at most slack. It never shortens the time left, nor makes a
// permanent element expire, whatever others do at the same time. It returns the
// outcome of each element, in order.
//
// comment returns the comment of an element that is there, from the one that it
// has and the one that was asked for. If it is nil, an element that gets a new
// timeout gets the latter, and the others keep theirs.
//
// It is one transaction, with two exceptions: kernels before 6.12 can need a
// second one, because the first reported success and renewed nothing; and if the
// set has no room for all, Extend renews those that are there and returns
// ErrFull. If the ruleset keeps changing until the deadline, it fails with
// ErrBusy.
func (c *Conn) Extend(s *Set, elems []Element, slack time.Duration, comment func(old, new string) string) ([]Outcome, error) {
	if err := s.Writable(); err != nil {
		return nil, err
	}
	unique, of := merge(elems, comment)
	outcomes, err := c.extendUnique(s, unique, slack, comment)
	if err != nil {
		return nil, err
	}
	all := make([]Outcome, len(elems))
	for i := range elems {
		all[i] = outcomes[of[i]]
	}
	return all, nil
}

// merge makes one element of those with the same key, which expires when the
// last of them does, and returns the index of each in unique.
func merge(elems []Element, comment func(old, new string) string) (unique []Element, of []int) {
	unique, of = make([]Element, 0, len(elems)), make([]int, len(elems))
	at := make(map[Key]int, len(elems))
	for i, e := range elems {
		j, twice := at[e.Key]
		if !twice {
			j = len(unique)
			at[e.Key] = j
			unique = append(unique, e)
		}
		of[i] = j
		if u := &unique[j]; twice {
			if comment != nil {
				e.Comment = comment(u.Comment, e.Comment)
			}
			if u.Permanent() || !e.Permanent() && u.left() > e.left() {
				e.Timeout, e.Expires = u.Timeout, u.Expires
			}
			*u = e
		}
	}
	return unique, of
}

// extendUnique is Extend for elements each of which has a key of its own.
func (c *Conn) extendUnique(s *Set, elems []Element, slack time.Duration, comment func(old, new string) string) ([]Outcome, error) {
	outcomes, renewed, err := c.extend(s, elems, slack, comment, true)
	var there []Element // that would have expired sooner
	for i, o := range outcomes {
		if o == Renewed {
			there = append(there, elems[i])
		}
	}
	if errors.Is(err, ErrFull) && len(there) > 0 && len(there) < len(elems) {
		// The error that counts is the first.
		_, _ = c.extendUnique(s, there, slack, comment)
	}
	if err != nil || renewed == nil {
		return outcomes, err
	}
	// Kernels before 6.12 report success and renew nothing.
	now, err := c.Lookup(s, renewed.Key)
	if err != nil {
		return outcomes, err
	}
	if e := now[renewed.Key]; e.Permanent() || e.Expires > renewed.Expires {
		return outcomes, nil
	}
	_, _, err = c.extend(s, there, slack, comment, false)
	return outcomes, err
}

// extend is one transaction of Extend's. With inPlace it renews without deleting,
// and returns an element that it renewed so, as it was before.
func (c *Conn) extend(s *Set, elems []Element, slack time.Duration, comment func(old, new string) string, inPlace bool) (outcomes []Outcome, renewed *Element, err error) {
	keys := make([]Key, len(elems))
	for i, e := range elems {
		keys[i] = e.Key
	}
	// Between the lookup and the transaction another login can add an element,
	// or renew one for longer. So elements that were missing are created, which
	// fails if they exist by now; and a transaction that renews any names the
	// generation of the lookup, and the kernel refuses it on another. Changes of
	// other sets have it refused too, so it is retried until the deadline.
	for {
		there, generation, err := c.lookup(s, keys)
		if err != nil {
			return nil, nil, err
		}
		outcomes, renewed = make([]Outcome, len(elems)), nil
		var create, renew, replace []Element
		for i, e := range elems {
			old, ok := there[e.Key]
			if ok && comment != nil {
				e.Comment = comment(old.Comment, e.Comment)
			}
			switch kept := ok && old.Outlives(e, slack); {
			case !ok:
				outcomes[i] = Added
				create = append(create, e)
				continue
			case kept && (comment == nil || old.Permanent() || old.Comment == e.Comment):
				continue
			case kept && old.Outlives(e, 0): // it gets the comment alone
				e.Timeout, e.Expires = old.Timeout, old.Expires
			}
			outcomes[i] = Renewed
			if !inPlace || e.Permanent() || old.Comment != e.Comment {
				replace = append(replace, e)
				continue
			}
			// The kernel renews an element whose expiration is given. See Conn
			// for what a deletion costs.
			renewed = &old
			e.Expires = e.left()
			renew = append(renew, e)
		}
		if len(renew)+len(replace) == 0 {
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
		err = batch.Commit()
		if !errors.Is(err, ErrGeneration) && !errors.Is(err, ErrExists) {
			return outcomes, renewed, err
		}
		if c.late() {
			return nil, nil, s.error(ErrBusy)
		}
	}
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

// Replace gives elements a new timeout and comment, on every kernel: it adds them,
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
// changing until the deadline, it fails with ErrBusy.
func (c *Conn) Remove(s *Set, keys []Key, match func(Element) bool) ([]Element, error) {
	if s.Constant {
		return nil, s.error(ErrConstant)
	}
	for {
		there, generation, err := c.lookup(s, keys)
		if err != nil {
			return nil, err
		}
		if match == nil {
			generation = 0
		}
		batch := c.BatchAt(generation)
		var removed []Element
		for _, k := range keys {
			if e, ok := there[k]; ok && (match == nil || match(e)) {
				batch.Delete(s, k)
				removed = append(removed, e)
				delete(there, k) // a key given twice is deleted once
			}
		}
		err = batch.Commit()
		switch {
		case errors.Is(err, ErrNotFound), errors.Is(err, ErrGeneration):
			// One expired, was deleted or got another comment in between.
			if c.late() {
				return nil, s.error(ErrBusy)
			}
		case err != nil:
			return nil, err
		default:
			return removed, nil
		}
	}
}

// Elements returns the elements of a set, each once, ordered by key, with the
// time left that they have when it returns.
//
// A dump during which the set changed can lack elements; see Dump. Then Elements
// dumps again and unites what it got, until it is unlikely that each dump lacks
// the same element.
func (c *Conn) Elements(s *Set) ([]Element, error) {
	start := time.Now()
	all, err := c.dump(s)
	if !errors.Is(err, ErrInterrupted) {
		return all, err
	}
	// How many are missing from each dump is estimated as animals are counted
	// that were caught twice: of n, a dump that lacks m lacks each with the
	// probability m/n.
	const attempts, unlikely = 8, 1e-3
	missing := 1.0
	for attempt := 2; ; attempt++ {
		at := time.Now()
		// Elements go missing where one buffer ends and the next begins, so each
		// dump has buffers of another size. The kernel remembers the largest that
		// a socket has had, so each has a socket of its own.
		other, err := Dial()
		if err != nil {
			return nil, err
		}
		other.buf = make([]byte, dumpBuffer-(attempt-1)<<10)
		other.deadline, other.timeout = c.deadline, c.timeout
		one, err := other.dump(s)
		c.deadline = other.deadline
		other.Close()
		if err == nil {
			return one, nil
		}
		if !errors.Is(err, ErrInterrupted) {
			return nil, err
		}
		var before, now int
		if all, before, now, err = c.union(s, all, one, time.Since(at), time.Since(start)); err != nil {
			return nil, err
		}
		if attempt == 2 {
			missing = float64(before + 1)
		}
		missing *= float64(now+1) / float64(len(all)+1)
		if missing < unlikely || attempt == attempts {
			return all, nil
		}
	}
}

// dump returns the elements of a dump, each once, ordered by key, with the time
// left that they have when it returns; with ErrInterrupted, those that did arrive.
//
// An element that came twice is a sign, too, that others are missing: the kernel
// resizes the hash table some time after many elements were added.
func (c *Conn) dump(s *Set) (elems []Element, err error) {
	start := time.Now()
	elems = make([]Element, 0, s.Count)
	err = c.Dump(s, func(e Element) error {
		// Counted from the start until the end is known.
		e.Expires += time.Since(start)
		elems = append(elems, e)
		return nil
	})
	if err != nil && !errors.Is(err, ErrInterrupted) {
		return nil, err
	}
	slices.SortFunc(elems, func(a, b Element) int { return a.Key.Compare(b.Key) })
	kept := elems[:0]
	for _, e := range elems {
		if last := len(kept) - 1; last >= 0 && kept[last].Key == e.Key {
			err = s.error(ErrInterrupted)
			// The one that was read later has no less time left.
			if e.Expires > kept[last].Expires {
				kept[last] = e
			}
			continue
		}
		kept = append(kept, e)
	}
	return age(kept, time.Since(start)), err
}

// age subtracts time that has passed, and leaves out what has expired.
func age(elems []Element, passed time.Duration) []Element {
	kept := elems[:0]
	for _, e := range elems {
		if e.Permanent() {
			e.Expires = 0
		} else if e.Expires = min(e.Expires-passed, e.Timeout); e.Expires <= 0 {
			continue
		}
		kept = append(kept, e)
	}
	return kept
}

// union returns what is in a set of what earlier dumps have and one later dump
// has. It looks up what only one of the two has. Of that, before is how many the
// earlier ones lack that were there since they began, and now how many the later
// one lacks.
func (c *Conn) union(s *Set, all, one []Element, later, since time.Duration) (union []Element, before, now int, err error) {
	all = age(all, later)
	var odd []Key
	inAll := make(map[Key]bool) // of odd
	for len(all) > 0 || len(one) > 0 {
		order := -1
		if len(all) == 0 {
			order = 1
		} else if len(one) > 0 {
			order = all[0].Key.Compare(one[0].Key)
		}
		switch {
		case order < 0:
			inAll[all[0].Key] = true
			odd, all = append(odd, all[0].Key), all[1:]
		case order > 0:
			odd, one = append(odd, one[0].Key), one[1:]
		default:
			union, all, one = append(union, one[0]), all[1:], one[1:]
		}
	}
	found, err := c.Lookup(s, odd...)
	if err != nil {
		return nil, 0, 0, err
	}
	for _, e := range found {
		union = append(union, e)
		switch {
		case inAll[e.Key]:
			now++
		case e.Permanent() || e.Timeout-e.Expires > since:
			before++
		}
	}
	slices.SortFunc(union, func(a, b Element) int { return a.Key.Compare(b.Key) })
	return union, before, now, nil
}
