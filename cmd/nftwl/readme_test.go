package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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

// The README's settings for Dovecot are the start of the shipped drop-in, without its
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
		block, _, _ := strings.Cut(block, "# and the same for ")
		if !strings.HasPrefix(bare.String(), block) {
			t.Errorf("the README has\n%sand the drop-in\n%s", block, &bare)
		}
	}
}

// The transcripts show what the commands print, except for the time left.
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

// make demo shows real connections before and after a login and a ban. Without nft it
// shows only the sets, and prints why.
func TestDemo(t *testing.T) {
	program := nstest.Build(t, "testdata/demo")
	demo := func() string {
		t.Helper()
		cmd := exec.Command(program)
		cmd.Dir = nstest.Root(t)
		cmd.Env = []string{"PATH=" + filepath.Dir(nstest.Build(t, "cmd/nftwl")) + ":/usr/bin:/bin"}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	count := func(out string, lines map[string]int) {
		t.Helper()
		for line, want := range lines {
			if n := len(regexp.MustCompile(`(?m)^`+line).FindAllString(out, -1)); n != want {
				t.Errorf("%q is there %d times, and not %d, in\n%s", line, n, want, out)
			}
		}
	}
	nstest.Need(t, "ip", "iproute2")
	nstest.Need(t, "nft", "nftables")
	nstest.New(t)
	out := demo()
	count(out, map[string]int{
		`198\.51\.100\.8  to port 587:( open){5} (reset|dropped)( dropped){2}$`: 1, // a stranger
		`192\.0\.2\.7     to port 587:( open){8}$`:                              2, // trusted
		`198\.51\.100\.66 to port 993: open$`:                                   1, // before the ban
		`198\.51\.100\.66 to port 993: dropped$`:                                2,
		`the mail process of alice$`:                                            1,
		`trusted  2001:db8::7 .* bob$`:                                          2,
		`banned   198\.51\.100\.66 .* guessing$`:                                2,
	})
	if n := strings.Count(out, "\n"); n > 50 {
		t.Errorf("it has %d lines", n)
	}
	for line := range strings.Lines(out) {
		if len([]rune(line)) > 81 {
			t.Errorf("a long line: %s", line)
		}
	}

	for _, err := range []error{
		unix.Unshare(unix.CLONE_NEWNS),
		unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("none", "/usr/sbin", "tmpfs", 0, ""),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	out = demo()
	count(out, map[string]int{
		`# No connections are shown: nft is not installed \(package nftables\)$`: 1,
		` to port `:                              0,
		`trusted  2001:db8::7 .* bob$`:           2,
		`banned   198\.51\.100\.66 .* guessing$`: 2,
	})
}
