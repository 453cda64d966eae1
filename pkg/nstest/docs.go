package nstest

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// Golden compares a file of the repository, which is generated, with what it
// should be. UPDATE_DOCS=1 writes it, which is what go generate does.
func Golden(t testing.TB, name, want string) {
	t.Helper()
	path := filepath.Join(Root(t), name)
	if os.Getenv("UPDATE_DOCS") != "" {
		Must(t, os.WriteFile(path, []byte(want), 0o644))
	}
	if Read(t, path) != want {
		t.Errorf("%s is stale: go generate ./cmd/... writes it anew", name)
	}
}

// A Block is one of a document's, as it is written there.
type Block struct{ Language, Text string }

// Blocks returns the blocks of code under a heading of a document, such as
// "README.md", down to the next heading. A block of sh is to be run as it is:
// TestDocsBlocksRun of cmd/nftwl looks for those that no test asks for.
func Blocks(t testing.TB, document, heading string) (blocks []Block) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(Root(t), document))
	if err != nil {
		t.Fatal(err)
	}
	// In a block of sh, what begins with # is no heading.
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
