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

// A step is something that happens to a machine. It does not wait until everything has
// finished: systemctl returns when nftables.service has, before the units around it.
type step struct {
	name string
	do   func(o *orders)
}

func on(name, program string, args ...string) step {
	return step{name, func(o *orders) { o.run(program, args...) }}
}

const byHand = "nft -f by hand"

// steps has the steps under systemd. The last two boot the machine.
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

// openrcSteps has the same steps under OpenRC, whose service ends when its hooks have.
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

// boots is the number of steps, the last ones, that boot the machine.
const boots = 2

// orders tries orders of steps on one machine, one after the other.
type orders struct {
	*machine
	extra  int  // number of elements in addition to those of fill
	boots  bool // whether the steps that boot are as frequent as the others
	steps  []step
	save   []string // the command of the timer, or of cron
	start  []string // starts the firewall; stop stops it
	stop   []string
	settle func()
	random *rand.Rand
	names  []string // steps of the current order
	n      int      // number of orders tried
	lost   int      // number of those that lost elements
}

// otherKeys loads sets with another key type, so that the snapshot cannot be restored,
// and then the right ones again.
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

// prepare adds elements that the orders must not lose, and saves them.
func (o *orders) prepare() {
	o.Helper()
	o.fill()
	var b strings.Builder
	for i := range o.extra {
		// They are in both lists and of both families.
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

// again resets a machine that has lost elements.
func (o *orders) again() {
	o.Helper()
	o.run(o.stop[0], o.stop[1:]...)
	o.settle()
	for _, name := range []string{snapshotFile, snapshotFile + ".old"} {
		_ = os.Remove(o.file(name)) // can be missing
	}
	o.run(o.start[0], o.start[1:]...)
	o.settle()
	o.prepare()
}

// order tries one order of steps. Afterwards the sets must have exactly the elements that
// were saved.
func (o *orders) order(order []step) {
	o.Helper()
	o.n++
	// Each time one element is added and one removed.
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
		// No unit notices that. The next save restores the elements.
		_, _ = o.try(o.save[0], o.save[1:]...) // the elements show whether it worked
	}
	// A restore gives each element the time left at the restore's start, so the element
	// expires later by as long as the restore takes.
	diffs := o.diff(want, 0, slack+time.Since(began))
	if len(diffs) == 0 {
		return
	}
	o.lost++
	o.Errorf("order %d: %s: of %d elements, %d differ: %s", o.n, strings.Join(o.names, ", "), len(want), len(diffs), diffs[0])
	o.again()
}

// pass tries orders of length steps, in which each sequence of n steps occurs. The steps
// of an order follow each other without a pause. Each order begins with the last n-1
// steps of the order before.
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

// each tries each order of n steps separately.
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

// longer tries random orders for a time.
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

// deBruijn returns a cyclic sequence in which each word of n letters, out of k, occurs
// once: the Lyndon words whose length divides n, in order.
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

// many is a number of elements with which a save and a restore take longer than it takes
// the next command to start.
const many = 30000

// TestSteps tries the steps in every order of three. No order, however fast the steps
// follow each other, loses an element that was saved once, brings back one that was
// removed, or extends the time left. One machine tries all orders. The others try those
// of three steps without a boot, and those of two.
//
// SOAK=10m tries longer random orders for that time. ORDERS=each tries the orders of one,
// two and three steps without a boot separately, which shows exactly which ones lose
// elements. SEED=N repeats a run.
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
			t.Logf("with %d steps: %d orders, %d lost elements", n, o.n-tried, o.lost-lost)
		}
	case o.boots:
		o.pass(o.steps, 3, 12)
	default:
		o.pass(awake, 3, 12)
		o.pass(o.steps, 2, 12)
	}
}
