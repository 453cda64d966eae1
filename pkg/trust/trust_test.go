package trust

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// What a login earns is tried with the real binary in cmd/nftwl; here is what
// only a configuration changes.
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
		// Nor is a network trusted that has an ignored address in it.
		{Login{IP: "2001:db8:0:3::9"}, "", 0},
		// The server's own network is not the server.
		{Login{IP: "2001:db8:0:2::7", LocalIP: "2001:db8:0:2::1"}, "2001:db8:0:2::", time.Hour},
		{Login{IP: "2001:db8:0:2::1", LocalIP: "2001:db8:0:2::1"}, "", 0},
		// Loopback is only ignored where the configuration says so.
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

// Nothing that comes in is trusted but an address that may be, and what is
// said of it is one line that fits a log.
func FuzzDecide(f *testing.F) {
	f.Add("192.0.2.7", "203.0.113.1", "alice", "", "")
	f.Add("::ffff:127.0.0.1", "", "a\"b\n", "no", "1d")
	f.Add("fe80::1%eth0", "::", "\xff", "yes", "0s")
	f.Fuzz(func(t *testing.T, ip, local, user, wanted, timeout string) {
		c := config.Default()
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
		if g.Timeout <= 0 || nftset.CheckComment(g.Comment) != nil {
			t.Errorf("%+v", g)
		}
	})
}
