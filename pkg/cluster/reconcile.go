package cluster

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

// deletion is an element that somebody deleted from this machine's sets.
type deletion struct {
	at      time.Time
	left    time.Duration // it had; 0 if it was permanent
	comment string        // of what was meant, qualified
	after   uint32        // the generation of the ruleset before
	again   bool          // it was added again, later
	before  *deletion     // an earlier one that is not shared yet either
}

// then returns what a later deletion makes of one that is not shared yet: what was
// meant by either is removed, and every part of a ban as of when that was meant.
func (d deletion) then(later deletion) deletion {
	if d.isExpiry() {
		return later
	}
	d.before = nil
	later.before = &d
	switch {
	case later.isExpiry():
		later.at, later.left, later.comment = d.at, d.left, d.comment
	case d.comment == "" && later.comment != "":
		later.at, later.comment = d.at, ""
	case later.comment != "":
		later.comment = addNames(later.comment, d.comment)
	}
	return later
}

// isExpiry reports whether the element was about to expire, which nobody need be told.
func (d deletion) isExpiry() bool { return d.left > 0 && d.left < minLeft }

// replaced returns what is left of a deletion if the element was added again in the same
// transaction: the one before, or none.
func (d deletion) replaced() (deletion, bool) {
	if d.before == nil {
		return d, false
	}
	d = *d.before
	d.again = true
	return d, true
}

// addition is an element that somebody added to this machine's sets.
type addition struct {
	at    time.Time
	after uint32 // the generation of the ruleset before
}

// minLeft is the time left below which a change is not worth a record: fail2ban ends
// its bans in the moment in which they expire.
const minLeft = 2 * time.Second

// state is what this machine has of an address.
type state struct {
	set     *nftset.Set
	there   map[uint16]nftset.Element // by port; 0 if the set's keys have none
	deleted map[uint16]deletion       // by port; one that is there again was filled from the others
	seen    map[uint16]addition       // by port, where that is known
	ports   []uint16                  // to look at; 0 alone if the set's keys have none
}

// plan is what there is to do for an address.
type plan struct {
	now    int64       // the engine's time of the changes
	set    *nftset.Set // the set to change
	send   []change
	remove []removal
	extend []nftset.Element
}

// removal is an element that the others have removed.
type removal struct {
	key nftset.Key
	by  record
}

func (p plan) empty() bool { return len(p.send)+len(p.remove)+len(p.extend) == 0 }

// view is what a machine goes by.
type view struct {
	config  *config.Config
	list    list
	node    string
	own     []netip.Addr // the machine's addresses
	now     int64        // the engine's time in milliseconds
	at      time.Time    // when that was
	records func(field) (record, bool)
	cleared int64 // when the list was emptied on all machines
}

// remembered is how long a removal, or the emptying of a list, counts against older
// elements. It is that of merge.lua.
const remembered = 30 * 24 * time.Hour

// reconcile decides what to do so that this machine and the others have the same
// of an address.
func (v *view) reconcile(addr netip.Addr, s *state) (p plan) {
	every := newField(v.prefix(addr), 0)
	shared := make(map[uint16]record) // by port; port 0 is every port
	for _, port := range append([]uint16{0}, s.ports...) {
		f := every
		f.port = port
		if r, ok := v.records(f); ok {
			if r, ok = r.at(v.now); ok {
				shared[port] = r
			}
		}
	}

	// What was deleted here is removed everywhere.
	needed := v.config.Ports
	if !s.set.Key.Port {
		needed = []uint16{0}
	}
	gone := make(map[uint16]change)
	for port, d := range s.deleted {
		if d.isExpiry() {
			continue
		}
		passed := v.at.Sub(d.at)
		c := change{every, record{removed: true, since: v.now - max(0, passed.Milliseconds()), comment: d.comment}}
		c.field.port = port
		if e, ok := s.there[port]; ok && d.again {
			c.since = min(c.since, v.record(e, s.seen[port].at).since-1)
		}
		if d.left > 0 {
			c.until = v.now + max(0, (d.left-passed).Milliseconds())
		}
		gone[port] = c
	}
	if !slices.ContainsFunc(needed, func(port uint16) bool { c, ok := gone[port]; return !ok || c.comment != gone[needed[0]].comment }) {
		all := gone[needed[0]]
		for _, port := range needed {
			if c := gone[port]; c.ends() > all.ends() {
				all.until = c.until
			}
			all.since = max(all.since, gone[port].since)
			delete(gone, port)
		}
		// Of a port with a record of its own too, as a later one of every port would
		// not end that.
		for port, r := range shared {
			if port == 0 || !r.removed {
				all.field.port = port
				gone[port] = all
			}
		}
		all.field.port = 0
		gone[0] = all
	}
	for port, c := range gone {
		old := shared[port]
		if !old.removed && old.since > c.since || old.removed && old.since >= c.since && (c.comment != "" || old.everyPart() >= c.since) {
			continue // the others know
		}
		p.send = append(p.send, c)
		c.until = forever
		shared[port] = mergeRemovals(c.record, old.lastRemoval())
	}

	// removedBy is the latest removal that counts on a port.
	removedBy := func(port uint16) record {
		r := record{since: -1}
		if all := (record{removed: true, since: v.cleared, until: v.cleared + remembered.Milliseconds()}); v.cleared > 0 && all.alive(v.now) {
			r = all
		}
		for _, port := range []uint16{0, port} {
			if last := shared[port].lastRemoval(); last.since > 0 && last.alive(v.now) {
				r = mergeRemovals(r, last)
			}
		}
		return r
	}
	// best is what the others have of a port that lasts longest.
	best := func(port uint16) (b record, ok bool) {
		for _, from := range []uint16{0, port} {
			if from != port && !slices.Contains(v.config.Ports, port) {
				continue // every port is every one that is configured
			}
			r, there := shared[from]
			if there && !r.removed && r.since > removedBy(port).since && (!ok || r.ends() > b.ends()) {
				b, ok = r, true
			}
		}
		return b, ok
	}
	longer := func(mine record, port uint16) bool {
		theirs, ok := best(port)
		return !ok || mine.outlasts(theirs)
	}

	// ownRecord is what an element of this machine is to the others. Only they can know
	// when a permanent one was added.
	ownRecord := func(port uint16) record {
		e := s.there[port]
		r := v.record(e, s.seen[port].at)
		for _, from := range []uint16{0, port} {
			if theirs := shared[from]; e.Permanent() && s.seen[port].at.IsZero() && theirs.until == 0 && !theirs.removed {
				r.since = max(r.since, theirs.since)
			}
		}
		return r
	}

	// What lasts longer here is sent: for every port, if it is on all that this
	// machine has, and for a port where that one lasts longer still.
	mine := make(map[uint16]record)
	for port, e := range s.there {
		r, by := ownRecord(port), removedBy(port)
		if kept := v.kept(by, e, r.since); r.since <= by.since && kept != "" {
			// This machine's part outlasts the removal, and is a new ban to the others.
			r.since, r.comment = by.since+1, kept
			if r.until != 0 {
				r.timeout = r.until - r.since
			}
		}
		if r.since > by.since {
			mine[port] = r
		}
	}
	send := func(r record, port uint16) {
		if !r.alive(v.now+minLeft.Milliseconds()) || !longer(r, port) {
			return
		}
		c := change{every, r}
		c.field.port = port
		p.send = append(p.send, c)
		shared[port] = r.after(shared[port].lastRemoval())
	}
	weakest, all := record{}, true
	for i, port := range needed {
		r, ok := mine[port]
		all = all && ok
		if i == 0 || r.ends() < weakest.ends() {
			weakest = r
		}
	}
	// What the others have of each port is not what they have of every port.
	if all && slices.ContainsFunc(needed, func(port uint16) bool { return longer(weakest, port) }) {
		send(weakest, 0)
	}
	for _, port := range s.ports {
		if r, ok := mine[port]; ok && port != 0 {
			send(r, port)
		}
	}

	// What the others removed, or have for longer, is changed here.
	for _, port := range s.ports {
		e, there := s.there[port]
		theirs, ok := best(port)
		var want nftset.Element
		f := every
		f.port = port
		if ok = ok && v.refuses(f) == ""; ok {
			want, ok = v.element(theirs)
			want.Key = nftset.Key{Addr: addr, Port: port}
		}
		r := removedBy(port)
		// What is there again for as long stays: the kernel's times are not exact.
		if mine := ownRecord(port); there && mine.since <= r.since && v.kept(r, e, mine.since) == "" && !(ok && want.Outlives(e, minLeft)) {
			p.remove = append(p.remove, removal{e.Key, r})
			there = false
		}
		slack := minLeft
		if theirs.until == 0 && v.list == trusted { // it is renewed, see element
			slack = max(minLeft, time.Duration(gain(v.config.Timeout.Milliseconds()))*time.Millisecond)
		}
		if ok && !(there && e.Outlives(want, slack)) {
			p.extend = append(p.extend, want)
		}
	}
	return p
}

// prefix is the network that an element of an address stands for.
func (v *view) prefix(addr netip.Addr) netip.Prefix {
	if n := trust.NetworkOf(addr, v.bits()); n.Addr() == addr {
		return n
	}
	return netip.PrefixFrom(addr, addr.BitLen())
}

// bits is how long the networks are that the rules look up.
func (v *view) bits() int {
	if v.list == banned {
		return trust.BanPrefix(v.config)
	}
	return v.config.IPv6Prefix
}

// here returns the field that stands on this machine for one of the others, and
// false for a network that is larger than this machine knows.
func (v *view) here(f field) (field, bool) {
	addr := f.Addr()
	if addr.Is4() || f.bits == 128 {
		addr = trust.Network(v.config, addr)
	} else if int(f.bits) < v.bits() {
		return f, false
	} else if int(f.bits) > v.bits() {
		addr = trust.Network(v.config, addr)
	}
	return newField(v.prefix(addr), f.port), true
}

// record is what an element of this machine would be to the others.
func (v *view) record(e nftset.Element, seen time.Time) record {
	r := record{comment: qualify(e.Comment, v.node)}
	switch {
	case !e.Permanent():
		r.timeout = max(1, e.Timeout.Milliseconds())
		r.until = v.now + max(1, e.Expires.Milliseconds())
		r.since = max(0, r.until-r.timeout)
	case !seen.IsZero():
		// Otherwise nobody knows, and any removal counts.
		r.since = v.now - v.at.Sub(seen).Milliseconds()
	}
	return r
}

// kept returns those names of an element, added at a time, that a removal by others
// leaves, qualified; "" for none, which ends the element. Of a ban that several tools
// wanted, each ends its own part, and the machine that a tool runs on keeps the part.
func (v *view) kept(r record, e nftset.Element, since int64) string {
	// Of what was added at 0, nobody knows when: a valid part must not be lost.
	if v.list != banned || r.comment == "" || since > 0 && since <= r.whole {
		return ""
	}
	var kept []string
	for name := range strings.SplitSeq(e.Comment, separator) {
		if _, _, others := origin(name); !others {
			if name = qualify(name, v.node); !trust.HasName(r.comment, name) {
				kept = append(kept, name)
			}
		}
	}
	return strings.Join(kept, separator)
}

// refuses says why this machine does not take what others have of a field, in a word;
// "" if it does. It takes no more than a login here would get.
func (v *view) refuses(f field) string {
	if f.port != 0 && v.list == trusted && !slices.Contains(v.config.Ports, f.port) {
		return "port"
	}
	refuse := trust.Refuse
	if v.list == banned {
		refuse = trust.RefuseBan
	}
	if refuse(v.config, f.Addr()) != nil || slices.ContainsFunc(v.own, v.prefix(f.Addr()).Contains) {
		return "address"
	}
	return ""
}

// element returns the element for a record of the others, and false if too little
// time is left. A trust gets no more than the time that a login of the same moment
// would have got here; a permanent one gets that again and again. The element is as old
// as the record, so that no machine takes it for a newer decision.
func (v *view) element(r record) (e nftset.Element, ok bool) {
	age := time.Duration(max(0, v.now-r.since)) * time.Millisecond
	e.Timeout = time.Duration(r.timeout) * time.Millisecond
	if v.list == banned || v.config.Comment {
		e.Comment = unqualify(r.comment, v.node)
	}
	if v.list == trusted {
		if r.until == 0 {
			e.Timeout, e.Expires = min(age, remembered)+v.config.Timeout, v.config.Timeout
			return e, true
		}
		e.Timeout = min(e.Timeout, v.config.Timeout)
	} else if r.until == 0 {
		return e, true
	}
	e.Expires = min(time.Duration(r.until-v.now)*time.Millisecond, e.Timeout, max(0, e.Timeout-age))
	return e, e.Expires >= minLeft
}
