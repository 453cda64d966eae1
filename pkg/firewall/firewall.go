// Package firewall asks the kernel what the loaded rules do with a connection.
// It copies the ruleset into a network namespace of its own, sends packets
// there, and reads what the kernel's trace says of them. It has no model of the
// rules.
//
// Nothing of the machine's own rules is changed, and they see no packet. The
// namespace ends with the process.
package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
)

// The reasons why rules cannot be asked.
var (
	ErrPermission = errors.New("no permission to make a network namespace: the capability CAP_SYS_ADMIN is missing")
	ErrTUN        = errors.New("no TUN device can be made")
	ErrOwn        = errors.New("is this machine's own address: its connections come by the loopback interface")
	ErrNoVerdict  = errors.New("the kernel gave no verdict")
)

// Verdict is what became of a packet.
type Verdict string

// The verdicts. What is rejected is dropped and answered; what is queued is left
// to another program, which is not asked.
const (
	Accept Verdict = "accept"
	Drop   Verdict = "drop"
	Reject Verdict = "reject"
	Queue  Verdict = "queue"
)

// Step is how a packet left a base chain: by a rule of it or of a chain that it
// jumped to, or by its policy.
type Step struct {
	Table   nftset.Table
	Chain   string
	Rule    *Rule // nil for the policy
	Verdict Verdict

	base hook // of the base chain that the packet is in
}

// Result is what became of a packet.
type Result struct {
	Verdict Verdict
	// Step decided it: the one that dropped the packet; else the last rule that
	// accepted it, or the last policy. Its Chain is empty if no chain of hook
	// input or forward saw the packet.
	Step
	Path []Step // of all base chains that saw it, in order
}

// Copy is a copy of the rules.
type Copy struct {
	// Omitted names what is not in the copy: tables that the kernel does not
	// take a second time, and elements of sets that have too many.
	Omitted []string

	tables    tables
	conn      *nftset.Conn // to the copy
	trace     *nftset.Conn
	listeners []net.Listener
	devices   []*device
	routes    []route
	texts     map[nftset.Table]map[uint64]string // of rules, by their handles
	port      uint16                             // of the last connection's source
}

// patience is how long the kernel may take to say what became of a packet.
const patience = 5 * time.Second

// Open copies the rules of the calling thread's network namespace, to ask them
// about packets from the sources to the ports of this machine.
func Open(sources []netip.Prefix, ports []uint16) (*Copy, error) {
	conn, err := nftset.Dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetTimeout(patience)
	tables, err := readTables(conn)
	if err != nil {
		return nil, err
	}
	c := &Copy{tables: tables, port: 32768}
	if c.devices, c.routes, err = readDevices(sources); err != nil {
		return nil, err
	}
	for _, t := range tables {
		omitted, err := t.readElements(conn, sources, ports)
		if err != nil {
			return nil, err
		}
		c.Omitted = append(c.Omitted, omitted...)
	}
	forwards := make(map[string][]byte)
	for _, name := range forwarding {
		forwards[name], _ = os.ReadFile(name) // without it, nothing is forwarded
	}
	err = Inside(func() error {
		for name, value := range forwards {
			_ = os.WriteFile(name, value, 0) // as above
		}
		return c.make(ports)
	})
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Inside runs f on a thread in a network namespace of its own. What f opens stays
// there, and keeps the namespace.
func Inside(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() { // whose namespace is the process's to others
			result <- Inside(f)
			runtime.UnlockOSThread()
			return
		}
		// Never unlocked: the thread ends with the goroutine.
		err := unix.Unshare(unix.CLONE_NEWNET)
		switch err {
		case nil:
			err = f()
		case unix.EPERM:
			err = ErrPermission
		}
		result <- err
	}()
	return <-result
}

// make fills the namespace of the calling thread.
func (c *Copy) make(ports []uint16) error {
	r, err := dialRoute()
	if err != nil {
		return err
	}
	defer unix.Close(int(r))
	if err := r.up(1); err != nil { // lo
		return err
	}
	for _, d := range c.devices {
		// Every namespace has some tunnels, such as sit0, once it is made.
		if err := d.make(r); err != nil && slices.ContainsFunc(c.routes, func(to route) bool { return to.device == d }) {
			return err
		}
	}
	for _, to := range c.routes {
		if err := r.addRoute(to.source, to.device.index); err != nil {
			if to.source.Addr().Is6() { // which the kernel need not have
				continue
			}
			return fmt.Errorf("route to %s: %w", to.source, err)
		}
		// To containers, and whatever else packets are sent on to.
		_ = r.addRoute(netip.PrefixFrom(to.source.Addr(), 0), to.device.index)
		// The kernel puts the routes of IPv6 addresses off (addrconf_dad_work).
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if _, _, err := r.lookup(to.local); err != nil { // ErrOwn, once it is there
				break
			}
		}
	}
	for _, port := range ports {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port)) // nobody accepts: the kernel alone answers
		if err != nil {
			return err
		}
		c.listeners = append(c.listeners, l)
	}
	if c.conn, err = nftset.Dial(); err != nil {
		return err
	}
	c.conn.SetTimeout(patience)
	for _, t := range c.tables {
		t.prepare()
		if err := t.load(c.conn); err != nil {
			c.Omitted = append(c.Omitted, fmt.Sprintf("table %s (%v)", t.Table, err))
		}
	}
	copies, err := readTables(c.conn)
	if err != nil {
		return err
	}
	for _, t := range copies {
		original := c.tables.find(t.Table)
		for chain, rules := range t.rules {
			for i, rule := range rules { // in each chain they are in the same order
				original.copies[rule.Handle] = original.rules[chain][i]
			}
		}
	}
	if err := c.loadTrace(); err != nil {
		return fmt.Errorf("trace packets: %w", err)
	}
	if c.trace, err = nftset.Dial(); err != nil {
		return err
	}
	return c.trace.Subscribe(unix.NFNLGRP_NFTRACE, 8<<20)
}

// Our own tables in the copy: the first sees each packet before the rules do and has
// it traced, the last sees what no rule dropped.
var (
	first = nftset.Table{Family: nftset.NetDev, Name: "nftwl-trace"}
	last  = nftset.Table{Family: nftset.INet, Name: "nftwl-trace"}
)

func (c *Copy) loadTrace() error {
	attr := nftset.AppendAttribute
	batch := c.conn.Batch()
	chain := func(t nftset.Table, chain string, number, priority uint32, dev []byte) {
		hook := attr(attr(dev, unix.NFTA_HOOK_HOOKNUM, big32(number)), unix.NFTA_HOOK_PRIORITY, big32(priority))
		o := attr(attr(nil, attrTable, name(t.Name)), unix.NFTA_CHAIN_NAME, name(chain))
		o = attr(attr(o, unix.NFTA_CHAIN_HOOK, hook), unix.NFTA_CHAIN_TYPE, name("filter"))
		batch.Put(t, nftset.Object{Type: unix.NFT_MSG_NEWCHAIN, Attrs: o})
	}
	for _, t := range []nftset.Table{first, last} {
		batch.Put(t, nftset.Object{Type: unix.NFT_MSG_NEWTABLE, Attrs: attr(attr(nil, unix.NFTA_TABLE_NAME, name(t.Name)), unix.NFTA_TABLE_FLAGS, big32(0))})
	}
	// The last of all: conntrack's own is at the maximum.
	chain(last, "input", unix.NF_INET_LOCAL_IN, 1<<31-2, nil)
	chain(last, "postrouting", unix.NF_INET_POST_ROUTING, 1<<31-2, nil)
	one := attr(attr(nil, unix.NFTA_IMMEDIATE_DREG, big32(unix.NFT_REG_1)), unix.NFTA_IMMEDIATE_DATA, attr(nil, unix.NFTA_DATA_VALUE, []byte{1}))
	trace := attr(attr(nil, unix.NFTA_META_KEY, big32(unix.NFT_META_NFTRACE)), unix.NFTA_META_SREG, big32(unix.NFT_REG_1))
	for _, d := range c.devices {
		if d.tun < 0 {
			continue
		}
		chain(first, d.name, unix.NF_NETDEV_INGRESS, 1<<31, attr(nil, hookDev, name(d.name)))
		o := attr(attr(nil, attrTable, name(first.Name)), unix.NFTA_RULE_CHAIN, name(d.name))
		o = attr(o, unix.NFTA_RULE_EXPRESSIONS, encode([]expression{{"immediate", one}, {"meta", trace}})) // meta nftrace set 1
		batch.Put(first, nftset.Object{Type: unix.NFT_MSG_NEWRULE, Attrs: o})
	}
	return batch.Commit()
}

// Close ends the copy.
func (c *Copy) Close() {
	for _, conn := range []*nftset.Conn{c.conn, c.trace} {
		if conn != nil {
			conn.Close()
		}
	}
	for _, d := range c.devices {
		if d.tun >= 0 {
			unix.Close(d.tun)
		}
	}
	for _, l := range c.listeners {
		l.Close()
	}
}

// Conn is a connection to the copy, to change what its sets hold.
func (c *Copy) Conn() *nftset.Conn { return c.conn }

// Connection is a connection to the copy, from a remote end that is ours.
type Connection struct {
	copy  *Copy
	route route
	next  segment // that the remote end sends
}

// Dial makes a connection from an address of the sources to one of the ports,
// and tells what became of its first packet.
func (c *Copy) Dial(from netip.Addr, port uint16) (*Connection, *Result, error) {
	i := slices.IndexFunc(c.routes, func(r route) bool { return r.source.Contains(from) })
	if i < 0 {
		return nil, nil, fmt.Errorf("%s is not one of the sources", from)
	}
	c.port++
	conn := &Connection{c, c.routes[i], segment{
		from: netip.AddrPortFrom(from, c.port), to: netip.AddrPortFrom(c.routes[i].local, port), flags: syn,
	}}
	result, err := c.send(conn.route.device, conn.next)
	return conn, result, err
}

// Open ends the handshake: it sends the acknowledgement, and tells what became of
// that. It must follow an accepted Dial. ok is false if the copy did not
// answer the first packet within a second.
func (conn *Connection) Open() (result *Result, ok bool, err error) {
	c := conn.copy
	buf := make([]byte, 2048)
	var fds []unix.PollFd
	for _, d := range c.devices {
		fds = append(fds, unix.PollFd{Fd: int32(d.tun), Events: unix.POLLIN})
	}
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); {
		_, _ = unix.Poll(fds, 100) // the deadline ends it
		for _, d := range c.devices {
			n, err := unix.Read(d.tun, buf)
			if err != nil {
				continue // EAGAIN
			}
			s, parsed := parse(buf[:n])
			switch {
			case !parsed:
			case s.flags == syn: // it was sent on, to a container, for which we answer
				if _, err := c.send(d, segment{from: s.to, to: s.from, ack: s.seq + 1, flags: syn | ack}); err != nil {
					return nil, false, err
				}
			case s.to == conn.next.from && s.from == conn.next.to && s.flags == syn|ack:
				conn.next.flags, conn.next.seq, conn.next.ack = ack, s.ack, s.seq+1
				result, err := c.send(conn.route.device, conn.next)
				return result, true, err
			}
		}
	}
	return nil, false, nil
}

// send sends a packet by a device, and reads what became of it.
func (c *Copy) send(by *device, s segment) (*Result, error) {
	if _, err := unix.Write(by.tun, s.packet()); err != nil {
		return nil, fmt.Errorf("send a packet: %w", err)
	}
	var path []Step
	var base hook
	ended := true // the base chain has
	c.trace.SetDeadline(time.Now().Add(patience))
	for {
		var result *Result
		err := c.trace.Receive(func(o nftset.Object) error {
			if o.Type != unix.NFT_MSG_TRACE || result != nil {
				return nil
			}
			step := Step{
				Table: nftset.Table{Family: o.Family, Name: text(attribute(o.Attrs, unix.NFTA_TRACE_TABLE))},
				Chain: text(attribute(o.Attrs, unix.NFTA_TRACE_CHAIN)),
			}
			t := c.tables.find(step.Table)
			if ended && t != nil { // not one of our own
				base = t.hooks[step.Chain]
			}
			step.base = base
			code := int32(number(attribute(attribute(o.Attrs, unix.NFTA_TRACE_VERDICT), unix.NFTA_VERDICT_CODE)))
			switch number(attribute(o.Attrs, unix.NFTA_TRACE_TYPE)) {
			case unix.NFT_TRACETYPE_POLICY:
				code = int32(number(attribute(o.Attrs, unix.NFTA_TRACE_POLICY)))
				ended = true
				if step.Table == last {
					result = &Result{Verdict: Accept, Step: accepting(path), Path: path}
				}
			case unix.NFT_TRACETYPE_RULE:
				handle := attribute(o.Attrs, unix.NFTA_TRACE_RULE_HANDLE)
				if ended = code >= 0; len(handle) == 8 && t != nil {
					step.Rule = t.copies[binary.BigEndian.Uint64(handle)]
				}
				if step.Rule == nil || !ended { // the end of a chain; or it goes on
					return nil
				}
			default:
				return nil // the end of a chain, by return
			}
			switch {
			case step.Table == first || step.Table == last:
				return nil
			case code == nfDrop && step.Rule != nil && step.Rule.rejects:
				step.Verdict = Reject
			case code == nfDrop:
				step.Verdict = Drop
			case code == nfAccept, code == nfStolen: // by synproxy, which answers
				step.Verdict = Accept
			default:
				step.Verdict = Queue
			}
			path = append(path, step)
			if code != nfAccept {
				result = &Result{Verdict: step.Verdict, Step: step, Path: path}
			}
			return nil
		})
		if errors.Is(err, nftset.ErrDeadline) {
			return nil, fmt.Errorf("%w on a packet from %s to port %d", ErrNoVerdict, s.from.Addr(), s.to.Port())
		}
		if err != nil || result != nil {
			return result, err
		}
	}
}

// Verdicts of include/uapi/linux/netfilter.h.
const (
	nfDrop   = 0
	nfAccept = 1
	nfStolen = 2
)

// accepting returns the step that let a packet in.
func accepting(path []Step) (decided Step) {
	for _, s := range path {
		input := s.Table.Family != nftset.NetDev && s.base.kind == "filter" &&
			(s.base.number == unix.NF_INET_LOCAL_IN || s.base.number == unix.NF_INET_FORWARD)
		if input && s.Verdict == Accept && (s.Rule != nil || decided.Rule == nil) {
			decided = s
		}
	}
	return decided
}

// Text returns the step's rule as nft lists it, without counters, or "policy drop".
// Without nft, it names the rule's handle. Call it on the thread that called Open,
// or in a process that has one namespace.
func (c *Copy) Text(s Step) string {
	if s.Rule == nil {
		return "policy " + string(s.Verdict)
	}
	if c.texts == nil {
		c.texts = list()
	}
	if text := c.texts[s.Table][s.Rule.Handle]; text != "" {
		return text
	}
	return fmt.Sprintf("rule with handle %d", s.Rule.Handle)
}

// list asks nft for the rules of each table, by their handles. It lists the
// whole ruleset, since nft 1.0.6 reads every element of a table that it lists
// alone, --terse or not.
func list() map[nftset.Table]map[uint64]string {
	texts := make(map[nftset.Table]map[uint64]string)
	out, _ := exec.Command("nft", "--handle", "--stateless", "--terse", "list", "ruleset").Output() // without it, there are handles
	var rules map[uint64]string
	for line := range strings.Lines(string(out)) {
		text, handle, _ := strings.Cut(strings.TrimSpace(line), " # handle ")
		if name, ok := strings.CutPrefix(text, "table "); ok && line[0] == 't' {
			rules = make(map[uint64]string)
			if t, err := nftset.ParseTable(strings.TrimSuffix(name, " {")); err == nil {
				texts[t] = rules
			}
		} else if n, err := strconv.ParseUint(handle, 10, 64); err == nil {
			rules[n] = text
		}
	}
	return texts
}
