package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// printError prints an error and, where there is one, its remedy.
func printError(err error) {
	fmt.Fprintln(os.Stderr, "nftwl: error:", printable(err.Error()))
	if hint := hintFor(err); hint != "" {
		printHint(hint)
	}
}

func printHint(text string) { fmt.Fprintln(os.Stderr, "nftwl: hint:", text) }

// printNote says what the user did not ask for but should know.
func printNote(format string, args ...any) {
	fmt.Fprintln(os.Stderr, "nftwl:", printable(fmt.Sprintf(format, args...)))
}

// hintFor returns the remedy for an error, or "".
func hintFor(err error) string {
	var e *nftset.Error
	if !errors.As(err, &e) {
		return ""
	}
	switch e.Err {
	case nftset.ErrNoTable, nftset.ErrNoSet:
		return "load the set definitions (nft -f sets.nft), or name the right table and sets in " + config.Path
	case nftset.ErrKeyType, nftset.ErrInterval, nftset.ErrMap, nftset.ErrConstant, nftset.ErrNoTimeout:
		return "define it as: type ipv4_addr . inet_service (or ipv6_addr); flags dynamic,timeout"
	case nftset.ErrFull:
		return fmt.Sprintf("give set %s a larger size in the ruleset, or a shorter timeout", e.Set)
	case nftset.ErrPermission:
		return "run it as root"
	}
	return ""
}

// printable keeps text on one line of a terminal or log.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// life puts the life that is left into words, no more exact than useful.
func life(d time.Duration) string {
	switch {
	case d == math.MaxInt64:
		return "permanent"
	case d >= 24*time.Hour:
		d = d.Truncate(time.Hour)
	case d >= time.Hour:
		d = d.Truncate(time.Minute)
	case d >= time.Second:
		d = d.Truncate(time.Second)
	}
	return nftset.FormatTimeout(d)
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run:   func(*cobra.Command, []string) { fmt.Println("nftwl " + version()) },
	}
}

// version is what go build noted: a release's tag, or the commit.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version + " " + info.GoVersion
}
