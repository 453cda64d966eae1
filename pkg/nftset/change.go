package nftset

import (
	"errors"
	"maps"
	"slices"
	"time"
)

// Outcome is what Extend did to an element.
type Outcome int

// The outcomes.
const (
	Kept     Outcome = iota // it lives for long enough already
	Added                   // it was not there
	Extended                // it was there, and lives longer now
)

// Extend sees to it that every element is in the set, and lives at least as
// long as asked: it adds those that are missing, gives those that would expire
// sooner the new timeout and comment, and leaves those alone whose remaining
// life is longer, or shorter by no more than slack. It never shortens a life
// nor makes a permanent element expire, whatever others do at the same time.
// The outcomes are those of the elements, in order.
//
// All is one transaction. On kernels before 6.12 it can take a second one,
// after the first turned out to have renewed nothing; and where the set is too
// full for all, those that are there already are renewed alone.
func (c *Conn) Extend(s *Set, elems []Element, slack time.Duration) ([]Outcome, error) {
	if err := s.Writable(); err != nil {
		return nil, err
	}
	outcomes, renewed, err := c.extend(s, elems, slack, true)
	// What was there, and was to live longer.
	there := func() (some []Element) {
		for i, e := range elems {
			if outcomes[i] == Extended {
				some = append(some, e)
			}
		}
		return some
	}
	if errors.Is(err, ErrFull) {
		if some := there(); len(some) > 0 && len(some) < len(elems) {
			// The error that counts is the first.
			_, _ = c.Extend(s, some, slack)
		}
	}
	if err != nil || renewed == nil {
		return outcomes, err
	}
	// Kernels before 6.12 renew nothing so, and report success.
	now, err := c.Lookup(s, renewed.Key)
	if err != nil {
		return outcomes, err
	}
	if e := now[renewed.Key]; e.Permanent() || e.Expires > renewed.Expires {
		return outcomes, nil
	}
	_, _, err = c.extend(s, there(), slack, false)
	return outcomes, err
}

// extend is one transaction of Extend's. With renew it has the kernel renew
// without deleting; an element that it asked that for is returned as it was.
func (c *Conn) extend(s *Set, elems []Element, slack time.Duration, renew bool) (outcomes []Outcome, renewed *Element, err error) {
	keys := make([]Key, len(elems))
	for i, e := range elems {
		keys[i] = e.Key
	}
	// Between the look-up and the transaction another login can give an
	// element a longer life. So the kernel is told which generation of the
	// ruleset was looked at, and refuses if it is another by now. On a machine
	// that changes its ruleset all the time it must do without.
	const attempts = 20
	for attempt := 1; ; attempt++ {
		there, generation, err := c.lookup(s, keys)
		if err != nil {
			return nil, nil, err
		}
		if attempt == attempts {
			generation = 0
		}
		outcomes, renewed = make([]Outcome, len(elems)), nil
		batch := c.BatchAt(generation)
		var replace []Element
		for i, e := range elems {
			old, ok := there[e.Key]
			switch {
			case !ok:
				outcomes[i] = Added
				batch.Add(s, e)
			case old.Outlives(e, slack):
				outcomes[i] = Kept
			case !renew || e.Permanent() || old.Comment != e.Comment:
				outcomes[i] = Extended
				replace = append(replace, e)
			default:
				// Without a deletion, so that a login does not wait for RCU
				// when the connection closes: the kernel renews an element
				// whose expiration is said.
				outcomes[i] = Extended
				renewed = &old
				e.Expires = e.Timeout
				batch.Add(s, e)
			}
		}
		batch.Replace(s, replace)
		if err := batch.Commit(); !errors.Is(err, ErrGeneration) {
			return outcomes, renewed, err
		}
	}
}

// Outlives tells whether an element of a set lives as long as another that is
// to be written there, less slack.
func (e Element) Outlives(other Element, slack time.Duration) bool {
	if e.Permanent() || other.Permanent() {
		return e.Permanent()
	}
	life := other.Timeout
	if other.Expires > 0 {
		life = other.Expires
	}
	return e.Expires >= life-slack
}

// Replace gives elements a new life and comment on every kernel: added, so that
// the deletion cannot miss one, deleted, and added anew.
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

// Remove deletes those of the elements that are in the set and that match
// accepts; a nil match accepts all. It returns the ones deleted.
func (c *Conn) Remove(s *Set, keys []Key, match func(Element) bool) ([]Element, error) {
	if s.Constant {
		return nil, s.error(ErrConstant)
	}
	for {
		there, err := c.Lookup(s, keys...)
		if err != nil {
			return nil, err
		}
		batch := c.Batch()
		var removed []Element
		for _, k := range keys {
			if e, ok := there[k]; ok && (match == nil || match(e)) {
				batch.Delete(s, k)
				removed = append(removed, e)
				delete(there, k) // a key given twice is deleted once
			}
		}
		err = batch.Commit()
		if errors.Is(err, ErrNotFound) {
			// One expired or was deleted in between. What is left is looked
			// up again; every round has fewer.
			continue
		}
		if err != nil {
			return nil, err
		}
		return removed, nil
	}
}

// attempts is how often an interrupted dump is taken again.
const attempts = 8

// Elements returns the elements of a set, each once, in no order.
//
// A dump that a change of the ruleset interrupted is taken again. Where the
// ruleset keeps changing, what all of the dumps saw is put together: an
// element that was there all the time is hardly ever missing from each.
func (c *Conn) Elements(s *Set) ([]Element, error) {
	union := make(map[Key]Element)
	for attempt := 1; ; attempt++ {
		whole := make(map[Key]Element)
		err := c.Dump(s, func(e Element) error {
			whole[e.Key] = e
			return nil
		})
		if err == nil {
			return slices.Collect(maps.Values(whole)), nil
		}
		if !errors.Is(err, ErrInterrupted) {
			return nil, err
		}
		maps.Copy(union, whole)
		if attempt == attempts {
			return slices.Collect(maps.Values(union)), nil
		}
	}
}
