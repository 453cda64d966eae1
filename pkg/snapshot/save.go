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
	// First is what was restored before, because the file was not of the table
	// that there is now; nil where it was.
	First *Restored
	// NotKept is why the file that was there is not kept as path.old; nil where
	// it is, or need not be.
	NotKept error
}

// Save writes a snapshot of the sets to a file of mode 0600, atomically: at
// any moment path is the old file or the new one, whole and on disk. The old
// one is kept beside it as path.old, unless it has no elements.
//
// A file that is not of the table that there is now, because the ruleset was
// flushed and loaded anew, has elements that the kernel lost. It is restored
// first, and Save fails with a NotRestoredError where that fails.
func Save(path string, conn *nftset.Conn, sets Sets) (Saved, error) {
	// What writes on to a terminal or to nowhere must not become a file, for
	// everyone: /dev/stdout is a symlink, too.
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return Saved{}, fmt.Errorf("%s is not a regular file", path)
	}
	unlock, err := lock(path)
	if err != nil {
		return Saved{}, err
	}
	defer unlock()
	// The table can be replaced while it is read. More than twice in a row
	// takes someone who means it.
	const attempts = 10
	for range attempts {
		r, err := save(path, conn, sets)
		if !errors.Is(err, errReplaced) {
			return r, err
		}
	}
	return Saved{}, fmt.Errorf("table %s: %w", sets.Table, errReplaced)
}

var errReplaced = errors.New("it was flushed and loaded anew while it was saved")

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
	if old.elements > 0 && old.table != table || old.damage != nil && old.table != table {
		if err := r.restore(path, conn, sets); err != nil {
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

// restore brings back what the file has of a table that was there before.
func (r *Saved) restore(path string, conn *nftset.Conn, sets Sets) error {
	if err := CheckOwner(path); err != nil {
		return err
	}
	first := new(Restored)
	f, _, err := first.load(path, sets)
	if err != nil {
		return err
	}
	first.Result, err = Restore(conn, []*File{f}, time.Now)
	if err == nil {
		r.First = first
	}
	return err
}

// NotRestoredError is why a file was not replaced: it may have elements that
// the kernel has not, and cannot be restored.
type NotRestoredError struct {
	Path  string
	Table nftset.Table
	Err   error
}

func (e *NotRestoredError) Unwrap() error { return e.Err }

func (e *NotRestoredError) Error() string {
	return fmt.Sprintf("%s is from before table %s was loaded, and cannot be restored: %v; it is left as it is", e.Path, e.Table, e.Err)
}

// A state is what the ends of a file tell of it.
type state struct {
	table    nftset.Instance // zero where it names none
	elements int             // at least 1 where it is not one of ours
	damage   error           // of one of ours
}

// inspect tells what is in a file from its ends. One that does not exist is
// as one that is empty.
func inspect(path string) (s state, err error) {
	const most = 300 // longer than a header or a trailer
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return s, err
	}
	start, end := make([]byte, most), make([]byte, most)
	n, err := f.ReadAt(start, 0)
	if err != nil && err != io.EOF {
		return s, err
	}
	if n == 0 {
		return s, nil
	}
	line, _, _ := strings.Cut(string(start[:n]), "\n")
	saved, table, err := parseHeader(line)
	if err != nil {
		s.damage = err
		return s, nil
	}
	if saved.IsZero() {
		s.elements = 1
		return s, nil
	}
	s.table = table
	n, err = f.ReadAt(end, max(0, info.Size()-most))
	if err != nil && err != io.EOF {
		return s, err
	}
	text := strings.TrimSuffix(string(end[:n]), "\n")
	elements, ok := parseTrailer(text[strings.LastIndexByte(text, '\n')+1:])
	if !ok {
		s.damage = errCutShort
	}
	s.elements = elements
	return s, nil
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
	out.WriteString(header(saved, table)) // an error is Flush's, too
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
