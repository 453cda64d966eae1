package nftset

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is a netlink connection to nf_tables in the network namespace of the
// thread that dialled it. It is for one goroutine at a time.
//
// Close takes some 10 ms, a grace period of RCU, after elements were deleted:
// nft_rcv_nl_event() waits until they are gone.
type Conn struct {
	fd       int
	seq      uint32
	deadline time.Time     // zero: none
	timeout  time.Duration // by which an answer to a dump moves the deadline; 0: it stays
	buf      []byte
	renews   *bool // see renewsInPlace; nil until asked
}

const (
	// smallBuffer takes any single reply: the largest is a set with a
	// comment and names of 255 bytes.
	smallBuffer = 8 << 10
	// dumpBuffer is the most that the kernel sends at once in a dump. It walks
	// the set from its start for each buffer.
	dumpBuffer = 32 << 10
)

// Dial opens a connection. It needs no privilege; most requests do.
func Dial() (*Conn, error) { return DialAs(Decided) }

// DialAs opens a connection whose changes have that meaning for a Watcher.
func DialAs(m Meaning) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, Table{}.error(err)
	}
	bind(fd, m)
	// An error's reply then carries the header of the message alone, not all
	// of its elements. Kernels before 4.3 refuse, and cut their replies.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	return &Conn{fd: fd, buf: make([]byte, smallBuffer)}, nil
}

// renewsInPlace reports whether the kernel renews an element whose expiration is given,
// without a deletion. Most logins need not ask.
func (c *Conn) renewsInPlace() bool {
	if c.renews == nil {
		renews := since(6, 12)
		c.renews = &renews
	}
	return *c.renews
}

// since reports whether the kernel is of that release or a later one.
func since(major, minor int) bool {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return false
	}
	var a, b int
	_, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &a, &b)
	return err == nil && (a > major || a == major && b >= minor)
}

// Close closes the connection.
func (c *Conn) Close() error { return unix.Close(c.fd) }

// SetDeadline limits how long later calls wait for the kernel's answers and
// retry; after it they fail with ErrDeadline or ErrBusy. The zero time is no
// limit. A request that waits in the kernel for another process's transaction
// takes as long as that does.
func (c *Conn) SetDeadline(t time.Time) { c.deadline, c.timeout = t, 0 }

// SetTimeout sets the deadline to d from now. Each answer to a dump, which can be
// of any size, moves it to d after that answer, and each transaction, of which there
// can be many.
func (c *Conn) SetTimeout(d time.Duration) { c.deadline, c.timeout = time.Now().Add(d), d }

func (c *Conn) late() bool { return !c.deadline.IsZero() && time.Now().After(c.deadline) }

// next returns the number of the next message.
func (c *Conn) next() uint32 {
	c.seq++
	return c.seq
}

func (c *Conn) send(b []byte) error {
	for {
		err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err != unix.EINTR {
			return err
		}
		if c.late() {
			return ErrDeadline
		}
	}
}

// message is a reply of the kernel's.
type message struct {
	typ        uint16 // with the subsystem; 0 for an ack
	family     Family
	flags      uint16
	seq        uint32
	port       uint32 // of who asked for it; of a notification, who made the change
	ack        bool   // an acknowledgement, an error or the end of a dump
	err        error  // an errno, if ack reports one
	generation uint16 // of the ruleset, its low bits (nfgenmsg.res_id); 0 for an ack
	body       []byte // valid until the next read
}

// replies calls f for each reply to the messages numbered first to last, in
// order, until f is done or fails. It skips late replies to earlier calls.
func (c *Conn) replies(first, last uint32, f func(m message) (done bool, err error)) error {
	for {
		ours, done := false, false
		err := c.receive(func(m message) error {
			if m.seq-first > last-first {
				return nil
			}
			ours = true
			d, err := f(m)
			done = done || d
			return err
		})
		switch {
		case err != nil || done:
			return err
		case !ours && c.late():
			return ErrDeadline
		}
	}
}

// receive reads one buffer and calls f for each message in it, until f fails.
func (c *Conn) receive(f func(m message) error) error {
	n, err := c.read()
	if err != nil {
		return err
	}
	if n == 0 {
		return errTruncated
	}
	for b := c.buf[:n]; len(b) > 0; {
		if len(b) < nlHeader {
			return errTruncated
		}
		size := int(native.Uint32(b))
		if size < nlHeader || size > len(b) {
			return errTruncated
		}
		m := message{flags: native.Uint16(b[6:]), seq: native.Uint32(b[8:]), port: native.Uint32(b[12:])}
		typ, body := native.Uint16(b[4:]), b[nlHeader:size]
		switch {
		case typ == unix.NLMSG_ERROR, typ == unix.NLMSG_DONE:
			m.ack = true
			if len(body) >= 4 {
				if errno := int32(native.Uint32(body)); errno != 0 {
					m.err = unix.Errno(-errno)
				}
			}
		case len(body) >= nfHeader:
			m.typ, m.family = typ, Family(body[0])
			m.generation = binary.BigEndian.Uint16(body[2:])
			m.body = body[nfHeader:]
		}
		if err := f(m); err != nil {
			return err
		}
		b = b[min(align(size), len(b)):]
	}
	return nil
}

// read fills the buffer, waiting at most until the deadline. Even after that, it
// reads an answer that is already there.
func (c *Conn) read() (int, error) {
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case err == nil && n > len(c.buf):
			return 0, errTruncated
		case err != unix.EAGAIN && err != unix.EINTR:
			return n, err
		}
		wait := -1
		if !c.deadline.IsZero() {
			left := time.Until(c.deadline)
			if left <= 0 {
				return 0, ErrDeadline
			}
			wait = int(left/time.Millisecond) + 1
		}
		fds := []unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, wait); err != nil && err != unix.EINTR {
			return 0, err
		}
	}
}

// ask sends requests numbered first to first+n-1, each of which gets one
// reply, and calls f with the number from 0 and the reply.
func (c *Conn) ask(requests []byte, first uint32, n int, f func(i int, m message) error) error {
	if err := c.send(requests); err != nil {
		return err
	}
	return c.replies(first, first+uint32(n)-1, func(m message) (bool, error) {
		n--
		return n == 0, f(int(m.seq-first), m)
	})
}

// request appends a request with the attributes to b; its number is c.seq then.
func (c *Conn) request(b []byte, typ, flags uint16, family Family, attrs []byte) []byte {
	start := len(b)
	b = appendMessage(b, subsystem|typ, unix.NLM_F_REQUEST|flags, c.next(), family, 0)
	b = append(b, attrs...)
	endMessage(b, start)
	return b
}

// get sends a request that gets one reply, and returns that.
func (c *Conn) get(typ uint16, family Family, attrs []byte) (reply message, err error) {
	req := c.request(nil, typ, 0, family, attrs)
	err = c.ask(req, c.seq, 1, func(_ int, m message) error {
		reply = m
		return m.err
	})
	return reply, err
}

// list asks for a dump and calls f for each message of it. If f fails, the rest of
// the dump stays unread.
func (c *Conn) list(typ uint16, family Family, attrs []byte, f func(m message) error) error {
	c.enlarge()
	if err := c.send(c.request(nil, typ, unix.NLM_F_DUMP, family, attrs)); err != nil {
		return err
	}
	return c.replies(c.seq, c.seq, func(m message) (done bool, err error) {
		if m.ack {
			return true, m.err
		}
		return false, f(m)
	})
}

// enlarge makes the buffer large enough for dumps and notifications.
func (c *Conn) enlarge() {
	if len(c.buf) == smallBuffer {
		c.buf = make([]byte, dumpBuffer)
	}
}

// Set returns the definition of a set.
func (c *Conn) Set(table Table, name string) (*Set, error) {
	s := &Set{Table: table, Name: name}
	attrs := appendString(nil, unix.NFTA_SET_TABLE, table.Name)
	m, err := c.get(unix.NFT_MSG_GETSET, table.Family, appendString(attrs, unix.NFTA_SET_NAME, name))
	if err == unix.ENOENT {
		if _, err := c.handle(table); err != nil {
			return nil, err
		}
		err = ErrNoSet
	}
	if err == nil {
		err = decodeSet(s, m.body)
	}
	if err != nil {
		return nil, s.error(err)
	}
	return s, nil
}

// Generation returns the number of the ruleset's generation, which every
// transaction increases. It is never 0.
func (c *Conn) Generation() (uint32, error) {
	m, err := c.get(unix.NFT_MSG_GETGEN, 0, nil)
	if err != nil {
		return 0, Table{}.error(err)
	}
	return beUint32(Attribute(m.body, unix.NFTA_GEN_ID)), nil
}

// Instance distinguishes a table from an earlier one of the same name, before the
// ruleset was flushed and loaded again. No two tables of a machine have the same
// Instance, and none has the zero value.
type Instance struct {
	Boot      string // the boot's random id, a UUID; see random(4)
	Namespace uint64 // the network namespace's cookie; its inode before Linux 5.14
	Handle    uint64 // the table's, which its namespace never uses again
}

// Instance returns the Instance of the table that has the name now.
func (c *Conn) Instance(table Table) (Instance, error) {
	handle, err := c.handle(table)
	if err != nil {
		return Instance{}, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Instance{}, err
	}
	i := Instance{Boot: strings.TrimSpace(string(boot)), Handle: handle}
	// The kernel reuses an inode when its namespace is gone, but never a cookie.
	if i.Namespace, err = unix.GetsockoptUint64(c.fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err == nil {
		return i, nil
	}
	var stat unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &stat); err != nil {
		return Instance{}, fmt.Errorf("stat /proc/thread-self/ns/net: %w", err)
	}
	i.Namespace = stat.Ino
	return i, nil
}

// handle returns the handle of a table.
func (c *Conn) handle(table Table) (uint64, error) {
	m, err := c.get(unix.NFT_MSG_GETTABLE, table.Family, appendString(nil, unix.NFTA_TABLE_NAME, table.Name))
	switch {
	case err == unix.ENOENT:
		return 0, table.error(ErrNoTable)
	case err != nil:
		return 0, table.error(err)
	}
	return beUint64(Attribute(m.body, tableHandle)), nil
}

// lookupChunk is how many lookups are sent at once: their replies must fit
// the socket's buffer of 208 KiB, in which each takes about 1 KiB.
const lookupChunk = 64

// Lookup returns those elements that are in the set, by key. It asks for each
// separately, so it is as fast in a large set.
func (c *Conn) Lookup(s *Set, keys ...Key) (map[Key]Element, error) {
	found, _, err := c.lookup(s, keys)
	return found, err
}

// lookup is Lookup, and returns the Generation before it.
func (c *Conn) lookup(s *Set, keys []Key) (found map[Key]Element, generation uint32, err error) {
	for _, k := range keys {
		if !k.CatchAll() && k.Addr.Is6() != s.Key.IPv6 || k.Port != 0 && !s.Key.Port {
			return nil, 0, s.unfit(fmt.Sprintf("has keys of type %s, which %s is not", s.Key, k))
		}
	}
	found = make(map[Key]Element, len(keys))
	var req, attrs []byte
	for len(keys) > 0 {
		chunk := keys[:min(len(keys), lookupChunk)]
		keys = keys[len(chunk):]
		req = c.request(req[:0], unix.NFT_MSG_GETGEN, 0, 0, nil)
		first := c.seq
		for _, k := range chunk {
			var list int
			attrs, list = beginAttr(appendListOf(attrs[:0], s), unix.NLA_F_NESTED|unix.NFTA_SET_ELEM_LIST_ELEMENTS)
			attrs = endAttr(appendElement(attrs, s, &Element{Key: k}, true), list)
			req = c.request(req, unix.NFT_MSG_GETSETELEM, 0, s.Table.Family, attrs)
		}
		err := c.ask(req, first, 1+len(chunk), func(i int, m message) error {
			switch {
			case i == 0 && !m.ack:
				if generation == 0 {
					generation = beUint32(Attribute(m.body, unix.NFTA_GEN_ID))
				}
				return nil
			case m.err == unix.ENOENT:
				return nil // the element is missing; or the set, which a change will report
			case m.ack:
				return m.err
			}
			return decodeElements(s, m.body, func(e Element) { found[e.Key] = e })
		})
		if err != nil {
			return nil, 0, s.error(err)
		}
	}
	return found, generation, nil
}

// Dump calls f for every element of the set, in the kernel's order, while
// they arrive.
//
// For each buffer, the kernel finds where it was by counting elements in a hash
// table that may have changed since, so elements can be missing or come twice. It
// does not mark such a dump of elements (NLM_F_DUMP_INTR). Dump returns
// ErrInterrupted, after f saw what did arrive, if the ruleset's generation
// changed, or if the kernel has collected expired elements.
func (c *Conn) Dump(s *Set, f func(Element)) error {
	before, err := c.Set(s.Table, s.Name)
	if err != nil {
		return err
	}
	changed, generation := false, uint16(0)
	err = c.list(unix.NFT_MSG_GETSETELEM, s.Table.Family, appendListOf(nil, s), func(m message) error {
		if c.timeout > 0 {
			c.SetTimeout(c.timeout)
		}
		changed = changed || m.flags&unix.NLM_F_DUMP_INTR != 0 || generation != 0 && m.generation != generation
		generation = m.generation
		return decodeElements(s, m.body, f)
	})
	if err == unix.ENOENT {
		err = ErrNoSet
	}
	if err != nil {
		return s.error(err)
	}
	after, err := c.Set(s.Table, s.Name)
	if err != nil {
		return err
	}
	if changed || after.Count < before.Count {
		return s.error(ErrInterrupted)
	}
	return nil
}
