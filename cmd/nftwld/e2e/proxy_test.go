package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"net/textproto"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// A proxy that accepts any password reports a success for each, before it asks the
// backend. Such a report trusts nothing, and wrong passwords do not count. If the
// proxy checks the password and the administrator confirms it (nftwl_trust=yes), the
// proxy's reports trust and ban. If only the backend checks, the backend reports the
// client's address to the proxy's nftwld, provided that the backend lists the proxy
// in login_trusted_networks.
func TestProxy(t *testing.T) {
	t.Parallel()
	const believe = "login_trusted_networks = " + server4 + "\n"
	eachSystem(t, func(t *testing.T, d system) {
		for name, c := range map[string]struct {
			field   string // of the proxy's passdb
			backend string // its settings
			works   bool
			reports [2]string // successes and failures
		}{
			"any password":    {"nopassword=y", believe + "auth_policy_server_url =\n", false, [2]string{"4", "0"}},
			"verified":        {"nftwl_trust=yes", believe + "auth_policy_server_url =\n", true, [2]string{"1", "3"}},
			"backend reports": {"nopassword=y", believe, true, [2]string{"5", "3"}},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				fields := []string{"proxy=y", "host=" + backend4, c.field}
				check := c.field != "nopassword=y"
				passdb := "passdb static {\n  fields {\n    " + strings.Join(fields, "\n    ") + "\n  }\n"
				if check {
					passdb += "  password = " + password + "\n"
				}
				passdb += "}\n" + static24
				if d.is23 {
					if check {
						fields = append(fields, "password={PLAIN}"+password)
					}
					passdb = "passdb {\n  driver = static\n  args = " + strings.Join(fields, " ") + "\n}\n" + static23
				}
				s := d.start(t, with{config: "failures: {limit: 3}\n", passdb: passdb,
					dovecot: "listen = " + server4 + "\nlogin_source_ips = " + server4 + "\n"})
				s.startBackend(c.backend)
				if err := login("192.0.2.7", "alice", password); err != nil {
					t.Errorf("the right password: %v", err)
				}
				tryAll(t, "192.0.2.8", different(3))
				s.reported(`protocol="imap",result="success"`, c.reports[0])
				s.reported(`protocol="imap",result="failure"`, c.reports[1])
				if c.works {
					nstest.Poll(s.t, "the trust", func() bool { return s.in("trusted_ipv4", `192.0.2.7 \. 143 .*comment "alice"`) })
					nstest.Poll(s.t, "the ban", func() bool { return s.in("banned_ipv4", `192.0.2.8 \. 143 `) })
				} else if n := s.metric(`nftwl_ignored_total{reason="unverified"}`); n != "4" {
					t.Errorf("%s successes are ignored", n)
				}
				if !c.works && s.in("trusted_ipv4", "192.0.2.7 ") || s.in("trusted_ipv4", "192.0.2.8 ") || s.in("trusted_ipv4", server4) {
					t.Error("somebody else is trusted")
				}
				if !c.works && s.in("banned_ipv4", "192.0.2.8 ") || s.in("banned_ipv4", "192.0.2.7 ") || s.in("banned_ipv4", server4) {
					t.Error("somebody else is banned")
				}
			})
		}
	})
}

// balancer is a load balancer with the PROXY protocol.
const balancer = "192.0.2.250"

// dialProxied connects as the balancer would for a client.
func dialProxied(version int, from, port string) (*textproto.Conn, error) {
	c, err := dial(balancer, port)
	if err != nil {
		return nil, err
	}
	client, server := netip.MustParseAddr(from), netip.MustParseAddr(server4)
	family, name := byte(1), "TCP4"
	if client.Is6() {
		server, family, name = netip.MustParseAddr(server6), 2, "TCP6"
	}
	// The two headers of doc/proxy-protocol.txt in HAProxy's source.
	header := fmt.Appendf(nil, "PROXY %s %s %s 4242 143\r\n", name, client, server)
	if version == 2 {
		addresses := append(client.AsSlice(), server.AsSlice()...)
		header = append([]byte("\r\n\r\n\x00\r\nQUIT\n"), 0x21, family<<4|1)
		header = binary.BigEndian.AppendUint16(header, uint16(len(addresses)+4))
		header = append(header, addresses...)
		header = binary.BigEndian.AppendUint16(header, 4242)
		header = binary.BigEndian.AppendUint16(header, 143)
	}
	if _, err := c.W.Write(header); err != nil {
		return nil, err
	}
	return c, c.W.Flush()
}

// Behind a balancer with the PROXY protocol, Dovecot reports the client's address.
// It refuses the client itself, because the firewall sees only the balancer.
func TestPROXYProtocol(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{config: "failures: {limit: 3}\n", dovecot: `
auth_policy_check_before_auth = yes
haproxy_trusted_networks = ` + balancer + `
service imap-login {
  inet_listener proxied {
    port = 10143
    haproxy = yes
  }
}
`})
		for version, c := range map[int]struct{ guesser, user, stranger, set string }{
			1: {"192.0.2.7", "192.0.2.8", "192.0.2.9", "ipv4"},
			2: {"2001:db8:7::7", "2001:db8:8::8", "2001:db8:9::9", "ipv6"},
		} {
			try := func(from, password string) error {
				t.Helper()
				c, err := dialProxied(version, from, "10143")
				nstest.Must(t, err)
				return imap(c, "PLAIN", "alice", password)
			}
			tryOver(t, func() (*textproto.Conn, error) { return dialProxied(version, c.guesser, "10143") }, different(3))
			nstest.Poll(s.t, "the ban of "+c.guesser, func() bool { return s.in("banned_"+c.set, c.guesser+` \. 143 `) })
			if err := try(c.guesser, password); !errors.Is(err, nstest.ErrDenied) {
				t.Errorf("v%d: a banned address with the right password: %v", version, err)
			}
			if err := try(c.user, password); err != nil {
				t.Errorf("v%d: %v", version, err)
			}
			nstest.Poll(s.t, "the trust of "+c.user, func() bool { return s.in("trusted_"+c.set, c.user+` \. 143 `) })
			nstest.Nft(t, fmt.Sprintf("add element inet filter banned_%s { %s . 143 }", c.set, c.user))
			if err := try(c.user, password); err != nil {
				t.Errorf("v%d: trusted and banned: %v", version, err)
			}
			if err := try(c.stranger, password); err != nil {
				t.Errorf("v%d: an unknown address: %v", version, err)
			}
			if s.in("trusted_"+c.set, c.guesser+" ") {
				t.Errorf("v%d: a banned address is trusted", version)
			}
		}
		if s.in("trusted_ipv4", balancer) || s.in("banned_ipv4", balancer) {
			t.Error("the balancer is in a set")
		}
	})
}
