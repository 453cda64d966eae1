package systemd

import (
	"errors"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// Whoever comes by SSH is not locked out by the example, whatever port that is:
// it opens those on which sshd listens, and those that it will have.
func TestSetupSSHPort(t *testing.T) {
	t.Parallel()
	m := newMachine(t, base{"trixie", nstest.Trixie(t)})
	rule := func() string {
		m.Helper()
		m.run("rm", "-rf", "/etc/nftwl", "/etc/nftables.conf")
		out := m.run("nftwl", "setup", "nftables", "--write")
		m.run("cp", "/etc/nftwl/nftables.conf", "/etc/nftables.conf")
		m.run("nft", "-c", "-f", "/etc/nftables.conf")
		for line := range strings.Lines(m.run("cat", "/etc/nftables.conf")) {
			if rule, ok := strings.CutSuffix(strings.TrimSpace(line), ` ct state new counter accept comment "SSH"`); ok {
				if ports := strings.Trim(strings.TrimPrefix(rule, "tcp dport "), "{ }"); !strings.Contains(out, "the ports of SSH ("+ports+")") {
					t.Errorf("it does not name %s:\n%s", ports, out)
				}
				return rule
			}
		}
		t.Fatal("the example has no rule for SSH")
		return ""
	}
	conf := func(text string) { m.write("etc/ssh/sshd_config.d/port.conf", text) }
	listens := func(port string) {
		m.Helper()
		m.run("systemctl", "restart", "ssh")
		m.until("sshd listens on "+port, func() error {
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
		if got := rule(); got != c.want {
			t.Errorf("%s: %s, and not %s", c.does, got, c.want)
		}
	}
}
