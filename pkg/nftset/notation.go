package nftset

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// What nft writes and reads: names, types, times and comments.

// ParseTable reads a table as nft writes it. Without a family it is ip, as in nft.
func ParseTable(s string) (Table, error) {
	words := strings.Fields(s)
	if len(words) == 1 {
		words = []string{"ip", words[0]}
	}
	if len(words) != 2 {
		return Table{}, fmt.Errorf("%.40q is not a table: write FAMILY NAME, such as inet filter", s)
	}
	for _, n := range familyNames {
		if n.name == words[0] {
			if err := CheckName(words[1]); err != nil {
				return Table{}, err
			}
			return Table{n.family, words[1]}, nil
		}
	}
	return Table{}, fmt.Errorf("%.40q is not a family of nftables: inet, ip, ip6, bridge, netdev or arp", words[0])
}

// maxName is NFT_NAME_MAXLEN less the final NUL.
const maxName = 255

// CheckName reports why a string cannot be the name of a table or set, or nil. It
// accepts what nft's scanner does (src/scanner.l).
func CheckName(s string) error {
	if s == "" {
		return fmt.Errorf("the name of a table or set is empty")
	}
	if len(s) > maxName {
		return fmt.Errorf("the name %.20q… is longer than %d bytes", s, maxName)
	}
	for i, r := range s {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '_'
		if !letter && (i == 0 || !strings.ContainsRune(`0123456789/\.-`, r)) {
			return fmt.Errorf("%q is not a name that nft accepts: a letter or underscore, then letters, digits and . _ - / \\", s)
		}
	}
	return nil
}

// Types of nft that a key of ours can have, numbered by enum datatypes in
// nft's include/datatype.h.
const (
	typeIPv4Addr    = 7
	typeIPv6Addr    = 8
	typeInetService = 13

	typeBits = 6 // TYPE_BITS: the width of a part in the number of a concatenation
)

// typeNames are nft's names of the types that people make sets of.
var typeNames = [...]string{
	4: "integer", 5: "string", 6: "ll_addr",
	7: "ipv4_addr", 8: "ipv6_addr", 9: "ether_addr", 10: "ether_type", 11: "arp_op", 12: "inet_proto",
	13: "inet_service", 14: "icmp_type", 15: "tcp_flag", 19: "mark", 20: "iface_index", 22: "realm",
	23: "classid", 24: "uid", 25: "gid", 26: "ct_state", 29: "icmpv6_type", 41: "ifname", 46: "cgroupsv2",
}

func typeName(magic uint32) string {
	var parts []string
	for ; magic != 0; magic >>= typeBits {
		n := magic & (1<<typeBits - 1)
		name := fmt.Sprintf("type %d", n)
		if int(n) < len(typeNames) && typeNames[n] != "" {
			name = typeNames[n]
		}
		parts = append([]string{name}, parts...)
	}
	return strings.Join(parts, " . ")
}

var timeUnits = []struct {
	name string
	unit time.Duration
}{
	{"d", 24 * time.Hour}, {"h", time.Hour}, {"m", time.Minute}, {"s", time.Second}, {"ms", time.Millisecond},
}

// MaxTimeout is the longest timeout that every kernel takes: it refuses those
// whose count of jiffies leaves no room to add the present time
// (nf_msecs_to_jiffies64), and a time.Duration ends at 292 years.
const MaxTimeout = 100 * 365 * 24 * time.Hour

// ParseTimeout reads nft's notation of a timeout: numbers with the units d, h,
// m, s and ms, largest first, such as 1d12h or 9m59s996ms. The result is more
// than 0 and at most MaxTimeout.
func ParseTimeout(s string) (time.Duration, error) {
	bad := func(why string) (time.Duration, error) {
		return 0, fmt.Errorf("%.40q is not a timeout: %s", s, why)
	}
	var sum time.Duration
	for rest, from := s, 0; rest != "" || from == 0; {
		digits, n := 0, int64(0)
		for digits < len(rest) && rest[digits] >= '0' && rest[digits] <= '9' {
			// Beyond the longest timeout in any unit, further digits do not matter.
			if n <= int64(MaxTimeout/time.Millisecond) {
				n = n*10 + int64(rest[digits]-'0')
			}
			digits++
		}
		letters := digits
		for letters < len(rest) && rest[letters] >= 'a' && rest[letters] <= 'z' {
			letters++
		}
		unit := from
		for unit < len(timeUnits) && timeUnits[unit].name != rest[digits:letters] {
			unit++
		}
		if digits == 0 || unit == len(timeUnits) {
			return bad("write it like 1d12h, 90m or 30s")
		}
		d := timeUnits[unit].unit
		if n > int64(MaxTimeout/d) || sum > MaxTimeout-time.Duration(n)*d {
			return bad("it is longer than " + FormatTimeout(MaxTimeout))
		}
		sum += time.Duration(n) * d
		rest, from = rest[letters:], unit+1
	}
	if sum == 0 {
		return bad("it must be more than 0")
	}
	return sum, nil
}

// FormatTimeout writes a duration in nft's notation, to the millisecond.
func FormatTimeout(d time.Duration) string { return string(AppendTimeout(nil, d)) }

// AppendTimeout appends what FormatTimeout returns.
func AppendTimeout(b []byte, d time.Duration) []byte {
	if d < time.Millisecond {
		return append(b, "0s"...)
	}
	for _, u := range timeUnits {
		if n := d / u.unit; n > 0 {
			b = strconv.AppendInt(b, int64(n), 10)
			b = append(b, u.name...)
			d -= n * u.unit
		}
	}
	return b
}

// MaxComment is the longest comment that nft reads back, in bytes
// (NFTNL_UDATA_COMMENT_MAXLEN).
const MaxComment = 128

// CheckComment reports why nft could not list a comment and load it again, or nil:
// nft has no escapes inside quotes.
func CheckComment(s string) error {
	switch {
	case len(s) > MaxComment:
		return fmt.Errorf("the comment is %d bytes long; nft takes at most %d", len(s), MaxComment)
	case !utf8.ValidString(s):
		return fmt.Errorf("the comment %q is not UTF-8", s)
	case CleanComment(s) != s:
		return fmt.Errorf("the comment %q has a quote or a control character, which nft cannot list and load again", s)
	}
	return nil
}

// CleanComment makes s a comment that CheckComment accepts: a quote becomes an
// apostrophe, and what does not print, a question mark; what is too long is cut.
func CleanComment(s string) string {
	odd := func(r rune) bool { return r < ' ' || r > '~' || r == '"' }
	if len(s) <= MaxComment && !strings.ContainsFunc(s, odd) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '"':
			r = '\''
		// IsGraphic also excludes what changes the direction of text: a terminal
		// would print something else than what is stored.
		case r == utf8.RuneError || !strconv.IsGraphic(r):
			r = '?'
		}
		if b.Len()+utf8.RuneLen(r) > MaxComment {
			break
		}
		b.WriteRune(r)
	}
	return b.String()
}
