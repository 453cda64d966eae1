// By default Go's runtime keeps the files of its cgroup's CPU limit open (one in
// version 2, two in version 1), to follow it with GOMAXPROCS. A login can lack
// these descriptors, and ends before the limit matters.

//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0

// Command nftwl trusts the addresses of a mail server's users in nftables
// sets. `nftwl help` lists what it does.
package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"nftwl/pkg/config"
	"nftwl/pkg/install"
)

func main() {
	// Before anything else sees the arguments: none of the command that login
	// becomes must be taken for nftwl's.
	if configPath, command, ok := install.LoginArgs(os.Args[1:]); ok {
		os.Exit(login(configPath, command))
	}
	// Commands run nft and others. Root's programs are often not in PATH, such as
	// cron's, and what they print is read.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	os.Setenv("LC_ALL", "C")
	os.Exit(run(os.Args[1:]))
}

// The exit codes.
const (
	exitFailed        = 1
	exitUsage         = 2
	exitNotExecutable = 126
	exitNotFound      = 127
)

// status ends the program with an exit code. The error in it is printed first;
// nil if everything has been printed.
type status struct {
	code int
	err  error
}

func (s *status) Error() string { return fmt.Sprint(s.err) }
func (s *status) Unwrap() error { return s.err }

// failed gives an error the exit code 1, unless it has a code. An error without
// a code came from the command line, and exits with 2.
func failed(err error) error {
	var s *status
	if err == nil || errors.As(err, &s) {
		return err
	}
	return &status{exitFailed, err}
}

func run(args []string) int {
	root := newRoot()
	root.SetArgs(args)
	cmd, err := root.ExecuteC()
	var s *status
	switch {
	case err == nil:
		return 0
	case !errors.As(err, &s):
		printError(err)
		printHint(fmt.Sprintf("see '%s --help'", cmd.CommandPath()))
		return exitUsage
	case s.err != nil:
		printError(s.err)
	}
	return s.code
}

func newRoot() *cobra.Command {
	var configPath string
	var showVersion bool
	root := &cobra.Command{
		Use:   "nftwl",
		Short: "Trust the addresses of a mail server's users in nftables",
		Long: `nftwl tells a mail server's firewall which addresses its users log in from.
Dovecot runs it after each login; it adds the client's address to nftables sets
for the mail ports, with a timeout, and lets the login go on.

Exit status: 0, or 1 if something failed, 2 if the command line was wrong.`,
		SilenceErrors:              true,
		SilenceUsage:               true,
		SuggestionsMinimumDistance: 2, // cobra's default
		Args:                       noSuchCommand,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if showVersion {
				return printVersion()
			}
			return cmd.Help()
		},
	}
	// Not cobra's own flag, whose template makes the program a quarter larger, and each
	// login slower.
	root.Flags().BoolVarP(&showVersion, "version", "v", false, "print the version")
	root.PersistentFlags().StringVar(&configPath, "config", "", "read `FILE`, not "+config.Path+" (which need not exist)")
	root.AddCommand(
		loginHelp(),
		newAdd(&configPath, trusted), newRemove(&configPath, trusted),
		newAdd(&configPath, banned), newRemove(&configPath, banned),
		newList(&configPath), newCheck(&configPath), newWhy(&configPath), newFlush(&configPath),
		newSave(&configPath), newRestore(&configPath),
		newSetup(&configPath), newDoctor(&configPath),
		newVersion(),
	)
	root.InitDefaultCompletionCmd()
	root.InitDefaultHelpCmd()
	// By default, cobra completes with the files of the working directory.
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	_ = root.MarkPersistentFlagFilename("config", "yaml") // the flag is there
	for _, cmd := range root.Commands() {
		switch cmd.Name() {
		case "login", "help":
			continue
		case "save", "restore":
			cmd.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveDefault)
		case "remove":
			cmd.ValidArgsFunction = completeAddresses(&configPath, trusted)
		case "unban":
			cmd.ValidArgsFunction = completeAddresses(&configPath, banned, limited)
		case "check":
			cmd.ValidArgsFunction = completeAddresses(&configPath, trusted, banned)
		case "why":
			cmd.ValidArgsFunction = completeAddresses(&configPath, allLists...)
		case "completion":
			cmd.Use, cmd.Short = "completion bash|fish|powershell|zsh", "Print a shell's completion script"
			cmd.Run = func(*cobra.Command, []string) {} // so that cobra checks the arguments
		default:
			cmd.ValidArgs = choices(cmd)
		}
		cmd.Args = checkArgs
	}
	return root
}

// noSuchCommand is for a word that stands where a command should.
func noSuchCommand(parent *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	err := fmt.Errorf("unknown command %q", args[0])
	if near := parent.SuggestionsFor(args[0]); len(near) > 0 {
		err = fmt.Errorf("%w; did you mean %s?", err, strings.Join(near, " or "))
	}
	return err
}

// checkArgs checks arguments against the command's usage line, which has one
// word at most: ADDRESS, ADDRESS…, [FILE], or the choices a|b.
func checkArgs(cmd *cobra.Command, args []string) error {
	_, usage, _ := strings.Cut(cmd.Use, " ")
	choices := choices(cmd)
	needed := "an " + strings.TrimSuffix(usage, "…")
	if choices != nil {
		needed = "one of " + strings.Join(choices, ", ")
	}
	most := min(1, len(usage))
	switch {
	case len(args) < most && usage[0] != '[':
		return fmt.Errorf("%s: %s is needed", cmd.Name(), needed)
	case len(args) > most && !strings.Contains(usage, "…"):
		return fmt.Errorf("%s: %q is one argument too many", cmd.Name(), args[most])
	case choices != nil && len(args) > 0 && !slices.Contains(choices, args[0]):
		return fmt.Errorf("%s: %q is not %s", cmd.Name(), args[0], needed)
	}
	return nil
}

// choices returns the words of which a command takes one; nil if it takes any.
func choices(cmd *cobra.Command) []string {
	_, usage, _ := strings.Cut(cmd.Use, " ")
	if words := strings.Split(strings.Trim(usage, "[]"), "|"); len(words) > 1 {
		return words
	}
	return nil
}
