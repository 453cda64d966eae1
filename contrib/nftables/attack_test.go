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

// minute is how long a minute of the attack takes.
const minute = time.Second

// An attack is what testdata/attack.txt describes.
type attack struct {
	attackers, users []netip.Addr
	phases           []phase
	userPace         int
}

type phase struct{ minutes, pace int }

func (a *attack) minutes() int {
	sum := 0
	for _, p := range a.phases {
		sum += p.minutes
	}
	return sum
}

// pace is how many connections a minute an attacker opens after some time.
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
		var n int
		var p phase
		switch {
		case scan(line, "attacker %s %d", &first, &n):
			for from := addr(first); n > 0; from, n = from.Next(), n-1 {
				a.attackers = append(a.attackers, from)
			}
		case scan(line, "user %s", &first):
			a.users = append(a.users, addr(first))
		case scan(line, "pace %d %d", &p.minutes, &p.pace):
			a.phases = append(a.phases, p)
		case scan(line, "user-pace %d", &a.userPace):
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

// A tally counts connections of one kind of people: tried, and let in.
type tally struct{ tried, in int }

func (n *tally) String() string { return fmt.Sprintf("%6d of %6d", n.in, n.tried) }

type result struct{ ipv4, ipv6, user tally }

// A caller is one source of connections.
type caller struct {
	from    netip.Addr
	pace    func(time.Duration) int
	patient time.Duration
	tally   *tally
	next    time.Duration
}

type attempt struct {
	fd    int32
	until time.Duration
	tally *tally
}

// play runs the attack against port 587. It opens its sockets itself, and all
// in one thread, since a goroutine could not be had in the namespace of the
// peer without a thread of its own.
func (s *mailserver) play(a *attack) *result {
	s.Helper()
	var r result
	var callers []*caller
	for _, from := range a.attackers {
		n := &r.ipv4
		if from.Is6() {
			n = &r.ipv6
		}
		callers = append(callers, &caller{from: from, pace: a.pace, patient: never, tally: n})
	}
	for _, from := range a.users {
		pace := func(time.Duration) int { return a.userPace }
		callers = append(callers, &caller{from: from, pace: pace, patient: soon, tally: &r.user})
	}
	for i, c := range callers {
		c.next = time.Duration(i) * minute / time.Duration(c.pace(0)) / time.Duration(len(callers))
	}
	var err error
	s.internet.Do(func() { err = run(callers, time.Duration(a.minutes())*minute) })
	if err != nil {
		s.Fatal(err)
	}
	return &r
}

func run(callers []*caller, end time.Duration) error {
	var pending []attempt
	start := time.Now()
	for now := time.Duration(0); now < end || len(pending) > 0; now = time.Since(start) {
		for _, c := range callers {
			if now < c.next || now >= end {
				continue
			}
			// Counted from now: who was late must not make up for it with a
			// burst, or a slow machine would get him banned.
			c.next = now + minute/time.Duration(c.pace(now))
			fd, err := connect(c.from, 587)
			if err != nil {
				return fmt.Errorf("from %s: %w", c.from, err)
			}
			c.tally.tried++
			pending = append(pending, attempt{int32(fd), now + c.patient, c.tally})
		}

		polled := make([]unix.PollFd, len(pending))
		for i, p := range pending {
			polled[i] = unix.PollFd{Fd: p.fd, Events: unix.POLLOUT}
		}
		if _, err := unix.Poll(polled, 2); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		waiting := pending[:0]
		for i, p := range pending {
			switch {
			case polled[i].Revents == unix.POLLOUT:
				p.tally.in++
			case polled[i].Revents != 0:
				code, err := unix.GetsockoptInt(int(p.fd), unix.SOL_SOCKET, unix.SO_ERROR)
				return fmt.Errorf("connection failed: %v, %v", unix.Errno(code), err)
			case now < p.until:
				waiting = append(waiting, p)
				continue
			}
			unix.Close(int(p.fd))
		}
		pending = waiting
	}
	return nil
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
		// A reset on close leaves no state behind.
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

// What the rules are for: attackers are kept out, and the user notices
// nothing, although he is one of their neighbours.
func TestAttack(t *testing.T) {
	a := readAttack(t)
	networks := map[netip.Addr]bool{}
	addresses := 0
	for _, from := range a.attackers {
		if from.Is6() {
			networks[network(from)] = true
		} else {
			addresses++
		}
	}
	// As fast as the minutes; and who is silent is remembered as long.
	faster := []edit{{"3/minute", "3/second"}, {"timeout 10m", "timeout 10s"}}
	l := layouts[0]
	rules := []struct {
		name  string
		edits []edit
	}{
		{"without nftwl", []edit{{"\t\tjump nftwl\n", "\t\ttcp dport 587 accept\n"}}},
		{"with nftwl", faster},
		{"strict", append(faster, l.strict)},
	}
	results := make([]*result, len(rules))
	for i, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			s := serve(t, l, "/", r.edits...)
			for _, from := range a.users {
				s.trust(from, 128, "1h")
			}
			got := s.play(a)
			results[i] = got
			if got.user.in != got.user.tried || got.user.tried < a.minutes()*a.userPace {
				t.Errorf("the user: %v connections", &got.user)
			}
			switch i {
			case 0:
				// Whoever is kept out below is kept out by nftwl.
				for _, n := range []tally{got.ipv4, got.ipv6} {
					if n.in != n.tried {
						t.Errorf("without nftwl %v connections get in", &n)
					}
				}
			case 1:
				most := burst5 + 3*a.minutes()
				if got.ipv4.in > addresses*most {
					t.Errorf("IPv4: %v, more than %d from each address", &got.ipv4, most)
				}
				if got.ipv6.in > len(networks)*most {
					t.Errorf("IPv6: %v, more than %d from each network", &got.ipv6, most)
				}
				if n := strings.Count(s.nft("list", "set", l.table+" banned_ipv4"), "587"); n != addresses {
					t.Errorf("%d of %d addresses are banned", n, addresses)
				}
				if n := strings.Count(s.nft("list", "set", l.table+" banned_ipv6"), "587"); n != len(networks) {
					t.Errorf("%d of %d networks are banned", n, len(networks))
				}
			case 2:
				if n := got.ipv4.in + got.ipv6.in; n != 0 {
					t.Errorf("strict, and %d connections of attackers get in", n)
				}
			}
		})
	}
	if t.Failed() {
		return
	}
	table := fmt.Sprintf("Connections to port 587 that were let in, %d minutes of attack:\n%-31s", a.minutes(), "")
	for _, r := range rules {
		table += fmt.Sprintf("%18s", r.name)
	}
	for _, row := range []struct {
		name  string
		tally func(*result) *tally
	}{
		{fmt.Sprintf("attackers, %d IPv4 addresses", addresses), func(r *result) *tally { return &r.ipv4 }},
		{fmt.Sprintf("attackers, %d IPv6, %d networks", len(a.attackers)-addresses, len(networks)), func(r *result) *tally { return &r.ipv6 }},
		{"the user", func(r *result) *tally { return &r.user }},
	} {
		table += fmt.Sprintf("\n%-31s", row.name)
		for _, r := range results {
			table += fmt.Sprintf("%18v", row.tally(r))
		}
	}
	t.Log(table)
}
