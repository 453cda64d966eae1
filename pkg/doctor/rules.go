package doctor

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/firewall"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

// checkRules tries the rules on packets, in a copy: there are as many ways to write a
// firewall as there are administrators.
func (d *Doctor) checkRules(context.Context) {
	if d.conn == nil {
		d.skip("rules", "nftables cannot be read")
		return
	}
	p := &probe{Doctor: d, open: make(map[key]*firewall.Result), past: make(map[key]bool), asked: make(map[*nftset.Set]bool)}
	ports := slices.Concat(d.config.Ports, mailboxes, submission)
	slices.Sort(ports)
	ports = slices.Compact(ports)
	var err error
	if p.copy, err = firewall.Open([]netip.Prefix{sources4, sources6}, ports); err != nil {
		d.skip("rules", "the rules cannot be tried: %v", err)
		return
	}
	defer p.copy.Close()
	p.findFamilies()
	if len(p.families) == 0 {
		d.skip("rules", "table %s lacks the sets that they would look up", d.config.Table)
		return
	}
	p.checkOpen(ports)
	switch {
	case p.opened:
	case p.mute:
		p.fail("rules.established", remedy{"accept in the chains of hook output: ct state established,related accept", "nft -a list ruleset"},
			"rules of hook output drop what this machine answers to new connections, so none works")
		return
	case p.cut != nil:
		p.fail("rules.established", p.accept(p.cut), "%s drops all but the first packet of connections, so none works", p.rule(p.cut.Step))
		return
	}
	// A limit that all sources share counts what these send: it comes first.
	banned := p.worst(d.config.Ports, p.banned)
	limit, well := p.limits()
	trusted := p.worst(d.config.Ports, p.trusted)
	both := trusted.jump && banned.jump // one jump fixes both
	if both {
		trusted.text, trusted.remedy = trusted.text+"; "+banned.text, banned.remedy
	}
	p.say("rules.trusted", "a trusted address is let in, also when it is banned or over the limit", trusted)
	if !both {
		p.say("rules.banned", "a banned address is kept out", banned)
	}
	p.say("rules.established", "open connections outlive a ban and the end of a trust", p.worst(d.config.Ports, p.established))
	past := false
	for k := range p.past {
		past = past || submits(k.port)
	}
	switch {
	case limit.status == "" && !slices.ContainsFunc(d.config.Ports, submits):
		p.skip("rules.limit", "no port of submission is among the ports of the configuration")
	case limit.status == "" && past:
		p.skip("rules.limit", "strangers are let in as banned addresses are: see rules.banned")
	default:
		p.say("rules.limit", well, limit)
	}
	p.checkStrangers()
	p.checkUnseen()
	if p.err != nil {
		p.skip("rules", "not all rules could be tried: %v", p.err)
	}
}

// The ports at which mail is read, and mailboxes are managed: whoever is not
// trusted yet must reach one of them, and mail readers open too many connections
// at once for a limit. At others passwords are guessed and, once guessed, spam
// is sent.
var (
	mailboxes  = []uint16{110, 143, 993, 995}
	submission = []uint16{465, 587}
)

func submits(port uint16) bool {
	return port != 25 && port != 4190 && !slices.Contains(mailboxes, port)
}

// A probe sends packets to a copy of the rules.
type probe struct {
	*Doctor
	copy     *firewall.Copy
	families []*family
	sources  int                      // that were used
	open     map[key]*firewall.Result // what a stranger met first
	past     map[key]bool             // where banned addresses are let in
	asked    map[*nftset.Set]bool     // whether the rules mask what they look up, which they do not
	opened   bool                     // a connection was
	mute     bool                     // the machine, to the first connection that was let in
	cut      *firewall.Result         // that did not let in what follows a first packet
	err      error                    // the first; what follows it is not known
}

type key struct {
	*family
	port uint16
}

// A family is IPv4 or IPv6, with its sets.
type family struct {
	name            string // "IPv4"
	sources         netip.Prefix
	trusted, banned *nftset.Set
}

// Packets come from these, and never leave the copy. Firewalls often drop
// addresses of the documentation.
var (
	sources4 = netip.MustParsePrefix("100.240.0.0/12")
	sources6 = netip.MustParsePrefix("2a00:ffff::/32")
)

// findFamilies finds those that are in use. One whose sets are missing or of no
// use is left out: the checks of the sets say so.
func (p *probe) findFamilies() {
	for _, f := range []*family{{name: "IPv4", sources: sources4}, {name: "IPv6", sources: sources6}} {
		// Empty too where IPv6 is in the kernel and switched off.
		if addresses, _ := os.ReadFile("/proc/thread-self/net/if_inet6"); f.sources == sources6 && len(addresses) == 0 {
			p.skip("rules.ipv6", "IPv6 is off in the kernel")
			return
		}
		usable := true
		set := func(names config.Names) *nftset.Set {
			p.conn.SetTimeout(patience)
			set, err := p.conn.Set(p.config.Table, names.For(f.sources.Addr()))
			usable = usable && err == nil && set.Key.IPv6 == f.sources.Addr().Is6()
			return set
		}
		f.trusted, f.banned = set(p.config.Trusted), set(p.config.Banned)
		if usable {
			p.families = append(p.families, f)
		}
	}
}

// source returns an address that was not used before, nor its /24 or /48. Its
// other bits are ones, so that a mask shows.
func (p *probe) source(f *family) netip.Addr {
	p.sources++
	b, at := f.sources.Addr().AsSlice(), f.sources.Bits()/8
	b[at], b[at+1] = b[at]|byte(p.sources>>8), byte(p.sources)
	for i := at + 2; i < len(b); i++ {
		b[i] = 0xff
	}
	addr, _ := netip.AddrFromSlice(b) // of one of the two lengths
	return addr
}

// put adds an address to a set of the copy, or removes it.
func (p *probe) put(set *nftset.Set, addr netip.Addr, remove bool) {
	batch := p.copy.Conn().Batch()
	for _, e := range trust.Elements(set, addr, p.config.Ports, nftset.Element{Timeout: time.Hour}) {
		if remove {
			batch.Delete(set, e.Key)
		} else {
			batch.Add(set, e)
		}
	}
	p.copy.Conn().SetTimeout(patience)
	p.note(batch.Commit())
}

func (p *probe) note(err error) {
	if p.err == nil {
		p.err = err
	}
}

// ban bans an address and its /64, as the rules' own limit does.
func (p *probe) ban(f *family, addr netip.Addr) {
	p.put(f.banned, trust.Network(p.config, addr), false)
	if addr.Is6() {
		p.put(f.banned, prefix(addr, 64), false)
	}
}

func prefix(addr netip.Addr, bits int) netip.Addr {
	p, _ := addr.Prefix(bits) // fails only for bits out of range
	return p.Addr()
}

// connect opens a connection, with the whole handshake, and returns what became
// of it: of its first packet, unless the last was not let in.
func (p *probe) connect(addr netip.Addr, port uint16) (*firewall.Connection, *firewall.Result) {
	conn, result, err := p.copy.Dial(addr, port)
	if err == nil && result.Verdict == firewall.Accept && !p.mute {
		last, answered, e := conn.Open()
		switch {
		case e != nil:
			err = e
		case !answered && p.opened:
			err = fmt.Errorf("port %d does not answer %s", port, addr)
		case !answered:
			p.mute = true
		case last.Verdict != firewall.Accept:
			result, p.cut = last, last
		default:
			p.opened = true
		}
	}
	if p.note(err); p.err != nil { // what follows is not reported
		result = &firewall.Result{Verdict: firewall.Accept}
	}
	return conn, result
}

// exceed opens more connections than a limit takes at once, until one is not let
// in, and returns that; nil where all are.
func (p *probe) exceed(addr netip.Addr, port uint16) *firewall.Result {
	attempts := 20
	if submits(port) { // where a limit can be one of whole networks, too
		attempts = 60
	}
	for range attempts {
		if _, r := p.connect(addr, port); r.Verdict != firewall.Accept {
			return r
		}
	}
	return nil
}

// A finding is what is wrong; the zero value, nothing.
type finding struct {
	status Status
	text   string
	remedy remedy
	jump   bool // is the remedy
}

// worst asks a question about each port of each family, and returns the worst
// finding, with the ports that it is true of.
func (p *probe) worst(ports []uint16, ask func(f *family, port uint16) finding) (worst finding) {
	var families []*family
	var of []uint16
	for _, f := range p.families {
		for _, port := range ports {
			found := ask(f, port)
			switch {
			case found.status == "":
				continue
			case found == worst:
			case worst.status == "", found.status == Fail && worst.status == Warn:
				worst, families, of = found, nil, nil
			default:
				continue
			}
			families = append(families, f)
			if !slices.Contains(of, port) {
				of = append(of, port)
			}
		}
	}
	if worst.status != "" {
		worst.text = portList(of) + ": " + worst.text
		if families[0] == families[len(families)-1] && len(p.families) > 1 {
			worst.text = families[0].name + ", " + worst.text
		}
	}
	return worst
}

func portList(ports []uint16) string {
	words := make([]string, len(ports))
	for i, port := range ports {
		words[i] = fmt.Sprint(port)
	}
	if len(words) == 1 {
		return "port " + words[0]
	}
	return "ports " + strings.Join(words, ", ")
}

// say reports a finding, or that all is well. After an error it reports nothing: what
// has been found since says nothing of the rules.
func (p *probe) say(check, well string, f finding) {
	switch {
	case p.err != nil:
	case f.status != "":
		p.report(Result{check, f.status, f.text, f.remedy.words, f.remedy.command})
	default:
		p.ok(check, "%s", well)
	}
}

// rule names what decided.
func (p *probe) rule(s firewall.Step) string {
	where := fmt.Sprintf("chain %s of table %s", s.Chain, s.Table)
	switch {
	case s.Chain == "":
		return "no chain of hook input"
	case s.Rule == nil:
		return "the policy of " + where
	case s.Rule.Comment != "":
		return fmt.Sprintf("rule %d (%q) in %s", s.Rule.Handle, s.Rule.Comment, where)
	}
	return fmt.Sprintf("rule %d (%s) in %s", s.Rule.Handle, p.copy.Text(s), where)
}

// before adds to a finding how to have a set looked up before a step decides.
func (p *probe) before(f finding, s firewall.Step, set *nftset.Set) finding {
	chain := nftName(s.Table) + " " + quote(s.Chain)
	f.remedy.command = "nft -a list chain " + chain
	user, base := p.copy.Lookup(set.Table, set.Name)
	switch {
	case s.Forwarded() && s.Verdict == firewall.Accept:
		f.remedy.words = "the port is a container's: look at its packets before they are sent there, as containers.md says"
	case s.Table != set.Table:
		f.remedy.words = "open the port there too: a drop is final, and an accept holds for its own chain alone"
	case user == nil:
		f.remedy = remedy{"load rules that look the sets up, as nftwl.nft does, and put a jump to them before that", "nftwl setup nftables"}
	case base || user.Chain == s.Chain:
		f.remedy.words = "look up " + set.Name + " before that, as nftwl.nft does"
	case s.Rule == nil:
		f.jump, f.remedy = true, remedy{fmt.Sprintf("put `jump %s` into chain %s, in the file that makes it, too", user.Chain, s.Chain),
			fmt.Sprintf("nft add rule %s jump %s", chain, quote(user.Chain))}
	default:
		f.jump, f.remedy = true, remedy{fmt.Sprintf("put `jump %s` above it, in the file that makes the chain, too", user.Chain),
			fmt.Sprintf("nft insert rule %s position %d jump %s", chain, s.Rule.Handle, quote(user.Chain))}
	}
	return f
}

func nftName(t nftset.Table) string { return t.Family.String() + " " + quote(t.Name) }

// masked describes rules that look a set up by other bits of an address than
// nftwl stores, if there are any: with the element that they do look up, the
// verdict is another.
func (p *probe) masked(f *family, set *nftset.Set, port uint16, was firewall.Verdict, ban bool) finding {
	if p.asked[set] { // at another port
		return finding{}
	}
	whole := f.sources.Addr().BitLen()
	length := func(bits int) string {
		if bits == whole {
			return "single addresses"
		}
		return fmt.Sprintf("the /%d", bits)
	}
	for bits := whole; bits > 0 && p.err == nil; bits-- {
		addr := p.source(f)
		element, stored := prefix(addr, bits), trust.Network(p.config, addr)
		if element == stored {
			continue
		}
		if ban {
			p.ban(f, addr)
		}
		p.put(set, element, false)
		_, r := p.connect(addr, port)
		p.put(set, element, true)
		if (r.Verdict == firewall.Accept) == (was == firewall.Accept) {
			continue
		}
		text := fmt.Sprintf("the rules look up %s in %s, and nftwl stores ", length(bits), set.Name)
		if whole == 32 {
			return finding{status: Fail, text: text + length(whole), remedy: remedy{words: "look up ip saddr as it is, without a mask"}}
		}
		return finding{status: Fail, text: fmt.Sprintf("%s%s: ipv6_prefix is %d", text, length(p.config.IPv6Prefix), p.config.IPv6Prefix),
			remedy: remedy{words: "make the mask of the rule and ipv6_prefix in " + p.configPath() + " equal"}}
	}
	p.asked[set] = p.err == nil
	return finding{}
}

// checkOpen asks what a stranger meets first, at each port. There is no more to
// say of a family for which every port is open, whoever is banned.
func (p *probe) checkOpen(ports []uint16) {
	var without []string
	p.families = slices.DeleteFunc(p.families, func(f *family) bool {
		open := func(r *firewall.Result) bool { return r.Verdict == firewall.Accept && r.Rule == nil && p.err == nil }
		all := true
		for _, port := range ports {
			_, r := p.connect(p.source(f), port)
			p.open[key{f, port}] = r
			all = all && open(r)
		}
		if all {
			addr := p.source(f)
			p.ban(f, addr)
			_, r := p.connect(addr, p.config.Ports[0])
			all = open(r)
		}
		if all {
			without = append(without, f.name)
		}
		return all
	})
	if len(without) > 0 {
		p.fail("rules", remedy{"jump to nftwl's chain from one of hook input, as nftables.conf does", "nftwl setup nftables"},
			"this machine has no input firewall for %s: every port is open", strings.Join(without, " and "))
	}
}

func (p *probe) trusted(f *family, port uint16) finding {
	addr := p.source(f)
	p.put(f.trusted, trust.Network(p.config, addr), false)
	p.ban(f, addr)
	r := p.exceed(addr, port)
	if r == nil {
		return finding{}
	}
	if m := p.masked(f, f.trusted, port, r.Verdict, true); m.status != "" {
		return m
	}
	text := p.rule(r.Step) + " drops trusted addresses"
	if r.Table != f.trusted.Table {
		text += fmt.Sprintf(", whatever table %s accepts", f.trusted.Table)
	}
	return p.before(finding{status: Fail, text: text}, r.Step, f.trusted)
}

func (p *probe) banned(f *family, port uint16) finding {
	addr := p.source(f)
	p.put(f.banned, trust.Network(p.config, addr), false)
	if _, r := p.connect(addr, port); r.Verdict == firewall.Accept {
		if m := p.masked(f, f.banned, port, r.Verdict, false); m.status != "" {
			return m
		}
		step := r.Step
		for _, s := range r.Path { // the last that accepts can be another table's
			if s.Verdict == firewall.Accept && s.Table == f.banned.Table {
				step = s
			}
		}
		p.past[key{f, port}] = true
		return p.before(finding{status: Fail, text: p.rule(step) + " lets banned addresses in"}, step, f.banned)
	}
	if f.name == "IPv6" {
		addr := p.source(f)
		p.put(f.banned, prefix(addr, 64), false)
		if _, r := p.connect(addr, port); r.Verdict == firewall.Accept {
			return finding{status: Warn, text: "a banned /64 is not kept out, as the rules look up single addresses alone in " + f.banned.Name,
				remedy: remedy{words: "look up the /64 too, as banned.nft does: who has a /64 has 2^64 addresses to come from"}}
		}
	}
	return finding{}
}

func (p *probe) established(f *family, port uint16) finding {
	addr := p.source(f)
	p.put(f.trusted, trust.Network(p.config, addr), false)
	conn, r := p.connect(addr, port)
	if r.Verdict != firewall.Accept || p.err != nil {
		return finding{} // which is rules.trusted's to say
	}
	p.put(f.trusted, trust.Network(p.config, addr), true)
	p.ban(f, addr)
	r, err := conn.Send()
	if p.note(err); err != nil || r.Verdict == firewall.Accept {
		return finding{}
	}
	return finding{status: Warn, text: "a ban, or the end of a trust, cuts open connections: " + p.rule(r.Step) + " drops them",
		remedy: p.accept(r)}
}

// accept returns how to keep connections open that a result cut.
func (p *probe) accept(r *firewall.Result) remedy {
	const rule = "ct state established,related accept"
	return remedy{"put first into the chain of hook input, in the file that makes it, too: " + rule,
		"nft insert rule " + nftName(r.Table) + " " + quote(r.Chain) + " " + rule}
}

// limits asks how strangers are limited, and returns what to say where all is well,
// too.
func (p *probe) limits() (worst finding, well string) {
	well = "strict: strangers are dropped"
	ports := slices.Concat(submission, p.config.Ports)
	slices.Sort(ports)
	ports = slices.DeleteFunc(slices.Compact(ports), func(port uint16) bool { return !submits(port) })
	worst = p.worst(ports, func(f *family, port uint16) finding {
		switch {
		case p.open[key{f, port}].Verdict != firewall.Accept || p.past[key{f, port}]:
			return finding{}
		case !slices.Contains(p.config.Ports, port):
			return finding{status: Warn, text: "strangers are let in, and `ports` lacks it: nobody is trusted there, and banned addresses are let in",
				remedy: remedy{words: "add the port to `ports` in " + p.configPath() + ", or close it"}}
		}
		well = "a stranger above the limit is dropped and banned, each source by itself"
		return p.limit(f, port)
	})
	return worst, well
}

func (p *probe) limit(f *family, port uint16) finding {
	limit := remedy{words: "limit each source by itself and ban who exceeds it, as submission.nft does on the ports that nftwl_submission_ports lists"}
	addr := p.source(f)
	over := p.exceed(addr, port)
	if over == nil {
		return finding{status: Warn, text: "strangers are let in without a limit", remedy: limit}
	}
	if _, r := p.connect(p.source(f), port); r.Verdict != firewall.Accept {
		return finding{status: Warn, text: "the limit is one for all sources together, so an attacker has others dropped or banned: " + p.rule(r.Step), remedy: limit}
	}
	_, next, err := p.copy.Dial(addr, port)
	if p.note(err); err != nil || next.Verdict != firewall.Accept && next.Rule != over.Rule {
		return finding{}
	}
	for _, name := range []string{f.banned.Name, "limited_" + strings.ToLower(f.name)} {
		for _, a := range []netip.Addr{addr, prefix(addr, min(64, addr.BitLen()))} {
			set, err := p.copy.Conn().Set(f.banned.Table, name)
			if err != nil {
				continue // the rules need not have it
			}
			found, err := p.copy.Conn().Lookup(set, trust.Keys(set, a, []uint16{port})...)
			if p.note(err); len(found) > 0 {
				return finding{status: Fail, text: fmt.Sprintf("the limit adds %s to %s, and no rule drops it for that", a, name),
					remedy: remedy{words: "mask alike what rules add to " + name + " and what they look up there, and drop it before any accept"}}
			}
		}
	}
	return finding{status: Warn, text: p.rule(over.Step) + " drops what is over the limit, and no rule bans the source", remedy: limit}
}

// checkStrangers asks whether a stranger can become known: by a login by IMAP or
// POP3, so one of these ports must be open to strangers.
func (p *probe) checkStrangers() {
	var shut []*family
	for _, f := range p.families {
		if !slices.ContainsFunc(mailboxes, func(port uint16) bool { return p.open[key{f, port}].Verdict == firewall.Accept }) {
			shut = append(shut, f)
		}
	}
	var found finding
	if len(shut) > 0 {
		r := p.open[key{shut[0], mailboxes[1]}]
		found = finding{status: Fail, text: portList(mailboxes) + ": " + p.rule(r.Step) + " drops who is not trusted yet, so nobody new can log in",
			remedy: remedy{"accept new connections to those ports of IMAP or POP3 that are in use", "nft -a list chain " + nftName(r.Table) + " " + quote(r.Chain)}}
	}
	if len(shut) < len(p.families) && len(shut) > 0 { // they get in by the other family
		found.status, found.text = Warn, shut[0].name+", "+found.text
	}
	p.say("rules.strangers", "strangers can open connections to log in by IMAP or POP3", found)
}

// checkUnseen names what is not in the copy. There mostly is nothing, which
// needs no line.
func (p *probe) checkUnseen() {
	unseen := slices.Clone(p.copy.Omitted)
	for _, ip := range []string{"ip", "ip6"} {
		names, _ := os.ReadFile("/proc/thread-self/net/" + ip + "_tables_names") // without it, the kernel has none
		for _, table := range strings.Fields(string(names)) {
			unseen = append(unseen, fmt.Sprintf("table %s of %stables-legacy", table, ip))
		}
	}
	if len(unseen) > 0 {
		p.skip("rules.unseen", "these could not be tried, and may drop what the other rules accept: %s", strings.Join(unseen, "; "))
	}
}
