package resident

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	google "github.com/google/nftables"
	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
	"nftwl/pkg/postlogin"
	"nftwl/pkg/trust"
)

// The server's goroutines run on any thread, and so in the namespace that the
// test binary started in. All tests share it, and none is parallel.
func TestMain(m *testing.M) { nstest.Main(m) }

const (
	version = "VERSION\tscript-login\t1\t0\n"
	alice   = "198.51.100.1\t192.0.2.7\talice\n"
	limit   = 10 * time.Second // for what must happen
)

// loadSets replaces the ruleset by the shipped sets, or by other text.
func loadSets(t *testing.T, rules ...string) {
	t.Helper()
	if rules == nil {
		b, err := os.ReadFile(filepath.Join(nstest.Root(t), "contrib/nftables/sets.nft"))
		must(t, err)
		rules = []string{string(b)}
	}
	nstest.Nft(t, "flush ruleset\n"+strings.Join(rules, "\n"))
}

// A running server, and what it said.
type running struct {
	*Server
	t    *testing.T
	path string
	stop func() // and wait

	mu       sync.Mutex
	problems []string
}

// start runs a server with a configuration, or with none. It may be changed
// before.
func start(t *testing.T, c *config.Config, change ...func(*running)) *running {
	t.Helper()
	r := &running{t: t, Server: New()}
	r.Owner = uint32(os.Geteuid())
	r.Problem = func(reason string, err error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.problems = append(r.problems, reason+": "+err.Error())
	}
	if c != nil {
		r.SetConfig(c)
	}
	for _, f := range change {
		f(r)
	}
	r.path = filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.path, Net: "unix"})
	must(t, err)
	must(t, os.Chmod(r.path, 0o666))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Serve(ctx, l) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(limit):
			t.Error("the server does not stop")
		}
		l.Close()
	})
	t.Cleanup(r.stop)
	return r
}

func (r *running) dial() *net.UnixConn {
	r.t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: r.path, Net: "unix"})
	must(r.t, err)
	must(r.t, conn.SetDeadline(time.Now().Add(limit)))
	return conn
}

// ask sends requests as Dovecot does, and returns all that comes back.
func (r *running) ask(text string) string {
	r.t.Helper()
	conn := r.dial()
	defer conn.Close()
	_, err := conn.Write([]byte(text))
	if err == nil {
		err = conn.CloseWrite()
	}
	must(r.t, err)
	answer, err := io.ReadAll(conn)
	if err != nil && !errors.Is(err, unix.ECONNRESET) {
		r.t.Fatal(err)
	}
	return string(answer)
}

// said compares the problems since the last call. Each want is a prefix.
func (r *running) said(want ...string) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.EqualFunc(r.problems, want, strings.HasPrefix) {
		r.t.Errorf("problems: %q, want %q", r.problems, want)
	}
	r.problems = nil
}

// trusted returns the addresses in a trusted set of table inet filter, and for
// how many keys each.
func trusted(t *testing.T, name string) map[netip.Addr]int {
	t.Helper()
	c, err := nftset.Dial()
	must(t, err)
	defer c.Close()
	set, err := c.Set(config.Default().Table, name)
	must(t, err)
	elems, err := c.Elements(set)
	must(t, err)
	found := make(map[netip.Addr]int)
	for _, e := range elems {
		found[e.Key.Addr]++
	}
	return found
}

// generation counts the kernel's transactions.
func generation(t *testing.T) uint32 {
	t.Helper()
	c, err := google.New()
	must(t, err)
	gen, err := c.GetGen()
	must(t, err)
	return gen.ID
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestRequests(t *testing.T) {
	loadSets(t)
	r := start(t, config.Default())
	long := strings.Repeat("x", postlogin.MaxLine)
	fits := "198.51.100.1\t192.0.2.7\talice\tk=" + long[:64<<10] + "\n"
	for _, test := range []struct{ what, text, answer, problem string }{
		{"a login", version + alice, "alice\n", ""},
		{"fields", version + "::1\t2001:db8::7\tb\x01tob\tuid=1000\tx=\x01n\x011\xff\n", "b\x01tob\tuid=1000\tx=\x01n\x011\xff\n", ""},
		{"64 kB, which is more than Dovecot ever sends", version + fits, strings.TrimPrefix(fits, "198.51.100.1\t192.0.2.7\t"), ""},
		{"several", version + alice + "\t\tbob\n" + alice, "alice\nbob\nalice\n", ""},
		{"nothing", "", "", ""},
		{"no login", version, "", "request: refused: an incomplete request: unexpected EOF"},
		{"half a version", "VERS", "", "request: refused: an incomplete request: unexpected EOF"},
		{"half a login", version + "198.51.100.1\t192.0.2.7\tal", "", "request: refused: an incomplete request: unexpected EOF"},
		{"a login and a half", version + alice + "198.51", "alice\n", "request: refused: an incomplete request: unexpected EOF"},
		{"another version", strings.Replace(version, "1", "2", 1) + alice, "", `request: refused: a request in version "2"."0"`},
		{"no version", alice, "", "request: refused: not a post-login request"},
		{"no user", version + "\t\t\n", "", "request: refused: the login has no user"},
		{"a line too long", version + "\t\t" + long + "\n", "", "request: refused: a line of more than 262144 bytes"},
		{"no line at all", long, "", "request: refused: a line of more than 262144 bytes"},
		{"an address that is none", version + "\tmail\talice\n", "alice\n", `login: login of "alice": IP: "mail" is not an IP address`},
		{"a setting that is none", version + "\t192.0.2.8\talice\tnftwl_timeout=x\n", "alice\tnftwl_timeout=x\n", `login: login of "alice": nftwl_timeout: "x" is not a time`},
	} {
		if got := r.ask(test.text); got != test.answer {
			t.Errorf("%s: %.100q", test.what, got)
		}
		if test.problem == "" {
			r.said()
		} else {
			r.said(test.problem)
		}
	}
	if got := trusted(t, "trusted_ipv4"); len(got) != 2 || got[netip.MustParseAddr("192.0.2.7")] != 5 || got[netip.MustParseAddr("192.0.2.8")] != 5 {
		t.Errorf("trusted: %v", got)
	}
	if got := trusted(t, "trusted_ipv6"); len(got) != 1 || got[netip.MustParseAddr("2001:db8::7")] != 5 {
		t.Errorf("trusted: %v", got)
	}
	s := r.Stats()
	if s.Logins != 9 || s.New != 3 || s.Kept != 4 || s.Ignored != 1 || s.Failed["login"] != 1 || len(s.Failed) != 1 || s.Refused["request"] != 9 || s.Late != 0 {
		t.Errorf("%+v", s)
	}
}

// One byte at a time, with the client's descriptor on the first: it comes back
// as a whole, and nobody but the client has the descriptor any more.
func TestPieces(t *testing.T) {
	loadSets(t)
	r := start(t, config.Default())
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	client := os.NewFile(uintptr(ends[1]), "client")
	defer client.Close()
	conn := r.dial()
	defer conn.Close()
	request := version + alice
	if _, _, err := conn.WriteMsgUnix([]byte(request[:1]), unix.UnixRights(ends[0]), nil); err != nil {
		t.Fatal(err)
	}
	must(t, unix.Close(ends[0]))
	for _, b := range []byte(request[1 : len(request)-1]) {
		if _, err := conn.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	// It has read some of it, though not all has come.
	must(t, unix.SetsockoptTimeval(int(client.Fd()), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(limit / time.Second)}))
	if n, err := client.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the client's descriptor is still open somewhere: %d, %v", n, err)
	}
	if _, err := conn.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 100)
	n, err := conn.Read(answer)
	if err != nil || string(answer[:n]) != "alice\n" {
		t.Errorf("%q, %v", answer[:n], err)
	}
	r.said()
}

// Only root's processes may ask, and those of the socket's owner.
func TestPeers(t *testing.T) {
	nstest.NeedUsers(t)
	loadSets(t)
	const owner, stranger = 1000, 1001
	r := start(t, config.Default(), func(r *running) { r.Owner = owner })
	must(t, os.Chmod(filepath.Dir(r.path), 0o755))
	must(t, os.Chmod(filepath.Dir(filepath.Dir(r.path)), 0o755))
	as := func(uid int) (answer string) {
		done := make(chan bool)
		go func() {
			defer close(done)
			// The kernel takes the user from the thread, which is thrown
			// away with the goroutine.
			runtime.LockOSThread()
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
				t.Error(errno)
				return
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				defer unix.Close(fd)
				err = unix.Connect(fd, &unix.SockaddrUnix{Name: r.path})
			}
			if err == nil {
				_, err = unix.Write(fd, []byte(version+alice)) // fails where it is closed by now
			}
			b := make([]byte, 100)
			n, err2 := unix.Read(fd, b)
			if n <= 0 {
				answer = fmt.Sprint("closed ", err != nil && err != unix.EPIPE, err2 != nil && err2 != unix.ECONNRESET)
				return
			}
			answer = string(b[:n])
		}()
		<-done
		return answer
	}
	for _, uid := range []int{0, owner} {
		if got := as(uid); got != "alice\n" {
			t.Errorf("user %d: %q", uid, got)
		}
		r.said()
	}
	if got := as(stranger); got != "closed false false" {
		t.Errorf("a stranger: %q", got)
	}
	r.said(fmt.Sprintf("peer: refused: process %d of user %d is neither root's nor user %d's", os.Getpid(), stranger, owner))
	if s := r.Stats(); s.Refused["peer"] != 1 {
		t.Errorf("%+v", s)
	}
}

// Whatever keeps a client from being trusted, the login is answered.
func TestFailures(t *testing.T) {
	for _, test := range []struct{ what, rules, reason, problem string }{
		{"no table", "", "missing", "table inet filter does not exist"},
		{"no set", "table inet filter { }", "missing", "set trusted_ipv4 does not exist in table inet filter"},
		{"another key", "table inet filter { set trusted_ipv4 { type inet_service; timeout 1d; }; }", "type", "set trusted_ipv4 has keys of type inet_service"},
		{"no timeout", "table inet filter { set trusted_ipv4 { type ipv4_addr; }; }", "type", "set trusted_ipv4 has no timeout flag"},
		{"full", "table inet filter { set trusted_ipv4 { type ipv4_addr . inet_service; timeout 1d; size 3; }; }", "full", "set trusted_ipv4 is full (3 elements)"},
	} {
		loadSets(t, test.rules)
		r := start(t, config.Default())
		for range 2 {
			if got := r.ask(version + alice); got != "alice\n" {
				t.Errorf("%s: %q", test.what, got)
			}
		}
		problem := test.reason + ": 192.0.2.7 is not trusted: " + test.problem
		r.said(problem, problem)
		// And it is trusted with the next login, once it can be.
		loadSets(t)
		if got := r.ask(version + alice); got != "alice\n" {
			t.Errorf("%s: %q", test.what, got)
		}
		r.said()
		if s := r.Stats(); s.Logins != 3 || s.Failed[test.reason] != 2 || s.New != 1 {
			t.Errorf("%s: %+v", test.what, s)
		}
		r.stop()
	}
}

func TestNoConfig(t *testing.T) {
	loadSets(t)
	r := start(t, nil)
	if got := r.ask(version + alice); got != "alice\n" {
		t.Errorf("%q", got)
	}
	r.said("config: nobody is trusted until the configuration is mended")
	r.SetConfig(config.Default())
	if got := r.ask(version + alice); got != "alice\n" {
		t.Errorf("%q", got)
	}
	r.said()
	if s := r.Stats(); s.Failed["config"] != 1 || s.New != 1 {
		t.Errorf("%+v", s)
	}
}

// A panic is the error of the request that it came from.
func TestPanic(t *testing.T) {
	loadSets(t)
	r := start(t, config.Default(), func(r *running) {
		says := r.Problem
		r.Problem = func(reason string, err error) {
			if reason == "login" {
				panic("in the middle of a request")
			}
			says(reason, err)
		}
	})
	if got := r.ask(version + "\tmail\talice\n"); got != "alice\n" {
		t.Errorf("%q", got)
	}
	r.said("defect: a defect of nftwl's: in the middle of a request")
	// In the writer: a grant whose address is none has no set.
	w := newWriter(func(*job) {})
	j, err := w.submit(nil, &trust.Grant{Addr: netip.MustParseAddr("192.0.2.9")})
	must(t, err)
	w.write(w.take())
	if <-j.done; !errors.As(j.err, new(defect)) {
		t.Errorf("%v", j.err)
	}
	if got := r.ask(version + alice); got != "alice\n" {
		t.Errorf("%q", got)
	}
	r.said()
}

// submit gives the writer a login each from so many addresses on, before it
// runs, and returns the jobs.
func submit(t *testing.T, w *writer, c *config.Config, first string, n int) []*job {
	t.Helper()
	var jobs []*job
	addr := netip.MustParseAddr(first)
	for range n {
		j, err := w.submit(c, &trust.Grant{Addr: addr, Timeout: time.Hour})
		must(t, err)
		jobs = append(jobs, j)
		addr = addr.Next()
	}
	return jobs
}

// runWriter has the writer write what waits, and end.
func runWriter(w *writer) {
	stop := make(chan struct{})
	close(stop)
	w.run(stop)
}

// Logins of one moment share a transaction, and one that needs none makes none.
func TestTransactions(t *testing.T) {
	loadSets(t)
	c := config.Default()
	for _, want := range []struct {
		transactions uint32
		outcome      nftset.Outcome
	}{{2, nftset.Added}, {0, nftset.Kept}} {
		w := newWriter(func(*job) {})
		jobs := slices.Concat(submit(t, w, c, "192.0.2.1", maxBatch), submit(t, w, c, "2001:db8::1", maxBatch))
		before := generation(t)
		runWriter(w)
		if n := generation(t) - before; n != want.transactions {
			t.Errorf("%d transactions, want %d", n, want.transactions)
		}
		for _, j := range jobs {
			if <-j.done; j.err != nil || j.outcome != want.outcome {
				t.Errorf("%s: %v, %v", j.grant.Addr, j.outcome, j.err)
			}
		}
	}
	if four, six := trusted(t, "trusted_ipv4"), trusted(t, "trusted_ipv6"); len(four) != maxBatch || len(six) != maxBatch {
		t.Errorf("%d and %d addresses", len(four), len(six))
	}
}

// Logins from one address that wait together are one job, for the longest time.
func TestMerge(t *testing.T) {
	loadSets(t)
	counted := 0
	w := newWriter(func(j *job) { counted += j.logins })
	addr := netip.MustParseAddr("192.0.2.7")
	var jobs []*job
	for _, timeout := range []time.Duration{time.Hour, 7 * time.Hour, 3 * time.Hour} {
		j, err := w.submit(config.Default(), &trust.Grant{Addr: addr, Timeout: timeout})
		must(t, err)
		jobs = append(jobs, j)
	}
	if jobs[0] != jobs[1] || jobs[1] != jobs[2] || jobs[0].grant.Timeout != 7*time.Hour {
		t.Errorf("%+v", jobs)
	}
	runWriter(w)
	if <-jobs[0].done; jobs[0].err != nil || counted != 3 {
		t.Errorf("%v, %d logins", jobs[0].err, counted)
	}
}

// Where the set has no room for all, some are trusted, and the others are told.
func TestFullForSome(t *testing.T) {
	loadSets(t, "table inet filter { set trusted_ipv4 { type ipv4_addr . inet_service; timeout 1d; size 17; }; }")
	w := newWriter(func(*job) {})
	jobs := submit(t, w, config.Default(), "192.0.2.1", 8)
	runWriter(w)
	full := 0
	for _, j := range jobs {
		if <-j.done; errors.Is(j.err, nftset.ErrFull) {
			full++
		} else if j.err != nil {
			t.Error(j.err)
		}
	}
	if full != 5 { // 3 with 5 ports each fit
		t.Errorf("%d of 8 found the set full", full)
	}
}

// The lasting connection is made anew where it fails, and no login is the
// worse for it.
func TestConnectionFails(t *testing.T) {
	loadSets(t)
	w := newWriter(func(*job) {})
	c := config.Default()
	grant := []*trust.Grant{{Addr: netip.MustParseAddr("192.0.2.1"), Timeout: time.Hour}}
	_, err := w.apply(c, grant)
	must(t, err)
	conn := w.conn
	if _, err = w.apply(c, grant); err != nil || w.conn != conn {
		t.Errorf("it does not last: %v", err)
	}
	w.conn.Close()
	o, err := w.apply(c, []*trust.Grant{{Addr: netip.MustParseAddr("192.0.2.2"), Timeout: time.Hour}})
	if err != nil || o[0] != nftset.Added {
		t.Errorf("%v, %v", o, err)
	}
	w.conn.Close()
}

// While the kernel carries out another's transaction nobody can write to it.
// No answer waits for that for longer than the deadline, and the clients are
// trusted afterwards.
func TestCommitLock(t *testing.T) {
	loadSets(t, "table inet other { set s { type ipv4_addr; }; }")
	must(t, func() error { // the sets, beside the other table
		b, err := os.ReadFile(filepath.Join(nstest.Root(t), "contrib/nftables/sets.nft"))
		nstest.Nft(t, string(b))
		return err
	}())
	c := config.Default()
	c.Deadline = 20 * time.Millisecond
	r := start(t, c)
	// The first of many more than 254, on a fast machine.
	first := netip.MustParseAddr("198.18.0.1")
	if got := r.ask(fmt.Sprintf("%s\t%s\talice\n", version, first)); got != "alice\n" {
		t.Fatalf("%q", got)
	}

	other, err := nftset.Dial()
	must(t, err)
	defer other.Close()
	table := nftset.Table{Family: nftset.INet, Name: "other"}
	set, err := other.Set(table, "s")
	must(t, err)
	addr := netip.MustParseAddr("10.0.0.0")
	for range 200 { // as much at a time as any user may send
		batch := other.Batch()
		for range 5000 {
			batch.Add(set, nftset.Element{Key: nftset.Key{Addr: addr}})
			addr = addr.Next()
		}
		must(t, batch.Commit())
	}
	batch := other.Batch()
	batch.Flush(set)
	committed := make(chan error, 1)
	go func() { committed <- batch.Commit() }()
	client, during := first.Next(), 0
	for done := false; !done; client = client.Next() {
		if got := r.ask(fmt.Sprintf("%s\t%s\talice\n", version, client)); got != "alice\n" {
			t.Fatalf("%q", got)
		}
		select {
		case err := <-committed:
			must(t, err)
			done = true
		default:
			during++
		}
	}
	r.stop() // which writes what waits
	late := r.Stats().Late
	if late < 2 {
		t.Errorf("%d of %d logins during the transaction were answered before the kernel could", late, during)
	}
	got := trusted(t, "trusted_ipv4")
	for a := first; a != client; a = a.Next() {
		if got[a] != 5 {
			t.Errorf("%s is trusted on %d ports", a, got[a])
		}
	}
	if s := r.Stats(); s.New != s.Logins || len(s.Failed) > 0 {
		t.Errorf("%+v", s)
	}
	for _, p := range r.problems {
		if !strings.HasPrefix(p, "late: 198.18.") || !strings.Contains(p, "went on without") {
			t.Error(p)
		}
	}
	t.Logf("%d logins during the transaction, %d answered before the kernel could", during, late)
}

// A server that stops answers what it has begun, and leaves the rest in the
// socket for the next.
func TestStop(t *testing.T) {
	loadSets(t)
	r := start(t, config.Default())
	begun := r.dial()
	defer begun.Close()
	if _, err := begun.Write([]byte(version)); err != nil {
		t.Fatal(err)
	}
	idle := r.dial() // which shall not keep it
	defer idle.Close()
	if got := r.ask(version + alice); got != "alice\n" {
		t.Fatalf("%q", got)
	}
	stopped := make(chan bool)
	go func() {
		r.stop()
		close(stopped)
	}()
	if _, err := begun.Write([]byte(alice)); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(begun)
	if err != nil || string(answer) != "alice\n" {
		t.Errorf("%q, %v", answer, err)
	}
	<-stopped
}

func TestAsk(t *testing.T) {
	loadSets(t)
	r := start(t, config.Default())
	r.ask(version + alice)
	r.ask(version + alice)
	s, err := Ask(r.path)
	if err != nil || s.Logins != 2 || s.New != 1 || s.Kept != 1 || s.Seconds <= 0 || s.Slowest <= 0 || s.Mean() <= 0 || time.Since(s.Started) > time.Hour {
		t.Errorf("%+v, %v", s, err)
	}
	r.stop()
	if _, err := Ask(r.path); !errors.Is(err, unix.ENOENT) {
		t.Errorf("%v", err)
	}
}

func TestPrometheus(t *testing.T) {
	var c counter
	c.start()
	c.s.Started = time.UnixMilli(1_700_000_000_250)
	c.trusted(nftset.Added, 2)
	c.trusted(nftset.Extended, 3)
	c.trusted(nftset.Kept, 4)
	c.ignored()
	c.failed("full", 2)
	c.failed("missing", 1)
	c.refused("peer")
	c.late()
	c.answered(time.Millisecond)
	c.answered(20 * time.Millisecond)
	var got strings.Builder
	must(t, c.stats().WritePrometheus(&got))
	want, err := os.ReadFile("testdata/nftwl.prom")
	must(t, err)
	if got.String() != string(want) {
		t.Errorf("%s", got.String())
	}
	// What was handed out does not change.
	s := c.stats()
	before := maps.Clone(s.Failed)
	c.failed("full", 1)
	if !maps.Equal(s.Failed, before) {
		t.Error("a copy of the counters changed")
	}
}
