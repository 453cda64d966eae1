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
	ports := slices.Concat(d.config.Ports, mailboxes, submission)
	slices.Sort(ports)
	ports = slices.Compact(ports)
	rules, err := firewall.Open([]netip.Prefix{sources4, sources6}, ports)
	if err != nil {
		d.skip("rules", "the rules cannot be tried: %v", err)
		return
	}
	defer rules.Close()
	p := &probe{Doctor: d, copy: rules, open: make(map[key]*firewall.Result)}
	p.findFamilies()
	if len(p.families) == 0 {
		d.skip("rules", "table %s lacks the sets that they would look up", d.config.Table)
		return
	}
	p.checkOpen(ports)
	if p.cut != nil && !p.opened {
		const rule = "ct state established,related accept"
		p.fail("rules.established", remedy{"put it first into the chain of hook input, in the file that makes it, too: " + rule, "nft insert rule " + chain(p.cut.Step) + " " + rule},
			"%s drops all but the first packet of connections, so none works", p.rule(p.cut.Step))
		return
	}
	// In this order: a limit that all sources share counts what trusted ones send, too.
	banned := p.worst(d.config.Ports, p.banned)
	limit := p.worst(slices.DeleteFunc(ports, func(port uint16) bool { return !submits(port) }), p.limited)
	trusted := p.worst(d.config.Ports, p.trusted)
	both := trusted.status != "" && trusted.remedy == banned.remedy // one cause
	if both {
		trusted.text += "; " + banned.text
	}
	p.say("rules.trusted", "a trusted address is let in, even if it is banned or over the limit", trusted)
	if !both {
		p.say("rules.banned", "a banned address is kept out", banned)
	}
	if banned.status != Fail { // or those over the limit are let in, too
		p.say("rules.limit", "strangers are limited, each source separately, or dropped", limit)
	}
	p.checkStrangers()
	p.checkUnseen()
	if p.err != nil {
		p.skip("rules", "not all rules could be tried: %v", p.err)
	}
}

// The ports at which mail is read: whoever is not trusted yet must reach one of
// them, and mail readers open too many connections at once for a limit. At others
// passwords are guessed and, once guessed, spam is sent.
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
	opened   bool                     // a connection was
	cut      *firewall.Result         // what dropped a packet after the first
	err      error                    // the first; nothing is sent after it
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

// findFamilies finds those whose sets can be used; the checks of the sets report the
// others.
func (p *probe) findFamilies() {
	for _, f := range []*family{{name: "IPv4", sources: sources4}, {name: "IPv6", sources: sources6}} {
		// Empty too if IPv6 is switched off.
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

// trust trusts an address, or the network that holds it, in the copy.
func (p *probe) trust(f *family, addr netip.Addr) {
	p.put(f.trusted, trust.Network(p.config, addr))
}

// ban bans an address and its /64, as the rules' own limit does.
func (p *probe) ban(f *family, addr netip.Addr) {
	p.put(f.banned, trust.Network(p.config, addr))
	if addr.Is6() {
		p.put(f.banned, prefix(addr, 64))
	}
}

func prefix(addr netip.Addr, bits int) netip.Addr {
	p, _ := addr.Prefix(bits) // fails only for bits out of range
	return p.Addr()
}

// put adds an address to a set of the copy.
func (p *probe) put(set *nftset.Set, addr netip.Addr) {
	batch := p.copy.Conn().Batch()
	for _, e := range trust.Elements(set, addr, p.config.Ports, nftset.Element{Timeout: time.Hour}) {
		batch.Add(set, e)
	}
	p.copy.Conn().SetTimeout(patience)
	p.note(batch.Commit())
}

func (p *probe) note(err error) {
	if p.err == nil {
		p.err = err
	}
}

// connect opens a connection, with the whole handshake, and returns what became
// of it: of its first packet, or of the last if that was not let in.
func (p *probe) connect(addr netip.Addr, port uint16) *firewall.Result {
	if p.err != nil { // what would be found is not reported
		return &firewall.Result{Verdict: firewall.Accept}
	}
	conn, result, err := p.copy.Dial(addr, port)
	if err == nil && result.Verdict == firewall.Accept {
		last, answered, e := conn.Open()
		switch {
		case e != nil:
			err = e
		case !answered:
			err = fmt.Errorf("port %d does not answer %s; rules of hook output may drop the answer", port, addr)
		case last.Verdict != firewall.Accept:
			result, p.cut = last, last
		default:
			p.opened = true
		}
	}
	if err != nil {
		p.note(err)
		return &firewall.Result{Verdict: firewall.Accept}
	}
	return result
}

// exceed opens more connections than a limit takes at once, until one is not let
// in, and returns that; nil if all are.
func (p *probe) exceed(addr netip.Addr, port uint16) *firewall.Result {
	attempts := 20
	if submits(port) { // where a limit can be one of whole networks, too
		attempts = 60
	}
	for range attempts {
		if r := p.connect(addr, port); r.Verdict != firewall.Accept {
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
	words := strings.Trim(strings.ReplaceAll(fmt.Sprint(ports), " ", ", "), "[]")
	if len(ports) == 1 {
		return "port " + words
	}
	return "ports " + words
}

// say reports a finding, or that all is well; after an error, neither.
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
	}
	return fmt.Sprintf("rule %d (%s) in %s", s.Rule.Handle, p.copy.Text(s), where)
}

// before is the remedy for a step that decides before nftwl's rules do.
func (p *probe) before(s firewall.Step) remedy {
	words := "look nftwl's sets up before that: put `jump nftwl` above it, in the file that makes the chain, too"
	switch {
	case s.Table == p.config.Table:
	case s.Verdict == firewall.Accept:
		words = "if the port is a container's, look at its packets before they are sent there, as containers.md says"
	default:
		words = "open the port there too: a drop is final, and an accept holds for its own chain alone"
	}
	return remedy{words, "nft -a list chain " + chain(s)}
}

// chain names a step's chain for nft, in a shell.
func chain(s firewall.Step) string {
	return s.Table.Family.String() + " " + quote(s.Table.Name) + " " + quote(s.Chain)
}

// checkOpen asks what a stranger meets first, at each port. There is no more to
// ask of a family that has every port open, to banned addresses, too.
func (p *probe) checkOpen(ports []uint16) {
	var without []string
	p.families = slices.DeleteFunc(p.families, func(f *family) bool {
		banned := p.source(f)
		p.ban(f, banned)
		r := p.connect(banned, p.config.Ports[0])
		open := r.Verdict == firewall.Accept && r.Rule == nil
		for _, port := range ports {
			r := p.connect(p.source(f), port)
			p.open[key{f, port}] = r
			open = open && r.Verdict == firewall.Accept && r.Rule == nil
		}
		if open = open && p.err == nil; open {
			without = append(without, f.name)
		}
		return open
	})
	switch of := strings.Join(without, " and "); {
	case of == "":
	case len(p.unseen()) > 0:
		p.warn("rules", remedy{"see whether the rules that rules.unseen names drop banned addresses, and let trusted ones in", "nft list ruleset"},
			"the rules that could be tried leave every port open for %s", of)
	default:
		p.fail("rules", remedy{"jump to nftwl's chain from one of hook input, as nftables.conf does", "nftwl setup nftables"},
			"this machine has no input firewall for %s: every port is open", of)
	}
}

func (p *probe) trusted(f *family, port uint16) finding {
	addr := p.source(f)
	p.trust(f, addr)
	p.ban(f, addr)
	r := p.exceed(addr, port)
	if r == nil {
		return finding{}
	}
	for _, bits := range []int{64, 128} {
		if f.name == "IPv4" || bits == p.config.IPv6Prefix {
			continue
		}
		addr := p.source(f)
		p.put(f.trusted, prefix(addr, bits))
		p.ban(f, addr)
		if p.exceed(addr, port) == nil {
			return finding{Fail, fmt.Sprintf("the rules look up the /%d in %s, and ipv6_prefix is %d", bits, f.trusted.Name, p.config.IPv6Prefix),
				remedy{words: "make the mask of the rule and ipv6_prefix in " + p.configPath() + " equal"}}
		}
	}
	text := p.rule(r.Step) + " drops trusted addresses"
	if r.Table != f.trusted.Table {
		text += fmt.Sprintf(", whatever table %s accepts", f.trusted.Table)
	}
	return finding{Fail, text, p.before(r.Step)}
}

func (p *probe) banned(f *family, port uint16) finding {
	addr := p.source(f)
	p.put(f.banned, trust.Network(p.config, addr))
	if r := p.connect(addr, port); r.Verdict == firewall.Accept {
		step := r.Step
		for _, s := range r.Path { // the last that accepts can be another table's
			if s.Verdict == firewall.Accept && s.Table == f.banned.Table {
				step = s
			}
		}
		return finding{Fail, p.rule(step) + " lets banned addresses in", p.before(step)}
	}
	if f.name == "IPv6" {
		addr := p.source(f)
		p.put(f.banned, prefix(addr, 64))
		if r := p.connect(addr, port); r.Verdict == firewall.Accept {
			return finding{Warn, "a banned /64 is let in, because the rules look up only single addresses in " + f.banned.Name,
				remedy{words: "look up the /64 too, as banned.nft does: its owner has 2^64 addresses to come from"}}
		}
	}
	return finding{}
}

// limited asks how a stranger is limited.
func (p *probe) limited(f *family, port uint16) finding {
	limit := remedy{words: "limit each source separately and ban those that exceed it, as submission.nft does on the ports that nftwl_submission_ports lists"}
	switch {
	case p.open[key{f, port}].Verdict != firewall.Accept:
		return finding{}
	case !slices.Contains(p.config.Ports, port):
		return finding{Warn, "strangers are let in, and `ports` lacks it: nobody is trusted there, and banned addresses are let in",
			remedy{words: "add the port to `ports` in " + p.configPath() + ", or close it"}}
	}
	addr := p.source(f)
	over := p.exceed(addr, port)
	if over == nil {
		return finding{Warn, "strangers are let in without a limit", limit}
	}
	if r := p.connect(p.source(f), port); r.Verdict != firewall.Accept {
		return finding{Warn, "all sources share one limit, so an attacker can have others dropped or banned: " + p.rule(r.Step), limit}
	}
	if again := p.connect(addr, port); again.Verdict == firewall.Accept || again.Rule == over.Rule {
		return finding{Warn, p.rule(over.Step) + " drops what is over the limit, and no rule drops the source for that", limit}
	}
	return finding{}
}

// checkStrangers asks whether a stranger can become known: by a login by IMAP or
// POP3, so one of these ports must be open to strangers.
func (p *probe) checkStrangers() {
	shut := 0
	found := p.worst(mailboxes[1:2], func(f *family, port uint16) finding {
		if slices.ContainsFunc(mailboxes, func(port uint16) bool { return p.open[key{f, port}].Verdict == firewall.Accept }) {
			return finding{}
		}
		shut++
		r := p.open[key{f, port}]
		return finding{Fail, p.rule(r.Step) + " drops addresses that are not trusted yet, and the other ports of IMAP and POP3 are shut, too: nobody new can log in",
			remedy{"accept new connections to those ports of IMAP or POP3 that are in use", "nft -a list chain " + chain(r.Step)}}
	})
	if shut == 1 && len(p.families) == 2 { // users get in by the other family
		found.status = Warn
	}
	p.say("rules.strangers", "strangers can open connections to log in by IMAP or POP3", found)
}

// unseen names what is not in the copy.
func (p *probe) unseen() []string {
	unseen := slices.Clone(p.copy.Omitted)
	for _, ip := range []string{"ip", "ip6"} {
		names, _ := os.ReadFile("/proc/thread-self/net/" + ip + "_tables_names") // without it, the kernel has none
		for _, table := range strings.Fields(string(names)) {
			unseen = append(unseen, fmt.Sprintf("table %s of %stables-legacy", table, ip))
		}
	}
	return unseen
}

func (p *probe) checkUnseen() {
	if unseen := p.unseen(); len(unseen) > 0 {
		p.skip("rules.unseen", "these could not be tried, and may drop what the other rules accept: %s", strings.Join(unseen, "; "))
	}
}
