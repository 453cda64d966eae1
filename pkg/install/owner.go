package install

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// OnlyRoots returns an error if users other than root can change a program or replace
// it: if they own, or can write, the program, a directory on the way to it, or a
// link there. A sticky directory is no exception: after a boot has emptied it,
// anyone can make that path again.
//
// The owner of the root directory counts as root, which is another user in a user
// namespace. A group counts as others, even root's own.
func OnlyRoots(program string) error {
	top, err := os.Stat("/")
	if err == nil {
		_, err = os.Stat(program) // fails on a loop of links
	}
	if err != nil {
		return err
	}
	owner := func(info fs.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }
	path, rest := "/", strings.Split(program, "/")
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
