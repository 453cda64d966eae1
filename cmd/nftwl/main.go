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

	"github.com/spf13/cobra"

	"nftwl/pkg/config"
	"nftwl/pkg/install"
)

func main() {
	// Before anything else sees the arguments: no argument of the command
	// that login becomes may be taken for one of nftwl's.
	if configPath, command, ok := install.LoginArgs(os.Args[1:]); ok {
		os.Exit(login(configPath, command))
	}
	os.Exit(run(os.Args[1:]))
}

// The exit codes.
const (
	exitFailed        = 1
	exitUsage         = 2
	exitNotExecutable = 126
	exitNotFound      = 127
)

// status ends the program with an exit code. The error in it is printed first,
// unless it is nil: all has been said then.
type status struct {
	code int
	err  error
}

func (s *status) Error() string { return fmt.Sprint(s.err) }
func (s *status) Unwrap() error { return s.err }

// failed makes an error of a command's the reason to exit with 1. What it is
// not applied to came from the command line, and exits with 2.
func failed(err error) error {
	if err == nil {
		return nil
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
	root := &cobra.Command{
		Use:   "nftwl",
		Short: "Trust the addresses of a mail server's users in nftables",
		Long: `nftwl lets a mail server's firewall know its own users. Dovecot runs it after
each login; it adds the client's address to nftables sets for the mail ports,
with a timeout, and lets the login go on.

Exit status: 0 when all went well, 1 when something failed, 2 when the command
line was wrong.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVar(&configPath, "config", "", "read `FILE`, not "+config.Path+" (which need not exist)")
	root.AddCommand(
		loginHelp(),
		newPut(&configPath, trusted), newDrop(&configPath, trusted),
		newPut(&configPath, banned), newDrop(&configPath, banned),
		newList(&configPath), newCheck(&configPath), newFlush(&configPath),
		newSave(&configPath), newRestore(&configPath),
		newSetup(&configPath), newDoctor(&configPath),
		newVersion(), newCompletion(),
	)
	root.SetHelpCommand(newHelp())
	addCompletions(root, &configPath)
	return root
}
