package systemd

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// doctor returns the status and the text of each check whose name begins so.
// No name may be there twice.
func (m *machine) doctor(group string) map[string]string {
	m.Helper()
	// It exits with 1 where another group's check fails.
	out, err := m.try("nftwl", "doctor", "--json")
	var results []struct{ Check, Status, Text, Remedy, Command string }
	if e := json.Unmarshal([]byte(out), &results); e != nil {
		m.Fatalf("nftwl doctor: %v, %v\n%s", err, e, out)
	}
	found := make(map[string]string)
	for _, r := range results {
		if r.Check != group && !strings.HasPrefix(r.Check, group+".") {
			continue
		}
		if before := found[r.Check]; before != "" {
			m.Errorf("%s is there twice: %s, and %s", r.Check, before, r.Text)
		}
		if (r.Status == "warn" || r.Status == "fail") != (r.Remedy != "") || strings.Contains(r.Text+r.Remedy, "\n") {
			m.Errorf("%+v", r)
		}
		found[r.Check] = r.Status + ": " + r.Text
	}
	return found
}

// diagnoses checks that these checks say this, each a regular expression, and
// that the others of the group are ok.
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

// A fault is a way to break a machine, and to mend it again.
type fault struct {
	name       string
	make, mend func()
	diagnosis  map[string]string
}

func (m *machine) tries(group string, faults []fault) {
	m.Helper()
	for _, f := range faults {
		f.make()
		m.diagnoses(f.name, group, f.diagnosis)
		if m.Failed() {
			m.FailNow()
		}
		f.mend() // the next one shows whether it is
		m.settle()
	}
	m.diagnoses("all mended", group, nil)
}

// commands makes a function of a line for a shell.
func (m *machine) commands(line string) func() {
	return func() {
		m.Helper()
		m.run("sh", "-ec", line)
	}
}

// only takes programs away that are none of a test's business, and take their
// time to say so.
func (m *machine) only() {
	m.Helper()
	m.run("rm", "-f", "/usr/bin/fail2ban-client")
	m.run("mv", "/usr/bin/doveconf", "/run")
}

func TestDoctorPersistence(t *testing.T) {
	t.Parallel()
	onEach(t, func(t *testing.T, b base) {
		t.Parallel()
		m := newMachine(t, b)
		m.only()
		const file = "/" + snapshotFile
		const late = " the sets are empty after each reload"
		m.diagnoses("nothing is enabled", "persistence", map[string]string{
			"persistence.unit":     "warn: nftwl-persist.service is not enabled:" + late,
			"persistence.snapshot": "skip: no snapshot yet: " + file,
		})
		m.install()
		m.diagnoses("nobody is trusted yet", "persistence", map[string]string{
			"persistence.save":     "ok: .*the last save succeeded",
			"persistence.snapshot": "ok: " + file + ": 0 elements, ",
		})
		want := m.fill()
		m.run("systemctl", "start", "nftwl-save")
		m.diagnoses("a healthy machine", "persistence", map[string]string{
			"persistence.unit":     "ok: .* enabled and active$",
			"persistence.order":    "ok: ",
			"persistence.save":     "ok: .*the last save succeeded",
			"persistence.snapshot": fmt.Sprintf(`ok: %s: %d elements, saved \d+s ago$`, file, len(want)),
		})

		// edit replaces a line of a unit, and says so to systemd.
		edit := func(unit, line, by string) func() {
			return m.commands(fmt.Sprintf("sed -i 's/^%s$/%s/' /etc/systemd/system/%s && systemctl daemon-reload", line, by, unit))
		}
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
			// In its place, as it has an owner.
			m.must(os.WriteFile(m.file(snapshotFile), []byte(m.older(2*time.Hour)), 0))
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
				map[string]string{
					"persistence.unit":     "fail: the sets were not restored after the last reload of nftables: .*cut short",
					"persistence.snapshot": "fail: " + file + ": line .*cut short",
				}},
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
			{"persist unit not enabled", m.commands("systemctl disable nftwl-persist"), m.commands("systemctl enable nftwl-persist"),
				map[string]string{"persistence.unit": "warn: nftwl-persist.service is not enabled:" + late}},
			{"nftables.service not enabled", m.commands("systemctl disable nftables"), m.commands("systemctl enable nftables"),
				map[string]string{"persistence.unit": "fail: nftables.service is not enabled"}},
			{"no persist unit", m.commands("mv /etc/systemd/system/nftwl-persist.service /run; systemctl daemon-reload"),
				m.commands("mv /run/nftwl-persist.service /etc/systemd/system/; systemctl daemon-reload"),
				map[string]string{"persistence.unit": "warn: nftwl-persist.service is not installed:" + late}},
			{"a file that systemd has not read", m.commands("touch /etc/systemd/system/nftwl-persist.service"), m.commands("systemctl daemon-reload"),
				map[string]string{"persistence.unit": "warn: .*another file than systemd has read"}},
			{"restore not ordered", edit("nftwl-persist.service", "After=local-fs.target nftables.service", "After=local-fs.target"),
				edit("nftwl-persist.service", "After=local-fs.target", "After=local-fs.target nftables.service"),
				map[string]string{"persistence.order": "fail: .*: nftwl-persist.service lacks After=nftables.service$"}},
			{"save not ordered", edit("nftwl-snapshot.service", "Before=nftables.service shutdown.target", "Before=shutdown.target"),
				edit("nftwl-snapshot.service", "Before=shutdown.target", "Before=nftables.service shutdown.target"),
				map[string]string{"persistence.order": "fail: .*: nftwl-snapshot.service lacks Before=nftables.service$"}},
			{"no save before a reload", edit("nftwl-snapshot.service", "ReloadPropagatedFrom=nftables.service", ""),
				edit("nftwl-snapshot.service", "PartOf=nftwl-persist.service", "ReloadPropagatedFrom=nftables.service\\n&"),
				map[string]string{"persistence.order": "fail: .*: nftwl-snapshot.service lacks ReloadPropagatedFrom=nftables.service$"}},
			{"timer stopped", m.commands("systemctl stop nftwl-save.timer"), m.commands("systemctl start nftwl-save.timer nftwl-save"),
				map[string]string{"persistence.save": "warn: nftwl-save.timer is inactive: a power cut loses "}},
			{"disk full", func() { full(); m.fails("systemctl", "start", "nftwl-save") },
				m.commands("umount /var/lib/private/nftwl; systemctl start nftwl-save"),
				map[string]string{"persistence.save": `fail: the last save failed \(.+\): .*no space left`}},
			{"disk full at a reload", func() { full(); m.fails("systemctl", "reload", "nftwl-snapshot") },
				m.commands("umount /var/lib/private/nftwl; systemctl reload nftwl-snapshot"),
				map[string]string{"persistence.save": "fail: the sets were not saved before the last reload of nftables: .*no space left"}},
			{"huge", m.commands("cp -p " + file + " /run/good; truncate --size=65M " + file), m.commands("cp -p /run/good " + file),
				map[string]string{"persistence.snapshot": `ok: .* 65 MiB, which is too much to look into here; written \d+s ago$`}},
			{"everyone can write", m.commands("chmod 666 " + file), m.commands("chmod 600 " + file),
				map[string]string{"persistence.snapshot": "fail: " + file + " is a file that everyone can write to"}},
			{"another's", m.commands("chown 1234 " + file), m.commands("chown --reference=/var/lib/nftwl/ " + file),
				map[string]string{"persistence.snapshot": "fail: " + file + " belongs to user 1234"}},
			{"old", older, m.commands("systemctl start nftwl-save"),
				map[string]string{"persistence.snapshot": "warn: .* saved 2h ago, though nftwl-save.timer saves"}},
			{"of other sets", m.commands("cp -p " + file + " /run/good; nft add table inet other; nft list table inet other >" + file + "; nft delete table inet other"), m.commands("cp -p /run/good " + file),
				map[string]string{"persistence.snapshot": "fail: .*none of the sets in it is one of table inet filter"}},
			{"a damaged one kept", m.commands("touch " + file + ".bad"), m.commands("rm " + file + ".bad"),
				map[string]string{"persistence.bad": "warn: .*" + file + ".bad"}},
		})

		// As nftwl-save.timer says.
		m.run("systemctl", "stop", "nftwl-save.timer")
		m.run("ln", "-sf", "/dev/null", "/etc/systemd/system/nftwl-save.timer")
		m.run("systemctl", "daemon-reload")
		older()
		m.diagnoses("no timer", "persistence", map[string]string{"persistence.save": "ok: nftwl-save.timer is masked"})
	})
}

// Where a unit of ours loads the rules.
func TestDoctorStandalone(t *testing.T) {
	t.Parallel()
	onEach(t, func(t *testing.T, b base) {
		t.Parallel()
		m := newStandalone(t, b)
		m.only()
		m.fill()
		m.run("systemctl", "start", "nftwl-save")
		m.healthy()
		const file = "/etc/nftwl/standalone.nft"
		const unit = "/etc/systemd/system/nftwl-persist.service"
		const mended = "cp /run/good " + file
		const nothing = "after a reboot neither the rules nor the sets are there$"
		const syntax = "fail: nft does not load it: " + file + `:\d+:\d+-\d+: Error: syntax error`
		m.run("cp", file, "/run/good")
		m.tries("persistence", []fault{
			{"the other unit", func() {
				m.run("systemctl", "disable", "nftwl-persist")
				m.diagnoses("not enabled", "persistence", map[string]string{"persistence.unit": "fail: nftwl-persist.service is not enabled: " + nothing})
				m.commands("mv " + unit + " /run; systemctl daemon-reload")()
				m.diagnoses("nor is the other unit", "persistence", map[string]string{"persistence.unit": "warn: nftwl-persist.service is not enabled: " + nothing})
				m.run("systemctl", "enable", "nftwl-persist")
			}, m.commands("systemctl disable nftwl-persist; mv /run/nftwl-persist.service " + unit + "; systemctl enable nftwl-persist"),
				map[string]string{"persistence.unit": "fail: nftwl-persist.service follows nftables.service, which is not enabled: " + nothing}},
			{"nftables.service beside it", m.commands("systemctl enable nftables"), m.commands("systemctl disable nftables"),
				map[string]string{"persistence.order": "fail: a restart or reload of nftables.service flushes all tables"}},
			{"late", m.commands("sed -i 's/^Before=network-pre.target /Before=/' " + unit + "; systemctl daemon-reload"),
				m.commands("sed -i 's/^Before=/&network-pre.target /' " + unit + "; systemctl daemon-reload"),
				map[string]string{"persistence.order": "fail: .* lacks Before=network-pre.target$"}},
			{"another table", m.commands("echo 'table: inet filter' >/etc/nftwl.yaml"), m.commands("echo 'table: inet nftwl' >/etc/nftwl.yaml"),
				map[string]string{
					"persistence.rules":    "fail: nftwl-persist.service loads " + file + ", which lacks table inet filter",
					"persistence.snapshot": "fail: .*none of the sets in it is one of table inet filter",
				}},
			{"no rules", m.commands("rm " + file), m.commands(mended),
				map[string]string{"persistence.rules": "fail: nftwl-persist.service loads it, .* " + file + ": no such file"}},
			{"rules that it cannot read", m.commands("chmod 600 " + file), m.commands("chmod 644 " + file),
				map[string]string{"persistence.rules": "fail: " + file + " has mode 0600"}},
			{"a reload that loaded none", func() {
				m.commands("echo no rule >>" + file)()
				m.diagnoses("the next boot loads none", "persistence", map[string]string{"persistence.rules": syntax})
				m.fails("systemctl", "reload", "nftwl-persist")
			}, m.commands(mended + "; systemctl reload nftwl-persist"),
				map[string]string{
					"persistence.rules": syntax,
					"persistence.unit":  "fail: the last reload of nftwl-persist.service failed: persistence.rules says why$",
				}},
		})
	})
}
