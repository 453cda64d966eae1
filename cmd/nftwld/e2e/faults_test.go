package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// crowd logs in count clients, up to 25 at once and each from a different address.
// Before each login it calls turn, if that is not nil. It returns the time of the
// slowest login. Every login must succeed.
func (s *server) crowd(prefix string, count int, turn func(i int)) time.Duration {
	s.t.Helper()
	var all sync.WaitGroup
	var mu sync.Mutex
	var slowest time.Duration
	places := make(chan struct{}, 25)
	for i := range count {
		if turn != nil {
			turn(i)
		}
		places <- struct{}{}
		c, err := dial(fmt.Sprintf("%s:%x", prefix, i+1), "143") // in this goroutine: other threads are in another namespace
		nstest.Must(s.t, err)
		start := time.Now()
		all.Go(func() {
			if err := imap(c, "", "alice", password); err != nil {
				s.t.Errorf("login: %v", err)
			}
			mu.Lock()
			slowest = max(slowest, time.Since(start))
			mu.Unlock()
			<-places
		})
	}
	all.Wait()
	return slowest
}

// No login waits for nftwld or fails because of it: not if it hangs, is killed, is
// gone or has another key.
func TestFaultsDenyNoLogin(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{socket: true})
		t.Logf("nftwld runs: %v", s.crowd("2001:db8:1:", 300, nil))

		nstest.Must(t, s.nftwld.Process.Signal(syscall.SIGSTOP))
		t.Logf("it hangs: %v", s.crowd("2001:db8:2:", 300, nil))
		nstest.Must(t, s.nftwld.Process.Signal(syscall.SIGCONT))

		t.Logf("it is killed: %v", s.crowd("2001:db8:3:", 300, func(i int) {
			if i == 150 {
				s.stopNftwld(syscall.SIGKILL)
			}
		}))
		t.Logf("it is gone: %v", s.crowd("2001:db8:4:", 50, nil))

		s.startNftwld()
		s.crowd("2001:db8:5:", 50, nil)
		nstest.Poll(s.t, "nftwld to trust again", func() bool { return s.in("trusted_ipv6", `2001:db8:5::1 \. `) })

		// If the keys differ, Dovecot's log has the error.
		s.write("policy.key", strings.ToUpper(key), 0o600)
		nstest.Must(t, s.nftwld.Process.Signal(syscall.SIGHUP))
		nstest.Poll(s.t, "nftwld to read the key", func() bool { return strings.Contains(s.read("nftwld.log"), "configuration reloaded") })
		s.crowd("2001:db8:6:", 50, nil)
		nstest.Poll(s.t, "nftwld to refuse the reports", func() bool { return s.metric(`nftwl_refused_total{reason="key"}`) == "50" })
		if s.in("trusted_ipv6", "2001:db8:6::1 ") {
			t.Error("trusted with a wrong key")
		}
		nstest.Poll(s.t, "the error in Dovecot's log", func() bool { return strings.Contains(s.read("log"), "Policy server HTTP error: 401 Unauthorized") })
	})
}

// Without systemd's socket, nothing listens while nftwld is gone. Dovecot then
// tries to connect at longer and longer intervals (http-client-peer.c), up to a
// minute, and its reports in between are lost.
func TestGoneWithoutSocket(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{})
		s.stopNftwld(syscall.SIGKILL)
		t.Logf("nftwld is gone: %v", s.crowd("2001:db8:1:", 100, nil))
		s.startNftwld()
		start := time.Now()
		for !s.in("trusted_ipv4", `192.0.2.7 \. `) {
			if err := login("192.0.2.7", "alice", password); err != nil {
				t.Fatal(err)
			}
			if time.Since(start) > 3*nstest.Patience {
				t.Fatal("Dovecot does not report logins again")
			}
			time.Sleep(100 * time.Millisecond) // because each login is a line in the logs
		}
		t.Logf("Dovecot reports again after %v", time.Since(start))
	})
}

// If systemd keeps the socket, a restart of nftwld while users log in loses no
// report.
func TestRestartLosesNoReport(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		patient := "auth_policy {\n  http_client_request_absolute_timeout = 1 min\n}\n" // instead of 2 s, for slow machines
		if d.is23 {
			patient = "auth_policy_server_timeout_msecs = 60000\n"
		}
		s := d.start(t, with{socket: true, dovecot: patient})
		s.crowd("2001:db8:1:", 300, func(i int) {
			if i%10 == 9 {
				s.stopNftwld(syscall.SIGTERM)
				s.startNftwld()
			}
		})
		all := regexp.MustCompile(`2001:db8:1::[0-9a-f]+ \. 993 `)
		nstest.Poll(s.t, "all to be trusted", func() bool {
			return len(all.FindAllString(nstest.Run(t, "nft", "list", "set", "inet", "filter", "trusted_ipv6"), -1)) == 300
		})
	})
}

// Failures survive a restart, and a kill too, except those of the last minute.
func TestCountsSurvive(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{config: "failures: {limit: 5}\n"})
		tryAll(t, "192.0.2.7", different(4))
		s.reported(`protocol="imap",result="failure"`, "4")
		s.stopNftwld(syscall.SIGTERM)
		s.startNftwld()
		s.stopNftwld(syscall.SIGKILL)
		s.startNftwld()
		tryAll(t, "192.0.2.7", []string{"wrong4"})
		nstest.Poll(s.t, "the ban", func() bool { return s.in("banned_ipv4", "192.0.2.7 ") })
		s.stopNftwld(syscall.SIGTERM)
		nstest.Must(t, os.WriteFile(filepath.Join(dir, "nftwld/failures"), []byte("junk"), 0o600))
		s.startNftwld()
		nstest.Poll(s.t, "the warning about the damaged file", func() bool { return strings.Contains(s.read("nftwld.log"), "starting without the saved failures") })
	})
}

// Without CAP_NET_ADMIN nftwld still answers, and logs what is missing.
func TestNoPrivilege(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{config: "failures: {limit: 2}\n", wrap: []string{"/usr/bin/setpriv", "--bounding-set=-net_admin"}})
		if err := login("192.0.2.7", "alice", password); err != nil {
			t.Error(err)
		}
		tryAll(t, "192.0.2.8", different(2))
		nstest.Poll(s.t, "both to fail", func() bool { return s.metric(`nftwl_errors_total{reason="permission"}`) == "2" })
		if log := s.read("nftwld.log"); !strings.Contains(log, "CAP_NET_ADMIN") {
			t.Errorf("the log: %s", log)
		}
	})
}

// With auth_policy_check_before_auth, Dovecot refuses the clients that the
// firewall would drop, and lets everybody in if nftwld does not answer.
func TestAllow(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{config: "failures: {limit: 3}\n", dovecot: "auth_policy_check_before_auth = yes\n"})
		tryAll(t, "192.0.2.7", different(3))
		nstest.Poll(s.t, "the ban", func() bool { return s.in("banned_ipv4", "192.0.2.7 ") })
		if err := login("192.0.2.7", "alice", password); err == nil {
			t.Error("a banned address logs in")
		}
		if err := login("192.0.2.8", "alice", password); err != nil {
			t.Errorf("another address: %v", err)
		}
		nstest.Poll(s.t, "the refusal not to count as a failure", func() bool { return s.metric(`nftwl_failures_total{outcome="rejected"}`) != "0" })
		nstest.Must(t, s.nftwld.Process.Signal(syscall.SIGSTOP))
		if err := login("192.0.2.7", "alice", password); err != nil {
			t.Errorf("while it hangs: %v", err)
		}
		nstest.Must(t, s.nftwld.Process.Signal(syscall.SIGCONT))
		s.stopNftwld(syscall.SIGTERM)
		if err := login("192.0.2.7", "alice", password); err != nil {
			t.Errorf("while it is gone: %v", err)
		}
		// With this setting, the packages refuse to be removed.
		s.dovecot.Stop()
		s.write("dovecot.conf", s.read("dovecot.conf")+"auth_policy_reject_on_fail = yes\n", 0o644)
		s.startDovecot()
		if err := login("192.0.2.8", "alice", password); err == nil {
			t.Error("a login succeeds with auth_policy_reject_on_fail and without nftwld")
		}
	})
}

// keepSocket opens the socket, as systemd would.
func (s *server) keepSocket() *os.File {
	s.t.Helper()
	l, err := net.Listen("tcp", policyAddress)
	nstest.Must(s.t, err)
	f, err := l.(*net.TCPListener).File()
	nstest.Must(s.t, err)
	nstest.Must(s.t, l.Close())
	s.t.Cleanup(func() { f.Close() })
	return f
}
