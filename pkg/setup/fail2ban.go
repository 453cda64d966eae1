package setup

import (
	"io/fs"
	"path/filepath"
	"strings"

	"nftwl/contrib"
)

// Fail2ban plans the action, the filters and the jails, none of them enabled.
func Fail2ban(o *Options) (*Plan, error) {
	const folder = "/etc/fail2ban"
	const local = folder + "/jail.d/mail.local"
	if err := o.checkPaths(); err != nil {
		return nil, err
	}
	names, err := fs.Glob(contrib.Files, "fail2ban/*/*")
	if err != nil {
		return nil, err
	}
	p := new(Plan)
	p.needFolder(folder, "fail2ban")
	p.checkProgram(o.Executable, o.installed())
	for _, name := range names {
		text, err := o.read(name)
		if err != nil {
			return nil, err
		}
		p.add(filepath.Join(folder, strings.TrimPrefix(name, "fail2ban/")), text)
	}
	if exists(local) {
		p.Next = []string{"# Enable the jails that you need in " + local + "."}
	} else {
		p.Next = []string{
			"# Enable the jails that you need, such as:",
			`printf '[%s]\nenabled = true\n' postfix-sasl postfix-lost dovecot >` + local,
		}
	}
	p.Next = append(p.Next,
		`# Take "action" and "port" of these jails out of jail.local. Then, and not with`,
		"# a reload, which would ban no one anew:",
		"fail2ban-client -t && systemctl restart fail2ban",
		o.shell()+" doctor",
	)
	p.Undo = []string{
		"# Take postfix-lost out of " + local + ", as its filter goes too, and the other",
		"# jails, unless fail2ban's own actions are to ban for them. Then:",
		p.remove(),
		"systemctl restart fail2ban",
	}
	return p, nil
}
