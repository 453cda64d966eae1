package snapshot

import (
	"cmp"
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

// lock keeps other saves and restores from the snapshot at path until unlock, so
// that a file which a killed one left behind can be removed. The lock is on a file
// that only its owner can open, and ends with the process.
func lock(path string) (unlock func(), err error) {
	name := path + ".lock"
	for deadline := time.Now().Add(lockTime); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		f, err := create(name)
		if errors.Is(err, fs.ErrExist) {
			if f, err = openOwn(name); errors.Is(err, fs.ErrNotExist) {
				continue // it has just been removed
			}
		}
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			// The previous owner may have removed it.
			mine, e1 := f.Stat()
			there, e2 := os.Lstat(name)
			if e1 == nil && e2 == nil && os.SameFile(mine, there) {
				return func() { discard(f) }, nil
			}
		}
		f.Close()
		if err != nil && err != unix.EWOULDBLOCK && err != unix.EINTR {
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
	}
	return nil, fmt.Errorf("another process has been saving or restoring %s for %v", path, lockTime)
}

// openOwn opens a lock file that exists. In a directory such as /tmp, everyone can
// make one: openOwn removes it unless it is a regular file of this user or of the
// owner of the directory, and returns ErrNotExist.
func openOwn(name string) (*os.File, error) {
	dir, err := os.Stat(filepath.Dir(name))
	if err != nil {
		return nil, err
	}
	// Without O_CREATE, which fs.protected_regular forbids for another's file.
	f, openErr := os.OpenFile(name, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	there, err := os.Lstat(name)
	if err == nil && there.Mode().IsRegular() && (uid(there) == uint32(os.Geteuid()) || uid(there) == uid(dir)) {
		return f, openErr
	}
	f.Close()
	if err == nil {
		err = cmp.Or(os.Remove(name), fs.ErrNotExist)
	}
	return nil, err
}

// create makes a file of mode 0600, which must not exist. In the directory of a
// service, root gives the file to the service, which must be able to restore it. A
// service does not: its sandbox may forbid that system call. A sticky directory,
// such as /tmp, is no service's.
func create(name string) (*os.File, error) {
	dir, err := os.Stat(filepath.Dir(name))
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 && uid(dir) != 0 && dir.Mode()&fs.ModeSticky == 0 {
		if err := f.Chown(int(uid(dir)), int(dir.Sys().(*syscall.Stat_t).Gid)); err != nil {
			discard(f)
			return nil, err
		}
	}
	return f, nil
}

// draft makes a file that will replace the one at path. The caller holds the lock.
func draft(path string) (*os.File, error) {
	_ = os.Remove(path + ".tmp") // of a killed one; if that fails, create does
	return create(path + ".tmp")
}

// discard removes what has the file's name, if anything has.
func discard(f *os.File) {
	_ = os.Remove(f.Name())
	f.Close()
}

// replace puts a file at path, whole and on disk, and moves what was there to keep;
// an empty keep discards it. notKept is why that failed; the new file is in place
// then.
func replace(f *os.File, path, keep string) (notKept, err error) {
	if err := f.Sync(); err != nil {
		return nil, err
	}
	// The two change places at once, so that there is always a file at path.
	// fs.protected_hardlinks may forbid a second link to the old one.
	err = unix.Renameat2(unix.AT_FDCWD, f.Name(), unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	switch {
	case err == nil && keep == "": // discard removes the old one
	case err == nil:
		notKept = os.Rename(f.Name(), keep)
	case err == unix.ENOENT:
		err = os.Rename(f.Name(), path)
	default: // a file system that cannot, such as NFS, or ZFS before 2.2
		if keep != "" {
			_ = os.Remove(keep) // Link tells whether it is gone
			notKept = os.Link(path, keep)
		}
		err = os.Rename(f.Name(), path)
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

// maxFile is the size of the largest file that is read, in bytes: many times the
// sets of a mail server.
const maxFile = 1 << 30

// Read returns the text of a regular file; "-" is standard input. More than 1 GiB
// is an error.
func Read(path string) (string, error) {
	f := os.Stdin
	var text strings.Builder // not ReadFile, which needs a second copy for the string
	size := int64(0)
	if path != "-" {
		// Without O_NONBLOCK, the open of a pipe waits for a writer.
		var err error
		if f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
			return "", err
		}
		defer f.Close()
		info, err := f.Stat()
		switch {
		case err != nil:
			return "", err
		case !info.Mode().IsRegular():
			return "", fmt.Errorf("%s is not a regular file", path)
		}
		size = info.Size()
	}
	var err error
	if size <= maxFile {
		text.Grow(int(size))
		size, err = io.Copy(&text, io.LimitReader(f, maxFile+1))
	}
	if err == nil && size > maxFile {
		err = fmt.Errorf("%s is larger than %d MiB", path, maxFile>>20)
	}
	return text.String(), err
}

// OwnerError is why others can have written a file.
type OwnerError struct{ Path, Why string }

func (e *OwnerError) Error() string { return e.Path + " " + e.Why }

func uid(info fs.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }

// CheckOwner returns an *OwnerError if anyone but root, this user and the owner of
// the directory can have written a file or put it there: whoever writes the
// snapshot decides which addresses the firewall trusts.
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
