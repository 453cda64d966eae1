package ruleset

import (
	"net/netip"
	"slices"
	"strings"

	"nftwl/pkg/nftset"
)

// Packet is a TCP packet that comes to this machine from another.
type Packet struct {
	Source      netip.Addr
	Port        uint16 // of this machine's
	Interface   string // it comes in by; empty where all that is known is that it is not lo
	Established bool   // it is of a connection that is open; else it is to open one
	Rate        Rate
}

// Rate tells which limits a packet exceeds.
type Rate int

// The rates: a source that is alone in what it does exceeds the limits of
// sources, and with all others together those of everybody.
const (
	Below Rate = iota
	OverOwn
	OverAll
)

// Trace is what became of a packet.
type Trace struct {
	Accepted bool
	Ends     []End    // of the base chains that it went through, in order
	Lookups  []Lookup // in the sets whose contents were given, in order
	Added    []Added  // what rules added to sets
	// PassedOver are the rules that would have done something if they matched,
	// and of which that is not known. They are presumed not to match.
	PassedOver []*Rule
}

// End is how a base chain ended.
type End struct {
	Chain    *Chain
	Rule     *Rule // that ended it; nil for the policy
	Accepted bool
}

// Lookup is a look-up in a set.
type Lookup struct {
	Set   Set
	Key   nftset.Key
	Rule  *Rule
	Found bool
}

// Added is an element that a rule added to a set, or renewed there.
type Added struct {
	Set  Set
	Key  nftset.Key
	Rule *Rule
}

// Found tells whether a set was looked up with a key that it holds.
func (t *Trace) Found(s Set) bool {
	return slices.ContainsFunc(t.Lookups, func(l Lookup) bool { return l.Set == s && l.Found })
}

// Walk tells what the rules make of a packet while some sets hold the given
// keys. A drop is final; an accept ends its base chain alone, and the packet
// goes on to the next. Where it is not known whether the rule assume matches,
// it is presumed to; nil for none.
func (r *Ruleset) Walk(p Packet, sets map[Set][]nftset.Key, assume *Rule) *Trace {
	w := &walk{Ruleset: r, packet: p, contents: sets, assume: assume, steps: 1_000_000}
	for _, base := range r.base {
		family, _, _ := strings.Cut(base.Table, " ")
		if family == "ip" && !p.Source.Is4() || family == "ip6" && !p.Source.Is6() {
			continue
		}
		v := w.chain(base, 0)
		end := End{base, v.rule, v.word == "accept" || v.word == "" && !base.drop}
		w.trace.Ends = append(w.trace.Ends, end)
		if !end.Accepted {
			return &w.trace
		}
	}
	w.trace.Accepted = true
	return &w.trace
}

type walk struct {
	*Ruleset
	packet   Packet
	contents map[Set][]nftset.Key
	assume   *Rule
	trace    Trace
	steps    int   // that are left
	rule     *Rule // that is looked at
}

// verdict is accept, drop, jump, goto, return, or nothing.
type verdict struct {
	word   string
	target string
	rule   *Rule
}

// answer tells whether something matches.
type answer int

const (
	no answer = iota
	yes
	unknown
)

func is(b bool) answer {
	if b {
		return yes
	}
	return no
}

func (a answer) not() answer {
	switch a {
	case yes:
		return no
	case no:
		return yes
	}
	return unknown
}

// chain returns accept or drop, or nothing where the packet leaves the chain.
// The kernel accepts no loops and 16 levels (NFT_JUMP_STACK_SIZE); what only
// says that it is the kernel's may have both.
func (w *walk) chain(c *Chain, depth int) verdict {
	if c == nil || depth > 32 {
		return verdict{}
	}
	for _, rule := range c.rules {
		w.steps--
		if w.steps < 0 {
			return verdict{}
		}
		w.rule = rule
		v := w.evaluate(rule)
		switch v.word {
		case "accept", "drop":
			return v
		case "return":
			return verdict{}
		case "goto":
			return w.chain(w.chains[Set{c.Table, v.target}], depth+1)
		case "jump":
			if v := w.chain(w.chains[Set{c.Table, v.target}], depth+1); v.word != "" {
				return v
			}
		}
	}
	return verdict{}
}

// evaluate returns what a rule decides. A statement that is not met ends it;
// after one that may be met, those that follow can still tell that it is not.
func (w *walk) evaluate(rule *Rule) verdict {
	doubtful := false
	for _, s := range rule.statements {
		word, body := only(s)
		v, met := verdict{}, yes
		switch word {
		case "match":
			met = w.match(object(body))
		case "limit":
			met = w.limit(body, false)
		case "ct count":
			met = over(object(body), w.packet.Rate == OverAll)
		case "set", "meter":
			met = w.update(object(body), doubtful)
		case "vmap":
			v, met = w.vmap(object(body))
		case "accept", "drop", "reject", "return", "jump", "goto":
			v = w.verdict(word, body)
		case "continue", "counter", "last", "log", "mangle", "notrack", "ct helper", "ct timeout", "ct expectation", "secmark", "comment":
		case "xt": // an extension of iptables's, of which nft prints no more than the name
			if name := object(body)["name"]; name != "comment" && name != "LOG" && name != "NFLOG" {
				met = unknown
			}
		default:
			met = unknown
		}
		if met == unknown && w.assume == rule {
			met = yes
		}
		switch {
		case met == no:
			return verdict{}
		case met == unknown:
			doubtful = true
		case v.word != "" && !doubtful:
			return v
		}
	}
	if doubtful && !slices.Contains(w.trace.PassedOver, rule) {
		w.trace.PassedOver = append(w.trace.PassedOver, rule)
	}
	return verdict{}
}

func (w *walk) verdict(word string, body any) verdict {
	switch word {
	case "reject":
		word = "drop"
	case "continue": // with what follows in the same rule
		return verdict{}
	}
	target, _ := object(body)["target"].(string)
	return verdict{word, target, w.rule}
}

// limit tells whether a limit lets a rule go on. One that stands in a rule by
// itself is one bucket for all sources together; one in an element of a set is
// its own.
func (w *walk) limit(body any, own bool) answer {
	exceeded := w.packet.Rate == OverAll || own && w.packet.Rate == OverOwn
	if name, ok := body.(string); ok {
		inverted, known := w.over[Set{w.rule.Chain.Table, name}]
		if !known {
			return unknown
		}
		return is(inverted == exceeded)
	}
	return over(object(body), exceeded)
}

// over: nft's word for a limit that matches what exceeds it is "over", and
// "inv" is its JSON's.
func over(limit map[string]any, exceeded bool) answer {
	return is((limit["inv"] == true) == exceeded)
}

// update carries out a statement that adds to a set, and tells whether the
// limits of the element let the rule go on.
func (w *walk) update(s map[string]any, doubtful bool) answer {
	expression := s["elem"]
	if expression == nil {
		expression = s["key"] // of a meter
	}
	v := w.value(expression)
	if v == (absent{}) {
		return no
	}
	statements, ok := s["stmt"].([]any)
	if !ok && s["stmt"] != nil {
		statements = []any{s["stmt"]}
	}
	met := yes
	for _, inner := range statements {
		switch word, body := only(object(inner)); word {
		case "limit":
			met = w.limit(body, fromSource(v))
		case "ct count":
			met = over(object(body), w.packet.Rate == OverAll || w.packet.Rate == OverOwn && fromSource(v))
		case "counter", "last":
		default:
			met = unknown
		}
		if met == no {
			return no
		}
	}
	name, named := s["set"].(string) // a meter has none
	if key, ok := keyOf(v); ok && named && !doubtful && met == yes && s["op"] != "delete" {
		w.trace.Added = append(w.trace.Added, Added{Set{w.rule.Chain.Table, strings.TrimPrefix(name, "@")}, key, w.rule})
	}
	return met
}

// vmap looks a verdict up. Where there is none, the rule ends.
func (w *walk) vmap(s map[string]any) (verdict, answer) {
	v := w.value(s["key"])
	var elements []any
	switch data := s["data"].(type) {
	case string:
		named := w.sets[Set{w.rule.Chain.Table, strings.TrimPrefix(data, "@")}]
		if named == nil || named.elements == nil {
			return verdict{}, unknown
		}
		elements = named.elements
	default:
		elements, _ = object(data)["set"].([]any)
	}
	found := no
	var other *verdict // for all that is not found
	for _, e := range elements {
		pair, _ := e.([]any)
		if len(pair) != 2 {
			return verdict{}, unknown
		}
		decision := w.verdict(only(object(pair[1])))
		key := bare(pair[0])
		if key == "*" {
			other = &decision
			continue
		}
		switch w.equal(v, key) {
		case yes:
			return decision, yes
		case unknown:
			found = unknown
		}
	}
	switch {
	case v == (absent{}):
		return verdict{}, no
	case found == no && other != nil:
		return *other, yes
	}
	return verdict{}, found
}

// match carries out a comparison.
func (w *walk) match(s map[string]any) answer {
	v, right := w.value(s["left"]), s["right"]
	if v == (absent{}) {
		return no
	}
	switch s["op"] {
	case "in": // of flags, any
		return w.equal(v, right)
	case "!": // of flags, none
		return w.equal(v, right).not()
	case "==":
		return w.equal(v, exactly(right))
	case "!=":
		return w.equal(v, exactly(right)).not()
	}
	a, known := v.(float64)
	b, number := right.(float64)
	if !known || !number {
		return unknown
	}
	switch s["op"] {
	case "<":
		return is(a < b)
	case ">":
		return is(a > b)
	case "<=":
		return is(a <= b)
	case ">=":
		return is(a >= b)
	}
	return unknown
}

// exactly makes of several flags, all of which are meant, what no packet has
// here: each has one.
func exactly(pattern any) any {
	if list, ok := flags(pattern); ok && len(list) > 1 {
		return []any{}
	}
	return pattern
}

// flags returns the flags that nft lists, in either of its two ways: 1.0.6 has
// an array, 1.1.3 an operator.
func flags(pattern any) ([]any, bool) {
	if word, body := only(object(pattern)); word == "|" {
		pattern = body
	}
	list, ok := pattern.([]any)
	return list, ok
}

// equal tells whether a value is what a pattern, of nft's right-hand sides,
// describes.
func (w *walk) equal(v, pattern any) answer {
	pattern = bare(pattern)
	switch p := pattern.(type) {
	case string:
		if name, ok := strings.CutPrefix(p, "@"); ok {
			return w.lookup(v, name)
		}
		if p == "*" {
			return yes
		}
		switch v := v.(type) {
		case netip.Addr:
			if addr, err := netip.ParseAddr(p); err == nil {
				return is(v == addr)
			}
		case outside:
			if p == "lo" {
				return no
			}
		case string:
			if start, ok := strings.CutSuffix(p, "*"); ok {
				return is(strings.HasPrefix(v, start))
			}
			return is(v == p)
		}
	case float64:
		switch v := v.(type) {
		case float64:
			return is(v == p)
		case string: // no flag at all
			if p == 0 {
				return is(v == "")
			}
		}
	}
	if list, ok := flags(pattern); ok {
		return w.any(v, list)
	}
	switch word, body := only(object(pattern)); word {
	case "set":
		if list, ok := body.([]any); ok {
			return w.any(v, list)
		}
	case "prefix":
		text, _ := object(body)["addr"].(string)
		bits, _ := object(body)["len"].(float64)
		addr, err := netip.ParseAddr(text)
		if v, ok := v.(netip.Addr); ok && err == nil {
			return is(netip.PrefixFrom(addr, int(bits)).Contains(v))
		}
	case "range":
		ends, _ := body.([]any)
		if len(ends) == 2 {
			return within(v, ends[0], ends[1])
		}
	case "concat":
		parts, _ := body.([]any)
		values, _ := v.([]any)
		if len(parts) == 0 || len(parts) != len(values) {
			return unknown
		}
		all := yes
		for i, part := range parts {
			switch w.equal(values[i], part) {
			case no:
				return no
			case unknown:
				all = unknown
			}
		}
		return all
	}
	return unknown
}

func (w *walk) any(v any, patterns []any) answer {
	found := no
	for _, p := range patterns {
		switch w.equal(v, p) {
		case yes:
			return yes
		case unknown:
			found = unknown
		}
	}
	return found
}

func within(v, from, to any) answer {
	switch v := v.(type) {
	case float64:
		a, first := from.(float64)
		b, last := to.(float64)
		if first && last {
			return is(a <= v && v <= b)
		}
	case netip.Addr:
		first, _ := from.(string)
		last, _ := to.(string)
		a, err := netip.ParseAddr(first)
		b, err2 := netip.ParseAddr(last)
		if err == nil && err2 == nil {
			return is(a.Compare(v) <= 0 && v.Compare(b) <= 0)
		}
	}
	return unknown
}

// lookup asks a named set.
func (w *walk) lookup(v any, name string) answer {
	s := Set{w.rule.Chain.Table, name}
	if key, ok := keyOf(v); ok {
		found := slices.Contains(w.contents[s], key) ||
			slices.ContainsFunc(w.trace.Added, func(a Added) bool { return a.Set == s && a.Key == key })
		if _, given := w.contents[s]; given {
			w.trace.Lookups = append(w.trace.Lookups, Lookup{s, key, w.rule, found})
			return is(found)
		}
		if found {
			return yes
		}
	}
	if named := w.sets[s]; named != nil && named.elements != nil {
		return w.any(v, named.elements)
	}
	return unknown
}

// What a value can be, beside netip.Addr, float64, string and, for a
// concatenation, []any.
type (
	absent     struct{} // the packet has none, so whatever the rule asks of it does not match
	unknowable struct{}
	outside    struct{} // an interface other than lo
)

// value returns what an expression, of nft's left-hand sides, is for the
// packet. What is a name to nft, such as a flag, is a string; so the packet has
// one flag of a kind, and the empty string stands for none.
func (w *walk) value(expression any) any {
	word, body := only(object(expression))
	switch word {
	case "elem":
		return w.value(object(body)["val"])
	case "concat":
		parts, _ := body.([]any)
		values := make([]any, len(parts))
		for i, part := range parts {
			values[i] = w.value(part)
			if values[i] == (absent{}) {
				return absent{}
			}
		}
		return values
	case "&":
		if operands, ok := body.([]any); ok && len(operands) == 2 {
			return masked(w.value(operands[0]), operands[1])
		}
	case "payload":
		protocol, _ := object(body)["protocol"].(string)
		return w.payload(protocol, object(body)["field"])
	case "meta":
		return w.meta(object(body)["key"])
	case "ct":
		switch key := object(body)["key"]; {
		case key == "state" && w.packet.Established:
			return "established"
		case key == "state":
			return "new"
		case key == "direction":
			return "original"
		case key == "status" && !w.packet.Established:
			return ""
		}
	}
	if number, ok := expression.(float64); ok {
		return number
	}
	return unknowable{}
}

const tcp = 6

func (w *walk) payload(protocol string, field any) any {
	switch protocol {
	case "ip":
		if !w.packet.Source.Is4() {
			return absent{}
		}
	case "ip6":
		if !w.packet.Source.Is6() {
			return absent{}
		}
	case "udp", "udplite", "sctp", "dccp", "icmp", "icmpv6", "igmp", "esp", "ah", "comp", "gre", "arp":
		return absent{}
	}
	switch name, _ := field.(string); protocol + " " + name {
	case "ip saddr", "ip6 saddr":
		return w.packet.Source
	case "ip protocol", "ip6 nexthdr":
		return float64(tcp)
	case "ip version":
		return float64(4)
	case "ip6 version":
		return float64(6)
	case "tcp dport", "th dport":
		return float64(w.packet.Port)
	case "tcp flags":
		if w.packet.Established {
			return "ack"
		}
		return "syn"
	}
	return unknowable{}
}

func (w *walk) meta(key any) any {
	switch key {
	case "iif", "iifname":
		if w.packet.Interface == "" {
			return outside{}
		}
		return w.packet.Interface
	case "l4proto":
		return float64(tcp)
	case "nfproto":
		if w.packet.Source.Is4() {
			return "ipv4"
		}
		return "ipv6"
	case "protocol":
		if w.packet.Source.Is4() {
			return "ip"
		}
		return "ip6"
	}
	return unknowable{}
}

// masked returns a value with a mask applied.
func masked(v, mask any) any {
	switch v := v.(type) {
	case absent:
		return v
	case float64:
		if bits, ok := mask.(float64); ok {
			return float64(uint64(v) & uint64(bits))
		}
	case string: // flags
		list, ok := flags(mask)
		if !ok {
			list = []any{mask}
		}
		if slices.Contains(list, any(v)) {
			return v
		}
		return ""
	case netip.Addr:
		text, _ := mask.(string)
		m, err := netip.ParseAddr(text)
		if err != nil || m.BitLen() != v.BitLen() {
			break
		}
		addr, bits := v.AsSlice(), m.AsSlice()
		for i := range addr {
			addr[i] &= bits[i]
		}
		result, _ := netip.AddrFromSlice(addr) // has the length of an address
		return result
	}
	return unknowable{}
}

// fromSource tells whether a key has the packet's source in it: the one
// address whose value is known.
func fromSource(v any) bool {
	if _, ok := v.(netip.Addr); ok {
		return true
	}
	parts, _ := v.([]any)
	return slices.ContainsFunc(parts, fromSource)
}

// keyOf makes a key of the kinds that package nftset knows of a value.
func keyOf(v any) (nftset.Key, bool) {
	if addr, ok := v.(netip.Addr); ok {
		return nftset.Key{Addr: addr}, true
	}
	if parts, ok := v.([]any); ok && len(parts) == 2 {
		addr, first := parts[0].(netip.Addr)
		port, second := parts[1].(float64)
		return nftset.Key{Addr: addr, Port: uint16(port)}, first && second
	}
	return nftset.Key{}, false
}

// bare strips an element of what is not its value.
func bare(element any) any {
	if word, body := only(object(element)); word == "elem" {
		return object(body)["val"]
	}
	return element
}

// object returns an object of JSON's, or an empty one.
func object(v any) map[string]any {
	m, _ := v.(map[string]any)
	return m
}

// only returns the one key of an object, and its value.
func only(m map[string]any) (string, any) {
	if len(m) == 1 {
		for k, v := range m {
			return k, v
		}
	}
	return "", nil
}
