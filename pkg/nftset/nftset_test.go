package nftset

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"

	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

var filter = Table{INet, "filter"}

// dial opens a connection in a new namespace with a ruleset.
func dial(t testing.TB, ruleset string) *Conn {
	t.Helper()
	nstest.New(t)
	nstest.Nft(t, ruleset)
	c, err := Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	return c
}

func describe(t testing.TB, c *Conn, name string) *Set {
	t.Helper()
	s, err := c.Set(filter, name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// nftElement is an element as nft -j list set prints it, in seconds. The tests compare
// with it.
type nftElement struct {
	Timeout, Expires int
	Comment          string
}

// nftList returns a set's elements according to nft, by key.
func nftList(t testing.TB, set string) map[string]nftElement {
	t.Helper()
	out, err := exec.Command("nft", "-j", "list", "set", "inet", "filter", set).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var doc struct {
		Nftables []struct {
			Set *struct {
				Timeout int
				Elem    []json.RawMessage
			}
		}
	}
	if err := json.Unmarshal(out, &doc); err != nil {
		t.Fatal(err)
	}
	elems := make(map[string]nftElement)
	for _, obj := range doc.Nftables {
		if obj.Set == nil {
			continue
		}
		for _, raw := range obj.Set.Elem {
			// nft prints an element without properties as its bare value.
			var wrapped struct {
				Elem *struct {
					Val json.RawMessage
					nftElement
				}
			}
			e, val := nftElement{}, raw
			if json.Unmarshal(raw, &wrapped) == nil && wrapped.Elem != nil {
				e, val = wrapped.Elem.nftElement, wrapped.Elem.Val
				if e.Timeout == 0 && e.Expires != 0 {
					e.Timeout = obj.Set.Timeout
				}
			}
			var concat struct{ Concat []any }
			key := strings.Trim(string(val), `"`)
			if json.Unmarshal(val, &concat) == nil && concat.Concat != nil {
				key = fmt.Sprintf("%v . %v", concat.Concat...)
			}
			elems[key] = e
		}
	}
	return elems
}

const rules = `
table inet filter {
	set v4port { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1d; size 1000; comment "hello"; gc-interval 10s; }
	set v6port { type ipv6_addr . inet_service; flags timeout; policy memory; }
	set v4     { type ipv4_addr; flags timeout; timeout 1h; }
	set v6     { type ipv6_addr; flags timeout; counter; }
	set none   { type ipv4_addr . inet_service; }
	set small  { type ipv4_addr . inet_service; flags dynamic,timeout; size 2; }
	set macs   { type ether_addr; flags timeout; }
	set turned { type inet_service . ipv4_addr; flags timeout; }
	set typed  { typeof ip6 saddr . tcp dport; flags timeout; }
	set range  { type ipv4_addr; flags interval,timeout; }
	set crange { type ipv4_addr . inet_service; flags interval,timeout; }
	map amap   { type ipv4_addr : verdict; flags timeout; }
}`

func TestSet(t *testing.T) {
	c := dial(t, rules)
	for _, want := range []*Set{
		{Name: "v4port", Key: KeyType{Port: true}, Dynamic: true, Timeouts: true, Timeout: 24 * time.Hour, Size: 1000, Comment: "hello", GCInterval: 10 * time.Second},
		{Name: "v6port", Key: KeyType{IPv6: true, Port: true}, Timeouts: true, Memory: true},
		{Name: "v4", Timeouts: true, Timeout: time.Hour},
		{Name: "v6", Key: KeyType{IPv6: true}, Timeouts: true, Counter: true},
		{Name: "none", Key: KeyType{Port: true}},
		{Name: "typed", Key: KeyType{IPv6: true, Port: true}, Timeouts: true},
	} {
		want.Table = filter
		got := describe(t, c, want.Name)
		got.Count = 0
		if *got != *want {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	}
}

func TestSetErrors(t *testing.T) {
	c := dial(t, rules)
	for _, test := range []struct {
		table Table
		set   string
		err   error
		words string
	}{
		{filter, "missing", ErrNoSet, "set missing does not exist in table inet filter"},
		{Table{INet, "missing"}, "v4", ErrNoTable, "table inet missing does not exist"},
		{Table{IPv4, "filter"}, "v4", ErrNoTable, "table ip filter does not exist"},
		{filter, "macs", ErrUnfit, "keys of type ether_addr,"},
		{filter, "turned", ErrUnfit, "keys of type inet_service . ipv4_addr,"},
		{filter, "range", ErrUnfit, "set range is an interval set"},
		{filter, "crange", ErrUnfit, "set crange is an interval set"},
		{filter, "amap", ErrUnfit, "set amap is a map"},
	} {
		_, err := c.Set(test.table, test.set)
		if !errors.Is(err, test.err) || !strings.Contains(fmt.Sprint(err), test.words) {
			t.Errorf("%s %s: %v, want %q", test.table, test.set, err, test.words)
		}
	}
}

func key(s string) Key {
	addr, port, ok := strings.Cut(s, " . ")
	k := Key{Addr: netip.MustParseAddr(addr)}
	if ok {
		fmt.Sscan(port, &k.Port)
	}
	return k
}

func TestAddIsReadByNft(t *testing.T) {
	c := dial(t, rules)
	for set, keys := range map[string][]string{
		"v4port": {"192.0.2.7 . 993", "192.0.2.7 . 465", "255.255.255.255 . 65535", "0.0.0.1 . 1"},
		"v6port": {"2001:db8::7 . 993", "::1 . 1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff . 65535"},
		"v4":     {"192.0.2.7"},
		"v6":     {"2001:db8::7"},
		"typed":  {"2001:db8::7 . 25"},
	} {
		s := describe(t, c, set)
		var elems []Element
		for _, k := range keys {
			elems = append(elems, Element{Key: key(k), Timeout: 2 * time.Hour, Comment: `a\b {#; 'é`})
		}
		outcomes, err := c.Extend(s, elems, 0, nil)
		if err != nil {
			t.Fatal(err)
		}
		got := nftList(t, set)
		if len(got) != len(keys) {
			t.Errorf("%s: nft lists %v", set, got)
		}
		for i, k := range keys {
			if e := got[k]; e.Timeout != 7200 || e.Expires < 7190 || e.Comment != elems[i].Comment {
				t.Errorf("%s: nft has %s as %+v", set, k, e)
			}
			if outcomes[i] != Added {
				t.Errorf("%s: %s: outcome %v", set, k, outcomes[i])
			}
		}
		// Both readers read what was written.
		all, err := c.Elements(s)
		if err != nil || len(all) != len(keys) {
			t.Fatalf("%s: %v, %v", set, all, err)
		}
		found, err := c.Lookup(s, append([]Key{all[0].Key}, elems[0].Key)...)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range append(all, found[elems[0].Key]) {
			if e.Timeout != 2*time.Hour || e.Expires <= 2*time.Hour-10*time.Second || e.Expires > e.Timeout || e.Comment != elems[0].Comment {
				t.Errorf("%s: read %+v", set, e)
			}
		}
	}
}

// Another implementation reads the same elements.
func TestReadByLibrary(t *testing.T) {
	c := dial(t, rules)
	s := describe(t, c, "v6port")
	want := []Element{
		{Key: key("2001:db8::7 . 993"), Timeout: 2 * time.Hour, Comment: "alice"},
		{Key: key("2001:db8::8 . 465"), Timeout: time.Hour, Expires: time.Minute},
		{Key: key("2001:db8::9 . 1")},
	}
	batch := c.Batch()
	for _, e := range want {
		batch.Add(s, e)
	}
	if err := batch.Commit(); err != nil {
		t.Fatal(err)
	}
	library, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	set, err := library.GetSetByName(&nftables.Table{Name: "filter", Family: nftables.TableFamilyINet}, "v6port")
	if err != nil {
		t.Fatal(err)
	}
	elems, err := library.GetSetElements(set)
	if err != nil || len(elems) != len(want) {
		t.Fatalf("%v, %v", elems, err)
	}
	for _, w := range want {
		addr := w.Addr.As16()
		bytes := append(addr[:], byte(w.Port>>8), byte(w.Port), 0, 0)
		i := slices.IndexFunc(elems, func(e nftables.SetElement) bool { return string(e.Key) == string(bytes) })
		if i < 0 {
			t.Errorf("%s is missing", w.Key)
			continue
		}
		left := w.Timeout
		if w.Expires > 0 {
			left = w.Expires
		}
		if e := elems[i]; e.Timeout != w.Timeout || e.Comment != w.Comment || e.Expires > left || e.Expires < left-10*time.Second {
			t.Errorf("%s is read as %+v", w.Key, e)
		}
	}
}

func TestPermanent(t *testing.T) {
	c := dial(t, rules)
	for _, set := range []string{"v4port", "small"} { // with and without a default timeout
		s := describe(t, c, set)
		e := Element{Key: key("192.0.2.7 . 993")}
		if _, err := c.Extend(s, []Element{e}, 0, nil); err != nil {
			t.Fatal(err)
		}
		if got := nftList(t, set)["192.0.2.7 . 993"]; got != (nftElement{}) {
			t.Errorf("%s: nft has %+v", set, got)
		}
		found, err := c.Lookup(s, e.Key)
		if got, ok := found[e.Key]; err != nil || !ok || !got.Permanent() {
			t.Errorf("%s: read %+v, %v", set, found, err)
		}
		// It stays permanent, whatever timeout a login asks for.
		e.Timeout = time.Hour
		if o, err := c.Extend(s, []Element{e}, 0, nil); err != nil || o[0] != Unchanged {
			t.Errorf("%v, %v", o, err)
		}
		if got := nftList(t, set)["192.0.2.7 . 993"]; got.Expires != 0 {
			t.Errorf("%s: a permanent element expires now: %+v", set, got)
		}
	}
}

func TestExtend(t *testing.T) {
	const k = "192.0.2.7 . 993"
	for _, test := range []struct {
		name    string
		there   string // the element that nft adds first
		e       Element
		outcome Outcome
		expires int // at least, in seconds
		timeout int
		comment string
	}{
		{"same timeout, part of it gone", "timeout 1h expires 10m", Element{Timeout: time.Hour}, Renewed, 3590, 3600, ""},
		{"the set's default, part of it gone", "expires 10m", Element{Timeout: 24 * time.Hour}, Renewed, 86390, 86400, ""},
		{"a shorter timeout", "timeout 10m", Element{Timeout: time.Hour}, Renewed, 3590, 3600, ""},
		{"a longer timeout, little of it left", "timeout 30d expires 10m", Element{Timeout: time.Hour}, Renewed, 3590, 3600, ""},
		{"a longer trust", "timeout 30d expires 29d", Element{Timeout: time.Hour}, Unchanged, 29*86400 - 10, 30 * 86400, ""},
		{"another comment", `timeout 1h expires 10m comment "alice"`, Element{Timeout: time.Hour, Comment: "bob"}, Renewed, 3590, 3600, "bob"},
		{"a longer trust with another comment", `timeout 1h comment "alice"`, Element{Timeout: time.Minute, Comment: "bob"}, Unchanged, 3590, 3600, "alice"},
		{"the same comment", `timeout 1h expires 10m comment "alice"`, Element{Timeout: time.Hour, Comment: "alice"}, Renewed, 3590, 3600, "alice"},
		{"permanent from now on", "timeout 1h", Element{}, Renewed, 0, 0, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := dial(t, rules)
			for _, renews := range []bool{c.renewsInPlace(), false} {
				c.renews = &renews // false before Linux 6.12
				nstest.Nft(t, "flush set inet filter v4port; add element inet filter v4port { "+k+" "+test.there+" }")
				s := describe(t, c, "v4port")
				test.e.Key = key(k)
				// A second, new element is added with it.
				second := Element{Key: key("192.0.2.7 . 465"), Timeout: time.Hour}
				o, err := c.Extend(s, []Element{test.e, second}, 0, nil)
				if err != nil || !slices.Equal(o, []Outcome{test.outcome, Added}) {
					t.Fatalf("outcomes %v, %v", o, err)
				}
				got := nftList(t, "v4port")
				if e := got[k]; e.Expires < test.expires || e.Timeout != test.timeout || e.Comment != test.comment {
					t.Errorf("nft has %+v, want %+v", e, test)
				}
				if e := got["192.0.2.7 . 465"]; e.Expires < 3590 {
					t.Errorf("nft has %+v for the new one", e)
				}
			}
		})
	}
}

// If the kernel can renew an element without deleting it, nothing is deleted. Closing
// the connection after a deletion would double the time of a login.
func TestRenewalDeletesNothing(t *testing.T) {
	c := dial(t, rules)
	const k = "192.0.2.7 . 993"
	nstest.Nft(t, "add element inet filter v4port { "+k+" timeout 1h expires 10m }")
	s := describe(t, c, "v4port")
	batch := c.Batch()
	batch.Add(s, Element{Key: key(k), Timeout: time.Hour, Expires: time.Hour})
	if err := batch.Commit(); err != nil {
		t.Fatal(err)
	}
	if renews := nftList(t, "v4port")[k].Expires > 3000; renews != c.renewsInPlace() {
		t.Errorf("this kernel renews: %v, not %v", renews, c.renewsInPlace())
	}
	for _, renews := range []bool{c.renewsInPlace(), false} {
		c.renews = &renews
		nstest.Nft(t, "delete element inet filter v4port { "+k+" }; add element inet filter v4port { "+k+" timeout 1h expires 10m }")
		before := c.seq
		if _, err := c.Extend(s, []Element{{Key: key(k), Timeout: time.Hour}}, 0, nil); err != nil {
			t.Fatal(err)
		}
		// The generation, a lookup, begin, add, end; or add, delete, add.
		if n, want := c.seq-before, map[bool]uint32{true: 5, false: 7}[renews]; n != want {
			t.Errorf("%d messages, want %d", n, want)
		}
	}
}

// Logins at the same moment, one of which is trusted for longer, or permanently.
func TestExtendAtOnce(t *testing.T) {
	c := dial(t, rules)
	s := describe(t, c, "v4port")
	other, err := Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	type job struct {
		key   Key
		ready *atomic.Int32
	}
	jobs, done := make(chan job), make(chan error)
	defer close(jobs)
	// Both begin at the same time, as nearly as a program can manage.
	atOnce := func(ready *atomic.Int32) {
		for ready.Add(1); ready.Load() < 2; {
		}
	}
	go func() {
		for j := range jobs {
			atOnce(j.ready)
			_, err := other.Extend(s, []Element{{Key: j.key, Timeout: time.Hour}}, 0, nil)
			done <- err
		}
	}()
	for round := range 200 {
		k := Key{netip.MustParseAddr("192.0.2.7"), uint16(round + 1)}
		long := Element{Key: k, Timeout: 7 * 24 * time.Hour}
		if round%3 == 0 {
			long.Timeout = 0
		}
		if round%2 == 0 {
			batch := c.Batch()
			batch.Add(s, Element{Key: k, Timeout: time.Hour, Expires: time.Minute})
			if err := batch.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		ready := new(atomic.Int32)
		jobs <- job{k, ready}
		atOnce(ready)
		_, err := c.Extend(s, []Element{long}, 0, nil)
		if e := <-done; err != nil || e != nil {
			t.Fatal(err, e)
		}
		now, err := c.Lookup(s, k)
		if err != nil {
			t.Fatal(err)
		}
		if e := now[k]; !e.Outlives(long, time.Minute) {
			t.Fatalf("round %d: %+v, want the time left of %+v", round, e, long)
		}
	}
}

// If there is no room for missing elements, the others are still renewed.
func TestFullRenews(t *testing.T) {
	c := dial(t, rules)
	s := describe(t, c, "small")
	nstest.Nft(t, "add element inet filter small { 192.0.2.7 . 1 timeout 1h expires 10m, 192.0.2.7 . 2 timeout 1h expires 10m }")
	var elems []Element
	for port := uint16(1); port <= 3; port++ {
		elems = append(elems, Element{Key: Key{netip.MustParseAddr("192.0.2.7"), port}, Timeout: time.Hour})
	}
	if _, err := c.Extend(s, elems, 0, nil); !errors.Is(err, ErrFull) {
		t.Errorf("%v", err)
	}
	got := nftList(t, "small")
	if len(got) != 2 || got["192.0.2.7 . 1"].Expires < 3590 || got["192.0.2.7 . 2"].Expires < 3590 {
		t.Errorf("%+v", got)
	}
}

// On kernels before 6.12, this renews an element.
func TestReplace(t *testing.T) {
	c := dial(t, rules)
	nstest.Nft(t, "add element inet filter v4port { 192.0.2.7 . 993 timeout 1h expires 10m }")
	s := describe(t, c, "v4port")
	batch := c.Batch()
	batch.Replace(s, []Element{
		{Key: key("192.0.2.7 . 993"), Timeout: time.Hour, Comment: "x"},
		{Key: key("192.0.2.8 . 993"), Timeout: time.Hour}, // not there
	})
	if err := batch.Commit(); err != nil {
		t.Fatal(err)
	}
	got := nftList(t, "v4port")
	if e := got["192.0.2.7 . 993"]; e.Expires < 3590 || e.Comment != "x" {
		t.Errorf("%+v", got)
	}
	if e := got["192.0.2.8 . 993"]; e.Expires < 3590 {
		t.Errorf("%+v", got)
	}
}

func TestSlack(t *testing.T) {
	c := dial(t, rules)
	s := describe(t, c, "v4port")
	nstest.Nft(t, "add element inet filter v4port { 192.0.2.7 . 993 timeout 1h expires 3590s }")
	e := []Element{{Key: key("192.0.2.7 . 993"), Timeout: time.Hour}}
	if o, err := c.Extend(s, e, 20*time.Second, nil); err != nil || o[0] != Unchanged {
		t.Errorf("within the slack: %v, %v", o, err)
	}
	if o, err := c.Extend(s, e, 2*time.Second, nil); err != nil || o[0] != Renewed {
		t.Errorf("past the slack: %v, %v", o, err)
	}
}

func TestRemove(t *testing.T) {
	c := dial(t, rules)
	s := describe(t, c, "v4port")
	nstest.Nft(t, `add element inet filter v4port { 192.0.2.7 . 1 comment "a", 192.0.2.7 . 2 comment "b", 192.0.2.8 . 1 }`)
	keys := []Key{key("192.0.2.7 . 1"), key("192.0.2.7 . 2"), key("192.0.2.9 . 9"), key("192.0.2.7 . 1")}
	removed, err := c.Remove(s, keys, func(e Element) bool { return e.Comment == "b" })
	if err != nil || len(removed) != 1 || removed[0].Key != keys[1] {
		t.Errorf("%v, %v", removed, err)
	}
	removed, err = c.Remove(s, keys, nil)
	if err != nil || len(removed) != 1 || removed[0].Key != keys[0] {
		t.Errorf("%v, %v", removed, err)
	}
	if got := nftList(t, "v4port"); len(got) != 1 {
		t.Errorf("left: %v", got)
	}
	batch := c.Batch()
	batch.Flush(s)
	if err := batch.Commit(); err != nil {
		t.Error(err)
	}
	if got := nftList(t, "v4port"); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

func TestWriteErrors(t *testing.T) {
	c := dial(t, rules)
	e := func(k string) []Element { return []Element{{Key: key(k), Timeout: time.Hour}} }
	for _, test := range []struct {
		set   string
		elems []Element
		err   error
		words string
	}{
		{"none", e("192.0.2.7 . 1"), ErrUnfit, "set none has no timeout flag"},
		{"v4port", e("2001:db8::7 . 1"), ErrUnfit, "2001:db8::7 . 1 is not"},
		{"v6port", e("192.0.2.7 . 1"), ErrUnfit, "192.0.2.7 . 1 is not"},
		{"v4", e("192.0.2.7 . 1"), ErrUnfit, "192.0.2.7 . 1 is not"},
		{"small", append(append(e("192.0.2.1 . 1"), e("192.0.2.2 . 1")...), e("192.0.2.3 . 1")...), ErrFull, "set small is full (2 elements)"},
	} {
		_, err := c.Extend(describe(t, c, test.set), test.elems, 0, nil)
		var typed *Error
		if !errors.Is(err, test.err) || !errors.As(err, &typed) || !strings.Contains(err.Error(), test.words) {
			t.Errorf("%s: %v, want %q", test.set, err, test.words)
		}
		if test.set == "small" && len(nftList(t, "small")) != 0 {
			t.Error("a transaction that failed left something behind")
		}
	}

	s := describe(t, c, "v4port")
	batch := c.Batch()
	batch.Delete(s, key("192.0.2.7 . 1"))
	if err := batch.Commit(); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete of a missing element: %v", err)
	}
	nstest.Nft(t, "delete set inet filter v4port")
	if _, err := c.Extend(s, e("192.0.2.7 . 1"), 0, nil); !errors.Is(err, ErrNoSet) {
		t.Errorf("the set is gone: %v", err)
	}
	if _, err := c.Elements(s); !errors.Is(err, ErrNoSet) {
		t.Errorf("the set is gone: %v", err)
	}
	nstest.Nft(t, "delete table inet filter")
	if _, err := c.Extend(s, e("192.0.2.7 . 1"), 0, nil); !errors.Is(err, ErrNoTable) {
		t.Errorf("the table is gone: %v", err)
	}
	// The connection still works.
	nstest.Nft(t, rules)
	if _, err := c.Extend(s, e("192.0.2.7 . 1"), 0, nil); err != nil {
		t.Error(err)
	}
}

// Deleting a missing element is an error at once, even if more messages follow in the
// batch.
func TestDeleteMissing(t *testing.T) {
	c := dial(t, rules)
	s := describe(t, c, "v4port")
	c.SetDeadline(time.Now().Add(5 * time.Second))
	batch := c.Batch()
	batch.Delete(s, key("192.0.2.1 . 1"))
	batch.Add(s, Element{Key: key("192.0.2.2 . 1")})
	if err := batch.Commit(); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if left := time.Until(c.deadline); left < 2*time.Second {
		t.Errorf("it waited until %v before the deadline", left)
	}
}

func TestCreate(t *testing.T) {
	c := dial(t, rules)
	var sets []*Set
	for _, name := range []string{"v4port", "v6port", "v4", "v6", "none", "small"} {
		sets = append(sets, describe(t, c, name))
	}
	nstest.Nft(t, "flush ruleset")
	batch := c.Batch()
	batch.CreateTable(filter)
	for _, s := range sets {
		batch.CreateSet(s)
	}
	if err := batch.Commit(); err != nil {
		t.Fatal(err)
	}
	got, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	nstest.Nft(t, "flush ruleset; "+rules)
	for _, gone := range []string{"set macs", "set turned", "set typed", "set range", "set crange", "map amap"} {
		nstest.Nft(t, "delete "+strings.Replace(gone, " ", " inet filter ", 1))
	}
	nstest.Nft(t, "flush set inet filter none")
	want, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("nft lists\n%s\nwant\n%s", got, want)
	}
}

// Many elements take several messages, because a list ends at 64 KiB, and several
// buffers.
func TestMany(t *testing.T) {
	const n = 20000
	c := dial(t, `table inet filter { set v6port { type ipv6_addr . inet_service; flags timeout; }; }`)
	s := describe(t, c, "v6port")
	comment := strings.Repeat("x", MaxComment)
	batch := c.Batch()
	want := make(map[Key]bool)
	addr := netip.MustParseAddr("2001:db8::")
	for range n {
		addr = addr.Next()
		k := Key{addr, 993}
		want[k] = true
		batch.Add(s, Element{Key: k, Timeout: time.Hour, Expires: time.Minute, Comment: comment})
	}
	if err := batch.Commit(); err != nil {
		t.Fatal(err)
	}
	got, err := c.Elements(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range got {
		if !want[e.Key] || e.Comment != comment || e.Timeout != time.Hour || e.Expires > time.Minute || e.Expires < 50*time.Second {
			t.Fatalf("read %+v", e)
		}
		delete(want, e.Key)
	}
	if len(want) > 0 {
		t.Errorf("%d elements are missing", len(want))
	}
	var keys []Key
	for _, e := range got[:1000] {
		keys = append(keys, e.Key)
	}
	if found, err := c.Lookup(s, keys...); err != nil || len(found) != len(keys) {
		t.Errorf("found %d of %d: %v", len(found), len(keys), err)
	}
}

// The kernel resizes the hash table of a set some time after many elements
// were added, and a dump meanwhile has some of them twice and others not.
func TestDumpDuringResize(t *testing.T) {
	const n = 20000
	c := dial(t, "table inet filter {}")
	for round := range 10 {
		s := &Set{Table: filter, Name: fmt.Sprint("set", round), Key: KeyType{Port: true}, Timeouts: true}
		batch := c.Batch()
		batch.CreateSet(s)
		addr := netip.MustParseAddr("192.0.2.0")
		for range n {
			addr = addr.Next()
			batch.Add(s, Element{Key: Key{addr, 993}, Timeout: time.Hour})
		}
		if err := batch.Commit(); err != nil {
			t.Fatal(err)
		}
		elems, err := c.Elements(s)
		if err != nil {
			t.Fatal(err)
		}
		if len(elems) != n {
			t.Fatalf("round %d: %d of %d elements", round, len(elems), n)
		}
	}
}

// The kernel's answers that a table is the same, or another one.
func TestInstance(t *testing.T) {
	const table = "table inet filter { set v4port { type ipv4_addr . inet_service; flags timeout; }; }"
	c := dial(t, table)
	instance := func() Instance {
		t.Helper()
		i, err := c.Instance(filter)
		if err != nil || i.Handle == 0 || i.Namespace == 0 || len(i.Boot) != 36 {
			t.Fatalf("%+v, %v", i, err)
		}
		return i
	}
	first := instance()
	for _, same := range []string{
		"add element inet filter v4port { 192.0.2.7 . 993 timeout 1h }", "flush set inet filter v4port",
		"flush table inet filter", "delete set inet filter v4port", table, "table inet other {}",
	} {
		nstest.Nft(t, same)
		if now := instance(); now != first {
			t.Errorf("after %s: %+v, and was %+v", same, now, first)
		}
	}
	seen := map[Instance]bool{first: true}
	for _, other := range []string{
		"flush ruleset; " + table, "delete table inet filter; " + table, "flush ruleset; table inet filter {}",
	} {
		nstest.Nft(t, other)
		if now := instance(); seen[now] {
			t.Errorf("after %s: %+v as before", other, now)
		} else {
			seen[now] = true
		}
	}
	// In another namespace, the same steps give the same handle.
	nstest.New(t)
	nstest.Nft(t, table)
	elsewhere, err := Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	if i, err := elsewhere.Instance(filter); err != nil || i.Namespace == first.Namespace || i.Boot != first.Boot {
		t.Errorf("another namespace: %+v, %v, and the first is %+v", i, err, first)
	}
	if _, err := elsewhere.Instance(Table{INet, "missing"}); !errors.Is(err, ErrNoTable) {
		t.Errorf("%v", err)
	}
}

// Elements that nft accepts but a mail server does not need are read and written
// unchanged.
func TestOddElements(t *testing.T) {
	c := dial(t, rules)
	for set, zero := range map[string]string{"v4port": "192.0.2.7 . 0", "v6port": "2001:db8::7 . 0", "v4": "", "v6": ""} {
		s := describe(t, c, set)
		elements := `* timeout 1h comment "all"`
		want := map[Key]string{{}: "all"}
		if zero != "" {
			elements += ", " + zero + ` timeout 1h comment "zero"`
			want[key(zero)] = "zero"
		}
		nstest.Nft(t, "add element inet filter "+set+" { "+elements+" }")
		var keys []Key
		for k := range want {
			keys = append(keys, k)
		}
		elems, err := c.Elements(s)
		if err != nil || len(elems) != len(want) {
			t.Fatalf("%s: %+v, %v", set, elems, err)
		}
		for _, e := range elems {
			if e.Comment != want[e.Key] || e.Timeout != time.Hour || e.Expires < 59*time.Minute {
				t.Errorf("%s: %+v", set, e)
			}
		}
		if found, err := c.Lookup(s, keys...); err != nil || len(found) != len(want) {
			t.Errorf("%s: %+v, %v", set, found, err)
		}
		if removed, err := c.Remove(s, keys, nil); err != nil || len(removed) != len(want) {
			t.Errorf("%s: %+v, %v", set, removed, err)
		}
		if got := nftList(t, set); len(got) != 0 {
			t.Errorf("%s: %+v", set, got)
		}
		for i := range elems {
			elems[i].Timeout = 2 * time.Hour
		}
		if _, err := c.Extend(s, elems, 0, nil); err != nil {
			t.Errorf("%s: %v", set, err)
		}
		if got := nftList(t, set); len(got) != len(want) || got["*"].Comment != "all" || got["*"].Timeout != 7200 {
			t.Errorf("%s: %+v", set, got)
		}
	}
}

func TestCreateExisting(t *testing.T) {
	c := dial(t, rules)
	s := describe(t, c, "v4port")
	k := "192.0.2.7 . 993"
	nstest.Nft(t, "add element inet filter v4port { "+k+" timeout 1h }")
	batch := c.Batch()
	batch.Create(s, Element{Key: key("192.0.2.8 . 993"), Timeout: time.Minute})
	batch.Create(s, Element{Key: key(k), Timeout: time.Minute})
	if err := batch.Commit(); !errors.Is(err, ErrExists) {
		t.Errorf("%v", err)
	}
	if got := nftList(t, "v4port"); len(got) != 1 || got[k].Timeout != 3600 {
		t.Errorf("%+v", got)
	}
}

// If a call has several elements with the same key, the first one counts.
func TestExtendTwice(t *testing.T) {
	c := dial(t, rules)
	s := describe(t, c, "v4port")
	k := key("192.0.2.7 . 993")
	both := func(old, new string) string { return old + "+" + new }
	for round, want := range []string{"a", "a+a"} {
		outcomes, err := c.Extend(s, []Element{
			{Key: k, Timeout: time.Duration(round+2) * time.Hour, Comment: "a"},
			{Key: k, Timeout: 9 * time.Hour, Comment: "b"},
			{Key: k, Timeout: time.Minute, Comment: "c"},
		}, 0, both)
		if err != nil || outcomes[0] != outcomes[1] || outcomes[1] != outcomes[2] || outcomes[0] != []Outcome{Added, Renewed}[round] {
			t.Errorf("round %d: %v, %v", round, outcomes, err)
		}
		if e := nftList(t, "v4port")[k.String()]; e.Timeout != (round+2)*3600 || e.Comment != want {
			t.Errorf("round %d: %+v", round, e)
		}
	}
}

// While others keep changing the ruleset, a change takes no longer than its deadline and
// the last of their transactions. A new element is still added, and no element expires
// earlier than before.
func TestExtendBehindOthers(t *testing.T) {
	const deadline = 300 * time.Millisecond
	c := dial(t, "table inet other { set s { type ipv4_addr; }; };"+rules)
	s := describe(t, c, "v4port")
	nstest.Nft(t, "add element inet filter v4port { 192.0.2.7 . 993 timeout 1h expires 10m }")
	other := &Set{Table: Table{INet, "other"}, Name: "s"}
	var longest atomic.Int64
	done, stopped := make(chan struct{}), make(chan error, 2)
	for worker := range byte(2) {
		// In the namespace of the test.
		conn, err := Dial()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer conn.Close()
			for {
				select {
				case <-done:
					stopped <- nil
					return
				default:
				}
				batch := conn.Batch()
				addr := netip.AddrFrom4([4]byte{10 + worker})
				for range 2000 {
					addr = addr.Next()
					batch.Replace(other, []Element{{Key: Key{Addr: addr}}})
				}
				start := time.Now()
				if err := batch.Commit(); err != nil {
					stopped <- err
					return
				}
				longest.Store(max(longest.Load(), int64(time.Since(start))))
			}
		}()
	}
	long := Element{Key: key("192.0.2.7 . 993"), Timeout: time.Hour}
	for round := range 10 {
		for _, e := range []Element{{Key: Key{netip.MustParseAddr("192.0.2.8"), uint16(round)}, Timeout: time.Hour}, long} {
			start := time.Now()
			c.SetDeadline(start.Add(deadline))
			_, err := c.Extend(s, []Element{e}, 0, nil)
			took := time.Since(start)
			switch {
			case e.Key == long.Key && errors.Is(err, ErrBusy):
			case err != nil:
				t.Errorf("round %d, %s: %v", round, e.Key, err)
			}
			// Two writers wait for each other, and this one for both.
			if most := deadline + 3*time.Duration(longest.Load()); took > most {
				t.Errorf("round %d, %s: %v, and the deadline and their transactions are %v", round, e.Key, took, most)
			}
		}
	}
	close(done)
	for range 2 {
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	}
	got := nftList(t, "v4port")
	if len(got) != 11 || got["192.0.2.7 . 993"].Expires < 590 {
		t.Errorf("%+v", got)
	}
}

func TestDeadline(t *testing.T) {
	c := dial(t, rules)
	c.SetDeadline(time.Now().Add(50 * time.Millisecond))
	start := time.Now()
	// Without a request, a reply never comes.
	_, err := c.read()
	if !errors.Is(err, ErrDeadline) {
		t.Errorf("%v", err)
	}
	if took := time.Since(start); took < 40*time.Millisecond || took > 10*time.Second {
		t.Errorf("waited %v", took)
	}
}

// Dump reports that the ruleset has changed meanwhile. Elements still returns all
// elements that were there all the time.
func TestInterruptedDump(t *testing.T) {
	const n = 20000
	c := dial(t, `table inet filter { set v4port { type ipv4_addr . inet_service; flags timeout; }; }`)
	s := describe(t, c, "v4port")
	batch := c.Batch()
	addr := netip.MustParseAddr("192.0.2.0")
	for range n {
		addr = addr.Next()
		batch.Add(s, Element{Key: Key{addr, 993}, Timeout: time.Hour})
	}
	if err := batch.Commit(); err != nil {
		t.Fatal(err)
	}
	other, err := Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	seen := 0
	err = c.Dump(s, func(Element) {
		if seen++; seen == 1 {
			b := other.Batch()
			b.Add(s, Element{Key: key("203.0.113.1 . 1"), Timeout: time.Hour})
			if err := b.Commit(); err != nil {
				t.Fatal(err)
			}
		}
	})
	if !errors.Is(err, ErrInterrupted) {
		t.Fatalf("after %d elements: %v", seen, err)
	}

	done := make(chan struct{})
	stopped := make(chan error)
	go func() {
		// In the namespace of the test: other was opened there.
		for i := uint16(1); ; i++ {
			select {
			case <-done:
				stopped <- nil
				return
			default:
			}
			b := other.Batch()
			e := Element{Key: Key{netip.MustParseAddr("203.0.113.2"), i | 1}, Timeout: time.Minute}
			b.Replace(s, []Element{e})
			if err := b.Commit(); err != nil {
				stopped <- err
				return
			}
		}
	}()
	elems, err := c.Elements(s)
	close(done)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	stable := 0
	for _, e := range elems {
		if e.Port == 993 && e.Addr.As4()[0] == 192 {
			stable++
		}
	}
	if stable != n {
		t.Errorf("%d of %d stable elements", stable, n)
	}
}

// The buffers of each dump end at other elements, also on a connection that has dumped
// before, so that the next dump has what one dump lacks.
func TestElementsWhileOthersAreDeleted(t *testing.T) {
	const n = 5000
	c := dial(t, `table inet filter { set v4port { type ipv4_addr . inet_service; flags timeout; }; }`)
	s := describe(t, c, "v4port")
	batch := c.Batch()
	addr := netip.MustParseAddr("192.0.2.0")
	for range n {
		addr = addr.Next()
		batch.Add(s, Element{Key: Key{addr, 993}, Timeout: time.Hour})
	}
	if err := batch.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := c.Dump(s, func(Element) {}); err != nil && !errors.Is(err, ErrInterrupted) {
		t.Fatal(err)
	}
	other, err := Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	done, stopped := make(chan struct{}), make(chan error)
	go func() {
		for port := uint16(1); ; port++ {
			select {
			case <-done:
				stopped <- nil
				return
			default:
			}
			for _, change := range []func(*Batch, Key){
				func(b *Batch, k Key) { b.Add(s, Element{Key: k, Timeout: time.Hour}) },
				func(b *Batch, k Key) { b.Delete(s, k) },
			} {
				b := other.Batch()
				for i := range 5 {
					change(b, Key{netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), port})
				}
				if err := b.Commit(); err != nil {
					stopped <- err
					return
				}
				time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
			}
		}
	}()
	rounds, lost := 0, 0
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); rounds++ {
		elems, err := c.Elements(s)
		if err != nil {
			t.Fatal(err)
		}
		stable := 0
		for _, e := range elems {
			if e.Port == 993 && e.Addr.As4()[0] == 192 {
				stable++
			}
		}
		if stable != n {
			lost++
		}
	}
	close(done)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	if lost > 0 {
		t.Errorf("elements were missing from %d of %d lists", lost, rounds)
	}
}

func TestNoPermission(t *testing.T) {
	nstest.New(t)
	out, err := exec.Command("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs",
		nstest.Build(t, "cmd/nftwl"), "list", "trusted").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "CAP_NET_ADMIN is missing") {
		t.Errorf("%v: %s", err, out)
	}
}
