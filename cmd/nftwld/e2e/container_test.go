package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/textproto"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// The addresses of a container and of the host on its bridge.
const (
	container4, container6 = "172.18.0.2", "fd00:18::2"
	bridge4, bridge6       = "172.18.0.1", "fd00:18::1"
	internet4, internet6   = "203.0.113.0/24", "2001:db8:a::/48" // where its clients are
)

// published has the rules that a container engine loads for published ports.
const published = `
table inet engine {
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		meta nfproto ipv4 fib daddr type local tcp dport 143 dnat ip to ` + container4 + `
		meta nfproto ipv6 fib daddr type local tcp dport 143 dnat ip6 to ` + container6 + `
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
		ct status dnat accept
		iifname "bridge0" accept
	}
}
`

// publish makes a host with the standalone rules, a container behind a bridge,
// whose mail port the host publishes, and clients on the internet.
func (s *server) publish() {
	t := s.t
	t.Helper()
	s.address, s.policy, s.table = container4, bridge4, "nftwl"
	namespace := func() *os.File {
		f, err := os.Open("/proc/thread-self/ns/net")
		nstest.Must(t, err)
		t.Cleanup(func() { f.Close() })
		return f
	}
	s.outside = namespace()
	nstest.Must(t, unix.Unshare(unix.CLONE_NEWNET))
	s.inside = namespace()
	// Without a default route, DNS lookups fail at once instead of timing out.
	nstest.IP(t, "link set lo up",
		fmt.Sprintf("link add eth0 type veth peer name veth0 netns /proc/%d/fd/%d", os.Getpid(), s.outside.Fd()),
		"link set eth0 up", "address add "+container4+"/16 dev eth0", "address add "+container6+"/64 dev eth0 nodad",
		"route add "+internet4+" via "+bridge4, "route add "+internet6+" via "+bridge6)
	nstest.Must(t, unix.Setns(int(s.outside.Fd()), unix.CLONE_NEWNET))
	nstest.IP(t, "link add bridge0 type bridge", "link set veth0 master bridge0", "link set veth0 up", "link set bridge0 up",
		"address add "+bridge4+"/16 dev bridge0", "address add "+bridge6+"/64 dev bridge0 nodad")
	s.internet = nstest.NewPeer(t, internet4, internet6)
	for _, name := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		nstest.Must(t, os.WriteFile("/proc/sys/net/"+name, []byte("1"), 0))
	}
	nstest.Nft(t, published)
	nstest.Nft(t, strings.NewReplacer(
		"\t\ttype filter hook input priority filter - 10; policy accept;\n", "",
		"#type filter hook prerouting", "type filter hook prerouting",
		"#fib daddr type", "fib daddr type",
	).Replace(nstest.Contrib(t, "nftables/standalone.nft")))
}

// dialPublished connects from the internet to the host's address.
func (s *server) dialPublished(from string, timeout time.Duration) (*textproto.Conn, error) {
	to := nstest.ServerIPv4
	client := netip.MustParseAddr(from)
	if client.Is6() {
		to = nstest.ServerIPv6
	}
	c, err := s.internet.Dial(client, netip.AddrPortFrom(to, 143), timeout)
	if err != nil {
		return nil, err
	}
	return textproto.NewConn(c), c.SetDeadline(time.Now().Add(nstest.Patience))
}

// Dovecot in a container reports to nftwld on the host, which adds its users to
// the host's sets. The container needs no privilege.
func TestContainer(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{publish: true, config: "failures: {limit: 5}\n"})
		nstest.Poll(s.t, "IPv6 to reach the container", func() bool { return listens("[" + container6 + "]:143") })
		for _, c := range []struct{ user, guesser, family string }{
			{"203.0.113.7", "203.0.113.8", "ipv4"},
			{"2001:db8:a:7::7", "2001:db8:a:8::8", "ipv6"},
		} {
			login := func() {
				t.Helper()
				conn, err := s.dialPublished(c.user, nstest.Patience)
				nstest.Must(t, err)
				if err := imap(conn, "", "alice", password); err != nil {
					t.Errorf("%s: %v", c.user, err)
				}
			}
			login()
			nstest.Poll(s.t, "the trust", func() bool { return s.in("trusted_"+c.family, c.user+` \. 143 .*comment "alice"`) })
			tryOver(t, func() (*textproto.Conn, error) { return s.dialPublished(c.guesser, nstest.Patience) }, different(5))
			nstest.Poll(s.t, "the ban", func() bool { return s.in("banned_"+c.family, c.guesser+` \. 143 .*comment "nftwld"`) })
			var timeout net.Error
			if _, err := s.dialPublished(c.guesser, 300*time.Millisecond); !errors.As(err, &timeout) || !timeout.Timeout() {
				t.Errorf("%s is banned, and connects: %v", c.guesser, err)
			}
			login()
			for _, other := range []string{container4, container6, bridge4, bridge6} {
				if s.in("trusted_"+c.family, other+" ") || s.in("banned_"+c.family, other+" ") {
					t.Errorf("%s is in a set", other)
				}
			}
		}
	})
}
