package install

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"nftwl/pkg/atomicfile"
	"nftwl/pkg/config"
)

// A Plan is what a part of the installation needs. Nothing here enables or reloads
// anything: the administrator does.
type Plan struct {
	Files    []File
	Problems []Problem // with any, nothing is written
	Notes    []string  // what the administrator should know
	Next     []string  // lines for a shell; words are in comments
	Undo     []string  // as Next, for after a write
}

// A File belongs at Path.
type File struct {
	Path  string
	Text  string
	Shown string      // what to print of a Text with secrets; "" for all of it
	Mode  fs.FileMode // 0 for 0644
	There bool        // with this very text
}

// A Problem keeps a plan from being written. Problems in a row with the same remedy
// have it in the last; "" for none.
type Problem struct{ Text, Remedy string }

func (p *Problem) Error() string { return p.Text }

// newPlan is a plan for contrib's files, which name nftwlPath and mean config.Path.
// An administrator who has others edits the files.
func newPlan(o *Options) *Plan {
	p := new(Plan)
	here, err := os.Stat(o.Executable)
	there, e := os.Stat(nftwlPath)
	if err != nil || e != nil || !os.SameFile(here, there) {
		p.problem("install -m 755 "+o.Executable+" "+nftwlPath+", and run that one", "the files name %s, and this is %s", nftwlPath, o.Executable)
	} else {
		p.needRoots(nftwlPath)
	}
	if o.ConfigPath != "" && o.ConfigPath != config.Path {
		p.problem("move it there; or add --config to the commands in what setup prints without --write", "the files have nftwl read %s, and not %s", config.Path, o.ConfigPath)
	}
	return p
}

func (p *Plan) problem(remedy, format string, args ...any) {
	if n := len(p.Problems); n > 0 && p.Problems[n-1].Remedy == remedy {
		p.Problems[n-1].Remedy = ""
	}
	p.Problems = append(p.Problems, Problem{fmt.Sprintf(format, args...), remedy})
}

func (p *Plan) note(format string, args ...any) {
	p.Notes = append(p.Notes, fmt.Sprintf(format, args...))
}

// add adds a file. If path exists, it must be a file with the same text. The
// caller may change what add returns until it adds another.
func (p *Plan) add(path, text string) *File {
	f := File{Path: path, Text: text}
	info, err := os.Lstat(path)
	var old []byte
	if err == nil && info.Mode().IsRegular() {
		old, err = os.ReadFile(path)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		p.problem(Remedy(err), "%v", err)
	case !info.Mode().IsRegular():
		p.problem("look at it, and move it away", "%s exists, and is not a regular file", path)
	case string(old) == text:
		f.There = true
	default:
		p.problem("setup never overwrites it: compare it with what setup prints without --write, or move it away (mv FILE FILE.mine)",
			"%s exists, with other contents", path)
	}
	p.Files = append(p.Files, f)
	return &p.Files[len(p.Files)-1]
}

// needDir reports that a program's directory is missing. Write does not make it,
// because no program would read it.
func (p *Plan) needDir(dir, program string) {
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		p.problem("install "+program+", or put what setup prints without --write into its directory",
			"%s is not a directory: %s is not installed, or its configuration is elsewhere", dir, program)
	}
}

// needRoots reports a program that users other than root could replace.
func (p *Plan) needRoots(program string) {
	if err := OnlyRoots(program); err != nil {
		p.problem("let root alone write it, and each directory above it",
			"%s would run as root or with CAP_NET_ADMIN, and users other than root can change it: %v", program, err)
	}
}

// remove is the command that undoes a write.
func remove(files []File) string {
	words := []string{"rm"}
	for _, f := range files {
		words = append(words, f.Path)
	}
	return strings.Join(words, " ")
}

// Write writes the files that are missing and returns their paths. It replaces
// nothing. After an error it has written none.
func (p *Plan) Write() (written []string, err error) {
	defer unix.Umask(unix.Umask(0o022))
	for _, f := range p.Files {
		if f.There {
			continue
		}
		err := os.MkdirAll(filepath.Dir(f.Path), 0o755)
		if err == nil {
			err = atomicfile.Create(f.Path, []byte(f.Text), cmp.Or(f.Mode, 0o644))
		}
		if err != nil {
			for _, path := range written {
				_ = os.Remove(path) // the first error counts
			}
			return nil, err
		}
		written = append(written, f.Path)
	}
	return written, nil
}
