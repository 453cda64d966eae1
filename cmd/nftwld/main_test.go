package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// The wrapper starts at every login, so every package that it links costs time.
// What only a daemon needs belongs in nftwld.
func TestWrapperStaysSmall(t *testing.T) {
	deps := func(command string) []string {
		t.Helper()
		cmd := exec.Command("go", "list", "-deps", command)
		cmd.Dir = nstest.Root(t)
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(string(out))
	}
	wrapper, daemon := deps("./cmd/nftwl"), deps("./cmd/nftwld")
	for _, name := range []string{"net/http", "crypto/tls", "crypto/rand", "github.com/prometheus/client_golang/prometheus"} {
		if slices.Contains(wrapper, name) {
			t.Errorf("cmd/nftwl links %s", name)
		}
		if !slices.Contains(daemon, name) {
			t.Errorf("cmd/nftwld does not link %s, so this test shows nothing", name)
		}
	}
}
