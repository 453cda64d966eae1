package setup

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	dovecotFolder = "/etc/dovecot/conf.d"
	loginFile     = "90-nftwl.conf"
	serveFile     = "90-nftwl-serve.conf"
	socket        = "/run/nftwl/post-login"
)

// DropIn is where the drop-in for login belongs.
const DropIn = dovecotFolder + "/" + loginFile

// Dovecot plans the drop-in, which is the same for 2.3 and 2.4.
func Dovecot(o *Options) (*Plan, error) {
	if err := o.checkPaths(); err != nil {
		return nil, err
	}
	name, other := loginFile, serveFile
	if o.Serve {
		name, other = serveFile, loginFile
	}
	text, err := o.read("dovecot/" + name)
	if err != nil {
		return nil, err
	}
	p := new(Plan)
	p.needFolder(dovecotFolder, "Dovecot")
	p.add(filepath.Join(dovecotFolder, name), text)
	if other := filepath.Join(dovecotFolder, other); exists(other) {
		p.problem("rm "+other, "%s is there, and the two exclude each other", other)
	}
	if main := filepath.Join(filepath.Dir(dovecotFolder), "dovecot.conf"); !includesFolder(main) {
		p.note("%s does not include conf.d/*.conf: without that Dovecot does not read the file.", main)
	}
	if o.Serve {
		if !exists(socket) {
			p.note("There is no %s yet, and without it Dovecot denies every login: '%s setup systemd --serve' comes first.", socket, o.shell())
		}
		p.Next = []string{o.shell() + " status     # it must answer before Dovecot is told to ask it"}
	} else {
		p.checkProgram(o)
	}
	p.notePostLogin(o)
	p.Next = append(p.Next,
		"doveconf -n >/dev/null && doveadm reload",
		"# Log in once with a mail client, and see that the client is there:",
		o.shell()+" list",
		o.shell()+" doctor",
	)
	p.Undo = []string{p.remove(), "doveadm reload"}
	return p, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func includesFolder(path string) bool {
	text, err := os.ReadFile(path)
	if err != nil {
		return true // as far as is known
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 1 && strings.HasPrefix(fields[0], "!include") && strings.HasSuffix(fields[1], "conf.d/*.conf") {
			return true
		}
	}
	return false
}

// notePostLogin says which post-login services the drop-in takes the place of.
func (p *Plan) notePostLogin(o *Options) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "doveconf", "-n")
	cmd.WaitDelay = time.Second // or a child of its that holds the pipe is waited for
	out, err := cmd.Output()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return
	case err != nil:
		p.note("Whether there is a post-login script already is not known: doveconf -n fails. What the file would take the place of, and how to keep it, its comments say.")
		return
	}
	for line := range strings.Lines(string(out)) {
		words := strings.Fields(line)
		if len(words) < 4 || words[0] != "executable" || filepath.Base(words[3]) == "nftwl" {
			continue
		}
		switch protocol, service := words[2], words[3]; {
		case protocol == "script-login":
			p.note("Dovecot has a post-login script already: %s", strings.Join(words[3:], " "))
			if o.Serve {
				p.note("nftwl serve runs no script: '%s setup dovecot' is for who needs one.", o.shell())
			} else {
				p.note("To keep it, put it last: executable = script-login %s login %s", o.Executable, strings.Join(words[3:], " "))
			}
		case service != socket && slices.Contains([]string{"imap", "pop3", "submission", "managesieve"}, protocol):
			p.note("Dovecot's service %s asks %s after a login, which this takes the place of.", protocol, service)
		}
	}
}
