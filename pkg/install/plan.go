// Package setup knows which of contrib's files fit this machine, and where they
// belong. It reads and writes files, and prints nothing. It reloads and enables
// nothing: that is for the administrator.
package install

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"nftwl/contrib"
	"nftwl/pkg/config"
)

// Options say for what the files are.
type Options struct {
	Executable string         // path of this very program
	ConfigPath string         // absolute; "" for the default
	Config     *config.Config // what is in that file
}

// A Plan is what a part of the installation needs.
type Plan struct {
	Files    []File
	Problems []Problem // why it cannot be written
	Notes    []string  // what the administrator should know
	Next     []string  // lines for a shell; words are in comments
	Undo     []string  // as Next, for after a write
}

// A File belongs at Path.
type File struct {
	Path  string
	Text  string
	Shown string      // what may be printed of a Text with secrets; "" for all of it
	Mode  fs.FileMode // 0 for 0644
	There bool        // with this very text
}

// A Problem keeps a plan from being written.
type Problem struct{ Text, Remedy string }

func (p *Problem) Error() string { return p.Text }

func (p *Plan) problem(remedy, format string, args ...any) {
	p.Problems = append(p.Problems, Problem{fmt.Sprintf(format, args...), remedy})
}

func (p *Plan) note(format string, args ...any) {
	p.Notes = append(p.Notes, fmt.Sprintf(format, args...))
}

// add adds a file. If there is one at its path, it must be the same. The caller
// can change what add returns until it adds another.
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
		p.problem("", "%v", err)
	case !info.Mode().IsRegular():
		p.problem("look at it, and move it away", "%s is there, and is not a regular file", path)
	case string(old) == text:
		f.There = true
	default:
		p.problem("it is never overwritten: compare it with what this command prints without --write, or move it away (mv FILE FILE.mine)",
			"%s is there, with other contents", path)
	}
	p.Files = append(p.Files, f)
	return &p.Files[len(p.Files)-1]
}

// needFolder reports that a program's directory is missing. It is not made:
// nobody would read it.
func (p *Plan) needFolder(dir, program string) {
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		p.problem("install "+program+"; if its configuration is in another directory, put there what this command prints without --write",
			"%s is not a directory: %s is not installed, or its configuration is elsewhere", dir, program)
	}
}

// remove is the command that undoes a write.
func (p *Plan) remove() string {
	words := []string{"rm"}
	for _, f := range p.Files {
		words = append(words, f.Path)
	}
	return strings.Join(words, " ")
}

// Write writes the files that are not there, and returns their paths: all or,
// with an error, none. It replaces nothing.
func (p *Plan) Write() (written []string, err error) {
	var made []string
	defer func() {
		if err == nil {
			return
		}
		for _, path := range slices.Backward(append(made, written...)) {
			_ = os.Remove(path) // the error that counts is the first
		}
		written = nil
	}()
	for _, f := range p.Files {
		if f.There {
			continue
		}
		folders, err := makeFolder(filepath.Dir(f.Path))
		made = append(made, folders...)
		if err == nil {
			err = writeFile(f)
		}
		if err != nil {
			return written, err
		}
		written = append(written, f.Path)
	}
	return written, nil
}

// makeFolder returns the directories that it had to make, the outermost first.
func makeFolder(dir string) (made []string, err error) {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	made, err = makeFolder(filepath.Dir(dir))
	if err == nil {
		err = os.Mkdir(dir, 0o755)
	}
	if err != nil {
		return made, err
	}
	return append(made, dir), os.Chmod(dir, 0o755) // whatever the umask
}

// writeFile makes a file, whole and on disk or not at all. It links the file: a
// rename would replace what someone else has put there meanwhile.
func writeFile(file File) error {
	// No program that reads such a directory takes a hidden file.
	f, err := os.CreateTemp(filepath.Dir(file.Path), ".nftwl-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(file.Text)
	if err == nil {
		err = f.Chmod(cmp.Or(file.Mode, 0o644))
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Link(f.Name(), file.Path)
	}
	return err
}

// shipped is where contrib's files have the program.
const shipped = "/usr/bin/nftwl"

// read returns a file of contrib's with this program and configuration in it.
func (o *Options) read(name string) (string, error) {
	text, err := contrib.Files.ReadFile(name)
	if err != nil {
		return "", err
	}
	command := o.command()
	// Comments name the program, too, and are not about its arguments.
	pairs := []string{
		"nftwl = " + shipped, "nftwl = " + command,
		"ExecStart=" + shipped + "d\n", "ExecStart=" + o.withConfig(o.daemon()) + "\n",
	}
	for _, verb := range []string{" login", " save", " restore", " check"} {
		pairs = append(pairs, shipped+verb, command+verb)
	}
	pairs = append(pairs, shipped, o.Executable)
	return strings.NewReplacer(pairs...).Replace(string(text)), nil
}

// command is this program with its configuration.
func (o *Options) command() string { return o.withConfig(o.Executable) }

// daemon is nftwld's path: it is beside this program.
func (o *Options) daemon() string { return filepath.Join(filepath.Dir(o.Executable), "nftwld") }

func (o *Options) withConfig(command string) string {
	if o.ConfigPath != "" {
		command += " --config " + o.ConfigPath
	}
	return command
}

// checkPaths refuses characters that Dovecot, systemd or fail2ban would split at,
// expand or take for a comment.
func (o *Options) checkPaths(more ...string) error {
	for _, path := range append(more, o.Executable, o.ConfigPath) {
		if strings.Trim(path, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._+-") != "" {
			return &Problem{fmt.Sprintf("%q has a space or another character that Dovecot, systemd or fail2ban would not take as it is", path),
				"give it a path of letters, digits and / . _ + - alone, such as " + shipped + " and " + config.Path}
		}
	}
	return nil
}

// checkProgram reports a program that others could replace.
func (p *Plan) checkProgram(program, remedy string) {
	if err := OnlyRoots(program); err != nil {
		p.problem(remedy, "%s would run as root or with CAP_NET_ADMIN, and others than root can change it: %v", program, err)
	}
}

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

// installed is the remedy for a program that is where it was built.
func (o *Options) installed() string {
	return "install -m 755 " + o.Executable + " " + shipped + ", and run " + shipped + " setup"
}

// shell is how an administrator runs this program.
func (o *Options) shell() string {
	command := o.Executable
	if command == shipped {
		command = "nftwl"
	}
	return o.withConfig(command)
}

// foreignFirewall names the program that the firewall belongs to, if nothing can
// be included into its rules: ufw, firewalld, or iptables, if its rules are in
// the kernel and nftables' own file has none.
func foreignFirewall() string {
	text, err := os.ReadFile("/etc/ufw/ufw.conf")
	if err == nil {
		for line := range strings.Lines(string(text)) {
			if strings.TrimSpace(strings.ToLower(line)) == "enabled=yes" {
				return "ufw"
			}
		}
	}
	// A dangling link is left of one that was removed.
	if _, err := os.Stat("/etc/systemd/system/multi-user.target.wants/firewalld.service"); err == nil {
		return "firewalld"
	}
	text, err = os.ReadFile(mainFile().path)
	if err != nil || isEmptyFirewall(string(text)) {
		tables, _ := liveTables() // nextInclude reports the error
		for _, t := range tables {
			if t.closes && t.ofIPTables() {
				return t.owners[0]
			}
		}
	}
	return ""
}

// share is where the administrator finds a directory of contrib's: where a
// package has put it, or in the sources.
func share(name string) string {
	if dir := "/usr/share/nftwl/" + name; exists(dir) {
		return dir
	}
	return "contrib/" + name
}
