package systemd

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// The commands of the README and of docs, run as they are written, on a machine that
// was installed as the README says. TestDocsBlocksRun of cmd/nftwl finds commands that
// no test runs.
func TestDocsCommands(t *testing.T) {
	eachWay(t, func(t *testing.T, b nstest.Debian, source bool) {
		m := newUninstalled(t, b)
		m.installs(source)
		m.settle()
		shows := func(out string, words ...string) {
			t.Helper()
			for _, w := range words {
				if !strings.Contains(out, w) {
					t.Errorf("%q is not in\n%s", w, out)
				}
			}
		}

		for _, b := range nstest.Blocks(t, "docs/operation.md", "Monitoring") {
			switch {
			case b.Language == "sh":
				shows(m.shell(b.Text), "192.0.2.1")
			case strings.Contains(b.Text, "root nftwl doctor |"):
				_, command, _ := strings.Cut(b.Text, " root ")
				if out, err := m.try("sh", "-c", command); out != "" || err == nil {
					t.Errorf("%s: %v, %s", command, err, out)
				}
			}
		}
		m.run("nft", "delete", "table", "inet", "filter")
		m.logsIn(1)
		m.run("systemctl", "reload", "nftables")
		m.settle()
		m.run("nftwl", "add", "192.0.2.7")
		for _, b := range nstest.Blocks(t, "README.md", "See that it works") {
			shows(m.shell(b.Text), "192.0.2.7", "nftwl: trusted IPv4", client(1)+" is not trusted: table inet filter does not exist")
		}

		for _, b := range nstest.Blocks(t, "docs/roaming.md", "Roaming clients, shared addresses") {
			m.shell(b.Text)
			shows(m.run("nftwl", "list", "trusted"), "permanent  office printer")
		}

		for _, command := range []string{
			"nftwl ban 192.0.2.7; nftwl list banned",
			"nftwl unban 192.0.2.7 && systemctl start nftwl-save",
			"nftwl list trusted",
			"nftwl list banned",
			"nft -c -f /etc/nftables.conf",
			"doveadm log errors",
			"systemd-analyze security nftwl-save",
			"nftwl setup fail2ban --write",
		} {
			m.shell(command)
		}
		if source {
			for _, b := range nstest.Blocks(t, "docs/operation.md", "Upgrading") {
				m.inSources(b.Text)
			}
		} else {
			// Only standalone.nft is not in use.
			shows(m.shell("diff -r /usr/share/nftwl/nftables /etc/nftwl || test $? = 1"), "Only in /usr/share/nftwl/nftables: standalone.nft\n")
			m.run("dpkg", "--install", "/root/old.deb")
			m.shell("apt install ./nftwl_*_amd64.deb")
		}
		m.logsIn(2)
		m.trusts(2)
	})
}

// Dovecot without root, and Dovecot without the capability.
func TestDocsPrivileges(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newUninstalled(t, b)
		m.installs(false)
		m.settle()
		blocks := nstest.Blocks(t, "docs/privileges.md", "`nftwl login`")

		const unit = "etc/systemd/system/dovecot.service.d/10-test.conf"
		m.write(unit, "[Service]\nCapabilityBoundingSet=~CAP_NET_ADMIN\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n")
		m.run("sh", "-euc", "systemctl daemon-reload; systemctl restart dovecot")
		m.logsIn(1)
		if _, err := m.try("nftwl", "check", "-q", client(1)); err == nil {
			t.Error("a login is trusted without the capability")
		}
		m.shell(blocks[1].Text)
		m.learns(1)

		m.shell(blocks[0].Text)
		text, err := os.ReadFile(filepath.Join(nstest.Root(t), "docs/privileges.md"))
		nstest.Must(m, err)
		words := strings.Join(strings.Fields(string(text)), " ")
		const user, executable = "user = nftwl-login", "executable = script-login /usr/local/sbin/nftwl login"
		if !strings.Contains(words, "`"+user+"` and `"+executable+"`") {
			t.Errorf("the document lacks the settings %s and %s", user, executable)
		}
		m.run("sed", "-i", "-e", "s,user = root,"+user+",", "-e", "s,executable = script-login .*,"+executable+",", "/etc/dovecot/conf.d/90-nftwl.conf")
		m.run("doveadm", "reload")
		nstest.Until(m, "nftwl runs as another user", func() error {
			m.logsIn(2)
			if out := m.run("doveconf", "-n"); !strings.Contains(out, user) {
				return errors.New(out)
			}
			_, err := m.try("nftwl", "check", "-q", client(2))
			return err
		})
	})
}

// From a plain fail2ban to one that bans through nftwl, and back.
func TestDocsFail2ban(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newUninstalled(t, b)
		if !m.exists("usr/bin/fail2ban-client") {
			nstest.Skip(t, "no fail2ban on %s", b.Release)
		}
		m.installs(false)
		m.settle()
		// fail2ban reads files here, and there is no log of sshd.
		m.write("etc/fail2ban/jail.d/defaults-debian.conf", "")
		m.write("etc/fail2ban/jail.local", "[DEFAULT]\npostfix_backend = polling\ndovecot_backend = polling\nbackend = polling\n")
		m.write("var/log/mail.log", "")
		shell := func(blocks []nstest.Block) (out string) {
			m.Helper()
			for _, b := range blocks {
				if b.Language == "sh" {
					out += m.shell(b.Text)
				}
			}
			return out
		}
		answers := func() {
			m.Helper()
			nstest.Until(m, "fail2ban answers", func() error {
				_, err := m.try("fail2ban-client", "ping")
				return err
			})
		}
		shell(nstest.Blocks(t, "docs/fail2ban.md", "With fail2ban"))
		answers()
		m.run("fail2ban-client", "set", "dovecot", "banip", "198.51.100.66")
		nstest.Until(m, "fail2ban bans", func() error {
			_, err := m.try("nftwl", "check", "-q", "--banned", "--port", "143", "198.51.100.66")
			return err
		})
		if out := shell(nstest.Blocks(t, "docs/fail2ban.md", "Seeing and ending bans")); !strings.Contains(out, "198.51.100.66  110,143") {
			t.Errorf("the ban is not in\n%s", out)
		}
		nstest.Until(m, "the ban ends", func() error {
			if _, err := m.try("nftwl", "check", "-q", "--banned", "--port", "143", "198.51.100.66"); err == nil {
				return errors.New("not yet")
			}
			return nil
		})
		shell(nstest.Blocks(t, "docs/fail2ban.md", "Undo"))
		answers()
		if out := m.run("fail2ban-client", "status"); strings.Contains(out, "postfix-lost") {
			t.Errorf("nftwl's jails still exist: %s", out)
		}
	})
}
