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
		Short: "Check the whole installation, and print remedies",
		Long: `Checks the configuration, the kernel's sets and rules, Dovecot, nftwld, the
units and fail2ban, and prints a remedy for each fault. If Dovecot runs, it
tries a login of an address that belongs to no one, and removes the address
again. It changes nothing else. Run it as root.

  ok     as it should be
  warn   works, but look at it
  fail   does not work
  skip   not in use here, or could not be checked

Exit status: 0 if no check failed, 1 if one did.`,
		RunE: func(*cobra.Command, []string) error {
			exe, err := os.Executable()
			if err != nil {
				return failed(err)
			}
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
			defer stop()
			context.AfterFunc(ctx, stop) // the next signal kills, whatever the doctor waits for
			path := *configPath
			if path != "" { // absolute, as in Dovecot's configuration
				if path, err = filepath.Abs(path); err != nil {
					return failed(err)
				}
			}
			d := &doctor.Doctor{Executable: exe, ConfigPath: path}
			results := []doctor.Result{}
			count := make(map[doctor.Status]int)
			screen := terminal()
			d.Run(ctx, func(r doctor.Result) {
				results = append(results, r)
				count[r.Status]++
				if !asJSON && err == nil {
					_, err = fmt.Print(screen.result(r))
				}
			})
			if asJSON {
				err = printJSON(results)
			} else if err == nil {
				_, err = fmt.Println(summary(count))
			}
			switch {
			case ctx.Err() != nil:
				return failed(errors.New("doctor: interrupted, so not everything was checked"))
			case err != nil:
				return failed(err)
			case count[doctor.Fail] > 0:
				return &status{code: exitFailed}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print an array with an object for each check")
	return cmd
}

// printJSON prints a value on a line of its own.
func printJSON(value any) error {
	enc := json.NewEncoder(os.Stdout)
	enc.SetEscapeHTML(false)
	return enc.Encode(value)
}

// summary counts the checks by their outcome: "9 ok, 1 warned, 2 failed".
func summary(count map[doctor.Status]int) string {
	var words []string
	for _, of := range []struct {
		status doctor.Status
		word   string
	}{{doctor.OK, "ok"}, {doctor.Warn, "warned"}, {doctor.Fail, "failed"}, {doctor.Skip, "skipped"}} {
		if n := count[of.status]; n > 0 {
			words = append(words, fmt.Sprint(n, " ", of.word))
		}
	}
	return strings.Join(words, ", ")
}

// colours of the statuses, for SGR (ECMA-48).
var colours = map[doctor.Status]string{doctor.OK: "32", doctor.Warn: "33", doctor.Fail: "1;31", doctor.Skip: "2"}

// result is a line for a result, and the remedy below it. On a terminal, lines are no
// wider than it, except commands, which stay whole.
func (s screen) result(r doctor.Result) string {
	const names = 22
	indent := 6 + names + 2
	status := fmt.Sprintf("%-4s", r.Status)
	if s.colour {
		status = "\x1b[" + colours[r.Status] + "m" + status + "\x1b[0m"
	}
	head := fmt.Sprintf("%s  %-*s  ", status, names, printable(r.Check))
	if s.width > 0 && s.width < indent+30 {
		indent = 6
	}
	left := "\n" + strings.Repeat(" ", indent)
	if indent < names || columns(r.Check) > names {
		head += left
	}
	text := head + s.wrap(printable(r.Text), left)
	if r.Remedy != "" {
		text += left + s.wrap(printable(r.Remedy), left)
	}
	if r.Command != "" {
		text += left + "# " + printable(r.Command)
	}
	return text + "\n"
}

// wrap breaks text at spaces so that it fits beside an indent, left. A word that is
// longer than a line stays whole.
func (s screen) wrap(text, left string) string {
	var b strings.Builder
	at := len(left) - 1
	for i, word := range strings.Split(text, " ") {
		switch {
		case i == 0:
		case s.width > 0 && at+1+columns(word) > s.width:
			b.WriteString(left)
			at = len(left) - 1
		default:
			b.WriteString(" ")
			at++
		}
		b.WriteString(word)
		at += columns(word)
	}
	return b.String()
}
