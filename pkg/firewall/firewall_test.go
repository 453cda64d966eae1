package firewall

import (
	"errors"
	"fmt"
	"iter"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) {
	nstest.Parallel(8) // these tests wait more than they work
	nstest.Main(m)
}

var (
	client4, other4 = netip.MustParseAddr("198.51.100.66"), netip.MustParseAddr("198.51.100.67")
	client6, other6 = netip.MustParseAddr("2001:db8:a:1::66"), netip.MustParseAddr("2001:db8:a:2::66")
	sources         = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:a::/48")}
)

// Each input is the text of a chain of hook input. Its table has two sets with the
// client.
var inputs = []struct {
	name, input, more string // more is more text of the table
	family            string // inet if empty
	beside            string // other tables
	iptables          string // commands; %s is iptables or ip6tables
}{
	{name: "nothing"},
	{name: "policy", input: "policy drop;"},
	{name: "accept of a port", input: "policy drop; tcp dport 80 accept"},
	{name: "reject", input: "tcp dport 80 reject with tcp reset; tcp dport 443 reject"},
	{name: "set of ports", input: "tcp dport { 22, 80 } drop"},
	{name: "range in a set", input: "tcp dport { 22, 50-100 } drop"},
	{name: "family of the packet", input: "meta nfproto ipv4 tcp dport 80 drop; meta protocol ip6 tcp dport 443 drop"},
	{name: "family of the table", family: "ip6", input: "tcp dport 80 drop"},
	{name: "not an address", input: "ip saddr != 198.51.100.66 drop; ip6 saddr != { 2001:db8:a:1::67, fe80::/10, 2001:db8::2 } drop"},
	{name: "prefix", input: "ip saddr 198.51.100.0/26 drop; ip6 saddr 2001:db8:a::/48 tcp dport 80 drop"},
	{name: "concatenation", input: "ip saddr . tcp dport { 198.51.100.66 . 80, 198.51.100.67 . 443 } drop"},
	{name: "named set", input: "ip saddr . tcp dport @port4 drop; ip6 saddr @addr6 drop"},
	{name: "not in a named set", input: "ip saddr . tcp dport != @port4 drop"},
	{name: "masked lookup", input: "ip6 saddr & ffff:ffff:ffff:ffff:: @addr6 tcp dport 80 drop"},
	{name: "loopback", input: `policy drop; iif "lo" accept; iifname "lo" accept; iifname { "lo", "foo*" } accept`},
	{name: "interface", input: `policy drop; iifname "net*" tcp dport 80 accept`},
	{name: "index of an interface", input: `policy drop; iif "net0" tcp dport 80 accept`},
	{name: "state", input: "policy drop; ct state established,related accept; ct state new tcp dport 80 accept"},
	{name: "map of states", input: "policy drop; ct state vmap { established : accept, related : accept, invalid : drop }; tcp dport 80 accept"},
	{name: "flags", input: "tcp flags & (fin | syn | rst | ack) == syn tcp dport 80 drop"},
	{name: "jump", input: "tcp dport 80 jump c; tcp dport 80 accept; drop", more: "chain c { tcp dport 22 drop; return; drop; }"},
	{name: "goto from a jump", input: "jump c; tcp dport 80 drop", more: "chain c { goto d; drop; }; chain d { tcp dport 443 drop; }"},
	{name: "a chain without a name", input: "tcp dport 80 jump { ip saddr 198.51.100.66 drop; ip6 saddr 2001:db8:a::/48 drop; }"},
	{name: "map of ports", input: "tcp dport vmap { 80 : drop, 90-100 : accept, 443 : goto c }", more: "chain c { ip6 saddr ::/0 drop; }"},
	{name: "map with the rest", input: "ct state established accept; tcp dport vmap { 80 : accept, * : drop }"},
	{name: "named map", input: "tcp dport vmap @m", more: "map m { type inet_service : verdict; elements = { 80 : drop }; }"},
	{name: "named ports", input: "tcp dport @p drop", more: "set p { type inet_service; flags interval; elements = { 1-9, 20-30, 40, 70-80, 82, 100-65535 }; }"},
	{name: "intervals", input: "ip saddr @i drop; ip6 saddr @j drop", more: "set i { type ipv4_addr; flags interval; auto-merge; elements = { 10.0.0.0/8, 198.51.100.64/30, 198.51.100.69 }; }; set j { type ipv6_addr; flags interval; elements = { 2001:db8:a:1::-2001:db8:a:1::ffff, ::1-::3 }; }"},
	{name: "concatenated intervals", input: "ip saddr . tcp dport @i drop", more: "set i { type ipv4_addr . inet_service; flags interval; elements = { 10.0.0.0/8 . 1-100, 198.51.100.0/24 . 80-90 }; }"},
	{name: "mark", input: "meta mark 7 drop", beside: "table inet marks { chain c { type filter hook prerouting priority -150; tcp dport 80 meta mark set 7; }; }"},
	{name: "mark of a connection", input: "ct mark 7 drop", beside: "table inet marks { chain c { type filter hook prerouting priority -150; tcp dport 80 ct state new ct mark set 7; }; }"},
	{name: "route back", input: "fib saddr . iif oif missing drop; fib daddr type local tcp dport 80 drop"},
	{name: "destination", input: "ip daddr 192.0.2.1 tcp dport 80 drop; ip daddr 192.0.2.9 drop; ip6 daddr 2001:db8::1 tcp dport 443 drop"},
	{name: "a later chain", input: "tcp dport 80 accept", more: "chain l { type filter hook input priority 10; tcp dport 80 drop; }"},
	{name: "a chain before", input: "policy drop;", more: "chain e { type filter hook prerouting priority -10; accept; }"},
	{name: "prerouting", beside: "table ip raw { chain p { type filter hook prerouting priority raw; tcp dport 80 drop; }; }"},
	{name: "untracked", input: "ct state untracked tcp dport 80 drop", beside: "table inet raw { chain p { type filter hook prerouting priority raw; notrack; }; }"},
	{name: "dormant", input: "policy drop; tcp dport 80 accept", beside: "table ip d { flags dormant; chain i { type filter hook input priority 0; policy drop; }; }"},
	{name: "a device", beside: `table netdev n { chain c { type filter hook ingress device "net0" priority 0; tcp dport 80 drop; }; chain l { type filter hook ingress device "lo" priority 0; drop; }; }`},
	{name: "ingress", beside: `table inet n { chain c { type filter hook ingress devices = { lo, net0 } priority 0; ip saddr 198.51.100.66 tcp dport 80 drop; }; }`},
	{name: "redirection", input: "tcp dport 80 drop", beside: "table inet n { chain c { type nat hook prerouting priority dstnat; tcp dport 443 redirect to :80; }; }"},
	{name: "objects", input: `policy drop; counter name "c" accept; `, more: `counter c { }; quota q { over 1 mbytes }; ct helper ftp { type "ftp" protocol tcp; }; limit l { rate 1/second; }`},
	{name: "a quota", input: `quota name "q" drop`, more: `quota q { until 1 mbytes }`},
	{name: "a limit", input: "ct state new tcp dport 80 limit rate over 1/hour burst 2 packets drop"},
	{name: "a limit that lets through", input: "ct state established accept; tcp dport 80 limit rate 1/hour burst 1 packets accept; tcp dport 80 drop"},
	{name: "the limit of a source", input: "ct state new add @l { ip saddr limit rate over 1/hour burst 1 packets } drop", more: "set l { type ipv4_addr; flags dynamic; size 9; }"},
	{name: "a meter", input: "ct state new meter x { ip saddr limit rate over 1/hour burst 1 packets } drop"},
	{name: "connections of a source", input: "ct state new add @l { ip saddr ct count over 1 } drop", more: "set l { type ipv4_addr; flags dynamic; size 9; }"},
	{name: "a named limit", input: "ct state new limit name x drop", more: "limit x { rate over 1/hour burst 1 packets; }"},
	{name: "added and looked up", input: "ip saddr @addr drop; add @addr { ip saddr }", more: "set addr { type ipv4_addr; flags dynamic; size 9; }"},
	{name: "log and count", input: `tcp dport 80 counter log prefix "x" drop`},

	{name: "iptables", iptables: `%s -P INPUT DROP
		%s -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
		%s -A INPUT -m addrtype ! --dst-type LOCAL -j DROP
		%s -A INPUT -p tcp -m tcp --dport 22 -m comment --comment x -j ACCEPT
		%s -A INPUT -p tcp -m multiport --dports 25,80 -j ACCEPT`},
	{name: "iptables rejects", iptables: `%s -A INPUT -p tcp -m multiport --dports 25,80 -j REJECT --reject-with tcp-reset`},
	{name: "iptables limits", iptables: `%s -A INPUT -p tcp -m state --state NEW -m recent --set --name x
		%s -A INPUT -p tcp -m state --state NEW -m recent --update --seconds 30 --hitcount 3 --name x -j DROP`},
	{name: "iptables by its bytes", iptables: `%s -A INPUT -p tcp --dport 80 -m length --length 1:65535 -m u32 --u32 "0>>28=4:6" -j DROP`},
}

// The kernel does with a packet what it does in the copy.
func TestAsTheKernel(t *testing.T) {
	for _, test := range inputs {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			nstest.New(t)
			peer := nstest.NewPeer(t, sources[0].String(), sources[1].String())
			ports := []uint16{80, 443}
			for _, port := range ports {
				nstest.Echo(t, port)
			}
			family := test.family
			if family == "" {
				family = "inet"
			}
			if test.iptables != "" {
				for _, program := range []string{"iptables-nft", "ip6tables-nft"} {
					// Neighbour discovery must work, whatever the policy.
					commands := program + " -A INPUT -p icmpv6 -j ACCEPT\n" + strings.ReplaceAll(test.iptables, "%s", program)
					if program == "iptables-nft" {
						_, commands, _ = strings.Cut(commands, "\n")
					}
					nstest.Need(t, program, "iptables")
					if out, err := exec.Command("sh", "-ec", commands).CombinedOutput(); err != nil {
						t.Fatalf("%v\n%s", err, out)
					}
				}
			} else {
				nstest.Nft(t, fmt.Sprintf("table %s filter {\n%s%s\nchain input {\n type filter hook input priority filter; meta l4proto ipv6-icmp accept\n%s\n}\n}\n%s", family,
					"set port4 { type ipv4_addr . inet_service; elements = { 198.51.100.66 . 80 }; }\n"+
						"set addr6 { type ipv6_addr; elements = { 2001:db8:a:1::, 2001:db8:a:1::66 }; }\n", test.more, test.input, test.beside))
			}
			before := ruleset(t)
			c, err := Open(sources, ports)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if len(c.Omitted) > 0 {
				t.Errorf("omitted: %v", c.Omitted)
			}
			for range 2 {
				for _, from := range []netip.Addr{client4, other4, client6, other6} {
					for _, port := range ports {
						conn, result, err := c.Dial(from, port)
						if err != nil {
							t.Fatal(err)
						}
						limit := 300 * time.Millisecond
						if result.Verdict == Accept {
							limit = 10 * time.Second // on a busy machine
							if _, ok, err := conn.Open(); err != nil || !ok {
								t.Errorf("from %s to %d: the copy answers: %v, %v", from, port, ok, err)
							}
						}
						verdict := Accept
						to := nstest.ServerIPv4
						if from.Is6() {
							to = nstest.ServerIPv6
						}
						real, err := peer.Dial(from, netip.AddrPortFrom(to, port), limit)
						var timed net.Error
						switch {
						case errors.Is(err, unix.ECONNREFUSED):
							verdict = Reject
						case errors.As(err, &timed) && timed.Timeout():
							verdict = Drop
						case err != nil:
							t.Fatal(err)
						default:
							defer real.Close()
						}
						// Not every client treats an ICMP answer as a refusal.
						if result.Verdict != verdict && !(result.Verdict == Reject && verdict == Drop) {
							t.Errorf("from %s to %d: %s by %q; the kernel says %s", from, port, result.Verdict, c.Text(result.Step), verdict)
						}
					}
				}
			}
			if after := ruleset(t); after != before {
				t.Errorf("the ruleset was\n%s\nand is\n%s", before, after)
			}
		})
	}
}

func ruleset(t *testing.T) string {
	t.Helper()
	out, err := exec.Command(nstest.Need(t, "nft", "nftables"), "--handle", "--stateless", "--terse", "list", "ruleset").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// shipped loads the example of contrib/nftables.
func shipped(t *testing.T, file string) {
	t.Helper()
	dir := t.TempDir()
	contrib := filepath.Join(nstest.Root(t), "contrib", "nftables")
	if err := os.Symlink(contrib, filepath.Join(dir, "nftwl")); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(nstest.Need(t, "nft", "nftables"), "-I", dir, "-f", filepath.Join(contrib, file)).CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
}

// open makes a copy of the loaded rules, for the clients and these ports.
func open(t *testing.T, ports ...uint16) *Copy {
	t.Helper()
	c, err := Open(sources, ports)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// decides returns which rule decides about a first packet.
func (c *Copy) decides(t *testing.T, from netip.Addr, port uint16) string {
	t.Helper()
	_, result, err := c.Dial(from, port)
	if err != nil {
		t.Fatal(err)
	}
	if result.Chain == "" {
		return string(result.Verdict)
	}
	return fmt.Sprintf("%s %s %s: %s", result.Verdict, result.Table, result.Chain, c.Text(result.Step))
}

func TestDecides(t *testing.T) {
	for name, test := range map[string]struct{ rules, want string }{
		"nothing":         {"", "accept"},
		"policy":          {"table inet f { chain c { type filter hook input priority 0; policy drop; }; }", "drop inet f c: policy drop"},
		"accept":          {"table inet f { chain c { type filter hook input priority 0; jump d; }; chain d { counter accept; }; chain l { type filter hook input priority 9; }; }", "accept inet f d: counter accept"},
		"the last accept": {"table inet f { chain c { type filter hook input priority 0; ct state new accept; }; chain l { type filter hook input priority 9; tcp dport 80 accept; }; }", "accept inet f l: tcp dport 80 accept"},
		"accept elsewhere": {"table inet f { chain c { type filter hook input priority 0; }; chain r { type filter hook prerouting priority -300; accept; }; chain n { type nat hook input priority 100; accept; }; }",
			"accept inet f c: policy accept"},
		"a later drop": {"table inet f { chain c { type filter hook input priority 0; accept; }; chain l { type filter hook input priority 9; tcp dport 80 drop; }; }", "drop inet f l: tcp dport 80 drop"},
		"reject":       {"table ip f { chain c { type filter hook input priority 0; reject with icmp type admin-prohibited comment \"no\"; }; }", `reject ip f c: reject with icmp admin-prohibited comment "no"`},
		"another destination": {"table ip n { chain c { type nat hook prerouting priority dstnat; dnat to 10.9.9.9; }; }; table ip f { chain c { type filter hook forward priority 0; policy drop; }; }",
			"drop ip f c: policy drop"},
	} {
		t.Run(name, func(t *testing.T) {
			nstest.New(t)
			nstest.NewPeer(t, "198.51.100.0/24", "10.9.9.0/24")
			if err := os.WriteFile(forwarding[0], []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
			if test.rules != "" {
				nstest.Nft(t, test.rules)
			}
			if got := open(t, 80).decides(t, client4, 80); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

// A chain of several devices is copied, whatever kind of devices they are.
func TestDevices(t *testing.T) {
	nstest.New(t)
	nstest.NewPeer(t, sources[0].String())
	if out, err := exec.Command("ip", "tuntap", "add", "dev", "bare", "mode", "tun").CombinedOutput(); err != nil {
		t.Fatalf("ip: %v, %s", err, out)
	}
	nstest.Nft(t, `table netdev n { chain c { type filter hook ingress devices = { lo, bare, net0 } priority 0; tcp dport 80 drop; }; }`)
	c := open(t, 80)
	if len(c.Omitted) > 0 {
		t.Errorf("omitted: %q", c.Omitted)
	}
	if got := c.decides(t, client4, 80); got != "drop netdev n c: tcp dport 80 drop" {
		t.Error(got)
	}
}

// The copy has the elements of large sets that the probe looks up, with any mask.
func TestLargeSets(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, `table inet f {
		set a { type ipv4_addr; }
		set b { type ipv4_addr . inet_service; }
		set c { type ipv4_addr; flags interval; }
		set d { type ipv6_addr . inet_service; }
		set e { type inet_service . ipv4_addr; }
		chain c {
			type filter hook input priority 0
			tcp dport 80 ip saddr @a drop
			tcp dport 81 ip saddr & 255.255.255.0 . tcp dport @b drop
			tcp dport 82 ip saddr @c drop
			ip6 saddr & ffff:ffff:ffff:ffff:: . tcp dport @d drop
			tcp dport . ip saddr @e drop
		}
	}`)
	for set, many := range map[string]struct {
		element string
		n       int
	}{
		"a": {"10.%d.%d.1", most}, "b": {"10.%d.%d.1 . 80", most}, "c": {"10.%d.%d.0/25", most / 2},
		"d": {"2001:db8:b:%x:%x::1 . 80", most}, "e": {"25 . 10.%d.%d.1", most},
	} {
		// nft's transactions are limited in a user namespace.
		for all := slices.Collect(numbers(many.n)); len(all) > 0; {
			n := min(len(all), 1000)
			var b strings.Builder
			for _, i := range all[:n] {
				fmt.Fprintf(&b, many.element+",", i>>8, i&0xff)
			}
			nstest.Nft(t, "add element inet f "+set+" {"+b.String()+"}")
			all = all[n:]
		}
	}
	nstest.Nft(t, "add element inet f a { 198.51.100.66 }; add element inet f b { 198.51.100.0 . 81 }; add element inet f c { 198.51.100.64/30 }; add element inet f d { 2001:db8:a:1:: . 83 }; add element inet f e { 25 . 198.51.100.1 }")
	var single []netip.Prefix
	for _, a := range []netip.Addr{client4, other4, client6, other6} {
		single = append(single, netip.PrefixFrom(a, a.BitLen()))
	}
	c, err := Open(single, []uint16{80, 81, 82, 83})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if want := []string{"the elements of inet f e, more than 4096"}; !slices.Equal(c.Omitted, want) {
		t.Errorf("omitted: %q, want %q", c.Omitted, want)
	}
	for _, test := range []struct {
		from netip.Addr
		port uint16
		want Verdict
	}{
		{client4, 80, Drop}, {client4, 81, Drop}, {client4, 82, Drop}, {client4, 83, Accept},
		{other4, 80, Accept}, {other4, 81, Drop}, {other4, 82, Drop},
		{client6, 83, Drop}, {client6, 80, Accept}, {other6, 83, Accept},
	} {
		if got := c.decides(t, test.from, test.port); !strings.HasPrefix(got, string(test.want)) {
			t.Errorf("from %s to %d: %s, want %s", test.from, test.port, got, test.want)
		}
	}
}

func numbers(n int) iter.Seq[int] {
	return func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	}
}

// Changes to the copy's sets do not change the machine's.
func TestChangedSets(t *testing.T) {
	nstest.New(t)
	shipped(t, "nftables.conf")
	c := open(t, 993)
	set, err := c.Conn().Set(nftset.Table{Family: nftset.INet, Name: "filter"}, "banned_ipv4")
	if err != nil {
		t.Fatal(err)
	}
	batch := c.Conn().Batch()
	batch.Add(set, nftset.Element{Key: nftset.Key{Addr: client4, Port: 993}, Timeout: time.Hour})
	if err := batch.Commit(); err != nil {
		t.Fatal(err)
	}
	if got := c.decides(t, client4, 993); !strings.HasPrefix(got, "drop inet filter nftwl: ip saddr . tcp dport @banned_ipv4 ") {
		t.Error(got)
	}
	// In this namespace, nothing has changed.
	if interfaces, err := net.Interfaces(); err != nil || len(interfaces) != 1 {
		t.Errorf("%v, %v", interfaces, err)
	}
	real, err := nftset.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer real.Close()
	if found, err := real.Lookup(set, nftset.Key{Addr: client4, Port: 993}); err != nil || len(found) > 0 {
		t.Errorf("%v, %v", found, err)
	}
}

// What cannot be copied is named, and the rest is tried.
func TestOmitted(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, "table inet f { chain c { type filter hook input priority 0; tcp dport 80 drop; }; }")
	nstest.Need(t, "ipset", "ipset")
	if out, err := exec.Command("sh", "-ec", "ipset create x hash:ip; iptables-nft -A INPUT -m set --match-set x src -j DROP").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c := open(t, 80)
	if len(c.Omitted) != 1 || !strings.HasPrefix(c.Omitted[0], "table ip filter (") {
		t.Errorf("omitted: %q", c.Omitted)
	}
	if got := c.decides(t, client4, 80); got != "drop inet f c: tcp dport 80 drop" {
		t.Error(got)
	}
}

// Flowtables are not copied, so their rules are copied up to where they use them. No
// flowtable is loaded, because not every kernel has them.
func TestFlowtable(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, "table inet f { chain c { type filter hook forward priority 0; meta l4proto tcp accept; accept; }; }")
	conn, err := nftset.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	tables, err := readTables(conn)
	if err != nil {
		t.Fatal(err)
	}
	flow := expression{"flow_offload", nftset.AppendAttribute(nil, 1, name("ft"))} // NFTA_FLOW_TABLE_NAME
	rules := tables[0].objects[unix.NFT_MSG_NEWRULE]
	for i := range rules {
		all := expressions(rules[i])
		all = slices.Insert(all, len(all)-1, flow) // before accept, which is for packets in the flowtable
		rules[i].Attrs = nftset.AppendAttribute(without(rules[i].Attrs, unix.NFTA_RULE_EXPRESSIONS), unix.NFTA_RULE_EXPRESSIONS, encode(all))
	}
	err = Inside(func() error {
		conn, err := nftset.Dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		tables[0].prepare()
		if err := tables[0].load(conn); err != nil {
			return err
		}
		out, err := exec.Command("nft", "list", "ruleset").Output()
		if strings.Contains(string(out), "\taccept") || !strings.Contains(string(out), "type filter hook forward") {
			t.Errorf("the copy is\n%s", out)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// Without nft, a rule is shown by its handle.
func TestWithoutNft(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, `table inet f { chain c { type filter hook input priority 0; tcp dport 80 drop comment "no"; }; }`)
	c := open(t, 80)
	c.texts = map[nftset.Table]map[uint64]string{}
	if got := c.decides(t, client4, 80); got != `drop inet f c: rule with handle 2` {
		t.Error(got)
	}
}

func TestErrors(t *testing.T) {
	nstest.New(t)
	nstest.NewPeer(t)
	if _, err := Open([]netip.Prefix{netip.PrefixFrom(nstest.ServerIPv4, 32)}, nil); !errors.Is(err, ErrOwn) {
		t.Errorf("its own address: %v", err)
	}
	c := open(t, 80)
	if _, _, err := c.Dial(netip.MustParseAddr("203.0.113.1"), 80); err == nil {
		t.Error("an address that is none of the sources")
	}
}
