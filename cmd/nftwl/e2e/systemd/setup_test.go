package systemd

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// Whoever comes by SSH is not locked out by the example, whatever port that is:
// setup warns, and its next step opens the ports on which sshd listens, and those
// that it will have. It patches nothing itself.
func TestSetupSSHPort(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nstest.Debian{Release: "trixie", Root: nstest.Trixie(t)})
	rule := func() (rule string, warned bool) {
		m.Helper()
		m.run("rm", "-rf", "/etc/nftwl", "/etc/nftables.conf")
		out := m.run("nftwl", "setup", "nftables", "--write")
		if text := m.run("cat", "/etc/nftwl/nftables.conf"); !strings.Contains(text, "\ttcp dport 22 ct state new ") {
			t.Errorf("the example is\n%s", text)
		}
		next, _, _ := strings.Cut(out, "\nTo undo it:\n")
		for line := range strings.Lines(next) {
			if strings.HasPrefix(line, "  sed ") || strings.HasPrefix(line, "  cp ") {
				m.shell(line)
			}
		}
		m.run("nft", "-c", "-f", "/etc/nftables.conf")
		for line := range strings.Lines(m.run("cat", "/etc/nftables.conf")) {
			if rule, ok := strings.CutSuffix(strings.TrimSpace(line), ` ct state new counter accept comment "SSH"`); ok {
				return rule, strings.Contains(next, "# STOP: sshd uses "+strings.TrimPrefix(rule, "tcp dport "))
			}
		}
		t.Fatalf("no rule for SSH after\n%s", out)
		return "", false
	}
	conf := func(text string) { m.write("etc/ssh/sshd_config.d/port.conf", text) }
	listens := func(port string) {
		m.Helper()
		m.run("systemctl", "restart", "ssh")
		nstest.Until(m, "sshd listens on "+port, func() error {
			if out := m.run("ss", "-Hltnp", "sport = :"+port); !strings.Contains(out, `"sshd"`) {
				return errors.New(out)
			}
			return nil
		})
	}
	for _, c := range []struct {
		does string
		do   func()
		want string
	}{
		{"sshd does not run", func() {}, "tcp dport 22"},
		{"sshd has its default", func() { listens("22") }, "tcp dport 22"},
		{"sshd has another port", func() { conf("Port 2222\n"); listens("2222") }, "tcp dport 2222"},
		{"sshd has not read its configuration", func() { conf("Port 2200\n") }, "tcp dport { 2200, 2222 }"},
	} {
		c.do()
		if got, warned := rule(); got != c.want || warned != (c.want != "tcp dport 22") {
			t.Errorf("%s: %s, and not %s; warned: %v", c.does, got, c.want, warned)
		}
	}
}

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

// What setup prints is enough to install each part, and to be rid of it.
func TestSetupNextAndUndo(t *testing.T) {
	eachWay(t, func(t *testing.T, b nstest.Debian, source bool) {
		m := newUninstalled(t, b)
		m.write("etc/nftables.conf", debian)
		if source {
			m.inSources("make build && install -m 755 build/nftwld build/nftwl /usr/bin")
		} else {
			m.run("dpkg", "--install", "/root/new.deb")
		}
		m.write("etc/nftwl.yaml", "policy: {}\nfailures: {}\n") // as setup policy says
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

// next runs what setup prints as the next steps. Until the last of them doctor
// finds something, and fails.
func (m *machine) next(out string) {
	m.Helper()
	_, next, _ := strings.Cut(out, "\nNext:\n")
	next, _, _ = strings.Cut(next, "\nTo undo it:\n")
	m.shell(strings.ReplaceAll(next, "  nftwl doctor\n", "  nftwl doctor || :\n"))
	m.settle()
}
