package nstest

import (
	"net"
	"os/exec"
	"strings"
	"testing"
)

func TestMain(m *testing.M) { Main(m) }

// Each test has its own ruleset, separate from the host's and from other tests'.
func TestNewIsPrivate(t *testing.T) {
	New(t)
	Nft(t, "add table inet private")
	seen := make(chan string)
	go func() {
		defer close(seen)
		New(t)
		out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
		if err != nil {
			t.Error(err)
		}
		seen <- string(out)
	}()
	if other := <-seen; other != "" {
		t.Errorf("a second namespace sees %q", other)
	}
	out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(out), "table inet private") {
		t.Errorf("own table is gone: %q", out)
	}
}

func TestLoopbackIsUp(t *testing.T) {
	New(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
