package nftables_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// A forger sends TCP packets from the peer, with any source address.
type forger struct {
	*mailserver
	ipv4, ipv6 int // raw sockets
}

// Flags of a TCP packet (RFC 9293, section 3.1).
const (
	syn = 0x02
	ack = 0x10
)

func (s *mailserver) forger() *forger {
	s.Helper()
	f := &forger{mailserver: s}
	var err error
	s.internet.Do(func() {
		// With this protocol, the sender provides the IP header: raw(7), ipv6(7).
		if f.ipv4, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err == nil {
			f.ipv6, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		}
	})
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { unix.Close(f.ipv4); unix.Close(f.ipv6) })
	return f
}

// send sends one packet to the server's port.
func (f *forger) send(from netip.AddrPort, port uint16, flags byte, seq, ackSeq uint32) {
	f.Helper()
	if err := f.trySend(from, port, flags, seq, ackSeq); err != nil {
		f.Fatal(err)
	}
}

func (f *forger) trySend(from netip.AddrPort, port uint16, flags byte, seq, ackSeq uint32) error {
	be := binary.BigEndian
	server := nstest.ServerIPv4
	if from.Addr().Is6() {
		server = nstest.ServerIPv6
	}
	tcp := be.AppendUint16(nil, from.Port())
	tcp = be.AppendUint16(tcp, port)
	tcp = be.AppendUint32(tcp, seq)
	tcp = be.AppendUint32(tcp, ackSeq)
	tcp = append(tcp, 5<<4, flags, 0xff, 0xff, 0, 0, 0, 0)
	pseudo := append(from.Addr().AsSlice(), server.AsSlice()...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP, 0, byte(len(tcp)))
	sum := uint32(0)
	for b := append(pseudo, tcp...); len(b) > 0; b = b[2:] {
		sum += uint32(be.Uint16(b))
	}
	be.PutUint16(tcp[16:], ^uint16(sum+sum>>16)) // few words, so one carry is enough

	if from.Addr().Is4() {
		ip := append([]byte{0x45, 0, 0, byte(20 + len(tcp)), 0, 0, 0, 0, 64, unix.IPPROTO_TCP, 0, 0}, from.Addr().AsSlice()...)
		ip = append(append(ip, server.AsSlice()...), tcp...)
		return unix.Sendto(f.ipv4, ip, 0, &unix.SockaddrInet4{Addr: server.As4()})
	}
	ip := append([]byte{0x60, 0, 0, 0, 0, byte(len(tcp)), unix.IPPROTO_TCP, 64}, from.Addr().AsSlice()...)
	ip = append(append(ip, server.AsSlice()...), tcp...)
	return unix.Sendto(f.ipv6, ip, 0, &unix.SockaddrInet6{Addr: server.As16()})
}

// Nobody can use up a client's connections by forging its address, with SYNs, ACKs or
// both, because the forger does not see the server's sequence number.
func TestForgedAddress(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root)
		f := s.forger()
		for _, silent := range []bool{false, true} {
			if silent {
				// A host that does not reset connections that it did not open.
				s.internet.Do(func() {
					nstest.Nft(s, "table inet silent { chain output { type filter hook output priority 0; tcp flags & rst == rst drop; }; }")
				})
			}
			for _, clients := range families {
				for i := range uint16(200) {
					from := netip.AddrPortFrom(clients.stranger, 1000+i)
					f.send(from, 587, syn, 1, 0)
					f.send(from, 587, ack, 2, rand.Uint32())
				}
				for i := range uint16(200) {
					f.send(netip.AddrPortFrom(clients.stranger, 2000+i), 587, ack, 2, rand.Uint32())
				}
				if n := s.packets("nftwl: strangers"); n < 200 {
					t.Errorf("%d forged packets arrived", n)
				}
			}
		}
		if n := s.packets("nftwl: below the limit") + s.packets("nftwl: over the limit"); n != 0 {
			t.Errorf("%d forged connections count", n)
		}
		s.internet.Do(func() { nstest.Nft(s, "delete table inet silent") })
		for _, clients := range families {
			s.pass(clients.stranger, 587, burst5)
			s.refuse(clients.stranger, 587)
		}
	})
}

// overloaded is a submission port of the administrator's own.
const overloaded = 2587

var withOverloaded = edit{"nftwl_submission_ports = { 465, 587 }", "nftwl_submission_ports = { 465, 587, 2587 }"}

// overload listens on the port overloaded. Its backlog is full, so no SYN is answered
// until relieve is called.
func (s *mailserver) overload() (relieve func() error) {
	s.Helper()
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet6{Port: overloaded})
	}
	if err == nil {
		err = unix.Listen(fd, 0)
	}
	if err != nil {
		s.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "listener")
	l, err := net.FileListener(file)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { l.Close(); file.Close() })
	// From loopback, which no rule limits.
	for tries := 0; ; tries++ {
		conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", overloaded), never)
		if err != nil {
			break
		}
		s.Cleanup(func() { conn.Close() })
		if tries == 10 {
			s.Fatal("the backlog has no end")
		}
	}
	return func() error {
		go nstest.Serve(l, func(conn net.Conn) { io.Copy(conn, conn) })
		return unix.Listen(fd, 1000)
	}
}

// A client repeats a SYN that a busy server does not answer. The repeats do not
// count.
func TestFullBacklog(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root, withOverloaded)
		relieve := s.overload()
		var waiting []int
		for range 3 {
			for _, clients := range families {
				var fd int
				var err error
				s.internet.Do(func() { fd, err = connect(clients.stranger, overloaded) })
				if err != nil {
					t.Fatal(err)
				}
				waiting = append(waiting, fd)
			}
		}
		// Each connection sends three SYNs.
		for deadline := time.Now().Add(20 * time.Second); s.packets("nftwl: strangers") < 3*len(waiting); {
			if time.Now().After(deadline) {
				t.Fatal("no SYN is repeated, or none is let in")
			}
			time.Sleep(50 * time.Millisecond)
		}
		for _, fd := range waiting {
			unix.Close(fd)
		}
		if err := relieve(); err != nil {
			t.Fatal(err)
		}
		for _, clients := range families {
			s.pass(clients.stranger, overloaded, burst5)
			s.refuse(clients.stranger, overloaded)
		}
	})
}

// burst40 is the limit of a network. ever is an edit that slows the limit down, so
// that no connection is regained during a test.
const burst40 = 40

var ever = edit{"20/minute burst 40", "1/day burst 40"}

// A client that changes addresses within a network, and exceeds the limit of none of
// them, is limited by the network. That shuts out no address, and no user.
func TestNetwork(t *testing.T) {
	networks := []struct {
		name        string
		at          func(int) netip.Addr
		user, other netip.Addr
	}{
		{"24", func(i int) netip.Addr { return addr(fmt.Sprintf("198.51.100.%d", i)) },
			addr("198.51.100.250"), addr("203.0.113.1")},
		{"48", func(i int) netip.Addr { return addr(fmt.Sprintf("2001:db8:a:%x::1", i)) },
			addr("2001:db8:a:ffff::1"), addr("2001:db8:b::1")},
		{"nat64", func(i int) netip.Addr { return addr(fmt.Sprintf("64:ff9b::198.51.100.%d", i)) },
			addr("64:ff9b::198.51.100.250"), addr("64:ff9b::198.51.101.1")},
	}
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root, ever)
		for _, network := range networks {
			for i := range burst40 {
				s.pass(network.at(i/4), 587, 1)
			}
			for i := range burst40 {
				s.refuse(network.at(i), 587)
			}
			s.pass(network.at(1), 465, 1)
			s.pass(network.other, 587, 1)
			s.trust(network.user, 128, "1h")
			s.pass(network.user, 587, 2*burst5)
		}
		for _, set := range []string{"limited_ipv4", "limited_ipv6", "banned_ipv4", "banned_ipv6"} {
			if out := s.nft("list", "set", l.table+" "+set); strings.Contains(out, "elements") {
				t.Errorf("%s is not empty:\n%s", set, out)
			}
		}
		if got, want := s.packets("nftwl: network over the limit"), len(networks)*burst40; got != want {
			t.Errorf("the rules count %d packets, want %d", got, want)
		}
	})
}

// Behind NAT64, each address is limited by itself.
func TestNAT64(t *testing.T) {
	stranger, another := addr("64:ff9b::198.51.100.66"), addr("64:ff9b::198.51.100.67")
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root)
		s.pass(stranger, 587, burst5)
		s.refuse(stranger, 587)
		s.drop(stranger, 587)
		if !s.has("limited", stranger, 587) || s.has("limited", addr("64:ff9b::"), 587) {
			t.Error("not limited by its whole address")
		}
		s.pass(another, 587, burst5)
	})
}

// A client completes many handshakes at once, after it has begun all of them. The
// connections over the limit do not get in, and do not use up what the network has
// left for the neighbours.
func TestHalfOpen(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root, ever)
		for _, clients := range families {
			s.internet.Do(func() {
				nstest.Nft(s, "table inet late { chain output { type filter hook output priority 0; tcp flags & (syn | ack) == ack drop; }; }")
			})
			var conns []*net.TCPConn
			for range burst40 {
				conn := s.internet.Connect(s, clients.stranger, 587, soon)
				if conn == nil {
					t.Fatalf("%s is kept out", clients.stranger)
				}
				conns = append(conns, conn)
				defer conn.Close()
			}
			s.internet.Do(func() { nstest.Nft(s, "delete table inet late") })
			for i, conn := range conns {
				if err := echo(conn); (err == nil) != (i < burst5) {
					t.Errorf("%s, connection %d: %v", clients.stranger, i+1, err)
				}
			}
			s.pass(clients.another, 587, burst5)
			for i := range burst5 {
				s.alive(conns[i])
			}
		}
	})
}

// An attack on the limit fills only the limit's own sets, so bans go on working. The
// attackers use forged addresses, which fill nothing, every address of a /47, and as
// many addresses as exceed the limit.
func TestBansWhileAttacked(t *testing.T) {
	const size = 10
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root, edit{"size 262144", fmt.Sprintf("size %d", size)}, edit{"burst 40", "burst 100"})
		f := s.forger()
		elements := func(set string) int {
			return strings.Count(s.nft("list", "set", l.table+" "+set), "expires")
		}
		for i := range 10 * size {
			for range burst5 + 1 {
				from := netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
				f.send(netip.AddrPortFrom(from, uint16(1000+rand.IntN(10000))), 587, syn, 1, 0)
			}
		}
		for _, set := range []string{"banned_ipv4", "limited_ipv4", "submission_rate_ipv4"} {
			if n := elements(set); n != 0 {
				t.Errorf("%s has %d elements from forged packets", set, n)
			}
		}
		for i := range 10 * size {
			for _, from := range []string{"198.51.100.%d", "2001:db8:a:%x::1", "2001:db8:b:%x::1"} {
				for range burst5 + 1 {
					s.try(addr(fmt.Sprintf(from, i)), 587)
				}
			}
		}
		for _, set := range []string{"limited_ipv4", "limited_ipv6"} {
			if n := elements(set); n < size {
				t.Errorf("%s has %d elements, and is not full", set, n)
			}
		}
		for _, guesser := range []netip.Addr{addr("203.0.113.99"), addr("2001:db8:a:9999::1")} {
			s.pass(guesser, 993, 1)
			s.run("ban", guesser.String())
			for _, port := range []int{143, 993, 587} {
				s.drop(guesser, port)
			}
			s.add("banned", guesser, 25, "1h")
			s.drop(guesser, 25)
		}
	})
}

// New rates also apply to clients that connected before. Limited clients stay limited,
// and open connections stay open.
func TestChangedRate(t *testing.T) {
	const burst30 = 30
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root)
		rate := func(from, to string) {
			t.Helper()
			name := filepath.Join(root, "etc", "nftwl", l.limit)
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(text), from) {
				t.Fatalf("%s has no %q", l.limit, from)
			}
			if err := os.WriteFile(name, []byte(strings.ReplaceAll(string(text), from, to)), 0o644); err != nil {
				t.Fatal(err)
			}
			s.nft("-f", "/etc/nftwl/"+l.main)
		}
		held := map[string]*net.TCPConn{}
		for _, clients := range families {
			held[clients.name] = s.open(clients.stranger, 587)
			s.pass(clients.stranger, 587, burst5-1)
			s.pass(clients.user, 587, burst5)
			s.refuse(clients.user, 587)
			s.drop(clients.user, 587)
		}
		rate("burst 5 ", "burst 30 ")
		for _, clients := range families {
			s.pass(clients.stranger, 587, burst30)
			s.drop(clients.user, 587)
			for range 2 * burst5 {
				s.alive(held[clients.name])
			}
		}
		rate("burst 30 ", "burst 5 ")
		for _, clients := range families {
			s.pass(clients.stranger, 587, burst5)
			s.refuse(clients.stranger, 587)
			s.alive(held[clients.name])
			s.drop(clients.user, 587)
		}
	})
}

// The limit does not count a connection that was open before it was loaded, nor those
// that the administrator accepts before it.
func TestNotCounted(t *testing.T) {
	before := map[string]edit{
		"filter":     {"\t\tjump nftwl\n", "\t\tip saddr 203.0.113.7 accept\n\t\tip6 saddr 2001:db8:b:1::7 accept\n\t\tjump nftwl\n"},
		"standalone": {"\t\ttcp dport 22 accept\n", "\t\tip saddr 203.0.113.7 accept\n\t\tip6 saddr 2001:db8:b:1::7 accept\n"},
	}
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root, before[l.name])
		s.nft("flush", "ruleset")
		var old []*net.TCPConn
		for range 2 * burst5 {
			for _, clients := range families {
				old = append(old, s.open(clients.stranger, 587))
			}
		}
		s.up()
		for range 2 * burst5 {
			for _, conn := range old {
				s.alive(conn)
			}
		}
		for _, clients := range families {
			s.pass(clients.user, 587, 4*burst5)
			s.pass(clients.stranger, 587, burst5)
			s.refuse(clients.stranger, 587)
		}
		for _, conn := range old {
			s.alive(conn)
		}
	})
}

// For a while after the server has reset a connection, conntrack assigns a SYN with
// the same ports to it. The limit still counts that SYN's connection as a new one.
func TestReusedPort(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root, withOverloaded)
		listener, err := net.Listen("tcp", fmt.Sprintf(":%d", overloaded))
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		go nstest.Serve(listener, func(conn net.Conn) {
			io.ReadFull(conn, make([]byte, 1))
			conn.(*net.TCPConn).SetLinger(0)
		})
		// reset reports whether a connection gets as far as the server's reset.
		reset := func(from netip.Addr) bool {
			t.Helper()
			server := nstest.ServerIPv4
			if from.Is6() {
				server = nstest.ServerIPv6
			}
			dialer := net.Dialer{
				Timeout:   never,
				LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 1234)),
				Control: func(_, _ string, c syscall.RawConn) error {
					var bind error
					err := c.Control(func(fd uintptr) {
						bind = errors.Join(nstest.FreeBind(int(fd), from), unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
					})
					return errors.Join(err, bind)
				},
			}
			var conn net.Conn
			s.internet.Do(func() { conn, err = dialer.Dial("tcp", netip.AddrPortFrom(server, overloaded).String()) })
			var timed net.Error
			if errors.As(err, &timed) && timed.Timeout() {
				return false
			}
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(soon))
			if _, err := conn.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Fatalf("%v, and no reset", err)
			}
			return true
		}
		for _, clients := range families {
			if !reset(clients.stranger) {
				t.Errorf("%s cannot connect", clients.stranger)
			}
			if reset(clients.stranger) {
				t.Errorf("%s connects again, uncounted", clients.stranger)
			}
			s.add("trusted", clients.user, overloaded, "1h")
			for range 2 {
				if !reset(clients.user) {
					t.Errorf("%s is trusted, and cannot connect", clients.user)
				}
			}
			s.nft("delete", "element", l.table+" "+set("trusted", clients.user), fmt.Sprintf("{ %s . %d }", clients.user, overloaded))
			s.add("banned", clients.user, overloaded, "1h")
			if reset(clients.user) {
				t.Errorf("%s is banned, and connects", clients.user)
			}
		}
	})
}

// Trust, bans and limited addresses also work for packets that the kernel does not
// track.
func TestUntracked(t *testing.T) {
	stateless := map[string][]edit{
		"filter": {
			{"\t\tjump nftwl\n", "\t\tjump nftwl\n\t\ttcp dport { 587, 993 } accept\n"},
		},
	}
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root, stateless[l.name]...)
		nstest.Nft(t, `table inet raw {
			chain prerouting { type filter hook prerouting priority raw; tcp dport { 587, 993 } notrack; }
			chain output { type filter hook output priority raw; tcp sport { 587, 993 } notrack; }
		}`)
		for _, clients := range families {
			for list, port := range map[string]int{"banned": 993, "limited": 587} {
				held := s.open(clients.stranger, port)
				s.add(list, network(clients.stranger), port, "1h")
				s.drop(clients.stranger, port)
				s.add(list, clients.another, port, "1h")
				s.drop(clients.another, port)
				s.alive(held)
				s.trust(clients.stranger, 128, "1h")
				s.pass(clients.stranger, port, 1)
				s.run("remove", clients.stranger.String())
			}
		}
	})
	strict := func(t *testing.T, l layout, root string) {
		s := serve(t, l, root, append(stateless[l.name], l.strict)...)
		nstest.Nft(t, `table inet raw { chain prerouting { type filter hook prerouting priority raw; tcp dport 587 notrack; }; }`)
		for _, clients := range families {
			s.drop(clients.stranger, 587)
		}
	}
	for _, l := range layouts {
		t.Run("strict/"+l.name, func(t *testing.T) { t.Parallel(); strict(t, l, "/") })
	}
}
