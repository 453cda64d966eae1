package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"nftwl/pkg/resident"
)

func newStatus() *cobra.Command {
	var path string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what the resident server (serve) has counted",
		Long: `Asks the resident server what it has counted since it started: the logins, and
what became of their clients' addresses.

  new      not trusted before
  renewed  trusted for longer than before
  kept     trusted for long enough already
  ignored  not to be trusted: loopback, an ignored prefix, nftwl_trust=no
  failed   not trusted because of an error, by reason
  late     answered before the kernel had trusted the address
  refused  requests that got no answer, which denies a login, by reason

Exit status: 0 when the server answers, 1 when it does not.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			stats, err := resident.Ask(path)
			if err != nil {
				printError(fmt.Errorf("status: %s: %w", path, err))
				switch {
				case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED):
					printHint("systemctl start nftwl.socket, or --socket with the path that the server listens on")
				case errors.Is(err, unix.EACCES):
					printHint("run it as root")
				}
				return &status{exitFailed, nil}
			}
			if asJSON {
				return failed(json.NewEncoder(os.Stdout).Encode(stats))
			}
			for _, line := range statusLines(stats) {
				if _, err := fmt.Println(line); err != nil {
					return failed(err)
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&path, "socket", socketPath, "`PATH` of the server's socket")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}

// statusLines puts the counters into words.
func statusLines(s resident.Stats) []string {
	lines := []string{
		fmt.Sprintf("logins %d since %s", s.Logins, s.Started.Local().Format(time.DateTime)),
		fmt.Sprintf("trusted %d new, %d renewed, %d kept; ignored %d", s.New, s.Renewed, s.Kept, s.Ignored),
		"failed " + reasons(s.Failed),
		fmt.Sprintf("refused %s; late %d", reasons(s.Refused), s.Late),
	}
	if s.Logins > 0 {
		slowest := time.Duration(s.Slowest * float64(time.Second))
		lines = append(lines, fmt.Sprintf("answered in %s on average, the slowest in %s",
			s.Mean().Round(10*time.Microsecond), slowest.Round(10*time.Microsecond)))
	}
	return lines
}

// reasons prints a sum and, where it is not 0, what it is made of.
func reasons(of map[string]uint64) string {
	var sum uint64
	var parts string
	for _, reason := range slices.Sorted(maps.Keys(of)) {
		sum += of[reason]
		parts += fmt.Sprintf(" %s %d", reason, of[reason])
	}
	if sum == 0 {
		return "0"
	}
	return fmt.Sprintf("%d:%s", sum, parts)
}
