package cluster

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// at is the engine's time in these tests.
const at = 1 << 40

// seconds returns milliseconds.
func seconds(n int64) int64 { return n * 1000 }

// plus and minus are records. The times are in seconds; left is less than 0 for a
// permanent element.
func plus(age, left int64, comment string) record {
	r := record{since: at - seconds(age), until: at + seconds(left), timeout: seconds(age + left), comment: comment}
	if left < 0 {
		r.until, r.timeout = 0, 0
	}
	return r
}

func minus(age int64, comment string) record {
	return record{removed: true, since: at - seconds(age), until: at + remembered.Milliseconds(), comment: comment}
}

// elem is an element that was added age seconds ago; as for plus.
func elem(age, left int64, comment string) nftset.Element {
	e := nftset.Element{Timeout: time.Duration(age+left) * time.Second, Expires: time.Duration(left) * time.Second, Comment: comment}
	if left < 0 {
		e.Timeout, e.Expires = 0, 0
	}
	return e
}

// describe writes a plan down, in seconds.
func describe(p plan) string {
	about := func(ms int64) int64 { return (ms + 500) / 1000 }
	var all []string
	for _, c := range p.send {
		s := fmt.Sprintf("send %s +%d/%d %s", c.field, about(at-c.since), about(c.until-at), c.comment)
		switch {
		case c.removed:
			s = fmt.Sprintf("send %s - %s", c.field, c.comment)
		case c.until == 0:
			s = fmt.Sprintf("send %s +%d/never %s", c.field, about(at-c.since), c.comment)
		}
		all = append(all, s)
	}
	for _, r := range p.remove {
		all = append(all, fmt.Sprintf("remove %s", r.key))
	}
	for _, e := range p.extend {
		s := fmt.Sprintf("extend %s %v/%v %s", e.Key, e.Expires.Round(time.Second), e.Timeout, e.Comment)
		if e.Permanent() {
			s = fmt.Sprintf("extend %s never %s", e.Key, e.Comment)
		}
		all = append(all, strings.TrimSpace(s))
	}
	slices.Sort(all)
	return strings.ReplaceAll(strings.Join(all, "; "), "192.0.2.7", "A")
}

type ports map[uint16]nftset.Element

func TestReconcile(t *testing.T) {
	const day, hour = 24 * 3600, 3600
	gone := func(left time.Duration, comment string) deletion {
		return deletion{at: time.Now(), left: left, comment: comment}
	}
	type records map[string]record // by the field; A is the address
	for _, test := range []struct {
		name    string
		list    list
		bare    bool // the set's keys have no port
		config  func(c *config.Config)
		addr    string // 192.0.2.7 if empty
		cleared int64  // seconds ago
		records records
		there   ports
		deleted map[uint16]deletion
		odd     []uint16
		want    string
	}{
		{name: "nothing"},
		{name: "a login here", there: ports{993: elem(0, day, "alice"), 465: elem(0, day, "alice")},
			want: "send A +0/86400 alice @a"},
		{name: "a login here that the others know", records: records{"A": plus(0, day, "alice @a")},
			there: ports{993: elem(0, day, "alice"), 465: elem(0, day, "alice")}},
		{name: "a login that gains little", records: records{"A": plus(hour, day-hour, "alice @a")},
			there: ports{993: elem(0, day-60, "alice"), 465: elem(0, day-60, "alice")}},
		{name: "a login that gains an hour", records: records{"A": plus(2*hour, day-2*hour, "alice @a")},
			there: ports{993: elem(0, day, "alice"), 465: elem(0, day, "alice")}, want: "send A +0/86400 alice @a"},
		{name: "one port", there: ports{465: elem(0, day, "alice")}, want: "send A 465 +0/86400 alice @a"},
		{name: "one port for longer", there: ports{993: elem(0, hour, "alice"), 465: elem(0, day, "alice")},
			want: "send A +0/3600 alice @a; send A 465 +0/86400 alice @a"},
		{name: "a permanent one", there: ports{993: elem(0, -1, ""), 465: elem(0, -1, "")},
			want: "send A +1099511628/never @a"},
		{name: "a permanent one that others have with an end", records: records{"A": plus(0, day, "")},
			there: ports{993: elem(0, -1, ""), 465: elem(0, -1, "")}, want: "send A +1099511628/never @a"},
		{name: "what is nearly over", there: ports{993: elem(day, 1, ""), 465: elem(day, 1, "")}},
		{name: "a port that is not configured", odd: []uint16{25}, there: ports{25: elem(0, day, "x")},
			want: "send A 25 +0/86400 x @a"},

		{name: "a login elsewhere", records: records{"A": plus(10, day-10, "alice @b")},
			want: "extend A . 465 23h59m50s/24h0m0s alice @b; extend A . 993 23h59m50s/24h0m0s alice @b"},
		{name: "a login elsewhere, of one port", records: records{"A 465": plus(0, day, "alice @b")},
			want: "extend A . 465 24h0m0s/24h0m0s alice @b"},
		{name: "of all, and one for longer", records: records{"A": plus(0, hour, "alice @b"), "A 465": plus(0, day, "bob @b")},
			want: "extend A . 465 24h0m0s/24h0m0s bob @b; extend A . 993 1h0m0s/1h0m0s alice @b"},
		{name: "a renewal elsewhere", records: records{"A": plus(0, day, "alice @b")},
			there: ports{993: elem(hour, day-hour, "alice @b"), 465: elem(hour, day-hour, "alice @b")},
			want:  "extend A . 465 24h0m0s/24h0m0s alice @b; extend A . 993 24h0m0s/24h0m0s alice @b"},
		{name: "never shortened", records: records{"A": plus(0, hour, "alice @b")},
			there: ports{993: elem(0, hour+60, "alice"), 465: elem(0, -1, "alice")},
			want:  "send A 465 +1099511628/never alice @a"},
		{name: "nearly over elsewhere", records: records{"A": plus(day, 1, "alice @b")}},
		{name: "over elsewhere", records: records{"A": plus(day, 0, "alice @b")}},
		{name: "it comes back from elsewhere", records: records{"A": plus(10, 90, "alice @a")},
			want: "extend A . 465 1m30s/1m40s alice; extend A . 993 1m30s/1m40s alice"},

		// No more than a login would get here.
		{name: "the timeout here", config: func(c *config.Config) { c.Timeout = time.Hour }, records: records{"A": plus(600, 7*day, "alice @b")},
			want: "extend A . 465 50m0s/1h0m0s alice @b; extend A . 993 50m0s/1h0m0s alice @b"},
		{name: "the timeout here is over", config: func(c *config.Config) { c.Timeout = time.Hour }, records: records{"A": plus(hour, 7*day, "alice @b")}},
		{name: "what was capped is not sent back", config: func(c *config.Config) { c.Timeout = time.Hour }, records: records{"A": plus(600, 7*day, "alice @b")},
			there: ports{993: elem(600, hour-600, "alice @b"), 465: elem(600, hour-600, "alice @b")}},
		{name: "a permanent one elsewhere", records: records{"A": plus(7*day, -1, "alice @b")},
			want: "extend A . 465 24h0m0s/192h0m0s alice @b; extend A . 993 24h0m0s/192h0m0s alice @b"},
		{name: "a permanent one elsewhere, again", records: records{"A": plus(7*day, -1, "alice @b")},
			there: ports{993: elem(2*hour, day-2*hour, "alice @b"), 465: elem(hour/2, day-hour/2, "alice @b")},
			want:  "extend A . 993 24h0m0s/192h0m0s alice @b"},
		{name: "what was given of a permanent one is as old as that", records: records{"A": minus(7*day-1, "x @b")},
			there: ports{993: elem(7*day, day-60, "alice @b"), 465: elem(7*day, day-60, "alice @b")},
			want:  "remove A . 465; remove A . 993"},
		{name: "a port that is not configured here", odd: []uint16{25}, records: records{"A 25": plus(0, day, "x @b")}},
		{name: "every port is those that are configured here", odd: []uint16{25}, records: records{"A": plus(0, day, "x @b"), "A 25": plus(0, day, "x @b")},
			want: "extend A . 465 24h0m0s/24h0m0s x @b; extend A . 993 24h0m0s/24h0m0s x @b"},
		{name: "an ignored address", addr: "127.0.0.1", records: records{"127.0.0.1": plus(0, day, "x @b")}},
		{name: "the machine's own", addr: "192.0.2.1", records: records{"192.0.2.1": plus(0, day, "x @b")}},
		{name: "no comments", config: func(c *config.Config) { c.Comment = false }, records: records{"A 465": plus(0, day, "alice @b")},
			want: "extend A . 465 24h0m0s/24h0m0s"},
		{name: "a network", config: func(c *config.Config) { c.IPv6Prefix = 64 }, addr: "2001:db8:1:2::", records: records{"2001:db8:1:2::/64 465": plus(0, day, "x @b")},
			want: "extend 2001:db8:1:2:: . 465 24h0m0s/24h0m0s x @b"},
		{name: "a network here", config: func(c *config.Config) { c.IPv6Prefix = 64 }, addr: "2001:db8:1:2::", there: ports{465: elem(0, day, "x")},
			want: "send 2001:db8:1:2::/64 465 +0/86400 x @a"},
		{name: "an address, although networks count", config: func(c *config.Config) { c.IPv6Prefix = 64 }, addr: "2001:db8:1:2::3", there: ports{465: elem(0, day, "x")},
			want: "send 2001:db8:1:2::3 465 +0/86400 x @a"},
		{name: "a network with the machine's own address", config: func(c *config.Config) { c.IPv6Prefix = 64 }, addr: "2001:db8::", records: records{"2001:db8::/64": plus(0, day, "x @b")}},

		{name: "a removal here", records: records{"A": plus(10, day, "alice @a")},
			deleted: map[uint16]deletion{993: gone(time.Hour, "alice @a"), 465: gone(time.Hour, "alice @a")}, want: "send A - alice @a"},
		{name: "a removal here of one port", records: records{"A": plus(10, day, "alice @a")}, there: ports{993: elem(10, day, "alice")},
			deleted: map[uint16]deletion{465: gone(time.Hour, "alice @a")}, want: "send A 465 - alice @a"},
		{name: "a removal that ends a record of one port, too", records: records{"A": plus(10, day, "alice @a"), "A 465": plus(10, 2*day, "alice @a")},
			deleted: map[uint16]deletion{993: gone(time.Hour, "alice @a"), 465: gone(time.Hour, "alice @a")},
			want:    "send A - alice @a; send A 465 - alice @a"},
		{name: "and of a port that is not configured", odd: []uint16{25}, records: records{"A 25": plus(10, day, "alice @a")},
			deleted: map[uint16]deletion{993: gone(time.Hour, "alice @a"), 465: gone(time.Hour, "alice @a")},
			want:    "send A - alice @a; send A 25 - alice @a"},
		{name: "a removal of what nobody else knows", deleted: map[uint16]deletion{993: gone(0, "x @a"), 465: gone(time.Hour, "x @a")},
			want: "send A - x @a"},
		{name: "a removal at the natural end", deleted: map[uint16]deletion{993: gone(time.Second, "x @a"), 465: gone(time.Second, "x @a")}},
		{name: "a removal, and what others had is there again", records: records{"A": plus(10, day, "x @a")}, there: ports{993: elem(10, day, "x"), 465: elem(10, day, "x")},
			deleted: map[uint16]deletion{993: gone(time.Hour, "x @a"), 465: gone(time.Hour, "x @a")}, want: "remove A . 465; remove A . 993; send A - x @a"},
		{name: "a removal, then an add that is shorter", records: records{"A": plus(10, day, "x @a")}, there: ports{993: elem(1, 100, "x"), 465: elem(1, 100, "x")},
			deleted: map[uint16]deletion{993: {at: time.Now(), left: time.Hour, again: true}, 465: {at: time.Now(), left: time.Hour, again: true}},
			want:    "send A +1/100 x @a; send A - "},
		{name: "a removal, then a login", records: records{"A": plus(10, day, "x @a")}, there: ports{993: elem(-5, day, "x"), 465: elem(-5, day, "x")},
			deleted: map[uint16]deletion{993: gone(time.Hour, "x @a"), 465: gone(time.Hour, "x @a")}, want: "send A +-4/86400 x @a; send A - x @a"},
		{name: "a removal that the others know", records: records{"A": minus(-1, "x @b")},
			deleted: map[uint16]deletion{993: gone(time.Hour, "x @a"), 465: gone(time.Hour, "x @a")}},
		{name: "a removal of what is newer elsewhere", records: records{"A": plus(-10, day, "x @b")},
			deleted: map[uint16]deletion{993: gone(time.Hour, "x @a"), 465: gone(time.Hour, "x @a")},
			want:    "extend A . 465 23h59m50s/23h59m50s x @b; extend A . 993 23h59m50s/23h59m50s x @b"},

		{name: "a removal elsewhere", records: records{"A": minus(5, "x @b")}, there: ports{993: elem(10, day, "x"), 465: elem(10, day, "x")},
			want: "remove A . 465; remove A . 993"},
		{name: "a removal elsewhere of one port", records: records{"A": plus(10, day-10, "x @a"), "A 465": minus(5, "x @b")}, there: ports{993: elem(10, day-10, "x"), 465: elem(10, day-10, "x")},
			want: "remove A . 465"},
		{name: "a removal elsewhere, before the login", records: records{"A": minus(15, "x @b")}, there: ports{993: elem(10, day, "x"), 465: elem(10, day, "x")},
			want: "send A +10/86400 x @a"},
		{name: "a removal elsewhere of a permanent one", records: records{"A": minus(5, "x @b")}, there: ports{993: elem(0, -1, "x"), 465: elem(0, -1, "x")},
			want: "remove A . 465; remove A . 993"},
		{name: "a removal of every port, on a port that is not configured", odd: []uint16{25}, records: records{"A": minus(5, "x @b")}, there: ports{25: elem(10, day, "x")},
			want: "remove A . 25"},
		{name: "a login on a port after a removal of all", records: records{"A": minus(5, "x @b"), "A 465": plus(1, day, "x @b")},
			there: ports{993: elem(10, day, "x"), 465: elem(10, day, "x")},
			want:  "remove A . 993"},

		{name: "emptied", cleared: 5, there: ports{993: elem(10, day, "x"), 465: elem(2, day, "x")},
			want: "remove A . 993; send A 465 +2/86400 x @a"},
		{name: "emptied, and an older record", cleared: 5, records: records{"A": plus(10, day, "x @b")}},
		{name: "emptied long ago", cleared: 31 * day, there: ports{993: elem(32*day, day, "x"), 465: elem(32*day, day, "x")},
			want: "send A +2764800/86400 x @a"},

		{name: "a ban elsewhere", list: banned, records: records{"A": plus(10, 30*day, "sshd @b")},
			want: "extend A . 465 720h0m0s/720h0m10s sshd @b; extend A . 993 720h0m0s/720h0m10s sshd @b"},
		{name: "a permanent ban elsewhere", list: banned, records: records{"A 465": plus(10, -1, "by hand @b")},
			want: "extend A . 465 never by hand @b"},
		{name: "a ban of any port", list: banned, odd: []uint16{25}, records: records{"A 25": plus(10, day, "sshd @b")},
			want: "extend A . 25 24h0m0s/24h0m10s sshd @b"},
		{name: "no comments, but of bans", list: banned, config: func(c *config.Config) { c.Comment = false }, records: records{"A 465": plus(0, day, "sshd @b")},
			want: "extend A . 465 24h0m0s/24h0m0s sshd @b"},
		{name: "an unban elsewhere", list: banned, records: records{"A": minus(5, "sshd @b")}, there: ports{993: elem(10, day, "sshd @b"), 465: elem(10, day, "sshd @b")},
			want: "remove A . 465; remove A . 993"},
		{name: "an unban of another machine's ban", list: banned, records: records{"A": minus(5, "sshd @a")}, there: ports{993: elem(10, day, "sshd"), 465: elem(10, day, "sshd")},
			want: "remove A . 465; remove A . 993"},
		{name: "an unban of one of several", list: banned, records: records{"A 465": minus(5, "sshd @b")}, there: ports{465: elem(10, day, "sshd @b, postfix")},
			want: "send A 465 +5/86400 postfix @a"},
		{name: "an unban of one of several, and a shorter ban after that", list: banned,
			records: records{"A 465": {since: at - seconds(4), until: at + seconds(100), timeout: seconds(104), comment: "fail2ban @c", removal: at - seconds(5), part: "sshd @b"}},
			there:   ports{465: elem(10, day, "sshd @b, postfix")}, want: "send A 465 +5/86400 postfix @a"},
		{name: "an unban of one of several, after one of all", list: banned,
			records: records{"A 465": {removed: true, since: at - seconds(5), until: at + seconds(1000), comment: "sshd @b", whole: at - seconds(8)}},
			there:   ports{465: elem(10, day, "postfix")}, want: "remove A . 465"},
		{name: "the same, of what was added in between", list: banned,
			records: records{"A 465": {removed: true, since: at - seconds(5), until: at + seconds(1000), comment: "sshd @b", whole: at - seconds(8)}},
			there:   ports{465: elem(7, day, "postfix")}, want: "send A 465 +5/86400 postfix @a"},
		{name: "the same, of a permanent one, of which nobody knows when it was added", list: banned,
			records: records{"A 465": {removed: true, since: at - seconds(5), until: at + seconds(1000), comment: "sshd @b", whole: at - seconds(8)}},
			there:   ports{465: elem(7, -1, "postfix")}, want: "send A 465 +5/never postfix @a"},
		{name: "unbans of a part and of all here", list: banned, deleted: map[uint16]deletion{465: gone(0, ""), 993: gone(0, "sshd @a")},
			want: "send A 465 - ; send A 993 - sshd @a"},
		{name: "an unban of one of several, after one of all on every port", list: banned,
			records: records{"A 465": minus(5, "sshd @b"), "A": minus(8, "")},
			there:   ports{465: elem(10, day, "postfix")}, want: "remove A . 465"},
		{name: "an unban of all here, before one of a part", list: banned, records: records{"A 465": minus(0, "sshd @b")},
			deleted: map[uint16]deletion{465: {at: time.Now().Add(-5 * time.Second)}}, want: "send A 465 - "},
		{name: "an unban by the same tool, of another machine", list: banned, records: records{"A 465": minus(5, "sshd @b")}, there: ports{465: elem(10, day, "sshd")},
			want: "send A 465 +5/86400 sshd @a"},
		{name: "an unban of several", list: banned, records: records{"A 465": minus(5, "postfix @a, sshd @b")}, there: ports{465: elem(10, day, "sshd @b, postfix")},
			want: "remove A . 465"},
		{name: "an unban of all", list: banned, records: records{"A 465": minus(5, "")}, there: ports{465: elem(10, day, "sshd @b, postfix")},
			want: "remove A . 465"},
		{name: "an unban of one of others, who share it again", list: banned, records: records{"A 465": minus(5, "sshd @b")}, there: ports{465: elem(10, day, "sshd @b, postfix @c")},
			want: "remove A . 465"},
		{name: "an unban of one of several, on every port", list: banned, records: records{"A": minus(5, "sshd @b")}, there: ports{993: elem(10, day, ""), 465: elem(10, day, "sshd @b")},
			want: "remove A . 465; send A 993 +5/86400 @a"},
		{name: "each port, but not every one", records: records{"A 465": plus(10, day-10, "x @b"), "A 993": plus(10, day-10, "x @b")},
			there: ports{993: elem(10, day-10, "x @b"), 465: elem(10, day-10, "x @b")}},

		{name: "keys without ports", bare: true, records: records{"A": plus(0, day, "x @b")}, want: "extend A 24h0m0s/24h0m0s x @b"},
		{name: "keys without ports, here", bare: true, there: ports{0: elem(0, day, "x")}, want: "send A +0/86400 x @a"},
		{name: "keys without ports, and a record of one port", bare: true, records: records{"A 465": plus(0, day, "x @b")}},
		{name: "keys without ports, and the removal of one port", bare: true, records: records{"A 465": minus(0, "x @b")}, there: ports{0: elem(10, day, "x")},
			want: "send A +10/86400 x @a"},
		{name: "keys without ports, removed here", bare: true, records: records{"A": plus(10, day, "x @b")}, deleted: map[uint16]deletion{0: gone(time.Hour, "x @b")},
			want: "send A - x @b"},
		{name: "keys without ports, removed elsewhere", bare: true, records: records{"A": minus(5, "x @b")}, there: ports{0: elem(10, day, "x")},
			want: "remove A"},
		{name: "keys without ports, and a removal before", bare: true, records: records{"A": minus(15, "x @b")}, there: ports{0: elem(10, day, "x")},
			want: "send A +10/86400 x @a"},
	} {
		c := config.Default()
		c.Ports = []uint16{465, 993}
		c.IPv6Prefix = 128
		if test.config != nil {
			test.config(c)
		}
		addr := netip.MustParseAddr("192.0.2.7")
		if test.addr != "" {
			addr = netip.MustParseAddr(test.addr)
		}
		v := &view{
			config: c, list: trusted, node: "a", now: at, at: time.Now(), own: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
			records: func(f field) (record, bool) {
				r, ok := test.records[strings.Replace(f.String(), "192.0.2.7", "A", 1)]
				return r, ok
			},
		}
		if test.list != "" {
			v.list = test.list
		}
		if test.cleared > 0 {
			v.cleared = at - seconds(test.cleared)
		}
		s := &state{set: &nftset.Set{Key: nftset.KeyType{Port: !test.bare}}, there: placed(addr, test.there), deleted: test.deleted, ports: append(test.odd, c.Ports...)}
		if test.bare {
			s.ports = []uint16{0}
		}
		if got := describe(v.reconcile(addr, s)); got != test.want {
			t.Errorf("%s:\n got %q\nwant %q", test.name, got, test.want)
		}
	}
}

// placed gives elements their keys.
func placed(addr netip.Addr, elems ports) ports {
	all := make(ports)
	for port, e := range elems {
		e.Key = nftset.Key{Addr: addr, Port: port}
		all[port] = e
	}
	return all
}

// Of every combination of what the others and this machine have of two ports: what
// is done leaves nothing to do, and leaves on each port what lasts longest of all
// that was not removed later.
func TestReconcileAll(t *testing.T) {
	const day = 24 * 3600
	addr := netip.MustParseAddr("192.0.2.7")
	shared := []*record{nil}
	for _, r := range []record{plus(20, day, ""), plus(10, 2*day, ""), plus(30, -1, ""), minus(5, ""), minus(15, ""), minus(25, ""), minus(35, "")} {
		shared = append(shared, &r)
	}
	justAfter := minus(25, "")
	justAfter = record{since: justAfter.since + 1, until: justAfter.since + 1 + seconds(3*day), timeout: seconds(3 * day)}
	shared = append(shared, &justAfter)
	own := []*nftset.Element{nil}
	for _, e := range []nftset.Element{elem(22, day, ""), elem(12, 2*day, ""), elem(2, 100, ""), elem(30, -1, "")} {
		own = append(own, &e)
	}
	tested := 0
	for i := range len(shared) * len(shared) * len(shared) * len(own) * len(own) * 2 {
		pick := func(n int) (one int) { one, i = i%n, i/n; return one }
		records := make(map[field]record)
		there := make(ports)
		seen := []time.Time{{}, time.Now().Add(-8 * time.Second)}[pick(2)]
		for _, port := range []uint16{0, 465, 993} {
			if r := shared[pick(len(shared))]; r != nil {
				f := newField(netip.PrefixFrom(addr, 32), port)
				records[f] = *r
			}
		}
		every := newField(netip.PrefixFrom(addr, 32), 0)
		for f, r := range records {
			if all, ok := records[every]; ok && all.removed && !r.removed && r.since <= all.since {
				delete(records, f) // who removes every port removes those, too
			}
		}
		for _, port := range []uint16{465, 993} {
			if e := own[pick(len(own))]; e != nil {
				there[port] = *e
			}
		}
		there = placed(addr, there)
		c := config.Default()
		c.Ports = []uint16{465, 993}
		c.Timeout = 365 * 24 * time.Hour
		v := &view{config: c, list: banned, node: "a", now: at, at: time.Now(), records: func(f field) (record, bool) { r, ok := records[f]; return r, ok }}
		s := &state{set: &nftset.Set{Key: nftset.KeyType{Port: true}}, there: there, seen: map[uint16]addition{465: {at: seen}, 993: {at: seen}}, ports: c.Ports}
		before := fmt.Sprintf("%v, %v, seen %v", records, there, !seen.IsZero())

		// What must come out.
		want := make(map[uint16]int64)
		for _, port := range c.Ports {
			removed := int64(-1)
			var all []record
			for _, f := range []field{every, newField(netip.PrefixFrom(addr, 32), port)} {
				if r, ok := records[f]; ok && r.removed {
					removed = max(removed, r.since)
				} else if ok {
					all = append(all, r)
				}
			}
			if e, ok := there[port]; ok {
				all = append(all, v.record(e, seen))
			}
			for _, r := range all {
				if r.since > removed {
					want[port] = max(want[port], r.ends())
				}
			}
		}

		p := v.reconcile(addr, s)
		for _, c := range p.send {
			if c.removed {
				t.Fatalf("%s: %s is removed", before, c.field)
			}
			r := c.record
			if old, ok := records[c.field]; ok {
				r = r.after(old.lastRemoval())
				if merge(old, r) != r {
					t.Fatalf("%s: %s is stale", before, c.field)
				}
			}
			records[c.field] = r
		}
		for _, r := range p.remove {
			delete(there, r.key.Port)
		}
		for _, e := range p.extend {
			if old, ok := there[e.Port]; ok && old.Outlives(e, 0) {
				t.Fatalf("%s: %v is shortened", before, e.Key)
			}
			if !e.Permanent() {
				e.Expires -= 8 * time.Millisecond // the kernel counts in jiffies
			}
			there[e.Port] = e
		}
		for _, port := range c.Ports {
			e, ok := there[port]
			r := v.record(e, seen)
			if ok != (want[port] != 0) || ok && want[port] != r.ends() && (want[port] == forever || r.ends() == forever || max(want[port]-r.ends(), r.ends()-want[port]) > seconds(2)) {
				t.Fatalf("%s: on port %d there is then %v, %+v; want the end %d, %s", before, port, ok, e, want[port], describe(p))
			}
			// The others get it from what they share, but for little.
			best, removed := int64(0), int64(-1)
			for _, count := range []bool{false, true} {
				for _, of := range []uint16{0, port} {
					r, ok := records[newField(netip.PrefixFrom(addr, 32), of)]
					if ok && r.lastRemoval().since > 0 {
						removed = max(removed, r.lastRemoval().since)
					}
					if ok && !r.removed && count && r.since > removed {
						best = max(best, r.ends())
					}
				}
			}
			if best != want[port] && (want[port] == forever || best == forever || max(want[port]-best, best-want[port]) > gain(day*2000)) {
				t.Fatalf("%s: of port %d the others have then %d, want %d: %s", before, port, best, want[port], describe(p))
			}
		}
		if again := v.reconcile(addr, s); !again.empty() {
			t.Fatalf("%s: after %s: %s", before, describe(p), describe(again))
		}
		tested++
	}
	t.Logf("%d combinations", tested)
}

// Of several changes that are not shared yet, a later one hides no removal.
func TestDeletions(t *testing.T) {
	key := nftset.Key{Addr: netip.MustParseAddr("192.0.2.7"), Port: 993}
	type step struct {
		generation uint32
		deleted    bool
		meaning    nftset.Meaning
		comment    string
		left       time.Duration
	}
	added := func(generation uint32) step { return step{generation: generation} }
	for name, test := range map[string]struct {
		steps          []step
		removed, again bool
		comment        string
		as             int // the step at whose time it was removed
	}{
		"deleted":              {[]step{{1, true, nftset.Decided, "jail", time.Hour}}, true, false, "", 0},
		"replaced":             {[]step{{1, true, nftset.Decided, "jail", time.Hour}, added(1)}, false, false, "", 0},
		"added again":          {[]step{{1, true, nftset.Decided, "jail", time.Hour}, added(2)}, true, true, "", 0},
		"replaced afterwards":  {[]step{{1, true, nftset.Decided, "jail", time.Hour}, added(2), {3, true, nftset.Decided, "jail", time.Hour}, added(3)}, true, true, "", 0},
		"then a part":          {[]step{{1, true, nftset.Decided, "jail", time.Hour}, added(2), {3, true, nftset.DecidedFor, "jail", time.Hour}}, true, false, "", 0},
		"a part, then all":     {[]step{{1, true, nftset.DecidedFor, "jail", time.Hour}, added(2), {3, true, nftset.Decided, "jail", time.Hour}}, true, false, "", 2},
		"then an expiry":       {[]step{{1, true, nftset.Decided, "jail", time.Hour}, added(2), {3, true, nftset.Decided, "jail", time.Second}}, true, false, "", 0},
		"an expiry, then one":  {[]step{{1, true, nftset.Decided, "jail", time.Second}, added(2), {3, true, nftset.DecidedFor, "jail", time.Hour}}, true, false, "jail @a", 2},
		"a part, then another": {[]step{{1, true, nftset.DecidedFor, "jail", time.Hour}, added(2), {3, true, nftset.DecidedFor, "cell", time.Hour}}, true, false, "jail @a, cell @a", 2},
	} {
		// All in one look, or the first change in an earlier one that could not be shared.
		for _, looks := range []int{0, 1} {
			s := &share{list: banned, changed: make(map[netip.Addr]*news), odd: make(map[uint16]bool)}
			n := &Node{names: map[string]*share{"banned_ipv4": s}, config: config.Default(), node: "a", wake: make(chan struct{}, 1)}
			unsent := new(news)
			var at []time.Time
			for i, step := range test.steps {
				if i == looks && i > 0 {
					unsent = s.changed[key.Addr]
					clear(s.changed)
				}
				n.heard = step.generation
				at = append(at, time.Now())
				n.event(nftset.Event{Set: "banned_ipv4", Deleted: step.deleted, Meaning: step.meaning, Element: nftset.Element{Key: key, Timeout: time.Hour, Expires: step.left, Comment: step.comment}})
			}
			heard := s.note(key.Addr)
			heard.merge(unsent)
			d, removed := heard.deleted[key.Port]
			if removed != test.removed || removed && (d.again != test.again || d.comment != test.comment) {
				t.Errorf("%s, after %d looks: %v, %+v", name, looks, removed, d)
			}
			if removed && (d.at.Before(at[test.as]) || test.as+1 < len(at) && d.at.After(at[test.as+1])) {
				t.Errorf("%s, after %d looks: it was removed at the wrong time", name, looks)
			}
		}
	}
}
