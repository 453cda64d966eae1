package snapshot

import (
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
)

// lockTime is how long a save waits for another one to end.
const lockTime = 30 * time.Second

// lock keeps other saves and restores from the snapshot at path, until unlock. So
// whatever a killed one left behind can be removed. The lock is on a file that
// nobody else can open, and ends with the process.
func lock(path string) (unlock func(), err error) {
	if _, err := os.Stat(filepath.Dir(path)); err != nil {
		return nil, err
	}
	name := path + ".lock"
	const foreign = 10 // times that others may put a file of theirs there
	strangers := 0
	for deadline := time.Now().Add(lockTime); ; {
		f, err := createNew(name)
		if errors.Is(err, fs.ErrExist) {
			f, err = os.OpenFile(name, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
			if errors.Is(err, fs.ErrNotExist) {
				continue // its owner is done
			}
			if err == nil && !owned(f) {
				f.Close()
				err = fmt.Errorf("%s belongs to another user", name)
			}
			if err != nil && strangers < foreign && os.Remove(name) == nil {
				strangers++
				continue
			}
		}
		if err != nil {
			return nil, err
		}
		locked := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		// The previous owner may have removed it.
		mine, err := f.Stat()
		there, e := os.Lstat(name)
		if locked == nil && err == nil && e == nil && os.SameFile(mine, there) {
			return func() {
				_ = os.Remove(name) // it does no harm
				f.Close()
			}, nil
		}
		f.Close()
		switch {
		case locked == nil:
		case locked != unix.EWOULDBLOCK && locked != unix.EINTR:
			return nil, fmt.Errorf("lock %s: %w", name, locked)
		case time.Now().After(deadline):
			return nil, fmt.Errorf("another process has been saving or restoring %s for %v", path, lockTime)
		default:
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// createNew creates a file of mode 0600. In the directory of a service, root makes
// it the service's, which is to restore it. Otherwise it does not change the
// owner, because a service's sandbox may forbid that system call. A sticky
// directory, such as /tmp, is no service's.
func createNew(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	dir, err := os.Stat(filepath.Dir(name))
	if err == nil && os.Geteuid() == 0 && uid(dir) != 0 && dir.Mode()&fs.ModeSticky == 0 {
		err = f.Chown(int(uid(dir)), int(dir.Sys().(*syscall.Stat_t).Gid))
	}
	if err != nil {
		_ = os.Remove(name)
		f.Close()
		return nil, err
	}
	return f, nil
}

func uid(info fs.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }

// owned reports whether this user or the owner of its directory owns a regular file.
func owned(f *os.File) bool {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return false
	}
	dir, err := os.Stat(filepath.Dir(f.Name()))
	return uid(info) == uint32(os.Geteuid()) || err == nil && uid(info) == uid(dir)
}

// draft is a file that is to replace another.
type draft struct{ *os.File }

// create makes a draft beside path. The caller holds the lock.
func create(path string) (*draft, error) {
	name := path + ".tmp"
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err := createNew(name)
	return &draft{f}, err
}

// discard ends the draft: it removes what has its name, if anything has.
func (d *draft) discard() {
	_ = os.Remove(d.Name())
	d.Close()
}

// replace puts the draft at path, whole and on disk, and what was there at keep;
// an empty keep discards it. notKept is why keep failed, which leaves the new file
// in place.
func (d *draft) replace(path, keep string) (notKept, err error) {
	if err := d.Sync(); err != nil {
		return nil, err
	}
	// The two change places at once, so that there is always a file at path. A
	// second link to the old one would not do: fs.protected_hardlinks may forbid it.
	err = unix.Renameat2(unix.AT_FDCWD, d.Name(), unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	switch {
	case err == nil && keep == "": // discard removes the old one
	case err == nil:
		notKept = os.Rename(d.Name(), keep)
	case err == unix.ENOENT:
		err = os.Rename(d.Name(), path)
	default: // a file system that cannot, such as NFS, or ZFS before 2.2
		if keep != "" {
			_ = os.Remove(keep) // Link tells whether it is gone
			notKept = os.Link(path, keep)
		}
		err = os.Rename(d.Name(), path)
	}
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return notKept, err
	}
	defer dir.Close()
	return notKept, dir.Sync()
}

const (
	// maxFile is the size of the largest file that is read, in bytes: many times
	// that of a mail server's sets.
	maxFile = 1 << 30
	// maxElements is how many it may have. They take more memory than their text.
	maxElements = 1 << 24
	// readTime is how long a pipe may be silent.
	readTime = 30 * time.Second
)

// Read returns the text of a file; "-" is standard input. A file larger than 1 GiB
// is an error, and so is a pipe whose writer is silent for 30 seconds, except
// standard input.
func Read(path string) (string, error) {
	f := os.Stdin
	if path != "-" {
		// Without O_NONBLOCK, the open of a pipe waits for a writer.
		var err error
		if f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
			return "", err
		}
		defer f.Close()
	}
	tooLarge := fmt.Errorf("%s is larger than %d MiB", path, maxFile>>20)
	var text strings.Builder // not ReadFile, which needs a second copy for the string
	info, err := f.Stat()
	switch {
	case err != nil:
		return "", err
	case info.IsDir():
		return "", fmt.Errorf("%s is a directory, not a file", path)
	case info.Size() > maxFile:
		return "", tooLarge
	}
	text.Grow(int(info.Size()))
	from := io.Reader(f)
	if path != "-" {
		from = patient{f}
	}
	n, err := io.Copy(&text, io.LimitReader(from, maxFile+1))
	if err == nil && n > maxFile {
		err = tooLarge
	}
	return text.String(), err
}

// patient is a file each read of which may take readTime.
type patient struct{ *os.File }

func (p patient) Read(b []byte) (int, error) {
	_ = p.SetReadDeadline(time.Now().Add(readTime)) // fails for a regular file, which needs none
	return p.File.Read(b)
}

// OwnerError says why others can have written a file.
type OwnerError struct{ Path, Why string }

func (e *OwnerError) Error() string { return e.Path + " " + e.Why }

// CheckOwner returns an *OwnerError if others than root, this user and the owner of
// the directory can have written a file, or put it there: whoever writes the
// snapshot decides whom the firewall trusts.
func CheckOwner(path string) error {
	dir, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return err
	}
	const others = 0o002
	if dir.Mode()&others != 0 && dir.Mode()&fs.ModeSticky == 0 {
		return &OwnerError{path, "is in a directory that everyone can write to"}
	}
	// The link, if it is one, and the file.
	for _, stat := range []func(string) (fs.FileInfo, error){os.Lstat, os.Stat} {
		info, err := stat(path)
		if err != nil {
			return err
		}
		if owner := uid(info); owner != 0 && owner != uint32(os.Geteuid()) && owner != uid(dir) {
			return &OwnerError{path, fmt.Sprintf("belongs to user %d, and neither to root nor to the owner of its directory", owner)}
		}
		if info.Mode().IsRegular() && info.Mode()&others != 0 {
			return &OwnerError{path, "is a file that everyone can write to"}
		}
	}
	return nil
}
