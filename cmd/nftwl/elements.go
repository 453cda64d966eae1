package main

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

// list is one of those that an address can be on.
type list string

const (
	trusted list = "trusted"
	banned  list = "banned"
	limited list = "limited" // by the shipped rules
)

// allLists are the lists in the order in which they are shown.
var allLists = []list{trusted, banned, limited}

func (l list) sets(c *config.Config) config.Names {
	switch l {
	case banned:
		return c.Banned
	case limited:
		return config.Limited
	}
	return c.Trusted
}

func (l list) timeout(c *config.Config) time.Duration {
	if l == banned {
		return c.BanTimeout
	}
	return c.Timeout
}

// prefix is how many bits the IPv6 networks have that the rules look up in the
// sets of a list, besides addresses; 128 where they look up none.
func (l list) prefix(c *config.Config) int {
	if l == trusted {
		return c.IPv6Prefix
	}
	return trust.BanPrefix(c)
}

// name is the address of an element, or the network that the rules take it for.
func (l list) name(c *config.Config, addr netip.Addr) string {
	if n := trust.NetworkOf(addr, l.prefix(c)); n.IsValid() && n.Addr() == addr && !n.IsSingleIP() {
		return n.String()
	}
	return nftset.Key{Addr: addr}.String()
}

// parse reads an address, or a network that an element can stand for, which it
// returns as the address of that element.
func (l list) parse(c *config.Config, text string) (netip.Addr, error) {
	addr, notAddr := trust.ParseAddr(text)
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return addr, notAddr
	}
	bits := l.prefix(c)
	switch {
	case p.Addr().Is4() || bits == 128:
		return addr, fmt.Errorf("%s is a prefix; the sets hold single addresses", text)
	case p.Bits() != bits:
		return addr, fmt.Errorf("%s is a prefix; the sets hold single addresses and networks of /%d", text, bits)
	case p != p.Masked():
		return addr, fmt.Errorf("%s has bits set past its length; did you mean %s?", text, p.Masked())
	}
	return p.Addr(), nil
}

// refuse says why an address must not be on the list, or returns nil.
func (l list) refuse(c *config.Config, addr netip.Addr) error {
	if l == trusted {
		return trust.Refuse(c, addr)
	}
	return trust.RefuseBan(c, addr)
}

// session is what a command that talks to the kernel begins with.
type session struct {
	*config.Config
	conn *nftset.Conn
}

// patience is how long a command waits for an answer of the kernel's, and tries
// to make a change while the ruleset keeps changing.
const patience = 10 * time.Second

// atOnce is how many elements a command changes in one transaction. While users
// log in, a change of many more would never come between two logins.
const atOnce = 1000

func open(configPath string) (*session, error) {
	c, err := config.Load(configPath)
	if err != nil {
		return nil, failed(err)
	}
	conn, err := nftset.Dial()
	if err != nil {
		return nil, failed(err)
	}
	conn.SetTimeout(patience)
	return &session{c, conn}, nil
}

// byFamily gives the addresses of each family that occurs to f, with their
// set.
func (s *session) byFamily(l list, addrs []netip.Addr, f func(set *nftset.Set, addrs []netip.Addr) error) (ok bool) {
	ok = true
	for _, v6 := range []bool{false, true} {
		var some []netip.Addr
		for _, a := range addrs {
			if a.Is6() == v6 {
				some = append(some, a)
			}
		}
		if len(some) == 0 {
			continue
		}
		// From now on, because addresses may have been typed until now.
		s.conn.SetTimeout(patience)
		set, err := s.conn.Set(s.Table, l.sets(s.Config).For(some[0]))
		if err == nil {
			err = f(set, some)
		}
		if err != nil {
			printError(err)
			ok = false
		}
	}
	return ok
}

// change gives the addresses of a command's arguments to f, as byFamily does.
// What fails is said, and the rest is done.
func (s *session) change(l list, args []string, refuse bool, f func(set *nftset.Set, addrs []netip.Addr) error) error {
	addrs, ok := s.addresses(l, args, refuse)
	if done := s.byFamily(l, addrs, f); !done || !ok {
		return &status{code: exitFailed}
	}
	return nil
}

// sets describes sets of the configured table, all of which must exist.
func (s *session) sets(names ...string) ([]*nftset.Set, error) {
	var sets []*nftset.Set
	for _, name := range names {
		set, err := s.conn.Set(s.Table, name)
		if err != nil {
			return nil, failed(err)
		}
		sets = append(sets, set)
	}
	return sets, nil
}

// addresses reads the arguments of a command, of which "-" stands for the
// lines of stdin. It reports what is not an address or, with refuse, must not be
// on the list; the others count.
func (s *session) addresses(l list, args []string, refuse bool) (addrs []netip.Addr, ok bool) {
	ok = true
	seen := make(map[netip.Addr]bool)
	one := func(text string) {
		addr, err := l.parse(s.Config, text)
		if err == nil && refuse {
			err = l.refuse(s.Config, addr)
		}
		if err != nil {
			printError(err)
			ok = false
			return
		}
		if !seen[addr] {
			seen[addr] = true
			addrs = append(addrs, addr)
		}
	}
	for _, arg := range args {
		if arg != "-" {
			one(arg)
			continue
		}
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
			if line := strings.TrimSpace(lines.Text()); line != "" && !strings.HasPrefix(line, "#") {
				one(line)
			}
		}
		err := lines.Err()
		if errors.Is(err, bufio.ErrTooLong) {
			err = errors.New("a line is longer than any address")
		}
		if err != nil {
			printError(fmt.Errorf("standard input: %w", err))
			ok = false
		}
	}
	return addrs, ok
}

// portsFlag is --port, which says fewer ports than the configuration.
type portsFlag []uint16

func (p *portsFlag) Type() string   { return "PORTS" }
func (p *portsFlag) String() string { return joinPorts(*p) }

func (p *portsFlag) Set(text string) error {
	for _, s := range strings.Split(text, ",") {
		port, err := config.ParsePort(strings.TrimSpace(s))
		if err != nil {
			return err
		}
		if !slices.Contains(*p, port) {
			*p = append(*p, port)
		}
	}
	return nil
}

func (p portsFlag) or(configured []uint16) []uint16 {
	if len(p) > 0 {
		return p
	}
	return configured
}

// fits says why the flag cannot be obeyed: without ports in its keys, a set
// would take the address for all of them.
func (p portsFlag) fits(set *nftset.Set) error {
	if len(p) > 0 && !set.Key.Port {
		return fmt.Errorf("--port: set %s has addresses without ports", set.Name)
	}
	return nil
}

func joinPorts(ports []uint16) string {
	var b strings.Builder
	for i, p := range ports {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprint(&b, p)
	}
	return b.String()
}

const addressesHelp = `

An ADDRESS is IPv4 or IPv6, or a network that 'nftwl list' shows; "-" reads them
from standard input, one a line, and skips empty lines and those that begin with
#.`

const changeExit = `

Exit status: 0 when all went well, 1 when something failed (the other addresses
are done all the same), 2 when the command line was wrong.`

const portHelp = "only these `PORTS`, such as 465,587"

// newPut is add and ban.
func newPut(configPath *string, l list) *cobra.Command {
	var ports portsFlag
	var timeout, comment string
	cmd := &cobra.Command{
		Use:   "add ADDRESS…",
		Short: "Trust addresses",
		Long: `Trusts addresses, as a login does: adds them to the trusted sets for the
configured ports and timeout. An address already trusted for longer is left
alone and reported. Loopback, and what else the configuration ignores, is
refused.

--timeout takes nft's notation: 1d12h, 90m, 30s. --timeout never makes permanent
elements, which no later login and no add makes expire, and which stay until
'nftwl remove'; like every element they need a set with the flag timeout.

With --port it also trusts addresses on ports that are not configured. No login
renews that, and 'nftwl remove' needs the same --port to end it.` + addressesHelp + changeExit,
		Example: `  nftwl add 192.0.2.7 2001:db8::7
  nftwl add --timeout never --comment 'the office' 203.0.113.5
  nftwl add --port 465,587 --timeout 12h - <addresses.txt`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e := nftset.Element{Comment: comment}
			if err := nftset.CheckComment(comment); err != nil {
				return fmt.Errorf("--comment: %w", err)
			}
			if cmd.Flags().Changed("timeout") && timeout != "never" {
				var err error
				if e.Timeout, err = nftset.ParseTimeout(timeout); err != nil {
					return fmt.Errorf("--timeout: %w", err)
				}
			}
			s, err := open(*configPath)
			if err != nil {
				return err
			}
			defer s.conn.Close()
			if !cmd.Flags().Changed("timeout") {
				e.Timeout = l.timeout(s.Config)
			}
			var others portsFlag
			for _, port := range ports {
				if !slices.Contains(s.Ports, port) {
					others = append(others, port)
				}
			}
			if l == trusted && len(others) > 0 {
				printNote("ports not configured: %s; no login renews them, and 'nftwl remove' needs --port %[1]s", &others)
			}
			return s.change(l, args, true, func(set *nftset.Set, addrs []netip.Addr) error {
				return s.put(l, set, addrs, ports, e)
			})
		},
	}
	if l == banned {
		cmd.Use, cmd.Short = "ban ADDRESS…", "Ban addresses"
		cmd.Long = `Bans addresses: adds them to the banned sets for the configured ports and
ban_timeout. An address already banned for longer is left alone and reported.
It also warns if the address is trusted, because the firewall then lets it in on
those ports all the same. What the configuration ignores is refused.

An IPv6 network is banned by its /64 (2001:db8:1:2::/64). With ipv6_prefix: 64
every IPv6 ban is one of the whole /64, and the first unban of an address in it
ends it.

--timeout takes nft's notation: 1d12h, 90m, 30s. --timeout never makes permanent
elements, which no later ban makes expire, and which stay until 'nftwl unban';
like every element they need a set with the flag timeout.` + addressesHelp + changeExit
		cmd.Example = `  nftwl ban 198.51.100.66
  nftwl ban --timeout 7d --comment 'password guessing' 198.51.100.66`
	}
	cmd.Flags().VarP(&ports, "port", "", portHelp)
	cmd.Flags().StringVar(&timeout, "timeout", "", "for how `LONG`, such as 12h, or never")
	cmd.Flags().StringVar(&comment, "comment", "", "a `TEXT` to note on the elements")
	return cmd
}

func (s *session) put(l list, set *nftset.Set, addrs []netip.Addr, only portsFlag, e nftset.Element) error {
	if err := only.fits(set); err != nil {
		return err
	}
	ports := only.or(s.Ports)
	var elems []nftset.Element
	for _, addr := range addrs {
		elems = append(elems, trust.Elements(set, trust.Network(s.Config, addr), ports, e)...)
	}
	var outcomes []nftset.Outcome
	for some := range slices.Chunk(elems, atOnce) {
		s.conn.SetTimeout(patience)
		of, err := s.conn.Extend(set, some, 0, nil)
		if err != nil {
			return err
		}
		outcomes = append(outcomes, of...)
	}
	kept := make(map[netip.Addr]bool)
	for i, o := range outcomes {
		if addr := elems[i].Addr; o == nftset.Unchanged && !kept[addr] {
			kept[addr] = true
			printNote("%s is unchanged: %s for as long already", l.name(s.Config, addr), l)
		}
	}
	if l == banned {
		s.noteTrusted(addrs, ports)
	}
	return nil
}

// noteTrusted tells of banned addresses that the firewall accepts all the
// same, because the trusted come first, and on which of the ports.
func (s *session) noteTrusted(addrs []netip.Addr, ports []uint16) {
	set, err := s.conn.Set(s.Table, s.Trusted.For(addrs[0]))
	if err != nil {
		return // the ban was all that was asked for
	}
	for _, addr := range addrs {
		s.conn.SetTimeout(patience)
		there, missing, err := s.find(trusted, set, addr, ports)
		switch {
		case err != nil:
			return
		case len(there) == 0:
		case len(missing) == 0:
			printNote("%s is trusted too, which comes first; nftwl remove ends that", trusted.name(s.Config, addr))
		default:
			var on portsFlag
			for _, e := range there {
				on = append(on, e.Port)
			}
			printNote("%s is trusted too on %s, which comes first there; nftwl remove --port %[2]s ends that", trusted.name(s.Config, addr), &on)
		}
	}
}

// find looks an address up as the rules do, which is as itself and as its
// network. For each port it returns the element that expires last, or the port
// among those that are missing.
func (s *session) find(l list, set *nftset.Set, addr netip.Addr, ports []uint16) (there []nftset.Element, missing []uint16, err error) {
	keys := trust.LookupKeys(set, addr, l.prefix(s.Config), ports)
	found, err := s.conn.Lookup(set, keys...)
	if err != nil {
		return nil, nil, err
	}
	n := len(trust.Keys(set, addr, ports))
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

// newDrop is remove and unban.
func newDrop(configPath *string, l list) *cobra.Command {
	var ports portsFlag
	var comment string
	cmd := &cobra.Command{
		Use:   "remove ADDRESS…",
		Short: "End the trust of addresses",
		Long: `Ends the trust of addresses: removes them from the trusted sets, on every
configured port or on those of --port. Unknown addresses are reported but are
not an error. Open connections stay open, and the next login trusts the address
again: 'nftwl_trust=no' in the user database prevents that.` + addressesHelp + changeExit,
		Example: `  nftwl remove 192.0.2.7
  nftwl remove --port 143 192.0.2.7 2001:db8::7`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := open(*configPath)
			if err != nil {
				return err
			}
			defer s.conn.Close()
			var match func(nftset.Element) bool
			if cmd.Flags().Changed("comment") {
				match = func(e nftset.Element) bool { return trust.HasName(e.Comment, comment) }
			}
			return s.change(l, args, false, func(set *nftset.Set, addrs []netip.Addr) error {
				return s.drop(l, set, addrs, ports, match)
			})
		},
	}
	if l == banned {
		cmd.Use, cmd.Short = "unban ADDRESS…", "End the ban of addresses"
		cmd.Long = `Ends the ban of addresses: removes them from the banned sets, on every
configured port or on those of --port. Unknown addresses are reported but are
not an error. A ban of an IPv6 address's whole /64 stays: the command that ends
it is printed.

It also ends what the limit of the shipped rules did to the address and, for
IPv6, to its /64: on every port, or on those of --port.

With --comment it removes only elements with that comment, so that one tool's
unban leaves another's ban alone, and the limit's too. Bans on ports that are
not configured, which fail2ban's jails have, end with --port, or with
'fail2ban-client unban'.` + addressesHelp + changeExit
		cmd.Example = `  nftwl unban 198.51.100.66
  nftwl unban --comment postfix-sasl 198.51.100.66`
	}
	cmd.Flags().VarP(&ports, "port", "", portHelp)
	cmd.Flags().StringVar(&comment, "comment", "", "only elements whose comment is `TEXT`, or names that user")
	return cmd
}

func (s *session) drop(l list, set *nftset.Set, addrs []netip.Addr, only portsFlag, match func(nftset.Element) bool) error {
	if err := only.fits(set); err != nil {
		return err
	}
	ports := only.or(s.Ports)
	var keys []nftset.Key
	for _, addr := range addrs {
		keys = append(keys, trust.LookupKeys(set, addr, s.IPv6Prefix, ports)...)
	}
	removed, err := s.remove(set, keys, match)
	if err != nil {
		return err
	}
	gone := make(map[netip.Addr]list)
	if l == banned && match == nil {
		var freed []nftset.Element
		freed, err = s.free(addrs, only)
		for _, e := range freed {
			gone[e.Addr] = limited
		}
	}
	for _, e := range removed {
		gone[e.Addr] = l
	}
	for _, addr := range addrs {
		network := trust.NetworkOf(addr, l.prefix(s.Config)).Addr()
		switch from, ok := gone[network]; {
		case ok && network != addr:
			printNote("%s was %s with its network %s", addr, from, from.name(s.Config, network))
		case gone[addr] == "":
			how := ""
			if match != nil {
				how = " with that comment"
			}
			if len(only) > 0 {
				how = " on " + joinPorts(only) + how
			}
			printNote("%s was not %s%s", l.name(s.Config, addr), l, how)
		}
		if network != addr && network != trust.Network(s.Config, addr) {
			// An error is no news: the set has just been read.
			if found, err := s.conn.Lookup(set, trust.Keys(set, network, ports)...); err == nil && len(found) > 0 {
				printNote("its network is %s: nftwl unban %s", l, l.name(s.Config, network))
			}
		}
	}
	return err
}

// remove removes any number of elements, and returns those that were there.
func (s *session) remove(set *nftset.Set, keys []nftset.Key, match func(nftset.Element) bool) (removed []nftset.Element, err error) {
	for some := range slices.Chunk(keys, atOnce) {
		s.conn.SetTimeout(patience)
		of, err := s.conn.Remove(set, some, match)
		if err != nil {
			return removed, err
		}
		removed = append(removed, of...)
	}
	return removed, nil
}

// rates are the sets in which the shipped rules count against the limit.
var rates = config.Names{IPv4: "submission_rate_ipv4", IPv6: "submission_rate_ipv6"}

// free ends what the limit of the shipped rules did to addresses of one family,
// on some ports or on all. It returns the elements of the limited set that it
// removed.
func (s *session) free(addrs []netip.Addr, only portsFlag) ([]nftset.Element, error) {
	set, err := s.conn.Set(s.Table, config.Limited.For(addrs[0]))
	switch {
	case errors.Is(err, nftset.ErrNoSet):
		return nil, nil // the rules are others
	case err != nil:
		return nil, err
	}
	if err := only.fits(set); err != nil {
		return nil, err
	}
	sources := make(map[netip.Addr]bool)
	for _, addr := range addrs {
		sources[addr] = true
		sources[trust.NetworkOf(addr, trust.BanPrefix(s.Config)).Addr()] = true
	}
	var keys []nftset.Key
	if set.Key.Port && len(only) == 0 {
		// The limit has the ports that are written in the rules.
		s.conn.SetTimeout(patience)
		elems, err := s.conn.Elements(set)
		if err != nil {
			return nil, err
		}
		for _, e := range elems {
			if sources[e.Addr] {
				keys = append(keys, e.Key)
			}
		}
	} else {
		for addr := range sources {
			keys = append(keys, trust.Keys(set, addr, only)...)
		}
	}
	removed, err := s.remove(set, keys, nil)
	if err != nil || len(removed) == 0 {
		return removed, err
	}
	// Forget what has been counted too, or the next connection exceeds the limit
	// again.
	rate, err := s.conn.Set(s.Table, rates.For(addrs[0]))
	switch {
	case errors.Is(err, nftset.ErrNoSet):
		return removed, nil
	case err != nil:
		return removed, err
	}
	keys = keys[:0]
	for _, e := range removed {
		keys = append(keys, e.Key)
	}
	_, err = s.remove(rate, keys, nil)
	return removed, err
}

func newCheck(configPath *string) *cobra.Command {
	var ports portsFlag
	var asBanned, quiet bool
	cmd := &cobra.Command{
		Use:   "check ADDRESS",
		Short: "Tell whether an address is trusted (or banned)",
		Long: `Tells whether an address is trusted now, on every configured port or on those
of --port, and for how long. --banned asks whether it is banned, which does not
include the limit of the shipped rules. An IPv6 address is banned when its /64
is, and trusted when its network of ipv6_prefix is. It looks up single elements,
so it is fast even with large sets.

Exit status: 0 for yes, 1 for no, 2 for an error.`,
		Example: `  nftwl check 192.0.2.7
  nftwl check --port 465,587 2001:db8::7
  nftwl check -q --banned 198.51.100.66 && echo banned`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			s, err := open(*configPath)
			if err != nil {
				return &status{exitUsage, err}
			}
			defer s.conn.Close()
			l := trusted
			if asBanned {
				l = banned
			}
			addrs, ok := s.addresses(l, args, false)
			if !ok || len(addrs) != 1 {
				return &status{code: exitUsage}
			}
			yes := false
			ok = s.byFamily(l, addrs, func(set *nftset.Set, _ []netip.Addr) (err error) {
				yes, err = s.check(l, set, addrs[0], ports.or(s.Ports), quiet)
				return err
			})
			switch {
			case !ok:
				return &status{code: exitUsage}
			case !yes:
				return &status{code: exitFailed}
			}
			return nil
		},
	}
	cmd.Flags().VarP(&ports, "port", "", portHelp)
	cmd.Flags().BoolVar(&asBanned, "banned", false, "ask the banned sets")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing")
	return cmd
}

func (s *session) check(l list, set *nftset.Set, addr netip.Addr, ports []uint16, quiet bool) (bool, error) {
	there, missing, err := s.find(l, set, addr, ports)
	if err != nil {
		return false, err
	}
	on := func(ports []uint16) string {
		if !set.Key.Port {
			return ""
		}
		return " on " + joinPorts(ports)
	}
	name := l.name(s.Config, addr)
	switch {
	case quiet:
	case len(missing) == 0:
		how := ""
		for _, e := range there {
			if e.Addr != addr {
				how = " with its network " + l.name(s.Config, e.Addr)
			}
		}
		fmt.Printf("%s is %s%s%s, time left: %s\n", name, l, on(ports), how, timeLeft(there))
	default:
		fmt.Printf("%s is not %s%s\n", name, l, on(missing))
	}
	return len(missing) == 0, nil
}

func newFlush(configPath *string) *cobra.Command {
	return &cobra.Command{
		Use:   "flush trusted|banned",
		Short: "Empty the trusted or the banned sets",
		Long: `Removes every element of the two sets of a list, permanent ones and those of
other tools among them, in one transaction. The sets themselves stay.

Exit status: 0, or 1 when a set is missing or cannot be written; nothing is
changed then.`,
		Example:   `  nftwl save - >before.nft && nftwl flush banned`,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{string(trusted), string(banned)},
		RunE: func(_ *cobra.Command, args []string) error {
			s, err := open(*configPath)
			if err != nil {
				return err
			}
			defer s.conn.Close()
			sets, err := s.sets(list(args[0]).sets(s.Config).Both()...)
			if err != nil {
				return err
			}
			batch := s.conn.Batch()
			for _, set := range sets {
				batch.Flush(set)
			}
			return failed(batch.Commit())
		},
	}
}
