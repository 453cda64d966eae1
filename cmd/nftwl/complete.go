package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"nftwl/pkg/config"
)

// addCompletions has the shell complete addresses, ports and files. Without it,
// cobra offers the files of the working directory for everything.
func addCompletions(root *cobra.Command, configPath *string) {
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	_ = root.MarkPersistentFlagFilename("config", "yaml")
	for _, cmd := range root.Commands() {
		switch cmd.Name() {
		case "login", "save", "restore":
			cmd.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveDefault)
		case "remove", "check":
			cmd.ValidArgsFunction = completeAddresses(configPath, trusted)
		case "unban":
			cmd.ValidArgsFunction = completeAddresses(configPath, banned, limited)
		case "why":
			cmd.ValidArgsFunction = completeAddresses(configPath, allLists...)
		}
		// An error is a command without that flag.
		_ = cmd.RegisterFlagCompletionFunc("port", completePorts(configPath))
	}
}

// completeAddresses offers the addresses of lists with their comments, the
// youngest first. It prints no error, because the user is in the middle of a line.
func completeAddresses(configPath *string, lists ...list) cobra.CompletionFunc {
	const most, patience = 1000, time.Second // to read a million elements takes a minute
	return func(cmd *cobra.Command, args []string, prefix string) (offers []cobra.Completion, _ cobra.ShellCompDirective) {
		const how = cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
		lists := lists
		if cmd.Name() == "check" || cmd.Name() == "why" {
			if len(args) > 0 {
				return nil, how
			}
			if asBanned, err := cmd.Flags().GetBool("banned"); err == nil && asBanned {
				lists = []list{banned}
			}
		}
		s, err := open(*configPath)
		if err != nil {
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

// completePorts offers the configured ports that are not on the line yet.
func completePorts(configPath *string) cobra.CompletionFunc {
	return func(_ *cobra.Command, _ []string, typed string) (offers []cobra.Completion, _ cobra.ShellCompDirective) {
		c, err := config.Load(*configPath)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		before := typed[:strings.LastIndexByte(typed, ',')+1]
		for _, port := range c.Ports {
			offer := fmt.Sprint(before, port)
			if strings.HasPrefix(offer, typed) && !slices.Contains(strings.Split(before, ","), fmt.Sprint(port)) {
				offers = append(offers, offer)
			}
		}
		return offers, cobra.ShellCompDirectiveNoFileComp
	}
}
