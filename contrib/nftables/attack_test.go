package nftables_test

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// minute is the time that a minute of the attack takes in the test.
const minute = time.Second

// An attack is one as testdata/attack.txt describes it.
type attack struct {
	attackers                []netip.Addr
	phases                   []phase
	rotator, forged, delayed one
	users                    []one
	overload                 int // minutes
}

// A phase is the attackers' pace for some minutes. A pace is a number of
// connections a minute.
type phase struct{ minutes, pace int }

type one struct {
	from netip.Addr
	pace int
}

func (a *attack) minutes() int {
	sum := 0
	for _, p := range a.phases {
		sum += p.minutes
	}
	return sum
}

// pace returns how many connections a minute each attacker opens at some time.
func (a *attack) pace(after time.Duration) int {
	for _, p := range a.phases {
		if after -= time.Duration(p.minutes) * minute; after < 0 {
			return p.pace
		}
	}
	return 0
}

func readAttack(t *testing.T) *attack {
	t.Helper()
	name := filepath.Join(nstest.Root(t), "testdata", "attack.txt")
	file, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var a attack
	for lines := bufio.NewScanner(file); lines.Scan(); {
		line := lines.Text()
		if line == "" || line[0] == '#' {
			continue
		}
		var first string
		var n, m int
		switch {
		case scan(line, "attacker %s %d", &first, &n):
			for from := addr(first); n > 0; from, n = from.Next(), n-1 {
				a.attackers = append(a.attackers, from)
			}
		case scan(line, "pace %d %d", &n, &m):
			a.phases = append(a.phases, phase{n, m})
		case scan(line, "rotator %s %d", &first, &n):
			a.rotator = one{addr(first), n}
		case scan(line, "user %s %d", &first, &n):
			a.users = append(a.users, one{addr(first), n})
		case scan(line, "forged %s %d", &first, &n):
			a.forged = one{addr(first), n}
		case scan(line, "overload %s %d %d", &first, &n, &m):
			a.delayed, a.overload = one{addr(first), n}, m
		default:
			t.Fatalf("%s: what is %q?", name, line)
		}
	}
	return &a
}

func scan(line, format string, into ...any) bool {
	n, err := fmt.Sscanf(line, format, into...)
	return err == nil && n == len(into)
}

// A tally counts the connections of one kind of client: tried, and let in.
type tally struct{ tried, in int }

func (n *tally) String() string { return fmt.Sprintf("%6d of %6d", n.in, n.tried) }

type result struct {
	ipv4, ipv6, rotator, user, forged, delayed tally
	syns                                       int // forged ones
}

// A caller opens connections, each from the next of its addresses.
type caller struct {
	next  func() netip.Addr
	port  int
	pace  func(time.Duration) int
	tally *tally
	from  time.Duration // connections before this do not count
	due   time.Duration
}

// An attempt is a connection that waits first for the handshake and then for the
// echo of a byte.
type attempt struct {
	fd    int32
	sent  bool
	until time.Duration
	tally *tally
}

// play runs the attack. It opens all its sockets in one thread, because each
// goroutine in the peer's namespace would need a thread of its own.
func (s *mailserver) play(a *attack) *result {
	s.Helper()
	var r result
	var callers []*caller
	call := func(from netip.Addr, pace func(time.Duration) int, n *tally) *caller {
		c := &caller{next: func() netip.Addr { return from }, port: 587, pace: pace, tally: n}
		callers = append(callers, c)
		return c
	}
	steady := func(pace int) func(time.Duration) int { return func(time.Duration) int { return pace } }
	for _, from := range a.attackers {
		if from.Is4() {
			call(from, a.pace, &r.ipv4)
		} else {
			call(from, a.pace, &r.ipv6)
		}
	}
	at := a.rotator.from.As16()
	call(a.rotator.from, steady(a.rotator.pace), &r.rotator).next = func() netip.Addr {
		if at[7]++; at[7] == 0 {
			at[6]++
		}
		return netip.AddrFrom16(at)
	}
	for _, u := range a.users {
		call(u.from, steady(u.pace), &r.user)
	}
	call(a.forged.from, steady(a.forged.pace), &r.forged)
	delayed := call(a.delayed.from, steady(a.delayed.pace), &r.delayed)
	delayed.port, delayed.from = overloaded, time.Duration(a.overload)*minute
	for i, c := range callers {
		c.due = time.Duration(i) * minute / time.Duration(c.pace(0)) / time.Duration(len(callers))
	}

	f := s.forger()
	relieve := s.overload()
	each := func(now time.Duration) error {
		if relieve != nil && now >= delayed.from {
			if err := relieve(); err != nil {
				return err
			}
			relieve = nil
		}
		r.syns++
		return f.trySend(netip.AddrPortFrom(a.forged.from, uint16(1024+r.syns%30000)), 587, syn, 1, 0)
	}
	var err error
	s.internet.Do(func() { err = run(callers, time.Duration(a.minutes())*minute, each) })
	if err != nil {
		s.Fatal(err)
	}
	return &r
}

// run lets the callers open connections until the end. It looks at each of them every
// few milliseconds.
func run(callers []*caller, end time.Duration, each func(now time.Duration) error) error {
	var pending []attempt
	start := time.Now()
	for now := time.Duration(0); now < end || len(pending) > 0; now = time.Since(start) {
		if now < end {
			if err := each(now); err != nil {
				return err
			}
		}
		for _, c := range callers {
			if now < c.due || now >= end {
				continue
			}
			// Count from now: a caller that is late must not catch up with a burst,
			// or it would be limited because the machine is slow.
			c.due = now + minute/time.Duration(c.pace(now))
			from := c.next()
			fd, err := connect(from, c.port)
			if err != nil {
				return fmt.Errorf("from %s: %w", from, err)
			}
			n := c.tally
			if now < c.from {
				n = new(tally)
			}
			n.tried++
			pending = append(pending, attempt{int32(fd), false, now + soon, n})
		}

		polled := make([]unix.PollFd, len(pending))
		for i, p := range pending {
			polled[i] = unix.PollFd{Fd: p.fd, Events: unix.POLLOUT}
			if p.sent {
				polled[i].Events = unix.POLLIN
			}
		}
		if _, err := unix.Poll(polled, 2); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		waiting := pending[:0]
		for i, p := range pending {
			done, err := p.step(polled[i].Revents)
			if err != nil {
				return err
			}
			if !done && now < p.until {
				waiting = append(waiting, p)
				continue
			}
			unix.Close(int(p.fd))
		}
		pending = waiting
	}
	return nil
}

// step continues an attempt for which poll(2) has reported events, and reports
// whether its result is known.
func (p *attempt) step(events int16) (done bool, err error) {
	if events == 0 {
		return false, nil
	}
	b := []byte{'x'}
	if !p.sent {
		_, err = unix.Write(int(p.fd), b)
		p.sent = err == nil
	} else if _, err = unix.Read(int(p.fd), b); err == nil {
		p.tally.in++
		return true, nil
	}
	if errors.Is(err, unix.ECONNRESET) { // over the limit
		return true, nil
	}
	return false, err
}

func connect(from netip.Addr, port int) (int, error) {
	family := unix.AF_INET
	var local, server unix.Sockaddr
	if from.Is4() {
		local = &unix.SockaddrInet4{Addr: from.As4()}
		server = &unix.SockaddrInet4{Addr: nstest.ServerIPv4.As4(), Port: port}
	} else {
		family = unix.AF_INET6
		local = &unix.SockaddrInet6{Addr: from.As16()}
		server = &unix.SockaddrInet6{Addr: nstest.ServerIPv6.As16(), Port: port}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	if err = nstest.FreeBind(fd, from); err == nil {
		// Closing it sends a reset, so that the kernel forgets the connection at once.
		err = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	if err == nil {
		err = unix.Bind(fd, local)
	}
	if err == nil {
		err = unix.Connect(fd, server)
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return 0, err
	}
	return fd, nil
}

// The purpose of the rules: attackers are kept out, and honest clients notice
// nothing, even a user who is the attackers' neighbour.
func TestAttack(t *testing.T) {
	a := readAttack(t)
	slash64s := map[netip.Addr]bool{}
	slash48s := map[netip.Prefix]bool{}
	slash24s := map[netip.Prefix]bool{}
	for _, from := range a.attackers {
		if from.Is6() {
			slash64s[network(from)] = true
			slash48s[netip.PrefixFrom(from, 48).Masked()] = true
		} else {
			slash24s[netip.PrefixFrom(from, 24).Masked()] = true
		}
	}
	// The limits, and the timeout after which the sets forget a client, are as fast as
	// the minutes.
	faster := []edit{{"3/minute", "3/second"}, {"20/minute", "20/second"}, {"timeout 10m", "timeout 10s"}}
	l := layouts[0]
	rules := []struct {
		name  string
		edits []edit
	}{
		{"without nftwl", []edit{{"\t\tjump nftwl\n", "\t\ttcp dport { 587, 2587 } accept\n"}}},
		{"with nftwl", faster},
		{"strict", append(faster, l.strict)},
	}
	results := make([]*result, len(rules))
	for i, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			s := serve(t, l, "/", append(r.edits, withOverloaded)...)
			for _, u := range a.users {
				s.trust(u.from, 128, "1h")
			}
			got := s.play(a)
			results[i] = got
			all := func(name string, n tally, least int) {
				if n.in != n.tried || n.tried < least {
					t.Errorf("%s: %v connections, of %d at least", name, &n, least)
				}
			}
			none := func(name string, n tally) {
				if n.in != 0 {
					t.Errorf("%s: %v connections get in", name, &n)
				}
			}
			// At most what the limit allows so many networks.
			most := func(name string, n tally, networks int) {
				if most := networks * (burst40 + 20*a.minutes() + 1); n.in > most || n.in == 0 {
					t.Errorf("%s: %v, want at most %d", name, &n, most)
				}
			}
			all("the user", got.user, a.minutes()*a.users[0].pace/2)
			switch i {
			case 0:
				// Without nftwl everyone gets in, so it is nftwl that keeps them out below.
				all("IPv4", got.ipv4, 1)
				all("IPv6", got.ipv6, 1)
				all("the rotator", got.rotator, 1)
				all("the one whose address is forged", got.forged, a.minutes()*a.forged.pace/2)
				all("the one who met a full backlog", got.delayed, (a.minutes()-a.overload)*a.delayed.pace/2)
			case 1:
				most("IPv4", got.ipv4, len(slash24s))
				most("IPv6", got.ipv6, len(slash48s))
				most("the rotator", got.rotator, 1)
				all("the one whose address is forged", got.forged, a.minutes()*a.forged.pace/2)
				all("the one who met a full backlog", got.delayed, (a.minutes()-a.overload)*a.delayed.pace/2)
				for _, set := range []string{"banned_ipv4", "banned_ipv6"} {
					if out := s.nft("list", "set", l.table+" "+set); strings.Contains(out, "elements") {
						t.Errorf("the limit bans: %s", out)
					}
				}
			case 2:
				none("IPv4", got.ipv4)
				none("IPv6", got.ipv6)
				none("the rotator", got.rotator)
				none("the one whose address is forged", got.forged)
				none("the one who met a full backlog", got.delayed)
			}
		})
	}
	if t.Failed() {
		return
	}
	table := fmt.Sprintf("Connections that were let in, %d minutes of attack:\n%-40s", a.minutes(), "")
	for _, r := range rules {
		table += fmt.Sprintf("%18s", r.name)
	}
	for _, row := range []struct {
		name  string
		tally func(*result) *tally
	}{
		{fmt.Sprintf("%d attackers of an IPv4 /24", len(a.attackers)-len(slash64s)*50), func(r *result) *tally { return &r.ipv4 }},
		{fmt.Sprintf("attackers in %d /64s of a /48", len(slash64s)), func(r *result) *tally { return &r.ipv6 }},
		{"one who rotates through a /48", func(r *result) *tally { return &r.rotator }},
		{"the user", func(r *result) *tally { return &r.user }},
		{fmt.Sprintf("a stranger, and %d forged SYNs", results[1].syns), func(r *result) *tally { return &r.forged }},
		{"a stranger, after a full backlog", func(r *result) *tally { return &r.delayed }},
	} {
		table += fmt.Sprintf("\n%-40s", row.name)
		for _, r := range results {
			table += fmt.Sprintf("%18v", row.tally(r))
		}
	}
	t.Log(table)
}
