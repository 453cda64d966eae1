package dovecot

import (
	"errors"
	"fmt"
	"net/textproto"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

const day = 24 * time.Hour

// command is the drop-in's line that some tests change.
const command = "executable = script-login /usr/bin/nftwl login"

func TestLoginIsTrusted(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{})
		check := func(what, client string, err error) {
			t.Helper()
			if err != nil {
				t.Errorf("%s from %s: %v", what, client, err)
			}
			wantTrusted(t, client, "alice", day)
			nstest.Nft(t, "flush ruleset")
			loadSets(t)
		}
		loadSets(t)
		for _, name := range d.protocols {
			p := protocols[name]
			for _, client := range []string{client4, client6} {
				check(name, client, login(client, p.port, p.visit, "alice", password))
			}
		}
		check("imaps", client4, loginTLS(client4, "993", nstest.IMAP, "alice", password))
		check("pop3s", client6, loginTLS(client6, "995", nstest.POP3, "alice", password))
		s.wantComplaints()
	})
}

func TestNotTrusted(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{})
		loadSets(t)
		for _, name := range d.protocols {
			p := protocols[name]
			if err := login(client4, p.port, p.visit, "alice", "wrong"); !errors.Is(err, nstest.ErrDenied) {
				t.Errorf("%s with a wrong password: %v, want %v", name, err, nstest.ErrDenied)
			}
			wantNobody(t)
		}
		for _, c := range []struct{ what, from, user string }{
			{"nftwl_trust=no", client4, "carol"},
			{"loopback", "127.0.0.1", "alice"},
			{"the server's own address", server4, "alice"},
			{"the server's own address", server6, "alice"},
		} {
			if err := login(c.from, "143", nstest.IMAP, c.user, password); err != nil {
				t.Errorf("%s: %v", c.what, err)
			}
			wantNobody(t)
		}
		s.wantComplaints()
	})
}

func TestTimeoutOfUser(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{})
		loadSets(t)
		if err := login(client4, "143", nstest.IMAP, "bob", password); err != nil {
			t.Error(err)
		}
		wantTrusted(t, client4, "bob", 7*day) // nftwl_timeout=7d
		s.wantComplaints()
	})
}

// The first promise: a login never fails because of nftwl. Each login logs one line
// with the cause.
func TestFailureDeniesNoLogin(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		ruleset string // loaded instead of the shipped sets
		config  string
		nobody  bool     // nftwl runs as user nobody
		wrap    []string // a command that runs Dovecot
		says    string
	}{{
		name:    "no table",
		ruleset: "table inet other { set trusted_ipv4 { type ipv4_addr . inet_service; timeout 1d; }; }",
		says:    ".*inet filter.*",
	}, {
		name:    "no set",
		ruleset: "table inet filter { set trusted_ipv6 { type ipv6_addr . inet_service; timeout 1d; }; }",
		says:    ".*trusted_ipv4.*",
	}, {
		name:    "set full",
		ruleset: fullSet,
		says:    ".*trusted_ipv4.* full .*5 elements.*",
	}, {
		name:    "key of another type",
		ruleset: "table inet filter { set trusted_ipv4 { type inet_service; timeout 1d; }; }",
		says:    ".*trusted_ipv4.*",
	}, {
		name:   "unknown key in the config",
		config: "timeout: 1d\ntiemout: 2d\n",
		says:   ".*/etc/nftwl.yaml.*2.*tiemout.*",
	}, {
		name:   "service without root",
		nobody: true,
		says:   ".*CAP_NET_ADMIN.*",
	}, {
		// As under a systemd unit with a CapabilityBoundingSet.
		name: "root without CAP_NET_ADMIN",
		wrap: withoutNetAdmin,
		says: ".*CAP_NET_ADMIN.*",
	}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			eachDovecot(t, func(t *testing.T, d dovecot) {
				w := with{config: c.config, wrap: c.wrap}
				if c.nobody {
					w.dovecot = "service nftwl {\n  user = nobody\n}\n"
				}
				s := d.start(t, w)
				if c.ruleset == "" {
					loadSets(t)
				} else {
					nstest.Nft(t, c.ruleset)
				}
				before := ruleset(t)
				var log []string
				for _, name := range d.protocols {
					p := protocols[name]
					if err := login(client4, p.port, p.visit, "alice", password); err != nil {
						t.Errorf("%s: %v", name, err)
					}
					log = append(log, c.says)
				}
				s.wantComplaints(log...)
				if after := ruleset(t); after != before {
					t.Errorf("the ruleset was\n%s\nand is\n%s", before, after)
				}
			})
		})
	}
}

// nobody is the id of the user and the group of that name, in every Debian.
const nobody = 65534

var withoutNetAdmin = []string{"/usr/bin/setpriv", "--bounding-set=-net_admin"}

// fullSet is full of permanent elements, so that a listing does not change.
const fullSet = `table inet filter {
	set trusted_ipv4 {
		type ipv4_addr . inet_service
		flags timeout
		size 5
		elements = { 203.0.113.1 . 1, 203.0.113.1 . 2, 203.0.113.1 . 3, 203.0.113.1 . 4, 203.0.113.1 . 5 }
	}
}`

func ruleset(t *testing.T) string {
	t.Helper()
	return nstest.Run(t, nstest.Need(t, "nft", "nftables"), "list", "ruleset")
}

// The second promise: a user who keeps logging in stays trusted, and no login shortens
// a longer trust.
func TestRenewal(t *testing.T) {
	t.Parallel()
	const set = "table inet filter { set trusted_ipv4 { type ipv4_addr . inet_service; flags timeout; %s; }; }\n"
	cases := []struct {
		name        string
		settings    string // of the set
		element     string
		timeout     time.Duration
		least, most time.Duration // time left after a login
	}{
		{"same timeout, partly passed", "timeout 1d", "timeout 1d expires 1h", day, day - nstest.Patience, day},
		{"another timeout, shorter", "timeout 1d", "timeout 2h expires 1h", day, day - nstest.Patience, day},
		{"another timeout, of which less is left", "timeout 1d", "timeout 30d expires 1h", day, day - nstest.Patience, day},
		{"longer", "timeout 1d", "timeout 30d expires 29d", 30 * day, 29*day - nstest.Patience, 29 * day},
		{"permanent", "size 100", "", 0, 0, 0},
		{"no default timeout", "size 100", "timeout 2h expires 1h", day, day - nstest.Patience, day},
	}
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{})
		for _, c := range cases {
			nstest.Nft(t, "flush ruleset\n"+fmt.Sprintf(set, c.settings))
			for _, port := range []int{143, 465, 587, 993, 995} {
				nstest.Nft(t, fmt.Sprintf("add element inet filter trusted_ipv4 { %s . %d %s }\n", client4, port, c.element))
			}
			if err := login(client4, "143", nstest.IMAP, "alice", password); err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			got := elements(t, "trusted_ipv4")
			if len(got) != 5 {
				t.Errorf("%s: the set holds %+v", c.name, got)
			}
			for _, e := range got {
				// nft rounds the time left down to whole seconds.
				if e.timeout != c.timeout || e.expires < c.least || e.expires > c.most {
					t.Errorf("%s: port %d has %v left of %v; want %v to %v of %v",
						c.name, e.port, e.expires, e.timeout, c.least, c.most, c.timeout)
				}
			}
		}
		s.wantComplaints()
	})
}

// The program after nftwl, another script or Dovecot's own script-login, must not be
// able to tell that nftwl has run.
func TestLoginLeavesNoTrace(t *testing.T) {
	t.Parallel()
	// Both services start it, and it notes everything that exec passes on.
	const probe = `#!/bin/sh
out=` + dir + `/seen.$1
shift
{
	echo "$@"
	env | grep -v ^AUTH_TOKEN= | sort
	grep -E '^(Sig(Blk|Ign)|Uid|Gid|Groups|Umask|Cap)' /proc/self/status
	cat /proc/self/limits
	pwd
	ls /proc/$$/fd
} >$out
exec "$@"
`
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{
			files: map[string]string{"probe": probe},
			dropIn: func(s string) string {
				return strings.Replace(s, command, command+" "+dir+"/probe nftwl", 1)
			},
			dovecot: `service direct {
  executable = script-login ` + dir + `/probe direct
  user = root
  vsz_limit = 1G
  unix_listener direct {
  }
}
service submission {
  executable = submission direct
}
`})
		loadSets(t)
		// Of the other protocols, only submission has the same environment as imap.
		if err := login(client4, "587", nstest.Submission, "bob", password); err != nil {
			t.Errorf("submission: %v", err)
		}
		wantNobody(t) // otherwise both went through nftwl
		if err := login(client4, "143", nstest.IMAP, "bob", password); err != nil {
			t.Errorf("imap: %v", err)
		}
		wantTrusted(t, client4, "bob", 7*day)
		direct, after := nstest.Read(s.t, dir+"/seen.direct"), nstest.Read(s.t, dir+"/seen.nftwl")
		if direct != after {
			t.Errorf("without nftwl:\n%s\nafter nftwl:\n%s", direct, after)
		}
		s.wantLog()
	})
}

// At the process limit Dovecot makes logins wait, and denies them after 10 s.
func TestManyLoginsAtOnce(t *testing.T) {
	t.Parallel()
	const count = 110 // more than default_process_limit
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{
			dovecot: `mail_max_userip_connections = 1000
service imap-login {
  process_limit = 200
}
`,
			files: map[string]string{"hold": hold},
			dropIn: func(s string) string {
				return strings.Replace(s, command, command+" "+dir+"/hold", 1)
			},
		})
		loadSets(t)
		nstest.Must(t, os.Mkdir(s.path("held"), 0o755))
		nstest.Must(t, unix.Mkfifo(s.path("go"), 0o600))
		results := loginsAtOnce(t, count)
		nstest.Poll(t, "all logins to be in nftwl's service at once", func() bool {
			held, err := os.ReadDir(s.path("held"))
			nstest.Must(t, err)
			return len(held) == count
		})
		release, err := os.OpenFile(s.path("go"), os.O_RDWR, 0)
		nstest.Must(t, err)
		defer release.Close()
		for range count {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		wantTrusted(t, client4, "alice", day)
		s.wantComplaints()
	})
}

// loginsAtOnce lets one client log in count times at once, and returns the result of
// each login.
func loginsAtOnce(t *testing.T, count int) <-chan error {
	t.Helper()
	results := make(chan error)
	for range count {
		c, err := dial(client4, "143") // in this goroutine: other threads are in another namespace
		nstest.Must(t, err)
		go func() {
			defer c.Close()
			results <- nstest.IMAP(textproto.NewConn(c), "alice", password)
		}()
	}
	return results
}

// hold is a program that keeps each login until all are there.
const hold = `#!/bin/sh
>` + dir + `/held/$$
: <` + dir + `/go
exec "$@"
`

// The changes that the drop-in's comments warn of do deny every login.
func TestDropInChanged(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, old, new string
		says           string
	}{
		{"no vsz_limit", "vsz_limit = 1G", "", "nftwl: Error: fatal error: failed to reserve page summary memory"},
		{"two spaces", command, strings.Replace(command, " /", "  /", 1), "execvp(/usr/lib/dovecot/) failed"},
		{"nftwl is missing", command, strings.Replace(command, "nftwl", "missing", 1), "execvp(/usr/bin/missing) failed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			eachDovecot(t, func(t *testing.T, d dovecot) {
				s := d.start(t, with{dropIn: func(s string) string {
					return strings.Replace(s, c.old, c.new, 1)
				}})
				loadSets(t)
				if err := login(client4, "143", nstest.IMAP, "alice", password); !errors.Is(err, nstest.ErrDenied) {
					t.Errorf("%v, want %v", err, nstest.ErrDenied)
				}
				for _, says := range []string{c.says, "imap(alice): Error: Post-login script denied access to user alice"} {
					nstest.Poll(t, "a line in the log: "+says, func() bool { return strings.Contains(s.log(), says) })
				}
			})
		})
	}
}

// Two spaces make an empty argument, which nftwl ignores.
func TestSecondSpace(t *testing.T) {
	t.Parallel()
	for _, spaced := range []string{
		strings.Replace(command, " login", "  login", 1),
		command + "  /usr/bin/env",
	} {
		t.Run(spaced, func(t *testing.T) {
			t.Parallel()
			eachDovecot(t, func(t *testing.T, d dovecot) {
				s := d.start(t, with{dropIn: func(s string) string {
					return strings.Replace(s, command, spaced, 1)
				}})
				loadSets(t)
				if err := login(client4, "143", nstest.IMAP, "alice", password); err != nil {
					t.Error(err)
				}
				wantTrusted(t, client4, "alice", day)
				s.wantLog()
			})
		})
	}
}

// The drop-in works unchanged on a Dovecot that has only IMAP.
func TestProtocolsNotInstalled(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		var hide []string
		for _, name := range []string{"pop3", "submission", "managesieve"} {
			hide = append(hide, name, name+"-login")
		}
		hide = append(hide, "modules/settings/libmanagesieve_settings.so", "modules/settings/libmanagesieve_login_settings.so")
		d.protocols = []string{"imap"}
		s := d.start(t, with{hide: hide})
		loadSets(t)
		if err := login(client4, "143", nstest.IMAP, "alice", password); err != nil {
			t.Error(err)
		}
		wantTrusted(t, client4, "alice", day)
		s.wantLog()
	})
}
