package nftables_test

import (
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"nftwl/pkg/nstest"
)

// A mail server in a container, whose ports the host publishes. When the host
// forwards a packet to it, the packet has the container's address and port. The peer
// is both the container and the internet, so packets that come back to it need the
// host's address as their source.
func TestContainer(t *testing.T) {
	elsewhere := map[string]netip.AddrPort{
		"ipv4": netip.MustParseAddrPort("10.9.9.9:587"),
		"ipv6": netip.MustParseAddrPort("[2001:db8:c::9]:587"),
	}
	for _, v := range nftVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			s := &mailserver{firewall: install(t, layouts[1], v.root(t),
				edit{"\t\ttype filter hook input priority filter - 10; policy accept;\n", ""},
				uncomment("type filter hook prerouting priority dstnat - 10; policy accept;"),
				uncomment("fib daddr type != local accept"),
				edit{"nftwl_submission_ports = { 465, 587 }", "nftwl_submission_ports = { 465, 587, 1465 }"})}
			s.up()
			s.internet = nstest.NewPeer(t, "198.51.100.0/24", "203.0.113.0/24", "2001:db8:a::/48", "2001:db8:b::/48")
			for _, name := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
				if err := os.WriteFile("/proc/sys/net/"+name, []byte("1"), 0); err != nil {
					t.Fatal(err)
				}
			}
			nstest.Nft(t, `table inet container {
				chain prerouting {
					type nat hook prerouting priority dstnat; policy accept;
					ip daddr 192.0.2.1 tcp dport 587 dnat ip to 192.0.2.2:1587
					ip6 daddr 2001:db8::1 tcp dport 587 dnat ip6 to [2001:db8::2]:1587
					ip daddr 192.0.2.1 tcp dport 1465 dnat ip to 192.0.2.2:465
					ip6 daddr 2001:db8::1 tcp dport 1465 dnat ip6 to [2001:db8::2]:465
				}
				chain postrouting {
					type nat hook postrouting priority srcnat; policy accept;
					ct status dnat masquerade
				}
			}`)
			ip := nstest.Need(t, "ip", "iproute2")
			s.internet.Echo(t, 1587)
			s.internet.Echo(t, 465)
			s.internet.Do(func() {
				for _, via := range [][]string{{"10.9.9.9", "192.0.2.1"}, {"2001:db8:c::9", "2001:db8::1"}} {
					if out, err := exec.Command(ip, "route", "add", via[0], "via", via[1]).CombinedOutput(); err != nil {
						t.Errorf("ip route: %v: %s", err, out)
					}
				}
			})

			for _, clients := range families {
				s.trust(clients.user, 128, "1h")
				s.pass(clients.user, 587, 2*burst5)

				// The limit does not count a container's connections to another server's
				// submission port.
				for range burst5 + 1 {
					if conn, err := s.internet.Dial(clients.stranger, elsewhere[clients.name], never); err == nil {
						conn.Close()
						t.Fatalf("there is a server at %s", elsewhere[clients.name])
					}
				}
				if s.has("limited", clients.source, 587) {
					t.Errorf("%s is limited for connections to another server", clients.stranger)
				}

				for _, port := range []int{587, 1465} {
					held := s.open(clients.stranger, port)
					s.pass(clients.stranger, port, burst5-1)
					s.refuse(clients.stranger, port)
					s.drop(clients.stranger, port)
					if !s.has("limited", clients.source, port) {
						t.Errorf("%s is not limited on the published port", clients.stranger)
					}
					for range 2 * burst5 {
						s.alive(held)
					}
				}
			}
		})
	}
}
