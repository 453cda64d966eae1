package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/snapshot"
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
	var owner *snapshot.OwnerError
	if errors.As(err, &owner) {
		return "see who wrote it; 'nftwl restore " + owner.Path + "' restores it all the same"
	}
	var old *snapshot.NotRestoredError
	var e *nftset.Error
	switch {
	case errors.Is(err, nftset.ErrBusy):
		return "run it again"
	case errors.As(err, &e):
	case errors.As(err, &old):
		return "repair it, or move it away (mv " + old.Path + " " + old.Path + ".bad), and save again"
	default:
		return ""
	}
	switch e.Err {
	case nftset.ErrNoTable, nftset.ErrNoSet:
		file := "sets.nft"
		if e.Table.Name == "nftwl" {
			file = "standalone.nft"
		}
		return "load the set definitions (nft -f /etc/nftwl/" + file + "), or name the right table and sets in " + config.Path
	case nftset.ErrKeyType, nftset.ErrInterval, nftset.ErrMap, nftset.ErrConstant, nftset.ErrNoTimeout:
		return "define it as: type ipv4_addr . inet_service (or ipv6_addr); flags dynamic,timeout"
	case nftset.ErrFull:
		return fmt.Sprintf("give set %s a larger size in the ruleset, or a shorter timeout", e.Set)
	case nftset.ErrPermission:
		return "run it as root"
	}
	return ""
}

// printable keeps text on one line of a terminal or log, and as it is: not
// turned around, and with nothing in it that does not show.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsGraphic(r) {
			return '?'
		}
		return r
	}, s)
}

// screen is where standard output shows. It is empty where that is not a
// terminal.
type screen struct {
	width, height int  // 0 where the terminal does not say
	redraws       bool // it obeys control sequences
	colour        bool
}

func terminal() screen {
	size, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return screen{}
	}
	term := os.Getenv("TERM")
	redraws := term != "" && term != "dumb"
	return screen{int(size.Col), int(size.Row), redraws, redraws && os.Getenv("NO_COLOR") == ""}
}

// columns is how many columns of a terminal text takes, or some more: signs
// that are put on others count as well.
func columns(text string) (n int) {
	for _, r := range text {
		n++
		// The blocks of East Asian scripts and pictures, whose signs are wide
		// (Unicode's EastAsianWidth.txt).
		if r >= 0x1100 && r < 0x1160 || r >= 0x2e80 && r < 0xa4d0 || r >= 0xac00 && r < 0xd7a4 ||
			r >= 0xf900 && r < 0xfb00 || r >= 0xff00 && r < 0xff61 || r >= 0x1f300 && r < 0x40000 {
			n++
		}
	}
	return n
}

// cut shortens text to columns of a terminal.
func cut(text string, most int) string {
	if columns(text) <= most {
		return text
	}
	n := 1 // the ellipsis
	for i, r := range text {
		if n += columns(string(r)); n > most {
			return strings.TrimRight(text[:i], " ") + "…"
		}
	}
	return text
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
		Long:  "Prints the version, or the commit, that nftwl was built from, and that of Go.",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Println("nftwl " + version())
			return failed(err)
		},
	}
}

// release is the version that contrib/packaging/build.sh was given; empty where
// it was given none.
var release string

// version is the release, or what go build noted: a tag, or the commit.
func version() string {
	if release != "" {
		return release + " " + runtime.Version()
	}
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version + " " + info.GoVersion
}
