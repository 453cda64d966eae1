package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"nftwl/pkg/nstest"
)

const mainCf = `
compatibility_level = 3.6
queue_directory = ` + dir + `/queue
data_directory = ` + dir + `/postfix
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
maillog_file = ` + dir + `/maillog
maillog_file_prefixes = /run
myhostname = mail.example.org
mydestination = mail.example.org
inet_interfaces = all
alias_maps =
alias_database =
smtpd_sasl_type = dovecot
smtpd_sasl_path = ` + dir + `/auth
smtpd_sasl_auth_enable = yes
smtpd_error_sleep_time = 0
`

// Nothing is chrooted: the tests' /run is not in the queue's directory.
const masterCf = `
submission inet n - n - - smtpd
  -o syslog_name=postfix/submission
anvil unix - - n - 1 anvil
cleanup unix n - n - 0 cleanup
proxymap unix - - n - - proxymap
rewrite unix - - n - - trivial-rewrite
postlog unix-dgram n - n - 1 postlogd
`

// startPostfix runs Postfix with its submission service, whose SASL is
// Dovecot's, and waits until it listens.
func (s *server) startPostfix() {
	t := s.t
	t.Helper()
	if _, err := os.Stat(filepath.Join(s.d.root, "usr/sbin/postfix")); err != nil {
		nstest.Skip(t, "no Postfix in %s: run testdata/deps.sh as root", s.d.root)
	}
	s.write("etc/main.cf", mainCf, 0o644)
	s.write("etc/master.cf", masterCf, 0o644)
	must(t, os.Mkdir(filepath.Join(dir, "queue"), 0o755))
	must(t, os.Mkdir(filepath.Join(dir, "postfix"), 0o755))
	postfix := func(args ...string) *exec.Cmd {
		cmd := exec.Command("/usr/sbin/postfix", append([]string{"-c", dir + "/etc"}, args...)...)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: s.d.root, Pdeathsig: syscall.SIGTERM}
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
		return cmd
	}
	chown := exec.Command("/bin/chown", "postfix", dir+"/postfix")
	chown.SysProcAttr = &syscall.SysProcAttr{Chroot: s.d.root}
	if out, err := chown.CombinedOutput(); err != nil {
		t.Fatalf("chown: %v\n%s", err, out)
	}
	out, err := os.Create(filepath.Join(dir, "postfix.out"))
	must(t, err)
	cmd := postfix("start-fg")
	cmd.Stdout, cmd.Stderr = out, out
	must(t, cmd.Start())
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait() // the log says why it ended
		out.Close()
		close(done)
	}()
	t.Cleanup(func() {
		if out, err := postfix("stop").CombinedOutput(); err != nil {
			t.Errorf("postfix stop: %v\n%s", err, out)
			_ = cmd.Process.Kill() // fails where it has exited
		}
		<-done
		if t.Failed() {
			t.Logf("Postfix:\n%s%s", s.read("postfix.out"), s.read("maillog"))
		}
	})
	s.poll("Postfix to listen", func() bool {
		select {
		case <-done:
			t.Fatal("Postfix did not start")
		default:
		}
		return listens(server4 + ":587")
	})
}

// Postfix runs no post-login program: who only submits is known to nftwld
// alone.
func TestPostfix(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{config: "failures: {limit: 5}\n"})
		s.startPostfix()
		for _, c := range []struct{ from, set string }{{"192.0.2.7", "trusted_ipv4"}, {"2001:db8::7", "trusted_ipv6"}} {
			if err := smtp(c.from, "587", "alice", password); err != nil {
				t.Errorf("from %s: %v", c.from, err)
			}
			s.poll(c.from+" to be trusted", func() bool { return s.in(c.set, c.from+` \. 587 .*comment "alice"`) })
		}
		s.reported(`protocol="smtp",result="success"`, "2")
		for i := range 5 {
			if err := smtp("192.0.2.8", "587", "alice", fmt.Sprint("wrong", i)); !errors.Is(err, errDenied) {
				t.Errorf("%v, want %v", err, errDenied)
			}
		}
		s.poll("the ban", func() bool { return s.in("banned_ipv4", `192.0.2.8 \. 587 timeout 1h`) })
		for range 10 {
			if err := smtp("192.0.2.9", "587", "alice", "old"); !errors.Is(err, errDenied) {
				t.Errorf("%v, want %v", err, errDenied)
			}
		}
		s.reported(`protocol="smtp",result="failure"`, "15")
		if s.in("banned_ipv4", "192.0.2.9") {
			t.Error("the same wrong password is banned")
		}
	})
}

// What people have fail2ban read logs for, wherever Dovecot looks at the
// passwords: a guesser is banned on every port, by whichever door.
func TestGuessersByEachDoor(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{config: "failures: {limit: 3}\n"})
		s.startPostfix()
		for i, door := range []struct {
			name string
			try  func(from, user, password string) error
		}{
			{"IMAP", login},
			{"POP3", pop3},
			{"submission with PLAIN", func(from, user, password string) error { return smtp(from, "587", user, password) }},
			{"submission with LOGIN", func(from, user, password string) error { return smtpLogin(from, "587", user, password) }},
		} {
			from := fmt.Sprintf("192.0.2.%d", 10+i)
			for j, user := range []string{"alice", "info", "alice"} {
				if err := door.try(from, user, fmt.Sprint("guess", j)); !errors.Is(err, errDenied) {
					t.Errorf("%s: %v, want %v", door.name, err, errDenied)
				}
			}
			for _, port := range []int{143, 993, 995, 465, 587} {
				s.poll(fmt.Sprintf("%s: the ban on %d", door.name, port), func() bool {
					return s.in("banned_ipv4", fmt.Sprintf(`%s \. %d timeout 1h`, from, port))
				})
			}
			good := fmt.Sprintf("192.0.2.%d", 20+i)
			if err := door.try(good, "alice", password); err != nil {
				t.Errorf("%s: %v", door.name, err)
			}
			s.poll(door.name+": the trust", func() bool { return s.in("trusted_ipv4", good+` \. 993 `) })
		}
	})
}
