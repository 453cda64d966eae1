package nftset

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// The watcher receives every change of a set, by any program, and knows what nftwl meant
// by its own.
func TestWatch(t *testing.T) {
	const ruleset = `table inet filter {
	set trusted_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1d; }
	set banned_ipv6 { type ipv6_addr; flags dynamic,timeout; }
	set other { type ether_addr; }
	chain input { type filter hook input priority 0; }
}`
	c := dial(t, ruleset)
	table := Table{INet, "filter"}
	if _, any, err := Listeners(); any || err != nil {
		t.Fatalf("listeners: %v, %v", any, err)
	}
	w, err := Watch(table)
	nstest.Must(t, err)
	defer w.Close()
	if watcher, any, err := Listeners(); !watcher || !any || err != nil {
		t.Fatalf("listeners: %v, %v, %v", watcher, any, err)
	}
	set, err := c.Set(table, "trusted_ipv4")
	nstest.Must(t, err)
	key := Key{netip.MustParseAddr("192.0.2.7"), 993}
	add := func(e Element) {
		t.Helper()
		e.Key = key
		if _, err := c.Extend(set, []Element{e}, 0, nil); err != nil {
			t.Fatal(err)
		}
	}
	as := func(m Meaning) *Conn {
		c, err := DialAs(m)
		nstest.Must(t, err)
		t.Cleanup(func() { c.Close() })
		return c
	}
	nft := func(command string) {
		t.Helper()
		nstest.Run(t, nstest.Need(t, "nft", "nftables"), strings.Fields(command)...)
	}
	told, err := c.Generation()
	nstest.Must(t, err)
	for _, test := range []struct {
		name string
		do   func()
		want string
	}{
		{"nft add", func() { nft("add element inet filter trusted_ipv4 { 192.0.2.1 . 143 timeout 1d comment alice }") },
			"trusted_ipv4 192.0.2.1 . 143 alice 0"},
		{"nft add of what is there", func() { nft("add element inet filter trusted_ipv4 { 192.0.2.1 . 143 }") }, ""},
		{"nft delete", func() { nft("delete element inet filter trusted_ipv4 { 192.0.2.1 . 143 }") },
			"trusted_ipv4 192.0.2.1 . 143 alice 0 deleted"},
		{"IPv6, permanent", func() { nft("add element inet filter banned_ipv6 { 2001:db8::1 }") },
			"banned_ipv6 2001:db8::1  0"},
		{"nft flush", func() { nft("flush set inet filter banned_ipv6") },
			"banned_ipv6 2001:db8::1  0 deleted"},
		{"another key type", func() { nft("add element inet filter other { 00:00:5e:00:53:01 }") }, ""},
		{"login", func() { add(Element{Timeout: time.Hour, Comment: "bob"}) },
			"trusted_ipv4 192.0.2.7 . 993 bob 1"},
		{"renewal", func() { add(Element{Timeout: 2 * time.Hour, Comment: "bob"}) },
			"trusted_ipv4 192.0.2.7 . 993 bob 1"},
		{"replacement", func() { add(Element{Timeout: 3 * time.Hour, Comment: "carol"}) },
			"trusted_ipv4 192.0.2.7 . 993 bob 1, trusted_ipv4 192.0.2.7 . 993 bob 1 deleted, trusted_ipv4 192.0.2.7 . 993 carol 1"},
		{"removal of another comment", func() { c.Remove(set, []Key{key}, func(e Element) bool { return false }) }, ""},
		{"removal by comment", func() { as(DecidedFor).Remove(set, []Key{key}, func(e Element) bool { return e.Comment == "carol" }) },
			"trusted_ipv4 192.0.2.7 . 993 carol 2 deleted"},
		{"the connection's next", func() { add(Element{Timeout: time.Hour}) }, "trusted_ipv4 192.0.2.7 . 993  1"},
		{"removal", func() { c.Remove(set, []Key{key}, nil) }, "trusted_ipv4 192.0.2.7 . 993  1 deleted"},
		{"local", func() { c = as(Local); add(Element{Timeout: time.Hour}) }, "trusted_ipv4 192.0.2.7 . 993  3"},
		{"reload", func() { nstest.Nft(t, "flush ruleset\n"+ruleset) },
			"replaced trusted_ipv4, replaced banned_ipv6, replaced other, replaced trusted_ipv4, replaced banned_ipv6, replaced other"},
		{"another table", func() {
			nft("add table ip filter")
			nft("add set ip filter trusted_ipv4 { type ipv4_addr; }")
			nft("add table inet other")
			nft("add set inet other trusted_ipv4 { type ipv4_addr; }")
		}, ""},
	} {
		test.do()
		generation, err := c.Generation()
		nstest.Must(t, err)
		var got []string
		for told != generation {
			err := w.Read(time.Now().Add(nstest.Patience), func(e Event) {
				switch {
				case e.Generation != 0:
					told = e.Generation
				case e.Replaced:
					got = append(got, "replaced "+e.Set)
				default:
					s := fmt.Sprintf("%s %s %s %d", e.Set, e.Element.Key, e.Element.Comment, e.Meaning)
					if e.Deleted {
						s += " deleted"
						if e.Element.Expires <= 0 != e.Element.Permanent() {
							t.Errorf("%s: %+v", test.name, e.Element)
						}
					}
					got = append(got, s)
				}
			})
			nstest.Must(t, err)
		}
		if s := strings.Join(got, ", "); s != test.want {
			t.Errorf("%s: %s, want %s", test.name, s, test.want)
		}
	}
	nstest.Poll(t, "the end of all events", func() bool {
		return errors.Is(w.Read(time.Now().Add(time.Millisecond), func(e Event) { t.Errorf("%+v", e) }), ErrDeadline)
	})
}

// A watcher that does not read is told that it has missed events.
func TestWatchOverrun(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, "add table inet filter\nadd set inet filter trusted_ipv4 { type ipv4_addr; size 1000000; }\n")
	w, err := Watch(Table{INet, "filter"})
	nstest.Must(t, err)
	defer w.Close()
	nstest.Must(t, unix.SetsockoptInt(w.conn.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096))
	c, err := Dial()
	nstest.Must(t, err)
	defer c.Close()
	set, err := c.Set(Table{INet, "filter"}, "trusted_ipv4")
	nstest.Must(t, err)
	for range 40 {
		batch := c.Batch()
		for i := range 500 {
			batch.Add(set, Element{Key: Key{Addr: netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)})}})
		}
		batch.Flush(set)
		nstest.Must(t, batch.Commit())
	}
	overrun := false
	nstest.Poll(t, "all events that were kept", func() bool {
		err := w.Read(time.Now().Add(time.Millisecond), func(Event) {})
		overrun = overrun || errors.Is(err, ErrOverrun)
		return errors.Is(err, ErrDeadline)
	})
	if !overrun {
		t.Error("it missed nothing")
	}
	// It then goes on.
	nstest.Nft(t, "add set inet filter end { type ipv4_addr; }\n")
	for end := false; !end; {
		nstest.Must(t, w.Read(time.Now().Add(nstest.Patience), func(e Event) { end = end || e.Set == "end" }))
	}
}
