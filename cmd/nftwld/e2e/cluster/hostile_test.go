package cluster

import (
	"bufio"
	"fmt"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// Whoever can write to the engine gets nothing into the sets that a login here would
// not: what is malformed or refused here is counted, and changes nothing.
func TestHostileRecords(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		l := newLAN(t, d, 1)
		a := l.nodes[0]
		a.config("ignore: [127.0.0.0/8, \"::1/128\", 203.0.113.0/24]\n")
		l.start()
		a.login("198.51.100.1", "alice")
		nstest.Poll(t, "the login to be shared", func() bool { return strings.Contains(l.hash(), "198.51.100.1 +") })

		now := time.Now().UnixMilli()
		value := func(comment string) string { return fmt.Sprintf("+ %d %d 86400000 0 %s", now, now+86400000, comment) }
		good := value("eve @evil")
		records := []struct{ field, value string }{
			// Not for this machine's sets.
			{"0.0.0.0", good}, {"::", good}, {"255.255.255.255", good}, {"224.0.0.1", good}, {"ff02::1", good},
			{"127.0.0.1", good}, {"::1", good}, {"203.0.113.7", good},
			{"10.9.0.2", good}, // its own address
			{"192.0.2.1 22", good}, {"192.0.2.1 25", good},
			{"10.0.0.0/8", good}, {"0.0.0.0/0", good}, {"2001:db8::/32", good}, {"2001:db8:1:2::/64", good}, {"::/0", good},
			// Malformed.
			{"", good}, {" ", good}, {"192.0.2.1 ", good}, {"192.0.2.1 0", good}, {"192.0.2.1 65536", good}, {"192.0.2.1 x", good}, {"192.0.2.1 993 993", good},
			{"192.0.2.01", good}, {"192.0.2.1/32", good}, {"::ffff:192.0.2.1", good}, {"fe80::1%lan0", good}, {"example.org", good}, {"192.0.2.1\n", good},
			{"192.0.2.1", ""}, {"192.0.2.1", "+"}, {"192.0.2.1", "+ 1 2 3"}, {"192.0.2.1", "* 1 2 3 0 x"},
			{"192.0.2.1", "+ -1 99999999999999 1 0 x"}, {"192.0.2.1", "+ 1 1e15 1 0 x"}, {"192.0.2.1", "+ 1 99999999999999999999 1 0 x"}, {"192.0.2.1", "+ 1 9223372036854775807 1 0 x"},
			{"192.0.2.1", "+ 1 4503599627370495 4503599627370495 0 x"}, {"192.0.2.1", fmt.Sprintf("+ %d 8796093022207 8796093022207 0 x", now)},
			{"192.0.2.1", fmt.Sprintf("+ %d 0 86400000 0 x", now)}, {"192.0.2.1", fmt.Sprintf("- %d 0 0 0 x", now)},
			{"192.0.2.1", value("new\nline")}, {"192.0.2.1", value("tab\t")}, {"192.0.2.1", value("\x1b[2J")}, {"192.0.2.1", value("\x00")}, {"192.0.2.1", value("\xff")}, {"192.0.2.1", value(`a"b`)},
			{"192.0.2.1", value(strings.Repeat("x", 129))}, {"192.0.2.1", value(strings.Repeat("x", 1<<16))}, {strings.Repeat("1", 1<<16), good},
			{"192.0.2.1", value(strings.Repeat("x", 10<<20))},
		}
		refused := func() (sum float64) {
			m, _ := a.status()["cluster_refused"].(map[string]any)
			for _, v := range m {
				sum += v.(float64)
			}
			return sum
		}
		unchanged := func(what string) {
			t.Helper()
			var all []string
			for key := range a.list("trusted") {
				all = append(all, key)
			}
			if len(all) != 5 || !a.is("trusted", "198.51.100.1") || len(a.list("banned")) != 0 {
				t.Errorf("%s: %q trusted, %v banned", what, all, a.list("banned"))
			}
		}
		c, err := nstest.Dial(nstest.Hub, nstest.Hub, "6379")
		nstest.Must(t, err)
		defer c.Close()
		answers := bufio.NewReader(c)
		// do sends what no command line can hold, and waits for a number or an id.
		do := func(words ...string) {
			t.Helper()
			request := fmt.Sprintf("*%d\r\n", len(words))
			for _, w := range words {
				request += fmt.Sprintf("$%d\r\n%s\r\n", len(w), w)
			}
			nstest.Must(t, c.SetDeadline(time.Now().Add(nstest.Patience)))
			_, err := c.Write([]byte(request))
			nstest.Must(t, err)
			answer, err := answers.ReadString('\n')
			if err == nil && answer[0] == '$' {
				answer, err = answers.ReadString('\n')
			}
			if err != nil || answer[0] == '-' {
				t.Fatalf("%.100q: %q, %v", words, answer, err)
			}
		}
		add := func(list string, words ...string) {
			t.Helper()
			sequence := l.engine.Do("HINCRBY", "nftwl:{mail}:"+list+":meta", "sequence", "1")
			epoch := l.engine.Do("HGET", "nftwl:{mail}:"+list+":meta", "epoch")
			do(append([]string{"XADD", "nftwl:{mail}:" + list + ":log", "*", "epoch", epoch, "sequence", sequence, "node", "evil"}, words...)...)
		}
		// What follows has all before it.
		proof := func(n int) {
			t.Helper()
			addr := fmt.Sprintf("198.51.100.%d", n)
			l.engine.Do("HSET", "nftwl:{mail}:trusted", addr, good) // so that it stays if the list is read
			add("trusted", addr, good)
			a.becomes("trusted", addr, true)
			a.nftwl("remove", addr)
			nstest.Poll(t, "the removal", func() bool { return strings.HasPrefix(l.engine.Do("HGET", "nftwl:{mail}:trusted", addr), "- ") })
			l.quiet()
		}

		// In the log.
		for _, r := range records {
			before := refused()
			add("trusted", r.field, r.value)
			nstest.Poll(t, fmt.Sprintf("%.60q %.60q to be refused", r.field, r.value), func() bool { return refused() > before })
		}
		proof(2)
		unchanged("the log")

		// In the list.
		words := []string{"HSET", "nftwl:{mail}:trusted"}
		for i, r := range records {
			if i > 0 && r.field == "192.0.2.1" {
				continue // one value a field
			}
			words = append(words, r.field, r.value)
		}
		before, merges := refused(), a.metric("cluster_merges")
		do(append(words, "192.0.2.9", value("\x1b[2J"), "192.0.2.8", strings.Repeat("x", 1<<20))...)
		l.engine.Do("XADD", "nftwl:{mail}:trusted:log", "*", "x", "y") // an entry out of order: the whole list is read
		nstest.Poll(t, "the list to be read", func() bool { return a.metric("cluster_merges") > merges })
		nstest.Poll(t, "refusals", func() bool { return refused() >= before+20 })
		proof(3)
		unchanged("the list")

		// No trust is longer than this machine's, wherever its times lie.
		const year = 365 * 86400 * 1000
		for i, times := range []string{
			fmt.Sprintf("%d %d %d", now, now+90*year, int64(90*year)), // long
			fmt.Sprintf("%d %d %d", now, now+60*year, 86400000),       // later than it can be
			fmt.Sprintf("%d 0 0", now),                                // permanent
			"0 0 0",
			fmt.Sprintf("%d %d %d", now+year, now+2*year, int64(year)), // not yet
			fmt.Sprintf("0 %d 86400000", now+86400000),                 // older than it can be: expired
		} {
			addr := fmt.Sprintf("192.0.2.%d", 100+i)
			l.engine.Do("HSET", "nftwl:{mail}:trusted", addr, "+ "+times+" 0 eve @evil")
			add("trusted", addr, "+ "+times+" 0 eve @evil")
			if i < 4 {
				a.becomes("trusted", addr, true)
			}
		}
		proof(5)
		for key, e := range a.list("trusted") {
			if e.Timeout <= 0 || e.Expires > 86400 || strings.HasPrefix(key, "192.0.2.104") || strings.HasPrefix(key, "192.0.2.105") {
				t.Errorf("%+v", e)
			}
		}
		for i := range 4 {
			a.nftwl("remove", fmt.Sprintf("192.0.2.%d", 100+i))
		}
		proof(6)
		unchanged("long times")

		// A hundred ports of a ban, of which a machine takes some.
		words = nil
		for port := range 100 {
			words = append(words, fmt.Sprintf("192.0.2.66 %d", 1000+port), good)
		}
		add("banned", words...)
		nstest.Poll(t, "some ports to be banned", func() bool { return len(a.list("banned")) > 0 })
		nstest.Poll(t, "the others to be refused", func() bool { return a.metric("cluster_refused ports") >= 68 })
		proof(4)
		if n := len(a.list("banned")); n != 32 {
			t.Errorf("%d ports are banned", n)
		}

		// Its process is still the first.
		if strings.Contains(a.log(), "internal error") || strings.Contains(a.log(), "\x1b") {
			t.Error("the log")
		}
	})
}
