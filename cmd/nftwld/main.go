// Command nftwld trusts the addresses of a mail server's users in nftables
// sets, and bans those that guess passwords, by Dovecot's reports of
// authentications.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"nftwl/pkg/config"
)

func main() { os.Exit(run(os.Args[1:])) }

// The exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

// failure is an error that ends the program with exitFailed; every other error
// came from the command line.
type failure struct {
	error
	hint string // what to do about it; empty where nobody knows
}

func (f failure) Unwrap() error { return f.error }

func run(args []string) int {
	root := newRoot()
	root.SetArgs(args)
	cmd, err := root.ExecuteC()
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "nftwld: error:", err)
	code, hint := exitUsage, fmt.Sprintf("see '%s --help'", cmd.CommandPath())
	var f failure
	if errors.As(err, &f) {
		code, hint = exitFailed, f.hint
	}
	if hint != "" {
		fmt.Fprintln(os.Stderr, "nftwld: hint:", hint)
	}
	return code
}

func newRoot() *cobra.Command {
	var d daemon
	root := &cobra.Command{
		Use:   "nftwld",
		Short: "Trust and ban the clients of a mail server by Dovecot's reports",
		Long: `nftwld lets a mail server's firewall know its own users. Dovecot reports every
authentication to it over HTTP, outside the login's path. It trusts the client's
address after a successful one, as 'nftwl login' does, and bans an address that
fails with many different passwords.

It runs in the foreground and logs to standard error. It does what 'policy' and
'failures' in the configuration say. The socket comes from systemd
(nftwld.socket), or it listens on policy.listen. The key of the reports is the
credential policy.key, or in policy.key_file.

SIGHUP reads the configuration and the key again; if they are wrong, it keeps the
old ones. SIGTERM ends it after it has written what was reported.

Exit status: 0 after SIGTERM, 1 when something failed, 2 when the command line
was wrong.`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		Args:              cobra.NoArgs,
		RunE:              func(*cobra.Command, []string) error { return d.run() },
	}
	root.PersistentFlags().StringVar(&d.configPath, "config", "", "read `FILE`, not "+config.Path)
	root.Flags().StringVar(&d.stateDir, "state", os.Getenv("STATE_DIRECTORY"), "keep the counts of failures in `DIR` over a restart")
	root.Flags().BoolVarP(&d.verbose, "verbose", "v", false, "log each address that becomes trusted")
	root.AddCommand(newStatus(&d.configPath), newClear(&d.configPath))
	return root
}
