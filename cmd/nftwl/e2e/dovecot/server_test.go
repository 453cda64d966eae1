package dovecot

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// patience bounds each wait for something that must happen. It is no guess of
// how long that takes: every wait ends as soon as it has happened.
const patience = 30 * time.Second

// The server's addresses and its clients', all on the private namespace's
// loopback. None is in 127.0.0.0/8, which nftwl ignores unless told otherwise.
const (
	server4, server6 = "198.51.100.1", "2001:db8:1::1"
	client4, client6 = "192.0.2.7", "2001:db8::7"
)

// dir is where all of a server's files lie, as Dovecot sees it: on a tmpfs
// over /run of the test's own mount namespace, next to Dovecot's own run
// folder. Nothing of it reaches the host, and socket paths stay short.
const dir = "/run/e2e"

const password = "secret"

// users is a passwd-file for passdb and userdb alike. No user 1000 need exist.
const users = `alice:{PLAIN}secret:1000:1000::` + dir + `/mail/alice::
bob:{PLAIN}secret:1000:1000::` + dir + `/mail/bob::userdb_nftwl_timeout=7d
carol:{PLAIN}secret:1000:1000::` + dir + `/mail/carol::userdb_nftwl_trust=no
`

// relayPort is where Dovecot's submission hands mail on to.
const relayPort = "10025"

// config23 and config24 are all that differs between the two Dovecots; what
// follows them is the same.
const config23 = `
ssl_cert = <` + dir + `/cert.pem
ssl_key = <` + dir + `/key.pem
disable_plaintext_auth = no
mail_location = maildir:~/Maildir
passdb {
  driver = passwd-file
  args = ` + dir + `/users
}
userdb {
  driver = passwd-file
  args = ` + dir + `/users
}
# Or each wrong password makes the next answer to its address slower.
service anvil {
  unix_listener anvil-auth-penalty {
    mode = 0
  }
}
`

const config24 = `
dovecot_config_version = 2.4.0
dovecot_storage_version = 2.4.0
ssl_server_cert_file = ` + dir + `/cert.pem
ssl_server_key_file = ` + dir + `/key.pem
auth_allow_cleartext = yes
mail_driver = maildir
mail_path = ~/Maildir
passdb passwd-file {
  passwd_file_path = ` + dir + `/users
}
userdb passwd-file {
  passwd_file_path = ` + dir + `/users
}
sieve_script personal {
  path = ~/sieve
}
`

const configBoth = `
state_dir = ` + dir + `/state
log_path = ` + dir + `/log
first_valid_uid = 1000
auth_failure_delay = 0
submission_relay_host = 127.0.0.1
submission_relay_port = ` + relayPort + `
!include ` + dir + `/90-nftwl.conf
`

// A dovecot is an installed Dovecot, on the host or in a tree of another
// distribution.
type dovecot struct {
	root      string // "/" or the tree
	version   string
	protocols []string
}

// eachDovecot runs a test on every Dovecot there is.
func eachDovecot(t *testing.T, test func(*testing.T, dovecot)) {
	t.Run("host", func(t *testing.T) {
		t.Parallel()
		test(t, hostDovecot(t))
	})
	t.Run("trixie", func(t *testing.T) {
		t.Parallel()
		test(t, findDovecot(t, nstest.Trixie(t)))
	})
}

// hostDovecot returns the one that is installed here.
func hostDovecot(t testing.TB) dovecot {
	t.Helper()
	nstest.Need(t, "dovecot", "dovecot-core")
	return findDovecot(t, "/")
}

// is23 says whether it wants Dovecot 2.3's settings, not 2.4's.
func (d dovecot) is23() bool { return strings.HasPrefix(d.version, "2.3.") }

func findDovecot(t testing.TB, root string) dovecot {
	t.Helper()
	nstest.NeedUsers(t)
	d := dovecot{root: root}
	cmd := exec.Command("/usr/sbin/dovecot", "--version")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("dovecot --version: %v\n%s", err, out)
	}
	d.version = string(out)
	for _, p := range []struct{ protocol, program, debianPackage string }{
		{"imap", "imap", "dovecot-imapd"},
		{"pop3", "pop3", "dovecot-pop3d"},
		{"submission", "submission", "dovecot-submissiond"},
		{"sieve", "managesieve", ""}, // tested where there is one
	} {
		_, err := os.Stat(filepath.Join(root, "usr/lib/dovecot", p.program))
		switch {
		case err == nil:
			d.protocols = append(d.protocols, p.protocol)
		case p.debianPackage != "":
			nstest.Skip(t, "Dovecot's %s is not installed: apt-get install %s", p.protocol, p.debianPackage)
		}
	}
	return d
}

// with is what a test changes of a server that is otherwise as shipped.
type with struct {
	config  string                // /etc/nftwl.yaml; none if empty
	dropIn  func(s string) string // edits the drop-in
	dovecot string                // Dovecot settings after the drop-in
	files   map[string]string     // executable files in dir
	hide    []string              // files under /usr/lib/dovecot that are not to exist
	wrap    []string              // a command to run Dovecot under
	env     []string              // more of Dovecot's environment
}

type server struct {
	t       testing.TB
	d       dovecot
	with    with
	dovecot *nstest.Dovecot
}

// start runs Dovecot in new network and mount namespaces, in which the nftwl
// just built is /usr/bin/nftwl. The calling goroutine stays in them: see
// nstest.New.
func (d dovecot) start(t testing.TB, w with) *server {
	t.Helper()
	nftwl := nstest.Build(t, "cmd/nftwl")
	dropIn := filepath.Join(nstest.Root(t), "contrib/dovecot/90-nftwl.conf")

	nstest.New(t)
	for _, a := range []string{server4 + "/32", client4 + "/32", server6 + "/128", client6 + "/128"} {
		run(t, nstest.Need(t, "ip", "iproute2"), "address", "add", a, "dev", "lo", "nodad")
	}
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", relayPort))
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go relay(l)

	nstest.Tree(t, d.root)
	s := &server{t: t, d: d, with: w}
	for _, name := range []string{"state", "etc", "lib", "mail"} {
		must(t, os.MkdirAll(s.path(name), 0o755))
	}

	// Read-only overlays: the host's own folders, and ours before them.
	s.overlay(filepath.Dir(nftwl), "usr/bin")
	if w.config != "" {
		s.write("etc/nftwl.yaml", w.config, 0o644)
	} else {
		s.whiteout("etc/nftwl.yaml")
	}
	s.overlay(s.path("etc"), "etc")
	for _, name := range w.hide {
		s.whiteout("lib/" + name)
	}
	s.overlay(s.path("lib"), "usr/lib/dovecot")

	s.write("90-nftwl.conf", "", 0o644)
	if w.dropIn == nil {
		must(t, unix.Mount(dropIn, s.path("90-nftwl.conf"), "", unix.MS_BIND, ""))
	} else {
		b, err := os.ReadFile(dropIn)
		must(t, err)
		s.write("90-nftwl.conf", w.dropIn(string(b)), 0o644)
	}
	for name, text := range w.files {
		s.write(name, text, 0o755)
	}

	cert, key := certificate(t)
	s.write("cert.pem", cert, 0o644)
	s.write("key.pem", key, 0o600)
	s.write("users", users, 0o644)
	for _, user := range []string{"alice", "bob", "carol"} {
		s.write("mail/"+user+"/Maildir/new/1.e2e", message, 0o644)
	}
	run(t, "chown", "-R", "1000:1000", s.path("mail"))
	header := config24
	if d.is23() {
		header = config23
	}
	s.write("dovecot.conf", header+configBoth+
		"protocols = "+strings.Join(d.protocols, " ")+"\n"+w.dovecot, 0o644)

	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Dovecot %s%s", d.version, s.log())
		}
	})
	s.dovecot = nstest.StartDovecot(t, d.root, dir+"/dovecot.conf", net.JoinHostPort(server4, "143"), s.path("out"), w.wrap, w.env)
	return s
}

// path is where the test finds a file in dir.
func (s *server) path(name string) string { return filepath.Join(s.d.root, dir, name) }

func (s *server) write(name, text string, mode os.FileMode) {
	s.t.Helper()
	must(s.t, os.MkdirAll(filepath.Dir(s.path(name)), 0o755))
	must(s.t, os.WriteFile(s.path(name), []byte(text), mode))
	must(s.t, os.Chmod(s.path(name), mode)) // whatever the umask
}

func (s *server) read(name string) string {
	s.t.Helper()
	b, err := os.ReadFile(s.path(name))
	must(s.t, err)
	return string(b)
}

// whiteout makes what overlayfs takes for "no such file here": a device 0:0
// (kernel, Documentation/filesystems/overlayfs.rst).
func (s *server) whiteout(name string) {
	s.t.Helper()
	must(s.t, os.MkdirAll(filepath.Dir(s.path(name)), 0o755))
	must(s.t, unix.Mknod(s.path(name), unix.S_IFCHR, 0))
}

// overlay puts the folder above over a folder of Dovecot's.
func (s *server) overlay(above, folder string) {
	s.t.Helper()
	folder = filepath.Join(s.d.root, folder)
	must(s.t, unix.Mount("overlay", folder, "overlay", unix.MS_RDONLY, "lowerdir="+above+":"+folder))
}

// log is what Dovecot wrote, to its log and to stderr.
func (s *server) log() string {
	s.t.Helper()
	log := s.read("out")
	if _, err := os.Stat(s.path("log")); err == nil {
		log += s.read("log")
	}
	return log
}

var (
	logged = regexp.MustCompile(`(?m)^\w+ +\d+ [\d:]+ (.*?: (?:Warning|Error|Fatal|Panic): .*)$`)
	// How Dovecot says that it was stopped or reloaded, and that the machine was stopped.
	stopped = regexp.MustCompile(`Warning: (Killed with signal 15|SIGHUP received|Shutting down logging|Time moved forwards)`)
)

// complaints stops Dovecot and returns what it logged above the level of
// information. Before, it waits for count of them: a process may be gone
// while its last line is still on its way into the log.
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
	for end := time.Now().Add(patience); len(lines()) < count && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
	s.dovecot.Stop()
	return lines()
}

// wantLog stops Dovecot and compares what it complained of with what it
// should have: one regular expression a line.
func (s *server) wantLog(want ...string) {
	s.t.Helper()
	got := s.complaints(len(want))
	if !slices.EqualFunc(got, want, func(line, re string) bool {
		return regexp.MustCompile("^" + re + "$").MatchString(line)
	}) {
		s.t.Errorf("Dovecot's log complains:\n\t%s\nwant:\n\t%s",
			strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

// wantComplaints stops Dovecot and compares what nftwl complained of to its log
// with what it should have: one regular expression a line. Nobody else may have
// complained.
func (s *server) wantComplaints(want ...string) {
	s.t.Helper()
	var lines []string
	for _, w := range want {
		lines = append(lines, "nftwl: Error: nftwl: error: "+w)
	}
	s.wantLog(lines...)
}

func poll(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
