package install

import (
	"cmp"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"nftwl/pkg/doveconf"
)

const setpriv = "/usr/bin/setpriv"

// Dovecot plans the drop-in, which is the same for 2.3 and 2.4.
func Dovecot(o *Options) *Plan {
	p := newPlan(o)
	p.needDir(dovecotDir, "Dovecot")
	p.add(DropIn, p.keepPostLogin(shipped("dovecot/"+filepath.Base(DropIn))))
	read, after := Overriding(DovecotConf, DropIn)
	if !read {
		p.note("%s does not include conf.d/*.conf: without that Dovecot does not read the drop-in.", DovecotConf)
	}
	for _, line := range after {
		p.Next = append(p.Next, "# Delete "+line+": Dovecot reads it later, and it overrides the drop-in.")
		p.Undo = append(p.Undo, "# Put back what you deleted: "+line+".")
	}
	p.Next = append(p.Next,
		"doveconf -n >/dev/null && doveadm reload",
		"# Log in once with a mail client. Its address is then in the list:",
		"nftwl list",
		"nftwl doctor",
	)
	p.Undo = append(p.Undo, remove(p.Files), "doveadm reload")
	return p
}

// Overriding reports whether Dovecot reads the drop-in, as far as is known, and
// returns the lines that it reads later and that set what a mail service
// executes.
func Overriding(main, dropIn string) (read bool, lines []string) {
	all := doveconf.Lines(main, dropIn)
	for _, line := range all {
		read = read || line.File == dropIn
		words := strings.Fields(line.Text)
		sets := len(words) > 2 && words[0] == "executable" && slices.ContainsFunc(doveconf.MailServices, func(m doveconf.MailService) bool {
			return m.Service == filepath.Base(words[2])
		})
		if sets && read && line.File != dropIn {
			lines = append(lines, fmt.Sprintf("%q from %s, line %d", line.Text, line.File, line.Number))
		}
	}
	return read || len(all) == 0, lines
}

// keepPostLogin edits the drop-in so that what Dovecot runs after a login today
// runs after nftwl, as the same user.
func (p *Plan) keepPostLogin(dropIn string) string {
	out, err := output("doveconf", doveconf.Arguments()...)
	if errors.Is(err, exec.ErrNotFound) {
		return dropIn
	}
	if err != nil {
		p.note("doveconf fails, so setup does not know whether there is a post-login script. The drop-in would replace it.")
		return dropIn
	}
	dovecot := doveconf.Parse(out)
	keep := map[string]string{} // the socket of a service of today: the new one's name
	for _, m := range doveconf.MailServices {
		executable := dovecot.Section("service " + m.Service).Values["executable"]
		socket, at := doveconf.SocketOf(executable)
		if !dovecot.Protocols()[m.Protocol] {
			continue
		}
		name := "nftwl"
		words := strings.Split(executable, " ")
		if at < 0 {
			words = append(words, name)
		} else {
			if kept := keep[socket]; kept != "" {
				name = kept
			} else if c, err := findChain(dovecot, socket); err != nil {
				p.problem("remove "+socket+" from that executable if you do not need it; or do without this drop-in: 'nftwl setup policy' leaves the script alone",
					"service %s asks %s after a login, and setup cannot keep that: %v", m.Service, socket, err)
				continue
			} else if c != nil {
				name = "nftwl-" + m.Service
				dropIn += c.service(name)
				p.note("After a login, service %s asks %s, which runs %s as %s. With the drop-in, service %s runs it after nftwl, as %[4]s, and nothing asks %[2]s any more.",
					m.Service, socket, strings.Join(c.command, " "), c.user, name)
			}
			keep[socket] = name
			words[at] = name
		}
		line := strings.Join(words, " ")
		if !plain(line) {
			p.problem("", "the executable of service %s has a character that Dovecot would not read as it is: %s", m.Service, executable)
			continue
		}
		dropIn = strings.Replace(dropIn, "\n  executable = "+m.Service+" nftwl\n", "\n  executable = "+line+"\n", 1)
	}
	return dropIn
}

// A chain is what a post-login service runs, and as which user.
type chain struct {
	command  []string
	user     string
	drop     []string // a command that becomes that user, and executes its arguments
	vsz      string
	listener *doveconf.Settings
}

// findChain returns that of the service that listens on a socket; nil if it runs
// nothing but nftwl.
func findChain(dovecot *doveconf.Settings, socket string) (*chain, error) {
	service, listener := dovecot.Listener(dovecot.Path(socket))
	if service == nil {
		return nil, errors.New("no Dovecot service listens there")
	}
	login, err := ParsePostLogin(service.Values["executable"])
	if err != nil {
		return nil, err
	}
	command := login.Command
	if login.Nftwl != "" && len(command) == 0 {
		return nil, nil
	}
	if login.MailUser {
		return nil, errors.New("script-login -d runs it as the mail user, who cannot write to nftables")
	}
	// script-login would look for it in libexec_dir, nftwl in PATH.
	if !filepath.IsAbs(command[0]) {
		return nil, fmt.Errorf("%s is not an absolute path", command[0])
	}
	if !plain(strings.Join(command, " ")) {
		return nil, errors.New("its executable has a character that Dovecot would not read as it is")
	}
	for _, key := range []string{"chroot", "group", "extra_groups", "privileged_group"} {
		if value := service.Values[key]; value != "" {
			return nil, fmt.Errorf("it has %s = %s", key, value)
		}
	}
	c := &chain{command: command, user: cmp.Or(service.Values["user"], "root"), vsz: "1G", listener: listener}
	if written, limit, err := dovecot.VszLimit(service); err == nil && (limit == 0 || limit >= 2<<30) {
		c.vsz = written
	}
	if c.user == "root" || c.user == "0" {
		return c, nil
	}
	// The user's group, as in service_create() of Dovecot's src/master/service.c.
	group, err := output("id", "-g", c.user)
	if err != nil {
		return nil, fmt.Errorf("the group of its user = %s is not known", c.user)
	}
	// BusyBox's lacks the options for users.
	if out, err := output(setpriv, "--help"); err != nil || !strings.Contains(out, "--reuid") {
		return nil, fmt.Errorf("running it as %s needs %s of util-linux, which is not installed", c.user, setpriv)
	}
	group = strings.TrimSpace(group)
	c.drop = []string{setpriv, "--reuid=" + c.user, "--regid=" + group, "--groups=" + group}
	return c, nil
}

// service is the block that runs the chain after nftwl.
func (c *chain) service(name string) string {
	var inner strings.Builder
	for _, key := range []string{"user", "group", "mode"} {
		if value := c.listener.Values[key]; value != "" {
			fmt.Fprintf(&inner, "    %s = %s\n", key, value)
		}
	}
	return fmt.Sprintf(`
# What Dovecot already ran after a login runs after nftwl.
service %s {
  executable = script-login %s login %s
  user = root
  vsz_limit = %s
  process_limit = 1024
  unix_listener %[1]s {
%[5]s  }
}
`, name, nftwlPath, strings.Join(slices.Concat(c.drop, c.command), " "), c.vsz, &inner)
}

// plain reports whether Dovecot reads a value as it is, without quotes.
func plain(s string) bool {
	return strings.TrimSpace(s) == s && !strings.ContainsAny(s, "#\"'\\$%{}<\t\n")
}
