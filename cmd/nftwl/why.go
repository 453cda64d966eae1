package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"nftwl/pkg/firewall"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

func newWhy(configPath *string) *cobra.Command {
	var ports portsFlag
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "why ADDRESS",
		Short: "Show what the firewall does with an address, and which rule decides",
		Long: `Shows what the loaded rules do with a new connection from ADDRESS to each
configured port, or to those of --port: one line for each port, with the
verdict, the table and chain, and the rule that decides. Below it is what the
sets hold of the address.

  accept   the connection is let in; the rule is the last that accepts it
  drop     it gets no answer
  reject   it is refused
  queue    the rule leaves it to another program, which is not asked

The kernel decides: nftwl copies the rules into a network namespace of its own,
and sends a packet there. The real rules see no packet. Rate limits start afresh
in the copy. Run it as root.

Exit status: 0, or 2 for an error.`,
		Example: `  nftwl why 192.0.2.7
  nftwl why --port 587 --json 2001:db8::7`,
		RunE: func(_ *cobra.Command, args []string) error {
			if err := why(*configPath, args[0], ports, asJSON); err != nil {
				return &status{exitUsage, err}
			}
			return nil
		},
	}
	cmd.Flags().VarP(&ports, "port", "", portHelp)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print an array with an object for each port")
	return cmd
}

// decision is what becomes of a connection to a port. Table, Chain and Rule are
// empty where no chain sees it.
type decision struct {
	Port    uint16           `json:"port"`
	Verdict firewall.Verdict `json:"verdict"`
	Table   string           `json:"table"`
	Chain   string           `json:"chain"`
	Rule    string           `json:"rule"`
}

func why(configPath, address string, only portsFlag, asJSON bool) error {
	s, err := open(configPath, nftset.Decided)
	if err != nil {
		return err
	}
	defer s.conn.Close()
	addr, err := trust.ParseAddr(address)
	if err != nil {
		return err
	}
	ports := only.or(s.Ports)
	copy, err := firewall.Open([]netip.Prefix{netip.PrefixFrom(addr, addr.BitLen())}, ports)
	if err != nil {
		return err
	}
	defer copy.Close()
	var decisions []decision
	for _, port := range ports {
		_, result, err := copy.Dial(addr, port)
		if err != nil {
			return err
		}
		d := decision{Port: port, Verdict: result.Verdict}
		if result.Chain != "" {
			d.Table, d.Chain, d.Rule = result.Table.String(), result.Chain, copy.Text(result.Step)
		}
		decisions = append(decisions, d)
	}
	for _, what := range copy.Omitted {
		printNote("left out, and may drop what is accepted here: %s", what)
	}
	if asJSON {
		return printJSON(decisions)
	}
	_, err = fmt.Println(strings.Join(append(decisionLines(decisions, copy.Omitted), s.holds(addr, ports)...), "\n"))
	return err
}

func decisionLines(decisions []decision, omitted []string) (lines []string) {
	port, verdict := 0, 0
	for _, d := range decisions {
		port, verdict = max(port, len(fmt.Sprint(d.Port))), max(verdict, len(d.Verdict))
	}
	for _, d := range decisions {
		where := fmt.Sprintf("%s %s: %s", d.Table, d.Chain, d.Rule)
		switch {
		case d.Chain != "":
		case len(omitted) > 0:
			where = "no chain of hook input, unless one was left out"
		default:
			where = "no chain of hook input: every port is open"
		}
		lines = append(lines, printable(fmt.Sprintf("%-*d  %-*s  %s", port, d.Port, verdict, d.Verdict, where)))
	}
	return lines
}

// holds says what the sets hold of an address or its network, as list does.
func (s *session) holds(addr netip.Addr, ports []uint16) []string {
	var rows []row
	for _, l := range allLists {
		set, err := s.conn.Set(s.Table, l.sets(s.Config).For(addr))
		var there []nftset.Element
		if err == nil {
			there, _, err = trust.Find(s.conn, set, addr, l.prefix(s.Config), ports)
		}
		switch {
		case l == limited && errors.Is(err, nftset.ErrNoSet): // the rules are others
		case err != nil:
			printError(err)
			return nil
		}
		for _, e := range there {
			rows = append(rows, row{l, set.Name, l.name(s.Config, e.Addr), e})
		}
	}
	if len(rows) == 0 {
		return []string{"", fmt.Sprintf("%s is neither trusted, banned nor limited on these ports", addr)}
	}
	return append([]string{""}, table(rows)...)
}
