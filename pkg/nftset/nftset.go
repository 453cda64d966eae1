// Package nftset reads and writes the elements of nftables sets that hold IP
// addresses, over netlink.
//
// It speaks netlink itself, because a login waits for it: a description, five
// lookups and a batch take a fifth of the time that they take through a general
// library.
//
// Numbers and layouts are those of include/uapi/linux/netfilter/nf_tables.h.
package nftset

import (
	"cmp"
	"fmt"
	"net/netip"
	"time"
)

// Family is the address family of a table, as NFPROTO_* in
// include/uapi/linux/netfilter.h. The zero value is invalid.
type Family uint8

// The families that nft names.
const (
	INet   Family = 1
	IPv4   Family = 2
	ARP    Family = 3
	NetDev Family = 5
	Bridge Family = 7
	IPv6   Family = 10
)

var familyNames = []struct {
	family Family
	name   string
}{
	{INet, "inet"}, {IPv4, "ip"}, {IPv6, "ip6"}, {Bridge, "bridge"}, {NetDev, "netdev"}, {ARP, "arp"},
}

// String returns nft's name of the family.
func (f Family) String() string {
	for _, n := range familyNames {
		if n.family == f {
			return n.name
		}
	}
	return fmt.Sprintf("family %d", uint8(f))
}

// Table names an nftables table.
type Table struct {
	Family Family
	Name   string
}

// String returns the table as nft writes it: "inet filter".
func (t Table) String() string { return t.Family.String() + " " + t.Name }

// KeyType is the type of a set's keys: an address, or an address and a port.
type KeyType struct {
	IPv6 bool // ipv6_addr, else ipv4_addr
	Port bool // concatenated with inet_service
}

// String returns the type as nft writes it: "ipv4_addr . inet_service".
func (k KeyType) String() string { return typeName(k.magic()) }

// KeyTypes are the key types that nftwl supports.
var KeyTypes = []KeyType{{}, {Port: true}, {IPv6: true}, {IPv6: true, Port: true}}

// magic is the number that nft stores for the type (NFTA_SET_KEY_TYPE): six bits
// for each part, of enum datatypes in nft's include/datatype.h. The kernel itself
// only compares lengths.
func (k KeyType) magic() uint32 {
	m := uint32(typeIPv4Addr)
	if k.IPv6 {
		m = typeIPv6Addr
	}
	if k.Port {
		m = m<<typeBits | typeInetService
	}
	return m
}

// len is the length of an encoded key in bytes. Each part fills registers of 32
// bits.
func (k KeyType) len() int {
	n := 4
	if k.IPv6 {
		n = 16
	}
	if k.Port {
		n += 4
	}
	return n
}

// Key identifies an element of a set. The zero Key is that of the catch-all
// element, which nft writes as "*".
type Key struct {
	Addr netip.Addr // of the set's family, without a zone
	Port uint16     // 0 if the set's keys have none
}

// CatchAll reports whether the element matches whatever no other element does.
func (k Key) CatchAll() bool { return k == Key{} }

// String returns the key as nft writes it: "192.0.2.7 . 993".
func (k Key) String() string {
	switch {
	case k.CatchAll():
		return "*"
	case k.Port == 0:
		return k.Addr.String()
	}
	return fmt.Sprintf("%s . %d", k.Addr, k.Port)
}

// Compare orders keys by address and port: a catch-all first, then IPv4.
func (k Key) Compare(other Key) int {
	if c := k.Addr.Compare(other.Addr); c != 0 {
		return c
	}
	return cmp.Compare(k.Port, other.Port)
}

// Element is an element of a set.
type Element struct {
	Key
	// Timeout is for how long the element was added; 0 for a permanent element,
	// also in a set with a default timeout. At most 292 years are read, which is
	// the longest time.Duration.
	Timeout time.Duration
	// Expires is the time left, at most Timeout. For an element that is written,
	// 0 stands for the whole Timeout.
	Expires time.Duration
	// Comment is at most MaxComment bytes; see CheckComment.
	Comment string
}

// Permanent reports whether the element never expires.
func (e Element) Permanent() bool { return e.Timeout == 0 }

// Set is the definition of a set, and how full it is.
type Set struct {
	Table Table
	Name  string
	Key   KeyType

	Dynamic  bool // rules can add elements
	Timeouts bool // elements can have a timeout (nft's "flags timeout")
	Counter  bool // every element counts its packets

	Timeout    time.Duration // of an element added without one; 0 for none
	GCInterval time.Duration // 0 for the kernel's default
	Size       uint32        // most elements; 0 for no limit
	Memory     bool          // nft's "policy memory"
	Comment    string

	// Count is how many elements the set has, including expired ones that the
	// kernel has not collected yet; 0 before Linux 6.16, which does not report it.
	Count uint32
}

// Fits returns ErrFull if the set cannot hold n elements.
func (s *Set) Fits(n int) error {
	if s.Size > 0 && n > int(s.Size) {
		return s.error(ErrFull)
	}
	return nil
}

// Writable reports why elements with a timeout cannot be written to the set,
// or nil.
func (s *Set) Writable() error {
	if !s.Timeouts {
		return s.unfit("has no timeout flag, so its elements cannot expire")
	}
	return nil
}
