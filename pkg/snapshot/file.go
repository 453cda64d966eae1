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

// lock keeps other saves and restores from the snapshot at path, until unlock.
// What a killed one left behind can then be told and removed. The lock is on a
// file that nobody else can open; it goes with the process.
func lock(path string) (unlock func(), err error) {
	if _, err := os.Stat(filepath.Dir(path)); err != nil {
		return nil, err
	}
	name := path + ".lock"
	const foreign = 10 // times that someone may put a file of theirs there
	strangers := 0
	for deadline := time.Now().Add(lockTime); ; {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if err == nil {
			if err = giveTo(f, filepath.Dir(path)); err != nil {
				_ = os.Remove(name)
			}
		} else if errors.Is(err, fs.ErrExist) {
			f, err = os.OpenFile(name, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
			if errors.Is(err, fs.ErrNotExist) {
				continue // whoever had it is done
			}
			if err == nil && !owned(f) {
				err = fmt.Errorf("%s belongs to another user", name)
			}
			if err != nil && strangers < foreign && os.Remove(name) == nil {
				strangers++
				f.Close() // nil is allowed
				continue
			}
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		for {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
			if err != unix.EWOULDBLOCK && err != unix.EINTR {
				break
			}
			if time.Now().After(deadline) {
				f.Close()
				return nil, fmt.Errorf("%s is being saved or restored by another process, and was for the last %v", path, lockTime)
			}
			time.Sleep(5 * time.Millisecond)
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		// Who had it before may have removed it.
		mine, err := f.Stat()
		there, e := os.Lstat(name)
		if err == nil && e == nil && os.SameFile(mine, there) {
			return func() {
				_ = os.Remove(name) // it does no harm
				f.Close()
			}, nil
		}
		f.Close()
	}
}

// owned tells whether a file is this user's, or that of the directory's owner, and
// nobody else's.
func owned(f *os.File) bool {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return false
	}
	uid := info.Sys().(*syscall.Stat_t).Uid
	dir, err := os.Stat(filepath.Dir(f.Name()))
	return uid == uint32(os.Geteuid()) || err == nil && uid == dir.Sys().(*syscall.Stat_t).Uid
}

// giveTo lets the owner of a directory read what root saves there by hand: it
// is the service that restores it. Nothing is asked of the kernel otherwise,
// because a service's sandbox kills who changes owners. A sticky directory, such
// as /tmp, is no service's.
func giveTo(f *os.File, dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	owner := info.Sys().(*syscall.Stat_t)
	if os.Geteuid() != 0 || owner.Uid == 0 || info.Mode()&fs.ModeSticky != 0 {
		return nil
	}
	return f.Chown(int(owner.Uid), int(owner.Gid))
}

// A draft is a file that is to take the place of another.
type draft struct{ *os.File }

// create makes a draft beside path. The lock is held.
func create(path string) (*draft, error) {
	name := path + ".tmp"
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	d := &draft{f}
	if err := giveTo(f, filepath.Dir(path)); err != nil {
		d.discard()
		return nil, err
	}
	return d, nil
}

// discard ends the draft: it removes what has its name, if anything has.
func (d *draft) discard() {
	_ = os.Remove(d.Name())
	d.Close()
}

// replace puts the draft at path, whole and on disk, and what was there at keep,
// or nowhere where that is empty. notKept is why that failed, which leaves the
// new file in place.
func (d *draft) replace(path, keep string) (notKept, err error) {
	if err := d.Sync(); err != nil {
		return nil, err
	}
	// The two change places at once, so that path never is without a file. Not
	// by a second link to the old one: fs.protected_hardlinks may forbid it.
	err = unix.Renameat2(unix.AT_FDCWD, d.Name(), unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	switch {
	case err == nil && keep == "": // discard removes it
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
	// maxFile is the size of the largest file that is read, in bytes: many
	// times what sets hold that a mail server can use.
	maxFile = 1 << 30
	// maxElements is how many it may have. They take more memory than their
	// text.
	maxElements = 1 << 24
	// readTime is how long a pipe that is read may be silent.
	readTime = 30 * time.Second
)

// Read returns the text of a file, without a second copy for the string. One
// that is larger than 1 GiB is an error, and so is a pipe whose writer is
// silent for 30 seconds; "-" is standard input, which may be.
func Read(path string) (string, error) {
	f := os.Stdin
	if path != "-" {
		// Without O_NONBLOCK, a pipe would be waited for until it has a writer.
		var err error
		if f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
			return "", err
		}
		defer f.Close()
	}
	tooLarge := fmt.Errorf("%s is larger than %d MiB", path, maxFile>>20)
	var text strings.Builder
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

// patient is a file each read of which is waited for as long.
type patient struct{ *os.File }

func (p patient) Read(b []byte) (int, error) {
	_ = p.SetReadDeadline(time.Now().Add(readTime)) // a regular file has none, and is never waited for
	return p.File.Read(b)
}

// OwnerError is a file that others can have written.
type OwnerError struct{ Path, Why string }

func (e *OwnerError) Error() string { return e.Path + " " + e.Why }

// CheckOwner returns an *OwnerError where others than root, this user and the owner
// of the directory can have written a file, or put it there: who writes the
// snapshot says whom the firewall trusts.
func CheckOwner(path string) error {
	dir, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return err
	}
	const others = 0o002
	if dir.Mode()&others != 0 && dir.Mode()&fs.ModeSticky == 0 {
		return &OwnerError{path, "is in a directory that everyone can write to"}
	}
	owner := func(info fs.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }
	// The file, and the link to it where it is one.
	for _, stat := range []func(string) (fs.FileInfo, error){os.Lstat, os.Stat} {
		info, err := stat(path)
		if err != nil {
			return err
		}
		if uid := owner(info); uid != 0 && uid != uint32(os.Geteuid()) && uid != owner(dir) {
			return &OwnerError{path, fmt.Sprintf("belongs to user %d, and neither to root nor to the owner of its directory", uid)}
		}
		if info.Mode().IsRegular() && info.Mode()&others != 0 {
			return &OwnerError{path, "is a file that everyone can write to"}
		}
	}
	return nil
}
