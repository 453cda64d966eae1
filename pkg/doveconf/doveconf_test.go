package doveconf

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	s := Parse(`base_dir = /run/dovecot
default_vsz_limit = 256 M
protocols = imap pop3
service "a b" {
  executable = "script-login /x#.sh \"y\" "
  vsz_limit = 18446744073709551615 B
  unix_listener login/a {
    mode = 0666
  }
}
}
`)
	service, listener := s.Listener("/run/dovecot/login/a")
	if service == nil || service.Name != "service a b" || service.Values["executable"] != `script-login /x#.sh "y" ` || listener.Values["mode"] != "0666" {
		t.Fatalf("%+v, %+v", service, listener)
	}
	if limit, err := s.VszLimit(service); limit != 256<<20 || err != nil {
		t.Errorf("%d, %v", limit, err)
	}
	if p := s.Protocols(); len(p) != 2 || !p["imap"] || !p["pop3"] {
		t.Errorf("%v", p)
	}
	if s.Section("service b").Values["executable"] != "" {
		t.Error("a section that is not there has settings")
	}
}

func TestUnquote(t *testing.T) {
	for quoted, want := range map[string]string{
		`"it\'s #1"`:      `it's #1`,
		`" a\\\' \"b\" "`: ` a\' "b" `,
		`"#\\"`:           `#\`,
		`it\'s`:           `it\'s`, // without quotes, nothing is escaped
		`'it\'s #1'`:      `'it\'s #1'`,
	} {
		if got := unquote(quoted); got != want {
			t.Errorf("%s: %q, want %q", quoted, got, want)
		}
	}
}

func TestSocketOf(t *testing.T) {
	for _, c := range []struct {
		executable, name string
		index            int
	}{
		{"", "", -1}, {"imap", "", -1}, {"imap nftwl", "nftwl", 1}, {"imap -t 30 -x nftwl x", "nftwl", 4},
		{"imap  nftwl", "", 1}, {"imap -t", "", -1}, {"imap -t30 nftwl", "nftwl", 2},
	} {
		if name, index := SocketOf(c.executable); name != c.name || index != c.index {
			t.Errorf("%q: %q, %d", c.executable, name, index)
		}
	}
}

// As doveconf of 2.3.19 and of 2.4.1 prints them.
func TestAuthPolicy(t *testing.T) {
	for name, text := range map[string]string{
		"2.3": `auth_policy_server_url = http://127.0.0.1:8085/
auth_policy_server_api_header = X-API-Key: KEY
auth_policy_hash_nonce = SALT
auth_policy_report_after_auth = yes
auth_policy_check_before_auth = no
auth_policy_check_after_auth = no
auth_policy_request_attributes = login=%{requested_username} proxy=%{passdb:proxy:no}
`,
		"2.4": `auth_policy {
  check_after_auth = no
  check_before_auth = no
  hash_nonce = # hidden, use -P to show it
  request_attributes {
    login = %{requested_username}
    proxy = %{passdb:proxy | default('no')}
  }
  server_api_header = X-API-Key: KEY
  server_url = http://127.0.0.1:8085/
}
auth_policy_server_url =
auth_policy_check_before_auth = yes
`,
	} {
		t.Run(name, func(t *testing.T) {
			p := Parse(text).AuthPolicy()
			if p.URL != "http://127.0.0.1:8085/" || p.Header != "X-API-Key: KEY" || p.Nonce == "" || !p.Report || p.Check ||
				len(p.Attributes) != 2 || p.Attributes["login"] != "%{requested_username}" {
				t.Errorf("%+v", p)
			}
		})
	}
	if p := Parse("").AuthPolicy(); p.URL != "" || !p.Report || !p.Check {
		t.Errorf("without settings: %+v", p)
	}
}

func TestLines(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"dovecot.conf":   "a\n!include conf.d/*.conf\n!include_try none\n  b\n",
		"conf.d/2.conf":  "two\n",
		"conf.d/10.conf": "!include ../dovecot.conf\n",
		"conf.d/3.ext":   "three\n",
	} {
		if err := os.MkdirAll(filepath.Join(dir, "conf.d"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for _, l := range Lines(filepath.Join(dir, "dovecot.conf"), filepath.Join(dir, "conf.d/15.conf"), filepath.Join(dir, "conf.d/2.conf")) {
		name, _ := filepath.Rel(dir, l.File)
		got = append(got, fmt.Sprintf("%s:%d %s", name, l.Number, l.Text))
	}
	want := "dovecot.conf:0 , dovecot.conf:1 a, dovecot.conf:2 !include conf.d/*.conf, conf.d/10.conf:0 , conf.d/10.conf:1 !include ../dovecot.conf, " +
		"conf.d/15.conf:0 , conf.d/2.conf:0 , conf.d/2.conf:1 two, dovecot.conf:3 !include_try none, dovecot.conf:4 b"
	if text := strings.Join(got, ", "); text != want {
		t.Errorf("%s\nwant\n%s", text, want)
	}
}
