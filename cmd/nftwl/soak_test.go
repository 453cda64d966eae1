package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"

	"nftwl/pkg/nstest"
	"nftwl/pkg/trust"
)

// entry is an element's set, address and port.
type entry struct {
	list string
	addr netip.Addr
	port uint16
}

func (e entry) String() string { return fmt.Sprintf("%s %s . %d", e.list, e.addr, e.port) }

// span is what the model knows about an element. The kernel reads its clock some time
// during a command, so the model has the earliest and the latest moment at which the
// element can expire. Between these moments it can be there or not.
type span struct {
	early, late time.Time
	comments    []string // the comments that it can have
	perhaps     bool     // whether the element can also be missing
}

func (l span) union(other span) span {
	u := span{l.early, l.late, slices.Clone(l.comments), l.perhaps && other.perhaps}
	if other.early.Before(u.early) {
		u.early = other.early
	}
	if other.late.After(u.late) {
		u.late = other.late
	}
	for _, c := range other.comments {
		if !slices.Contains(u.comments, c) {
			u.comments = append(u.comments, c)
		}
	}
	return u
}

// jiffy is more than the imprecision of the kernel's times.
const jiffy = 50 * time.Millisecond

// model has the elements that the sets must have.
type model map[entry]span

// put gives an element a time to expire, unless its old one is not earlier by more than
// slack. The command ran from start to end.
func (m model) put(e entry, l span, slack time.Duration, start, end time.Time) {
	old, ok := m[e]
	if !ok || old.late.Before(start.Add(-jiffy)) {
		m[e] = l
		return
	}
	kept := !old.late.Before(l.early.Add(-slack - jiffy))
	replaced := old.perhaps || old.early.Before(l.late.Add(-slack+jiffy)) || old.early.Before(end.Add(jiffy))
	switch {
	case kept && replaced:
		m[e] = old.union(l)
	case replaced:
		m[e] = l
	}
}

// compare returns how the kernel's state differs from the model.
func (m model) compare(kernel map[entry]kernelElement, start, end time.Time) (diffs []string) {
	for e, l := range m {
		k, ok := kernel[e]
		switch {
		case !ok && !l.perhaps && l.early.After(end.Add(jiffy)):
			diffs = append(diffs, fmt.Sprintf("%v is missing, and should have %v left", e, l.early.Sub(end)))
		case ok && (k.expires < l.early.Sub(end)-jiffy || k.expires > l.late.Sub(start)+jiffy):
			diffs = append(diffs, fmt.Sprintf("%v has %v left, and should have %v to %v", e, k.expires, l.early.Sub(end), l.late.Sub(start)))
		case ok && !slices.ContainsFunc(l.comments, func(c string) bool { return sameUsers(c, k.comment) }):
			diffs = append(diffs, fmt.Sprintf("%v has the comment %q, and should have one of %q", e, k.comment, l.comments))
		}
	}
	for e, k := range kernel {
		if _, ok := m[e]; !ok {
			diffs = append(diffs, fmt.Sprintf("%v is there, with %v left and the comment %q", e, k.expires, k.comment))
		}
	}
	return diffs
}

// sameUsers reports whether two comments name the same users, in any order.
func sameUsers(a, b string) bool {
	users := func(s string) []string { return slices.Sorted(slices.Values(strings.Split(s, ", "))) }
	return slices.Equal(users(a), users(b))
}

type kernelElement struct {
	expires time.Duration
	comment string
}

// kernelState reads the sets, with another reader than nftwl's own.
func kernelState(t *testing.T) map[entry]kernelElement {
	t.Helper()
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	state := make(map[entry]kernelElement)
	for _, list := range []string{"trusted", "banned"} {
		for _, family := range []string{"ipv4", "ipv6"} {
			set, err := c.GetSetByName(&nftables.Table{Name: "filter", Family: nftables.TableFamilyINet}, list+"_"+family)
			if err != nil {
				t.Fatal(err)
			}
			elems, err := c.GetSetElements(set)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range elems {
				n := len(e.Key) - 4 // the port is padded to 4 bytes
				addr, _ := netip.AddrFromSlice(e.Key[:n])
				state[entry{list, addr, binary.BigEndian.Uint16(e.Key[n:])}] = kernelElement{e.Expires, e.Comment}
			}
		}
	}
	return state
}

// Random logins, bans, saves and restores, compared with a model of the sets. SOAK=10m
// sets the time, and SEED=N repeats a run.
func TestSoak(t *testing.T) {
	length := 2 * time.Second
	if s := os.Getenv("SOAK"); s != "" {
		var err error
		if length, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	s := &soak{T: t, random: rand.New(rand.NewPCG(seed, 0)), model: make(model), dir: t.TempDir(), did: make(map[string]int)}
	t.Logf("SEED=%d", seed)
	nstest.New(t)
	rules, err := os.ReadFile(filepath.Join(nstest.Root(t), "contrib/nftables/sets.nft"))
	if err != nil {
		t.Fatal(err)
	}
	s.rules = string(rules)
	s.config = filepath.Join(s.dir, "nftwl.yaml")
	if err := os.WriteFile(s.config, []byte("snapshot: "+filepath.Join(s.dir, "snapshot")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	nstest.Nft(t, s.rules)
	checks := 0
	for begin := time.Now(); time.Since(begin) < length && !t.Failed(); {
		for range 1 + s.random.IntN(20) {
			s.step()
		}
		start := time.Now()
		kernel := kernelState(t)
		for _, diff := range s.model.compare(kernel, start, time.Now()) {
			t.Error(diff)
		}
		checks++
	}
	t.Logf("%d checks, after %v", checks, s.did)
	if t.Failed() {
		t.Logf("the last commands:\n%s", strings.Join(s.history[max(0, len(s.history)-60):], "\n"))
	}
}

type soak struct {
	*testing.T
	random  *rand.Rand
	dir     string
	config  string // a file of it, which names the snapshot
	rules   string
	model   model
	saved   model // what the snapshot has; nil before the first
	did     map[string]int
	history []string
}

var soakPorts = []uint16{143, 993, 995, 465, 587}

func pick[E any](s *soak, of ...E) E { return of[s.random.IntN(len(of))] }

func (s *soak) addr() netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf(pick(s, "192.0.2.%d", "2001:db8::%d"), 1+s.random.IntN(4)))
}

// span returns the span of an element whose timeout starts between two moments.
func (s *soak) span(timeout time.Duration, comment string, start, end time.Time) span {
	return span{start.Add(timeout), end.Add(timeout), []string{comment}, false}
}

// run runs nftwl, and returns when it began and ended.
func (s *soak) run(env []string, args ...string) (start, end time.Time) {
	s.Helper()
	start = time.Now()
	cmd := nftwl(s.T, env, args...)
	out, err := cmd.CombinedOutput()
	end = time.Now()
	s.history = append(s.history, fmt.Sprintf("%s %q %q", start.Format("05.000"), env, args))
	if err != nil {
		s.Errorf("%q: %v: %s", args, err, out)
	}
	return start, end
}

// step runs one random command.
func (s *soak) step() {
	s.Helper()
	timeout := pick(s, time.Second, 3*time.Second, time.Minute, time.Hour, 24*time.Hour)
	comment := pick(s, "alice", "bob", "carol")
	addr, list := s.addr(), pick(s, "trusted", "banned")
	ports := soakPorts
	var only []string
	if s.random.IntN(3) == 0 {
		port := pick(s, ports...)
		ports, only = []uint16{port}, []string{"--port", fmt.Sprint(port)}
	}
	what := pick(s, "login", "login", "add")
	if s.random.IntN(3) == 0 {
		what = pick(s, "remove", "remove with comment", "flush", "save", "restore", "reload", "reload unseen", "crash", "read")
	}
	s.did[what]++
	switch what {
	case "login":
		start, end := s.run([]string{"IP=" + addr.String(), "USER=" + comment, "NFTWL_TIMEOUT=" + timeout.String()}, "login", "/bin/true")
		for _, port := range soakPorts {
			e := entry{"trusted", addr, port}
			l := s.span(timeout, comment, start, end)
			old, there := s.model[e]
			s.model.put(e, l, min(timeout/100, time.Second), start, end)
			if !there {
				continue
			}
			// The comment also has earlier users of the address. A new user is added
			// even if nothing else changes, and then the time left is never shorter
			// than asked for.
			new := false
			if !old.perhaps && old.early.After(end.Add(jiffy)) {
				l.comments = nil
			}
			for _, c := range old.comments {
				l.comments = append(l.comments, trust.AddName(c, comment))
				new = new || !trust.HasName(c, comment)
			}
			named := s.model[e]
			if new {
				s.model[e] = old
				s.model.put(e, l, 0, start, end)
				named = named.union(s.model[e])
			}
			named.comments = l.comments
			s.model[e] = named
		}
	case "add":
		command := map[string]string{"trusted": "add", "banned": "ban"}[list]
		start, end := s.run(nil, append([]string{command, "--timeout", timeout.String(), "--comment", comment, addr.String()}, only...)...)
		for _, port := range ports {
			s.model.put(entry{list, addr, port}, s.span(timeout, comment, start, end), 0, start, end)
		}
	case "remove", "remove with comment":
		command := map[string]string{"trusted": "remove", "banned": "unban"}[list]
		args := append([]string{command, addr.String()}, only...)
		if what != "remove" {
			args = append(args, "--comment", comment)
		}
		s.run(nil, args...)
		for _, port := range ports {
			e := entry{list, addr, port}
			l, ok := s.model[e]
			named := 0
			for _, c := range l.comments {
				if trust.HasName(c, comment) {
					named++
				}
			}
			switch {
			case !ok || what != "remove" && named == 0:
			case what == "remove" || named == len(l.comments):
				delete(s.model, e)
			default:
				l.perhaps = true
				s.model[e] = l
			}
		}
	case "flush":
		s.run(nil, "flush", list)
		for e := range s.model {
			if e.list == list {
				delete(s.model, e)
			}
		}
	case "save":
		s.save()
	case "restore":
		s.restore()
	case "reload": // as nftables.service and the units do
		s.save()
		nstest.Nft(s.T, "flush ruleset\n"+s.rules)
		clear(s.model)
		s.restore()
	case "reload unseen": // by hand; the next save is the timer's
		nstest.Nft(s.T, "flush ruleset\n"+s.rules)
		clear(s.model)
		s.restoreBy("save")
		s.save()
	case "crash":
		nstest.Nft(s.T, "flush ruleset\n"+s.rules)
		clear(s.model)
		s.restore()
	case "read":
		s.run(nil, "list")
		s.run(nil, "save", "-")
	}
}

func (s *soak) save() {
	s.Helper()
	s.run(nil, "--config", s.config, "save")
	s.saved = make(model, len(s.model))
	for e, l := range s.model {
		s.saved[e] = l
	}
}

func (s *soak) restore() {
	s.Helper()
	s.restoreBy("restore")
}

// restoreBy runs a command that restores the snapshot.
func (s *soak) restoreBy(command string) {
	s.Helper()
	if s.saved == nil {
		return
	}
	start, end := s.run(nil, "--config", s.config, command)
	for e, l := range s.saved {
		if l.late.Before(start) {
			continue
		}
		// Saving and restoring takes a moment.
		l.early, l.late = l.early.Add(-2*jiffy), l.late.Add(2*jiffy)
		perhaps := l.perhaps || l.early.Before(end)
		l.perhaps = false
		before, ok := s.model[e]
		s.model.put(e, l, time.Second, start, end)
		if perhaps { // it can be missing in the file, so that nothing changed
			if !ok {
				before = s.model[e]
				before.perhaps = true
			}
			after := s.model[e]
			after.perhaps = before.perhaps
			s.model[e] = after.union(before)
		}
	}
}
