package policy

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/trust"
)

// The limits of a Tracker's memory: about 60 MB when all are reached. What comes
// in after that replaces the networks with the fewest failures.
const (
	maxNetworks  = 1 << 18
	maxFailures  = 1 << 20 // of all networks together
	maxRight     = 1 << 17
	maxFollowers = 64 // addresses of one /64 that are banned after the first
	// rightFor is how long a user and password that succeeded are known to be right.
	rightFor = 30 * 24 * time.Hour
	// sample is how many records are compared to find one that is worth little.
	sample = 16
)

// Attempt is a user and the password that was tried.
type Attempt struct {
	Login string
	Hash  string // of the password; empty if the mechanism sends no password
}

// Tracker counts failed logins, and decides which addresses to ban and for how
// long. It bans nothing itself and has no clock. Only one goroutine at a time can
// use it.
//
// It counts by network, which is an IPv4 address or the /64 of an IPv6 address.
// Only different attempts count, so that a telephone with an old password does
// not get its owner banned. An attempt that has succeeded before, from
// anywhere, never counts: it is no guess, and fails because, for example, the
// password database is down.
type Tracker struct {
	limits   config.Failures
	key      []byte // of the hashes, so that the saved file does not reveal users or passwords
	networks map[[16]byte]*network
	failures int // of all networks
	right    map[uint64]uint32
	// forgotten counts the networks that were removed to make room for others.
	forgotten uint64
}

type network struct {
	failures []failure // different ones
	until    uint32    // end of the last ban; 0 before the first
	bans     uint8     // number of bans in a row
	stolen   bool      // whether the address was trusted when it was banned last
	banned   []uint32  // hashes of the addresses that the last ban covers
}

// failure is the hash of an attempt, and when it failed last. Times are seconds
// since 1970.
type failure struct {
	attempt uint32
	at      uint32
}

// NewTracker returns a Tracker without any failures.
func NewTracker(limits config.Failures) *Tracker {
	t := &Tracker{
		limits:   limits,
		key:      make([]byte, 16),
		networks: make(map[[16]byte]*network),
		right:    make(map[uint64]uint32),
	}
	_, _ = rand.Read(t.key) // never fails
	return t
}

// SetLimits replaces the limits. The failures so far stay.
func (t *Tracker) SetLimits(limits config.Failures) { t.limits = limits }

// Success records that an attempt is right: from anywhere, or, if it has no hash,
// only from this network.
func (t *Tracker) Success(now time.Time, addr netip.Addr, a Attempt) {
	key := t.rightKey(addr, a)
	if _, ok := t.right[key]; !ok && len(t.right) >= maxRight {
		t.forgetRight()
	}
	t.right[key] = seconds(now)
}

// Outcome says whether a failure counts.
type Outcome string

// The outcomes.
const (
	Counted  Outcome = "counted"
	Repeated Outcome = "repeated" // the same attempt has failed before
	Right    Outcome = "right"    // the same attempt has succeeded before
)

// Failure counts a failed attempt. Call Judge to see whether it was one too many.
func (t *Tracker) Failure(now time.Time, addr netip.Addr, a Attempt) Outcome {
	at := seconds(now)
	if since, ok := t.right[t.rightKey(addr, a)]; ok && age(at, since) < rightFor {
		return Right
	}
	n := t.network(at, addr)
	hash := uint32(t.hash(a.Login, a.Hash))
	if a.Hash == "" {
		var random [4]byte
		_, _ = rand.Read(random[:]) // never fails
		hash = binary.NativeEndian.Uint32(random[:])
	}
	i := slices.IndexFunc(n.failures, func(f failure) bool { return f.attempt == hash })
	if i >= 0 {
		n.failures = append(slices.Delete(n.failures, i, i+1), failure{hash, at})
		return Repeated
	}
	if len(n.failures) > t.limits.TrustedLimit {
		n.failures = slices.Delete(n.failures, 0, 1)
		t.failures--
	}
	n.failures = append(n.failures, failure{hash, at})
	for t.failures++; t.failures > maxFailures; {
		t.forget(n)
	}
	return Counted
}

// Verdict is the consequence of an address's failures.
type Verdict struct {
	Failures int           // different ones, of its network, that still count
	Ban      time.Duration // 0 for none
	Stolen   bool          // ban it even if it is trusted
}

// Judge returns whether to ban an address for its failures so far.
func (t *Tracker) Judge(now time.Time, addr netip.Addr) Verdict {
	at := seconds(now)
	n := t.networks[key(addr)]
	if n == nil {
		return Verdict{}
	}
	t.expire(n, at)
	v := Verdict{Failures: len(n.failures), Stolen: len(n.failures) > t.limits.TrustedLimit}
	switch {
	case v.Failures >= t.limits.Limit:
		v.Ban = t.limits.Ban
		for range n.bans {
			v.Ban = min(2*v.Ban, t.limits.Longest)
		}
	case v.Failures > 0 && n.until > at && !networkOf(addr).IsSingleIP() && len(n.banned) < maxFollowers &&
		!slices.Contains(n.banned, t.addressHash(addr)):
		// Another address of a banned /64: it is banned for the rest of that ban.
		v.Ban = time.Duration(n.until-at) * time.Second
	}
	return v
}

// Ban records that an address has been banned according to the verdict.
func (t *Tracker) Ban(now time.Time, addr netip.Addr, v Verdict) {
	n := t.network(seconds(now), addr)
	if v.Failures >= t.limits.Limit {
		t.failures -= len(n.failures)
		n.failures, n.banned = nil, nil
		n.until = seconds(now.Add(v.Ban))
		n.stolen = v.Stolen
		if n.bans < 64 { // doubling it more often has no effect
			n.bans++
		}
	}
	if !networkOf(addr).IsSingleIP() {
		n.banned = append(n.banned, t.addressHash(addr))
	}
}

// Stolen reports whether the network of an address is banned although it was
// trusted. It guesses from a stolen account, and must not end the ban by logging
// in to that account again.
func (t *Tracker) Stolen(now time.Time, addr netip.Addr) bool {
	n := t.networks[key(addr)]
	return n != nil && n.stolen && n.until > seconds(now)
}

// Sweep removes the records that have no effect any more.
func (t *Tracker) Sweep(now time.Time) {
	at := seconds(now)
	for k, n := range t.networks {
		if t.expire(n, at); len(n.failures) == 0 && n.until == 0 {
			delete(t.networks, k)
		}
	}
	for k, since := range t.right {
		if age(at, since) >= rightFor {
			delete(t.right, k)
		}
	}
}

// network returns the record of an address, without expired failures and bans.
func (t *Tracker) network(at uint32, addr netip.Addr) *network {
	k := key(addr)
	n := t.networks[k]
	if n == nil {
		for len(t.networks) >= maxNetworks {
			t.forget(nil)
		}
		n = new(network)
		t.networks[k] = n
	}
	t.expire(n, at)
	return n
}

// expire removes the failures of a network that are too old. It removes the bans
// when the last one ended longer ago than the longest ban lasts.
func (t *Tracker) expire(n *network, at uint32) {
	before := len(n.failures)
	n.failures = slices.DeleteFunc(n.failures, func(f failure) bool { return age(at, f.at) >= t.limits.Within })
	t.failures -= before - len(n.failures)
	if len(n.failures) == 0 {
		n.failures = nil
	}
	if n.until <= at && age(at, n.until) >= t.limits.Longest {
		*n = network{failures: n.failures}
	}
}

// forget makes room: of some networks other than keep, it removes the one with
// the fewest failures and bans. So a flood of new addresses replaces other new
// addresses, not the few that are close to a ban.
func (t *Tracker) forget(keep *network) {
	worth := func(n *network) int { return len(n.failures) + int(n.bans)*t.limits.Limit }
	var least [16]byte
	var found *network
	seen := 0
	for k, n := range t.networks {
		if n == keep {
			continue
		}
		if found == nil || worth(n) < worth(found) {
			least, found = k, n
		}
		if seen++; seen == sample {
			break
		}
	}
	t.failures -= len(found.failures)
	delete(t.networks, least)
	t.forgotten++
}

// forgetRight removes the oldest of some right attempts.
func (t *Tracker) forgetRight() {
	var oldest uint64
	var since uint32
	seen := 0
	for k, s := range t.right {
		if seen == 0 || s < since {
			oldest, since = k, s
		}
		if seen++; seen == sample {
			break
		}
	}
	delete(t.right, oldest)
}

func (t *Tracker) rightKey(addr netip.Addr, a Attempt) uint64 {
	if a.Hash == "" {
		k := key(addr)
		return t.hash(a.Login, "", string(k[:]))
	}
	return t.hash(a.Login, a.Hash)
}

func (t *Tracker) addressHash(addr netip.Addr) uint32 { return uint32(t.hash(addr.String())) }

func (t *Tracker) hash(parts ...string) uint64 {
	b := append(make([]byte, 0, 128), t.key...)
	for _, p := range parts {
		b = binary.LittleEndian.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	sum := sha256.Sum256(b)
	return binary.LittleEndian.Uint64(sum[:])
}

// networkOf is the network in which an address is counted.
func networkOf(addr netip.Addr) netip.Prefix { return trust.NetworkOf(addr, 64) }

func key(addr netip.Addr) [16]byte { return networkOf(addr).Addr().As16() }

func seconds(t time.Time) uint32 { return uint32(max(t.Unix(), 0)) }

// age returns the time from then to now, or 0 if a clock went backwards.
func age(now, then uint32) time.Duration {
	if then > now {
		return 0
	}
	return time.Duration(now-then) * time.Second
}
