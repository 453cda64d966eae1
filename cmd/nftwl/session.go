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

// prefix is the length of the IPv6 networks that the rules look up in the sets of
// a list besides addresses; 128 if they look up none.
func (l list) prefix(c *config.Config) int {
	if l == trusted {
		return c.IPv6Prefix
	}
	return trust.BanPrefix(c)
}

func (l list) name(c *config.Config, addr netip.Addr) string {
	return trust.Name(addr, l.prefix(c))
}

func (l list) parse(c *config.Config, text string) (netip.Addr, error) {
	return trust.ParseElement(text, l.prefix(c))
}

// session is the configuration and a connection to the kernel.
type session struct {
	*config.Config
	conn *nftset.Conn
}

// patience is how long a command waits for an answer from the kernel, and how
// long it retries a change while the ruleset keeps changing.
const patience = 10 * time.Second

// atOnce is how many elements a command changes in one transaction. While users
// log in, a larger change would never fit between two logins.
const atOnce = 1000

// open opens a session whose changes have a meaning for nftwld.
func open(configPath string, m nftset.Meaning) (*session, error) {
	c, err := config.Load(configPath)
	if err != nil {
		return nil, failed(err)
	}
	conn, err := nftset.DialAs(m)
	if err != nil {
		return nil, failed(err)
	}
	conn.SetTimeout(patience)
	return &session{c, conn}, nil
}

// noteUnshared tells that other machines do not learn of a removal.
func (s *session) noteUnshared() {
	if s.Cluster == nil {
		return
	}
	if running, _, err := nftset.Listeners(); err == nil && !running {
		printNote("nftwld is not running, so other machines keep what was removed here, and it comes back when nftwld starts")
		printHint("systemctl start nftwld, and run this again")
	}
}

// withSession is what a command runs that talks to the kernel. If f fails, the
// exit code is 1.
func withSession(configPath *string, m nftset.Meaning, f func(s *session, args []string) error) func(*cobra.Command, []string) error {
	return func(_ *cobra.Command, args []string) error {
		s, err := open(*configPath, m)
		if err != nil {
			return err
		}
		defer s.conn.Close()
		return failed(f(s, args))
	}
}

// refusal says why an address must not be on a list; nil if it may.
type refusal func(*config.Config, netip.Addr) error

// change calls f for the addresses of each family in a command's arguments, with
// their set. Errors are printed, and the other addresses are still done.
func (s *session) change(l list, args []string, refuse refusal, f func(set *nftset.Set, addrs []netip.Addr) error) error {
	addrs, ok := s.addresses(l, args, refuse)
	for _, v6 := range []bool{false, true} {
		some := slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return a.Is6() != v6 })
		if len(some) == 0 {
			continue
		}
		// Again, because someone may have typed addresses until now.
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
	if !ok {
		return &status{code: exitFailed}
	}
	return nil
}

// addresses reads the arguments of a command; "-" stands for the lines of standard
// input. It prints what is wrong with some, and returns the others, each once.
func (s *session) addresses(l list, args []string, refuse refusal) (addrs []netip.Addr, ok bool) {
	ok = true
	seen := make(map[netip.Addr]bool)
	read := func(text string) {
		addr, err := l.parse(s.Config, text)
		if err == nil && refuse != nil {
			err = refuse(s.Config, addr)
		}
		switch {
		case err != nil:
			printError(err)
			ok = false
		case !seen[addr]:
			seen[addr] = true
			addrs = append(addrs, addr)
		}
	}
	for _, arg := range args {
		if arg != "-" {
			read(arg)
			continue
		}
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
			if line := strings.TrimSpace(lines.Text()); line != "" && !strings.HasPrefix(line, "#") {
				read(line)
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

// portsFlag is --port: other ports than the configured ones.
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

// without returns ports that are not among others.
func without(ports, others []uint16) []uint16 {
	return slices.DeleteFunc(slices.Clone(ports), func(p uint16) bool { return slices.Contains(others, p) })
}

func joinPorts(ports []uint16) string {
	text := make([]string, len(ports))
	for i, port := range ports {
		text[i] = fmt.Sprint(port)
	}
	return strings.Join(text, ",")
}

// What the help of add, ban, remove and unban ends with.
const addressesHelp = `

An ADDRESS is IPv4 or IPv6, or a network that 'nftwl list' shows. "-" reads
addresses from standard input, one a line; empty lines and lines that begin with
# are skipped.

Exit status: 0, or 1 if an address failed (the others are still done), 2
if the command line was wrong.`

const portHelp = "only these `PORTS`, such as 465,587"
