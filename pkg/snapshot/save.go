package snapshot

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"nftwl/pkg/nftset"
)

// Write writes a snapshot of the sets to w.
func Write(w io.Writer, conn *nftset.Conn, sets Sets) error {
	table, err := conn.Instance(sets.Table)
	if err != nil {
		return err
	}
	all, err := sets.describe(conn)
	if err != nil {
		return err
	}
	_, err = write(w, conn, all, table)
	return err
}

// Saved is what Save did besides.
type Saved struct {
	// First is what Save restored first, because the file was of another table
	// than there is now; nil if it was not.
	First *Restored
	// NotKept is why the previous file is not kept as path.old; nil if it is, or
	// need not be.
	NotKept error
}

// Save writes a snapshot of the sets to a file of mode 0600, atomically: at
// any moment path is the old file or the new one, whole and on disk. It keeps the
// old one as path.old, unless that has no elements.
//
// A file of another table than there is now has elements that the kernel lost when
// the ruleset was flushed and loaded again. Save restores it first, and if that
// fails, returns a NotRestoredError.
func Save(path string, conn *nftset.Conn, sets Sets) (Saved, error) {
	// A device such as /dev/null must not become a file. /dev/stdout is a symlink.
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return Saved{}, fmt.Errorf("%s is not a regular file", path)
	}
	unlock, err := lock(path)
	if err != nil {
		return Saved{}, err
	}
	defer unlock()
	const attempts = 10 // the table can be replaced while it is read
	for range attempts {
		r, err := save(path, conn, sets)
		if !errors.Is(err, errReplaced) {
			return r, err
		}
	}
	return Saved{}, fmt.Errorf("table %s: %w", sets.Table, errReplaced)
}

var errReplaced = errors.New("it was flushed and loaded again while it was saved")

// save is an attempt of Save's.
func save(path string, conn *nftset.Conn, sets Sets) (r Saved, err error) {
	table, err := conn.Instance(sets.Table)
	if err != nil {
		return r, err
	}
	all, err := sets.describe(conn)
	if err != nil {
		return r, err
	}
	old, err := inspect(path)
	if err != nil {
		return r, err
	}
	if old.table != table && (old.elements > 0 || old.damage != nil) {
		if r.First, err = restoreFirst(path, conn, sets); err != nil {
			return r, &NotRestoredError{path, sets.Table, err}
		}
	}
	f, err := create(path)
	if err != nil {
		return r, err
	}
	defer f.discard()
	elements, err := write(f, conn, all, table)
	if err != nil {
		return r, err
	}
	if now, err := conn.Instance(sets.Table); err != nil || now != table {
		return r, errors.Join(err, errReplaced)
	}
	keep := path + ".old"
	switch {
	case old.damage != nil && elements == 0:
		return r, fmt.Errorf("%s is damaged (%w) and the sets are empty: it is left as it is; remove it, or name another file", path, old.damage)
	case old.damage != nil:
		keep = path + ".bad"
	case old.elements == 0:
		keep = ""
	}
	r.NotKept, err = f.replace(path, keep)
	return r, err
}

// restoreFirst restores a file of another table.
func restoreFirst(path string, conn *nftset.Conn, sets Sets) (*Restored, error) {
	if err := CheckOwner(path); err != nil {
		return nil, err
	}
	text, err := Read(path)
	if err != nil {
		return nil, err
	}
	f, err := ParseSets(text, sets)
	if err != nil {
		return nil, err
	}
	result, err := Restore(conn, []*File{f}, time.Now)
	if err != nil {
		return nil, err
	}
	return &Restored{Result: result, Refused: f.Refused}, nil
}

// NotRestoredError is why Save left a file as it is: it may have elements that the
// kernel lacks, and cannot be restored.
type NotRestoredError struct {
	Path  string
	Table nftset.Table
	Err   error
}

func (e *NotRestoredError) Unwrap() error { return e.Err }

func (e *NotRestoredError) Error() string {
	return fmt.Sprintf("%s is from before table %s was loaded, and cannot be restored: %v; it is left as it is", e.Path, e.Table, e.Err)
}

// state is what the ends of a file tell of it.
type state struct {
	table    nftset.Instance // zero if it names none
	elements int             // at least 1 if it is no snapshot
	damage   error           // of a snapshot
}

// inspect reads the ends of a file. The state of one that does not exist, or is
// empty, is zero.
func inspect(path string) (s state, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() == 0 {
		return s, err
	}
	const most = 300 // longer than a header or a trailer
	start, err := io.ReadAll(io.NewSectionReader(f, 0, most))
	if err != nil {
		return s, err
	}
	end, err := io.ReadAll(io.NewSectionReader(f, max(0, info.Size()-most), most))
	if err != nil {
		return s, err
	}
	first, _, _ := strings.Cut(string(start), "\n")
	saved, table, err := parseHeader(first)
	if err != nil {
		return state{damage: err}, nil
	}
	if saved.IsZero() {
		return state{elements: 1}, nil
	}
	last := strings.TrimSuffix(string(end), "\n")
	elements, ok := parseTrailer(last[strings.LastIndexByte(last, '\n')+1:])
	if !ok {
		return state{table: table, damage: errCutShort}, nil
	}
	return state{table: table, elements: elements}, nil
}

var errCutShort = errors.New("it was cut short: its last line is missing")

// write writes a snapshot of the sets as they are when all have been read.
func write(w io.Writer, conn *nftset.Conn, sets []*nftset.Set, table nftset.Instance) (elements int, err error) {
	lists, read := make([][]nftset.Element, len(sets)), make([]time.Time, len(sets))
	for i, s := range sets {
		if lists[i], err = conn.Elements(s); err != nil {
			return 0, err
		}
		read[i] = time.Now()
	}
	saved := time.Now()
	out := bufio.NewWriterSize(w, 64<<10)
	out.WriteString(header(saved, table)) // Flush returns its error
	var b []byte
	for i, s := range sets {
		out.Write(appendSet(b[:0], s))
		n := 0
		for _, e := range lists[i] {
			if !e.Permanent() {
				if e.Expires -= saved.Sub(read[i]); e.Expires <= 0 {
					continue
				}
			}
			b = appendElement(b[:0], s, e, n == 0)
			out.Write(b)
			n++
		}
		out.Write(appendSetEnd(b[:0], n))
		elements += n
	}
	out.WriteString(trailer(elements))
	return elements, out.Flush()
}
