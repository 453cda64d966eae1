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
	Saved time.Time       // zero if the file is no snapshot
	Table nftset.Instance // that it was saved from; zero if the file does not say
	Sets  []Section
	// Refused is why ParseSets left out sets and addresses.
	Refused []error
}

// Section is a set of a File.
type Section struct {
	nftset.Set
	Elements []nftset.Element
}

// ParseSets reads a file, a snapshot or any other that nft -f loads, and returns
// those of the sets that it has, without the addresses that they refuse. A file
// that has none of the sets is an error.
func ParseSets(text string, sets Sets) (f *File, err error) {
	if strings.HasPrefix(text, headerStart) {
		f, err = Parse(text)
	} else {
		f, err = load(text, sets.Table, sets.Names)
	}
	if err != nil {
		return nil, err
	}
	f.Sets = slices.DeleteFunc(f.Sets, func(s Section) bool {
		if s.Table == sets.Table && slices.Contains(sets.Names, s.Name) {
			return false
		}
		f.Refused = append(f.Refused, fmt.Errorf("the configuration does not name set %s of table %s", s.Name, s.Table))
		return true
	})
	if len(f.Sets) == 0 {
		return nil, fmt.Errorf("none of the sets in it is one of table %s that the configuration names", sets.Table)
	}
	for i := range f.Sets {
		s := &f.Sets[i]
		s.Elements = slices.DeleteFunc(s.Elements, func(e nftset.Element) bool {
			if sets.Refuse == nil || e.CatchAll() {
				return false
			}
			err := sets.Refuse(e.Addr)
			if err != nil {
				f.Refused = append(f.Refused, err)
			}
			return err != nil
		})
	}
	return f, nil
}

// Parse reads a snapshot, and accepts only what Write writes. An error begins with
// "line N: ".
//
// The comments of the elements are parts of the text, and keep it in memory.
func Parse(text string) (*File, error) {
	f := &File{}
	r := reader{rest: text}
	var err error
	if f.Saved, f.Table, err = parseHeader(r.next()); err != nil {
		return nil, r.error(err)
	}
	// First, so that the error of a truncated file is that it was cut short.
	body, want, err := parseTrailer(r.rest)
	if err != nil {
		return nil, fmt.Errorf("line %d: %w", strings.Count(text, "\n")+1, err)
	}
	r.rest = body
	elements := 0
	for r.rest != "" {
		s, err := r.set()
		if err != nil {
			return nil, r.error(err)
		}
		elements += len(s.Elements)
		f.Sets = append(f.Sets, s)
	}
	if elements != want {
		r.line++
		return nil, r.error(fmt.Errorf("the snapshot has %d elements, and its last line says %d; %s", elements, want, byHand))
	}
	return f, nil
}

const byHand = "after a change by hand, remove the first line"

// reader reads the lines of a snapshot.
type reader struct {
	rest string
	line int // the number of the last line
}

// next returns the next line, "" after the last.
func (r *reader) next() (line string) {
	line, r.rest, _ = strings.Cut(r.rest, "\n")
	r.line++
	return line
}

func (r *reader) error(err error) error { return fmt.Errorf("line %d: %w", r.line, err) }

// unknown is the error of a line that Write does not write.
func unknown(line string) error {
	return fmt.Errorf("%.60q is not as nftwl writes it; %s", line, byHand)
}

// expect reads the lines of the text.
func (r *reader) expect(text string) error {
	for want := range strings.Lines(text) {
		if line := r.next(); line+"\n" != want {
			return unknown(line)
		}
	}
	return nil
}

// set reads a set. It checks a definition or an element by writing what it read,
// and comparing that with the text.
func (r *reader) set() (s Section, err error) {
	ahead := *r
	s.Table, _ = nftset.ParseTable(strings.TrimSuffix(strings.TrimPrefix(ahead.next(), "table "), " {"))
	if name := strings.TrimSuffix(strings.TrimPrefix(ahead.next(), "\tset "), " {"); nftset.CheckName(name) == nil {
		s.Name = name
	}
	for define(&s.Set, strings.TrimPrefix(ahead.next(), "\t\t")) {
	}
	if err := r.expect(string(appendSet(nil, &s.Set))); err != nil {
		return s, err
	}
	end := setEnd
	if strings.HasPrefix(r.rest, elementsStart) {
		r.next()
		end = elementsEnd[1:] + setEnd
		// Room for all at once: grown bit by bit, they would take twice as much. But a
		// line may be no element, and take less memory than one.
		lines := strings.Count(r.rest[:max(0, strings.Index(r.rest, elementsEnd))], "\n") + 1
		s.Elements = make([]nftset.Element, 0, min(lines, 1<<20))
		var written []byte
		for more := true; more; {
			line := r.next()
			text, comma := strings.CutSuffix(line, ",")
			e, ok := parseElement(&s.Set, strings.TrimPrefix(text, "\t\t\t"))
			written = appendElement(written[:0], &s.Set, e)
			if !ok || string(written) != text {
				return s, unknown(line)
			}
			s.Elements = append(s.Elements, e)
			more = comma
		}
	}
	return s, r.expect(end)
}

// define reads a line of a set's definition.
func define(s *nftset.Set, line string) bool {
	key, value, _ := strings.Cut(line, " ")
	var err error
	switch key {
	case "type":
		for _, k := range nftset.KeyTypes {
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
	key, times, _ := strings.Cut(text, " timeout ")
	addr, port, _ := strings.Cut(key, " . ")
	timeout, expires, expiring := strings.Cut(times, " expires ")
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
