package main

import (
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"nftwl/pkg/cluster"
	"nftwl/pkg/config"
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

// Each metric of the cluster is in docs/cluster.md, and what that names is one.
func TestDocsClusterMetrics(t *testing.T) {
	c := config.Default()
	c.Cluster = &config.Cluster{Server: "unix:///nowhere", Name: "mail", Node: "one"}
	registry := prometheus.NewRegistry()
	cluster.New(c, "", registry)
	descriptions := make(chan *prometheus.Desc, 100)
	registry.Describe(descriptions)
	close(descriptions)
	there := make(map[string]bool)
	for d := range descriptions {
		there[regexp.MustCompile(`fqName: "(\w+)"`).FindStringSubmatch(d.String())[1]] = true
	}
	named := make(map[string]bool)
	for _, m := range regexp.MustCompile("`(nftwl_cluster_\\w+)`").FindAllStringSubmatch(nstest.Read(t, filepath.Join(nstest.Root(t), "docs/cluster.md")), -1) {
		named[m[1]] = true
	}
	if !maps.Equal(there, named) {
		t.Errorf("docs/cluster.md has %v, nftwld %v", slices.Sorted(maps.Keys(named)), slices.Sorted(maps.Keys(there)))
	}
}
