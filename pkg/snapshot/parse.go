package snapshot

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"nftwl/pkg/nftset"
)

// File is what a file of sets holds.
type File struct {
	// Saved is when it was saved, and zero where the file is not a snapshot
	// of ours but what nft printed.
	Saved time.Time
	// Table is the table that it was saved from; zero where the file does not
	// say.
	Table nftset.Instance
	Sets  []Section
	// Passed are the things in the file that are none of the wanted sets, as
	// "line 12: chain input".
	Passed []string
}

// Section is a set of a File. A file can be several lists of nft's, and so have
// several sections of one set.
type Section struct {
	nftset.Set
	Elements []nftset.Element
}

// Parse reads a snapshot, or what nft list printed. Of the sets in it, it
// takes those that wanted accepts, and passes over the rest. An error begins
// with "line N: ".
//
// The comments of the elements are parts of the text, and keep it in memory.
func Parse(text string, wanted func(nftset.Table, string) bool) (*File, error) {
	f := &File{}
	line, _, _ := strings.Cut(text, "\n")
	var err error
	if f.Saved, f.Table, err = parseHeader(line); err != nil {
		return nil, fmt.Errorf("line 1: %w", err)
	}
	n := 0
	if !f.Saved.IsZero() {
		// Before what the cut made of the last element.
		whole := strings.TrimSuffix(text, "\n")
		var ok bool
		if n, ok = parseTrailer(whole[strings.LastIndexByte(whole, '\n')+1:]); !ok {
			return nil, fmt.Errorf("line %d: %w", strings.Count(text, "\n")+1, errCutShort)
		}
	}
	p := &parser{file: f, wanted: wanted, text: text, inWord: wordBytes(), line: 1}
	if err := p.parse(); err != nil {
		return nil, fmt.Errorf("line %d: %w", p.line, err)
	}
	if !f.Saved.IsZero() {
		// Those of the sets that were passed over are not counted.
		if p.elements > n || p.elements < n && len(f.Passed) == 0 {
			return nil, fmt.Errorf("line %d: the snapshot has %d elements, and its last line says %d; after a change by hand, remove its first line", p.line, p.elements, n)
		}
	}
	return f, nil
}

// ParseSets parses a file, of which it takes the sets of a table that have one
// of the names. One that has none of them is an error, with the File.
func ParseSets(text string, table nftset.Table, names []string) (*File, error) {
	f, err := Parse(text, func(t nftset.Table, set string) bool { return t == table && slices.Contains(names, set) })
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

// parser reads tokens of nft's language: words, the marks { } = , ; and the
// end of a line, and strings, in which nothing is escaped.
type parser struct {
	file   *File
	wanted func(nftset.Table, string) bool
	inWord [256]bool // the bytes of words
	text   string
	at     int
	line   int // of the last token
	next   int // lines that the last token ended

	tok      string // a word, or a mark, or the inside of a string; empty at the end
	kind     byte   // 'w', '"', or the mark itself; 0 at the end
	elements int    // of all sets of ours
}

const (
	word   = 'w'
	quoted = '"'
	end    = 0
)

func (p *parser) advance() error {
	p.line += p.next
	p.next = 0
	for p.at < len(p.text) {
		switch c := p.text[p.at]; c {
		case ' ', '\t', '\r':
			p.at++
		case '#':
			n := strings.IndexByte(p.text[p.at:], '\n')
			if n < 0 {
				n = len(p.text) - p.at
			}
			p.at += n
		case '\\':
			// A line that goes on in the next.
			if p.at+1 >= len(p.text) || p.text[p.at+1] != '\n' {
				return fmt.Errorf("an unexpected %q", c)
			}
			p.at += 2
			p.line++
		case '\n', '{', '}', '=', ',', ';':
			p.tok, p.kind = p.text[p.at:p.at+1], c
			p.at++
			if c == '\n' {
				p.next = 1
			}
			return nil
		case '"':
			rest := p.text[p.at+1:]
			n := strings.IndexByte(rest, '"')
			if n < 0 || strings.IndexByte(rest[:n], '\n') >= 0 {
				return fmt.Errorf("a string without its end: %s", clip(p.text[p.at:]))
			}
			p.tok, p.kind = rest[:n], quoted
			p.at += n + 2
			return nil
		default:
			rest, n := p.text[p.at:], 0
			for n < len(rest) && p.inWord[rest[n]] {
				n++
			}
			if n == 0 {
				return fmt.Errorf("an unexpected byte %q", c)
			}
			p.tok, p.kind = rest[:n], word
			p.at += n
			return nil
		}
	}
	p.tok, p.kind = "", end
	return nil
}

// wordBytes tells of the bytes of words: all that print and are no mark.
func wordBytes() (in [256]bool) {
	for c := byte('!'); c <= '~'; c++ {
		in[c] = !strings.ContainsRune(`{}=,;"#`, rune(c))
	}
	return in
}

// clip makes text fit for an error.
func clip(text string) string {
	const most = 40
	text, _, _ = strings.Cut(text, "\n")
	if len(text) > most {
		return fmt.Sprintf("%q…", text[:most])
	}
	return fmt.Sprintf("%q", text)
}

func (p *parser) found() string {
	switch p.kind {
	case end:
		return "the end of the file"
	case '\n':
		return "the end of the line"
	}
	return clip(p.tok)
}

// is tells whether the token is the word or the mark.
func (p *parser) is(s string) bool { return p.kind != quoted && p.tok == s }

// expect reads a token that must be the mark.
func (p *parser) expect(mark string) error {
	if err := p.advance(); err != nil {
		return err
	}
	if !p.is(mark) {
		return fmt.Errorf("%s where %s must be", p.found(), mark)
	}
	return nil
}

// word reads a token that must be a word.
func (p *parser) word(what string) (string, error) {
	if err := p.advance(); err != nil {
		return "", err
	}
	if p.kind != word {
		return "", fmt.Errorf("%s where %s must be", p.found(), what)
	}
	return p.tok, nil
}

// skipLines reads on to a token that is not the end of a line.
func (p *parser) skipLines() error {
	for {
		if err := p.advance(); err != nil || p.kind != '\n' && p.kind != ';' {
			return err
		}
	}
}

// parse reads the tables of a file.
func (p *parser) parse() error {
	for {
		if err := p.skipLines(); err != nil {
			return err
		}
		switch {
		case p.kind == end:
			return nil
		case p.is("{"):
			return fmt.Errorf("this is JSON; nftwl reads what nft lists without --json")
		case !p.is("table"):
			// Commands, such as flush ruleset, are not what nft list prints.
			// To obey them would undo what is to be restored into.
			return fmt.Errorf("%s, where only tables can be, as nft list prints them", p.found())
		}
		if err := p.table(); err != nil {
			return err
		}
	}
}

func (p *parser) table() error {
	var words []string
	for {
		if err := p.advance(); err != nil {
			return err
		}
		if p.is("{") {
			break
		}
		if p.kind != word || len(words) == 2 {
			return fmt.Errorf("%s where { must be", p.found())
		}
		words = append(words, p.tok)
	}
	// The kernel takes names of other programs that nft's grammar does not, so
	// the name counts only where it is a wanted one.
	if len(words) < 2 {
		words = append([]string{"ip"}, words...)
	}
	table, err := nftset.ParseTable(words[0] + " name")
	if err != nil {
		return err
	}
	table.Name = words[len(words)-1]
	for {
		if err := p.skipLines(); err != nil {
			return err
		}
		switch {
		case p.is("}"):
			return nil
		case p.is("set"):
			name, err := p.word("the name of a set")
			if err != nil {
				return err
			}
			if p.wanted(table, name) {
				err = p.set(table, name)
			} else {
				err = p.pass("set " + name)
			}
			if err != nil {
				return err
			}
		case p.kind == word:
			kind := p.tok
			switch kind {
			case "flags", "comment":
				err = p.restOfLine()
			case "map":
				name, e := p.word("the name of a map")
				if e == nil && p.wanted(table, name) {
					e = fmt.Errorf("%s is a map here, and must be a set", name)
				}
				if err = e; err == nil {
					err = p.pass("map " + name)
				}
			default:
				err = p.pass(kind)
			}
			if err != nil {
				return err
			}
		default:
			return fmt.Errorf("%s where } must be", p.found())
		}
	}
}

// restOfLine reads to the end of a statement.
func (p *parser) restOfLine() error {
	for {
		if err := p.advance(); err != nil {
			return err
		}
		if p.kind == '\n' || p.kind == ';' || p.kind == end {
			return nil
		}
	}
}

// pass reads over an object of the table, which ends with its braces, or with
// its line where it has none.
func (p *parser) pass(what string) error {
	line, depth := p.line, 0
	for {
		if err := p.advance(); err != nil {
			return err
		}
		switch p.kind {
		case '{':
			depth++
		case '}':
			depth--
		case end:
			return fmt.Errorf("the end of the file within %s of line %d", clip(what), line)
		case word:
			if depth == 0 && !strings.Contains(what, " ") {
				what += " " + p.tok // its name
			}
			continue
		case '\n':
			if depth > 0 {
				continue
			}
		default:
			continue
		}
		if depth <= 0 {
			p.file.Passed = append(p.file.Passed, fmt.Sprintf("line %d: %.60s", line, what))
			if depth < 0 {
				return fmt.Errorf("an unexpected }")
			}
			return nil
		}
	}
}

// set reads a set that is wanted.
func (p *parser) set(table nftset.Table, name string) error {
	s := Section{Set: nftset.Set{Table: table, Name: name}}
	if err := p.expect("{"); err != nil {
		return err
	}
	var typed, listed bool
	for {
		if err := p.skipLines(); err != nil {
			return err
		}
		if p.is("}") {
			break
		}
		if p.kind != word {
			return fmt.Errorf("%s within set %s", p.found(), name)
		}
		key := p.tok
		var err error
		switch key {
		case "type", "typeof", "flags", "timeout":
			// How the elements are read hangs on these, and nft lists them first.
			if listed {
				return fmt.Errorf("%s after the elements of set %s, where it must be before", key, name)
			}
		}
		switch key {
		case "type", "typeof":
			var words string
			if words, err = p.statement(); err == nil {
				s.Key, err = keyType(words)
				typed = true
			}
		case "flags":
			var words string
			if words, err = p.statement(); err == nil {
				err = setFlags(&s.Set, words)
			}
		case "policy":
			var words string
			if words, err = p.statement(); err == nil {
				s.Memory = words == "memory"
			}
		case "timeout", "gc-interval":
			var words string
			var d time.Duration
			if words, err = p.statement(); err == nil {
				d, err = nftset.ParseTimeout(words)
			}
			if key == "timeout" {
				s.Timeout, s.Timeouts = d, true
			} else {
				s.GCInterval = d
			}
		case "size":
			var words string
			if words, err = p.statement(); err == nil {
				var n uint64
				if n, err = strconv.ParseUint(words, 10, 32); err != nil {
					err = fmt.Errorf("%s is not the size of a set", clip(words))
				}
				s.Size = uint32(n)
			}
		case "counter":
			s.Counter = true
		case "auto-merge":
			// It concerns intervals, which a set of ours has not.
		case "comment":
			if err = p.advance(); err == nil {
				s.Comment = p.tok
				if p.kind != quoted {
					err = fmt.Errorf("%s where a string must be", p.found())
				}
			}
		case "elements":
			switch {
			case listed:
				return fmt.Errorf("set %s has elements twice", name)
			case !typed:
				return fmt.Errorf("elements before the type of set %s", name)
			}
			listed = true
			if err = p.expect("="); err == nil {
				err = p.expect("{")
			}
			if err == nil {
				err = p.elementList(&s)
			}
		default:
			return fmt.Errorf("%s is nothing that a set has, as far as nftwl knows", p.found())
		}
		if err != nil {
			return err
		}
	}
	if !typed {
		return fmt.Errorf("set %s has no type", name)
	}
	p.elements += len(s.Elements)
	for _, old := range p.file.Sets {
		if old.Table == table && old.Name == name && old.Key != s.Key {
			return fmt.Errorf("set %s is of type %s here, and of %s before", name, s.Key, old.Key)
		}
	}
	p.file.Sets = append(p.file.Sets, s)
	return nil
}

// statement reads the words up to the end of the line, with one space between.
func (p *parser) statement() (string, error) {
	var words []string
	for {
		if err := p.advance(); err != nil {
			return "", err
		}
		switch p.kind {
		case '\n', ';':
			return strings.Join(words, " "), nil
		case word, ',':
			if len(words) > 20 {
				return "", fmt.Errorf("the statement is too long")
			}
			words = append(words, p.tok)
		default:
			return "", fmt.Errorf("%s within a statement", p.found())
		}
	}
}

// keyType reads the type of a set's keys, which nft can also print as the
// expression that the set was made for.
func keyType(words string) (nftset.KeyType, error) {
	addr, port, concat := strings.Cut(words, " . ")
	var k nftset.KeyType
	known := true
	switch addr {
	case "ipv4_addr", "ip saddr", "ip daddr":
	case "ipv6_addr", "ip6 saddr", "ip6 daddr":
		k.IPv6 = true
	default:
		known = false
	}
	if concat {
		k.Port = true
		protocol, side, _ := strings.Cut(port, " ")
		known = known && (port == "inet_service" ||
			(side == "dport" || side == "sport") && slices.Contains([]string{"tcp", "udp", "th", "sctp", "dccp", "udplite"}, protocol))
	}
	if !known {
		return k, fmt.Errorf("the set has keys of type %.60q, not of an address or an address . inet_service", words)
	}
	return k, nil
}

func setFlags(s *nftset.Set, words string) error {
	for _, flag := range strings.FieldsFunc(words, func(r rune) bool { return r == ' ' || r == ',' }) {
		switch flag {
		case "constant":
			s.Constant = true
		case "dynamic":
			s.Dynamic = true
		case "timeout":
			s.Timeouts = true
		case "interval":
			return fmt.Errorf("set %s is an interval set, which nftwl cannot use", s.Name)
		default:
			return fmt.Errorf("%.40q is a flag that nftwl does not know", flag)
		}
	}
	return nil
}

// elementList reads the elements of a set after the opening brace.
func (p *parser) elementList(s *Section) error {
	// Room for all at once: grown bit by bit, they would take twice as much.
	// Text that is no elements does not get more than its length allows.
	list, _, _ := strings.Cut(p.text[p.at:], "}")
	const shortest = len("0.0.0.0,")
	n := min(strings.Count(list, ",")+1, len(list)/shortest+1)
	if p.elements+len(s.Elements)+n > maxElements {
		return fmt.Errorf("more than %d elements", maxElements)
	}
	s.Elements = slices.Grow(s.Elements, n)
	for {
		if err := p.skipLines(); err != nil {
			return err
		}
		if p.is("}") {
			return nil
		}
		e, err := p.element(s)
		if err != nil {
			return err
		}
		s.Elements = append(s.Elements, e)
		for p.kind == '\n' {
			if err := p.advance(); err != nil {
				return err
			}
		}
		switch {
		case p.is("}"):
			return nil
		case p.kind != ',':
			return fmt.Errorf("%s where a comma or } must be", p.found())
		}
	}
}

// element reads an element whose first token is read, and the token after it.
func (p *parser) element(s *Section) (e nftset.Element, err error) {
	if p.kind != word {
		return e, fmt.Errorf("%s where an address must be", p.found())
	}
	catchAll := p.is("*")
	if !catchAll {
		if e.Addr, err = address(p.tok, s.Key.IPv6); err != nil {
			return e, err
		}
	}
	if err := p.advance(); err != nil {
		return e, err
	}
	if p.is(".") != (s.Key.Port && !catchAll) {
		return e, fmt.Errorf("%s after %s, in a set whose keys are of type %s", p.found(), e.Key, s.Key)
	}
	if s.Key.Port && !catchAll {
		if err := p.advance(); err != nil {
			return e, err
		}
		if e.Port, err = port(p.tok); err != nil {
			return e, err
		}
		if err := p.advance(); err != nil {
			return e, err
		}
	}
	e.Timeout = s.Timeout
	for p.kind == word {
		key := p.tok
		if err := p.advance(); err != nil {
			return e, err
		}
		switch key {
		case "timeout", "expires":
			var d time.Duration // never, as nft 1.1.1 says for a permanent element
			if !p.is("never") {
				if d, err = nftset.ParseTimeout(p.tok); err != nil && !p.is("0s") {
					return e, err
				}
			}
			if key == "timeout" {
				e.Timeout = d
			} else if e.Expires = d; p.is("0s") {
				e.Expires = time.Millisecond // what nft prints for less
			}
		case "comment":
			if p.kind != quoted {
				return e, fmt.Errorf("%s where a comment in quotes must be", p.found())
			}
			e.Comment = p.tok
			if err := nftset.CheckComment(e.Comment); err != nil {
				e.Comment = nftset.CleanComment(e.Comment)
			}
		case "counter":
			// A count starts anew. The numbers can be left out.
			for p.is("packets") || p.is("bytes") {
				if _, err := p.word("a number"); err != nil {
					return e, err
				}
				if err := p.advance(); err != nil {
					return e, err
				}
			}
			continue
		default:
			return e, fmt.Errorf("%s, which nftwl cannot restore", clip(key))
		}
		if err := p.advance(); err != nil {
			return e, err
		}
	}
	switch {
	case e.Timeout == 0 && e.Expires > 0:
		// Left by hand: it lives for so long.
		e.Timeout = e.Expires
	case e.Timeout == permanent && !p.file.Saved.IsZero():
		e.Timeout, e.Expires = 0, 0
	}
	// A list of nft's that was taken while the element was renewed has the
	// longer life of the two as what is left.
	e.Expires = min(e.Expires, e.Timeout)
	if e.Timeout > 0 && !s.Timeouts {
		return e, fmt.Errorf("%s has a timeout, and set %s has no timeout flag", e.Key, s.Name)
	}
	return e, nil
}

func address(text string, ipv6 bool) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	switch {
	case err != nil && strings.ContainsAny(text, "/-"):
		return a, fmt.Errorf("%s is an interval, where a single address must be", clip(text))
	case err != nil || a.Zone() != "":
		return a, fmt.Errorf("%s is not an address", clip(text))
	case a.Is6() != ipv6:
		return a, fmt.Errorf("%s is of the other family than the set", a)
	}
	return a, nil
}

// port reads a port by number, or by name as nft prints it where asked to.
func port(text string) (uint16, error) {
	if n, err := strconv.ParseUint(text, 10, 16); err == nil {
		return uint16(n), nil
	}
	if n := mailPort(text); n > 0 {
		return n, nil
	}
	if isName(text) {
		if n, err := net.LookupPort("tcp", text); err == nil && n > 0 {
			return uint16(n), nil
		}
	}
	return 0, fmt.Errorf("%s is not a port, nor the name of one in /etc/services", clip(text))
}

// mailPort returns the port that nft calls by a name of IANA's or Debian's,
// where it is a mail port; else 0. A machine need not have /etc/services.
func mailPort(name string) uint16 {
	switch name {
	case "smtp":
		return 25
	case "pop3", "pop-3":
		return 110
	case "imap2", "imap":
		return 143
	case "submissions", "urd", "smtps", "ssmtp":
		return 465
	case "submission":
		return 587
	case "imaps":
		return 993
	case "pop3s":
		return 995
	}
	return 0
}

func isName(s string) bool {
	return len(s) < 32 && strings.ContainsAny(s, "abcdefghijklmnopqrstuvwxyz")
}
