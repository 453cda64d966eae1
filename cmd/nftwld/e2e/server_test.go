package e2e

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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

// The server's addresses, on the private namespace's loopback. Clients are in
// 192.0.2.0/24 and 2001:db8::/32.
const server4, server6 = "198.51.100.1", "2001:db8:ffff::1"

// backend4 is the address of the Dovecot behind a proxy.
const backend4 = "198.51.100.2"

// dir is where all of a server's files are, as Dovecot sees it: on a tmpfs over
// /run of the test's own mount namespace. Nothing of it reaches the host.
const dir = "/run/e2e"

const (
	key      = "0123456789abcdef0123456789abcdef"
	password = "secret"
)

// users is a passwd-file. No user 1000 need exist.
const users = `alice:{PLAIN}secret:1000:1000::` + dir + `/mail/alice::
bob:{PLAIN}secret:1000:1000::` + dir + `/mail/bob::nftwl_timeout=7d
carol:{PLAIN}secret:1000:1000::` + dir + `/mail/carol::nftwl_trust=no
dave:{PLAIN}secret:1000:1000::` + dir + `/mail/dave::userdb_nftwl_trust=no
`

// passwd23 and passwd24 are the databases that read it.
const (
	passwd23 = `
passdb {
  driver = passwd-file
  args = ` + dir + `/users
}
userdb {
  driver = passwd-file
  args = ` + dir + `/users
}
`
	passwd24 = `
passdb passwd-file {
  passwd_file_path = ` + dir + `/users
}
userdb passwd-file {
  passwd_file_path = ` + dir + `/users
}
`
)

const config23 = `
ssl = no
disable_plaintext_auth = no
mail_location = maildir:~/Maildir
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
ssl = no
auth_allow_cleartext = yes
mail_driver = maildir
mail_path = ~/Maildir
`

const configBoth = `
state_dir = ` + dir + `/state
log_path = ` + dir + `/log
first_valid_uid = 1000
auth_failure_delay = 0
auth_mechanisms = plain login cram-md5 scram-sha-1 scram-sha-256
mail_max_userip_connections = 1000
protocols = imap pop3
service imap-login {
  process_limit = 400
}
service auth {
  unix_listener ` + dir + `/auth {
    mode = 0666
  }
}
!include ` + dir + `/91-nftwl-policy.conf
`

// A system is a Debian: the host's, or the Debian 13 tree.
type system struct {
	root string // "/" or the tree
	is23 bool   // its Dovecot wants 2.3's settings, not 2.4's
}

// eachSystem runs a test on every system there is.
func eachSystem(t *testing.T, test func(*testing.T, system)) {
	t.Run("host", func(t *testing.T) {
		t.Parallel()
		nstest.Need(t, "dovecot", "dovecot-core")
		test(t, find(t, "/"))
	})
	t.Run("trixie", func(t *testing.T) {
		t.Parallel()
		test(t, find(t, nstest.Trixie(t)))
	})
}

func find(t testing.TB, root string) system {
	t.Helper()
	nstest.NeedUsers(t)
	cmd := exec.Command("/usr/sbin/dovecot", "--version")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("dovecot --version: %v\n%s", err, out)
	}
	return system{root, bytes.HasPrefix(out, []byte("2.3."))}
}

// with is what a test changes of a server that is otherwise as shipped.
type with struct {
	config  string // more of nftwl.yaml
	passdb  string // in place of the passwd-file
	dovecot string // Dovecot settings after the drop-in
	bare    bool   // no nftwld, and no rules
	socket  bool   // nftwld inherits its socket, as from systemd
	publish bool   // Dovecot is in a container, which publish makes
	wrap    []string
}

type server struct {
	t    testing.TB
	d    system
	with with

	conf    string // of Dovecot, in dir
	address string // where it listens, with port 143
	policy  string // where nftwld listens, with port 8085
	table   string // of the sets, in family inet

	inside, outside *os.File // the network namespaces of a container and the host
	internet        *nstest.Peer

	dovecot *nstest.Dovecot
	nftwld  *exec.Cmd
	starts  int      // of nftwld
	socket  *os.File // that nftwld inherits
}

// start runs Dovecot and nftwld in new network and mount namespaces, with the
// shipped sets. The calling goroutine stays in them: see nstest.New.
func (d system) start(t testing.TB, w with) *server {
	t.Helper()
	nstest.Build(t, "cmd/nftwld")
	nstest.New(t)
	s := &server{t: t, d: d, with: w, conf: "dovecot.conf", address: server4, policy: "127.0.0.1", table: "filter"}
	if w.publish {
		s.publish()
	} else {
		for _, a := range []string{server4 + "/32", backend4 + "/32", "192.0.2.1/24", server6 + "/128"} {
			run(t, nstest.Need(t, "ip", "iproute2"), "address", "add", a, "dev", "lo", "nodad")
		}
		run(t, "ip", "route", "add", "local", "2001:db8::/32", "dev", "lo")
	}

	nstest.Tree(t, d.root)
	for _, name := range []string{"state", "mail", "nftwld"} {
		must(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
	}

	s.write("users", users, 0o644)
	for _, user := range []string{"alice", "bob", "carol", "dave"} {
		s.write("mail/"+user+"/Maildir/new/1.e2e", "Subject: test\n\nYou have mail.\n", 0o644)
	}
	run(t, "chown", "-R", "1000:1000", dir+"/mail")
	dropIn := "2.4"
	if d.is23 {
		dropIn = "2.3"
	}
	s.write("91-nftwl-policy.conf", strings.NewReplacer(": KEY", ": "+key, "= SALT", "= salt", "127.0.0.1", s.policy).
		Replace(contrib(t, "dovecot/91-nftwl-policy-"+dropIn+".conf")), 0o600)
	if !w.bare {
		if !w.publish {
			nstest.Nft(t, contrib(t, "nftables/sets.nft"))
		}
		s.write("policy.key", key+"\n", 0o600)
		s.write("nftwl.yaml", "table: inet "+s.table+"\npolicy: {listen: "+s.policy+":8085, key_file: "+dir+"/policy.key}\n"+w.config, 0o644)
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("nftwld:\n%s", s.read("nftwld.log"))
			}
		})
		s.startNftwld()
	}
	s.configureDovecot()
	s.startDovecot()
	return s
}

// startBackend runs a second Dovecot, to which s.d's passdb can hand logins on.
// It reads the passwd-file, and reports to the same nftwld.
func (s *server) startBackend(settings string) {
	s.t.Helper()
	own := dir + "/backend"
	must(s.t, os.Mkdir(own, 0o755))
	backend := &server{t: s.t, d: s.d, conf: "backend.conf", address: backend4, with: with{dovecot: `
listen = ` + backend4 + `
base_dir = ` + own + `/run
state_dir = ` + own + `/state
service auth {
  unix_listener ` + dir + `/auth {
    mode = 0
  }
}
` + settings}}
	backend.configureDovecot()
	backend.startDovecot()
}

// configureDovecot writes its configuration.
func (s *server) configureDovecot() {
	header, passdb := config24, passwd24
	if s.d.is23 {
		header, passdb = config23, passwd23
	}
	if s.with.passdb != "" {
		passdb = s.with.passdb
	}
	s.write(s.conf, header+passdb+configBoth+s.with.dovecot, 0o644)
}

// startDovecot waits until it listens.
func (s *server) startDovecot() {
	t := s.t
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Dovecot:\n%s%s", s.read(s.conf+".out"), s.read("log"))
		}
	})
	if s.inside != nil {
		must(t, unix.Setns(int(s.inside.Fd()), unix.CLONE_NEWNET))
	}
	s.dovecot = nstest.StartDovecot(t, s.d.root, dir+"/"+s.conf, s.address+":143", filepath.Join(dir, s.conf+".out"), nil, nil)
	if s.inside != nil {
		must(t, unix.Setns(int(s.outside.Fd()), unix.CLONE_NEWNET))
	}
}

func listens(address string) bool {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

const policyAddress = "127.0.0.1:8085"

// startNftwld waits until it listens.
func (s *server) startNftwld() {
	t := s.t
	t.Helper()
	log, err := os.OpenFile(filepath.Join(dir, "nftwld.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	must(t, err)
	defer log.Close()
	argv := append(s.with.wrap, nstest.Build(t, "cmd/nftwld"), "--config", dir+"/nftwl.yaml", "--state", dir+"/nftwld", "--verbose")
	if s.with.socket && s.socket == nil {
		s.socket = s.keepSocket()
	}
	if s.socket != nil {
		argv = append([]string{"/bin/sh", "-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"`, "sh"}, argv...)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{}
	if s.socket != nil {
		cmd.ExtraFiles = []*os.File{s.socket}
	}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, cmd.Start())
	s.nftwld = cmd
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			s.stopNftwld(syscall.SIGTERM)
		}
	})
	s.starts++
	s.poll("nftwld to listen", func() bool { return strings.Count(s.read("nftwld.log"), "msg=listening") == s.starts })
}

// stopNftwld sends it a signal and waits for its end.
func (s *server) stopNftwld(signal syscall.Signal) {
	s.t.Helper()
	cmd := s.nftwld
	must(s.t, cmd.Process.Signal(signal))
	late := time.AfterFunc(patience, func() {
		s.t.Errorf("nftwld did not end on %v", signal)
		_ = cmd.Process.Kill() // fails where it has just exited
	})
	defer late.Stop()
	if err := cmd.Wait(); err != nil && signal == syscall.SIGTERM {
		s.t.Errorf("nftwld: %v", err)
	}
}

func (s *server) write(name, text string, mode os.FileMode) {
	s.t.Helper()
	path := filepath.Join(dir, name)
	must(s.t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(s.t, os.WriteFile(path, []byte(text), mode))
	must(s.t, os.Chmod(path, mode)) // whatever the umask
}

// read returns a file in dir; one that is missing is empty.
func (s *server) read(name string) string {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.t.Fatal(err)
	}
	return string(b)
}

// metric returns a line of nftwld's metrics, such as
// nftwl_trusted_total{outcome="added"}; 0 where there is none.
func (s *server) metric(name string) string {
	s.t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (.*)$`).FindStringSubmatch(s.get("/metrics"))
	if m == nil {
		return "0"
	}
	return m[1]
}

// reported waits until nftwld has so many reports of a kind:
// protocol="imap",result="success".
func (s *server) reported(labels, count string) {
	s.t.Helper()
	s.poll(count+" reports with "+labels, func() bool { return s.metric("nftwl_reports_total{"+labels+"}") == count })
}

// in tells whether a set has an element whose text matches.
func (s *server) in(set, element string) bool {
	s.t.Helper()
	return regexp.MustCompile(element).MatchString(run(s.t, nstest.Need(s.t, "nft", "nftables"), "list", "set", "inet", s.table, set))
}

func (s *server) poll(what string, done func() bool) {
	s.t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

// contrib returns a file that is shipped.
func contrib(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(nstest.Root(t), "contrib", name))
	must(t, err)
	return string(b)
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
