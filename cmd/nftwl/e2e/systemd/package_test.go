package systemd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"nftwl/pkg/nstest"
)

// A manager installs packages.
type manager struct {
	suffix  string
	install []string // the package's file follows
	upgrade []string
	remove  []string
	// If the administrator has changed a package's configuration file, aside is where an
	// upgrade puts the new one, and saved where a removal leaves the changed one.
	aside, saved string
}

var (
	dpkg = manager{
		suffix:  ".deb",
		install: []string{"dpkg", "--install"},
		// As unattended upgrades do.
		upgrade: []string{"dpkg", "--force-confdef", "--force-confold", "--install"},
		remove:  []string{"dpkg", "--remove", "nftwl"},
		aside:   "etc/nftwl.yaml.dpkg-dist",
		saved:   "etc/nftwl.yaml",
	}
	rpm = manager{
		suffix: ".rpm",
		// On Debian, rpm's database has no shell.
		install: []string{"rpm", "--install", "--nodeps"},
		upgrade: []string{"rpm", "--upgrade", "--nodeps"},
		remove:  []string{"rpm", "--erase", "nftwl"},
		aside:   "etc/nftwl.yaml.rpmnew",
		saved:   "etc/nftwl.yaml.rpmsave",
	}
)

func TestPackageDeb(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newUninstalled(t, b)
		m.livesThrough(dpkg)

		m.run("dpkg", "--purge", "nftwl")
		m.left("etc/nftwl", "etc/nftwl-defaults.yaml")
		// /etc/nftables.conf still loads, because /etc/nftwl stays.
		m.run("nft", "--check", "--file", "/etc/nftables.conf")
		m.logsIn(400)
	})
}

// Only this machine has rpm, not the Debian 13 tree.
func TestPackageRPM(t *testing.T) {
	t.Parallel()
	nstest.Need(t, "rpm", "rpm")
	m := newUninstalled(t, nstest.Host)
	m.livesThrough(rpm)
}

// A removal fails, in whichever way Dovecot's configuration names the program.
func TestPackageNamed(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newUninstalled(t, b)
		m.run("dpkg", "--install", "/root/new.deb")
		names := func(program string) {
			m.Helper()
			m.run("sh", "-euc", `rm -f /etc/dovecot/conf.d/90-nftwl*
				sed "s,/usr/bin/nftwl login,$1," /usr/share/nftwl/dovecot/90-nftwl.conf >/etc/dovecot/conf.d/90-nftwl.conf
				doveadm reload`, "sh", program)
		}
		names("/bin/nftwl login")
		if out := m.fails("dpkg", "--remove", "nftwl"); !strings.Contains(out, "names /bin/nftwl: without it") {
			t.Errorf("it does not say why: %s", out)
		} else {
			m.hint(out)
		}
		m.logsIn(1)
		// A script that Dovecot runs names the program, in one way or another.
		const wrap = "/usr/local/bin/wrap.sh"
		for _, c := range []struct{ program, text string }{
			{wrap, "#!/bin/sh\nexec /usr/bin/nftwl login \"$@\"\n"},
			{"-d " + wrap, "#!/bin/sh\nNFTWL=/bin/nftwl; exec $NFTWL login \"$@\"\n"},
			{"/bin/sh " + wrap, "[ $IP = :: ]||nftwl add $IP>&2;exec \"$@\"\n"},
		} {
			m.write(wrap[1:], c.text)
			m.run("chmod", "755", wrap)
			names(c.program)
			if out := m.fails("dpkg", "--remove", "nftwl"); !strings.Contains(out, "names "+wrap+", which executes ") {
				t.Errorf("%s: it does not say why: %s", c.text, out)
			}
		}
		// Scripts that do not name it, and files that are no scripts.
		m.write(wrap[1:], "#!/bin/sh\n# not /usr/bin/nftwl\nexec \"$@\" # nftwl-like\n")
		m.write("usr/local/bin/wrap.bin", "\x00 /usr/bin/nftwl \n")
		names(wrap + " /usr/local/bin/wrap.bin /dev/zero /usr/local/bin/missing")
		m.run("dpkg", "--remove", "nftwl")
		m.run("dpkg", "--install", "/root/new.deb")
		// A program that does not belong to the package.
		m.run("sh", "-euc", `cp /bin/true /usr/local/bin/nftwl
			sed -i -e "s,/usr/bin/nftwl,/usr/local/bin/nftwl," /usr/share/nftwl/dovecot/90-nftwl.conf
			mv /usr/share/nftwl/dovecot/90-nftwl.conf /etc/dovecot/conf.d/`)
		m.run("dpkg", "--remove", "nftwl")
	})
}

// An upgrade restarts nftwld, and a removal ends it. Without nftwld Dovecot lets everybody
// in, unless its settings say otherwise.
func TestPackageNftwld(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newUninstalled(t, b)
		m.run("dpkg", "--install", "/root/old.deb")
		m.run("nft", "--file", "/usr/share/nftwl/nftables/sets.nft")
		m.write("etc/nftwl.yaml", "policy: {}\n")
		if out := m.run("nftwl", "setup", "policy", "--write"); !strings.Contains(out, "Installed already") {
			t.Errorf("it writes the units: %s", out)
		}
		m.run("sh", "-euc", "systemctl enable --now nftwld.socket nftwld; doveadm reload")
		trusts := func(i int) {
			m.Helper()
			nstest.Until(m, "a login is trusted", func() error {
				m.logsIn(i)
				if _, ok := m.elements()[element{"trusted", client(i), 993}]; !ok {
					return errors.New("not yet")
				}
				return nil
			})
		}
		trusts(1)

		pid := m.property("nftwld.service", "MainPID")
		m.run("dpkg", "--force-confdef", "--force-confold", "--install", "/root/new.deb")
		m.state("nftwld.service", "active")
		if now := m.property("nftwld.service", "MainPID"); now == pid {
			t.Error("the upgrade leaves the old nftwld running")
		}
		trusts(2)

		const more = "etc/dovecot/conf.d/92-more.conf"
		m.write(more, "auth_policy_reject_on_fail = yes\nauth_policy_check_after_auth = yes\n")
		if out := m.fails("dpkg", "--remove", "nftwl"); !strings.Contains(out, "EVERY LOGIN") || !strings.Contains(out, "auth_policy_reject_on_fail") {
			t.Errorf("it does not say why: %s", out)
		}
		m.state("nftwld.service", "active")
		m.write(more, "auth_policy_reject_on_fail = yes\n")
		m.run("doveadm", "reload")
		if out := m.run("dpkg", "--remove", "nftwl"); !strings.Contains(out, "rm /etc/dovecot/conf.d/91-nftwl-policy.conf*") {
			t.Errorf("it does not say what to remove: %s", out)
		} else {
			m.hint(out)
		}
		m.logsIn(3)
		for _, list := range []string{"list-units --all nftwl*", "list-unit-files nftwl*", "list-units --failed"} {
			// It fails where it finds no file.
			if units, err := m.try("systemctl", append(strings.Fields(list), "--plain", "--no-legend")...); units != "" {
				t.Errorf("%s: %s%v", list, units, err)
			}
		}
		m.run("dpkg", "--purge", "nftwl")
		m.left("etc/nftwl", "etc/nftwl-defaults.yaml")
	})
}

// hint runs the command in the hint of a package's script.
func (m *machine) hint(out string) {
	m.Helper()
	hint := regexp.MustCompile(`(?m)^nftwl: hint: (rm .*)$`).FindStringSubmatch(out)
	if hint == nil {
		m.Fatalf("no hint in %s", out)
	}
	m.shell(hint[1])
}

// Debian has no apk. This test does what apk does, step by step, in its order, and
// whether or not its scripts fail.
func TestPackageAPK(t *testing.T) {
	t.Parallel()
	m := newUninstalled(t, nstest.Host)
	m.run("sh", "-euc", "mkdir /root/apk; cd /root/apk; tar --warning=no-unknown-keyword -xzf ../new.apk; cp -a usr /")
	remove := func() string {
		m.Helper()
		return m.run("sh", "-uc", `
			cd /root/apk
			./.pre-deinstall 1.2.3
			find usr -type f | sed s,^,/, | xargs rm
			find usr -depth -type d | sed s,^,/, | xargs rmdir 2>/dev/null
			./.post-deinstall 1.2.3`)
	}
	m.run("rm", "/usr/bin/systemctl") // Alpine has none
	const conf = "/etc/dovecot/conf.d/90-nftwl.conf"
	m.run("cp", "/usr/share/nftwl/dovecot/90-nftwl.conf", conf)
	m.run("doveadm", "reload")
	if out := remove(); !strings.Contains(out, "EVERY LOGIN") || !strings.Contains(out, "/usr/bin/nftwl stays") || !strings.Contains(out, "/usr/bin/nftwld stays") {
		t.Errorf("it does not say what it does: %s", out)
	}
	m.logsIn(1)
	m.left("etc/nftwl-defaults.yaml", conf[1:], "run/dovecot/nftwl", "usr/bin/nftwl", "usr/bin/nftwld")

	// Files that an earlier, interrupted removal has left.
	m.run("rm", conf)
	m.run("doveadm", "reload")
	m.run("sh", "-euc", "cp -a /root/apk/usr /; cp /usr/bin/nftwl /usr/bin/.nftwl.kept; cp /usr/bin/nftwld /usr/bin/.nftwld.kept")
	if out := remove(); out != "" {
		t.Errorf("it says %s", out)
	}
	m.left("etc/nftwl-defaults.yaml")
	m.logsIn(2)
}

// The administrator's own unit loads the firewall at boot, also after the package is
// removed.
func TestPackageStandalone(t *testing.T) {
	t.Parallel()
	nstest.Need(t, "rpm", "rpm")
	for _, p := range []manager{dpkg, rpm} {
		t.Run(p.install[0], func(t *testing.T) {
			t.Parallel()
			m := newUninstalled(t, nstest.Host)
			m.run(p.install[0], append(slices.Clone(p.install[1:]), "/root/new"+p.suffix)...)
			m.write("etc/nftwl.yaml", "table: inet nftwl\n")
			m.write(defaults, "table: inet nftwl\n")
			m.write("etc/ufw/ufw.conf", "ENABLED=yes\n")
			m.write("etc/theirs.nft", theirs)
			m.write("etc/systemd/system/theirs.service", theirService)
			m.run("rm", "-f", "/etc/nftables.conf")
			for _, b := range nstest.Blocks(t, "docs/firewall.md", "Variants") {
				if b.Language == "sh" {
					m.shell(b.Text)
				}
			}
			// The administrator can change what the unit does when it ends.
			m.run("sed", "-i", "-e", "s,^ExecStop=.*,ExecStop=/usr/sbin/nft delete table inet nftwl,", "/etc/systemd/system/"+persist)
			m.run("systemctl", "daemon-reload")
			m.run("systemctl", "enable", "--now", "theirs", "nftwl-persist")
			m.settle()
			m.fill()
			m.run(p.remove[0], p.remove[1:]...)
			snapshot := m.snapshot()
			if p.suffix == dpkg.suffix {
				m.run("dpkg", "--purge", "nftwl")
			}
			m.same(snapshot, "the removal")
			m.loaded()
			m.reboot()
			m.loaded()
			m.state(persist, "active")
		})
	}
}

// A removal warns about enabled jails, which would then ban nobody.
func TestPackageFail2ban(t *testing.T) {
	t.Parallel()
	nstest.Need(t, "fail2ban-client", "fail2ban")
	m := newUninstalled(t, nstest.Host)
	m.run("dpkg", "--install", "/root/new.deb")
	m.run("cp", "-r", "/usr/share/nftwl/fail2ban", "/etc")
	for _, enabled := range []bool{false, true} {
		m.run("dpkg", "--install", "/root/new.deb")
		m.write("etc/fail2ban/jail.d/mail.local", fmt.Sprintf("[dovecot]\nenabled = %v\nbackend = polling\nlogpath = /dev/null\n", enabled))
		if out := m.run("dpkg", "--remove", "nftwl"); strings.Contains(out, "ban NOBODY") != enabled {
			t.Errorf("a jail is enabled: %v, and it says %s", enabled, out)
		}
	}
}

// builtPackages makes packages for this machine, and packages of an earlier version with
// another configuration. It returns the directories of both.
var builtPackages = sync.OnceValues(func() ([2]string, error) {
	var dirs [2]string
	work, err := os.MkdirTemp("", "nftwl-packages-")
	if err != nil {
		return dirs, err
	}
	// A copy of the source, for the earlier version.
	script := `
		cp -r cmd contrib docs pkg go.mod go.sum LICENSE ./*.md "$1"
		cd "$1"
		VERSION=1.2.3 sh contrib/packaging/build.sh new "$2"
		echo '# of an earlier version' >>contrib/packaging/nftwl.yaml
		VERSION=1.2.3-rc.1 sh contrib/packaging/build.sh old "$2"`
	cmd := exec.Command("sh", "-euc", script, "sh", work, runtime.GOARCH)
	cmd.Dir = "../../../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		return dirs, fmt.Errorf("%w\n%s", err, out)
	}
	return [2]string{filepath.Join(work, "old"), filepath.Join(work, "new")}, nil
})

// newUninstalled returns a machine without nftwl. A Dovecot without nftwl runs on it, and
// the packages are in /root.
func newUninstalled(t *testing.T, b nstest.Debian) *machine {
	t.Helper()
	if cache, err := os.UserCacheDir(); err == nil {
		if found, _ := filepath.Glob(filepath.Join(cache, "nftwl", "nfpm-*", "nfpm")); found == nil {
			nstest.Skip(t, "no nfpm in %s/nftwl: run contrib/packaging/nfpm.sh", cache)
		}
	}
	m := newMachine(t, b)
	units, err := filepath.Glob(m.file("etc/systemd/system/nftwl*"))
	nstest.Must(m, err)
	for _, path := range append(units, m.file("usr/bin/nftwl"), m.file("etc/nftwl"), m.file("etc/nftwl.yaml"),
		m.file("etc/systemd/system/dovecot.service.d"), m.file("etc/systemd/system/standalone"),
		// Trees for containers have these files: one keeps services from starting, the
		// others leave out documents.
		m.file("usr/sbin/policy-rc.d"), m.file("etc/dpkg/dpkg.cfg.d")) {
		nstest.Must(m, os.RemoveAll(path))
	}
	m.run("systemctl", "daemon-reload")

	// The packages that are installed.
	if out, err := exec.Command("cp", "-a", filepath.Join(b.Root, "var/lib/dpkg"), m.file("var/lib")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	nstest.Must(m, os.MkdirAll(m.file("var/log"), 0o755))
	dirs, err := builtPackages()
	nstest.Must(m, err)
	for i, name := range []string{"old", "new"} {
		files, err := filepath.Glob(filepath.Join(dirs[i], "*"))
		nstest.Must(m, err)
		for _, file := range files {
			text, err := os.ReadFile(file)
			nstest.Must(m, err)
			m.write("root/"+name+filepath.Ext(file), string(text))
		}
	}

	m.mail()
	m.run("systemctl", "enable", "--now", "dovecot")
	return m
}

func (m *machine) dropIns() []string {
	m.Helper()
	found, err := filepath.Glob(m.file("etc/dovecot/conf.d/90-nftwl*"))
	nstest.Must(m, err)
	return found
}

// livesThrough installs, uses, upgrades, removes and reinstalls the package.
func (m *machine) livesThrough(p manager) {
	m.Helper()
	pkg := func(command []string, version string) string {
		m.Helper()
		return m.run(command[0], append(slices.Clone(command[1:]), "/root/"+version+p.suffix)...)
	}
	const hint = `"nftwl setup nftables"`
	ruleset := func() string { return m.run("nft", "--stateless", "list", "ruleset") }
	m.run("nft", "add table inet filter; add chain inet filter input { type filter hook input priority 0; policy accept; }")
	rules, etc, mail := ruleset(), m.etc(), m.property("dovecot.service", "MainPID")

	if out := pkg(p.install, "old"); !strings.Contains(out, hint) {
		m.Errorf("no next step: %s", out)
	}
	if now := ruleset(); now != rules {
		m.Errorf("the rules are now\n%s", now)
	}
	now := m.etc()
	conf := now["nftwl.yaml"]
	delete(now, "nftwl.yaml")
	for path, was := range etc {
		if now[path] != was {
			m.Errorf("/etc/%s has changed", path)
		}
		delete(now, path)
	}
	for path := range now {
		m.Errorf("/etc/%s is new", path)
	}
	if !strings.Contains(conf, "# of an earlier version\n") {
		m.Errorf("/etc/nftwl.yaml: %s", conf)
	}
	if units := lines(m.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "nftwl*")); len(units) > 0 {
		m.Errorf("there are units: %q", units)
	}
	for _, line := range lines(m.run("systemctl", "list-unit-files", "--no-legend", "nftwl*")) {
		if f := strings.Fields(line); f[1] != "disabled" && f[1] != "static" {
			m.Error(line)
		}
	}
	m.logsIn(1)
	if pid := m.property("dovecot.service", "MainPID"); pid != mail {
		m.Error("Dovecot was restarted")
	}

	// It is in use, also after a boot.
	m.run("cp", "-r", "/usr/share/nftwl/nftables", "/etc/nftwl")
	m.run("mv", "/etc/nftwl/nftables.conf", "/etc/nftables.conf")
	m.run("systemctl", "enable", "--now", "nftables", "nftwl-persist")
	m.settle()
	const mine = "timeout: 2h\n"
	m.write("etc/nftwl.yaml", mine)
	m.run("cp", "/usr/share/nftwl/dovecot/90-nftwl.conf", "/etc/dovecot/conf.d/")
	m.run("doveadm", "reload")
	nstest.Until(m, "a login is trusted", func() error {
		m.logsIn(2)
		if _, ok := m.elements()[element{"trusted", client(2), 993}]; !ok {
			return errors.New("not yet")
		}
		return nil
	})
	m.reboot()
	m.addresses()
	m.trusts(2)

	// The upgrade denies no login, and restarts no unit of the firewall.
	const entered = "ActiveEnterTimestampMonotonic"
	persist, firewall := m.property("nftwl-persist.service", entered), m.property(nftables, entered)
	n, denied := m.crowd(100, func(turn func(int)) {
		turn(30)
		if out := pkg(p.upgrade, "new"); strings.Contains(out, hint) {
			m.Errorf("the first step again: %s", out)
		}
	})
	for _, err := range denied {
		m.Error(err)
	}
	m.trusts(upTo(n)...)
	for _, unit := range []string{"nftwl-persist.service", "nftwl-snapshot.service", "nftwl-save.timer"} {
		m.state(unit, "active")
		m.shows(unit, "NeedDaemonReload", "no")
	}
	m.shows("nftwl-persist.service", entered, persist)
	m.shows(nftables, entered, firewall)
	if now := m.etc()["nftwl.yaml"]; now != mine {
		m.Errorf("/etc/nftwl.yaml: %s", now)
	}
	if text, err := os.ReadFile(m.file(p.aside)); err != nil || strings.Contains(string(text), "earlier") {
		m.Errorf("the new configuration: %v\n%s", err, text)
	}

	// The removal fails because of Dovecot's configuration.
	if out := m.fails(p.remove[0], p.remove[1:]...); !strings.Contains(out, "EVERY LOGIN") {
		m.Errorf("it does not say why: %s", out)
	}
	m.logsIn(300)
	// What the message says. A file that Dovecot does not read does not matter.
	for _, path := range m.dropIns() {
		nstest.Must(m, os.Rename(path, path+".off"))
	}
	m.run("doveadm", "reload")
	want, rules := m.login(1), ruleset()
	m.run(p.remove[0], p.remove[1:]...)
	if now := ruleset(); now != rules {
		m.Errorf("the rules are now\n%s", now)
	}
	for _, list := range []string{"list-units --all nftwl*", "list-unit-files nftwl*", "list-units --failed"} {
		// It fails where it finds no file.
		if units, err := m.try("systemctl", append(strings.Fields(list), "--plain", "--no-legend")...); units != "" {
			m.Errorf("%s: %s%v", list, units, err)
		}
	}
	left := []string{
		"etc/dovecot/conf.d/90-nftwl.conf.off", "etc/nftwl", "etc/nftwl-defaults.yaml", p.saved, p.aside,
		"var/lib/nftwl", "var/lib/private/nftwl",
	}
	m.left(left...)
	m.logsIn(301)
	m.run("systemctl", "restart", nftables)
	nstest.Must(m, os.Remove(m.file("etc/dovecot/conf.d/90-nftwl.conf.off")))

	// A new installation restores what the removal saved.
	pkg(p.install, "new")
	m.run("systemctl", "enable", "--now", "nftwl-persist")
	m.settle()
	m.has(want, 0)
}

// etc returns the text of each file in /etc.
func (m *machine) etc() map[string]string {
	m.Helper()
	files := make(map[string]string)
	root := os.DirFS(m.file("etc"))
	nstest.Must(m, fs.WalkDir(root, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			files[path] = d.Type().String()
			return err
		}
		text, err := fs.ReadFile(root, path)
		files[path] = string(text)
		return err
	}))
	return files
}

// left checks which files and directories have our name, without looking into such
// directories or dpkg's database.
func (m *machine) left(want ...string) {
	m.Helper()
	var got []string
	for _, dir := range []string{"etc", "usr", "var", "run", "tmp"} {
		root := m.disk("")
		if dir == "run" || dir == "tmp" {
			root = m.file("")
		}
		nstest.Must(m, filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil
			case err != nil:
				return err
			case d.Type()&fs.ModeDevice != 0: // a whiteout, which hides a file of the tree
				return nil
			}
			name, _ := filepath.Rel(root, path)
			if name == "var/lib/dpkg" || name == "run/log" {
				return fs.SkipDir
			}
			if strings.Contains(d.Name(), "nftwl") {
				got = append(got, name)
				if d.IsDir() {
					return fs.SkipDir
				}
			}
			return nil
		}))
	}
	slices.Sort(got)
	slices.Sort(want)
	if want = slices.Compact(want); !slices.Equal(got, want) {
		m.Errorf("the files left are %q, want %q", got, want)
	}
}
