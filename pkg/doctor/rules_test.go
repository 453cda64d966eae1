package doctor

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// contributed returns the example firewall, or another file of contrib/nftables, as one
// text without includes. Edits are pairs: text of the files, and its replacement.
func contributed(t *testing.T, name string, edits ...string) string {
	t.Helper()
	used := make([]bool, len(edits))
	var expand func(name string) string
	expand = func(name string) string {
		data, err := os.ReadFile(filepath.Join(nstest.Root(t), "contrib", "nftables", name))
		if err != nil {
			t.Fatal(err)
		}
		text := string(data)
		for i := 0; i < len(edits); i += 2 {
			used[i] = used[i] || strings.Contains(text, edits[i])
			text = strings.ReplaceAll(text, edits[i], edits[i+1])
		}
		var b strings.Builder
		for line := range strings.Lines(text) {
			if file, ok := strings.CutPrefix(line, `include "nftwl/`); ok {
				file, _, _ = strings.Cut(file, `"`)
				b.WriteString(expand(file))
			} else if !strings.HasPrefix(line, "flush ruleset") {
				b.WriteString(line)
			}
		}
		return b.String()
	}
	text := expand(name)
	for i := 0; i < len(edits); i += 2 {
		if !used[i] {
			t.Fatalf("no file has %q", edits[i])
		}
	}
	return text
}

// newDoctor returns a doctor with a configuration, the defaults if empty, and the results that are not
// ok of the checks that it will make.
func newDoctor(t *testing.T, config string) (*Doctor, *[]Result) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nftwl.yaml")
	if err := os.WriteFile(path, []byte(cmp.Or(config, "# all defaults\n")), 0o644); err != nil {
		t.Fatal(err)
	}
	var results []Result
	return &Doctor{ConfigPath: path, report: func(r Result) {
		t.Logf("%s %s: %s\n\t%s\n\t# %s", r.Status, r.Check, r.Text, r.Remedy, r.Command)
		if (r.Status == Fail || r.Status == Warn) == (r.Remedy == "") {
			t.Errorf("%s is %s and has the remedy %q", r.Check, r.Status, r.Remedy)
		}
		if r.Status != OK {
			results = append(results, r)
		}
	}}, &results
}

// checkTheRules returns the results of the rules in the namespace that are not ok.
func checkTheRules(t *testing.T, config string) []Result {
	t.Helper()
	d, results := newDoctor(t, config)
	d.checkConfig(t.Context())
	d.checkKernel(t.Context())
	if d.conn == nil {
		t.Fatal("nftables cannot be read")
	}
	defer d.conn.Close()
	d.checkRules(t.Context())
	return *results
}

const (
	prefix64 = `include "nftwl/trusted-prefix64.nft"`
	strict   = `include "nftwl/strict.nft"`
)

// doctor finds nothing wrong with the files of contrib/nftables, in each variant,
// whichever nft loads them and whichever reads them.
func TestRulesOfContrib(t *testing.T) {
	const (
		standalone64     = `ip6 saddr & $nftwl_ipv6_network . tcp dport @trusted_ipv6`
		standaloneStrict = `tcp dport $nftwl_submission_ports counter drop`
	)
	trixie := t.TempDir()
	script := "#!/bin/sh\nexec /usr/sbin/chroot '" + nstest.Trixie(t) + "' /usr/sbin/nft \"$@\"\n"
	if err := os.WriteFile(filepath.Join(trixie, "nft"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	path := os.Getenv("PATH")
	for _, v := range []struct {
		name, file, config string
		edits              []string
	}{
		{"plain", "nftables.conf", "", nil},
		{"prefix64", "nftables.conf", "ipv6_prefix: 64\n", []string{"#" + prefix64, prefix64}},
		{"strict", "nftables.conf", "", []string{"#" + strict, strict}},
		{"prefix64 and strict", "nftables.conf", "ipv6_prefix: 64\n", []string{"#" + prefix64, prefix64, "#" + strict, strict}},
		{"standalone", "standalone.nft", "table: inet nftwl\n", nil},
		{"standalone prefix64", "standalone.nft", "table: inet nftwl\nipv6_prefix: 64\n", []string{"#" + standalone64, standalone64}},
		{"standalone strict", "standalone.nft", "table: inet nftwl\n", []string{"#" + standaloneStrict, standaloneStrict}},
		{"other names and ports", "nftables.conf",
			"trusted: {ipv4: logins4, ipv6: logins6}\nbanned: {ipv4: guessers4, ipv6: guessers6}\nports: [993, 587]\n",
			[]string{"{ 465, 587 }", "{ 587 }", "trusted_ipv4", "logins4", "trusted_ipv6", "logins6", "banned_ipv4", "guessers4", "banned_ipv6", "guessers6"}},
		{"no port in the keys", "nftables.conf", "", []string{"_addr . inet_service", "_addr", " . tcp dport", ""}},
	} {
		for _, nft := range []string{"host", "trixie"} {
			t.Run(v.name+"/"+nft, func(t *testing.T) {
				nstest.New(t)
				t.Setenv("PATH", path)
				if nft == "trixie" {
					t.Setenv("PATH", trixie+":"+path)
				}
				load(t, contributed(t, v.file, v.edits...))
				if bad := checkTheRules(t, v.config); len(bad) > 0 {
					t.Errorf("%d checks are not ok", len(bad))
				}
			})
		}
	}
}

// load loads a ruleset with the nft that doctor will find.
func load(t *testing.T, text string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s\n%s", err, out, text)
	}
}

func TestRulesBroken(t *testing.T) {
	const (
		jump       = "\t\tjump nftwl\n"
		mailboxes  = "\t\ttcp dport { 143, 993, 995 } ct state new counter accept comment \"IMAP and POP3\"\n"
		submission = "\t\ttcp dport { 465, 587 } ct state new counter accept comment \"submission\"\n"
		trusted    = `include "nftwl/trusted.nft"` + "\n"
		banned     = `include "nftwl/banned.nft"` + "\n"
		trusted4   = `ip saddr . tcp dport @trusted_ipv4`
		trusted6   = `ip6 saddr . tcp dport @trusted_ipv6`
		network6   = `ip6 saddr & $nftwl_ipv6_network . tcp dport @banned_ipv6 counter drop comment "nftwl: banned IPv6 network"`
		limits6    = `ip6 saddr != $nftwl_nat64 add @limited_ipv6 { ip6 saddr & $nftwl_ipv6_network . tcp dport }`
		limited6   = `ip6 saddr & $nftwl_ipv6_network . tcp dport @limited_ipv6`
		count      = ` jump nftwl_count`
		update4    = `update @submission_rate_ipv4 { ip saddr . tcp dport limit rate over 3/minute burst 5 packets }`
		update6    = `ip6 saddr != $nftwl_nat64 update @submission_rate_ipv6 { ip6 saddr & $nftwl_ipv6_network . tcp dport limit rate over 3/minute burst 5 packets }`
		all        = `limit rate over 3/minute burst 5 packets`
		anotherEnd = "iif \"lo\" accept\nct state established,related accept\nmeta l4proto ipv6-icmp accept\ntcp dport { 143, 587 } accept\n"
	)
	// another is a second firewall.
	another := func(hook, rules string) string {
		return "table ip theirs {\nchain in { type filter hook " + hook + "; policy drop;\n" + rules + anotherEnd + "}\n}\n"
	}
	const filter = "chain input of table inet filter"
	for _, v := range []struct {
		name   string
		config string
		file   string // default: nftables.conf
		edits  []string
		more   string   // a text to load after it
		want   []string // what is not ok
		says   string   // the first of them
	}{
		{name: "jump after the accept", edits: []string{jump, "", mailboxes, mailboxes + jump},
			want: []string{"fail rules.banned"},
			says: `comment "IMAP and POP3") in ` + filter + ` lets banned addresses in`},
		{name: "no jump", edits: []string{jump, ""},
			want: []string{"fail rules.banned"}, says: `ports 143, 993, 995: rule `},
		{name: "no jump, nor a rule for submission", edits: []string{jump, "", submission, ""},
			want: []string{"fail rules.trusted"},
			says: "ports 465, 587: the policy of " + filter + " drops trusted addresses"},
		{name: "jump after a drop", edits: []string{jump, "\t\ttcp dport 587 ct state new drop\n" + jump},
			want: []string{"fail rules.trusted"},
			says: " (tcp dport 587 ct state new drop) in " + filter + " drops trusted addresses"},
		{name: "banned before trusted", edits: []string{banned, "", trusted, banned + trusted},
			want: []string{"fail rules.trusted"},
			says: `comment "nftwl: banned IPv4") in chain nftwl of table inet filter drops trusted addresses`},
		{name: "limit before trusted", edits: []string{jump, "\t\ttcp dport 465 ct state new limit rate over 9/minute counter drop\n" + jump},
			want: []string{"fail rules.trusted", "warn rules.limit"},
			says: " (tcp dport 465 ct state new limit rate over 9/minute counter drop) in " + filter},
		{name: "no rule for trusted IPv6", edits: []string{trusted6, "ip6 saddr 2001:db8::1"},
			want: []string{"fail rules.trusted"}, says: `comment "nftwl: banned IPv6") in chain nftwl of table inet filter drops trusted addresses`},
		{name: "no rules for banned IPv6", edits: []string{network6, "", "ip6 saddr . tcp dport @banned_ipv6", "ip6 saddr 2001:db8::1"},
			want: []string{"fail rules.banned"}, says: `ports 143, 993, 995: rule `},
		{name: "no rule for banned networks", edits: []string{network6, ""},
			want: []string{"warn rules.banned"}, says: "a banned /64 is let in"},
		{name: "ports that are not covered", edits: []string{jump, "\t\ttcp dport { 143, 465, 587 } jump nftwl\n"},
			want: []string{"fail rules.banned"}, says: "ports 993, 995: rule "},
		{name: "another port in the configuration", config: "ports: [143, 993, 995, 465, 587, 4190]\n", edits: []string{jump, "\t\ttcp dport 4190 accept\n" + jump},
			want: []string{"fail rules.banned"}, says: "port 4190: rule "},
		{name: "another submission port in the configuration", config: "ports: [143, 993, 995, 465, 587, 2587]\n", edits: []string{jump, jump + "\t\ttcp dport 2587 accept\n"},
			want: []string{"warn rules.limit"}, says: "port 2587: strangers are let in without a limit"},
		{name: "no submission port in the configuration", config: "ports: [143, 993, 995]\n",
			want: []string{"warn rules.limit"}, says: "ports 465, 587: strangers are let in, and `ports` lacks it"},
		{name: "rules of the /64 variant alone", edits: []string{trusted6, "ip6 saddr & $nftwl_ipv6_network . tcp dport @trusted_ipv6"},
			want: []string{"fail rules.trusted"}, says: "the rules look up the /64 in trusted_ipv6, and ipv6_prefix is 128"},
		{name: "configuration of the /64 variant alone", config: "ipv6_prefix: 64\n",
			want: []string{"fail rules.trusted"}, says: "the rules look up the /128 in trusted_ipv6, and ipv6_prefix is 64"},
		{name: "mask for IPv4", edits: []string{trusted4, "ip saddr & 255.255.255.0 . tcp dport @trusted_ipv4"},
			want: []string{"fail rules.trusted"}, says: "drops trusted addresses"},
		{name: "banned by a network that is not", config: "ipv6_prefix: 56\n", edits: []string{trusted6, "ip6 saddr & ffff:ffff:ffff:ff00:: . tcp dport @trusted_ipv6"},
			want: []string{"fail rules.banned"}, says: "lets banned addresses in"},
		{name: "another table drops", more: another("input priority filter + 10", ""),
			want: []string{"fail rules.trusted"}, says: "ports 993, 995, 465: the policy of chain in of table ip theirs drops trusted addresses, whatever table inet filter accepts"},
		{name: "an earlier table drops", more: another("input priority filter - 5", ""),
			want: []string{"fail rules.trusted"}, says: "ports 993, 995, 465: the policy of chain in of table ip theirs drops trusted addresses"},
		{name: "prerouting drops", more: another("prerouting priority raw", ""),
			want: []string{"fail rules.trusted"}, says: "ports 993, 995, 465: the policy of chain in of table ip theirs drops trusted addresses"},
		{name: "a device drops", more: "table netdev n { chain c { type filter hook ingress device net0 priority 0; tcp dport 993 drop; }; }",
			want: []string{"fail rules.trusted"}, says: "port 993: rule 2 (tcp dport 993 drop) in chain c of table netdev n drops trusted addresses"},
		{name: "another table drops, unless a mark", more: another("input priority filter + 10", "meta mark 7 accept\n"),
			want: []string{"fail rules.trusted"}, says: "ports 993, 995, 465: the policy of chain in of table ip theirs"},
		{name: "lookup with a mark", edits: []string{trusted6, "meta mark 7 " + trusted6},
			want: []string{"fail rules.trusted"}, says: "drops trusted addresses"},
		{name: "jump with a mark", edits: []string{jump, "\t\tmeta mark 7 jump nftwl\n"},
			want: []string{"fail rules.banned"}, says: `ports 143, 993, 995: rule `},
		{name: "jump of another interface", edits: []string{jump, "\t\tiifname \"net1\" jump nftwl\n"},
			want: []string{"fail rules.banned"}, says: `ports 143, 993, 995: rule `},
		{name: "jump of another destination", edits: []string{jump, "\t\tip daddr 192.0.2.9 jump nftwl\n"},
			want: []string{"fail rules.banned"}, says: `ports 143, 993, 995: rule `},
		{name: "open connections are not accepted", edits: []string{"ct state established,related accept", ""},
			want: []string{"fail rules.established"}, says: "the policy of " + filter + " drops all but the first packet of connections"},
		{name: "answers are dropped", more: "table inet out { chain o { type filter hook output priority 0; policy drop; }; }",
			want: []string{"skip rules"}, says: "port 143 does not answer"},
		{name: "one limit for all", edits: []string{update4, all, update6, all},
			want: []string{"warn rules.limit"}, says: "all sources share one limit"},
		{name: "one limit for all in a set", edits: []string{update4, "update @submission_rate_ipv4 { tcp dport " + all + " }", update6, all,
			"\tset submission_rate_ipv4 {\n\t\ttype ipv4_addr . inet_service", "\tset submission_rate_ipv4 {\n\t\ttype inet_service"},
			want: []string{"warn rules.limit"}, says: "all sources share one limit"},
		{name: "no limit", edits: []string{count, ""},
			want: []string{"warn rules.limit"}, says: "ports 465, 587: strangers are let in without a limit"},
		{name: "a limit that bans nobody", edits: []string{limits6, ""},
			want: []string{"warn rules.limit"}, says: "IPv6, ports 465, 587: rule "},
		{name: "bans that are not looked up", edits: []string{limited6, "ip6 saddr & ffff:: . tcp dport @limited_ipv6"},
			want: []string{"warn rules.limit"}, says: "no rule drops the source for that"},
		{name: "no rules", file: "sets.nft", want: []string{"fail rules"},
			says: "this machine has no input firewall for IPv4 and IPv6: every port is open"},
		{name: "rules, and nothing that jumps to them", file: "nftwl.nft", want: []string{"fail rules"},
			says: "this machine has no input firewall for IPv4 and IPv6: every port is open"},
		{name: "no rules for IPv6", edits: []string{jump, "\t\tmeta nfproto ipv6 accept\n" + jump},
			want: []string{"fail rules.banned"}, says: "ports 143, 993, 995, 465, 587: rule "},
		{name: "an empty policy of drop", file: "sets.nft", more: "table inet filter { chain input { type filter hook input priority 0; policy drop; ct state established accept; }; }",
			want: []string{"fail rules.trusted", "fail rules.strangers"},
			says: "ports 143, 993, 995, 465, 587: the policy of " + filter + " drops trusted addresses"},
		{name: "strangers cannot log in", edits: []string{mailboxes, ""},
			want: []string{"fail rules.strangers"}, says: "port 143: the policy of " + filter + " drops addresses that are not trusted yet"},
		{name: "strangers cannot log in by IPv6", edits: []string{mailboxes, "ip version 4 " + mailboxes},
			want: []string{"warn rules.strangers"}, says: "IPv6, port 143: "},
		{name: "strangers cannot log in without a mark", edits: []string{mailboxes, "\t\tmeta mark 7 tcp dport 993 accept\n"},
			want: []string{"fail rules.strangers"}, says: "port 143: "},
		{name: "strict and open", edits: []string{"#" + strict, strict, jump, "\t\ttcp dport 587 accept\n" + jump},
			want: []string{"fail rules.banned"}, says: "port 587: rule "},
		{name: "a table that is not loaded", config: "table: inet nftwl\n",
			want: []string{"skip rules"}, says: "table inet nftwl lacks the sets"},
		{name: "standalone.nft with the default table", file: "standalone.nft",
			want: []string{"skip rules"}, says: "table inet filter lacks the sets"},
		{name: "no sets", file: "sets.nft", more: "flush ruleset", want: []string{"skip rules"}, says: "lacks the sets that they would look up"},
		{name: "sets of one family", file: "sets.nft", more: "delete set inet filter trusted_ipv4; delete set inet filter banned_ipv4",
			want: []string{"fail rules"}, says: "no input firewall for IPv6"},
	} {
		t.Run(v.name, func(t *testing.T) {
			nstest.New(t)
			nstest.NewPeer(t)
			routes(t)
			nstest.Nft(t, contributed(t, cmp.Or(v.file, "nftables.conf"), v.edits...))
			if v.more != "" {
				nstest.Nft(t, v.more)
			}
			bad := checkTheRules(t, v.config)
			if got := names(bad); !slices.Equal(got, v.want) {
				t.Errorf("not ok are %q, want %q", got, v.want)
			}
			if len(bad) > 0 && !strings.Contains(bad[0].Text, v.says) {
				t.Errorf("says %q, want %q", bad[0].Text, v.says)
			}
		})
	}
}

func names(results []Result) (names []string) {
	for _, r := range results {
		names = append(names, fmt.Sprintf("%s %s", r.Status, r.Check))
	}
	return names
}

// routes adds the routes to the internet: to the peer, through net0.
func routes(t *testing.T) {
	t.Helper()
	for _, via := range []string{"192.0.2.2", "2001:db8::2"} {
		if out, err := exec.Command("ip", "route", "add", "default", "via", via).CombinedOutput(); err != nil {
			t.Fatalf("ip: %v\n%s", err, out)
		}
	}
}

// doctor finds nothing wrong with rules that do the same in another way.
func TestRulesHealthy(t *testing.T) {
	const jump = "\t\tjump nftwl\n"
	for name, v := range map[string]struct {
		config string
		edits  []string
		more   string
	}{
		"interface":                {edits: []string{jump, "\t\tiifname vmap { \"net1\" : drop, \"net0\" : jump nftwl }\n"}},
		"index":                    {edits: []string{jump, "\t\tiif \"net0\" jump nftwl\n"}},
		"destination":              {edits: []string{jump, "\t\tip daddr 192.0.2.1 jump nftwl\n\t\tip6 daddr 2001:db8::1 jump nftwl\n"}},
		"local":                    {edits: []string{jump, "\t\tfib daddr type local jump nftwl\n\t\tfib daddr type broadcast drop\n"}},
		"route back":               {edits: []string{jump, "\t\tfib saddr . iif oif missing drop\n" + jump}},
		"mark":                     {edits: []string{jump, "\t\tmeta mark 7 drop\n\t\tmeta mark 8 accept\n" + jump}},
		"mark that is set":         {edits: []string{jump, "\t\tmeta mark 7 jump nftwl\n"}, more: "table inet m { chain p { type filter hook prerouting priority mangle; tcp dport { 143, 993, 995, 465, 587 } meta mark set 7; }; }"},
		"notrack":                  {more: "table inet r { chain p { type filter hook prerouting priority raw; udp dport 53 notrack; }; }"},
		"bogons":                   {more: "table inet b { set bogons { type ipv4_addr; flags interval; elements = { 0.0.0.0/8, 10.0.0.0/8, 192.0.2.0/24, 198.51.100.0/24, 203.0.113.0/24, 224.0.0.0/3 }; }; chain p { type filter hook prerouting priority raw; ip saddr @bogons drop; ip6 saddr 2001:db8::/32 drop; }; }"},
		"a quota of a later table": {more: "table inet q { chain i { type filter hook input priority 10; tcp dport 587 limit rate 1000/second burst 1000 packets accept; tcp dport 587 drop; }; }"},
	} {
		t.Run(name, func(t *testing.T) {
			nstest.New(t)
			nstest.NewPeer(t)
			routes(t)
			nstest.Nft(t, contributed(t, "nftables.conf", v.edits...))
			if v.more != "" {
				nstest.Nft(t, v.more)
			}
			if bad := checkTheRules(t, v.config); len(bad) > 0 {
				t.Errorf("not ok are %q", names(bad))
			}
		})
	}
}

// If only IPv4 has a route, IPv6 packets would arrive through the same interface.
func TestRulesOfAnInterface(t *testing.T) {
	nstest.New(t)
	nstest.NewPeer(t)
	nstest.Nft(t, contributed(t, "nftables.conf", "\t\tjump nftwl\n", "\t\tiifname \"net0\" jump nftwl\n"))
	if bad := checkTheRules(t, ""); len(bad) == 0 {
		t.Error("all is well without a route")
	}
	if out, err := exec.Command("ip", "route", "add", "default", "via", "192.0.2.2").CombinedOutput(); err != nil {
		t.Fatalf("ip: %v\n%s", err, out)
	}
	if bad := checkTheRules(t, ""); len(bad) > 0 {
		t.Errorf("not ok are %q", names(bad))
	}
}

// Together with the rules of other programs.
func TestRulesBeside(t *testing.T) {
	rulesets := filepath.Join(nstest.Root(t), "testdata", "rulesets")
	const container = "type filter hook input priority filter - 10; policy accept;"
	beside := func(t *testing.T, name string) {
		t.Helper()
		nft := nstest.Need(t, "nft", "nftables")
		nstest.Need(t, "iptables-nft-restore", "iptables")
		commands := nft + " -f " + name + ".nft"
		if _, err := os.Stat(filepath.Join(rulesets, name+".nft")); err != nil {
			commands = "iptables-nft-restore <" + name + ".v4; test ! -e " + name + ".v6 || ip6tables-nft-restore <" + name + ".v6"
		}
		cmd := exec.Command("sh", "-ec", commands)
		cmd.Dir = rulesets
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	docker := func(t *testing.T) {
		t.Helper()
		for _, command := range []string{"link add docker0 index 30 type veth peer name docker1", "link set docker0 up", "link set docker1 up", "addr add 172.17.0.1/16 dev docker0"} {
			if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
				t.Fatalf("ip: %v\n%s", err, out)
			}
		}
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	for name, v := range map[string]struct {
		beside, file, config string
		edits                []string
		then                 string // commands
		want                 []string
		says                 string
	}{
		"ufw":       {beside: "ufw", file: "standalone.nft", config: "table: inet nftwl\n"},
		"firewalld": {beside: "firewalld", file: "standalone.nft", config: "table: inet nftwl\n"},
		"docker's containers, unseen": {beside: "docker", file: "nftables.conf",
			want: []string{"fail rules.banned"}, says: "in chain DOCKER of table ip filter lets banned addresses in"},
		"docker's containers": {beside: "docker", file: "standalone.nft", config: "table: inet nftwl\n", edits: []string{container, "type filter hook prerouting priority dstnat - 10; policy accept;", "#fib daddr type != local accept", "fib daddr type != local accept"}},
		"SYNs":                {beside: "syn-limit"},
		"ufw without a port": {beside: "ufw", file: "standalone.nft", config: "table: inet nftwl\n", then: "iptables -D ufw-user-input -p tcp --dport 993 -j ACCEPT",
			want: []string{"fail rules.trusted"}, says: "port 993: the policy of chain INPUT of table ip filter drops trusted addresses, whatever table inet nftwl accepts"},
		"ufw's limit": {beside: "ufw", file: "standalone.nft", config: "table: inet nftwl\n", then: "iptables -I ufw-user-input -p tcp --dport 587 -m conntrack --ctstate NEW -m recent --update --seconds 30 --hitcount 6 --name X -j DROP; iptables -I ufw-user-input -p tcp --dport 587 -m conntrack --ctstate NEW -m recent --set --name X",
			want: []string{"fail rules.trusted", "warn rules.limit"}, says: "in chain ufw-user-input of table ip filter drops trusted addresses"},
		"firewalld without a port": {beside: "firewalld", file: "standalone.nft", config: "table: inet nftwl\n", then: "nft delete rule inet firewalld filter_IN_public_allow handle $(nft -a list chain inet firewalld filter_IN_public_allow | sed -n 's/.*dport 587 accept # handle //p')",
			want: []string{"fail rules.trusted"}, says: "(reject with icmpx admin-prohibited) in chain filter_IN_public of table inet firewalld drops trusted addresses"},
	} {
		t.Run(name, func(t *testing.T) {
			nstest.New(t)
			nstest.NewPeer(t)
			routes(t)
			if v.beside == "docker" {
				docker(t)
			}
			if v.file != "" {
				nstest.Nft(t, contributed(t, v.file, v.edits...))
			}
			beside(t, v.beside)
			if out, err := exec.Command("sh", "-ec", v.then).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			bad := checkTheRules(t, v.config)
			if got := names(bad); !slices.Equal(got, v.want) {
				t.Errorf("not ok are %q, want %q", got, v.want)
			}
			if len(bad) > 0 && !strings.Contains(bad[0].Text, v.says) {
				t.Errorf("says %q, want %q", bad[0].Text, v.says)
			}
		})
	}
}

// doctor names what it cannot try, if there is anything, and makes no claim about it.
func TestRulesUnseen(t *testing.T) {
	ipset := func(t *testing.T) { // a table that is not copied
		t.Helper()
		nstest.Need(t, "ipset", "ipset")
		if out, err := exec.Command("sh", "-ec", "ipset create x hash:ip; iptables-nft -A INPUT -m set --match-set x src -j DROP").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	nstest.New(t)
	nstest.Nft(t, contributed(t, "nftables.conf"))
	if bad := checkTheRules(t, ""); len(bad) > 0 {
		t.Fatalf("not ok are %q", names(bad))
	}
	ipset(t)
	t.Run("alone", func(t *testing.T) {
		nstest.New(t)
		nstest.Nft(t, contributed(t, "sets.nft"))
		ipset(t)
		bad := checkTheRules(t, "")
		if want := []string{"warn rules", "skip rules.unseen"}; !slices.Equal(names(bad), want) || strings.Contains(bad[0].Text, "no input firewall") {
			t.Errorf("%v, want %q", bad, want)
		}
	})
	unseen := func(want string) {
		t.Helper()
		if bad := checkTheRules(t, ""); len(bad) != 1 || bad[0].Check != "rules.unseen" || !strings.Contains(bad[0].Text, want) {
			t.Errorf("%v, want %q", bad, want)
		}
	}
	unseen(": table ip filter (")

	// As with iptables-legacy, a query creates the table: IPT_SO_GET_INFO in
	// linux/netfilter_ipv4/ip_tables.h.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	info := [84]byte{}
	copy(info[:], "filter")
	size := uint32(len(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_IP, 64, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	switch errno {
	case 0:
	case unix.ENOPROTOOPT, unix.ENOENT:
		nstest.Skip(t, "the kernel has no iptables-legacy: modprobe iptable_filter")
	default:
		t.Fatal(errno)
	}
	unseen("; table filter of iptables-legacy")
}

// If no client uses IPv6, rules for IPv4 are enough.
func TestRulesWithoutIPv6(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, contributed(t, "nftables.conf", "\t\tjump nftwl\n", "\t\tip version 4 jump nftwl\n"))
	if bad := checkTheRules(t, ""); len(bad) == 0 {
		t.Error("all is well with IPv6 and without rules for it")
	}
	for _, which := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	if bad := checkTheRules(t, ""); len(bad) != 1 || bad[0].Status != Skip || bad[0].Check != "rules.ipv6" {
		t.Errorf("not ok: %v", bad)
	}
}

// nft 1.0.6 crashes on a map that a later nft has loaded, and prints half an object of a
// dormant table. doctor asks the kernel instead.
func TestRulesUnreadable(t *testing.T) {
	for name, rules := range map[string]string{
		"crash":   "table inet x { chain c { ct state vmap { established : accept, related : accept, invalid : drop }; }; }",
		"no JSON": "table inet x { flags dormant; }",
	} {
		t.Run(name, func(t *testing.T) {
			nstest.New(t)
			nstest.Nft(t, contributed(t, "nftables.conf"))
			cmd := exec.Command("/usr/sbin/nft", rules)
			cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Chroot: nstest.Trixie(t)}
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("nft: %v\n%s", err, out)
			}
			if bad := checkTheRules(t, ""); len(bad) > 0 {
				t.Errorf("not ok: %v", bad)
			}
		})
	}
	d, results := newDoctor(t, "")
	d.checkRules(t.Context())
	if len(*results) != 1 || (*results)[0].Status != Skip {
		t.Errorf("without the kernel: %v", *results)
	}
}
