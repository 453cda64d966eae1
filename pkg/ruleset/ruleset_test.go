package ruleset

import (
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

// What rules add to a set is known by its key, and what is under a rule that
// is not understood happens only where that is presumed.
func TestTrace(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, `table inet filter {
		set banned { type ipv4_addr . inet_service; flags dynamic,timeout; }
		chain input {
			type filter hook input priority filter; policy accept;
			ip saddr . tcp dport @banned drop comment "banned"
			meta mark 7 add @banned { ip saddr . tcp dport } drop
			tcp dport 587 limit rate over 1/minute add @banned { ip saddr & 255.255.255.0 . tcp dport timeout 1h } counter
		}
	}`)
	r := read(t, "/")
	banned := Set{"inet filter", "banned"}
	sets := map[Set][]nftset.Key{banned: nil}
	p := Packet{Source: client4, Port: 587, Rate: OverAll}

	trace := r.Walk(p, sets, nil)
	if !trace.Accepted || trace.Found(banned) || len(trace.PassedOver) != 1 || len(trace.Lookups) != 1 {
		t.Fatalf("%+v", trace)
	}
	network := nftset.Key{Addr: netip.MustParseAddr("198.51.100.0"), Port: 587}
	if len(trace.Added) != 1 || trace.Added[0].Key != network || trace.Added[0].Set != banned {
		t.Errorf("added %+v, want %s", trace.Added, network)
	}

	trace = r.Walk(p, sets, trace.PassedOver[0])
	key := nftset.Key{Addr: client4, Port: 587}
	if trace.Accepted || len(trace.PassedOver) != 0 || len(trace.Added) != 1 || trace.Added[0].Key != key {
		t.Errorf("as if it matched: %+v", trace)
	}

	sets[banned] = []nftset.Key{key}
	trace = r.Walk(p, sets, nil)
	end := trace.Ends[0]
	if trace.Accepted || !trace.Found(banned) || end.Rule.Comment != "banned" {
		t.Errorf("banned: %+v", trace)
	}
	want := fmt.Sprintf(`rule %d ("banned") in chain input of table inet filter`, end.Rule.Handle)
	if end.Rule.String() != want {
		t.Errorf("the rule is %s, want %s", end.Rule, want)
	}
}

// nft 1.0.6 does not know this statement, and leaves it out.
func TestLast(t *testing.T) {
	nstest.New(t)
	trixie := nstest.Trixie(t)
	cmd := exec.Command("/usr/sbin/nft", "table inet filter { chain input { type filter hook input priority filter; tcp dport 587 last drop; }; }")
	cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Chroot: trixie}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	for _, root := range []string{"/", trixie} {
		if trace := read(t, root).Walk(Packet{Source: client4, Port: 587}, nil, nil); trace.Accepted {
			t.Errorf("as nft of %s prints it: %+v", root, trace)
		}
	}
}

// Names are handed to nft, which reads its arguments as a program.
func TestUnread(t *testing.T) {
	var r Ruleset
	err := r.Read([]byte(`{"nftables": [
		{"set": {"family": "inet", "table": "a", "name": "ports", "type": "inet_service"}},
		{"map": {"family": "ip", "table": "a", "name": "b", "type": ["ifname", "inet_service"], "map": "verdict"}},
		{"set": {"family": "ip", "table": "a", "name": "addresses", "type": ["ipv4_addr", "inet_service"]}},
		{"set": {"family": "ip", "table": "a", "name": "any", "type": {"typeof": {"meta": {"key": "mark"}}}}},
		{"set": {"family": "ip", "table": "a", "name": "x; flush ruleset", "type": "inet_service"}},
		{"set": {"family": "ip", "table": "a; flush ruleset", "name": "x", "type": "inet_service"}}
	]}`))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, command := range r.Unread() {
		got = append(got, fmt.Sprint(command[2:]))
	}
	slices.Sort(got)
	if want := []string{"[list map ip a b]", "[list set inet a ports]"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// Whatever it reads, it says something and stops.
func FuzzRead(f *testing.F) {
	nstest.New(f)
	for _, test := range inputs {
		family := test.family
		if family == "" {
			family = "inet"
		}
		nstest.Nft(f, fmt.Sprintf("flush ruleset\ntable %s filter {\nset port4 { type ipv4_addr . inet_service; }\nset addr6 { type ipv6_addr; }\n%s\nchain input { type filter hook input priority filter\n%s\n}\n}\n", family, test.more, test.input))
		out, err := exec.Command(nstest.Need(f, "nft", "nftables"), append(Arguments, "list", "ruleset")...).Output()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(out)
	}
	f.Add([]byte(`{"nftables": [
		{"chain": {"family": "ip", "table": "a", "name": "c", "type": "filter", "hook": "input", "policy": "drop"}},
		{"rule": {"family": "ip", "table": "a", "chain": "c", "expr": [{"jump": {"target": "c"}}, {"goto": {"target": "c"}}]}},
		{"rule": {"family": "ip", "table": "a", "chain": "c", "expr": [{"jump": {"target": "c"}}]}},
		{"rule": {"family": "ip", "table": "a", "chain": "c", "expr": [{"match": {"op": "==", "left": [], "right": {"set": {"elem": 5}}}}]}}
	]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var r Ruleset
		if r.Read(data) != nil {
			return
		}
		r.Unread()
		for _, source := range []netip.Addr{client4, client6} {
			trace := r.Walk(Packet{Source: source, Port: 587}, map[Set][]nftset.Key{{"inet filter", "port4"}: nil}, nil)
			for _, rule := range trace.PassedOver[:min(len(trace.PassedOver), 3)] {
				r.Walk(Packet{Source: source, Port: 587, Rate: OverAll, Established: true}, nil, rule)
			}
		}
	})
}
