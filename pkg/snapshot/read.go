package snapshot

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	// maxFile is the size of the largest file that is read, in bytes: many
	// times what sets hold that a mail server can use.
	maxFile = 1 << 30
	// maxElements is how many it may have. They take more memory than their
	// text.
	maxElements = 1 << 24
)

// Read returns the text of a file, without a second copy for the string. One
// that is larger than 1 GiB is an error.
func Read(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	tooLarge := fmt.Errorf("%s is larger than %d MiB", path, maxFile>>20)
	var text strings.Builder
	if info, err := f.Stat(); err == nil {
		if info.Size() > maxFile {
			return "", tooLarge
		}
		text.Grow(int(info.Size()))
	}
	n, err := io.Copy(&text, io.LimitReader(f, maxFile+1))
	if err == nil && n > maxFile {
		err = tooLarge
	}
	return text.String(), err
}

// CheckOwner returns an error where others than root, this user and the owner
// of the folder can have written a file, or put it there: whoever writes the
// snapshot says whom the firewall trusts.
func CheckOwner(path string) error {
	folder, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return err
	}
	const others = 0o002
	if folder.Mode()&others != 0 && folder.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("%s is in a folder that everyone can write to", path)
	}
	owner := func(info fs.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }
	// The file, and the link to it where it is one.
	for _, stat := range []func(string) (fs.FileInfo, error){os.Lstat, os.Stat} {
		info, err := stat(path)
		if err != nil {
			return err
		}
		if uid := owner(info); uid != 0 && uid != uint32(os.Geteuid()) && uid != owner(folder) {
			return fmt.Errorf("%s belongs to user %d, and neither to root nor to the owner of its folder", path, uid)
		}
		if info.Mode().IsRegular() && info.Mode()&others != 0 {
			return fmt.Errorf("%s is a file that everyone can write to", path)
		}
	}
	return nil
}
