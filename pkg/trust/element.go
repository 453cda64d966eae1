package trust

import (
	"fmt"
	"net/netip"
	"slices"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// Which elements stand for an address in the sets, and which of them the rules
// look up.

// nat64 are the prefixes of IPv6 addresses with an IPv4 address in them: the
// well-known one (RFC 6052) and the one for local use (RFC 8215).
var nat64 = []netip.Prefix{
	netip.MustParsePrefix("64:ff9b::/96"),
	netip.MustParsePrefix("64:ff9b:1::/48"),
}

// NetworkOf returns the network of that length that contains an IPv6 address. For
// IPv4, and for a network that contains NAT64 addresses (it could be all of IPv4),
// it returns the address alone.
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

// Network returns the address that stands for a client in the sets: the first one
// of its network of ipv6_prefix; see NetworkOf.
func Network(c *config.Config, addr netip.Addr) netip.Addr {
	return NetworkOf(addr, c.IPv6Prefix).Addr()
}

// BanPrefix returns the bits of the networks that the rules look up in the banned
// and limited sets, besides addresses; see nftwl_ipv6_network in contrib/nftables.
// Networks in the trusted sets have c.IPv6Prefix.
func BanPrefix(c *config.Config) int {
	if c.IPv6Prefix == 128 {
		return 64
	}
	return c.IPv6Prefix
}

// ParseElement reads an address, or a network of that many bits, and returns the
// address that stands for it in the sets.
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

// Name returns the address of an element, or the network of that many bits if the
// address stands for one.
func Name(addr netip.Addr, bits int) string {
	if n := NetworkOf(addr, bits); n.IsValid() && n.Addr() == addr && !n.IsSingleIP() {
		return n.String()
	}
	return nftset.Key{Addr: addr}.String()
}

// Elements returns e for an address and each port, or once if the set's keys have
// no port.
func Elements(set *nftset.Set, addr netip.Addr, ports []uint16, e nftset.Element) []nftset.Element {
	var elems []nftset.Element
	for _, key := range Keys(set, addr, ports) {
		e.Key = key
		elems = append(elems, e)
	}
	return elems
}

// Keys returns the keys of an address in a set: one for each port, or one if the
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

// CheckPorts returns an error if there are ports and the set's keys have none: the
// change would be for every port.
func CheckPorts(set *nftset.Set, ports []uint16) error {
	if len(ports) > 0 && !set.Key.Port {
		return fmt.Errorf("set %s has addresses without ports, and cannot take some ports alone", set.Name)
	}
	return nil
}

// LookupKeys returns the keys with which rules that look up networks of that many
// bits find an address: its own, then those of its network, unless that is the
// address.
func LookupKeys(set *nftset.Set, addr netip.Addr, bits int, ports []uint16) []nftset.Key {
	keys := Keys(set, addr, ports)
	if network := NetworkOf(addr, bits).Addr(); network != addr {
		keys = append(keys, Keys(set, network, ports)...)
	}
	return keys
}

// Find looks up an address by its LookupKeys. For each port, it returns either the
// element that expires last, or the port as missing.
func Find(conn *nftset.Conn, set *nftset.Set, addr netip.Addr, bits int, ports []uint16) (there []nftset.Element, missing []uint16, err error) {
	keys := LookupKeys(set, addr, bits, ports)
	found, err := conn.Lookup(set, keys...)
	if err != nil {
		return nil, nil, err
	}
	own := Keys(set, addr, ports)
	network := keys[len(keys)-len(own):]
	for i, k := range own {
		e, ok := found[k]
		if of, too := found[network[i]]; too && (!ok || of.Outlives(e, 0)) {
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
