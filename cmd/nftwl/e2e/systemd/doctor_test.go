package systemd

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// doctor returns the result of each check in a group.
func (m *machine) doctor(group string) map[string]string {
	m.Helper()
	return nstest.Diagnosis(m, m.findings(group))
}

// remedies returns the commands of doctor's remedies, by check.
func (m *machine) remedies(group string) map[string]string {
	m.Helper()
	commands := make(map[string]string)
	for _, f := range m.findings(group) {
		commands[f.Check] = f.Command
	}
	return commands
}

// diagnoses compares the results of checks with regular expressions. All other checks of
// the group must be ok.
func (m *machine) diagnoses(what, group string, want map[string]string) {
	m.Helper()
	got := m.doctor(group)
	for check, text := range want {
		if !regexp.MustCompile("^(?:" + text + ")").MatchString(got[check]) {
			m.Errorf("%s: %s is %q, and should be %q", what, check, got[check], text)
		}
		delete(got, check)
	}
	for _, check := range slices.Sorted(maps.Keys(got)) {
		if !strings.HasPrefix(got[check], "ok: ") {
			m.Errorf("%s: %s is %q", what, check, got[check])
		}
	}
}

// A fault breaks a machine and fixes it again. If fix is nil, doctor's remedies fix it,
// run as they are written.
type fault struct {
	name      string
	make, fix func()
	diagnosis map[string]string
}

func (m *machine) tries(group string, faults []fault) {
	m.Helper()
	for _, f := range faults {
		f.make()
		m.diagnoses(f.name, group, f.diagnosis)
		if m.Failed() {
			m.FailNow()
		}
		if f.fix == nil {
			commands := m.remedies(group)
			for check := range f.diagnosis {
				m.run("sh", "-euc", commands[check])
			}
		} else {
			f.fix()
		}
		// The next fault's diagnosis shows whether it is fixed.
		m.settle()
	}
	m.diagnoses("all fixed", group, nil)
}

// commands returns a function that runs a line of shell.
func (m *machine) commands(line string) func() {
	return func() {
		m.Helper()
		m.run("sh", "-ec", line)
	}
}

// only removes programs that a test does not need, but that doctor would spend time
// on.
func (m *machine) only() {
	m.Helper()
	m.run("rm", "-f", "/usr/bin/fail2ban-client")
	m.run("mv", "/usr/bin/doveconf", "/run")
}

func TestDoctorPersistence(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.only()
		const file = "/" + snapshotFile
		const late = " the sets are empty after each reload"
		m.diagnoses("nothing is enabled", "persistence", map[string]string{
			"persistence.unit":     "fail: nftwl-persist.service is not enabled:" + late,
			"persistence.snapshot": "skip: no snapshot yet: " + file,
		})
		// The remedy for a fresh machine, run as it is written, enables what the README
		// enables.
		commands := m.remedies("persistence")
		m.run("sh", "-euc", commands["persistence.unit"])
		m.settle()
		m.diagnoses("nobody is trusted yet", "persistence", map[string]string{
			"persistence.save":     "ok: .*the last save succeeded",
			"persistence.snapshot": "ok: " + file + ": 0 elements, ",
		})
		want := m.fill()
		m.run("systemctl", "start", "nftwl-save")
		m.diagnoses("a healthy machine", "persistence", map[string]string{
			"persistence.unit":     "ok: .* enabled and active$",
			"persistence.boot":     "ok: /etc/nftables.conf loads, and has .* that table inet filter has now$",
			"persistence.save":     "ok: .*the last save succeeded",
			"persistence.snapshot": fmt.Sprintf(`ok: %s: %d elements, saved \d+s ago$`, file, len(want)),
		})

		m.run("cp", "/etc/nftables.conf", "/run/good.conf")
		const asBefore = "cp /run/good.conf /etc/nftables.conf"
		truncate := func() {
			m.run("cp", "-p", file, "/run/good")
			m.run("truncate", "--size=-20", file)
		}
		full := func() {
			m.run("cp", "-p", file, "/run/good")
			m.run("mount", "-t", "tmpfs", "-o", "mode=700,size=4k", "none", "/var/lib/private/nftwl")
			m.run("cp", "-p", "/run/good", file)
		}
		older := func() {
			// Overwrite it, so that its owner stays.
			nstest.Must(m, os.WriteFile(m.file(snapshotFile), []byte(m.older(2*time.Hour)), 0))
		}
		nothing := map[string]string{"persistence.save": "skip: nothing is saved while nftwl-persist.service is "}
		with := func(check, text string) map[string]string {
			all := maps.Clone(nothing)
			all[check] = text
			return all
		}
		m.tries("persistence", []fault{
			{"a reload that restored nothing", func() {
				truncate()
				m.run("nft", "-f", "/etc/nftables.conf")
				m.fails("systemctl", "reload", "nftwl-persist")
			},
				m.commands("cp -p /run/good " + file + "; systemctl reload nftwl-persist"),
				map[string]string{"persistence.snapshot": "fail: " + file + ": line .*cut short"}},
			{"a start that restored nothing", func() {
				m.run("systemctl", "stop", nftables)
				m.settle()
				truncate()
				m.run("systemctl", "start", nftables)
				m.settle()
				m.fails("systemctl", "start", "nftwl-save")
			}, m.commands("cp -p /run/good " + file + "; systemctl start nftwl-save"),
				map[string]string{
					"persistence.save":     `fail: the last save failed \(.+\): .*cut short`,
					"persistence.snapshot": "fail: " + file + ": line .*cut short",
				}},
			{"nftables.service stopped", func() { m.run("systemctl", "stop", nftables); m.settle() },
				func() { m.run("systemctl", "start", nftables); m.settle(); m.run("systemctl", "start", "nftwl-save") },
				with("persistence.unit", "fail: nftables.service is inactive")},
			{"persist unit not enabled", m.commands("systemctl disable nftwl-persist"), nil,
				map[string]string{"persistence.unit": "fail: nftwl-persist.service is not enabled:" + late}},
			{"nftables.service not enabled", m.commands("systemctl disable nftables"), nil,
				map[string]string{"persistence.unit": "fail: nftwl-persist.service follows nftables.service, which is not enabled"}},
			{"no persist unit", m.commands("mv /etc/systemd/system/nftwl-persist.service /run; systemctl daemon-reload"),
				m.commands("mv /run/nftwl-persist.service /etc/systemd/system/; systemctl daemon-reload"),
				map[string]string{"persistence.unit": "warn: nftwl-persist.service is not installed:" + late}},
			{"timer stopped", m.commands("systemctl stop nftwl-save.timer"), nil,
				map[string]string{"persistence.save": "warn: nftwl-save.timer is inactive: a power cut loses "}},
			{"a boot file with an error", m.commands("echo nonsense >>/etc/nftables.conf"), m.commands(asBefore),
				map[string]string{"persistence.boot": "fail: after a reboot there is no firewall: nft does not load /etc/nftables.conf: .*Error: syntax error"}},
			{"a boot file with an error, and a restart", func() {
				m.run("systemctl", "start", "nftwl-save")
				m.commands("echo nonsense >>/etc/nftables.conf")()
				m.fails("systemctl", "restart", nftables)
				m.settle()
			}, func() {
				m.commands(asBefore + "; systemctl start nftables")()
				m.settle()
				m.run("systemctl", "start", "nftwl-persist", "nftwl-save")
			}, with("persistence.boot", "fail: after a reboot there is no firewall: ")},
			{"no boot file", m.commands("mv /etc/nftables.conf /run"), m.commands("mv /run/nftables.conf /etc"),
				map[string]string{"persistence.boot": "fail: after a reboot there is no firewall: .*/etc/nftables.conf: no such file"}},
			{"what it includes is removed", m.commands("mv /etc/nftwl /run"), m.commands("mv /run/nftwl /etc"),
				map[string]string{"persistence.boot": "fail: after a reboot there is no firewall: nft does not load /etc/nftables.conf: .*nftwl.nft"}},
			{"no include", m.commands("sed -i '/include/d;/jump nftwl/d' /etc/nftables.conf"), m.commands(asBefore),
				map[string]string{"persistence.boot": "fail: /etc/nftables.conf lacks what is loaded now: .*table inet filter has no "}},
			{"no jump", m.commands("sed -i '/jump nftwl/d' /etc/nftables.conf"), m.commands(asBefore),
				map[string]string{"persistence.boot": "fail: /etc/nftables.conf lacks what is loaded now: .* no \".*jump nftwl"}},
			{"no table", m.commands("echo 'flush ruleset' >/etc/nftables.conf"), m.commands(asBefore),
				map[string]string{"persistence.boot": "fail: after a reboot there is no table inet filter"}},
			{"disk full", func() { full(); m.fails("systemctl", "start", "nftwl-save") },
				m.commands("umount /var/lib/private/nftwl; systemctl start nftwl-save"),
				map[string]string{"persistence.save": `fail: the last save failed \(.+\): .*no space left`}},
			{"everyone can write", m.commands("chmod 666 " + file), nil,
				map[string]string{"persistence.snapshot": "fail: " + file + " is a file that everyone can write to"}},
			{"another's", m.commands("chown 1234 " + file), nil,
				map[string]string{"persistence.snapshot": "fail: " + file + " belongs to user 1234"}},
			{"old", older, nil,
				map[string]string{"persistence.snapshot": "warn: .* saved 2h ago, though nftwl-save.timer saves"}},
			{"of other sets", m.commands("cp -p " + file + " /run/good; nft add table inet other; nft list table inet other >" + file + "; nft delete table inet other"), m.commands("cp -p /run/good " + file),
				map[string]string{"persistence.snapshot": "fail: .*none of the sets in it is one of table inet filter"}},
		})

		// If there is no table, the remedy also loads the rules.
		m.tries("sets", []fault{
			{"flushed by hand", m.commands("nft flush ruleset"), nil, map[string]string{"sets": "fail: table inet filter does not exist"}},
			{"flushed, and the boot file has an error", m.commands("nft flush ruleset; echo nonsense >>/etc/nftables.conf"), m.commands(asBefore + "; nft -f /etc/nftables.conf; systemctl start nftwl-save"),
				map[string]string{"sets": "skip: table inet filter does not exist: persistence.boot says why"}},
		})
		m.run("nft", "list", "chain", "inet", "filter", "input")
		m.diagnoses("the rules are back", "persistence", nil)

		// The interval of nftwl-save.timer.
		m.run("systemctl", "stop", "nftwl-save.timer")
		m.run("ln", "-sf", "/dev/null", "/etc/systemd/system/nftwl-save.timer")
		m.run("systemctl", "daemon-reload")
		older()
		m.diagnoses("no timer", "persistence", map[string]string{"persistence.save": "ok: nftwl-save.timer is masked"})
	})
}

// On a machine where one of our units loads the rules.
func TestDoctorStandalone(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newStandalone(t, b)
		m.only()
		m.fill()
		m.run("systemctl", "start", "nftwl-save")
		m.healthy()
		const file = "/etc/nftwl/standalone.nft"
		const fixed = "cp /run/good " + file
		const syntax = "fail: after a reboot there is no firewall: nft does not load " + file + `: nft: ` + file + `:\d+:\d+-\d+: Error: syntax error`
		m.run("cp", file, "/run/good")
		m.tries("persistence", []fault{
			{"not enabled", m.commands("systemctl disable nftwl-persist"), nil,
				map[string]string{"persistence.unit": "fail: nftwl-persist.service is not enabled: after a reboot neither the rules nor the sets are there$"}},
			{"nftables.service beside it", m.commands("systemctl enable nftables"), nil,
				map[string]string{"persistence.unit": "fail: a restart or reload of nftables.service flushes all tables"}},
			{"another table", m.commands("echo 'table: inet filter' >/etc/nftwl.yaml"), m.commands("echo 'table: inet nftwl' >/etc/nftwl.yaml"),
				map[string]string{
					"persistence.snapshot": "fail: .*none of the sets in it is one of table inet filter",
				}},
			{"no rules", m.commands("rm " + file), m.commands(fixed),
				map[string]string{"persistence.boot": "fail: after a reboot there is no firewall: .* " + file + ": no such file"}},
			{"rules that root alone can read", m.commands("chmod 600 " + file), nil,
				map[string]string{"persistence.boot": "fail: after a reboot there is no firewall: " + file + " has mode 0600"}},
			{"a reload that loaded none", func() {
				m.commands("echo no rule >>" + file)()
				m.diagnoses("the next boot loads none", "persistence", map[string]string{"persistence.boot": syntax})
				m.fails("systemctl", "reload", "nftwl-persist")
			}, m.commands(fixed + "; systemctl reload nftwl-persist"),
				map[string]string{
					"persistence.boot": syntax,
				}},
		})
	})
}

// A Dovecot that does not run, or whose unit withholds CAP_NET_ADMIN.
func TestDoctorDovecotUnit(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.run("rm", "-f", "/usr/bin/fail2ban-client")
		m.mail()
		m.install()
		m.write("run/systemd/system/dovecot.service.d/test.conf", "[Unit]\nStartLimitIntervalSec=0\n")
		m.run("sh", "-euc", "nftwl setup dovecot --write && systemctl daemon-reload && systemctl enable --now dovecot")
		m.diagnoses("a healthy machine", "dovecot", nil)
		const dir = "/etc/systemd/system/dovecot.service.d"
		unit := func(settings string) func() {
			return m.commands("rm -rf " + dir + "; mkdir " + dir + "; printf '[Service]\n" + settings + "\n' >" + dir + "/a.conf; systemctl daemon-reload; systemctl restart dovecot")
		}
		m.tries("dovecot", []fault{
			{"stopped", m.commands("systemctl stop dovecot"), m.commands("systemctl start dovecot"), map[string]string{
				"dovecot.running": "fail: dovecot.service is inactive: result success", "dovecot.login": "skip: .*Dovecot is not running"}},
			{"stopped and disabled", m.commands("systemctl disable --now dovecot"), m.commands("systemctl enable --now dovecot"), map[string]string{
				"dovecot.running": "skip: ", "dovecot.login": "skip: "}},
			{"failed", func() {
				m.commands("systemctl kill --signal=KILL dovecot")()
				nstest.Until(m, "dovecot.service has failed", func() error { _, err := m.try("systemctl", "is-failed", "-q", "dovecot"); return err })
			}, m.commands("systemctl restart dovecot"), map[string]string{
				"dovecot.running": "fail: dovecot.service is failed: result signal", "dovecot.login": "skip: "}},
			{"capabilities", unit("CapabilityBoundingSet=~CAP_NET_ADMIN"), nil, map[string]string{
				"dovecot.login": "fail: a login by service nftwl was tried: logins go on, and no client is trusted: .*CAP_NET_ADMIN"}},
			{"address families", unit("RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6"), nil, map[string]string{
				"dovecot.login": "fail: .* was tried: logins go on, and no client is trusted: "}},
			{"both", unit("RestrictAddressFamilies=~AF_NETLINK\nCapabilityBoundingSet=~CAP_NET_ADMIN"), nil, map[string]string{
				"dovecot.login": "fail: .* was tried: logins go on, and no client is trusted: "}},
		})
	})
}
