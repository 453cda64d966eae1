package main

import (
	"bytes"
	"cmp"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"nftwl/pkg/config"
	"nftwl/pkg/install"
)

func newSetup(configPath *string) *cobra.Command {
	var write bool
	parts := map[string]func(*install.Options) *install.Plan{
		"dovecot":  install.Dovecot,
		"nftables": install.Nftables,
		"systemd":  install.Systemd,
		"fail2ban": install.Fail2ban,
		"policy":   install.Policy,
	}
	cmd := &cobra.Command{
		Use:   "setup dovecot|policy|nftables|systemd|fail2ban",
		Short: "Print or write the files that a part of the installation needs",
		Long: `Prints the files for this machine, each below the path where it belongs, then
what to do next, and how to undo it.

  dovecot    the drop-in that has Dovecot run 'nftwl login' after each login
  policy     nftwld's key and units, and the drop-in that has Dovecot report
             each authentication to it: no program runs at a login
  nftables   the sets and rules, to include into your own firewall; with
             "table: inet nftwl" in the configuration, a table of their own
  systemd    the units that keep the sets over restart, reload and reboot
  fail2ban   the action, the filters and the jails

With --write, it writes the files that are missing. It never overwrites a file:
if one differs, it writes nothing. It enables and reloads nothing.

Exit status: 0, or 1 if something failed, 2 if the command line was wrong.`,
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := config.Load(*configPath)
			if err != nil {
				return failed(err)
			}
			executable, err := os.Executable()
			if err != nil {
				return failed(err)
			}
			p := parts[args[0]](&install.Options{Executable: executable, ConfigPath: *configPath, Config: c})
			if write {
				return writePlan(p)
			}
			return printPlan(p)
		},
	}
	cmd.Flags().BoolVar(&write, "write", false, "put the files in their places")
	return cmd
}

// printPlan prints the files, and what to know and to do about them.
func printPlan(p *install.Plan) error {
	var b bytes.Buffer
	secrets := false
	for _, f := range p.Files {
		fmt.Fprintf(&b, "### %s\n%s\n", f.Path, cmp.Or(f.Shown, f.Text))
		secrets = secrets || f.Shown != ""
	}
	fmt.Fprintln(&b, "### What to do")
	if secrets {
		fmt.Fprintln(&b, "\nKEY and SALT stand for secrets, which setup does not print: --write keeps those\nthat exist, or makes new ones.")
	}
	if len(p.Problems) > 0 {
		fmt.Fprintln(&b, "\n--write would write nothing:")
	}
	for _, problem := range p.Problems {
		fmt.Fprintf(&b, "  %s\n", printable(problem.Text))
		if problem.Remedy != "" {
			fmt.Fprintf(&b, "    %s\n", printable(problem.Remedy))
		}
	}
	printSteps(&b, p)
	_, err := os.Stdout.Write(b.Bytes())
	return failed(err)
}

// writePlan writes the files, and prints what it did.
func writePlan(p *install.Plan) error {
	for _, problem := range p.Problems {
		printError(fmt.Errorf("setup: %w", &problem))
	}
	if len(p.Problems) > 0 {
		return &status{code: exitFailed}
	}
	written, err := p.Write()
	if err != nil {
		return failed(fmt.Errorf("setup: nothing is written: %w", err))
	}
	var b bytes.Buffer
	for _, path := range written {
		fmt.Fprintf(&b, "written: %s\n", path)
	}
	if there := len(p.Files) - len(written); there > 0 {
		fmt.Fprintf(&b, "there already, and the same: %d\n", there)
	}
	printSteps(&b, p)
	_, err = os.Stdout.Write(b.Bytes())
	return failed(err)
}

func printSteps(b *bytes.Buffer, p *install.Plan) {
	for _, note := range p.Notes {
		fmt.Fprintf(b, "\n%s\n", printable(note))
	}
	for _, part := range []struct {
		title string
		lines []string
	}{{"Next", p.Next}, {"To undo it", p.Undo}} {
		fmt.Fprintf(b, "\n%s:\n", part.title)
		for _, line := range part.lines {
			fmt.Fprintf(b, "  %s\n", printable(line))
		}
	}
}
