package nftset

import (
	"encoding/binary"
	"errors"
	"math"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Numbers that x/sys/unix does not have.
const (
	setConcat     = 0x80 // NFT_SET_CONCAT
	setExpression = 17   // NFTA_SET_EXPR
	setCount      = 20   // NFTA_SET_COUNT
	tableHandle   = 4    // NFTA_TABLE_HANDLE
	elemCatchAll  = 0x2  // NFT_SET_ELEM_CATCHALL

	// Of libnftnl's include/libnftnl/udata.h: what nft stores for itself in the
	// user data of sets and elements.
	udataSetKeyByteOrder = 0
	udataSetComment      = 7
	udataElemComment     = 0

	byteOrderBig = 2 // BYTEORDER_BIG_ENDIAN of nft's include/datatype.h
)

// subsystem is nf_tables' part of a message's type.
const subsystem = unix.NFNL_SUBSYS_NFTABLES << 8

const (
	nlHeader   = 16 // struct nlmsghdr
	nfHeader   = 4  // struct nfgenmsg
	attrHeader = 4  // struct nlattr
)

var native = binary.NativeEndian

// align rounds up to the alignment of messages and attributes alike.
func align(n int) int { return (n + 3) &^ 3 }

// appendMessage begins a message; endMessage writes its length.
func appendMessage(b []byte, typ, flags uint16, seq uint32, family Family, resource uint16) []byte {
	b = native.AppendUint32(b, 0)
	b = native.AppendUint16(b, typ)
	b = native.AppendUint16(b, flags)
	b = native.AppendUint32(b, seq)
	b = native.AppendUint32(b, 0)  // port: the kernel fills it in
	b = append(b, byte(family), 0) // NFNETLINK_V0
	return append(b, byte(resource>>8), byte(resource))
}

func endMessage(b []byte, start int) { native.PutUint32(b[start:], uint32(len(b)-start)) }

// beginAttr begins an attribute and returns where; endAttr writes its length
// and pads it.
func beginAttr(b []byte, typ uint16) ([]byte, int) {
	start := len(b)
	b = native.AppendUint16(b, 0)
	return native.AppendUint16(b, typ), start
}

func endAttr(b []byte, start int) []byte {
	native.PutUint16(b[start:], uint16(len(b)-start))
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func appendString(b []byte, typ uint16, s string) []byte {
	b, start := beginAttr(b, typ)
	b = append(b, s...)
	return endAttr(append(b, 0), start)
}

func appendUint32(b []byte, typ uint16, v uint32) []byte {
	b, start := beginAttr(b, typ)
	return endAttr(binary.BigEndian.AppendUint32(b, v), start)
}

func appendUint64(b []byte, typ uint16, v uint64) []byte {
	b, start := beginAttr(b, typ)
	return endAttr(binary.BigEndian.AppendUint64(b, v), start)
}

// appendListOf names the set whose elements a message is about.
func appendListOf(b []byte, s *Set) []byte {
	b = appendString(b, unix.NFTA_SET_ELEM_LIST_TABLE, s.Table.Name)
	return appendString(b, unix.NFTA_SET_ELEM_LIST_SET, s.Name)
}

// appendElement encodes an element, or only its key where bare.
func appendElement(b []byte, s *Set, e *Element, bare bool) []byte {
	b, elem := beginAttr(b, unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM)
	if e.CatchAll() {
		b = appendUint32(b, unix.NFTA_SET_ELEM_FLAGS, elemCatchAll)
	} else {
		b = appendKey(b, s, e.Key)
	}
	if s.Timeouts && !bare {
		// Also if it is 0, for a permanent element: without a timeout the kernel
		// takes the set's default.
		b = appendUint64(b, unix.NFTA_SET_ELEM_TIMEOUT, milliseconds(e.Timeout))
		if e.Expires > 0 && e.Timeout > 0 {
			// The kernel refuses more than the timeout (ERANGE).
			b = appendUint64(b, unix.NFTA_SET_ELEM_EXPIRATION, milliseconds(min(e.Expires, e.Timeout)))
		}
	}
	if e.Comment != "" && !bare {
		var udata int
		b, udata = beginAttr(b, unix.NFTA_SET_ELEM_USERDATA)
		b = endAttr(appendUserData(b, udataElemComment, e.Comment), udata)
	}
	return endAttr(b, elem)
}

func appendKey(b []byte, s *Set, k Key) []byte {
	b, key := beginAttr(b, unix.NLA_F_NESTED|unix.NFTA_SET_ELEM_KEY)
	b, value := beginAttr(b, unix.NFTA_DATA_VALUE)
	if s.Key.IPv6 {
		a := k.Addr.As16()
		b = append(b, a[:]...)
	} else {
		a := k.Addr.As4()
		b = append(b, a[:]...)
	}
	if s.Key.Port {
		b = append(b, byte(k.Port>>8), byte(k.Port), 0, 0)
	}
	b = endAttr(b, value)
	return endAttr(b, key)
}

// appendUserData appends one field in libnftnl's form: type, length, value,
// with the final NUL counted.
func appendUserData(b []byte, typ byte, s string) []byte {
	b = append(b, typ, byte(len(s)+1))
	b = append(b, s...)
	return append(b, 0)
}

// appendSet encodes the definition of a set as nft sends it.
func appendSet(b []byte, s *Set, id uint32) []byte {
	var flags uint32
	if s.Dynamic {
		flags |= unix.NFT_SET_EVAL
	}
	if s.Timeouts {
		flags |= unix.NFT_SET_TIMEOUT
	}
	b = appendString(b, unix.NFTA_SET_TABLE, s.Table.Name)
	b = appendString(b, unix.NFTA_SET_NAME, s.Name)
	b = appendUint32(b, unix.NFTA_SET_FLAGS, flags)
	b = appendUint32(b, unix.NFTA_SET_KEY_TYPE, s.Key.magic())
	b = appendUint32(b, unix.NFTA_SET_KEY_LEN, uint32(s.Key.len()))
	b = appendUint32(b, unix.NFTA_SET_ID, id)
	if s.Memory {
		b = appendUint32(b, unix.NFTA_SET_POLICY, unix.NFT_SET_POL_MEMORY)
	}
	if s.Size > 0 {
		b = AppendAttribute(b, unix.NLA_F_NESTED|unix.NFTA_SET_DESC, appendUint32(nil, unix.NFTA_SET_DESC_SIZE, s.Size))
	}
	if s.Timeout > 0 {
		b = appendUint64(b, unix.NFTA_SET_TIMEOUT, milliseconds(s.Timeout))
	}
	if s.GCInterval > 0 {
		b = appendUint32(b, unix.NFTA_SET_GC_INTERVAL, uint32(milliseconds(s.GCInterval)))
	}
	udata := native.AppendUint32([]byte{udataSetKeyByteOrder, 4}, byteOrderBig)
	if s.Comment != "" {
		udata = appendUserData(udata, udataSetComment, s.Comment)
	}
	b = AppendAttribute(b, unix.NFTA_SET_USERDATA, udata)
	if s.Counter {
		b = AppendAttribute(b, unix.NLA_F_NESTED|setExpression, appendString(nil, unix.NFTA_EXPR_NAME, "counter"))
	}
	return b
}

// milliseconds converts to the kernel's unit. It rounds up, because 0 time left
// means the whole timeout.
func milliseconds(d time.Duration) uint64 {
	ms := uint64(d / time.Millisecond)
	if d%time.Millisecond > 0 {
		ms++
	}
	return ms
}

func fromMilliseconds(ms uint64) time.Duration {
	if ms > math.MaxInt64/uint64(time.Millisecond) {
		return math.MaxInt64
	}
	return time.Duration(ms) * time.Millisecond
}

var errTruncated = errors.New("a truncated netlink message")

// Attributes calls f for each attribute in b, with its type without the flags,
// until f fails.
func Attributes(b []byte, f func(typ uint16, data []byte) error) error {
	for len(b) >= attrHeader {
		n := int(native.Uint16(b))
		if n < attrHeader || n > len(b) {
			return errTruncated
		}
		typ := native.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		if err := f(typ, b[attrHeader:n]); err != nil {
			return err
		}
		b = b[min(align(n), len(b)):]
	}
	return nil
}

// Attribute returns the data of an attribute in b; nil if there is none, or if b is
// truncated.
func Attribute(b []byte, which uint16) (found []byte) {
	_ = Attributes(b, func(typ uint16, data []byte) error {
		if typ == which {
			found = data
		}
		return nil
	})
	return found
}

// userData returns a field of libnftnl's user data, or "".
func userData(b []byte, typ byte) string {
	for len(b) >= 2 && len(b) >= 2+int(b[1]) {
		value := b[2 : 2+int(b[1])]
		if b[0] == typ {
			return strings.TrimSuffix(string(value), "\x00")
		}
		b = b[2+int(b[1]):]
	}
	return ""
}

func beUint32(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func beUint64(b []byte) uint64 {
	if len(b) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

func beMilliseconds(b []byte) time.Duration { return fromMilliseconds(beUint64(b)) }

// decodeSet reads the body of a NEWSET message into s, which has its table and
// name.
func decodeSet(s *Set, b []byte) error {
	var flags, keyType, keyLen uint32
	err := Attributes(b, func(typ uint16, data []byte) error {
		switch typ {
		case unix.NFTA_SET_FLAGS:
			flags = beUint32(data)
		case unix.NFTA_SET_KEY_TYPE:
			keyType = beUint32(data)
		case unix.NFTA_SET_KEY_LEN:
			keyLen = beUint32(data)
		case unix.NFTA_SET_TIMEOUT:
			s.Timeout = beMilliseconds(data)
		case unix.NFTA_SET_GC_INTERVAL:
			s.GCInterval = fromMilliseconds(uint64(beUint32(data)))
		case unix.NFTA_SET_POLICY:
			s.Memory = beUint32(data) == unix.NFT_SET_POL_MEMORY
		case unix.NFTA_SET_DESC:
			s.Size = beUint32(Attribute(data, unix.NFTA_SET_DESC_SIZE))
		case unix.NFTA_SET_USERDATA:
			s.Comment = userData(data, udataSetComment)
		case setCount:
			s.Count = beUint32(data)
		case setExpression:
			s.Counter = string(Attribute(data, unix.NFTA_EXPR_NAME)) == "counter\x00"
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.Dynamic = flags&unix.NFT_SET_EVAL != 0
	s.Timeouts = flags&unix.NFT_SET_TIMEOUT != 0
	if flags&unix.NFT_SET_MAP != 0 {
		return s.unfit("is a map")
	}
	for _, s.Key = range KeyTypes {
		if s.Key.magic() == keyType && uint32(s.Key.len()) == keyLen {
			if flags&(unix.NFT_SET_INTERVAL|setConcat) != 0 {
				return s.unfit("is an interval set; single addresses need a plain one")
			}
			return nil
		}
	}
	return s.unfit("has keys of type " + typeName(keyType) + ", not of an address or an address . inet_service")
}

// decodeElements calls f for every element in the body of a NEWSETELEM
// message.
func decodeElements(s *Set, b []byte, f func(Element)) error {
	return Attributes(b, func(typ uint16, data []byte) error {
		if typ != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			return nil
		}
		return Attributes(data, func(_ uint16, data []byte) error {
			e, err := decodeElement(s, data)
			if err == nil {
				f(e)
			}
			return err
		})
	})
}

func decodeElement(s *Set, b []byte) (Element, error) {
	// The kernel leaves out a timeout that is the set's default
	// (nf_tables_fill_setelem), and the expiration of a permanent element.
	e := Element{Timeout: s.Timeout}
	expires, catchAll := false, false
	err := Attributes(b, func(typ uint16, data []byte) error {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			key := Attribute(data, unix.NFTA_DATA_VALUE)
			if len(key) != s.Key.len() {
				return errTruncated
			}
			if s.Key.IPv6 {
				e.Addr = netip.AddrFrom16([16]byte(key[:16]))
			} else {
				e.Addr = netip.AddrFrom4([4]byte(key[:4]))
			}
			if s.Key.Port {
				e.Port = binary.BigEndian.Uint16(key[len(key)-4:])
			}
		case unix.NFTA_SET_ELEM_FLAGS:
			catchAll = beUint32(data)&elemCatchAll != 0
		case unix.NFTA_SET_ELEM_TIMEOUT:
			e.Timeout = beMilliseconds(data)
		case unix.NFTA_SET_ELEM_EXPIRATION:
			e.Expires, expires = beMilliseconds(data), true
		case unix.NFTA_SET_ELEM_USERDATA:
			e.Comment = userData(data, udataElemComment)
		}
		return nil
	})
	if err == nil && e.CatchAll() != catchAll {
		err = errTruncated
	}
	if !expires {
		e.Timeout = 0
	}
	// The kernel reads one after the other, and a renewal can come in between.
	e.Expires = min(e.Expires, e.Timeout)
	return e, err
}
