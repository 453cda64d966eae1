package systemd

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// The README's other way, as it is written there, after the first; and back.
// Its doctor finds nothing in between.
func TestReadmeOtherWay(t *testing.T) {
	t.Parallel()
	onEach(t, func(t *testing.T, b base) {
		t.Parallel()
		m := newUninstalled(t, b)
		m.must(os.Rename(m.file("root/new.deb"), m.file("root/nftwl_1.2.3_amd64.deb")))
		for _, block := range m.section("Install") {
			switch {
			case block.language == "nft":
				m.write("etc/nftables.conf", flushed+block.text)
			case block.language == "sh" && !strings.Contains(block.text, "nftwl doctor"):
				m.run("sh", "-euc", "cd /root\n"+block.text)
			}
		}
		m.settle()
		for _, block := range m.section("The other way: nftwld") {
			if block.language == "sh" {
				m.run("sh", "-euc", block.text)
			}
		}
		m.run("sh", "-euc", "rm /etc/dovecot/conf.d/90-nftwl* && doveadm reload")
		m.learns(1)
		m.healthy()
		m.diagnoses("the other way", "policy", map[string]string{"policy.reports": "ok: "})

		// Another key, as docs/operation.md says.
		m.run("sh", "-euc", `rm /etc/nftwl/policy.key /etc/dovecot/conf.d/91-nftwl-policy*
			nftwl setup policy --write
			systemctl restart nftwld && doveadm reload`)
		m.learns(2)
		m.healthy()

		m.run("sh", "-euc", "nftwl setup dovecot --write && doveadm reload")
		m.run("sh", "-euc", `rm /etc/dovecot/conf.d/91-nftwl*; doveadm reload; systemctl disable --now nftwld.socket nftwld
			rm /etc/nftwl.yaml`)
		m.learns(3)
		m.healthy()
	})
}

// learns has a client log in, and waits until it is trusted.
func (m *machine) learns(n int) {
	m.Helper()
	m.until(client(n)+" is trusted", func() error {
		// Dovecot may still be reading its configuration: the first login can be by the old one.
		m.logsIn(n)
		if _, err := m.try("nftwl", "check", "-q", client(n)); err != nil {
			return errors.New("it is not")
		}
		return nil
	})
}
