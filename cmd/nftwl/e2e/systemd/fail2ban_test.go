package systemd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// From a plain fail2ban to nftwl's jails and back, with each command of the document, in
// its order. Dovecot logs wrong passwords where this system's fail2ban reads them: in a
// file or in the journal.
func TestFail2banDocument(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.mail()
		m.install()
		m.withFail2ban()
		text, err := os.ReadFile(filepath.Join(nstest.Root(t), "docs/fail2ban.md"))
		nstest.Must(m, err)
		blocks := regexp.MustCompile("(?s)\n```sh\n(.*?\n)```\n").FindAllStringSubmatch(string(text), -1)
		if len(blocks) != 3 {
			t.Fatalf("the document has %d blocks of commands, want 3: to set up, to end bans and to undo", len(blocks))
		}
		const attacker, port = "198.51.100.66", "143"
		banned := func(address string, want bool) {
			t.Helper()
			nstest.Until(m, fmt.Sprintf("%s is banned: %v", address, want), func() error {
				if _, err := m.try("nftwl", "check", "-q", "--banned", "--port", port, address); (err == nil) != want {
					return errors.New("not yet")
				}
				return nil
			})
		}

		m.run("sh", "-euc", blocks[0][1])
		m.fail2banRuns("postfix-sasl", "postfix-lost", "dovecot")
		for i := range 3 {
			m.guesses(client(7), fmt.Sprint("guess", i))
		}
		banned(client(7), true)

		m.run("fail2ban-client", "set", "dovecot", "banip", attacker)
		banned(attacker, true)
		if out := m.run("sh", "-euc", blocks[1][1]); !strings.Contains(out, attacker) || !strings.Contains(out, client(7)) {
			t.Errorf("the banned address is not in\n%s", out)
		}
		banned(attacker, false)
		banned(client(7), true)

		// The document's prose: ending all bans, and banning a network.
		m.run("fail2ban-client", "unban", "--all")
		banned(client(7), true)
		m.run("nftwl", "flush", "banned")
		banned(client(7), false)
		m.run("fail2ban-client", "set", "dovecot", "banip", "203.0.113.0/24")
		nstest.Until(m, "the error", func() error {
			if log := m.read("var/log/fail2ban.log"); !regexp.MustCompile(`nftwl: error: .*203\.0\.113\.0/24`).MatchString(log) {
				return errors.New(log)
			}
			return nil
		})
		m.fail2banBans("203.0.113.0/24", true)
		m.run("fail2ban-client", "unban", "203.0.113.0/24")
		m.fail2banBans("203.0.113.0/24", false)

		// If another file enables one of our jails, fail2ban runs on unchanged.
		m.write("etc/fail2ban/jail.local", "[dovecot-auth]\nenabled = true\n")
		m.run("systemctl", "restart", "fail2ban")
		m.fail2banRuns("postfix-sasl", "postfix-lost", "dovecot", "dovecot-auth")
		m.fails("sh", "-euc", blocks[2][1]+"fail2ban-client -t")
		m.fail2banRuns("postfix-sasl", "postfix-lost", "dovecot", "dovecot-auth")
		m.run("rm", "/etc/fail2ban/jail.local")

		// The undo as described, with each of our jails enabled.
		m.run("nftwl", "setup", "fail2ban", "--write")
		m.write("etc/fail2ban/jail.d/nftwl.local", "[dovecot]\nenabled = true\n[dovecot-auth]\nenabled = true\n[postfix-lost]\nenabled = true\n[postfix-spam]\nenabled = true\n")
		m.run("systemctl", "restart", "fail2ban")
		m.fail2banRuns("dovecot", "dovecot-auth", "postfix-lost", "postfix-spam")
		m.run("fail2ban-client", "set", "dovecot", "banip", attacker)
		banned(attacker, true)
		m.run("sh", "-euc", blocks[2][1])
		m.fail2banRuns()
		banned(attacker, false)
		if left, _ := filepath.Glob(m.file("etc/fail2ban/*/nftwl*")); len(left) > 0 {
			t.Errorf("not removed: %q", left)
		}
	})
}

// withFail2ban starts fail2ban as its package does, with the logs that it reads.
func (m *machine) withFail2ban() {
	m.Helper()
	if _, err := os.Stat(m.file("usr/bin/fail2ban-server")); err != nil {
		nstest.Skip(m, "fail2ban is not installed: apt-get install fail2ban")
	}
	// rsyslog would create them.
	for _, name := range []string{"auth.log", "mail.log"} {
		m.write("var/log/"+name, "")
	}
	// Debian 13's fail2ban reads the journal, an older one reads a file.
	if !strings.Contains(m.read("etc/fail2ban/paths-debian.conf"), "dovecot_backend = systemd") {
		m.write("etc/dovecot/conf.d/92-log.conf", "log_path = /var/log/mail.log\n")
	}
	nstest.Must(m, os.MkdirAll(m.file("var/lib/fail2ban"), 0o755))
	m.run("systemctl", "enable", "--now", "dovecot", "fail2ban")
	m.fail2banRuns()
}

// fail2banRuns checks that fail2ban has these jails besides sshd's.
func (m *machine) fail2banRuns(jails ...string) {
	m.Helper()
	nstest.Until(m, "fail2ban has its jails", func() error {
		out, err := m.try("fail2ban-client", "status")
		if err != nil {
			return errors.New(out)
		}
		_, list, _ := strings.Cut(out, "Jail list:")
		got := strings.FieldsFunc(list, func(r rune) bool { return strings.ContainsRune(", \t\n", r) })
		want := append([]string{"sshd"}, jails...)
		if len(got) != len(want) {
			return fmt.Errorf("%q, want %q", got, want)
		}
		for _, jail := range want {
			if !strings.Contains(list, jail) {
				return fmt.Errorf("%q, want %q", got, want)
			}
		}
		return nil
	})
	m.state("fail2ban", "active")
}

func (m *machine) fail2banBans(attacker string, want bool) {
	m.Helper()
	nstest.Until(m, fmt.Sprintf("fail2ban lists %s: %v", attacker, want), func() error {
		if out := m.run("fail2ban-client", "status", "dovecot"); strings.Contains(out, attacker) != want {
			return errors.New(out)
		}
		return nil
	})
}

func (m *machine) read(name string) string {
	m.Helper()
	return nstest.Read(m, m.file(name))
}

// guesses tries a wrong password over IMAP, and hangs up.
func (m *machine) guesses(from, password string) {
	m.Helper()
	if err := m.visit(from, nstest.IMAPLogin, password); !errors.Is(err, nstest.ErrDenied) {
		m.Fatalf("a wrong password: %v, want %v", err, nstest.ErrDenied)
	}
}
