// Package cluster tests nftwld on several machines: network namespaces on a bridge,
// with a real Redis or Valkey.
package cluster

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) {
	nstest.Parallel(2)
	nstest.Main(m)
}

// lan is some machines, and an engine that they share.
type lan struct {
	t      testing.TB
	engine *nstest.Engine
	// replica is another engine, of tests that start one.
	replica *nstest.Engine
	nodes   []*node
}

// node is a machine with nftables and an nftwld.
type node struct {
	t      testing.TB
	peer   *nstest.Peer
	name   string
	dir    string
	server string // the engine's URL
	cmd    *exec.Cmd

	seen int           // addresses of logins of a benchmark
	used time.Duration // nftwld's processor time before it
}

// eachEngine runs a test with Redis and with Valkey.
func eachEngine(t *testing.T, test func(t *testing.T, d nstest.Debian)) {
	nstest.EachDebian(t, test)
}

// newLAN makes n machines with the shipped sets, and an engine with the given
// arguments, on a system. No nftwld runs yet.
func newLAN(t testing.TB, d nstest.Debian, n int, args ...string) *lan {
	t.Helper()
	nstest.New(t)
	d.Tree(t)
	nstest.Must(t, os.Mkdir("/run/engine", 0o755))
	l := &lan{t: t}
	for i, peer := range nstest.NewLAN(t, n) {
		l.nodes = append(l.nodes, &node{t: t, peer: peer, name: fmt.Sprintf("node%d", i), dir: t.TempDir(), server: "redis://" + nstest.Hub + ":6379"})
		l.nodes[i].load()
		l.nodes[i].config("")
	}
	l.engine = d.NewEngine(t, nstest.Hub+":6379", "/run/engine", args...)
	return l
}

// start starts the nftwld of every machine, and waits until all are connected.
func (l *lan) start() {
	l.t.Helper()
	for _, n := range l.nodes {
		n.start()
	}
	for _, n := range l.nodes {
		n.connected()
	}
}

// load loads the shipped sets, in place of all rules.
func (n *node) load() {
	n.t.Helper()
	n.nft("flush ruleset\n" + nstest.Contrib(n.t, "nftables/sets.nft"))
}

// nft runs nft(8) with a ruleset.
func (n *node) nft(ruleset string) {
	n.t.Helper()
	n.peer.Do(func() { nstest.Nft(n.t, ruleset) })
}

// config writes the configuration. more is added to it; "cluster: {" in it is the
// beginning of the shared part.
func (n *node) config(more string) {
	n.t.Helper()
	if !strings.Contains(more, "cluster: {") {
		more += "\ncluster: {}\n"
	}
	more = strings.Replace(more, "cluster: {", "cluster: {server: \""+n.server+"\", node: "+n.name+", ", 1)
	nstest.Write(n.t, filepath.Join(n.dir, "nftwl.yaml"), strings.Replace(more, ", }", "}", 1), 0o600)
}

func (n *node) log() string { return nstest.Read(n.t, filepath.Join(n.dir, "log")) }

// start starts its nftwld.
func (n *node) start() {
	n.t.Helper()
	log, err := os.OpenFile(filepath.Join(n.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	nstest.Must(n.t, err)
	defer log.Close()
	cmd := exec.Command(nstest.Build(n.t, "cmd/nftwld"), "--config", n.dir+"/nftwl.yaml", "-v")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	n.peer.Do(func() { err = cmd.Start() })
	nstest.Must(n.t, err)
	n.cmd = cmd
	n.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		if n.t.Failed() {
			n.t.Logf("%s:\n%.4000s", n.name, n.log())
		}
	})
}

// stop ends its nftwld with SIGTERM.
func (n *node) stop() {
	n.t.Helper()
	nstest.Must(n.t, n.cmd.Process.Signal(syscall.SIGTERM))
	if err := n.cmd.Wait(); err != nil {
		n.t.Errorf("%s after SIGTERM: %v", n.name, err)
	}
}

// status is what nftwld status prints.
func (n *node) status() map[string]any {
	out, err := n.output("nftwld", "status", "--json")
	status := make(map[string]any)
	if err == nil {
		err = json.Unmarshal([]byte(out), &status)
	}
	if err != nil {
		return nil
	}
	return status
}

// metric returns a value of nftwld status: "cluster_connected", "cluster_sent trusted".
func (n *node) metric(name string) float64 {
	var at any = n.status()
	for word := range strings.FieldsSeq(name) {
		m, _ := at.(map[string]any)
		at = m[word]
	}
	v, _ := at.(float64)
	return v
}

func (n *node) connected() {
	n.t.Helper()
	nstest.Poll(n.t, n.name+" to be connected", func() bool {
		return n.metric("cluster_connected") == 1 && n.metric("cluster_merges") >= 2
	})
}

// disconnected waits until it reports that the engine cannot be used, for a reason.
func (n *node) disconnected(reason string) {
	n.t.Helper()
	nstest.Poll(n.t, n.name+" to report "+reason, func() bool {
		s := n.status()
		down, _ := s["cluster_down"].(map[string]any)
		return s["cluster_connected"] == 0. && down[reason] == 1.
	})
}

// output runs nftwl or nftwld on the machine.
func (n *node) output(name string, args ...string) (string, error) {
	n.t.Helper()
	cmd := exec.Command(nstest.Build(n.t, "cmd/"+name), append([]string{"--config", n.dir + "/nftwl.yaml"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	var out []byte
	var err error
	n.peer.Do(func() { out, err = cmd.CombinedOutput() })
	return string(out), err
}

// nftwl runs a command that must succeed.
func (n *node) nftwl(args ...string) string {
	n.t.Helper()
	out, err := n.output("nftwl", args...)
	if err != nil {
		n.t.Fatalf("%s: nftwl %q: %v\n%s", n.name, args, err, out)
	}
	return out
}

// login logs a user in from an address.
func (n *node) login(addr, user string) {
	n.t.Helper()
	cmd := exec.Command(nstest.Build(n.t, "cmd/nftwl"), "--config", n.dir+"/nftwl.yaml", "login", "/bin/true")
	cmd.Env = []string{"IP=" + addr, "LOCAL_IP=" + "10.9.0.1", "USER=" + user}
	var err error
	n.peer.Do(func() { err = cmd.Run() })
	nstest.Must(n.t, err)
}

// element is one of nftwl list.
type element struct {
	List, Set, Address string
	Port               int
	Timeout, Expires   float64
	Comment            string
}

// list returns the elements of a list, by address and port: "192.0.2.7 993".
func (n *node) list(name string) map[string]element {
	n.t.Helper()
	var all []element
	nstest.Must(n.t, json.Unmarshal([]byte(n.nftwl("list", name, "--json")), &all))
	m := make(map[string]element)
	for _, e := range all {
		m[fmt.Sprintf("%s %d", e.Address, e.Port)] = e
	}
	return m
}

// is reports whether an address is on a list on every configured port.
func (n *node) is(name, addr string) bool {
	args := []string{"check", "-q", addr}
	if name == "banned" {
		args = append(args, "--banned")
	}
	_, err := n.output("nftwl", args...)
	return err == nil
}

// becomes waits until an address is on a list, or is not any more.
func (n *node) becomes(name, addr string, want bool) {
	n.t.Helper()
	nstest.Poll(n.t, fmt.Sprintf("%s: %s %s: %v", n.name, addr, name, want), func() bool { return n.is(name, addr) == want })
}

// quiet waits until nobody sends anything any more.
func (l *lan) quiet() {
	l.t.Helper()
	var before string
	nstest.Poll(l.t, "the logs to stay as they are", func() bool {
		now := l.sequence("trusted") + " " + l.sequence("banned")
		same := now == before
		before = now
		time.Sleep(300 * time.Millisecond)
		return same
	})
}

// sequence is the number of the last entry of a list's log; empty for none.
func (l *lan) sequence(list string) string {
	l.t.Helper()
	return l.engine.Do("HGET", "nftwl:{mail}:"+list+":meta", "sequence")
}

// same waits until all machines have the same elements.
func (l *lan) same() {
	l.t.Helper()
	for _, list := range []string{"trusted", "banned"} {
		nstest.Until(l.t, "the machines to have the same "+list, func() error {
			want := slices.Sorted(maps.Keys(l.nodes[0].list(list)))
			for _, n := range l.nodes[1:] {
				if got := slices.Sorted(maps.Keys(n.list(list))); !slices.Equal(got, want) {
					return fmt.Errorf("%s has %q, %s %q", l.nodes[0].name, want, n.name, got)
				}
			}
			return nil
		})
	}
}
