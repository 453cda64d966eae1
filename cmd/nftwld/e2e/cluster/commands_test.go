package cluster

import (
	"strings"
	"syscall"
	"testing"

	"nftwl/pkg/nstest"
)

// What nftwl's commands say and do on a machine that shares its sets.
func TestCommands(t *testing.T) {
	l := newLAN(t, nstest.Host, 2)
	l.start()
	a, b := l.nodes[0], l.nodes[1]
	const addr = "198.51.100.7"
	a.login(addr, "alice")
	b.becomes("trusted", addr, true)

	// A flush is of one machine, and the last address of a set is no exception.
	if out := a.nftwl("flush", "trusted"); !strings.Contains(out, "--everywhere") {
		t.Errorf("flush says nothing of the others: %s", out)
	}
	a.becomes("trusted", addr, true)
	if !b.is("trusted", addr) {
		t.Error("a flush has removed elsewhere")
	}
	// Nor does it end the trust that was added before, where a ban of the same
	// address stands.
	a.nftwl("ban", addr)
	b.becomes("banned", addr, true)
	if out := a.nftwl("flush", "--everywhere", "trusted"); out != "" {
		t.Errorf("flush --everywhere says: %s", out)
	}
	for _, n := range l.nodes {
		n.becomes("trusted", addr, false)
		if !n.is("banned", addr) {
			t.Errorf("%s: the ban is gone", n.name)
		}
	}
	b.login(addr, "alice")
	a.becomes("trusted", addr, true)

	// What one tool banned, another's unban leaves alone, on each machine.
	const guesser = "198.51.100.66"
	a.nftwl("ban", "--comment", "postfix-sasl", "--timeout", "1h", guesser)
	b.becomes("banned", guesser, true)
	b.nftwl("ban", "--comment", "by hand", "--timeout", "2d", guesser)
	nstest.Poll(t, "the longer ban everywhere", func() bool { return a.list("banned")[guesser+" 993"].Expires > 86400 })
	a.nftwl("unban", "--comment", "postfix-sasl", guesser)
	l.quiet()
	if !b.is("banned", guesser) {
		t.Error("one tool's unban has ended another's ban elsewhere")
	}
	b.nftwl("unban", guesser)
	a.becomes("banned", guesser, false)
	b.becomes("banned", guesser, false)

	// Without the engine, nothing is emptied.
	l.engine.Signal(syscall.SIGKILL)
	if out, err := a.output("nftwl", "flush", "--everywhere", "trusted"); err == nil || !strings.Contains(out, "nothing was changed here") {
		t.Errorf("flush --everywhere without an engine: %v, %s", err, out)
	}
	if !a.is("trusted", addr) {
		t.Error("it was emptied here")
	}
	l.engine.Start()
	a.connected()

	// Without nftwld, a removal is of one machine.
	if out := b.nftwl("remove", addr); out != "" {
		t.Errorf("remove says: %s", out)
	}
	a.becomes("trusted", addr, false)
	b.login(addr, "alice")
	a.becomes("trusted", addr, true)
	a.stop()
	if out := a.nftwl("remove", addr); !strings.Contains(out, "nftwld is not running") || !strings.Contains(out, "hint: systemctl start nftwld") {
		t.Errorf("remove without nftwld says: %s", out)
	}
	a.start()
	a.becomes("trusted", addr, true)

	nstest.Write(t, a.dir+"/nftwl.yaml", "timeout: 1d\n", 0o600)
	if out, err := a.output("nftwl", "flush", "--everywhere", "trusted"); err == nil || !strings.Contains(out, "the configuration has no cluster") {
		t.Errorf("flush --everywhere without a cluster: %v, %s", err, out)
	}
}
