package policy

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"nftwl/pkg/config"
)

var limits = config.Failures{Limit: 3, Within: 10 * time.Minute, Ban: time.Hour, Longest: 4 * time.Hour, TrustedLimit: 5}

var start = time.Unix(1_800_000_000, 0)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func wrong(n int) Attempt { return Attempt{"alice", fmt.Sprint(n)} }

func TestDifferentAttemptsCount(t *testing.T) {
	tr := NewTracker(limits)
	guesser, owner := addr("192.0.2.1"), addr("192.0.2.2")
	for range 100 {
		tr.Failure(start, owner, wrong(0))
	}
	if v := tr.Judge(start, owner); v.Failures != 1 || v.Ban != 0 {
		t.Errorf("a telephone with an old password: %+v", v)
	}
	for i, a := range []Attempt{{"alice", "1"}, {"alice", "2"}, {"bob", "1"}} {
		if v := tr.Judge(start, guesser); v.Failures != i || v.Ban != 0 {
			t.Errorf("after %d: %+v", i, v)
		}
		if o := tr.Failure(start, guesser, a); o != Counted {
			t.Errorf("%v is %s", a, o)
		}
	}
	if v := tr.Judge(start, guesser); v != (Verdict{Failures: 3, Ban: time.Hour}) {
		t.Errorf("at the limit: %+v", v)
	}
	if o := tr.Failure(start, guesser, wrong(2)); o != Repeated {
		t.Errorf("the same again is %s", o)
	}
}

// Without a hash each failure counts.
func TestWithoutHash(t *testing.T) {
	tr := NewTracker(limits)
	for range 3 {
		tr.Failure(start, addr("192.0.2.1"), Attempt{Login: "alice"})
	}
	if v := tr.Judge(start, addr("192.0.2.1")); v.Ban == 0 {
		t.Errorf("%+v", v)
	}
}

// While the password database is down, right passwords fail, and do not count.
func TestOutage(t *testing.T) {
	tr := NewTracker(limits)
	office, attacker := addr("192.0.2.1"), addr("192.0.2.2")
	for user := range 200 {
		tr.Success(start, office, Attempt{fmt.Sprint(user), "right"})
		tr.Success(start, office, Attempt{fmt.Sprint(user), ""})
	}
	later := start.Add(20 * 24 * time.Hour)
	for user := range 200 {
		for _, hash := range []string{"right", ""} {
			if o := tr.Failure(later, office, Attempt{fmt.Sprint(user), hash}); o != Right {
				t.Errorf("user %d, hash %q: %s", user, hash, o)
			}
		}
	}
	if v := tr.Judge(later, office); v != (Verdict{}) {
		t.Errorf("%+v", v)
	}
	// A right password is right from anywhere. Without a hash, nobody knows what was
	// tried elsewhere.
	if o := tr.Failure(later, attacker, Attempt{"1", "right"}); o != Right {
		t.Errorf("from elsewhere: %s", o)
	}
	if o := tr.Failure(later, attacker, Attempt{"1", ""}); o != Counted {
		t.Errorf("from elsewhere without a hash: %s", o)
	}
	if o := tr.Failure(start.Add(31*24*time.Hour), office, Attempt{"1", "right"}); o != Counted {
		t.Errorf("after a month: %s", o)
	}
}

func TestWindow(t *testing.T) {
	tr := NewTracker(limits)
	a := addr("192.0.2.1")
	tr.Failure(start, a, wrong(1))
	tr.Failure(start.Add(9*time.Minute), a, wrong(2))
	if v := tr.Judge(start.Add(10*time.Minute-time.Second), a); v.Failures != 2 {
		t.Errorf("within: %+v", v)
	}
	if v := tr.Judge(start.Add(10*time.Minute), a); v.Failures != 1 {
		t.Errorf("after it: %+v", v)
	}
	// A clock that goes backwards brings no address closer to a ban.
	tr.Failure(start.Add(-time.Hour), a, wrong(2))
	if v := tr.Judge(start.Add(-time.Hour), a); v.Failures != 1 {
		t.Errorf("before: %+v", v)
	}
}

// fail counts n different failures, and bans the address if they call for it.
func fail(tr *Tracker, now time.Time, a netip.Addr, n int) Verdict {
	for range n {
		tr.Failure(now, a, Attempt{"alice", fmt.Sprint(rand.Uint64())})
	}
	v := tr.Judge(now, a)
	if v.Ban > 0 {
		tr.Ban(now, a, v)
	}
	return v
}

func TestBansDouble(t *testing.T) {
	tr := NewTracker(limits)
	a, now := addr("192.0.2.1"), start
	for i, want := range []time.Duration{1, 2, 4, 4} {
		if v := fail(tr, now, a, 3); v.Ban != want*time.Hour {
			t.Errorf("ban %d: %+v", i, v)
		}
		if v := tr.Judge(now, a); v != (Verdict{}) {
			t.Errorf("after ban %d: %+v", i, v)
		}
		now = now.Add(want*time.Hour + time.Minute)
	}
	tr.Sweep(now)
	if v := fail(tr, now, a, 3); v.Ban != 4*time.Hour {
		t.Errorf("within the longest time: %+v", v)
	}
	now = now.Add(8 * time.Hour)
	if v := fail(tr, now, a, 3); v.Ban != time.Hour {
		t.Errorf("after it: %+v", v)
	}
}

// The addresses of a /64 count as one. After its ban, each of them that fails
// again is banned for the rest of that ban.
func TestNetwork(t *testing.T) {
	tr := NewTracker(limits)
	for i := range 3 {
		tr.Failure(start, addr(fmt.Sprintf("2001:db8::%d", i+1)), wrong(i))
	}
	third := addr("2001:db8::3")
	v := tr.Judge(start, third)
	if v.Ban != time.Hour {
		t.Fatalf("%+v", v)
	}
	tr.Ban(start, third, v)
	later := start.Add(time.Minute)
	if v := tr.Judge(later, addr("2001:db8::1")); v.Ban != 0 {
		t.Errorf("an address that no longer fails: %+v", v)
	}
	if v := fail(tr, later, third, 1); v.Ban != 0 {
		t.Errorf("the banned address fails again, as after an unban: %+v", v)
	}
	followers := 0
	for i := range 1000 {
		a := addr(fmt.Sprintf("2001:db8::1:%d", i))
		v := tr.Judge(later, a)
		if v.Failures < 3 && v.Ban > 0 {
			if v.Ban != 59*time.Minute {
				t.Fatalf("%+v", v)
			}
			followers++
			tr.Ban(later, a, v)
		}
	}
	if followers != maxFollowers-1 {
		t.Errorf("%d addresses were banned with the first", followers)
	}
	if v := fail(tr, later, addr("2001:db8:0:1::1"), 2); v.Ban != 0 {
		t.Errorf("another /64: %+v", v)
	}
	// Addresses behind NAT64 share a /64, but belong to different clients.
	for i := range 9 {
		// The second form is not NAT64, but in the same /64.
		for _, form := range []string{"64:ff9b::192.0.2.%d", "64:ff9b::1:192.0.2.%d"} {
			if v := fail(tr, start, addr(fmt.Sprintf(form, i)), 2); v.Ban != 0 {
				t.Errorf("NAT64: %+v", v)
			}
		}
	}
}

func TestStolen(t *testing.T) {
	tr := NewTracker(limits)
	a := addr("192.0.2.1")
	for i := range 9 { // of a trusted address, so that the limit bans nobody
		tr.Failure(start, a, wrong(i))
		if v, want := tr.Judge(start, a), min(i+1, 6); v.Failures != want || v.Stolen != (want > 5) {
			t.Errorf("after %d: %+v", i+1, v)
		}
	}
	tr.Ban(start, a, tr.Judge(start, a))
	if !tr.Stolen(start.Add(59*time.Minute), a) || tr.Stolen(start.Add(time.Hour), a) {
		t.Error("not for as long as the ban")
	}
}

// The counts match those of a model, a plain list of all failures.
func TestModel(t *testing.T) {
	type event struct {
		net, attempt string
		at           time.Time
	}
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		l := config.Failures{Limit: 1 + r.IntN(6), Within: time.Duration(1+r.IntN(600)) * time.Second, Ban: time.Minute, Longest: time.Duration(1+r.IntN(60)) * time.Minute}
		l.TrustedLimit = l.Limit + r.IntN(6)
		l.Ban = min(l.Ban, l.Longest)
		tr := NewTracker(l)
		now := start
		var events []event
		type ban struct {
			until time.Time
			level int
		}
		bans := make(map[string]ban)
		for step := range 400 {
			now = now.Add(time.Duration(r.IntN(60)) * time.Second)
			if r.IntN(50) == 0 {
				now = now.Add(time.Hour)
			}
			a := netip.AddrFrom4([4]byte{192, 0, 2, byte(r.IntN(4))})
			network := a.String()
			if r.IntN(2) == 0 {
				a = addr(fmt.Sprintf("2001:db8:0:%d::%d", r.IntN(3), r.IntN(3)))
				prefix, _ := a.Prefix(64)
				network = prefix.String()
			}
			attempt := wrong(r.IntN(8))
			tr.Failure(now, a, attempt)
			events = append(events, event{network, attempt.Hash, now})
			switch r.IntN(20) {
			case 0:
				tr.Sweep(now)
			case 1:
				tr = reloaded(t, tr, now)
			}

			// The tracker keeps only as many as TrustedLimit needs.
			last := make(map[string]time.Time)
			for _, e := range events {
				if e.net == network && now.Sub(e.at) < l.Within {
					last[e.attempt] = e.at
				}
			}
			count := min(len(last), l.TrustedLimit+1)
			v := tr.Judge(now, a)
			if v.Failures != count || v.Stolen != (count > l.TrustedLimit) {
				t.Fatalf("seed %d, step %d: %+v, want %d failures", seed, step, v, count)
			}
			if count < l.Limit {
				continue
			}
			b := bans[network]
			if !b.until.IsZero() && !now.Before(b.until.Add(l.Longest)) {
				b = ban{}
			}
			want := min(l.Ban<<min(b.level, 20), l.Longest)
			if v.Ban != want {
				t.Fatalf("seed %d, step %d: banned for %v, want %v", seed, step, v.Ban, want)
			}
			if r.IntN(3) > 0 { // else trusted, or the kernel refuses
				tr.Ban(now, a, v)
				bans[network] = ban{now.Add(want), b.level + 1}
				for i := range events {
					if events[i].net == network {
						events[i].net = ""
					}
				}
			}
		}
		failures := 0
		for _, n := range tr.networks {
			failures += len(n.failures)
		}
		if failures != tr.failures {
			t.Fatalf("seed %d: %d failures, counted as %d", seed, failures, tr.failures)
		}
	}
}

// A botnet of a million addresses does not make the memory grow, nor the tracker
// forget an address that guesses often.
func TestBotnet(t *testing.T) {
	tr := NewTracker(config.Failures{Limit: 10, Within: 10 * time.Minute, Ban: time.Hour, Longest: 24 * time.Hour, TrustedLimit: 100})
	guesser, old := addr("192.0.2.1"), addr("192.0.2.2")
	fail(tr, start, guesser, 9)
	fail(tr, start, old, 10)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range 1_000_000 {
		a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		if i%2 == 0 {
			a = addr("2001:db8::").Next()
			b := a.As16()
			b[5], b[6], b[7] = byte(i>>16), byte(i>>8), byte(i)
			a = netip.AddrFrom16(b)
		}
		tr.Failure(start, a, wrong(i%3))
		tr.Failure(start, a, wrong(i%3+1))
		tr.Success(start, a, wrong(i))
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	mib := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) >> 20
	t.Logf("%d networks, %d failures, %d right, %d forgotten, %d MiB", len(tr.networks), tr.failures, len(tr.right), tr.forgotten, mib)
	if mib > 80 || len(tr.networks) > maxNetworks || tr.failures > maxFailures || len(tr.right) > maxRight {
		t.Error("over the limits")
	}
	if v := fail(tr, start, guesser, 1); v.Ban != time.Hour {
		t.Errorf("the address that had failed 9 times: %+v", v)
	}
	if v := fail(tr, start, old, 10); v.Ban != 2*time.Hour {
		t.Errorf("the address that had been banned: %+v", v)
	}
	var file bytes.Buffer
	begin := time.Now()
	if err := tr.Save(&file); err != nil {
		t.Fatal(err)
	}
	saved := time.Since(begin)
	begin = time.Now()
	if _, err := LoadTracker(&file, start, tr.limits); err != nil {
		t.Fatal(err)
	}
	t.Logf("saved in %v, loaded in %v", saved, time.Since(begin))
	tr.Sweep(start.Add(60 * 24 * time.Hour))
	if len(tr.networks) != 0 || tr.failures != 0 || len(tr.right) != 0 {
		t.Errorf("after two months: %d, %d, %d", len(tr.networks), tr.failures, len(tr.right))
	}
}

// The number of failures is limited too: here of 1500 addresses with 999 each.
func TestManyFailures(t *testing.T) {
	tr := NewTracker(config.Failures{Limit: 1000, Within: 10 * time.Minute, Ban: time.Hour, Longest: time.Hour, TrustedLimit: 1000})
	for i := range 1500 {
		a := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
		for j := range 999 {
			tr.Failure(start, a, wrong(j))
		}
	}
	if tr.failures > maxFailures || len(tr.networks) < 1000 {
		t.Errorf("%d failures of %d networks", tr.failures, len(tr.networks))
	}
}

func reloaded(t *testing.T, tr *Tracker, now time.Time) *Tracker {
	t.Helper()
	var file bytes.Buffer
	if err := tr.Save(&file); err != nil {
		t.Fatal(err)
	}
	loaded, err := LoadTracker(&file, now, tr.limits)
	if err != nil {
		t.Fatal(err)
	}
	return loaded
}

func TestSaved(t *testing.T) {
	tr := NewTracker(limits)
	a, b := addr("192.0.2.1"), addr("2001:db8::1")
	fail(tr, start, a, 3)
	fail(tr, start, b, 6)
	fail(tr, start, a, 2)
	tr.Success(start, a, wrong(1))
	tr = reloaded(t, tr, start)
	if o := tr.Failure(start, a, wrong(1)); o != Right {
		t.Errorf("a right one is %s", o)
	}
	if !tr.Stolen(start, b) {
		t.Error("not stolen")
	}
	if v := fail(tr, start, a, 1); v != (Verdict{Failures: 3, Ban: 2 * time.Hour}) {
		t.Errorf("%+v", v)
	}
	if v := fail(tr, start.Add(time.Minute), b.Next(), 1); v.Ban != 59*time.Minute {
		t.Errorf("another address of the /64: %+v", v)
	}
}

// The clock was wrong when the file was saved, or is wrong now. A time in the
// future counts as now. What is too old is forgotten. A jump of the clock bans
// nobody.
func TestClockJumps(t *testing.T) {
	saved, banned, phone := addr("192.0.2.1"), addr("2001:db8::1"), addr("192.0.2.3")
	for _, c := range []struct {
		then, now time.Time
		kept      bool
	}{
		{start, start.Add(-time.Hour), true},
		{start, start.Add(-24 * time.Hour), true},
		{start.AddDate(60, 0, 0), start, true},
		{start, time.Unix(0, 0), true},
		{time.Unix(0, 0), start, false},
		{start, start.AddDate(60, 0, 0), false},
	} {
		tr := NewTracker(limits)
		fail(tr, c.then, saved, limits.Limit-1)
		fail(tr, c.then, banned, limits.TrustedLimit+1)
		tr.Success(c.then, phone, wrong(9))
		tr = reloaded(t, tr, c.now)
		for _, a := range []netip.Addr{saved, banned, phone} {
			if v := tr.Judge(c.now, a); v.Ban != 0 {
				t.Errorf("%v to %v: the jump bans %s: %+v", c.then, c.now, a, v)
			}
		}
		n := tr.Judge(c.now, saved).Failures
		right := tr.Failure(c.now, phone, wrong(9)) == Right
		if stolen := tr.Stolen(c.now, banned); (n == limits.Limit-1) != c.kept || right != c.kept || stolen != c.kept {
			t.Errorf("%v to %v: %d failures, right: %v, stolen: %v", c.then, c.now, n, right, stolen)
		}
		if v := tr.Judge(c.now.Add(limits.Within), saved); v.Failures != 0 {
			t.Errorf("%v to %v: %d failures after the time in which they count", c.then, c.now, v.Failures)
		}
		if tr.Stolen(c.now.Add(limits.Longest+time.Second), banned) {
			t.Errorf("%v to %v: a ban is longer than the longest", c.then, c.now)
		}
		tr.Sweep(c.now.Add(2*limits.Longest + rightFor))
		if len(tr.networks) != 0 || tr.failures != 0 || len(tr.right) != 0 {
			t.Errorf("%v to %v: some records never expire: %d, %d, %d", c.then, c.now, len(tr.networks), tr.failures, len(tr.right))
		}
	}
}

func TestDamagedFile(t *testing.T) {
	tr := NewTracker(limits)
	fail(tr, start, addr("192.0.2.1"), 3)
	var file bytes.Buffer
	if err := tr.Save(&file); err != nil {
		t.Fatal(err)
	}
	for n := range file.Len() {
		if _, err := LoadTracker(bytes.NewReader(file.Bytes()[:n]), start, limits); err == nil {
			t.Errorf("the first %d of %d bytes are accepted", n, file.Len())
		}
	}
	for i := range file.Len() {
		b := bytes.Clone(file.Bytes())
		b[i] ^= 0x55
		if _, err := LoadTracker(bytes.NewReader(b), start, limits); err == nil {
			t.Errorf("a file with byte %d damaged is accepted", i)
		}
	}
}
