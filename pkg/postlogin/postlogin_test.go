package postlogin

import (
	"bytes"
	"strings"
	"testing"
)

func TestCheckVersion(t *testing.T) {
	for _, test := range []struct{ line, err string }{
		{"VERSION\tscript-login\t1\t0\n", ""},
		{"VERSION\tscript-login\t1\t0", ""},
		{"VERSION\tscript-login\t1\t7\n", ""}, // minor versions are compatible
		{"VERSION\tscript-login\t2\t0\n", `a request in version "2"."0" of the post-login protocol; known is 1`},
		{"VERSION\tscript-login\t1\tx\n", `a request in version "1"."x" of the post-login protocol; known is 1`},
		{"VERSION\tauth-master\t1\t0\n", `a request in the protocol "auth-master", not in script-login`},
		{"VERSION\tscript-login\t1\n", "not a post-login request"},
		{"GET / HTTP/1.1\r\n", "not a post-login request"},
		{"\n", "not a post-login request"},
		{"", "not a post-login request"},
	} {
		var got string
		if err := CheckVersion([]byte(test.line)); err != nil {
			got = err.Error()
		}
		if got != test.err {
			t.Errorf("%q: %q", test.line, got)
		}
	}
}

func TestParse(t *testing.T) {
	for _, test := range []struct {
		line string
		want Request
		err  string
	}{
		{"198.51.100.1\t192.0.2.7\talice\n", Request{"198.51.100.1", "192.0.2.7", "alice", []byte("alice\n")}, ""},
		// A client that came over a Unix socket.
		{"\t\talice\tuid=1000\n", Request{"", "", "alice", []byte("alice\tuid=1000\n")}, ""},
		{"::1\t2001:db8::7\tal\x01tice\x011\tk=\x01n\n", Request{"::1", "2001:db8::7", "al\tice\x01", []byte("al\x01tice\x011\tk=\x01n\n")}, ""},
		{"198.51.100.1\t192.0.2.7\n", Request{}, "the line of the login has fewer than three fields"},
		{"\n", Request{}, "the line of the login has fewer than three fields"},
		{"198.51.100.1\t192.0.2.7\t\tk=v\n", Request{}, "the login has no user"},
		{"198.51.100.1\t192.0.2.7\t\n", Request{}, "the login has no user"},
		{"198.51.100.1\t192.0.2.7\talice", Request{}, "the line of the login has no end"},
		{"", Request{}, "the line of the login has no end"},
	} {
		got, err := Parse([]byte(test.line))
		if (err == nil) != (test.err == "") || err != nil && err.Error() != test.err {
			t.Errorf("%q: %v", test.line, err)
		}
		if got.LocalIP != test.want.LocalIP || got.IP != test.want.IP || got.User != test.want.User || !bytes.Equal(got.Answer, test.want.Answer) {
			t.Errorf("%q: %q", test.line, got)
		}
	}
}

// As what script-login makes of the fields: variables of the environment.
func TestField(t *testing.T) {
	r, err := Parse([]byte("\t\tnftwl_trust=no\tnftwl_trust=maybe\tNftwl_Trust=yes\tnftwl_trust\tb=\x01n=\x011\t=x\t\tc=\x01\n"))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"nftwl_trust": "yes", // not the user's name, and the last of three
		"B":           "\n=\x01",
		"c":           "",
		"d":           "",
		"":            "x",
	} {
		if got := r.Field(name); got != want {
			t.Errorf("%q: %q", name, got)
		}
	}
}

// escape is str_tabescape() of Dovecot's.
var escape = strings.NewReplacer("\x00", "\x010", "\x01", "\x011", "\t", "\x01t", "\r", "\x01r", "\n", "\x01n")

// Whatever Dovecot sends comes back as it was, and is understood.
func FuzzParse(f *testing.F) {
	f.Add("198.51.100.1", "192.0.2.7", "alice", "nftwl_trust", "no")
	f.Add("", "", "a\tb\n\x01\x00\r", "k=\x01", "\xff=")
	f.Add("\n", "\t", "", "", "\x01")
	f.Fuzz(func(t *testing.T, local, ip, user, key, value string) {
		answer := escape.Replace(user) + "\t" + escape.Replace(key+"="+value) + "\n"
		line := escape.Replace(local) + "\t" + escape.Replace(ip) + "\t" + answer
		r, err := Parse([]byte(line))
		if (err == nil) != (user != "") {
			t.Fatalf("%q: %v", line, err)
		}
		if err == nil {
			key, want, _ := strings.Cut(key+"="+value, "=")
			if r.LocalIP != local || r.IP != ip || r.User != user || string(r.Answer) != answer || r.Field(key) != want {
				t.Errorf("%q: %q, %q is %q", line, r, key, r.Field(key))
			}
		}
		// And nothing else does harm.
		for _, raw := range []string{local, ip + "\n", user + "\t" + ip + "\t" + value + "\n"} {
			if r, err := Parse([]byte(raw)); err == nil {
				if len(r.User) == 0 || !strings.HasSuffix(raw, string(r.Answer)) {
					t.Errorf("%q: %q", raw, r)
				}
				r.Field(key)
			}
			_ = CheckVersion([]byte(raw))
		}
	})
}
