package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// BenchmarkLogin makes whole IMAP logins without a hook and with nftwld, one after
// the other and each from a new address. It prints a table of what nftwld costs a
// login. make bench runs it.
//
// Each login begins when the server is idle, so that it does not pay for the
// previous one's report. The processor time includes the reports: it counts all
// processes of Dovecot and nftwld.
func BenchmarkLogin(b *testing.B) {
	const (
		logins = 400
		warmUp = 10
	)
	candidates := []*candidate{
		{name: "no hook", with: with{bare: true, dovecot: "auth_policy_server_url =\n"}},
		{name: "auth policy, `nftwld`"},
	}
	// When a thread ends, the processes that it has started are killed. So it ends
	// last.
	release := make(chan struct{})
	b.Cleanup(func() { close(release) })
	for _, c := range candidates {
		c.turns, c.ended = make(chan int), make(chan struct{})
		// Each server is in the namespaces of a goroutine's thread.
		go func() {
			s := find(b, nstest.Host).start(b, c.with)
			for turn := range c.turns {
				if turn == warmUp {
					c.took, c.used = nil, -s.cpu()
				}
				start := time.Now()
				if err := login(fmt.Sprintf("2001:db8:1::%x", turn+1), "alice", password); err != nil {
					b.Error(err)
				}
				c.took = append(c.took, time.Since(start))
				s.rest(turn + 1)
				c.ended <- struct{}{}
			}
			c.used += s.cpu()
			close(c.ended)
			<-release
		}()
	}
	for turn := range warmUp + logins {
		for _, i := range rand.Perm(len(candidates)) {
			candidates[i].turns <- turn
			<-candidates[i].ended
		}
	}
	for _, c := range candidates {
		close(c.turns)
		<-c.ended
		slices.Sort(c.took)
	}

	// b.Log would indent it.
	fmt.Printf("\nWhole IMAP logins over loopback, each from a new address: median of %d in turn.\n\n", logins)
	fmt.Print("| hook | in turn | ratio to no hook | processor time of a login |\n|---|--:|--:|--:|\n")
	none := float64(candidates[0].took[logins/2])
	for _, c := range candidates {
		fmt.Printf("| %s | %.2f ms | %.2f | %.2f ms |\n", c.name, float64(c.took[logins/2])/1e6,
			float64(c.took[logins/2])/none, float64(c.used)/1e6/logins)
	}
	fmt.Println()
	b.ReportMetric(0, "ns/op") // omits it, because it would be the sum of all candidates
}

// candidate is a server to measure.
type candidate struct {
	name  string
	with  with
	turns chan int      // the number of the next login
	ended chan struct{} // has an item after each login
	took  []time.Duration
	used  time.Duration // processor time of all of the server's processes
}

// rest waits until nftwld has trusted so many logins, and their processes are gone.
func (s *server) rest(logins int) {
	s.t.Helper()
	if !s.with.bare {
		// Reading its metrics would cost it more than a report.
		nstest.Poll(s.t, "the trust", func() bool { return strings.Count(s.read("nftwld.log"), "msg=trusted") == logins })
	}
	nstest.Poll(s.t, "Dovecot to be idle", func() bool {
		return !slices.ContainsFunc(s.children(), func(pid string) bool {
			name, _ := os.ReadFile("/proc/" + pid + "/comm") // it may have just gone
			return strings.HasPrefix(string(name), "imap")
		})
	})
}

// children returns the processes that Dovecot's master has started.
func (s *server) children() []string {
	master := strconv.Itoa(s.dovecot.Pid)
	children, err := os.ReadFile("/proc/" + master + "/task/" + master + "/children")
	nstest.Must(s.t, err)
	return strings.Fields(string(children))
}

// cpu returns the processor time that all processes of an idle server have used,
// including those that have ended, because their parents have waited for them.
func (s *server) cpu() (sum time.Duration) {
	pids := append(s.children(), strconv.Itoa(s.dovecot.Pid))
	if s.nftwld != nil {
		pids = append(pids, strconv.Itoa(s.nftwld.Process.Pid))
	}
	for _, pid := range pids {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		nstest.Must(s.t, err)
		_, fields, _ := strings.Cut(string(stat), ") ")
		for _, field := range strings.Fields(fields)[11:15] { // utime, stime, cutime, cstime
			ticks, err := strconv.Atoi(field)
			nstest.Must(s.t, err)
			sum += time.Duration(ticks) * time.Second / 100 // USER_HZ
		}
	}
	return sum
}
