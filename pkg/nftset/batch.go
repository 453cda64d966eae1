package nftset

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Batch collects changes that the kernel makes in one transaction: all of them, or
// none. The zero value is not ready for use; call Conn.Batch.
type Batch struct {
	conn  *Conn
	first uint32 // number of the message that begins the batch; the others follow
	buf   []byte
	last  int    // where the last message starts
	sets  []*Set // that the messages are about, to name it in an error

	// The message of elements that the next element joins, if it can.
	open  *Set
	typ   uint16
	flags uint16
	list  int // where its list starts
}

// Batch begins a batch.
func (c *Conn) Batch() *Batch { return c.BatchAt(0) }

// BatchAt begins a batch that fails with ErrGeneration unless the ruleset is of
// the generation; 0 stands for any.
func (c *Conn) BatchAt(generation uint32) *Batch {
	b := &Batch{conn: c, first: c.next()}
	b.buf = appendMessage(make([]byte, 0, 1024), unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, b.first, 0, unix.NFNL_SUBSYS_NFTABLES)
	if generation != 0 {
		b.buf = appendUint32(b.buf, unix.NFNL_BATCH_GENID, generation)
	}
	endMessage(b.buf, 0)
	return b
}

// Grow makes room for n further elements with short comments. Without it, a large
// batch is copied again and again while it grows.
func (b *Batch) Grow(n int) { b.buf = slices.Grow(b.buf, 100*n) }

// message begins a message about a set.
func (b *Batch) message(typ, flags uint16, s *Set) {
	b.finish()
	b.last = len(b.buf)
	b.sets = append(b.sets, s)
	b.buf = appendMessage(b.buf, subsystem|typ, unix.NLM_F_REQUEST|flags, b.first+uint32(len(b.sets)), s.Table.Family, 0)
}

// put adds a message about a set, which has no elements.
func (b *Batch) put(typ, flags uint16, s *Set, attrs []byte) {
	b.message(typ, flags, s)
	b.buf = append(b.buf, attrs...)
	endMessage(b.buf, b.last)
}

// finish closes the open message of elements, if there is one.
func (b *Batch) finish() {
	if b.open == nil {
		return
	}
	b.buf = endAttr(b.buf, b.list)
	endMessage(b.buf, b.last)
	b.open = nil
}

// maxList is the most that a list of elements takes in one message: the
// length of an attribute is 16 bits. An element is at most 240 bytes.
const maxList = 1<<16 - 512

func (b *Batch) element(typ, flags uint16, s *Set, e *Element) {
	if b.open != s || b.typ != typ || b.flags != flags || len(b.buf)-b.list > maxList {
		b.message(typ, flags, s)
		b.open, b.typ, b.flags = s, typ, flags
		b.buf = appendListOf(b.buf, s)
		b.buf, b.list = beginAttr(b.buf, unix.NLA_F_NESTED|unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	}
	b.buf = appendElement(b.buf, s, e, typ == unix.NFT_MSG_DELSETELEM)
}

// Create adds an element. If it exists already, the whole batch fails with
// ErrExists.
func (b *Batch) Create(s *Set, e Element) {
	b.element(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE|unix.NLM_F_EXCL, s, &e)
}

// Add adds an element. One that exists already stays as it is, except that
// kernels from 6.12 on give it the Timeout, if that differs, and the Expires, if
// that is not 0; never another comment.
func (b *Batch) Add(s *Set, e Element) { b.element(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, s, &e) }

// Delete deletes an element. If it does not exist, the whole batch fails with
// ErrNotFound.
func (b *Batch) Delete(s *Set, k Key) { b.element(unix.NFT_MSG_DELSETELEM, 0, s, &Element{Key: k}) }

// Flush deletes all elements of a set.
func (b *Batch) Flush(s *Set) { b.put(unix.NFT_MSG_DELSETELEM, 0, s, appendListOf(nil, s)) }

// CreateTable creates a table, unless it exists.
func (b *Batch) CreateTable(t Table) {
	attrs := appendString(nil, unix.NFTA_TABLE_NAME, t.Name)
	b.put(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, &Set{Table: t}, appendUint32(attrs, unix.NFTA_TABLE_FLAGS, 0))
}

// CreateSet creates a set. If one of that name exists with another definition,
// the whole batch fails.
func (b *Batch) CreateSet(s *Set) {
	id := len(b.sets) + 1 // any that no other set of the batch has
	b.put(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, s, appendSet(nil, s, uint32(id)))
}

// Commit carries the batch out, and returns after the kernel did. An empty batch
// does nothing.
func (b *Batch) Commit() error {
	b.finish()
	if len(b.sets) == 0 {
		return nil
	}
	c := b.conn
	// The last message asks for an acknowledgement, so that silence is never
	// success. The kernel sends it after the commit (nfnetlink_rcv_batch).
	last := b.first + uint32(len(b.sets))
	c.seq = max(c.seq, last+1)
	flags := native.Uint16(b.buf[b.last+6:])
	native.PutUint16(b.buf[b.last+6:], flags|unix.NLM_F_ACK)
	end := len(b.buf)
	b.buf = appendMessage(b.buf, unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, last+1, 0, unix.NFNL_SUBSYS_NFTABLES)
	endMessage(b.buf, end)

	c.grow(len(b.buf))
	switch err := c.send(b.buf); {
	case err == unix.EMSGSIZE:
		return b.error(last, fmt.Errorf("a transaction of %d bytes is more than net.core.wmem_max lets this user send: %w", len(b.buf), err))
	case err != nil:
		return b.error(last, err)
	}
	var failed message // the first with an error
	read := func() error {
		return c.replies(b.first, last, func(m message) (done bool, err error) {
			if !m.ack {
				return false, nil
			}
			if m.err != nil && failed.err == nil {
				failed = m
			}
			return m.seq == last || m.seq == b.first, nil
		})
	}
	err := read()
	if err == unix.ENOBUFS {
		// More errors than the socket's buffer holds. The first of them are in
		// it; the acknowledgement may not be.
		deadline := c.deadline
		c.deadline = time.Now()
		err = read()
		c.deadline = deadline
	}
	switch {
	case failed.err != nil:
		return b.error(failed.seq, failed.err)
	case err != nil:
		return b.error(last, err)
	}
	if c.timeout > 0 {
		c.SetTimeout(c.timeout)
	}
	return nil
}

// error names the set that the message with the number was about. An error of the
// whole transaction has the number of its beginning.
func (b *Batch) error(seq uint32, err error) error {
	s := b.sets[max(seq-b.first, 1)-1]
	if errors.Is(err, unix.ENOENT) {
		if s.Name == "" {
			return s.error(ErrNoTable)
		}
		if _, e := b.conn.Set(s.Table, s.Name); e != nil {
			return e
		}
		return s.error(ErrNotFound)
	}
	return s.error(err)
}

// grow makes the socket's send buffer large enough for one message of n bytes, if
// the kernel lets it: it takes a transaction in a single one. Without CAP_NET_ADMIN
// in the first user namespace, net.core.wmem_max is the limit.
func (c *Conn) grow(n int) {
	n += 32 // netlink_sendmsg()
	if have, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF); err != nil || n <= have {
		return
	}
	// The kernel doubles what it is asked for.
	if unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, (n+1)/2) != nil {
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, (n+1)/2)
	}
}
