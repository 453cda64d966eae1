package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"nftwl/pkg/nstest"
)

// recorder receives reports in place of nftwld.
type recorder struct {
	mu      sync.Mutex
	reports []map[string]any
}

func record(t *testing.T) *recorder {
	t.Helper()
	l, err := net.Listen("tcp", policyAddress)
	nstest.Must(t, err)
	r := new(recorder)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		report := make(map[string]any)
		if err := json.NewDecoder(request.Body).Decode(&report); err != nil {
			t.Error(err)
		}
		report["command"] = request.URL.RawQuery
		r.mu.Lock()
		r.reports = append(r.reports, report)
		r.mu.Unlock()
		fmt.Fprint(w, `{"status":0,"msg":""}`)
	})}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return r
}

// take waits for n reports, and returns all since the last call.
func (r *recorder) take(s *server, n int) (some []map[string]any) {
	s.t.Helper()
	nstest.Poll(s.t, fmt.Sprint(n, " reports"), func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.reports) < n {
			return false
		}
		some, r.reports = r.reports, nil
		return true
	})
	return some
}

// outages has settings with a password database that is down, by name and
// Dovecot's version. Dovecot 2.4 has no checkpassword.
var outages = map[string]struct{ config23, config24 string }{
	"missing passwd-file": {
		"passdb {\n  driver = passwd-file\n  args = " + dir + "/none\n}\n" + static23,
		"passdb passwd-file {\n  passwd_file_path = " + dir + "/none\n}\n" + static24,
	},
	"SQL that is down": {
		"passdb {\n  driver = sql\n  args = " + dir + "/sql.conf\n}\n" + static23,
		"sql_driver = sqlite\nsqlite_path = " + dir + "/none/db\npassdb sql {\n  query = SELECT password FROM users WHERE name = '%{user}'\n}\n" + static24,
	},
	"temporary failure": {
		"passdb {\n  driver = checkpassword\n  args = " + dir + "/check\n}\n" + static23, "",
	},
}

const (
	static23 = "userdb {\n  driver = static\n  args = uid=1000 gid=1000 home=" + dir + "/mail/%u\n}\n"
	static24 = "userdb static {\n  fields {\n    uid = 1000\n    gid = 1000\n    home = " + dir + "/mail/%{user}\n  }\n}\n"
)

// describe returns a report in words, such as "failure credentials B". hashes has
// a letter for each hash that it has seen.
func describe(report map[string]any, hashes map[string]string) string {
	text := "failure"
	if report["success"] == true {
		text = "success"
	}
	if t, _ := report["fail_type"].(string); t != "" {
		text += " " + t
	}
	hash := fmt.Sprint(report["pwhash"])
	if hashes[hash] == "" {
		hashes[hash] = string(rune('A' + len(hashes)))
	}
	return text + " " + hashes[hash]
}

// pkg/policy relies on what Dovecot reports here. Each letter stands for a hash.
func TestReports(t *testing.T) {
	t.Parallel()
	attempts := []struct{ user, password, plain23, plain24, other23, other24 string }{
		{"alice", password, "success A", "success A", "success D", "success D"},
		{"alice", "wrong1", "failure B", "failure credentials B", "failure D", "failure D"},
		{"alice", "wrong1", "failure B", "failure credentials B", "failure D", "failure D"},
		{"alice", "wrong2", "failure C", "failure credentials C", "failure D", "failure D"},
	}
	eachSystem(t, func(t *testing.T, d system) {
		for _, cache := range []string{"0", "1M"} {
			t.Run("auth_cache_size="+cache, func(t *testing.T) {
				s := d.start(t, with{bare: true, dovecot: "auth_cache_size = " + cache + "\nauth_mechanisms = plain login cram-md5 scram-sha-1 scram-sha-256 anonymous\n"})
				r := record(t)
				hashes := make(map[string]string)
				check := func(mech, user, password, want23, want24 string) {
					t.Helper()
					_ = authenticate("192.0.2.7", mech, user, password) // the report has the result
					report := r.take(s, 1)[0]
					want := want24
					if d.is23 {
						want = want23
					}
					if got := describe(report, hashes); got != want {
						t.Errorf("%s %s %s: %s, want %s", mech, user, password, got, want)
					}
					if report["command"] != "command=report" || report["mech"] != mech || report["remote"] != "192.0.2.7" || report["local"] != server4 || report["protocol"] != "imap" {
						t.Errorf("%s: %v", mech, report)
					}
				}
				for _, mech := range []string{"PLAIN", "LOGIN"} {
					for _, a := range attempts {
						check(mech, a.user, a.password, a.plain23, a.plain24)
					}
				}
				for _, mech := range []string{"CRAM-MD5", "SCRAM-SHA-1", "SCRAM-SHA-256"} {
					for _, a := range attempts {
						check(mech, a.user, a.password, a.other23, a.other24)
					}
				}
				check("PLAIN", "nobody", "wrong", "failure E", "failure account E")
				check("CRAM-MD5", "nobody", "wrong", "failure F", "failure account F")
				// Both versions report a success; 2.4 reports it with a fail_type.
				check("ANONYMOUS", "x", "", "success G", "success credentials G")
			})
		}
		for name, o := range outages {
			config := o.config24
			if d.is23 {
				config = o.config23
			}
			if config == "" {
				continue
			}
			t.Run(name, func(t *testing.T) {
				s := d.startOutage(t, config)
				r := record(t)
				for _, mech := range []string{"PLAIN", "PLAIN", "CRAM-MD5", "CRAM-MD5"} {
					if err := authenticate("192.0.2.7", mech, "alice", password); err == nil {
						t.Errorf("%s: the login succeeded", mech)
					}
				}
				hashes := make(map[string]string)
				for _, report := range r.take(s, 4) {
					got := describe(report, hashes)
					t.Log(report["mech"], got)
					switch got[:len(got)-2] {
					case "failure":
						if !d.is23 {
							t.Errorf("2.4 says %s", got)
						}
					case "failure internal":
					case "failure account":
						if name != "missing passwd-file" {
							t.Errorf("2.4 says %s", got)
						}
					default:
						t.Error(got)
					}
				}
			})
		}
	})
}

// startOutage starts a server without nftwld, whose password database is down.
func (d system) startOutage(t *testing.T, passdb string) *server {
	t.Helper()
	s := d.start(t, with{bare: true, passdb: passdb})
	s.write("sql.conf", "driver = sqlite\nconnect = "+dir+"/none/db\npassword_query = SELECT password FROM users WHERE name = '%u'\n", 0o644)
	s.write("check", "#!/bin/sh\nexit 111\n", 0o755)
	return s
}

// While the password database is down, every login fails, here from one address
// that is not trusted. It is not banned.
func TestOutageBansNobody(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{config: "failures: {limit: 3}\n", dovecot: "auth_cache_size = 0\n"})
		var all string
		for i := range 20 {
			all += fmt.Sprintf("user%d:{PLAIN}secret:1000:1000::%s/mail/alice::nftwl_trust=no\n", i, dir)
		}
		s.write("users", all, 0o644)
		office := "192.0.2.7"
		everybody := func(wantSuccess bool) {
			t.Helper()
			results := make(chan error)
			for i := range 40 {
				c, err := dial(office, "143")
				nstest.Must(t, err)
				go func() { results <- imap(c, []string{"PLAIN", "CRAM-MD5"}[i/20], fmt.Sprintf("user%d", i%20), password) }()
			}
			for range 40 {
				if err := <-results; (err == nil) != wantSuccess {
					t.Errorf("login: %v", err)
				}
			}
		}
		everybody(true)
		s.reported(`protocol="imap",result="success"`, "40")
		s.dovecot.Stop()
		nstest.Must(t, os.Remove(filepath.Join(dir, "users")))
		s.startDovecot()
		everybody(false)
		s.reported(`protocol="imap",result="failure"`, "40")
		if s.in("banned_ipv4", "elements") || s.metric(`nftwl_failures_total{outcome="counted"}`) != "0" {
			t.Errorf("counted: %s", s.get("/metrics"))
		}
	})
}
