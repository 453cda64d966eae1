package e2e

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// doctor returns what `nftwl doctor` says, where Dovecot runs, in checks of
// policy and in dovecot.protocols: "status: text" by name.
func (s *server) doctor() map[string]string {
	s.t.Helper()
	cmd := exec.Command(dir+"/nftwl", "--config", dir+"/nftwl.yaml", "doctor", "--json")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: s.d.root}
	out, err := cmd.Output() // which fails where a check does
	var results []struct{ Check, Status, Text, Remedy, Command string }
	if e := json.Unmarshal(out, &results); e != nil {
		s.t.Fatalf("nftwl doctor: %v, %v\n%s", err, e, out)
	}
	if strings.Contains(string(out), key) || strings.Contains(string(out), strings.ToUpper(key)) {
		s.t.Errorf("the key is in %s", out)
	}
	found := make(map[string]string)
	for _, r := range results {
		if !strings.HasPrefix(r.Check, "policy.") && !strings.HasPrefix(r.Check, "dovecot.") {
			continue
		}
		if found[r.Check] != "" {
			s.t.Errorf("%s is there twice", r.Check)
		}
		if (r.Status == "warn" || r.Status == "fail") != (r.Remedy != "") || strings.Contains(r.Text+r.Remedy, "\n") {
			s.t.Errorf("%+v", r)
		}
		found[r.Check] = r.Status + ": " + r.Text
	}
	return found
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

// Each way in which Dovecot, nftwld and the key can be at odds is found.
func TestDoctor(t *testing.T) {
	t.Parallel()
	healthy := map[string]string{
		"dovecot.protocols": "skip: logins by imap, pop3 run no nftwl; policy.dovecot says",
		"policy.service":    "skip: systemd does not run here",
		"policy.dovecot":    "ok: ",
		"policy.key":        "ok: ",
		"policy.reports":    "ok: 1 reports since nftwld started",
	}
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{})
		must(t, unix.Mount(dir+"/dovecot.conf", filepath.Join(d.root, "etc/dovecot/dovecot.conf"), "", unix.MS_BIND, ""))
		// Not a copy, which a fork elsewhere can keep open: "text file busy".
		s.write("nftwl", "", 0o755)
		must(t, unix.Mount(nstest.Build(t, "cmd/nftwl"), filepath.Join(d.root, dir, "nftwl"), "", unix.MS_BIND, ""))
		dropIn, conf := s.read("91-nftwl-policy.conf"), s.read("nftwl.yaml")
		diagnoses := func(what string, change map[string]string) {
			t.Helper()
			want := maps.Clone(healthy)
			maps.Copy(want, change)
			s.diagnoses(what, want)
		}
		diagnoses("healthy", map[string]string{"policy.reports": "skip: nftwld started .* no report yet"})
		must(t, login("192.0.2.7", "alice", password))
		s.reported(`protocol="imap",result="success"`, "1")
		before := s.get("/metrics")
		diagnoses("healthy", nil)
		if changed := regexp.MustCompile(`(?m)^nftwl_(reports|trusted|ignored|failures|banned|refused|errors|last).*$`); strings.Join(changed.FindAllString(before, -1), "\n") != strings.Join(changed.FindAllString(s.get("/metrics"), -1), "\n") {
			t.Error("the doctor changes what nftwld counts")
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
				"policy.dovecot": "fail: Dovecot reports no logins: auth_policy_server_url is not set"}},
			{"another port", set("auth_policy_server_url = http://127.0.0.1:8084/"), map[string]string{
				"policy.dovecot": "fail: Dovecot reports to http://127.0.0.1:8084/, where nobody answers"}},
			{"another path", set("auth_policy_server_url = http://127.0.0.1:8085/policy"), map[string]string{"policy.dovecot": "fail: Dovecot reports to "}},
			{"TLS", set("auth_policy_server_url = https://127.0.0.1:8085/"), map[string]string{"policy.dovecot": "fail: Dovecot reports to "}},
			{"by name", set("auth_policy_server_url = http://localhost:8085"), nil},
			{"no reports", set("auth_policy_report_after_auth = no"), map[string]string{"policy.dovecot": "fail: .*auth_policy_report_after_auth is no"}},
			{"checks", set("auth_policy_check_before_auth = yes"), map[string]string{"policy.dovecot": "warn: each login waits"}},
			{"checks behind a proxy", set("auth_policy_check_before_auth = yes\nhaproxy_trusted_networks = 192.0.2.99"), nil},
			{"no nonce", set("auth_policy_hash_nonce ="), map[string]string{"policy.dovecot": "fail: .*auth_policy_hash_nonce"}},
			{"no proxy", without("proxy"), map[string]string{"policy.dovecot": "warn: Dovecot's reports lack proxy$"}},
			{"another key", func(text string) string { return strings.Replace(text, key, strings.ToUpper(key), 1) }, map[string]string{
				"policy.dovecot": "fail: Dovecot's reports have another key than "}},
			{"no key", set("auth_policy_server_api_header ="), map[string]string{"policy.dovecot": "fail: Dovecot's reports have another key than "}},
		} {
			s.write("91-nftwl-policy.conf", c.edit(dropIn), 0o600)
			diagnoses(c.name, c.want)
		}
		s.write("91-nftwl-policy.conf", dropIn, 0o600)

		must(t, os.Chmod(dir+"/policy.key", 0o644))
		diagnoses("readable key", map[string]string{"policy.key": "fail: .*policy.key belongs to user 0, with mode 0644"})
		must(t, os.Chmod(dir+"/policy.key", 0o600))

		must(t, os.Rename(dir+"/policy.key", dir+"/moved"))
		diagnoses("missing key", map[string]string{"policy.key": "fail: .*no such file", "policy.dovecot": ""})
		must(t, os.Rename(dir+"/moved", dir+"/policy.key"))

		s.write("nftwl.yaml", "", 0o644)
		diagnoses("no policy in the configuration", map[string]string{"dovecot.protocols": "fail: no mail protocol runs nftwl", "policy.service": "",
			"policy.dovecot": "(fail: Dovecot reports to .* and the configuration has no policy|$)", "policy.key": "", "policy.reports": ""})
		s.write("nftwl.yaml", "timeout: 1d\n", 0o644)
		diagnoses("no policy in the configuration", map[string]string{"dovecot.protocols": "fail: no mail protocol runs nftwl", "policy.service": "",
			"policy.dovecot": "fail: Dovecot reports to .* and the configuration has no policy", "policy.key": "", "policy.reports": ""})
		s.write("nftwl.yaml", conf, 0o644)

		s.write("nftwl.yaml", "timeout: 1d\n", 0o644)
		s.write("91-nftwl-policy.conf", without("nftwl_trust")(dropIn), 0o600)
		diagnoses("another's policy server", map[string]string{"dovecot.protocols": "fail: no mail protocol runs nftwl", "policy.service": "",
			"policy.dovecot": "skip: Dovecot reports to", "policy.key": "", "policy.reports": ""})
		s.write("91-nftwl-policy.conf", dropIn, 0o600)
		s.write("nftwl.yaml", conf, 0o644)

		other := strings.ToUpper(key)
		s.write("policy.key", other+"\n", 0o600)
		s.write("91-nftwl-policy.conf", strings.Replace(dropIn, key, other, 1), 0o600)
		diagnoses("the key has changed since", map[string]string{"policy.dovecot": "fail: nftwld refuses the key"})
		s.write("policy.key", key+"\n", 0o600)
		s.write("91-nftwl-policy.conf", dropIn, 0o600)
		diagnoses("the key has changed since", map[string]string{"policy.reports": "warn: nftwld has refused 1 requests with a wrong key"})

		s.stopNftwld(syscall.SIGTERM)
		gone := map[string]string{"policy.reports": "fail: nftwld does not answer on 127.0.0.1:8085: .*connection refused", "policy.dovecot": ""}
		diagnoses("nftwld is gone", gone)

		s.startNftwld()
		must(t, login("192.0.2.7", "alice", password))
		s.reported(`protocol="imap",result="success"`, "1")
		diagnoses("Postfix", nil)
		s.startPostfix()
		must(t, smtp("192.0.2.7", "587", "alice", password))
		s.reported(`protocol="smtp",result="success"`, "1")
		diagnoses("Postfix", map[string]string{"policy.reports": "ok: 2 reports"})
	})
}
