package nftset

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Meaning is what a change means to other machines that share a set. It does not
// show in the change: a deletion can be somebody's decision, or what a flush did
// to each element. So a Conn encodes it in its netlink port, which is the one thing
// that a notification tells of who made the change (nlmsg_pid).
type Meaning uint32

// The meanings.
const (
	Unknown    Meaning = iota // that of other programs
	Decided                   // somebody wants it
	DecidedFor                // somebody wants it of the elements with one comment alone
	Local                     // it is about this machine: what is deleted is lost, what is added is old
	watching                  // a Watcher's, which changes nothing
)

// A port's upper bits are the meaning. Ports of processes' first sockets are
// their ids, which are below these; the others that the kernel chooses are above
// (netlink_autobind() in net/netlink/af_netlink.c).
const meaningShift = 28

// bind gives a socket a port with the meaning. Without a free one, it is the
// kernel's choice.
func bind(fd int, m Meaning) {
	first := uint32(m)<<meaningShift | uint32(os.Getpid())<<6&(1<<meaningShift-1)
	for port := range uint32(64) { // of the sockets of one process
		if unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: first | port}) != unix.EADDRINUSE {
			return
		}
	}
}

// Event is a change of a set.
type Event struct {
	Set string // its name

	// Generation: all events of the transaction that made this generation of the
	// ruleset have been reported; see Conn.Generation. The other fields are zero.
	Generation uint32

	// Replaced: the set was created, deleted or replaced. There are no events of
	// the elements that it lost. The fields below are zero.
	Replaced bool

	// Deleted: the element was deleted; else it was added or renewed. In a
	// transaction that does both, the last event counts. An element that expires
	// or that a rule adds is not reported.
	Deleted bool
	// Element is the element with its comment and, of one that was deleted, the
	// time that was left. Its Timeout says only whether it is permanent.
	Element Element
	Meaning Meaning // of a change of an element
}

// ErrOverrun: a Watcher has missed events, because the socket's buffer was full.
var ErrOverrun = errors.New("events were lost")

// watchBuffer is the most that the kernel keeps of events that are not read yet.
// It takes no memory before it is used.
const watchBuffer = 64 << 20

// Watcher hears of the changes of a table's sets, by whomever they are made. It
// needs CAP_NET_ADMIN.
//
// With any listener, the kernel allocates some 8 KB for each element of a
// transaction until it has committed it (nf_tables_setelem_notify() in
// net/netfilter/nf_tables_api.c).
type Watcher struct {
	conn  *Conn
	table Table
}

// Watch begins to watch a table, which need not exist.
func Watch(table Table) (*Watcher, error) {
	c, err := DialAs(watching)
	if err != nil {
		return nil, err
	}
	if err := c.Subscribe(unix.NFNLGRP_NFTABLES, watchBuffer); err != nil {
		c.Close()
		return nil, table.error(err)
	}
	return &Watcher{c, table}, nil
}

// Close closes the connection.
func (w *Watcher) Close() error { return w.conn.Close() }

// Read waits until the deadline for changes of any table, and calls f for each
// event among them. If nothing changes, it returns ErrDeadline. After ErrOverrun, the next call goes
// on with what came later; what was missed has to be read from the sets.
func (w *Watcher) Read(deadline time.Time, f func(Event)) error {
	w.conn.SetDeadline(deadline)
	err := w.conn.receive(func(m message) error {
		if m.typ&^subsystem == unix.NFT_MSG_NEWGEN { // of no family
			f(Event{Generation: beUint32(Attribute(m.body, unix.NFTA_GEN_ID))})
			return nil
		}
		if m.family != w.table.Family {
			return nil
		}
		switch m.typ &^ subsystem {
		case unix.NFT_MSG_NEWSET, unix.NFT_MSG_DELSET:
			if attributeString(m.body, unix.NFTA_SET_TABLE) == w.table.Name {
				f(Event{Set: attributeString(m.body, unix.NFTA_SET_NAME), Replaced: true})
			}
		case unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
			if attributeString(m.body, unix.NFTA_SET_ELEM_LIST_TABLE) == w.table.Name {
				return w.elements(m, f)
			}
		}
		return nil
	})
	if errors.Is(err, unix.ENOBUFS) {
		return ErrOverrun
	}
	return err
}

// elements reports the elements of a message.
func (w *Watcher) elements(m message, f func(Event)) error {
	e := Event{
		Set:     attributeString(m.body, unix.NFTA_SET_ELEM_LIST_SET),
		Deleted: m.typ&^subsystem == unix.NFT_MSG_DELSETELEM,
	}
	if meaning := Meaning(m.port >> meaningShift); meaning < watching {
		e.Meaning = meaning
	}
	return Attributes(Attribute(m.body, unix.NFTA_SET_ELEM_LIST_ELEMENTS), func(_ uint16, data []byte) error {
		// The key's length tells the types apart that a set of ours can have.
		// Those of other sets do not matter.
		set := &Set{Timeout: math.MaxInt64}
		key := Attribute(Attribute(data, unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE)
		for _, set.Key = range KeyTypes {
			if set.Key.len() == len(key) {
				var err error
				if e.Element, err = decodeElement(set, data); err == nil {
					f(e)
				}
				break
			}
		}
		return nil
	})
}

func attributeString(b []byte, typ uint16) string {
	return strings.TrimSuffix(string(Attribute(b, typ)), "\x00")
}

// Listeners tells who hears of changes in the network namespace of the calling
// thread: a Watcher, and any program at all.
func Listeners() (watcher, any bool, err error) {
	text, err := os.ReadFile("/proc/thread-self/net/netlink")
	if err != nil {
		return false, false, err
	}
	for line := range strings.Lines(string(text)) {
		// sk Eth Pid Groups …; see netlink_native_seq_show() in
		// net/netlink/af_netlink.c
		f := strings.Fields(line)
		if len(f) < 4 || f[1] != strconv.Itoa(unix.NETLINK_NETFILTER) {
			continue
		}
		groups, err := strconv.ParseUint(f[3], 16, 32)
		if err != nil {
			return false, false, fmt.Errorf("/proc/net/netlink: %w", err)
		}
		if groups&(1<<(unix.NFNLGRP_NFTABLES-1)) != 0 {
			any = true
			port, err := strconv.ParseUint(f[2], 10, 32)
			watcher = watcher || err == nil && Meaning(port>>meaningShift) == watching
		}
	}
	return watcher, any, nil
}

// Room is how many elements a transaction should change at most, so that what the
// kernel allocates for listeners (see Watcher) stays below 100 MB. Without a
// listener, it is all.
func Room() int {
	if _, any, err := Listeners(); any && err == nil {
		return 10_000
	}
	return math.MaxInt
}
