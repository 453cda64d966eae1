package dovecot

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// note is a post-login script that notes its user, groups and capabilities.
const note = `#!/bin/sh
echo $(id -u) $(id -g) $(id -G) $(grep CapEff /proc/self/status) >>` + dir + `/seen/note
exec "$@"
`

// existing is a post-login service of the administrator's.
func existing(executable, user string) string {
	return "service imap {\n  executable = imap imap-postlogin\n}\nservice imap-postlogin {\n  executable = " + executable + "\n  " + user +
		"\n  unix_listener imap-postlogin {\n  }\n}\n"
}

// setup replaces no post-login script. One that runs after nftwl, as the documentation
// says, runs as the same user as before, and the client is trusted.
func TestExistingPostLogin(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, user string
		as         string // uid, gid, groups and capabilities of the script
	}{
		{"root", "", "0 0 0 CapEff: [0-9a-f]+[1-9a-f]\n"},
		{"user", "user = games", "5 60 60 CapEff: 0+\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			eachDovecot(t, func(t *testing.T, d dovecot) {
				s := d.start(t, with{
					dropIn: func(string) string { return existing("script-login "+dir+"/note", c.user) },
					files:  map[string]string{"note": note},
				})
				nstest.Must(t, os.Mkdir(s.path("seen"), 0o755))
				nstest.Must(t, os.Chmod(s.path("seen"), 0o777)) // whatever the umask
				nstest.Must(t, unix.Mount("none", d.Path("etc/dovecot/conf.d"), "tmpfs", 0, "mode=755"))
				s.install()
				loadSets(t)

				// logIn returns what a login leaves of the script.
				logIn := func() string {
					t.Helper()
					_ = os.Remove(s.path("seen/note")) // missing at first
					if err := login(client4, protocols["imap"].port, protocols["imap"].visit, "alice", password); err != nil {
						t.Errorf("a login: %v", err)
					}
					return nstest.Read(t, s.path("seen/note"))
				}
				if left := logIn(); !regexp.MustCompile("^" + c.as + "$").MatchString(left) {
					t.Fatalf("the script leaves %q, want %q", left, c.as)
				}

				out, err := d.Command("nftwl", "setup", "dovecot", "--write").CombinedOutput()
				if err == nil || !strings.Contains(string(out), "service imap has executable = imap imap-postlogin, and the drop-in would replace that") {
					t.Errorf("setup: %v\n%s", err, out)
				}
				if _, err := os.Stat(d.Path("etc/dovecot/conf.d/90-nftwl.conf")); err == nil {
					t.Error("setup has written the drop-in")
				}
				diagnoses(t, s.doctor(), healthy.but(notAsked).but(diagnosis{
					"dovecot.protocols": "fail: logins by pop3, submission(, sieve)? trust no one",
					"dovecot.service":   "warn: service imap-postlogin runs " + dir + "/note, and whether that runs nftwl cannot be seen",
				}))

				s.write("90-nftwl.conf", documented(t, c.user), 0o644)
				s.shell("doveadm reload")
				nstest.Nft(t, "flush ruleset")
				loadSets(t)
				if left := logIn(); !regexp.MustCompile("^" + c.as + "$").MatchString(left) {
					t.Errorf("after nftwl the script leaves %q, want %q", left, c.as)
				}
				wantTrusted(t, client4, "alice", day)
				for _, r := range s.results() {
					if r.Check == "dovecot.service" || r.Check == "dovecot.login" && r.Status == "fail" {
						t.Errorf("doctor reports %+v", r)
					}
				}
			})
		})
	}
}

// documented is the service that docs/how-it-works.md shows, with the script of the test
// instead of its own; without setpriv, unless a user is set.
func documented(t *testing.T, user string) string {
	t.Helper()
	text := nstest.Read(t, nstest.Root(t)+"/docs/how-it-works.md")
	_, text, _ = strings.Cut(text, "\n## A post-login script of your own\n")
	_, text, _ = strings.Cut(text, "\n```dovecot\n")
	text, _, ok := strings.Cut(text, "\n```\n")
	const drop = " /usr/bin/setpriv --reuid=alice --regid=1000 --groups=1000 /usr/local/bin/hello.sh\n"
	if !ok || !strings.Contains(text, drop) {
		t.Fatalf("the documentation shows\n%s", text)
	}
	script := " " + dir + "/note\n"
	if user != "" {
		script = " /usr/bin/setpriv --reuid=games --regid=60 --groups=60" + script
	}
	return strings.Replace(text, drop, script, 1) + "\n"
}

// shell runs a script on Dovecot's system. If that reloads Dovecot, it waits for the
// reload.
func (s *server) shell(script string) string {
	s.t.Helper()
	const reloaded = "SIGHUP received - reloading configuration"
	before := strings.Count(s.log(), reloaded)
	out := s.d.Run(s.t, "sh", "-euc", script)
	if strings.Contains(script, "doveadm reload") {
		nstest.Poll(s.t, "Dovecot to reload", func() bool { return strings.Count(s.log(), reloaded) > before })
		// Dovecot's master logs that before it reloads, and answers only afterwards.
		s.d.Run(s.t, "doveadm", "service", "status")
	}
	return out
}

func (s *server) results() []nstest.Finding {
	s.t.Helper()
	return nstest.Findings(s.t, s.d.Command("sh", "-c", "nftwl doctor --json"))
}
