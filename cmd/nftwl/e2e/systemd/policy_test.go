package systemd

import (
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// The doctor looks at nftwld's units and its key.
func TestDoctorPolicy(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.only()
		m.nftwld()
		quiet := map[string]string{
			"policy.dovecot": "skip: Dovecot's settings cannot be read",
		}
		with := func(check, text string) map[string]string {
			all := map[string]string{check: text}
			for k, v := range quiet {
				if all[k] == "" {
					all[k] = v
				}
			}
			return all
		}
		m.diagnoses("nobody has logged in", "policy", quiet)
		for _, f := range []struct{ name, make, fix, check, text string }{
			{"not enabled", "systemctl disable nftwld", "systemctl enable nftwld", "policy.service", "fail: nftwld.socket is not enabled"},
			{"the service is stopped", "systemctl stop nftwld.service", "systemctl start nftwld", "policy.service", "fail: nftwld.service is inactive"},
		} {
			m.commands(f.make)()
			m.diagnoses(f.name, "policy", with(f.check, f.text))
			m.commands(f.fix)()
			m.settle()
		}
		// One cause makes one finding, and its remedy works as it is written.
		m.run("systemctl", "stop", "nftwld.socket", "nftwld.service")
		got, commands := m.doctor("policy"), m.remedies("policy")
		if !strings.HasPrefix(got["policy.service"], "fail: nftwld.socket is inactive") {
			t.Errorf("stopped: %q", got)
		}
		m.run("sh", "-euc", commands["policy.service"])
		m.settle()
		m.run("chmod", "644", "/etc/nftwl/policy.key")
		m.diagnoses("a key for all", "policy", with("policy.key", "fail: /etc/nftwl/policy.key belongs to user 0, with mode 0644"))
		m.run("chmod", "600", "/etc/nftwl/policy.key")
	})
}
