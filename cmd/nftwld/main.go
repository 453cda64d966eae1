// Command nftwld reads Dovecot's reports of authentications. It adds the
// addresses of users to nftables' trusted sets, and bans those that guess
// passwords.
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

// failure is an error that ends the program with exitFailed. Every other error is
// about the command line.
type failure struct {
	error
	hint string // how to fix it, or empty
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
		Short: "Trust and ban a mail server's clients by Dovecot's reports",
		Long: `nftwld tells the firewall which addresses a mail server's users log in from.
Dovecot reports every authentication to it over HTTP, and no login waits for
that. After a successful one, nftwld trusts the client's address, as 'nftwl
login' does. It bans an address that fails with many different passwords. It can
share the sets with other machines, over Redis or Valkey.

It runs in the foreground and logs to standard error. 'policy', 'failures' and
'cluster' in the configuration set what it does. It takes its socket from systemd
(nftwld.socket), or listens on policy.listen. It reads the key that reports must
have from the credential policy.key, or from policy.key_file.

On SIGHUP, nftwld reads the configuration and the key again; if they are wrong,
it keeps the old ones. On SIGTERM, it writes everything that was reported, and
exits.

Exit status: 0 after SIGTERM, 1 when something failed, 2 when the command line
was wrong.`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		Args:              cobra.NoArgs,
		RunE:              func(*cobra.Command, []string) error { return d.run() },
	}
	root.PersistentFlags().StringVar(&d.configPath, "config", "", "read `FILE`, not "+config.Path)
	root.Flags().StringVar(&d.stateDir, "state", os.Getenv("STATE_DIRECTORY"), "save the failures in `DIR`, so that a restart keeps them")
	root.Flags().BoolVarP(&d.verbose, "verbose", "v", false, "log each address that becomes trusted")
	root.AddCommand(newStatus(&d.configPath), newClear(&d.configPath))
	return root
}
