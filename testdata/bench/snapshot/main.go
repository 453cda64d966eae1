// Command snapshot compares nftwl save and nftwl restore with nft and with the
// kernel's own dump. Run it as root in a network namespace of its own: in a user
// namespace, nft cannot make its socket's buffer large enough.
//
//	unshare --net go run ./testdata/bench/snapshot
//
// It prints a Markdown table of medians and peak memory, and takes about four
// minutes, or one with -most 65535.
package main

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
)

var cases = []struct {
	elements        int
	family          string
	saves, restores int // number of runs
}{
	{1000, "ipv4", 21, 21},
	{65535, "ipv4", 11, 11},
	{65535, "ipv6", 11, 11},
	{1000000, "ipv4", 1, 3}, // the kernel needs most of a minute for one dump
}

const tables = `table inet filter {
	set trusted_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; size 1000000; timeout 1d; }
	set trusted_ipv6 { type ipv6_addr . inet_service; flags dynamic,timeout; size 1000000; timeout 1d; }
	set banned_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; size 1000000; timeout 1d; }
	set banned_ipv6 { type ipv6_addr . inet_service; flags dynamic,timeout; size 1000000; timeout 1d; }
}`

func main() {
	most := flag.Int("most", 1000000, "leave out the sets of more elements than `N`")
	// Another process adds the elements, because the kernel counts at least the
	// parent's peak memory as a child's (exec_mmap).
	fillSet := flag.String("fill", "", "only add -most elements to `SET`")
	listen := flag.Bool("listener", false, "only measure what a listener costs")
	flag.Parse()
	err := alone()
	switch {
	case err == nil && *fillSet != "":
		err = fill(*fillSet, *most)
	case err == nil && *listen:
		err = underListener(min(*most, 100_000))
	case err == nil:
		err = bench(*most)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "snapshot bench:", err)
		os.Exit(1)
	}
}

// alone returns an error if this network namespace is in use, so that the benchmark
// changes no firewall.
func alone() error {
	interfaces, err := net.Interfaces()
	if err == nil && len(interfaces) > 1 {
		err = errors.New("this network is in use: run it with unshare --net")
	}
	return err
}

func fill(set string, n int) error { return fillBy(set, n, n) }

// fillBy adds n elements, at most so many in a transaction.
func fillBy(set string, n, atOnce int) error {
	conn, err := nftset.Dial()
	if err != nil {
		return err
	}
	s, err := conn.Set(nftset.Table{Family: nftset.INet, Name: "filter"}, set)
	if err != nil {
		return err
	}
	ports := []uint16{143, 993, 995, 465, 587}
	batch := conn.Batch()
	addr := netip.MustParseAddr("198.18.0.0")
	if s.Key.IPv6 {
		addr = netip.MustParseAddr("2001:db8:4f3a:9000::")
	}
	for i := range n {
		if i%len(ports) == 0 {
			addr = addr.Next()
		}
		if i > 0 && i%atOnce == 0 {
			if err := batch.Commit(); err != nil {
				return err
			}
			batch = conn.Batch()
		}
		batch.Add(s, nftset.Element{
			Key:     nftset.Key{Addr: addr, Port: ports[i%len(ports)]},
			Timeout: 24 * time.Hour,
			Expires: time.Hour + time.Duration(i%80_000_000)*time.Millisecond,
			Comment: fmt.Sprintf("user%d@example.org", i/len(ports)),
		})
	}
	if err := batch.Commit(); err != nil {
		return err
	}
	return conn.Close()
}

// figure has the measurements of one program.
type figure struct {
	times  []time.Duration
	memory int64 // maximum of all runs, in bytes
}

func (f *figure) median() time.Duration {
	slices.Sort(f.times)
	return f.times[len(f.times)/2]
}

// run runs a command, with its output in a file if out is not empty.
func (f *figure) run(out string, command ...string) error {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stderr = os.Stderr
	if out != "" {
		file, err := os.Create(out)
		if err != nil {
			return err
		}
		defer file.Close()
		cmd.Stdout = file
	}
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", strings.Join(command, " "), err)
	}
	f.times = append(f.times, time.Since(start))
	f.memory = max(f.memory, cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss*1024)
	return nil
}

func bench(most int) error {
	dir, err := os.MkdirTemp("", "nftwl-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	nftwl := filepath.Join(dir, "nftwl")
	build := exec.Command("go", "build", "-trimpath", "-o", nftwl, "./cmd/nftwl")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	fmt.Println("| elements | | save | bare dump | ratio | nft list set | ratio | restore | nft -f | ratio | memory: save | nft list | ratio | restore | nft -f | ratio |")
	fmt.Println("|" + strings.Repeat("--:|", 16))
	for _, c := range cases {
		if c.elements > most {
			continue
		}
		set := "trusted_" + c.family
		var save, bare, list, restore, load figure
		if err := reset(); err != nil {
			return err
		}
		self := exec.Command("/proc/self/exe", "-fill", set, "-most", strconv.Itoa(c.elements))
		if out, err := self.CombinedOutput(); err != nil {
			return fmt.Errorf("fill: %w\n%s", err, out)
		}
		// Each has its own file, because a save restores a file of another table.
		saved, listed := filepath.Join(dir, fmt.Sprint(set, c.elements)), filepath.Join(dir, "list.nft")
		// They take turns, so that other work on the machine affects all alike.
		for range c.saves {
			if err := bare.dump(set, c.elements); err != nil {
				return err
			}
			if err := save.run("", nftwl, "save", saved); err != nil {
				return err
			}
			if err := list.run(listed, "nft", "list", "set", "inet", "filter", set); err != nil {
				return err
			}
		}
		for range c.restores {
			if err := reset(); err != nil {
				return err
			}
			if err := restore.run("", nftwl, "restore", saved); err != nil {
				return err
			}
			if err := reset(); err != nil {
				return err
			}
			if err := load.run("", "nft", "-f", saved); err != nil {
				return err
			}
		}
		ratio := func(a, b *figure) float64 { return float64(a.median()) / float64(b.median()) }
		fmt.Printf("| %d | %s | %s | %s | %.2f | %s | %.1f | %s | %s | %.1f | %s | %s | %.1f | %s | %s | %.1f |\n",
			c.elements, c.family,
			ms(&save), ms(&bare), ratio(&save, &bare), ms(&list), ratio(&list, &save),
			ms(&restore), ms(&load), ratio(&load, &restore),
			mib(&save), mib(&list), float64(list.memory)/float64(save.memory),
			mib(&restore), mib(&load), float64(load.memory)/float64(restore.memory))
	}
	if err := underLogins(nftwl, dir, min(most, 262144)); err != nil {
		return err
	}
	return underListener(min(most, 100_000))
}

// underLogins compares saves on a quiet system with saves during which two users a
// second log in.
func underLogins(nftwl, dir string, n int) error {
	if err := reset(); err != nil {
		return err
	}
	self := exec.Command("/proc/self/exe", "-fill", "trusted_ipv4", "-most", strconv.Itoa(n))
	if out, err := self.CombinedOutput(); err != nil {
		return fmt.Errorf("fill: %w\n%s", err, out)
	}
	conn, err := nftset.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	set, err := conn.Set(nftset.Table{Family: nftset.INet, Name: "filter"}, "trusted_ipv4")
	if err != nil {
		return err
	}
	saved := filepath.Join(dir, "with-logins.nft")
	var quiet, disturbed figure
	addr := netip.MustParseAddr("203.0.113.0")
	login := func() error {
		addr = addr.Next()
		var elems []nftset.Element
		for _, port := range []uint16{143, 993, 995, 465, 587} {
			elems = append(elems, nftset.Element{Key: nftset.Key{Addr: addr, Port: port}, Timeout: time.Hour})
		}
		_, err := conn.Extend(set, elems, 0, nil)
		return err
	}
	for range 3 {
		if err := quiet.run("", nftwl, "save", saved); err != nil {
			return err
		}
		done, stopped := make(chan struct{}), make(chan error)
		go func() {
			every := time.NewTicker(time.Second / 2)
			defer every.Stop()
			err := login()
			for err == nil {
				select {
				case <-done:
					stopped <- nil
					return
				case <-every.C:
					err = login()
				}
			}
			stopped <- err
		}()
		err := disturbed.run("", nftwl, "save", saved)
		close(done)
		if err := errors.Join(err, <-stopped); err != nil {
			return err
		}
	}
	fmt.Printf("\n| elements | save | with 2 logins a second | ratio | memory: save | with logins |\n|--:|--:|--:|--:|--:|--:|\n")
	fmt.Printf("| %d | %s | %s | %.2f | %s | %s |\n", n, ms(&quiet), ms(&disturbed),
		float64(disturbed.median())/float64(quiet.median()), mib(&quiet), mib(&disturbed))
	return nil
}

// underListener shows how much memory the kernel takes for a transaction while a
// listener is there, as in nftwld with a cluster: its own, that is not a process's.
func underListener(n int) error {
	fmt.Printf("\n| elements | in a transaction | the kernel's memory without a listener | with one | time without | with one |\n|--:|--:|--:|--:|--:|--:|\n")
	for _, atOnce := range []int{n, n / 10} {
		var memory [2][]int64
		var times [2]figure
		for range 5 {
			for listens := range 2 {
				took, rise, err := fillWith(listens == 1, n, atOnce)
				if err != nil {
					return err
				}
				memory[listens] = append(memory[listens], rise)
				times[listens].times = append(times[listens].times, took)
			}
		}
		for _, m := range memory {
			slices.Sort(m)
		}
		fmt.Printf("| %d | %d | %d MB | %d MB | %s | %s |\n", n, atOnce, memory[0][2]/1000, memory[1][2]/1000, ms(&times[0]), ms(&times[1]))
	}
	return nil
}

// fillWith fills a set, with a listener or without, and returns by how many kilobytes
// the kernel's memory rose meanwhile at most.
func fillWith(listener bool, n, atOnce int) (took time.Duration, rise int64, err error) {
	if err := reset(); err != nil {
		return 0, 0, err
	}
	done := make(chan struct{})
	var others sync.WaitGroup
	defer others.Wait()
	defer close(done)
	if listener {
		w, err := nftset.Watch(nftset.Table{Family: nftset.INet, Name: "filter"})
		if err != nil {
			return 0, 0, err
		}
		others.Go(func() {
			defer w.Close()
			for {
				select {
				case <-done:
					return
				default:
					_ = w.Read(time.Now().Add(50*time.Millisecond), func(nftset.Event) {}) // at the deadline, too
				}
			}
		})
	}
	before, err := unreclaimable()
	if err != nil {
		return 0, 0, err
	}
	stop, most := make(chan struct{}), make(chan int64)
	go func() {
		var peak int64
		for {
			select {
			case <-stop:
				most <- peak
				return
			default:
				if now, err := unreclaimable(); err == nil {
					peak = max(peak, now)
				}
			}
		}
	}()
	start := time.Now()
	err = fillBy("trusted_ipv4", n, atOnce)
	took = time.Since(start)
	close(stop)
	return took, <-most - before, err
}

// unreclaimable is how much memory the kernel has allocated for itself, in kilobytes.
func unreclaimable() (int64, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(text), "\nSUnreclaim:")
	value, _, _ := strings.Cut(strings.TrimSpace(after), " ")
	return strconv.ParseInt(value, 10, 64)
}

func ms(f *figure) string {
	return strconv.FormatFloat(float64(f.median().Microseconds())/1000, 'f', 1, 64) + " ms"
}

func mib(f *figure) string { return strconv.FormatInt(f.memory>>20, 10) + " MiB" }

// reset empties the four sets.
func reset() error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader("flush ruleset\n" + tables)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w\n%s", err, out)
	}
	// Wait until the kernel has freed the flushed elements, which is not part of any
	// measurement. It has when a connection that deleted something is closed.
	cmd = exec.Command("nft", "add element inet filter trusted_ipv4 { 192.0.2.1 . 1 }; delete element inet filter trusted_ipv4 { 192.0.2.1 . 1 }")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w\n%s", err, out)
	}
	return nil
}

// dump measures the kernel's own dump of a set. It reads with buffers of 32 KiB and
// discards what it reads.
func (f *figure) dump(set string, elements int) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	native := binary.NativeEndian
	attr := func(b []byte, typ uint16, s string) []byte {
		b = native.AppendUint16(b, uint16(4+len(s)+1))
		b = native.AppendUint16(b, typ)
		b = append(append(b, s...), 0)
		return append(b, make([]byte, -len(b)&3)...)
	}
	req := make([]byte, 16, 128) // struct nlmsghdr
	req = append(req, unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0)
	req = attr(req, unix.NFTA_SET_ELEM_LIST_TABLE, "filter")
	req = attr(req, unix.NFTA_SET_ELEM_LIST_SET, set)
	native.PutUint32(req, uint32(len(req)))
	native.PutUint16(req[4:], unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETSETELEM)
	native.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	buf := make([]byte, 32<<10)

	start := time.Now()
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	size := 0
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return err
		}
		size += n
		// The message that ends a dump comes alone, or is the last one in a buffer. It
		// has a header and 4 bytes of error code.
		if n >= 20 && (native.Uint16(buf[4:]) == unix.NLMSG_DONE || native.Uint16(buf[n-16:]) == unix.NLMSG_DONE) {
			break
		}
	}
	f.times = append(f.times, time.Since(start))
	if size < 40*elements {
		return fmt.Errorf("a dump of %d bytes is not one of %d elements", size, elements)
	}
	return nil
}
