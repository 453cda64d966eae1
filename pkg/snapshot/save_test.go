package snapshot

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

// fill adds n elements to a set that do not expire during the test.
func fill(t testing.TB, c *nftset.Conn, set string, n int) {
	t.Helper()
	s := describe(t, c, set)[0]
	addr := netip.MustParseAddr("198.18.0.0")
	if s.Key.IPv6 {
		addr = netip.MustParseAddr("2001:db8:1::")
	}
	batch := c.Batch()
	for range n {
		addr = addr.Next()
		batch.Add(s, nftset.Element{Key: nftset.Key{Addr: addr, Port: 993}, Timeout: 12 * time.Hour, Comment: "stable"})
	}
	if err := batch.Commit(); err != nil {
		t.Fatal(err)
	}
}

func stable(f *File) (n int) {
	for _, s := range f.Sets {
		for _, e := range s.Elements {
			if e.Comment == "stable" {
				n++
			}
		}
	}
	return n
}

// count returns the number of elements in a complete snapshot.
func count(t testing.TB, path string) int {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, s := range parse(t, string(data)).Sets {
		n += len(s.Elements)
	}
	return n
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func mustSave(t testing.TB, c *nftset.Conn, path string) {
	t.Helper()
	if _, err := Save(path, c, four); err != nil {
		t.Fatal(err)
	}
}

// A save of empty sets keeps the previous snapshot, the only copy of the elements.
func TestSaveKeepsOld(t *testing.T) {
	c := dial(t, empty)
	path := filepath.Join(t.TempDir(), "sets.nft")
	fill(t, c, "trusted_ipv4", 3)
	mustSave(t, c, path)
	if got := names(t, filepath.Dir(path)); !slices.Equal(got, []string{"sets.nft"}) {
		t.Errorf("first save: %q", got)
	}
	fill(t, c, "banned_ipv6", 2)
	mustSave(t, c, path)
	if count(t, path) != 5 || count(t, path+".old") != 3 {
		t.Errorf("second save: %d and %d elements", count(t, path), count(t, path+".old"))
	}
	run(t, "nft", "flush set inet filter trusted_ipv4; flush set inet filter banned_ipv6")
	for range 2 {
		mustSave(t, c, path)
		if count(t, path) != 0 || count(t, path+".old") != 5 {
			t.Errorf("empty save: %d and %d elements", count(t, path), count(t, path+".old"))
		}
	}
	if got := names(t, filepath.Dir(path)); !slices.Equal(got, []string{"sets.nft", "sets.nft.old"}) {
		t.Errorf("left behind: %q", got)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// A damaged file is never lost: it stays where it is, or beside the new one if the
// kernel has what it had.
func TestSaveOverDamaged(t *testing.T) {
	whole := random(rand.New(rand.NewPCG(1, 0))).text()
	for name, old := range map[string]string{
		"cut short":         whole[:len(whole)-20],
		"cut in the header": headerStart + "1, sa",
		"of the future":     strings.Replace(whole, "snapshot 1", "snapshot 2", 1),
		"of no known time":  headerStart + "1, saved now\n" + trailer(0),
		"of no known table": headerStart + "1, saved 2026-11-21T13:00:00Z, table 1\n" + trailer(0),
		"not one of ours":   "mine\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, empty)
			path := filepath.Join(t.TempDir(), "sets.nft")
			must(t, os.WriteFile(path, []byte(old), 0o600))
			for range 2 {
				_, err := Save(path, c, four)
				var refused *NotRestoredError
				if !errors.As(err, &refused) || refused.Path != path || strings.Contains(err.Error(), "\n") {
					t.Errorf("%v", err)
				}
				fill(t, c, "trusted_ipv4", 1)
			}
			if got, _ := os.ReadFile(path); string(got) != old {
				t.Errorf("replaced by %.60q…", got)
			}
			if got := names(t, filepath.Dir(path)); !slices.Equal(got, []string{"sets.nft"}) {
				t.Errorf("left behind: %q", got)
			}
		})
	}
	// The header names this table.
	c := dial(t, empty)
	path := filepath.Join(t.TempDir(), "sets.nft")
	fill(t, c, "trusted_ipv4", 2)
	mustSave(t, c, path)
	text, err := os.ReadFile(path)
	must(t, err)
	short := string(text[:len(text)-20])
	must(t, os.WriteFile(path, []byte(short), 0o600))
	run(t, "nft", "flush set inet filter trusted_ipv4")
	_, err = Save(path, c, four)
	if err == nil || !strings.HasPrefix(err.Error(), path+" is damaged (") {
		t.Errorf("%v", err)
	}
	if got, _ := os.ReadFile(path); string(got) != short {
		t.Error("replaced by an empty snapshot")
	}
	fill(t, c, "trusted_ipv4", 1)
	mustSave(t, c, path)
	mustSave(t, c, path)
	if got, _ := os.ReadFile(path + ".bad"); string(got) != short || count(t, path) != 1 {
		t.Errorf("kept %.60q…", got)
	}
	if got := names(t, filepath.Dir(path)); !slices.Equal(got, []string{"sets.nft", "sets.nft.bad", "sets.nft.old"}) {
		t.Errorf("left behind: %q", got)
	}
}

// A save that fails leaves the directory as it was, and reports why in one line.
func TestSaveFails(t *testing.T) {
	for _, test := range []struct {
		name    string
		prepare func(t *testing.T, path string)
		words   string
	}{
		{"no set", func(t *testing.T, _ string) { run(t, "nft", "delete set inet filter banned_ipv6") }, "set banned_ipv6 does not exist in table inet filter"},
		{"no table", func(t *testing.T, _ string) { run(t, "nft", "delete table inet filter") }, "table inet filter does not exist"},
		{"read-only", func(t *testing.T, path string) {
			dir := filepath.Dir(path)
			must(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
			t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
			must(t, unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		}, "sets.nft.lock: read-only file system"},
		{"full", func(t *testing.T, path string) {
			dir := filepath.Dir(path)
			old, err := os.ReadFile(path)
			must(t, err)
			must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"))
			t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
			must(t, os.WriteFile(path, old, 0o600))
		}, "sets.nft.tmp: no space left on device"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := dial(t, empty)
			path := filepath.Join(t.TempDir(), "sets.nft")
			fill(t, c, "banned_ipv6", 3)
			mustSave(t, c, path)
			fill(t, c, "trusted_ipv4", 5000) // more than 128 KiB
			test.prepare(t, path)
			_, err := Save(path, c, four)
			if err == nil || !strings.Contains(err.Error(), test.words) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want %s", err, test.words)
			}
			if got := names(t, filepath.Dir(path)); !slices.Equal(got, []string{"sets.nft"}) || count(t, path) != 3 {
				t.Errorf("%q, %d elements", got, count(t, path))
			}
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A save replaces the file's name, not the file that it links to, and only if it is a
// regular file.
func TestSaveOnto(t *testing.T) {
	c := dial(t, empty)
	fill(t, c, "trusted_ipv4", 1)
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target"), filepath.Join(dir, "link")
	mine := list("trusted_ipv4", "type ipv4_addr . inet_service; flags timeout", "192.0.2.1 . 993")
	must(t, os.WriteFile(target, []byte(mine), 0o644))
	for _, to := range []string{"target", "nowhere"} {
		_ = os.Remove(link)
		must(t, os.Symlink(to, link))
		mustSave(t, c, link)
		info, err := os.Lstat(link)
		if err != nil || info.Mode() != 0o600 || count(t, link) != 2 {
			t.Errorf("%v, %v", info, err)
		}
	}
	if got, _ := os.ReadFile(target); string(got) != mine {
		t.Errorf("wrote %q to the target", got)
	}

	// It does not follow a link at the names of its own files.
	path := filepath.Join(dir, "sets.nft")
	for range 2 {
		must(t, os.Symlink("target", path+".tmp"))
		must(t, os.Symlink("target", path+".lock"))
		mustSave(t, c, path)
	}
	if got, _ := os.ReadFile(target); string(got) != mine || count(t, path) != 2 || count(t, path+".old") != 2 {
		t.Errorf("wrote %q to the target", got)
	}

	pipe := filepath.Join(dir, "pipe")
	must(t, unix.Mkfifo(pipe, 0o600))
	must(t, os.Symlink("/dev/null", filepath.Join(dir, "null")))
	before := names(t, dir)
	for _, path := range []string{dir, pipe, filepath.Join(dir, "null")} {
		_, err := Save(path, c, four)
		if err == nil || err.Error() != path+" is not a regular file" {
			t.Errorf("%v", err)
		}
	}
	if after := names(t, dir); !slices.Equal(after, before) {
		t.Errorf("%q, before %q", after, before)
	}
	if _, err := Save(filepath.Join(dir, "missing", "sets.nft"), c, four); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "/missing: no such file") {
		t.Errorf("%v", err)
	}
}

// A service can read what root saves by hand in its directory.
func TestSaveForOwner(t *testing.T) {
	c := dial(t, empty)
	dir := t.TempDir()
	if err := os.Chown(dir, 1234, 1235); err != nil {
		nstest.Skip(t, "%v: run the tests as root", err)
	}
	path := filepath.Join(dir, "sets.nft")
	mustSave(t, c, path)
	info, err := os.Stat(path)
	must(t, err)
	if owner := info.Sys().(*syscall.Stat_t); owner.Uid != 1234 || owner.Gid != 1235 || info.Mode() != 0o600 {
		t.Errorf("%v of %d:%d", info.Mode(), owner.Uid, owner.Gid)
	}
}

// A file that cannot be read does not count as damaged.
func TestSaveOverUnreadable(t *testing.T) {
	c := dial(t, empty)
	dir := t.TempDir()
	path := filepath.Join(dir, "sets.nft")
	mustSave(t, c, path)
	must(t, os.Chmod(dir, 0o777))
	must(t, os.Chmod(filepath.Dir(dir), 0o755))
	// Only for this thread, so that no other test is affected.
	if _, err := unix.SetfsuidRetUid(1234); err != nil {
		t.Fatal(err)
	}
	defer unix.SetfsuidRetUid(0)
	if f, err := os.Open(path); err == nil {
		f.Close()
		nstest.Skip(t, "another user can read %s: run the tests as root", path)
	}
	_, err := Save(path, c, four)
	if !errors.Is(err, os.ErrPermission) || !strings.HasPrefix(err.Error(), "open "+path+": ") {
		t.Errorf("%v", err)
	}
	if got := names(t, dir); !slices.Equal(got, []string{"sets.nft"}) {
		t.Errorf("left behind: %q", got)
	}
}

// login changes a set like logins do while f runs: it adds, renews and deletes elements.
func login(t *testing.T, f func()) (logins int) {
	t.Helper()
	c, err := nftset.Dial()
	must(t, err)
	defer c.Close()
	s := describe(t, c, "trusted_ipv4")[0]
	var done, stopped = make(chan struct{}), make(chan error)
	go func() {
		stopped <- func() error {
			for {
				select {
				case <-done:
					return nil
				default:
				}
				key := nftset.Key{Addr: netip.AddrFrom4([4]byte{203, 0, 113, byte(logins)}), Port: 993}
				e := nftset.Element{Key: key, Timeout: time.Duration(logins+1) * time.Second, Comment: "passing"}
				if _, err := c.Extend(s, []nftset.Element{e}, 0, nil); err != nil {
					return err
				}
				if logins%3 == 0 {
					if _, err := c.Remove(s, []nftset.Key{key}, nil); err != nil {
						return err
					}
				}
				logins++
				runtime.Gosched()
			}
		}()
	}()
	f()
	close(done)
	must(t, <-stopped)
	return logins
}

// While users log in, every snapshot has the elements that do not change.
func TestSaveDuringLogins(t *testing.T) {
	const n = 5000
	c := dial(t, empty)
	fill(t, c, "trusted_ipv4", n)
	path := filepath.Join(t.TempDir(), "sets.nft")
	logins := login(t, func() {
		for range 20 {
			mustSave(t, c, path)
			data, err := os.ReadFile(path)
			if err != nil {
				t.Error(err)
			}
			if got := stable(parse(t, string(data))); got != n {
				t.Errorf("%d of %d stable elements", got, n)
			}
		}
	})
	if logins < 20 {
		t.Errorf("only %d logins", logins)
	}
}

// A save reads only the ends of the old file, which can be large.
func TestSaveReadsLittle(t *testing.T) {
	c := dial(t, empty)
	put(t, c, "trusted_ipv4", ipv4(1))
	path := filepath.Join(t.TempDir(), "sets.nft")
	mustSave(t, c, path)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte("\n"+trailer(1)), 64<<20)
	must(t, err)
	if mib := allocates(func() { mustSave(t, c, path) }); mib > 16 {
		t.Errorf("%d MiB", mib)
	}
	if info, err := os.Stat(path + ".old"); err != nil || info.Size() < 64<<20 || count(t, path) != 1 {
		t.Errorf("%v, %v", info, err)
	}
}

// The kernel resizes a set's hash table some time after many elements were
// added, and a dump then leaves some out.
func TestSaveAfterRestore(t *testing.T) {
	const n = 65535
	c := dial(t, empty)
	fill(t, c, "trusted_ipv4", n)
	f := parse(t, snapshotOf(t, c))
	for range 4 {
		run(t, "nft", "flush", "set", "inet", "filter", "trusted_ipv4")
		if r := mustRestore(t, c, f); r.Restored != n {
			t.Fatalf("%+v", r)
		}
		if got := stable(parse(t, snapshotOf(t, c))); got != n {
			t.Errorf("%d of %d elements", got, n)
		}
	}
}

// Saves are killed at any moment while users log in, and run twice at the same time. There
// is always a complete snapshot with all elements that do not change.
func TestSaveKilled(t *testing.T) {
	const n = 2000
	bin := nstest.Build(t, "cmd/nftwl")
	c := dial(t, empty)
	fill(t, c, "trusted_ipv4", n)
	dir := t.TempDir()
	path := filepath.Join(dir, "sets.nft")
	run(t, bin, "save", path)

	done := make(chan struct{})
	var reader sync.WaitGroup
	reads := 0
	reader.Go(func() {
		for ; ; reads++ {
			select {
			case <-done:
				return
			default:
			}
			data, err := os.ReadFile(path)
			if err == nil {
				var f *File
				if f, err = Parse(string(data)); err == nil && stable(f) != n {
					err = fmt.Errorf("%d of %d stable elements", stable(f), n)
				}
			}
			if err != nil {
				t.Errorf("read %d: %v", reads, err)
				return
			}
		}
	})
	killed, whole := 0, 0
	r := rand.New(rand.NewPCG(1, 2))
	deadline := time.Now().Add(15 * time.Second)
	login(t, func() {
		for i := 0; i < 200 && time.Now().Before(deadline); i++ {
			var pair [2]*exec.Cmd
			for j := range pair {
				pair[j] = exec.Command(bin, "save", path)
				must(t, pair[j].Start())
			}
			time.Sleep(time.Duration(r.IntN(12_000)) * time.Microsecond)
			must(t, pair[0].Process.Kill())
			if i%2 == 0 {
				must(t, pair[1].Process.Kill())
			}
			for _, cmd := range pair {
				if err := cmd.Wait(); err == nil {
					whole++
				} else {
					killed++
				}
			}
		}
	})
	close(done)
	reader.Wait()
	if killed < 50 || whole < 20 || reads < 20 {
		t.Errorf("%d were killed, %d went through, %d reads: the test proves little", killed, whole, reads)
	}
	run(t, bin, "save", path)
	if got := names(t, dir); !slices.Equal(got, []string{"sets.nft", "sets.nft.old"}) {
		t.Errorf("left behind: %q", got)
	}
	if count(t, path+".old") < n {
		t.Errorf("%d elements in the old one", count(t, path+".old"))
	}
}

// Each of the commands' errors is one line, with the file and the cause.
func TestCommandErrors(t *testing.T) {
	bin := nstest.Build(t, "cmd/nftwl")
	dial(t, empty)
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	bad := file("bad.nft", list("trusted_ipv4", "type ipv4_addr . inet_service; flags timeout", "192.0.2.1 . 993", "192.0.2.300 . 993"))
	foreign := file("foreign.nft", "table ip nat {\n\tset x {\n\t\ttype ipv4_addr\n\t}\n}\n")
	nothing := file("nothing.nft", "")
	short := file("short.nft", header(time.Now(), nftset.Instance{})+"table inet filter {\n\tset trusted_ipv4 {\n")
	for _, test := range []struct {
		args  []string
		code  int
		words []string
	}{
		{[]string{"save", dir}, 1, []string{dir + " is not a regular file"}},
		{[]string{"save", dir + "/missing/sets.nft"}, 1, []string{"stat " + dir + "/missing: no such file or directory"}},
		{[]string{"save", bad + "/sets.nft"}, 1, []string{bad, "not a directory"}},
		{[]string{"save", "/proc/sets.nft"}, 1, []string{"/proc/sets.nft.lock: "}},
		{[]string{"save", "a", "b"}, 2, []string{`"b" is one argument too many`}},
		{[]string{"restore", dir}, 1, []string{dir + " is not a regular file"}},
		{[]string{"restore", dir + "/missing"}, 1, []string{dir + "/missing: no such file or directory"}},
		{[]string{"restore", bad}, 1, []string{bad + `: line 6: nft: Could not resolve hostname`}},
		{[]string{"restore", foreign}, 1, []string{foreign + ": none of the sets in it is one of table inet filter that the configuration names"}},
		{[]string{"restore", nothing}, 1, []string{nothing + ": none of the sets in it"}},
		{[]string{"restore", short}, 1, []string{short + ": line 4: it was cut short: its last line is missing"}},
		{[]string{"restore", "--nonsense"}, 2, []string{"unknown flag: --nonsense"}},
	} {
		var stdout, stderr strings.Builder
		cmd := exec.Command(bin, test.args...)
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		_ = cmd.Run()
		got := stderr.String()
		if code := cmd.ProcessState.ExitCode(); code != test.code || strings.Count(got, "nftwl: error: ") != 1 || stdout.Len() > 0 {
			t.Errorf("%q: exit code %d: %s%s", test.args, code, got, stdout.String())
		}
		for _, words := range test.words {
			if !strings.Contains(got, words) {
				t.Errorf("%q: %q is not in: %s", test.args, words, got)
			}
		}
	}
}
