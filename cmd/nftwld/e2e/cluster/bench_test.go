package cluster

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"net/textproto"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

// benchServer is a machine whose Dovecot runs nftwl login, with an engine beside it.
type benchServer struct {
	*testing.B
	dovecot *nstest.Dovecot
	engine  *nstest.Engine
	nftwld  *exec.Cmd
	count   int // of logins
}

const (
	benchDir     = nstest.Dir
	benchAddress = "198.51.100.1"
)

// state is what the cluster is while users log in.
type state struct {
	name       string
	begin, end func(s *benchServer)
}

var states = []state{
	{"no cluster", func(*benchServer) {}, func(*benchServer) {}},
	{"no cluster, once more", func(*benchServer) {}, func(*benchServer) {}}, // shows the noise
	{"a cluster", (*benchServer).join, (*benchServer).leave},
	{"a cluster, its engine hanging", func(s *benchServer) {
		s.join()
		s.engine.Signal(syscall.SIGSTOP)
	}, func(s *benchServer) {
		s.engine.Signal(syscall.SIGCONT)
		s.leave()
	}},
}

// BenchmarkLogin measures what a cluster costs logins: whole ones over IMAP, and nftwl
// login alone. make bench runs it.
//
// One Dovecot serves all. Each round has all states, in random order, and the ratios
// are of each round's medians: so a machine whose speed drifts treats them alike. Each
// login is from an address of its own, and begins once the last one's processes are
// gone.
func BenchmarkLogin(b *testing.B) {
	const (
		rounds = 25 // of each state
		logins = 12 // in each
	)
	s := newBenchServer(b)
	whole, alone := make([][]float64, len(states)), make([][]float64, len(states)) // medians of rounds
	for range 10 {
		s.login()
		s.nftwl()
	}
	for range rounds {
		for _, i := range rand.Perm(len(states)) {
			states[i].begin(s)
			var w, a []time.Duration
			for range logins {
				w, a = append(w, s.login()), append(a, s.nftwl())
			}
			whole[i], alone[i] = append(whole[i], at(w, 0.5)), append(alone[i], at(a, 0.5))
			states[i].end(s)
		}
	}

	// Not through b.Log, which indents.
	ratio := func(rounds, to []float64) float64 {
		var ratios []float64
		for i := range rounds {
			ratios = append(ratios, rounds[i]/to[i])
		}
		return median(ratios)
	}
	fmt.Printf("\nLogins, each from a new address: medians of %d rounds of %d.\n\n", rounds, logins)
	fmt.Print("| | whole IMAP login | ratio | `nftwl login` alone | ratio |\n|---|--:|--:|--:|--:|\n")
	for i, state := range states {
		fmt.Printf("| %s | %.2f ms | %.3f | %.2f ms | %.3f |\n", state.name,
			median(whole[i]), ratio(whole[i], whole[0]), median(alone[i]), ratio(alone[i], alone[0]))
	}
	fmt.Println()
	b.ReportMetric(0, "ns/op") // which would be that of all together
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// at is a quantile in milliseconds.
func at(times []time.Duration, quantile float64) float64 {
	slices.Sort(times)
	return float64(times[int(quantile*float64(len(times)-1))]) / 1e6
}

func newBenchServer(b *testing.B) *benchServer {
	b.Helper()
	d := nstest.Host
	version := d.DovecotVersion(b)
	nftwl := nstest.Build(b, "cmd/nftwl")
	nstest.Build(b, "cmd/nftwld")
	nstest.New(b)
	nstest.IP(b, "address add "+benchAddress+"/32 dev lo", "route add local "+benchClients.String()+" dev lo")
	d.Tree(b)
	s := &benchServer{B: b}
	for _, dir := range []string{"state", "mail/alice/Maildir/new", "engine"} {
		nstest.Must(b, os.MkdirAll(filepath.Join(benchDir, dir), 0o755))
	}
	nstest.Run(b, "chown", "-R", "1000:1000", benchDir+"/mail")
	s.write("users", "alice:{PLAIN}secret:1000:1000::"+benchDir+"/mail/alice::\n")
	s.write("nftwl.yaml", "cluster: {server: \"redis://127.0.0.1:6379\", node: bench}\n")
	s.write("90-nftwl.conf", strings.Replace(nstest.Contrib(b, "dovecot/90-nftwl.conf"),
		"script-login /usr/bin/nftwl login", "script-login "+nftwl+" --config "+benchDir+"/nftwl.yaml login", 2))
	s.write("dovecot.conf", nstest.DovecotConf{Dir: benchDir}.For(version)+"protocols = imap\nstate_dir = "+benchDir+"/state\nlog_path = "+
		benchDir+"/log\n!include "+benchDir+"/90-nftwl.conf\n")
	nstest.Nft(b, nstest.Contrib(b, "nftables/sets.nft"))
	s.engine = d.NewEngine(b, "127.0.0.1:6379", benchDir+"/engine")
	s.dovecot = d.StartDovecot(b, benchDir+"/dovecot.conf", benchAddress+":143")
	return s
}

func (s *benchServer) write(name, text string) {
	s.Helper()
	nstest.Write(s, filepath.Join(benchDir, name), text, 0o644)
}

// join starts nftwld, and waits until it is connected.
func (s *benchServer) join() {
	s.Helper()
	program := nstest.Build(s, "cmd/nftwld")
	log, err := os.Create(benchDir + "/nftwld.log")
	nstest.Must(s, err)
	defer log.Close()
	s.nftwld = exec.Command(program, "--config", benchDir+"/nftwl.yaml")
	s.nftwld.Stderr, s.nftwld.Env = log, []string{}
	s.nftwld.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	nstest.Must(s, s.nftwld.Start())
	nstest.Poll(s, "nftwld to be connected", func() bool {
		out, _ := exec.Command(program, "--config", benchDir+"/nftwl.yaml", "status").Output() // once it listens
		text := strings.Join(strings.Fields(string(out)), " ")
		return strings.Contains(text, "cluster connected 1 ") && strings.Contains(text, "cluster merges 2 ")
	})
}

func (s *benchServer) leave() {
	s.Helper()
	nstest.Must(s, s.nftwld.Process.Signal(syscall.SIGTERM))
	if err := s.nftwld.Wait(); err != nil {
		s.Fatalf("%v\n%s", err, nstest.Read(s, benchDir+"/nftwld.log"))
	}
}

// benchClients is set aside for benchmarks (RFC 2544).
var benchClients = netip.MustParsePrefix("198.18.0.0/15")

// client is an address that was not there before.
func (s *benchServer) client() string {
	s.count++
	return netip.AddrFrom4([4]byte{198, 18, byte(s.count >> 8), byte(s.count)}).String()
}

// login logs in and out, waits until the server is at rest, and returns how long the
// login took.
func (s *benchServer) login() time.Duration {
	s.Helper()
	start := time.Now()
	conn, err := nstest.Dial(s.client(), benchAddress, "143")
	nstest.Must(s, err)
	defer conn.Close()
	c := textproto.NewConn(conn)
	_, err = c.ReadLine()
	nstest.Must(s, err)
	nstest.Must(s, nstest.IMAPCommand(c, "", "LOGIN alice secret"))
	nstest.Must(s, nstest.IMAPCommand(c, "BYE", "LOGOUT"))
	if line, err := c.ReadLine(); !errors.Is(err, io.EOF) {
		s.Fatalf("after the logout: %q, %v", line, err)
	}
	took := time.Since(start)
	nstest.Poll(s, "Dovecot to be at rest", func() bool {
		master := strconv.Itoa(s.dovecot.Pid)
		for pid := range strings.FieldsSeq(nstest.Read(s, "/proc/"+master+"/task/"+master+"/children")) {
			name, _ := os.ReadFile("/proc/" + pid + "/comm") // it may have just gone
			if strings.HasPrefix(string(name), "imap") || strings.HasPrefix(string(name), "script-login") {
				return false
			}
		}
		return true
	})
	if !s.trusted() {
		s.Fatalf("the login was not trusted:\n%s", nstest.Read(s, benchDir+"/log"))
	}
	return took
}

// nftwl runs nftwl login, and returns how long it took.
func (s *benchServer) nftwl() time.Duration {
	s.Helper()
	cmd := exec.Command(nstest.Build(s, "cmd/nftwl"), "--config", benchDir+"/nftwl.yaml", "login", "/bin/true")
	cmd.Env = []string{"IP=" + s.client(), "LOCAL_IP=" + benchAddress, "USER=alice"}
	start := time.Now()
	err := cmd.Run()
	took := time.Since(start)
	nstest.Must(s, err)
	if !s.trusted() {
		s.Fatal("nftwl login has trusted nobody")
	}
	return took
}

// trusted reports whether the last client is.
func (s *benchServer) trusted() bool {
	s.Helper()
	conn, err := nftset.Dial()
	nstest.Must(s, err)
	defer conn.Close()
	set, err := conn.Set(nftset.Table{Family: nftset.INet, Name: "filter"}, "trusted_ipv4")
	nstest.Must(s, err)
	key := nftset.Key{Addr: netip.AddrFrom4([4]byte{198, 18, byte(s.count >> 8), byte(s.count)}), Port: 993}
	found, err := conn.Lookup(set, key)
	nstest.Must(s, err)
	return len(found) == 1
}

// BenchmarkSpread measures how long after an address is trusted on one machine it is
// trusted on another, by what the two kernels report. make bench runs it.
func BenchmarkSpread(b *testing.B) {
	const logins = 500
	l := newLAN(b, nstest.Host, 2)
	l.start()
	type arrival struct {
		addr netip.Addr
		at   time.Time
	}
	var came [2]chan arrival // on each machine
	for i, n := range l.nodes {
		came[i] = make(chan arrival, 2*logins)
		var w *nftset.Watcher
		var err error
		n.peer.Do(func() { w, err = nftset.Watch(nftset.Table{Family: nftset.INet, Name: "filter"}) })
		nstest.Must(b, err)
		b.Cleanup(func() { w.Close() })
		go func() {
			known := make(map[netip.Addr]bool)
			for b.Context().Err() == nil {
				_ = w.Read(time.Now().Add(time.Second), func(e nftset.Event) { // at the deadline, too
					if addr := e.Element.Addr; !e.Deleted && e.Element.Port == 993 && !known[addr] {
						known[addr] = true
						came[i] <- arrival{addr, time.Now()}
					}
				})
			}
		}()
	}
	fmt.Printf("\nFrom trust on one machine to trust on another, of %d logins, in milliseconds.\n\n", logins)
	fmt.Print("| | median | 99th percentile |\n|---|--:|--:|\n")
	host := 0
	for _, c := range []struct {
		name string
		gap  time.Duration
	}{{"5 logins a second", 200 * time.Millisecond}, {"50 logins a second", 20 * time.Millisecond}} {
		var there [2]map[netip.Addr]time.Time
		next := time.NewTicker(c.gap)
		for range logins {
			host++
			l.nodes[0].login(fmt.Sprintf("198.18.%d.%d", host>>8, host&255), "alice")
			<-next.C
		}
		next.Stop()
		for i := range there {
			there[i] = make(map[netip.Addr]time.Time)
			for range logins {
				select {
				case a := <-came[i]:
					there[i][a.addr] = a.at
				case <-time.After(nstest.Patience):
					b.Fatalf("%d logins came to %s", len(there[i]), l.nodes[i].name)
				}
			}
		}
		var took []time.Duration
		for addr, at := range there[1] {
			took = append(took, at.Sub(there[0][addr]))
		}
		fmt.Printf("| %s | %.1f | %.1f |\n", c.name, at(took, 0.5), at(took, 0.99))
	}
	fmt.Println()
	b.ReportMetric(0, "ns/op")
}
