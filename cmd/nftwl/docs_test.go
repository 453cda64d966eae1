package main

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"nftwl/pkg/config"
	"nftwl/pkg/install"
	"nftwl/pkg/nstest"
)

// documents returns the text of each document, by its path from the root of the
// repository.
func documents(t *testing.T) map[string]string {
	t.Helper()
	root := nstest.Root(t)
	texts := make(map[string]string)
	for _, pattern := range []string{"*.md", "docs/*.md"} {
		names, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil || len(names) == 0 {
			t.Fatalf("%s: %v", pattern, err)
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			rel, _ := filepath.Rel(root, name)
			texts[rel] = string(text)
		}
	}
	return texts
}

// blocks returns the code blocks of a language in a document.
func blocks(text, language string) (found []string) {
	for _, m := range regexp.MustCompile("(?s)\n```"+language+"\n(.*?\n)```\n").FindAllStringSubmatch(text, -1) {
		found = append(found, m[1])
	}
	return found
}

func TestDocsLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#]*)(#[^)]*)?\)`)
	heading := regexp.MustCompile(`(?m)^#+ (.*)$`)
	docs := documents(t)
	anchors := func(text string) (all []string) {
		for _, m := range heading.FindAllStringSubmatch(text, -1) {
			anchor := strings.Map(func(r rune) rune {
				switch {
				case r == ' ':
					return '-'
				case r == '-', r == '_', r >= '0' && r <= '9', r >= 'a' && r <= 'z':
					return r
				}
				return -1
			}, strings.ToLower(m[1]))
			all = append(all, "#"+anchor)
		}
		return all
	}
	for name, text := range docs {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			path, anchor := m[1], m[2]
			if strings.Contains(path, "://") {
				continue
			}
			target := name
			if path != "" {
				target = filepath.Join(filepath.Dir(name), path)
			}
			if _, err := os.Stat(filepath.Join(nstest.Root(t), target)); err != nil {
				t.Errorf("%s: %v", name, err)
			} else if anchor != "" && !slices.Contains(anchors(docs[target]), anchor) {
				t.Errorf("%s: %s has no heading %s", name, target, anchor)
			}
		}
	}
}

// The files, make targets, commands of nftwl and flags that a document names exist.
func TestDocsNames(t *testing.T) {
	root := nstest.Root(t)
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	fenced := regexp.MustCompile("(?s)```.*?\n```\n")
	inline := regexp.MustCompile("`[^`]+`")
	file := regexp.MustCompile(`\b(?:contrib|testdata|cmd|pkg|docs)/[a-z0-9_./-]*[a-z0-9]`)
	target := regexp.MustCompile(`\bmake ([a-z-]+)`)
	command := regexp.MustCompile(`(?m)\bnftwl ((?:--config \S+ )?[a-z].*)$`)
	for name, text := range documents(t) {
		code := slices.Concat(blocks(text, "sh"), blocks(text, "console"), inline.FindAllString(fenced.ReplaceAllString(text, "\n"), -1))
		for _, part := range code {
			for _, path := range file.FindAllString(part, -1) {
				if _, err := os.Stat(filepath.Join(root, path)); err != nil && !strings.Contains(part, "*") {
					t.Errorf("%s: %v", name, err)
				}
			}
			for _, m := range target.FindAllStringSubmatch(part, -1) {
				if !bytes.Contains(makefile, []byte("\n"+m[1]+":")) {
					t.Errorf("%s: the Makefile has no target %s", name, m[1])
				}
			}
			// Text after a comment, && or > is no argument.
			for _, m := range command.FindAllStringSubmatch(strings.Trim(part, "`"), -1) {
				line, _, _ := strings.Cut(m[1], " #")
				line, _, _ = strings.Cut(line, " && ")
				line, _, _ = strings.Cut(line, " >")
				if why := refused(strings.Fields(line)); why != "" {
					t.Errorf("%s: nftwl %s: %s", name, line, why)
				}
			}
		}
	}
}

// refused returns why the command line is wrong, or "" if it is not.
func refused(args []string) string {
	if _, _, ok := install.LoginArgs(args); ok {
		return ""
	}
	root := newRoot()
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	cmd, rest, err := root.Find(args)
	if err != nil {
		return err.Error()
	}
	if !cmd.HasParent() {
		return "no command"
	}
	if cmd.Hidden {
		return "an internal command"
	}
	var flags []string
	for _, arg := range rest {
		if strings.HasPrefix(arg, "-") && arg != "-" {
			name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
			flags = append(flags, name)
		}
	}
	cmd.InitDefaultHelpFlag()
	for _, name := range flags {
		if cmd.Flags().Lookup(name) == nil && cmd.InheritedFlags().Lookup(name) == nil &&
			(len(name) != 1 || cmd.Flags().ShorthandLookup(name) == nil) {
			return "no flag " + name
		}
	}
	return ""
}

// The manual page names no internal commands.
func TestDocsManual(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(nstest.Root(t), "contrib/man/nftwl.8"))
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^\.SS nftwl (.*)$`).FindAllStringSubmatch(string(page), -1)
	if len(found) == 0 {
		t.Error("it has no commands")
	}
	for _, m := range found {
		words := strings.FieldsFunc(m[1], func(r rune) bool { return strings.ContainsRune(` |[]\`, r) })
		words = slices.DeleteFunc(words, func(w string) bool { return strings.ToLower(w) != w || strings.HasPrefix(w, "-") })
		if why := refused(words); why != "" {
			t.Errorf("nftwl %s: %s", m[1], why)
		}
	}
}

func TestDocsShell(t *testing.T) {
	for name, text := range documents(t) {
		for _, block := range blocks(text, "sh") {
			cmd := exec.Command("/bin/sh", "-n")
			cmd.Stdin = strings.NewReader(block)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s in\n%s", name, err, out, block)
			}
		}
	}
}

func TestDocsConfig(t *testing.T) {
	for name, text := range documents(t) {
		for _, block := range blocks(text, "yaml") {
			if _, err := config.Parse([]byte(block)); err != nil {
				t.Errorf("%s: %v in\n%s", name, err, block)
			}
		}
	}
}

// With the rules that a document shows, a login is trusted.
func TestDocsRules(t *testing.T) {
	for name, text := range documents(t) {
		for _, block := range blocks(text, "nft") {
			nstest.New(t)
			dir := t.TempDir()
			if err := os.Symlink(filepath.Join(nstest.Root(t), "contrib", "nftables"), filepath.Join(dir, "nftwl")); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(nstest.Need(t, "nft", "nftables"), "-I", dir, "-f", "-")
			cmd.Stdin = strings.NewReader(block)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", name, err, out)
			}
			if _, errs, code := output(t, nftwl(t, []string{"IP=192.0.2.7"}, "login", "/bin/true")); code != 0 || errs != "" {
				t.Errorf("%s: exit %d: %s", name, code, errs)
			}
			if _, errs, code := output(t, nftwl(t, nil, "check", "-q", "192.0.2.7")); code != 0 {
				t.Errorf("%s: check: exit %d: %s", name, code, errs)
			}
		}
	}
}

// A test runs every block of shell: it calls nstest.Blocks with the block's heading.
// Some test has every command that a document has in a sentence, as it is written.
func TestDocsBlocksRun(t *testing.T) {
	root := nstest.Root(t)
	var tests strings.Builder
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, "_test.go") {
			var text []byte
			text, err = os.ReadFile(path)
			tests.Write(text)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	run := make(map[string]bool) // document and heading
	for _, m := range regexp.MustCompile(`nstest\.Blocks\(\w+, ("[^"]+", "[^"]+")\)`).FindAllStringSubmatch(tests.String(), -1) {
		run[m[1]] = true
	}
	part := regexp.MustCompile("(?m)^ *```(\\w*)\n((?s:.*?)\n) *```$|^#+ (.*)$")
	// Commands of more than a word, without anything that the reader must fill in.
	command := regexp.MustCompile("`((?:sudo|rm|mv|cp|diff|sed|apt|install|systemctl|systemd-analyze|doveadm|nft|nftwld?|fail2ban-client)\\s[^`]+)`")
	for name, text := range documents(t) {
		if untested[name] {
			continue
		}
		heading, inBlocks := "", ""
		for _, m := range part.FindAllStringSubmatch(text, -1) {
			switch {
			case m[3] != "":
				heading = m[3]
			case m[1] == "sh":
				inBlocks += m[2]
				if key := fmt.Sprintf("%q, %q", name, heading); !run[key] {
					t.Errorf("no test has nstest.Blocks(t, %s), which has:\n%s", key, m[2])
				}
			}
		}
		if lookedAt[name] {
			continue
		}
		for _, m := range command.FindAllStringSubmatch(part.ReplaceAllString(text, ""), -1) {
			line := strings.Join(strings.Fields(m[1]), " ")
			words := strings.Fields(line)
			if regexp.MustCompile(`\b[A-Z]{4,}\b|…|^systemctl edit `).MatchString(line) || len(words) < 3 && (words[0] == "nftwl" || words[0] == "nftwld" || words[0] == "nft") {
				continue
			}
			if !strings.Contains(tests.String(), line) && !strings.Contains(inBlocks, line) {
				t.Errorf("%s: %q is in no test", name, line)
			}
		}
	}
}

// untested has the documents whose commands build and test nftwl itself.
var untested = map[string]bool{"CONTRIBUTING.md": true, "docs/measurements.md": true}

// lookedAt has the documents whose commands in sentences no test has yet.
var lookedAt = map[string]bool{"docs/fail2ban.md": true, "docs/firewall.md": true, "docs/containers.md": true, "docs/troubleshooting.md": true}
