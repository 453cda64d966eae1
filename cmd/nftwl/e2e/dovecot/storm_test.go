package dovecot

import (
	"fmt"
	"net/textproto"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// Many users log in at once, each from another address, while other programs save and
// list the sets and load the ruleset again. All get in, and all are trusted. STORM=500
// sets the number of users.
func TestStorm(t *testing.T) {
	count := 100
	if s := os.Getenv("STORM"); s != "" {
		var err error
		count, err = strconv.Atoi(s)
		nstest.Must(t, err)
	}
	const settings = `
service imap-login {
  service_count = 0
  client_limit = 1000
  process_limit = 2
}
`
	for _, way := range []struct {
		name   string
		with   with
		trusts bool
	}{
		{"without", with{dropIn: func(string) string { return "" }}, false},
		{"login", with{}, true},
	} {
		way.with.dovecot = settings
		t.Run(way.name, func(t *testing.T) {
			s := hostDovecot(t).start(t, way.with)
			loadSets(t)
			nstest.IP(t, "route add local 198.18.0.0/15 dev lo")
			s.write("other.nft", "table inet other\ndelete table inet other\ntable inet other { chain c { tcp dport 25 accept; }; }\n", 0o644)

			// First all connections, on this thread, which is in the namespace.
			address := func(i int) string { return fmt.Sprintf("198.18.%d.%d", i/250, 1+i%250) }
			conns := make([]*textproto.Conn, count)
			for i := range conns {
				c, err := nstest.Dial(address(i), server4, "143")
				nstest.Must(t, err)
				defer c.Close()
				conns[i] = textproto.NewConn(c)
				_, err = conns[i].ReadLine()
				nstest.Must(t, err)
			}
			begin, done := make(chan struct{}), make(chan time.Duration)
			for _, c := range conns {
				go func() {
					<-begin
					start := time.Now()
					err := nstest.IMAPCommand(c, "", "LOGIN alice %s", password)
					took := time.Since(start)
					if err == nil {
						err = nstest.IMAPRead(c)
					}
					c.Close()
					if err != nil {
						t.Error(err)
					}
					done <- took
				}()
			}
			close(begin)
			var times []time.Duration
			for n := 0; len(times) < count; n++ {
				beside := [][]string{
					{"/usr/bin/nftwl", "save", s.path("sets.nft")},
					{"/usr/bin/nftwl", "list"},
					{"nft", "-f", s.path("other.nft")},
				}[n%3]
				if out, err := exec.Command(beside[0], beside[1:]...).CombinedOutput(); err != nil {
					t.Errorf("%q: %v: %s", beside, err, out)
				}
				for more := true; more; {
					select {
					case took := <-done:
						times = append(times, took)
					default:
						more = false
					}
				}
			}
			trusted := make(map[string]int)
			for _, e := range elements(t, "trusted_ipv4") {
				trusted[e.address]++
			}
			for i := range count {
				if n := trusted[address(i)]; way.trusts && n != 5 {
					t.Errorf("%s is trusted on %d ports", address(i), n)
				}
			}
			s.wantLog()
			slices.Sort(times)
			t.Logf("%d logins at once: median %v, 99th percentile %v", count, times[count/2].Round(time.Millisecond), times[count*99/100].Round(time.Millisecond))
		})
	}
}
