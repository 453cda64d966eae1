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
	Passed  []string // what is in the file besides the sets, as File has it
	Refused []error  // the addresses that were left out, and why
	// NotNoted is why the file does not name the present table now, so that the
	// next Save restores it once more; nil where it does.
	NotNoted error
}

// RestoreSnapshot restores the snapshot at path, and notes in it that it is of
// the present table now: what is removed from the sets later is not brought back
// by the next Save. Unless anyone may have written it, the file must be one that
// only root, this user or the owner of its directory can have written.
func RestoreSnapshot(path string, conn *nftset.Conn, sets Sets, anyone bool) (r Restored, err error) {
	// Where nothing can be written, it is restored all the same.
	unlock, notLocked := lock(path)
	if notLocked == nil {
		defer unlock()
	}
	if !anyone {
		if err := CheckOwner(path); err != nil {
			return r, err
		}
	}
	f, text, err := r.load(path, sets)
	if err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	// The table can be missing before, or be replaced meanwhile. The elements are
	// in the one that was there before and is after.
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

// load reads a file, of which it takes the sets without the addresses that are
// refused.
func (r *Restored) load(path string, sets Sets) (f *File, text string, err error) {
	if text, err = Read(path); err != nil {
		return nil, "", err
	}
	f, err = ParseSets(text, sets.Table, sets.Names)
	if f != nil {
		r.Passed, r.Refused = f.Passed, f.Drop(sets.Refuse)
	}
	return f, text, err
}

// note writes a snapshot's text anew, with another table in its header.
func note(path, text string, f *File, table nftset.Instance) error {
	if f.Saved.IsZero() || f.Table == table {
		return nil // there is no place for it; or nothing to be changed
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
	missing bool
	there   []nftset.Element // by key
	files   []nftset.Element // of all files, with the time left that they have now
}

type name struct {
	table nftset.Table
	set   string
}

// Restore merges files into the kernel in one transaction: it creates the
// tables and sets that are missing, as the files define them, and adds the
// elements with the time that is left to them. Those of a snapshot lost what
// has passed since; a clock that went backwards counts as no time. It never
// shortens the time left of an element that the kernel has.
//
// now tells the time, and is asked again when Restore has to try again.
func Restore(conn *nftset.Conn, files []*File, now func() time.Time) (Result, error) {
	// Between the look at the sets and the transaction, a login can renew an
	// element. So the transaction names the generation that it is made for.
	// Where others keep changing the ruleset, it does without: the elements that
	// are there with less time left are given theirs beforehand, in small
	// transactions, and what is left is to create the others, which only a
	// login of the same moment from one of their addresses can prevent.
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
			if t.set.Key != s.Key {
				return r, otherType(s, t.set.Key.String())
			}
		}
	}
	for _, f := range files {
		elapsed := time.Duration(0)
		if !f.Saved.IsZero() {
			// By wall clock, because the machine may have been down.
			elapsed = max(0, now().Round(0).Sub(f.Saved))
		}
		for i := range f.Sets {
			s := &f.Sets[i]
			t := targets[name{s.Table, s.Name}]
			if err := t.take(s.Elements, elapsed, &r); err != nil {
				return r, err
			}
		}
	}

	create, extend := make([][]nftset.Element, len(order)), make([][]nftset.Element, len(order))
	for i, t := range order {
		create[i], extend[i] = t.compare(&r)
		if guarded {
			continue
		}
		const most = 64
		for some := range slices.Chunk(extend[i], most) {
			if _, err := conn.Extend(t.set, some, time.Second, nil); err != nil {
				return Result{}, err
			}
		}
		extend[i] = nil
	}
	if !guarded {
		generation = 0
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
	for i, t := range order {
		comments := 0
		for j := range create[i] {
			comments += len(create[i][j].Comment)
		}
		batch.Grow(t.set, len(create[i]), comments)
		for _, e := range create[i] {
			batch.Create(t.set, e)
		}
		batch.Replace(t.set, extend[i])
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
	elems, err := conn.Elements(set)
	return &target{set: set, there: elems}, err
}

func otherType(s *nftset.Set, kernel string) error {
	return fmt.Errorf("set %s has keys of type %s, and of type %s in the file", s.Name, kernel, s.Key)
}

// take adds the elements of a file with the time that is left to them.
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

// compare tells which elements of the files the set lacks, and which it has
// with less time left. Of one that stands twice the one that expires last counts.
func (t *target) compare(r *Result) (create, extend []nftset.Element) {
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
			create = append(create, e)
		case there[0].Outlives(e, time.Second): // a snapshot's time is no more exact
			r.There++
			continue
		default:
			extend = append(extend, e)
		}
		r.Restored++
	}
	return create, extend
}
