package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"nftwl/pkg/config"
	"nftwl/pkg/nstest"
)

// eachEngine runs a test with a Redis and with a Valkey. They listen in the network
// namespace that all of this package's tests are in, as the client's threads are.
func eachEngine(t *testing.T, test func(t *testing.T, e *engine)) {
	nstest.IP(t, "link set lo up")
	nstest.EachDebian(t, func(t *testing.T, d nstest.Debian) {
		runtime.LockOSThread() // never unlocked, as it is in a mount namespace of its own
		d.Tree(t)
		nstest.Must(t, os.Mkdir("/run/engine", 0o755))
		address := map[string]string{"host": "127.0.0.1:6379", "trixie": "127.0.0.1:6380"}[d.Release]
		d.NewEngine(t, address, "/run/engine")
		e, err := dial(&config.Cluster{Server: "redis://" + address, Name: "mail"}, "a", "")
		nstest.Must(t, err)
		t.Cleanup(e.close)
		test(t, e)
	})
}

// add and remove return changes about 192.0.2.7, and ports if there are any, at the
// time at. The times are in seconds; left is less than 0 for a permanent element.
func add(age, left int64, ports ...uint16) change {
	return change{testField(ports...), plus(age, left, "alice @a")}
}

func remove(age int64, ports ...uint16) change {
	return change{testField(ports...), minus(age, "")}
}

// moved returns changes at another time.
func moved(changes []change, to int64) (all []change) {
	for _, c := range changes {
		c.since += to - at
		if c.until != 0 {
			c.until += to - at
		}
		all = append(all, c)
	}
	return all
}

func testField(ports ...uint16) field {
	f := newField(netip.MustParsePrefix("192.0.2.7/32"), 0)
	for _, f.port = range ports {
	}
	return f
}

func sendNow(e *engine, l list, changes ...change) ([]reply, position, error) {
	now, err := e.now(context.Background())
	if err != nil {
		return nil, position{}, err
	}
	return e.send(context.Background(), l, moved(changes, now), now)
}

// What the engine's script makes of two records, one after the other.
func TestMergeScript(t *testing.T) {
	const day = 24 * 3600
	const month = 30 * day
	eachEngine(t, func(t *testing.T, e *engine) {
		ctx := context.Background()
		for _, test := range []struct {
			name     string
			changes  []change
			accepted string // of each change, y or n
			want     string // the last one's field: sign, age and time left
		}{
			{"an add", []change{add(10, 100)}, "y", "+ 10 100"},
			{"a permanent one", []change{add(10, -1)}, "y", "+ 10 never"},
			{"the same again", []change{add(10, 100), add(10, 100)}, "yn", "+ 10 100"},
			{"one that lasts longer", []change{add(10, 100), add(0, 200)}, "yy", "+ 0 200"},
			{"one that gains too little", []change{add(10, 100), add(0, 103)}, "yn", "+ 10 100"},
			{"one that gains a 24th", []change{add(10, 100), add(0, 106)}, "yy", "+ 0 106"},
			{"one that gains less than an hour of many", []change{add(10, 100*day), add(0, 100*day+3500)}, "yn", "+ 10 8640000"},
			{"one that gains an hour of many", []change{add(10, 100*day), add(0, 100*day+3700)}, "yy", "+ 0 8643700"},
			{"one that ends sooner", []change{add(10, 100), add(0, 50)}, "yn", "+ 10 100"},
			{"one that ends, where one never does", []change{add(10, -1), add(0, 100)}, "yn", "+ 10 never"},
			{"one that never ends", []change{add(10, 100), add(0, -1)}, "yy", "+ 0 never"},
			{"never twice", []change{add(10, -1), add(0, -1)}, "yn", "+ 10 never"},

			{"a removal", []change{add(10, 100), remove(5)}, "yy", "- 5"},
			{"a removal of what is newer", []change{add(10, 100), remove(15)}, "yy", "+ 10 100"},
			{"it counts for what is older", []change{add(10, 100), remove(15), remove(16), add(20, -1), add(12, -1)}, "yynny", "+ 12 never"},
			{"a removal of the same moment", []change{add(10, 100), remove(10)}, "yy", "- 10"},
			{"an add that is older than a removal", []change{remove(10), add(15, 1000)}, "yn", "- 10"},
			{"an add that is newer", []change{remove(10), add(5, 1000)}, "yy", "+ 5 1000"},
			{"a later removal", []change{remove(10), remove(5)}, "yy", "- 5"},
			{"an earlier removal", []change{remove(5), remove(10)}, "yn", "- 5"},
			{"a removal of a removal", []change{add(10, 100), remove(5), add(7, 1000), add(1, 90)}, "yyny", "+ 1 90"},

			{"one port, where all were removed", []change{remove(5), add(10, 1000, 465)}, "yn", ""},
			{"one from before a removal, after a shorter one", []change{add(30, -1), remove(20), add(10, 100), add(30, -1)}, "yyyn", "+ 10 100"},
			{"the same, when that has expired", []change{add(30, -1), remove(20), add(10, 0), add(30, -1)}, "yyyn", "+ 10 0"},
			{"one from after the removal", []change{remove(20), add(10, 0), add(15, -1)}, "yyy", "+ 15 never"},
			{"one port, after all were removed", []change{remove(10), add(5, 1000, 465)}, "yy", "+ 5 1000"},
			{"all, where one port was removed", []change{remove(5, 465), add(10, 1000)}, "yy", "+ 10 1000"},
			{"one port that was there when all were removed", []change{add(20, 1000, 465), remove(10), add(5, 10, 465)}, "yyy", "+ 5 10"},

			{"one port, where all were removed and added again", []change{remove(10), add(5, -1), add(12, 1000, 465)}, "yyn", ""},
			{"one port from before that, and a shorter one after it", []change{add(30, 1000, 465), remove(20), add(15, -1), add(10, 50, 465)}, "yyyy", "+ 10 50"},
			{"one that has expired counts no more", []change{add(1000, 0), add(2000, 5)}, "yy", "+ 2000 5"},
		} {
			e.do(ctx, 0, "FLUSHALL")
			got := ""
			for _, c := range test.changes {
				replies, _, err := sendNow(e, trusted, c)
				nstest.Must(t, err)
				if replies[0].accepted {
					got += "y"
					continue
				}
				got += "n"
				if _, err := parseRecord(replies[0].record); err != nil {
					t.Errorf("%s: the script says %q: %v", test.name, replies[0].record, err)
				}
			}
			if got != test.accepted {
				t.Errorf("%s: accepted: %s, want %s", test.name, got, test.accepted)
			}
			now, err := e.now(ctx)
			nstest.Must(t, err)
			last := test.changes[len(test.changes)-1].field
			text, _ := e.do(ctx, 0, "HGET", e.key(trusted, ""), last.String()).ToString() // none
			if test.want == "" {
				if text != "" {
					t.Errorf("%s: %q", test.name, text)
				}
				continue
			}
			r, err := parseRecord(text)
			if err != nil {
				t.Errorf("%s: the script wrote %q: %v", test.name, text, err)
				continue
			}
			about := func(ms int64) int64 { return (ms + 500) / 1000 } // the tests take less
			text = fmt.Sprintf("+ %d %d", about(now-r.since), about(r.until-now))
			if r.until == 0 {
				text = fmt.Sprintf("+ %d never", about(now-r.since))
			}
			if r.removed {
				text = fmt.Sprintf("- %d", about(now-r.since))
				if r.until < now+(month-60)*1000 {
					t.Errorf("%s: a removal is forgotten after %d s", test.name, (r.until-now)/1000)
				}
			}
			if text != test.want {
				t.Errorf("%s: %s, want %s", test.name, text, test.want)
			}
			// What was accepted is in the log, with numbers that go up.
			entries, err := e.read(ctx, map[list]position{trusted: {id: "0-0"}})
			nstest.Must(t, err)
			if len(entries) != strings.Count(test.accepted, "y") {
				t.Errorf("%s: %d entries", test.name, len(entries))
			}
			for i, entry := range entries {
				if entry.sequence != int64(i+1) || entry.node != "a" || entry.epoch == "" || entry.epoch != entries[0].epoch || len(entry.records) != 1 {
					t.Errorf("%s: %+v", test.name, entry)
				}
			}
			p, cleared, err := e.end(ctx, trusted)
			if len(entries) > 0 && p != entries[len(entries)-1].position || cleared != 0 || err != nil {
				t.Errorf("%s: the end is at %+v, %d, %v", test.name, p, cleared, err)
			}
		}
	})
}

// The script and merge make the same of two records: also times and comments, to the
// millisecond.
func TestMergeSame(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine) {
		ctx := context.Background()
		part := func(age int64) change {
			return change{testField(), minus(age, "bob @b")}
		}
		for _, test := range [][]change{
			{add(10, 1000), remove(15)},
			{add(10, 1000), part(15)},
			{add(10, 1000), part(15), add(5, 5000)},
			{add(10, 1000), part(15), remove(12)},
			{add(10, 1000), remove(15), part(12), remove(13)},
			{part(15), add(10, 1000)},
			{part(15), add(10, 1000), part(5)},
			{part(15), add(10, 1000), add(5, -1), remove(7)},
			{remove(15), part(10)},
			{part(10), remove(15)},
			{part(10), remove(15), remove(12), remove(14)},
			{add(20, 1000), remove(15), part(10), add(5, 2000), part(3)},
			{part(10), add(5, 1000), remove(15), remove(16)},
			{remove(15), part(10), remove(5)},
			{remove(15), part(10), part(5), add(12, -1)},
		} {
			e.do(ctx, 0, "FLUSHALL")
			var want record
			for i, c := range test {
				now, err := e.now(ctx)
				nstest.Must(t, err)
				now += 500 // as far as a machine's view of the clock can be ahead
				c = moved([]change{c}, now)[0]
				_, _, err = e.send(ctx, trusted, []change{c}, now)
				nstest.Must(t, err)
				if i == 0 {
					want = c.record
				} else {
					want = merge(want, c.record)
				}
			}
			text, err := e.do(ctx, 0, "HGET", e.key(trusted, ""), testField().String()).ToString()
			nstest.Must(t, err)
			got, err := parseRecord(text)
			if want.removed { // the script remembers it for a month from when it hears of it
				got.until = want.until
			}
			if err != nil || got != want {
				t.Errorf("%v: %v, %v, want %v", test, got, err, want)
			}
		}
	})
}

// The removal of every port ends the record of one, but not the removal that it tells of.
func TestRemovalOfPort(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine) {
		ctx := context.Background()
		now, err := e.now(ctx)
		nstest.Must(t, err)
		part := change{testField(465), minus(5, "bob @b")}
		replies, _, err := e.send(ctx, banned, moved([]change{remove(60, 465), add(50, -1), add(40, -1, 465), remove(10), part}, now), now)
		nstest.Must(t, err)
		r, err := parseRecord(replies[4].record)
		if err != nil || !r.removed || r.comment != "bob @b" || r.whole != now-seconds(60) {
			t.Errorf("%+v, %v", replies, err)
		}
	})
}

// What is left of a ban that a machine removed in part counts as added 1 ms later: also
// where that machine's clock is ahead.
func TestAheadOfEngine(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine) {
		ctx := context.Background()
		now, err := e.now(ctx)
		nstest.Must(t, err)
		now += 900
		rest := plus(0, 100, "bob @b")
		rest.since++
		replies, _, err := e.send(ctx, banned, moved([]change{{testField(), minus(0, "alice @a")}, {testField(), rest}}, now), now)
		if err != nil || !replies[0].accepted || !replies[1].accepted || !strings.HasPrefix(replies[1].record, "+") {
			t.Errorf("%+v, %v", replies, err)
		}
	})
}

// A record that no machine takes does not spoil those that follow it.
func TestSpoiled(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine) {
		ctx := context.Background()
		now, err := e.now(ctx)
		nstest.Must(t, err)
		for _, comment := range []string{"Büro", "a\"b", "a\tb", "a\t5 b\tc", "\xff", strings.Repeat("x", 129)} {
			for _, r := range []string{"- %d 9007199254740991 0 7 ", "- %d 4000000000000 0 7 ", "- %d 4000000000000 0 9007199254740991 ", "+ %d 4000000000000 0 7 a\t6 ", "+ %d 4000000000000 0 7 a\t9 "} {
				for _, c := range []change{add(5, -1), remove(3)} {
					e.do(ctx, 0, "FLUSHALL")
					e.do(ctx, 0, "HSET", e.key(banned, ""), testField().String(), fmt.Sprintf(r, now-seconds(100))+comment)
					replies, _, err := sendNow(e, banned, c)
					nstest.Must(t, err)
					got, err := parseRecord(replies[0].record)
					if err != nil {
						t.Errorf("%q: %+v, %v", r+comment, replies, err)
					}
					// A part stays a part, though the script knows ASCII alone.
					if comment == "Büro" && r == "- %d 4000000000000 0 7 " && !c.removed && got.part != "B??ro" {
						t.Errorf("%q: %+v", r+comment, got)
					}
				}
			}
		}
	})
}

// What the network held back is as old as it is. If that is much, or a clock was just
// set, it is refused.
func TestLate(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine) {
		ctx := context.Background()
		for held, want := range map[int64]int64{0: 10, 4: 14, 200: 0, -5: 0, -100_000: 0} {
			e.do(ctx, 0, "FLUSHALL")
			now, err := e.now(ctx)
			nstest.Must(t, err)
			replies, _, err := e.send(ctx, trusted, moved([]change{add(10, 1000)}, now-seconds(held)), now-seconds(held))
			if isLate(err) != (want == 0) {
				t.Errorf("held back for %d s: %v", held, err)
			}
			nstest.Must(t, e.all(ctx, trusted, func(_, value string) {
				r, err := parseRecord(value)
				nstest.Must(t, err)
				age, left := (now-r.since+500)/1000, (r.until-now+500)/1000
				if replies[0] != (reply{true, value}) {
					t.Errorf("held back for %d s: %+v, and the engine has %s", held, replies, value)
				}
				if age != want || left != 1000-(want-10) {
					t.Errorf("held back for %d s: added %d s ago, %d s left", held, age, left)
				}
			}))
		}
	})
}

// What is older than the emptying of a list stays out; what is newer comes in.
func TestClear(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine) {
		ctx := context.Background()
		try := func(c change, want bool) {
			t.Helper()
			replies, _, err := sendNow(e, banned, c)
			if err != nil || replies[0].accepted != want {
				t.Errorf("%+v: %+v, %v", c, replies, err)
			}
		}
		try(add(10, 100), true)
		nstest.Must(t, e.clear(ctx, banned))
		if n, err := e.do(ctx, 0, "HLEN", e.key(banned, "")).AsInt64(); n != 0 || err != nil {
			t.Errorf("%d fields, %v", n, err)
		}
		try(add(9, 1000), false)
		try(add(9, -1), false)
		try(add(9, 1000, 465), false)
		nstest.Poll(t, "a new add", func() bool {
			replies, _, err := sendNow(e, banned, add(0, 50))
			return err == nil && replies[0].accepted
		})
		p, cleared, err := e.end(ctx, banned)
		now, _ := e.now(ctx)
		if err != nil || p.sequence != 3 || cleared > now || cleared < now-60_000 {
			t.Errorf("%+v, %d, %v", p, cleared, err)
		}
		entries, err := e.read(ctx, map[list]position{banned: {id: "0-0"}})
		if err != nil || len(entries) != 3 || entries[0].cleared != 0 || entries[1].cleared != cleared {
			t.Errorf("%+v, %v", entries, err)
		}
		// The other list is another.
		if p, cleared, err := e.end(ctx, trusted); p.epoch != "" || cleared != 0 || err != nil {
			t.Errorf("%+v, %d, %v", p, cleared, err)
		}
	})
}

// What does not count any more is deleted, and nothing else.
func TestSweep(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine) {
		ctx := context.Background()
		_, _, err := sendNow(e, trusted, add(10, 0), add(10, 0, 25), add(10, 100, 465), add(10, -1, 587), remove(5, 993))
		nstest.Must(t, err)
		fields := func() (all []string) {
			nstest.Must(t, e.all(ctx, trusted, func(field, _ string) { all = append(all, field) }))
			slices.Sort(all)
			return slices.Compact(all)
		}
		all := fields()
		if len(all) != 5 {
			t.Errorf("%q", all)
		}
		nstest.Until(t, "what has expired to be deleted", func() error {
			nstest.Must(t, e.sweep(ctx, trusted, append(all, "192.0.2.8")))
			if left := fields(); !slices.Equal(left, []string{"192.0.2.7 465", "192.0.2.7 587", "192.0.2.7 993"}) {
				return fmt.Errorf("%q", left)
			}
			return nil
		})
	})
}
