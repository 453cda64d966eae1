// Package trust decides from a login that Dovecot reports which address the
// firewall trusts, for how long and with which comment, and writes that to the
// sets. It also knows which elements stand for an address.
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

// Login is what Dovecot reports of a login. All of it comes from outside: the
// address from the client or a proxy, the rest from the user database.
type Login struct {
	IP      string // empty if the client came over a Unix socket
	LocalIP string // the server's own address; empty if unknown
	User    string
	Trust   string // nftwl_trust of the user: "no" not to trust; empty for yes
	Timeout string // nftwl_timeout of the user; empty for the configured one
}

// Grant is a decision to trust.
type Grant struct {
	Addr    netip.Addr    // as it stands in the sets
	Timeout time.Duration // more than 0
	Comment string        // empty for none
}

// Decide returns the grant that a login earns. Without a grant and an error, it
// earns none. With both, the error is about a value that was ignored.
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
	// A client with the server's own address is webmail, or a proxy that does not
	// forward the client's address: to trust it is to trust everyone behind it. The
	// same goes for a network that has the server's address in it.
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

// Apply trusts the addresses of grants on every configured port, in one
// transaction, or in none if all are trusted for long enough already. The addresses
// differ and are of one family. It returns an outcome for each grant: Added if its
// address was missing on a port, else Renewed if it was renewed on one.
func Apply(conn *nftset.Conn, c *config.Config, grants ...*Grant) ([]nftset.Outcome, error) {
	set, err := conn.Set(c.Table, c.Trusted.For(grants[0].Addr))
	if err != nil {
		return nil, err
	}
	// A mail client opens several connections at once; the first of them renews.
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

// names separates users in the comment of an address that several log in from.
const names = ", "

// AddName adds a user to the front of an address's comment. If it becomes too
// long, it loses the names that do not fit.
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

// HasName reports whether a comment is the text, or names it as one of several
// users.
func HasName(comment, text string) bool {
	return strings.Contains(names+comment+names, names+text+names)
}

// ParseAddr reads a client's address. An IPv4-mapped one becomes IPv4, and a zone
// is left out, because no set can hold it.
func ParseAddr(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return addr, fmt.Errorf("%s is not an IP address", Quote(s))
	}
	return addr.Unmap().WithZone(""), nil
}

// Refuse returns why an address must not be trusted, or nil.
func Refuse(c *config.Config, addr netip.Addr) error { return refuse(c, addr, c.IPv6Prefix) }

// RefuseBan returns why an address must not be banned, or nil.
func RefuseBan(c *config.Config, addr netip.Addr) error { return refuse(c, addr, BanPrefix(c)) }

// refuse is Refuse for a set in which the rules look up networks of that many bits.
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
	// To a rule that masks addresses, this one is the whole network.
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

// Quote quotes a value from outside for a log line, and cuts it if it is long.
func Quote(s string) string {
	const most = 60
	if len(s) > most {
		return fmt.Sprintf("%q…", s[:most])
	}
	return fmt.Sprintf("%q", s)
}
