package snapshot

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"nftwl/pkg/nftset"
)

// File is what a file of sets holds.
type File struct {
	// Saved is when it was saved; zero if the file is no snapshot.
	Saved time.Time
	// Table is the table that it was saved from; zero if the file does not say.
	Table nftset.Instance
	Sets  []Section
	// Passed are the sets in a snapshot that are not wanted, as "line 12: set x".
	Passed []string
}

// Section is a set of a File.
type Section struct {
	nftset.Set
	Elements []nftset.Element
}

// ParseSets reads a file: a snapshot, or any other that nft -f loads. It takes
// the sets of a table that have one of the names. A file that has none of them
// is an error, with the File.
func ParseSets(text string, table nftset.Table, names []string) (f *File, err error) {
	if strings.HasPrefix(text, headerStart) {
		f, err = Parse(text, func(t nftset.Table, set string) bool { return t == table && slices.Contains(names, set) })
	} else {
		f, err = load(text, table, names)
	}
	if err == nil && len(f.Sets) == 0 {
		err = fmt.Errorf("none of the sets in it is one of table %s that the configuration names", table)
	}
	return f, err
}

// Drop leaves out the elements whose addresses are refused, and returns why.
func (f *File) Drop(refuse func(netip.Addr) error) (refused []error) {
	for i := range f.Sets {
		s := &f.Sets[i]
		s.Elements = slices.DeleteFunc(s.Elements, func(e nftset.Element) bool {
			if e.CatchAll() {
				return false
			}
			err := refuse(e.Addr)
			if err != nil {
				refused = append(refused, err)
			}
			return err != nil
		})
	}
	return refused
}

// Parse reads a snapshot, to the letter as Write writes it. Of the sets in it,
// it takes those that wanted accepts. An error begins with "line N: ".
//
// The comments of the elements are parts of the text, and keep it in memory.
func Parse(text string, wanted func(nftset.Table, string) bool) (*File, error) {
	f := &File{}
	r := reader{rest: text}
	var err error
	if f.Saved, f.Table, err = parseHeader(r.next()); err != nil {
		return nil, r.error(err)
	}
	// Before what the cut made of the last element.
	body := strings.TrimSuffix(r.rest, "\n")
	i := strings.LastIndexByte(body, '\n') + 1
	want, ok := parseTrailer(body[i:])
	if !ok {
		return nil, fmt.Errorf("line %d: %w", strings.Count(text, "\n")+1, errCutShort)
	}
	r.rest = body[:i]
	elements := 0
	for r.rest != "" {
		s, passed, err := r.set(wanted)
		if err != nil {
			return nil, r.error(err)
		}
		if passed != "" {
			f.Passed = append(f.Passed, passed)
			continue
		}
		elements += len(s.Elements)
		f.Sets = append(f.Sets, s)
	}
	// Those of the sets that were passed over are not counted.
	if elements > want || elements < want && len(f.Passed) == 0 {
		r.line++
		return nil, r.error(fmt.Errorf("the snapshot has %d elements, and its last line says %d; %s", elements, want, byHand))
	}
	return f, nil
}

const byHand = "after a change by hand, remove the first line"

// reader reads the lines of a snapshot.
type reader struct {
	rest string
	line int // of what was read last
}

// next returns the next line; "" after the last.
func (r *reader) next() (line string) {
	line, r.rest, _ = strings.Cut(r.rest, "\n")
	r.line++
	return line
}

func (r *reader) error(err error) error { return fmt.Errorf("line %d: %w", r.line, err) }

// unknown is the error of a line that Write does not write.
func unknown(line string) error {
	const most = 60
	if len(line) > most {
		return fmt.Errorf("%q… is not as nftwl writes it; %s", line[:most], byHand)
	}
	return fmt.Errorf("%q is not as nftwl writes it; %s", line, byHand)
}

// set reads a set, or passes over it. What it read must be what would be written
// for it: so every line is checked by one comparison.
func (r *reader) set(wanted func(nftset.Table, string) bool) (s Section, passed string, err error) {
	text := r.rest
	line := r.next()
	name, ok := strings.CutPrefix(line, "table ")
	name, ok2 := strings.CutSuffix(name, " {")
	if s.Table, err = nftset.ParseTable(name); !ok || !ok2 || err != nil {
		return s, "", unknown(line)
	}
	line = r.next()
	name, ok = strings.CutPrefix(line, "\tset ")
	s.Name, ok2 = strings.CutSuffix(name, " {")
	if !ok || !ok2 || nftset.CheckName(s.Name) != nil {
		return s, "", unknown(line)
	}
	pass := !wanted(s.Table, s.Name)
	if pass {
		passed = fmt.Sprintf("line %d: set %s", r.line, s.Name)
	}
	const list, ends = "\t\telements = {", "\t}"
	for line = r.next(); line != list && line != ends; line = r.next() {
		if !define(&s.Set, strings.TrimPrefix(line, "\t\t")) {
			return s, "", unknown(line)
		}
	}
	definition := text[:len(text)-len(r.rest)-len(line)-len("\n")]
	if string(appendSet(nil, &s.Set)) != definition {
		return s, "", unknown(definition[strings.LastIndexByte(definition[:len(definition)-1], '\n')+1 : len(definition)-1])
	}
	if line == list {
		n := strings.Count(r.rest[:max(0, strings.Index(r.rest, "\n\t\t}\n"))], "\n") + 1
		if n > maxElements {
			return s, "", fmt.Errorf("more than %d elements", maxElements)
		}
		// Room for all at once: grown bit by bit, they would take twice as much.
		if !pass {
			s.Elements = make([]nftset.Element, 0, n)
		}
		var written []byte
		for i := range n {
			line = r.next()
			if pass {
				continue
			}
			text := line
			if i < n-1 {
				text = strings.TrimSuffix(text, ",")
			}
			e, ok := parseElement(&s.Set, strings.TrimPrefix(text, "\t\t\t"))
			written = appendElement(written[:0], &s.Set, e, false)
			if i < n-1 {
				written = append(written, ',')
			}
			if !ok || string(written[len(",\n"):]) != line {
				return s, "", unknown(line)
			}
			s.Elements = append(s.Elements, e)
		}
		if line = r.next(); line != "\t\t}" {
			return s, "", unknown(line)
		}
		if line = r.next(); line != ends {
			return s, "", unknown(line)
		}
	}
	if line = r.next(); line != "}" {
		return s, "", unknown(line)
	}
	return s, passed, nil
}

// define reads a line of a set's definition.
func define(s *nftset.Set, line string) bool {
	key, value, _ := strings.Cut(line, " ")
	var err error
	switch key {
	case "type":
		for _, k := range []nftset.KeyType{{}, {IPv6: true}, {Port: true}, {IPv6: true, Port: true}} {
			if value == k.String() {
				s.Key = k
			}
		}
	case "policy":
		s.Memory = true
	case "size":
		var n uint64
		n, err = strconv.ParseUint(value, 10, 32)
		s.Size = uint32(n)
	case "flags":
		s.Constant = strings.Contains(value, "constant")
		s.Dynamic = strings.Contains(value, "dynamic")
		s.Timeouts = strings.Contains(value, "timeout")
	case "counter":
		s.Counter = true
	case "timeout":
		s.Timeout, err = nftset.ParseTimeout(value)
	case "gc-interval":
		s.GCInterval, err = nftset.ParseTimeout(value)
	case "comment":
		s.Comment = strings.Trim(value, `"`)
	default:
		return false
	}
	return err == nil
}

// parseElement reads what appendElement writes.
func parseElement(s *nftset.Set, text string) (e nftset.Element, ok bool) {
	// Nothing before the comment has quotes.
	text, comment, _ := strings.Cut(text, ` comment "`)
	e.Comment = strings.TrimSuffix(comment, `"`)
	key, life, _ := strings.Cut(text, " timeout ")
	addr, port, _ := strings.Cut(key, " . ")
	timeout, expires, expiring := strings.Cut(life, " expires ")
	var err error
	if addr != "*" {
		if e.Addr, err = netip.ParseAddr(addr); err != nil || e.Addr.Is6() != s.Key.IPv6 {
			return e, false
		}
		if s.Key.Port {
			n, err := strconv.ParseUint(port, 10, 16)
			if err != nil {
				return e, false
			}
			e.Port = uint16(n)
		}
	}
	if expiring {
		if e.Timeout, err = nftset.ParseTimeout(timeout); err == nil {
			e.Expires, err = nftset.ParseTimeout(expires)
		}
	}
	return e, err == nil && (e.Timeout == 0 || s.Timeouts)
}
