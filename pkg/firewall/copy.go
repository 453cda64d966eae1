package firewall

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
)

// Rule is a rule of the machine's.
type Rule struct {
	Handle uint64 // as `nft -a list ruleset` shows it

	rejects bool // it answers what it drops
}

// table is a table and all that is in it.
type table struct {
	nftset.Table
	objects map[uint16][]nftset.Object // by the message that makes them, in the order in which they were made
	hooks   map[string]hook            // of its base chains
	rules   map[string][]*Rule         // by chain
	copies  map[uint64]*Rule           // the same, by their handles in the copy
}

// hook is where a base chain sees packets.
type hook struct {
	kind   string // "filter", "nat" or "route"
	number uint32 // unix.NF_INET_LOCAL_IN, …; another family's have no meaning here
}

// The kinds of objects, in the order in which they refer to each other. The
// first attribute of each names its table.
var kinds = []struct{ get, add uint16 }{
	{unix.NFT_MSG_GETTABLE, unix.NFT_MSG_NEWTABLE},
	{unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_NEWCHAIN},
	{unix.NFT_MSG_GETOBJ, unix.NFT_MSG_NEWOBJ},
	{unix.NFT_MSG_GETSET, unix.NFT_MSG_NEWSET},
	{0, unix.NFT_MSG_NEWSETELEM},
	{unix.NFT_MSG_GETRULE, unix.NFT_MSG_NEWRULE},
}

// Of a message of any kind in kinds.
const attrTable = 1

// Numbers that x/sys/unix does not have, from
// include/uapi/linux/netfilter/nf_tables.h.
const (
	hookDev    = 3 // NFTA_HOOK_DEV
	chainUse   = 6 // NFTA_CHAIN_USE
	chainFlags = 10
	setHandle  = 16
	setType    = 19
	setCount   = 20
)

// tables are in the order in which they were made, by which the kernel calls chains of
// the same priority.
type tables []*table

// find returns a table; nil if none has the name.
func (all tables) find(t nftset.Table) *table {
	if i := slices.IndexFunc(all, func(x *table) bool { return x.Table == t }); i >= 0 {
		return all[i]
	}
	return nil
}

// readTables reads the ruleset of the connection's namespace, without elements
// of sets. It is of one generation.
func readTables(conn *nftset.Conn) (tables, error) {
	for range 10 {
		before, err := conn.Generation()
		if err != nil {
			return nil, err
		}
		var all tables
		for _, kind := range kinds {
			if kind.get == 0 {
				continue
			}
			err := conn.Objects(kind.get, true, 0, nil, func(o nftset.Object) error {
				name := nftset.Table{Family: o.Family, Name: text(attribute(o.Attrs, attrTable))}
				t := all.find(name)
				if t == nil {
					t = &table{name, make(map[uint16][]nftset.Object), make(map[string]hook), make(map[string][]*Rule), make(map[uint64]*Rule)}
					all = append(all, t)
				}
				t.add(kind.add, o)
				return nil
			})
			if err != nil {
				return nil, fmt.Errorf("read the ruleset: %w", err)
			}
		}
		if after, err := conn.Generation(); err != nil || after == before {
			return all, err
		}
	}
	return nil, nftset.ErrBusy
}

func (t *table) add(kind uint16, o nftset.Object) {
	t.objects[kind] = append(t.objects[kind], o)
	switch kind {
	case unix.NFT_MSG_NEWCHAIN:
		if h := attribute(o.Attrs, unix.NFTA_CHAIN_HOOK); h != nil {
			t.hooks[text(attribute(o.Attrs, unix.NFTA_CHAIN_NAME))] = hook{text(attribute(o.Attrs, unix.NFTA_CHAIN_TYPE)), number(attribute(h, unix.NFTA_HOOK_HOOKNUM))}
		}
	case unix.NFT_MSG_NEWRULE:
		chain := text(attribute(o.Attrs, unix.NFTA_RULE_CHAIN))
		rule := new(Rule)
		if handle := attribute(o.Attrs, unix.NFTA_RULE_HANDLE); len(handle) == 8 {
			rule.Handle = binary.BigEndian.Uint64(handle)
		}
		for _, e := range expressions(o) {
			rule.rejects = rule.rejects || e.name == "reject" ||
				e.name == "target" && text(attribute(e.data, unix.NFTA_TARGET_NAME)) == "REJECT"
		}
		t.rules[chain] = append(t.rules[chain], rule)
	}
}

type expression struct {
	name string
	data []byte // attributes; nil for none
}

func expressions(rule nftset.Object) (all []expression) {
	each(attribute(rule.Attrs, unix.NFTA_RULE_EXPRESSIONS), func(_ uint16, e []byte) {
		all = append(all, expression{text(attribute(e, unix.NFTA_EXPR_NAME)), attribute(e, unix.NFTA_EXPR_DATA)})
	})
	return all
}

// encode is the opposite of expressions.
func encode(expressions []expression) (list []byte) {
	for _, e := range expressions {
		elem := nftset.AppendAttribute(nil, unix.NFTA_EXPR_NAME, name(e.name))
		if e.data != nil {
			elem = nftset.AppendAttribute(elem, unix.NFTA_EXPR_DATA, e.data)
		}
		list = nftset.AppendAttribute(list, unix.NFTA_LIST_ELEM, elem)
	}
	return list
}

// prepare turns objects that were read into what another namespace takes.
func (t *table) prepare() {
	for kind, objects := range t.objects {
		for i := range objects {
			o := &objects[i]
			o.Type = kind
			switch kind {
			case unix.NFT_MSG_NEWTABLE:
				// The other flags bind a table to a process.
				dormant := number(attribute(o.Attrs, unix.NFTA_TABLE_FLAGS)) & unix.NFT_TABLE_F_DORMANT
				o.Attrs = nftset.AppendAttribute(nftset.AppendAttribute(nil, attrTable, name(t.Name)), unix.NFTA_TABLE_FLAGS, big32(dormant))
			case unix.NFT_MSG_NEWCHAIN:
				// The flags are for hardware, and for a chain without a name.
				o.Attrs = without(o.Attrs, unix.NFTA_CHAIN_HANDLE, chainUse, chainFlags)
			case unix.NFT_MSG_NEWSET:
				o.Attrs = nftset.AppendAttribute(without(o.Attrs, setHandle, setType, setCount), unix.NFTA_SET_ID, big32(uint32(i+1)))
			case unix.NFT_MSG_NEWRULE:
				o.Attrs = prepareRule(*o)
			}
		}
	}
}

func prepareRule(o nftset.Object) []byte {
	all := expressions(o)
	// The copy has no flowtables. A rule ends at flow_offload for all packets but the
	// one of an open connection that it puts into the flowtable:
	// nft_flow_offload_eval() of the kernel's net/netfilter/nft_flow_offload.c.
	if i := slices.IndexFunc(all, func(e expression) bool { return e.name == "flow_offload" }); i >= 0 {
		all = all[:i]
	}
	extension := false // of iptables'
	var protocol byte
	for i, e := range all {
		switch e.name {
		case "match", "target":
			extension = true
		case "cmp":
			if value := attribute(attribute(e.data, unix.NFTA_CMP_DATA), unix.NFTA_DATA_VALUE); len(value) == 1 && protocol == 0 {
				protocol = value[0]
			}
		case "dynset":
			// The kernel lists a timeout of 0 where a rule gives none, and refuses it
			// in a set without timeouts.
			if timeout := attribute(e.data, unix.NFTA_DYNSET_TIMEOUT); len(bytes.Trim(timeout, "\x00")) == 0 {
				all[i].data = without(e.data, unix.NFTA_DYNSET_TIMEOUT)
			}
		}
	}
	attrs := without(o.Attrs, unix.NFTA_RULE_HANDLE, unix.NFTA_RULE_POSITION, unix.NFTA_RULE_EXPRESSIONS)
	attrs = nftset.AppendAttribute(attrs, unix.NFTA_RULE_EXPRESSIONS, encode(all))
	if extension {
		// Extensions ask for the protocol that the rule is for, and the kernel does
		// not list it apart. It is the one byte that a rule of iptables-nft compares.
		compat := nftset.AppendAttribute(nil, unix.NFTA_RULE_COMPAT_PROTO, big32(uint32(protocol)))
		compat = nftset.AppendAttribute(compat, unix.NFTA_RULE_COMPAT_FLAGS, big32(0))
		attrs = nftset.AppendAttribute(attrs, unix.NFTA_RULE_COMPAT, compat)
	}
	return attrs
}

// most is how many elements a set that is copied whole can have. Of a larger one
// whose keys are addresses, only the elements that the packets can match are copied.
const most = 4096

var errMany = errors.New("too many elements")

// readElements reads the elements of the sets, and returns the sets that have too
// many.
func (t *table) readElements(conn *nftset.Conn, sources []netip.Prefix, ports []uint16) (omitted []string, err error) {
	for _, set := range t.objects[unix.NFT_MSG_NEWSET] {
		setName := attribute(set.Attrs, unix.NFTA_SET_NAME)
		list := nftset.AppendAttribute(nil, attrTable, name(t.Name))
		list = slices.Clip(nftset.AppendAttribute(list, unix.NFTA_SET_ELEM_LIST_SET, setName))
		kind := keyKind(number(attribute(set.Attrs, unix.NFTA_SET_KEY_TYPE)))
		known := slices.Contains(keyKinds, kind)
		found, err := t.dump(set, list)
		switch {
		case errors.Is(err, errMany) && known:
			interval := number(attribute(set.Attrs, unix.NFTA_SET_FLAGS))&unix.NFT_SET_INTERVAL != 0
			found, err = t.lookup(conn, list, kind.keys(sources, ports), interval)
		case errors.Is(err, errMany):
			omitted = append(omitted, fmt.Sprintf("the elements of %s %s, more than %d", t.Table, text(setName), most))
			continue
		}
		if err != nil && !errors.Is(err, unix.ENOENT) { // it is gone
			return nil, fmt.Errorf("read set %s: %w", text(setName), err)
		}
		t.objects[unix.NFT_MSG_NEWSETELEM] = append(t.objects[unix.NFT_MSG_NEWSETELEM], found...)
	}
	return omitted, nil
}

// dump reads all elements of a set, unless they are too many. That leaves the
// connection unusable, so it has one of its own.
func (t *table) dump(set nftset.Object, list []byte) (found []nftset.Object, err error) {
	if int(number(attribute(set.Attrs, setCount))) > most { // which kernels before 6.16 do not tell
		return nil, errMany
	}
	conn, err := nftset.Dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetTimeout(patience)
	count := 0
	err = conn.Objects(unix.NFT_MSG_GETSETELEM, true, t.Family, list, func(o nftset.Object) error {
		each(attribute(o.Attrs, unix.NFTA_SET_ELEM_LIST_ELEMENTS), func(uint16, []byte) { count++ })
		if found = append(found, o); count > most {
			return errMany
		}
		return nil
	})
	return found, err
}

// lookup reads the elements of a set that keys find. Each element of an interval set
// is two: its start, and its end.
func (t *table) lookup(conn *nftset.Conn, list []byte, keys [][]byte, interval bool) (found []nftset.Object, err error) {
	conn.SetTimeout(patience)
	flags := []uint32{0}
	if interval {
		flags = append(flags, unix.NFT_SET_ELEM_INTERVAL_END)
	}
	seen := make(map[string]bool)
	for _, key := range keys {
		for _, flag := range flags {
			elem := nftset.AppendAttribute(nil, unix.NFTA_SET_ELEM_KEY, nftset.AppendAttribute(nil, unix.NFTA_DATA_VALUE, key))
			elem = nftset.AppendAttribute(elem, unix.NFTA_SET_ELEM_FLAGS, big32(flag))
			elems := nftset.AppendAttribute(list, unix.NFTA_SET_ELEM_LIST_ELEMENTS, nftset.AppendAttribute(nil, unix.NFTA_LIST_ELEM, elem))
			err := conn.Objects(unix.NFT_MSG_GETSETELEM, false, t.Family, elems, func(o nftset.Object) error {
				if !seen[string(o.Attrs)] {
					seen[string(o.Attrs)] = true
					found = append(found, o)
				}
				return nil
			})
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return nil, err
			}
		}
	}
	return found, nil
}

// keyKind is the type of a set's keys, as nft numbers it (enum datatypes in
// its include/datatype.h, six bits a part): one of those below, or 0.
type keyKind uint32

const (
	addr4     keyKind = 7
	addr6     keyKind = 8
	addr4Port         = addr4<<6 | 13
	addr6Port         = addr6<<6 | 13
)

var keyKinds = []keyKind{addr4, addr6, addr4Port, addr6Port}

// keys returns those by which rules can look up the sources, under any mask.
func (k keyKind) keys(sources []netip.Prefix, ports []uint16) (keys [][]byte) {
	for _, source := range sources {
		if a := source.Addr(); a.Is6() != (k == addr6 || k == addr6Port) {
			continue
		}
		for bits := range source.Bits() + 1 {
			p, _ := source.Addr().Prefix(bits) // fails only for bits out of range
			key := p.Addr().AsSlice()
			if k == addr4 || k == addr6 {
				keys = append(keys, key)
				continue
			}
			for _, port := range ports {
				keys = append(keys, append(slices.Clip(key), byte(port>>8), byte(port), 0, 0))
			}
		}
	}
	return keys
}

// load puts the table into the connection's namespace.
func (t *table) load(conn *nftset.Conn) error {
	batch := conn.Batch()
	for _, kind := range kinds {
		for _, o := range t.objects[kind.add] {
			batch.Put(t.Table, o)
		}
	}
	return batch.Commit()
}

// Attributes of objects that the kernel made are never truncated, so that
// reading them has no errors.

func each(b []byte, f func(typ uint16, data []byte)) {
	_ = nftset.Attributes(b, func(typ uint16, data []byte) error { f(typ, data); return nil })
}

func attribute(b []byte, which uint16) []byte { return nftset.Attribute(b, which) }

// without returns the attributes that are not of some types.
func without(b []byte, types ...uint16) (kept []byte) {
	each(b, func(typ uint16, data []byte) {
		if !slices.Contains(types, typ) {
			kept = nftset.AppendAttribute(kept, typ, data)
		}
	})
	return kept
}

func name(s string) []byte { return append([]byte(s), 0) }

func text(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }

func number(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func big32(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
