package e2e

import (
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

// The server's addresses, on the private namespace's loopback. Clients are in
// 192.0.2.0/24 and 2001:db8::/32.
const server4, server6 = "198.51.100.1", "2001:db8:ffff::1"

// backend4 is the address of the Dovecot behind a proxy.
const backend4 = "198.51.100.2"

const dir = nstest.Dir

const (
	key      = "0123456789abcdef0123456789abcdef"
	password = "secret"
)

// users is a passwd-file. The system needs no user 1000.
const users = `alice:{PLAIN}secret:1000:1000::` + dir + `/mail/alice::
bob:{PLAIN}secret:1000:1000::` + dir + `/mail/bob::nftwl_timeout=7d
carol:{PLAIN}secret:1000:1000::` + dir + `/mail/carol::nftwl_trust=no
dave:{PLAIN}secret:1000:1000::` + dir + `/mail/dave::userdb_nftwl_trust=no
`

const config = `
state_dir = ` + dir + `/state
log_path = ` + dir + `/log
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

// A system is a Debian with a Dovecot.
type system struct {
	nstest.Debian
	version string // of Dovecot
	is23    bool   // needs the settings of 2.3, not those of 2.4
}

// eachSystem runs a test on every available system.
func eachSystem(t *testing.T, test func(*testing.T, system)) {
	nstest.EachDebian(t, func(t *testing.T, d nstest.Debian) { test(t, find(t, d)) })
}

func find(t testing.TB, d nstest.Debian) system {
	t.Helper()
	version := d.DovecotVersion(t)
	return system{d, version, nstest.Is23(version)}
}

// with has a test's changes to a server that is otherwise as shipped.
type with struct {
	config  string   // more lines of nftwl.yaml
	passdb  string   // passdb and userdb, instead of the passwd-file
	dovecot string   // Dovecot settings after the drop-in
	bare    bool     // without nftwld and rules
	socket  bool     // nftwld inherits its socket, as from systemd
	publish bool     // Dovecot runs in a container, which publish makes
	wrap    []string // the command that runs nftwld, before its own
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

// start starts Dovecot and nftwld in new network and mount namespaces, with the
// shipped sets. The calling goroutine stays in the namespaces: see nstest.New.
func (d system) start(t testing.TB, w with) *server {
	t.Helper()
	nstest.Build(t, "cmd/nftwld")
	nstest.New(t)
	s := &server{t: t, d: d, with: w, conf: "dovecot.conf", address: server4, policy: "127.0.0.1", table: "filter"}
	if w.publish {
		s.publish()
	} else {
		for _, a := range []string{server4 + "/32", backend4 + "/32", "192.0.2.1/24", server6 + "/128"} {
			nstest.IP(t, "address add "+a+" dev lo nodad")
		}
		nstest.IP(t, "route add local 2001:db8::/32 dev lo")
	}

	d.Tree(t)
	for _, name := range []string{"state", "mail", "nftwld"} {
		nstest.Must(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
	}

	s.write("users", users, 0o644)
	for _, user := range []string{"alice", "bob", "carol", "dave"} {
		s.write("mail/"+user+"/Maildir/new/1.e2e", nstest.Message, 0o644)
	}
	nstest.Run(t, "chown", "-R", "1000:1000", dir+"/mail")
	dropIn := "2.4"
	if d.is23 {
		dropIn = "2.3"
	}
	s.write("91-nftwl-policy.conf", strings.NewReplacer(": KEY", ": "+key, "= SALT", "= salt", "127.0.0.1", s.policy).
		Replace(nstest.Contrib(t, "dovecot/91-nftwl-policy-"+dropIn+".conf")), 0o600)
	if !w.bare {
		if !w.publish {
			nstest.Nft(t, nstest.Contrib(t, "nftables/sets.nft"))
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

// startBackend starts a second Dovecot, to which the passdb of the first can pass
// logins on. It reads the passwd-file, and reports to the same nftwld.
func (s *server) startBackend(settings string) {
	s.t.Helper()
	own := dir + "/backend"
	nstest.Must(s.t, os.Mkdir(own, 0o755))
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

// configureDovecot writes Dovecot's configuration.
func (s *server) configureDovecot() {
	conf := nstest.DovecotConf{Dir: dir, Databases: s.with.passdb}.For(s.d.version)
	s.write(s.conf, conf+config+s.with.dovecot, 0o644)
}

// startDovecot starts Dovecot, and waits until it listens.
func (s *server) startDovecot() {
	t := s.t
	t.Helper()
	if s.inside != nil {
		nstest.Must(t, unix.Setns(int(s.inside.Fd()), unix.CLONE_NEWNET))
	}
	s.dovecot = s.d.StartDovecot(t, dir+"/"+s.conf, s.address+":143")
	if s.inside != nil {
		nstest.Must(t, unix.Setns(int(s.outside.Fd()), unix.CLONE_NEWNET))
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

// startNftwld starts nftwld, and waits until it listens.
func (s *server) startNftwld() {
	t := s.t
	t.Helper()
	log, err := os.OpenFile(filepath.Join(dir, "nftwld.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	nstest.Must(t, err)
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
	nstest.Must(t, cmd.Start())
	s.nftwld = cmd
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			s.stopNftwld(syscall.SIGTERM)
		}
	})
	s.starts++
	nstest.Poll(s.t, "nftwld to listen", func() bool { return strings.Count(s.read("nftwld.log"), "msg=listening") == s.starts })
}

// stopNftwld sends nftwld a signal, and waits for its exit.
func (s *server) stopNftwld(signal syscall.Signal) {
	s.t.Helper()
	cmd := s.nftwld
	nstest.Must(s.t, cmd.Process.Signal(signal))
	late := time.AfterFunc(nstest.Patience, func() {
		s.t.Errorf("nftwld did not end on %v", signal)
		_ = cmd.Process.Kill() // fails if it has just exited
	})
	defer late.Stop()
	if err := cmd.Wait(); err != nil && signal == syscall.SIGTERM {
		s.t.Errorf("nftwld: %v", err)
	}
}

func (s *server) write(name, text string, mode os.FileMode) {
	s.t.Helper()
	nstest.Write(s.t, filepath.Join(dir, name), text, mode)
}

// read returns the text of a file in dir, or "" if it is missing.
func (s *server) read(name string) string {
	s.t.Helper()
	return nstest.Read(s.t, filepath.Join(dir, name))
}

// metric returns the value of one of nftwld's metrics, such as
// nftwl_trusted_total{outcome="added"}, or "0" if it is missing.
func (s *server) metric(name string) string {
	s.t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (.*)$`).FindStringSubmatch(s.get("/metrics"))
	if m == nil {
		return "0"
	}
	return m[1]
}

// reported waits until nftwld has counted so many reports with labels such as
// protocol="imap",result="success".
func (s *server) reported(labels, count string) {
	s.t.Helper()
	nstest.Poll(s.t, count+" reports with "+labels, func() bool { return s.metric("nftwl_reports_total{"+labels+"}") == count })
}

// in reports whether a set has an element whose text matches.
func (s *server) in(set, element string) bool {
	s.t.Helper()
	return regexp.MustCompile(element).MatchString(nstest.Run(s.t, nstest.Need(s.t, "nft", "nftables"), "list", "set", "inet", s.table, set))
}
