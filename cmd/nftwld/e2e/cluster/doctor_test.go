package cluster

import (
	"os/exec"
	"regexp"
	"syscall"
	"testing"

	"nftwl/pkg/nstest"
)

// doctor says whether the sets are shared, and why not.
func TestDoctor(t *testing.T) {
	l := newLAN(t, nstest.Host, 1)
	n := l.nodes[0]
	becomes := func(what, want string) {
		t.Helper()
		var got string
		nstest.Poll(t, what+": "+want, func() bool {
			cmd := exec.Command(nstest.Build(t, "cmd/nftwl"), "--config", n.dir+"/nftwl.yaml", "doctor", "--json")
			cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
			var found []nstest.Finding
			n.peer.Do(func() { found = nstest.Findings(t, cmd, "cluster") })
			if len(found) != 1 {
				t.Fatalf("%s: %+v", what, found)
			}
			got = found[0].Status + ": " + found[0].Text
			return regexp.MustCompile("^" + want).MatchString(got)
		})
	}
	becomes("no nftwld", "fail: nftwld does not run")
	n.start()
	n.login("198.51.100.7", "alice")
	becomes("healthy", "ok: 1 trusted and 0 banned")
	l.engine.Do("CONFIG", "SET", "maxmemory", "1")
	n.login("198.51.100.8", "alice")
	becomes("no memory", "fail: .* has no memory left")
	l.engine.Do("CONFIG", "SET", "maxmemory", "0")
	becomes("memory again", "ok: 2 trusted")
	l.engine.Signal(syscall.SIGKILL)
	becomes("no engine", "fail: .* cannot be reached")
	l.engine.Start()
	becomes("the engine again", "ok: ")
	n.stop()
	l.engine.Do("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
	l.engine.Do("CONFIG", "SET", "maxmemory", "100mb")
	n.start()
	becomes("it evicts", "warn: ")
	n.stop()
	l.engine.Do("CONFIG", "SET", "requirepass", "secret")
	n.start()
	becomes("no password", "fail: .* refuses the user or the password")
}
