package fail2ban

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// dir is where the daemons' files are, on a tmpfs over /run of the test's own
// mount namespace.
const dir = "/run/e2e"

// Clients are in 192.0.2.0/24 and 2001:db8::/64, which are on the loopback
// interface, too.
const server4, server6 = "198.51.100.1", "2001:db8:ffff::1"

// users is a passwd-file. PAM has the machine's own, as Debian's
// /etc/pam.d/dovecot says.
const users = "alice:{PLAIN}secret:1000:1000::" + dir + "/mail/alice::\n"

// IMAP takes passwords without TLS, and POP3 does not. PAM is asked for root and
// pam-… alone: each passdb that is asked logs a line of its own.
const (
	dovecot23 = `
ssl_cert = <` + dir + `/cert.pem
ssl_key = <` + dir + `/key.pem
disable_plaintext_auth = no
protocol pop3 {
  disable_plaintext_auth = yes
}
mail_location = maildir:~/Maildir
passdb {
  driver = passwd-file
  args = ` + dir + `/users
  username_filter = !root !pam-*
}
passdb {
  driver = pam
  username_filter = root pam-*
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
	dovecot24 = `
dovecot_config_version = 2.4.0
dovecot_storage_version = 2.4.0
ssl_server_cert_file = ` + dir + `/cert.pem
ssl_server_key_file = ` + dir + `/key.pem
auth_allow_cleartext = yes
protocol pop3 {
  auth_allow_cleartext = no
}
mail_driver = maildir
mail_path = ~/Maildir
passdb passwd-file {
  passwd_file_path = ` + dir + `/users
  username_filter = !root !pam-*
}
passdb pam {
  username_filter = root pam-*
}
userdb passwd-file {
  passwd_file_path = ` + dir + `/users
}
`
	dovecotBoth = `
protocols = imap pop3 submission sieve
state_dir = ` + dir + `/state
first_valid_uid = 1000
auth_failure_delay = 0
auth_verbose = yes
auth_mechanisms = plain login cram-md5
# Names of users can look like any part of a line.
auth_username_chars =
submission_relay_host = 127.0.0.1
# Port 587 is Postfix's.
service submission-login {
  inet_listener submission {
    port = 2587
  }
}
service auth {
  unix_listener ` + dir + `/auth {
    mode = 0666
  }
}
`
)

// Nothing is chrooted: the tests' /run is not in the queue's directory.
const (
	mainCf = `
compatibility_level = 3.6
queue_directory = ` + dir + `/queue
data_directory = ` + dir + `/postfix
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
myhostname = mail.example.org
mydestination = mail.example.org
local_recipient_maps =
inet_interfaces = all
alias_maps =
alias_database =
smtpd_tls_chain_files = ` + dir + `/key.pem ` + dir + `/cert.pem
smtpd_tls_security_level = may
smtpd_sasl_type = dovecot
smtpd_sasl_path = ` + dir + `/auth
smtpd_sasl_auth_enable = yes
smtpd_error_sleep_time = 0
`
	masterCf = `
25 inet n - n - - smtpd
  -o smtpd_milters=inet:127.0.0.1:10040
2525 inet n - n - - smtpd
  -o smtpd_milters=inet:127.0.0.1:10041
submission inet n - n - - smtpd
  -o syslog_name=postfix/submission
anvil unix - - n - 1 anvil
cleanup unix n - n - 0 cleanup
proxymap unix - - n - - proxymap
rewrite unix - - n - - trivial-rewrite
tlsmgr unix - - n 1000? 1 tlsmgr
`
)

// daemons are a Dovecot and a Postfix of one Debian, and what they have logged.
type daemons struct {
	testing.TB
	root    string
	dovecot *nstest.Dovecot
	postfix *exec.Cmd
	syslog  chan string
}

// newDaemons makes network and mount namespaces for them, in which the calling
// goroutine stays: see nstest.New.
func newDaemons(t testing.TB, root string) *daemons {
	t.Helper()
	d := &daemons{TB: t, root: root}
	nstest.New(t)
	nstest.Tree(t, root)
	d.must(os.Mkdir(dir, 0o755))
	return d
}

// startDaemons starts both. Dovecot logs to a file of its own or, like Postfix
// and PAM, to syslog.
func startDaemons(t testing.TB, root, dovecotLog string) *daemons {
	t.Helper()
	nstest.NeedUsers(t)
	for _, name := range []string{"usr/sbin/postfix", "usr/lib/dovecot/pop3", "usr/lib/dovecot/submission", "usr/lib/dovecot/managesieve"} {
		if _, err := os.Stat(filepath.Join(root, name)); err != nil {
			nstest.Skip(t, "%v: run testdata/deps.sh as root", err)
		}
	}
	d := newDaemons(t, root)
	for _, address := range []string{server4 + "/32", "192.0.2.254/24", server6 + "/128"} {
		d.run(nstest.Need(t, "ip", "iproute2"), "address", "add", address, "dev", "lo", "nodad")
	}
	for i := range visits {
		d.run("ip", "address", "add", fmt.Sprintf("2001:db8::%x/128", i+1), "dev", "lo", "nodad")
	}
	d.milter("127.0.0.1:10040", "550 5.7.1 Blocked by SpamAssassin")
	d.milter("127.0.0.1:10041", "451 4.7.1 Greylisted, come back later")

	for _, name := range []string{"state", "mail/alice", "etc", "queue", "postfix", "dev"} {
		d.must(os.MkdirAll(filepath.Join(dir, name), 0o755))
	}
	d.run("chown", "-R", "1000:1000", dir+"/mail")
	d.chroot("chown", "postfix", dir+"/postfix")
	d.openSyslog()
	cert, key := certificate(t)
	d.write("cert.pem", cert, 0o644)
	d.write("key.pem", key, 0o600)
	d.write("users", users, 0o644)

	conf := dovecot24
	if strings.HasPrefix(d.chroot("/usr/sbin/dovecot", "--version"), "2.3.") {
		conf = dovecot23
	}
	d.write("dovecot.conf", conf+dovecotBoth+"log_path = "+dovecotLog+"\n", 0o644)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Dovecot: %s", d.read("dovecot.out"))
		}
	})
	d.dovecot = nstest.StartDovecot(t, root, dir+"/dovecot.conf", server4+":143", dir+"/dovecot.out", nil, nil)

	d.write("etc/main.cf", mainCf, 0o644)
	d.write("etc/master.cf", masterCf, 0o644)
	d.postfix = d.command("/usr/sbin/postfix", "-c", dir+"/etc", "start-fg")
	var out bytes.Buffer
	d.postfix.Stdout, d.postfix.Stderr = &out, &out
	d.must(d.postfix.Start())
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Postfix: %s", &out)
		}
		d.stopPostfix()
	})
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", server4+":587")
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatalf("waited %v for Postfix: %v", patience, err)
		}
	}
	return d
}

// openSyslog puts a /dev before the daemons that has the devices they need, and
// a log socket that is ours.
func (d *daemons) openSyslog() {
	d.Helper()
	dev := filepath.Join(dir, "dev")
	for _, name := range []string{"null", "zero", "random", "urandom"} {
		d.write("dev/"+name, "", 0o666)
		d.must(unix.Mount("/dev/"+name, filepath.Join(dev, name), "", unix.MS_BIND, ""))
	}
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dev, "log"), Net: "unixgram"})
	d.must(err)
	d.must(os.Chmod(filepath.Join(dev, "log"), 0o666))
	d.must(unix.Mount(dev, filepath.Join(d.root, "dev"), "", unix.MS_BIND|unix.MS_REC, ""))
	d.syslog = make(chan string, 10_000)
	go func() {
		defer close(d.syslog)
		for b := make([]byte, 64<<10); ; {
			n, err := l.Read(b)
			if err != nil || string(b[:n]) == "end" {
				l.Close()
				return
			}
			d.syslog <- string(b[:n])
		}
	}()
}

// stop stops both, and returns all that they have logged, as it is in the
// files of a Debian: rsyslog's with the name of the machine after the time.
func (d *daemons) stop() (log string) {
	d.Helper()
	d.stopPostfix()
	d.dovecot.Stop()
	c, err := net.Dial("unixgram", filepath.Join(dir, "dev/log"))
	d.must(err)
	_, err = io.WriteString(c, "end")
	d.must(err)
	for line := range d.syslog {
		// "<22>Nov 21 16:40:31 dovecot: …"
		_, line, _ = strings.Cut(line, ">")
		if len(line) > 16 {
			log += line[:16] + "mail " + strings.TrimRight(line[16:], "\n\x00") + "\n"
		}
	}
	return log + d.read("dovecot.log")
}

func (d *daemons) stopPostfix() {
	if d.postfix == nil {
		return
	}
	if out, err := d.command("/usr/sbin/postfix", "-c", dir+"/etc", "stop").CombinedOutput(); err != nil {
		d.Errorf("postfix stop: %v\n%s", err, out)
		_ = d.postfix.Process.Kill() // fails where it has exited
	}
	_ = d.postfix.Wait() // its log says why it ended
	d.postfix = nil
}

func (d *daemons) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("/usr/bin/env", append([]string{name}, args...)...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: d.root, Pdeathsig: syscall.SIGTERM}
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "TZ=UTC"}
	return cmd
}

func (d *daemons) chroot(name string, args ...string) string {
	d.Helper()
	out, err := d.command(name, args...).CombinedOutput()
	if err != nil {
		d.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func (d *daemons) run(name string, args ...string) {
	d.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		d.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

func (d *daemons) must(err error) {
	d.Helper()
	if err != nil {
		d.Fatal(err)
	}
}

func (d *daemons) write(name, text string, mode os.FileMode) {
	d.Helper()
	path := filepath.Join(dir, name)
	d.must(os.WriteFile(path, []byte(text), mode))
	d.must(os.Chmod(path, mode)) // whatever the umask
}

// read returns a file in dir; one that is missing is empty.
func (d *daemons) read(name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil && !os.IsNotExist(err) {
		d.Fatal(err)
	}
	return string(b)
}

// milter answers the end of each message with a reply: as much of the protocol
// as Postfix needs for that (postfix/src/milter/milter8.c).
func (d *daemons) milter(address, reply string) {
	d.Helper()
	l, err := net.Listen("tcp", address)
	d.must(err)
	d.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				send := func(packet []byte) {
					conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(packet))), packet...))
				}
				for {
					var size uint32
					if binary.Read(conn, binary.BigEndian, &size) != nil {
						return
					}
					packet := make([]byte, size)
					if _, err := io.ReadFull(conn, packet); err != nil {
						return
					}
					switch packet[0] {
					case 'O': // version 6, no actions, nothing but the end of the message
						send([]byte{'O', 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0x03, 0x7f})
					case 'E':
						send([]byte("y" + reply + "\x00"))
					case 'Q':
						return
					}
				}
			}()
		}
	}()
}

// certificate makes a self-signed one, in PEM.
func certificate(t testing.TB) (cert, key string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	must(err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	must(err)
	encode := func(kind string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", pkcs8)
}
