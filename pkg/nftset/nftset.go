// Package nftset reads and writes the elements of nftables sets that hold IP
// addresses, over netlink.
//
// It speaks to the kernel directly. A login waits for it, and a snapshot of a
// million elements goes through it: one description, five lookups and a
// batch cost a fifth of what they cost through a general library, a dump is
// decoded while it arrives, and a batch is encoded once, into the buffer that
// is sent.
//
// Numbers and layouts are those of include/uapi/linux/netfilter/nf_tables.h.
package nftset

import (
	"cmp"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
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

// ParseTable reads a table as nft writes it. Without a family it is ip, as it
// is for nft.
func ParseTable(s string) (Table, error) {
	words := strings.Fields(s)
	if len(words) == 1 {
		words = []string{"ip", words[0]}
	}
	if len(words) != 2 {
		return Table{}, fmt.Errorf("%.40q is not a table: write FAMILY NAME, such as inet filter", s)
	}
	for _, n := range familyNames {
		if n.name == words[0] {
			if err := CheckName(words[1]); err != nil {
				return Table{}, err
			}
			return Table{n.family, words[1]}, nil
		}
	}
	return Table{}, fmt.Errorf("%.40q is not a family of nftables: inet, ip, ip6, bridge, netdev or arp", words[0])
}

// maxName is NFT_NAME_MAXLEN less the final NUL.
const maxName = 255

// CheckName reports why a string cannot be the name of a table or set. What
// it accepts is what nft's scanner takes for one.
func CheckName(s string) error {
	if s == "" {
		return fmt.Errorf("a name of a table or set is empty")
	}
	if len(s) > maxName {
		return fmt.Errorf("the name %.20q… is longer than %d bytes", s, maxName)
	}
	for i, r := range s {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '_'
		if !letter && (i == 0 || !strings.ContainsRune(`0123456789/\.-`, r)) {
			return fmt.Errorf("%q is not a name that nft accepts: a letter or underscore, then letters, digits and . _ - / \\", s)
		}
	}
	return nil
}

// KeyType is the type of a set's keys: an address, or an address and a port.
type KeyType struct {
	IPv6 bool // ipv6_addr, else ipv4_addr
	Port bool // concatenated with inet_service
}

// String returns the type as nft writes it: "ipv4_addr . inet_service".
func (k KeyType) String() string { return typeName(k.magic()) }

// magic is the number by which nft remembers the type in the kernel
// (NFTA_SET_KEY_TYPE): six bits a part, numbers of enum datatypes in nft's
// include/datatype.h. The kernel itself only compares lengths.
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

// len is the length of an encoded key in bytes; a part is padded to a
// register of 32 bits.
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

// Key is what an element is found by. The zero Key is that of a set's
// catch-all element, which nft writes as "*".
type Key struct {
	Addr netip.Addr // of the set's family, without a zone
	Port uint16     // 0 where the set's key has no port
}

// CatchAll tells whether the element matches whatever no other element does.
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
	// Timeout is for how long the element was added. 0 is a permanent element,
	// also in a set that has a default timeout. One that is longer than a
	// time.Duration can be, 292 years, is read as that.
	Timeout time.Duration
	// Expires is the time left. It is never more than Timeout. When an element
	// is written, 0 stands for the whole Timeout.
	Expires time.Duration
	// Comment is at most MaxComment bytes; see CheckComment.
	Comment string
}

// Permanent tells whether the element never expires.
func (e Element) Permanent() bool { return e.Timeout == 0 }

// Set is the definition of a set, and how full it is.
type Set struct {
	Table Table
	Name  string
	Key   KeyType

	Constant bool // elements cannot change after creation
	Dynamic  bool // rules can add elements
	Timeouts bool // elements can have a timeout (nft's "flags timeout")
	Counter  bool // every element counts its packets

	Timeout    time.Duration // of an element added without one; 0 for none
	GCInterval time.Duration // 0 for the kernel's default
	Size       uint32        // most elements; 0 for no limit
	Memory     bool          // nft's "policy memory"
	Comment    string

	// Count is how many elements the set has, expired ones that are not yet
	// collected among them, where the kernel says it (from 6.16 on); else 0.
	Count uint32
}

// Writable reports why elements with a timeout cannot be written to the set,
// or nil.
func (s *Set) Writable() error {
	switch {
	case s.Constant:
		return s.error(ErrConstant)
	case !s.Timeouts:
		return s.error(ErrNoTimeout)
	}
	return nil
}

// MaxComment is the longest comment that nft reads back, in bytes
// (NFTNL_UDATA_COMMENT_MAXLEN).
const MaxComment = 128

// CheckComment reports why a comment cannot be stored so that nft can list
// it and load it again: nft knows no escapes inside its quotes.
func CheckComment(s string) error {
	switch {
	case len(s) > MaxComment:
		return fmt.Errorf("the comment is %d bytes long; nft takes at most %d", len(s), MaxComment)
	case !utf8.ValidString(s):
		return fmt.Errorf("the comment %q is not UTF-8", s)
	case CleanComment(s) != s:
		return fmt.Errorf("the comment %q has a quote or a control character, which nft cannot list and load again", s)
	}
	return nil
}

// CleanComment returns s as a comment that CheckComment accepts: a quote
// becomes an apostrophe, what does not print becomes a question mark, and what
// is too long is cut.
func CleanComment(s string) string {
	clean := true
	for i := 0; i < len(s); i++ {
		if c := s[i]; c < ' ' || c > '~' || c == '"' {
			clean = false
			break
		}
	}
	if clean && len(s) <= MaxComment {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '"':
			r = '\''
		// Also what turns the text around, or does not show: a terminal or a log
		// would have something else than what is stored.
		case r == utf8.RuneError || !strconv.IsGraphic(r):
			r = '?'
		}
		if b.Len()+utf8.RuneLen(r) > MaxComment {
			break
		}
		b.WriteRune(r)
	}
	return b.String()
}
