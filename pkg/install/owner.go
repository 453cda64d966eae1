package install

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// OnlyRoots returns an error if others than root can change a program or put
// another one in its place: if they own it, a directory on the way to it, or a
// link there, or can write it. A sticky directory is no exception: its files
// are safe from others until a boot empties it, and then anyone can make that
// path anew.
//
// The owner of the root directory counts as root, who in a user namespace is
// another. A group counts as others, root's own too.
func OnlyRoots(program string) error {
	top, err := os.Stat("/")
	if err != nil {
		return err
	}
	owner := func(info fs.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }
	path, rest, links := "/", strings.Split(program, "/"), 0
	for {
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		if uid := owner(info); uid != 0 && uid != owner(top) {
			return fmt.Errorf("%s belongs to user %d", path, uid)
		}
		if info.Mode()&fs.ModeSymlink != 0 {
			to, err := os.Readlink(path)
			if links++; err == nil && links > 40 { // as in the kernel, path_resolution(7)
				err = &fs.PathError{Op: "open", Path: program, Err: syscall.ELOOP}
			}
			if err != nil {
				return err
			}
			path, rest = filepath.Dir(path), append(strings.Split(to, "/"), rest...)
			if filepath.IsAbs(to) {
				path = "/"
			}
		} else if mode := info.Mode(); mode&0o022 != 0 {
			return fmt.Errorf("%s has mode %04o", path, mode.Perm())
		}
		if len(rest) == 0 {
			return nil
		}
		// path has no links, so that ".." is what it says.
		path, rest = filepath.Join(path, rest[0]), rest[1:]
	}
}
