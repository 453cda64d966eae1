package snapshot

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

var filter = nftset.Table{Family: nftset.INet, Name: "filter"}

// comments look like nft's language; nft still prints and loads them.
var comments = []string{"", "alice", `x \ y; {`, "}", "# nftwl end, 7 elements", "a, b", "'quoted'", "zoë ☃ 日本", "timeout 1d", strings.Repeat("x", nftset.MaxComment)}

// random returns a random file with the four sets, like the parser does.
func random(r *rand.Rand) *File {
	f := &File{Saved: time.Now().Add(-time.Duration(r.IntN(1000)) * time.Millisecond).UTC()}
	pick := func(d ...time.Duration) time.Duration { return d[r.IntN(len(d))] }
	const ms, s, h, d = time.Millisecond, time.Second, time.Hour, 24 * time.Hour
	port := r.IntN(4) > 0
	for i, name := range []string{"trusted_ipv4", "trusted_ipv6", "banned_ipv4", "banned_ipv6"} {
		set := nftset.Set{Table: filter, Name: name, Key: nftset.KeyType{IPv6: i%2 == 1, Port: port}}
		set.Dynamic, set.Timeouts, set.Memory, set.Counter = r.IntN(2) > 0, r.IntN(4) > 0, r.IntN(4) == 0, r.IntN(4) == 0
		set.Comment = comments[r.IntN(len(comments))]
		// With both, the kernel uses a tree for intervals, and refuses the second
		// element (nft_set_rbtree.c).
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
				e.Port = uint16(r.IntN(65536) * r.IntN(10)) // 0 is possible too
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
		before, after := elementsStart, ""
		for _, e := range s.Elements {
			b = appendElement(append(b, before...), &s.Set, e)
			before, after = elementsNext, elementsEnd
		}
		b = append(b, after+setEnd...)
		n += len(s.Elements)
	}
	return string(b) + trailer(n)
}

func TestWriteParse(t *testing.T) {
	for seed := range uint64(500) {
		want := random(rand.New(rand.NewPCG(seed, 0)))
		got, err := Parse(want.text())
		if err != nil {
			t.Fatalf("seed %d: %v in:\n%s", seed, err, want.text())
		}
		if diff := differ(got, want); diff != "" {
			t.Fatalf("seed %d: %s", seed, diff)
		}
	}
}

// The kernel can report more time left than the timeout for an element that is
// being renewed. nft would refuse the whole file for it.
func TestWriteRenewed(t *testing.T) {
	s := &nftset.Set{Table: filter, Name: "trusted_ipv4", Timeouts: true}
	got := string(appendElement(nil, s, element("192.0.2.7", time.Hour, 2*time.Hour, "")))
	if want := "\t\t\t192.0.2.7 timeout 1h expires 1h"; got != want {
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

// list returns the text of one set, as nft prints it.
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

// nft reads what nft lists, and what an administrator writes.
func TestLoadForms(t *testing.T) {
	nstest.New(t)
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
		{"trusted_ipv4", v4 + "; timeout 1d", "192.0.2.7 . 993", []nftset.Element{element("192.0.2.7 . 993", d, d, "")}},
		{"trusted_ipv4", v4 + "; timeout 1d", "192.0.2.7 . 993 expires 12h59m59s996ms", []nftset.Element{element("192.0.2.7 . 993", d, 13*h-4*ms, "")}},
		{"trusted_ipv4", v4 + "; timeout 1d", "192.0.2.7 . 993 timeout 7d", []nftset.Element{element("192.0.2.7 . 993", 7*d, 7*d, "")}},
		{"trusted_ipv4", v4, `192.0.2.7 . 993 counter packets 12 bytes 3456 timeout 1h expires 30m comment "x \ y; {"`,
			[]nftset.Element{element("192.0.2.7 . 993", h, h/2, `x \ y; {`)}},
		{"trusted_ipv4", v4, `192.0.2.7 . 993 limit rate 1/second comment "#, }", 192.0.2.8 . imaps, 192.0.2.9 . 0,`,
			[]nftset.Element{element("192.0.2.7 . 993", 0, 0, "#, }"), element("192.0.2.8 . 993", 0, 0, ""), element("192.0.2.9 . 0", 0, 0, "")}},
		{"trusted_ipv6", "type ipv6_addr . inet_service; size 65535\t# count 2; flags timeout", "2001:db8::7 . 993, ::ffff:192.0.2.1 . 1",
			[]nftset.Element{element("::ffff:192.0.2.1 . 1", 0, 0, ""), element("2001:db8::7 . 993", 0, 0, "")}},
		{"banned_ipv4", "typeof ip saddr . tcp dport; flags timeout", "192.0.2.7 . 993", []nftset.Element{element("192.0.2.7 . 993", 0, 0, "")}},
		{"banned_ipv4", "typeof ip saddr; flags timeout", "192.0.2.7", []nftset.Element{element("192.0.2.7", 0, 0, "")}},
		{"banned_ipv4", "type ipv4_addr; timeout 1h", "192.0.2.7 timeout 2h", []nftset.Element{element("192.0.2.7", 2*h, 2*h, "")}},
	} {
		f, err := load(list(test.set, test.definition, test.elements), filter, []string{"trusted_ipv4", "trusted_ipv6", "banned_ipv4"})
		if err != nil {
			t.Errorf("%s: %v", test.elements, err)
			continue
		}
		if len(f.Sets) != 1 || !slices.EqualFunc(f.Sets[0].Elements, test.want, func(got, want nftset.Element) bool {
			soon := want.Expires - got.Expires
			got.Expires = want.Expires
			return got == want && soon >= 0 && soon < time.Minute
		}) {
			t.Errorf("%s: got %+v", test.elements, f)
		}
	}
}

func TestLoadDefinition(t *testing.T) {
	nstest.New(t)
	f, err := load(list("banned_ipv6", "type ipv6_addr . inet_service; policy memory; size 10; flags dynamic,timeout; counter; timeout 1h; gc-interval 10s; comment \"hello }\""), filter, []string{"banned_ipv6"})
	if err != nil {
		t.Fatal(err)
	}
	want := nftset.Set{
		Table: filter, Name: "banned_ipv6", Key: nftset.KeyType{IPv6: true, Port: true}, Dynamic: true, Timeouts: true,
		Counter: true, Timeout: time.Hour, GCInterval: 10 * time.Second, Size: 10, Memory: true, Comment: "hello }",
	}
	if got := f.Sets[0].Set; got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// A complete firewall with our sets, as nft list ruleset prints it.
func TestLoadRuleset(t *testing.T) {
	nstest.New(t)
	f, err := load(read(t, "ruleset.nft"), filter, []string{"trusted_ipv4", "banned_ipv6"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range f.Sets {
		for _, e := range s.Elements {
			got = append(got, fmt.Sprintf("%s %s %s %q", s.Name, e.Key, nftset.FormatTimeout(e.Timeout), e.Comment))
		}
	}
	want := []string{`trusted_ipv4 192.0.2.7 . 993 1d "alice"`, `trusted_ipv4 192.0.2.8 . 465 7d "x \\ y; {"`, `banned_ipv6 2001:db8::7 . 587 1d ""`}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	if rules := nstest.Nft(t, "list ruleset"); rules != "" {
		t.Errorf("loaded outside its namespace:\n%s", rules)
	}
}

// The rules of another machine, whose interfaces this machine lacks.
func TestLoadDevices(t *testing.T) {
	nstest.New(t)
	text := list("trusted_ipv4", "type ipv4_addr", "192.0.2.7") + `table inet filter {
	chain input {
		type filter hook input priority filter; policy drop;
		iif "eth7" accept
		iif != { "lo", "eth8", "wg0" } ip saddr 192.0.2.1 drop
		oifname "eth9" accept comment "device "
		iif "eth7" accept
	}
	chain dev {
		type filter hook ingress device "eth10" priority filter; policy accept;
	}
}
`
	f, err := load(text, filter, []string{"trusted_ipv4"})
	if err != nil || len(f.Sets) != 1 {
		t.Errorf("%+v, %v", f, err)
	}
}

// If nft refuses a file, the error has nft's words and the line.
func TestLoadErrors(t *testing.T) {
	nstest.New(t)
	const v4 = "type ipv4_addr . inet_service; flags timeout"
	for _, test := range []struct{ text, err string }{
		{list("trusted_ipv4", "type ether_addr; flags timeout"), "set trusted_ipv4 "},
		{list("trusted_ipv4", "type ipv4_addr; flags interval,timeout"), "set trusted_ipv4 "},
		{"table inet filter {\n\tmap trusted_ipv4 {\n\t\ttype ipv4_addr : verdict\n\t}\n}\n", "set trusted_ipv4 "},
		{list("trusted_ipv4", v4, "2001:db8::1 . 993"), "line 5: nft: "},
		{list("trusted_ipv4", v4, "192.0.2.1 . nosuchport"), "line 5: nft: "},
		{list("trusted_ipv4", v4, "192.0.2.1 . 993 comment \"alice"), "line 5: nft: "},
		{list("trusted_ipv4", v4, "192.0.2.1 . 993") + "table ip 10-nat {\n}\n", `line 8: nft: syntax error`},
		{"table inet filter {\n\tchain input {\n", "line 3: nft: "},
		{"include \"/nonexistent\"\n", "line 1: nft: "},
		{`{"nftables": [{"metainfo": {"version": "1.0.6"}}]}`, "this is JSON; restore reads what nft lists without --json"},
		{"\x7fELF\x02", "line 1: nft: "},
	} {
		f, err := load(test.text, filter, []string{"trusted_ipv4"})
		if err == nil || !strings.HasPrefix(err.Error(), test.err) || strings.ContainsAny(err.Error(), "\n\x7f") {
			t.Errorf("got  %v, %+v\nwant %s\nin:\n%s", err, f, test.err, test.text)
		}
	}
}

// whole returns a complete snapshot with these sections.
func whole(sets ...Section) string { return (&File{Saved: time.Now(), Sets: sets}).text() }

func section(name string, elems ...nftset.Element) Section {
	return Section{nftset.Set{Table: filter, Name: name, Key: nftset.KeyType{Port: true}, Timeouts: true, Timeout: 24 * time.Hour}, elems}
}

// Only in a snapshot does the longest timeout mean permanent.
func TestParseLongest(t *testing.T) {
	nstest.New(t)
	text := whole(section("trusted_ipv4", element("192.0.2.7 . 993", 0, 0, "")))
	_, foreign, _ := strings.Cut(text, "\n")
	for text, want := range map[string]time.Duration{text: 0, foreign: nftset.MaxTimeout} {
		f, err := ParseSets(text, four)
		if err != nil || f.Sets[0].Elements[0].Timeout != want {
			t.Errorf("%v, %+v in:\n%s", err, f, text)
		}
	}
}

// A snapshot is read exactly as it was written, or not at all.
func TestParseErrors(t *testing.T) {
	text := whole(section("trusted_ipv4", element("192.0.2.7 . 993", time.Hour, time.Minute, "alice"), element("192.0.2.8 . 993", 0, 0, "")))
	if _, err := Parse(text); err != nil {
		t.Fatal(err)
	}
	head, rest, _ := strings.Cut(text, "\n")
	for _, test := range []struct{ text, err string }{
		{strings.Replace(text, "snapshot 1", "snapshot 2", 1), `line 1: the snapshot has format "2"; this nftwl knows format 1`},
		{headerStart + "1, saved yesterday\n", `line 1: the snapshot's time "yesterday" is not one`},
		{head + ", table 1, namespace x\n" + rest, `line 1: the snapshot's table`},
		{head + "\n", "line 2: it was cut short"},
		{strings.Replace(text, "2 elements", "1 elements", 1), "line 13: the snapshot has 2 elements, and its last line says 1; after a change by hand"},
		{strings.Replace(text, "2 elements", "3 elements", 1), "line 13: the snapshot has 2 elements, and its last line says 3; after a change by hand"},
	} {
		_, err := Parse(test.text)
		if err == nil || !strings.HasPrefix(err.Error(), test.err) {
			t.Errorf("got  %v\nwant %s\nin:\n%s", err, test.err, test.text)
		}
	}
	// The error names the first line that differs.
	changed := strings.Replace(text, "flags timeout", "flags  timeout", 1)
	if _, err := Parse(changed); err == nil || !strings.HasPrefix(err.Error(), `line 5: "\t\tflags  timeout" is not`) {
		t.Errorf("%v in:\n%s", err, changed)
	}
	for old, changed := range map[string][]string{
		"table inet filter": {"table inet  filter", "table none filter", "flush table inet filter", "table inet fil;ter", "table inet filter; x"},
		"set trusted_ipv4":  {"set trusted_ipv4\x00", "map trusted_ipv4"},
		"type ipv4_addr . inet_service": {"type ether_addr", "type ipv4_addr . inet_service . ipv4_addr", "type ipv4_addr", "type ipv6_addr . inet_service",
			"typeof ip saddr . tcp dport", "type ipv4_addr . inet_service\n\t\tsize 0", "type ipv4_addr . inet_service\n\t\tsize 01", "type ipv4_addr . inet_service\n\t\tquota over 25 mbytes"},
		"flags timeout": {"flags timeout,interval", "flags  timeout", "flags", ""},
		"timeout 1d":    {"timeout 24h", "timeout 1x", "timeout 36500d"},
		"192.0.2.7 . 993": {"192.0.2.0/24 . 993", "192.0.2.1-192.0.2.9 . 993", "2001:db8::1 . 993", "mail.example.org . 993", "192.0.2.7", "192.0.2.7 . imaps",
			"192.0.2.7 . 65536", "192.0.2.7 . 0993", "* . 993", "192.0.2.7%eth0 . 993"},
		"timeout 1h expires 1m": {"timeout 1h", "timeout 1h expires 61s", "timeout 1h expires 2h", "expires 1m", "timeout 1h expires 0s", "counter timeout 1h expires 1m"},
		`comment "alice"`:       {`comment alice`, `comment "alice`, `comment "al"ice"`, `comment ""`, "comment \"a\x01\""},
		" 1m comment":           {" 1m  comment"},
		"\",\n":                 {"\"\n", "\",\n\n", "\", "},
		"\t\t}\n":               {"", "\t}\n"},
	} {
		for _, changed := range changed {
			text := strings.Replace(text, old, changed, 1)
			_, err := Parse(text)
			if err == nil || !strings.Contains(err.Error(), " is not as nftwl writes it; after a change by hand, remove the first line") || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q for %q: %v", changed, old, err)
			}
		}
	}
}

// Sets that the configuration does not name are left out of a snapshot, and
// reported.
func TestParseRenamed(t *testing.T) {
	e := element("192.0.2.7 . 993", 0, 0, "")
	text := whole(section("trusted_ipv4", e), section("another", e), section("banned_ipv4"))
	f, err := ParseSets(text, four)
	if err != nil || len(f.Sets) != 2 || fmt.Sprint(f.Refused) != "[the configuration does not name set another of table inet filter]" {
		t.Errorf("%+v, %v", f, err)
	}
	for _, count := range []string{"0", "1", "3"} {
		if _, err := ParseSets(strings.Replace(text, "2 elements", count+" elements", 1), four); err == nil {
			t.Errorf("2 elements, and the last line says %s", count)
		}
	}
}

// A truncated snapshot is never mistaken for a complete one.
func TestParseCutShort(t *testing.T) {
	text := random(rand.New(rand.NewPCG(3, 0))).text()
	for n := len(headerStart); n < len(text)-1; n++ {
		if _, err := Parse(text[:n]); err == nil {
			t.Fatalf("cut after %d of %d bytes: %q", n, len(text), text[max(0, n-60):n])
		}
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

// A file of empty lines takes little memory: one of 1 GiB would take 64 times as much
// if each line were room for an element.
func TestParseEmptyLines(t *testing.T) {
	set := &nftset.Set{Table: filter, Name: "trusted_ipv4"}
	text := header(time.Now(), nftset.Instance{}) + string(appendSet(nil, set)) +
		elementsStart + strings.Repeat("\n", 16<<20) + elementsEnd + setEnd + trailer(1)
	if mib := allocates(func() {
		if _, err := Parse(text); err == nil || !strings.HasPrefix(err.Error(), "line 6: ") {
			t.Errorf("%v", err)
		}
	}); mib > 128 {
		t.Errorf("%d MiB", mib)
	}
}

// allocates returns how many MiB f allocates.
func allocates(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return (after.TotalAlloc - before.TotalAlloc) >> 20
}

// Any bytes are read, or refused with the line. What was read is written unchanged.
func FuzzParse(f *testing.F) {
	for seed := range uint64(3) {
		f.Add([]byte(random(rand.New(rand.NewPCG(seed, 0))).text()))
	}
	// An error must not quote all of it.
	for _, key := range []string{"type", "size", "comment", strings.Repeat("k", 2000)} {
		f.Add([]byte(header(time.Now(), nftset.Instance{}) + "table inet filter {\n\tset s {\n\t\t" + key + " " + strings.Repeat("v", 2000) + "\n\t}\n}\n" + trailer(0)))
	}
	lined := regexp.MustCompile(`^line [1-9][0-9]*: [^\n]+$`)
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := Parse(string(data))
		if err != nil {
			var line int
			fmt.Sscanf(err.Error(), "line %d:", &line)
			if !lined.MatchString(err.Error()) || line > strings.Count(string(data), "\n")+1 || len(err.Error()) > 1000 {
				t.Fatalf("%q", err)
			}
			return
		}
		_, wrote, _ := strings.Cut(got.text(), "\n")
		_, read, _ := strings.Cut(strings.TrimSuffix(string(data), "\n")+"\n", "\n")
		if wrote != read {
			t.Fatalf("read\n%s\nwrote\n%s", read, wrote)
		}
		// A section's memory is proportional to its text.
		for _, s := range got.Sets {
			if cap(s.Elements) > len(data)/4+16 {
				t.Fatalf("room for %d elements in %d bytes", cap(s.Elements), len(data))
			}
		}
	})
}
