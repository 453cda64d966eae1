package nstest

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Patience is the longest wait for something that must happen. It need not be
// exact: every wait ends as soon as the thing has happened.
const Patience = time.Minute

// Parallel runs n tests of a package at once, for tests that wait more than they
// work. TestMain calls it; -test.parallel overrides it.
func Parallel(n int) {
	if err := flag.Set("test.parallel", fmt.Sprint(n)); err != nil {
		fmt.Fprintln(os.Stderr, "nstest:", err)
		os.Exit(1)
	}
}

// Must ends the test on an error.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Until waits until check returns no error, and fails the test after Patience. The
// longer it has waited, the more rarely it checks, to leave the processor to what
// it waits for.
func Until(t testing.TB, what string, check func() error) {
	t.Helper()
	for start := time.Now(); ; {
		err := check()
		if err == nil {
			return
		}
		waited := time.Since(start)
		if waited > Patience {
			t.Fatalf("waited %v for %s: %v", Patience, what, err)
		}
		time.Sleep(min(max(waited/8, time.Millisecond), 50*time.Millisecond))
	}
}

// Poll is Until for a check without an error.
func Poll(t testing.TB, what string, done func() bool) {
	t.Helper()
	Until(t, what, func() error {
		if !done() {
			return errors.New("not yet")
		}
		return nil
	})
}

// Run runs a program that must succeed, and returns what it printed.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	return output(t, exec.Command(name, args...))
}

func output(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

// Write writes a file with exactly this mode, whatever the umask, and creates its
// directory.
func Write(t testing.TB, name, text string, mode os.FileMode) {
	t.Helper()
	Must(t, os.MkdirAll(filepath.Dir(name), 0o755))
	Must(t, os.WriteFile(name, []byte(text), mode))
	Must(t, os.Chmod(name, mode))
}

// Read returns the text of a file, or "" if it is missing.
func Read(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return string(text)
}

// Contrib returns the text of a file in contrib.
func Contrib(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(Root(t), "contrib", name))
	Must(t, err)
	return string(text)
}

// A Finding is the result of one check of nftwl doctor.
type Finding struct{ Check, Status, Text, Remedy, Command string }

// Findings runs a command such as `nftwl doctor --json`, and returns the results of
// the checks of some groups, or of all if no group is given. It fails the test if a
// result is not one line, or if a fault has no remedy.
func Findings(t testing.TB, cmd *exec.Cmd, groups ...string) []Finding {
	t.Helper()
	out, err := cmd.Output() // fails if a check fails
	var found []Finding
	if e := json.Unmarshal(out, &found); e != nil {
		t.Fatalf("%q: %v, %v\n%s", cmd.Args, err, e, out)
	}
	if len(groups) > 0 {
		found = slices.DeleteFunc(found, func(f Finding) bool {
			group, _, _ := strings.Cut(f.Check, ".")
			return !slices.Contains(groups, group)
		})
	}
	for _, f := range found {
		if (f.Status == "warn" || f.Status == "fail") != (f.Remedy != "") || strings.Contains(f.Text+f.Remedy+f.Command, "\n") {
			t.Errorf("%+v", f)
		}
	}
	return found
}

// Diagnosis returns the findings as a map from the check's name to "status: text".
// It fails the test if a check is there twice.
func Diagnosis(t testing.TB, found []Finding) map[string]string {
	t.Helper()
	texts := make(map[string]string)
	for _, f := range found {
		if texts[f.Check] != "" {
			t.Errorf("%s is there twice: %+v", f.Check, f)
		}
		texts[f.Check] = f.Status + ": " + f.Text
	}
	return texts
}
