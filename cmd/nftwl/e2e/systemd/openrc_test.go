package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// The parts of Alpine's service that change the ruleset.
const openrcNftables = `#!/sbin/openrc-run
extra_started_commands="reload"

start_pre() {
	nft list tables >/dev/null
}

start() {
	ebegin "Loading nftables state and starting firewall"
	nft -f /etc/nftables.conf
	eend $?
}

reload() {
	start
}

stop() {
	ebegin "Stopping firewall"
	nft flush ruleset
	eend $?
}
`

// newOpenRC returns a machine on which the real OpenRC runs the services. PID 1 is still
// systemd, as on a Debian where OpenRC is only installed, but it does not matter here.
func newOpenRC(t *testing.T) *machine {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	tree := filepath.Join(cache, "nftwl", "openrc")
	if _, err := os.Stat(filepath.Join(tree, "usr/sbin/openrc")); err != nil {
		nstest.Skip(t, "no OpenRC at %s: run cmd/nftwl/e2e/systemd/testdata/openrc.sh", tree)
	}
	nstest.Need(t, "nft", "nftables")
	// A copy, because overlayfs cannot put a part of a tree above that tree.
	layer := filepath.Join(t.TempDir(), "openrc")
	if out, err := exec.Command("cp", "-a", tree, layer).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	m := newMachine(t, nstest.Debian{Release: "openrc", Root: layer + ":/"})
	m.write(openrcConf, nstest.Contrib(t, "openrc/nftwl.conf"))
	m.write("etc/init.d/nftables", openrcNftables)
	nstest.Must(m, os.Chmod(m.file("etc/init.d/nftables"), 0o755))
	for _, level := range []string{"default", "shutdown"} {
		nstest.Must(m, os.MkdirAll(m.file("etc/runlevels/"+level), 0o755))
	}
	m.run("rc-update", "add", "nftables", "default")
	m.up()
	return m
}

const openrcConf = "etc/rc.conf.d/nftwl.conf"

// cron returns the command that nftwl.conf tells crond to run each minute.
func (m *machine) cron() string {
	m.Helper()
	text, err := os.ReadFile(m.file(openrcConf))
	nstest.Must(m, err)
	_, rest, ok := strings.Cut(string(text), "\n#   * * * * * ")
	command, _, _ := strings.Cut(rest, "\n")
	if !ok || command == "" {
		m.Fatalf("no line for cron:\n%s", text)
	}
	return command
}

// up enters the runlevel default, as OpenRC does at the end of a boot.
func (m *machine) up() {
	m.Helper()
	m.write("run/openrc/softlevel", "")
	m.run("openrc", "default")
}

func TestOpenRC(t *testing.T) {
	t.Parallel()
	m := newOpenRC(t)
	m.run("rc-service", "nftables", "status")
	m.has(nil, 0)
	m.fill()

	want := m.login(1)
	m.run("rc-service", "nftables", "stop")
	if rules := m.run("nft", "list", "ruleset"); rules != "" {
		t.Fatalf("nftables is stopped, and the ruleset is\n%s", rules)
	}
	m.run("rc-service", "nftables", "start")
	m.has(want, 0)
	for i, how := range []string{"restart", "reload", "restart", "reload"} {
		want = m.login(2 + i)
		m.run("rc-service", "nftables", how)
		m.has(want, 0)
	}

	want = m.login(6)
	m.run("openrc", "shutdown")
	m.kill()
	m.boot()
	m.up()
	m.has(want, 0)

	want = m.login(7)
	m.run("sh", "-c", m.cron())
	m.kill()
	m.boot()
	m.up()
	m.has(want, 0)

	want = m.login(8)
	good, err := os.ReadFile(m.file("etc/nftables.conf"))
	nstest.Must(m, err)
	m.write("etc/nftables.conf", string(good)+"\nno rule\n")
	m.fails("rc-service", "nftables", "reload")
	m.has(want, 0)
	m.fails("rc-service", "nftables", "restart")
	m.fails("sh", "-c", m.cron())
	m.write("etc/nftables.conf", string(good))
	m.run("rc-service", "nftables", "start")
	m.has(want, 0)
}

// A snapshot that no longer fits the sets is kept.
func TestOpenRCOtherSets(t *testing.T) {
	t.Parallel()
	m := newOpenRC(t)
	m.fill()
	sets, err := os.ReadFile(m.file("etc/nftwl/sets.nft"))
	nstest.Must(m, err)
	m.write("etc/nftables.conf", "flush ruleset\n"+strings.ReplaceAll(string(sets), " . inet_service", ""))
	if out := m.run("rc-service", "nftables", "reload"); !strings.Contains(out, "not restored") {
		t.Errorf("a snapshot of other sets: %s", out)
	}
	was := m.snapshot()
	m.login(1)
	m.fails("sh", "-c", m.cron())
	m.run("rc-service", "nftables", "stop")
	m.same(was, "a save and a stop")
}

func TestOpenRCCorruptSnapshot(t *testing.T) {
	t.Parallel()
	m := newOpenRC(t)
	m.fill()
	m.run("rc-service", "nftables", "stop")
	bad := m.snapshot()
	bad = bad[:len(bad)/2]
	nstest.Must(m, os.WriteFile(m.file(snapshotFile), []byte(bad), 0o600))
	if out := m.run("rc-service", "nftables", "start"); !strings.Contains(out, "error: /"+snapshotFile) || !strings.Contains(out, "not restored") {
		t.Errorf("a snapshot that is corrupt: %s", out)
	}
	m.run("rc-service", "nftables", "status")
	m.has(nil, 0)
	m.login(1)
	m.fails("sh", "-c", m.cron())
	m.run("rc-service", "nftables", "reload")
	m.run("rc-service", "nftables", "restart")
	m.run("rc-service", "nftables", "stop")
	m.same(bad, "after a save, a reload, a restart and a stop")
}
