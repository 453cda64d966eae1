package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"nftwl/pkg/config"
	"nftwl/pkg/install"
)

func newSetup(configPath *string) *cobra.Command {
	var write bool
	parts := map[string]func(*install.Options) (*install.Plan, error){
		"dovecot":  install.Dovecot,
		"nftables": install.Nftables,
		"systemd":  install.Systemd,
		"fail2ban": install.Fail2ban,
		"policy":   install.Policy,
	}
	cmd := &cobra.Command{
		Use:   "setup dovecot|policy|nftables|systemd|fail2ban",
		Short: "Print or write the files that a part of the installation needs",
		Long: `Prints the files that fit this machine and its configuration, each below the
path where it belongs, and after them, as comments, what to do next.

  dovecot    the drop-in that has Dovecot run 'nftwl login' after each login
  policy     nftwld's key and units, and the drop-in that has Dovecot report
             each authentication to it: no program runs at a login
  nftables   the sets and rules, to be included into your own firewall, or as a
             table of their own where ufw or firewalld own the firewall
  systemd    the units that keep the sets over restart, reload, reboot
  fail2ban   the action, the filters and the jails

With --write it puts them there, and says what to do next and how to undo it.
It never overwrites a file that differs: if there is one, it writes nothing.
It enables and reloads nothing.

Exit status: 0 when all went well, 1 when something failed, 2 when the command
line was wrong.`,
		ValidArgs: []string{"dovecot", "policy", "nftables", "systemd", "fail2ban"},
		Args:      cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			part := parts[args[0]]
			if part == nil {
				return fmt.Errorf("setup: %q is not one of dovecot, policy, nftables, systemd and fail2ban", args[0])
			}
			o, err := setupOptions(*configPath)
			if err != nil {
				return failed(err)
			}
			p, err := part(o)
			var problem *install.Problem
			if errors.As(err, &problem) {
				return refuse(*problem)
			}
			if err != nil {
				return failed(fmt.Errorf("setup: %w", err))
			}
			if write {
				return writePlan(p)
			}
			_, err = os.Stdout.Write(planText(p))
			return failed(err)
		},
	}
	cmd.Flags().BoolVar(&write, "write", false, "put the files in their places")
	return cmd
}

// setupOptions are those of this machine.
func setupOptions(configPath string) (*install.Options, error) {
	c, err := config.Load(configPath)
	if err != nil {
		return nil, err
	}
	o := &install.Options{Config: c}
	if o.Executable, err = os.Executable(); err != nil {
		return nil, err
	}
	// Where that is a link to another place, the link is what stays over an
	// upgrade.
	const usual = "/usr/bin/nftwl"
	here, err := os.Stat(o.Executable)
	if err != nil {
		return nil, err
	}
	if there, err := os.Stat(usual); err == nil && os.SameFile(here, there) {
		o.Executable = usual
	}
	if configPath != "" {
		if configPath, err = filepath.Abs(configPath); err != nil {
			return nil, err
		}
	}
	if configPath != config.Path {
		o.ConfigPath = configPath
	}
	return o, nil
}

// refuse prints problems, and a remedy that several have once.
func refuse(problems ...install.Problem) error {
	for i, p := range problems {
		printError(fmt.Errorf("setup: %s", p.Text))
		last := i+1 == len(problems) || problems[i+1].Remedy != p.Remedy
		if p.Remedy != "" && last {
			printHint(printable(p.Remedy))
		}
	}
	return &status{code: exitFailed}
}

// planText is the files, and as comments what is to be said about them.
func planText(p *install.Plan) []byte {
	var b bytes.Buffer
	secrets := false
	for _, f := range p.Files {
		fmt.Fprintf(&b, "### %s\n%s\n", f.Path, cmp.Or(f.Shown, f.Text))
		secrets = secrets || f.Shown != ""
	}
	fmt.Fprintln(&b, "### What to do")
	if secrets {
		fmt.Fprintln(&b, "# KEY and SALT stand for secrets, which are not printed: --write keeps those that")
		fmt.Fprintln(&b, "# are there, or makes new ones.\n#")
	}
	if len(p.Problems) > 0 {
		fmt.Fprintln(&b, "# With --write nothing would be written:")
		for _, problem := range p.Problems {
			fmt.Fprintf(&b, "#   %s\n", printable(problem.Text))
			if problem.Remedy != "" {
				fmt.Fprintf(&b, "#     %s\n", printable(problem.Remedy))
			}
		}
		fmt.Fprintln(&b, "#")
	}
	for _, note := range p.Notes {
		fmt.Fprintf(&b, "# %s\n#\n", printable(note))
	}
	fmt.Fprintln(&b, "# With the files in their places, where --write puts them:")
	steps(&b, "#   ", p.Next)
	return b.Bytes()
}

// writePlan writes the files, and says what it did.
func writePlan(p *install.Plan) error {
	if len(p.Problems) > 0 {
		return refuse(p.Problems...)
	}
	written, err := p.Write()
	if err != nil {
		printError(fmt.Errorf("setup: nothing is written: %w", err))
		if errors.Is(err, fs.ErrPermission) {
			printHint("run it as root")
		}
		return &status{code: exitFailed}
	}
	var b bytes.Buffer
	for _, path := range written {
		fmt.Fprintf(&b, "written: %s\n", path)
	}
	if there := len(p.Files) - len(written); there > 0 {
		fmt.Fprintf(&b, "there already, and the same: %d\n", there)
	}
	for _, note := range p.Notes {
		fmt.Fprintf(&b, "\n%s\n", printable(note))
	}
	fmt.Fprintln(&b, "\nNext:")
	steps(&b, "  ", p.Next)
	fmt.Fprintln(&b, "\nTo undo it:")
	steps(&b, "  ", p.Undo)
	_, err = os.Stdout.Write(b.Bytes())
	return failed(err)
}

// steps prints lines for a shell. Where they are comments anyway, those in
// words need no # of their own.
func steps(w io.Writer, prefix string, lines []string) {
	for _, line := range lines {
		if words, ok := strings.CutPrefix(line, "# "); ok && strings.HasPrefix(prefix, "#") {
			line = words
		} else if strings.HasPrefix(prefix, "#") {
			line = "  " + line
		}
		fmt.Fprintln(w, prefix+printable(line))
	}
}
