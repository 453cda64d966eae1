package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// In a real bash, someone presses Tab. Comments, which can have users' names, are
// never run or expanded.
func TestBashCompletes(t *testing.T) {
	const functions = "/usr/share/bash-completion/bash_completion"
	bash := nstest.Need(t, "bash", "bash")
	if _, err := os.Stat(functions); err != nil {
		nstest.Skip(t, "%s is not there: apt-get install bash-completion", functions)
	}
	nstest.New(t)
	nstest.Nft(t, fourSets+`
add element inet filter trusted_ipv4 { 192.0.2.7 . 993 timeout 1d comment "$(touch made)" }
add element inet filter trusted_ipv4 { 192.0.2.8 . 993 timeout 1d comment "'; touch made; `+"`touch made`"+`" }
add element inet filter trusted_ipv6 { 2001:db8::7 . 993 timeout 1d comment "alice" }
`)
	cmd := exec.Command(bash, "--norc", "--noprofile", "-i")
	cmd.Dir = t.TempDir()
	cmd.Env = []string{"TERM=dumb", "HOME=/", "PATH=" + filepath.Dir(nstest.Build(t, "cmd/nftwl")) + ":/usr/bin:/bin"}
	y := startOn(t, 200, 24, cmd)
	// What the user types, and what the terminal then shows. bash shows nothing while
	// there is more to read.
	for _, step := range []struct{ typed, shown string }{
		{". " + functions + " && echo re''ady\n", "\nready\n"},
		{". <(nftwl completion bash) && echo lo''aded\n", "\nloaded\n"},
		{"nftwl rem\t", "# nftwl remove "},
		{"2001:db8:\t", "2001:db8::7 "},
		{"&& echo don''e\n", "\ndone\n"},
		{"nftwl remove 192.\t", "0.2."},
		{"\t\t", "192.0.2.7  ($(touch made))"},
		{"", "192.0.2.8  ('; touch made; `touch made`)"},
		{"\x15exit 7\n", "exit"},
	} {
		fmt.Fprint(y.keys, step.typed)
		for end := time.Now().Add(limit); !strings.Contains(y.written(), step.shown); time.Sleep(2 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("after %q, %q is not in\n%s", step.typed, step.shown, y.written())
			}
		}
	}
	text, code := y.wait(t, cmd)
	if code != 7 {
		t.Errorf("exit %d", code)
	}
	if out := trustedNow(t, "trusted_ipv6"); strings.Contains(out, "2001:db8::7") {
		t.Errorf("what was completed was not removed:\n%s\n%s", text, out)
	}
	if left, _ := filepath.Glob(filepath.Join(cmd.Dir, "*")); len(left) > 0 {
		t.Errorf("a comment was executed: %q", left)
	}
}
