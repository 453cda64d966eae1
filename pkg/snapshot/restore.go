package snapshot

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"nftwl/pkg/nftset"
)

// Result counts what Restore did with the elements of files.
type Result struct {
	Restored int // added, or given the longer time left that the file has
	Expired  int // in the time since the snapshot
	There    int // in the kernel already, and expire no sooner
}

// String puts the counts into words.
func (r Result) String() string {
	return fmt.Sprintf("restored %d, expired %d, already there %d", r.Restored, r.Expired, r.There)
}

// Restored is what became of a snapshot.
type Restored struct {
	Result
	Refused []error // why sets and addresses were left out
	// NotNoted is why the file does not name the present table, so that the next
	// Save will restore it again; nil if it does.
	NotNoted error
}

// RestoreSnapshot restores the snapshot at path, and notes in it that it is of
// the present table: otherwise the next Save would bring back what was removed
// from the sets meanwhile. Unless anyone may have written it, the file must pass
// CheckOwner.
func RestoreSnapshot(path string, conn *nftset.Conn, sets Sets, anyone bool) (r Restored, err error) {
	// A snapshot that cannot be written is restored too.
	unlock, notLocked := lock(path)
	if notLocked == nil {
		defer unlock()
	}
	if !anyone {
		if err := CheckOwner(path); err != nil {
			return r, err
		}
	}
	text, err := Read(path)
	if err != nil {
		return r, err
	}
	// The table can be missing before, or be replaced meanwhile. If it is the same
	// before and after, it has the elements.
	table, _ := conn.Instance(sets.Table)
	for n := range attempts {
		before := table
		result, refused, err := restoreText(text, conn, sets)
		if err != nil {
			return r, fmt.Errorf("%s: %w", path, err)
		}
		if n == 0 {
			r.Result, r.Refused = result, refused
		}
		table, err = conn.Instance(sets.Table)
		switch {
		case err != nil:
			r.NotNoted = err
		case table != before:
			r.NotNoted = errReplaced
			continue
		case notLocked != nil:
			r.NotNoted = notLocked
		default:
			r.NotNoted = note(path, text, table)
		}
		break
	}
	return r, nil
}

// restoreText restores the sets of a file.
func restoreText(text string, conn *nftset.Conn, sets Sets) (r Result, refused []error, err error) {
	f, err := ParseSets(text, sets)
	if err != nil {
		return r, nil, err
	}
	r, err = Restore(conn, []*File{f})
	return r, f.Refused, err
}

// attempts is how often a save or a restore is repeated if the table is replaced
// meanwhile.
const attempts = 10

// note writes a snapshot again, with another table in its header.
func note(path, text string, table nftset.Instance) error {
	first, rest, _ := strings.Cut(text, "\n")
	saved, of, err := parseHeader(first)
	if err != nil || saved.IsZero() || of == table {
		return err // there is no header; or nothing to change
	}
	d, err := draft(path)
	if err != nil {
		return err
	}
	defer discard(d)
	_, err = io.Copy(d, io.MultiReader(strings.NewReader(header(saved, table)), strings.NewReader(rest)))
	if err == nil {
		_, err = replace(d, path, "")
	}
	return err
}

// target is a set that files are restored into.
type target struct {
	set     *nftset.Set // as the kernel has it, or as the first file defines it
	missing error       // ErrNoTable or ErrNoSet
	there   []nftset.Element
	files   []nftset.Element // of all files, with the time that they have left
	create  []nftset.Element // what of files is not there
	extend  []nftset.Element // what of files is there with less time left
}

// Restore merges files into the kernel: in one transaction or, while a program
// listens to changes, in several of at most nftset.Room elements, or in small ones
// if logins keep adding the same elements. If it fails, the first of several are
// done. It creates the tables and sets that are missing as the files define them,
// and adds the elements with their time left. From that of a snapshot it subtracts
// the time since it was saved, or nothing if the clock went backwards. It never
// shortens the time left of an element that the kernel has.
func Restore(conn *nftset.Conn, files []*File) (r Result, err error) {
	// Between the dump of the sets and the transaction, a login can renew an
	// element. So the transaction names the generation that it is for. If others
	// keep changing the ruleset, small transactions extend what has less time
	// left, and the last one only creates elements: it fails only if a login adds
	// one of them at the same moment. If that goes on, small ones create them, too.
	room := nftset.Room()
	done := 0 // by attempts that failed in a later transaction
	for attempt := range 2 * wholeAttempts {
		r, err = restore(conn, files, attempt, room)
		if err == nil {
			r.Restored, r.There = r.Restored+done, max(0, r.There-done)
			return r, nil
		}
		if !errors.Is(err, nftset.ErrGeneration) && !errors.Is(err, nftset.ErrExists) {
			return Result{}, err
		}
		done += r.Restored
	}
	return Result{}, fmt.Errorf("table %s: %w", files[0].Sets[0].Table, nftset.ErrBusy)
}

const (
	guardedAttempts = 3  // name the generation
	wholeAttempts   = 10 // create all in one transaction, if there is room
)

// restore is one attempt of Restore. If it fails, the result counts what it has
// restored.
func restore(conn *nftset.Conn, files []*File, attempt, room int) (r Result, err error) {
	generation, err := conn.Generation()
	if err != nil {
		return Result{}, err
	}
	type part struct {
		*Section
		saved time.Time
		to    *target
	}
	var parts []part
	var targets []*target // in the order of the files, in which the kernel lists them
	for _, f := range files {
		for i := range f.Sets {
			s := &f.Sets[i]
			n := slices.IndexFunc(targets, func(t *target) bool { return t.set.Table == s.Table && t.set.Name == s.Name })
			if n < 0 {
				t, err := find(conn, &s.Set)
				if err != nil {
					return r, err
				}
				n = len(targets)
				targets = append(targets, t)
			}
			if key := targets[n].set.Key; key != s.Key {
				return r, fmt.Errorf("set %s has keys of type %s, and of type %s in the file", s.Name, key, s.Key)
			}
			parts = append(parts, part{s, f.Saved, targets[n]})
		}
	}
	taken := time.Now() // after all dumps, which take time
	for _, p := range parts {
		if err := p.to.take(p.Elements, p.saved, &r); err != nil {
			return Result{}, err
		}
	}
	extend := 0
	for _, t := range targets {
		t.compare(&r)
		if err := t.set.Fits(len(t.there) + len(t.create)); err != nil {
			return Result{}, err
		}
		extend += len(t.extend)
	}
	if attempt >= guardedAttempts || 3*extend > room { // Replace takes three for each
		generation = 0
		const most = 64
		for _, t := range targets {
			if attempt >= wholeAttempts && t.missing == nil && t.set.Timeouts { // no login writes to others
				t.extend, t.create = append(t.extend, t.create...), nil
			}
			for some := range slices.Chunk(t.extend, most) {
				if _, err := conn.Extend(t.set, left(some, taken), time.Second, nil); err != nil {
					return Result{}, err
				}
			}
			t.extend = nil
		}
	}
	batch := conn.BatchAt(generation)
	for _, t := range targets {
		if errors.Is(t.missing, nftset.ErrNoTable) {
			batch.CreateTable(t.set.Table)
		}
		if t.missing != nil {
			batch.CreateSet(t.set)
		}
	}
	for _, t := range targets {
		batch.Replace(t.set, t.extend)
	}
	free, done := room, 0
	for _, t := range targets {
		for len(t.create) > 0 {
			if free == 0 {
				if err := batch.Commit(); err != nil {
					return Result{Restored: done}, err
				}
				batch, free, done = conn.Batch(), room, done+room
			}
			some := t.create[:min(free, len(t.create))]
			batch.Grow(len(some))
			for _, e := range left(some, taken) {
				batch.Create(t.set, e)
			}
			t.create, free = t.create[len(some):], free-len(some)
		}
	}
	if err := batch.Commit(); err != nil {
		return Result{Restored: done}, err
	}
	return r, nil
}

// left returns those elements whose time is not over, some time after it was
// counted: the transactions before this one can take long.
func left(elems []nftset.Element, counted time.Time) []nftset.Element {
	passed := time.Since(counted)
	if passed < time.Second {
		return elems
	}
	var some []nftset.Element
	for _, e := range elems {
		if e.Permanent() {
			some = append(some, e)
		} else if e.Expires -= passed; e.Expires > 0 {
			some = append(some, e)
		}
	}
	return some
}

// find returns what the kernel has of a set.
func find(conn *nftset.Conn, s *nftset.Set) (*target, error) {
	set, err := conn.Set(s.Table, s.Name)
	switch {
	case errors.Is(err, nftset.ErrNoTable), errors.Is(err, nftset.ErrNoSet):
		return &target{set: s, missing: err}, nil
	case err != nil:
		return nil, err
	}
	elems, err := conn.Elements(set)
	return &target{set: set, there: elems}, err
}

// take adds the elements of a file that was saved at some time.
func (t *target) take(elems []nftset.Element, saved time.Time, r *Result) error {
	passed := time.Duration(0)
	if !saved.IsZero() {
		// By wall clock, because the machine may have been down.
		passed = max(0, time.Now().Round(0).Sub(saved))
	}
	t.files = slices.Grow(t.files, len(elems))
	for _, e := range elems {
		if !e.Permanent() {
			if e.Expires == 0 {
				e.Expires = e.Timeout
			}
			if e.Expires -= passed; e.Expires <= 0 {
				r.Expired++
				continue
			}
			if err := t.set.Writable(); err != nil {
				return err
			}
		}
		t.files = append(t.files, e)
	}
	return nil
}

// compare finds which elements of the files the set lacks, and which it has with
// less time left. Of those with the same key, the one that expires last counts.
func (t *target) compare(r *Result) {
	slices.SortFunc(t.files, func(a, b nftset.Element) int {
		switch c := a.Key.Compare(b.Key); {
		case c != 0:
			return c
		case !a.Outlives(b, 0):
			return 1
		case !b.Outlives(a, 0):
			return -1
		}
		return 0
	})
	t.files = slices.CompactFunc(t.files, func(a, b nftset.Element) bool { return a.Key == b.Key })
	there := t.there
	for _, e := range t.files {
		for len(there) > 0 && there[0].Key.Compare(e.Key) < 0 {
			there = there[1:]
		}
		switch {
		case len(there) == 0 || there[0].Key != e.Key:
			t.create = append(t.create, e)
		case there[0].Outlives(e, time.Second): // a snapshot's time is no more exact
			r.There++
			continue
		default:
			t.extend = append(t.extend, e)
		}
		r.Restored++
	}
}
