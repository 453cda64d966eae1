package nftset

import (
	"strings"
	"testing"
	"time"
)

func TestParseTimeout(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"1d":         24 * time.Hour,
		"1d12h":      36 * time.Hour,
		"90m":        90 * time.Minute,
		"30s":        30 * time.Second,
		"500ms":      500 * time.Millisecond,
		"9m59s996ms": 9*time.Minute + 59*time.Second + 996*time.Millisecond,
		"0d1s":       time.Second,
		"36500d":     MaxTimeout,
	} {
		if got, err := ParseTimeout(text); err != nil || got != want {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", "1", "d", "1 d", "1h1d", "1s1s", "1ms1s", "-1s", "+1s", "1.5h", "1D", "1w", "1us", "0s", "0d0h", "never",
		"36500d1ms", "36501d", "99999999999999999999s", "9223372036854775807d", "1d\n", "１d", strings.Repeat("9", 10000) + "s",
	} {
		if got, err := ParseTimeout(text); err == nil {
			t.Errorf("%q is %v", text, got)
		} else if strings.Contains(err.Error(), "\n") || len(err.Error()) > 300 {
			t.Errorf("%q: %q", text, err)
		}
	}
}

// Every accepted text is written in a form that is read as the same value.
func FuzzParseTimeout(f *testing.F) {
	f.Add("1d12h5m59s996ms")
	f.Add("36500d")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := ParseTimeout(text)
		if err != nil {
			return
		}
		if d <= 0 || d > MaxTimeout || d%time.Millisecond != 0 {
			t.Errorf("%q is %v", text, d)
		}
		if again, err := ParseTimeout(FormatTimeout(d)); err != nil || again != d {
			t.Errorf("%q: %v is written %s, and read %v, %v", text, d, FormatTimeout(d), again, err)
		}
	})
}

func TestParseTable(t *testing.T) {
	for text, want := range map[string]Table{
		"inet filter":  {INet, "filter"},
		"ip6  mail-in": {IPv6, "mail-in"},
		"filter":       {IPv4, "filter"},
		"bridge a.b_c": {Bridge, "a.b_c"},
	} {
		if got, err := ParseTable(text); err != nil || got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "inet", "inet a b", "filter inet", "inet 1a", "inet a;b", "inet a}", "inet ä", "inet " + strings.Repeat("a", 256)} {
		if text == "inet" {
			continue // a table of family ip with that name
		}
		if got, err := ParseTable(text); err == nil {
			t.Errorf("%q is %v", text, got)
		}
	}
}

func TestCleanComment(t *testing.T) {
	for text, want := range map[string]string{
		"":                                 "",
		"alice@example.org":                "alice@example.org",
		`say "hi"`:                         "say 'hi'",
		"a\nb\x00c\x7fd\u0085":             "a?b?c?d?",
		"bad\xffutf8":                      "bad?utf8",
		"left\u202eright\u2028":            "left?right?",
		"so\u00adft\u061c\u2060\U000e0041": "so?ft???",
		"Jürgen 日本":                        "Jürgen 日本",
		strings.Repeat("x", 200):           strings.Repeat("x", 128),
		"x" + strings.Repeat("ü", 100):     "x" + strings.Repeat("ü", 63),
	} {
		got := CleanComment(text)
		if got != want {
			t.Errorf("%q: %q", text, got)
		}
		if err := CheckComment(got); err != nil {
			t.Errorf("%q: %v", got, err)
		}
		if (CheckComment(text) == nil) != (got == text) {
			t.Errorf("%q: %v", text, CheckComment(text))
		}
	}
}
