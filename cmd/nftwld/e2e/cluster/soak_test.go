package cluster

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// Logins, adds, removals, bans and unbans on three machines at random, while sets
// are flushed, rulesets are loaded again, machines are cut off, and the engine hangs,
// dies or loses everything. In the end all machines have the same, which is what a
// model says, and nothing is sent any more. SOAK=10m goes on for so long, and SEED=N
// repeats a run.
func TestSoak(t *testing.T) {
	length := 2 * time.Second
	if s := os.Getenv("SOAK"); s != "" {
		var err error
		length, err = time.ParseDuration(s)
		nstest.Must(t, err)
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		nstest.Must(t, err)
	}
	t.Logf("SEED=%d", seed)
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		s := &soak{begin: time.Now(), random: rand.New(rand.NewPCG(seed, 0)), adds: make(map[place][]*given), ghosts: make(map[place][]*given), parts: make(map[place]map[string]bool), did: make(map[string]int)}
		var args []string
		if s.random.IntN(2) == 0 {
			s.keeps = true
			args = []string{"--appendonly", "yes", "--appendfsync", "always"}
		}
		s.lan = newLAN(t, d, 3, args...)
		for i := range s.has {
			s.has[i] = make(map[place]time.Time)
		}
		t.Cleanup(func() {
			if t.Failed() {
				s.explain()
			}
		})
		s.start()
		rounds := 0
		for begin := time.Now(); time.Since(begin) < length && !t.Failed(); rounds++ {
			s.round()
		}
		if !t.Failed() {
			s.silent()
		}
		t.Logf("SEED=%d: %d rounds, after %v", seed, rounds, s.did)
	})
}

// place is where an element can be.
type place struct {
	list, addr string
	port       int
}

func (p place) String() string { return fmt.Sprintf("%s %s . %d", p.list, p.addr, p.port) }

// set tells which of the four sets of a machine it is in.
func (p place) set() string {
	if strings.Contains(p.addr, ":") {
		return p.list + "_ipv6"
	}
	return p.list + "_ipv4"
}

// given is an add of an element, or a login. A removal that came later ends it.
type given struct {
	node    int
	comment string
	// When it was added, by the clock of this test.
	early, late time.Time
	timeout     time.Duration // 0 for a permanent element
	// perhaps: it counts or not, as both are allowed: see where it is set.
	perhaps bool
	// weak: what was there lasts as long or longer, so nothing was changed by it. It
	// is then not newer than a removal on a machine that was cut off.
	weak bool
}

const (
	// exact is within what time the machines agree on what came first. It is how long
	// a machine that has no processor can take from a look to a record.
	exact = time.Second
	// tolerance is by how much the time left can differ, besides what is not worth a
	// record (gain in pkg/cluster).
	tolerance = 3 * time.Second
)

// until is when it ends at the latest.
func (g *given) until() time.Time {
	if g.timeout == 0 {
		return time.Now().Add(1000 * time.Hour)
	}
	return g.late.Add(g.timeout)
}

type soak struct {
	*lan
	begin  time.Time
	random *rand.Rand
	keeps  bool // the engine keeps what it has over a restart
	adds   map[place][]*given
	// has is until when a machine certainly has an element, so that a removal there
	// certainly removes it: it has what it added itself, or what all had after a round.
	has [3]map[place]time.Time
	// ghosts are adds of every port that were removed on one: when the port is added
	// again they can count there again, as its record then says nothing of the removal.
	ghosts map[place][]*given
	// parts are the names of a ban, with their machines. Each machine ends its own part
	// alone, and those that it knows of: one that gains little is not shared.
	parts   map[place]map[string]bool
	did     map[string]int
	history []string
	wrong   []place // of which the machines differ

	// Of the round:
	unplugged map[int]bool
	flushed   map[string]int // how often each set lost all, by its name
	lost      bool           // the engine lost all
	stopped   bool           // the engine hangs
	down      bool           // the engine is dead
	cleared   map[string]bool
	removals  map[place]bool // where there were any
	// hidden are adds that were removed in this round. When the address is added again
	// before a machine has heard of the removal, the record of the add hides it, and
	// what that machine has from before can stay.
	hidden map[place][]*given
}

func (s *soak) pick(of ...string) string { return of[s.random.IntN(len(of))] }

func (s *soak) note(format string, args ...any) {
	s.history = append(s.history, time.Now().Format("05.000 ")+fmt.Sprintf(format, args...))
}

// round does some things, heals all, and compares.
func (s *soak) round() {
	s.note("--- round")
	s.unplugged, s.flushed, s.cleared, s.removals = make(map[int]bool), make(map[string]int), make(map[string]bool), make(map[place]bool)
	s.lost, s.hidden = false, make(map[place][]*given)
	for range 3 + s.random.IntN(30) {
		if s.random.IntN(8) == 0 {
			s.fault()
		} else {
			s.step()
		}
	}
	s.heal()
	s.compare()
}

// explain logs what happened to the addresses of which the machines differ.
func (s *soak) explain() {
	var lines []string
	for _, line := range s.history {
		if !strings.Contains(line, "node") || strings.Contains(line, "---") || slices.ContainsFunc(s.wrong, func(p place) bool { return strings.Contains(line, p.list+" "+p.addr+" ") }) ||
			!strings.Contains(line, ".1") && !strings.Contains(line, "::") {
			lines = append(lines, line)
		}
	}
	s.t.Logf("the engine keeps its data: %v\n%s", s.keeps, strings.Join(lines[max(0, len(lines)-150):], "\n"))
	s.t.Logf("the engine:\n%s", s.engine.Do("HGETALL", "nftwl:{mail}:"+s.wrong[0].list))
	s.t.Logf("its log:\n%s", s.engine.Do("XREVRANGE", "nftwl:{mail}:"+s.wrong[0].list+":log", "+", "-", "COUNT", "30"))
}

// fault breaks something, or repairs it.
func (s *soak) fault() {
	what := s.pick("unplug", "unplug", "plug", "flush", "flush by nft", "reload", "reload", "wipe", "kill", "hang", "clear")
	i := s.random.IntN(3)
	n := s.nodes[i]
	set := s.pick("trusted_ipv4", "trusted_ipv6", "banned_ipv4", "banned_ipv6")
	listed := s.pick("trusted", "banned")
	up := !s.stopped && !s.down
	switch what {
	case "unplug":
		nstest.Unplug(s.t, i)
		s.unplugged[i] = true
	case "plug":
		nstest.Plug(s.t, i)
		delete(s.unplugged, i)
	case "flush":
		n.nftwl("flush", listed)
		s.lose(i, listed+"_ipv4", listed+"_ipv6")
	case "flush by nft":
		n.peer.Do(func() { nstest.Nft(s.t, "flush set inet filter "+set) })
		s.lose(i, set)
	case "reload":
		n.load()
		s.lose(i, "trusted_ipv4", "trusted_ipv6", "banned_ipv4", "banned_ipv6")
	case "wipe":
		if !up {
			return
		}
		s.engine.Do("FLUSHALL")
		s.lost = true
	case "kill":
		if s.down {
			s.engine.Start()
			s.down = false
			break
		}
		s.engine.Signal(syscall.SIGKILL)
		s.down, s.stopped = true, false
		s.lost = s.lost || !s.keeps
	case "hang":
		if s.down {
			return
		}
		if s.stopped {
			s.engine.Signal(syscall.SIGCONT)
		} else {
			s.engine.Signal(syscall.SIGSTOP)
		}
		s.stopped = !s.stopped
	case "clear":
		if !up || s.unplugged[i] || s.random.IntN(4) != 0 {
			return
		}
		early := time.Now()
		if out, err := n.output("nftwld", "clear", listed); err != nil {
			// It was just plugged in, or the engine is starting. It may have been done.
			s.note("clear: %v: %s", err, out)
			for p := range s.adds {
				if p.list == listed {
					s.removed(p, i, early, time.Now(), func(*given) bool { return false })
				}
			}
			break
		}
		s.cleared[listed] = true
		for p := range s.adds {
			if p.list == listed {
				s.removed(p, i, early, time.Now(), func(*given) bool { return true })
			}
		}
	}
	s.did[what]++
	s.note("%s %s %s %s", what, n.name, set, listed)
}

// lose notes that sets of a machine lost all. What was added there in this round can
// be lost, if nobody was told before.
func (s *soak) lose(i int, sets ...string) {
	for _, set := range sets {
		s.flushed[set]++
		for p, all := range s.adds {
			if p.set() != set {
				continue
			}
			delete(s.has[i], p)
			for _, g := range all {
				// node is -1 for what all had.
				g.perhaps = g.perhaps || g.node == i
			}
		}
	}
}

// removed notes that elements were removed at a place, by a machine: certainly those
// for which sure is true, and perhaps the others.
func (s *soak) removed(p place, by int, early, late time.Time, sure func(*given) bool) {
	s.removals[p] = true
	for _, g := range s.adds[p] {
		hidden := *g
		s.hidden[p] = append(s.hidden[p], &hidden)
	}
	var left []*given
	for _, g := range s.adds[p] {
		switch {
		case sure(g) && g.late.Before(early.Add(-exact)) && !g.perhapsLonger(early):
			continue
		case g.early.After(late.Add(exact)) && !g.weak && g.timeout != 0:
		default:
			g.perhaps = true
		}
		left = append(left, g)
	}
	s.adds[p] = left
	for i := range s.nodes {
		delete(s.has[i], p)
	}
}

// perhapsLonger: a removal at the natural end is not sent, as there is nothing to
// remove then.
func (g *given) perhapsLonger(at time.Time) bool {
	return g.timeout != 0 && g.late.Add(g.timeout).Before(at.Add(exact+2*time.Second))
}

// step has somebody come in, or be removed.
func (s *soak) step() {
	i := s.random.IntN(3)
	n := s.nodes[i]
	addr := fmt.Sprintf(s.pick("198.51.100.%d", "2001:db8::%d"), 1+s.random.IntN(6))
	listed := s.pick("trusted", "banned")
	comment := s.pick("alice", "bob")
	timeout := []time.Duration{0, 4 * time.Second, 10 * time.Second, time.Minute, time.Hour, 24 * time.Hour}[s.random.IntN(6)]
	ports := []int{143, 993, 995, 465, 587}
	var args []string
	if s.random.IntN(3) == 0 {
		ports = []int{ports[s.random.IntN(len(ports))]}
		args = []string{"--port", fmt.Sprint(ports[0])}
	}
	what := s.pick("login", "add", "add", "add", "remove", "remove", "remove by nft", "remove for")
	early := time.Now()
	switch what {
	case "login":
		listed, ports = "trusted", []int{143, 993, 995, 465, 587}
		timeout = 24 * time.Hour
		n.login(addr, comment)
	case "add":
		given := "never"
		if timeout != 0 {
			given = timeout.String()
		}
		args = append(args, "--timeout", given, "--comment", comment, addr)
		n.nftwl(append([]string{map[string]string{"trusted": "add", "banned": "ban"}[listed]}, args...)...)
	case "remove", "remove for":
		args = append(args, addr)
		if what == "remove for" {
			args = append(args, "--comment", comment)
		}
		n.nftwl(append([]string{map[string]string{"trusted": "remove", "banned": "unban"}[listed]}, args...)...)
	case "remove by nft":
		ports = ports[:1]
		n.peer.Do(func() {
			set := place{listed, addr, 0}.set()
			nstest.Nft(s.t, fmt.Sprintf("add element inet filter %s { %s . %d }\ndelete element inet filter %[1]s { %[2]s . %[3]d }", set, addr, ports[0]))
		})
	}
	late := time.Now()
	s.did[what]++
	every := what == "remove" && len(ports) == 5
	for _, port := range ports {
		every = every && s.has[i][place{listed, addr, port}].After(late.Add(exact+2*time.Second))
	}
	s.note("%s %s %s %s %v %v %s", n.name, what, listed, addr, ports, timeout, comment)
	for _, port := range ports {
		p := place{listed, addr, port}
		switch what {
		case "login", "add":
			g := &given{node: i, comment: comment, early: early, late: late, timeout: timeout}
			// One that this machine may still have for longer, because it has not heard of a
			// removal, stays as it is there: nobody hears of the add.
			for _, old := range append(slices.Clone(s.adds[p]), s.hidden[p]...) {
				g.weak = g.weak || old.until().After(g.early.Add(g.timeout-2*time.Second)) || old.timeout == 0
			}
			g.perhaps = g.weak && s.removals[p]
			for _, ghost := range append(s.ghosts[p], s.hidden[p]...) {
				ghost.perhaps = true
				s.adds[p] = append(s.adds[p], ghost)
			}
			if s.parts[p] == nil {
				s.parts[p] = make(map[string]bool)
			}
			if len(s.ghosts[p])+len(s.hidden[p]) > 0 {
				s.parts[p]["a ghost's"] = true
			}
			delete(s.ghosts, p)
			delete(s.hidden, p)
			s.adds[p] = append(s.adds[p], g)
			s.parts[p][fmt.Sprint(i, comment)] = true
			for j := range s.nodes {
				delete(s.has[j], p)
			}
			s.has[i][p] = g.early.Add(timeout)
			if timeout == 0 {
				s.has[i][p] = late.Add(1000 * time.Hour)
			}
		case "remove":
			sure := s.has[i][p].After(late.Add(exact + 2*time.Second))
			if every {
				delete(s.ghosts, p)
			} else {
				s.haunt(p)
			}
			sure = sure && (listed == "trusted" || len(s.parts[p]) <= 1)
			s.removed(p, i, early, late, func(*given) bool { return sure })
		case "remove for":
			// It removes the element if it has the comment, and of a ban only this
			// machine's part elsewhere. What a machine has in its comment depends on
			// what was there before.
			sure := s.has[i][p].After(late.Add(exact + 2*time.Second))
			s.haunt(p)
			sure = sure && len(s.parts[p]) == 1 && s.parts[p][fmt.Sprint(i, comment)]
			s.removed(p, i, early, late, func(*given) bool { return sure })
		case "remove by nft":
			// If the set is empty then, it was flushed, for all that others know.
			s.haunt(p)
			s.removed(p, i, early, late, func(*given) bool { return false })
			for _, g := range s.adds[p] {
				g.perhaps = true
			}
		}
	}
}

// haunt notes that a port is removed alone.
func (s *soak) haunt(p place) {
	for _, g := range s.adds[p] {
		ghost := *g
		s.ghosts[p] = append(s.ghosts[p], &ghost)
	}
}

// heal repairs all.
func (s *soak) heal() {
	for i := range s.nodes {
		if s.unplugged[i] {
			nstest.Plug(s.t, i)
		}
	}
	if s.down {
		s.engine.Start()
	}
	if s.stopped {
		s.engine.Signal(syscall.SIGCONT)
	}
	s.down, s.stopped = false, false
	s.note("healed")
	for p, all := range s.adds {
		for _, g := range all {
			// If all machines and the engine lost it, nobody has it.
			if s.lost && (s.flushed[p.set()] >= 3 || s.cleared[p.list]) {
				g.perhaps = true
			}
		}
	}
	// If it lost that a list was cleared, too, those bring it back that had not heard.
	for p, all := range s.hidden {
		if !s.lost || !s.cleared[p.list] {
			continue
		}
		s.note("the engine lost that %s was cleared", p.list)
		for _, g := range all {
			g.perhaps = true
			s.adds[p] = append(s.adds[p], g)
		}
	}
}

// compare waits until all machines have the same, as the model says. From then on
// the model has that.
func (s *soak) compare() {
	var all [3]map[place]element
	var read [3]time.Time
	var at time.Time
	nstest.Until(s.t, "the machines to have the same", func() error {
		for i, n := range s.nodes {
			if s.unplugged[i] && n.metric("cluster_connected") != 1 {
				return fmt.Errorf("%s is not connected", n.name)
			}
		}
		for i, n := range s.nodes {
			all[i] = make(map[place]element)
			for _, name := range []string{"trusted", "banned"} {
				list := n.list(name)
				read[i] = time.Now()
				for _, e := range list {
					all[i][place{name, e.Address, e.Port}] = e
				}
			}
		}
		// As of one moment: on a busy machine it takes seconds to read all.
		at = time.Now()
		for i := range all {
			for p, e := range all[i] {
				if e.Timeout != 0 {
					e.Expires -= at.Sub(read[i]).Seconds()
					all[i][p] = e
				}
			}
		}
		return s.differ(at, all)
	})
	s.note("the same")
	places := make(map[place]bool)
	for i := range s.nodes {
		s.has[i] = make(map[place]time.Time)
		for p, e := range all[i] {
			places[p] = true
			s.has[i][p] = at.Add(time.Duration(e.Expires*float64(time.Second)) - time.Second)
			if e.Timeout == 0 {
				s.has[i][p] = at.Add(1000 * time.Hour)
			}
		}
	}
	for p := range s.adds {
		if !places[p] {
			delete(s.adds, p)
			delete(s.parts, p)
			continue
		}
		// Of what counts perhaps, what they have counts.
		var best *given
		permanent := false
		for i := range s.nodes {
			e, ok := all[i][p]
			if !ok {
				continue
			}
			if e.Timeout == 0 {
				permanent = true
				continue
			}
			timeout, expires := time.Duration(e.Timeout*float64(time.Second)), time.Duration(e.Expires*float64(time.Second))
			g := &given{node: -1, early: at.Add(expires - timeout), late: at.Add(expires - timeout), timeout: timeout}
			if best == nil || g.until().After(best.until()) {
				best = g
			}
		}
		// A permanent trust is one elsewhere that ends, and is renewed.
		now := []*given{best}
		for _, g := range s.adds[p] {
			switch {
			case g.timeout == 0 && (permanent || !g.perhaps):
				now = []*given{{node: -1, early: g.early, late: g.late}}
			case g.timeout == 0 && p.list == "trusted" && best.timeout >= 24*time.Hour:
				now = append(now, &given{node: -1, early: g.early, late: g.late, perhaps: true})
			}
		}
		s.adds[p] = slices.DeleteFunc(now, func(g *given) bool { return g == nil })
	}
}

// differ returns in what the machines differ from each other or from the model.
func (s *soak) differ(at time.Time, all [3]map[place]element) error {
	// If somebody sets this machine's clock, which is the engine's, what machines got
	// before and after it ends that much apart.
	tolerance := tolerance + (time.Since(s.begin) - time.Now().Round(0).Sub(s.begin.Round(0))).Abs()
	var diffs []string
	places := make(map[place]bool)
	for i := range all {
		for p := range all[i] {
			places[p] = true
		}
	}
	for p := range s.adds {
		places[p] = true
	}
	for p := range places {
		// The ends that are allowed: of what certainly counts the latest, and of what
		// counts perhaps each that is later.
		var certain time.Time
		var permanent, perhapsPermanent bool
		var ends []time.Time
		for _, g := range s.adds[p] {
			switch {
			case g.timeout == 0 && g.perhaps:
				perhapsPermanent = true
			case g.timeout == 0:
				permanent = true
			case g.perhaps:
				ends = append(ends, g.until())
			case g.until().After(certain):
				certain = g.until()
			}
		}
		ends = slices.DeleteFunc(ends, func(end time.Time) bool { return end.Before(certain) })
		if !certain.IsZero() {
			ends = append(ends, certain)
		}
		over := certain.Before(at.Add(tolerance)) // what lasts certainly is over, or nearly
		present := 0
		var first, last float64
		ever := false
		for i, n := range s.nodes {
			e, ok := all[i][p]
			if !ok {
				continue
			}
			present++
			if e.Timeout == 0 {
				if !permanent && !perhapsPermanent {
					diffs = append(diffs, fmt.Sprintf("%s: %v never ends", n.name, p))
				}
				ever = true
				continue
			}
			if present == 1 || last == 0 {
				first, last = e.Expires, e.Expires
			}
			first, last = min(first, e.Expires), max(last, e.Expires)
			// A permanent trust is here one of a day, again and again.
			right := (permanent || perhapsPermanent) && p.list == "trusted" && e.Expires > 22.9*3600
			for _, end := range ends {
				left := end.Sub(at).Seconds()
				little := min(e.Timeout/24, 3600) + tolerance.Seconds()
				right = right || !permanent && e.Expires < left+tolerance.Seconds() && e.Expires > left-little
			}
			if !right {
				diffs = append(diffs, fmt.Sprintf("%s: %v has %v s left", n.name, p, e.Expires))
			}
		}
		if present != 0 && present != len(s.nodes) && last > tolerance.Seconds() || present != len(s.nodes) && ever {
			diffs = append(diffs, fmt.Sprintf("%v is on %d machines", p, present))
		}
		if present == 0 && (permanent || !over) {
			diffs = append(diffs, fmt.Sprintf("%v is missing", p))
		}
		if ever && p.list == "banned" && last != 0 {
			diffs = append(diffs, fmt.Sprintf("%v ends on some machines", p))
		}
		if !ever && last-first > min(last/20, 3600)+tolerance.Seconds() {
			diffs = append(diffs, fmt.Sprintf("%v has %v to %v s left", p, first, last))
		}
	}
	if len(diffs) == 0 {
		return nil
	}
	slices.Sort(diffs)
	s.wrong = nil
	for p := range places {
		if slices.ContainsFunc(diffs, func(d string) bool { return strings.Contains(d, p.String()+" ") }) {
			s.wrong = append(s.wrong, p)
		}
	}
	var known []string
	for p, all := range s.adds {
		for _, g := range all {
			if slices.ContainsFunc(diffs, func(d string) bool { return strings.Contains(d, p.String()) }) {
				known = append(known, fmt.Sprintf("%v: of %d at %s for %v, perhaps %v, weak %v", p, g.node, g.late.Format("05.000"), g.timeout, g.perhaps, g.weak))
			}
		}
	}
	slices.Sort(known)
	return fmt.Errorf("%s\nthe model:\n%s", strings.Join(diffs[:min(len(diffs), 12)], "\n"), strings.Join(known[:min(len(known), 30)], "\n"))
}

// silent waits until nobody sends anything, and checks that it stays so.
func (s *soak) silent() {
	length := func() string {
		return s.engine.Do("HGET", "nftwl:{mail}:trusted:meta", "sequence") + " " + s.engine.Do("HGET", "nftwl:{mail}:banned:meta", "sequence")
	}
	now, since := length(), time.Now()
	nstest.Until(s.t, "the logs to stay as they are", func() error {
		if next := length(); next != now {
			now, since = next, time.Now()
		}
		if time.Since(since) < 5*time.Second { // a machine reads all after at most 3 s
			return fmt.Errorf("%s", now)
		}
		return nil
	})
	if s.random.IntN(2) == 0 { // and all machines read all
		for _, n := range s.nodes {
			before := n.metric("cluster_merges")
			nstest.Must(s.t, n.cmd.Process.Signal(syscall.SIGHUP))
			nstest.Poll(s.t, n.name+" to read all", func() bool { return n.metric("cluster_merges") >= before+2 })
		}
		time.Sleep(time.Second)
	}
	if next := length(); next != now {
		s.t.Errorf("the logs were %s and are %s, although nothing happened", now, next)
	}
}
