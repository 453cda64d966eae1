package dovecot

import (
	"encoding/json"
	"fmt"
	"net"
	"net/textproto"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// asks is the drop-in's line that some tests change.
const asks = "executable = imap " + socket

// imapAsks has the drop-in's IMAP ask at another socket.
func imapAsks(path string) func(string) string {
	return func(s string) string { return strings.Replace(s, asks, "executable = imap "+path, 1) }
}

// What no process of Dovecot's may do, nftwl serve does for it.
func TestDovecotNeedsNoPrivilege(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{serve: true, wrap: withoutNetAdmin})
		loadSets(t)
		if err := login(client4, "143", imap, "alice", password); err != nil {
			t.Error(err)
		}
		wantTrusted(t, client4, "alice", day)
		s.wantComplaints()
	})
}

// What a mail process gets back is what it asked with, whatever bytes the user
// database holds; and it is what Dovecot's own script-login makes of the same
// request, but for what that loses.
func TestFieldsComeBackUnchanged(t *testing.T) {
	t.Parallel()
	// An environment variable is the one way for a line feed into a field in
	// both Dovecots. 2.4 cuts it at a space, 2.3 the users' lines at a colon.
	const odd = "a\tb\nc\rd\x01e\x011\x01n\\\x7f\xff\u00fc"
	eachDovecot(t, func(t *testing.T, d dovecot) {
		keep := "import_environment {\n  ODD=%{env:ODD}\n}\n"
		if d.is23() {
			keep = "import_environment = $import_environment ODD\n"
		}
		s := d.start(t, with{
			serve:  true,
			env:    []string{"ODD=" + odd},
			dropIn: imapAsks(dir + "/recorder"),
			dovecot: keep + `service script {
  executable = script-login /usr/bin/env
  unix_listener script {
  }
}
`,
		})
		loadSets(t)
		r := s.record("recorder", socket)
		s.write("users", "alice:{PLAIN}secret:1000:1000::::"+
			"userdb_home="+dir+"/mail/%{env:ODD} userdb_odd=%{env:ODD} userdb_Upper=aB userdb_flag userdb_empty=\n", 0o644)
		s.write("mail/"+odd+"/Maildir/new/1.e2e", message, 0o644)
		run(t, "chown", "-R", "1000:1000", s.path("mail"))

		// There is mail in that folder alone.
		if err := login(client4, "143", imap, "alice", password); err != nil {
			t.Errorf("a home folder named %q: %v", odd, err)
		}
		wantTrusted(t, client4, "alice", day)
		got := r.take(t, 1)[0]
		if escaped := "\todd=a\x01tb\x01nc\x01rd\x011e\x0111\x011n\\\x7f\xff\u00fc\t"; !strings.Contains(got.request, escaped) {
			t.Errorf("Dovecot asks %q, without %q", got.request, escaped)
		}
		if want := fields(got.request); got.answer != want {
			t.Errorf("nftwl serve answers %q, want %q", got.answer, want)
		}
		answer, err := s.postLogin("/run/dovecot/script").ask(got.request)
		if want := asScriptLogin(got.answer); err != nil || answer != want {
			t.Errorf("script-login answers %q, %v; want %q", answer, err, want)
		}
		s.wantComplaints()
	})
}

// fields returns the part of a request that is to come back.
func fields(request string) string {
	_, login, _ := strings.Cut(request, "\n")
	return strings.SplitN(login, "\t", 3)[2]
}

// asScriptLogin is what script-login makes of an answer. The fields pass
// through its environment, so that their keys are in lower case afterwards,
// and those without a value are lost.
func asScriptLogin(answer string) string {
	fields := strings.Split(strings.TrimSuffix(answer, "\n"), "\t")
	kept := fields[:1]
	for _, f := range fields[1:] {
		if key, value, ok := strings.Cut(f, "="); ok {
			kept = append(kept, strings.ToLower(key)+"="+value)
		}
	}
	return strings.Join(kept, "\t") + "\n"
}

// Requests such as no user database here makes, sent to both.
func TestSameAnswerAsScriptLogin(t *testing.T) {
	t.Parallel()
	const version = "VERSION\tscript-login\t1\t0\n"
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{serve: true, dovecot: `service script {
  executable = script-login /usr/bin/env
  unix_listener script {
  }
}
`})
		loadSets(t)
		script, serve := s.postLogin("/run/dovecot/script"), s.postLogin(socket)
		for _, c := range []struct {
			name, request string
			script        string // script-login's answer where it is another
		}{
			{name: "no fields", request: version + "198.51.100.1\t192.0.2.7\talice\n"},
			{name: "no addresses", request: version + "\t\talice\tuid=1000\n"},
			{name: "an address that is none", request: version + "x\ty\talice\tuid=1000\n"},
			{name: "IPv6", request: version + "2001:db8:1::1\t2001:db8::7\talice\tuid=1000\n"},
			{name: "escapes", request: version + "198.51.100.1\t192.0.2.7\talice\ta=\x01t\x01n\x01r\x011\x011n\n"},
			{name: "equals signs", request: version + "198.51.100.1\t192.0.2.7\talice\ta==b=\tc=\n"},
			{name: "spaces in a user", request: version + "198.51.100.1\t192.0.2.7\ta b \tuid=1000\n"},
			{name: "8 KiB", request: version + "198.51.100.1\t192.0.2.7\talice\ta=" + strings.Repeat("x\x01t", 2700) + "\n"},
			{name: "a later minor version", request: "VERSION\tscript-login\t1\t7\n198.51.100.1\t192.0.2.7\talice\ta=b\n"},
			{
				name: "upper case", request: version + "198.51.100.1\t192.0.2.7\talice\tQuota_Rule=*:Bytes=1G\n",
				script: "alice\tquota_rule=*:Bytes=1G\n",
			},
			{
				name: "no value", request: version + "198.51.100.1\t192.0.2.7\talice\tflag\t\ta=b\n",
				script: "alice\ta=b\n",
			},
			{
				name: "a key twice", request: version + "198.51.100.1\t192.0.2.7\talice\ta=b\ta=c\n",
				script: "alice\ta=c\ta=c\n",
			},
			{
				// Which gives the mail process another user, and a field of
				// that user's choice.
				name: "a tab in a user", request: version + "198.51.100.1\t192.0.2.7\talice\x01tuid=0\ta=b\n",
				script: "alice\tuid=0\ta=b\n",
			},
		} {
			want := fields(c.request)
			if answer, err := serve.ask(c.request); err != nil || answer != want {
				t.Errorf("%s: nftwl serve answers %q, %v; want %q", c.name, answer, err, want)
			}
			if c.script != "" {
				want = c.script
			}
			if answer, err := script.ask(c.request); err != nil || answer != want {
				t.Errorf("%s: script-login answers %q, %v; want %q", c.name, answer, err, want)
			}
		}
	})
}

// As whom the mail processes ask, on which the owner of the socket depends.
func TestWhoAsks(t *testing.T) {
	t.Parallel()
	const root = 0
	for _, c := range []struct {
		name     string
		settings string // $COUNT is service_count by its name
		uids     []int  // of one login after another
	}{
		{"as shipped", "", []int{root, root}},
		{"user", "service imap {\n  user = nobody\n}\n", []int{root, root}},
		{"drop_priv_before_exec", `service imap {
  user = nobody
  drop_priv_before_exec = yes
}
service config {
  unix_listener config {
    user = nobody
  }
}
service auth {
  unix_listener auth-master {
    user = nobody
  }
}
`, []int{nobody, nobody}},
		{"a process for many logins", manyLogins, []int{root, nobody, nobody}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			eachDovecot(t, func(t *testing.T, d dovecot) {
				s := d.start(t, with{
					serve:   true,
					dropIn:  imapAsks(dir + "/recorder"),
					dovecot: d.settings(c.settings),
				})
				s.mailIsNobodys()
				loadSets(t)
				r := s.record("recorder", socket)
				var uids []int
				for range c.uids {
					if err := login(client4, "143", imap, "alice", password); err != nil {
						t.Error(err)
					}
					uids = append(uids, r.take(t, 1)[0].uid)
				}
				if !slices.Equal(uids, c.uids) {
					t.Errorf("the mail processes ask as users %v, want %v", uids, c.uids)
				}
			})
		})
	}
}

// manyLogins has one process serve them all.
const manyLogins = `service imap {
  $COUNT = 100
  process_limit = 1
}
`

// settings puts the name that this Dovecot has for service_count into some.
func (d dovecot) settings(s string) string {
	name := "restart_request_count"
	if d.is23() {
		name = "service_count"
	}
	return strings.ReplaceAll(s, "$COUNT", name)
}

// mailIsNobodys makes user nobody the owner of all mail.
func (s *server) mailIsNobodys() {
	s.t.Helper()
	id := strconv.Itoa(nobody)
	s.write("users", strings.ReplaceAll(users, "1000", id), 0o644)
	run(s.t, "chown", "-R", id+":"+id, s.path("mail"))
}

// A mail process that serves several logins asks as the mail user from its
// second on. It may where that user owns the socket, and only there.
func TestOwnerOfTheSocket(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		owner  int
		mode   os.FileMode
		denied string // what Dovecot's log says of the second login; empty where it succeeds
		says   string // nftwl serve's log
	}{
		{"the mail user", nobody, 0o600, "", ""},
		{"root", 0, 0o600, `net_connect_unix\(` + socket + `\) failed: Permission deni`, ""},
		{
			"root, but everyone may connect", 0, 0o666, `(write|fd_read)\(` + socket + `\) failed: (Broken pipe|Connection reset by peer)`,
			`refused: process \d+ of user 65534 is neither root's nor user 0's, who owns the socket`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			eachDovecot(t, func(t *testing.T, d dovecot) {
				s := d.start(t, with{serve: true, dovecot: d.settings(manyLogins)})
				s.mailIsNobodys()
				loadSets(t)
				s.stopResident(syscall.SIGTERM)
				s.startActivated(c.owner, c.mode)
				if err := login(client4, "143", imap, "alice", password); err != nil {
					t.Errorf("the first login: %v", err)
				}
				wantTrusted(t, client4, "alice", day)
				// A connection that is denied after the login's success in
				// Dovecot's eyes gets no answer.
				conn, err := dial(client6, "143")
				must(t, err)
				defer conn.Close()
				result := make(chan error, 1)
				go func() { result <- imap(textproto.NewConn(conn), "alice", password) }()
				if c.denied == "" {
					if err := <-result; err != nil {
						t.Errorf("the second login: %v", err)
					}
					if got := elements(t, "trusted_ipv6"); len(got) != 5 {
						t.Errorf("set trusted_ipv6 holds %+v", got)
					}
				} else {
					re := regexp.MustCompile(`imap\(alice\): Error: ` + c.denied)
					poll(t, "Dovecot's log to deny the second login", func() bool { return re.MatchString(s.log()) })
				}
				s.stopResident(syscall.SIGTERM)
				got := strings.Join(s.residentComplaints(), "\n")
				if !regexp.MustCompile("^" + c.says + "$").MatchString(got) {
					t.Errorf("nftwl serve complains %q, want %q", got, c.says)
				}
			})
		})
	}
}

// startActivated runs nftwl serve as systemd does, on a socket of the given
// owner.
func (s *server) startActivated(owner int, mode os.FileMode) {
	s.t.Helper()
	must(s.t, os.Remove(socket))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	must(s.t, err)
	l.SetUnlinkOnClose(false)
	defer l.Close()
	must(s.t, os.Chown(socket, owner, owner))
	must(s.t, os.Chmod(socket, mode))
	file, err := l.File()
	must(s.t, err)
	defer file.Close()
	s.runResident(file, "/bin/sh", "-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec /usr/bin/nftwl serve")
}

// status returns what nftwl status says, as JSON.
func (s *server) status() (stats struct {
	Logins, New, Renewed, Kept, Ignored, Late int
	Failed, Refused                           map[string]int
	Slowest                                   float64
}) {
	s.t.Helper()
	must(s.t, json.Unmarshal([]byte(s.nftwl("status", "--json", "--socket", socket)), &stats))
	return stats
}

// nftwl runs a command of it.
func (s *server) nftwl(args ...string) string {
	s.t.Helper()
	cmd := exec.Command("/usr/bin/nftwl", args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: s.d.root}
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("nftwl %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// A stream of logins goes on over restarts: Dovecot tries for a second to reach
// who does not listen.
func TestRestart(t *testing.T) {
	t.Parallel()
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(unix.SignalName(signal), func(t *testing.T) {
			t.Parallel()
			eachDovecot(t, func(t *testing.T, d dovecot) {
				const restarts, workers = 10, 8
				s := d.start(t, with{serve: true})
				loadSets(t)
				p := s.postLogin(socket)
				var answered, denied atomic.Int64
				var last atomic.Pointer[error]
				stop := make(chan struct{})
				var wg sync.WaitGroup
				for w := range workers {
					wg.Go(func() {
						for i := 0; ; i++ {
							select {
							case <-stop:
								return
							default:
							}
							if err := p.ok(fmt.Sprintf("192.0.2.%d", 10*w+i%10+100), "alice"); err != nil {
								denied.Add(1)
								last.Store(&err)
							} else {
								answered.Add(1)
							}
						}
					})
				}
				for range restarts {
					next := answered.Load() + 10*workers
					poll(t, "logins", func() bool { return answered.Load() >= next })
					// One of Dovecot's own comes while nobody listens.
					conn, err := dial(client4, "143")
					must(t, err)
					s.stopResident(signal)
					result := make(chan error, 1)
					go func() {
						defer conn.Close()
						result <- imap(textproto.NewConn(conn), "alice", password)
					}()
					s.startResident()
					if err := <-result; err != nil {
						t.Errorf("a login while nobody listens: %v", err)
					}
				}
				close(stop)
				wg.Wait()
				t.Logf("%d logins were let in, %d not", answered.Load(), denied.Load())
				most := int64(0)
				if signal == syscall.SIGKILL {
					// What it had in hand, and what asked again before the
					// kernel had come to the socket that listens.
					most = 2 * restarts * workers
				}
				if n := denied.Load(); n > most {
					t.Errorf("%d logins were denied by %d restarts, %d at most should have been; the last: %v", n, restarts, most, *last.Load())
				}
				s.wantComplaints()
			})
		})
	}
}

// What it takes to serve does not grow with the number of logins.
func TestManyLoginsOneAfterAnother(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	t.Parallel()
	const warm, all, atOnce, addresses = 10_000, 100_000, 32, 10_000
	s := hostDovecot(t).start(t, with{serve: true})
	loadSets(t)
	p := s.postLogin(socket)
	// Each comes twice at once, and again in the next round.
	client := func(i int) string {
		a := i / 2 % addresses
		return fmt.Sprintf("203.0.%d.%d", a/250, a%250+1)
	}
	logins := func(from, to int) {
		var next atomic.Int64
		next.Store(int64(from))
		var wg sync.WaitGroup
		for range atOnce {
			wg.Go(func() {
				for i := int(next.Add(1)) - 1; i < to; i = int(next.Add(1)) - 1 {
					if err := p.ok(client(i), "alice"); err != nil {
						t.Errorf("login %d: %v", i, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	logins(0, 1) // upon which it connects to the kernel
	fds := s.descriptors()
	start := time.Now()
	logins(1, warm)
	warmMemory := s.memory()
	logins(warm, all)
	took := time.Since(start)
	memory := s.memory()
	stats := s.status()
	t.Logf("%d logins in %v, the slowest answer after %.1f ms; it takes %d KiB after %d, and %d after all; it had %d descriptors after the first, and has %d",
		all, took.Round(time.Millisecond), stats.Slowest*1000, warmMemory, warm, memory, fds, s.descriptors())
	if memory > warmMemory+4<<10 {
		t.Errorf("it takes %d KiB after %d logins, and %d KiB after %d", warmMemory, warm, memory, all)
	}
	poll(t, "as few descriptors as before", func() bool { return s.descriptors() <= fds+2 })
	if stats.Logins != all || stats.New+stats.Renewed+stats.Kept != all {
		t.Errorf("the counters are %+v", stats)
	}
	trusted := make(map[string]int)
	for _, e := range elements(t, "trusted_ipv4") {
		trusted[e.address]++
	}
	for i := range all {
		address := client(i)
		if trusted[address] != 5 {
			t.Fatalf("%s is trusted on %d ports", address, trusted[address])
		}
	}
	s.wantLog()
	s.wantLate(stats.Late) // a busy machine's
}

// memory returns how much of nftwl serve is resident, in KiB.
func (s *server) memory() int {
	s.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.resident.Process.Pid))
	must(s.t, err)
	m := regexp.MustCompile(`(?m)^VmRSS:\s+(\d+) kB$`).FindSubmatch(b)
	n, err := strconv.Atoi(string(m[1]))
	must(s.t, err)
	return n
}

// descriptors returns how many nftwl serve has open.
func (s *server) descriptors() int {
	s.t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.resident.Process.Pid))
	must(s.t, err)
	return len(fds)
}

// The sets can go and come back under it.
func TestTableFlushedMeanwhile(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{serve: true})
		visit := func() {
			t.Helper()
			if err := login(client4, "143", imap, "alice", password); err != nil {
				t.Error(err)
			}
		}
		loadSets(t)
		visit()
		wantTrusted(t, client4, "alice", day)
		nstest.Nft(t, "flush ruleset")
		visit()
		visit()
		loadSets(t)
		visit()
		wantTrusted(t, client4, "alice", day)
		// And with other sets in their place.
		nstest.Nft(t, "flush ruleset\n"+fullSet)
		visit()
		nstest.Nft(t, "flush ruleset")
		loadSets(t)
		visit()
		wantTrusted(t, client4, "alice", day)
		const missing = `192\.0\.2\.7 is not trusted: table inet filter does not exist`
		s.wantComplaints(missing, `192\.0\.2\.7 is not trusted: set trusted_ipv4 .* full .*`, missing)
	})
}

// busy is a transaction that takes the kernel half a second: ranges in several
// fields are the dearest elements to add. As root of a user namespace nft's
// socket takes no batch that is much larger.
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

// While the kernel carries out another's transaction, it does nobody else's.
// Logins go on after the deadline all the same, and are trusted later.
//
// It runs alone: meanwhile no other transaction ends, even in another namespace
// (synchronize_rcu in nf_tables_commit), and a kernel that is not preemptible
// lets nobody else have that processor.
func TestKernelBusy(t *testing.T) {
	const deadline, margin, atOnce = 50 * time.Millisecond, 250 * time.Millisecond, 20
	others, first := processors(t)
	stayOn(t, others)
	t.Cleanup(func() { stayOn(t, append(others, first)) })
	s := hostDovecot(t).start(t, with{serve: true, config: "deadline: 50ms\n"})
	loadSets(t)
	p := s.postLogin(socket)
	s.write("busy.nft", busy(), 0o644)
	nft := exec.Command(nstest.Need(t, "nft", "nftables"), "-f", s.path("busy.nft"))
	start := time.Now()
	must(t, nft.Start())
	must(t, unix.SchedSetaffinity(nft.Process.Pid, cpuSet(first)))
	done := make(chan error, 1)
	go func() { done <- nft.Wait() }()

	var slowest time.Duration
	addresses := []string{client4}
	for ended := false; !ended; {
		took := make([]time.Duration, atOnce)
		var wg sync.WaitGroup
		for i := range took {
			n := len(addresses)
			address := fmt.Sprintf("203.0.%d.%d", 100+n/250, n%250+1)
			addresses = append(addresses, address)
			wg.Go(func() {
				start := time.Now()
				if err := p.ok(address, "alice"); err != nil {
					t.Error(err)
				}
				took[i] = time.Since(start)
			})
		}
		start := time.Now()
		if err := login(client4, "143", imap, "alice", password); err != nil {
			t.Error(err)
		}
		whole := time.Since(start) // of which the answer is the most
		wg.Wait()
		slowest = max(slowest, whole, slices.Max(took))
		select {
		case err := <-done:
			must(t, err)
			ended = true
		default:
		}
	}
	took := time.Since(start)
	stats := s.status()
	t.Logf("%v of another's transaction: %d logins, %d of them late, the slowest took %v", took, len(addresses), stats.Late, slowest)
	if stats.Late == 0 {
		t.Errorf("no login was late in the %v that the transaction took: nothing was tested", took)
	}
	if slowest > deadline+margin {
		t.Errorf("a login took %v with a deadline of %v", slowest, deadline)
	}
	poll(t, "all to be trusted", func() bool {
		trusted := make(map[string]int)
		for _, e := range elements(t, "trusted_ipv4") {
			trusted[e.address]++
		}
		return !slices.ContainsFunc(addresses, func(a string) bool { return trusted[a] != 5 })
	})
	s.wantLog()
	s.wantLate(s.status().Late)
}

// processors returns those that the tests may use, and one of them apart.
func processors(t *testing.T) (others []int, first int) {
	t.Helper()
	var set unix.CPUSet
	must(t, unix.SchedGetaffinity(0, &set))
	for i := range len(set) * 64 {
		if set.IsSet(i) {
			others = append(others, i)
		}
	}
	if len(others) < 2 {
		nstest.Skip(t, "the test needs two processors")
	}
	return others[1:], others[0]
}

// stayOn has every thread of the tests, and what they start, run on some
// processors.
func stayOn(t *testing.T, processors []int) {
	t.Helper()
	threads, err := os.ReadDir("/proc/self/task")
	must(t, err)
	for _, e := range threads {
		id, err := strconv.Atoi(e.Name())
		must(t, err)
		if err := unix.SchedSetaffinity(id, cpuSet(processors...)); err != nil && err != unix.ESRCH {
			t.Fatal(err)
		}
	}
}

func cpuSet(processors ...int) *unix.CPUSet {
	var set unix.CPUSet
	for _, i := range processors {
		set.Set(i)
	}
	return &set
}

// wantLate ends nftwl serve, which may complain of nothing but late answers,
// and of so many.
func (s *server) wantLate(count int) {
	s.t.Helper()
	s.stopResident(syscall.SIGTERM)
	got := s.residentComplaints()
	if len(got) != count {
		s.t.Errorf("nftwl serve complains of %d late answers, and counts %d", len(got), count)
	}
	for _, line := range got {
		if !strings.Contains(line, "without the kernel's answer") {
			s.t.Errorf("nftwl serve complains %q", line)
		}
	}
}

// A connection to the kernel that fails is replaced within the same login.
func TestNetlinkSocketFails(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{serve: true})
		loadSets(t)
		if err := login(client4, "143", imap, "alice", password); err != nil {
			t.Error(err)
		}
		wantTrusted(t, client4, "alice", day)
		nstest.Nft(t, "flush ruleset")
		loadSets(t)

		before := s.overrun(t)
		if err := login(client4, "143", imap, "alice", password); err != nil {
			t.Error(err)
		}
		wantTrusted(t, client4, "alice", day)
		if after, _ := s.netlink(t); after == before {
			t.Errorf("it goes on with the socket %s", before)
		}
		s.wantComplaints()
	})
}

// netlink returns the one socket by which nftwl serve talks to nf_tables, and
// its descriptor in that process.
func (s *server) netlink(t *testing.T) (socket string, fd int) {
	t.Helper()
	table, err := os.ReadFile("/proc/thread-self/net/netlink")
	must(t, err)
	inodes := make(map[string]bool)
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); f[1] == strconv.Itoa(unix.NETLINK_NETFILTER) {
			inodes["socket:["+f[9]+"]"] = true
		}
	}
	folder := fmt.Sprintf("/proc/%d/fd", s.resident.Process.Pid)
	fds, err := os.ReadDir(folder)
	must(t, err)
	for _, e := range fds {
		link, err := os.Readlink(filepath.Join(folder, e.Name()))
		must(t, err)
		if inodes[link] {
			fd, err := strconv.Atoi(e.Name())
			must(t, err)
			return link, fd
		}
	}
	t.Fatal("nftwl serve has no netlink socket")
	return "", 0
}

// overrun breaks that socket: with answers to questions that nftwl serve never
// asked, of which more come than its buffer takes. Its next call fails with
// ENOBUFS.
func (s *server) overrun(t *testing.T) string {
	t.Helper()
	name, fd := s.netlink(t)
	process, err := unix.PidfdOpen(s.resident.Process.Pid, 0)
	must(t, err)
	defer unix.Close(process)
	fd, err = unix.PidfdGetfd(process, fd, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 0)) // the least there is
	// struct nlmsghdr, and no message of a subsystem that exists
	ask := make([]byte, 16)
	ask[0], ask[4], ask[5], ask[6] = 16, 0xff, 0xff, unix.NLM_F_REQUEST|unix.NLM_F_ACK
	for range 100 {
		err := unix.Sendto(fd, ask, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err != nil && err != unix.ENOBUFS {
			t.Fatal(err)
		}
	}
	return name
}

// A server that does not start denies every login, so a bad configuration
// starts and trusts nobody.
func TestConfigMendedMeanwhile(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		const bad, good = "tiemout: 2d\n", "timeout: 2d\n"
		s := d.start(t, with{serve: true, config: bad})
		loadSets(t)
		visit := func() {
			t.Helper()
			if err := login(client4, "143", imap, "alice", password); err != nil {
				t.Error(err)
			}
		}
		reload := func(config string) {
			t.Helper()
			s.write("etc/nftwl.yaml", config, 0o644)
			must(t, s.resident.Process.Signal(syscall.SIGHUP))
		}
		visit()
		wantNobody(t)

		reload(good)
		// Nothing tells when it is read; a login trusts from then on.
		poll(t, "the mended configuration", func() bool {
			visit()
			return len(elements(t, "trusted_ipv4")) > 0
		})
		wantTrusted(t, client4, "alice", 2*day)

		reload(bad)
		const stays = "the old one stays in use"
		poll(t, "the bad configuration to be refused", func() bool { return strings.Contains(s.read("resident"), stays) })
		nstest.Nft(t, "flush ruleset")
		loadSets(t)
		visit()
		wantTrusted(t, client4, "alice", 2*day)

		stats := s.status()
		if stats.Failed["config"] < 1 || stats.New != 2 || stats.Logins != stats.New+stats.Failed["config"] {
			t.Errorf("the counters are %+v", stats)
		}
		lines := s.nftwl("status", "--socket", socket)
		must(t, s.resident.Process.Signal(syscall.SIGUSR1))
		poll(t, "the counters in the log", func() bool {
			for line := range strings.Lines(lines) {
				if !strings.Contains(s.read("resident"), "nftwl: "+line) {
					return false
				}
			}
			return true
		})

		want := []string{".*/etc/nftwl.yaml.*tiemout.*; nobody is trusted until it is mended and read again"}
		want = append(want, slices.Repeat([]string{"nobody is trusted until the configuration is mended and read again"}, stats.Failed["config"])...)
		want = append(want, ".*/etc/nftwl.yaml.*tiemout.*; the old one stays in use")
		s.wantComplaints(want...)
	})
}
