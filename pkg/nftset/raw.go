package nftset

import "golang.org/x/sys/unix"

// Object is a table, chain, rule, set or anything else that nf_tables has, in the
// kernel's encoding. What one network namespace lists can be put into another.
type Object struct {
	Type   uint16 // of the message that creates it: unix.NFT_MSG_NEWTABLE, …
	Family Family
	Attrs  []byte // the attributes of that message
}

func (m message) object() Object {
	return Object{m.typ & 0xff, m.family, append([]byte(nil), m.body...)}
}

// Objects sends a message (unix.NFT_MSG_GETTABLE, …) with some attributes for a
// family (0 for all), and calls f for the object that it gets, or for each object
// of a dump. It returns the kernel's errno as it is. If f fails, close the
// connection.
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

// Put creates an object in a table. It ignores the object's own Family.
func (b *Batch) Put(t Table, o Object) {
	b.put(o.Type, unix.NLM_F_CREATE|unix.NLM_F_APPEND, &Set{Table: t}, o.Attrs)
}

// Subscribe makes the connection receive what the kernel sends to a group of
// NETLINK_NETFILTER: unix.NFNLGRP_*. Of what is not read yet, the kernel keeps at
// most so many bytes, or fewer if this is not root of the first user namespace.
func (c *Conn) Subscribe(group, buffer int) error {
	c.enlarge()
	if unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer) != nil {
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, buffer)
	}
	return unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group)
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
