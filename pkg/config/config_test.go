package config

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
)

func TestDefaultsAreTheDocumentedFile(t *testing.T) {
	c, err := Parse([]byte(`
table: inet filter
trusted: {ipv4: trusted_ipv4, ipv6: trusted_ipv6}
banned: {ipv4: banned_ipv4, ipv6: banned_ipv6}
ports: [143, 993, 995, 465, 587]
timeout: 1d                 # nft's notation: 1d12h, 90m, 30s
ban_timeout: 1d
ipv6_prefix: 128
ignore: [127.0.0.0/8, "::1/128", "fe80::/10"]
comment: true
deadline: 500ms
snapshot: /var/lib/nftwl/sets.nft
`))
	if err != nil {
		t.Fatal(err)
	}
	if want := Default(); !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestParse(t *testing.T) {
	c, err := Parse([]byte("\ufeff" + `
table: ip6 mail
trusted:
  ipv4: t4
banned:
  ipv6: "b6"
ports:
  - 993
  - 25
timeout: 1d12h
ban_timeout: "90m"
ipv6_prefix: 64
ignore: ["10.0.0.0/8", 192.0.2.1]
comment: false
deadline: 1s
snapshot: "/x y"
policy: {listen: "[::1]:80"}
failures: {limit: 3, longest: 30d}
`))
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		Table:      nftset.Table{Family: nftset.IPv6, Name: "mail"},
		Trusted:    Names{"t4", "trusted_ipv6"},
		Banned:     Names{"banned_ipv4", "b6"},
		Ports:      []uint16{993, 25},
		Timeout:    36 * time.Hour,
		BanTimeout: 90 * time.Minute,
		IPv6Prefix: 64,
		Ignore:     []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.1/32")},
		Deadline:   time.Second,
		Snapshot:   "/x y",
		Policy:     &Policy{netip.MustParseAddrPort("[::1]:80"), "/etc/nftwl/policy.key"},
		Failures:   &Failures{3, 10 * time.Minute, time.Hour, 30 * 24 * time.Hour, 100},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

// A part of nftwld is off unless the configuration has its key.
func TestParts(t *testing.T) {
	c, err := Parse([]byte("policy: {listen: 127.0.0.1:8085, key_file: /etc/nftwl/policy.key}\n" +
		"failures: {limit: 10, within: 10m, ban: 1h, longest: 7d, trusted_limit: 100}\n"))
	if err != nil || !reflect.DeepEqual(c.Policy, &DefaultPolicy) || !reflect.DeepEqual(c.Failures, &defaultFailures) {
		t.Errorf("the documented values: %+v %+v, %v", c.Policy, c.Failures, err)
	}
	c, err = Parse([]byte("policy: {}\nfailures: {}\n"))
	if err != nil || !reflect.DeepEqual(c.Policy, &DefaultPolicy) || !reflect.DeepEqual(c.Failures, &defaultFailures) {
		t.Errorf("without values: %+v %+v, %v", c.Policy, c.Failures, err)
	}
	c, err = Parse([]byte("policy: {listen: 192.0.2.1:1}\n"))
	if err != nil || c.Failures != nil || DefaultPolicy.Listen.Port() == 1 {
		t.Errorf("one part: %+v, %v; the default is %+v now", c.Failures, err, DefaultPolicy)
	}
}

func TestCluster(t *testing.T) {
	both := []string{"trusted", "banned"}
	for text, want := range map[string]Cluster{
		"{server: 'rediss://nftwl@redis.example:6380', name: mail, node: imap1}": {Server: "rediss://nftwl@redis.example:6380", Name: "mail", Node: "imap1", Send: both, Take: both},
		"{server: 'redis://[2001:db8::1]:6379/3'}":                               {Server: "redis://[2001:db8::1]:6379/3", Name: "mail", Send: both, Take: both},
		"{server: 'unix:///run/redis.sock?db=1', send: [], take: [trusted]}":     {Server: "unix:///run/redis.sock?db=1", Name: "mail", Send: []string{}, Take: both[:1]},
		"{server: 'redis://a:26379?addr=b:26379&master_set=m', send: [banned], password_file: /p, ca_file: /c}": {
			Server: "redis://a:26379?addr=b:26379&master_set=m", Name: "mail", Send: both[1:], Take: both, PasswordFile: "/p", CAFile: "/c"},
	} {
		c, err := Parse([]byte("cluster: " + text + "\n"))
		if err != nil || !reflect.DeepEqual(c.Cluster, &want) {
			t.Errorf("%s: %+v, %v", text, c.Cluster, err)
		}
	}
	if c, err := Parse([]byte("policy: {}\n")); err != nil || c.Cluster != nil {
		t.Errorf("without one: %+v, %v", c.Cluster, err)
	}
}

func TestEmptyIsDefault(t *testing.T) {
	for _, text := range []string{"", "\n\n", "# nothing\n", "---\n", "---\n# nothing\n", "null\n", "{}\n", "ignore: []\n"} {
		c, err := Parse([]byte(text))
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		want := Default()
		if text == "ignore: []\n" {
			want.Ignore = []netip.Prefix{}
		}
		if !reflect.DeepEqual(c, want) {
			t.Errorf("%q: got %+v", text, c)
		}
	}
}

// Every error names the line and the key.
func TestErrors(t *testing.T) {
	for _, test := range []struct{ text, line, words string }{
		{"tabel: inet filter", "1", `unknown key "tabel"`},
		{"timeout: 1d\n\nport: 1", "3", `unknown key "port"`},
		{"timeout: 1d\ntimeout: 2d", "2", `"timeout"`},
		{"trusted: {ipv4: a, ipv4: b}", "1", `"ipv4"`},
		{"trusted: {ipv5: a}", "1", `trusted: unknown key "ipv5"`},
		{"trusted:\n  ipv4: '; flush ruleset'", "2", "trusted.ipv4: "},
		{"trusted: x", "1", "trusted: "},
		{"trusted: {ipv4: banned_ipv4}", "1", "trusted: set banned_ipv4 is named twice"},
		{"comment: true\nbanned: {ipv6: trusted_ipv4}", "2", "banned: set trusted_ipv4 is named twice"},
		{"table: filter inet", "1", `table: "filter" is not a family`},
		{"table: inet a b", "1", "table: "},
		{"table:", "1", "table: the value is missing"},
		{"table: ''", "1", "table: the value is empty"},
		{"table: [inet, filter]", "1", "table: a single plain value"},
		{"ports: []", "1", "ports: at least one"},
		{"ports: 993", "1", "ports: a list"},
		{"ports: [0]", "1", `ports: "0" is not a port`},
		{"ports: [65536]", "1", "ports: "},
		{"ports: [imaps]", "1", `ports: "imaps"`},
		{"ports: [993, 993]", "1", "ports: port 993 occurs twice"},
		{"ports: [[993]]", "1", "ports: "},
		{"ports:\n  - 993\n  - x", "3", `ports: "x" is not a port`},
		{"ignore: [\n  10.0.0.0/8,\n  x]", "3", `ignore: "x"`},
		{`"trusted": {ipv4: banned_ipv4}`, "1", "trusted: set banned_ipv4 is named twice"},
		{"timeout: 1d\n...\n---\n", "", ""},
		{"0----\n---", "", ""},
		{"deadline: 31s", "1", "deadline: it must be at most 30s"},
		{"timeout: |\n  1d", "1", "timeout: a single plain value"},
		{"timeout: !!str 1d", "1", "timeout: a single plain value"},
		{"timeout: &a 1d\nban_timeout: *a", "1", "timeout: a single plain value"},
		{"<<: {timeout: 1d}", "1", `unknown key "<<"`},
		{"table: inet filter\nports: [993\ntimeout: 1d", "2", "',' or ']'"},
		{"table: inet filter\nports: [993]\n timeout: 1d\n", "3", "expected key"},
		{"table: inet filter\nports: [993]\n'timeout: 1d\n", "3", "unexpected end of stream"},
		{"table: inet filter\nports: [993]\ntimeout: @\n", "3", "cannot start any token"},
		{"table: inet filter\nports: [993]\n\ttimeout: 1d", "3", "cannot start any token"},
		{strings.Repeat("[", 1000), "2", "node content"},
		{strings.Repeat("- ", 1000), "1", "keys with values"},
		{"timeout: 86400", "1", `timeout: "86400" is not a timeout`},
		{"timeout: 0s", "1", "timeout: "},
		{"timeout: never", "1", "timeout: "},
		{"timeout: 1h1d", "1", "timeout: "},
		{"timeout: -1d", "1", "timeout: "},
		{"timeout: 99999999999d", "1", "timeout: "},
		{"deadline: 0s", "1", "deadline: "},
		{"ipv6_prefix: 0", "1", "ipv6_prefix: "},
		{"ipv6_prefix: 129", "1", "ipv6_prefix: "},
		{"ignore: [10.0.0.1/8]", "1", "did you mean 10.0.0.0/8?"},
		{"ignore: ['::ffff:10.0.0.0/104']", "1", "IPv4-mapped"},
		{"ignore: [example.org]", "1", "ignore: "},
		{"ignore:", "1", "ignore: a list"},
		{"comment: maybe", "1", `comment: "maybe" is not true or false`},
		{"snapshot: sets.nft", "1", "snapshot: "},
		{"policy:", "1", "policy: keys with values"},
		{"policy: {port: 1}", "1", `policy: unknown key "port"`},
		{"policy: {listen: localhost:8085}", "1", `policy.listen: "localhost:8085" is not an address`},
		{"policy: {listen: 8085}", "1", "policy.listen: "},
		{"policy: {listen: 127.0.0.1:0}", "1", "policy.listen: "},
		{"policy:\n  key_file: k", "2", "policy.key_file: "},
		{"failures: {tries: 1}", "1", `failures: unknown key "tries"`},
		{"failures: {limit: 0}", "1", "failures.limit: "},
		{"failures: {limit: 1001}", "1", "failures.limit: "},
		{"failures: {limit: many}", "1", "failures.limit: "},
		{"failures: {within: 8d}", "1", "failures.within: it must be at most 7d"},
		{"failures: {ban: 0s}", "1", "failures.ban: "},
		{"failures: {ban: 8d}", "1", "failures: longest (7d) is shorter than ban (8d)"},
		{"failures: {limit: 101}", "1", "failures: trusted_limit (100) is less than limit (101)"},
		{"cluster:", "1", "cluster: keys with values"},
		{"cluster: {}", "1", "cluster: server is missing"},
		{"cluster: {name: mail}", "1", "cluster: server is missing"},
		{"cluster: {sever: redis://h}", "1", `cluster: unknown key "sever"`},
		{"cluster:\n  server: redis.example", "2", "cluster.server: \"redis.example\" is not a URL"},
		{"cluster: {server: 'http://h'}", "1", "cluster.server: "},
		{"cluster: {server: 'redis://'}", "1", "cluster.server: "},
		{"cluster: {server: 'redis://:6379'}", "1", "cluster.server: "},
		{"cluster: {server: 'redis://h:x'}", "1", "cluster.server: not a URL"},
		{"cluster: {server: 'unix://run/redis.sock'}", "1", "cluster.server: "},
		{"cluster: {server: 'redis://nftwl:secret@h'}", "1", "cluster.server: a password does not belong"},
		{"cluster: {server: 'redis://h/'}", "1", "cluster.server: "},
		{"cluster: {server: 'redis://h/mail'}", "1", "not the number of a database"},
		{"cluster: {server: 'redis://h?master=x'}", "1", `has "master", which is not`},
		{"cluster: {server: 'redis://h?addr=i'}", "1", "no master_set"},
		{"cluster: {server: 'rediss://h?skip_verify=1'}", "1", "cluster.server: "},
		{"cluster:\n  server: redis://h\n  name: a b", "3", `cluster.name: "a b" is not a name`},
		{"cluster:\n  server: redis://h\n  name: 'a}b'", "3", "cluster.name: "},
		{"cluster: {server: redis://h, node: " + strings.Repeat("x", 65) + "}", "1", "cluster.node: "},
		{"cluster:\n  server: redis://h\n  send: [trusted, limited]", "3", `cluster.send: "limited" is not trusted or banned`},
		{"cluster: {server: redis://h, take: trusted}", "1", "cluster.take: a list"},
		{"cluster: {server: redis://h, send: [], take: []}", "1", "cluster: neither send nor take"},
		{"cluster: {server: redis://h, password_file: p}", "1", "cluster.password_file: "},
		{"cluster:\n  server: redis://h\n  ca_file: ca.pem", "3", "cluster.ca_file: "},
		{"- a\n- b", "1", "keys with values"},
		{"just words", "1", "keys with values"},
		{"timeout: 1d\n---\ntimeout: 1d", "2", "a second YAML document"},
		{"timeout: 1d\ntable: \xff", "2", "not UTF-8"},
		{"timeout: {", "2", "node content"},
		{"table: &a inet filter", "1", "table: "},
		{"? [a]\n: b", "1", "a plain word"},
	} {
		_, err := Parse([]byte(test.text))
		if err == nil {
			t.Errorf("%q: no error", test.text)
			continue
		}
		if got := err.Error(); !strings.HasPrefix(got, test.line) || !regexp.MustCompile(`^\d+: `).MatchString(got) || !strings.Contains(got, test.words) || strings.Contains(got, "\n") {
			t.Errorf("%q: got %q, want line %s and %q", test.text, got, test.line, test.words)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := write("good", "timeout: 2d\n")
	if c, err := Load(good); err != nil || c.Timeout != 48*time.Hour {
		t.Errorf("%+v, %v", c, err)
	}
	for name, text := range map[string]string{
		"largest": strings.Repeat("#", maxFile), "comment": "# nothing\n", "newline": "\n", "space": " ",
	} {
		if c, err := Load(write(name, text)); err != nil || !reflect.DeepEqual(c, Default()) {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, words := range map[string]string{
		filepath.Join(dir, "missing"): "no such file",
		dir:                           "not a regular file",
		pipe:                          "not a regular file",
		"/dev/zero":                   "not a regular file",
		// A regular file whose size is 0 according to stat, but which can be read.
		"/proc/kallsyms": "larger than 32 KiB",
		write("large", strings.Repeat("#", maxFile+1)): "larger than 32 KiB",
		write("empty", ""):                    "empty is empty; remove the file to use the defaults",
		write("bad", "timeout: 1d\nfoo: 1\n"): "bad:2: unknown key",
	} {
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), words) || !strings.HasPrefix(err.Error(), "config: ") {
			t.Errorf("%s: %v, want %q", path, err, words)
		}
	}
}

// A login waits while the file is read, and Dovecot limits its address space. So none of
// these files must take seconds or gigabytes.
func TestHostileFiles(t *testing.T) {
	for name, unit := range map[string]string{
		"brackets": "[", "braces": "{a: ", "closed": "[],", "items": "- ", "questions": "? ", "colons": "a: ",
		"commas": ",", "quotes": `"`, "keys": "k%d: 1\n", "newlines": "\n", "spaced newlines": " \n", "anchors": "&a ", "tags": "! ",
		"comments": "#\n", "item lines": "- a\n", "nested lines": "%s- a\n", "nested keys": "%sa:\n", "strings": "\"a\" ", "aliases": "*a ", "text": "word ", "bars": "|\n",
	} {
		for _, prefix := range []string{"", "a: ", "a: [", "a:\n  ", "ignore: |\n", "a: >1\n", "a: \"", "a: '"} {
			var text strings.Builder
			text.WriteString(prefix)
			for i := 0; text.Len() < maxFile; i++ {
				switch {
				case strings.Contains(unit, "%d"):
					fmt.Fprintf(&text, unit, i)
				case strings.Contains(unit, "%s"):
					fmt.Fprintf(&text, unit, strings.Repeat(" ", i))
				default:
					text.WriteString(unit)
				}
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := time.Now()
			_, _ = Parse([]byte(text.String()))
			runtime.ReadMemStats(&after)
			took, mib := time.Since(start), (after.TotalAlloc-before.TotalAlloc)>>20
			if took > 2*time.Second || mib > 64 {
				t.Errorf("%q and %s: %v, %d MiB", prefix, name, took, mib)
			}
			if testing.Verbose() && (took > 20*time.Millisecond || mib > 10) {
				t.Logf("%q and %s: %v, %d MiB", prefix, name, took, mib)
			}
		}
	}
}

// Whatever is in the file, the result is a valid configuration, or an error with a line.
func FuzzParse(f *testing.F) {
	f.Add("table: inet filter\nports: [1, 2]\ntrusted: {ipv4: a}\nignore: [::1]\n")
	f.Add("timeout: 1d12h\ncomment: false\n? a\n: b\n")
	f.Add("a: &a [*a]\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := Parse([]byte(text))
		if err != nil {
			if first := err.Error()[0]; first < '0' || first > '9' || strings.Contains(err.Error(), "\n") {
				t.Errorf("not one line with its number: %q", err)
			}
			return
		}
		if len(c.Ports) == 0 || c.Timeout <= 0 || c.BanTimeout <= 0 || c.Deadline <= 0 || c.IPv6Prefix < 1 || c.IPv6Prefix > 128 {
			t.Errorf("accepted %q as %+v", text, c)
		}
		for _, name := range c.Sets() {
			if err := nftset.CheckName(name); err != nil {
				t.Error(err)
			}
		}
	})
}
