package nftset

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is a netlink connection to nf_tables in the network namespace of the
// thread that dialled it. It is for one goroutine at a time.
//
// Closing one after elements were deleted takes the kernel a grace period of
// RCU, some 10 ms: nft_rcv_nl_event() waits for the deletions to be carried
// out. That is why Extend does without deleting where the kernel lets it.
type Conn struct {
	fd       int
	seq      uint32
	deadline time.Time     // zero: none
	timeout  time.Duration // of an answer to a dump; 0: the deadline stays
	buf      []byte
}

const (
	// smallBuffer takes any single reply: the largest is a set with a
	// comment and names of 255 bytes.
	smallBuffer = 8 << 10
	// dumpBuffer makes the kernel fill buffers of 32 KiB, its limit. A dump
	// walks the set from its start for each of them.
	dumpBuffer = 32 << 10
)

// Dial opens a connection. It needs no privilege; what is then asked does.
func Dial() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		if why := reason(err); why != err {
			return nil, &Error{Err: why}
		}
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	// An error's reply then carries the header of the message alone, not all
	// of its elements. Kernels before 4.3 refuse, and their replies are cut.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	return &Conn{fd: fd, buf: make([]byte, smallBuffer)}, nil
}

// Close closes the connection.
func (c *Conn) Close() error { return unix.Close(c.fd) }

// SetDeadline limits how long later calls wait for the kernel's answers and
// try again; past it they fail with ErrDeadline or ErrBusy. The zero time waits
// for ever.
//
// It cannot limit the time that the kernel takes to carry out a request,
// which includes waiting for another process's transaction to end.
func (c *Conn) SetDeadline(t time.Time) { c.deadline, c.timeout = t, 0 }

// SetTimeout sets the deadline to d from now. A dump moves it to d after each
// answer, because a set can be larger than can be read in any fixed time.
func (c *Conn) SetTimeout(d time.Duration) { c.deadline, c.timeout = time.Now().Add(d), d }

// late tells whether the deadline has passed.
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
	ack        bool   // an acknowledgement, an error or the end of a dump
	err        error  // an errno where ack and it failed
	generation uint16 // of the ruleset, its low bits (nfgenmsg.res_id); 0 for an ack
	body       []byte
}

// replies calls f for each reply to the messages numbered first to last, in
// order, until f is done or fails. What is left from a call that gave up is
// passed over.
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

// receive reads one buffer of replies and calls f for each message in it, in
// order. An error of f's ends it.
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
		m := message{flags: native.Uint16(b[6:]), seq: native.Uint32(b[8:])}
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

// read fills the buffer, waiting at most until the deadline. An answer that is
// there already is read even after it.
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

// Set returns the definition of a set.
func (c *Conn) Set(table Table, name string) (*Set, error) {
	seq := c.next()
	req := appendMessage(nil, msgGetSet, unix.NLM_F_REQUEST, seq, table.Family, 0)
	req = appendString(req, unix.NFTA_SET_TABLE, table.Name)
	req = appendString(req, unix.NFTA_SET_NAME, name)
	endMessage(req, 0)
	var set *Set
	err := c.ask(req, seq, 1, func(_ int, m message) (err error) {
		if m.ack {
			return m.err
		}
		set, err = decodeSet(table, m.body)
		return err
	})
	named := &Set{Table: table, Name: name}
	switch {
	case errors.Is(err, unix.ENOENT):
		if _, err := c.handle(table); err != nil {
			return nil, err
		}
		return nil, named.error(ErrNoSet)
	case err != nil:
		var typed *Error
		if errors.As(err, &typed) {
			return nil, err
		}
		return nil, named.error(err)
	}
	return set, nil
}

// Generation returns the number of the ruleset's generation, which every
// transaction increases. It is never 0.
func (c *Conn) Generation() (generation uint32, err error) {
	seq := c.next()
	req := appendMessage(nil, msgGetGen, unix.NLM_F_REQUEST, seq, 0, 0)
	endMessage(req, 0)
	err = c.ask(req, seq, 1, func(_ int, m message) error {
		if !m.ack {
			generation = decodeGeneration(m.body)
		}
		return m.err
	})
	if why := reason(err); why != err {
		return 0, &Error{Err: why}
	}
	return generation, err
}

// Instance tells a table from one of the same name that was there before it, as
// after the ruleset was flushed and loaded anew: no two tables that a machine
// ever had are the same. The zero value is no table's.
type Instance struct {
	Boot      string // the boot's random id, a UUID; see random(4)
	Namespace uint64 // the network namespace's cookie, or its inode before Linux 5.14
	Handle    uint64 // the table's, of which a namespace gives each number once
}

// Instance returns which table has the name now.
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
	// An inode's number is given again when a namespace is gone, and a cookie
	// never.
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
func (c *Conn) handle(table Table) (handle uint64, err error) {
	seq := c.next()
	req := appendMessage(nil, msgGetTable, unix.NLM_F_REQUEST, seq, table.Family, 0)
	req = appendString(req, unix.NFTA_TABLE_NAME, table.Name)
	endMessage(req, 0)
	err = c.ask(req, seq, 1, func(_ int, m message) (err error) {
		if m.ack {
			return m.err
		}
		handle, err = decodeHandle(m.body)
		return err
	})
	if errors.Is(err, unix.ENOENT) {
		return 0, table.error(ErrNoTable)
	}
	if err != nil {
		return 0, table.error(err)
	}
	return handle, nil
}

// lookupChunk is how many lookups are sent at once: their replies must all
// fit the socket's buffer, in which each takes about 1 KiB of 208.
const lookupChunk = 64

// Lookup asks for single elements, and returns those that are in the set, by
// their keys. It never dumps the set.
func (c *Conn) Lookup(s *Set, keys ...Key) (map[Key]Element, error) {
	found, _, err := c.lookup(s, keys)
	return found, err
}

// lookup is Lookup, and returns the Generation before it.
func (c *Conn) lookup(s *Set, keys []Key) (found map[Key]Element, generation uint32, err error) {
	for _, k := range keys {
		if !k.CatchAll() && k.Addr.Is6() != s.Key.IPv6 || k.Port != 0 && !s.Key.Port {
			return nil, 0, &Error{Table: s.Table, Set: s.Name, Type: s.Key.String(), Key: k, Err: ErrKeyType}
		}
	}
	found = make(map[Key]Element, len(keys))
	var req []byte
	for len(keys) > 0 {
		chunk := keys[:min(len(keys), lookupChunk)]
		keys = keys[len(chunk):]
		first := c.next()
		req = appendMessage(req[:0], msgGetGen, unix.NLM_F_REQUEST, first, 0, 0)
		endMessage(req, 0)
		for _, k := range chunk {
			start := len(req)
			req = appendMessage(req, msgGetSetElem, unix.NLM_F_REQUEST, c.next(), s.Table.Family, 0)
			req = appendListOf(req, s)
			var list int
			req, list = beginAttr(req, unix.NLA_F_NESTED|unix.NFTA_SET_ELEM_LIST_ELEMENTS)
			req = appendElement(req, s, &Element{Key: k}, true)
			req = endAttr(req, list)
			endMessage(req, start)
		}
		err := c.ask(req, first, 1+len(chunk), func(i int, m message) error {
			switch {
			case i == 0 && !m.ack:
				if generation == 0 {
					generation = decodeGeneration(m.body)
				}
				return nil
			case m.err == unix.ENOENT:
				// The element is missing, or the set went since Set was
				// called; adding to it will tell.
				return nil
			case m.ack:
				return m.err
			}
			return decodeElements(s, m.body, func(e Element) error {
				found[e.Key] = e
				return nil
			})
		})
		if err != nil {
			return nil, 0, s.error(err)
		}
	}
	return found, generation, nil
}

// Dump calls f for every element of the set, in the kernel's order, while
// they arrive. An error of f's ends it.
//
// The kernel takes a dump up again where it was by counting elements, in a
// hash table that may change between two buffers, and does not say so: it
// marks the dumps of everything else (NLM_F_DUMP_INTR), but not this one. So
// elements can be missing, and come twice. Dump returns ErrInterrupted, after
// f saw what did arrive, where there is a sign of it: the ruleset's
// generation changed; an element came twice, as others go missing when the
// table is resized, which the kernel does some time after many were added; or
// the set has fewer elements than before, because some that had expired were
// collected.
func (c *Conn) Dump(s *Set, f func(Element) error) error { return c.dumpInto(dumpBuffer, s, f) }

// dumpInto is Dump with buffers of a size, unless the connection has had a
// larger one.
func (c *Conn) dumpInto(buffer int, s *Set, f func(Element) error) error {
	before, err := c.Set(s.Table, s.Name)
	if err != nil {
		return err
	}
	if len(c.buf) < buffer {
		c.buf = make([]byte, buffer)
	}
	seq := c.next()
	req := appendMessage(nil, msgGetSetElem, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, seq, s.Table.Family, 0)
	req = appendListOf(req, s)
	endMessage(req, 0)
	if err := c.send(req); err != nil {
		return s.error(err)
	}
	var (
		changed    bool
		generation uint16
		seen       seen
		stop       error // the rest is read all the same, so that the next call finds no leftovers
	)
	err = c.replies(seq, seq, func(m message) (done bool, err error) {
		changed = changed || m.flags&unix.NLM_F_DUMP_INTR != 0
		if m.ack {
			return true, m.err
		}
		if c.timeout > 0 {
			c.SetTimeout(c.timeout)
		}
		changed = changed || generation != 0 && m.generation != generation
		generation = m.generation
		if stop == nil {
			stop = decodeElements(s, m.body, func(e Element) error {
				seen.add(e.Key)
				return f(e)
			})
		}
		return false, nil
	})
	switch {
	case errors.Is(err, unix.ENOENT):
		return s.error(ErrNoSet)
	case err != nil:
		return s.error(err)
	}
	if stop != nil {
		return stop
	}
	after, err := c.Set(s.Table, s.Name)
	if err != nil {
		return err
	}
	if changed || after.Count < before.Count || seen.twice() {
		return s.error(ErrInterrupted)
	}
	return nil
}

// seen remembers keys in 8 bytes each, to tell whether one came twice. It can
// be wrong in saying so, once in many million dumps, and costs one more then.
type seen struct {
	seed   maphash.Seed
	hashes []uint64
}

func (s *seen) add(k Key) {
	if s.hashes == nil {
		s.seed = maphash.MakeSeed()
	}
	var b [18]byte
	a := k.Addr.As16()
	copy(b[:], a[:])
	binary.BigEndian.PutUint16(b[16:], k.Port)
	s.hashes = append(s.hashes, maphash.Bytes(s.seed, b[:]))
}

func (s *seen) twice() bool {
	slices.Sort(s.hashes)
	for i := 1; i < len(s.hashes); i++ {
		if s.hashes[i] == s.hashes[i-1] {
			return true
		}
	}
	return false
}
