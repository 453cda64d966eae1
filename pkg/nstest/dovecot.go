package nstest

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Dir has the files of a test's servers. It is on the /run that Tree mounts, so
// that the host never sees them and the paths of sockets stay short.
const Dir = "/run/e2e"

// DovecotConf has the settings that a Dovecot needs for tests: it accepts
// passwords without TLS, and has mail in ~/Maildir. The system needs no user
// 1000.
type DovecotConf struct {
	Dir       string // has the passwd-file users
	TLS       bool   // Dir also has cert.pem and key.pem
	Databases string // passdb and userdb instead of the passwd-file
}

// For returns the settings in the syntax of a version, such as "2.3.19".
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

// Is23 reports whether a version of Dovecot needs the settings of 2.3, not those
// of 2.4.
func Is23(version string) bool { return strings.HasPrefix(version, "2.3.") }

// DovecotVersion returns the version of the system's Dovecot. It skips the test if
// the namespace has only one user, because Dovecot needs several.
func (d Debian) DovecotVersion(t testing.TB) string {
	t.Helper()
	NeedUsers(t)
	d.Need(t, "usr/sbin/dovecot", "dovecot-core")
	return d.Run(t, "/usr/sbin/dovecot", "--version")
}

// A Dovecot is a running Dovecot.
type Dovecot struct {
	Pid int

	t    testing.TB
	cmd  *exec.Cmd
	done chan struct{} // closed once all its processes have exited
}

// StartDovecot starts the system's Dovecot with a configuration, and waits until
// its IMAP answers at an address. Its output goes to conf + ".out". If the test
// fails, that and the file log beside conf are logged. Dovecot stops when the test
// ends. wrap is a command that runs Dovecot, if there is one.
func (d Debian) StartDovecot(t testing.TB, conf, address string, wrap ...string) *Dovecot {
	t.Helper()
	out, err := os.Create(conf + ".out")
	Must(t, err)
	argv := append(wrap, "/usr/sbin/dovecot", "-F", "-c", conf)
	cmd := d.Command(argv[0], argv[1:]...)
	// Dovecot writes to a pipe, not to the file, so that Wait waits for all of its
	// processes and thus for the last line of the log.
	cmd.Stdout = struct{ io.Writer }{out}
	cmd.Stderr = cmd.Stdout
	Must(t, cmd.Start())
	s := &Dovecot{cmd.Process.Pid, t, cmd, make(chan struct{})}
	go func() {
		_ = cmd.Wait() // the log has the reason
		out.Close()
		close(s.done)
	}()
	t.Cleanup(func() {
		s.Stop()
		if t.Failed() {
			t.Logf("Dovecot:\n%s%s", Read(t, conf+".out"), withoutInfo(Read(t, filepath.Join(filepath.Dir(conf), "log"))))
		}
	})
	waitForServer(t, "Dovecot", address, s.done)
	return s
}

// withoutInfo leaves out most of what Dovecot logs of hundreds of good logins, in
// which an error would not be found: all lines of level Info, but for the last 20.
func withoutInfo(log string) string {
	lines := strings.SplitAfter(log, "\n")
	last := max(len(lines)-20, 0)
	rare := slices.DeleteFunc(lines[:last:last], func(line string) bool { return strings.Contains(line, ": Info: ") })
	return strings.Join(append(rare, lines[last:]...), "")
}

// waitForServer waits until a server greets at an address. It fails the test if the
// server has exited.
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

// greeted waits for a greeting. Connecting is not enough: Dovecot opens all its
// ports before it starts the process that greets.
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

// Stop ends Dovecot if it still runs, and waits until it is gone.
func (s *Dovecot) Stop() {
	s.t.Helper()
	_ = s.cmd.Process.Signal(syscall.SIGTERM) // fails if it has exited
	select {
	case <-s.done:
	case <-time.After(Patience):
		s.t.Error("Dovecot did not stop on SIGTERM")
		_ = s.cmd.Process.Kill() // fails if it has just exited
		<-s.done
	}
}
