package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"nftwl/pkg/config"
	"nftwl/pkg/nstest"
)

// readme returns the README's code blocks of a language.
func readme(t *testing.T, language string) []string {
	t.Helper()
	found := blocks(documents(t)["README.md"], language)
	if len(found) == 0 {
		t.Fatalf("the README has no block of %s", language)
	}
	return found
}

func TestReadmeConfigIsTheDefault(t *testing.T) {
	for _, block := range readme(t, "yaml") {
		c, err := config.Parse([]byte(block))
		if err != nil || !reflect.DeepEqual(c, config.Default()) {
			t.Errorf("%+v, %v", c, err)
		}
	}
}

// What is to be pasted is what is shipped, and tried with Dovecot, less its
// comments.
func TestReadmeDovecotIsTheDropIn(t *testing.T) {
	dropIn, err := os.ReadFile(filepath.Join(nstest.Root(t), "contrib", "dovecot", "90-nftwl.conf"))
	if err != nil {
		t.Fatal(err)
	}
	var bare strings.Builder
	for line := range strings.Lines(string(dropIn)) {
		if text := strings.TrimSpace(line); text != "" && !strings.HasPrefix(text, "#") {
			bare.WriteString(line)
		}
	}
	for _, block := range readme(t, "dovecot") {
		if block != bare.String() {
			t.Errorf("the README has\n%sand the drop-in\n%s", block, &bare)
		}
	}
}

// The transcripts are what the commands print, but for the time that is left.
func TestReadmeTranscripts(t *testing.T) {
	timeLeft := regexp.MustCompile(` (1d|23h59m) +`)
	for _, block := range readme(t, "console") {
		nstest.New(t)
		nstest.Nft(t, "include \""+filepath.Join(nstest.Root(t), "contrib", "nftables", "sets.nft")+"\"\n")
		var script, want strings.Builder
		for line := range strings.Lines(block) {
			if command, ok := strings.CutPrefix(line, "$ "); ok {
				script.WriteString("printf '%s\\n' " + quoteShell(strings.TrimSuffix(line, "\n")) + "\n" + command)
			}
			want.WriteString(line)
		}
		cmd := exec.Command("/bin/sh", "-e", "-c", script.String())
		cmd.Env = []string{"PATH=" + filepath.Dir(nstest.Build(t, "cmd/nftwl")) + ":/usr/bin:/bin"}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		got := timeLeft.ReplaceAllString(string(out), " TIME ")
		if wanted := timeLeft.ReplaceAllString(want.String(), " TIME "); got != wanted {
			t.Errorf("got\n%s\nwant\n%s", got, wanted)
		}
	}
}

func quoteShell(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// make demo, but for make: it needs no nft and no privilege outside of its
// namespace.
func TestDemo(t *testing.T) {
	nstest.New(t)
	cmd := exec.Command("/bin/sh", "testdata/demo.sh")
	cmd.Dir = nstest.Root(t)
	cmd.Env = []string{"PATH=" + filepath.Dir(nstest.Build(t, "cmd/nftwl")) + ":/usr/bin:/bin"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, words := range []string{"the mail process of alice", "restored 20, expired 0, already there 0"} {
		if !strings.Contains(string(out), words) {
			t.Errorf("%q is not in\n%s", words, out)
		}
	}
	// The list before the flush, and after the restore.
	if n := strings.Count(string(out), "\ntrusted  2001:db8::7 "); n != 2 {
		t.Errorf("bob is listed %d times in\n%s", n, out)
	}
}
