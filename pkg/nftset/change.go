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
// the new timeout and comment, and leaves those alone whose time left is longer,
// or shorter by no more than slack. It never shortens the time left, nor makes a
// permanent element expire, whatever others do at the same time. The outcomes are
// those of the elements, in order.
//
// comment returns the comment of an element that is there, of the one that it has
// and the one that was asked for. With nil, an element that gets a new timeout
// gets the latter, and the others keep theirs.
//
// All is one transaction. On kernels before 6.12 it can take a second one,
// after the first turned out to have renewed nothing; and where the set is too
// full for all, those that are there already are renewed alone. Where the ruleset
// keeps changing until the deadline, Extend fails with ErrBusy.
func (c *Conn) Extend(s *Set, elems []Element, slack time.Duration, comment func(old, new string) string) ([]Outcome, error) {
	if err := s.Writable(); err != nil {
		return nil, err
	}
	unique, of := merge(elems, comment)
	outcomes, err := c.extendUnique(s, unique, slack, comment)
	if len(unique) == len(elems) || outcomes == nil {
		return outcomes, err
	}
	all := make([]Outcome, len(elems))
	for i := range elems {
		all[i] = outcomes[of[i]]
	}
	return all, err
}

// merge makes one element of those with the same key, which expires when the
// last of them does, and tells where each went.
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
	// What was there, and was to expire later.
	there := func() (some []Element) {
		for i, e := range elems {
			if outcomes[i] == Renewed {
				some = append(some, e)
			}
		}
		return some
	}
	if errors.Is(err, ErrFull) {
		if some := there(); len(some) > 0 && len(some) < len(elems) {
			// The error that counts is the first.
			_, _ = c.extendUnique(s, some, slack, comment)
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
	_, _, err = c.extend(s, there(), slack, comment, false)
	return outcomes, err
}

// extend is one transaction of Extend's. With inPlace it has the kernel renew
// without deleting; an element that it asked that for is returned as it was.
func (c *Conn) extend(s *Set, elems []Element, slack time.Duration, comment func(old, new string) string, inPlace bool) (outcomes []Outcome, renewed *Element, err error) {
	keys := make([]Key, len(elems))
	for i, e := range elems {
		keys[i] = e.Key
	}
	// Between the lookup and the transaction another login can add an element,
	// or renew one for longer. So elements that were missing are created, which
	// fails where they exist by now; and a transaction that renews any names the
	// generation of the ruleset that was looked at, and is refused on another.
	// A stranger's change refuses it too, so it is tried again until the
	// deadline, and never without that guard.
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
			// Without a deletion, so that a login does not wait for RCU when
			// the connection closes: the kernel renews an element whose
			// expiration is given.
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

// Outlives tells whether an element of a set expires no sooner than another that
// is to be written there, less slack.
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

// Replace gives elements a new timeout and comment on every kernel: added, so that
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
// accepts; a nil match accepts all. It returns the ones deleted. Where the
// elements keep changing until the deadline, it fails with ErrBusy.
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
// A dump during which the ruleset changed can lack elements (see Dump). Then
// further ones are taken and put together, until it is unlikely that an element
// is missing from each of them.
func (c *Conn) Elements(s *Set) ([]Element, error) {
	start := time.Now()
	all, err := c.dump(s, dumpBuffer)
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
		// Elements go missing where the kernel ends one buffer and begins the
		// next. Another size has it do so at others. The kernel takes the largest
		// that a socket has had, so that each size needs a socket of its own.
		other, err := Dial()
		if err != nil {
			return nil, err
		}
		other.deadline, other.timeout = c.deadline, c.timeout
		one, err := other.dump(s, dumpBuffer-(attempt-1)<<10)
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
// left that they have when it returns. With the error ErrInterrupted it returns
// those that did arrive.
func (c *Conn) dump(s *Set, buffer int) (elems []Element, err error) {
	start := time.Now()
	elems = make([]Element, 0, s.Count)
	err = c.dumpInto(buffer, s, func(e Element) error {
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
			// The one that was read later counts, which has no less time left.
			if e.Expires > kept[last].Expires {
				kept[last] = e
			}
			continue
		}
		kept = append(kept, e)
	}
	return age(kept, time.Since(start)), err
}

// age takes off time that has passed, and leaves out what has expired.
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

// union returns what is in a set, of what earlier dumps saw and of one more, which
// came later. What only one of the two has is looked up. before is how many of
// that the earlier ones lack though it was there since they began, and now how
// many the last one lacks.
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
