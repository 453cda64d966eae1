package dovecot

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// The faults in docs/faults.md that involve Dovecot, except those of
// TestFailureDeniesNoLogin.

// If stderr is closed, nftwl cannot report an error, and still executes Dovecot's
// script-login.
func TestStderrClosed(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{
			files: map[string]string{"mute": "#!/bin/sh\nexec \"$@\" 2>&-\n"},
			dropIn: func(s string) string {
				return strings.Replace(s, command, "executable = script-login "+dir+"/mute /usr/bin/nftwl login", 1)
			},
		})
		for _, name := range d.protocols {
			p := protocols[name]
			if err := login(client4, p.port, p.visit, "alice", password); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		s.wantLog()
	})
}

// The kernel makes one transaction at a time. A login waits for the end of another
// one, and its client is trusted then. This test runs alone, like TestKernelBusy.
func TestLoginWhileKernelIsBusy(t *testing.T) {
	s := hostDovecot(t).start(t, with{config: "deadline: 10s\n"})
	loadSets(t)
	s.write("busy.nft", busy(), 0o644)
	nft := exec.Command(nstest.Need(t, "nft", "nftables"), "-f", s.path("busy.nft"))
	nstest.Must(t, nft.Start())
	done := make(chan error, 1)
	go func() { done <- nft.Wait() }()
	start := time.Now()
	var logins int
	var slowest time.Duration
	for ended := false; !ended; logins++ {
		start := time.Now()
		if err := login(client4, "143", nstest.IMAP, "alice", password); err != nil {
			t.Error(err)
		}
		slowest = max(slowest, time.Since(start))
		select {
		case err := <-done:
			nstest.Must(t, err)
			ended = true
		default:
		}
	}
	t.Logf("%d logins during %v of another's transaction, the slowest in %v", logins, time.Since(start), slowest)
	wantTrusted(t, client4, "alice", day)
	s.wantLog()
}

// At the service's process_limit Dovecot makes further logins wait.
func TestProcessLimitReached(t *testing.T) {
	t.Parallel()
	const count = 4
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{
			files: map[string]string{"hold": hold},
			dropIn: func(s string) string {
				s = strings.Replace(s, command, command+" "+dir+"/hold", 1)
				return strings.Replace(s, "process_limit = 1024", "process_limit = 1", 1)
			},
		})
		loadSets(t)
		nstest.Must(t, os.Mkdir(s.path("held"), 0o755))
		nstest.Must(t, unix.Mkfifo(s.path("go"), 0o600))
		results := loginsAtOnce(t, count)
		// If the limit is one process, Dovecot's message names client_limit.
		reached := regexp.MustCompile(`service\(nftwl\): (client|process)_limit \(\d+\) reached`)
		nstest.Poll(t, "Dovecot to log that the limit is reached", func() bool { return reached.MatchString(s.log()) })
		nstest.Poll(t, "one login to be in nftwl's service", func() bool {
			held, err := os.ReadDir(s.path("held"))
			nstest.Must(t, err)
			if len(held) > 1 {
				t.Fatalf("%d logins are in nftwl's service", len(held))
			}
			return len(held) == 1
		})
		release, err := os.OpenFile(s.path("go"), os.O_RDWR, 0)
		nstest.Must(t, err)
		defer release.Close()
		for range count {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		wantTrusted(t, client4, "alice", day)
	})
}

// busy is a transaction that takes the kernel half a second: elements with ranges in
// several fields take it longest to add. nft's socket accepts no much larger batch from
// root of a user namespace.
func busy() string {
	var b strings.Builder
	b.WriteString("table inet other { set s { type ipv6_addr . ipv6_addr . ipv6_addr; flags interval; }; }\nadd element inet other s {\n")
	for i := range 400 {
		for field, end := range []string{" . ", " . ", ",\n"} {
			fmt.Fprintf(&b, "2001:db8:%x:%x::1-2001:db8:%x:%x:ffff:ffff:ffff:fff0%s", i, field, i, field, end)
		}
	}
	b.WriteString("}\n")
	return b.String()
}
