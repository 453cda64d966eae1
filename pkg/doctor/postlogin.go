package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"os"
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

// postLogin is a post-login service, and those who ask it.
type postLogin struct {
	*doveconf.Settings
	listener *doveconf.Settings
	socket   string
	askers   []*doveconf.Settings // services

	login   *install.PostLogin
	user    string   // whom it starts programs as
	nftwl   string   // its path
	scripts []string // the paths of the other programs that a login goes through
}

func (p *postLogin) config() string { return cmp.Or(p.login.Config, config.Path) }

func (p *postLogin) root() bool { return p.user == "root" || p.user == "0" }

// checkPostLogin checks a service that runs nftwl login.
func (d *Doctor) checkPostLogin(p *postLogin) {
	const check = "dovecot.service"
	executable := p.Values["executable"]
	login, err := install.ParsePostLogin(executable)
	switch {
	case err != nil:
		remedy := reload("executable = script-login %s login in %s", d.Executable, p.Name)
		if errors.Is(err, install.ErrEmptyWord) {
			remedy = reload("remove one of the two spaces in a row from executable = %s in %s", executable, p.Name)
		}
		d.fail(check, remedy, "the executable of %s denies every login: %v: %s", p.Name, err, executable)
		return
	case p.Values["chroot"] != "":
		d.fail(check, reload("take chroot = %s out of %s", p.Values["chroot"], p.Name),
			"%s has chroot = %s, where it does not find what it should execute, which denies every login", p.Name, p.Values["chroot"])
		return
	case login.Nftwl == "":
		d.warn(check, chain(), "%s runs %s, and whether that runs nftwl cannot be seen", p.Name, strings.Join(login.Command, " "))
		return
	}
	p.resolve(login, d.dovecot.Values["libexec_dir"])
	if own := p.config(); own != d.configPath() {
		d.warn("dovecot.config", remedy{"have the doctor look at that one", "nftwl --config " + quote(own) + " doctor"},
			"logins are trusted by %s, and the doctor looks at %s", own, d.configPath())
	}
	d.checkSafe(p)
	d.checkListener(p)
	d.checkProcessLimit(p)
	d.checkLogin(p)
}

// resolve finds the programs of a login.
func (p *postLogin) resolve(login *install.PostLogin, libexec string) {
	p.login = login
	p.user = cmp.Or(p.Values["user"], "root")
	if login.MailUser {
		p.user = "the mail user (script-login -d)"
	}
	absolute := func(path string) string {
		if !filepath.IsAbs(path) {
			path = filepath.Join(libexec, path) // as script-login does
		}
		return path
	}
	p.nftwl = absolute(login.Nftwl)
	if len(login.Before) > 0 {
		p.scripts = append(p.scripts, absolute(login.Before[0]))
	}
	if len(login.Command) > 0 {
		// As nftwl finds it, to which Dovecot gives no PATH. From where a path
		// with a slash begins cannot be seen.
		switch script := login.Command[0]; {
		case filepath.IsAbs(script):
			p.scripts = append(p.scripts, script)
		case !strings.Contains(script, "/") && unix.Access("/bin/"+script, unix.X_OK) == nil:
			p.scripts = append(p.scripts, "/bin/"+script)
		case !strings.Contains(script, "/"):
			p.scripts = append(p.scripts, "/usr/bin/"+script)
		}
	}
}

// chain is the remedy for a post-login service without nftwl.
func chain() remedy {
	if exists(install.DropIn) {
		return remedy{"have nftwl run it: 'nftwl setup dovecot' prints the services that run both, and which line elsewhere overrides them",
			"nftwl setup dovecot"}
	}
	return remedy{"have nftwl run it, as the same user: the drop-in that setup writes does both", "nftwl setup dovecot --write && doveadm reload"}
}

// What a service does that is broken.
const denied, untrusted = "every login is denied", "logins go on, and no client is trusted"

// checkLogin has the service trust a client, or says why it would not.
func (d *Doctor) checkLogin(p *postLogin) {
	const check = "dovecot.login"
	since := time.Now()
	untried := d.untried(p)
	var trusted []string
	var err error
	if untried == "" {
		trusted, err = d.tryLogins(p)
	}
	gone := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED)
	switch {
	case untried != "":
	case gone && !d.running:
		untried = "Dovecot is not running"
	case err == nil && trusted == nil:
		untried = "nftwl ignores the addresses that could be tried, 192.0.2.0/24 and 2001:db8::/32, trusts them already, or has no set for them"
	case err == nil:
		d.ok(check, "a login by %s was tried: it trusts %s; that was removed again", p.Name, strings.Join(trusted, " and "))
		return
	case gone:
		d.fail(check, remedy{"have Dovecot read its configuration, which has that service", "doveadm reload"}, "the running Dovecot has no %s: %v", p.Name, err)
		return
	}
	text, effect, fix := d.broken(p)
	switch {
	case untried != "" && text == "":
		d.skip(check, "no login by %s was tried: %s", p.Name, untried)
		return
	case untried != "":
		text += ": " + effect
	case text != "":
		text = fmt.Sprintf("a login by %s was tried: %v: %s", p.Name, err, text)
	default:
		why := logged(d.dovecot, strings.TrimPrefix(p.Name, "service "), since)
		text = fmt.Sprintf("a login by %s was tried: %v%s", p.Name, err, why)
		fix = d.unseen(p, why)
	}
	if !d.told[fix] { // one cause is one finding, whatever services it breaks
		d.told[fix] = true
		d.fail(check, fix, "%s", text)
	}
}

// untried tells why no login by a service can be tried; "" if one can.
func (d *Doctor) untried(p *postLogin) string {
	switch {
	case d.conn == nil:
		return "nftables cannot be read"
	case !d.valid:
		return "the configuration of nftwl is not valid"
	case p.config() != d.configPath():
		return "it has another configuration"
	case len(p.scripts) > 0 || len(p.login.Command) > 0:
		return "it would run " + strings.Join(slices.Concat(p.login.Before, p.login.Command), " ")
	}
	return ""
}

// broken says what keeps a service from trusting anyone, as far as can be read;
// text is empty if nothing does.
func (d *Doctor) broken(p *postLogin) (text, effect string, fix remedy) {
	for _, path := range append([]string{p.nftwl}, p.scripts...) {
		info, err := os.Stat(path)
		switch {
		case err != nil && path == p.nftwl:
			return err.Error(), denied, remedy{"install nftwl there", "install -m 755 " + quote(d.Executable) + " " + quote(path)}
		case err != nil:
			return err.Error(), denied, reload("put it there, or take it out of executable = %s in %s", p.Values["executable"], p.Name)
		case !info.Mode().IsRegular() || unix.Access(path, unix.X_OK) != nil:
			return path + " cannot be executed", denied, remedy{"make it executable", "chmod 755 " + quote(path)}
		}
	}
	// The remedy names all that a service lacks, so that it need not be changed twice.
	var lacks []string
	lack := func(setting, what, does string) {
		lacks = append(lacks, setting)
		if text == "" {
			text, effect = p.Name+" "+what, does
		}
	}
	if written, limit, err := d.dovecot.VszLimit(p.Settings); err != nil || limit != 0 && !enough(limit) {
		lack("vsz_limit = 1G", "has vsz_limit = "+written+", and nftwl needs 1G", denied)
	}
	_, err := unix.Getxattr(p.nftwl, "security.capability", nil)
	switch capable := err == nil; {
	case capable || p.root():
	case p.login.MailUser:
		lack("executable = script-login without -d", "runs as the mail user, who may not write to nftables", untrusted)
	default:
		lack("user = root", "runs as "+p.user+", who may not write to nftables", untrusted)
	}
	switch {
	case text == "" && d.units["dovecot.service"].withholds():
		return "Dovecot's unit withholds CAP_NET_ADMIN or AF_NETLINK", untrusted, allow
	case text == "":
		return "", "", remedy{}
	}
	if most, _ := d.mostProcesses(p); d.dovecot.ProcessLimit(p.Settings) < most {
		lacks = append(lacks, fmt.Sprintf("process_limit = %d", most))
	}
	return text, effect, reload("in %s, set %s", p.Name, strings.Join(lacks, ", "))
}

// enough tells whether nftwl runs within a limit on its address space: Go's
// runtime reserves some 700 MB, and with 1110 to 1200 MB it tries for more.
func enough(limit uint64) bool {
	return limit >= 1<<30 && (limit < 1110<<20 || limit > 1200<<20)
}

// unseen is the remedy for what only a login shows, by what Dovecot has logged of it.
func (d *Doctor) unseen(p *postLogin, why string) remedy {
	// What nftwl lacks, though the doctor has it. Without the capability, a file that
	// has it cannot be executed; without AF_NETLINK, there seems to be no nf_tables.
	withheld := slices.ContainsFunc([]string{"CAP_NET_ADMIN", "nf_tables", "Operation not permitted"},
		func(words string) bool { return strings.Contains(why, words) })
	switch {
	case d.stale:
		return reload("its configuration has changed")
	case !withheld:
		return remedy{"see what Dovecot says", "doveadm log errors"}
	case !p.root():
		return reload("in %s, set user = root", p.Name)
	case d.units == nil:
		return remedy{words: "let Dovecot's container have CAP_NET_ADMIN, and netlink sockets"}
	}
	return allow
}

// allow is the remedy for what Dovecot's unit withholds. Two lines for each are right
// for any unit: see contrib/systemd/dovecot.service.d.
var allow = remedy{"let Dovecot's unit have CAP_NET_ADMIN and AF_NETLINK, which it withholds",
	"mkdir -p /etc/systemd/system/dovecot.service.d && printf '%s\\n' '[Service]' 'CapabilityBoundingSet=~CAP_NET_ADMIN' 'CapabilityBoundingSet=CAP_NET_ADMIN'" +
		" 'RestrictAddressFamilies=~AF_NETLINK' 'RestrictAddressFamilies=AF_NETLINK' >>/etc/systemd/system/dovecot.service.d/nftwl.conf" +
		" && systemctl daemon-reload && systemctl restart dovecot"}

// withholds tells whether a unit, as systemctl shows it, lacks what nftwl needs.
func (u unit) withholds() bool {
	capabilities := u["CapabilityBoundingSet"]
	families, denied := strings.CutPrefix(u["RestrictAddressFamilies"], "~")
	return capabilities != "" && !slices.Contains(strings.Fields(capabilities), "cap_net_admin") ||
		families != "" && slices.Contains(strings.Fields(families), "AF_NETLINK") == denied
}

// checkSafe checks that Dovecot runs as root only what is root's, and this very
// nftwl.
func (d *Doctor) checkSafe(p *postLogin) {
	check := "dovecot.executable"
	for _, path := range append([]string{p.nftwl}, p.scripts...) {
		if err := install.OnlyRoots(path); err != nil && p.root() && exists(path) {
			d.fail(check, remedy{words: "let root alone write it and each directory above it, or move it to where that is so, such as /usr/bin"},
				"Dovecot runs %s as root, and others than root can change it: %v", path, err)
			return
		}
		check = "dovecot.script"
	}
	info, err := os.Stat(p.nftwl)
	own, e := os.Stat(d.Executable)
	if err == nil && e == nil && !os.SameFile(info, own) {
		d.warn("dovecot.executable", remedy{"ask that one's doctor, or remove one of the two", quote(p.nftwl) + " doctor"},
			"Dovecot runs %s, which is not the %s that looks", p.nftwl, d.Executable)
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
				"the processes of %s ask as the mail user (%s = %s, drop_priv_before_exec = %s), and may not: those logins are denied",
				asker.Name, count, asker.Values[count], asker.Values["drop_priv_before_exec"])
			return
		}
	}
}

// checkProcessLimit compares with the mail services, each login by which is a
// process of both.
func (d *Doctor) checkProcessLimit(p *postLogin) {
	own := d.dovecot.ProcessLimit(p.Settings)
	if most, asker := d.mostProcesses(p); own < most {
		d.warn("dovecot.process_limit", reload("process_limit = %d in %s", most, p.Name),
			"%s may have %d processes, and %s %d: when many log in at once, logins wait, and are denied after ten seconds", p.Name, own, asker, most)
	}
}

// mostProcesses is how many the mail services that ask may have.
func (d *Doctor) mostProcesses(p *postLogin) (most uint64, name string) {
	for _, asker := range p.askers {
		if n := d.dovecot.ProcessLimit(asker); n > most {
			most, name = n, asker.Name
		}
	}
	return most, name
}
