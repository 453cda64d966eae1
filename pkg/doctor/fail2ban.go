package doctor

import (
	"cmp"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"nftwl/pkg/install"
)

func (d *Doctor) checkFail2ban(ctx context.Context) {
	const check = "fail2ban"
	client := find("fail2ban-client")
	if client == "" {
		d.skip(check, "fail2ban is not installed")
		return
	}
	if os.Geteuid() != 0 {
		d.skip(check, "only root can ask fail2ban")
		return
	}
	// setup's, and nftwl.local, which enables the jails.
	files, _ := filepath.Glob(install.Fail2banDir + "/*.d/nftwl*") // no error but a bad pattern
	status, err := output(ctx, client, "status")
	if err != nil && len(files) == 0 {
		d.skip(check, "fail2ban does not run")
		return
	}
	if why := refused(ctx, client); why != "" {
		report, words := d.fail, "fail2ban does not start, so nobody is banned for wrong passwords: %s"
		if err == nil {
			report, words = d.warn, "fail2ban runs, but will not start again: %s"
		}
		fix := remedy{"fix its configuration; this tests it", "fail2ban-client -t"}
		// The actions, filters and jails that only nftwl's files have.
		if regexp.MustCompile(`'[a-z.]*/?(?:nftwl|dovecot-auth|postfix-lost|postfix-spam)`).MatchString(why) {
			fix = remedy{"put nftwl's files back, or remove the jails that need them", "nftwl setup fail2ban --write"}
		}
		report(check, fix, words, why)
	} else if err != nil {
		d.warn(check, remedy{"start it; nobody is banned for wrong passwords meanwhile", "systemctl start fail2ban"}, "fail2ban does not answer, and %s is there", files[0])
	}
	if err != nil {
		return
	}
	_, list, _ := strings.Cut(string(status), "Jail list:")
	jails := strings.FieldsFunc(list, func(r rune) bool { return strings.ContainsRune(", \t\n", r) })
	jails = slices.DeleteFunc(jails, func(jail string) bool { return !isMail(jail) })
	if len(jails) == 0 {
		d.skip(check, "fail2ban runs, and has no jail for mail; `nftwl setup fail2ban` says how to enable some")
		return
	}
	for _, jail := range jails {
		if err := d.checkJail(ctx, client, jail); err != nil {
			d.skip("fail2ban."+jail, "%v", err)
		}
	}
}

// refused returns the first error that fail2ban finds in its configuration, with
// which it would not start; "" if there is none.
func refused(ctx context.Context, client string) string {
	out, errs, err := run(ctx, client, "-t")
	if err == nil {
		return ""
	}
	// 2026-11-21 17:04:26,864 fail2ban.configreader   [19432]: ERROR   Found no …
	for line := range strings.Lines(string(out) + string(errs)) {
		if _, text, found := strings.Cut(line, ": ERROR "); found {
			return strings.TrimSpace(text)
		}
	}
	return err.Error()
}

// isMail is about the jails of fail2ban's jail.conf and of ours that watch mail
// servers.
func isMail(jail string) bool {
	return slices.ContainsFunc([]string{"postfix", "dovecot", "cyrus", "sasl", "sieve", "exim", "sendmail", "courier", "imap", "pop3", "smtp"},
		func(word string) bool { return strings.Contains(jail, word) })
}

// checkJail looks at a jail as the server has it, whatever the files say by
// now. It asks for nothing that a jail can lack: fail2ban logs that as an error.
func (d *Doctor) checkJail(ctx context.Context, client, jail string) error {
	check := "fail2ban." + jail
	restart := "systemctl restart fail2ban"
	var failed error
	get := func(args ...string) string {
		out, err := output(ctx, client, append([]string{"get", jail}, args...)...)
		failed = cmp.Or(failed, err)
		return strings.TrimSpace(string(out))
	}
	// A line of words, and one with the names; or a line that there are none.
	actions, ignore := get("actions"), get("ignorecommand")
	if failed != nil {
		return failed
	}
	_, names, _ := strings.Cut(actions, "\n")
	all := strings.FieldsFunc(names, func(r rune) bool { return strings.ContainsRune(", \n", r) })
	// One of several has a name of its own: nftwl[actname=nftwl-submission].
	i := slices.IndexFunc(all, func(name string) bool { return strings.HasPrefix(name, "nftwl") })
	if i < 0 {
		with := "no action"
		if len(all) > 0 {
			with = "action " + strings.Join(all, ", ")
		}
		d.warn(check, remedy{"take action and port of this jail out of jail.local, then restart fail2ban", restart},
			"jail %s has %s, and not nftwl: trusted addresses can be banned, and nftwl list does not show the bans", jail, with)
		return nil
	}
	program := get("action", all[i], "nftwl")
	if failed != nil {
		return failed
	}
	for _, command := range []string{program, ignore} {
		if word, _, _ := strings.Cut(command, " "); strings.HasPrefix(word, "/") {
			if _, err := exec.LookPath(word); err != nil {
				d.fail(check, remedy{"name the path of nftwl in action and ignorecommand of this jail, then restart fail2ban", restart},
					"jail %s runs %s, which cannot be run: %v", jail, word, err)
				return nil
			}
		}
	}
	if !strings.Contains(ignore, "nftwl") {
		d.warn(check, remedy{"give the jail its ignorecommand = " + install.Program + " check -q -- <ip>, then restart fail2ban", restart},
			"jail %s has no ignorecommand that asks nftwl: trusted addresses can be banned", jail)
		return nil
	}
	d.ok(check, "jail %s bans by nftwl, and no trusted address", jail)
	return nil
}
