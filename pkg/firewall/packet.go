package firewall

import (
	"encoding/binary"
	"net/netip"
)

// Flags of TCP (RFC 9293, section 3.1).
const (
	syn = 0x02
	ack = 0x10
)

// segment is a TCP segment with its addresses.
type segment struct {
	from, to netip.AddrPort
	seq, ack uint32
	flags    byte
}

const headerTCP = 20

// packet encodes the segment in an IP packet.
func (s segment) packet() []byte {
	tcp := binary.BigEndian.AppendUint16(nil, s.from.Port())
	tcp = binary.BigEndian.AppendUint16(tcp, s.to.Port())
	tcp = binary.BigEndian.AppendUint32(tcp, s.seq)
	tcp = binary.BigEndian.AppendUint32(tcp, s.ack)
	tcp = append(tcp, headerTCP/4<<4, s.flags, 0xff, 0xff, 0, 0, 0, 0)

	// The pseudo header of RFC 9293, section 3.1, less its zeros.
	pseudo := append(s.from.Addr().AsSlice(), s.to.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, 6, 0, headerTCP)
	binary.BigEndian.PutUint16(tcp[16:], checksum(append(pseudo, tcp...)))

	var ip []byte
	if s.from.Addr().Is4() {
		ip = []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0}
		binary.BigEndian.PutUint16(ip[2:], 20+headerTCP)
	} else {
		ip = []byte{0x60, 0, 0, 0, 0, headerTCP, 6, 64}
	}
	ip = append(ip, s.from.Addr().AsSlice()...)
	ip = append(ip, s.to.Addr().AsSlice()...)
	if s.from.Addr().Is4() {
		binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	}
	return append(ip, tcp...)
}

// checksum is that of RFC 1071, of an even number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) > 0; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// parse reads a segment from an IP packet without options; ok is false for
// anything else.
func parse(b []byte) (s segment, ok bool) {
	var from, to netip.Addr
	switch {
	case len(b) >= 20+headerTCP && b[0] == 0x45 && b[9] == 6:
		from, to = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		b = b[20:]
	case len(b) >= 40+headerTCP && b[0]>>4 == 6 && b[6] == 6:
		from, to = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		b = b[40:]
	default:
		return s, false
	}
	s.from = netip.AddrPortFrom(from, binary.BigEndian.Uint16(b))
	s.to = netip.AddrPortFrom(to, binary.BigEndian.Uint16(b[2:]))
	s.seq, s.ack, s.flags = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:]), b[13]
	return s, true
}
