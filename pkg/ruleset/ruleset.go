// Package ruleset tells what the kernel's nftables rules make of a packet. It
// walks the rules as nft decompiles them, so that two firewalls that are
// written differently and do the same are the same to it. Nothing is sent.
//
// The format is that of libnftables-json(5).
package ruleset

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"nftwl/pkg/nftset"
)

// Arguments make nft print what Read reads. Sets without their elements:
// 100,000 of them take nft 1.7 s and 7 MB, and their definition 5 ms. Numbers
// for protocols, since their names depend on /etc/protocols.
var Arguments = []string{"--json", "--terse", "--numeric-protocol"}

// Ruleset is what is known of the rules. The zero value is an empty one.
type Ruleset struct {
	// Ingress are the chains that may drop a packet before the others see it.
	// No packet is walked through them.
	Ingress []*Chain

	chains map[Set]*Chain
	base   []*Chain // that see a packet to this machine, in the order of the kernel
	sets   map[Set]*set
	over   map[Set]bool // named limits: whether they match above the rate
}

// Set names a set, a map or whatever else has a name of its own in a table.
type Set struct {
	Table string // as nft writes it: "inet filter"
	Name  string
}

// set is a set or a map whose elements rules look up.
type set struct {
	kind     string // "set" or "map"
	typ      any    // of its keys
	elements []any
}

// Chain is a chain of rules.
type Chain struct {
	Set
	hook     string // empty where packets come by jumps alone
	priority int
	drop     bool // its policy
	rules    []*Rule
}

// String names the chain.
func (c *Chain) String() string { return fmt.Sprintf("chain %s of table %s", c.Name, c.Table) }

// Rule is a rule of a chain.
type Rule struct {
	Chain   *Chain
	Handle  int
	Comment string

	statements []map[string]any // each has one key
}

// String names the rule, and where it is.
func (r *Rule) String() string {
	if r.Comment == "" {
		return fmt.Sprintf("rule %d in %s", r.Handle, r.Chain)
	}
	return fmt.Sprintf("rule %d (%q) in %s", r.Handle, r.Comment, r.Chain)
}

// Read adds what nft printed of a whole ruleset, or of one set.
func (r *Ruleset) Read(data []byte) error {
	var document struct {
		Nftables []map[string]json.RawMessage
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	if err := decoder.Decode(&document); err != nil {
		return fmt.Errorf("what nft prints is no JSON: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return errors.New("what nft prints goes on after its JSON")
	}
	if r.chains == nil {
		r.chains, r.sets, r.over = make(map[Set]*Chain), make(map[Set]*set), make(map[Set]bool)
	}
	dormant := make(map[string]bool)
	for _, object := range document.Nftables {
		for kind, data := range object {
			var o struct {
				Family, Table, Name, Chain string
				Handle                     int
				Flags                      any
				Type                       any
				Hook, Policy               string
				Prio                       int
				Comment                    string
				Expr                       []map[string]any
				Elem                       []any
				Inv                        bool
			}
			switch kind {
			case "table", "chain", "rule", "set", "map", "limit":
			default:
				continue
			}
			if err := json.Unmarshal(data, &o); err != nil {
				return fmt.Errorf("what nft prints of a %s: %w", kind, err)
			}
			name := Set{o.Family + " " + o.Table, o.Name}
			switch kind {
			case "table":
				// nft 1.0.6 prints other words than this one.
				dormant[o.Family+" "+o.Name] = o.Flags == "dormant"
			case "chain":
				c := r.chain(name)
				switch sees := o.Hook == "prerouting" || o.Hook == "input"; {
				case o.Type != "filter" || dormant[name.Table]:
				case o.Hook == "ingress":
					r.Ingress = append(r.Ingress, c)
				case sees && slices.Contains([]string{"inet", "ip", "ip6"}, o.Family):
					c.hook, c.priority, c.drop = o.Hook, o.Prio, o.Policy == "drop"
					r.base = append(r.base, c)
				}
			case "rule":
				c := r.chain(Set{name.Table, o.Chain})
				c.rules = append(c.rules, &Rule{c, o.Handle, o.Comment, o.Expr})
			case "set", "map":
				if r.sets[name] != nil && o.Elem == nil {
					o.Elem = []any{} // asked for, and there are none
				}
				r.sets[name] = &set{kind, o.Type, o.Elem}
			case "limit":
				r.over[name] = o.Inv
			}
		}
	}
	slices.SortStableFunc(r.base, func(a, b *Chain) int {
		// By luck in the order of the alphabet, backwards.
		return cmp.Or(cmp.Compare(b.hook, a.hook), cmp.Compare(a.priority, b.priority))
	})
	return nil
}

func (r *Ruleset) chain(name Set) *Chain {
	c := r.chains[name]
	if c == nil {
		c = &Chain{Set: name}
		r.chains[name] = c
	}
	return c
}

// Sets returns the sets of a name, whatever their table.
func (r *Ruleset) Sets(name string) []Set {
	var sets []Set
	for s := range r.sets {
		if s.Name == name {
			sets = append(sets, s)
		}
	}
	slices.SortFunc(sets, func(a, b Set) int { return cmp.Compare(a.Table, b.Table) })
	return sets
}

// Unread returns, as nft's commands that list them for Read, the sets and maps
// whose elements are not known and cannot be many: those of ports, interfaces
// or the like.
func (r *Ruleset) Unread() [][]string {
	var commands [][]string
	for name, s := range r.sets {
		types, ok := s.typ.([]any)
		if !ok {
			types = []any{s.typ}
		}
		small := func(t any) bool {
			return t == "inet_service" || t == "inet_proto" || t == "ct_state" || t == "ifname" || t == "iface_index"
		}
		if s.elements != nil || slices.ContainsFunc(types, func(t any) bool { return !small(t) }) {
			continue
		}
		// nft reads its arguments as a program.
		table, err := nftset.ParseTable(name.Table)
		if err == nil && nftset.CheckName(name.Name) == nil {
			commands = append(commands, []string{"--json", "--numeric-protocol", "list", s.kind, table.Family.String(), table.Name, name.Name})
		}
	}
	return commands
}
