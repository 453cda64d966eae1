package fail2ban

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

const dir = nstest.Dir

// Clients are in 192.0.2.0/24 and 2001:db8::/64, which are also on the loopback
// interface.
const server4, server6 = "198.51.100.1", "2001:db8:ffff::1"

// users is a passwd-file. PAM has the machine's own users, by Debian's
// /etc/pam.d/dovecot.
const users = "alice:{PLAIN}secret:1000:1000::" + dir + "/mail/alice::\n"

// IMAP accepts passwords without TLS, and POP3 does not. Dovecot asks PAM only for root
// and pam-…, because each passdb that it asks logs a line.
const (
	databases23 = `
passdb {
  driver = passwd-file
  args = DIR/users
  username_filter = !root !pam-*
}
passdb {
  driver = pam
  username_filter = root pam-*
}
userdb {
  driver = passwd-file
  args = DIR/users
}
protocol pop3 {
  disable_plaintext_auth = yes
}
`
	databases24 = `
passdb passwd-file {
  passwd_file_path = DIR/users
  username_filter = !root !pam-*
}
passdb pam {
  username_filter = root pam-*
}
userdb passwd-file {
  passwd_file_path = DIR/users
}
protocol pop3 {
  auth_allow_cleartext = no
}
`
	dovecotConf = `
protocols = imap pop3 submission sieve
state_dir = ` + dir + `/state
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
	mainCf = `
local_recipient_maps =
smtpd_tls_chain_files = ` + dir + `/key.pem ` + dir + `/cert.pem
smtpd_tls_security_level = may
`
	masterCf = `
25 inet n - n - - smtpd
  -o smtpd_milters=inet:127.0.0.1:10040
2525 inet n - n - - smtpd
  -o smtpd_milters=inet:127.0.0.1:10041
tlsmgr unix - - n 1000? 1 tlsmgr
`
)

// daemons has a Dovecot and a Postfix of one Debian, and their logs.
type daemons struct {
	testing.TB
	nstest.Debian
	dovecot *nstest.Dovecot
	postfix *nstest.Postfix
	syslog  chan string
}

// newDaemons makes network and mount namespaces for them. The calling goroutine stays
// in the namespaces: see nstest.New.
func newDaemons(t testing.TB, system nstest.Debian) *daemons {
	t.Helper()
	d := &daemons{TB: t, Debian: system}
	nstest.New(t)
	d.Tree(t)
	nstest.Must(d, os.Mkdir(dir, 0o755))
	return d
}

// startDaemons starts both. Dovecot logs to its own file or, like Postfix and PAM, to
// syslog.
func startDaemons(t testing.TB, system nstest.Debian, dovecotLog string) *daemons {
	t.Helper()
	version := system.DovecotVersion(t)
	for _, name := range []string{"pop3", "submission", "managesieve"} {
		system.Need(t, "usr/lib/dovecot/"+name, "dovecot-"+strings.TrimPrefix(name, "manage")+"d")
	}
	d := newDaemons(t, system)
	for _, address := range []string{server4 + "/32", "192.0.2.254/24", server6 + "/128"} {
		nstest.IP(t, "address add "+address+" dev lo nodad")
	}
	nstest.IP(t, "route add local 2001:db8::/64 dev lo")
	d.milter("127.0.0.1:10040", "550 5.7.1 Blocked by SpamAssassin")
	d.milter("127.0.0.1:10041", "451 4.7.1 Greylisted, come back later")

	for _, name := range []string{"state", "mail/alice", "dev"} {
		nstest.Must(d, os.MkdirAll(filepath.Join(dir, name), 0o755))
	}
	nstest.Run(d, "chown", "-R", "1000:1000", dir+"/mail")
	d.openSyslog()
	cert, key := nstest.Certificate(t)
	nstest.Write(d, dir+"/cert.pem", cert, 0o644)
	nstest.Write(d, dir+"/key.pem", key, 0o600)
	nstest.Write(d, dir+"/users", users, 0o644)

	databases := databases24
	if nstest.Is23(version) {
		databases = databases23
	}
	conf := nstest.DovecotConf{Dir: dir, TLS: true, Databases: databases}.For(version)
	nstest.Write(d, dir+"/dovecot.conf", conf+dovecotConf+"log_path = "+dovecotLog+"\n", 0o644)
	d.dovecot = d.StartDovecot(t, dir+"/dovecot.conf", server4+":143")
	d.postfix = d.StartPostfix(t, server4+":587", mainCf, masterCf)
	return d
}

// openSyslog gives the daemons a /dev with the devices that they need, and with our
// log socket.
func (d *daemons) openSyslog() {
	d.Helper()
	dev := filepath.Join(dir, "dev")
	for _, name := range []string{"null", "zero", "random", "urandom"} {
		nstest.Write(d, filepath.Join(dev, name), "", 0o666)
		nstest.Must(d, unix.Mount("/dev/"+name, filepath.Join(dev, name), "", unix.MS_BIND, ""))
	}
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dev, "log"), Net: "unixgram"})
	nstest.Must(d, err)
	nstest.Must(d, os.Chmod(filepath.Join(dev, "log"), 0o666))
	nstest.Must(d, unix.Mount(dev, d.Path("dev"), "", unix.MS_BIND|unix.MS_REC, ""))
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

// stop stops both, and returns everything that they have logged, in the format of
// Debian's files: rsyslog writes the machine's name after the time.
func (d *daemons) stop() (log string) {
	d.Helper()
	d.postfix.Stop()
	d.dovecot.Stop()
	c, err := net.Dial("unixgram", filepath.Join(dir, "dev/log"))
	nstest.Must(d, err)
	_, err = io.WriteString(c, "end")
	nstest.Must(d, err)
	for line := range d.syslog {
		// "<22>Nov 21 16:40:31 dovecot: …"
		_, line, _ = strings.Cut(line, ">")
		if len(line) > 16 {
			log += line[:16] + "mail " + strings.TrimRight(line[16:], "\n\x00") + "\n"
		}
	}
	return log + nstest.Read(d, dir+"/dovecot.log")
}

// milter answers the end of each message with a reply, with as little of the protocol
// as Postfix needs for that (postfix/src/milter/milter8.c).
func (d *daemons) milter(address, reply string) {
	d.Helper()
	l, err := net.Listen("tcp", address)
	nstest.Must(d, err)
	d.Cleanup(func() { l.Close() })
	go nstest.Serve(l, func(conn net.Conn) {
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
			case 'O': // version 6, no actions, only the end of the message
				send([]byte{'O', 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0x03, 0x7f})
			case 'E':
				send([]byte("y" + reply + "\x00"))
			case 'Q':
				return
			}
		}
	})
}
