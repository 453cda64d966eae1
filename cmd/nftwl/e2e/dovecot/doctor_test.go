package dovecot

import (
	"errors"
	"fmt"
	"maps"
	"net/textproto"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// A diagnosis has the expected results of checks, by name: "status: text" as a regular
// expression.
type diagnosis map[string]string

// healthy is the diagnosis of Dovecot as shipped.
var healthy = diagnosis{
	"dovecot.running":   "ok: ",
	"dovecot.protocols": "ok: after a login, imap, pop3, submission(, sieve)? ask service nftwl",
	"dovecot.login":     "ok: a login by service nftwl was tried: it trusts 192.0.2.[0-9]+ and 2001:db8:[0-9a-f:]+; that was removed again$",
}

// but returns the diagnosis with some results replaced. An empty text means that doctor
// does not make the check.
func (d diagnosis) but(others diagnosis) diagnosis {
	all := maps.Clone(d)
	maps.Copy(all, others)
	return all
}

// notAsked is a diagnosis without a post-login service to look at.
var notAsked = diagnosis{"dovecot.login": ""}

// diagnoses runs a command such as `nftwl doctor --json`, and compares its results
// about Dovecot with a diagnosis.
func diagnoses(t *testing.T, cmd *exec.Cmd, want diagnosis) {
	t.Helper()
	found := nstest.Diagnosis(t, nstest.Findings(t, cmd, "dovecot"))
	for check, text := range found {
		switch {
		case want[check] == "":
			t.Errorf("%s should not be there: %s", check, text)
		case !regexp.MustCompile("^(?:" + want[check] + ")").MatchString(text):
			t.Errorf("%s is %q, want %q", check, text, want[check])
		}
	}
	for check, text := range want {
		if found[check] == "" && text != "" {
			t.Errorf("%s is missing, want %q", check, text)
		}
	}
}

// doctor returns the command that runs nftwl doctor on Dovecot's system.
func (s *server) doctor() *exec.Cmd { return s.d.Command("/usr/bin/nftwl", "doctor", "--json") }

// install makes the server's configuration that of the system, which doctor reads.
func (s *server) install() {
	s.t.Helper()
	nstest.Must(s.t, unix.Mount(s.path("dovecot.conf"), s.d.Path("etc/dovecot/dovecot.conf"), "", unix.MS_BIND, ""))
}

// capable makes a second nftwl with the file capability CAP_NET_ADMIN, permitted and
// effective (struct vfs_cap_data, revision 2).
func capable(s *server) {
	s.t.Helper()
	b, err := os.ReadFile(nstest.Build(s.t, "cmd/nftwl"))
	nstest.Must(s.t, err)
	s.write("nftwl", string(b), 0o755)
	xattr := "\x01\x00\x00\x02\x00\x10\x00\x00" + strings.Repeat("\x00", 12)
	nstest.Must(s.t, unix.Setxattr(s.path("nftwl"), "security.capability", []byte(xattr), 0))
}

// The results of a login.
const (
	trusted = iota
	untrusted
	denied
	deniedAfter // trusted, then denied
)

// replace edits the drop-in.
func replace(old, new string) func(string) string {
	return func(s string) string { return strings.Replace(s, old, new, 1) }
}

const (
	hop       = "#!/bin/sh\nexec \"$@\"\n"
	second    = dir + "/nftwl" // a second program
	asNobody  = "service nftwl {\n  user = nobody\n}\n"
	runSecond = "service nftwl {\n  executable = script-login " + second + " login\n}\n"
)

// However Dovecot is broken, doctor and a real login agree.
func TestDoctor(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		with   with
		after  func(*server) // Dovecot's start
		by     string        // the protocol of the login; imap if empty
		login  int
		change diagnosis // of the healthy one
	}{
		{name: "as shipped"},
		{
			name: "no drop-in", login: untrusted,
			with: with{dropIn: func(string) string { return "" }},
			change: notAsked.but(diagnosis{
				"dovecot.protocols": "fail: no mail protocol runs nftwl: logins by imap, pop3, submission(, sieve)? trust no one",
			}),
		},
		{
			name: "pop3 without", by: "pop3", login: untrusted,
			with:   with{dropIn: replace("executable = pop3 nftwl", "")},
			change: diagnosis{"dovecot.protocols": "fail: logins by pop3 trust no one"},
		},
		{
			name: "options of imap",
			with: with{dropIn: replace("imap nftwl", "imap -t 30 nftwl")},
		},
		{
			name: "two spaces after imap", login: denied,
			with:   with{dropIn: replace("imap nftwl", "imap  nftwl")},
			change: notAsked.but(diagnosis{"dovecot.protocols": "fail: an empty name .* denies every login by imap"}),
		},
		{
			name: "no such service", login: denied,
			with:   with{dropIn: replace("imap nftwl", "imap nftlw")},
			change: notAsked.but(diagnosis{"dovecot.protocols": "fail: .*nftlw.* every login by imap is denied"}),
		},
		{
			name: "two spaces after script-login", login: denied,
			with: with{dropIn: replace(command, strings.Replace(command, " /", "  /", 1))},
			change: notAsked.but(diagnosis{
				"dovecot.service": "fail: .* denies every login: .* empty word",
			}),
		},
		{
			name: "no script-login", login: denied,
			with: with{dropIn: replace(command, "executable = /usr/bin/nftwl login")},
			change: notAsked.but(diagnosis{
				"dovecot.service": "fail: .* denies every login: script-login does not run it",
			}),
		},
		{
			name: "no word login", login: denied,
			with: with{dropIn: replace(command, "executable = script-login /usr/bin/nftwl")},
			change: notAsked.but(diagnosis{
				"dovecot.service": "fail: .* denies every login: .* no word login",
			}),
		},
		{
			name: "an option that script-login lacks", login: denied,
			with: with{dropIn: replace(command, "executable = script-login -x /usr/bin/nftwl login")},
			change: notAsked.but(diagnosis{
				"dovecot.service": "fail: .* denies every login: script-login has no option -x",
			}),
		},
		{
			name:   "an option that all of Dovecot's programs have",
			with:   with{dropIn: replace(command, "executable = script-login -o verbose_proctitle=no /usr/bin/nftwl login")},
			change: notAsked.but(diagnosis{"dovecot.service": "warn: whether service nftwl runs nftwl cannot be seen: .* -o$"}),
		},
		{
			name: "two spaces after --config",
			with: with{dropIn: replace(command, "executable = script-login /usr/bin/nftwl --config  /etc/nftwl.yaml login"), config: "timeout: 1d\n"},
		},
		{
			name: "no file after --config", login: denied,
			with: with{dropIn: replace(command, "executable = script-login /usr/bin/nftwl --config login")},
			change: notAsked.but(diagnosis{
				"dovecot.service": "fail: .* denies every login: .* no word login",
			}),
		},
		{
			name:   "a script after nftwl, and empty words that it skips",
			with:   with{dropIn: replace(command, "executable = script-login /usr/bin/nftwl  login  "+dir+"/hop"), files: map[string]string{"hop": hop}},
			change: diagnosis{"dovecot.login": "skip: no login by service nftwl was tried: it would run " + dir + "/hop$"},
		},
		{
			name: "a script that is missing", login: deniedAfter,
			with:   with{dropIn: replace(command, command+"  "+dir+"/hop")},
			change: diagnosis{"dovecot.login": "fail: every login is denied: .*" + dir + "/hop: no such file"},
		},
		{
			name: "a script that is not executable", login: deniedAfter,
			with:   with{dropIn: replace(command, command+" "+dir+"/hop"), files: map[string]string{"hop": hop}},
			after:  func(s *server) { nstest.Must(s.t, os.Chmod(s.path("hop"), 0o644)) },
			change: diagnosis{"dovecot.login": "fail: every login is denied: .*" + dir + "/hop.*: permission denied"},
		},
		{
			name:   "a program of the system",
			with:   with{dropIn: replace(command, command+" env")},
			change: diagnosis{"dovecot.login": "skip: .* it would run env$"},
		},
		{
			name: "a program that the system lacks", login: deniedAfter,
			with:   with{dropIn: replace(command, command+" hop")},
			change: diagnosis{"dovecot.login": "fail: every login is denied: .*hop.*not found"},
		},
		{
			name: "chroot", login: denied,
			with:   with{dovecot: "service nftwl {\n  chroot = empty\n}\n"},
			change: notAsked.but(diagnosis{"dovecot.service": "fail: service nftwl has chroot = empty, .* every login is denied"}),
		},
		{
			name:   "a program that everyone can write",
			with:   with{dovecot: runSecond},
			after:  func(s *server) { capable(s); nstest.Must(s.t, os.Chmod(s.path("nftwl"), 0o777)) },
			change: diagnosis{"dovecot.executable": "fail: Dovecot runs " + second + " as root, .*: " + second + " has mode 0777"},
		},
		{
			name:   "a script of another's",
			with:   with{dropIn: replace(command, command+" "+dir+"/hop"), files: map[string]string{"hop": hop}},
			after:  func(s *server) { nstest.Must(s.t, os.Chown(s.path("hop"), 1000, 0)) },
			change: diagnosis{"dovecot.login": "skip: ", "dovecot.executable": "fail: Dovecot runs " + dir + "/hop as root, .*: " + dir + "/hop belongs to user 1000"},
		},
		{
			name:   "a program in another user's directory",
			with:   with{dovecot: runSecond},
			after:  func(s *server) { capable(s); nstest.Must(s.t, os.Chown(s.path(""), 1000, 0)) },
			change: diagnosis{"dovecot.executable": "fail: Dovecot runs " + second + " as root, .*: " + dir + " belongs to user 1000"},
		},
		{
			name:   "a value in quotes",
			with:   with{dropIn: replace(command, `executable = "script-login /usr/bin/nftwl login `+dir+`/hop#1"`), files: map[string]string{"hop#1": hop}},
			change: diagnosis{"dovecot.login": "skip: .* it would run " + dir + "/hop#1$"},
		},
		{
			name: "another script", login: untrusted,
			with: with{dropIn: replace(command, "executable = script-login "+dir+"/hop"), files: map[string]string{"hop": hop}},
			change: notAsked.but(diagnosis{
				"dovecot.service": "warn: service nftwl runs " + dir + "/hop, and whether that runs nftwl cannot be seen",
			}),
		},
		{
			name:   "another configuration",
			with:   with{dropIn: replace(command, "executable = script-login /usr/bin/nftwl --config "+dir+"/other.yaml login"), files: map[string]string{"other.yaml": "timeout: 1d\n"}},
			change: diagnosis{"dovecot.login": "skip: .*another configuration, which `nftwl --config " + dir + "/other.yaml doctor`"},
		},
		{
			name: "the configuration, named",
			with: with{dropIn: replace(command, "executable = script-login /usr/bin/nftwl --config=/etc/nftwl.yaml login"), config: "timeout: 1d\n"},
		},
		{
			name: "no vsz_limit", login: denied,
			with:   with{dropIn: replace("vsz_limit = 1G", "")},
			change: diagnosis{"dovecot.login": "fail: a login by service nftwl was tried: every login is denied"},
		},
		{
			name: "a higher default_vsz_limit",
			with: with{dropIn: replace("vsz_limit = 1G", ""), dovecot: "default_vsz_limit = 2 G\n"},
		},
		{
			name: "no limit",
			with: with{dropIn: replace("vsz_limit = 1G", "vsz_limit = $NONE")},
		},
		{
			name: "a limit that refers to the default", login: denied,
			with:   with{dropIn: replace("vsz_limit = 1G", "vsz_limit = $SET:default_vsz_limit")},
			change: diagnosis{"dovecot.login": "fail: .* was tried: every login is denied"},
		},
		{
			name: "nftwl is missing", login: denied,
			with:   with{dropIn: replace(command, "executable = script-login /usr/sbin/nftwl login")},
			change: diagnosis{"dovecot.login": "fail: every login is denied: .*/usr/sbin/nftwl: no such file"},
		},
		{
			name: "nftwl is not executable", login: denied,
			with:   with{dovecot: runSecond},
			after:  func(s *server) { capable(s); nstest.Must(s.t, os.Chmod(s.path("nftwl"), 0o644)) },
			change: diagnosis{"dovecot.login": "fail: every login is denied: .*" + second + ".*: permission denied"},
		},
		{
			name: "user nobody", login: untrusted,
			with:   with{dovecot: asNobody},
			change: diagnosis{"dovecot.login": "fail: .* was tried: logins go on, and no client is trusted"},
		},
		{
			name: "no user",
			with: with{dropIn: replace("user = root", "")},
		},
		{
			name: "privileges of the mail user", login: untrusted,
			with:   with{dropIn: replace(command, "executable = script-login -d /usr/bin/nftwl login")},
			change: diagnosis{"dovecot.login": "fail: service nftwl lacks executable = script-login without -d; no login by it was tried: "},
		},
		{
			name:  "user nobody, and a file with the capability",
			with:  with{dovecot: asNobody + runSecond},
			after: capable,
		},
		{
			name: "the same, and NoNewPrivileges", login: untrusted,
			with:  with{dovecot: asNobody + runSecond, wrap: []string{"/usr/bin/setpriv", "--no-new-privs"}},
			after: capable,
			change: diagnosis{
				"dovecot.login": "fail: .* no client is trusted: .*CAP_NET_ADMIN is missing",
			},
		},
		{
			name: "Dovecot without CAP_NET_ADMIN", login: untrusted,
			with:   with{wrap: withoutNetAdmin},
			change: diagnosis{"dovecot.login": "fail: .* no client is trusted: .*CAP_NET_ADMIN is missing"},
		},
		{
			name: "the same, and a file with the capability", login: denied,
			with:  with{wrap: withoutNetAdmin, dovecot: runSecond},
			after: capable,
			change: diagnosis{
				"dovecot.login": "fail: .*: every login is denied: .*Operation not permitted",
			},
		},
		{
			name:   "a process_limit that is lower than imap's",
			with:   with{dropIn: replace("process_limit = 1024", "")},
			change: diagnosis{"dovecot.process_limit": "warn: service nftwl can have 100 processes, and service imap 1024"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			eachDovecot(t, func(t *testing.T, d dovecot) {
				w := c.with
				if edit := w.dropIn; edit != nil {
					names := strings.NewReplacer("$NONE", "unlimited")
					if d.is23() {
						names = strings.NewReplacer("$NONE", "0", "$SET:", "$")
					}
					w.dropIn = func(s string) string {
						edited := names.Replace(edit(s))
						if edited == s {
							t.Error("the edit does not change the drop-in")
						}
						return edited
					}
				}
				s := d.start(t, w)
				s.install()
				loadSets(t)
				if c.after != nil {
					c.after(s)
				}
				diagnoses(t, s.doctor(), healthy.but(c.change))
				wantNobody(t) // the login that doctor tries leaves nothing behind

				p := protocols["imap"]
				if c.by != "" {
					p = protocols[c.by]
				}
				err := login(client4, p.port, p.visit, "alice", password)
				if c.login == denied || c.login == deniedAfter {
					if !errors.Is(err, nstest.ErrDenied) {
						t.Errorf("a login: %v, want %v", err, nstest.ErrDenied)
					}
				} else if err != nil {
					t.Errorf("a login: %v", err)
				}
				if c.login == trusted || c.login == deniedAfter {
					wantTrusted(t, client4, "alice", day)
				} else {
					wantNobody(t)
				}
			})
		})
	}
}

// A mail process that serves several logins connects to the post-login service as the
// mail user, from the second login on.
func TestDoctorOnListener(t *testing.T) {
	t.Parallel()
	for _, listener := range []string{"", "group = nogroup", "user = nobody\n    mode = 0460"} {
		t.Run(listener, func(t *testing.T) {
			t.Parallel()
			eachDovecot(t, func(t *testing.T, d dovecot) { d.deniesSecondLogin(t, listener) })
		})
	}
}

func (d dovecot) deniesSecondLogin(t *testing.T, listener string) {
	s := d.start(t, with{dovecot: d.settings(manyLogins) + onListener(listener)})
	s.mailIsNobodys()
	s.install()
	loadSets(t)
	diagnoses(t, s.doctor(), healthy.but(diagnosis{
		"dovecot.listener": `fail: the processes of service imap ask as the mail user \((service|restart_request)_count = 100`,
	}))
	if err := login(client4, "143", nstest.IMAP, "alice", password); err != nil {
		t.Errorf("the first login: %v", err)
	}
	conn, err := dial(client6, "143")
	nstest.Must(t, err)
	defer conn.Close()
	go func() { _ = nstest.IMAP(textproto.NewConn(conn), "alice", password) }() // gets no answer
	re := regexp.MustCompile(`imap\(alice\): Error: net_connect_unix\(/run/dovecot/nftwl\) failed: Permission denied`)
	nstest.Poll(t, "Dovecot's log to deny the second login", func() bool { return re.MatchString(s.log()) })
}

// manyLogins lets one process serve all logins.
const manyLogins = `service imap {
  $COUNT = 100
  process_limit = 1
}
`

// settings replaces $COUNT by this Dovecot's name for service_count.
func (d dovecot) settings(s string) string {
	name := "restart_request_count"
	if d.is23() {
		name = "service_count"
	}
	return strings.ReplaceAll(s, "$COUNT", name)
}

// mailIsNobodys makes user nobody the owner of all mail.
func (s *server) mailIsNobodys() {
	s.t.Helper()
	id := strconv.Itoa(nobody)
	s.write("users", strings.ReplaceAll(users, "1000", id), 0o644)
	nstest.Run(s.t, "chown", "-R", id+":"+id, s.path("mail"))
}

// onListener returns settings of the post-login service's listener.
func onListener(settings string) string {
	return "service nftwl {\n  unix_listener nftwl {\n    " + settings + "\n  }\n}\n"
}

func TestDoctorOnOwnListener(t *testing.T) {
	t.Parallel()
	for _, listener := range []string{"user = nobody", "group = nogroup\n    mode = 0660", "mode = 0666"} {
		t.Run(listener, func(t *testing.T) {
			t.Parallel()
			eachDovecot(t, func(t *testing.T, d dovecot) {
				s := d.start(t, with{dovecot: d.settings(manyLogins) + onListener(listener)})
				s.mailIsNobodys()
				s.install()
				loadSets(t)
				diagnoses(t, s.doctor(), healthy)
				for _, client := range []string{client4, client6} {
					if err := login(client, "143", nstest.IMAP, "alice", password); err != nil {
						t.Errorf("a login: %v", err)
					}
					wantTrusted(t, client, "alice", day)
					nstest.Nft(t, "flush ruleset")
					loadSets(t)
				}
			})
		})
	}
}

// doctor reads the configuration that Dovecot's logins use, whatever its path. To users
// other than root it reports that, not that Dovecot's settings are wrong.
func TestDoctorByHand(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{config: "timeout: 1d\n"})
		s.install()
		loadSets(t)
		cmd := s.doctor()
		cmd.Dir = "/etc"
		cmd.Args = append(cmd.Args, "--config", "nftwl.yaml")
		diagnoses(t, cmd, healthy)

		cmd = s.doctor()
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
		diagnoses(t, cmd, diagnosis{
			"dovecot.settings": "skip: only root ",
		})
	})
}

// What is there to look at where nobody can log in.
func TestDoctorWithoutLogins(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{dropIn: unchanged})
		s.dovecot.Stop()
		s.install()
		loadSets(t)
		stopped := healthy.but(diagnosis{"dovecot.running": "skip: Dovecot is not running", "dovecot.login": "skip: .*: Dovecot is not running"})
		diagnoses(t, s.doctor(), stopped)
		s.edit("vsz_limit = 1G", "")
		diagnoses(t, s.doctor(), stopped.but(diagnosis{"dovecot.login": "fail: service nftwl lacks vsz_limit = 1G; no login by it was tried: Dovecot is not running"}))

		settings := nstest.Read(s.t, dir+"/dovecot.conf")
		s.write("dovecot.conf", settings+"protocols = lmtp\n", 0o644)
		diagnoses(t, s.doctor(), stopped.but(notAsked).but(diagnosis{"dovecot.protocols": "skip: "}))
		s.write("dovecot.conf", settings+"nonsense = yes\n", 0o644)
		diagnoses(t, s.doctor(), diagnosis{
			"dovecot.settings": "fail: doveconf: .*nonsense",
		})

		cmd := s.doctor()
		cmd.Env = []string{"PATH=/nowhere"}
		diagnoses(t, cmd, diagnosis{"dovecot": "skip: Dovecot is not installed"})
	})
}

// unchanged leaves the drop-in as it is, but gives the server a copy that the test can
// edit.
func unchanged(s string) string { return s }

func (s *server) edit(old, new string) {
	s.t.Helper()
	s.write("90-nftwl.conf", strings.Replace(nstest.Read(s.t, dir+"/90-nftwl.conf"), old, new, 1), 0o644)
}

// The login that doctor tries leaves nothing behind, not even a line in the log, and
// trusted addresses stay trusted.
func TestDoctorLeavesNothing(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{})
		s.install()
		loadSets(t)
		nstest.Must(t, login(client4, "143", nstest.IMAP, "alice", password))
		for range 3 { // which can take alice's address, and then leaves it alone
			diagnoses(t, s.doctor(), healthy.but(diagnosis{"dovecot.login": `ok: .* tried: it trusts (192\.0\.2\.\d+ and )?2001:db8:`}))
		}
		wantTrusted(t, client4, "alice", day)
		// doctor takes an address that is not trusted yet. Few here are not.
		for i := range 128 {
			if i != 64 {
				nstest.Nft(t, fmt.Sprintf("add element inet filter trusted_ipv4 { 192.0.2.%d . 993 timeout 1h }", 2*i+1))
			}
		}
		diagnoses(t, s.doctor(), healthy.but(diagnosis{"dovecot.login": "ok: .* tried: it trusts (192.0.2.129 and )?2001:db8:"}))
		if n := strings.Count(ruleset(t), "192.0.2."); n != 127+4 { // alice has one of them, and 4 ports more
			t.Errorf("%d elements of 192.0.2.0/24 are left", n)
		}
		s.wantLog()
	})
}

// With ipv6_prefix, doctor tries and removes a network; with sets keyed by address
// alone, one element.
func TestDoctorOnOtherSets(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{config: "ipv6_prefix: 64\nignore: [192.0.2.0/24]\ncomment: false\nports: [143, 465, 587]\n"})
		s.install()
		loadSets(t)
		diagnoses(t, s.doctor(), healthy.but(diagnosis{"dovecot.login": "ok: .* tried: it trusts 2001:db8:[0-9a-f:]+;"}))
		wantNobody(t)
		nstest.Nft(t, "flush ruleset; table inet filter { set trusted_ipv4 { type ipv4_addr; flags timeout; }\nset trusted_ipv6 { type ipv6_addr; flags timeout; }\nset banned_ipv4 { type ipv4_addr; flags timeout; }\nset banned_ipv6 { type ipv6_addr; flags timeout; }\n}\n")
		diagnoses(t, s.doctor(), healthy.but(diagnosis{"dovecot.login": "ok: .* tried: it trusts 2001:db8:[0-9a-f:]+;"}))
		wantNobody(t)
	})
}

// A change that Dovecot has not read is found, and a reload ends that.
func TestDoctorReload(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{dropIn: unchanged})
		s.install()
		loadSets(t)
		diagnoses(t, s.doctor(), healthy)
		const due = "warn: Dovecot loaded its configuration .* has not read it since " + dir + "/90-nftwl.conf changed$"
		s.edit("", "\n")
		diagnoses(t, s.doctor(), healthy.but(diagnosis{"dovecot.running": due}))
		s.shell("doveadm reload")
		diagnoses(t, s.doctor(), healthy)
		// The service that the configuration names does not exist yet.
		s.write("90-nftwl.conf", strings.NewReplacer("service nftwl", "service later", "unix_listener nftwl", "unix_listener later",
			"imap nftwl", "imap later", "pop3 nftwl", "pop3 later", "submission nftwl", "submission later", "managesieve nftwl", "managesieve later").
			Replace(nstest.Read(s.t, dir+"/90-nftwl.conf")), 0o644)
		later := diagnosis{"dovecot.protocols": "ok: .* service later"}
		diagnoses(t, s.doctor(), healthy.but(later).but(diagnosis{
			"dovecot.running": due, "dovecot.login": "fail: a login by service later was tried: .*no such file",
		}))
		s.shell("doveadm reload")
		diagnoses(t, s.doctor(), healthy.but(later).but(diagnosis{"dovecot.login": "ok: "}))
	})
}

// The remedy, followed to the letter, fixes a service that lacks everything that nftwl
// needs, in one step.
func TestDoctorRemedy(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{dropIn: func(s string) string {
			return strings.NewReplacer("user = root", "user = nobody", "vsz_limit = 1G", "", "process_limit = 1024", "").Replace(s)
		}})
		s.install()
		loadSets(t)
		found := 0
		for _, r := range s.results() {
			m := regexp.MustCompile(`^in (service nftwl), set (.*); then reload Dovecot$`).FindStringSubmatch(r.Remedy)
			if m == nil {
				continue
			}
			found++
			s.write("90-nftwl.conf", nstest.Read(s.t, dir+"/90-nftwl.conf")+m[1]+" {\n"+strings.ReplaceAll(m[2], ", ", "\n")+"\n}\n", 0o644)
			s.shell(r.Command)
		}
		if found != 2 { // for dovecot.process_limit and dovecot.login
			t.Errorf("%d remedies in %+v", found, s.results())
		}
		diagnoses(t, s.doctor(), healthy)
		nstest.Must(t, login(client4, "143", nstest.IMAP, "alice", password))
		wantTrusted(t, client4, "alice", day)
	})
}

// doctor names the line that overrides the drop-in, in a file that Dovecot reads
// later.
func TestDoctorOverridden(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{dropIn: func(string) string { return "!include_try /etc/dovecot/conf.d/*.conf\n" }})
		nstest.Must(t, unix.Mount("none", d.Path("etc/dovecot/conf.d"), "tmpfs", 0, "mode=755"))
		s.install()
		loadSets(t)
		s.shell("nftwl setup dovecot --write && printf 'service pop3 {\n  executable = pop3\n}\n' >/etc/dovecot/conf.d/99-local.conf && doveadm reload")
		diagnoses(t, s.doctor(), healthy.but(diagnosis{"dovecot.protocols": "fail: logins by pop3 trust no one"}))
		for _, r := range s.results() {
			if want := `delete "executable = pop3" from /etc/dovecot/conf.d/99-local.conf, line 2`; r.Check == "dovecot.protocols" && !strings.HasPrefix(r.Remedy, want) {
				t.Errorf("the remedy is %q, want %q", r.Remedy, want)
			}
		}
		s.shell("sed -i 2d /etc/dovecot/conf.d/99-local.conf && doveadm reload")
		diagnoses(t, s.doctor(), healthy)
	})
}

// If doctor does not know the cause, it prints Dovecot's log. It does not wait for a
// program that hangs.
func TestDoctorOnFailure(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{dovecot: runSecond, files: map[string]string{"nftwl": "#!/bin/sh\necho nftwl: error: broken somehow >&2\nexit 1\n"}})
		s.install()
		loadSets(t)
		diagnoses(t, s.doctor(), healthy.but(diagnosis{
			"dovecot.login": "fail: a login by service nftwl was tried: every login is denied: broken somehow$",
		}))
		s.write("nftwl", "#!/bin/sh\nexec sleep 4\n", 0o755)
		diagnoses(t, s.doctor(), healthy.but(diagnosis{
			"dovecot.login": "fail: a login by service nftwl was tried: no answer within 1s",
		}))
	})
}
