package trust

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// cmd/nftwl tests with the real binary what a login trusts. This tests what depends on
// the configuration.
func TestDecide(t *testing.T) {
	c := config.Default()
	c.IPv6Prefix = 64
	c.Timeout = time.Hour
	c.Comment = false
	c.Ignore = []netip.Prefix{netip.MustParsePrefix("2001:db8:0:1::/64"), netip.MustParsePrefix("2001:db8:0:3::5/128")}
	for _, test := range []struct {
		login   Login
		addr    string // or "" for no grant
		timeout time.Duration
	}{
		{Login{IP: "192.0.2.7", User: "alice"}, "192.0.2.7", time.Hour},
		{Login{IP: "2001:db8:0:2:3:4:5:6"}, "2001:db8:0:2::", time.Hour},
		{Login{IP: "2001:db8:0:1:3:4:5:6"}, "", 0},
		// A network with an ignored address in it is not trusted.
		{Login{IP: "2001:db8:0:3::9"}, "", 0},
		// Nor one with the server's own address, because that would trust its webmail.
		{Login{IP: "2001:db8:0:2::7", LocalIP: "2001:db8:0:2::1"}, "", 0},
		{Login{IP: "2001:db8:0:2::1", LocalIP: "2001:db8:0:2::1"}, "", 0},
		{Login{IP: "2001:db8:0:2::7", LocalIP: "2001:db8:0:4::1"}, "2001:db8:0:2::", time.Hour},
		{Login{IP: "192.0.2.7", LocalIP: "192.0.2.1"}, "192.0.2.7", time.Hour},
		// A NAT64 network is all of IPv4, or all of a private network.
		{Login{IP: "64:ff9b::192.0.2.7"}, "64:ff9b::c000:207", time.Hour},
		{Login{IP: "64:ff9b::192.0.2.7", LocalIP: "64:ff9b::192.0.2.1"}, "64:ff9b::c000:207", time.Hour},
		{Login{IP: "64:ff9b:1:c000:2:700::"}, "64:ff9b:1:c000:2:700::", time.Hour},
		{Login{IP: "64:ff9b:1:fffe::192.0.2.7"}, "64:ff9b:1:fffe::c000:207", time.Hour},
		{Login{IP: "64:ff9b:0:1::192.0.2.7"}, "64:ff9b:0:1::", time.Hour},
		{Login{IP: "64:ff9b:2::1"}, "64:ff9b:2::", time.Hour},
		// An address that the masking rule mistakes for such a network.
		{Login{IP: "64:ff9b::"}, "", 0},
		{Login{IP: "64:ff9b:1:c000::"}, "", 0}, // 192.0.0.0
		{Login{IP: "255.255.255.255"}, "", 0},
		// Loopback is ignored only if the configuration lists it.
		{Login{IP: "127.0.0.1"}, "127.0.0.1", time.Hour},
		{Login{IP: "192.0.2.7", Timeout: "10m"}, "192.0.2.7", 10 * time.Minute},
	} {
		g, err := Decide(c, test.login)
		if err != nil || (g == nil) != (test.addr == "") {
			t.Errorf("%+v: %+v, %v", test.login, g, err)
			continue
		}
		if g != nil && (g.Addr.String() != test.addr || g.Timeout != test.timeout || g.Comment != "") {
			t.Errorf("%+v: %+v", test.login, g)
		}
	}
}

// A prefix that is shorter than the NAT64 prefix contains NAT64 addresses.
func TestShortPrefixHasNAT64(t *testing.T) {
	c := config.Default()
	for bits, want := range map[int]string{16: "64:ff9b:2::9", 32: "64:ff9b:2::9", 46: "64:ff9b:2::9", 47: "64:ff9b:2::", 48: "64:ff9b:2::", 128: "64:ff9b:2::9"} {
		c.IPv6Prefix = bits
		if got := Network(c, netip.MustParseAddr("64:ff9b:2::9")); got.String() != want {
			t.Errorf("%d bits: %s, want %s", bits, got, want)
		}
	}
	c.IPv6Prefix = 128
	if g, err := Decide(c, Login{IP: "64:ff9b::"}); g == nil || err != nil {
		t.Errorf("%+v, %v", g, err)
	}
}

// With ipv6_prefix: 128, too, the rules look up networks in the banned sets: an address
// that stands for a network is banned as that network.
func TestRefuseBan(t *testing.T) {
	c := config.Default()
	c.Ignore = []netip.Prefix{netip.MustParsePrefix("2001:db8:1:203::5/128")}
	for _, test := range []struct {
		prefix  int
		addr    string
		refused bool
	}{
		{128, "2001:db8:1:203::", true},
		{128, "2001:db8:1:203::6", false},
		{128, "2001:db8:1:200::", false},
		{128, "64:ff9b::", true},
		{128, "64:ff9b::192.0.2.7", false},
		{128, "64:ff9b:1:c000::", true},
		{128, "192.0.2.0", false},
		{64, "2001:db8:1:203::6", true},
		{56, "2001:db8:1:200::", true},
		{56, "2001:db8:1:204::", true},
		{56, "2001:db8:1:300::", false},
	} {
		c.IPv6Prefix = test.prefix
		if err := RefuseBan(c, netip.MustParseAddr(test.addr)); (err != nil) != test.refused {
			t.Errorf("ipv6_prefix %d, %s: %v", test.prefix, test.addr, err)
		}
		c.IPv6Prefix = 128
		if err := Refuse(c, netip.MustParseAddr(test.addr)); err != nil {
			t.Errorf("%s is not trusted: %v", test.addr, err)
		}
	}
}

// Whatever the input is, only addresses that are allowed are trusted, and the error is one
// line that fits a log.
func FuzzDecide(f *testing.F) {
	f.Add("192.0.2.7", "203.0.113.1", "alice", "", "", uint8(128))
	f.Add("::ffff:127.0.0.1", "", "a\"b\n", "no", "1d", uint8(128))
	f.Add("fe80::1%eth0", "::", "\xff", "yes", "0s", uint8(128))
	f.Add("2001:db8::7", "2001:db8::1%eth0", "", "", "", uint8(64))
	f.Add("64:ff9b::192.0.2.7", "", "", "", "", uint8(64))
	f.Add("64:ff9b::", "", "", "", "", uint8(64))
	f.Add("64:ff9b:1:c000::", "", "", "", "", uint8(56))
	f.Add("64:ff9b:3::1", "", "", "", "", uint8(32))
	f.Add("fe00::1", "", "", "", "", uint8(7))
	f.Fuzz(func(t *testing.T, ip, local, user, wanted, timeout string, bits uint8) {
		c := config.Default()
		c.IPv6Prefix = max(1, min(int(bits), 128))
		g, err := Decide(c, Login{ip, local, user, wanted, timeout})
		if err != nil && (strings.ContainsAny(err.Error(), "\n\r\x00\x1b") || len(err.Error()) > 600) {
			t.Errorf("%q", err)
		}
		if g == nil {
			return
		}
		if !g.Addr.IsValid() || g.Addr.Is4In6() || g.Addr.Zone() != "" || Refuse(c, g.Addr) != nil {
			t.Errorf("%q is trusted as %v", ip, g.Addr)
		}
		// What the firewall's rules then trust: the address, and the network if the
		// address can stand for one.
		trusted := netip.PrefixFrom(g.Addr, g.Addr.BitLen())
		if cut, err := g.Addr.Prefix(c.IPv6Prefix); err == nil && g.Addr.Is6() && cut.Addr() == g.Addr {
			trusted = cut
		}
		if a, err := ParseAddr(ip); err != nil || !trusted.Contains(a) {
			t.Errorf("%q is not in %s", ip, trusted)
		}
		if a, err := ParseAddr(local); err == nil && trusted.Contains(a) {
			t.Errorf("%q trusts %s with the server's own address %q", ip, trusted, local)
		}
		for _, p := range c.Ignore {
			if p.Overlaps(trusted) {
				t.Errorf("%q trusts %s with %s, which is ignored", ip, trusted, p)
			}
		}
		for _, p := range []string{"64:ff9b::/96", "64:ff9b:1::/48"} {
			if netip.MustParsePrefix(p).Overlaps(trusted) && !trusted.IsSingleIP() {
				t.Errorf("%q trusts %s with NAT64 addresses of others", ip, trusted)
			}
		}
		if g.Timeout <= 0 || nftset.CheckComment(g.Comment) != nil {
			t.Errorf("%+v", g)
		}
	})
}

func TestAddName(t *testing.T) {
	long := strings.Repeat("x", nftset.MaxComment-10)
	for _, test := range []struct{ comment, user, want string }{
		{"", "alice", "alice"},
		{"alice", "alice", "alice"},
		{"alice", "bob", "bob, alice"},
		{"bob, alice", "alice", "bob, alice"},
		{"bob, alice", "carol", "carol, bob, alice"},
		{"alice", "", "alice"}, // with comment: false
		{"alice2", "alice", "alice, alice2"},
		{"alice", "bob, the builder", "bob, the builder, alice"}, // what separates names can be in one
		{"the office", "alice", "alice, the office"},
		{long, "bob", "bob, " + long},
		{long, "bob@example.org", "bob@example.org"},
		{long + ", carol", "bob", "bob, " + long},
	} {
		got := AddName(test.comment, test.user)
		if got != test.want || nftset.CheckComment(got) != nil {
			t.Errorf("%q and %q: %q, want %q", test.comment, test.user, got, test.want)
		}
		if AddName(got, test.user) != got || test.user != "" && !HasName(got, test.user) {
			t.Errorf("%q does not name %q", got, test.user)
		}
	}
	for _, text := range []string{"bob", "alice", "bob, alice"} {
		if !HasName("bob, alice", text) {
			t.Errorf("%q is not in it", text)
		}
	}
	for _, text := range []string{"ali", "b", "", ", ", "alice, bob"} {
		if HasName("bob, alice", text) {
			t.Errorf("%q is in it", text)
		}
	}
}
