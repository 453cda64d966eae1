// Package config reads /etc/nftwl.yaml. Only this package uses YAML.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"gopkg.in/yaml.v3"

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

// Limited are the sets of addresses that exceed the limit of the shipped rules.
// Only these rules have them, in the configured table.
var Limited = Names{"limited_ipv4", "limited_ipv6"}

// Config is the configuration, with defaults for what the file does not have.
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
	Policy     *Policy        // nil if nftwld takes no reports
	Failures   *Failures      // nil if failed logins ban no address
	Cluster    *Cluster       // nil if no other machine shares the sets
}

// Policy configures how nftwld takes Dovecot's reports.
type Policy struct {
	Listen  netip.AddrPort // with a port
	KeyFile string         // path of the file with the key of the reports
}

// Failures configures the bans for failed logins.
type Failures struct {
	Limit        int           // different failures that ban an address; 1 or more
	Within       time.Duration // in which they must come; more than 0
	Ban          time.Duration // the first ban; each further one is twice as long; more than 0
	Longest      time.Duration // the longest ban; not less than Ban
	TrustedLimit int           // a trusted address is banned for more failures than this; not less than Limit
}

// Cluster is where nftwld shares the sets with other machines.
type Cluster struct {
	Server       string   // URL of a Redis or Valkey: redis://, rediss:// or unix://, without a password
	Name         string   // of what is shared: machines with the same name share
	Node         string   // this machine's name; empty for the host's
	Send, Take   []string // the lists that are shared: trusted, banned
	PasswordFile string   // path of the file with the server's password; empty for /etc/nftwl/cluster.password, which can be missing
	CAFile       string   // path of the certificates that sign the server's; empty for the system's
}

// Same reports whether another has the same server and name, as the same machine.
func (c *Cluster) Same(other *Cluster) bool {
	return other != nil && c.Server == other.Server && c.Name == other.Name && c.Node == other.Node &&
		c.PasswordFile == other.PasswordFile && c.CAFile == other.CAFile
}

// DefaultPolicy and defaultFailures are the values of an empty mapping.
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

// maxFile is the size of the largest file that is read, in bytes. Every login
// reads it.
const maxFile = 32 << 10

// Load reads a configuration. An empty path means Path, which need not exist. A
// file of 0 bytes is an error: an editor may be about to write it.
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

// read returns the contents of a regular file. It does not wait for the writer of a
// pipe, and does not fill the memory from a device.
//
// It makes the system calls itself: os.OpenFile starts Go's poller, which ends the
// process if fewer than three descriptors are left. A login must survive that. On
// FUSE or NFS, the signal with which Go preempts a thread can interrupt the calls.
func read(path string) ([]byte, error) {
	fd, err := -1, error(unix.EINTR)
	for err == unix.EINTR {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	// The size in stat can be that of a moment ago.
	data := make([]byte, maxFile+1)
	n := 0
	for {
		more, err := unix.Read(fd, data[n:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if more == 0 {
			break
		}
		n += more
	}
	switch n {
	case 0:
		// An editor can leave the file so for an instant, before it writes. The
		// defaults would trust an address in ignore.
		return nil, fmt.Errorf("%s is empty; remove the file to use the defaults", path)
	case len(data):
		return nil, fmt.Errorf("%s is larger than %d KiB", path, maxFile>>10)
	}
	return data[:n], nil
}

// Parse reads the text of a configuration. An error begins with the number
// of the line.
func Parse(data []byte) (*Config, error) {
	c := Default()
	root, err := document(data)
	if err != nil {
		return nil, err
	}
	if root == nil {
		return c, nil
	}
	if err := mapping("", root,
		entry{"table", value(&c.Table, nftset.ParseTable)},
		entry{"trusted", c.Trusted.read},
		entry{"banned", c.Banned.read},
		entry{"ports", c.readPorts},
		entry{"timeout", value(&c.Timeout, nftset.ParseTimeout)},
		entry{"ban_timeout", value(&c.BanTimeout, nftset.ParseTimeout)},
		entry{"ipv6_prefix", value(&c.IPv6Prefix, number(128))},
		entry{"ignore", list(&c.Ignore, parsePrefix)},
		entry{"comment", value(&c.Comment, parseBool)},
		entry{"deadline", value(&c.Deadline, atMost(maxDeadline))},
		entry{"snapshot", value(&c.Snapshot, parsePath)},
		entry{"policy", c.readPolicy},
		entry{"failures", c.readFailures},
		entry{"cluster", c.readCluster},
	); err != nil {
		return nil, err
	}
	// A set that two lists share would trust who is banned.
	sets := c.Sets()
	for i, name := range sets {
		if !slices.Contains(sets[:i], name) {
			continue
		}
		for j := 0; j < len(root.Content); j += 2 {
			if key := root.Content[j]; key.Value == "trusted" || key.Value == "banned" {
				return nil, fail(key, key.Value, "set %s is named twice; the four sets must differ", name)
			}
		}
	}
	return c, nil
}

const (
	// maxDeadline is less than the 60 s that Dovecot gives a post-login program.
	maxDeadline = 30 * time.Second
	// maxFailures bounds what nftwld must remember of one address.
	maxFailures = 1000
	// maxWithin is a week: slower guessing does no harm.
	maxWithin = 7 * 24 * time.Hour
)

func (c *Config) readPorts(key string, v *yaml.Node) error {
	if err := list(&c.Ports, ParsePort)(key, v); err != nil {
		return err
	}
	if len(c.Ports) == 0 {
		return fail(v, key, "at least one port is needed")
	}
	for i, p := range c.Ports {
		if slices.Contains(c.Ports[:i], p) {
			return fail(v.Content[i], key, "port %d occurs twice", p)
		}
	}
	return nil
}

func (n *Names) read(key string, v *yaml.Node) error {
	return mapping(key, v, entry{"ipv4", value(&n.IPv4, parseSet)}, entry{"ipv6", value(&n.IPv6, parseSet)})
}

func (c *Config) readPolicy(key string, v *yaml.Node) error {
	p := DefaultPolicy
	c.Policy = &p
	return mapping(key, v, entry{"listen", value(&p.Listen, parseListen)}, entry{"key_file", value(&p.KeyFile, parsePath)})
}

func (c *Config) readFailures(key string, v *yaml.Node) error {
	f := defaultFailures
	c.Failures = &f
	err := mapping(key, v,
		entry{"limit", value(&f.Limit, number(maxFailures))},
		entry{"within", value(&f.Within, atMost(maxWithin))},
		entry{"ban", value(&f.Ban, nftset.ParseTimeout)},
		entry{"longest", value(&f.Longest, nftset.ParseTimeout)},
		entry{"trusted_limit", value(&f.TrustedLimit, number(maxFailures))},
	)
	switch {
	case err != nil:
		return err
	case f.Longest < f.Ban:
		return fail(v, key, "longest (%s) is shorter than ban (%s)", nftset.FormatTimeout(f.Longest), nftset.FormatTimeout(f.Ban))
	case f.TrustedLimit < f.Limit:
		return fail(v, key, "trusted_limit (%d) is less than limit (%d)", f.TrustedLimit, f.Limit)
	}
	return nil
}

func (c *Config) readCluster(name string, v *yaml.Node) error {
	cluster := Cluster{Name: "mail", Send: []string{"trusted", "banned"}, Take: []string{"trusted", "banned"}}
	c.Cluster = &cluster
	err := mapping(name, v,
		entry{"server", value(&cluster.Server, parseServer)},
		entry{"name", value(&cluster.Name, parseName)},
		entry{"node", value(&cluster.Node, parseName)},
		entry{"send", list(&cluster.Send, parseList)},
		entry{"take", list(&cluster.Take, parseList)},
		entry{"password_file", value(&cluster.PasswordFile, parsePath)},
		entry{"ca_file", value(&cluster.CAFile, parsePath)},
	)
	switch {
	case err != nil:
		return err
	case cluster.Server == "":
		return fail(v, name, "server is missing, such as rediss://nftwl@redis.example:6380")
	case len(cluster.Send)+len(cluster.Take) == 0:
		return fail(v, name, "neither send nor take has a list, so that nothing is shared")
	}
	return nil
}

// ReadKey returns the key in a file such as Policy.KeyFile: one word, without white
// space around it.
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

// ParsePort reads the number of a port, 1 to 65535.
func ParsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is not a port: a number from 1 to 65535", s)
	}
	return uint16(n), nil
}

func parseSet(s string) (string, error) { return s, nftset.CheckName(s) }

func parsePath(s string) (string, error) {
	if !strings.HasPrefix(s, "/") {
		return "", fmt.Errorf("%q is not an absolute path", s)
	}
	return s, nil
}

// parseServer reads the URL of a Redis or Valkey.
func parseServer(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil {
		return "", errors.New("not a URL such as rediss://nftwl@redis.example:6380") // the error would quote a password
	}
	if _, secret := u.User.Password(); secret {
		return "", errors.New("a password does not belong in this file; write it into a file of its own, and its path as password_file")
	}
	tcp := (u.Scheme == "redis" || u.Scheme == "rediss") && u.Hostname() != ""
	if !tcp && !(u.Scheme == "unix" && u.Host == "" && strings.HasPrefix(u.Path, "/")) {
		return "", fmt.Errorf("%q is not a URL such as rediss://nftwl@redis.example:6380 or unix:///run/redis/redis.sock", s)
	}
	if database, ok := strings.CutPrefix(u.Path, "/"); ok && tcp {
		if _, err := strconv.ParseUint(database, 10, 31); err != nil {
			return "", fmt.Errorf("%q ends with a path that is not the number of a database", s)
		}
	}
	for name := range u.Query() {
		if name != "master_set" && name != "addr" && name != "db" {
			return "", fmt.Errorf("%q has %q, which is not master_set, addr or db", s, name)
		}
	}
	if u.Query().Has("addr") && !u.Query().Has("master_set") {
		return "", fmt.Errorf("%q has several addresses and no master_set, the name by which Sentinel knows the server", s)
	}
	return s, nil
}

// parseName reads the name of a machine, or of what machines share.
func parseName(s string) (string, error) {
	if !IsName(s) {
		return "", fmt.Errorf("%q is not a name of at most %d letters, digits and any of . - _", s, maxName)
	}
	return s, nil
}

const maxName = 64

// IsName reports whether a text can be the name of a machine.
func IsName(s string) bool {
	return s != "" && len(s) <= maxName && !strings.ContainsFunc(s, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '.' || r == '-' || r == '_')
	})
}

func parseList(s string) (string, error) {
	if s != "trusted" && s != "banned" {
		return "", fmt.Errorf("%q is not trusted or banned", s)
	}
	return s, nil
}

func parseBool(s string) (bool, error) {
	if s != "true" && s != "false" {
		return false, fmt.Errorf("%q is not true or false", s)
	}
	return s == "true", nil
}

// number returns a parser of the numbers from 1 to most.
func number(most int) func(string) (int, error) {
	return func(s string) (int, error) {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > most {
			return 0, fmt.Errorf("%q is not a number from 1 to %d", s, most)
		}
		return n, nil
	}
}

// atMost returns a parser of timeouts up to most.
func atMost(most time.Duration) func(string) (time.Duration, error) {
	return func(s string) (time.Duration, error) {
		d, err := nftset.ParseTimeout(s)
		if err == nil && d > most {
			err = fmt.Errorf("it must be at most %s", nftset.FormatTimeout(most))
		}
		return d, err
	}
}

func parseListen(s string) (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 {
		return a, fmt.Errorf("%q is not an address with a port, such as 127.0.0.1:8085 or [::1]:8085", s)
	}
	return a, nil
}

// parsePrefix reads a prefix, or an address as a prefix of its full length.
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
