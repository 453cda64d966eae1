package snapshot

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

var filter = nftset.Table{Family: nftset.INet, Name: "filter"}

// ours accepts the sets that the configuration names by default.
func ours(table nftset.Table, set string) bool {
	return table == filter && slices.Contains([]string{"trusted_ipv4", "trusted_ipv6", "banned_ipv4", "banned_ipv6"}, set)
}

// comments are what nft prints and loads, though it looks like its language.
var comments = []string{"", "alice", `x \ y; {`, "}", "# nftwl end, 7 elements", "a, b", "'quoted'", "zoë ☃ 日本", "timeout 1d", strings.Repeat("x", nftset.MaxComment)}

// random returns a whole file: of the four sets, each of them as the file's
// reader should have it.
func random(r *rand.Rand) *File {
	f := &File{Saved: time.Now().Add(-time.Duration(r.IntN(1000)) * time.Millisecond).UTC()}
	pick := func(d ...time.Duration) time.Duration { return d[r.IntN(len(d))] }
	const ms, s, h, d = time.Millisecond, time.Second, time.Hour, 24 * time.Hour
	port := r.IntN(4) > 0
	for i, name := range []string{"trusted_ipv4", "trusted_ipv6", "banned_ipv4", "banned_ipv6"} {
		set := nftset.Set{Table: filter, Name: name, Key: nftset.KeyType{IPv6: i%2 == 1, Port: port}}
		set.Dynamic, set.Timeouts, set.Memory, set.Counter = r.IntN(2) > 0, r.IntN(4) > 0, r.IntN(4) == 0, r.IntN(4) == 0
		set.Comment = comments[r.IntN(len(comments))]
		// With both, the kernel takes a tree that is for intervals, and refuses
		// the second element (nft_set_rbtree.c).
		if !set.Memory && r.IntN(2) > 0 {
			set.Size = uint32(100 + r.IntN(100000))
		}
		if set.Timeouts {
			set.Timeout = pick(0, 0, 12*h, d, 36*h+7*ms)
			set.GCInterval = pick(0, 0, 10*s, 90*s)
		}
		sec := Section{Set: set}
		for n := range r.IntN(60) {
			e := nftset.Element{Comment: comments[r.IntN(len(comments))]}
			b := [16]byte{0x20, 0x01, 0x0d, 0xb8, 11: byte(n), 15: byte(r.IntN(256))}
			e.Addr = netip.AddrFrom16(b)
			if !set.Key.IPv6 {
				e.Addr = netip.AddrFrom4([4]byte{203, 0, byte(n), byte(r.IntN(256))})
			}
			if port {
				e.Port = uint16(r.IntN(65536) * r.IntN(10)) // 0 is one, too
			}
			if set.Timeouts {
				if e.Timeout = pick(0, h, set.Timeout, 400*d, 5*d+4*h+3*time.Minute+2*s+1*ms, longest); e.Timeout > 0 {
					e.Expires = pick(e.Timeout, e.Timeout/2, 30*time.Minute+1*ms).Truncate(ms)
				}
			}
			if n == 0 && r.IntN(4) == 0 {
				e.Key = nftset.Key{}
			}
			sec.Elements = append(sec.Elements, e)
		}
		f.Sets = append(f.Sets, sec)
	}
	return f
}

func (f *File) text() string {
	b := []byte(header(f.Saved, f.Table))
	n := 0
	for _, s := range f.Sets {
		b = appendSet(b, &s.Set)
		for i, e := range s.Elements {
			b = appendElement(b, &s.Set, e, i == 0)
		}
		b = appendSetEnd(b, len(s.Elements))
		n += len(s.Elements)
	}
	return string(b) + trailer(n)
}

func TestWriteParse(t *testing.T) {
	for seed := range uint64(500) {
		want := random(rand.New(rand.NewPCG(seed, 0)))
		got, err := Parse(want.text(), ours)
		if err != nil {
			t.Fatalf("seed %d: %v in:\n%s", seed, err, want.text())
		}
		if diff := differ(got, want); diff != "" {
			t.Fatalf("seed %d: %s", seed, diff)
		}
	}
}

// The kernel can report an element that is being renewed with more life left
// than its timeout. nft would refuse the whole file for it.
func TestWriteRenewed(t *testing.T) {
	s := &nftset.Set{Table: filter, Name: "trusted_ipv4", Timeouts: true}
	got := string(appendElement(nil, s, element("192.0.2.7", time.Hour, 2*time.Hour, ""), false))
	if want := ",\n\t\t\t192.0.2.7 timeout 1h expires 1h"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// differ returns the first difference of two files.
func differ(got, want *File) string {
	if !got.Saved.Equal(want.Saved) {
		return fmt.Sprintf("saved %v, want %v", got.Saved, want.Saved)
	}
	if got.Table != want.Table {
		return fmt.Sprintf("table %+v, want %+v", got.Table, want.Table)
	}
	if len(got.Sets) != len(want.Sets) {
		return fmt.Sprintf("%d sets, want %d", len(got.Sets), len(want.Sets))
	}
	for i, w := range want.Sets {
		g := got.Sets[i]
		if g.Set != w.Set {
			return fmt.Sprintf("got  %+v\nwant %+v", g.Set, w.Set)
		}
		if len(g.Elements) != len(w.Elements) {
			return fmt.Sprintf("%s: %d elements, want %d", g.Name, len(g.Elements), len(w.Elements))
		}
		for j := range w.Elements {
			if g.Elements[j] != w.Elements[j] {
				return fmt.Sprintf("%s: got  %+v\nwant %+v", g.Name, g.Elements[j], w.Elements[j])
			}
		}
	}
	return ""
}

// list is text as nft prints it, of one set.
func list(set, definition string, elements ...string) string {
	text := "table inet filter {\n\tset " + set + " {\n\t\t" + strings.ReplaceAll(definition, "; ", "\n\t\t") + "\n"
	if len(elements) > 0 {
		text += "\t\telements = { " + strings.Join(elements, ",\n\t\t\t     ") + " }\n"
	}
	return text + "\t}\n}\n"
}

func element(key string, timeout, expires time.Duration, comment string) nftset.Element {
	addr, port, _ := strings.Cut(key, " . ")
	e := nftset.Element{Timeout: timeout, Expires: expires, Comment: comment}
	e.Addr = netip.MustParseAddr(addr)
	if port != "" {
		fmt.Sscan(port, &e.Port)
	}
	return e
}

func TestParseForms(t *testing.T) {
	const (
		v4 = "type ipv4_addr . inet_service; flags dynamic,timeout"
		ms = time.Millisecond
		h  = time.Hour
		d  = 24 * time.Hour
	)
	for _, test := range []struct {
		set, definition, elements string
		want                      []nftset.Element
	}{
		{"trusted_ipv4", v4, "192.0.2.7 . 993", []nftset.Element{element("192.0.2.7 . 993", 0, 0, "")}},
		{"trusted_ipv4", v4 + "; timeout 1d", "192.0.2.7 . 993", []nftset.Element{element("192.0.2.7 . 993", d, 0, "")}},
		{"trusted_ipv4", v4 + "; timeout 1d", "192.0.2.7 . 993 expires 23h59m59s996ms", []nftset.Element{element("192.0.2.7 . 993", d, d-4*ms, "")}},
		{"trusted_ipv4", v4 + "; timeout 1d", "192.0.2.7 . 993 timeout 7d", []nftset.Element{element("192.0.2.7 . 993", 7*d, 0, "")}},
		{"trusted_ipv4", v4, "192.0.2.7 . 993 timeout 1h expires 1ms", []nftset.Element{element("192.0.2.7 . 993", h, ms, "")}},
		{"trusted_ipv4", v4, "192.0.2.7 . 993 timeout 1h expires 0s", []nftset.Element{element("192.0.2.7 . 993", h, ms, "")}},
		{"trusted_ipv4", v4, "192.0.2.7 . 993 timeout 1h expires 2h", []nftset.Element{element("192.0.2.7 . 993", h, h, "")}},
		{"trusted_ipv4", v4, "192.0.2.7 . 993 expires 1h", []nftset.Element{element("192.0.2.7 . 993", h, h, "")}},
		{"trusted_ipv4", v4 + "; timeout 1d", "192.0.2.7 . 993 timeout never", []nftset.Element{element("192.0.2.7 . 993", 0, 0, "")}},
		{"trusted_ipv4", v4, `192.0.2.7 . 993 counter packets 12 bytes 3456 timeout 1h expires 30m comment "x \ y; {"`,
			[]nftset.Element{element("192.0.2.7 . 993", h, h/2, `x \ y; {`)}},
		{"trusted_ipv4", v4 + "; counter", "192.0.2.7 . 993 counter timeout 1h", []nftset.Element{element("192.0.2.7 . 993", h, 0, "")}},
		{"trusted_ipv4", v4, `192.0.2.7 . 993 comment "#, }", 192.0.2.8 . 465, 192.0.2.9 . 587`,
			[]nftset.Element{element("192.0.2.7 . 993", 0, 0, "#, }"), element("192.0.2.8 . 465", 0, 0, ""), element("192.0.2.9 . 587", 0, 0, "")}},
		// Names of ports, by the tables of Debian 12 and 13 and of IANA; and a comma at the end, as
		// a hand leaves it.
		{"trusted_ipv4", v4, "192.0.2.7 . imaps, 192.0.2.7 . imap2, 192.0.2.7 . imap, 192.0.2.7 . pop3s, 192.0.2.7 . submission, 192.0.2.7 . submissions,",
			[]nftset.Element{element("192.0.2.7 . 993", 0, 0, ""), element("192.0.2.7 . 143", 0, 0, ""), element("192.0.2.7 . 143", 0, 0, ""),
				element("192.0.2.7 . 995", 0, 0, ""), element("192.0.2.7 . 587", 0, 0, ""), element("192.0.2.7 . 465", 0, 0, "")}},
		{"trusted_ipv6", "type ipv6_addr . inet_service; size 65535\t# count 2; flags timeout", "2001:db8::7 . 993, ::ffff:192.0.2.1 . 1",
			[]nftset.Element{element("2001:db8::7 . 993", 0, 0, ""), element("::ffff:192.0.2.1 . 1", 0, 0, "")}},
		{"banned_ipv4", "typeof ip saddr . tcp dport; flags timeout", "192.0.2.7 . 993", []nftset.Element{element("192.0.2.7 . 993", 0, 0, "")}},
		{"banned_ipv4", "typeof ip saddr; flags timeout", "192.0.2.7", []nftset.Element{element("192.0.2.7", 0, 0, "")}},
		{"banned_ipv6", "typeof ip6 daddr . th sport; flags timeout", "2001:db8::7 . 993", []nftset.Element{element("2001:db8::7 . 993", 0, 0, "")}},
		{"banned_ipv4", "type ipv4_addr; timeout 1h", "192.0.2.7 timeout 2h", []nftset.Element{element("192.0.2.7", 2*time.Hour, 0, "")}},
		{"banned_ipv6", "type ipv6_addr; auto-merge", "2001:db8::7", []nftset.Element{element("2001:db8::7", 0, 0, "")}},
		{"banned_ipv6", "type ipv6_addr; policy memory; size 10; flags timeout; timeout 1h; gc-interval 10s; comment \"hello }\"", "", nil},
	} {
		var elements []string
		if test.elements != "" {
			elements = []string{test.elements}
		}
		f, err := Parse(list(test.set, test.definition, elements...), ours)
		if err != nil {
			t.Errorf("%s: %v", test.elements, err)
			continue
		}
		if len(f.Sets) != 1 || !slices.Equal(f.Sets[0].Elements, test.want) || len(f.Passed) > 0 {
			t.Errorf("%s: got %+v", test.elements, f)
		}
	}
}

// Only a snapshot of ours says permanent by the longest timeout.
func TestParseLongest(t *testing.T) {
	text := list("trusted_ipv4", "type ipv4_addr; flags timeout; timeout 1d", "192.0.2.7 timeout 36500d")
	for _, test := range []struct {
		text string
		want time.Duration
	}{
		{text, nftset.MaxTimeout},
		{header(time.Now(), nftset.Instance{}) + text + trailer(1), 0},
	} {
		f, err := Parse(test.text, ours)
		if err != nil || f.Sets[0].Elements[0].Timeout != test.want {
			t.Errorf("%v, %+v in:\n%s", err, f, test.text)
		}
	}
}

func TestParseDefinition(t *testing.T) {
	f, err := Parse(list("banned_ipv6", "type ipv6_addr . inet_service; policy memory; size 10; flags constant,dynamic,timeout; counter; timeout 1h; gc-interval 10s; comment \"hello }\""), ours)
	if err != nil {
		t.Fatal(err)
	}
	want := nftset.Set{
		Table: filter, Name: "banned_ipv6", Key: nftset.KeyType{IPv6: true, Port: true}, Constant: true, Dynamic: true, Timeouts: true,
		Counter: true, Timeout: time.Hour, GCInterval: 10 * time.Second, Size: 10, Memory: true, Comment: "hello }",
	}
	if f.Sets[0].Set != want {
		t.Errorf("got  %+v\nwant %+v", f.Sets[0].Set, want)
	}
}

// What cannot be restored is an error with its line, if it concerns a set of
// ours; all else in a ruleset is passed over and said.
func TestParseErrors(t *testing.T) {
	const v4 = "type ipv4_addr . inet_service; flags timeout"
	head := header(time.Now(), nftset.Instance{})
	for _, test := range []struct{ text, err string }{
		{list("trusted_ipv4", "type ether_addr; flags timeout"), `line 3: the set has keys of type "ether_addr", not of an address`},
		{list("trusted_ipv4", "type ipv4_addr . inet_service . ipv4_addr"), `line 3: the set has keys of type "ipv4_addr . inet_service . ipv4_addr", not`},
		{list("trusted_ipv4", "typeof ip saddr . meta mark"), `line 3: the set has keys of type "ip saddr . meta mark", not`},
		{list("trusted_ipv4", "type ipv4_addr; flags interval,timeout"), "line 4: set trusted_ipv4 is an interval set"},
		{list("trusted_ipv4", "type ipv4_addr; flags owner"), `line 4: "owner" is a flag that nftwl does not know`},
		{list("trusted_ipv4", "type ipv4_addr; quota over 25 mbytes"), `line 4: "quota" is nothing that a set has`},
		{list("trusted_ipv4", v4, "192.0.2.0/24 . 993"), `line 5: "192.0.2.0/24" is an interval`},
		{list("trusted_ipv4", v4, "192.0.2.1 . 993", "192.0.2.1-192.0.2.9 . 993"), `line 6: "192.0.2.1-192.0.2.9" is an interval`},
		{list("trusted_ipv4", v4, "2001:db8::1 . 993"), "line 5: 2001:db8::1 is of the other family"},
		{list("trusted_ipv4", v4, "mail.example.org . 993"), `line 5: "mail.example.org" is not an address`},
		{list("trusted_ipv4", v4, "192.0.2.1"), `line 5: "}" after 192.0.2.1, in a set whose keys are of type ipv4_addr . inet_service`},
		{list("trusted_ipv4", "type ipv4_addr", "192.0.2.1 . 993"), `line 4: "." after 192.0.2.1, in a set whose keys are of type ipv4_addr`},
		{list("trusted_ipv4", v4, "192.0.2.1 . nosuchport"), `line 5: "nosuchport" is not a port`},
		{list("trusted_ipv4", v4, "192.0.2.1 . 65536"), `line 5: "65536" is not a port`},
		{list("trusted_ipv4", v4, "192.0.2.1 . 993 timeout 1x"), `line 5: "1x" is not a timeout`},
		{list("trusted_ipv4", "type ipv4_addr", "192.0.2.1 timeout 1h"), "line 4: 192.0.2.1 has a timeout, and set trusted_ipv4 has no timeout flag"},
		{list("trusted_ipv4", v4, "192.0.2.1 . 993 limit rate 1/second"), `line 5: "limit", which nftwl cannot restore`},
		{list("trusted_ipv4", v4, "192.0.2.1 . 993 comment alice"), `line 5: "alice" where a comment in quotes must be`},
		{list("trusted_ipv4", v4, "192.0.2.1 . 993 comment \"alice"), "line 5: a string without its end"},
		{list("trusted_ipv4", v4, "192.0.2.1 . 993 comment \"alice", "192.0.2.2 . 993 comment \"bob\""), `line 5: a string without its end: "\"alice,"`},
		{list("trusted_ipv4", v4, "192.0.2.1 . 993 192.0.2.2 . 993"), `line 5: "192.0.2.2", which nftwl cannot restore`},
		{list("trusted_ipv4", "type ipv4_addr; elements = { 192.0.2.1 }; flags timeout; timeout 1d"), "line 5: flags after the elements of set trusted_ipv4"},
		{list("trusted_ipv4", "flags timeout; elements = { 192.0.2.1 }"), "line 4: elements before the type of set trusted_ipv4"},
		{list("trusted_ipv4", "flags timeout"), "line 4: set trusted_ipv4 has no type"},
		{list("trusted_ipv4", v4) + list("trusted_ipv4", "type ipv4_addr"), "line 10: set trusted_ipv4 is of type ipv4_addr here, and of ipv4_addr . inet_service before"},
		{"table inet filter {\n\tmap trusted_ipv4 {\n\t\ttype ipv4_addr : verdict\n\t}\n}\n", "line 2: trusted_ipv4 is a map here, and must be a set"},
		{"table inet filter {\n\tset trusted_ipv4 {\n\t\ttype ipv4_addr\n", `line 4: the end of the file within set trusted_ipv4`},
		{"table inet filter {\n\tchain input {\n", `line 3: the end of the file within "chain input" of line 2`},
		{"table inet filter {\n}\n}\n", `line 3: "}", where only tables can be`},
		{"flush ruleset\n", `line 1: "flush", where only tables can be, as nft list prints them`},
		{"table inet\tfilter x {\n}\n", `line 1: "x" where { must be`},
		{"table none filter {\n}\n", `line 1: "none" is not a family`},
		{"table " + strings.Repeat("x", 5000) + " filter {\n}\n", `line 1: "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx" is not a family of nftables`},
		{`{"nftables": [{"metainfo": {"version": "1.0.6"}}]}`, "line 1: this is JSON; nftwl reads what nft lists without --json"},
		{"\x7fELF\x02", `line 1: an unexpected byte '\x7f'`},
		{headerStart + "2, saved 2026-01-01T00:00:00Z\n", `line 1: the snapshot has format "2"; this nftwl knows format 1`},
		{headerStart + "1, saved yesterday\n", `line 1: the snapshot's time "yesterday" is not one`},
		{head + list("trusted_ipv4", v4), "line 8: it was cut short"},
		{head + strings.Split(list("trusted_ipv4", v4, "192.0.2.7 . 993 timeout 1h expires 1h"), "res")[0], "line 6: it was cut short"},
		{head + list("trusted_ipv4", v4) + trailer(1), "line 9: the snapshot has 0 elements, and its last line says 1"},
		{head + list("trusted_ipv4", v4, "192.0.2.7 . 993") + list("another", v4) + trailer(0), "line 16: the snapshot has 1 elements, and its last line says 0"},
	} {
		_, err := Parse(test.text, ours)
		if err == nil || !strings.HasPrefix(err.Error(), test.err) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got  %v\nwant %s\nin:\n%s", err, test.err, test.text)
		}
	}
}

// A snapshot of sets that have another name in the configuration by now is
// whole, with fewer elements than it says.
func TestParseRenamed(t *testing.T) {
	const v4 = "type ipv4_addr . inet_service; flags timeout"
	text := headerStart + "1, saved 2026-01-01T00:00:00Z\n" + list("trusted_ipv4", v4, "192.0.2.7 . 993") + list("another", v4, "192.0.2.8 . 993") + trailer(2)
	f, err := Parse(text, ours)
	if err != nil || len(f.Sets) != 1 || len(f.Passed) != 1 {
		t.Errorf("%+v, %v", f, err)
	}
}

// A snapshot that was cut short anywhere is never taken for a whole one.
func TestParseCutShort(t *testing.T) {
	text := random(rand.New(rand.NewPCG(3, 0))).text()
	for n := len(headerStart); n < len(text)-1; n++ {
		if _, err := Parse(text[:n], ours); err == nil {
			t.Fatalf("cut after %d of %d bytes: %q", n, len(text), text[max(0, n-60):n])
		}
	}
}

// A whole firewall with sets of ours in it, as nft list ruleset prints it: all
// else is passed over, and said by line.
func TestParseRuleset(t *testing.T) {
	f, err := Parse(read(t, "ruleset.nft"), ours)
	if err != nil {
		t.Fatal(err)
	}
	passed := []string{
		"line 2: set trusted_ipv4", // of another table
		"line 9: chain prerouting", "line 15: counter hits", "line 19: set other", "line 25: map ports", "line 49: chain input",
	}
	if !slices.Equal(f.Passed, passed) {
		t.Errorf("passed over %q", f.Passed)
	}
	var got []string
	for _, s := range f.Sets {
		for _, e := range s.Elements {
			got = append(got, fmt.Sprintf("%s %s %s %q", s.Name, e.Key, nftset.FormatTimeout(e.Timeout), e.Comment))
		}
	}
	want := []string{`trusted_ipv4 192.0.2.8 . 465 7d "x \\ y; {"`, `trusted_ipv4 192.0.2.7 . 993 1d "alice"`, `banned_ipv6 2001:db8::7 . 587 1d ""`}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
}

func read(t testing.TB, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(nstest.Root(t), "testdata", "snapshots", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// Any bytes are read or refused with the line, and what was read can be
// written and is read again as the same.
func FuzzParse(f *testing.F) {
	for seed := range uint64(3) {
		f.Add([]byte(random(rand.New(rand.NewPCG(seed, 0))).text()))
	}
	files, err := filepath.Glob(filepath.Join(nstest.Root(f), "testdata", "snapshots", "*.nft"))
	if err != nil || len(files) == 0 {
		f.Fatalf("%v, %d files", err, len(files))
	}
	for _, name := range files {
		f.Add([]byte(read(f, filepath.Base(name))))
	}
	// An error has no room for all of it.
	for _, key := range []string{"type", "size", "flags", "timeout", "policy", "comment", strings.Repeat("k", 2000)} {
		f.Add([]byte("table inet filter {\n\tset s {\n\t\t" + key + " " + strings.Repeat("v", 2000) + "\n\t}\n}\n"))
		f.Add([]byte("table " + key + " " + strings.Repeat("v", 2000) + " {\n"))
	}
	lined := regexp.MustCompile(`^line [1-9][0-9]*: [^\n]+$`)
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := Parse(string(data), func(nftset.Table, string) bool { return true })
		if err != nil {
			var line int
			fmt.Sscanf(err.Error(), "line %d:", &line)
			if !lined.MatchString(err.Error()) || line > strings.Count(string(data), "\n")+1 || len(err.Error()) > 1000 {
				t.Fatalf("%q", err)
			}
			return
		}
		// What a section needs in memory is in proportion to the text.
		for _, s := range got.Sets {
			if cap(s.Elements) > len(data)/4+16 {
				t.Fatalf("room for %d elements in %d bytes", cap(s.Elements), len(data))
			}
		}
		// What stands for the whole life, and a file without our header, read
		// the same when they are written out.
		want := &File{Saved: time.Unix(1e9, 0)}
		for _, s := range got.Sets {
			s.Elements = slices.Clone(s.Elements)
			s.Comment = nftset.CleanComment(s.Comment)
			for i := range s.Elements {
				e := &s.Elements[i]
				if e.Expires == 0 {
					e.Expires = e.Timeout
				}
				if e.Timeout == permanent {
					e.Timeout, e.Expires = 0, 0
				}
			}
			if len(s.Elements) == 0 {
				s.Elements = nil
			}
			want.Sets = append(want.Sets, s)
		}
		again, err := Parse(want.text(), func(nftset.Table, string) bool { return true })
		if err != nil {
			t.Fatalf("%v in what was written:\n%s", err, want.text())
		}
		if diff := differ(again, want); diff != "" {
			t.Fatal(diff)
		}
	})
}
