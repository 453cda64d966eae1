package doctor

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/ruleset"
	"nftwl/pkg/trust"
)

// The rules are read from the kernel and asked what becomes of a client, since
// there are as many ways to write a firewall as there are administrators.
func (d *Doctor) checkRules(ctx context.Context) {
	nft := find("nft")
	switch {
	case d.conn == nil:
		d.skip("rules", "nftables cannot be read")
		return
	case nft == "":
		d.skip("rules", "nft is not installed, so the rules cannot be read")
		return
	}
	rules, err := readRules(ctx, nft)
	if err != nil {
		d.skip("rules", "the rules cannot be read: %v", err)
		return
	}
	p := &probe{Doctor: d, rules: rules, passedOver: make(map[*ruleset.Rule]bool)}
	for _, ipv6 := range []bool{false, true} {
		// Empty too where IPv6 is in the kernel and switched off.
		if addresses, _ := os.ReadFile("/proc/thread-self/net/if_inet6"); ipv6 && len(addresses) == 0 {
			d.skip("rules.ipv6", "IPv6 is off in the kernel")
			break
		}
		if c := d.client(ipv6); c != nil {
			p.clients = append(p.clients, c)
		}
	}
	if len(p.clients) == 0 {
		d.rulesElsewhere(rules)
		return
	}
	for _, c := range p.clients {
		p.checkTrusted(c)
	}
	for _, c := range p.clients {
		p.checkBanned(c)
	}
	p.checkEstablished()
	p.checkLimit()
	p.checkStrangers()
	p.checkUnseen()
}

func readRules(ctx context.Context, nft string) (*ruleset.Ruleset, error) {
	var rules ruleset.Ruleset
	out, err := output(ctx, nft, append(slices.Clone(ruleset.Arguments), "list", "ruleset")...)
	if err == nil {
		err = rules.Read(out)
	}
	if err != nil {
		return nil, err
	}
	for _, list := range rules.Unread() {
		// One that is gone meanwhile stays unknown.
		if out, err := output(ctx, nft, list...); err == nil {
			if err := rules.Read(out); err != nil {
				return nil, err
			}
		}
	}
	return &rules, nil
}

// rulesElsewhere says that the sets are not where the configuration has them.
func (d *Doctor) rulesElsewhere(rules *ruleset.Ruleset) {
	for _, s := range rules.Sets(d.config.Trusted.IPv4) {
		if s.Table != d.config.Table.String() {
			d.fail("rules", remedy{words: fmt.Sprintf("if those rules are the ones in use, put into %s: table: %s", cmp.Or(d.ConfigPath, config.Path), s.Table)},
				"table %s lacks the sets, and table %s has one named %s", d.config.Table, s.Table, s.Name)
			return
		}
	}
	d.skip("rules", "table %s lacks the sets that they would look up", d.config.Table)
}

// A client of a family, and what the sets hold when they hold it.
type client struct {
	family          string // "ipv4"
	addr            netip.Addr
	device          string // that its packets come in by; empty for unknown
	trusted, banned ruleset.Set
	trustedKeys     []nftset.Key
	bannedKeys      []nftset.Key
	networkKeys     []nftset.Key // its /64, banned; empty for IPv4
}

// client returns nil where the family's sets are missing or of no use, as the
// checks of the sets have said.
func (d *Doctor) client(ipv6 bool) *client {
	// No addresses of the documentation, which firewalls often drop. Their bits
	// are ones, so that a mask shows.
	c := &client{family: "ipv4", addr: netip.MustParseAddr("100.255.255.255")}
	if ipv6 {
		c.family, c.addr = "ipv6", netip.MustParseAddr("2a00:ffff:ffff:ffff:ffff:ffff:ffff:ffff")
	}
	table := d.config.Table
	c.trusted = ruleset.Set{Table: table.String(), Name: d.config.Trusted.For(c.addr)}
	c.banned = ruleset.Set{Table: table.String(), Name: d.config.Banned.For(c.addr)}
	d.conn.SetDeadline(time.Now().Add(patience))
	trusted, err := d.conn.Set(table, c.trusted.Name)
	if err != nil || trusted.Key.IPv6 != ipv6 {
		return nil
	}
	banned, err := d.conn.Set(table, c.banned.Name)
	if err != nil || banned.Key.IPv6 != ipv6 {
		return nil
	}
	element := trust.Network(d.config, c.addr)
	c.trustedKeys = trust.Keys(trusted, element, d.config.Ports)
	c.bannedKeys = trust.Keys(banned, element, d.config.Ports)
	if ipv6 {
		c.networkKeys = trust.Keys(banned, prefix(c.addr, 64), d.config.Ports)
	}
	c.device = cmp.Or(defaultDevice(ipv6), defaultDevice(!ipv6))
	return c
}

// defaultDevice returns the interface of the default route, by which the
// internet comes in, or "". The formats are those of proc(5) and of
// rt6_info_route() in the kernel.
func defaultDevice(ipv6 bool) string {
	// The thread's, as its network namespace is where the rules were read.
	name, device, zero := "/proc/thread-self/net/route", 0, []int{1, 7}
	if ipv6 {
		name, device, zero = "/proc/thread-self/net/ipv6_route", 9, []int{0, 1}
	}
	text, _ := os.ReadFile(name) // without it, the interface is not known
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 10 || fields[device] == "lo" {
			continue
		}
		if strings.Trim(fields[zero[0]]+fields[zero[1]], "0") == "" {
			return fields[device]
		}
	}
	return ""
}

func prefix(addr netip.Addr, bits int) netip.Addr {
	p, _ := addr.Prefix(bits) // fails only for bits out of range
	return p.Addr()
}

// A probe asks the rules what becomes of packets.
type probe struct {
	*Doctor
	rules   *ruleset.Ruleset
	clients []*client

	passedOver map[*ruleset.Rule]bool // by one check
}

// A situation is a packet, and what the sets hold when it comes.
type situation struct {
	*client
	port            uint16
	established     bool
	rate            ruleset.Rate
	trusted, banned []nftset.Key
}

func (p *probe) ask(c situation, assume *ruleset.Rule) *ruleset.Trace {
	t := p.rules.Walk(
		ruleset.Packet{Source: c.addr, Port: c.port, Interface: c.device, Established: c.established, Rate: c.rate},
		map[ruleset.Set][]nftset.Key{c.client.trusted: c.trusted, c.client.banned: c.banned},
		assume)
	if assume == nil {
		for _, rule := range t.PassedOver {
			p.passedOver[rule] = true
		}
	}
	return t
}

// A finding is what is wrong; the zero value, nothing.
type finding struct {
	status Status
	text   string
	remedy remedy
}

// A question is asked about one port. It returns what it finds, and the trace
// that shows it. Rules that are not understood are presumed not to match, but
// for assume.
type question func(port uint16, assume *ruleset.Rule) (finding, *ruleset.Trace)

// settle asks a question about ports, and returns the worst finding of which
// the rules leave no doubt, with the ports that it is true of; else one that
// is in doubt, as a skip; else none.
func (p *probe) settle(ports []uint16, ask question) finding {
	var findings []finding
	of := make(map[finding][]uint16)
	for _, port := range ports {
		f, t := ask(port, nil)
		if f.status == "" {
			continue
		}
		if n := len(t.PassedOver); n > 0 {
			if rule := doubt(t, func(r *ruleset.Rule) bool { f, _ := ask(port, r); return f.status == "" }); rule != nil {
				f = finding{status: Skip, text: fmt.Sprintf("cannot be told, as nftwl does not understand %s; without that rule: %s", rule, f.text)}
			} else {
				f.text += passedOver(n)
			}
		}
		if of[f] == nil {
			findings = append(findings, f)
		}
		of[f] = append(of[f], port)
	}
	for _, status := range []Status{Fail, Warn, Skip} {
		for _, f := range findings {
			if f.status == status {
				f.text = portList(of[f]) + ": " + f.text
				return f
			}
		}
	}
	return finding{}
}

func passedOver(n int) string {
	return fmt.Sprintf(" (rules passed over as not understood: %d)", n)
}

// doubt returns a rule with which all would be well, if it matched: with more
// than these, any.
func doubt(t *ruleset.Trace, well func(*ruleset.Rule) bool) *ruleset.Rule {
	const most = 100
	if len(t.PassedOver) > most {
		return t.PassedOver[0]
	}
	for _, rule := range t.PassedOver {
		if well(rule) {
			return rule
		}
	}
	return nil
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

// conclude reports the worst of the findings, or that all is well.
func (p *probe) conclude(check, well string, findings ...finding) {
	n := len(p.passedOver)
	clear(p.passedOver)
	for _, status := range []Status{Fail, Warn, Skip} {
		for _, f := range findings {
			if f.status == status {
				p.report(Result{check, status, f.text, f.remedy.words, f.remedy.command})
				return
			}
		}
	}
	if n > 0 {
		well += passedOver(n)
	}
	p.ok(check, "%s", well)
}

// both asks a question for each family.
func (p *probe) both(ports []uint16, ask func(c *client) question) []finding {
	var findings []finding
	for _, c := range p.clients {
		f := p.settle(ports, ask(c))
		f.text = strings.Replace(c.family, "ip", "IP", 1) + ", " + f.text
		findings = append(findings, f)
	}
	return findings
}

// end tells what ended a packet's way: a rule, or a policy.
func end(t *ruleset.Trace) string {
	if len(t.Ends) == 0 {
		return "a firewall without a chain of hook input"
	}
	e := t.Ends[len(t.Ends)-1]
	if e.Rule == nil {
		return "the policy of " + e.Chain.String()
	}
	return e.Rule.String()
}

// listing is a command that lists the chain in which a packet's way ended, with
// the handles of its rules.
func listing(t *ruleset.Trace) string {
	if len(t.Ends) == 0 {
		return "nft -a list ruleset"
	}
	e := t.Ends[len(t.Ends)-1]
	chain := e.Chain
	if e.Rule != nil {
		chain = e.Rule.Chain
	}
	family, table, _ := strings.Cut(chain.Table, " ")
	return "nft -a list chain " + family + " " + quote(table) + " " + quote(chain.Name)
}

// masked describes a look-up that masks a client otherwise than nftwl does, or
// returns nothing.
func (p *probe) masked(t *ruleset.Trace, c *client, set ruleset.Set) finding {
	for _, l := range t.Lookups {
		if l.Set != set || l.Found {
			continue
		}
		for bits := c.addr.BitLen(); bits > 0; bits-- {
			stored := p.config.IPv6Prefix
			if c.addr.Is4() {
				stored = 32
			}
			if l.Key.Addr != prefix(c.addr, bits) || bits == stored {
				continue
			}
			text := fmt.Sprintf("%s looks up %s in %s, and nftwl stores %s", l.Rule, length(c, bits), set.Name, length(c, stored))
			if c.addr.Is4() {
				return finding{Fail, text, remedy{words: "look up ip saddr as it is, without a mask"}}
			}
			return finding{Fail, fmt.Sprintf("%s: ipv6_prefix is %d", text, stored),
				remedy{words: "make the mask of the rule and ipv6_prefix in " + cmp.Or(p.ConfigPath, config.Path) + " equal"}}
		}
	}
	return finding{}
}

func length(c *client, bits int) string {
	if bits == c.addr.BitLen() {
		return "single addresses"
	}
	return fmt.Sprintf("the /%d", bits)
}

func (p *probe) checkTrusted(c *client) {
	banned := append(slices.Clone(c.bannedKeys), c.networkKeys...)
	p.conclude("rules.trusted."+c.family, "who is trusted gets in on "+portList(p.config.Ports)+", also when banned or over the limit",
		p.settle(p.config.Ports, func(port uint16, assume *ruleset.Rule) (f finding, t *ruleset.Trace) {
			for _, rate := range []ruleset.Rate{ruleset.Below, ruleset.OverAll} {
				t = p.ask(situation{client: c, port: port, rate: rate, trusted: c.trustedKeys, banned: banned}, assume)
				if f = p.judgeTrusted(t, c); f.status != "" {
					break
				}
			}
			return f, t
		}))
}

func (p *probe) judgeTrusted(t *ruleset.Trace, c *client) finding {
	found := t.Found(c.trusted)
	if found && t.Accepted {
		return finding{}
	}
	if !found {
		if f := p.masked(t, c, c.trusted); f.status != "" {
			return f
		}
	}
	first := remedy{"accept who is in " + c.trusted.Name + " before that, as contrib/nftables/nftwl.nft does", listing(t)}
	switch {
	case found && t.Ends[len(t.Ends)-1].Chain.Table != c.trusted.Table:
		return finding{Fail, fmt.Sprintf("%s drops who is trusted, whatever table %s accepts", end(t), c.trusted.Table),
			remedy{"open the port there too: a drop is final, and an accept holds for its own chain alone", listing(t)}}
	case found:
		return finding{Fail, end(t) + " drops who is trusted, although " + c.trusted.Name + " was looked up", first}
	case t.Accepted:
		return finding{Fail, fmt.Sprintf("no rule looks up %s before %s lets everybody in", c.trusted.Name, end(t)), first}
	}
	return finding{Fail, fmt.Sprintf("no rule looks up %s before %s drops who is trusted", c.trusted.Name, end(t)), first}
}

func (p *probe) checkBanned(c *client) {
	lookedUp := false
	ask := func(banned []nftset.Key) question {
		return func(port uint16, assume *ruleset.Rule) (finding, *ruleset.Trace) {
			t := p.ask(situation{client: c, port: port, banned: banned}, assume)
			lookedUp = lookedUp || t.Found(c.banned) || len(t.PassedOver) > 0 // as one of these may jump to the look-up
			return p.judgeBanned(t, c), t
		}
	}
	f := p.settle(p.config.Ports, ask(c.bannedKeys))
	if f.status == "" && !lookedUp {
		f = finding{Warn, "no rule looks up " + c.banned.Name + ", as everybody is kept out from every port",
			remedy{words: "drop who is in " + c.banned.Name + ", as contrib/nftables/banned.nft does"}}
	}
	if f.status == "" && len(c.networkKeys) > 0 {
		if f = p.settle(p.config.Ports, ask(c.networkKeys)); f.status == Fail {
			f.status = Warn
			f.text = "a banned /64 is not kept out, as single addresses alone are looked up in " + c.banned.Name
			f.remedy = remedy{words: "look up the /64 too, as contrib/nftables/banned.nft does: who has a /64 has 2^64 addresses to come from"}
		}
	}
	p.conclude("rules.banned."+c.family, "who is banned is kept out", f)
}

func (p *probe) judgeBanned(t *ruleset.Trace, c *client) finding {
	drop := remedy{"drop who is in " + c.banned.Name + " before that, as contrib/nftables/banned.nft does", listing(t)}
	switch {
	case !t.Accepted:
		return finding{}
	case t.Found(c.banned):
		return finding{Fail, end(t) + " lets in who is banned, although " + c.banned.Name + " was looked up", drop}
	}
	if f := p.masked(t, c, c.banned); f.status != "" {
		return f
	}
	return finding{Fail, fmt.Sprintf("no rule looks up %s before %s lets everybody in", c.banned.Name, end(t)), drop}
}

func (p *probe) checkEstablished() {
	findings := p.both(p.config.Ports, func(c *client) question {
		return func(port uint16, assume *ruleset.Rule) (finding, *ruleset.Trace) {
			banned := append(slices.Clone(c.bannedKeys), c.networkKeys...)
			t := p.ask(situation{client: c, port: port, established: true, rate: ruleset.OverAll, banned: banned}, assume)
			if t.Accepted {
				return finding{}, t
			}
			return finding{Warn, "a ban, or the end of a trust, cuts open connections: " + end(t) + " drops them",
				remedy{"put first into the chain of hook input: ct state established,related accept", listing(t)}}, t
		}
	})
	p.conclude("rules.established", "open connections outlive a ban and the end of a trust", findings...)
}

func (p *probe) checkLimit() {
	// Where passwords are guessed and, once guessed, spam is sent. Mail readers
	// open too many connections at once for a limit on the other ports.
	ports := slices.DeleteFunc([]uint16{465, 587}, func(port uint16) bool { return !slices.Contains(p.config.Ports, port) })
	if len(ports) == 0 {
		p.skip("rules.limit", "no port of submission is among the ports of the configuration")
		return
	}
	well := "strict: strangers are dropped on " + portList(ports)
	findings := p.both(ports, func(c *client) question {
		return func(port uint16, assume *ruleset.Rule) (finding, *ruleset.Trace) {
			t := p.ask(situation{client: c, port: port}, assume)
			if !t.Accepted {
				if assume == nil {
					if rule := doubt(t, func(r *ruleset.Rule) bool { return p.ask(situation{client: c, port: port}, r).Accepted }); rule != nil {
						return finding{status: Skip, text: fmt.Sprintf("cannot be told, as nftwl does not understand %s", rule)}, new(ruleset.Trace)
					}
				}
				return finding{}, t
			}
			well = "strangers above the limit are dropped and banned, each source by itself"
			return p.judgeLimit(c, port, assume)
		}
	})
	p.conclude("rules.limit", well, findings...)
}

func (p *probe) judgeLimit(c *client, port uint16, assume *ruleset.Rule) (finding, *ruleset.Trace) {
	limit := remedy{words: "limit each source by itself and ban who exceeds it, as contrib/nftables/submission.nft does"}
	own := p.ask(situation{client: c, port: port, rate: ruleset.OverOwn}, assume)
	bans := added(own, c.banned)
	if own.Accepted && len(bans) == 0 {
		all := p.ask(situation{client: c, port: port, rate: ruleset.OverAll}, assume)
		if all.Accepted && len(added(all, c.banned)) == 0 {
			return finding{Warn, "strangers are let in without a limit", limit}, all
		}
		return finding{Warn, "the limit is one for all sources together, so an attacker has others dropped or banned: " + end(all), limit}, all
	}
	if len(bans) == 0 {
		return finding{Warn, end(own) + " drops who is above the limit, and no rule bans him", limit}, own
	}
	var keys []nftset.Key
	for _, ban := range bans {
		keys = append(keys, ban.Key)
	}
	next := p.ask(situation{client: c, port: port, banned: keys}, assume)
	if next.Accepted || !next.Found(c.banned) {
		return finding{Fail, fmt.Sprintf("%s bans %s, which no rule looks up before %s lets him in again", bans[0].Rule, bans[0].Key, end(next)),
			remedy{words: "mask alike what rules add to " + c.banned.Name + " and what they look up there, and drop it before any accept"}}, next
	}
	return finding{}, own
}

// added returns what rules added to a set.
func added(t *ruleset.Trace, s ruleset.Set) []ruleset.Added {
	return slices.DeleteFunc(slices.Clone(t.Added), func(a ruleset.Added) bool { return a.Set != s })
}

// A login by IMAP or POP3 is what makes a stranger known, so somewhere these
// must be open to him.
func (p *probe) checkStrangers() {
	ports := []uint16{110, 143, 993, 995}
	ask := func(c *client) question {
		return func(port uint16, assume *ruleset.Rule) (finding, *ruleset.Trace) {
			t := p.ask(situation{client: c, port: port}, assume)
			if t.Accepted {
				return finding{}, t
			}
			return finding{Fail, end(t) + " drops who is not trusted yet, so nobody new can log in",
				remedy{"accept new connections to those ports of IMAP or POP3 that are in use", listing(t)}}, t
		}
	}
	findings := p.both(ports, ask)
	for _, port := range ports {
		for i, f := range p.both([]uint16{port}, ask) {
			// One port that is open is enough, and one that may be is no failure.
			if f.status == "" || f.status == Skip && findings[i].status == Fail {
				findings[i] = f
			}
		}
	}
	if slices.ContainsFunc(findings, func(f finding) bool { return f.status != Fail }) {
		for i := range findings {
			if findings[i].status == Fail { // and they get in by the other family
				findings[i].status = Warn
			}
		}
	}
	p.conclude("rules.strangers", "strangers can open connections to log in by IMAP or POP3", findings...)
}

// checkUnseen names what nftwl does not look at. There mostly is nothing, which
// needs no line.
func (p *probe) checkUnseen() {
	var unseen []string
	for _, ip := range []string{"ip", "ip6"} {
		names, _ := os.ReadFile("/proc/thread-self/net/" + ip + "_tables_names") // without it, the kernel has none
		for _, table := range strings.Fields(string(names)) {
			unseen = append(unseen, fmt.Sprintf("table %s of %stables-legacy", table, ip))
		}
	}
	for _, chain := range p.rules.Ingress {
		unseen = append(unseen, chain.String()+", of hook ingress")
	}
	if len(unseen) > 0 {
		p.skip("rules.unseen", "nftwl does not look at these, which may drop what the rules accept: %s", strings.Join(unseen, "; "))
	}
}
