package install

import (
	"io/fs"
	"path/filepath"
	"strings"

	"nftwl/contrib"
)

// Fail2ban plans the action, the filters and the jails, none of them enabled.
// All files of ours begin with nftwl, and so does the one that enables the jails:
// without its file, a jail that is enabled keeps fail2ban from starting.
func Fail2ban(o *Options) (*Plan, error) {
	const folder = "/etc/fail2ban"
	const local = folder + "/jail.d/nftwl.local"
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
	const restart = "fail2ban-client -t && systemctl restart fail2ban"
	p.Next = append(p.Next,
		`# Take "action" and "port" of these jails out of jail.local. Then restart`,
		"# fail2ban: after a reload it would not ban anew who is banned already.",
		restart,
		o.shell()+" doctor",
	)
	p.Undo = []string{
		"# Where another file than " + local + " enables",
		"# postfix-lost, postfix-spam or dovecot-auth, take that out first.",
		"rm " + folder + "/*.d/nftwl*",
		restart,
	}
	return p, nil
}
