package cluster

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

// many is how many addresses the others have.
const many = 1_000_000

// BenchmarkLate measures a machine that begins to share when the others have a
// million addresses, on one port: how long that takes, its memory and the engine's,
// and what logins take meanwhile; and the same of a lost connection and of reading
// all again. make bench runs it.
func BenchmarkLate(b *testing.B) {
	l := newLAN(b, nstest.Host, 1)
	n := l.nodes[0]
	sets := strings.ReplaceAll(nstest.Contrib(b, "nftables/sets.nft"), "size 262144", "size 2000000")
	n.peer.Do(func() { nstest.Nft(b, "flush ruleset\n"+sets) })
	n.config("ports: [993]\n")
	l.engine.Do("EVAL", fill, "0", strconv.Itoa(many))
	engine := l.engine.Do("INFO", "memory")
	engineUsed, err := strconv.Atoi(regexp.MustCompile(`used_memory:(\d+)`).FindStringSubmatch(engine)[1])
	nstest.Must(b, err)

	var rows []string
	row := func(what string, began time.Time, logins []time.Duration) {
		resident, most, cpu := n.usage()
		rows = append(rows, fmt.Sprintf("| %s | %.1f s | %.1f s | %d MB | %d MB | %.2f ms | %.2f ms |", what, time.Since(began).Seconds(), cpu.Seconds(),
			resident>>20, most>>20, quantile(logins, 0.5), quantile(logins, 0.99)))
		n.forget()
		fmt.Println(rows[len(rows)-1]) // as it takes minutes
	}
	before := n.logins(func(count int) bool { return count < 500 })
	rows = append(rows, fmt.Sprintf("| no `nftwld` | | | | | %.2f ms | %.2f ms |", quantile(before, 0.5), quantile(before, 0.99)))

	start := time.Now()
	n.start()
	var last time.Time
	meanwhile := n.logins(func(int) bool {
		if time.Since(last) < 100*time.Millisecond {
			return true
		}
		last = time.Now()
		if last.Sub(start) > 15*time.Minute {
			b.Fatalf("it has %d addresses", n.count("trusted_ipv4"))
		}
		return n.count("trusted_ipv4") < many
	})
	row("a late machine", start, meanwhile)
	start = time.Now()
	row("idle", start, n.logins(func(count int) bool { return count < 500 }))

	start = time.Now()
	l.engine.Do("CLIENT", "KILL", "TYPE", "normal")
	nstest.Poll(b, "the connection to be lost", func() bool { return n.metric("cluster_connected") == 0 })
	meanwhile = n.logins(func(int) bool { return n.metric("cluster_connected") == 0 })
	row("a lost connection", start, meanwhile)

	start = time.Now()
	merges := n.metric("cluster_merges")
	nstest.Must(b, n.cmd.Process.Signal(syscall.SIGHUP))
	last = start
	used := n.processor()
	meanwhile = n.logins(func(int) bool {
		if time.Since(last) < 500*time.Millisecond {
			return true
		}
		before, since := used, last
		used, last = n.processor(), time.Now()
		return n.metric("cluster_merges") < merges+2 || used-before > time.Since(since)/10
	})
	row("reading all again", start, meanwhile)

	// Not through b.Log, which indents.
	fmt.Printf("\n%d addresses on one port that others share; the engine uses %d MB for them.\n\n", many, engineUsed>>20)
	fmt.Print("| | time | processor | memory | most | `nftwl login` | its 99th percentile |\n|---|--:|--:|--:|--:|--:|--:|\n")
	fmt.Println(strings.Join(rows, "\n") + "\n")
	b.ReportMetric(0, "ns/op") // which would be that of all together
}

// fill is a script that makes a list of trusted addresses as the engine has it.
const fill = `
local clock = redis.call('TIME')
local now = clock[1] * 1000
for i = 0, ARGV[1] - 1 do
	local field = string.format('20.%d.%d.%d', math.floor(i / 65536), math.floor(i / 256) % 256, i % 256)
	local since = now - i % 3600000
	redis.call('HSET', 'nftwl:{mail}:trusted', field, string.format('+ %.0f %.0f 86400000 0 user%d@example.org @node1', since, since + 86400000, i % 5000))
end
redis.call('HSET', 'nftwl:{mail}:trusted:meta', 'epoch', 'late', 'format', '1', 'sequence', '0')`

// logins has users log in, each from a new address, while more is true, and returns
// how long each nftwl login took.
func (n *node) logins(more func(count int) bool) []time.Duration {
	n.t.Helper()
	program := nstest.Build(n.t, "cmd/nftwl")
	var took []time.Duration
	for len(took) == 0 || more(len(took)) {
		addr := netip.AddrFrom4([4]byte{100, byte(n.seen >> 16), byte(n.seen >> 8), byte(n.seen)})
		n.seen++
		var err error
		n.peer.Do(func() {
			cmd := exec.Command(program, "--config", n.dir+"/nftwl.yaml", "login", "/bin/true")
			cmd.Env = []string{"IP=" + addr.String(), "USER=alice"}
			start := time.Now()
			err = cmd.Run()
			took = append(took, time.Since(start))
		})
		nstest.Must(n.t, err)
	}
	return took
}

// count is how many elements a set has.
func (n *node) count(name string) (count int) {
	n.t.Helper()
	var err error
	n.peer.Do(func() {
		var c *nftset.Conn
		if c, err = nftset.Dial(); err != nil {
			return
		}
		defer c.Close()
		var set *nftset.Set
		if set, err = c.Set(nftset.Table{Family: nftset.INet, Name: "filter"}, name); err == nil {
			count = int(set.Count)
		}
	})
	nstest.Must(n.t, err)
	return count
}

// usage returns nftwld's memory, the most since forget, and its processor time since
// then.
func (n *node) usage() (resident, most int, cpu time.Duration) {
	n.t.Helper()
	dir := fmt.Sprintf("/proc/%d", n.cmd.Process.Pid)
	for line := range strings.Lines(nstest.Read(n.t, filepath.Join(dir, "status"))) {
		f := strings.Fields(line)
		switch f[0] {
		case "VmRSS:":
			resident, _ = strconv.Atoi(f[1])
		case "VmHWM:":
			most, _ = strconv.Atoi(f[1])
		}
	}
	return resident << 10, most << 10, n.processor() - n.used
}

// processor is nftwld's processor time.
func (n *node) processor() time.Duration {
	n.t.Helper()
	f := strings.Fields(nstest.Read(n.t, fmt.Sprintf("/proc/%d/stat", n.cmd.Process.Pid)))
	var ticks time.Duration
	for _, s := range f[13:15] {
		t, err := strconv.Atoi(s)
		nstest.Must(n.t, err)
		ticks += time.Duration(t)
	}
	return ticks * time.Second / 100
}

func (n *node) forget() {
	n.t.Helper()
	n.used = n.processor()
	nstest.Must(n.t, os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", n.cmd.Process.Pid), []byte("5"), 0))
}

// quantile is in milliseconds.
func quantile(took []time.Duration, q float64) float64 {
	slices.Sort(took)
	return float64(took[int(q*float64(len(took)-1))]) / 1e6
}
