// Package trust decides, from what Dovecot says of a login, whom the firewall
// is to trust, for how long and under which comment, and has the kernel do
// it. Every way by which a login comes in shares it.
package trust

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// Login is what Dovecot says of a login. All of it comes from outside: the
// address from the client or a proxy, the rest from the user database.
type Login struct {
	IP      string // empty where the client came over a Unix socket
	LocalIP string // the server's own address; empty where unknown
	User    string
	Trust   string // nftwl_trust of the user: "no" to trust nobody; empty for yes
	Timeout string // nftwl_timeout of the user; empty for the configured one
}

// Grant is a decision to trust.
type Grant struct {
	Addr    netip.Addr    // as it stands in the sets
	Timeout time.Duration // more than 0
	Comment string        // empty for none
}

// Decide returns the grant that a login earns, or nil where it earns none and
// all is well. With a grant it can return an error too, for what it had to
// pass over.
func Decide(c *config.Config, l Login) (*Grant, error) {
	if l.IP == "" {
		return nil, nil
	}
	addr, err := ParseAddr(l.IP)
	if err != nil {
		return nil, fmt.Errorf("IP: %w", err)
	}
	if Refuse(c, addr) != nil {
		return nil, nil
	}
	// A client at the server's own address is webmail, or a proxy that does
	// not forward: whoever uses it would be trusted with everybody else. The
	// same holds where the client's network has the server's address in it.
	if local, err := ParseAddr(l.LocalIP); err == nil && NetworkOf(addr, c.IPv6Prefix).Contains(local) {
		return nil, nil
	}
	switch l.Trust {
	case "", "yes", "true", "1":
	case "no", "false", "0":
		return nil, nil
	default:
		return nil, fmt.Errorf("nftwl_trust: %s is neither yes nor no, so the address is not trusted", Quote(l.Trust))
	}
	g := &Grant{Addr: Network(c, addr), Timeout: c.Timeout}
	if c.Comment {
		g.Comment = nftset.CleanComment(l.User)
	}
	if l.Timeout != "" {
		t, err := nftset.ParseTimeout(l.Timeout)
		if err != nil {
			return g, fmt.Errorf("nftwl_timeout: %w; trusting for %s", err, nftset.FormatTimeout(c.Timeout))
		}
		g.Timeout = t
	}
	return g, nil
}

// Apply has the kernel trust the addresses of grants, which are of one family,
// for every configured port: in one transaction, or none where all are trusted
// for long enough already. It returns what became of each grant: Added where
// its address was not trusted on each port, else Renewed where it was to be
// trusted for longer.
func Apply(conn *nftset.Conn, c *config.Config, grants ...*Grant) ([]nftset.Outcome, error) {
	set, err := conn.Set(c.Table, c.Trusted.For(grants[0].Addr))
	if err != nil {
		return nil, err
	}
	// A mail client opens several connections in the same moment; the first
	// of them renews.
	slack := time.Second
	var elems []nftset.Element
	for _, g := range grants {
		slack = min(slack, g.Timeout/100)
		elems = append(elems, Elements(set, g.Addr, c.Ports, nftset.Element{Timeout: g.Timeout, Comment: g.Comment})...)
	}
	of, err := conn.Extend(set, elems, slack, AddName)
	if err != nil {
		return nil, err
	}
	outcomes := make([]nftset.Outcome, len(grants))
	each := len(elems) / len(grants)
	for i := range grants {
		part := of[i*each : (i+1)*each]
		switch {
		case slices.Contains(part, nftset.Added):
			outcomes[i] = nftset.Added
		case slices.Contains(part, nftset.Renewed):
			outcomes[i] = nftset.Renewed
		}
	}
	return outcomes, nil
}

// names separates the users in the comment of a trusted address that several
// log in from.
const names = ", "

// AddName adds a user to the comment of an address that others log in from, too.
// The first of them are left out where the comment would become too long.
func AddName(comment, user string) string {
	if user == "" || HasName(comment, user) {
		return comment
	}
	all := user
	for _, name := range strings.Split(comment, names) {
		if name != "" && len(all)+len(names)+len(name) <= nftset.MaxComment {
			all += names + name
		}
	}
	return all
}

// HasName tells whether a comment is the text, or names it as one of several
// users.
func HasName(comment, text string) bool {
	return strings.Contains(names+comment+names, names+text+names)
}

// Elements returns e for an address and every port, or once where the set's
// keys have no port.
func Elements(set *nftset.Set, addr netip.Addr, ports []uint16, e nftset.Element) []nftset.Element {
	var elems []nftset.Element
	for _, key := range Keys(set, addr, ports) {
		e.Key = key
		elems = append(elems, e)
	}
	return elems
}

// Keys returns the keys of an address in a set: one a port, or one where the
// set's keys have no port.
func Keys(set *nftset.Set, addr netip.Addr, ports []uint16) []nftset.Key {
	if !set.Key.Port {
		return []nftset.Key{{Addr: addr}}
	}
	keys := make([]nftset.Key, len(ports))
	for i, port := range ports {
		keys[i] = nftset.Key{Addr: addr, Port: port}
	}
	return keys
}

// CheckPorts returns an error if some ports are asked for, and the set's keys have
// none: a change would be one on every port.
func CheckPorts(set *nftset.Set, ports []uint16) error {
	if len(ports) > 0 && !set.Key.Port {
		return fmt.Errorf("set %s has addresses without ports, and cannot take some ports alone", set.Name)
	}
	return nil
}

// LookupKeys returns the keys by which the rules look an address up in a set: its
// own and, where they look up networks of so many bits, then those of its
// network.
func LookupKeys(set *nftset.Set, addr netip.Addr, bits int, ports []uint16) []nftset.Key {
	keys := Keys(set, addr, ports)
	if network := NetworkOf(addr, bits).Addr(); network != addr {
		keys = append(keys, Keys(set, network, ports)...)
	}
	return keys
}

// Find looks an address up as the rules do that look up networks of so many bits:
// as itself and as its network. For each port it returns the element that expires
// last, or the port among those that are missing.
func Find(conn *nftset.Conn, set *nftset.Set, addr netip.Addr, bits int, ports []uint16) (there []nftset.Element, missing []uint16, err error) {
	keys := LookupKeys(set, addr, bits, ports)
	found, err := conn.Lookup(set, keys...)
	if err != nil {
		return nil, nil, err
	}
	n := len(Keys(set, addr, ports))
	for i, k := range keys[:n] {
		e, ok := found[k]
		if of, too := found[keys[len(keys)-n+i]]; too && (!ok || of.Outlives(e, 0)) {
			e, ok = of, true
		}
		if ok {
			there = append(there, e)
		} else {
			missing = append(missing, k.Port)
		}
	}
	return there, missing, nil
}

// ParseAddr reads a client's address. An IPv4-mapped one is IPv4; a zone,
// which no set can hold, is dropped.
func ParseAddr(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return addr, fmt.Errorf("%s is not an IP address", Quote(s))
	}
	return addr.Unmap().WithZone(""), nil
}

// ParseElement reads an address, or a network of so many bits, which it returns as
// the address of the element that stands for it.
func ParseElement(s string, bits int) (netip.Addr, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return ParseAddr(s)
	}
	switch {
	case p.Addr().Is4() || bits == 128:
		err = fmt.Errorf("%s is a prefix; the sets hold single addresses", s)
	case p.Bits() != bits:
		err = fmt.Errorf("%s is a prefix; the sets hold single addresses and networks of /%d", s, bits)
	case p != p.Masked():
		err = fmt.Errorf("%s has bits set past its length; did you mean %s?", s, p.Masked())
	}
	return p.Addr(), err
}

// Name is the address of an element, or the network of so many bits that the rules
// take it for.
func Name(addr netip.Addr, bits int) string {
	if n := NetworkOf(addr, bits); n.IsValid() && n.Addr() == addr && !n.IsSingleIP() {
		return n.String()
	}
	return nftset.Key{Addr: addr}.String()
}

// Refuse says why an address must not be trusted, or returns nil.
func Refuse(c *config.Config, addr netip.Addr) error { return refuse(c, addr, c.IPv6Prefix) }

// RefuseBan says why an address must not be banned, or returns nil.
func RefuseBan(c *config.Config, addr netip.Addr) error { return refuse(c, addr, BanPrefix(c)) }

// BanPrefix is how many bits the networks have that the firewall's rules look up
// in the banned and the limited sets, besides addresses. Those that it looks up
// in the trusted sets have c.IPv6Prefix. See nftwl_ipv6_network in
// contrib/nftables.
func BanPrefix(c *config.Config) int {
	if c.IPv6Prefix == 128 {
		return 64
	}
	return c.IPv6Prefix
}

// refuse is Refuse for sets in which the rules look up networks of so many bits.
func refuse(c *config.Config, addr netip.Addr, bits int) error {
	switch {
	case addr.IsUnspecified():
		return fmt.Errorf("%s is the unspecified address", addr)
	case addr.IsMulticast():
		return fmt.Errorf("%s is a multicast address", addr)
	case addr == broadcast:
		return fmt.Errorf("%s is the broadcast address", addr)
	}
	network := NetworkOf(addr, c.IPv6Prefix)
	// The rule that masks an address takes this one for the whole network.
	if cut, _ := addr.Prefix(bits); addr.Is6() && addr == cut.Addr() {
		if network = NetworkOf(addr, bits); network != cut {
			return fmt.Errorf("%s stands for all of %s, which has NAT64 addresses in it", addr, cut)
		}
	}
	for _, prefix := range c.Ignore {
		switch {
		case prefix.Contains(addr):
			return fmt.Errorf("%s is in %s, which the configuration ignores", addr, prefix)
		case prefix.Overlaps(network):
			return fmt.Errorf("the network of %s, %s, has %s in it, which the configuration ignores", addr, network, prefix)
		}
	}
	return nil
}

// broadcast is the limited broadcast address (RFC 919).
var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// nat64 are the prefixes behind which an IPv6 address has an IPv4 address in
// it: the well-known one (RFC 6052) and the one for local use (RFC 8215).
var nat64 = []netip.Prefix{
	netip.MustParsePrefix("64:ff9b::/96"),
	netip.MustParsePrefix("64:ff9b:1::/48"),
}

// NetworkOf returns the network of so many bits that an IPv6 address is in, or the
// address alone: where it is IPv4, and where the network has NAT64 addresses in
// it, because that is not one client's: it can be all of IPv4.
func NetworkOf(addr netip.Addr, bits int) netip.Prefix {
	single := netip.PrefixFrom(addr, addr.BitLen())
	if addr.Is4() {
		return single
	}
	prefix, _ := addr.Prefix(bits) // fails only for bits out of range
	if slices.ContainsFunc(nat64, prefix.Overlaps) {
		return single
	}
	return prefix
}

// Network returns the address that stands for the client in the sets: itself,
// or the first address of its network where the configuration has a shorter
// ipv6_prefix. A NAT64 address stands for itself.
func Network(c *config.Config, addr netip.Addr) netip.Addr {
	return NetworkOf(addr, c.IPv6Prefix).Addr()
}

// Quote makes a value from outside fit for a line of a log.
func Quote(s string) string {
	const most = 60
	if len(s) > most {
		return fmt.Sprintf("%q…", s[:most])
	}
	return fmt.Sprintf("%q", s)
}
