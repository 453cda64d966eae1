package cluster

import (
	"net/netip"
	"strings"
	"testing"

	"nftwl/pkg/nftset"
)

func TestField(t *testing.T) {
	for text, want := range map[string]field{
		"192.0.2.7":            newField(netip.MustParsePrefix("192.0.2.7/32"), 0),
		"192.0.2.7 465":        newField(netip.MustParsePrefix("192.0.2.7/32"), 465),
		"2001:db8::7":          newField(netip.MustParsePrefix("2001:db8::7/128"), 0),
		"2001:db8:1:2::/64":    newField(netip.MustParsePrefix("2001:db8:1:2::/64"), 0),
		"2001:db8:1:2::/64 25": newField(netip.MustParsePrefix("2001:db8:1:2::/64"), 25),
	} {
		if got, err := parseField(text); err != nil || got != want || got.String() != text {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	// Each field has one way to write it.
	for _, text := range []string{
		"", " ", "x", "192.0.2.7 ", "192.0.2.7 0", "192.0.2.7 065", "192.0.2.7 65536", "192.0.2.7 -1", "192.0.2.7 465 ",
		"192.0.2.7/32", "192.0.2.7/33", "2001:db8::7/128", "2001:db8::7/64", "2001:DB8::7", "2001:db8:0::7",
		"::ffff:192.0.2.7", "::ffff:192.0.2.0/120", "fe80::1%eth0", " 192.0.2.7", "192.0.2.7  465",
	} {
		if got, err := parseField(text); err == nil {
			t.Errorf("%q is taken for %v", text, got)
		}
	}
}

func TestRecord(t *testing.T) {
	for text, want := range map[string]record{
		"+ 1000 87400 86400 0 alice @imap1": {since: 1000, until: 87400, timeout: 86400, comment: "alice @imap1"},
		"+ 1000 0 0 999 ":                   {since: 1000, removal: 999},
		"+ 1000 0 0 999 a @b\t0 c @d":       {since: 1000, comment: "a @b", removal: 999, part: "c @d"},
		"+ 1000 0 0 999 \t998 c @d":         {since: 1000, removal: 999, part: "c @d", whole: 998},
		"- 1000 87400 0 999 a":              {removed: true, since: 1000, until: 87400, comment: "a", whole: 999},
		"- 1000 87400 0 0 a, b @imap1":      {removed: true, since: 1000, until: 87400, comment: "a, b @imap1"},
		"- 1000 87400 0 0 ":                 {removed: true, since: 1000, until: 87400},
	} {
		if got, err := parseRecord(text); err != nil || got != want || got.String() != text {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", "+", "+ 1 2 3", "+ 1 2 3 x", "* 1 2 3 0 x", "+ 1 2 x 0 y", "+ -1 2 3 0 x", "+ 01 2 3 0 x", "+ 1 2 9007199254740993 0 x",
		"+ 1 99999999999999999999 3 0 x", "+ 1 2 3 2 x",
		"+ 1 0 5 0 x", "+ 1 5 0 0 x", // permanent, or not
		"- 1 0 0 0 x", "- 1 5 3 0 x", // a removal is forgotten some day, and has no timeout
		"+ 3 4 1 2 a\t", "+ 3 4 1 2 a\tb", "+ 3 4 1 2 a\t0 ", "+ 3 4 1 2 a\tx b", "+ 3 4 1 2 a\t3 b", "+ 3 4 1 0 a\t0 b", // the part that was removed before
		"+ 3 4 1 2 a\t0 b\tc", "+ 3 4 1 2 a\t0 \"", "- 3 4 0 0 a\tb", "- 3 4 0 4 a", "- 3 4 0 2 ",
		"+ 1 2 1 0 a\nb", "+ 1 2 1 0 a\"b", "+ 1 2 1 0 " + strings.Repeat("x", nftset.MaxComment+1),
	} {
		if got, err := parseRecord(text); err == nil {
			t.Errorf("%q is taken for %+v", text, got)
		}
	}
}

// Whatever another machine writes into the engine is refused, or is what it says.
func FuzzRecord(f *testing.F) {
	f.Add("192.0.2.7", "+ 1000 87400 86400 0 alice @imap1")
	f.Add("2001:db8:1:2::/64 465", "- 1000 87400 0 0 a, b @imap1")
	f.Add("::ffff:192.0.2.7", "+ 1000 0 0 999 ")
	f.Add("192.0.2.7 993", "+ 1000 0 0 999 a\t998 b")
	f.Add("192.0.2.7", "- 1 1 0 0 0,")
	f.Add("fe80::1%eth0 70000", "+ 1 2 3 0 \"\n")
	f.Fuzz(func(t *testing.T, name, value string) {
		if at, err := parseField(name); err == nil {
			addr := at.Addr()
			if at.String() != name || !addr.IsValid() || addr.Zone() != "" || addr.Is4In6() || addr.Is4() && at.bits != 128 {
				t.Errorf("%q is taken for %+v", name, at)
			}
		}
		r, err := parseRecord(value)
		if err != nil {
			return
		}
		if r.String() != value || r.since < 0 || r.until < 0 || r.timeout < 0 || nftset.CheckComment(r.comment) != nil || nftset.CheckComment(r.part) != nil {
			t.Errorf("%q is taken for %+v", value, r)
		}
		if r.ends() <= 0 && r.until != 0 {
			t.Errorf("%q ends at %d", value, r.ends())
		}
		for _, node := range []string{"imap1", strings.Repeat("n", 63)} {
			q := qualify(r.comment, node)
			if nftset.CheckComment(q) != nil {
				t.Errorf("%q on %s: %q", r.comment, node, q)
			}
			if again := qualify(q, "other"); again != q {
				t.Errorf("%q on another machine: %q", q, again)
			}
			if own := unqualify(q, node); nftset.CheckComment(own) != nil || len(own) > len(q) {
				t.Errorf("%q without %s: %q", q, node, own)
			}
		}
	})
}

func TestComments(t *testing.T) {
	long := strings.Repeat("x", 60)
	for _, test := range []struct{ comment, qualified, own string }{
		{"alice", "alice @imap1", "alice"},
		{"", "@imap1", ""},
		{"alice, bob", "alice @imap1, bob @imap1", "alice, bob"},
		{"alice, bob @imap2", "alice @imap1, bob @imap2", "alice, bob @imap2"},
		{"alice @imap1", "alice @imap1", "alice"},
		{"alice@example.org", "alice@example.org @imap1", "alice@example.org"},
		{"alice@example.org @imap2", "alice@example.org @imap2", "alice@example.org @imap2"},
		{"fail2ban @ home", "fail2ban @ home @imap1", "fail2ban @ home"},
		{"ends in a comma,", "ends in a comma @imap1", "ends in a comma"},
		{"ends in @", "ends in @ @imap1", "ends in @"},
		{"@imap2", "@imap2", "@imap2"},
		{"@imap1", "@imap1", ""},
		// What does not fit is left out, and no name is cut but the first.
		{long + ", " + long, long + " @imap1", long},
		{strings.Repeat("y", 128), strings.Repeat("y", nftset.MaxComment-len(" @imap1")) + " @imap1", strings.Repeat("y", nftset.MaxComment-len(" @imap1"))},
		{strings.Repeat("é", 60), strings.Repeat("é", 60) + " @imap1", strings.Repeat("é", 60)},
	} {
		q := qualify(test.comment, "imap1")
		if q != test.qualified {
			t.Errorf("%q is %q, and should be %q", test.comment, q, test.qualified)
		}
		if own := unqualify(q, "imap1"); own != test.own {
			t.Errorf("%q is here %q, and should be %q", q, own, test.own)
		}
	}
	if got := ownNames("alice, bob @imap2, carol"); got != "alice, carol" {
		t.Errorf("%q", got)
	}
	if got := addNames("alice, bob @imap2", "carol @imap1, alice"); got != "carol @imap1, alice, bob @imap2" {
		t.Errorf("%q", got)
	}
}

// The later of two records counts, as for the engine.
func TestMerge(t *testing.T) {
	added := func(since, until int64) record { return record{since: since, until: until, timeout: 1, comment: "a"} }
	removed := func(since, until int64) record {
		return record{removed: true, since: since, until: until, comment: "r"}
	}
	all := func(since int64) record { return record{removed: true, since: since, until: 20} }
	again := func(since, until, removal int64) record {
		return record{since: since, until: until, timeout: 1, comment: "a", removal: removal, part: "r"}
	}
	for _, test := range []struct{ a, b, want record }{
		{added(1, 10), added(2, 20), added(2, 20)},
		{added(2, 10), added(1, 20), added(1, 20)},
		{added(1, 0), added(2, 20), added(1, 0)},
		{added(1, 10), removed(2, 5), removed(2, 5)},
		{added(2, 10), removed(2, 5), removed(2, 5)},
		{added(3, 10), removed(2, 50), again(3, 10, 2)},
		{again(3, 10, 2), added(1, 0), again(3, 10, 2)},
		{again(3, 10, 2), added(4, 20), again(4, 20, 2)},
		{again(3, 10, 2), removed(1, 10), again(3, 10, 2)},
		{added(3, 10), again(6, 20, 5), again(6, 20, 5)},
		{added(3, 10), again(3, 20, 3), removed(3, 3+remembered.Milliseconds())},
		{removed(2, 20), all(1), record{removed: true, since: 2, until: 20, comment: "r", whole: 1}},
		{removed(1, 10), all(2), all(2)},
		{again(3, 10, 2), all(1), record{since: 3, until: 10, timeout: 1, comment: "a", removal: 2, part: "r", whole: 1}},
		{removed(1, 10), removed(2, 5), removed(2, 10)},
	} {
		if got := merge(test.a, test.b); got != test.want {
			t.Errorf("%v and %v: %v", test.a, test.b, got)
		}
		if got := merge(test.b, test.a); got != test.want {
			t.Errorf("%v and %v: %v", test.b, test.a, got)
		}
	}
}

// What a machine knows counts against what the engine has after it lost that.
func TestKeep(t *testing.T) {
	const now, hour = 1_000_000_000, 3_600_000
	removal := record{removed: true, since: now - 100, until: now + remembered.Milliseconds()}
	expiring := record{since: now - 90, until: now - 90 + hour, timeout: hour, removal: now - 100}
	permanent := record{since: now - 50, removal: now - 100}
	f := newField(netip.MustParsePrefix("192.0.2.7/32"), 465)
	for name, test := range map[string]struct{ there, known, want record }{
		"permanent, and expiring there": {expiring, permanent, permanent},
		"permanent, and removed there":  {removal, permanent, permanent},
		"permanent, and there":          {permanent, permanent, record{}},
		"expiring, and permanent there": {permanent, expiring, record{}},
		"removed, and removed there":    {removal, removal, record{}},
		"older than a removal there":    {record{removed: true, since: now - 10, until: now + remembered.Milliseconds()}, permanent, record{}},
	} {
		s := &share{records: map[field]record{f: test.there}}
		lost := s.keep(map[field]record{f: test.known})
		switch {
		case test.want == record{}:
			if len(lost) > 0 || s.records[f] != test.there {
				t.Errorf("%s: %v is lost, and %v counts", name, lost, s.records[f])
			}
		case len(lost) != 1 || lost[0] != change{f, test.want} || s.records[f] != test.want:
			t.Errorf("%s: %v is lost, and %v counts", name, lost, s.records[f])
		}
	}
}
