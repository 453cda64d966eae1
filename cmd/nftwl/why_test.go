package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// docs/troubleshooting.md shows what nftwl why prints with the shipped rules.
// UPDATE_DOCS=1 writes its transcripts.
func TestTroubleshootingWhy(t *testing.T) {
	nstest.New(t)
	contrib := filepath.Join(nstest.Root(t), "contrib", "nftables")
	dir := t.TempDir()
	if err := os.Symlink(contrib, filepath.Join(dir, "nftwl")); err != nil {
		t.Fatal(err)
	}
	load := exec.Command(nstest.Need(t, "nft", "nftables"), "-I", dir, "-f", filepath.Join(contrib, "nftables.conf"))
	if out, err := load.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	nstest.Nft(t, `add element inet filter limited_ipv4 { 203.0.113.9 . 587 }
		table inet blocklist {
			set addresses { type ipv4_addr; flags interval; elements = { 192.0.2.0/24 }; }
			chain input { type filter hook input priority filter - 5; ip saddr @addresses drop; }
		}`)
	for _, args := range [][]string{
		{"ban", "--port", "587", "--comment", "postfix-sasl", "198.51.100.66"},
		{"add", "--comment", "alice", "192.0.2.7"},
	} {
		if out, err := nftwl(t, nil, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", args, err, out)
		}
	}

	path := filepath.Join(nstest.Root(t), "docs", "troubleshooting.md")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	timeLeft := regexp.MustCompile(`(?m) (1d|23h59m|1h|59m[0-9]+s)( +|$)`)
	want := regexp.MustCompile("(?s)```console\n\\$ nftwl (why [^\n]*)\n.*?```\n").ReplaceAllStringFunc(string(text), func(block string) string {
		n++
		command, _, _ := strings.Cut(strings.TrimPrefix(block, "```console\n"), "\n")
		out, err := nftwl(t, nil, strings.Fields(command)[2:]...).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", command, err, out)
			return block // do not write an error into the document
		}
		new := "```console\n" + command + "\n" + string(out) + "```\n"
		if timeLeft.ReplaceAllString(new, " TIME ") == timeLeft.ReplaceAllString(block, " TIME ") {
			return block
		}
		return new
	})
	if n < 3 {
		t.Errorf("%d transcripts of nftwl why", n)
	}
	if want == string(text) {
		return
	}
	if os.Getenv("UPDATE_DOCS") != "" {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("docs/troubleshooting.md is not what nftwl says; UPDATE_DOCS=1 go test -run TestTroubleshootingWhy ./cmd/nftwl writes it\n%s", want)
}

// why does not claim that a port is open if it could not copy all rules.
func TestWhyOmitted(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, "table inet filter { }")
	nstest.Need(t, "ipset", "ipset")
	out, err := exec.Command("sh", "-ec", "ipset create x hash:ip; iptables-nft -A INPUT -m set --match-set x src -j DROP").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	stdout, stderr, code := output(t, nftwl(t, nil, "why", "--port", "993", "192.0.2.7"))
	if !strings.HasPrefix(stdout, "993  accept  no chain of hook input") || strings.Contains(stdout, "open") || !strings.Contains(stderr, "table ip filter (") {
		t.Errorf("exit %d\n%s%s", code, stdout, stderr)
	}
}
