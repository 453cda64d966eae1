package cluster

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unique"

	"nftwl/pkg/nftset"
)

// field names what a record is about: an address, or the network that an element
// stands for, on one port or on every port that a machine is configured for.
type field struct {
	addr [16]byte // an IPv4 address as an IPv4-mapped one
	bits uint8    // of the network; 128 for a single address
	port uint16   // 0 for every port
}

func newField(p netip.Prefix, port uint16) field {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return field{p.Addr().As16(), uint8(bits), port}
}

// Addr is the address as it stands in the sets.
func (f field) Addr() netip.Addr { return netip.AddrFrom16(f.addr).Unmap() }

// String returns the field as the engine has it: "192.0.2.7",
// "2001:db8:1:2::/64", or either with a port: "192.0.2.7 465".
func (f field) String() string {
	s := f.Addr().String()
	if f.bits != 128 {
		s += "/" + strconv.Itoa(int(f.bits))
	}
	if f.port != 0 {
		s += " " + strconv.Itoa(int(f.port))
	}
	return s
}

// parseField reads what String wrote, and nothing else.
func parseField(s string) (f field, err error) {
	host, port, _ := strings.Cut(s, " ")
	p, err := netip.ParsePrefix(host)
	if err != nil {
		var addr netip.Addr
		if addr, err = netip.ParseAddr(host); err != nil {
			return f, errNoField
		}
		p = netip.PrefixFrom(addr, addr.BitLen())
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil && port != "" || p.Addr().Zone() != "" {
		return f, errNoField
	}
	if f = newField(p, uint16(n)); p != p.Masked() || f.String() != s {
		return f, errNoField
	}
	return f, nil
}

var errNoField = errors.New("not an address, a network, or either with a port")

// record is what the machines agree on about a field. Times are the engine's own,
// in milliseconds since 1970.
type record struct {
	removed bool   // the address was removed or unbanned; else it is trusted or banned
	since   int64  // when it was added, renewed or removed
	until   int64  // when it expires, or when the removal is forgotten; 0 for never
	timeout int64  // of the element; 0 for a permanent one
	comment string // of the element; of a removal, the part of a ban that was removed, "" for all; see qualify

	// Of one that was added: when the address was removed last before, 0 for never, and
	// the comment of that removal.
	removal int64
	part    string
	// If that removal, or this one, was of a part: when every part was removed last
	// before, 0 for never.
	whole int64
}

// forever stands for the time at which a permanent element expires.
const forever = math.MaxInt64

// ends is when an element of the record would expire.
func (r record) ends() int64 {
	if r.until == 0 {
		return forever
	}
	return r.until
}

// at returns what counts of a record at a time, and false for nothing: once an element
// that was added after a removal has expired, the removal still counts.
func (r record) at(now int64) (record, bool) {
	if !r.alive(now) && r.removal > 0 {
		r = r.lastRemoval()
	}
	return r, r.alive(now)
}

// alive reports whether the record counts at a time. One of the future does not: it
// is from before the engine's clock was set back, and nobody could remove it.
func (r record) alive(now int64) bool { return r.ends() > now && r.since <= now+skew.Milliseconds() }

// skew is how far apart two views of the engine's clock can be. It is that of
// merge.lua.
const skew = time.Minute

// String returns the record as the engine has it: see merge.lua.
func (r record) String() string {
	if r.removed {
		return fmt.Sprintf("- %d %d %d %d %s", r.since, r.until, r.timeout, r.whole, r.comment)
	}
	s := fmt.Sprintf("+ %d %d %d %d %s", r.since, r.until, r.timeout, r.removal, r.comment)
	if r.part != "" {
		s += fmt.Sprintf("\t%d %s", r.whole, r.part)
	}
	return s
}

// parseRecord reads what the script wrote, and nothing else.
func parseRecord(s string) (r record, err error) {
	parts := strings.SplitN(s, " ", 6)
	if len(parts) != 6 || parts[0] != "+" && parts[0] != "-" {
		return r, errNoRecord
	}
	r.removed = parts[0] == "-"
	comment, last, hasPart := strings.Cut(parts[5], "\t")
	whole, part, _ := strings.Cut(last, " ")
	// A comment is in many records, and must not keep the whole text.
	r.comment, r.part = unique.Make(comment).Value(), unique.Make(part).Value()
	numbers, to := parts[1:5:5], []*int64{&r.since, &r.until, &r.timeout, &r.removal, &r.whole}
	if r.removed {
		to[3] = &r.whole
	} else if hasPart {
		numbers = append(numbers, whole)
	}
	for i, text := range numbers {
		const most = 1 << 43 // in the year 2248; as nanoseconds, it fits into a time.Duration
		if *to[i], err = strconv.ParseInt(text, 10, 64); err != nil || *to[i] < 0 || *to[i] > most {
			return r, errNoRecord
		}
	}
	removal := r.lastRemoval()
	if r.String() != s || r.timeout > nftset.MaxTimeout.Milliseconds() || (r.until == 0) != (r.timeout == 0) && !r.removed || r.removed && (r.until == 0 || r.timeout != 0) ||
		r.removal > r.since || removal.since == 0 && removal.comment != "" || removal.whole > removal.since || removal.comment == "" && removal.whole != 0 {
		return r, errNoRecord
	}
	return r, errors.Join(nftset.CheckComment(r.comment), nftset.CheckComment(r.part))
}

var errNoRecord = errors.New("not a record")

// merge returns which of two records of a field counts, as the script decides it.
func merge(a, b record) record {
	removal := mergeRemovals(a.lastRemoval(), b.lastRemoval())
	counts := func(r record) bool { return !r.removed && (removal.since == 0 || r.since > removal.since) }
	if !counts(a) || counts(b) && b.ends() > a.ends() {
		a, b = b, a
	}
	if counts(a) {
		return a.after(removal)
	}
	return removal
}

// mergeRemovals returns what counts of two removals: the later one, and when every part
// was removed last.
func mergeRemovals(a, b record) record {
	if a.since < b.since {
		a, b = b, a
	}
	if b.since <= 0 { // never
		return a
	}
	a.until = max(a.until, b.until)
	if a.comment != "" {
		a.whole = max(a.whole, b.everyPart())
	}
	return a
}

// everyPart is when a removal, or the last one before it, was of every part.
func (r record) everyPart() int64 {
	if r.comment == "" {
		return r.since
	}
	return r.whole
}

// after returns the record of an element that was added after a removal.
func (r record) after(removal record) record {
	r.removal, r.part, r.whole = removal.since, removal.comment, removal.whole
	return r
}

// lastRemoval returns the record itself if it is a removal, or else the one that it
// tells of; that is at 0 if there was none.
func (r record) lastRemoval() record {
	if r.removed {
		return r
	}
	return record{removed: true, since: r.removal, until: r.removal + remembered.Milliseconds(), comment: r.part, whole: r.whole}
}

// outlasts reports whether an element ends so much later than another that it is worth
// a record, as the script decides it.
func (r record) outlasts(other record) bool {
	return other.ends() != forever && (r.ends() == forever || r.ends() > other.ends()+gain(r.timeout))
}

// gain is by how much longer an element must last than the others have it, before
// it is worth a record: 600,000 clients that log in every 10 minutes are then 170
// records a second.
func gain(timeout int64) int64 { return min(timeout/24, time.Hour.Milliseconds()) }
