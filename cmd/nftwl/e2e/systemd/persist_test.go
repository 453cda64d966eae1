package systemd

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// An element of `nftwl list --json`, without the rest of its data.
type element struct {
	List, Address string
	Port          int
}

type value struct {
	until   time.Time // when it expires; zero if it is permanent
	comment string
}

type elements map[element]value

// slack is how much the time left can differ. An element loses the time between a save
// and the kernel's flush, which is longer on a busy machine, and gains none. The errors
// that the tests look for are minutes.
const slack = 10 * time.Second

// defaults is a configuration for the tests, independent of the machine's own.
const defaults = "etc/nftwl-defaults.yaml"

func (m *machine) elements() elements {
	m.Helper()
	var listed []struct {
		element
		Timeout, Expires *float64
		Comment          string
	}
	now := time.Now()
	nstest.Must(m, json.Unmarshal([]byte(m.run("nftwl", "--config", "/"+defaults, "list", "--json")), &listed))
	found := make(elements)
	for _, l := range listed {
		f := value{comment: l.Comment}
		if l.Expires != nil {
			f.until = now.Add(time.Duration(*l.Expires * float64(time.Second)))
		}
		found[l.element] = f
	}
	return found
}

// diff returns how the kernel's elements differ from those wanted. Each must have its old
// time left, less a time lost on purpose, with a tolerance of slack.
func (m *machine) diff(want elements, lost, slack time.Duration) (diffs []string) {
	m.Helper()
	got := m.elements()
	now := time.Now()
	say := func(format string, args ...any) { diffs = append(diffs, fmt.Sprintf(format, args...)) }
	for key, w := range want {
		g, ok := got[key]
		delete(got, key)
		if w.until.IsZero() {
			if !ok || g != w {
				say("%+v is %+v, want %+v", key, g, w)
			}
			continue
		}
		w.until = w.until.Add(-lost)
		left := w.until.Sub(now)
		switch {
		case !ok && left > slack:
			say("%+v is lost, with %v left", key, left)
		case !ok:
		case g.until.Sub(w.until).Abs() > slack:
			say("%+v has %v left, want %v", key, g.until.Sub(now), left)
		case g.comment != w.comment:
			say("%+v has comment %q, want %q", key, g.comment, w.comment)
		}
	}
	for key, g := range got {
		say("%+v is there, but must not: %+v", key, g)
	}
	return diffs
}

// has checks that the kernel has exactly these elements.
func (m *machine) has(want elements, lost time.Duration) {
	m.Helper()
	if diffs := m.diff(want, lost, slack); len(diffs) > 0 {
		m.Fatal(strings.Join(diffs, "\n"))
	}
}

// fill puts elements of every kind into the sets.
func (m *machine) fill() elements {
	m.Helper()
	for _, args := range []string{
		"add 192.0.2.7 --timeout 1h --comment alice",
		"add 192.0.2.8 --port 993 --timeout 1h --comment first",
		"add 2001:db8::7 --timeout 2h",
		"add 2001:db8::8 --port 587 --timeout never --comment office",
		"ban 198.51.100.9 --timeout 30m --comment fail2ban",
		"ban 198.51.100.10 --port 587 --timeout 5m",
		"ban 2001:db8:bad::1 --timeout never",
		"ban 2001:db8:bad::2 --port 465,587 --timeout 3h --comment two",
	} {
		m.run("nftwl", strings.Fields(args)...)
	}
	e := m.elements()
	if len(e) < 8 {
		m.Fatalf("only %d elements were added", len(e))
	}
	return e
}

// login adds elements that no earlier save can have.
func (m *machine) login(n int) elements {
	m.Helper()
	m.run("nftwl", "add", fmt.Sprintf("203.0.113.%d", n), fmt.Sprintf("2001:db8:203::%d", n))
	return m.elements()
}

const (
	snapshotFile = "var/lib/nftwl/sets.nft"
	// /var/lib/nftwl is a symlink.
	snapshotOnDisk = "var/lib/private/nftwl/sets.nft"
)

func (m *machine) snapshot() string {
	m.Helper()
	name := m.disk(snapshotOnDisk)
	if m.pid != 0 {
		name = m.file(snapshotFile)
	}
	text, err := os.ReadFile(name)
	nstest.Must(m, err)
	return string(text)
}

var savedAt = regexp.MustCompile(`^(.*, saved )([^,\n]+)`)

// older returns the snapshot with an earlier time in its header.
func (m *machine) older(by time.Duration) string {
	m.Helper()
	text := m.snapshot()
	header := savedAt.FindStringSubmatch(text)
	if header == nil {
		m.Fatalf("the snapshot begins with %.100q", text)
	}
	saved, err := time.Parse(time.RFC3339Nano, header[2])
	nstest.Must(m, err)
	return header[1] + saved.Add(-by).Format(time.RFC3339Nano) + text[len(header[0]):]
}

// setSnapshot replaces the text of the snapshot, and keeps its owner and mode.
func (m *machine) setSnapshot(text string) {
	m.Helper()
	if m.pid != 0 {
		m.Fatal("the machine is on")
	}
	nstest.Must(m, os.WriteFile(m.disk(snapshotOnDisk), []byte(text), 0o600))
}

func (m *machine) same(was, what string) {
	m.Helper()
	if is := m.snapshot(); is != was {
		m.Fatalf("%s: the snapshot is\n%s\nand was\n%s", what, is, was)
	}
}

const nftables = "nftables.service"

func TestRestarts(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.install()
		// At the first boot there is no snapshot, which is no error.
		m.state("nftwl-persist.service", "active")
		m.has(nil, 0)
		m.fill()

		want := m.login(1)
		m.run("systemctl", "stop", nftables)
		m.settle()
		if rules := m.run("nft", "list", "ruleset"); rules != "" {
			t.Fatalf("nftables.service is stopped, and the ruleset is\n%s", rules)
		}
		m.state("nftwl-persist.service", "inactive")
		m.state("nftwl-save.timer", "inactive")
		m.run("systemctl", "start", nftables)
		m.settle()
		m.has(want, 0)
		m.state("nftwl-save.timer", "active")

		// More restarts than systemd allows a unit by default.
		for i, how := range strings.Fields("restart reload restart reload-or-restart try-restart reload restart restart restart reload") {
			want := m.login(2 + i)
			m.run("systemctl", how, nftables)
			m.settle()
			m.has(want, 0)
			m.state("nftwl-persist.service", "active")
			m.state("nftwl-save.timer", "active")
		}
	})
}

func TestOrder(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.install()
		// Like cloud-init, which makes an ordering cycle with a firewall that waits for
		// the end of the early boot.
		m.write("etc/systemd/system/early.service", `[Unit]
DefaultDependencies=no
After=network-pre.target
Before=sysinit.target

[Service]
Type=oneshot
ExecStart=/bin/true

[Install]
WantedBy=sysinit.target
`)
		m.run("systemctl", "enable", "early")
		m.reboot()
		boot := m.jobs("start")
		order := []int{
			slices.Index(boot, "nftwl-snapshot.service done"),
			slices.Index(boot, nftables),
			slices.Index(boot, nftables+" done"),
			slices.Index(boot, "nftwl-persist.service done"),
			slices.Index(boot, "network-pre.target done"),
			slices.Index(boot, "early.service done"),
			slices.Index(boot, "sysinit.target done"),
		}
		if order[0] < 0 || !slices.IsSorted(order) {
			t.Errorf("the jobs of a boot: %q", boot)
		}
		m.early()
		m.noCycle()

		m.run("systemctl", "reload", nftables)
		m.settle()
		got := m.jobs("reload")
		want := []string{
			"nftwl-snapshot.service", "nftwl-snapshot.service done",
			nftables, nftables + " done",
			"nftwl-persist.service", "nftwl-persist.service done",
		}
		if !slices.Equal(got, want) {
			t.Errorf("the jobs of a reload: %q", got)
		}
	})
}

// early checks that the sets were restored after nftwl-persist started and before the
// network did.
func (m *machine) early() {
	m.Helper()
	order := []int{
		m.at(persist, "ActiveEnterTimestampMonotonic"),
		m.at("nftwl-save.service", "ExecMainStartTimestampMonotonic"),
		m.at("nftwl-save.service", "ExecMainExitTimestampMonotonic"),
		m.at("network-pre.target", "ActiveEnterTimestampMonotonic"),
	}
	if order[0] == 0 || !slices.IsSorted(order) {
		m.Errorf("the times of nftwl-persist, the start and the end of the restore, and the network are not in order: %d", order)
	}
}

// at returns when something happened to a unit, in microseconds.
func (m *machine) at(unit, property string) int {
	m.Helper()
	n, err := strconv.Atoi(m.property(unit, property))
	nstest.Must(m, err)
	return n
}

// noCycle checks that systemd left out no unit because of an ordering cycle.
func (m *machine) noCycle() {
	m.Helper()
	if log := m.journal(); strings.Contains(log, "ordering cycle") {
		m.Errorf("an ordering cycle:\n%s", log)
	}
}

// Unlike Debian's unit, Fedora's does not belong to the early boot.
func TestLateFirewall(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.write("etc/systemd/system/nftables.service", `[Unit]
Wants=network-pre.target
Before=network-pre.target

[Service]
Type=oneshot
RemainAfterExit=yes
ProtectSystem=full
ProtectHome=true
ExecStart=/usr/sbin/nft -f /etc/nftables.conf
ExecReload=/usr/sbin/nft -f /etc/nftables.conf
ExecStop=/usr/sbin/nft flush ruleset

[Install]
WantedBy=basic.target
`)
		m.run("systemctl", "daemon-reload")
		m.install()
		want := m.fill()
		m.run("systemctl", "reload", nftables)
		m.settle()
		m.has(want, 0)
		want = m.login(1)
		m.reboot()
		m.noCycle()
		m.has(want, 0)
		want = m.login(2)
		m.run("systemctl", "restart", nftables)
		m.settle()
		m.has(want, 0)
	})
}

func TestReboot(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.install()
		want := m.fill()
		m.reboot()
		m.has(want, 0)
		want = m.login(1)
		m.powerOff()
		m.boot()
		m.has(want, 0)

		// The machine was off for ten minutes: the file is ten minutes older.
		const down = 10 * time.Minute
		want = m.login(2)
		m.powerOff()
		m.setSnapshot(m.older(down))
		m.boot()
		if _, ok := m.elements()[element{"banned", "198.51.100.10", 587}]; ok {
			t.Error("an element that expired while the machine was off is back")
		}
		m.has(want, down)
	})
}

func TestPowerCut(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.write("etc/systemd/system/nftwl-save.timer.d/soon.conf",
			"[Timer]\nOnUnitInactiveSec=\nOnUnitInactiveSec=1s\nAccuracySec=1ms\n")
		m.run("systemctl", "daemon-reload")
		m.install()
		m.fill()
		// More than once.
		for i := range 2 {
			m.login(1 + i)
			nstest.Until(m, "the timer saves", func() error {
				text, err := os.ReadFile(m.file(snapshotFile))
				if err == nil && !strings.Contains(string(text), fmt.Sprintf("203.0.113.%d ", 1+i)) {
					err = errors.New("not in the snapshot yet")
				}
				return err
			})
		}
		// Otherwise there would be three lines a minute.
		if log := m.journal("--unit=nftwl-save.service"); strings.Contains(log, "nftwl") {
			t.Errorf("the journal has lines of saves that did not fail:\n%s", log)
		}
		want := m.elements()
		m.kill()
		m.boot()
		m.has(want, 0)
	})
}

func TestBrokenRuleset(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.install()
		m.fill()
		good, err := os.ReadFile(m.file("etc/nftables.conf"))
		nstest.Must(m, err)
		m.write("etc/nftables.conf", string(good)+"\nno rule\n")

		want := m.login(1)
		m.fails("systemctl", "reload", nftables)
		m.settle()
		m.has(want, 0)

		want = m.login(2)
		m.fails("systemctl", "restart", nftables)
		m.settle()
		m.state(nftables, "failed")
		was := m.snapshot()
		if !strings.Contains(was, "203.0.113.2 ") {
			t.Fatalf("not saved before the restart:\n%s", was)
		}
		m.fails("systemctl", "start", "nftwl-save")
		m.same(was, "a save without sets")
		m.reboot()
		m.state(nftables, "failed")
		m.state("nftwl-save.timer", "inactive")
		m.same(was, "a boot without rules")

		m.write("etc/nftables.conf", string(good))
		m.run("systemctl", "start", nftables)
		m.settle()
		m.has(want, 0)
	})
}

// A snapshot that cannot be restored is not replaced, and nothing else fails because of
// it. Once it can be restored, the next save does so.
func TestCorruptSnapshot(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.install()
		want := m.fill()
		m.powerOff()
		good := m.snapshot()
		bad := good[:len(good)/2]
		m.setSnapshot(bad)
		m.boot()
		m.state(nftables, "active")
		m.state(persist, "active")
		m.state("nftwl-save.service", "failed")
		m.state("nftwl-save.timer", "active")
		m.has(nil, 0)
		if log := m.journal("--unit=nftwl-save"); !strings.Contains(log, "error: /"+snapshotFile) {
			t.Errorf("the journal does not name the cause:\n%s", log)
		}
		m.fails("systemctl", "reload", persist)
		for i, how := range []string{"restart", "reload", "stop"} {
			m.login(1 + i)
			m.run("systemctl", how, nftables)
			m.settle()
			m.same(bad, how)
		}

		// Overwrite it, so that its owner stays.
		m.run("systemctl", "start", nftables)
		m.settle()
		now := m.login(4)
		for key, l := range now {
			want[key] = l
		}
		nstest.Must(m, os.WriteFile(m.file(snapshotFile), []byte(good), 0))
		m.run("systemctl", "start", "nftwl-save")
		m.has(want, 0)
	})
}

func TestNotInUse(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.run("nft", "-f", "/etc/nftwl/sets.nft")
		want := m.fill()
		m.run("systemctl", "enable", "nftwl-persist")
		m.fails("systemctl", "start", "nftwl-persist")
		m.settle()
		m.has(want, 0)
		m.state(nftables, "inactive")
		m.state("nftwl-save.timer", "inactive")
		m.reboot()
		m.state(nftables, "inactive")
		m.state("nftwl-persist.service", "inactive")
		m.state("nftwl-save.timer", "inactive")
		if rules := m.run("nft", "list", "ruleset"); rules != "" {
			t.Errorf("there is a ruleset:\n%s", rules)
		}
	})
}

// The units do not notice what an administrator does by hand.
func TestByHand(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.install()
		want := m.fill()
		m.run("nftwl", "save")
		for _, commands := range []string{
			"systemctl start nftwl-save",
			"nftwl save",
			"nftwl restore",
			"systemctl reload nftwl-persist",
			"systemctl restart nftwl-persist",
			"systemctl stop nftwl-persist; systemctl start nftwl-persist",
			"systemctl reload nftables",
			"systemctl restart nftables",
			"systemctl stop nftwl-persist; systemctl reload nftables; systemctl start nftwl-persist",
			"systemctl stop nftwl-persist; systemctl restart nftables",
			// The README's first and fourth step, done a second time.
			"systemctl stop nftables; systemctl enable --now nftables; systemctl reload nftables",
		} {
			m.run("nft", "-f", "/etc/nftables.conf")
			m.has(nil, 0)
			for command := range strings.SplitSeq(commands, "; ") {
				m.run("sh", "-c", command)
			}
			m.settle()
			if diffs := m.diff(want, 0, slack); len(diffs) > 0 {
				t.Fatalf("nft -f; %s: %s", commands, diffs[0])
			}
			m.state(persist, "active")
			m.state("nftwl-save.timer", "active")
		}
	})
}

// A gate is a step of a unit that waits until the test opens it.
func (m *machine) gate(unit, step, name string) {
	m.Helper()
	m.write("etc/systemd/system/"+unit+".d/"+name+".conf", fmt.Sprintf(
		"[Service]\n%s=/bin/sh -c 'until [ -e /run/%s ]; do sleep .01; done'\n", step, name))
	m.run("systemctl", "daemon-reload")
}

func (m *machine) open(name string) { m.write("run/"+name, "") }

// flushed waits until all sets exist and are empty. While the kernel replaces them, some
// can be missing.
func (m *machine) flushed() {
	m.Helper()
	nstest.Until(m, "the sets are flushed", func() error {
		out, err := m.try("nftwl", "list", "--json")
		if err == nil && strings.TrimSpace(out) != "[]" {
			err = errors.New(out)
		}
		return err
	})
}

// waits waits until a unit's job waits for other jobs.
func (m *machine) waits(unit string) {
	m.Helper()
	nstest.Until(m, unit+" waits", func() error {
		out, err := m.try("systemctl", "list-jobs", "--no-legend", "--plain")
		for _, line := range lines(out) {
			if f := strings.Fields(line); len(f) == 4 && f[1] == unit && f[3] == "waiting" {
				return err
			}
		}
		return fmt.Errorf("%v%s", err, out)
	})
}

// A save between the flush and the restore restores the sets itself. The timer's save waits
// for the units.
func TestSaveAfterFlush(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.install()
		want := m.fill()
		m.gate(nftables, "ExecReload", "reloaded")
		m.run("systemctl", "reload", "--no-block", nftables)
		m.flushed()
		m.run("systemctl", "start", "--no-block", "nftwl-save")
		m.waits("nftwl-save.service")
		m.run("nftwl", "save")
		m.has(want, 0)
		m.open("reloaded")
		m.settle()
		m.has(want, 0)
	})
}
