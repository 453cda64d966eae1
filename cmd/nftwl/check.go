package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

func newCheck(configPath *string) *cobra.Command {
	var ports portsFlag
	var asBanned, quiet bool
	cmd := &cobra.Command{
		Use:   "check ADDRESS",
		Short: "Tell whether an address is trusted (or banned)",
		Long: `Tells whether an address is trusted now, on every configured port or on those
of --port, and for how long. --banned asks whether it is banned; an address that
the shipped rules limit is not. It looks up single elements, so it is fast even
with large sets.

Exit status: 0 for yes, 1 for no, 2 for an error.`,
		Example: `  nftwl check 192.0.2.7
  nftwl check --port 465,587 2001:db8::7
  nftwl check -q --banned 198.51.100.66 && echo banned`,
		RunE: func(_ *cobra.Command, args []string) error {
			l := trusted
			if asBanned {
				l = banned
			}
			text, yes, err := check(*configPath, l, args[0], ports)
			if err == nil && !quiet {
				_, err = fmt.Println(text)
			}
			switch {
			case err != nil:
				return &status{exitUsage, err}
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

// check tells whether an address is on a list, in words too.
func check(configPath string, l list, address string, only portsFlag) (text string, yes bool, err error) {
	s, err := open(configPath, nftset.Decided)
	if err != nil {
		return "", false, err
	}
	defer s.conn.Close()
	addr, err := l.parse(s.Config, address)
	if err != nil {
		return "", false, err
	}
	set, err := s.conn.Set(s.Table, l.sets(s.Config).For(addr))
	if err != nil {
		return "", false, err
	}
	ports := only.or(s.Ports)
	there, missing, err := trust.Find(s.conn, set, addr, l.prefix(s.Config), ports)
	if err != nil {
		return "", false, err
	}
	on := func(ports []uint16) string {
		if !set.Key.Port {
			return ""
		}
		return " on " + joinPorts(ports)
	}
	name := l.name(s.Config, addr)
	if len(missing) > 0 {
		return fmt.Sprintf("%s is not %s%s", name, l, on(missing)), false, nil
	}
	network := ""
	for _, e := range there {
		if e.Addr != addr {
			network = " with its network " + l.name(s.Config, e.Addr)
		}
	}
	return fmt.Sprintf("%s is %s%s%s, time left: %s", name, l, on(ports), network, timeLeft(there)), true, nil
}
