package dovecot

import (
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// The addresses of the server and its clients, all on the private namespace's
// loopback. None is in 127.0.0.0/8, which nftwl ignores by default.
const (
	server4, server6 = "198.51.100.1", "2001:db8:1::1"
	client4, client6 = "192.0.2.7", "2001:db8::7"
)

const dir = nstest.Dir

const password = "secret"

// users is a passwd-file for both passdb and userdb. The system needs no user 1000.
const users = `alice:{PLAIN}secret:1000:1000::` + dir + `/mail/alice::
bob:{PLAIN}secret:1000:1000::` + dir + `/mail/bob::userdb_nftwl_timeout=7d
carol:{PLAIN}secret:1000:1000::` + dir + `/mail/carol::userdb_nftwl_trust=no
`

// relayPort is the port to which Dovecot's submission service passes mail on.
const relayPort = "10025"

const config = `
state_dir = ` + dir + `/state
log_path = ` + dir + `/log
submission_relay_host = 127.0.0.1
submission_relay_port = ` + relayPort + `
!include ` + dir + `/90-nftwl.conf
`

// config24 has settings that Dovecot 2.4 needs for ManageSieve.
const config24 = `
sieve_script personal {
  path = ~/sieve
}
`

// A dovecot is an installed Dovecot.
type dovecot struct {
	nstest.Debian
	version   string
	protocols []string
}

// eachDovecot runs a test on every available Dovecot.
func eachDovecot(t *testing.T, test func(*testing.T, dovecot)) {
	nstest.EachDebian(t, func(t *testing.T, d nstest.Debian) { test(t, find(t, d)) })
}

// hostDovecot returns the Dovecot that is installed on this machine.
func hostDovecot(t testing.TB) dovecot {
	t.Helper()
	return find(t, nstest.Host)
}

// is23 reports whether it needs the settings of 2.3, not those of 2.4.
func (d dovecot) is23() bool { return nstest.Is23(d.version) }

func find(t testing.TB, system nstest.Debian) dovecot {
	t.Helper()
	d := dovecot{system, system.DovecotVersion(t), []string{"imap", "pop3", "submission"}}
	for _, name := range d.protocols {
		d.Need(t, "usr/lib/dovecot/"+name, "dovecot-"+name+"d")
	}
	// ManageSieve is optional.
	if _, err := os.Stat(d.Path("usr/lib/dovecot/managesieve")); err == nil {
		d.protocols = append(d.protocols, "sieve")
	}
	return d
}

// with has a test's changes to a server that is otherwise as shipped.
type with struct {
	config  string                // /etc/nftwl.yaml; none if empty
	dropIn  func(s string) string // edits the drop-in
	dovecot string                // Dovecot settings after the drop-in
	files   map[string]string     // executable files in dir
	hide    []string              // files under /usr/lib/dovecot that must not exist
	wrap    []string              // a command that runs Dovecot
}

type server struct {
	t       testing.TB
	d       dovecot
	with    with
	dovecot *nstest.Dovecot
}

// start starts Dovecot in new network and mount namespaces, in which /usr/bin/nftwl is
// the program just built. The calling goroutine stays in the namespaces: see
// nstest.New.
func (d dovecot) start(t testing.TB, w with) *server {
	t.Helper()
	nftwl := nstest.Build(t, "cmd/nftwl")
	dropIn := filepath.Join(nstest.Root(t), "contrib/dovecot/90-nftwl.conf")

	nstest.New(t)
	for _, a := range []string{server4 + "/32", client4 + "/32", server6 + "/128", client6 + "/128"} {
		nstest.IP(t, "address add "+a+" dev lo nodad")
	}
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", relayPort))
	nstest.Must(t, err)
	t.Cleanup(func() { l.Close() })
	go relay(l)

	d.Tree(t)
	s := &server{t: t, d: d, with: w}
	for _, name := range []string{"state", "etc", "lib", "mail"} {
		nstest.Must(t, os.MkdirAll(s.path(name), 0o755))
	}

	// Read-only overlays: our directories above those of the host.
	d.Overlay(t, "usr/bin", filepath.Dir(nftwl))
	if w.config != "" {
		s.write("etc/nftwl.yaml", w.config, 0o644)
	} else {
		nstest.Whiteout(t, s.path("etc/nftwl.yaml"))
	}
	d.Overlay(t, "etc", s.path("etc"))
	for _, name := range w.hide {
		nstest.Whiteout(t, s.path("lib/"+name))
	}
	d.Overlay(t, "usr/lib/dovecot", s.path("lib"))

	s.write("90-nftwl.conf", "", 0o644)
	if w.dropIn == nil {
		nstest.Must(t, unix.Mount(dropIn, d.Path(s.path("90-nftwl.conf")), "", unix.MS_BIND, ""))
	} else {
		s.write("90-nftwl.conf", w.dropIn(nstest.Read(t, dropIn)), 0o644)
	}
	for name, text := range w.files {
		s.write(name, text, 0o755)
	}

	cert, key := nstest.Certificate(t)
	s.write("cert.pem", cert, 0o644)
	s.write("key.pem", key, 0o600)
	s.write("users", users, 0o644)
	for _, user := range []string{"alice", "bob", "carol"} {
		s.write("mail/"+user+"/Maildir/new/1.e2e", nstest.Message, 0o644)
	}
	nstest.Run(t, "chown", "-R", "1000:1000", s.path("mail"))
	conf := nstest.DovecotConf{Dir: dir, TLS: true}.For(d.version) + config
	if !d.is23() {
		conf += config24
	}
	s.write("dovecot.conf", conf+"protocols = "+strings.Join(d.protocols, " ")+"\n"+w.dovecot, 0o644)
	s.dovecot = d.StartDovecot(t, dir+"/dovecot.conf", net.JoinHostPort(server4, "143"), w.wrap...)
	return s
}

// path returns the path of a file in dir, which is the same for Dovecot.
func (s *server) path(name string) string { return filepath.Join(dir, name) }

func (s *server) write(name, text string, mode os.FileMode) {
	s.t.Helper()
	nstest.Write(s.t, s.path(name), text, mode)
}

// log returns what Dovecot wrote to its log and to stderr.
func (s *server) log() string {
	s.t.Helper()
	return nstest.Read(s.t, s.path("dovecot.conf.out")) + nstest.Read(s.t, s.path("log"))
}

var (
	logged = regexp.MustCompile(`(?m)^\w+ +\d+ [\d:]+ (.*?: (?:Warning|Error|Fatal|Panic): .*)$`)
	// Dovecot's messages when it was stopped or reloaded, and after the machine was
	// suspended.
	stopped = regexp.MustCompile(`Warning: (Killed with signal 15|SIGHUP received|Shutting down logging|Time moved forwards)`)
)

// complaints stops Dovecot, and returns the warnings and errors that it logged. It first
// waits for count of them, because a process can end before its last line is in the
// log.
func (s *server) complaints(count int) []string {
	s.t.Helper()
	lines := func() []string {
		var all []string
		for _, m := range logged.FindAllStringSubmatch(s.log(), -1) {
			if !stopped.MatchString(m[1]) {
				all = append(all, m[1])
			}
		}
		return all
	}
	for end := time.Now().Add(nstest.Patience); len(lines()) < count && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
	s.dovecot.Stop()
	return lines()
}

// wantLog stops Dovecot, and compares its warnings and errors with regular expressions,
// one for each line.
func (s *server) wantLog(want ...string) {
	s.t.Helper()
	got := s.complaints(len(want))
	if !slices.EqualFunc(got, want, func(line, re string) bool {
		return regexp.MustCompile("^" + re + "$").MatchString(line)
	}) {
		s.t.Errorf("Dovecot's log has:\n\t%s\nwant:\n\t%s",
			strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

// wantComplaints stops Dovecot, and compares nftwl's errors in its log with regular
// expressions, one for each line. There must be no others.
func (s *server) wantComplaints(want ...string) {
	s.t.Helper()
	var lines []string
	for _, w := range want {
		lines = append(lines, "nftwl: Error: nftwl: error: "+w)
	}
	s.wantLog(lines...)
}
