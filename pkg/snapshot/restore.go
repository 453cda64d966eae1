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
	Refused []error // the sets and addresses that were left out, and why
	// NotNoted is why the file does not name the present table, so that the next
	// Save restores it again; nil if it does.
	NotNoted error
}

// RestoreSnapshot restores the snapshot at path, and notes in it that it is of
// the present table: otherwise the next Save would bring back what was removed
// from the sets meanwhile. Unless anyone may have written it, it returns an
// *OwnerError for a file that others than root, this user and the owner of the
// directory can have written.
func RestoreSnapshot(path string, conn *nftset.Conn, sets Sets, anyone bool) (r Restored, err error) {
	// If nothing can be written, it is restored all the same.
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
	f, err := ParseSets(text, sets)
	if err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	r.Refused = f.Refused
	// The table can be missing before, or be replaced meanwhile. The elements are
	// in it if it is the same before and after.
	table, _ := conn.Instance(sets.Table)
	const attempts = 10
	for attempt := range attempts {
		before := table
		result, err := Restore(conn, []*File{f}, time.Now)
		if err != nil {
			return r, fmt.Errorf("%s: %w", path, err)
		}
		if attempt == 0 {
			r.Result = result
		}
		if table, r.NotNoted = conn.Instance(sets.Table); r.NotNoted != nil {
			return r, nil
		}
		if table == before {
			r.NotNoted = notLocked
			if notLocked == nil {
				r.NotNoted = note(path, text, f, table)
			}
			return r, nil
		}
	}
	r.NotNoted = errReplaced
	return r, nil
}

// note writes a snapshot again, with another table in its header.
func note(path, text string, f *File, table nftset.Instance) error {
	if f.Saved.IsZero() || f.Table == table {
		return nil // there is no header; or nothing to change
	}
	_, rest, _ := strings.Cut(text, "\n")
	d, err := create(path)
	if err != nil {
		return err
	}
	defer d.discard()
	_, err = io.WriteString(d, header(f.Saved, table))
	if err == nil {
		_, err = io.WriteString(d, rest)
	}
	if err == nil {
		_, err = d.replace(path, "")
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

// Restore merges files into the kernel in one transaction: it creates the tables
// and sets that are missing as the files define them, and adds the elements with
// the time that they have left. From that of a snapshot it subtracts the time
// since; if the clock went backwards, nothing. It never shortens the time left of
// an element that the kernel has.
//
// now tells the time. Restore asks it again when it has to retry.
func Restore(conn *nftset.Conn, files []*File, now func() time.Time) (Result, error) {
	// Between the dump of the sets and the transaction, a login can renew an
	// element. So the transaction names the generation that it is for. If others
	// keep changing the ruleset, small transactions extend what has less time
	// left, and the last one only creates elements, which fails only if a login
	// adds one of them in the same moment.
	const guarded, attempts = 3, 20
	for attempt := 1; ; attempt++ {
		r, err := restore(conn, files, now, attempt <= guarded)
		switch {
		case !errors.Is(err, nftset.ErrGeneration) && !errors.Is(err, nftset.ErrExists):
			return r, err
		case attempt == attempts:
			return Result{}, fmt.Errorf("table %s: %w", files[0].Sets[0].Table, nftset.ErrBusy)
		}
	}
}

// restore is an attempt of Restore's.
func restore(conn *nftset.Conn, files []*File, now func() time.Time, guarded bool) (r Result, err error) {
	generation, err := conn.Generation()
	if err != nil {
		return r, err
	}
	var targets []*target // in the order of the files, in which the kernel lists them
	index := func(s Section) int {
		return slices.IndexFunc(targets, func(t *target) bool { return t.set.Table == s.Table && t.set.Name == s.Name })
	}
	for _, f := range files {
		for _, s := range f.Sets {
			i := index(s)
			if i < 0 {
				t, err := find(conn, &s.Set)
				if err != nil {
					return r, err
				}
				i = len(targets)
				targets = append(targets, t)
			}
			if key := targets[i].set.Key; key != s.Key {
				return r, fmt.Errorf("set %s has keys of type %s, and of type %s in the file", s.Name, key, s.Key)
			}
		}
	}
	for _, f := range files {
		elapsed := time.Duration(0)
		if !f.Saved.IsZero() {
			// By wall clock, because the machine may have been down.
			elapsed = max(0, now().Round(0).Sub(f.Saved))
		}
		for _, s := range f.Sets {
			if err := targets[index(s)].take(s.Elements, elapsed, &r); err != nil {
				return r, err
			}
		}
	}
	for _, t := range targets {
		t.compare(&r)
		if guarded {
			continue
		}
		const most = 64
		for some := range slices.Chunk(t.extend, most) {
			if _, err := conn.Extend(t.set, some, time.Second, nil); err != nil {
				return Result{}, err
			}
		}
		t.extend = nil
	}
	if !guarded {
		generation = 0
	}
	batch := conn.BatchAt(generation)
	for _, t := range targets {
		if t.missing == nftset.ErrNoTable {
			batch.CreateTable(t.set.Table)
		}
		if t.missing != nil {
			batch.CreateSet(t.set)
		}
	}
	for _, t := range targets {
		for _, e := range t.create {
			batch.Create(t.set, e)
		}
		batch.Replace(t.set, t.extend)
	}
	if err := batch.Commit(); err != nil {
		return Result{}, err
	}
	return r, nil
}

// find returns what the kernel has of a set.
func find(conn *nftset.Conn, s *nftset.Set) (*target, error) {
	set, err := conn.Set(s.Table, s.Name)
	switch {
	case errors.Is(err, nftset.ErrNoTable):
		return &target{set: s, missing: nftset.ErrNoTable}, nil
	case errors.Is(err, nftset.ErrNoSet):
		return &target{set: s, missing: nftset.ErrNoSet}, nil
	case err != nil:
		return nil, err
	}
	elems, err := conn.Elements(set)
	return &target{set: set, there: elems}, err
}

// take adds the elements of a file with the time that they have left.
func (t *target) take(elems []nftset.Element, elapsed time.Duration, r *Result) error {
	t.files = slices.Grow(t.files, len(elems))
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
		t.files = append(t.files, e)
	}
	return nil
}

// compare finds which elements of the files the set lacks, and which it has with
// less time left. Of those with the same key, the one that expires last counts.
func (t *target) compare(r *Result) {
	byKey := func(a, b nftset.Element) int { return a.Key.Compare(b.Key) }
	if !slices.IsSortedFunc(t.files, byKey) {
		slices.SortFunc(t.files, byKey)
	}
	there := t.there
	for i, e := range t.files {
		if i > 0 && t.files[i-1].Key == e.Key {
			continue
		}
		for _, twin := range t.files[i+1:] {
			if twin.Key != e.Key {
				break
			}
			if !e.Outlives(twin, 0) {
				e = twin
			}
		}
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
