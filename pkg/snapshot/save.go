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

// Saved is what Save did besides saving.
type Saved struct {
	// First is what Save restored first, because the file was of another table
	// than the present one; nil for nothing.
	First *Restored
	// NotKept is why the previous file could not be kept as path.old, or nil.
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
	for range attempts {
		r, err := save(path, conn, sets)
		if !errors.Is(err, errReplaced) {
			return r, err
		}
	}
	return Saved{}, fmt.Errorf("table %s: %w", sets.Table, errReplaced)
}

var errReplaced = errors.New("it was flushed and loaded again while it was saved")

// save is one attempt of Save.
func save(path string, conn *nftset.Conn, sets Sets) (r Saved, err error) {
	table, err := conn.Instance(sets.Table)
	if err != nil {
		return r, err
	}
	all, err := sets.describe(conn)
	if err != nil {
		return r, err
	}
	text, err := ends(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, err
	}
	was, had, damage := inspect(text)
	if was != table && (had > 0 || damage != nil) {
		err := CheckOwner(path)
		if err == nil {
			text, err = Read(path)
		}
		if err == nil {
			r.First = &Restored{}
			r.First.Result, r.First.Refused, err = restoreText(text, conn, sets)
		}
		if err != nil {
			return Saved{}, &NotRestoredError{path, sets.Table, err}
		}
	}
	f, err := draft(path)
	if err != nil {
		return r, err
	}
	defer discard(f)
	elements, err := write(f, conn, all, table)
	if err != nil {
		return r, err
	}
	if now, err := conn.Instance(sets.Table); err != nil || now != table {
		return r, errors.Join(err, errReplaced)
	}
	keep := path + ".old"
	switch {
	case damage != nil && elements == 0:
		return r, fmt.Errorf("%s is damaged (%w) and the sets are empty: it is left as it is; remove it, or name another file", path, damage)
	case damage != nil:
		keep = path + ".bad"
	case had == 0:
		keep = ""
	}
	r.NotKept, err = replace(f, path, keep)
	return r, err
}

// NotRestoredError is why Save left a file as it is: the file may have elements that
// the kernel lacks, and cannot be restored.
type NotRestoredError struct {
	Path  string
	Table nftset.Table
	Err   error
}

func (e *NotRestoredError) Unwrap() error { return e.Err }

func (e *NotRestoredError) Error() string {
	return fmt.Sprintf("%s is from before table %s was loaded, and cannot be restored: %v; it is left as it is", e.Path, e.Table, e.Err)
}

// ends returns the beginning and the end of a file, which have the first and the
// last line of a snapshot. A save needs no more of the old file, unless it must
// restore it.
func ends(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	const most = 300 // bytes, more than a header or a trailer has
	text, err := io.ReadAll(io.MultiReader(
		io.NewSectionReader(f, 0, most),
		io.NewSectionReader(f, max(most, info.Size()-most), most)))
	return string(text), err
}

// inspect returns what the first and the last line of a file tell: the table, zero
// if they name none; how many elements it has, at least 1 if it is no snapshot; and
// how a snapshot is damaged.
func inspect(text string) (table nftset.Instance, elements int, damage error) {
	if text == "" {
		return table, 0, nil
	}
	first, rest, _ := strings.Cut(text, "\n")
	saved, table, err := parseHeader(first)
	switch {
	case err != nil:
		return table, 0, err
	case saved.IsZero():
		return table, 1, nil
	}
	_, elements, err = parseTrailer(rest)
	return table, elements, err
}

// write writes a snapshot of the sets as they are after all have been read.
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
		before, after := elementsStart, ""
		for _, e := range lists[i] {
			if !e.Permanent() {
				if e.Expires -= saved.Sub(read[i]); e.Expires <= 0 {
					continue
				}
			}
			out.WriteString(before)
			b = appendElement(b[:0], s, e)
			out.Write(b)
			before, after = elementsNext, elementsEnd
			elements++
		}
		out.WriteString(after + setEnd)
	}
	out.WriteString(trailer(elements))
	return elements, out.Flush()
}
