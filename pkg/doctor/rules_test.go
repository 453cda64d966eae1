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

// contributed returns the example firewall, or another file of
// contrib/nftables, as one text without includes. Edits are pairs: what
// stands in the files, and what an administrator made of it.
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

// checkTheRules returns what is not ok of the rules in the namespace.
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

// The files of contrib/nftables are well, in each variant, whichever nft loads
// and whichever reads them.
func TestRulesOfContrib(t *testing.T) {
	const (
		standalone64     = `ip6 saddr & $nftwl_ipv6_network . tcp dport @trusted_ipv6`
		standaloneStrict = `tcp dport $nftwl_submission_ports ct state new counter drop`
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
			[]string{"trusted_ipv4", "logins4", "trusted_ipv6", "logins6", "banned_ipv4", "guessers4", "banned_ipv6", "guessers6"}},
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

// load loads a ruleset by the nft that the doctor will find.
func load(t *testing.T, text string) {
	t.Helper()
	cmd := exec.Command(find("nft"), "-f", "-")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s\n%s", err, out, text)
	}
}

func TestRulesBroken(t *testing.T) {
	const (
		jump       = "\t\tjump nftwl\n"
		mailboxes  = "\t\ttcp dport { 143, 993, 995 } ct state new counter accept comment \"IMAP and POP3\"\n"
		trusted    = `include "nftwl/trusted.nft"` + "\n"
		banned     = `include "nftwl/banned.nft"` + "\n"
		limits     = `include "nftwl/submission.nft"` + "\n"
		trusted4   = `ip saddr . tcp dport @trusted_ipv4`
		trusted6   = `ip6 saddr . tcp dport @trusted_ipv6`
		bans6      = `add @banned_ipv6 { ip6 saddr & $nftwl_ipv6_network . tcp dport }`
		network6   = `ip6 saddr & $nftwl_ipv6_network . tcp dport @banned_ipv6 ct state new counter drop comment "nftwl: banned IPv6 network"`
		update4    = `update @submission_rate_ipv4 { ip saddr . tcp dport limit rate over 3/minute burst 5 packets }`
		update6    = `update @submission_rate_ipv6 { ip6 saddr & $nftwl_ipv6_network . tcp dport limit rate over 3/minute burst 5 packets }`
		all        = `limit rate over 3/minute burst 5 packets`
		anotherEnd = "iif \"lo\" accept\nct state established,related accept\nmeta l4proto ipv6-icmp accept\ntcp dport { 143, 587 } accept\n"
	)
	// another is a firewall beside ours.
	another := func(rules string) string {
		return "table ip theirs {\nchain in { type filter hook input priority filter + 10; policy drop;\n" + rules + anotherEnd + "}\n}\n"
	}
	for _, v := range []struct {
		name   string
		config string
		file   string // nftables.conf if empty
		edits  []string
		more   string   // a text to load after it
		want   []string // what is not ok
		says   string   // the first of them
	}{
		{name: "jump after the accept", edits: []string{jump, "", mailboxes, mailboxes + jump},
			want: []string{"fail rules.trusted.ipv4", "fail rules.trusted.ipv6", "fail rules.banned.ipv4", "fail rules.banned.ipv6"},
			says: `ports 143, 993, 995: no rule looks up trusted_ipv4 before rule 38 ("IMAP and POP3") in chain input of table inet filter lets everybody in`},
		{name: "jump after a drop", edits: []string{jump, "\t\ttcp dport 587 ct state new drop\n" + jump},
			want: []string{"fail rules.trusted.ipv4", "fail rules.trusted.ipv6"},
			says: "port 587: no rule looks up trusted_ipv4 before rule "},
		{name: "banned before trusted", edits: []string{banned, "", trusted, banned + trusted},
			want: []string{"fail rules.trusted.ipv4", "fail rules.trusted.ipv6"},
			says: `("nftwl: banned IPv4") in chain nftwl of table inet filter drops who is trusted`},
		{name: "limit before trusted", edits: []string{jump, "\t\ttcp dport 465 ct state new limit rate over 9/minute counter drop\n" + jump},
			want: []string{"fail rules.trusted.ipv4", "fail rules.trusted.ipv6"},
			says: "port 465: no rule looks up trusted_ipv4 before rule "},
		{name: "no rule for trusted IPv6", edits: []string{trusted6, "ip6 saddr 2001:db8::1"},
			want: []string{"fail rules.trusted.ipv6"}, says: `no rule looks up trusted_ipv6 before rule `},
		{name: "no rules for banned IPv6", edits: []string{network6, "", "ip6 saddr . tcp dport @banned_ipv6", "ip6 saddr 2001:db8::1"},
			want: []string{"fail rules.banned.ipv6", "fail rules.limit"}, says: "no rule looks up banned_ipv6 before rule "},
		{name: "no rule for banned networks", edits: []string{network6, ""},
			want: []string{"warn rules.banned.ipv6", "fail rules.limit"}, says: "a banned /64 is not kept out"},
		{name: "ports that are not covered", edits: []string{jump, "\t\ttcp dport { 143, 465, 587 } jump nftwl\n"},
			want: []string{"fail rules.trusted.ipv4", "fail rules.trusted.ipv6", "fail rules.banned.ipv4", "fail rules.banned.ipv6"},
			says: "ports 993, 995: no rule looks up trusted_ipv4 before "},
		{name: "another port in the configuration", config: "ports: [143, 993, 995, 465, 587, 4190]\n", edits: []string{jump, "\t\ttcp dport 4190 accept\n" + jump},
			want: []string{"fail rules.trusted.ipv4", "fail rules.trusted.ipv6", "fail rules.banned.ipv4", "fail rules.banned.ipv6"},
			says: "port 4190: no rule looks up trusted_ipv4 before "},
		{name: "rules of the /64 variant alone", edits: []string{trusted6, "ip6 saddr & $nftwl_ipv6_network . tcp dport @trusted_ipv6"},
			want: []string{"fail rules.trusted.ipv6"}, says: "looks up the /64 in trusted_ipv6, and nftwl stores single addresses: ipv6_prefix is 128"},
		{name: "configuration of the /64 variant alone", config: "ipv6_prefix: 64\n",
			want: []string{"fail rules.trusted.ipv6"}, says: "looks up single addresses in trusted_ipv6, and nftwl stores the /64: ipv6_prefix is 64"},
		{name: "mask for IPv4", edits: []string{trusted4, "ip saddr & 255.255.255.0 . tcp dport @trusted_ipv4"},
			want: []string{"fail rules.trusted.ipv4"}, says: "looks up the /24 in trusted_ipv4, and nftwl stores single addresses"},
		{name: "banned by a network that is not", config: "ipv6_prefix: 56\n", edits: []string{trusted6, "ip6 saddr & ffff:ffff:ffff:ff00:: . tcp dport @trusted_ipv6"},
			want: []string{"fail rules.banned.ipv6"}, says: "looks up single addresses in banned_ipv6, and nftwl stores the /56: ipv6_prefix is 56"},
		{name: "another table drops", more: another(""),
			want: []string{"fail rules.trusted.ipv4"}, says: "ports 993, 995, 465: the policy of chain in of table ip theirs drops who is trusted, whatever table inet filter accepts"},
		{name: "another table drops, as far as is known", more: another("meta mark 7 accept\n"),
			want: []string{"skip rules.trusted.ipv4", "skip rules.limit"}, says: "cannot be told, as nftwl does not understand rule "},
		{name: "nothing is known of a drop", edits: []string{jump, "\t\tmeta mark 7 drop\n" + jump}},
		{name: "what is not understood is no help", edits: []string{trusted6, "ip6 saddr 2001:db8::1", jump, "\t\tmeta mark 7 accept\n" + jump},
			want: []string{"fail rules.trusted.ipv6"}, says: "(rules passed over as not understood: 1)"},
		{name: "look-up that is not understood", edits: []string{trusted6, "meta mark 7 " + trusted6},
			want: []string{"skip rules.trusted.ipv6"}, says: "cannot be told"},
		{name: "the rest behind what is not understood", edits: []string{jump, "\t\tmeta mark 7 jump nftwl\n", mailboxes, "\t\tmeta mark 7 tcp dport 993 accept\n"},
			want: []string{"skip rules.trusted.ipv4", "skip rules.trusted.ipv6", "skip rules.limit", "skip rules.strangers"}, says: "cannot be told"},
		{name: "strict, as far as is known", edits: []string{"#" + strict, strict, jump, "\t\tmeta mark 7 tcp dport 587 accept\n" + jump},
			want: []string{"skip rules.limit"}, says: "IPv4, port 587: cannot be told, as nftwl does not understand rule "},
		{name: "no limit, as far as is known", edits: []string{update4, "", update6, "", "goto nftwl_over_limit", "accept", jump, "\t\tmeta mark 7 accept\n\t\tmeta mark 8 drop\n" + jump},
			want: []string{"skip rules.limit"}, says: "; without that rule: strangers are let in without a limit"},
		{name: "open connections are not accepted", edits: []string{"ct state established,related accept", ""},
			want: []string{"warn rules.established"}, says: "the policy of chain input of table inet filter drops them"},
		{name: "bans cut connections", edits: []string{"ct state established,related accept", "", jump, jump + "\t\tct state established,related accept\n", "@banned_ipv4 ct state new", "@banned_ipv4"},
			want: []string{"warn rules.established"}, says: `IPv4, ports 143, 993, 995, 465, 587: a ban, or the end of a trust, cuts open connections: rule `},
		{name: "one limit for all", edits: []string{update4, all, update6, all},
			want: []string{"warn rules.limit"}, says: "the limit is one for all sources together"},
		{name: "one limit for all in a set", edits: []string{update4, "update @submission_rate { tcp dport " + all + " }", update6, all,
			"\tset submission_rate_ipv4 {\n\t\ttype ipv4_addr . inet_service", "\tset submission_rate {\n\t\ttype inet_service"},
			want: []string{"warn rules.limit"}, says: "the limit is one for all sources together"},
		{name: "no limit", edits: []string{update4, "", update6, "", "goto nftwl_over_limit", "accept"},
			want: []string{"warn rules.limit"}, says: "IPv4, ports 465, 587: strangers are let in without a limit"},
		{name: "a limit that bans nobody", edits: []string{bans6, ""},
			want: []string{"warn rules.limit"}, says: "IPv6, ports 465, 587: rule "},
		{name: "bans that are not looked up", edits: []string{"ip6 saddr . tcp dport @banned_ipv6 ct state new counter drop comment \"nftwl: banned IPv6\"", "", bans6, "add @banned_ipv6 { ip6 saddr . tcp dport }"},
			want: []string{"fail rules.banned.ipv6", "fail rules.limit"}, says: "looks up the /64 in banned_ipv6, and nftwl stores single addresses"},
		{name: "no rules", file: "sets.nft",
			want: []string{"fail rules.trusted.ipv4", "fail rules.trusted.ipv6", "fail rules.banned.ipv4", "fail rules.banned.ipv6", "warn rules.limit"},
			says: "no rule looks up trusted_ipv4 before a firewall without a chain of hook input lets everybody in"},
		{name: "an empty policy of drop", file: "sets.nft", more: "table inet filter { chain input { type filter hook input priority 0; policy drop; ct state established accept; }; }",
			want: []string{"fail rules.trusted.ipv4", "fail rules.trusted.ipv6", "warn rules.banned.ipv4", "warn rules.banned.ipv6", "fail rules.strangers"},
			says: "no rule looks up trusted_ipv4 before the policy of chain input of table inet filter drops who is trusted"},
		{name: "strangers cannot log in", edits: []string{mailboxes, ""},
			want: []string{"fail rules.strangers"}, says: "IPv4, ports 110, 143, 993, 995: the policy of chain input of table inet filter drops who is not trusted yet"},
		{name: "strangers cannot log in by IPv6", edits: []string{mailboxes, "ip version 4 " + mailboxes},
			want: []string{"warn rules.strangers"}, says: "IPv6, ports "},
		{name: "strangers cannot log in, as far as is known", edits: []string{mailboxes, "\t\tmeta mark 7 tcp dport 993 accept\n"},
			want: []string{"skip rules.strangers"}, says: "IPv4, port 993: cannot be told, as nftwl does not understand rule "},
		{name: "strangers cannot log in by IPv4, and by IPv6 as far as is known", edits: []string{mailboxes, "\t\tmeta mark 7 ip6 version 6 tcp dport 993 accept\n"},
			want: []string{"warn rules.strangers"}, says: "IPv4, ports 110, 143, 993, 995: "},
		{name: "strict and open", edits: []string{"#" + strict, strict, jump, "\t\ttcp dport 587 accept\n" + jump},
			want: []string{"fail rules.trusted.ipv4", "fail rules.trusted.ipv6", "fail rules.banned.ipv4", "fail rules.banned.ipv6", "warn rules.limit"},
			says: "port 587: no rule looks up trusted_ipv4"},
		{name: "a table that is not loaded", config: "table: inet nftwl\n",
			want: []string{"fail rules"}, says: "table inet nftwl lacks the sets, and table inet filter has one named trusted_ipv4"},
		{name: "standalone.nft with the default table", file: "standalone.nft",
			want: []string{"fail rules"}, says: "table inet filter lacks the sets, and table inet nftwl has one named trusted_ipv4"},
		{name: "no sets", file: "sets.nft", more: "flush ruleset", want: []string{"skip rules"}, says: "lacks the sets that they would look up"},
		{name: "sets of one family", file: "sets.nft", more: "delete set inet filter trusted_ipv4; delete set inet filter banned_ipv4",
			want: []string{"fail rules.trusted.ipv6", "fail rules.banned.ipv6", "warn rules.limit"}, says: "no rule looks up trusted_ipv6"},
	} {
		t.Run(v.name, func(t *testing.T) {
			nstest.New(t)
			file := v.file
			if file == "" {
				file = "nftables.conf"
			}
			text := contributed(t, file, v.edits...)
			nstest.Nft(t, text)
			if v.more != "" {
				nstest.Nft(t, v.more)
			}
			var got []string
			bad := checkTheRules(t, v.config)
			for _, r := range bad {
				got = append(got, fmt.Sprintf("%s %s", r.Status, r.Check))
			}
			if !slices.Equal(got, v.want) {
				t.Errorf("not ok are %q, want %q", got, v.want)
			}
			if len(bad) > 0 && !strings.Contains(bad[0].Text, v.says) {
				t.Errorf("says %q, want %q", bad[0].Text, v.says)
			}
		})
	}
}

// Rules for the interface of the internet are rules for those who come by it.
func TestRulesOfAnInterface(t *testing.T) {
	nstest.New(t)
	nstest.NewPeer(t)
	nstest.Nft(t, contributed(t, "nftables.conf", "\t\tjump nftwl\n", "\t\tiifname vmap { \"net1\" : drop, \"net0\" : jump nftwl }\n"))
	if bad := checkTheRules(t, ""); !slices.ContainsFunc(bad, func(r Result) bool {
		return strings.Contains(r.Text, "cannot be told") || strings.Contains(r.Text, "not understood")
	}) {
		t.Errorf("without a route, the interface is known: %v", bad)
	}
	for _, family := range []string{"-4", "-6"} {
		via := map[string]string{"-4": "192.0.2.2", "-6": "2001:db8::2"}[family]
		if out, err := exec.Command("ip", family, "route", "add", "default", "via", via).CombinedOutput(); err != nil {
			t.Fatalf("ip: %v\n%s", err, out)
		}
		if device := defaultDevice(family == "-6"); device != "net0" {
			t.Errorf("the default route of %s is by %q", family, device)
		}
	}
	if bad := checkTheRules(t, ""); len(bad) > 0 {
		t.Errorf("%d checks are not ok", len(bad))
	}
}

// What is not looked at is named, where there is any.
func TestRulesUnseen(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, contributed(t, "nftables.conf"))
	text := func(check string) string {
		t.Helper()
		d, _ := newDoctor(t, "")
		texts, report := make(map[string]string), d.report
		d.report = func(r Result) { texts[r.Check] = r.Text; report(r) }
		d.checkConfig(t.Context())
		d.checkKernel(t.Context())
		defer d.conn.Close()
		d.checkRules(t.Context())
		return texts[check]
	}
	if s := text("rules.unseen"); s != "" {
		t.Errorf("with nothing unseen: %q", s)
	}
	if s := text("rules.trusted.ipv4"); s == "" || strings.Contains(s, "passed over") {
		t.Errorf("with all rules understood: %q", s)
	}

	nstest.Nft(t, "insert rule inet filter input meta mark 7 accept; insert rule inet filter input ct state new meta mark 8 accept")
	for check, n := range map[string]int{"rules.trusted.ipv4": 2, "rules.banned.ipv6": 2, "rules.established": 1} {
		if s, want := text(check), fmt.Sprintf(" (rules passed over as not understood: %d)", n); !strings.HasSuffix(s, want) {
			t.Errorf("%s says %q, want %q", check, s, want)
		}
	}
	nstest.Nft(t, "table netdev x { chain c { type filter hook ingress device lo priority 0; tcp dport 993 drop; }; }")
	if s := text("rules.unseen"); !strings.HasSuffix(s, ": chain c of table netdev x, of hook ingress") {
		t.Errorf("with a chain of hook ingress: %q", s)
	}

	// As iptables-legacy does it, asking makes the table: IPT_SO_GET_INFO of
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
	if s := text("rules.unseen"); !strings.Contains(s, ": table filter of iptables-legacy; chain c ") {
		t.Errorf("with iptables-legacy: %q", s)
	}
}

// Where nobody comes by IPv6, rules for IPv4 are enough.
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

// What cannot be looked at is no failure. nft 1.0.6 crashes on a map that a
// later one has loaded, and prints half an object of a table that is dormant.
func TestRulesUnreadable(t *testing.T) {
	old := strings.Contains(nftVersion(t), "v1.0.6")
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
			bad := checkTheRules(t, "")
			if old && (len(bad) != 1 || bad[0].Status != Skip || bad[0].Check != "rules") || !old && len(bad) > 0 {
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

func nftVersion(t *testing.T) string {
	t.Helper()
	out, err := exec.Command(nstest.Need(t, "nft", "nftables"), "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}
