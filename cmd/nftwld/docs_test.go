package main

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// docs/policy.md names every metric, and no others.
func TestDocsMetrics(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(nstest.Root(t), "docs/policy.md"))
	if err != nil {
		t.Fatal(err)
	}
	n := newInstance(t, "policy: {}\nfailures: {}\n")
	n.start()
	n.report(key, "alice", "1", "192.0.2.1", true)
	conn := n.dial() // in this goroutine: other threads are in another namespace
	if _, err := io.WriteString(conn, "GET /metrics HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.Contains(string(answer), http.StatusText(http.StatusOK)) {
		t.Fatalf("%v: %s", err, answer)
	}
	names := func(pattern, text string) (all []string) {
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
			all = append(all, m[1])
		}
		return all
	}
	there, named := names(`(?m)^# TYPE (nftwl_\w+)`, string(answer)), names("`(nftwl_\\w+)`", string(text))
	for _, name := range named {
		if !slices.Contains(there, name) && !slices.Contains([]string{"nftwl_trust", "nftwl_timeout"}, name) {
			t.Errorf("docs/policy.md has %s, which nftwld lacks", name)
		}
	}
	for _, name := range there {
		if !slices.Contains(named, name) {
			t.Errorf("docs/policy.md lacks %s", name)
		}
	}
	n.stop()
}
