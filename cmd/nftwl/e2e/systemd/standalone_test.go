package systemd

import (
	"os"
	"slices"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// theirs is another firewall, like ufw and firewalld: at boot and at each reload it replaces
// its own table, and no others.
const theirs = `table inet theirs
delete table inet theirs
table inet theirs {
	chain input {
		type filter hook input priority filter; policy drop;
		iif "lo" accept
		ct state established,related accept
		tcp dport { 22, 25, 143, 465, 587, 993, 995 } accept
	}
}
`

const theirService = `[Unit]
DefaultDependencies=no
After=nftables.service
Before=network-pre.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/nft -f /etc/theirs.nft
ExecReload=/usr/sbin/nft -f /etc/theirs.nft
ExecStop=/usr/sbin/nft delete table inet theirs

[Install]
WantedBy=multi-user.target
`

// newStandalone returns a machine with another firewall, on which a package has installed
// nftwl, and nftwl setup everything else.
func newStandalone(t *testing.T, b nstest.Debian) *machine {
	t.Helper()
	m := newMachine(t, b)
	m.run("sh", "-euc", `
		cd /etc/systemd/system
		mv nftwl*.* /usr/lib/systemd/system
		rm -r standalone nftables.service.d /etc/nftwl /etc/nftables.conf`)
	m.write("etc/nftwl.yaml", "table: inet nftwl\n")
	m.write(defaults, "table: inet nftwl\n")
	m.write("etc/theirs.nft", theirs)
	m.write("etc/systemd/system/theirs.service", theirService)
	m.run("nftwl", "setup", "nftables", "--write")
	if out := m.run("nftwl", "setup", "systemd", "--write"); !strings.HasPrefix(out, "written: /etc/systemd/system/nftwl-persist.service\n\nInstalled already, ") {
		t.Errorf("setup: %s", out)
	}
	m.run("systemctl", "enable", "--now", "theirs", "nftwl-persist")
	m.settle()
	return m
}

const persist = "nftwl-persist.service"

// loaded checks that our rules and those of the other firewall are loaded.
func (m *machine) loaded() {
	m.Helper()
	for table, words := range map[string]string{"inet nftwl": "nftwl: trusted IPv6", "inet theirs": "policy drop"} {
		if out := m.run("nft", "list", "chain", table+" input"); !strings.Contains(out, words) {
			m.Fatalf("table %s:\n%s", table, out)
		}
	}
}

func TestStandalone(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newStandalone(t, b)
		if out := m.run("systemd-analyze", "verify", "--man=no", persist); out != "" {
			t.Errorf("verify: %s", out)
		}
		m.run("systemd-analyze", "security", "--offline=yes", "--threshold=12", persist)
		m.state(nftables, "inactive")
		m.loaded()
		want := m.fill()

		// The other firewall's reload does not change our table.
		for _, how := range []string{"reload", "restart", "stop", "start"} {
			m.run("systemctl", how, "theirs")
			m.has(want, 0)
		}

		// A reload with changed rules brings back no address that was removed since the last
		// save.
		m.run("systemctl", "start", "nftwl-save")
		want = m.login(1)
		for key := range want {
			if key.Address == "192.0.2.7" {
				delete(want, key)
			}
		}
		m.run("nftwl", "remove", "192.0.2.7")
		m.run("sed", "-i", "s,over 3/minute,over 30/minute,", "/etc/nftwl/standalone.nft")
		m.run("systemctl", "reload", persist)
		m.has(want, 0)
		if rules := m.run("nft", "list", "chain", "inet nftwl count"); strings.Count(rules, "over 30/minute") != 3 || strings.Contains(rules, "over 3/minute") {
			t.Errorf("the rules have not changed:\n%s", rules)
		}

		// A reboot, with a unit that waits for network-pre.target like cloud-init.
		m.write("etc/systemd/system/early.service", "[Unit]\nDefaultDependencies=no\nAfter=network-pre.target\nBefore=sysinit.target\n\n"+
			"[Service]\nType=oneshot\nExecStart=/bin/true\n\n[Install]\nWantedBy=sysinit.target\n")
		m.run("systemctl", "enable", "early")
		want = m.login(2)
		m.reboot()
		m.has(want, 0)
		m.loaded()
		m.early()
		m.noCycle()
		m.state(nftables, "inactive")
		boot := m.jobs("start")
		order := []int{
			slices.Index(boot, persist),
			slices.Index(boot, persist+" done"),
			slices.Index(boot, "network-pre.target done"),
			slices.Index(boot, "early.service done"),
			slices.Index(boot, "sysinit.target done"),
		}
		if order[0] < 0 || !slices.IsSorted(order) {
			t.Errorf("the jobs of a boot: %q", boot)
		}

		// The last save survives a power cut, also if a unit that flushes everything at boot is
		// enabled.
		m.write("etc/nftables.conf", flushed)
		m.run("systemctl", "enable", nftables)
		want = m.login(3)
		m.run("systemctl", "start", "nftwl-save")
		m.login(4)
		m.kill()
		m.boot()
		m.has(want, 0)
		m.loaded()
		m.state(nftables, "active")
		// It would be first here even without that.
		if after := m.property(persist, "After"); !slices.Contains(strings.Fields(after), nftables) {
			t.Errorf("%s is started after %s", persist, after)
		}

		// By hand.
		for _, how := range []string{"reload", "restart"} {
			for _, again := range []string{"", "; nft -f /etc/nftwl/standalone.nft"} {
				m.run("sh", "-c", "nft delete table inet nftwl"+again)
				m.run("systemctl", how, persist)
				m.settle()
				if diffs := m.diff(want, 0, slack); len(diffs) > 0 {
					t.Fatalf("nft delete table%s, and systemctl %s: %s", again, how, diffs[0])
				}
				m.loaded()
			}
		}
	})
}

// A snapshot that cannot be restored does not keep the rules from loading, and is not
// overwritten. Rules that cannot be loaded are logged, and keep nothing else from
// starting.
func TestStandaloneBroken(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newStandalone(t, b)
		want := m.fill()
		m.powerOff()
		good := m.snapshot()
		bad := good[:len(good)/2]
		m.setSnapshot(bad)
		m.boot()
		m.loaded()
		m.has(nil, 0)
		m.state(persist, "active")
		m.state("nftwl-save.service", "failed")
		m.state("nftwl-save.timer", "active")
		m.state("multi-user.target", "active")
		if log := m.journal("--unit=nftwl-save"); !strings.Contains(log, "error: /"+snapshotFile) {
			t.Errorf("the journal does not say what is wrong:\n%s", log)
		}
		m.fails("systemctl", "reload", persist)
		m.fails("systemctl", "start", "nftwl-save")
		m.login(1)
		m.powerOff()
		m.same(bad, "a shutdown")
		m.setSnapshot(good)

		file := m.disk("etc/nftwl/standalone.nft")
		rules, err := os.ReadFile(file)
		nstest.Must(m, err)
		m.write("etc/nftwl/standalone.nft", string(rules)+"no rule\n")
		m.boot()
		m.state(persist, "failed")
		m.state("nftwl-save.timer", "inactive")
		m.state("multi-user.target", "active")
		m.state("theirs.service", "active")
		if log := m.journal("--unit=nftwl-persist"); !strings.Contains(log, "/etc/nftwl/standalone.nft:") || !strings.Contains(log, "Error: syntax error") {
			t.Errorf("the journal does not say what is wrong:\n%s", log)
		}
		m.same(good, "a boot without rules")

		m.write("etc/nftwl/standalone.nft", string(rules))
		m.run("systemctl", "start", persist)
		m.settle()
		m.has(want, 0)
		m.loaded()
		m.state("nftwl-save.timer", "active")
		// A wrong change of the rules leaves the loaded ones as they are.
		m.write("etc/nftwl/standalone.nft", string(rules)+"no rule\n")
		m.fails("systemctl", "reload", persist)
		m.has(want, 0)
		m.loaded()
		m.state(persist, "active")
	})
}
