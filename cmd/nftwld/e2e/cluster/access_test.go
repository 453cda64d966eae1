package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// The engine's users, as docs/cluster.md has them: a machine that sends and takes
// both lists, and one that takes trust and cannot write.
const (
	nodeACL = "~nftwl:{mail}:* +ping +time +info +eval +evalsha " +
		"+hget +hmget +hset +hdel +hincrby +hscan +xadd +xread +xrevrange +del"
	readerACL = "%R~nftwl:{mail}:trusted* +ping +time +info +hmget +hscan +xread +xrevrange"
)

const password = "correct horse battery staple"

// user makes a user of an engine's.
func user(e *nstest.Engine, name, acl string) {
	e.Do(append([]string{"ACL", "SETUSER", name, "reset", "on", ">" + password}, strings.Fields(acl)...)...)
}

// as has a machine log in to the engine as a user. more is the rest of its cluster.
func (n *node) as(name, url, word, more string) {
	n.t.Helper()
	file := filepath.Join(n.dir, "password")
	nstest.Write(n.t, file, word+"\n", 0o600)
	n.server = strings.Replace(url, "://", "://"+name+"@", 1)
	n.config("cluster: {password_file: " + file + ", " + more + "}")
}

// denied is what the engine's ACLs have refused so far.
func (l *lan) denied() string { return l.engine.Do("ACL", "LOG") }

// Over TLS with a CA of one's own, as a user that can do what nftwld needs and no
// more.
func TestTLSAndACL(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		ca := newAuthority(t)
		cert, key := ca.sign(t, nstest.Hub)
		l := newLAN(t, d, 3)
		for name, text := range map[string]string{"ca": ca.pem, "cert": cert, "key": key} {
			nstest.Write(t, "/run/engine/"+name+".pem", text, 0o600)
		}
		l.engine.Do("CONFIG", "SET", "tls-cert-file", "/run/engine/cert.pem", "tls-key-file", "/run/engine/key.pem",
			"tls-ca-cert-file", "/run/engine/ca.pem", "tls-auth-clients", "no", "tls-port", "6380")
		user(l.engine, "nftwl", nodeACL)
		user(l.engine, "nothing", "")
		a, b, c := l.nodes[0], l.nodes[1], l.nodes[2]
		const url = "rediss://" + nstest.Hub + ":6380"
		caFile := writeFile(t, ca.pem)
		for _, n := range l.nodes {
			n.as("nftwl", url, password, "ca_file: "+caFile)
		}
		l.engine.Do("CONFIG", "RESETSTAT")
		l.start()
		a.login("198.51.100.1", "alice")
		b.becomes("trusted", "198.51.100.1", true)
		b.nftwl("remove", "198.51.100.1")
		a.becomes("trusted", "198.51.100.1", false)
		a.nftwl("ban", "198.51.100.2", "--timeout", "5s")
		nstest.Poll(t, "the ban to be shared", func() bool { return strings.Contains(l.hash(), "198.51.100.2 +") })
		if out, err := a.output("nftwld", "clear", "trusted"); err != nil {
			t.Errorf("clear: %v, %s", err, out)
		}
		// A machine that reads the whole list sweeps out what has expired.
		nstest.Poll(t, "the ban to end", func() bool { return len(a.list("banned")) == 0 })
		nstest.Poll(t, "the expired record to go", func() bool {
			c.stop()
			c.start()
			c.connected()
			return !strings.Contains(l.hash(), "198.51.100.2")
		})
		if log := l.denied(); log != "" {
			t.Errorf("denied: %s", log)
		}

		// Nor can it do more than it needs.
		c.stop()
		used := l.engine.Do("INFO", "commandstats")
		for word := range strings.FieldsSeq(nodeACL) {
			if name, ok := strings.CutPrefix(word, "+"); ok && !strings.Contains(used, "cmdstat_"+name+":") {
				t.Errorf("%s is not needed", name)
			}
		}

		// Anything wrong has a name.
		for _, wrong := range []struct{ reason, user, url, password, more string }{
			{"login", "nftwl", url, "wrong", "ca_file: " + caFile},
			{"login", "nobody", url, password, "ca_file: " + caFile},
			{"acl", "nothing", url, password, "ca_file: " + caFile},
			{"tls", "nftwl", url, password, ""},
			{"tls", "nftwl", url, password, "ca_file: " + writeFile(t, newAuthority(t).pem)},
		} {
			c.as(wrong.user, wrong.url, wrong.password, wrong.more)
			c.start()
			c.disconnected(wrong.reason)
			c.login("198.51.100.9", "alice")
			if log := c.log(); strings.Contains(log, wrong.password) || strings.Contains(log, password) {
				t.Errorf("%s: the log has the password", wrong.reason)
			}
			nstest.Must(t, c.cmd.Process.Signal(syscall.SIGKILL))
			_ = c.cmd.Wait()
		}
	})
}

func writeFile(t *testing.T, text string) string {
	name := filepath.Join(t.TempDir(), "file")
	nstest.Write(t, name, text, 0o644)
	return name
}

// A machine in a role that can only read trust is let in everywhere and gets in
// nobody.
func TestReader(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		l := newLAN(t, d, 2)
		user(l.engine, "reader", readerACL)
		a, b := l.nodes[0], l.nodes[1]
		b.as("reader", "redis://"+nstest.Hub+":6379", password, "send: [], take: [trusted]")
		a.start()
		a.connected()
		b.start()
		nstest.Poll(t, "the reader", func() bool { return b.metric("cluster_merges") >= 1 && b.metric("cluster_connected") == 1 })
		a.login("198.51.100.1", "alice")
		a.nftwl("ban", "198.51.100.2")
		b.becomes("trusted", "198.51.100.1", true)
		b.login("198.51.100.3", "bob")
		b.nftwl("ban", "198.51.100.4")
		b.nftwl("remove", "198.51.100.1")
		a.login("198.51.100.5", "alice")
		b.becomes("trusted", "198.51.100.5", true)
		l.quiet()
		if !a.is("trusted", "198.51.100.1") || a.is("trusted", "198.51.100.3") || a.is("banned", "198.51.100.4") || b.is("banned", "198.51.100.2") {
			t.Error("the reader has sent something, or taken a ban")
		}
		if sent := b.metric("cluster_sent trusted") + b.metric("cluster_sent banned"); sent != 0 || b.metric("cluster_connected") != 1 {
			t.Errorf("%v sent", sent)
		}
		if log := l.denied(); log != "" {
			t.Errorf("denied: %s", log)
		}
		// The engine keeps it from writing, whatever it runs.
		for _, words := range [][]string{
			{"HSET", "nftwl:{mail}:trusted", "x", "y"},
			{"XADD", "nftwl:{mail}:trusted:log", "*", "x", "y"},
			{"HGETALL", "nftwl:{mail}:banned"},
			{"EVAL", "return redis.call('HSET', KEYS[1], 'x', 'y')", "1", "nftwl:{mail}:trusted"},
			{"GET", "x"}, {"KEYS", "*"}, {"CONFIG", "GET", "*"}, {"FLUSHALL"},
		} {
			if out := l.engine.As("reader", password).Try(words...); !strings.Contains(out, "NOPERM") {
				t.Errorf("%q: %s", words, out)
			}
		}
		// One that is configured to write all the same is told.
		b.stop()
		b.as("reader", "redis://"+nstest.Hub+":6379", password, "take: [trusted], send: [trusted]")
		b.start()
		b.login("198.51.100.6", "bob")
		b.disconnected("acl")
	})
}

// An engine on the same machine, without a port.
func TestUnixSocket(t *testing.T) {
	l := newLAN(t, nstest.Host, 1, "--unixsocket", "/run/engine/sock", "--unixsocketperm", "777")
	a := l.nodes[0]
	user(l.engine, "nftwl", nodeACL)
	// The machines see another /run than the engine.
	a.as("nftwl", fmt.Sprintf("unix:///proc/%d/root/run/engine/sock", l.engine.Pid()), password, "")
	l.start()
	a.login("198.51.100.1", "alice")
	nstest.Poll(t, "the login to be shared", func() bool { return strings.Contains(l.hash(), "198.51.100.1 +") })
}

// authority is a CA.
type authority struct {
	pem  string // its certificate
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{cert: &x509.Certificate{Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}}
	der := a.issue(t, a.cert)
	var err error
	a.cert, err = x509.ParseCertificate(der)
	nstest.Must(t, err)
	a.pem = encode("CERTIFICATE", der)
	return a
}

// sign returns a certificate for an address, and its key, in PEM.
func (a *authority) sign(t *testing.T, address string) (cert, key string) {
	t.Helper()
	ca := *a
	der := ca.issue(t, &x509.Certificate{IPAddresses: []net.IP{net.ParseIP(address)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	pkcs8, err := x509.MarshalPKCS8PrivateKey(ca.key)
	nstest.Must(t, err)
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", pkcs8)
}

// issue makes a key, which becomes a's, and a certificate that its old one signs.
func (a *authority) issue(t *testing.T, template *x509.Certificate) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	nstest.Must(t, err)
	signer := a.key
	if signer == nil {
		signer = key
	}
	a.key = key
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), signer)
	nstest.Must(t, err)
	return der
}

func encode(kind string, b []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
}
