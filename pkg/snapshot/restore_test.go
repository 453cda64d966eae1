package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

// dial opens a connection in a new namespace with a ruleset.
func dial(t testing.TB, ruleset string) *nftset.Conn {
	t.Helper()
	nstest.New(t)
	nstest.Nft(t, ruleset)
	c, err := nftset.Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	return c
}

// run runs a command in the test's namespace, and returns its output.
func run(t testing.TB, command ...string) string {
	t.Helper()
	out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
	}
	return string(out)
}

// ruleset returns nft's listing of the kernel's ruleset, without time left, handles and
// counters. What has no order is sorted.
func ruleset(t testing.TB) string {
	t.Helper()
	return rulesetBy(t, "nft")
}

// rulesetBy does the same with another version of nft. Each version reads what it has
// loaded itself: 1.0.6 crashes on the comment of a set that 1.1.3 has made.
//
// It lists until two listings agree: while the kernel resizes a set that has just been
// filled, elements occur twice or are missing.
func rulesetBy(t testing.TB, nft ...string) string {
	t.Helper()
	last := listBy(t, nft...)
	for range 20 {
		again := listBy(t, nft...)
		if again == last {
			return again
		}
		last = again
	}
	t.Fatal("no two of nft's listings agree")
	return ""
}

func listBy(t testing.TB, nft ...string) string {
	t.Helper()
	var doc struct{ Nftables []any }
	if err := json.Unmarshal([]byte(run(t, append(nft, "-j", "list", "ruleset")...)), &doc); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, object := range doc.Nftables {
		lines = append(lines, strings.ReplaceAll(lasting(object), "},{", "},\n{"))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// changes returns the lines in which two rulesets differ.
func changes(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	only := func(a, b []string) string {
		a = slices.DeleteFunc(slices.Clone(a), func(line string) bool { return slices.Contains(b, line) })
		return strings.Join(a, "\n\t")
	}
	return "only now:\n\t" + only(g, w) + "\nonly before:\n\t" + only(w, g)
}

// lasting returns JSON without the values that change by themselves.
func lasting(v any) string {
	switch v := v.(type) {
	case map[string]any:
		var fields []string
		for key, value := range v {
			switch {
			case slices.Contains([]string{"expires", "handle", "metainfo", "packets", "bytes"}, key):
			case key == "timeout" && value.(float64) >= permanent.Seconds():
				// 1.1.3 prints the largest number for "never".
			case key == "elem":
				// An element {"elem": {…}} in which only the value is left is the same
				// as the bare value.
				if list, ok := value.([]any); ok {
					var elems []string
					for _, e := range list {
						elems = append(elems, lasting(e))
					}
					slices.Sort(elems)
					fields = append(fields, "elem:"+strings.Join(elems, ","))
				} else if inner, ok := value.(map[string]any); ok {
					s := lasting(inner)
					if bare := "{val:" + lasting(inner["val"]) + "}"; s == bare {
						return lasting(inner["val"])
					}
					return s
				}
			default:
				fields = append(fields, key+":"+lasting(value))
			}
		}
		slices.Sort(fields)
		return "{" + strings.Join(fields, " ") + "}"
	case []any:
		var list []string
		for _, e := range v {
			list = append(list, lasting(e))
		}
		return "[" + strings.Join(list, " ") + "]"
	}
	return fmt.Sprintf("%#v", v)
}

// nfts runs a test with each available version of nft.
func nfts(t *testing.T, test func(t *testing.T, nft []string)) {
	for _, version := range []struct {
		name    string
		command func(t *testing.T) []string
	}{
		{"ours", func(t *testing.T) []string { return []string{nstest.Need(t, "nft", "nftables")} }},
		{"trixie", func(t *testing.T) []string { return []string{"chroot", nstest.Trixie(t), "nft"} }},
	} {
		t.Run(version.name, func(t *testing.T) { test(t, version.command(t)) })
	}
}

func parse(t testing.TB, text string) *File {
	t.Helper()
	f, err := Parse(text)
	if err != nil {
		t.Fatalf("%v in:\n%.2000s", err, text)
	}
	return f
}

func mustRestore(t testing.TB, c *nftset.Conn, files ...*File) Result {
	t.Helper()
	r, err := Restore(c, files)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// four has the tests' sets.
var four = Sets{
	Table:  filter,
	Names:  []string{"trusted_ipv4", "trusted_ipv6", "banned_ipv4", "banned_ipv6"},
	Refuse: func(netip.Addr) error { return nil },
}

// describe returns our sets in the kernel.
func describe(t testing.TB, c *nftset.Conn, names ...string) []*nftset.Set {
	t.Helper()
	if names == nil {
		names = []string{"trusted_ipv4", "trusted_ipv6", "banned_ipv4", "banned_ipv6"}
	}
	var sets []*nftset.Set
	for _, name := range names {
		s, err := c.Set(filter, name)
		if err != nil {
			t.Fatal(err)
		}
		sets = append(sets, s)
	}
	return sets
}

// elements returns a set's elements in the kernel.
func elements(t testing.TB, c *nftset.Conn, set string) map[nftset.Key]nftset.Element {
	t.Helper()
	all, err := c.Elements(describe(t, c, set)[0])
	if err != nil {
		t.Fatal(err)
	}
	byKey := make(map[nftset.Key]nftset.Element)
	for _, e := range all {
		byKey[e.Key] = e
	}
	return byKey
}

// snapshotOf returns the text of a snapshot of all sets.
func snapshotOf(t testing.TB, c *nftset.Conn) string {
	t.Helper()
	var b strings.Builder
	if err := Write(&b, c, four); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// nft and restore load a snapshot in the same way. After a save, a flush and a restore,
// the kernel has the same elements.
func TestRoundTrip(t *testing.T) {
	nfts(t, func(t *testing.T, nft []string) {
		c := dial(t, "")
		for seed := range uint64(12) {
			f := random(rand.New(rand.NewPCG(seed, 1)))
			text := f.text()
			cmd := exec.Command(nft[0], append(nft[1:], "-f", "-")...)
			cmd.Stdin = strings.NewReader("flush ruleset\n" + text)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("seed %d: %v\n%s\nin:\n%s", seed, err, out, text)
			}
			want := rulesetBy(t, nft...)
			for round := range 2 {
				run(t, "nft", "flush", "ruleset")
				r := mustRestore(t, c, parse(t, text))
				if got := rulesetBy(t, nft...); got != want || r.Expired+r.There > 0 {
					t.Fatalf("seed %d, round %d: %+v, %s", seed, round, r, changes(got, want))
				}
				text = snapshotOf(t, c)
			}
			got := parse(t, text)
			for _, s := range f.Sets {
				there := make(map[nftset.Key]nftset.Element)
				for _, g := range got.Sets {
					for _, e := range g.Elements {
						if g.Name == s.Name {
							there[e.Key] = e
						}
					}
				}
				for _, want := range s.Elements {
					e, ok := there[want.Key]
					const jiffy = 10 * time.Millisecond // or less: the kernel's unit
					off, lost := want.Timeout-e.Timeout, want.Expires-e.Expires
					if !ok || off.Abs() > jiffy || e.Comment != want.Comment || lost < -jiffy || lost > 20*time.Second {
						t.Fatalf("seed %d: %s: got %s, want %s", seed, s.Name, show(e), show(want))
					}
				}
			}
		}
	})
}

func show(e nftset.Element) string {
	return fmt.Sprintf("%s timeout %v expires %v comment %q", e.Key, e.Timeout, e.Expires, e.Comment)
}

// As in the reference article, nft prints each set to its own file. Both versions of nft
// do, with all options that change the format.
func TestRestoreLists(t *testing.T) {
	bin := nstest.Build(t, "cmd/nftwl")
	names := []string{"trusted_ipv4", "trusted_ipv6", "banned_ipv4", "banned_ipv6"}
	nfts(t, func(t *testing.T, nft []string) {
		for _, option := range []string{"", "-a", "-S", "-n", "-s"} {
			dial(t, `
				table inet filter {
					set trusted_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1d; comment "x \ y; {"; size 1000
						elements = { 192.0.2.7 . 993 comment "alice", 192.0.2.7 . 143 expires 2h, 192.0.2.8 . 465 timeout 7d comment "# }",
							192.0.2.9 . 8080 timeout 2d expires 3h comment "zoë" } }
					set trusted_ipv6 { typeof ip6 saddr . tcp dport; flags dynamic,timeout; policy memory; gc-interval 1m
						elements = { 2001:db8::7 . 993, 2001:db8:1:: . 587 timeout 2h } }
					set banned_ipv4 { type ipv4_addr . inet_service; flags timeout; counter
						elements = { 203.0.113.66 . 25 timeout 30m, 203.0.113.66 . 110 timeout 30m } }
					set banned_ipv6 { type ipv6_addr . inet_service; flags dynamic,timeout; timeout 1d; }
				}`)
			want := rulesetBy(t, nft...)
			dir := t.TempDir()
			command := []string{bin, "restore", "-v"}
			for _, name := range names {
				args := slices.Clone(nft[1:])
				if option != "" {
					args = append(args, option)
				}
				out, err := exec.Command(nft[0], append(args, "list", "set", "inet", "filter", name)...).Output()
				if err != nil {
					t.Fatal(err)
				}
				file := filepath.Join(dir, name+".nft")
				if err := os.WriteFile(file, out, 0o600); err != nil {
					t.Fatal(err)
				}
				command = append(command, file)
			}
			// A set with typeof is restored with type.
			run(t, "nft", "delete set inet filter trusted_ipv4; flush set inet filter trusted_ipv6; flush set inet filter banned_ipv4; delete set inet filter banned_ipv6")
			out := run(t, command...)
			if got := rulesetBy(t, nft...); got != want || out != "restored 8, expired 0, already there 0\n" {
				t.Fatalf("%q: %s%s", option, out, changes(got, want))
			}
		}
	})
}

// The article's four files in a directory, and a complete firewall, of which only the
// sets are restored.
func TestRestoreFiles(t *testing.T) {
	bin := nstest.Build(t, "cmd/nftwl")
	c := dial(t, "")
	dir := filepath.Join(nstest.Root(t), "testdata", "snapshots")
	var files []string
	for _, name := range []string{"trusted_ipv4", "trusted_ipv6", "banned_ipv4", "banned_ipv6"} {
		files = append(files, filepath.Join(dir, name+".nft"))
	}
	if out := run(t, append([]string{bin, "restore", "-v"}, files...)...); out != "restored 11, expired 0, already there 0\n" {
		t.Error(out)
	}
	got := elements(t, c, "trusted_ipv4")[element("198.51.100.80 . 993", 0, 0, "").Key]
	if got.Timeout != 7*24*time.Hour || got.Expires < got.Timeout-time.Minute || got.Comment != "zoë {" {
		t.Errorf("got %s", show(got))
	}
	got = elements(t, c, "banned_ipv4")[element("203.0.113.66 . 587", 0, 0, "").Key]
	if got.Timeout != 24*time.Hour || got.Expires > 22*time.Hour+12*time.Minute || got.Expires < 22*time.Hour+10*time.Minute {
		t.Errorf("got %s", show(got))
	}

	run(t, "nft", "flush", "ruleset")
	name := filepath.Join(dir, "ruleset.nft")
	out := run(t, bin, "restore", "-v", name)
	if out != "restored 3, expired 0, already there 0\n" {
		t.Error(out)
	}
	if tables := run(t, "nft", "list", "tables"); tables != "table inet filter\n" {
		t.Errorf("made %q", tables)
	}
}

// The kernel accepts any bytes as a comment. Bytes that would end the comment or the file
// are written so that both nft and restore can read them.
func TestHostileComments(t *testing.T) {
	c := dial(t, empty)
	s := describe(t, c, "trusted_ipv4")[0]
	b := c.Batch()
	for i, comment := range []string{"a\"b", "\" }\n}\n# nftwl end, 0 elements\n", "\xff\xfe", "\x1b[2J", strings.Repeat("\"", nftset.MaxComment)} {
		b.Add(s, nftset.Element{Key: nftset.Key{Addr: ipv4(i), Port: 993}, Timeout: time.Hour, Comment: comment})
	}
	must(t, b.Commit())
	text := snapshotOf(t, c)
	run(t, "nft", "flush", "ruleset")
	if r := mustRestore(t, c, parse(t, text)); r.Restored != 5 {
		t.Errorf("%+v in:\n%s", r, text)
	}
	want := ruleset(t)
	nstest.Nft(t, "flush ruleset\n"+text)
	if got := ruleset(t); got != want {
		t.Error(changes(got, want))
	}
	for i, comment := range []string{"a'b", "' }?}?# nftwl end, 0 elements?", "??", "?[2J", strings.Repeat("'", nftset.MaxComment)} {
		if got := elements(t, c, "trusted_ipv4")[nftset.Key{Addr: ipv4(i), Port: 993}].Comment; got != comment {
			t.Errorf("got %q, want %q", got, comment)
		}
	}
}

func ipv4(i int) netip.Addr { return netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}) }

const empty = `table inet filter {
	set trusted_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1d; }
	set trusted_ipv6 { type ipv6_addr . inet_service; flags dynamic,timeout; timeout 1d; }
	set banned_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1d; }
	set banned_ipv6 { type ipv6_addr . inet_service; flags dynamic,timeout; timeout 1d; }
}`

// of returns a file with one set of elements, saved some time ago. Without a time, it is
// a file that nft printed.
func of(set string, saved time.Time, elems ...nftset.Element) *File {
	s := nftset.Set{
		Table: filter, Name: set, Key: nftset.KeyType{IPv6: strings.HasSuffix(set, "6"), Port: true},
		Dynamic: true, Timeouts: true, Timeout: 24 * time.Hour,
	}
	return &File{Saved: saved, Sets: []Section{{s, elems}}}
}

// The time left depends on the file, on the time since the save, and on the kernel's
// elements.
func TestRemainingLife(t *testing.T) {
	const (
		h   = time.Hour
		d   = 24 * time.Hour
		key = "192.0.2.7 . 993"
	)
	now := time.Now()
	ago := now.Add(-time.Hour)
	e := func(timeout, expires time.Duration) nftset.Element { return element(key, timeout, expires, "file") }
	held := func(timeout, expires time.Duration) *nftset.Element {
		e := element(key, timeout, expires, "kernel")
		return &e
	}
	files := func(f ...*File) []*File { return f }
	const set = "trusted_ipv4"
	for _, test := range []struct {
		name   string
		held   *nftset.Element
		files  []*File
		want   *nftset.Element // with the comment of the one that stays
		result Result
	}{
		{"elapsed", nil, files(of(set, ago, e(d, 3*h))), &nftset.Element{Timeout: d, Expires: 2 * h, Comment: "file"}, Result{Restored: 1}},
		{"elapsed of the whole timeout", nil, files(of(set, ago, e(d, 0))), &nftset.Element{Timeout: d, Expires: 23 * h, Comment: "file"}, Result{Restored: 1}},
		{"expired", nil, files(of(set, ago, e(d, h-time.Second))), nil, Result{Expired: 1}},
		{"expired just now", nil, files(of(set, ago, e(d, h))), nil, Result{Expired: 1}},
		{"clock backwards", nil, files(of(set, now.Add(9*h), e(d, 3*h))), &nftset.Element{Timeout: d, Expires: 3 * h, Comment: "file"}, Result{Restored: 1}},
		{"permanent", nil, files(of(set, ago.Add(-9000*h), e(0, 0))), &nftset.Element{Comment: "file"}, Result{Restored: 1}},
		{"of no known time", nil, files(of(set, time.Time{}, e(d, 3*h))), &nftset.Element{Timeout: d, Expires: 3 * h, Comment: "file"}, Result{Restored: 1}},
		{"the kernel has longer", held(d, 5*h), files(of(set, ago, e(7*d, 5*h))), &nftset.Element{Timeout: d, Expires: 5 * h, Comment: "kernel"}, Result{There: 1}},
		{"the kernel has the same", held(d, 5*h), files(of(set, now, e(d, 5*h))), &nftset.Element{Timeout: d, Expires: 5 * h, Comment: "kernel"}, Result{There: 1}},
		{"the kernel has a permanent one", held(0, 0), files(of(set, ago, e(7*d, 7*d))), &nftset.Element{Comment: "kernel"}, Result{There: 1}},
		{"the kernel has less", held(d, h), files(of(set, ago, e(7*d, 4*h))), &nftset.Element{Timeout: 7 * d, Expires: 3 * h, Comment: "file"}, Result{Restored: 1}},
		{"the file has a permanent one", held(d, d), files(of(set, ago, e(0, 0))), &nftset.Element{Comment: "file"}, Result{Restored: 1}},
		{"the longer first", nil, files(of(set, now, e(d, 9*h)), of(set, now, e(d, h))), &nftset.Element{Timeout: d, Expires: 9 * h, Comment: "file"}, Result{Restored: 1}},
		{"the longer last", nil, files(of(set, now, e(d, h)), of(set, now, e(d, 9*h))), &nftset.Element{Timeout: d, Expires: 9 * h, Comment: "file"}, Result{Restored: 1}},
		{"the longer last, and held", held(d, 2*h), files(of(set, now, e(d, h)), of(set, now, e(d, 9*h))), &nftset.Element{Timeout: d, Expires: 9 * h, Comment: "file"}, Result{Restored: 1}},
		{"twice in a file, the longer first", nil, files(of(set, time.Time{}, e(d, 9*h), e(d, h))), &nftset.Element{Timeout: d, Expires: 9 * h, Comment: "file"}, Result{Restored: 1}},
		{"twice in a file, the longer last", nil, files(of(set, time.Time{}, e(d, h), e(d, 9*h))), &nftset.Element{Timeout: d, Expires: 9 * h, Comment: "file"}, Result{Restored: 1}},
		{"twice in a file, and held", held(d, 2*h), files(of(set, time.Time{}, e(d, 9*h), e(d, 3*h))), &nftset.Element{Timeout: d, Expires: 9 * h, Comment: "file"}, Result{Restored: 1}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := dial(t, empty)
			if test.held != nil {
				b := c.Batch()
				b.Add(describe(t, c, set)[0], *test.held)
				if err := b.Commit(); err != nil {
					t.Fatal(err)
				}
			}
			r, err := Restore(c, test.files)
			if err != nil || r != test.result {
				t.Errorf("%+v, %v, want %+v", r, err, test.result)
			}
			got, ok := elements(t, c, set)[e(0, 0).Key]
			if ok != (test.want != nil) {
				t.Fatalf("got %s", show(got))
			}
			if test.want == nil {
				return
			}
			if off := test.want.Expires - got.Expires; off < 0 || off > time.Minute || got.Timeout != test.want.Timeout || got.Comment != test.want.Comment {
				t.Errorf("got %s, want %s", show(got), show(*test.want))
			}
		})
	}
}

// A restore does not undo a login at the same time, whichever comes first.
func TestRestoreBesideLogins(t *testing.T) {
	const set, login, left = "trusted_ipv4", 24 * time.Hour, 2 * time.Hour
	c := dial(t, empty)
	other, err := nftset.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	s := describe(t, c, set)[0]
	type job struct {
		key   nftset.Key
		ready *atomic.Int32
	}
	jobs, done := make(chan job), make(chan error)
	defer close(jobs)
	atOnce := func(ready *atomic.Int32) {
		for ready.Add(1); ready.Load() < 2; {
		}
	}
	go func() {
		for j := range jobs {
			atOnce(j.ready)
			_, err := other.Extend(s, []nftset.Element{{Key: j.key, Timeout: login}}, 0, nil)
			done <- err
		}
	}()
	for round := range 200 {
		key := nftset.Key{Addr: ipv4(1), Port: uint16(round + 1)}
		if round%2 == 0 {
			b := c.Batch()
			b.Add(s, nftset.Element{Key: key, Timeout: login, Expires: time.Hour})
			if err := b.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		file := of(set, time.Now(), nftset.Element{Key: key, Timeout: login, Expires: left})
		ready := new(atomic.Int32)
		jobs <- job{key, ready}
		atOnce(ready)
		_, err := Restore(c, []*File{file})
		if e := <-done; err != nil || e != nil {
			t.Fatal(err, e)
		}
		now, err := c.Lookup(s, key)
		if err != nil {
			t.Fatal(err)
		}
		if e := now[key]; e.Expires < login-time.Minute {
			t.Fatalf("round %d: the login's trust has become %s", round, show(e))
		}
	}
}

// While a program listens to changes, a large restore takes several transactions,
// because of what the kernel allocates for it. What is there already is extended
// with the rest.
func TestRestoreInParts(t *testing.T) {
	const set, n = "trusted_ipv4", 25_000
	c := dial(t, empty)
	w, err := nftset.Watch(describe(t, c, set)[0].Table)
	nstest.Must(t, err)
	defer w.Close()
	var elems []nftset.Element
	for i := range n {
		addr := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
		elems = append(elems, nftset.Element{Key: nftset.Key{Addr: addr, Port: 993}, Timeout: 24 * time.Hour, Expires: time.Hour})
	}
	restore := func(most int) {
		t.Helper()
		before, err := c.Generation()
		nstest.Must(t, err)
		c.SetTimeout(time.Minute)
		if r := mustRestore(t, c, of(set, time.Now(), elems...)); r.Restored != n {
			t.Errorf("%+v", r)
		}
		after, err := c.Generation()
		nstest.Must(t, err)
		if got := int(after - before); got < n/nftset.Room() || got > most {
			t.Errorf("%d transactions", got)
		}
		all := elements(t, c, set)
		for _, e := range elems {
			if left := all[e.Key].Expires; left > e.Expires || left < e.Expires-time.Minute {
				t.Fatalf("%s has %v left", e.Key, left)
			}
		}
	}
	restore(n/nftset.Room() + 1)
	for i := range elems {
		elems[i].Expires = 2 * time.Hour
	}
	restore(n)
}

// Whatever is wrong with a file, the kernel's sets stay as they were.
func TestRestoreFails(t *testing.T) {
	const full = `table inet filter {
		set trusted_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1d; elements = { 192.0.2.1 . 993 } }
		set banned_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; size 2; elements = { 192.0.2.1 . 993 timeout 1h } }
		set banned_ipv6 { type ipv6_addr; flags timeout; }
		map trusted_ipv6 { type ipv6_addr : verdict; }
	}`
	const plain = `table inet filter {
		set trusted_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1d; elements = { 192.0.2.1 . 993 } }
		set trusted_ipv6 { type ipv6_addr . inet_service; flags interval,timeout; }
		set banned_ipv4 { type ipv4_addr . inet_service; }
		set banned_ipv6 { type ether_addr; }
	}`
	v4 := func(n int) (elems []nftset.Element) {
		for i := range n {
			elems = append(elems, element(fmt.Sprintf("203.0.113.%d . 25", i), time.Hour, 0, ""))
		}
		return elems
	}
	v6 := element("2001:db8::1 . 25", time.Hour, 0, "")
	good := of("trusted_ipv4", time.Time{}, v4(5)...)
	other := of("trusted_ipv4", time.Time{}, v4(5)...) // makes a table, before it fails
	other.Sets[0].Table = nftset.Table{Family: nftset.IPv4, Name: "made"}
	for _, test := range []struct {
		before string
		file   *File
		reason error
		words  string
	}{
		{full, of("banned_ipv4", time.Time{}, v4(2)...), nftset.ErrFull, "set banned_ipv4 is full (2 elements)"},
		{full, of("trusted_ipv6", time.Time{}, v6), nftset.ErrUnfit, "set trusted_ipv6 is a map"},
		{full, of("banned_ipv6", time.Time{}, v6), nil, "set banned_ipv6 has keys of type ipv6_addr, and of type ipv6_addr . inet_service in the file"},
		{plain, of("trusted_ipv6", time.Time{}, v6), nftset.ErrUnfit, "set trusted_ipv6 is an interval set"},
		{plain, of("banned_ipv4", time.Time{}, v4(1)...), nftset.ErrUnfit, "set banned_ipv4 has no timeout flag"},
		{plain, of("banned_ipv6", time.Time{}, v6), nftset.ErrUnfit, "set banned_ipv6 has keys of type ether_addr, not of an address or an address . inet_service"},
	} {
		t.Run(test.words, func(t *testing.T) {
			c := dial(t, test.before)
			before := ruleset(t)
			_, err := Restore(c, []*File{other, good, test.file})
			if err == nil || !strings.Contains(err.Error(), test.words) || test.reason != nil && !errors.Is(err, test.reason) {
				t.Errorf("%v, want %s", err, test.words)
			}
			if after := ruleset(t); after != before {
				t.Error(changes(after, before))
			}
		})
	}
}
