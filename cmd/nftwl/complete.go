package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"nftwl/pkg/config"
)

func newCompletion() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print a shell's completion script",
		Long: `Prints the script that has a shell complete nftwl's commands and flags, and for
remove, unban and check the addresses that are on the lists now, where the user
may read them. For bash it needs the package bash-completion.

Exit status: 0, or 2 for another shell.`,
		Example: `  nftwl completion bash >/etc/bash_completion.d/nftwl
  nftwl completion zsh >/usr/local/share/zsh/site-functions/_nftwl
  nftwl completion fish >/etc/fish/completions/nftwl.fish`,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"bash", "zsh", "fish"},
		RunE: func(cmd *cobra.Command, args []string) error {
			switch root := cmd.Root(); args[0] {
			case "bash":
				return failed(root.GenBashCompletionV2(os.Stdout, true))
			case "zsh":
				return failed(root.GenZshCompletion(os.Stdout))
			default:
				return failed(root.GenFishCompletion(os.Stdout, true))
			}
		},
	}
}

// newHelp is cobra's, but that a command which does not exist is an error.
func newHelp() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Show what a command does",
		Long:  "Shows what a command does, its flags and its exit status, or lists the commands.",
		RunE: func(cmd *cobra.Command, args []string) error {
			about, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				printError(fmt.Errorf("help: unknown command %q", strings.Join(args, " ")))
				printHint("'nftwl help' lists the commands")
				return &status{code: exitUsage}
			}
			about.InitDefaultHelpFlag()
			return failed(about.Help())
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) (names []cobra.Completion, _ cobra.ShellCompDirective) {
			about, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			for _, c := range about.Commands() {
				if c.IsAvailableCommand() && strings.HasPrefix(c.Name(), prefix) {
					names = append(names, cobra.CompletionWithDesc(c.Name(), c.Short))
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
	}
}

// addCompletions says what the shell completes. Where nothing is said, it would
// offer the files of the working folder.
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
		}
		// An error is a command without that flag.
		_ = cmd.RegisterFlagCompletionFunc("port", completePorts(configPath))
	}
}

// completionTime is how long a shell waits for what it completes.
const completionTime = time.Second

// completeAddresses offers the addresses of lists, with their comments: whom
// one has to do with is mostly among the last. An error is no answer, since the
// user is in the middle of a line.
func completeAddresses(configPath *string, lists ...list) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		const most = 1000
		lists := lists
		if cmd.Name() == "check" {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			if asBanned, err := cmd.Flags().GetBool("banned"); err == nil && asBanned {
				lists = []list{banned}
			}
		}
		found := make(chan []listed)
		go func() {
			s, err := open(*configPath)
			if err != nil {
				found <- nil
				return
			}
			rows, _ := s.rows(lists)
			found <- byAddress(rows)
		}()
		var offers []cobra.Completion
		there := slices.Clone(args) // on the line, or offered
		select {
		case <-time.After(completionTime): // a set of a million elements takes a minute
		case all := <-found:
			for _, a := range all {
				if strings.HasPrefix(a.name, prefix) && !slices.Contains(there, a.name) && len(offers) < most {
					there = append(there, a.name)
					offers = append(offers, cobra.CompletionWithDesc(a.name, a.comment()))
				}
			}
		}
		return offers, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	}
}

// completePorts offers the configured ports, behind those that are there.
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
