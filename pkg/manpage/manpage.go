// Package manpage has the manual pages say what the commands say of themselves.
// Tests alone use it.
package manpage

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"nftwl/pkg/nstest"
)

// Command writes what the help of a command and of those below it says.
func Command(b *strings.Builder, cmd *cobra.Command) {
	fmt.Fprintf(b, ".SS %s\n", escape(strings.TrimSuffix(cmd.UseLine(), " [flags]")))
	b.WriteString(Text(cmd.Long))
	if cmd.Example != "" {
		b.WriteString(".PP\nExamples:\n" + Text(cmd.Example))
	}
	b.WriteString(Flags(cmd))
	for _, below := range cmd.Commands() {
		if !below.Hidden {
			Command(b, below)
		}
	}
}

// Flags is what a command's own flags are for.
func Flags(cmd *cobra.Command) string {
	var b strings.Builder
	// A name and, two spaces apart, what it is for.
	for line := range strings.Lines(cmd.NonInheritedFlags().FlagUsages()) {
		flag, usage, _ := strings.Cut(strings.TrimSpace(line), "  ")
		if strings.Contains(flag, "--help") {
			continue
		}
		// cobra's notation of a value that can be left out.
		flag = regexp.MustCompile(` (\S+)\[=.*\]$`).ReplaceAllString(flag, "[=$1]")
		fmt.Fprintf(&b, ".TP\n.B %s\n%s", escape(flag), Text(strings.TrimSpace(usage)))
	}
	return b.String()
}

// Text writes text, of which an empty line ends a paragraph, and indented
// lines stay as they are.
func Text(text string) string {
	var b strings.Builder
	asItIs := false
	for _, line := range strings.Split(text, "\n") {
		if indented := strings.HasPrefix(line, "  "); indented != asItIs {
			asItIs = indented
			b.WriteString(map[bool]string{true: ".RS 2\n.EX\n", false: ".EE\n.RE\n"}[indented])
		}
		switch {
		case line == "":
			b.WriteString(".PP\n")
		case asItIs:
			b.WriteString(escape(line[2:]) + "\n")
		default:
			b.WriteString(escape(line) + "\n")
		}
	}
	if asItIs {
		b.WriteString(".EE\n.RE\n")
	}
	return b.String()
}

// escape writes text as roff shows it: groff_char(7).
func escape(text string) string {
	var b strings.Builder
	for i, r := range text {
		switch {
		case i == 0 && r == '.':
			b.WriteString(`\&.`)
		case r > '~':
			fmt.Fprintf(&b, `\[u%04X]`, r)
		case strings.ContainsRune("\\-'`^~\"", r):
			b.WriteString(map[rune]string{'\\': `\(rs`, '-': `\-`, '\'': `\(aq`, '`': `\(ga`, '^': `\(ha`, '~': `\(ti`, '"': `\(dq`}[r])
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// Check has man show the page, which must have such words and no fault, and find
// it by its subject.
func Check(t *testing.T, path, subject string, shows ...string) {
	t.Helper()
	cmd := exec.Command(nstest.Need(t, "man", "man-db"), "-l", "--warnings", "-E", "UTF-8", path)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "MANWIDTH=80", "MANOPT=", "MAN_KEEP_FORMATTING=")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil || errs.Len() > 0 {
		t.Errorf("%s: %v\n%s", path, err, &errs)
	}
	for _, words := range shows {
		if !strings.Contains(out.String(), words) {
			t.Errorf("%s does not show %q:\n%s", path, words, &out)
		}
	}
	if b, err := exec.Command(nstest.Need(t, "lexgrog", "man-db"), path).CombinedOutput(); err != nil || string(b) != path+`: "`+subject+"\"\n" {
		t.Errorf("lexgrog: %v: %s", err, b)
	}
}
