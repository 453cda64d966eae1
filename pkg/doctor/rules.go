package doctor

import (
	"cmp"
	"context"
	"fmt"
	"maps"
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

// The rules are tried on packets, in a copy: there are as many ways to write a
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
	for _, ipv6 := range []bool{false, true} {
		// Empty too where IPv6 is in the kernel and switched off.
		if addresses, _ := os.ReadFile("/proc/thread-self/net/if_inet6"); ipv6 && len(addresses) == 0 {
			d.skip("rules.ipv6", "IPv6 is off in the kernel")
			break
		}
		if f := d.family(ipv6); f != nil {
			p.families = append(p.families, f)
		}
	}
	if len(p.families) == 0 {
		d.rulesElsewhere(p.copy)
		return
	}
	p.checkOpen(ports)
	if p.mute && !p.opened {
		p.fail("rules.established", remedy{"accept in the chains of hook output: ct state established,related accept", "nft -a list ruleset"},
			"rules of hook output drop what this machine answers to new connections, so none works")
		return
	}
	if p.cut != nil && !p.opened {
		p.fail("rules.established", p.accept(p.cut), "%s drops all but the first packet of connections, so none works", p.rule(p.cut.Step))
		return
	}
	// Before a limit of everybody's has counted what the other checks send.
	banned := p.settle(p.banned)
	limit, well := p.limits()
	trusted := p.settle(p.trusted)
	for i := range trusted {
		// One jump does away with both.
		if t, b := &trusted[i], &banned[i]; t.jump && b.jump {
			t.text, t.remedy = t.text+"; "+b.text, b.remedy
			*b = finding{status: told}
		}
	}
	p.conclude("rules.trusted", "a trusted address is let in, also when it is banned or over the limit", trusted)
	p.conclude("rules.banned", "a banned address is kept out", banned)
	p.concludeAll("rules.established", "open connections outlive a ban and the end of a trust", p.settle(p.established))
	switch {
	case slices.ContainsFunc(limit, isBad):
		p.concludeAll("rules.limit", well, limit)
	case !slices.ContainsFunc(d.config.Ports, submits):
		p.skip("rules.limit", "no port of submission is among the ports of the configuration")
	case slices.ContainsFunc(slices.Collect(maps.Keys(p.past)), func(k key) bool { return submits(k.port) }):
		p.skip("rules.limit", "strangers are let in as banned addresses are: see rules.banned")
	default:
		p.concludeAll("rules.limit", well, limit)
	}
	p.checkStrangers()
	p.checkUnseen()
	if p.err != nil {
		p.skip("rules", "not all rules could be tried: %v", p.err)
	}
}

// rulesElsewhere says that the sets are not where the configuration has them.
func (d *Doctor) rulesElsewhere(c *firewall.Copy) {
	for _, table := range c.Tables(d.config.Trusted.IPv4) {
		if table != d.config.Table {
			d.fail("rules", remedy{words: fmt.Sprintf("if those rules are the ones in use, put into %s: table: %s", cmp.Or(d.ConfigPath, config.Path), table)},
				"table %s lacks the sets, and table %s has one named %s", d.config.Table, table, d.config.Trusted.IPv4)
			return
		}
	}
	d.skip("rules", "table %s lacks the sets that they would look up", d.config.Table)
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
	trusted, banned *nftset.Set
}

// family returns nil where the family's sets are missing or of no use, as the
// checks of the sets have said.
func (d *Doctor) family(ipv6 bool) *family {
	f := &family{name: "IPv4"}
	any := sources4.Addr()
	if ipv6 {
		f.name, any = "IPv6", sources6.Addr()
	}
	d.conn.SetDeadline(time.Now().Add(patience))
	for set, name := range map[**nftset.Set]string{&f.trusted: d.config.Trusted.For(any), &f.banned: d.config.Banned.For(any)} {
		var err error
		if *set, err = d.conn.Set(d.config.Table, name); err != nil || (*set).Key.IPv6 != ipv6 || (*set).Constant {
			return nil
		}
	}
	return f
}

// Packets come from these, and never leave the copy. Firewalls often drop
// addresses of the documentation.
var (
	sources4 = netip.MustParsePrefix("100.240.0.0/12")
	sources6 = netip.MustParsePrefix("2a00:ffff::/32")
)

// source returns an address that was not used before, nor its /24 or /48. Its
// other bits are ones, so that a mask shows.
func (p *probe) source(f *family) netip.Addr {
	p.sources++
	high, low := byte(p.sources>>8), byte(p.sources)
	if f.name == "IPv4" {
		return netip.AddrFrom4([4]byte{100, 240 | high, low, 255})
	}
	a := [16]byte{0x2a, 0, 0xff, 0xff, high, low}
	for i := 6; i < len(a); i++ {
		a[i] = 0xff
	}
	return netip.AddrFrom16(a)
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

// told is the status of what another finding tells.
const told Status = "told"

func isBad(f finding) bool { return f.status != "" }

// settle asks a question about each port for each family, and returns a finding
// for each family: the worst, with the ports that it is true of.
func (p *probe) settle(ask func(f *family, port uint16) finding) (findings []finding) {
	for _, f := range p.families {
		findings = append(findings, p.worst(p.config.Ports, func(port uint16) finding { return ask(f, port) }))
	}
	return findings
}

func (p *probe) worst(ports []uint16, ask func(port uint16) finding) (worst finding) {
	var of []uint16
	for _, port := range ports {
		f := ask(port)
		switch {
		case f == worst && f.status != "":
			of = append(of, port)
		case f.status == Fail && worst.status != Fail, f.status == Warn && worst.status == "":
			worst, of = f, []uint16{port}
		}
	}
	if worst.status != "" {
		worst.text = portList(of) + ": " + worst.text
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

// conclude reports the findings of the families, each by itself, unless they
// are one and the same.
func (p *probe) conclude(check, well string, findings []finding) {
	if len(findings) == 2 && findings[0] == findings[1] && isBad(findings[0]) {
		findings = findings[:1]
	}
	for i, f := range findings {
		p.say(check+"."+strings.ToLower(p.families[i].name), well, f)
	}
}

// concludeAll reports the worst of the findings.
func (p *probe) concludeAll(check, well string, findings []finding) {
	var worst finding
	for i, f := range findings {
		if f.status == Fail && worst.status != Fail || f.status == Warn && worst.status == "" {
			if worst = f; len(findings) == 2 && findings[0] != findings[1] {
				worst.text = p.families[i].name + ", " + f.text
			}
		}
	}
	p.say(check, well, worst)
}

func (p *probe) say(check, well string, f finding) {
	switch {
	case p.err != nil || f.status == told: // an error says nothing of the rules
	case isBad(f):
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
	whole, stored := 32, 32
	if f.name == "IPv6" {
		whole, stored = 128, p.config.IPv6Prefix
	}
	length := func(bits int) string {
		if bits == whole {
			return "single addresses"
		}
		return fmt.Sprintf("the /%d", bits)
	}
	for bits := whole; bits > 0 && p.err == nil; bits-- {
		addr := p.source(f)
		element := prefix(addr, bits)
		if bits == stored || element == trust.Network(p.config, addr) {
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
		text := fmt.Sprintf("the rules look up %s in %s, and nftwl stores %s", length(bits), set.Name, length(stored))
		if whole == 32 {
			return finding{status: Fail, text: text, remedy: remedy{words: "look up ip saddr as it is, without a mask"}}
		}
		return finding{status: Fail, text: fmt.Sprintf("%s: ipv6_prefix is %d", text, stored),
			remedy: remedy{words: "make the mask of the rule and ipv6_prefix in " + cmp.Or(p.ConfigPath, config.Path) + " equal"}}
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
	if m := p.masked(f, f.trusted, port, r.Verdict, true); isBad(m) {
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
		if m := p.masked(f, f.banned, port, r.Verdict, false); isBad(m) {
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

// limits asks how strangers are limited, and returns a finding for each family,
// and what to say where all is well.
func (p *probe) limits() (findings []finding, well string) {
	well = "strict: strangers are dropped"
	ports := slices.Clone(submission)
	for _, port := range p.config.Ports {
		if submits(port) && !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
	}
	for _, f := range p.families {
		findings = append(findings, p.worst(ports, func(port uint16) finding {
			if p.open[key{f, port}].Verdict != firewall.Accept || p.past[key{f, port}] {
				return finding{}
			}
			if !slices.Contains(p.config.Ports, port) {
				return finding{status: Warn, text: "strangers are let in, and `ports` lacks it: nobody is trusted there, and banned addresses are let in",
					remedy: remedy{words: "add the port to `ports` in " + cmp.Or(p.ConfigPath, config.Path) + ", or close it"}}
			}
			well = "a stranger above the limit is dropped and banned, each source by itself"
			return p.limit(f, port)
		}))
	}
	return findings, well
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

// A login by IMAP or POP3 is what makes a stranger known, so one of these ports
// must be open to strangers.
func (p *probe) checkStrangers() {
	var findings []finding
	shut := 0
	for _, f := range p.families {
		one := finding{}
		if !slices.ContainsFunc(mailboxes, func(port uint16) bool { return p.open[key{f, port}].Verdict == firewall.Accept }) {
			r := p.open[key{f, mailboxes[1]}]
			one = finding{status: Fail, text: portList(mailboxes) + ": " + p.rule(r.Step) + " drops who is not trusted yet, so nobody new can log in",
				remedy: remedy{"accept new connections to those ports of IMAP or POP3 that are in use", "nft -a list chain " + nftName(r.Table) + " " + quote(r.Chain)}}
			shut++
		}
		findings = append(findings, one)
	}
	if shut == 1 && len(findings) == 2 { // they get in by the other family
		for i := range findings {
			if isBad(findings[i]) {
				findings[i].status = Warn
			}
		}
	}
	p.concludeAll("rules.strangers", "strangers can open connections to log in by IMAP or POP3", findings)
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
