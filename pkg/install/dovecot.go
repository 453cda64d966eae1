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

// Dovecot plans the drop-in, which is the same for 2.3 and 2.4.
func Dovecot(o *Options) *Plan {
	p := newPlan(o)
	p.needDir(dovecotDir, "Dovecot")
	p.add(DropIn, shipped("dovecot/"+filepath.Base(DropIn)))
	p.leaveOthers()
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

// leaveOthers reports what Dovecot runs after a login today: the drop-in would replace
// it.
func (p *Plan) leaveOthers() {
	out, err := output("doveconf", doveconf.Arguments()...)
	if errors.Is(err, exec.ErrNotFound) {
		return
	}
	if err != nil {
		p.note("doveconf fails, so setup does not know whether there is a post-login script. The drop-in would replace it.")
		return
	}
	dovecot := doveconf.Parse(out)
	for _, m := range doveconf.MailServices {
		executable := dovecot.Section("service " + m.Service).Values["executable"]
		if dovecot.Protocols()[m.Protocol] && executable != m.Service && executable != m.Service+" nftwl" {
			p.problem(OwnScript+"; or leave it as it is, and use nftwld: nftwl setup policy",
				"service %s has executable = %s, and the drop-in would replace that", m.Service, executable)
		}
	}
}

// OwnScript is what to do if Dovecot runs another script after a login.
const OwnScript = `have the service run nftwl before the script, see "A post-login script of your own" in docs/how-it-works.md`
