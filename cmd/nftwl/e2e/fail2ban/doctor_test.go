package fail2ban

import (
	"os"
	"regexp"
	"testing"

	"nftwl/pkg/nstest"
)

// diagnoses checks what nftwl doctor reports of fail2ban: one finding, which a
// regular expression describes.
func (m *machine) diagnoses(want string) {
	m.Helper()
	got := nstest.Diagnosis(m, nstest.Findings(m, m.Command("nftwl", "doctor", "--json"), "fail2ban"))
	if !regexp.MustCompile("^(?:"+want+")").MatchString(got["fail2ban"]) || len(got) != 1 {
		m.Errorf("%q, want %q", got, want)
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
`})
		m.diagnoses("warn: jails do not ban through nftwl, .*: postfix [(]action [^()]+[)]$")

		// It looks at the server, which does not yet know what the files say.
		m.run("fail2ban-client", "stop", "postfix")
		m.diagnoses("ok: jails ban through nftwl: cyrus-imap, dovecot, dovecot-auth, postfix-lost, postfix-sasl, postfix-spam$")
		m.run("fail2ban-client", "set", "dovecot", "delaction", "nftwl")
		m.diagnoses("warn: .*: dovecot [(]action [)]$")

		for _, jail := range []string{"dovecot", "dovecot-auth", "cyrus-imap", "postfix-sasl", "postfix-lost", "postfix-spam"} {
			m.run("fail2ban-client", "stop", jail)
		}
		m.diagnoses("skip: no jail bans through nftwl")

		// doctor has asked for nothing that fail2ban complains about.
		m.stop()
		m.diagnoses("fail: fail2ban does not answer")
	})
}

// If one of nftwl's files is missing, fail2ban does not start.
func TestDoctorMissingFile(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{})
		const broken = "fail: fail2ban will not start again, and then nobody is banned for wrong passwords: "
		for name, why := range map[string]string{
			"action.d/nftwl.conf":         "Found no accessible config files for 'action.d/nftwl'",
			"filter.d/nftwl-postfix.conf": "Found no accessible config files for 'filter.d/nftwl-postfix'",
			"jail.d/nftwl.conf":           "Found no accessible config files for 'filter.d/",
		} {
			m.without("etc/fail2ban/"+name, func() { m.diagnoses(broken + why) })
		}
		m.write("etc/fail2ban/jail.d/own.local", "[sshd]\nenabled = true\nbackend = auto\nlogpath = /none\n")
		m.diagnoses(broken + "Failed during configuration: Have not found any log file for sshd jail")
		nstest.Must(m, os.Remove(m.Path("etc/fail2ban/jail.d/own.local")))
		m.diagnoses("ok: ")
		m.stop()
		m.without("etc/fail2ban/action.d/nftwl.conf", func() { m.diagnoses(broken) })
	})
}
