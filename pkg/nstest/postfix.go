package nstest

import (
	"os"
	"os/exec"
	"testing"
)

// No service is chrooted, because the queue directory does not contain the tests'
// /run.
const (
	mainCf = `
compatibility_level = 3.6
queue_directory = ` + Dir + `/queue
data_directory = ` + Dir + `/postfix
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
myhostname = mail.example.org
mydestination = mail.example.org
inet_interfaces = all
alias_maps =
alias_database =
smtpd_sasl_type = dovecot
smtpd_sasl_path = ` + Dir + `/auth
smtpd_sasl_auth_enable = yes
smtpd_error_sleep_time = 0
`
	masterCf = `
submission inet n - n - - smtpd
  -o syslog_name=postfix/submission
anvil unix - - n - 1 anvil
cleanup unix n - n - 0 cleanup
proxymap unix - - n - - proxymap
rewrite unix - - n - - trivial-rewrite
`
)

// A Postfix is a running Postfix.
type Postfix struct {
	t    testing.TB
	d    Debian
	cmd  *exec.Cmd
	done chan struct{} // closed when it has exited
}

// StartPostfix starts the system's Postfix, and waits until its submission service
// greets at an address. It uses Dovecot SASL through the socket auth in Dir. main
// and master are more lines of its configuration. If the test fails, its output and
// the file maillog in Dir are logged. Postfix stops when the test ends.
func (d Debian) StartPostfix(t testing.TB, address, main, master string) *Postfix {
	t.Helper()
	d.Need(t, "usr/sbin/postfix", "postfix")
	Write(t, Dir+"/etc/main.cf", mainCf+main, 0o644)
	Write(t, Dir+"/etc/master.cf", masterCf+master, 0o644)
	for _, name := range []string{"queue", "postfix"} {
		Must(t, os.Mkdir(Dir+"/"+name, 0o755))
	}
	d.Run(t, "chown", "postfix", Dir+"/postfix")
	out, err := os.Create(Dir + "/postfix.out")
	Must(t, err)
	defer out.Close()
	p := &Postfix{t, d, d.Command("/usr/sbin/postfix", "-c", Dir+"/etc", "start-fg"), make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	Must(t, p.cmd.Start())
	go func() {
		_ = p.cmd.Wait() // the log has the reason
		close(p.done)
	}()
	t.Cleanup(func() {
		p.Stop()
		if t.Failed() {
			t.Logf("Postfix:\n%s%s", Read(t, Dir+"/postfix.out"), Read(t, Dir+"/maillog"))
		}
	})
	waitForServer(t, "Postfix", address, p.done)
	return p
}

// Stop ends Postfix if it still runs, and waits until it is gone.
func (p *Postfix) Stop() {
	p.t.Helper()
	select {
	case <-p.done:
		return
	default:
	}
	if out, err := p.d.Command("/usr/sbin/postfix", "-c", Dir+"/etc", "stop").CombinedOutput(); err != nil {
		p.t.Errorf("postfix stop: %v\n%s", err, out)
		_ = p.cmd.Process.Kill() // fails if it has exited
	}
	<-p.done
}
