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

// BenchmarkLogin has whole logins over IMAP without a hook and with nftwld, in
// turn and each from a new address, and prints a table of what policy costs a
// login. make bench runs it.
//
// The next login begins once the server is at rest, and so is not charged for the
// last one's report. That is in the processor time, which counts all processes of
// Dovecot's and nftwld.
func BenchmarkLogin(b *testing.B) {
	const (
		logins = 400
		warmUp = 10
	)
	candidates := []*candidate{
		{name: "no hook", with: with{bare: true, dovecot: "auth_policy_server_url =\n"}},
		{name: "auth policy, `nftwld`"},
	}
	// What a thread has started is killed when it ends: last of all.
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

	// Not through b.Log, which indents.
	fmt.Printf("\nWhole IMAP logins over loopback, each from a new address: median of %d in turn.\n\n", logins)
	fmt.Print("| hook | in turn | ratio to no hook | processor time of a login |\n|---|--:|--:|--:|\n")
	none := float64(candidates[0].took[logins/2])
	for _, c := range candidates {
		fmt.Printf("| %s | %.2f ms | %.2f | %.2f ms |\n", c.name, float64(c.took[logins/2])/1e6,
			float64(c.took[logins/2])/none, float64(c.used)/1e6/logins)
	}
	fmt.Println()
	b.ReportMetric(0, "ns/op") // which would be that of all together
}

// candidate is a server to measure.
type candidate struct {
	name  string
	with  with
	turns chan int      // which login is to be done
	ended chan struct{} // once it is
	took  []time.Duration
	used  time.Duration // by all of the server's processes
}

// rest waits until so many logins have been trusted, and their processes are gone.
func (s *server) rest(logins int) {
	s.t.Helper()
	if !s.with.bare {
		// Not from its metrics, which take it longer than a report.
		nstest.Poll(s.t, "the trust", func() bool { return strings.Count(s.read("nftwld.log"), "msg=trusted") == logins })
	}
	nstest.Poll(s.t, "Dovecot to be at rest", func() bool {
		return !slices.ContainsFunc(s.children(), func(pid string) bool {
			name, _ := os.ReadFile("/proc/" + pid + "/comm") // it may have just gone
			return strings.HasPrefix(string(name), "imap")
		})
	})
}

// children are the processes that Dovecot's master has started.
func (s *server) children() []string {
	master := strconv.Itoa(s.dovecot.Pid)
	children, err := os.ReadFile("/proc/" + master + "/task/" + master + "/children")
	nstest.Must(s.t, err)
	return strings.Fields(string(children))
}

// cpu is what all processes of a server at rest have used until now, with those
// that have ended: each was waited for by its parent.
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
