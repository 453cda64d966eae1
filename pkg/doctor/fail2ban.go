package doctor

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"nftwl/pkg/install"
)

// checkFail2ban checks that fail2ban runs, that it will start again, and that its
// jails for mail ban through nftwl, which spares trusted addresses.
func (d *Doctor) checkFail2ban(ctx context.Context) {
	const check, client = "fail2ban", "fail2ban-client"
	if _, err := exec.LookPath(client); err != nil {
		d.skip(check, "fail2ban is not installed")
		return
	}
	if os.Geteuid() != 0 {
		d.skip(check, "only root can ask fail2ban")
		return
	}
	// setup's, and nftwl.local, which enables the jails.
	files, _ := filepath.Glob(install.Fail2banDir + "/*.d/nftwl*") // no error but a bad pattern
	if len(files) == 0 {
		d.skip(check, "%s has none of nftwl's files; `nftwl setup fail2ban` has them", install.Fail2banDir)
		return
	}
	again := remedy{"put nftwl's files back, fix the configuration until `fail2ban-client -t` reports no error, then restart fail2ban", "nftwl setup fail2ban --write"}
	if _, err := run(ctx, client, "-t"); err != nil {
		// 2026-11-21 17:04:26,864 fail2ban.configreader   [19432]: ERROR   Found no …
		_, why, _ := strings.Cut(err.Error(), "ERROR")
		d.fail(check, again, "fail2ban will not start again, and then nobody is banned for wrong passwords: %s", cmp.Or(strings.TrimSpace(why), err.Error()))
		return
	}
	status, err := run(ctx, client, "status")
	if err != nil {
		d.fail(check, remedy{"start it; until then, nobody is banned for wrong passwords", "systemctl start fail2ban"}, "fail2ban does not answer, and %s is there", files[0])
		return
	}
	_, list, _ := strings.Cut(status, "Jail list:")
	var ours, others []string
	for _, jail := range words(list) {
		actions, err := run(ctx, client, "get", jail, "actions")
		if err != nil {
			d.skip(check, "%v", err)
			return
		}
		// A line of words, and one with the names. One of several nftwl actions has
		// a name of its own: nftwl[actname=nftwl-submission].
		_, names, _ := strings.Cut(actions, "\n")
		switch all := words(names); {
		case slices.ContainsFunc(all, func(name string) bool { return strings.HasPrefix(name, "nftwl") }):
			ours = append(ours, jail)
		case isMail(jail):
			others = append(others, fmt.Sprintf("%s (action %s)", jail, strings.Join(all, " ")))
		}
	}
	switch {
	case others != nil:
		d.warn(check, remedy{"take action and port of these jails out of jail.local, then restart fail2ban", "systemctl restart fail2ban"},
			"jails do not ban through nftwl, so they can ban trusted addresses, and nftwl list does not show their bans: %s", strings.Join(others, ", "))
	case ours == nil:
		d.skip(check, "no jail bans through nftwl; `nftwl setup fail2ban` says how to enable some")
	default:
		d.ok(check, "jails ban through nftwl: %s", strings.Join(ours, ", "))
	}
}

// words splits a fail2ban list.
func words(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return strings.ContainsRune(", \t\n", r) })
}

// isMail tells whether a jail in fail2ban's jail.conf watches a mail server.
func isMail(jail string) bool {
	return slices.ContainsFunc([]string{"postfix", "dovecot", "cyrus", "sasl", "sieve", "exim", "sendmail", "courier", "imap", "pop3", "smtp"},
		func(word string) bool { return strings.Contains(jail, word) })
}
