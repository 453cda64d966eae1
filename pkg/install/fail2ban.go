package install

import (
	"io/fs"
	"path/filepath"
	"strings"

	"nftwl/contrib"
)

// Fail2ban plans the action, the filters and the jails, and enables none. All of
// the files begin with nftwl, and so does the one in which the administrator
// enables jails, so that one rm takes all: an enabled jail without its file keeps
// fail2ban from starting.
func Fail2ban(o *Options) *Plan {
	const local = Fail2banDir + "/jail.d/nftwl.local"
	names, _ := fs.Glob(contrib.Files, "fail2ban/*/*") // the pattern is right
	p := newPlan(o)
	p.needDir(Fail2banDir, "fail2ban")
	for _, name := range names {
		p.add(filepath.Join(Fail2banDir, strings.TrimPrefix(name, "fail2ban/")), shipped(name))
	}
	const restart = "fail2ban-client -t && systemctl restart fail2ban"
	p.Next = []string{
		"# Enable the jails that you need in " + local + ", such as:",
		"#   [postfix-sasl]",
		"#   enabled = true",
		`# Remove "action" and "port" of these jails from jail.local. Then restart`,
		"# fail2ban: after a reload it does not ban a banned address again.",
		restart,
		"nftwl doctor",
	}
	p.Undo = []string{
		"# If another file than " + local + " enables postfix-lost,",
		"# postfix-spam or dovecot-auth, remove that first.",
		"rm " + Fail2banDir + "/*.d/nftwl*",
		restart,
	}
	return p
}
