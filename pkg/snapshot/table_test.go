package snapshot

import (
	"errors"
	"fmt"
	"maps"
	"math"
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

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

// put adds elements, each with an hour left.
func put(t testing.TB, c *nftset.Conn, set string, addrs ...netip.Addr) {
	t.Helper()
	s := describe(t, c, set)[0]
	b := c.Batch()
	for _, a := range addrs {
		b.Add(s, nftset.Element{Key: nftset.Key{Addr: a, Port: 993}, Timeout: time.Hour})
	}
	must(t, b.Commit())
}

// holds checks that a set has exactly these addresses.
func holds(t testing.TB, c *nftset.Conn, what, set string, addrs ...netip.Addr) {
	t.Helper()
	var got []netip.Addr
	for key := range elements(t, c, set) {
		got = append(got, key.Addr)
	}
	slices.SortFunc(got, netip.Addr.Compare)
	if !slices.Equal(got, addrs) {
		t.Errorf("%s: %s has %v, and should have %v", what, set, got, addrs)
	}
}

const reload = "flush ruleset;" + empty

// A ruleset that was flushed and loaded again has lost the elements. The next save
// brings them back first.
func TestSaveIntoAnotherTable(t *testing.T) {
	c := dial(t, empty)
	path := filepath.Join(t.TempDir(), "sets.nft")
	var all []netip.Addr
	for round := range 4 {
		all = append(all, ipv4(round))
		put(t, c, "trusted_ipv4", ipv4(round))
		mustSave(t, c, path)
		nstest.Nft(t, reload)
		if round%2 == 0 {
			// Someone logs in before the next save.
			all = append(all, ipv4(100+round))
			put(t, c, "trusted_ipv4", ipv4(100+round))
		}
		slices.SortFunc(all, netip.Addr.Compare)
		for range 3 {
			mustSave(t, c, path)
			holds(t, c, fmt.Sprint("round ", round), "trusted_ipv4", all...)
			if n := count(t, path); n != len(all) {
				t.Errorf("round %d: %d elements in the file, and there are %d", round, n, len(all))
			}
		}
	}
	if r, err := Save(path, c, four); err != nil || r.First != nil || r.NotKept != nil {
		t.Errorf("a save of the same table: %+v, %v", r, err)
	}
}

// Removed elements stay removed, in each table that the snapshot was restored into.
func TestRemovedStaysRemoved(t *testing.T) {
	c := dial(t, empty)
	path := filepath.Join(t.TempDir(), "sets.nft")
	put(t, c, "banned_ipv4", ipv4(1), ipv4(2), ipv4(3))
	mustSave(t, c, path)
	for round, bring := range []func(){
		func() { mustSave(t, c, path) },
		func() {
			r, err := RestoreSnapshot(path, c, four, false)
			if err != nil || r.NotNoted != nil || r.Refused != nil || r.Restored != 2 {
				t.Errorf("%+v, %v", r, err)
			}
		},
	} {
		nstest.Nft(t, reload)
		bring()
		run(t, "nft", "delete", "element", "inet", "filter", "banned_ipv4", fmt.Sprintf("{ %s . 993 }", ipv4(round+1)))
		mustSave(t, c, path)
		want := []netip.Addr{ipv4(1), ipv4(2), ipv4(3)}[round+1:]
		holds(t, c, fmt.Sprint("round ", round), "banned_ipv4", want...)
		if n := count(t, path); n != len(want) {
			t.Errorf("round %d: %d elements in the file", round, n)
		}
	}
}

// After a restore that failed, no save replaces the file.
func TestSaveAfterFailedRestore(t *testing.T) {
	const typed = "flush ruleset; table inet filter {" +
		"set trusted_ipv4 { type ipv4_addr; flags timeout; }; set trusted_ipv6 { type ipv6_addr . inet_service; flags timeout; };" +
		"set banned_ipv4 { type ipv4_addr . inet_service; flags timeout; }; set banned_ipv6 { type ipv6_addr . inet_service; flags timeout; }; }"
	const small = "flush ruleset; table inet filter {" +
		"set trusted_ipv4 { type ipv4_addr . inet_service; size 1; flags timeout; }; set trusted_ipv6 { type ipv6_addr . inet_service; flags timeout; };" +
		"set banned_ipv4 { type ipv4_addr . inet_service; flags timeout; }; set banned_ipv6 { type ipv6_addr . inet_service; flags timeout; }; }"
	for name, ruleset := range map[string]string{"another key type": typed, "too small": small} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, empty)
			dir := t.TempDir()
			path := filepath.Join(dir, "sets.nft")
			put(t, c, "trusted_ipv4", ipv4(1), ipv4(2))
			mustSave(t, c, path)
			put(t, c, "banned_ipv4", ipv4(3))
			mustSave(t, c, path)
			files := func() map[string]string {
				all := make(map[string]string)
				for _, name := range names(t, dir) {
					text, err := os.ReadFile(filepath.Join(dir, name))
					must(t, err)
					all[name] = string(text)
				}
				return all
			}
			before := files()
			nstest.Nft(t, ruleset)
			if _, err := RestoreSnapshot(path, c, four, false); err == nil {
				t.Error("restored")
			}
			for i := range 4 {
				put(t, c, "banned_ipv4", ipv4(10+i))
				var refused *NotRestoredError
				if _, err := Save(path, c, four); !errors.As(err, &refused) {
					t.Errorf("%v", err)
				}
			}
			if after := files(); !maps.Equal(before, after) {
				t.Errorf("the files were %q and are %q", before, after)
			}
			nstest.Nft(t, reload)
			mustSave(t, c, path)
			holds(t, c, "in the end", "trusted_ipv4", ipv4(1), ipv4(2))
			holds(t, c, "in the end", "banned_ipv4", ipv4(3))
		})
	}
}

// The table can be missing when the snapshot is restored, which makes it.
func TestRestoreSnapshotMakesTable(t *testing.T) {
	c := dial(t, empty)
	path := filepath.Join(t.TempDir(), "sets.nft")
	put(t, c, "banned_ipv4", ipv4(1), ipv4(2))
	mustSave(t, c, path)
	nstest.Nft(t, "flush ruleset")
	r, err := RestoreSnapshot(path, c, four, false)
	if err != nil || r.NotNoted != nil || r.Restored != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := Save(path, c, four); err != nil || r.First != nil {
		t.Errorf("%+v, %v", r, err)
	}
	holds(t, c, "made", "banned_ipv4", ipv4(1), ipv4(2))
}

// A file that anyone can have written is restored if somebody asks for it by name,
// and belongs to the administrator from then on.
func TestRestoreSnapshotOfAnyone(t *testing.T) {
	c := dial(t, empty)
	path := filepath.Join(t.TempDir(), "sets.nft")
	put(t, c, "banned_ipv4", ipv4(1))
	mustSave(t, c, path)
	must(t, os.Chmod(path, 0o666))
	nstest.Nft(t, reload)
	var refused *NotRestoredError
	if _, err := Save(path, c, four); !errors.As(err, &refused) {
		t.Errorf("saved: %v", err)
	}
	if _, err := RestoreSnapshot(path, c, four, false); err == nil {
		t.Error("restored")
	}
	holds(t, c, "refused", "banned_ipv4")
	if r, err := RestoreSnapshot(path, c, four, true); err != nil || r.NotNoted != nil {
		t.Errorf("%+v, %v", r, err)
	}
	holds(t, c, "asked for", "banned_ipv4", ipv4(1))
	if err := CheckOwner(path); err != nil {
		t.Error(err)
	}
	mustSave(t, c, path)
}

// A snapshot in a read-only directory is restored too.
func TestRestoreSnapshotReadOnly(t *testing.T) {
	c := dial(t, empty)
	dir := t.TempDir()
	path := filepath.Join(dir, "sets.nft")
	put(t, c, "banned_ipv4", ipv4(1))
	mustSave(t, c, path)
	nstest.Nft(t, reload)
	must(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	must(t, unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	r, err := RestoreSnapshot(path, c, four, false)
	if err != nil || !errors.Is(r.NotNoted, unix.EROFS) || r.Restored != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	holds(t, c, "read-only", "banned_ipv4", ipv4(1))
}

// A snapshot is also restored if the boot id cannot be read, as in a sandbox with
// ProcSubset=pid.
func TestRestoreSnapshotOfUnknownBoot(t *testing.T) {
	c := dial(t, empty)
	path := filepath.Join(t.TempDir(), "sets.nft")
	put(t, c, "banned_ipv4", ipv4(1))
	mustSave(t, c, path)
	nstest.Nft(t, reload)
	const random = "/proc/sys/kernel/random"
	must(t, unix.Mount(t.TempDir(), random, "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(random, unix.MNT_DETACH) })
	r, err := RestoreSnapshot(path, c, four, false)
	if err != nil || r.NotNoted == nil || r.Restored != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	holds(t, c, "unknown", "banned_ipv4", ipv4(1))
}

// While the ruleset is loaded again and again, saves and restores lose nothing that
// was saved once.
func TestSaveDuringReloads(t *testing.T) {
	const n = 3000
	c := dial(t, empty)
	fill(t, c, "trusted_ipv4", n)
	path := filepath.Join(t.TempDir(), "sets.nft")
	mustSave(t, c, path)
	var reloads, saves atomic.Int32
	done, stopped := make(chan struct{}), make(chan error)
	// Only the table with the sets, because nft would take most of the time otherwise.
	other, err := nftset.Dial()
	must(t, err)
	defer other.Close()
	nft := nstest.Need(t, "nft", "nftables")
	netns := fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
	go func() {
		stopped <- func() error {
			for {
				select {
				case <-done:
					return nil
				case <-time.After(time.Duration(rand.IntN(100)) * time.Millisecond):
				}
				cmd := exec.Command("nsenter", "--net="+netns, nft, "-f", "-")
				cmd.Stdin = strings.NewReader(reload)
				if out, err := cmd.CombinedOutput(); err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				reloads.Add(1)
			}
		}()
	}()
	for start := time.Now(); (reloads.Load() < 20 || saves.Load() < 5) && time.Since(start) < time.Minute || time.Since(start) < 5*time.Second; {
		_, err := Save(path, c, four)
		switch {
		case err == nil:
			saves.Add(1)
		case errors.Is(err, errReplaced), errors.Is(err, nftset.ErrNoTable), errors.Is(err, nftset.ErrNoSet), errors.Is(err, nftset.ErrBusy):
		default:
			t.Error(err)
		}
		if got := stable(parse(t, string(readFile(t, path)))); got != n {
			t.Fatalf("after %d reloads and %d saves the file has %d of %d elements", reloads.Load(), saves.Load(), got, n)
		}
	}
	close(done)
	must(t, <-stopped)
	if reloads.Load() < 20 || saves.Load() < 5 {
		t.Errorf("only %d reloads and %d saves", reloads.Load(), saves.Load())
	}
	mustSave(t, c, path)
	if got := stable(parse(t, snapshotOf(t, c))); got != n {
		t.Errorf("%d of %d elements in the end", got, n)
	}
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	must(t, err)
	return text
}

// restore and nft can read everything that save writes, whatever is in the sets.
func TestOddElementsRestored(t *testing.T) {
	const odd = `
add element inet filter trusted_ipv4 { 192.0.2.7 . 0 timeout 1h comment "no port" }
add element inet filter trusted_ipv4 { * timeout 1h comment "all" }
add element inet filter trusted_ipv4 { 192.0.2.7 . 993 timeout 40000d }
add element inet filter trusted_ipv4 { 192.0.2.8 . 993 timeout 36500d }
add element inet filter trusted_ipv6 { * }
add element inet filter trusted_ipv6 { 2001:db8::7 . 0 timeout 200000d expires 100000d }
add element inet filter banned_ipv4 { * timeout 50000d comment "everyone" }
add set inet filter banned_ipv6 { type ipv6_addr; flags timeout; timeout 40000d; }
add element inet filter banned_ipv6 { 2001:db8::1, 2001:db8::2 timeout 1h, * timeout 2h }
`
	nfts(t, func(t *testing.T, nft []string) {
		c := dial(t, strings.ReplaceAll(empty, "set banned_ipv6 { type ipv6_addr . inet_service; flags dynamic,timeout; timeout 1d; }", "")+odd)
		var before []map[nftset.Key]nftset.Element
		for _, set := range four.Names {
			before = append(before, elements(t, c, set))
		}
		text := snapshotOf(t, c)
		for how, restore := range map[string]func(){
			"restored": func() { mustRestore(t, c, parse(t, text)) },
			"loaded by nft": func() {
				cmd := exec.Command(nft[0], append(nft[1:], "-f", "-")...)
				cmd.Stdin = strings.NewReader(text)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%v: %s", err, out)
				}
			},
		} {
			nstest.Nft(t, "flush ruleset")
			restore()
			for i, set := range four.Names {
				now := elements(t, c, set)
				if len(now) != len(before[i]) {
					t.Errorf("%s: %s has %v, and had %v", how, set, now, before[i])
				}
				for key, was := range before[i] {
					is := now[key]
					// nft cannot express a permanent element in a set with a default
					// timeout; our longest timeout means permanent.
					if how != "restored" && was.Permanent() {
						was.Timeout, was.Expires = permanent, permanent
					}
					// A century is long enough.
					want := min(was.Expires, longest)
					if is.Comment != was.Comment || is.Permanent() != was.Permanent() || (want-is.Expires).Abs() > 10*time.Second && is.Expires < longest-time.Minute {
						t.Errorf("%s: %s has %s, and had %s", how, set, show(is), show(was))
					}
				}
			}
		}
	})
}

// A snapshot is sorted by address, whatever the kernel's order is, so that two files can
// be compared.
func TestSaveSorted(t *testing.T) {
	c := dial(t, empty)
	fill(t, c, "trusted_ipv4", 1000)
	fill(t, c, "banned_ipv6", 1000)
	addresses := func() (lines []string) {
		for line := range strings.Lines(snapshotOf(t, c)) {
			if key, _, ok := strings.Cut(line, " timeout "); ok {
				lines = append(lines, key)
			}
		}
		return lines
	}
	before := addresses()
	f := parse(t, snapshotOf(t, c))
	for _, s := range f.Sets {
		if !slices.IsSortedFunc(s.Elements, func(a, b nftset.Element) int { return a.Key.Compare(b.Key) }) {
			t.Errorf("set %s is not sorted", s.Name)
		}
	}
	nstest.Nft(t, reload)
	mustRestore(t, c, f)
	if after := addresses(); len(before) < 2000 || !slices.Equal(before, after) {
		t.Error("the order has changed")
	}
}

// If a snapshot has a key twice, the element that expires last counts.
func TestRestoreTwiceInSnapshot(t *testing.T) {
	hours := func(key string, n time.Duration) nftset.Element { return element(key, n*time.Hour, n*time.Hour, "") }
	for _, elems := range [][]nftset.Element{
		{hours("192.0.2.1 . 993", 9), hours("192.0.2.1 . 993", 1)},
		{hours("192.0.2.1 . 993", 1), hours("192.0.2.1 . 993", 9), hours("192.0.2.1 . 993", 2)},
		{hours("192.0.2.1 . 993", 1), hours("192.0.2.0 . 993", 1), hours("192.0.2.1 . 993", 9)},
	} {
		c := dial(t, empty)
		mustRestore(t, c, parse(t, whole(section("trusted_ipv4", elems...))))
		e := elements(t, c, "trusted_ipv4")[nftset.Key{Addr: netip.MustParseAddr("192.0.2.1"), Port: 993}]
		if e.Timeout != 9*time.Hour {
			t.Errorf("%+v: %s", elems, show(e))
		}
	}
}

// Addresses that no list accepts are not restored; the others are.
func TestRestoreRefuses(t *testing.T) {
	c := dial(t, empty)
	path := filepath.Join(t.TempDir(), "sets.nft")
	put(t, c, "trusted_ipv4", ipv4(1), netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("224.0.0.1"))
	mustSave(t, c, path)
	sets := four
	sets.Refuse = func(a netip.Addr) error {
		if a.IsLoopback() || a.IsMulticast() {
			return fmt.Errorf("%s is refused", a)
		}
		return nil
	}
	for _, refused := range []int{2, 0} {
		nstest.Nft(t, reload)
		r, err := Save(path, c, sets)
		if err != nil || r.First == nil || len(r.First.Refused) != refused || r.First.Restored != 1 {
			t.Errorf("%+v, %v", r, err)
		}
		holds(t, c, "restored", "trusted_ipv4", ipv4(1))
	}
	nstest.Nft(t, reload)
	if _, err := RestoreSnapshot(path, c, sets, false); err != nil {
		t.Error(err)
	}
	holds(t, c, "restored", "trusted_ipv4", ipv4(1))
}

// Two users keep logging in from the addresses that are restored. No restore shortens what
// a login has written, and each restore ends.
func TestRestoreBesideManyLogins(t *testing.T) {
	const n, login, left = 300, 24 * time.Hour, 2 * time.Hour
	c := dial(t, empty)
	s := describe(t, c, "trusted_ipv4")[0]
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}) }
	var elems []nftset.Element
	for i := range n {
		elems = append(elems, nftset.Element{Key: nftset.Key{Addr: addr(i), Port: 993}, Timeout: login, Expires: left})
	}
	done, stopped := make(chan struct{}), make(chan error, 2)
	var since [n]atomic.Int64 // when a login ended; 0 for never
	for worker := range 2 {
		other, err := nftset.Dial()
		must(t, err)
		go func() {
			defer other.Close()
			for i := worker; ; i++ {
				select {
				case <-done:
					stopped <- nil
					return
				default:
				}
				e := nftset.Element{Key: elems[i%n].Key, Timeout: login}
				if _, err := other.Extend(s, []nftset.Element{e}, time.Second, nil); err != nil {
					stopped <- err
					return
				}
				since[i%n].Store(1)
			}
		}()
	}
	for range 20 {
		// Elements of all three kinds: missing, with less time left, with more.
		b := c.Batch()
		b.Replace(s, []nftset.Element{{Key: elems[0].Key, Timeout: login, Expires: time.Hour}})
		must(t, b.Commit())
		since[0].Store(0)
		c.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := Restore(c, []*File{of("trusted_ipv4", time.Now(), elems...)}); err != nil {
			t.Error(err)
		}
		for i := 1; i < n; i++ {
			if since[i].Load() == 0 {
				continue
			}
			found, err := c.Lookup(s, elems[i].Key)
			must(t, err)
			if e := found[elems[i].Key]; e.Expires < login-time.Minute {
				t.Fatalf("%s: the login's trust has become %s", elems[i].Key, show(e))
			}
		}
	}
	close(done)
	for range 2 {
		must(t, <-stopped)
	}
}

// An attempt after many adds the elements in small transactions: those that are
// missing, those with less time left, and those of sets that it must create.
func TestRestoreLastAttempts(t *testing.T) {
	c := dial(t, empty)
	set := describe(t, c, "trusted_ipv4")[0]
	put(t, c, "trusted_ipv4", ipv4(1))
	want := []nftset.Element{{Key: nftset.Key{Addr: ipv4(1), Port: 993}, Timeout: 48 * time.Hour, Expires: 47 * time.Hour}}
	for i := 2; i < 200; i++ {
		want = append(want, nftset.Element{Key: nftset.Key{Addr: ipv4(i), Port: 993}, Timeout: time.Hour, Expires: time.Minute})
	}
	r, err := restore(c, []*File{of("trusted_ipv4", time.Time{}, want...), of("own", time.Time{}, want[5:]...)}, wholeAttempts, math.MaxInt)
	if err != nil || r.Restored != len(want)+len(want[5:]) {
		t.Errorf("%+v, %v", r, err)
	}
	for _, s := range []string{set.Name, "own"} {
		elems, err := c.Elements(describe(t, c, s)[0])
		must(t, err)
		for i, e := range elems {
			w := want[len(want)-len(elems)+i]
			if e.Key != w.Key || e.Timeout != w.Timeout || e.Expires > w.Expires || e.Expires < w.Expires-10*time.Second {
				t.Errorf("%s: %s, want %s", s, show(e), show(w))
			}
		}
		if len(elems) < len(want)-5 {
			t.Errorf("%s has %d elements", s, len(elems))
		}
	}
}

// Other users cannot block a save: neither with a lock on the directory, nor with a
// lock file of theirs, which fs.protected_regular keeps root from opening in /tmp.
func TestSaveNotBlocked(t *testing.T) {
	nstest.NeedUsers(t)
	for _, mode := range []os.FileMode{0o755, 0o777 | os.ModeSticky} {
		c := dial(t, empty)
		dir := t.TempDir()
		must(t, os.Chmod(dir, mode))
		path := filepath.Join(dir, "sets.nft")
		must(t, os.WriteFile(path+".lock", nil, 0o666))
		for _, name := range []string{dir, path + ".lock"} {
			held, err := os.Open(name)
			must(t, err)
			defer held.Close()
			must(t, unix.Flock(int(held.Fd()), unix.LOCK_EX))
		}
		must(t, os.Chown(path+".lock", 1000, 1000))
		start := time.Now()
		mustSave(t, c, path)
		if took := time.Since(start); took > lockTime/2 {
			t.Errorf("took %v", took)
		}
		if got := names(t, dir); !slices.Equal(got, []string{"sets.nft"}) {
			t.Errorf("left behind: %q", got)
		}
	}
}

// The service keeps a file that root has put there, though it must not link to it
// (fs.protected_hardlinks).
func TestSaveKeepsRoots(t *testing.T) {
	nstest.NeedUsers(t)
	nstest.Need(t, "setpriv", "util-linux")
	c := dial(t, empty)
	put(t, c, "trusted_ipv4", ipv4(1))
	dir := t.TempDir()
	for d := dir; len(d) > len(os.TempDir()); d = filepath.Dir(d) {
		must(t, os.Chmod(d, 0o755))
	}
	path := filepath.Join(dir, "sets.nft")
	mustSave(t, c, path)
	must(t, os.Chmod(path, 0o644))
	must(t, os.Chown(dir, 1000, 1000))
	bin := nstest.Build(t, "cmd/nftwl")
	out, err := exec.Command("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups",
		"--inh-caps=+net_admin", "--ambient-caps=+net_admin", bin, "save", path).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("%v: %s", err, out)
	}
	if got := names(t, dir); !slices.Equal(got, []string{"sets.nft", "sets.nft.old"}) {
		t.Errorf("the directory has %q", got)
	}
}

// Restore does not wait for a pipe that nobody writes to.
func TestReadPipe(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	must(t, unix.Mkfifo(pipe, 0o600))
	if _, err := Read(pipe); err == nil || err.Error() != pipe+" is not a regular file" {
		t.Errorf("%v", err)
	}
}

// The previous snapshot is also kept on a file system that cannot exchange two files, such
// as NFS.
func TestSaveWithoutExchange(t *testing.T) {
	strace := nstest.Need(t, "strace", "strace")
	c := dial(t, empty)
	dir := t.TempDir()
	path := filepath.Join(dir, "sets.nft")
	bin := nstest.Build(t, "cmd/nftwl")
	for i := range 3 {
		put(t, c, "banned_ipv4", ipv4(i))
		out, err := exec.Command(strace, "-f", "-o", filepath.Join(t.TempDir(), "trace"), "-e", "inject=renameat2:error=EINVAL", bin, "save", path).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%v: %s", err, out)
		}
		if n := count(t, path); n != i+1 {
			t.Errorf("save %d: %d elements", i, n)
		}
		if i > 0 && count(t, path+".old") != i {
			t.Errorf("save %d: the previous snapshot has %d elements", i, count(t, path+".old"))
		}
	}
	if got := names(t, dir); !slices.Equal(got, []string{"sets.nft", "sets.nft.old"}) {
		t.Errorf("the directory has %q", got)
	}
}

// If the previous snapshot cannot be kept, nothing else is left behind.
func TestSaveCannotKeep(t *testing.T) {
	c := dial(t, empty)
	dir := t.TempDir()
	path := filepath.Join(dir, "sets.nft")
	must(t, os.Mkdir(path+".old", 0o700))
	for i := range 2 {
		put(t, c, "banned_ipv4", ipv4(i))
		if r, err := Save(path, c, four); err != nil || (r.NotKept == nil) != (i == 0) {
			t.Errorf("%+v, %v", r, err)
		}
	}
	if got := names(t, dir); !slices.Equal(got, []string{"sets.nft", "sets.nft.old"}) || count(t, path) != 2 {
		t.Errorf("the directory has %q", got)
	}
}

// In a sticky directory a save keeps the file's owner. A save that cannot give the
// file to the owner of its directory leaves no lock.
func TestSaveForAnotherOwner(t *testing.T) {
	strace := nstest.Need(t, "strace", "strace")
	nstest.NeedUsers(t)
	dial(t, empty)
	dir := t.TempDir()
	path := filepath.Join(dir, "sets.nft")
	bin := nstest.Build(t, "cmd/nftwl")
	must(t, os.Chown(dir, 1000, 1000))
	for _, test := range []struct {
		mode os.FileMode
		want []string
	}{{0o700, nil}, {0o777 | os.ModeSticky, []string{"sets.nft"}}} {
		must(t, os.Chmod(dir, test.mode))
		out, err := exec.Command(strace, "-f", "-o", filepath.Join(t.TempDir(), "trace"), "-e", "inject=fchown:error=EINVAL", bin, "save", path).CombinedOutput()
		if (err == nil) != (test.want != nil) {
			t.Errorf("%v: %s", err, out)
		}
		if got := names(t, dir); !slices.Equal(got, test.want) {
			t.Errorf("the directory has %q", got)
		}
	}
}

// A save that cannot change a file's owner does not remove the lock that another one
// holds.
func TestSaveLeavesLock(t *testing.T) {
	strace := nstest.Need(t, "strace", "strace")
	nstest.NeedUsers(t)
	dial(t, empty)
	dir := t.TempDir()
	path := filepath.Join(dir, "sets.nft")
	bin := nstest.Build(t, "cmd/nftwl")
	must(t, os.Chown(dir, 1000, 1000))
	unlock, err := lock(path)
	must(t, err)
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command(strace, "-f", "-o", trace, "-e", "inject=fchown:error=EINVAL", bin, "save", path)
	must(t, cmd.Start())
	nstest.Poll(t, "the save to want the lock", func() bool {
		text, _ := os.ReadFile(trace)
		return strings.Contains(string(text), "flock(") || strings.Contains(string(text), "+++ exited")
	})
	if got := names(t, dir); !slices.Equal(got, []string{"sets.nft.lock"}) {
		t.Errorf("the directory has %q", got)
	}
	unlock()
	if err := cmd.Wait(); err == nil {
		t.Error("the save cannot change a file's owner, and succeeds")
	}
	if got := names(t, dir); len(got) > 0 {
		t.Errorf("left behind: %q", got)
	}
}
