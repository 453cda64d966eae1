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
units and fail2ban, and says what to do about what is wrong. Where Dovecot runs,
it tries a login of an address that belongs to no one, and removes that again.
It changes nothing else. Run it as root.

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
			count := make(map[doctor.Status]int)
			screen := terminal()
			d.Run(ctx, func(r doctor.Result) {
				results = append(results, r)
				count[r.Status]++
				if !asJSON && err == nil {
					_, err = fmt.Print(screen.result(r))
				}
			})
			if !asJSON && err == nil {
				_, err = fmt.Println(summary(count))
			}
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
			case count[doctor.Fail] > 0:
				return &status{code: exitFailed}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print an array with an object for each check")
	return cmd
}

// summary says how many checks came out how: "9 ok, 1 warned, 2 failed".
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

// result is a line for a result, and what to do about it below. A terminal has
// them in lines that are no longer than its own.
func (s screen) result(r doctor.Result) string {
	const names = 22
	indent := 6 + names + 2
	if s.width > 0 && s.width < indent+30 {
		indent = 6
	}
	var b strings.Builder
	status := fmt.Sprintf("%-4s", r.Status)
	if s.colour {
		status = "\x1b[" + colours[r.Status] + "m" + status + "\x1b[0m"
	}
	fmt.Fprintf(&b, "%s  %-*s  ", status, names, printable(r.Check))
	left := strings.Repeat(" ", indent)
	if indent < names || columns(r.Check) > names {
		b.WriteString("\n" + left)
	}
	next := "\n" + left
	b.WriteString(strings.Join(s.wrap(printable(r.Text), indent, ""), next))
	if r.Remedy != "" {
		b.WriteString(next + strings.Join(s.wrap(printable(r.Remedy), indent, ""), next))
	}
	if r.Command != "" { // which a shell takes in several lines, too
		b.WriteString(next + "# " + strings.Join(s.wrap(printable(r.Command), indent+2, ` \`), next+"  "))
	}
	return b.String() + "\n"
}

// wrap breaks text at spaces, so that it fits beside an indent; each line but
// the last has an end. A word that is longer than a line stays whole.
func (s screen) wrap(text string, indent int, end string) (lines []string) {
	line, quoted := "", false
	for _, word := range strings.Split(text, " ") {
		// A break inside quotes would become part of the word.
		if line != "" && !(end != "" && quoted) && s.width > 0 && indent+columns(line+" "+word+end) > s.width {
			lines, line = append(lines, line+end), word
		} else if line != "" {
			line += " " + word
		} else {
			line = word
		}
		quoted = quoted != (strings.Count(word, "'")%2 == 1)
	}
	return append(lines, line)
}
