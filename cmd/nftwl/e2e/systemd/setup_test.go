package systemd

import (
	"slices"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// debian is what Debian installs as /etc/nftables.conf.
const debian = flushed + `table inet filter {
	chain input {
		type filter hook input priority filter;
	}
	chain forward {
		type filter hook forward priority filter;
	}
	chain output {
		type filter hook output priority filter;
	}
}
`

// What setup prints is enough to install each part, and to remove it again.
func TestSetupNextAndUndo(t *testing.T) {
	eachWay(t, func(t *testing.T, b nstest.Debian, source bool) {
		m := newUninstalled(t, b)
		m.write("etc/nftables.conf", debian)
		if source {
			m.inSources("make build && install -m 755 build/nftwld build/nftwl /usr/bin")
		} else {
			m.run("dpkg", "--install", "/root/new.deb")
		}
		m.write("etc/nftwl.yaml", "policy: {}\nfailures: {}\n") // as setup policy tells you
		before := m.etc()
		var undo []string
		for _, part := range []string{"nftables", "systemd", "dovecot", "policy"} {
			out := m.run("nftwl", "setup", part, "--write")
			m.next(out)
			_, back, _ := strings.Cut(out, "\nTo undo it:\n")
			undo = append(undo, back)
		}
		m.logsIn(1)
		m.trusts(1)
		m.learns(2)
		for _, commands := range slices.Backward(undo) {
			m.shell(commands)
			m.settle()
		}
		m.logsIn(3)
		for path, text := range m.etc() {
			if before[path] != text && path != "nftables.conf" && !strings.HasPrefix(path, enabled) {
				t.Errorf("/etc/%s is left behind, or changed", path)
			}
		}
		if rules := m.run("nft", "list", "ruleset"); strings.Contains(rules, "nftwl") || !strings.Contains(rules, "587") {
			t.Errorf("the rules are\n%s", rules)
		}
	})
}

// next runs the next steps that setup prints. Before the last of them, doctor can still
// fail.
func (m *machine) next(out string) {
	m.Helper()
	_, next, _ := strings.Cut(out, "\nNext:\n")
	next, _, _ = strings.Cut(next, "\nTo undo it:\n")
	m.shell(strings.ReplaceAll(next, "  nftwl doctor\n", "  nftwl doctor || :\n"))
	m.settle()
}
