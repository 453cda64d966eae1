package systemd

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// A step is something that happens to a machine. It does not wait for what it
// started: systemctl returns when nftables.service is done, and before the
// units around it are.
type step struct {
	name string
	do   func(o *orders)
}

func on(name, program string, args ...string) step {
	return step{name, func(o *orders) { o.run(program, args...) }}
}

const byHand = "nft -f by hand"

// steps are those under systemd. The last two boot the machine.
var steps = []step{
	on("reload", "systemctl", "reload", nftables),
	on("restart", "systemctl", "restart", nftables),
	{"stop and start", func(o *orders) {
		o.run("systemctl", "stop", nftables)
		o.run("systemctl", "start", nftables)
	}},
	on(byHand, "nft", "-f", "/etc/nftables.conf"),
	on("save", "systemctl", "start", "--no-block", "nftwl-save"), // as the timer does
	{"a restore that fails", func(o *orders) { o.otherKeys("systemctl", nftables) }},
	{"reboot", func(o *orders) { o.reboot() }},
	{"power cut", func(o *orders) { o.kill(); o.boot() }},
}

// openrcSteps are the same under OpenRC, whose service ends when its hooks do.
var openrcSteps = []step{
	on("reload", "rc-service", "nftables", "reload"),
	on("restart", "rc-service", "nftables", "restart"),
	{"stop and start", func(o *orders) {
		o.run("rc-service", "nftables", "stop")
		o.run("rc-service", "nftables", "start")
	}},
	on(byHand, "nft", "-f", "/etc/nftables.conf"),
	{"save", func(o *orders) { o.run("sh", "-c", "("+o.cron()+") >/dev/null 2>&1 &") }}, // as cron does
	{"a restore that fails", func(o *orders) { o.otherKeys("rc-service", "nftables") }},
	{"reboot", func(o *orders) { o.run("openrc", "shutdown"); o.kill(); o.boot(); o.up() }},
	{"power cut", func(o *orders) { o.kill(); o.boot(); o.up() }},
}

// boots is how many of the steps, at their end, boot the machine.
const boots = 2

// orders are tried on one machine, one after the other.
type orders struct {
	*machine
	extra  int  // elements, besides those of fill
	boots  bool // whether they boot as often as they do anything else
	steps  []step
	save   []string // what the timer runs, or cron
	start  []string // with stop, the firewall
	stop   []string
	settle func()
	random *rand.Rand
	names  []string // steps of the present order
	n      int      // orders tried
	lost   int      // of those, how many lost elements
}

// otherKeys loads sets with another key type, into which the snapshot cannot be
// restored, and then the right ones again.
func (o *orders) otherKeys(program, service string) {
	o.Helper()
	good, err := os.ReadFile(o.file("etc/nftables.conf"))
	nstest.Must(o, err)
	sets, err := os.ReadFile(o.file("etc/nftwl/sets.nft"))
	nstest.Must(o, err)
	others := "flush ruleset\n" + strings.ReplaceAll(string(sets), " . inet_service", "")
	for _, conf := range []string{others, string(good)} {
		o.write("etc/nftables.conf", conf)
		how := []string{"reload", "restart"}[o.random.IntN(2)]
		o.names = append(o.names, "("+how+")")
		if program == "systemctl" {
			o.run(program, how, service)
		} else {
			o.run(program, service, how)
		}
	}
}

// prepare has the sets hold what the orders must not lose, and saves it.
func (o *orders) prepare() {
	o.Helper()
	o.fill()
	var b strings.Builder
	for i := range o.extra {
		// 30,000 and more are of one list, and of both families.
		set, address := "trusted_ipv4", fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)
		switch i % 4 {
		case 1:
			set = "banned_ipv4"
		case 2:
			set, address = "trusted_ipv6", fmt.Sprintf("2001:db8:1::%x", i)
		case 3:
			set, address = "banned_ipv6", fmt.Sprintf("2001:db8:1::%x", i)
		}
		fmt.Fprintf(&b, "add element inet filter %s { %s . 993 timeout %dm comment \"user %d\" }\n", set, address, 120+i%600, i)
	}
	o.write("run/elements.nft", b.String())
	o.run("nft", "-f", "/run/elements.nft")
	o.run(o.save[0], o.save[1:]...)
}

// again makes a machine that has lost elements as good as new.
func (o *orders) again() {
	o.Helper()
	o.run(o.stop[0], o.stop[1:]...)
	o.settle()
	for _, name := range []string{snapshotFile, snapshotFile + ".old"} {
		_ = os.Remove(o.file(name)) // it need not be there
	}
	o.run(o.start[0], o.start[1:]...)
	o.settle()
	o.prepare()
}

// order tries one order: what the sets held, and was saved, they hold after, no
// more and no less.
func (o *orders) order(order []step) {
	o.Helper()
	o.n++
	// One comes and one goes each time.
	address := func(n int) string { return fmt.Sprintf("2001:db8:203::%x", n) }
	o.run("nftwl", "add", address(o.n))
	o.run("nftwl", "remove", address(o.n-1))
	o.run(o.save[0], o.save[1:]...)
	want := o.elements()

	o.names = nil
	began := time.Now()
	for _, s := range order {
		o.names = append(o.names, s.name)
		s.do(o)
	}
	o.settle()
	if o.names[len(o.names)-1] == byHand {
		// No unit sees that: what heals it is the next save.
		_, _ = o.try(o.save[0], o.save[1:]...) // the elements tell
	}
	// A restore gives each element what it has left at its begin, and so makes
	// its life as much longer as the restore takes.
	diffs := o.diff(want, 0, slack+time.Since(began))
	if len(diffs) == 0 {
		return
	}
	o.lost++
	o.Errorf("order %d: %s: of %d elements, %d are not as before: %s", o.n, strings.Join(o.names, ", "), len(want), len(diffs), diffs[0])
	o.again()
}

// pass tries orders of so many steps in which each run of n steps occurs: the
// steps of one order go on without a pause, and the next order begins with
// the last n-1 of the one before.
func (o *orders) pass(steps []step, n, length int) {
	o.Helper()
	steps = slices.Clone(steps)
	o.random.Shuffle(len(steps), func(i, j int) { steps[i], steps[j] = steps[j], steps[i] })
	var chain []step
	for _, i := range deBruijn(len(steps), n) {
		chain = append(chain, steps[i])
	}
	chain = append(chain, chain[:n-1]...)
	for len(chain) >= n {
		order := chain[:min(length, len(chain))]
		o.order(order)
		chain = chain[len(order)-n+1:]
	}
}

// each tries each order of so many steps by itself.
func (o *orders) each(steps []step, n int, before ...step) {
	o.Helper()
	if n == 0 {
		o.order(before)
		return
	}
	for _, s := range steps {
		o.each(steps, n-1, append(slices.Clone(before), s)...)
	}
}

// longer tries random orders for so long.
func (o *orders) longer(d time.Duration) {
	o.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); {
		order := make([]step, 4+o.random.IntN(9))
		for i := range order {
			order[i] = o.steps[o.random.IntN(len(o.steps))]
		}
		o.order(order)
	}
}

// deBruijn is a cyclic sequence in which each word of n letters, out of k,
// occurs once: the Lyndon words whose length divides n, in order.
func deBruijn(k, n int) (sequence []int) {
	word := make([]int, n+1)
	var extend func(t, p int)
	extend = func(t, p int) {
		if t > n {
			if n%p == 0 {
				sequence = append(sequence, word[1:p+1]...)
			}
			return
		}
		word[t] = word[t-p]
		extend(t+1, p)
		for word[t] = word[t-p] + 1; word[t] < k; word[t]++ {
			extend(t+1, t)
		}
	}
	extend(1, 1)
	return sequence
}

// many is how many elements make a save and a restore take longer than the
// next command takes to come.
const many = 30000

// TestSteps tries the steps in every order of three: no order of what happens
// to a machine, however fast it follows, loses an element that was saved once,
// brings back one that was removed, or makes a life longer. All orders are on one
// machine, and on the others those of three steps without a boot, and of two.
//
// SOAK=10m goes on with longer orders at random for so long. ORDERS=each tries
// the orders of one, two and three steps without a boot one by one, which tells
// exactly which ones lose elements. SEED=N repeats a run.
func TestSteps(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		for _, extra := range []int{0, many} {
			t.Run(strconv.Itoa(extra), func(t *testing.T) {
				t.Parallel()
				m := newMachine(t, b)
				m.install()
				tryOrders(t, &orders{
					machine: m, extra: extra, boots: extra == 0 && b.Release == "host", steps: steps, settle: m.settle,
					save:  []string{"systemctl", "start", "nftwl-save"},
					start: []string{"systemctl", "start", nftables},
					stop:  []string{"systemctl", "stop", nftables},
				})
			})
		}
	})
}

func TestOpenRCSteps(t *testing.T) {
	t.Parallel()
	for _, extra := range []int{0, many} {
		t.Run(strconv.Itoa(extra), func(t *testing.T) {
			t.Parallel()
			m := newOpenRC(t)
			tryOrders(t, &orders{
				machine: m, extra: extra, steps: openrcSteps, settle: func() { m.ends("nftwl") },
				save:  []string{"sh", "-c", m.cron()},
				start: []string{"rc-service", "nftables", "start"},
				stop:  []string{"rc-service", "nftables", "stop"},
			})
		})
	}
}

// ends waits until no process of a program runs on the machine.
func (m *machine) ends(program string) {
	m.Helper()
	nstest.Until(m, program+" ends", func() error {
		if out, err := m.try("pgrep", "-x", program); err == nil {
			return fmt.Errorf("it runs as %s", out)
		}
		return nil
	})
}

func tryOrders(t *testing.T, o *orders) {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		nstest.Must(o, err)
	}
	o.random = rand.New(rand.NewPCG(seed, 0))
	t.Logf("SEED=%d", seed)
	defer func() { t.Logf("%d orders, %d lost elements", o.n, o.lost) }()
	o.prepare()
	awake := o.steps[:len(o.steps)-boots]
	switch d, err := time.ParseDuration(os.Getenv("SOAK")); {
	case err == nil:
		o.longer(d)
	case os.Getenv("ORDERS") == "each":
		for n := 1; n <= 3; n++ {
			tried, lost := o.n, o.lost
			o.each(awake, n)
			t.Logf("of %d steps: %d orders, %d lost elements", n, o.n-tried, o.lost-lost)
		}
	case o.boots:
		o.pass(o.steps, 3, 12)
	default:
		o.pass(awake, 3, 12)
		o.pass(o.steps, 2, 12)
	}
}
