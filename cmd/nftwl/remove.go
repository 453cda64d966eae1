package main

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/spf13/cobra"

	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

// newRemove is remove and unban.
func newRemove(configPath *string, l list) *cobra.Command {
	var ports portsFlag
	var comment string
	cmd := &cobra.Command{
		Use:   "remove ADDRESS…",
		Short: "End the trust of addresses",
		Long: `Ends the trust of addresses: removes them from the trusted sets, on every
configured port or on those of --port. Unknown addresses are reported, but are
not an error. Open connections stay open, and the next login trusts the address
again, unless the user database has nftwl_trust=no.` + addressesHelp,
		Example: `  nftwl remove 192.0.2.7
  nftwl remove --port 143 192.0.2.7 2001:db8::7`,
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		meaning := nftset.Decided
		var match func(nftset.Element) bool
		if cmd.Flags().Changed("comment") {
			meaning = nftset.DecidedFor
			match = func(e nftset.Element) bool { return trust.HasName(e.Comment, comment) }
		}
		return withSession(configPath, meaning, func(s *session, args []string) error {
			defer s.noteUnshared()
			return s.change(l, args, nil, func(set *nftset.Set, addrs []netip.Addr) error {
				return s.remove(l, set, addrs, ports, match)
			})
		})(cmd, args)
	}
	if l == banned {
		cmd.Use, cmd.Short = "unban ADDRESS…", "End the ban of addresses"
		cmd.Long = `Ends the ban of addresses: removes them from the banned sets, on every
configured port or on those of --port, and from what the limit of the shipped
rules bans. Unknown addresses are reported, but are not an error.

--comment removes only bans with that comment, so that one tool's unban leaves
another's ban alone. fail2ban's bans on ports that are not configured end with
--port, or with 'fail2ban-client unban'.` + addressesHelp
		cmd.Example = `  nftwl unban 198.51.100.66
  nftwl unban --comment postfix-sasl 198.51.100.66`
	}
	cmd.Flags().VarP(&ports, "port", "", portHelp)
	cmd.Flags().StringVar(&comment, "comment", "", "only elements whose comment is `TEXT`, or names that user")
	return cmd
}

func (s *session) remove(l list, set *nftset.Set, addrs []netip.Addr, only portsFlag, match func(nftset.Element) bool) error {
	if err := trust.CheckPorts(set, only); err != nil {
		return err
	}
	ports := only.or(s.Ports)
	var keys []nftset.Key
	for _, addr := range addrs {
		keys = append(keys, trust.LookupKeys(set, addr, s.IPv6Prefix, ports)...)
	}
	gone := make(map[netip.Addr]list) // the list that an address was on
	for some := range slices.Chunk(keys, atOnce) {
		s.conn.SetTimeout(patience)
		removed, err := s.conn.Remove(set, some, match)
		if err != nil {
			return err
		}
		for _, e := range removed {
			gone[e.Addr] = l
		}
	}
	var err error
	if l == banned && match == nil {
		var freed []nftset.Element
		s.conn.SetTimeout(patience)
		freed, err = trust.Unlimit(s.conn, s.Config, addrs, only)
		for _, e := range freed {
			gone[e.Addr] = cmp.Or(gone[e.Addr], limited)
		}
	}
	how := ""
	if len(only) > 0 {
		how = " on " + joinPorts(only)
	}
	if match != nil {
		how += " with that comment"
	}
	for _, addr := range addrs {
		network := trust.NetworkOf(addr, l.prefix(s.Config)).Addr()
		switch from := gone[network]; {
		case from != "" && network != addr:
			printNote("%s was %s with its network %s", addr, from, from.name(s.Config, network))
		case gone[addr] == "":
			printNote("%s was not %s%s", l.name(s.Config, addr), l, how)
		}
		if network != addr && network != trust.Network(s.Config, addr) {
			// The set has just been read, so this hardly fails; then there is no note.
			if found, err := s.conn.Lookup(set, trust.Keys(set, network, ports)...); err == nil && len(found) > 0 {
				printNote("its network is %s: nftwl unban %s", l, l.name(s.Config, network))
			}
		}
	}
	return err
}
