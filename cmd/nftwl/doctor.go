package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"nftwl/pkg/doctor"
)

func newDoctor(configPath *string) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check the whole installation, and say what to do",
		Long: `Checks the configuration, the kernel's sets and rules, Dovecot, nftwld, the
units and fail2ban, each with one line, and says what to do about what is
wrong. It changes nothing. Run it as root.

  ok     as it should be
  warn   works, and should be looked at
  fail   does not work
  skip   not in use here, or could not be looked at

Exit status: 0 when nothing failed, 1 when something did.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			exe, err := os.Executable()
			if err != nil {
				return failed(err)
			}
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
			defer stop()
			context.AfterFunc(ctx, stop) // the next one kills, whatever the doctor is at
			path := *configPath
			if path != "" { // as the others name it, to compare with them
				if path, err = filepath.Abs(path); err != nil {
					return failed(err)
				}
			}
			d := &doctor.Doctor{Executable: exe, ConfigPath: path}
			results := []doctor.Result{}
			broken := false
			d.Run(ctx, func(r doctor.Result) {
				results = append(results, r)
				broken = broken || r.Status == doctor.Fail
				if !asJSON && err == nil {
					_, err = fmt.Print(resultLines(r))
				}
			})
			if asJSON {
				enc := json.NewEncoder(os.Stdout)
				enc.SetEscapeHTML(false)
				err = enc.Encode(results)
			}
			switch {
			case ctx.Err() != nil:
				return failed(errors.New("doctor: interrupted, so not everything was checked"))
			case err != nil:
				return failed(err)
			case broken:
				return &status{code: exitFailed}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print an array with an object for each check")
	return cmd
}

// resultLines is a line for a result, and what to do about it below.
func resultLines(r doctor.Result) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-4s  %-22s  %s\n", r.Status, printable(r.Check), printable(r.Text))
	if r.Remedy != "" {
		fmt.Fprintf(&b, "      %-22s  %s\n", "", printable(r.Remedy))
	}
	if r.Command != "" {
		fmt.Fprintf(&b, "      %-22s  # %s\n", "", printable(r.Command))
	}
	return b.String()
}
