package ruleset

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) {
	flag.Set("test.parallel", "8") // these tests wait rather than work
	nstest.Main(m)
}

// read asks an nft, of the system at root, for the rules of the namespace.
func read(t *testing.T, root string) *Ruleset {
	t.Helper()
	var r Ruleset
	nft := func(args ...string) {
		t.Helper()
		cmd := exec.Command("/usr/sbin/nft", args...)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		out, err := cmd.Output()
		if err == nil {
			err = r.Read(out)
		}
		if err != nil {
			t.Fatalf("nft %q: %v", args, err)
		}
	}
	nft(append(Arguments[:len(Arguments):len(Arguments)], "list", "ruleset")...)
	for _, list := range r.Unread() {
		nft(list...)
	}
	return &r
}

var (
	client4, other4 = netip.MustParseAddr("198.51.100.66"), netip.MustParseAddr("198.51.100.67")
	client6, other6 = netip.MustParseAddr("2001:db8:a:1::66"), netip.MustParseAddr("2001:db8:a:2::66")
)

// Each input is what stands in a chain of hook input; above it, tracked
// connections and two sets that hold the client.
var inputs = []struct {
	name, input, more string // more is of the table
	family            string // inet if empty
	rate              Rate   // that connections made before the one that counts have led to
	by                bool   // another made them
	passedOver        int
}{
	{name: "nothing"},
	{name: "policy", input: "policy drop;"},
	{name: "accept of a port", input: "policy drop; tcp dport 80 accept"},
	{name: "drop of a port", input: "tcp dport 80 drop"},
	{name: "reject", input: "tcp dport 80 reject with tcp reset"},
	{name: "reject after icmp", input: "meta l4proto icmp accept; meta l4proto ipv6-icmp accept; reject"},
	{name: "set of ports", input: "tcp dport { 22, 80 } drop"},
	{name: "not of a set", input: "meta l4proto { icmp, ipv6-icmp } accept; tcp dport != { 22, 80 } drop"},
	{name: "range", input: "tcp dport 1-100 drop"},
	{name: "range in a set", input: "tcp dport { 22, 50-100 } drop"},
	{name: "less", input: "tcp dport < 443 drop"},
	{name: "any transport", input: "th dport 80 drop"},
	{name: "another transport", input: "udp dport 80 drop; udp dport != 80 drop"},
	{name: "transports", input: "policy drop; meta l4proto { udp, icmp, ipv6-icmp } accept; meta l4proto tcp th dport 443 accept"},
	{name: "family of the packet", input: "meta nfproto ipv4 tcp dport 80 drop; meta protocol ip6 tcp dport 443 drop"},
	{name: "family of the table", family: "ip6", input: "tcp dport 80 drop"},
	{name: "address", input: "ip saddr 198.51.100.66 drop; ip6 saddr 2001:db8:a:1::67 drop"},
	{name: "not an address", input: "ip saddr != 198.51.100.66 drop; ip6 saddr != { 2001:db8:a:1::67, fe80::/10, 2001:db8::2 } drop"},
	{name: "prefix", input: "ip saddr 198.51.100.0/26 drop; ip6 saddr 2001:db8:a::/48 tcp dport 80 drop"},
	{name: "range of addresses", input: "ip saddr 198.51.100.1-198.51.100.66 drop; ip6 saddr { 2001:db8:a::-2001:db8:a:1::65 } drop"},
	{name: "mask", input: "ip saddr & 0.0.0.66 == 0.0.0.66 tcp dport 80 drop; ip6 saddr & ffff:ffff:ffff:: == 2001:db8:b:: drop"},
	{name: "concatenation", input: "ip saddr . tcp dport { 198.51.100.66 . 80, 198.51.100.67 . 443 } drop"},
	{name: "named set", input: "ip saddr . tcp dport @port4 drop; ip6 saddr @addr6 drop"},
	{name: "not in a named set", input: "ip saddr . tcp dport != @port4 drop"},
	{name: "masked look-up", input: "ip6 saddr & ffff:ffff:ffff:ffff:: @addr6 tcp dport 80 drop"},
	{name: "loopback", input: `policy drop; iif "lo" accept; iifname "lo" accept; iifname { "lo", "foo*" } accept`},
	{name: "interface", input: `policy drop; iifname "net*" tcp dport 80 accept`},
	{name: "not loopback", input: `iif != "lo" tcp dport 80 drop`},
	{name: "state", input: "policy drop; ct state established,related accept; ct state new tcp dport 80 accept"},
	{name: "set of states", input: "policy drop; ct state { established, related } accept"},
	{name: "not a state", input: "tcp dport 80 ct state != new drop; tcp dport 443 ct state ! established drop"},
	{name: "map of states", input: "policy drop; ct state vmap { established : accept, related : accept, invalid : drop }"},
	{name: "translated", input: "ct status dnat accept; tcp dport 80 ct state new drop", passedOver: 1},
	{name: "flags", input: "tcp flags & (fin | syn | rst | ack) == syn tcp dport 80 drop"},
	{name: "flags that are not", input: "tcp flags & (fin | syn | rst | ack) != syn ct state new drop; tcp flags & (fin | syn) == fin | syn drop"},
	{name: "jump", input: "tcp dport 80 jump c; tcp dport 80 accept; drop", more: "chain c { tcp dport 22 drop; return; drop; }"},
	{name: "continue", input: "tcp dport 80 continue; tcp dport 443 drop"},
	{name: "goto", input: "tcp dport 80 goto c; accept", more: "chain c { ip saddr 198.51.100.66 drop; }"},
	{name: "goto from a jump", input: "jump c; tcp dport 80 drop", more: "chain c { goto d; drop; }; chain d { tcp dport 443 drop; }"},
	{name: "map of ports", input: "tcp dport vmap { 80 : drop, 90-100 : accept, 443 : goto c }", more: "chain c { ip6 saddr ::/0 drop; }"},
	{name: "map with the rest", input: "ct state established accept; tcp dport vmap { 80 : accept, * : drop }"},
	{name: "map and no more", input: "tcp dport vmap { 80 : continue } drop; tcp dport 443 counter drop"},
	{name: "named map", input: "tcp dport vmap @m", more: "map m { type inet_service : verdict; elements = { 80 : drop }; }"},
	{name: "named ports", input: "tcp dport @p drop", more: "set p { type inet_service; flags interval; elements = { 70-80 }; }"},
	{name: "named ports, none", input: "tcp dport != @p ct state new drop", more: "set p { type inet_service; }"},
	{name: "log and count", input: `tcp dport 80 counter log prefix "x" drop`},
	{name: "another set", input: "ip saddr @o drop", more: "set o { type ipv4_addr; }", passedOver: 1},
	{name: "mark", input: "meta mark 7 drop", passedOver: 1},
	{name: "mark of another port", input: "meta mark 7 tcp dport 81 drop"},
	{name: "a later chain", input: "tcp dport 80 accept", more: "chain l { type filter hook input priority 10; tcp dport 80 drop; }"},
	{name: "a chain before", input: "policy drop;", more: "chain e { type filter hook prerouting priority -10; accept; }"},
	{name: "a limit that holds", input: "ct state new tcp dport 80 limit rate over 1/hour burst 3 packets drop"},
	{name: "the limit of all", rate: OverAll, input: "ct state new tcp dport 80 limit rate over 1/hour burst 1 packets drop"},
	{name: "the limit of all, by another", rate: OverAll, by: true, input: "ct state new limit rate over 1/hour burst 1 packets drop"},
	{name: "below the limit of all", rate: OverAll, input: "ct state established accept; tcp dport 80 limit rate 1/hour burst 1 packets accept; tcp dport 80 drop"},
	{name: "the limit of a source", rate: OverOwn, input: "ct state new add @l { ip saddr limit rate over 1/hour burst 1 packets } drop", more: "set l { type ipv4_addr; flags dynamic; size 9; }"},
	{name: "the limit of another", by: true, rate: OverOwn, input: "ct state new add @l { ip saddr . tcp dport limit rate over 1/hour burst 1 packets } drop", more: "set l { type ipv4_addr . inet_service; flags dynamic; size 9; }"},
	{name: "a meter", rate: OverOwn, input: "ct state new meter x { ip saddr limit rate over 1/hour burst 1 packets } drop"},
	{name: "a named limit", rate: OverAll, input: "ct state new limit name x drop", more: "limit x { rate over 1/hour burst 1 packets; }"},
	{name: "added and looked up", input: "add @addr { ip saddr }; ip saddr @addr drop", more: "set addr { type ipv4_addr; flags dynamic; size 9; }"},
}

// What the walk says of a packet, the kernel does with one.
func TestWalkAsTheKernel(t *testing.T) {
	for _, test := range inputs {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			nstest.New(t)
			peer := nstest.NewPeer(t, "198.51.100.0/24", "2001:db8:a::/48")
			for _, port := range []uint16{80, 443} {
				nstest.Echo(t, port)
			}
			// Connections are tracked from their first packet on.
			track := "table inet track { chain c { type filter hook input priority -300; ct state new accept; }; }\n"
			nstest.Nft(t, track)
			dial := func(from netip.Addr, port uint16) *net.TCPConn {
				t.Helper()
				server := nstest.ServerIPv4
				if from.Is6() {
					server = nstest.ServerIPv6
				}
				conn, err := peer.Dial(from, netip.AddrPortFrom(server, port), 300*time.Millisecond)
				var timed net.Error
				if err != nil && !errors.Is(err, unix.ECONNREFUSED) && !(errors.As(err, &timed) && timed.Timeout()) {
					t.Fatal(err)
				}
				return conn
			}
			open := make(map[Packet]*net.TCPConn)
			packets := []Packet{{Source: client4, Port: 80}, {Source: client4, Port: 443}, {Source: client6, Port: 80}, {Source: client6, Port: 443}}
			for _, p := range packets {
				if open[p] = dial(p.Source, p.Port); open[p] == nil {
					t.Fatal("no connection without rules")
				}
			}

			family := test.family
			sets := "set port4 { type ipv4_addr . inet_service; elements = { 198.51.100.66 . 80 }; }\n" +
				"set addr6 { type ipv6_addr; elements = { 2001:db8:a:1::, 2001:db8:a:1::66 }; }\n"
			if family == "" {
				family = "inet"
			}
			// Neighbours must be found, whatever the policy.
			nstest.Nft(t, fmt.Sprintf("table %s filter {\n%s%s\nchain input {\n type filter hook input priority filter; meta l4proto ipv6-icmp accept\n%s\n}\n}\n", family, sets, test.more, test.input))
			contents := map[Set][]nftset.Key{
				{family + " filter", "port4"}: {{Addr: client4, Port: 80}},
				{family + " filter", "addr6"}: {{Addr: netip.MustParseAddr("2001:db8:a:1::")}, {Addr: client6}},
			}

			host, trixie := read(t, "/"), read(t, nstest.Trixie(t))
			for _, p := range packets {
				for _, established := range []bool{true, false} {
					in := p
					in.Interface, in.Established = "net0", established
					if test.rate == OverAll || !test.by {
						in.Rate = test.rate
					}
					trace := host.Walk(in, contents, nil)
					if again := trixie.Walk(in, contents, nil); again.Accepted != trace.Accepted {
						t.Errorf("%v is accepted: %v; by the rules as nft of trixie prints them: %v", in, trace.Accepted, again.Accepted)
					}
					if n := len(trace.PassedOver); n > test.passedOver {
						t.Errorf("%v: %d rules are not understood, of which the first is %s", in, n, trace.PassedOver[0])
					}
					var accepted bool
					if established {
						accepted = alive(open[p])
					} else {
						before := in.Source
						if test.by {
							before = map[netip.Addr]netip.Addr{client4: other4, client6: other6}[before]
						}
						for range 2 * int(min(test.rate, 1)) {
							if conn := dial(before, p.Port); conn != nil {
								conn.Close()
							}
						}
						conn := dial(p.Source, p.Port)
						if accepted = conn != nil; accepted {
							// All that it sends is established, which the rules may drop.
							conn.Close()
						}
					}
					if accepted != trace.Accepted {
						t.Errorf("%+v is accepted: %v; the kernel says %v\n%+v", in, trace.Accepted, accepted, trace)
					}
				}
			}
		})
	}
}

// alive tells whether an open connection still carries data.
func alive(conn *net.TCPConn) bool {
	conn.SetDeadline(time.Now().Add(300 * time.Millisecond))
	line := []byte("NOOP\r\n")
	if _, err := conn.Write(line); err != nil {
		return false
	}
	_, err := io.ReadFull(conn, line)
	return err == nil
}
