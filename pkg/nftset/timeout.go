package nftset

import (
	"fmt"
	"math"
	"strconv"
	"time"
)

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
		if len(s) > 40 {
			s = s[:40] + "…"
		}
		return 0, fmt.Errorf("%q is not a timeout: %s", s, why)
	}
	if s == "" {
		return bad("write it like 1d12h, 90m or 30s")
	}
	var sum time.Duration
	rest, from := s, 0
	for rest != "" {
		digits, n := 0, int64(0)
		for digits < len(rest) && rest[digits] >= '0' && rest[digits] <= '9' {
			// Past the longest timeout in any unit, further digits do not matter.
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

// milliseconds is the kernel's unit. A part of one rounds up, because 0 time
// left means the whole timeout.
func milliseconds(d time.Duration) uint64 {
	ms := uint64(d / time.Millisecond)
	if d%time.Millisecond > 0 {
		ms++
	}
	return ms
}

func fromMilliseconds(ms uint64) time.Duration {
	if ms > math.MaxInt64/uint64(time.Millisecond) {
		return math.MaxInt64
	}
	return time.Duration(ms) * time.Millisecond
}
