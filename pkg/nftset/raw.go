package nftset

import (
	"golang.org/x/sys/unix"
)

// Object is a table, chain, rule, set or whatever else nf_tables has, in the
// kernel's own encoding. What one dump returned, another namespace of the same
// kernel takes.
type Object struct {
	Type   uint16 // of the message that makes it: unix.NFT_MSG_NEWTABLE, …
	Family Family
	Attrs  []byte // the attributes of that message
}

// Objects asks for objects of a family, or of all if it is 0, with a message
// (unix.NFT_MSG_GETTABLE, …) of some attributes, and calls f for each that comes:
// for one, or for all if dump. An errno of the kernel's is returned as it is. The connection cannot be used any
// more after an error of f's.
func (c *Conn) Objects(get uint16, dump bool, family Family, attrs []byte, f func(Object) error) error {
	if len(c.buf) < dumpBuffer {
		c.buf = make([]byte, dumpBuffer)
	}
	seq, flags := c.next(), uint16(unix.NLM_F_REQUEST)
	if dump {
		flags |= unix.NLM_F_DUMP
	}
	req := appendMessage(nil, unix.NFNL_SUBSYS_NFTABLES<<8|get, flags, seq, family, 0)
	req = append(req, attrs...)
	endMessage(req, 0)
	if err := c.send(req); err != nil {
		return err
	}
	return c.replies(seq, seq, func(m message) (bool, error) {
		if m.ack {
			return true, m.err
		}
		return !dump, f(m.object())
	})
}

func (m message) object() Object {
	return Object{m.typ & 0xff, m.family, append([]byte(nil), m.body...)}
}

// Put adds an object of a table to the batch. The object's own Family is of no
// matter.
func (b *Batch) Put(t Table, o Object) {
	b.message(unix.NFNL_SUBSYS_NFTABLES<<8|o.Type, unix.NLM_F_CREATE|unix.NLM_F_APPEND, &Set{Table: t})
	b.buf = append(b.buf, o.Attrs...)
	endMessage(b.buf, b.last)
}

// Subscribe has the connection receive what the kernel sends to a group of
// NETLINK_NETFILTER: unix.NFNLGRP_*.
func (c *Conn) Subscribe(group int) error {
	if len(c.buf) < dumpBuffer {
		c.buf = make([]byte, dumpBuffer)
	}
	// A ruleset of hundreds of rules sends as many messages about one packet. Root
	// of a user namespace must do with what there is.
	_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	return unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (group - 1)})
}

// Receive waits for what the kernel sends to a group, and calls f for each
// message of it.
func (c *Conn) Receive(f func(Object) error) error {
	return c.receive(func(m message) error {
		if m.ack {
			return m.err
		}
		return f(m.object())
	})
}

// Attributes calls f for each attribute in b, with its type less the flags. An
// error of f's ends it.
func Attributes(b []byte, f func(typ uint16, data []byte) error) error { return attributes(b, f) }

// AppendAttribute appends an attribute.
func AppendAttribute(b []byte, typ uint16, data []byte) []byte {
	b, start := beginAttr(b, typ)
	return endAttr(append(b, data...), start)
}
