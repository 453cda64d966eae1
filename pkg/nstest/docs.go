package nstest

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// Golden compares a generated file of the repository with the text that it should
// have. With UPDATE_DOCS=1, which go generate sets, it writes the file.
func Golden(t testing.TB, name, want string) {
	t.Helper()
	path := filepath.Join(Root(t), name)
	if os.Getenv("UPDATE_DOCS") != "" {
		Must(t, os.WriteFile(path, []byte(want), 0o644))
	}
	if Read(t, path) != want {
		t.Errorf("%s is out of date: run go generate ./cmd/...", name)
	}
}

// A Block is a code block of a document.
type Block struct{ Language, Text string }

// Blocks returns the code blocks under a heading of a document, such as
// "README.md", down to the next heading. A test must run each block of sh
// unchanged: TestDocsBlocksRun of cmd/nftwl finds those that no test asks for.
func Blocks(t testing.TB, document, heading string) (blocks []Block) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(Root(t), document))
	if err != nil {
		t.Fatal(err)
	}
	// A line that begins with # is no heading if it is in a block.
	parts := regexp.MustCompile("(?m)^```(\\w*)\n((?s:.*?)\n)```$|^#+ (.*)$").FindAllStringSubmatch(string(text), -1)
	at := ""
	for _, m := range parts {
		switch {
		case m[3] != "":
			at = m[3]
		case at == heading:
			blocks = append(blocks, Block{m[1], m[2]})
		}
	}
	if len(blocks) == 0 {
		t.Fatalf("%s has no blocks under %q", document, heading)
	}
	return blocks
}
