package e2e

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// doctor runs `nftwl doctor` where Dovecot runs. It returns its checks of policy
// and of Dovecot, as "status: text" by name.
func (s *server) doctor() map[string]string {
	s.t.Helper()
	findings := nstest.Findings(s.t, s.d.Command(dir+"/nftwl", "--config", dir+"/nftwl.yaml", "doctor", "--json"), "policy", "dovecot")
	if out := fmt.Sprint(findings); strings.Contains(out, key) || strings.Contains(out, strings.ToUpper(key)) {
		s.t.Errorf("the key is in %s", out)
	}
	return nstest.Diagnosis(s.t, findings)
}

func (s *server) diagnoses(what string, want map[string]string) {
	s.t.Helper()
	got := s.doctor()
	for check, text := range got {
		if strings.HasPrefix(check, "policy.") && want[check] == "" {
			s.t.Errorf("%s: %s is %q, and should not be there", what, check, text)
		}
	}
	for check, text := range want {
		if text != "" && !regexp.MustCompile("^(?:"+text+")").MatchString(got[check]) {
			s.t.Errorf("%s: %s is %q, want %q", what, check, got[check], text)
		}
	}
}

// doctor notices each way in which Dovecot, nftwld and the key can disagree.
func TestDoctor(t *testing.T) {
	t.Parallel()
	healthy := map[string]string{
		"dovecot.protocols": "skip: logins by imap, pop3 run no nftwl; policy.dovecot tells",
		"policy.service":    "skip: systemd does not run here",
		"policy.dovecot":    "ok: ",
		"policy.key":        "ok: ",
	}
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{})
		nstest.Must(t, unix.Mount(dir+"/dovecot.conf", filepath.Join(d.Root, "etc/dovecot/dovecot.conf"), "", unix.MS_BIND, ""))
		// A bind mount, because a fork elsewhere could keep a copy open, and executing
		// it would fail ("text file busy").
		s.write("nftwl", "", 0o755)
		nstest.Must(t, unix.Mount(nstest.Build(t, "cmd/nftwl"), filepath.Join(d.Root, dir, "nftwl"), "", unix.MS_BIND, ""))
		dropIn, conf := s.read("91-nftwl-policy.conf"), s.read("nftwl.yaml")
		diagnoses := func(what string, change map[string]string) {
			t.Helper()
			want := maps.Clone(healthy)
			maps.Copy(want, change)
			s.diagnoses(what, want)
		}
		nstest.Must(t, login("192.0.2.7", "alice", password))
		nstest.Poll(t, "the trust", func() bool { return s.metric(`nftwl_trusted_total{outcome="added"}`) == "1" })
		before := s.get("/metrics")
		diagnoses("healthy", nil)
		if changed := regexp.MustCompile(`(?m)^nftwl_(reports|trusted|ignored|failures|banned|refused|errors|last).*$`); strings.Join(changed.FindAllString(before, -1), "\n") != strings.Join(changed.FindAllString(s.get("/metrics"), -1), "\n") {
			t.Error("doctor changes nftwld's counters")
		}

		without := func(name string) func(string) string {
			return func(text string) string {
				return regexp.MustCompile(`(?m)(^  | )`+name+` ?= ?[^\n]*?\}[^\n ]*(\n| )`).ReplaceAllString(text, "$2")
			}
		}
		set := func(line string) func(string) string {
			return func(text string) string { return text + line + "\n" }
		}
		for _, c := range []struct {
			name string
			edit func(string) string // of the drop-in
			want map[string]string
		}{
			{"no drop-in", func(string) string { return "" }, map[string]string{
				"policy.dovecot": "fail: .*auth_policy_server_url"}},
			{"another port", set("auth_policy_server_url = http://127.0.0.1:8084/"), map[string]string{
				"policy.dovecot": "fail: .*http://127.0.0.1:8084/"}},
			{"another path", set("auth_policy_server_url = http://127.0.0.1:8085/policy"), map[string]string{"policy.dovecot": "fail: .*http://127.0.0.1:8085/policy"}},
			{"TLS", set("auth_policy_server_url = https://127.0.0.1:8085/"), map[string]string{"policy.dovecot": "fail: .*https://127.0.0.1:8085/"}},
			{"by name", set("auth_policy_server_url = http://localhost:8085"), nil},
			{"no reports", set("auth_policy_report_after_auth = no"), map[string]string{"policy.dovecot": "fail: Dovecot reports no logins: auth_policy_report_after_auth is no"}},
			{"checks", set("auth_policy_check_before_auth = yes"), map[string]string{"policy.dovecot": "warn: each login waits"}},
			{"checks behind a proxy", set("auth_policy_check_before_auth = yes\nhaproxy_trusted_networks = 192.0.2.99"), nil},
			{"no nonce", set("auth_policy_hash_nonce ="), map[string]string{"policy.dovecot": "fail: .*auth_policy_hash_nonce is not set"}},
			{"no proxy", without("proxy"), map[string]string{"policy.dovecot": "fail: Dovecot's reports lack proxy$"}},
			{"another key", func(text string) string { return strings.Replace(text, key, strings.ToUpper(key), 1) }, map[string]string{
				"policy.dovecot": "fail: nftwld refuses the key of Dovecot's reports"}},
			{"no key", set("auth_policy_server_api_header ="), map[string]string{"policy.dovecot": "fail: nftwld refuses the key of Dovecot's reports"}},
		} {
			s.write("91-nftwl-policy.conf", c.edit(dropIn), 0o600)
			diagnoses(c.name, c.want)
		}
		s.write("91-nftwl-policy.conf", dropIn, 0o600)

		nstest.Must(t, os.Chmod(dir+"/policy.key", 0o644))
		diagnoses("readable key", map[string]string{"policy.key": "fail: .*policy.key .*0644"})
		nstest.Must(t, os.Chmod(dir+"/policy.key", 0o600))

		nstest.Must(t, os.Rename(dir+"/policy.key", dir+"/moved"))
		diagnoses("missing key", map[string]string{"policy.key": "fail: .*no such file"})
		nstest.Must(t, os.Rename(dir+"/moved", dir+"/policy.key"))

		s.write("nftwl.yaml", "", 0o644)
		diagnoses("no policy in the configuration", map[string]string{"dovecot.protocols": "fail: no mail protocol runs nftwl", "policy.service": "",
			"policy.dovecot": "(fail: Dovecot reports to .* and the configuration has no policy|$)", "policy.key": ""})
		s.write("nftwl.yaml", "timeout: 1d\n", 0o644)
		diagnoses("no policy in the configuration", map[string]string{"dovecot.protocols": "fail: no mail protocol runs nftwl", "policy.service": "",
			"policy.dovecot": "fail: Dovecot reports to .* and the configuration has no policy", "policy.key": ""})
		s.write("nftwl.yaml", conf, 0o644)

		s.write("nftwl.yaml", "timeout: 1d\n", 0o644)
		s.write("91-nftwl-policy.conf", without("nftwl_trust")(dropIn), 0o600)
		diagnoses("another's policy server", map[string]string{"dovecot.protocols": "fail: no mail protocol runs nftwl", "policy.service": "",
			"policy.dovecot": "", "policy.key": ""})
		s.write("91-nftwl-policy.conf", dropIn, 0o600)
		s.write("nftwl.yaml", conf, 0o644)

		other := strings.ToUpper(key)
		s.write("policy.key", other+"\n", 0o600)
		s.write("91-nftwl-policy.conf", strings.Replace(dropIn, key, other, 1), 0o600)
		diagnoses("the key has changed since", map[string]string{"policy.dovecot": "fail: nftwld refuses the key of Dovecot's reports"})
		s.write("policy.key", key+"\n", 0o600)
		s.write("91-nftwl-policy.conf", dropIn, 0o600)

		s.stopNftwld(syscall.SIGTERM)
		diagnoses("nftwld is gone", map[string]string{"policy.dovecot": "fail: Dovecot reports to http://127.0.0.1:8085/, where nobody answers; .*connection refused"})
	})
}
