package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"nftwl/pkg/install"
)

// printError prints an error and, where there is one, its remedy.
func printError(err error) {
	fmt.Fprintln(os.Stderr, "nftwl: error:", printable(err.Error()))
	if hint := install.Remedy(err); hint != "" {
		printHint(hint)
	}
}

func printHint(text string) { fmt.Fprintln(os.Stderr, "nftwl: hint:", printable(text)) }

// printNote prints what the user did not ask for but should know.
func printNote(format string, args ...any) {
	fmt.Fprintln(os.Stderr, "nftwl:", printable(fmt.Sprintf(format, args...)))
}

// printable replaces what does not show, or changes how the rest shows (ends of
// lines, marks of direction): text stays on one line of a terminal or log.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsGraphic(r) {
			return '?'
		}
		return r
	}, s)
}

// screen is the terminal that standard output is, if it is one.
type screen struct {
	there  bool // standard output is a terminal
	width  int  // 0 if it is not, or does not say
	colour bool
}

func terminal() screen {
	size, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return screen{}
	}
	term := os.Getenv("TERM")
	return screen{true, int(size.Col), term != "" && term != "dumb" && os.Getenv("NO_COLOR") == ""}
}

// columns is how many columns of a terminal text takes. Wide characters count as
// one.
func columns(text string) int { return utf8.RuneCountInString(text) }
