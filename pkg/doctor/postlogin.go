package doctor

import (
	"cmp"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
	"nftwl/pkg/doveconf"
	"nftwl/pkg/install"
)

// postLogin is a post-login service, and the services that ask it.
type postLogin struct {
	*doveconf.Settings
	listener *doveconf.Settings
	socket   string
	askers   []*doveconf.Settings

	login    *install.PostLogin
	programs []string // the paths that Dovecot executes: nftwl's, and the one after it
}

// root tells whether the service runs its programs as root.
func (p *postLogin) root() bool {
	return !p.login.MailUser && slices.Contains([]string{"", "root", "0"}, p.Values["user"])
}

// checkPostLogin checks a service that runs nftwl login.
func (d *Doctor) checkPostLogin(p *postLogin) {
	const check = "dovecot.service"
	executable := p.Values["executable"]
	login, err := install.ParsePostLogin(executable)
	switch {
	case errors.Is(err, install.ErrOption):
		d.warn(check, reload("if nothing needs the option, take it out of executable = %s in %s", executable, p.Name),
			"whether %s runs nftwl cannot be seen: %v", p.Name, err)
		return
	case err != nil:
		fix := reload("executable = script-login %s login in %s", d.Executable, p.Name)
		if errors.Is(err, install.ErrEmptyWord) {
			fix = reload("remove one of the two spaces in a row from executable = %s in %s", executable, p.Name)
		}
		d.fail(check, fix, "the executable of %s denies every login: %v: %s", p.Name, err, executable)
		return
	case p.Values["chroot"] != "":
		d.fail(check, reload("take chroot = %s out of %s", p.Values["chroot"], p.Name),
			"%s has chroot = %s, which lacks the program that it should execute: every login is denied", p.Name, p.Values["chroot"])
		return
	case login.Nftwl == "" && d.config.Policy != nil:
		d.skip(check, "%s runs no nftwl; policy.dovecot tells whether Dovecot reports its logins", p.Name)
		return
	case login.Nftwl == "":
		d.warn(check, reload("%s", install.OwnScript), "%s runs %s, and whether that runs nftwl cannot be seen", p.Name, strings.Join(login.Command, " "))
		return
	}
	p.login = login
	path := login.Nftwl
	if !filepath.IsAbs(path) {
		path = filepath.Join(d.dovecot.Values["libexec_dir"], path) // as script-login does
	}
	p.programs = append(p.programs, path)
	if len(login.Command) > 0 {
		path := login.Command[0]
		if found, err := exec.LookPath(path); err == nil {
			path = found
		}
		p.programs = append(p.programs, path)
	}
	d.checkSafe(p)
	d.checkListener(p)
	d.checkProcessLimit(p)
	d.checkLogin(p)
}

// checkLogin has the service trust a client, or tells why it would not.
func (d *Doctor) checkLogin(p *postLogin) {
	const check = "dovecot.login"
	fail := func(fix remedy, format string, args ...any) {
		if !d.told[fix] { // one cause is one finding, whatever services it breaks
			d.told[fix] = true
			d.fail(check, fix, format, args...)
		}
	}
	for _, path := range p.programs {
		if _, err := exec.LookPath(path); err != nil {
			fail(reload("put the program there, or correct executable = %s in %s", p.Values["executable"], p.Name), "%v: %v", errDenied, err)
			return
		}
	}
	lacks := d.lacks(p)
	set := reload("in %s, set %s", p.Name, lacks)
	if untried := d.untried(p); untried != "" && lacks != "" {
		fail(set, "%s lacks %s; no login by it was tried: %s", p.Name, lacks, untried)
		return
	} else if untried != "" {
		d.skip(check, "no login by %s was tried: %s", p.Name, untried)
		return
	}
	since := time.Now()
	trusted, err := d.tryLogins(p)
	if err == nil && trusted == nil {
		d.skip(check, "no login by %s was tried: nftwl ignores the addresses that could be tried, 192.0.2.0/24 and 2001:db8::/32, trusts them already, or has no set for them", p.Name)
		return
	} else if err == nil {
		d.ok(check, "a login by %s was tried: it trusts %s; that was removed again", p.Name, strings.Join(trusted, " and "))
		return
	}
	why := logged(d.dovecot, strings.TrimPrefix(p.Name, "service "), since)
	// What nftwl lacks, though doctor has it. Without the capability, a file that
	// has it cannot be executed; without AF_NETLINK, there seems to be no nf_tables.
	withheld := slices.ContainsFunc([]string{"CAP_NET_ADMIN", "nf_tables", "Operation not permitted"},
		func(words string) bool { return strings.Contains(why, words) })
	fix := remedy{"see what Dovecot says", "doveadm log errors"}
	switch {
	case lacks != "":
		fix = set
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED), d.stale:
		fix = remedy{"have Dovecot read its configuration", "doveadm reload"}
	case withheld && !p.root():
		fix = reload("in %s, set user = root", p.Name)
	case withheld:
		fix = allow
	}
	fail(fix, "a login by %s was tried: %v%s", p.Name, err, why)
}

// untried tells why no login by a service can be tried; "" if one can.
func (d *Doctor) untried(p *postLogin) string {
	switch own := cmp.Or(p.login.Config, config.Path); {
	case d.conn == nil:
		return "nftables cannot be read"
	case !d.valid:
		return "the configuration of nftwl is not valid"
	case own != d.configPath():
		return "it has another configuration, which `nftwl --config " + quote(own) + " doctor` looks at"
	case p.login.MailUser:
		return "it runs as the mail user"
	case len(p.programs) > 1:
		return "it would run " + strings.Join(p.login.Command, " ")
	case !d.running:
		return "Dovecot is not running"
	}
	return ""
}

// lacks returns the settings that a service needs and does not have; "" if it has
// all.
func (d *Doctor) lacks(p *postLogin) string {
	var settings []string
	if limit, err := d.dovecot.VszLimit(p.Settings); err != nil || limit != 0 && !enough(limit) {
		settings = append(settings, "vsz_limit = 1G")
	}
	_, err := unix.Getxattr(p.programs[0], "security.capability", nil)
	switch {
	case p.root() || err == nil:
	case p.login.MailUser:
		settings = append(settings, "executable = script-login without -d")
	default:
		settings = append(settings, "user = root")
	}
	return strings.Join(settings, ", ")
}

// enough tells whether nftwl runs within a limit on its address space: Go's
// runtime reserves some 700 MB, and with 1110 to 1200 MB it tries for more.
func enough(limit uint64) bool {
	return limit >= 1<<30 && (limit < 1110<<20 || limit > 1200<<20)
}

// allow is the remedy for what Dovecot's unit withholds. Two lines for each are right
// for any unit: see contrib/systemd/dovecot.service.d.
var allow = remedy{"let Dovecot's unit, or its container, have CAP_NET_ADMIN and AF_NETLINK, which it withholds",
	"mkdir -p /etc/systemd/system/dovecot.service.d && printf '%s\\n' '[Service]' 'CapabilityBoundingSet=~CAP_NET_ADMIN' 'CapabilityBoundingSet=CAP_NET_ADMIN'" +
		" 'RestrictAddressFamilies=~AF_NETLINK' 'RestrictAddressFamilies=AF_NETLINK' >>/etc/systemd/system/dovecot.service.d/nftwl.conf" +
		" && systemctl daemon-reload && systemctl restart dovecot"}

// checkSafe checks that Dovecot runs as root only what is root's.
func (d *Doctor) checkSafe(p *postLogin) {
	for _, path := range p.programs {
		if err := install.OnlyRoots(path); err != nil && p.root() && exists(path) {
			d.fail("dovecot.executable", remedy{words: "let only root write it and each directory above it, or move it to where that is so, such as /usr/bin"},
				"Dovecot runs %s as root, and users other than root can change it: %v", path, err)
			return
		}
	}
}

// checkListener checks that a mail process may still ask when it no longer is
// root: with drop_priv_before_exec, or from its second login on.
func (d *Doctor) checkListener(p *postLogin) {
	mode, _ := strconv.ParseUint(cmp.Or(p.listener.Values["mode"], "0600"), 8, 32) // 2.4 leaves the default out
	// It takes the right to write to connect, see unix(7).
	if mode&0o002 != 0 || mode&0o020 != 0 && p.listener.Values["group"] != "" ||
		mode&0o200 != 0 && cmp.Or(p.listener.Values["user"], "root") != "root" {
		return
	}
	for _, asker := range p.askers {
		count := "service_count"
		if _, ok := asker.Values[count]; !ok {
			count = "restart_request_count" // 2.4
		}
		if asker.Values["drop_priv_before_exec"] == "yes" || cmp.Or(asker.Values[count], "1") != "1" {
			d.fail("dovecot.listener", reload("in %s of %s, user = the mail user; or in %s, %s = 1", p.listener.Name, p.Name, asker.Name, count),
				"the processes of %s ask as the mail user (%s = %s, drop_priv_before_exec = %s), and have no permission: those logins are denied",
				asker.Name, count, asker.Values[count], asker.Values["drop_priv_before_exec"])
			return
		}
	}
}

// checkProcessLimit compares with the mail services, each login by which is a
// process of both.
func (d *Doctor) checkProcessLimit(p *postLogin) {
	for _, asker := range p.askers {
		if own, most := d.dovecot.ProcessLimit(p.Settings), d.dovecot.ProcessLimit(asker); own < most {
			d.warn("dovecot.process_limit", reload("in %s, set process_limit = %d", p.Name, most),
				"%s can have %d processes, and %s %d: when many log in at once, logins wait, and are denied after ten seconds", p.Name, own, asker.Name, most)
			return
		}
	}
}
