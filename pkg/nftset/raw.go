package nftset

import "golang.org/x/sys/unix"

// Object is a table, chain, rule, set or whatever else nf_tables has, in the
// kernel's own encoding. What one network namespace lists, another of the same
// kernel takes.
type Object struct {
	Type   uint16 // of the message that makes it: unix.NFT_MSG_NEWTABLE, …
	Family Family
	Attrs  []byte // the attributes of that message
}

func (m message) object() Object {
	return Object{m.typ & 0xff, m.family, append([]byte(nil), m.body...)}
}

// Objects sends a message (unix.NFT_MSG_GETTABLE, …) with some attributes for a
// family, or for all if it is 0, and calls f for the object that it gets, or for
// each if dump. It returns the kernel's errno as it is. After an error of f's, the
// connection must be closed.
func (c *Conn) Objects(get uint16, dump bool, family Family, attrs []byte, f func(Object) error) error {
	if dump {
		return c.list(get, family, attrs, func(m message) error { return f(m.object()) })
	}
	m, err := c.get(get, family, attrs)
	if err != nil {
		return err
	}
	return f(m.object())
}

// Put adds the making of an object in a table to the batch. It ignores the
// object's own Family.
func (b *Batch) Put(t Table, o Object) {
	b.put(o.Type, unix.NLM_F_CREATE|unix.NLM_F_APPEND, &Set{Table: t}, o.Attrs)
}

// Subscribe has the connection receive what the kernel sends to a group of
// NETLINK_NETFILTER: unix.NFNLGRP_*.
func (c *Conn) Subscribe(group int) error {
	c.enlarge()
	// A ruleset of hundreds of rules sends as many messages about one packet. Root
	// of a user namespace may not have more than there is.
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

// AppendAttribute appends an attribute.
func AppendAttribute(b []byte, typ uint16, data []byte) []byte {
	b, start := beginAttr(b, typ)
	return endAttr(append(b, data...), start)
}
