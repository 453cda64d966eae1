package dovecot

import (
	"os"
	"regexp"
	"slices"
	"strconv"
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

// existing returns a post-login service of the administrator's, which Dovecot reads
// before the drop-in.
func existing(protocol, executable, settings string) string {
	return strings.ReplaceAll(`service PROTOCOL {
  executable = PROTOCOL PROTOCOL-postlogin
}
service PROTOCOL-postlogin {
  executable = `+executable+`
  `+settings+`
  unix_listener PROTOCOL-postlogin {
  }
}
`, "PROTOCOL", protocol)
}

// An existing post-login service keeps working: whoever follows setup to the letter
// denies no login, the script runs as the same user as before, and the client is
// trusted.
func TestExistingPostLogin(t *testing.T) {
	t.Parallel()
	const script = "script-login " + dir + "/note"
	const root, games = "0 0 0 CapEff: [0-9a-f]+[1-9a-f]\n", "5 60 60 CapEff: 0+\n"
	for _, c := range []struct {
		name   string
		config string // Dovecot's, before the place of the drop-in
		after  string // and after
		as     string // uid, gid, groups and capabilities of the script
	}{
		{name: "plain", config: existing("imap", script, ""), as: root},
		{name: "user", config: existing("imap", script, "user = games"), as: games},
		{name: "another for POP3", config: existing("imap", "script-login /bin/sh "+dir+"/note", "") + existing("pop3", script, "user = games"), as: root},
		{name: "nftwl already", config: existing("imap", "script-login /usr/bin/nftwl login "+dir+"/note", "vsz_limit = 1G"), as: root},
		{name: "later in the configuration", after: existing("imap", script, "user = games"), as: games},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			eachDovecot(t, func(t *testing.T, d dovecot) {
				s := d.start(t, with{
					dropIn:  func(string) string { return c.config + "!include_try /etc/dovecot/conf.d/90-nftwl.conf\n" },
					dovecot: "!include_try " + dir + "/later.conf\n",
					files:   map[string]string{"note": note, "later.conf": c.after},
				})
				nstest.Must(t, os.Mkdir(s.path("seen"), 0o755))
				nstest.Must(t, os.Chmod(s.path("seen"), 0o777)) // whatever the umask
				nstest.Must(t, unix.Mount("none", d.Path("etc/dovecot/conf.d"), "tmpfs", 0, "mode=755"))
				s.install()
				loadSets(t)

				// logIn returns what a login leaves of the script.
				logIn := func(client, name string) string {
					t.Helper()
					_ = os.Remove(s.path("seen/note")) // missing at first
					p := protocols[name]
					if err := login(client, p.port, p.visit, "alice", password); err != nil {
						t.Errorf("a login by %s: %v", name, err)
					}
					return nstest.Read(t, s.path("seen/note"))
				}
				before, pop := logIn(client4, "imap"), logIn(client6, "pop3")
				if !regexp.MustCompile("^" + c.as + "$").MatchString(before) {
					t.Fatalf("the script leaves %q, want %q", before, c.as)
				}

				s.follow(s.remedy())
				for client, p := range map[string]struct{ name, left string }{client4: {"imap", before}, client6: {"pop3", pop}} {
					nstest.Nft(t, "flush ruleset")
					loadSets(t)
					if left := logIn(client, p.name); left != p.left {
						t.Errorf("by %s, the script notes %q, and noted %q before", p.name, left, p.left)
					}
					wantTrusted(t, client, "alice", day)
				}
				for _, r := range s.results() {
					if strings.HasPrefix(r.Check, "dovecot.") && r.Status == "fail" {
						t.Errorf("doctor reports %+v", r)
					}
				}
				// A second setup prints the same.
				if out := s.shell("nftwl setup dovecot --write"); !strings.Contains(out, "there already, and the same: ") {
					t.Errorf("the second time:\n%s", out)
				}
				for _, line := range s.complaints(0) {
					if strings.Contains(line, "nftwl") {
						t.Error(line)
					}
				}
			})
		})
	}
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

var toDelete = regexp.MustCompile(`# Delete "(.*)" from (\S+), line (\d+)`)

// follow runs a command, and then the next steps that it prints, up to the reload.
func (s *server) follow(command string) {
	s.t.Helper()
	out := s.shell(command)
	s.t.Log(out)
	_, next, _ := strings.Cut(out, "\nNext:\n")
	for line := range strings.Lines(next) {
		line = strings.TrimSpace(line)
		if m := toDelete.FindStringSubmatch(line); m != nil {
			path := s.d.Path(m[2])
			b, err := os.ReadFile(path)
			nstest.Must(s.t, err)
			lines := strings.Split(string(b), "\n")
			n, err := strconv.Atoi(m[3])
			nstest.Must(s.t, err)
			if strings.TrimSpace(lines[n-1]) != m[1] {
				s.t.Errorf("line %d of %s is %q", n, path, lines[n-1])
			}
			nstest.Must(s.t, os.WriteFile(path, []byte(strings.Join(slices.Delete(lines, n-1, n), "\n")), 0o644))
		} else if !strings.HasPrefix(line, "#") {
			s.shell(line)
		}
		if strings.Contains(line, "doveadm reload") {
			return
		}
	}
	s.t.Fatalf("nothing to reload in\n%s", out)
}

func (s *server) results() []nstest.Finding {
	s.t.Helper()
	return nstest.Findings(s.t, s.d.Command("sh", "-c", "nftwl doctor --json"))
}

// remedy returns doctor's remedy for a post-login service without nftwl.
func (s *server) remedy() string {
	s.t.Helper()
	results := s.results()
	for _, r := range results {
		if (r.Status == "warn" || r.Status == "fail") && (r.Check == "dovecot.service" || r.Check == "dovecot.protocols") {
			return r.Command
		}
	}
	s.t.Fatalf("doctor reports no such service: %+v", results)
	return ""
}
