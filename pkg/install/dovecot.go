package install

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"nftwl/pkg/doveconf"
)

const setpriv = "/usr/bin/setpriv" // as mailUserFile has it

// Dovecot plans the drop-in, which is the same for 2.3 and 2.4.
func Dovecot(o *Options) (*Plan, error) {
	if err := o.checkPaths(); err != nil {
		return nil, err
	}
	p := new(Plan)
	p.needDir(DovecotDir, "Dovecot")
	text, script := p.keepPostLogin(o, o.read("dovecot/"+filepath.Base(DropIn)))
	p.add(DropIn, text)
	if script != "" {
		p.add(mailUserFile, script).Mode = 0o755
		p.Next = []string{"chmod 755 " + mailUserFile}
	}
	read, after := Overriding(DovecotConf, DropIn)
	if !read {
		p.note("%s does not include conf.d/*.conf: without that Dovecot does not read the drop-in.", DovecotConf)
	}
	for _, line := range after {
		p.Next = append(p.Next, "# Delete "+line+": Dovecot reads it later, and it overrides the drop-in.")
		p.Undo = append(p.Undo, "# Put back what you deleted: "+line+".")
	}
	p.needRoots(o.Executable, o.move())
	p.Next = append(p.Next,
		"doveconf -n >/dev/null && doveadm reload",
		"# Log in once with a mail client. Its address is then in the list:",
		o.shell("nftwl")+" list",
		o.shell("nftwl")+" doctor",
	)
	p.Undo = append(p.Undo, p.remove(), "doveadm reload")
	return p, nil
}

// Overriding reports whether Dovecot reads the drop-in, as far as is known, and
// returns the lines that it reads later and that set what a mail service
// executes.
func Overriding(main, dropIn string) (read bool, lines []string) {
	all := doveconf.Lines(main, dropIn)
	for _, line := range all {
		read = read || line.File == dropIn
		words := strings.Fields(line.Text)
		if read && line.File != dropIn && len(words) > 2 && words[0] == "executable" && slices.ContainsFunc(doveconf.MailServices, func(m struct{ Protocol, Service string }) bool {
			return m.Service == filepath.Base(words[2])
		}) {
			lines = append(lines, fmt.Sprintf("%q from %s, line %d", line.Text, line.File, line.Number))
		}
	}
	return read || len(all) == 0, lines
}

// readDoveconf returns Dovecot's settings, or nil without an error if Dovecot is
// not installed.
func readDoveconf() (*doveconf.Settings, error) {
	out, err := output("doveconf", doveconf.Arguments("mail_uid", "mail_gid", "mail_access_groups", "mail_privileged_group")...)
	if errors.Is(err, exec.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return doveconf.Parse(out), nil
}

// keepPostLogin edits the drop-in so that what Dovecot runs after a login today
// runs after nftwl, as the same user. script is the text of mailUserFile; "" if it
// is not needed.
func (p *Plan) keepPostLogin(o *Options, dropIn string) (text, script string) {
	dovecot, err := readDoveconf()
	if err != nil {
		p.note("doveconf fails, so setup does not know whether there is a post-login script. The drop-in would replace it.")
	}
	if dovecot == nil {
		return dropIn, ""
	}
	keep := map[string]string{} // service of today: the new one's name
	for _, m := range doveconf.MailServices {
		service := dovecot.Section("service " + m.Service)
		words := strings.Split(service.Values["executable"], " ")
		asked, at := doveconf.SocketOf(service.Values["executable"])
		if !dovecot.Protocols()[m.Protocol] {
			continue
		}
		name := "nftwl"
		old, listener := dovecot.Listener(dovecot.Path(asked))
		switch {
		case at < 0:
			at, words = len(words), append(words, "")
		case old == nil:
			p.note("Dovecot's %s asks %s after a login. The drop-in replaces that.", service.Name, asked)
		case keep[old.Name] != "":
			name = keep[old.Name]
		default:
			c, err := o.chain(dovecot, old)
			if err != nil {
				p.problem("remove "+asked+" from the executable of "+service.Name+" if you do not need it, or have its program execute nftwl login itself",
					"%s asks %s after a login, and setup cannot keep that: %v", service.Name, old.Name, err)
				continue
			}
			if c != nil {
				name = "nftwl-" + m.Service
				dropIn += c.service(o, name, dovecot, old, listener)
				if c.mailUser {
					script = o.mailUserScript(dovecot)
				}
				p.note("After a login, %s asks %s, which runs %s as %s. With the drop-in, service %s runs it after nftwl, as %s, and nothing asks %s any more.",
					service.Name, old.Name, strings.Join(c.command, " "), c.user, name, c.user, old.Name)
			}
			keep[old.Name] = name
		}
		words[at] = name
		line := strings.Join(words, " ")
		if !plain(line) {
			p.problem("", "the executable of %s has a character that Dovecot would not read as it is: %s", service.Name, service.Values["executable"])
			continue
		}
		dropIn = strings.Replace(dropIn, "\n  executable = "+m.Service+" nftwl\n", "\n  executable = "+line+"\n", 1)
	}
	return dropIn, script
}

// A chain is what a post-login service runs, and as which user.
type chain struct {
	command  []string
	user     string
	mailUser bool     // whose id only the login knows
	drop     []string // a command that becomes that user, and executes its arguments
}

// chain returns a service's, or nil if it runs nothing but nftwl.
func (o *Options) chain(dovecot, service *doveconf.Settings) (*chain, error) {
	login, err := ParsePostLogin(service.Values["executable"])
	if err != nil {
		return nil, err
	}
	c := &chain{command: login.Command}
	if login.Nftwl != "" {
		c.command = slices.Concat(login.Before, login.Command)
	}
	if len(c.command) == 0 {
		return nil, nil
	}
	// script-login looks for its program in libexec_dir, nftwl in PATH.
	if first := c.command[0]; !filepath.IsAbs(first) && (login.Nftwl == "" || len(login.Before) > 0) {
		c.command = slices.Concat([]string{filepath.Join(dovecot.Values["libexec_dir"], first)}, c.command[1:])
	}
	if !plain(strings.Join(c.command, " ")) {
		return nil, errors.New("its executable has a character that Dovecot would not read as it is")
	}
	refuse := func(s *doveconf.Settings, keys ...string) error {
		for _, key := range keys {
			if value := s.Values[key]; value != "" {
				return fmt.Errorf("it has %s = %s", key, value)
			}
		}
		return nil
	}
	if err := refuse(service, "chroot", "privileged_group"); err != nil {
		return nil, err
	}

	user, group, groups := service.Values["user"], service.Values["group"], service.Values["extra_groups"]
	switch {
	case login.MailUser:
		if err := refuse(dovecot, "mail_access_groups", "mail_privileged_group"); err != nil {
			return nil, fmt.Errorf("with script-login -d, %w", err)
		}
		c.user, c.mailUser, c.drop = "the mail user", true, []string{mailUserFile}
	case (user == "" || user == "root" || user == "0") && group == "" && groups == "":
		c.user = "root"
		return c, nil
	default:
		if user == "" {
			user = "root"
		}
		if group == "" { // the user's, as in service_create() of Dovecot's src/master/service.c
			out, err := exec.Command("id", "-g", user).Output()
			if err != nil {
				return nil, fmt.Errorf("the group of its user = %s is not known", user)
			}
			group = strings.TrimSpace(string(out))
		}
		all := append([]string{group}, strings.FieldsFunc(groups, func(r rune) bool { return r == ' ' || r == ',' })...)
		c.user = user
		c.drop = []string{findSetpriv(), "--reuid=" + user, "--regid=" + group, "--groups=" + strings.Join(all, ",")}
	}
	// BusyBox's lacks the options for users.
	if out, err := exec.Command(findSetpriv(), "--help").CombinedOutput(); err != nil || !strings.Contains(string(out), "--reuid") {
		return nil, fmt.Errorf("running it as %s needs setpriv of util-linux, which is not installed", c.user)
	}
	return c, nil
}

func findSetpriv() string {
	if path, err := exec.LookPath("setpriv"); err == nil {
		return path
	}
	return setpriv
}

// service is the block that runs the chain after nftwl.
func (c *chain) service(o *Options, name string, dovecot, old, listener *doveconf.Settings) string {
	vsz := "1G"
	if written, limit, err := dovecot.VszLimit(old); err == nil && (limit == 0 || limit >= 2<<30) {
		vsz = written
	}
	var inner strings.Builder
	for _, key := range []string{"user", "group", "mode"} {
		if value := listener.Values[key]; value != "" {
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
`, name, o.command(), strings.Join(slices.Concat(c.drop, c.command), " "), vsz, &inner)
}

// mailUserScript is mailUserFile's text for this Dovecot.
func (o *Options) mailUserScript(dovecot *doveconf.Settings) string {
	return strings.NewReplacer(
		"default_uid=''", "default_uid="+quote(dovecot.Values["mail_uid"]),
		"default_gid=''", "default_gid="+quote(dovecot.Values["mail_gid"]),
		setpriv, findSetpriv(),
	).Replace(shipped("dovecot/" + filepath.Base(mailUserFile)))
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// plain reports whether Dovecot reads a value as it is, without quotes.
func plain(s string) bool {
	return strings.TrimSpace(s) == s && !strings.ContainsAny(s, "#\"'\\$%{}<\t\n")
}
