package doctor

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
	"nftwl/pkg/doveconf"
	"nftwl/pkg/install"
	"nftwl/pkg/setup"
)

// postLogin is a post-login service, and those who ask it.
type postLogin struct {
	*doveconf.Settings
	listener *doveconf.Settings
	askers   []*doveconf.Settings // services
	user     string               // whom it starts programs as
}

func (p *postLogin) root() bool { return p.user == "root" || p.user == "0" }

// checkPostLogin checks a service that runs nftwl login.
func (d *Doctor) checkPostLogin(ctx context.Context, dovecot *doveconf.Settings, p *postLogin) {
	executable := p.Values["executable"]
	login, err := install.ParsePostLogin(executable)
	if err != nil {
		remedy := reload("executable = script-login %s login in %s", d.Executable, p.Name)
		if errors.Is(err, install.ErrEmptyWord) {
			remedy = reload("remove one of the two spaces in a row from executable = %s in %s", executable, p.Name)
		}
		d.fail("dovecot.service", remedy, "the executable of %s denies every login: %v: %s", p.Name, err, executable)
		return
	}
	if chroot := p.Values["chroot"]; chroot != "" {
		d.fail("dovecot.service", reload("take chroot = %s out of %s", chroot, p.Name),
			"%s has chroot = %s, where it does not find what it is to execute, which denies every login", p.Name, chroot)
		return
	}
	if login.Nftwl == "" {
		d.warn("dovecot.service", chain(), "%s runs %s, and whether that runs nftwl cannot be seen", p.Name, strings.Join(login.Command, " "))
		return
	}
	p.user = cmp.Or(p.Values["user"], "root")
	if login.MailUser {
		p.user = "the mail user (script-login -d)"
	}
	absolute := func(path string) string {
		if !filepath.IsAbs(path) {
			path = filepath.Join(dovecot.Values["libexec_dir"], path) // as script-login does
		}
		return path
	}
	path := absolute(login.Nftwl)
	d.ok("dovecot.service", "%s runs nftwl login", p.Name)
	if doctors := cmp.Or(d.ConfigPath, config.Path); cmp.Or(login.Config, config.Path) != doctors {
		d.warn("dovecot.config", remedy{"have the doctor look at that one", "nftwl --config " + quote(cmp.Or(login.Config, config.Path)) + " doctor"},
			"logins are trusted by %s, and the doctor looks at %s", cmp.Or(login.Config, config.Path), doctors)
	}

	d.checkExecutable(p, path)
	var scripts []string
	if len(login.Before) > 0 {
		scripts = append(scripts, absolute(login.Before[0]))
	}
	if len(login.Command) > 0 {
		// As nftwl finds it, to which Dovecot gives no PATH. From where a path
		// with a slash begins cannot be seen.
		switch script := login.Command[0]; {
		case filepath.IsAbs(script):
			scripts = append(scripts, script)
		case !strings.Contains(script, "/") && unix.Access("/bin/"+script, unix.X_OK) == nil:
			scripts = append(scripts, "/bin/"+script)
		case !strings.Contains(script, "/"):
			scripts = append(scripts, "/usr/bin/"+script)
		}
	}
	d.checkScripts(p, scripts)
	d.checkListener(p)
	d.checkVszLimit(ctx, dovecot, p)
	d.checkPrivilege(dovecot, p, path)
	d.checkProcessLimit(dovecot, p)
}

// chain is the remedy for a post-login service without nftwl.
func chain() remedy {
	if _, err := os.Lstat(setup.DropIn); err == nil {
		return remedy{"have nftwl run it: 'nftwl setup dovecot' prints the services that run both, and which line elsewhere overrides them",
			"nftwl setup dovecot"}
	}
	return remedy{"have nftwl run it, as the same user: the drop-in that setup writes does both", "nftwl setup dovecot --write && doveadm reload"}
}

func (d *Doctor) checkExecutable(p *postLogin, path string) {
	const check = "dovecot.executable"
	if !d.checkProgram(check, p, path, remedy{"install nftwl there", "install -m 755 " + quote(d.Executable) + " " + quote(path)}) {
		return
	}
	info, err := os.Stat(path)
	own, e := os.Stat(d.Executable)
	if err != nil || e != nil || !os.SameFile(info, own) {
		d.warn(check, remedy{"ask that one's doctor, or remove one of the two", quote(path) + " doctor"},
			"Dovecot runs %s, which is not the %s that looks", path, d.Executable)
		return
	}
	d.ok(check, "%s is this program", path)
}

// checkScripts checks the other programs that a login goes through.
func (d *Doctor) checkScripts(p *postLogin, paths []string) {
	const check = "dovecot.script"
	for _, path := range paths {
		if !d.checkProgram(check, p, path, reload("put it there, or take it out of executable = %s in %s", p.Values["executable"], p.Name)) {
			return
		}
	}
	if paths != nil {
		d.ok(check, "%s can be executed", strings.Join(paths, " and "))
	}
}

// checkProgram reports a program that cannot be executed, or should not be.
func (d *Doctor) checkProgram(check string, p *postLogin, path string, missing remedy) bool {
	info, err := os.Stat(path)
	if err != nil {
		d.fail(check, missing, "%v, which denies every login", err)
		return false
	}
	if !info.Mode().IsRegular() || unix.Access(path, unix.X_OK) != nil {
		d.fail(check, remedy{"make it executable", "chmod 755 " + quote(path)}, "%s cannot be executed, which denies every login", path)
		return false
	}
	if err := setup.OnlyRoots(path); err != nil && p.root() {
		d.fail(check, remedy{words: "let root alone write it and each folder above it, or move it to where that is so, such as /usr/bin"},
			"Dovecot runs %s as root, and others than root can change it: %v", path, err)
		return false
	}
	return true
}

// checkListener checks that a mail process may still ask when it no longer is
// root: with drop_priv_before_exec, or from its second login on.
func (d *Doctor) checkListener(p *postLogin) {
	const check = "dovecot.listener"
	mode, _ := strconv.ParseUint(cmp.Or(p.listener.Values["mode"], "0600"), 8, 32) // 2.4 leaves the default out
	// It takes the right to write to connect, see unix(7).
	may := mode&0o002 != 0 ||
		mode&0o020 != 0 && p.listener.Values["group"] != "" ||
		mode&0o200 != 0 && cmp.Or(p.listener.Values["user"], "root") != "root"
	for _, asker := range p.askers {
		count := "service_count"
		if _, ok := asker.Values[count]; !ok {
			count = "restart_request_count" // 2.4
		}
		if asker.Values["drop_priv_before_exec"] != "yes" && cmp.Or(asker.Values[count], "1") == "1" {
			continue
		}
		if !may {
			d.fail(check, reload("in %s of %s, user = the mail user; or in %s, %s = 1", p.listener.Name, p.Name, asker.Name, count),
				"the processes of %s ask as the mail user (%s = %s, drop_priv_before_exec = %s), and may not: those logins are denied",
				asker.Name, count, asker.Values[count], asker.Values["drop_priv_before_exec"])
			return
		}
	}
	d.ok(check, "the mail services may ask %s", p.Name)
}

func (d *Doctor) checkVszLimit(ctx context.Context, dovecot *doveconf.Settings, p *postLogin) {
	const check = "dovecot.vsz_limit"
	written, limit, err := dovecot.VszLimit(p.Settings)
	if err == nil && limit != 0 {
		err = d.try(ctx, limit, "")
	}
	switch {
	case errors.Is(err, errUntried):
		d.skip(check, "%v", err)
	case err != nil:
		d.fail(check, reload("vsz_limit = 1G in %s", p.Name),
			"nftwl does not run within the vsz_limit of %s, %s, which denies every login: %v", p.Name, written, err)
	case limit == 0:
		d.ok(check, "%s has no vsz_limit", p.Name)
	default:
		d.ok(check, "nftwl runs within the vsz_limit of %s, %s", p.Name, written)
	}
}

// checkPrivilege checks that what the service starts may write to nftables.
func (d *Doctor) checkPrivilege(dovecot *doveconf.Settings, p *postLogin, path string) {
	capable := hasFileCapability(path)
	switch {
	case p.root():
		d.ok("dovecot.user", "%s runs as root", p.Name)
	case capable:
		d.ok("dovecot.user", "%s runs as %s, and %s has the capability CAP_NET_ADMIN", p.Name, p.user, path)
	default:
		d.fail("dovecot.user", reload("user = root in %s", p.Name),
			"%s runs as %s, and only root, or a file with the capability CAP_NET_ADMIN, may write to nftables: no login is trusted", p.Name, p.user)
		return
	}

	const check = "dovecot.privilege"
	status, pid, err := masterStatus(dovecot.Path("master.pid"))
	if errors.Is(err, fs.ErrNotExist) {
		d.skip(check, "Dovecot is not running")
		return
	}
	bounding, e := strconv.ParseUint(status["CapBnd"], 16, 64)
	if err = cmp.Or(err, e); err != nil {
		d.skip(check, "the running Dovecot: %v", err)
		return
	}
	allow := remedy{
		"let its unit have the capability (contrib/systemd/dovecot.service.d/nftwl.conf, into /etc/systemd/system/dovecot.service.d), or its container",
		"systemctl daemon-reload && systemctl restart dovecot",
	}
	switch {
	case bounding&(1<<unix.CAP_NET_ADMIN) == 0 && capable:
		// The kernel executes no file that would get less than it asks for.
		d.fail(check, allow, "the running Dovecot (%d) must not have CAP_NET_ADMIN, which %s asks for: every login is denied", pid, path)
	case bounding&(1<<unix.CAP_NET_ADMIN) == 0:
		d.fail(check, allow, "the running Dovecot (%d) must not have CAP_NET_ADMIN: logins go on, and none is trusted", pid)
	case status["NoNewPrivs"] == "1" && !p.root():
		d.fail(check, remedy{words: "NoNewPrivileges=no in Dovecot's unit, or user = root in " + p.Name},
			"the running Dovecot (%d) gains no privileges from files (NoNewPrivileges): logins go on, and none is trusted", pid)
	default:
		d.ok(check, "the running Dovecot (%d) may have CAP_NET_ADMIN", pid)
	}
}

// hasFileCapability tells whether a file, when it is executed, has CAP_NET_ADMIN
// in effect: struct vfs_cap_data of include/uapi/linux/capability.h.
func hasFileCapability(path string) bool {
	var b [24]byte
	n, err := unix.Getxattr(path, "security.capability", b[:])
	if err != nil || n < 8 {
		return false
	}
	const effective = 1 // VFS_CAP_FLAGS_EFFECTIVE
	permitted := binary.LittleEndian.Uint32(b[4:])
	return binary.LittleEndian.Uint32(b[:])&effective != 0 && permitted&(1<<unix.CAP_NET_ADMIN) != 0
}

// masterStatus returns what the kernel says of Dovecot's first process. The
// error is fs.ErrNotExist where there is none.
func masterStatus(pidFile string) (status map[string]string, pid int, err error) {
	b, err := os.ReadFile(pidFile)
	if err == nil {
		pid, err = strconv.Atoi(string(bytes.TrimSpace(b)))
	}
	if err == nil {
		status, err = procStatus(strconv.Itoa(pid))
	}
	if err == nil && status["Name"] != "dovecot" { // the file is an old one
		err = fs.ErrNotExist
	}
	return status, pid, err
}

// checkProcessLimit compares with the mail services, each login by which is a
// process of both.
func (d *Doctor) checkProcessLimit(dovecot *doveconf.Settings, p *postLogin) {
	const check = "dovecot.process_limit"
	own := dovecot.ProcessLimit(p.Settings)
	for _, asker := range p.askers {
		if most := dovecot.ProcessLimit(asker); own < most {
			d.warn(check, reload("process_limit = %d in %s", most, p.Name),
				"%s may have %d processes, and %s %d: when many log in at once, logins wait, and are denied after ten seconds", p.Name, own, asker.Name, most)
			return
		}
	}
	d.ok(check, "%s may have as many processes as the mail services", p.Name)
}
