// Package config reads /etc/nftwl.yaml. It is the only package that knows
// YAML.
package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
)

// Path is where the configuration is, unless --config says otherwise.
const Path = "/etc/nftwl.yaml"

// Sets returns the names of the four sets.
func (c *Config) Sets() []string { return append(c.Trusted.Both(), c.Banned.Both()...) }

// Names are a pair of sets of one table, one a family.
type Names struct {
	IPv4, IPv6 string
}

// For returns the name of the set for an address.
func (n Names) For(addr netip.Addr) string {
	if addr.Is4() {
		return n.IPv4
	}
	return n.IPv6
}

// Both returns the two names, that of IPv4 first.
func (n Names) Both() []string { return []string{n.IPv4, n.IPv6} }

// Limited are the sets of those who exceed the limit of the shipped rules, which
// alone have them, in the configured table.
var Limited = Names{"limited_ipv4", "limited_ipv6"}

// Config is the whole configuration, with the defaults where the file has
// nothing.
type Config struct {
	Table      nftset.Table
	Trusted    Names
	Banned     Names
	Ports      []uint16       // never empty
	Timeout    time.Duration  // of a trust; more than 0
	BanTimeout time.Duration  // of a ban; more than 0
	IPv6Prefix int            // 1 to 128: the bits of an IPv6 address that count
	Ignore     []netip.Prefix // never trusted, never banned
	Comment    bool           // note the user's name on the element
	Deadline   time.Duration  // the longest wait for the kernel; more than 0
	Snapshot   string         // path of the snapshot file
	Policy     *Policy        // nil where nftwld takes no reports
	Failures   *Failures      // nil where failed logins ban nobody
}

// Policy is where nftwld takes Dovecot's reports.
type Policy struct {
	Listen  netip.AddrPort // with a port
	KeyFile string         // path of the file with the key of the reports
}

// Failures is what it takes to be banned for failed logins, and for how long.
type Failures struct {
	Limit        int           // different failures that ban an address; 1 or more
	Within       time.Duration // in which they must come; more than 0
	Ban          time.Duration // the first ban; each further one is twice as long; more than 0
	Longest      time.Duration // the longest ban; not less than Ban
	TrustedLimit int           // a trusted address is banned for more failures than this; not less than Limit
}

// DefaultPolicy and defaultFailures stand for an empty mapping.
var (
	DefaultPolicy   = Policy{netip.MustParseAddrPort("127.0.0.1:8085"), "/etc/nftwl/policy.key"}
	defaultFailures = Failures{Limit: 10, Within: 10 * time.Minute, Ban: time.Hour, Longest: 7 * 24 * time.Hour, TrustedLimit: 100}
)

// Default returns the configuration that applies without a file.
func Default() *Config {
	return &Config{
		Table:      nftset.Table{Family: nftset.INet, Name: "filter"},
		Trusted:    Names{"trusted_ipv4", "trusted_ipv6"},
		Banned:     Names{"banned_ipv4", "banned_ipv6"},
		Ports:      []uint16{143, 993, 995, 465, 587},
		Timeout:    24 * time.Hour,
		BanTimeout: 24 * time.Hour,
		IPv6Prefix: 128,
		Ignore: []netip.Prefix{
			netip.MustParsePrefix("127.0.0.0/8"),
			netip.MustParsePrefix("::1/128"),
			netip.MustParsePrefix("fe80::/10"),
		},
		Comment:  true,
		Deadline: 500 * time.Millisecond,
		Snapshot: "/var/lib/nftwl/sets.nft",
	}
}

// maxFile is more than any sane configuration, and little enough to read
// before every login.
const maxFile = 32 << 10

// Load reads a configuration. An empty path stands for Path, which need not
// exist; a file that is named must. A file of 0 bytes is an error: it may be one
// that an editor is about to write.
func Load(path string) (*Config, error) {
	named := path != ""
	if !named {
		path = Path
	}
	data, err := read(path)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return Default(), nil
	}
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	c, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("config: %s:%w", path, err)
	}
	return c, nil
}

// read returns the contents of a regular file. It does not wait for the
// writer of a pipe, and does not fill the memory from a device.
//
// It makes the system calls itself: os.OpenFile starts Go's poller, which
// ends the process where fewer than three descriptors are left. A login must
// survive that.
func read(path string) ([]byte, error) {
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		return nil, fmt.Errorf("%s is a directory, not a file", path)
	default:
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	// The size in stat can be that of a moment ago.
	data := make([]byte, maxFile+1)
	n := 0
	for {
		more, err := ignoringEINTR(func() (int, error) { return unix.Read(fd, data[n:]) })
		n += max(more, 0)
		switch {
		case err != nil:
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		case n > maxFile:
			return nil, fmt.Errorf("%s is larger than %d KiB", path, maxFile>>10)
		case more > 0:
			continue
		case n == 0:
			// An editor can leave the file so for an instant, before it
			// writes. The defaults would trust an address in ignore.
			return nil, fmt.Errorf("%s is empty; remove the file to use the defaults", path)
		}
		return data[:n], nil
	}
}

// ignoringEINTR repeats a system call that a signal interrupted.
func ignoringEINTR(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// screen refuses what no configuration has, and what takes the parser seconds
// or gigabytes, since its time grows with the square of some things' number: a
// login waits for it.
func screen(text string) error {
	const most = 64
	brackets, number := 0, 0
	for line := range strings.Lines(text) {
		number++
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		brackets += strings.Count(line, "[") + strings.Count(line, "{")
		inside := strings.Count(line, "- ") + strings.Count(line, "? ") + strings.Count(line, ": ")
		end := strings.TrimRight(line, "-+0123456789")
		block := strings.HasSuffix(end, "|") || strings.HasSuffix(end, ">")
		switch {
		case brackets > most:
			return &lineError{number, fmt.Errorf("more than %d brackets", most)}
		case inside > most:
			return &lineError{number, fmt.Errorf("more than %d keys or items in a line", most)}
		case block:
			return &lineError{number, errors.New("a block of text, which no key takes")}
		}
	}
	return nil
}

// Parse reads the text of a configuration. An error begins with the number
// of the line.
func Parse(data []byte) (*Config, error) {
	c := Default()
	if !utf8.Valid(data) {
		return nil, fmt.Errorf("%d: not UTF-8", 1+strings.Count(string(data[:invalidAt(data)]), "\n"))
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff")) // a mark that some editors put first
	if err := screen(string(data)); err != nil {
		return nil, err
	}
	file, err := parser.ParseBytes(data, 0)
	if err != nil {
		return nil, syntaxError(err)
	}
	switch len(file.Docs) {
	case 0:
		return c, nil
	case 1:
	default:
		return nil, at(file.Docs[1], errors.New("a second YAML document begins; there must be one"))
	}
	root := file.Docs[0].Body
	switch root.(type) {
	case nil, *ast.NullNode, *ast.CommentGroupNode:
		return c, nil // nothing but comments
	}
	if err := mapping(root, c.set); err != nil {
		return nil, at(root, err)
	}
	if err := c.distinct(root); err != nil {
		return nil, err
	}
	return c, nil
}

// distinct reports two lists that share a set: who is banned would be
// trusted, or the other way round.
func (c *Config) distinct(root ast.Node) error {
	seen := make(map[string]bool)
	for _, name := range []string{c.Trusted.IPv4, c.Trusted.IPv6, c.Banned.IPv4, c.Banned.IPv6} {
		if !seen[name] {
			seen[name] = true
			continue
		}
		for _, v := range root.(*ast.MappingNode).Values {
			if key, _ := scalar(v.Key); key == "trusted" || key == "banned" {
				return in(v, key, fmt.Errorf("set %s is named twice; the four sets must differ", name))
			}
		}
		return at(root, fmt.Errorf("set %s is named twice; the four sets must differ", name))
	}
	return nil
}

// maxDeadline is less than the 60 s that Dovecot gives a post-login program.
const maxDeadline = 30 * time.Second

// set reads the value of one key.
func (c *Config) set(key string, v ast.Node) (err error) {
	switch key {
	case "table":
		var s string
		if s, err = scalar(v); err == nil {
			c.Table, err = nftset.ParseTable(s)
		}
	case "trusted":
		return c.Trusted.set(key, v)
	case "banned":
		return c.Banned.set(key, v)
	case "ports":
		c.Ports, err = list(key, v, ParsePort)
		if err == nil && len(c.Ports) == 0 {
			err = errors.New("at least one port is needed")
		}
		if err == nil {
			err = unique(c.Ports)
		}
	case "timeout":
		c.Timeout, err = timeout(v)
	case "ban_timeout":
		c.BanTimeout, err = timeout(v)
	case "ipv6_prefix":
		var s string
		if s, err = scalar(v); err == nil {
			c.IPv6Prefix, err = strconv.Atoi(s)
			if err != nil || c.IPv6Prefix < 1 || c.IPv6Prefix > 128 {
				err = fmt.Errorf("%q is not a number from 1 to 128", s)
			}
		}
	case "ignore":
		c.Ignore, err = list(key, v, parsePrefix)
	case "comment":
		var s string
		if s, err = scalar(v); err == nil {
			c.Comment = s == "true"
			if s != "true" && s != "false" {
				err = fmt.Errorf("%q is not true or false", s)
			}
		}
	case "deadline":
		c.Deadline, err = timeout(v)
		if err == nil && c.Deadline > maxDeadline {
			err = fmt.Errorf("it must be at most %s, since Dovecot gives up after a minute", nftset.FormatTimeout(maxDeadline))
		}
	case "snapshot":
		c.Snapshot, err = path(v)
	case "policy":
		p := DefaultPolicy
		c.Policy = &p
		return p.set(key, v)
	case "failures":
		f := defaultFailures
		c.Failures = &f
		return f.set(key, v)
	default:
		return at(v, fmt.Errorf("unknown key %q; the keys are table, trusted, banned, ports, timeout, ban_timeout, ipv6_prefix, ignore, comment, deadline, snapshot, policy and failures", key))
	}
	return in(v, key, err)
}

func (n *Names) set(outer string, v ast.Node) error {
	return in(v, outer, mapping(v, func(key string, v ast.Node) (err error) {
		var s string
		switch key {
		case "ipv4":
			if s, err = scalar(v); err == nil {
				n.IPv4, err = s, nftset.CheckName(s)
			}
		case "ipv6":
			if s, err = scalar(v); err == nil {
				n.IPv6, err = s, nftset.CheckName(s)
			}
		default:
			return at(v, fmt.Errorf("%s: unknown key %q; the keys are ipv4 and ipv6", outer, key))
		}
		return in(v, outer+"."+key, err)
	}))
}

// ReadKey returns the key in a file such as Policy.KeyFile: one word, without the
// white space around it.
func ReadKey(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	key := strings.TrimSpace(string(b))
	const least = 16
	if len(key) < least || strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s must hold one word of at least %d printable characters", path, least)
	}
	return key, nil
}

func (p *Policy) set(outer string, v ast.Node) error {
	return in(v, outer, mapping(v, func(key string, v ast.Node) (err error) {
		var s string
		switch key {
		case "listen":
			if s, err = scalar(v); err == nil {
				p.Listen, err = netip.ParseAddrPort(s)
				if err != nil || p.Listen.Port() == 0 {
					err = fmt.Errorf("%q is not an address with a port, such as 127.0.0.1:8085 or [::1]:8085", s)
				}
			}
		case "key_file":
			p.KeyFile, err = path(v)
		default:
			return at(v, fmt.Errorf("%s: unknown key %q; the keys are listen and key_file", outer, key))
		}
		return in(v, outer+"."+key, err)
	}))
}

func (f *Failures) set(outer string, v ast.Node) error {
	return in(v, outer, cmp.Or(mapping(v, func(key string, v ast.Node) (err error) {
		switch key {
		case "limit":
			f.Limit, err = failures(v)
		case "within":
			f.Within, err = timeout(v)
			if err == nil && f.Within > maxWithin {
				err = fmt.Errorf("it must be at most %s", nftset.FormatTimeout(maxWithin))
			}
		case "ban":
			f.Ban, err = timeout(v)
		case "longest":
			f.Longest, err = timeout(v)
		case "trusted_limit":
			f.TrustedLimit, err = failures(v)
		default:
			return at(v, fmt.Errorf("%s: unknown key %q; the keys are limit, within, ban, longest and trusted_limit", outer, key))
		}
		return in(v, outer+"."+key, err)
	}), f.check()))
}

// check reports values that do not fit each other.
func (f *Failures) check() error {
	switch {
	case f.Longest < f.Ban:
		return fmt.Errorf("longest (%s) is shorter than ban (%s)", nftset.FormatTimeout(f.Longest), nftset.FormatTimeout(f.Ban))
	case f.TrustedLimit < f.Limit:
		return fmt.Errorf("trusted_limit (%d) is less than limit (%d)", f.TrustedLimit, f.Limit)
	}
	return nil
}

const (
	// maxFailures bounds what nftwld must remember of one address.
	maxFailures = 1000
	// maxWithin is a week: whoever guesses more slowly than that does not guess.
	maxWithin = 7 * 24 * time.Hour
)

func failures(v ast.Node) (int, error) {
	s, err := scalar(v)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > maxFailures {
		return 0, fmt.Errorf("%q is not a number from 1 to %d", s, maxFailures)
	}
	return n, nil
}

// lineError is an error whose line is known.
type lineError struct {
	line int
	err  error
}

func (e *lineError) Error() string { return fmt.Sprintf("%d: %v", e.line, e.err) }
func (e *lineError) Unwrap() error { return e.err }

// at adds the line of a node to an error, unless it has one already.
func at(v ast.Node, err error) error {
	var known *lineError
	if err == nil || errors.As(err, &known) {
		return err
	}
	return &lineError{line(v), err}
}

// in adds the name of a key and its line to an error.
func in(v ast.Node, key string, err error) error {
	var known *lineError
	if err == nil || errors.As(err, &known) {
		return err
	}
	return &lineError{line(v), fmt.Errorf("%s: %w", key, err)}
}

func line(v ast.Node) int {
	if d, ok := v.(*ast.DocumentNode); ok && d.Body == nil {
		if d.Start == nil {
			return 1
		}
		return d.Start.Position.Line
	}
	if t := v.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line
	}
	return 1
}

// mapping calls set for every key of a node. The parser has refused a key that
// stands twice.
func mapping(v ast.Node, set func(key string, v ast.Node) error) error {
	m, ok := v.(*ast.MappingNode)
	if !ok {
		return errors.New("keys with values are needed, such as timeout: 1d")
	}
	for _, pair := range m.Values {
		key, err := scalar(pair.Key)
		if err != nil {
			return at(pair, errors.New("a key must be a plain word"))
		}
		if err := set(key, pair.Value); err != nil {
			return err
		}
	}
	return nil
}

// scalar returns the text of a single value. Anchors, aliases and tags have no
// use in a file of this size.
func scalar(v ast.Node) (string, error) {
	switch v := v.(type) {
	case *ast.StringNode:
		if v.Value == "" {
			return "", errors.New("the value is empty")
		}
		return v.Value, nil
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return v.GetToken().Value, nil
	case *ast.NullNode:
		return "", errors.New("the value is missing")
	}
	return "", fmt.Errorf("a single plain value is needed, not a YAML %s", strings.ToLower(v.Type().YAMLName()))
}

func path(v ast.Node) (string, error) {
	s, err := scalar(v)
	if err == nil && !strings.HasPrefix(s, "/") {
		err = fmt.Errorf("%q is not an absolute path", s)
	}
	return s, err
}

func timeout(v ast.Node) (time.Duration, error) {
	s, err := scalar(v)
	if err != nil {
		return 0, err
	}
	return nftset.ParseTimeout(s)
}

// list returns the values of a list. An error names the item's line.
func list[T any](key string, v ast.Node, parse func(string) (T, error)) ([]T, error) {
	seq, ok := v.(*ast.SequenceNode)
	if !ok {
		return nil, errors.New("a list is needed, such as [a, b]")
	}
	var values []T
	for _, item := range seq.Values {
		s, err := scalar(item)
		if err != nil {
			return nil, in(item, key, err)
		}
		value, err := parse(s)
		if err != nil {
			return nil, in(item, key, err)
		}
		values = append(values, value)
	}
	return values, nil
}

// ParsePort reads the number of a port, 1 to 65535.
func ParsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is not a port: a number from 1 to 65535", s)
	}
	return uint16(n), nil
}

func unique(ports []uint16) error {
	seen := make(map[uint16]bool)
	for _, p := range ports {
		if seen[p] {
			return fmt.Errorf("port %d stands twice", p)
		}
		seen[p] = true
	}
	return nil
}

// parsePrefix reads a prefix, or an address as the prefix that it alone is in.
func parsePrefix(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return p, fmt.Errorf("%q is not a prefix such as 192.0.2.0/24 or 2001:db8::/32", s)
	case p.Addr().Is4In6():
		return p, fmt.Errorf("%q is an IPv4-mapped prefix; write the IPv4 prefix", s)
	case p != p.Masked():
		return p, fmt.Errorf("%q has bits set past its length; did you mean %s?", s, p.Masked())
	}
	return p, nil
}

// syntaxError makes one line of the parser's error, which is a drawing of the
// place.
func syntaxError(err error) error {
	var located interface {
		GetToken() *token.Token
		GetMessage() string
	}
	if errors.As(err, &located) && located.GetToken() != nil {
		return &lineError{located.GetToken().Position.Line, errors.New(located.GetMessage())}
	}
	return &lineError{1, err}
}

func invalidAt(data []byte) int {
	for i := 0; i < len(data); {
		r, n := utf8.DecodeRune(data[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return len(data)
}
