package doctor

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
)

// postLogin is a post-login service, and those who ask it.
type postLogin struct {
	*settings
	listener *settings
	askers   []*settings // services
}

// checkPostLogin checks a service that runs nftwl login.
func (d *Doctor) checkPostLogin(ctx context.Context, dovecot *settings, p *postLogin) {
	words := strings.Split(p.values["executable"], " ")
	if filepath.Base(words[0]) != "script-login" {
		d.fail("dovecot.service", reload("executable = script-login %s login in %s", d.Executable, p.name),
			"%s is not run by script-login, which denies every login: executable = %s", p.name, p.values["executable"])
		return
	}
	words = words[1:]
	drops := false // privileges, for those of the mail user
	for len(words) > 0 && strings.HasPrefix(words[0], "-") {
		drops = drops || words[0] == "-d"
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
	path, configPath, ok := parseLogin(words[i:])
	if !filepath.IsAbs(path) {
		path = filepath.Join(dovecot.values["libexec_dir"], path) // as script-login does
	}
	if !ok {
		d.fail("dovecot.service", reload("executable = script-login %s login in %s", path, p.name),
			"the executable of %s has no word login after nftwl, which denies every login: %s", p.name, p.values["executable"])
		return
	}
	d.ok("dovecot.service", "%s runs nftwl login", p.name)
	if doctors := cmp.Or(d.ConfigPath, config.Path); cmp.Or(configPath, config.Path) != doctors {
		d.warn("dovecot.config", remedy{"have the doctor look at that one", "nftwl --config " + quote(cmp.Or(configPath, config.Path)) + " doctor"},
			"logins are trusted by %s, and the doctor looks at %s", cmp.Or(configPath, config.Path), doctors)
	}

	d.checkExecutable(path)
	d.checkListener(p)
	d.checkVszLimit(ctx, dovecot, p)
	d.checkPrivilege(dovecot, p, path, drops)
	d.checkProcessLimit(dovecot, p)
}

// parseLogin takes the words of nftwl's own apart as nftwl does, which passes
// over empty ones: its path, the configuration and the word login.
func parseLogin(words []string) (path, configPath string, ok bool) {
	path = words[0]
	words = slices.DeleteFunc(slices.Clone(words[1:]), func(word string) bool { return word == "" })
	for len(words) > 0 {
		if file, ok := strings.CutPrefix(words[0], "--config="); ok {
			configPath, words = file, words[1:]
		} else if words[0] == "--config" && len(words) > 1 {
			configPath, words = words[1], words[2:]
		} else {
			break
		}
	}
	return path, configPath, len(words) > 0 && words[0] == "login"
}

func (d *Doctor) checkExecutable(path string) {
	const check = "dovecot.executable"
	info, err := os.Stat(path)
	own, e := os.Stat(d.Executable)
	switch {
	case err != nil:
		d.fail(check, remedy{"install nftwl there", "install -m 755 " + quote(d.Executable) + " " + quote(path)},
			"%v, which denies every login", err)
	case !info.Mode().IsRegular() || unix.Access(path, unix.X_OK) != nil:
		d.fail(check, remedy{"make it executable", "chmod 755 " + quote(path)}, "%s cannot be executed, which denies every login", path)
	case e != nil || !os.SameFile(info, own):
		d.warn(check, remedy{"ask that one's doctor, or remove one of the two", quote(path) + " doctor"},
			"Dovecot runs %s, which is not the %s that looks", path, d.Executable)
	default:
		d.ok(check, "%s is this program", path)
	}
}

// checkListener checks that a mail process may still ask when it no longer is
// root: with drop_priv_before_exec, or from its second login on.
func (d *Doctor) checkListener(p *postLogin) {
	const check = "dovecot.listener"
	mode, _ := strconv.ParseUint(p.listener.values["mode"], 8, 32) // 2.4 leaves the default out
	own := cmp.Or(p.listener.values["user"], "root") != "root" || p.listener.values["group"] != ""
	for _, asker := range p.askers {
		count := "service_count"
		if _, ok := asker.values[count]; !ok {
			count = "restart_request_count" // 2.4
		}
		if asker.values["drop_priv_before_exec"] != "yes" && cmp.Or(asker.values[count], "1") == "1" {
			continue
		}
		if !own && mode&0o002 == 0 {
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
func (d *Doctor) checkPrivilege(dovecot *settings, p *postLogin, path string, drops bool) {
	user := cmp.Or(p.values["user"], "root")
	if drops {
		user = "the mail user (script-login -d)"
	}
	root := user == "root" || user == "0"
	capable := hasFileCapability(path)
	switch {
	case root:
		d.ok("dovecot.user", "%s runs as root", p.name)
	case capable:
		d.ok("dovecot.user", "%s runs as %s, and %s has the capability CAP_NET_ADMIN", p.name, user, path)
	default:
		d.fail("dovecot.user", reload("user = root in %s", p.name),
			"%s runs as %s, and only root, or a file with the capability CAP_NET_ADMIN, may write to nftables: no login is trusted", p.name, user)
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
	case status["NoNewPrivs"] == "1" && !root:
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
		b, err = os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	}
	if err != nil {
		return nil, pid, err
	}
	status = map[string]string{}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), ":")
		status[key] = strings.TrimSpace(value)
	}
	if status["Name"] != "dovecot" { // the file is an old one
		return nil, pid, fs.ErrNotExist
	}
	return status, pid, nil
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
