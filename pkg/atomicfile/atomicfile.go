// Package atomicfile writes small files, each whole or not at all.
//
// The snapshot has a writer of its own: it streams, holds a lock, keeps the
// previous file and gives the new one to the service's user.
package atomicfile

import (
	"io/fs"
	"os"
	"path/filepath"
)

// Create makes a file. If path exists, whatever it is, Create leaves it alone and
// returns fs.ErrExist.
func Create(path string, data []byte, mode fs.FileMode) error {
	return write(path, data, mode, os.Link) // a rename would replace it
}

// Replace makes a file, and replaces the one at path if there is one.
func Replace(path string, data []byte, mode fs.FileMode) error {
	return write(path, data, mode, os.Rename)
}

func write(path string, data []byte, mode fs.FileMode, move func(from, to string) error) error {
	// Programs that read a directory of configuration files skip hidden ones.
	f, err := os.CreateTemp(filepath.Dir(path), ".nftwl-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails after a rename
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode) // whatever the umask
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = move(f.Name(), path)
	}
	return err
}
