package main

import (
	"net/netip"
	"slices"

	"github.com/spf13/cobra"

	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

// newAdd is add and ban.
func newAdd(configPath *string, l list) *cobra.Command {
	var ports portsFlag
	var e nftset.Element
	timed := false
	cmd := &cobra.Command{
		Use:   "add ADDRESS…",
		Short: "Trust addresses",
		Long: `Trusts addresses, as a login does: adds them to the trusted sets for the
configured ports and timeout. An address already trusted for longer is left
alone and reported. Addresses that the configuration ignores, such as loopback,
are refused.` + addressesHelp,
		Example: `  nftwl add 192.0.2.7 2001:db8::7
  nftwl add --timeout never --comment 'the office' 203.0.113.5
  nftwl add --port 465,587 --timeout 12h - <addresses.txt`,
		RunE: withSession(configPath, nftset.Decided, func(s *session, args []string) error {
			refuse, timeout := trust.RefuseBan, s.BanTimeout
			if l == trusted {
				refuse, timeout = trust.Refuse, s.Timeout
				if others := without(ports, s.Ports); len(others) > 0 {
					printNote("ports not configured: %s; no login renews them, and 'nftwl remove' needs --port %[1]s", joinPorts(others))
				}
			}
			if !timed {
				e.Timeout = timeout
			}
			return s.change(l, args, refuse, func(set *nftset.Set, addrs []netip.Addr) error {
				return s.add(l, set, addrs, ports, e)
			})
		}),
	}
	if l == banned {
		cmd.Use, cmd.Short = "ban ADDRESS…", "Ban addresses"
		cmd.Long = `Bans addresses: adds them to the banned sets for the configured ports and
ban_timeout. An address already banned for longer is left alone and reported.
Addresses that the configuration ignores are refused. It warns if an address is
trusted, because the firewall then lets it in anyway.

2001:db8:1:2::/64 bans an IPv6 network.` + addressesHelp
		cmd.Example = `  nftwl ban 198.51.100.66
  nftwl ban --timeout 7d --comment 'password guessing' 198.51.100.66`
	}
	cmd.Flags().VarP(&ports, "port", "", portHelp)
	cmd.Flags().Func("timeout", "for this `TIMEOUT`, such as 1d12h, 90m or 30s, or never to end", func(text string) (err error) {
		timed = true
		e.Timeout = 0
		if text != "never" {
			e.Timeout, err = nftset.ParseTimeout(text)
		}
		return err
	})
	cmd.Flags().Func("comment", "note a `TEXT` on the elements", func(text string) error {
		e.Comment = text
		return nftset.CheckComment(text)
	})
	return cmd
}

func (s *session) add(l list, set *nftset.Set, addrs []netip.Addr, only portsFlag, e nftset.Element) error {
	if err := trust.CheckPorts(set, only); err != nil {
		return err
	}
	ports := only.or(s.Ports)
	var elems []nftset.Element
	for _, addr := range addrs {
		elems = append(elems, trust.Elements(set, trust.Network(s.Config, addr), ports, e)...)
	}
	unchanged := make(map[netip.Addr]bool)
	for some := range slices.Chunk(elems, atOnce) {
		s.conn.SetTimeout(patience)
		outcomes, err := s.conn.Extend(set, some, 0, nil)
		if err != nil {
			return err
		}
		for i, o := range outcomes {
			if addr := some[i].Addr; o == nftset.Unchanged && !unchanged[addr] {
				unchanged[addr] = true
				printNote("%s is unchanged: already %s for at least as long", l.name(s.Config, addr), l)
			}
		}
	}
	if l == banned {
		s.noteTrusted(addrs, ports)
	}
	return nil
}

// noteTrusted prints which banned addresses the firewall accepts anyway,
// because the trusted come first, and on which of the ports.
func (s *session) noteTrusted(addrs []netip.Addr, ports []uint16) {
	set, err := s.conn.Set(s.Table, s.Trusted.For(addrs[0]))
	if err != nil {
		return // the ban was all that was asked for
	}
	for _, addr := range addrs {
		s.conn.SetTimeout(patience)
		there, missing, err := trust.Find(s.conn, set, addr, s.IPv6Prefix, ports)
		if err != nil {
			return
		}
		on, flag := "", ""
		if len(missing) > 0 {
			rest := joinPorts(without(ports, missing))
			on, flag = " on "+rest, " --port "+rest
		}
		if len(there) > 0 {
			printNote("%s is trusted too%s, which comes first; nftwl remove%s ends that", trusted.name(s.Config, addr), on, flag)
		}
	}
}
