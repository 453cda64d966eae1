package dovecot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/textproto"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// BenchmarkLogin measures whole IMAP logins (connect, LOGIN, LOGOUT), and prints a
// table of what each way to trust the clients costs. make bench runs it.
//
// The servers differ only in the hook. All run at the same time and take turns in
// random order, so that a machine whose speed changes treats them alike. All are
// restarted a few times, because a server that lies badly in memory or in the caches
// stays a few percent slower until its end. Quote the ratios of the medians. Each
// login comes from its own address, so that each has something to write.
func BenchmarkLogin(b *testing.B) {
	const (
		starts = 5   // of each server
		rounds = 40  // of one login for each server, after each start
		passes = 2   // of logins at once for each server, after each start
		logins = 300 // in a pass
		atOnce = 50
		warmUp = 10 // more rounds, and logins at once
	)
	nstest.NeedUsers(b)
	host := hostDovecot(b)
	nstest.Need(b, "ipcalc-ng", "ipcalc-ng")
	script, err := os.ReadFile(filepath.Join(nstest.Root(b), "testdata/bench/login/trust.sh"))
	nstest.Must(b, err)
	candidates := []*candidate{
		{name: "no hook", with: with{dropIn: func(string) string { return "" }}},
		{name: "`nftwl login`", trusts: true},
		{name: "the shell script", trusts: true, with: with{
			files: map[string]string{"trust.sh": string(script)},
			dropIn: func(s string) string {
				return strings.Replace(s, command, "executable = script-login "+dir+"/trust.sh", 1)
			},
		}},
	}
	order := rand.New(rand.NewPCG(1, 2))
	// The order changes each time, because each server affects the next.
	shuffled := func() []*candidate {
		order.Shuffle(len(candidates), func(i, j int) {
			candidates[i], candidates[j] = candidates[j], candidates[i]
		})
		return candidates
	}
	none, table := candidates[0], slices.Clone(candidates)
	for range starts {
		for _, c := range shuffled() {
			c.start(b, host)
		}
		for round := range warmUp + rounds {
			for _, c := range shuffled() {
				took := c.login()
				if round >= warmUp {
					c.inTurn = append(c.inTurn, took)
				}
			}
		}
		for pass := range 1 + passes {
			for _, c := range shuffled() {
				if pass == 0 {
					c.pass(warmUp, warmUp)
					continue
				}
				before := c.cpu()
				c.atOnce = append(c.atOnce, c.pass(logins, atOnce))
				c.used += c.cpu() - before
			}
		}
		for _, c := range candidates {
			c.stop()
		}
	}

	// b.Log would indent it.
	w := os.Stdout
	fmt.Fprintf(w, "\nWhole IMAP logins over loopback, each from a new address: median of %d in turn, and of %d passes of %d with %d at once, Dovecot %s, %s, %s, %d processors.\n\n",
		starts*rounds, starts*passes, logins, atOnce, strings.Fields(host.version)[0], runtime.Version(), kernel(b), runtime.NumCPU())
	fmt.Fprintf(w, "| hook | in turn | ratio to no hook | %d, %d at once | ratio to no hook | processor time of a login |\n", logins, atOnce)
	fmt.Fprintln(w, "|---|--:|--:|--:|--:|--:|")
	for _, c := range table {
		fmt.Fprintf(w, "| %s | %.2f ms | %.2f | %.2f s | %.2f | %.2f ms |\n", c.name,
			ms(median(c.inTurn)), ratio(c.inTurn, none.inTurn),
			median(c.atOnce).Seconds(), ratio(c.atOnce, none.atOnce),
			ms(c.used)/(starts*passes*logins))
	}
	fmt.Fprintln(w)
	b.ReportMetric(0, "ns/op") // omits it, because it would be the sum of all candidates
}

// candidate is a server to measure, with its measurements since the first start.
type candidate struct {
	name   string
	with   with
	trusts bool

	inTurn, atOnce []time.Duration
	used           time.Duration // processor time of all of the server's processes in the passes

	// Since the last start.
	testing.TB
	server *server
	count  int         // of logins
	work   chan func() // for the goroutine that is in the server's namespaces
	clean  []func()
	end    func() // of the goroutine
}

// start starts the server in a goroutine of its own: see nstest.New. Everything that
// uses the server runs there, until it stops or the benchmark fails.
func (c *candidate) start(b *testing.B, host dovecot) {
	c.TB, c.count, c.clean = b, 0, nil
	work, ended := make(chan func()), make(chan struct{})
	c.work = work
	c.end = sync.OnceFunc(func() {
		close(work)
		<-ended
	})
	b.Cleanup(c.end)
	go func() {
		defer close(ended)
		defer func() {
			for _, f := range slices.Backward(c.clean) {
				f()
			}
		}()
		for f := range work {
			f()
		}
	}()
	c.do(func() {
		c.server = host.start(c, c.with)
		loadSets(c)
		nstest.IP(c, "route add local "+clients.String()+" dev lo")
	})
}

// stop checks that all logins were trusted, and stops the server.
func (c *candidate) stop() {
	c.do(func() {
		want := 0
		if c.trusts {
			want = 5 * c.count
		}
		if got := len(elements(c, "trusted_ipv4")); got != want {
			c.Errorf("%s: after %d logins set trusted_ipv4 has %d elements, want %d", c.name, c.count, got, want)
		}
		c.server.wantLog()
	})
	c.end()
}

// Cleanup collects what the helpers clean up; end runs it, in the namespaces.
func (c *candidate) Cleanup(f func()) { c.clean = append(c.clean, f) }

// do calls f in the server's namespaces.
func (c *candidate) do(f func()) {
	c.Helper()
	done := make(chan struct{})
	c.work <- func() {
		defer close(done)
		f()
	}
	<-done
	if c.Failed() {
		c.FailNow() // because the goroutine may have ended
	}
}

// clients is the network that the logins come from, which is reserved for benchmarks
// (RFC 2544).
var clients = netip.MustParsePrefix("198.18.0.0/15")

// dial connects from the next unused address.
func (c *candidate) dial() net.Conn {
	c.count++
	from := clients.Addr().As4()
	from[1] += byte(c.count >> 16)
	from[2], from[3] = byte(c.count>>8), byte(c.count)
	conn, err := nstest.Dial(netip.AddrFrom4(from).String(), server4, "143")
	nstest.Must(c, err)
	return conn
}

// login logs in once, waits until the server is idle, and returns how long the login
// took.
func (c *candidate) login() (took time.Duration) {
	c.do(func() {
		start := time.Now()
		conn := c.dial()
		defer conn.Close()
		err := inAndOut(conn)
		took = time.Since(start)
		nstest.Must(c, err)
		c.rest()
	})
	return took
}

// pass logs in count times, atOnce of them at a time. It waits until the server is
// idle, and returns how long the logins took together.
func (c *candidate) pass(count, atOnce int) (took time.Duration) {
	c.do(func() {
		places := make(chan struct{}, atOnce)
		var all sync.WaitGroup
		start := time.Now()
		for range count {
			places <- struct{}{}
			conn := c.dial() // in this goroutine: other threads are in another namespace
			all.Go(func() {
				defer func() { <-places }()
				defer conn.Close()
				if err := inAndOut(conn); err != nil {
					c.Error(err)
				}
			})
		}
		all.Wait()
		took = time.Since(start)
		c.rest()
	})
	return took
}

// inAndOut logs in and out, and returns when the server has closed the connection.
func inAndOut(conn net.Conn) error {
	c := textproto.NewConn(conn)
	if _, err := c.ReadLine(); err != nil {
		return err
	}
	if err := nstest.IMAPCommand(c, "", "LOGIN alice %s", password); err != nil {
		return err
	}
	if err := nstest.IMAPCommand(c, "BYE", "LOGOUT"); err != nil {
		return err
	}
	if line, err := c.ReadLine(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the logout: %q, %v", line, err)
	}
	return nil
}

// rest waits until the processes of the logins are gone, so that the end of one login
// does not slow down the next.
func (c *candidate) rest() {
	lasting := []string{"anvil", "auth", "config", "log", "stats"}
	nstest.Poll(c, "Dovecot to be idle", func() bool {
		for _, pid := range c.children() {
			p := c.process(pid)
			if p.name != "" && !slices.Contains(lasting, p.name) {
				return false
			}
		}
		return true
	})
}

// cpu returns the processor time that all processes of an idle server have used,
// including those that have ended, because their parents have waited for them.
func (c *candidate) cpu() (sum time.Duration) {
	pids := append(c.children(), c.server.dovecot.Pid)
	for _, pid := range pids {
		sum += c.process(pid).cpu
	}
	return sum
}

// children returns the ids of the processes that Dovecot's master has started.
func (c *candidate) children() (pids []int) {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", c.server.dovecot.Pid))
	nstest.Must(c, err)
	for _, field := range strings.Fields(string(children)) {
		pid, err := strconv.Atoi(field)
		nstest.Must(c, err)
		pids = append(pids, pid)
	}
	return pids
}

// process has what proc_pid_stat(5) tells about a process; zero if it is gone.
type process struct {
	name string
	cpu  time.Duration // its own and its children's
}

func (c *candidate) process(pid int) (p process) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return p
	}
	nstest.Must(c, err)
	front, back, _ := strings.Cut(string(stat), ") ")
	_, p.name, _ = strings.Cut(front, " (")
	for _, field := range strings.Fields(back)[11:15] { // utime, stime, cutime, cstime
		ticks, err := strconv.Atoi(field)
		nstest.Must(c, err)
		p.cpu += time.Duration(ticks) * time.Second / 100 // USER_HZ
	}
	return p
}

func median(times []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(times))
	return sorted[len(sorted)/2]
}

func ratio(times, to []time.Duration) float64 { return float64(median(times)) / float64(median(to)) }

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func kernel(t testing.TB) string {
	t.Helper()
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	nstest.Must(t, err)
	return "Linux " + string(bytes.TrimSpace(release))
}
