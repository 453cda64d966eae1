package nstest

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Dir is where the files of a test's servers are, on the /run that Tree makes:
// nothing of it reaches the host, and the paths of sockets stay short.
const Dir = "/run/e2e"

// DovecotConf makes settings that a Dovecot of a version, such as "2.3.19",
// needs for tests: it takes passwords without TLS, and has mail in ~/Maildir. No
// user 1000 need exist.
type DovecotConf struct {
	Dir       string // of the passwd-file users
	TLS       bool   // cert.pem and key.pem are there, too
	Databases string // passdb and userdb in place of the passwd-file
}

// For returns the settings in the words of a version.
func (c DovecotConf) For(version string) string {
	const both = `
first_valid_uid = 1000
auth_failure_delay = 0
`
	const conf23 = `
disable_plaintext_auth = no
mail_location = maildir:~/Maildir
# Or each wrong password makes the next answer to its address slower.
service anvil {
  unix_listener anvil-auth-penalty {
    mode = 0
  }
}
`
	const conf24 = `
dovecot_config_version = 2.4.0
dovecot_storage_version = 2.4.0
auth_allow_cleartext = yes
mail_driver = maildir
mail_path = ~/Maildir
`
	conf, tls := conf24, "ssl_server_cert_file = DIR/cert.pem\nssl_server_key_file = DIR/key.pem\n"
	databases := "passdb passwd-file {\n  passwd_file_path = DIR/users\n}\nuserdb passwd-file {\n  passwd_file_path = DIR/users\n}\n"
	if Is23(version) {
		conf, tls = conf23, "ssl_cert = <DIR/cert.pem\nssl_key = <DIR/key.pem\n"
		databases = "passdb {\n  driver = passwd-file\n  args = DIR/users\n}\nuserdb {\n  driver = passwd-file\n  args = DIR/users\n}\n"
	}
	if !c.TLS {
		tls = "ssl = no\n"
	}
	if c.Databases != "" {
		databases = c.Databases
	}
	return strings.ReplaceAll(conf+both+tls+databases, "DIR", c.Dir)
}

// Is23 tells whether a Dovecot of a version wants 2.3's settings, not 2.4's.
func Is23(version string) bool { return strings.HasPrefix(version, "2.3.") }

// DovecotVersion returns the version of the system's Dovecot. Its users need
// more ids than a plain user has: the test is skipped where there is but one.
func (d Debian) DovecotVersion(t testing.TB) string {
	t.Helper()
	NeedUsers(t)
	d.Need(t, "usr/sbin/dovecot", "dovecot-core")
	return d.Run(t, "/usr/sbin/dovecot", "--version")
}

// Dovecot is one that was started.
type Dovecot struct {
	Pid int

	t    testing.TB
	cmd  *exec.Cmd
	done chan struct{} // closed once all its processes have exited
}

// StartDovecot runs the system's Dovecot with a configuration, and waits until
// its IMAP answers at an address. What it prints is written to conf + ".out"; if
// the test fails, that and the file log beside conf are logged. It is stopped
// when the test ends. wrap is a command to run it under.
func (d Debian) StartDovecot(t testing.TB, conf, address string, wrap ...string) *Dovecot {
	t.Helper()
	out, err := os.Create(conf + ".out")
	Must(t, err)
	argv := append(wrap, "/usr/sbin/dovecot", "-F", "-c", conf)
	cmd := d.Command(argv[0], argv[1:]...)
	// Not the file itself but a pipe into it, so that Wait waits for every
	// process of Dovecot's, and with them for the last line of the log.
	cmd.Stdout = struct{ io.Writer }{out}
	cmd.Stderr = cmd.Stdout
	Must(t, cmd.Start())
	s := &Dovecot{cmd.Process.Pid, t, cmd, make(chan struct{})}
	go func() {
		_ = cmd.Wait() // the log says why it ended
		out.Close()
		close(s.done)
	}()
	t.Cleanup(func() {
		s.Stop()
		if t.Failed() {
			t.Logf("Dovecot:\n%s%s", Read(t, conf+".out"), Read(t, filepath.Join(filepath.Dir(conf), "log")))
		}
	})
	waitForServer(t, "Dovecot", address, s.done)
	return s
}

// waitForServer waits until a server greets at an address, unless it has ended.
func waitForServer(t testing.TB, name, address string, done <-chan struct{}) {
	t.Helper()
	Until(t, name, func() error {
		select {
		case <-done:
			t.Fatalf("%s did not start", name)
		default:
		}
		return greeted(address)
	})
}

// greeted waits for a greeting: Dovecot opens its ports one after the other,
// and all before it starts the process that sends one.
func greeted(address string) error {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(Patience)); err != nil {
		return err
	}
	if _, err = c.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("no greeting: %w", err)
	}
	return nil
}

// Stop ends it, if it has not ended, and waits until it is gone.
func (s *Dovecot) Stop() {
	s.t.Helper()
	_ = s.cmd.Process.Signal(syscall.SIGTERM) // fails where it has exited
	select {
	case <-s.done:
	case <-time.After(Patience):
		s.t.Error("Dovecot did not stop on SIGTERM")
		_ = s.cmd.Process.Kill() // fails where it has just exited
		<-s.done
	}
}
