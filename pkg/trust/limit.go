package trust

import (
	"errors"
	"net/netip"
	"slices"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// rates are the sets in which the shipped rules count connections.
var rates = config.Names{IPv4: "submission_rate_ipv4", IPv6: "submission_rate_ipv6"}

// Unlimit removes addresses of one family, and their networks, from the sets of
// what the shipped rules limit, on some ports; no ports means all. It returns the
// elements that it removed: none if the rules are not the shipped ones.
func Unlimit(conn *nftset.Conn, c *config.Config, addrs []netip.Addr, ports []uint16) ([]nftset.Element, error) {
	set, err := conn.Set(c.Table, config.Limited.For(addrs[0]))
	if errors.Is(err, nftset.ErrNoSet) {
		return nil, nil
	}
	if err == nil {
		err = CheckPorts(set, ports)
	}
	if err != nil {
		return nil, err
	}
	sources := make(map[netip.Addr]bool)
	for _, addr := range addrs {
		sources[addr] = true
		sources[NetworkOf(addr, BanPrefix(c)).Addr()] = true
	}
	// Only the rules know the ports of the limit.
	elems, err := conn.Elements(set)
	if err != nil {
		return nil, err
	}
	var keys []nftset.Key
	for _, e := range elems {
		if sources[e.Addr] && (len(ports) == 0 || slices.Contains(ports, e.Port)) {
			keys = append(keys, e.Key)
		}
	}
	removed, err := conn.Remove(set, keys, nil)
	if err != nil || len(removed) == 0 {
		return nil, err
	}
	// Otherwise the next connection exceeds the limit again.
	rate, err := conn.Set(c.Table, rates.For(addrs[0]))
	if errors.Is(err, nftset.ErrNoSet) {
		return removed, nil
	}
	if err == nil {
		_, err = conn.Remove(rate, keys, nil)
	}
	return removed, err
}
