package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"nftwl/pkg/doveconf"
)

var dropIn = remedy{"put the shipped settings (contrib/dovecot) into /etc/dovecot/conf.d, and have Dovecot read them", "nftwl setup dovecot --write && doveadm reload"}

// reload is a remedy in Dovecot's settings.
func reload(format string, args ...any) remedy {
	return remedy{fmt.Sprintf(format, args...) + "; then reload Dovecot", "doveadm reload"}
}

func (d *Doctor) checkDovecot(ctx context.Context) {
	program := find("doveconf")
	d.unread = "Dovecot's settings cannot be read"
	if program == "" {
		d.unread = "Dovecot is not installed here"
		d.skip("dovecot", "Dovecot is not installed here")
		return
	}
	out, err := output(ctx, find("dovecot"), "--version")
	version, _, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	switch {
	case err != nil:
		d.fail("dovecot.version", remedy{words: "see why it does not run"}, "%v", err)
	case strings.HasPrefix(version, "2.3.") || strings.HasPrefix(version, "2.4."):
		d.ok("dovecot.version", "Dovecot %s", version)
	default:
		d.warn("dovecot.version", remedy{words: "log in once, and look whether the client is trusted"}, "Dovecot %s: nftwl is tried with 2.3 and 2.4", version)
	}

	// The settings refer to keys, which root alone can read.
	if os.Geteuid() != 0 {
		d.skip("dovecot.settings", "only root can read all of Dovecot's settings")
		return
	}
	out, err = output(ctx, program, doveconf.Arguments(append(doveconf.AuthPolicyNames, "haproxy_trusted_networks")...)...)
	if errors.Is(err, errNoAnswer) {
		d.warn("dovecot.settings", remedy{"see why it does not answer; Dovecot's settings are not looked at", "doveconf -n"}, "%v", err)
		return
	}
	if err != nil {
		d.fail("dovecot.settings", remedy{"correct them: Dovecot would not start with them", "doveconf -n"}, "%s", strings.TrimPrefix(err.Error(), "doveconf: ")) // it says its name itself
		return
	}
	dovecot := doveconf.Parse(string(out))
	d.dovecot = dovecot
	for _, p := range d.checkProtocols(dovecot) {
		d.checkPostLogin(ctx, dovecot, p)
	}
	d.checkLSM()
}

// checkProtocols checks whom the mail services ask after a login, and returns
// the post-login services among them.
func (d *Doctor) checkProtocols(dovecot *doveconf.Settings) []*postLogin {
	const check = "dovecot.protocols"
	var services []*postLogin
	var enabled, silent, asking, foreign []string
	denied := false // logins; one failure says so, and hides the others
	for _, m := range doveconf.MailServices {
		if !dovecot.Protocols()[m.Protocol] {
			continue
		}
		enabled = append(enabled, m.Protocol)
		service := dovecot.Section("service " + m.Service)
		name, at := doveconf.SocketOf(service.Values["executable"])
		if at < 0 {
			silent = append(silent, m.Protocol)
			continue
		}
		path := dovecot.Path(name)
		post, listener := dovecot.Listener(path)
		switch {
		case name == "" && !denied:
			denied = true
			d.fail(check, reload("take one of the two spaces in a row out of executable = %s in %s", service.Values["executable"], service.Name),
				"an empty name of a post-login service denies every login by %s", m.Protocol)
		case post != nil:
			i := slices.IndexFunc(services, func(p *postLogin) bool { return p.listener == listener })
			if i < 0 {
				i, services = len(services), append(services, &postLogin{Settings: post, listener: listener})
			}
			services[i].askers = append(services[i].askers, service)
			asking = append(asking, m.Protocol)
		case filepath.IsAbs(name) && exists(path): // another program listens there
			if !slices.Contains(foreign, path) {
				foreign = append(foreign, path)
			}
			asking = append(asking, m.Protocol)
		case !denied:
			denied = true
			d.fail(check, dropIn, "there is no service with a listener %s, which denies every login by %s", name, m.Protocol)
		}
	}
	var whom []string
	for _, p := range services {
		whom = append(whom, p.Name)
	}
	whom = append(whom, foreign...)
	switch {
	case enabled == nil:
		d.skip(check, "Dovecot serves no protocol by which users log in")
	case denied:
	case silent != nil && d.config.Policy != nil:
		d.skip(check, "logins by %s run no nftwl; policy.dovecot says whether Dovecot reports them", strings.Join(silent, ", "))
	case asking == nil:
		d.fail(check, dropIn, "no mail protocol runs nftwl: logins by %s trust no one", strings.Join(silent, ", "))
	case silent != nil:
		d.fail(check, dropIn, "logins by %s trust no one", strings.Join(silent, ", "))
	default:
		d.ok(check, "after a login, %s ask %s", strings.Join(asking, ", "), strings.Join(whom, ", "))
	}
	for _, path := range foreign {
		d.warn("dovecot.socket", remedy{words: "log in once, and look whether the client is trusted"},
			"no service of Dovecot's listens on %s, and whether what does runs nftwl cannot be seen", path)
	}
	return services
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// checkLSM looks for what can deny a process more than the rest of this sees.
func (d *Doctor) checkLSM() {
	const check = "dovecot.lsm"
	const words = "log in once; if the client is not trusted, look for denials"
	if b, err := os.ReadFile("/sys/fs/selinux/enforce"); err == nil && string(bytes.TrimSpace(b)) == "1" {
		d.warn(check, remedy{words, "ausearch -m avc -ts recent"}, "SELinux is enforcing, under which nftwl is not tried")
		return
	}
	b, err := os.ReadFile("/sys/kernel/security/apparmor/profiles")
	if errors.Is(err, fs.ErrPermission) {
		d.skip(check, "%v", err)
		return
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutSuffix(strings.TrimSpace(line), " (enforce)"); ok && strings.Contains(name, "dovecot") {
			d.warn(check, remedy{words, `journalctl -k --grep='apparmor="DENIED"'`}, "AppArmor confines Dovecot (profile %s), under which nftwl is not tried", name)
			return
		}
	}
	d.ok(check, "neither SELinux nor AppArmor confines Dovecot")
}
