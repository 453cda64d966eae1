package main

import (
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"nftwl/pkg/nftset"
)

// completeAddresses offers the addresses of lists with their comments. It prints
// no error, because the user is in the middle of a line.
func completeAddresses(configPath *string, lists ...list) cobra.CompletionFunc {
	const most, patience = 1000, time.Second // to read a million elements takes a minute
	return func(cmd *cobra.Command, args []string, prefix string) (offers []cobra.Completion, _ cobra.ShellCompDirective) {
		const how = cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
		s, err := open(*configPath, nftset.Decided)
		if err != nil || len(args) > 0 && !strings.HasSuffix(cmd.Use, "…") {
			return nil, how
		}
		defer s.conn.Close()
		s.conn.SetDeadline(time.Now().Add(patience))
		rows, _ := s.rows(lists)
		there := slices.Clone(args) // on the line, or offered
		for _, a := range byAddress(rows) {
			if strings.HasPrefix(a.name, prefix) && !slices.Contains(there, a.name) && len(offers) < most {
				there = append(there, a.name)
				offers = append(offers, cobra.CompletionWithDesc(a.name, a.comment()))
			}
		}
		return offers, how
	}
}
