package fail2ban

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// doctor returns the status and the text of what nftwl doctor says of fail2ban.
func (m *machine) doctor() map[string]string {
	m.Helper()
	return nstest.Diagnosis(m, nstest.Findings(m, m.Command("nftwl", "doctor", "--json"), "fail2ban"))
}

// diagnoses checks that nftwl doctor says so of fail2ban, and nothing else.
func (m *machine) diagnoses(want map[string]string) {
	m.Helper()
	got := m.doctor()
	for check, text := range want {
		if !strings.HasPrefix(got[check], text) {
			m.Errorf("%s is %q, and should be %q", check, got[check], text)
		}
		delete(got, check)
	}
	for _, check := range slices.Sorted(maps.Keys(got)) {
		m.Errorf("%s is %q, and should not be there", check, got[check])
	}
}

func TestDoctor(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{jails: `
[sshd]
enabled = true
backend = auto
[postfix]
enabled = true
[dovecot-auth]
ignorecommand =
[cyrus-imap]
action = nftwl[nftwl=/usr/local/bin/nftwl, port="%(port)s"]
`})
		ours := map[string]string{
			"fail2ban.postfix-sasl": "ok: ",
			"fail2ban.postfix-lost": "ok: ",
			"fail2ban.postfix-spam": "ok: ",
			"fail2ban.dovecot":      "ok: jail dovecot bans by nftwl, and no trusted address",
		}
		broken := maps.Clone(ours)
		maps.Copy(broken, map[string]string{
			"fail2ban.postfix":      "warn: jail postfix has action ",
			"fail2ban.dovecot-auth": "warn: jail dovecot-auth has no ignorecommand",
			"fail2ban.cyrus-imap":   "fail: jail cyrus-imap runs /usr/local/bin/nftwl, which cannot be run",
		})
		m.diagnoses(broken)

		// It looks at the server, which does not yet know what the files say.
		for _, jail := range []string{"postfix", "dovecot-auth", "cyrus-imap"} {
			m.run("fail2ban-client", "stop", jail)
		}
		m.diagnoses(ours)
		m.run("fail2ban-client", "set", "dovecot", "delaction", "nftwl")
		m.run("fail2ban-client", "set", "postfix-sasl", "ignorecommand", "/bin/false <ip>")
		ours["fail2ban.dovecot"] = "warn: jail dovecot has no action, and not nftwl"
		ours["fail2ban.postfix-sasl"] = "warn: jail postfix-sasl has no ignorecommand that asks nftwl"
		m.diagnoses(ours)

		for _, jail := range []string{"dovecot", "postfix-sasl", "postfix-lost", "postfix-spam"} {
			m.run("fail2ban-client", "stop", jail)
		}
		m.diagnoses(map[string]string{"fail2ban": "skip: fail2ban runs, and has no jail for mail"})

		// It has asked for nothing that fail2ban complains of.
		m.stop()
		m.diagnoses(map[string]string{"fail2ban": "warn: fail2ban does not answer"})
	})
}

// A file of nftwl's that is gone keeps fail2ban from starting.
func TestDoctorMissingFile(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{})
		healthy := m.doctor()
		for name, why := range map[string]string{
			"action.d/nftwl.conf":         "Found no accessible config files for 'action.d/nftwl'",
			"filter.d/nftwl-postfix.conf": "Found no accessible config files for 'filter.d/nftwl-postfix'",
			"jail.d/nftwl.conf":           "Found no accessible config files for 'filter.d/",
		} {
			m.without("etc/fail2ban/"+name, func() {
				running := maps.Clone(healthy)
				running["fail2ban"] = "warn: fail2ban runs, but will not start again: " + why
				m.diagnoses(running)
			})
		}
		m.write("etc/fail2ban/jail.d/own.local", "[sshd]\nenabled = true\nbackend = auto\nlogpath = /none\n")
		running := maps.Clone(healthy)
		running["fail2ban"] = "warn: fail2ban runs, but will not start again: Failed during configuration: Have not found any log file for sshd jail"
		m.diagnoses(running)
		nstest.Must(m, os.Remove(m.Path("etc/fail2ban/jail.d/own.local")))
		m.diagnoses(healthy)
		m.stop()
		m.without("etc/fail2ban/action.d/nftwl.conf", func() {
			m.diagnoses(map[string]string{"fail2ban": "fail: fail2ban does not start, so nobody is banned for wrong passwords: Found no accessible config files for 'action.d/nftwl'"})
		})
	})
}
