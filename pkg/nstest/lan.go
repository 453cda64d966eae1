package nstest

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Hub is the address of the calling side of NewLAN.
const Hub = "10.9.0.1"

// NewLAN joins the network namespace of the calling goroutine, which New made, to n
// others by a bridge. The calling side gets Hub, the others 10.9.0.2 and so on, each
// on an interface lan0.
func NewLAN(t testing.TB, n int) []*Peer {
	t.Helper()
	IP(t, "link add lan0 type bridge", "link set lan0 up", "addr add "+Hub+"/24 dev lan0")
	var hosts []*Peer
	for i := range n {
		p, thread := newPeer(t)
		IP(t, fmt.Sprintf("link add host%d index %d type veth peer name lan0 index %d netns %d", i, 10+i, 100+i, thread),
			fmt.Sprintf("link set host%d master lan0", i), fmt.Sprintf("link set host%d up", i))
		p.Do(func() {
			IP(t, "link set lan0 up", "addr add "+LANAddress(i).String()+"/24 dev lan0")
		})
		hosts = append(hosts, p)
	}
	return hosts
}

// LANAddress is the address of the host with that index.
func LANAddress(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 9, 0, byte(2 + i)}) }

// Unplug cuts a host of NewLAN's off, Plug joins it again. Both are called where
// NewLAN was.
func Unplug(t testing.TB, i int) { t.Helper(); IP(t, fmt.Sprintf("link set host%d down", i)) }

// Plug undoes Unplug.
func Plug(t testing.TB, i int) { t.Helper(); IP(t, fmt.Sprintf("link set host%d up", i)) }

// Engine is a Redis or Valkey.
type Engine struct {
	Address string // with a port
	Name    string // redis or valkey

	t      testing.TB
	debian Debian
	args   []string
	user   []string // arguments of the client's, if it logs in
	cmd    *exec.Cmd
}

// NewEngine starts the system's Redis or Valkey at an address, with its files in a
// directory that the system sees by the same path. Unless args say otherwise, it
// keeps nothing over a restart. It ends with the test.
func (d Debian) NewEngine(t testing.TB, address, dir string, args ...string) *Engine {
	t.Helper()
	host, port, _ := strings.Cut(address, ":")
	return d.newEngine(t, address, append([]string{"--bind", host, "--port", port, "--dir", dir, "--save", "", "--protected-mode", "no"}, args...)...)
}

// NewSentinel starts the system's Sentinel with a configuration that has the
// address.
func (d Debian) NewSentinel(t testing.TB, address, conf string) *Engine {
	t.Helper()
	return d.newEngine(t, address, conf, "--sentinel")
}

func (d Debian) newEngine(t testing.TB, address string, args ...string) *Engine {
	t.Helper()
	e := &Engine{Address: address, t: t, debian: d, Name: "redis", args: args}
	if fileExists(d.Path("usr/bin/valkey-server")) {
		e.Name = "valkey"
	} else {
		d.Need(t, "usr/bin/redis-server", "redis-server")
	}
	e.Start()
	t.Cleanup(func() { e.Signal(syscall.SIGKILL) })
	return e
}

// Start starts it again, and waits until it answers. It is called on a thread in
// the engine's network namespace that lives as long as the engine.
func (e *Engine) Start() {
	e.t.Helper()
	e.cmd = e.debian.Command("/usr/bin/"+e.Name+"-server", e.args...)
	e.cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	Must(e.t, e.cmd.Start())
	Poll(e.t, e.Name+" to answer", func() bool { return strings.Contains(e.Try("PING"), "PONG") })
}

// Signal sends a signal, and waits for the engine's end where it is one that ends
// it.
func (e *Engine) Signal(s syscall.Signal) {
	if e.cmd.ProcessState != nil {
		return
	}
	_ = e.cmd.Process.Signal(s)
	if s == syscall.SIGKILL || s == syscall.SIGTERM {
		_ = e.cmd.Wait()
	}
}

// Do sends a command by the engine's own client, which must succeed.
func (e *Engine) Do(words ...string) string {
	e.t.Helper()
	return strings.TrimSpace(output(e.t, e.client(words...)))
}

// Spawn sends a command, and does not wait for its answer.
func (e *Engine) Spawn(words ...string) {
	e.t.Helper()
	cmd := e.client(words...)
	Must(e.t, cmd.Start())
	e.t.Cleanup(func() {
		_ = cmd.Process.Kill() // fails where it has exited
		_ = cmd.Wait()
	})
}

// At is the engine by another address.
func (e *Engine) At(address string) *Engine {
	other := *e
	other.Address = address
	return &other
}

// As is the engine for one of its users.
func (e *Engine) As(user, password string) *Engine {
	other := *e
	other.user = []string{"--no-auth-warning", "--user", user, "--pass", password}
	return &other
}

// Pid is the id of its process.
func (e *Engine) Pid() int { return e.cmd.Process.Pid }

// Try sends a command, and returns the answer or the error.
// Try is Do for an engine that may not answer.
func (e *Engine) Try(words ...string) string {
	out, _ := e.client(words...).CombinedOutput() // as long as it does not listen
	return string(out)
}

func (e *Engine) client(words ...string) *exec.Cmd {
	host, port, _ := strings.Cut(e.Address, ":")
	return e.debian.Command("/usr/bin/"+e.Name+"-cli", append(append([]string{"-h", host, "-p", port}, e.user...), words...)...)
}
