package nstest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The addresses of the side that calls NewPeer, the server.
var (
	ServerIPv4 = netip.MustParseAddr("192.0.2.1")
	ServerIPv6 = netip.MustParseAddr("2001:db8::1")
)

// A Peer is another machine on the network: a namespace with a thread in it.
type Peer struct {
	work chan func()
}

// NewPeer connects the network namespace of the calling goroutine, which New
// made, to a new one, by a pair of interfaces net0 and peer0. The calling side gets
// ServerIPv4 and ServerIPv6, and routes the prefixes to the peer. The peer has every
// address in these prefixes, and can connect from any of them.
func NewPeer(t testing.TB, prefixes ...string) *Peer {
	t.Helper()
	p, thread := newPeer(t)
	here, there := []string{}, []string{}
	for _, prefix := range prefixes {
		via := "192.0.2.2"
		if netip.MustParsePrefix(prefix).Addr().Is6() {
			via = "2001:db8::2"
		}
		here = append(here, "route add "+prefix+" via "+via)
		there = append(there, "route add local "+prefix+" dev lo")
	}
	program := Need(t, "ip", "iproute2")
	// If both ends have the same index, the kernel takes a second to notice that the
	// link is up (linkwatch_urgent_event, net/core/link_watch.c).
	err := ip(program, fmt.Sprintf("link add net0 index 10 type veth peer name peer0 index 11 netns %d", thread))
	if err == nil {
		err = ip(program, append(interfaceUp("net0", "1"), here...)...)
	}
	if err == nil {
		p.Do(func() {
			if err = ip(program, append(interfaceUp("peer0", "2"), there...)...); err == nil {
				err = waitForInterface(program, "peer0", "2")
			}
		})
	}
	if err == nil {
		err = waitForInterface(program, "net0", "1")
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// newPeer returns a peer without interfaces, and the id of its thread.
func newPeer(t testing.TB) (p *Peer, thread int) {
	t.Helper()
	p = &Peer{work: make(chan func())}
	ready := make(chan error)
	go func() {
		// Never unlocked: the thread is thrown away with the goroutine.
		runtime.LockOSThread()
		thread = unix.Gettid()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = loopbackUp()
		}
		ready <- err
		for f := range p.work {
			f()
		}
	}()
	t.Cleanup(func() { close(p.work) })
	if err := <-ready; err != nil {
		t.Fatalf("the peer's network namespace: %v", err)
	}
	return p, thread
}

// waitForInterface waits until an interface no longer throws away what it is
// to send or to receive. Its flag IFF_RUNNING does not tell, being set while the
// state is unknown, too; and the kernel puts off the routes of IPv6 addresses.
func waitForInterface(program, name, host string) error {
	var out []byte
	for deadline := time.Now().Add(Patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		cmd := exec.Command(program, "-6", "-batch", "-")
		cmd.Stdin = strings.NewReader("link show " + name + "\nroute show table local dev " + name + "\n")
		var err error
		if out, err = cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("ip: %v\n%s", err, out)
		}
		if bytes.Contains(out, []byte("qdisc noqueue state UP ")) &&
			bytes.Contains(out, []byte("local fe80::"+host+" ")) &&
			bytes.Contains(out, []byte("local 2001:db8::"+host+" ")) {
			return nil
		}
	}
	return fmt.Errorf("%s does not come up:\n%s", name, out)
}

// interfaceUp adds a link-local address without duplicate address detection. The
// kernel's own link-local address would be unusable for the second that the
// detection takes.
func interfaceUp(name, host string) []string {
	return []string{
		"link set " + name + " addrgenmode none",
		"link set " + name + " up",
		"addr add 192.0.2." + host + "/24 dev " + name,
		"addr add fe80::" + host + "/64 dev " + name + " nodad",
		"addr add 2001:db8::" + host + "/64 dev " + name + " nodad",
	}
}

// IP runs commands of ip(8) in the network namespace of the calling goroutine,
// such as "address add 192.0.2.1/32 dev lo".
func IP(t testing.TB, commands ...string) {
	t.Helper()
	Must(t, ip(Need(t, "ip", "iproute2"), commands...))
}

func ip(program string, commands ...string) error {
	cmd := exec.Command(program, "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip: %v\n%s", err, out)
	}
	return nil
}

// Do runs f in the peer's network namespace. f runs on another goroutine, so it
// must not call t.Fatal.
func (p *Peer) Do(f func()) {
	done := make(chan struct{})
	p.work <- func() {
		defer close(done)
		f()
	}
	<-done
}

// Dial opens a TCP connection from an address of the peer. Closing it sends a
// reset, so that the kernel forgets the connection at once.
func (p *Peer) Dial(from netip.Addr, to netip.AddrPort, timeout time.Duration) (*net.TCPConn, error) {
	var conn *net.TCPConn
	var err error
	p.Do(func() { conn, err = dial(from.String(), to.String(), timeout) })
	if err != nil {
		return nil, err
	}
	return conn, conn.SetLinger(0)
}

// Connect opens a connection from an address of the peer to a port of the server.
// It returns nil if no answer comes in time, and fails the test on another error.
func (p *Peer) Connect(t testing.TB, from netip.Addr, port int, timeout time.Duration) *net.TCPConn {
	t.Helper()
	server := ServerIPv4
	if from.Is6() {
		server = ServerIPv6
	}
	conn, err := p.Dial(from, netip.AddrPortFrom(server, uint16(port)), timeout)
	var timed net.Error
	if err != nil && !(errors.As(err, &timed) && timed.Timeout()) {
		t.Fatalf("from %s to port %d: %v", from, port, err)
	}
	return conn
}

// FreeBind lets a socket bind to an address that the peer has only by its routes.
// IPv4 needs no permission for that.
func FreeBind(fd int, from netip.Addr) error {
	if from.Is4() {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
}

// Echo listens on a port of all addresses, in the namespace of the calling
// goroutine, and sends back what it receives.
func Echo(t testing.TB, port uint16) {
	t.Helper()
	if err := echo(t, port); err != nil {
		t.Fatal(err)
	}
}

// Echo does the same on the peer.
func (p *Peer) Echo(t testing.TB, port uint16) {
	t.Helper()
	var err error
	p.Do(func() { err = echo(t, port) })
	if err != nil {
		t.Fatal(err)
	}
}

func echo(t testing.TB, port uint16) error {
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.Addr{}, port)))
	if err != nil {
		return err
	}
	t.Cleanup(func() { l.Close() })
	go Serve(l, func(conn net.Conn) { io.Copy(conn, conn) })
	return nil
}

// Serve calls f with each connection and then closes it, until the listener is
// closed.
func Serve(l net.Listener, f func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			f(conn)
		}()
	}
}
