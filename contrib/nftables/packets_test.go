package nftables_test

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

var addr = netip.MustParseAddr

// A family has the same kinds of clients in IPv4 and in IPv6.
type family struct {
	name              string
	stranger, another netip.Addr // no network in common
	source            netip.Addr // the address under which the stranger is limited
	user              netip.Addr
	local             netip.Addr
}

var families = []family{
	{"ipv4", addr("198.51.100.66"), addr("198.51.100.67"), addr("198.51.100.66"), addr("203.0.113.7"), addr("127.0.0.1")},
	{"ipv6", addr("2001:db8:a:1::66"), addr("2001:db8:a:2::66"), addr("2001:db8:a:1::"), addr("2001:db8:b:1::7"), addr("::1")},
}

// burst5 is the limit of submission.nft: so many connections at once, and the next
// one is refused.
const burst5 = 5

func TestStrangerIsLimited(t *testing.T) {
	const out = 3 * time.Second
	each(t, func(t *testing.T, l layout, root string) {
		for _, clients := range families {
			t.Run(clients.name, func(t *testing.T) {
				t.Parallel()
				// The count must expire before the source gets in again. Otherwise its
				// first connection would be over the limit.
				s := serve(t, l, root, edit{"timeout 1h", "timeout 3s"}, edit{"timeout 10m", "timeout 1s"})
				held := s.open(clients.stranger, 587)
				s.pass(clients.stranger, 587, burst5-1)
				if s.has("limited", clients.source, 587) {
					t.Error("limited below the limit")
				}
				start := time.Now()
				s.refuse(clients.stranger, 587)
				if !s.has("limited", clients.source, 587) {
					t.Error("not limited above the limit")
				}
				if s.has("banned", clients.source, 587) || s.has("banned", clients.stranger, 587) {
					t.Error("the limit bans")
				}

				// Other ports and other clients are not affected.
				s.pass(clients.stranger, 465, burst5)
				s.pass(clients.stranger, 993, 2*burst5)
				s.pass(clients.stranger, 25, 2*burst5)
				s.pass(clients.another, 587, burst5)
				for range 2 * burst5 {
					s.alive(held)
				}

				s.drop(clients.stranger, 587)
				s.until(true, clients.stranger, 587)
				if d := time.Since(start); d < out-100*time.Millisecond || d > out+10*time.Second {
					t.Errorf("limited for %v, want %v", d, out)
				}

				for comment, want := range map[string]int{
					"nftwl: over the limit":  1,
					"nftwl: below the limit": 3*burst5 + 1,
				} {
					if got := s.packets(comment); got != want {
						t.Errorf("%q: %d packets, want %d", comment, got, want)
					}
				}
				limited := "nftwl: limited IPv4"
				if clients.stranger.Is6() {
					limited = "nftwl: limited IPv6 network"
				}
				if s.packets(limited) == 0 {
					t.Errorf("%q counts no packet", limited)
				}
			})
		}
	})
}

func TestTrustedPasses(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root)
		for _, clients := range families {
			s.trust(clients.user, 128, "1h")
			s.pass(clients.user, 587, 6*burst5)
			if s.has("limited", clients.user, 587) || s.has("limited", network(clients.user), 587) {
				t.Errorf("%s is limited while trusted", clients.user)
			}
			for _, port := range []int{143, 993, 995, 465, 587} {
				s.add("banned", clients.user, port, "1h")
				s.pass(clients.user, port, 2*burst5)
			}
			for _, list := range []string{"banned", "limited"} {
				s.add(list, network(clients.user), 587, "1h")
				s.pass(clients.user, 587, burst5)
			}

			// A client that was limited when it logged in.
			s.pass(clients.stranger, 587, burst5)
			s.refuse(clients.stranger, 587)
			s.drop(clients.stranger, 587)
			s.trust(clients.stranger, 128, "1h")
			s.pass(clients.stranger, 587, 4*burst5)
			if got, want := s.packets("nftwl: trusted IP"+clients.name[2:]), 16*burst5; got < want {
				t.Errorf("the rule for trusted %s counts %d packets, want %d", clients.name, got, want)
			}
		}
		if n := s.packets("nftwl: over the limit"); n != len(families) {
			t.Errorf("%d connections of untrusted clients were over the limit, want %d", n, len(families))
		}
	})
}

// network returns the address that stands for an IPv6 address's /64 in the sets. An
// IPv4 address stands for itself.
func network(a netip.Addr) netip.Addr {
	if a.Is4() {
		return a
	}
	p, err := a.Prefix(64)
	if err != nil {
		panic(err)
	}
	return p.Addr()
}

// A ban by nftwl or fail2ban names one address. Other addresses of its /64 are not
// banned.
func TestBannedAddress(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root)
		for _, clients := range families {
			neighbour := clients.stranger.Next()
			s.add("banned", clients.stranger, 993, "1h")
			s.drop(clients.stranger, 993)
			s.pass(clients.stranger, 995, 1)
			s.pass(neighbour, 993, 1)
			if got := s.packets("nftwl: banned IP" + clients.name[2:]); got != 1 {
				t.Errorf("the rule for banned %s counts %d packets, want 1", clients.name, got)
			}
		}
		// A ban of a /64 covers all its addresses.
		s.add("banned", addr("2001:db8:a:9::"), 993, "1h")
		s.drop(addr("2001:db8:a:9::1"), 993)
		s.pass(addr("2001:db8:a:8::1"), 993, 1)
	})
}

func TestStrict(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		for _, clients := range families {
			t.Run(clients.name, func(t *testing.T) {
				t.Parallel()
				s := serve(t, l, root, l.strict)
				for _, port := range []int{465, 587} {
					s.drop(clients.user, port)
				}
				for _, port := range []int{25, 143, 993, 995} {
					s.pass(clients.user, port, 2*burst5)
				}
				start := time.Now()
				s.trust(clients.user, 128, "3s")
				for _, port := range []int{465, 587} {
					s.pass(clients.user, port, 2*burst5)
				}
				held := s.open(clients.user, 587)
				s.drop(clients.stranger, 587)
				s.until(false, clients.user, 587)
				if d := time.Since(start); d < 3*time.Second-100*time.Millisecond || d > 13*time.Second {
					t.Errorf("a trust of 3 s lasted %v", d)
				}
				s.drop(clients.user, 465)
				s.alive(held)
				if s.packets("nftwl: not logged in") < 4 {
					t.Error("the strict rule does not count what it drops")
				}
			})
		}
	})
}

func TestIPv6Prefix(t *testing.T) {
	user, neighbour, outside := addr("2001:db8:a:1::7"), addr("2001:db8:a:1:ffff::8"), addr("2001:db8:a:2::7")
	each(t, func(t *testing.T, l layout, root string) {
		t.Run("128", func(t *testing.T) {
			s := serve(t, l, root, l.strict)
			s.trust(user, 128, "1h")
			s.pass(user, 587, 1)
			s.drop(neighbour, 587)
			s.drop(outside, 587)
		})
		t.Run("64", func(t *testing.T) {
			s := serve(t, l, root, l.strict, l.prefix64)
			s.trust(user, 64, "1h")
			s.pass(user, 587, 1)
			s.pass(neighbour, 587, 2*burst5)
			s.drop(outside, 587)
			if n := s.packets("nftwl: trusted IPv6 network"); n != 2*burst5+1 {
				t.Errorf("the rule counts %d packets, want %d", n, 2*burst5+1)
			}
			// An address behind NAT64 is trusted alone, without its /64.
			s.trust(addr("64:ff9b::192.0.2.7"), 64, "1h")
			s.pass(addr("64:ff9b::192.0.2.7"), 587, 1)
			s.drop(addr("64:ff9b::192.0.2.8"), 587)
			if n := s.packets("nftwl: trusted IPv6"); n != 1 {
				t.Errorf("the rule of single addresses counts %d packets, want 1", n)
			}
			// IPv4 does not change.
			s.trust(families[0].user, 128, "1h")
			s.pass(families[0].user, 587, 1)
			s.drop(families[0].user.Next(), 587)
		})
	})
}

// A client that changes its address within a /64 still counts as one source.
func TestRotationWithinA64(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root)
		at := func(net, host int) netip.Addr { return addr(fmt.Sprintf("2001:db8:a:%x::%x", net, host)) }
		for host := 1; host <= burst5; host++ {
			s.pass(at(1, host), 587, 1)
		}
		s.refuse(at(1, burst5+1), 587)
		s.drop(at(1, 1), 587)
		s.pass(at(2, 1), 587, burst5)
	})
}

func TestLoopbackAndSSH(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root, l.strict)
		for _, clients := range families {
			for _, port := range []int{22, 465, 587} {
				s.add("banned", clients.local, port, "1h")
				for range 4 * burst5 {
					to := netip.AddrPortFrom(clients.local, uint16(port))
					conn, err := net.DialTimeout("tcp", to.String(), soon)
					if err != nil {
						t.Fatalf("loopback: %v", err)
					}
					conn.Close()
				}
			}
			s.add("banned", clients.stranger, 22, "1h")
			s.pass(clients.stranger, 22, 4*burst5)
		}
	})
}

// If the limit's set is full, a source that is not in it gets in, and the others are
// still limited.
func TestFullLimit(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root, edit{"size 262144", "size 2"})
		for _, clients := range families {
			s.pass(clients.another, 587, 1)
			s.pass(clients.user, 587, 1)
			s.pass(clients.stranger, 587, 3*burst5)
			s.pass(clients.another, 587, burst5-1)
			s.refuse(clients.another, 587)
		}
	})
}

// Connections over the limit are refused even if the limited set is full.
func TestFullLimited(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		s := serve(t, l, root, edit{"size 262144", "size 5"})
		for _, clients := range families {
			for port := 1; port <= 5; port++ {
				s.add("limited", clients.user, port, "1h")
			}
			s.pass(clients.stranger, 587, burst5)
			s.refuse(clients.stranger, 587)
			s.refuse(clients.stranger, 587)
			if s.has("limited", clients.source, 587) {
				t.Error("the set was not full")
			}
		}
		if n := s.packets("nftwl: over the limit"); n != 4 {
			t.Errorf("refused %d connections, want 4", n)
		}
	})
}

// The example firewall lets in what it names, and nothing else.
func TestExample(t *testing.T) {
	ping := nstest.Need(t, "ping", "iputils-ping")
	for _, v := range nftVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, layouts[0], v.root(t))
			for _, clients := range families {
				s.drop(clients.stranger, unnamed)
				server := nstest.ServerIPv4
				if clients.stranger.Is6() {
					server = nstest.ServerIPv6
				}
				s.internet.Do(func() {
					if out, err := exec.Command(ping, "-c1", "-W2", server.String()).CombinedOutput(); err != nil {
						t.Errorf("ping: %v\n%s", err, out)
					}
				})
			}

			// A DHCPv6 server's answer to a client's multicast.
			l, err := net.ListenPacket("udp6", "[fe80::1%net0]:546")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			for _, port := range []int{548, 547} { // only the second gets in
				s.internet.Do(func() {
					err = send(port)
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			l.SetReadDeadline(time.Now().Add(soon))
			_, from, err := l.ReadFrom(make([]byte, 10))
			if err != nil {
				t.Fatalf("DHCPv6: %v", err)
			}
			if port := from.(*net.UDPAddr).Port; port != 547 {
				t.Errorf("a packet from port %d is let in", port)
			}
		})
	}
}

func send(from int) error {
	conn, err := net.DialUDP("udp6",
		&net.UDPAddr{IP: net.ParseIP("fe80::2"), Port: from, Zone: "peer0"},
		&net.UDPAddr{IP: net.ParseIP("fe80::1"), Port: 546, Zone: "peer0"})
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte("reply"))
	return err
}

// standalone.nft works beside another firewall's table as its comments say.
func TestStandaloneBesideAnotherFirewall(t *testing.T) {
	for _, v := range nftVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, layouts[1], v.root(t))
			nstest.Nft(t, `table inet theirs {
				chain input {
					type filter hook input priority filter; policy drop;
					iif "lo" accept
					ct state established,related accept
					meta l4proto 58 accept
					tcp dport { 22, 143, 587 } accept
				}
			}`)
			for _, clients := range families {
				s.trust(clients.user, 128, "1h")
				s.pass(clients.user, 587, 2*burst5)
				s.drop(clients.user, 993) // trusted, but the other firewall has closed the port

				s.pass(clients.stranger, 587, burst5)
				s.refuse(clients.stranger, 587) // open in the other firewall, but over the limit
				s.drop(clients.stranger, 587)
				s.pass(clients.stranger, 143, 1)
			}
		})
	}
}

// An accept after the jump does not let in what nftwl's chain drops.
func TestLaterAccept(t *testing.T) {
	later := edit{"\t\tjump nftwl\n", "\t\tjump nftwl\n\t\ttcp dport { 465, 587 } accept\n"}
	full := edit{"size 262144", "size 1"} // so that the limit refuses but shuts nobody out
	l := layouts[0]
	for _, v := range nftVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			t.Run("limit", func(t *testing.T) {
				s := serve(t, l, v.root(t), later, full)
				for _, clients := range families {
					s.add("limited", clients.user, 1, "1h")
					s.pass(clients.stranger, 587, burst5)
					s.refuse(clients.stranger, 587)
					s.refuse(clients.stranger, 587)
				}
			})
			t.Run("strict", func(t *testing.T) {
				s := serve(t, l, v.root(t), later, l.strict)
				for _, clients := range families {
					s.drop(clients.stranger, 465)
					s.drop(clients.stranger, 587)
				}
			})
		})
	}
}

// Connections over loopback are never limited, wherever the jump is.
func TestLoopbackInOwnChain(t *testing.T) {
	serve(t, layouts[0], "/",
		edit{"\t\tiif \"lo\" accept\n", ""}, edit{"\t\tjump nftwl\n", "\t\tjump nftwl\n\t\tiif \"lo\" accept\n"})
	for range 2 * burst5 {
		conn, err := net.DialTimeout("tcp", "127.0.0.1:587", soon)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
}
