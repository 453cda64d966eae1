package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// Many logins at once, each from another address, while other programs save and list the
// sets and load the ruleset again. All of them execute their command, and all are
// trusted. STORM=5000 sets the number of logins.
func TestStorm(t *testing.T) {
	count, atOnce := 500, 100
	if s := os.Getenv("STORM"); s != "" {
		var err error
		if count, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	nstest.New(t)
	rules, err := os.ReadFile(filepath.Join(nstest.Root(t), "contrib/nftables/sets.nft"))
	if err != nil {
		t.Fatal(err)
	}
	nstest.Nft(t, string(rules))
	other := filepath.Join(t.TempDir(), "other.nft")
	if err := os.WriteFile(other, []byte("table inet other\ndelete table inet other\ntable inet other { chain c { tcp dport 25 accept; }; }\n"), 0o600); err != nil {
		t.Fatal(err)
	}

	address := func(i int) string { return fmt.Sprintf("198.18.%d.%d", i/250, 1+i%250) }
	// This thread is in the namespace, so it starts all processes.
	start := func(cmd *exec.Cmd, ended func(took time.Duration)) {
		var stderr strings.Builder
		cmd.Stderr = &stderr
		begin := time.Now()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() {
			if err := cmd.Wait(); err != nil {
				t.Errorf("%q: %v: %s", cmd.Args, err, &stderr)
			}
			ended(time.Since(begin))
		}()
	}
	// storm starts a command for each login, and meanwhile one of the other commands at a
	// time.
	storm := func(login func(i int) *exec.Cmd, beside ...func() *exec.Cmd) (times []time.Duration) {
		done, besideDone := make(chan time.Duration), make(chan time.Duration, 1)
		busy := false
		for started := 0; len(times) < count; {
			if started < count && started-len(times) < atOnce {
				start(login(started), func(took time.Duration) { done <- took })
				started++
				if !busy {
					busy = true
					start(beside[started%len(beside)](), func(took time.Duration) { besideDone <- took })
				}
				continue
			}
			select {
			case took := <-done:
				times = append(times, took)
			case <-besideDone:
				busy = false
			}
		}
		if busy {
			<-besideDone
		}
		slices.Sort(times)
		return times
	}

	snapshot := filepath.Join(t.TempDir(), "sets.nft")
	beside := []func() *exec.Cmd{
		func() *exec.Cmd { return nftwl(t, nil, "save", snapshot) },
		func() *exec.Cmd { return nftwl(t, nil, "list") },
		func() *exec.Cmd { return exec.Command("nft", "-f", other) },
	}
	without := storm(func(int) *exec.Cmd { return exec.Command("/bin/true") }, beside...)
	with := storm(func(i int) *exec.Cmd {
		return nftwl(t, []string{"IP=" + address(i), "USER=alice"}, "login", "/bin/true")
	}, beside...)
	trusted := make(map[string]int)
	for e := range kernelState(t) {
		trusted[e.addr.String()]++
	}
	for i := range count {
		if n := trusted[address(i)]; n != 5 {
			t.Errorf("%s is trusted on %d ports", address(i), n)
		}
	}
	for _, r := range []struct {
		name  string
		times []time.Duration
	}{{"/bin/true alone", without}, {"nftwl login /bin/true", with}} {
		t.Logf("%s: median %v, 99th percentile %v", r.name, r.times[count/2].Round(100*time.Microsecond), r.times[count*99/100].Round(100*time.Microsecond))
	}
}
