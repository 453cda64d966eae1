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
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
	"nftwl/pkg/setup"
)

// postLogin is a post-login service, and those who ask it.
type postLogin struct {
	*settings
	listener *settings
	askers   []*settings // services
	user     string      // whom it starts programs as
}

func (p *postLogin) root() bool { return p.user == "root" || p.user == "0" }

// checkPostLogin checks a service that runs nftwl login.
func (d *Doctor) checkPostLogin(ctx context.Context, dovecot *settings, p *postLogin) {
	words := strings.Split(p.values["executable"], " ")
	if filepath.Base(words[0]) != "script-login" {
		d.fail("dovecot.service", reload("executable = script-login %s login in %s", d.Executable, p.name),
			"%s is not run by script-login, which denies every login: executable = %s", p.name, p.values["executable"])
		return
	}
	if chroot := p.values["chroot"]; chroot != "" {
		d.fail("dovecot.service", reload("take chroot = %s out of %s", chroot, p.name),
			"%s has chroot = %s, where it does not find what it is to execute, which denies every login", p.name, chroot)
		return
	}
	words = words[1:]
	p.user = cmp.Or(p.values["user"], "root")
	for len(words) > 0 && strings.HasPrefix(words[0], "-") {
		if words[0] == "-d" {
			p.user = "the mail user (script-login -d)"
		}
		words = words[1:]
	}
	// Another program can come first, and then executes nftwl.
	i := slices.IndexFunc(words, func(word string) bool { return filepath.Base(word) == "nftwl" })
	if i < 0 {
		i = slices.Index(words, "login") - 1
	}
	if i < 0 {
		d.warn("dovecot.service", reload("put nftwl before it: executable = script-login %s login %s in %s", d.Executable, strings.Join(words, " "), p.name),
			"%s runs %s, and whether that runs nftwl cannot be seen", p.name, strings.Join(words, " "))
		return
	}
	if slices.Contains(words[:i], "") {
		d.fail("dovecot.service", reload("take one of the two spaces in a row out of executable = %s in %s", p.values["executable"], p.name),
			"an empty word before nftwl in the executable of %s denies every login", p.name)
		return
	}
	absolute := func(path string) string {
		if !filepath.IsAbs(path) {
			path = filepath.Join(dovecot.values["libexec_dir"], path) // as script-login does
		}
		return path
	}
	configPath, rest := parseLogin(words[i+1:])
	path := absolute(words[i])
	if len(rest) == 0 || rest[0] != "login" {
		d.fail("dovecot.service", reload("executable = script-login %s login in %s", path, p.name),
			"the executable of %s has no word login after nftwl, which denies every login: %s", p.name, p.values["executable"])
		return
	}
	d.ok("dovecot.service", "%s runs nftwl login", p.name)
	if doctors := cmp.Or(d.ConfigPath, config.Path); cmp.Or(configPath, config.Path) != doctors {
		d.warn("dovecot.config", remedy{"have the doctor look at that one", "nftwl --config " + quote(cmp.Or(configPath, config.Path)) + " doctor"},
			"logins are trusted by %s, and the doctor looks at %s", cmp.Or(configPath, config.Path), doctors)
	}

	d.checkExecutable(p, path)
	var scripts []string
	if i > 0 {
		scripts = append(scripts, absolute(words[0]))
	}
	if len(rest) > 1 {
		// As nftwl finds it, to which Dovecot gives no PATH. From where a path
		// with a slash begins cannot be seen.
		switch script := rest[1]; {
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

// parseLogin takes nftwl's arguments apart as nftwl does, which passes over
// empty ones: the configuration, and from the word login on the rest.
func parseLogin(words []string) (configPath string, rest []string) {
	words = slices.DeleteFunc(slices.Clone(words), func(word string) bool { return word == "" })
	for len(words) > 0 {
		if file, ok := strings.CutPrefix(words[0], "--config="); ok {
			configPath, words = file, words[1:]
		} else if words[0] == "--config" && len(words) > 1 {
			configPath, words = words[1], words[2:]
		} else {
			break
		}
	}
	return configPath, words
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
		if !d.checkProgram(check, p, path, reload("put it there, or take it out of executable = %s in %s", p.values["executable"], p.name)) {
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
	mode, _ := strconv.ParseUint(cmp.Or(p.listener.values["mode"], "0600"), 8, 32) // 2.4 leaves the default out
	// It takes the right to write to connect, see unix(7).
	may := mode&0o002 != 0 ||
		mode&0o020 != 0 && p.listener.values["group"] != "" ||
		mode&0o200 != 0 && cmp.Or(p.listener.values["user"], "root") != "root"
	for _, asker := range p.askers {
		count := "service_count"
		if _, ok := asker.values[count]; !ok {
			count = "restart_request_count" // 2.4
		}
		if asker.values["drop_priv_before_exec"] != "yes" && cmp.Or(asker.values[count], "1") == "1" {
			continue
		}
		if !may {
			d.fail(check, reload("in %s of %s, user = the mail user; or in %s, %s = 1", p.listener.name, p.name, asker.name, count),
				"the processes of %s ask as the mail user (%s = %s, drop_priv_before_exec = %s), and may not: those logins are denied",
				asker.name, count, asker.values[count], asker.values["drop_priv_before_exec"])
			return
		}
	}
	d.ok(check, "the mail services may ask %s", p.name)
}

func (d *Doctor) checkVszLimit(ctx context.Context, dovecot *settings, p *postLogin) {
	const check = "dovecot.vsz_limit"
	written, limit, err := dovecot.vszLimit(p.settings)
	if err == nil && limit != 0 {
		err = d.try(ctx, limit, "")
	}
	switch {
	case errors.Is(err, errUntried):
		d.skip(check, "%v", err)
	case err != nil:
		d.fail(check, reload("vsz_limit = 1G in %s", p.name),
			"nftwl does not run within the vsz_limit of %s, %s, which denies every login: %v", p.name, written, err)
	case limit == 0:
		d.ok(check, "%s has no vsz_limit", p.name)
	default:
		d.ok(check, "nftwl runs within the vsz_limit of %s, %s", p.name, written)
	}
}

// checkPrivilege checks that what the service starts may write to nftables.
func (d *Doctor) checkPrivilege(dovecot *settings, p *postLogin, path string) {
	capable := hasFileCapability(path)
	switch {
	case p.root():
		d.ok("dovecot.user", "%s runs as root", p.name)
	case capable:
		d.ok("dovecot.user", "%s runs as %s, and %s has the capability CAP_NET_ADMIN", p.name, p.user, path)
	default:
		d.fail("dovecot.user", reload("user = root in %s", p.name),
			"%s runs as %s, and only root, or a file with the capability CAP_NET_ADMIN, may write to nftables: no login is trusted", p.name, p.user)
		return
	}

	const check = "dovecot.privilege"
	status, pid, err := masterStatus(dovecot.path("master.pid"))
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
		d.fail(check, remedy{words: "NoNewPrivileges=no in Dovecot's unit, or user = root in " + p.name},
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
func (d *Doctor) checkProcessLimit(dovecot *settings, p *postLogin) {
	const check = "dovecot.process_limit"
	own := dovecot.processLimit(p.settings)
	for _, asker := range p.askers {
		if most := dovecot.processLimit(asker); own < most {
			d.warn(check, reload("process_limit = %d in %s", most, p.name),
				"%s may have %d processes, and %s %d: when many log in at once, logins wait, and are denied after ten seconds", p.name, own, asker.name, most)
			return
		}
	}
	d.ok(check, "%s may have as many processes as the mail services", p.name)
}
