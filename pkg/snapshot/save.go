package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
)

// sink is what a snapshot is written to. Truncate takes back what an
// interrupted dump wrote.
type sink interface {
	io.Writer
	truncate(size int64) error
}

// Write writes a snapshot of the sets to w.
func Write(w io.Writer, conn *nftset.Conn, sets []*nftset.Set) error {
	var m memory
	if _, err := write(&m, conn, sets); err != nil {
		return err
	}
	_, err := w.Write(m.Bytes())
	return err
}

// Save writes a snapshot of the sets to a file of mode 0600, atomically: at
// any moment path is the old file or the new one, whole and on disk. The old
// one is kept beside it as path.old, but that an empty one does not take the
// place of one with elements.
//
// An old file that was cut short or is of a version unknown is kept as
// path.bad, and is not replaced by a snapshot without elements: what it holds
// may be all that there is.
func Save(path string, conn *nftset.Conn, sets []*nftset.Set) error {
	// What writes on to a terminal or to nowhere must not become a file, for
	// everyone: /dev/stdout is a symlink, too.
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", path)
	}
	folder, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer folder.Close()
	// One save at a time; the lock goes with the descriptor. So what a
	// killed one left behind can be told and removed.
	if err := flock(folder); err != nil {
		return fmt.Errorf("lock %s: %w", folder.Name(), err)
	}
	temp := path + ".tmp"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	err = func() error {
		if err := giveTo(f, folder); err != nil {
			return err
		}
		elements, err := write(file{f}, conn, sets)
		if err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		return keep(path, elements)
	}()
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp) // the error that counts is the first
		return err
	}
	return folder.Sync()
}

// giveTo lets the owner of the folder read what root saves there by hand: it
// is the service that restores it. Nothing is asked of the kernel otherwise, as
// a service's sandbox kills who changes owners.
func giveTo(f, folder *os.File) error {
	info, err := folder.Stat()
	if err != nil {
		return err
	}
	owner := info.Sys().(*syscall.Stat_t)
	if os.Geteuid() != 0 || owner.Uid == 0 {
		return nil
	}
	return f.Chown(int(owner.Uid), int(owner.Gid))
}

func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			return err
		}
	}
}

// keep gives the file at path a second name before a snapshot with so many
// elements takes its place.
func keep(path string, elements int) error {
	old, err := inspect(path)
	suffix := ".old"
	var failed *fs.PathError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.As(err, &failed):
		return err // not damaged, as far as is known
	case err != nil && elements == 0:
		return fmt.Errorf("%s is damaged (%w) and the sets are empty: it is left as it is; remove it, or name another file", path, err)
	case err != nil:
		suffix = ".bad"
	case old == 0:
		return nil
	}
	// By way of a link, so that path never is without a file.
	link := path + suffix + ".tmp"
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Link(path, link); err != nil {
		return err
	}
	return os.Rename(link, path+suffix)
}

// inspect tells from its ends how many elements a snapshot has: at least 1
// where it is not one of ours. An error is that it is not whole.
func inspect(path string) (elements int, err error) {
	const most = 200 // longer than a header or a trailer
	info, err := os.Lstat(path)
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() {
		return 1, nil // a symlink
	}
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	start, end := make([]byte, most), make([]byte, most)
	n, err := f.ReadAt(start, 0)
	if err != nil && err != io.EOF {
		return 0, err
	}
	line, _, _ := strings.Cut(string(start[:n]), "\n")
	saved, err := parseHeader(line)
	switch {
	case err != nil:
		return 0, err
	case saved.IsZero() && n == 0:
		return 0, nil
	case saved.IsZero():
		return 1, nil
	}
	n, err = f.ReadAt(end, max(0, info.Size()-most))
	if err != nil && err != io.EOF {
		return 0, err
	}
	text := strings.TrimSuffix(string(end[:n]), "\n")
	elements, ok := parseTrailer(text[strings.LastIndexByte(text, '\n')+1:])
	if !ok {
		return 0, errCutShort
	}
	return elements, nil
}

var errCutShort = errors.New("it was cut short: its last line is missing")

// attempts is how often an interrupted dump of a set is taken again before
// several are put together, which takes memory.
const attempts = 4

func write(w sink, conn *nftset.Conn, sets []*nftset.Set) (elements int, err error) {
	b := []byte(header(time.Now()))
	written := int64(0)
	flush := func() error {
		n, err := w.Write(b)
		written += int64(n)
		b = b[:0]
		return err
	}
	for _, s := range sets {
		b = appendSet(b, s)
		if err := flush(); err != nil {
			return 0, err
		}
		start, n := written, 0
		one := func(e nftset.Element) error {
			b = appendElement(b, s, e, n == 0)
			n++
			if len(b) < 64<<10 {
				return nil
			}
			return flush()
		}
		for attempt := 1; ; attempt++ {
			err := conn.Dump(s, one)
			if err == nil {
				break
			}
			if !errors.Is(err, nftset.ErrInterrupted) {
				return 0, err
			}
			if err := w.truncate(start); err != nil {
				return 0, err
			}
			b, written, n = b[:0], start, 0
			if attempt == attempts {
				all, err := conn.Elements(s)
				if err != nil {
					return 0, err
				}
				for _, e := range all {
					if err := one(e); err != nil {
						return 0, err
					}
				}
				break
			}
		}
		b = appendSetEnd(b, n)
		elements += n
	}
	b = append(b, trailer(elements)...)
	return elements, flush()
}

type memory struct{ bytes.Buffer }

func (m *memory) truncate(size int64) error {
	m.Truncate(int(size))
	return nil
}

type file struct{ *os.File }

func (f file) truncate(size int64) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	_, err := f.Seek(size, io.SeekStart)
	return err
}
