package snapshot

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"nftwl/pkg/nftset"
)

// Result counts what Restore did with the elements of files.
type Result struct {
	Restored int // added, or given the longer life that the file has
	Expired  int // in the time since the snapshot
	There    int // in the kernel already, for at least as long
}

// target is a set that files are restored into.
type target struct {
	set     *nftset.Set // as the kernel has it, or as the first file defines it
	missing bool
	// there are the elements that the set has, or will have from a file
	// before.
	there map[nftset.Key]nftset.Element
	// repeats is whether an element can occur twice in the files. In one
	// snapshot it does not, so that a large one is restored without the map.
	repeats bool
}

type name struct {
	table nftset.Table
	set   string
}

// Restore merges files into the kernel in one transaction: it creates the
// tables and sets that are missing, as the files define them, and adds the
// elements with the life that is left to them. Those of a snapshot lost what
// has passed since; a clock that went backwards counts as no time. What the
// kernel holds already is never shortened.
func Restore(conn *nftset.Conn, files []*File, now time.Time) (Result, error) {
	// Between the look at what is there and the transaction a login can make a
	// life longer, which the transaction would then shorten. So it names the
	// generation that it is made for. Where the ruleset changes all the time
	// it must do without.
	const attempts = 10
	for attempt := 1; ; attempt++ {
		var generation uint32
		if attempt < attempts {
			var err error
			if generation, err = conn.Generation(); err != nil {
				return Result{}, err
			}
		}
		r, err := restore(conn, files, now, generation)
		if !errors.Is(err, nftset.ErrGeneration) {
			return r, err
		}
	}
}

// restore is an attempt of Restore's, on a generation of the ruleset.
func restore(conn *nftset.Conn, files []*File, now time.Time, generation uint32) (r Result, err error) {
	targets := make(map[name]*target)
	var order []*target // of the files, so that the kernel lists them so
	missing := make(map[nftset.Table]bool)
	for _, f := range files {
		for i := range f.Sets {
			s := &f.Sets[i].Set
			t, seen := targets[name{s.Table, s.Name}]
			if !seen {
				if t, err = find(conn, s, missing); err != nil {
					return r, err
				}
				targets[name{s.Table, s.Name}] = t
				order = append(order, t)
			}
			t.repeats = t.repeats || seen || f.Saved.IsZero()
			if t.set.Key != s.Key {
				return r, otherType(s, t.set.Key.String())
			}
		}
	}

	batch := conn.BatchAt(generation)
	for table := range missing {
		batch.CreateTable(table)
	}
	for _, t := range order {
		if t.missing {
			batch.CreateSet(t.set)
		}
	}
	for _, f := range files {
		elapsed := time.Duration(0)
		if !f.Saved.IsZero() {
			// By wall clock, since the machine may have been down.
			elapsed = max(0, now.Round(0).Sub(f.Saved))
		}
		for i := range f.Sets {
			s := &f.Sets[i]
			if err := targets[name{s.Table, s.Name}].merge(batch, s.Elements, elapsed, &r); err != nil {
				return r, err
			}
		}
	}
	if err := batch.Commit(); err != nil {
		return Result{}, err
	}
	return r, nil
}

// find returns what the kernel has of a set, and notes a table that is
// missing.
func find(conn *nftset.Conn, s *nftset.Set, missing map[nftset.Table]bool) (*target, error) {
	set, err := conn.Set(s.Table, s.Name)
	var e *nftset.Error
	switch {
	case errors.Is(err, nftset.ErrNoTable):
		missing[s.Table] = true
		return &target{set: s, missing: true}, nil
	case errors.Is(err, nftset.ErrNoSet):
		return &target{set: s, missing: true}, nil
	case errors.Is(err, nftset.ErrKeyType) && errors.As(err, &e):
		return nil, otherType(s, e.Type)
	case err != nil:
		return nil, err
	}
	t := &target{set: set, there: make(map[nftset.Key]nftset.Element)}
	elems, err := conn.Elements(set)
	for _, e := range elems {
		t.there[e.Key] = e
	}
	return t, err
}

func otherType(s *nftset.Set, kernel string) error {
	return fmt.Errorf("set %s has keys of type %s, and of type %s in the file", s.Name, kernel, s.Key)
}

// merge adds elements to the batch, with the life that is left to them.
func (t *target) merge(batch *nftset.Batch, elems []nftset.Element, elapsed time.Duration, r *Result) error {
	comments := 0
	for i := range elems {
		comments += len(elems[i].Comment)
	}
	batch.Grow(t.set, len(elems), comments)
	replace := make(map[nftset.Key]nftset.Element)
	for _, e := range elems {
		if !e.Permanent() {
			if e.Expires == 0 {
				e.Expires = e.Timeout
			}
			if e.Expires -= elapsed; e.Expires <= 0 {
				r.Expired++
				continue
			}
			if !t.set.Timeouts {
				return t.set.Writable()
			}
		}
		old, ok := t.there[e.Key]
		switch {
		case !ok:
			batch.Add(t.set, e)
		case old.Outlives(e, time.Second): // the snapshot's time is no more exact
			r.There++
			continue
		default:
			replace[e.Key] = e
		}
		r.Restored++
		if t.repeats {
			if t.there == nil {
				t.there = make(map[nftset.Key]nftset.Element)
			}
			t.there[e.Key] = e
		}
	}
	batch.Replace(t.set, slices.Collect(maps.Values(replace)))
	return nil
}
