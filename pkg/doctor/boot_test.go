package doctor

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// doctor recognizes a file as the loaded one, whatever its rules refer to, its sets have
// and its counters have counted. It finds what nftwl needs and the file lacks.
func TestBoot(t *testing.T) {
	const rules = `flush ruleset
table inet filter {
	set trusted_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1d; }
	set trusted_ipv6 { type ipv6_addr . inet_service; flags dynamic,timeout; timeout 1d; }
	set banned_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1d; }
	set banned_ipv6 { type ipv6_addr . inet_service; flags dynamic,timeout; timeout 1d; }
	set offices { type ipv4_addr; flags interval; elements = { 198.51.100.0/24 } }
	counter smtp { }
	chain nftwl {
		ip saddr . tcp dport @trusted_ipv4 counter accept
		ip6 saddr . tcp dport @trusted_ipv6 counter accept
		ip saddr . tcp dport @banned_ipv4 counter drop
	}
	chain mail {
		tcp dport { 465, 587 } jump nftwl
	}
	chain input {
		type filter hook input priority 0; policy drop;
		iif "mail0" accept
		iifname "mail0" ip saddr @offices accept
		tcp dport 25 counter name smtp limit rate 10/second accept
		jump mail
		tcp dport 993 accept
	}
}
`
	nstest.Need(t, "ip", "iproute2")
	replace := func(old, new string) func(string) string {
		return func(s string) string { return strings.Replace(s, old, new, 1) }
	}
	for _, v := range []struct {
		name string
		edit func(string) string // edits the file after it is loaded
		hand string              // rules loaded by hand
		want []string
	}{
		{name: "as it is loaded"},
		{name: "elements and counters", hand: "add element inet filter trusted_ipv4 { 192.0.2.7 . 993 }; add element inet filter offices { 203.0.113.0/24 }; reset counters"},
		{name: "a rule that nftwl does not need", edit: replace("\t\ttcp dport 993 accept\n", "")},
		{name: "tables of others", hand: "table ip nat { chain x { type nat hook output priority 0; }; }; table inet f2b-table { set s { type ipv4_addr; }; }"},
		{name: "no jump", edit: replace("\t\tjump mail\n", ""), want: []string{`fail persistence.boot: no "jump mail"`}},
		{name: "no second jump", edit: replace("jump nftwl", "accept"), want: []string{`fail persistence.boot: jump nftwl"`}},
		{name: "no lookup", edit: replace("\t\tip saddr . tcp dport @banned_ipv4 counter drop\n", ""), want: []string{`fail persistence.boot: @banned_ipv4`}},
		{name: "another policy", edit: replace("policy drop", "policy accept"), want: []string{`fail persistence.boot: policy drop`}},
		{name: "a device that is gone", edit: replace(`iif "mail0"`, `iif "mail1"`), want: []string{"fail persistence.boot: there is no firewall"}},
		{name: "another table", edit: func(s string) string { return strings.ReplaceAll(s, "inet filter", "inet other") }, want: []string{"fail persistence.boot: no table inet filter"}},
	} {
		t.Run(v.name, func(t *testing.T) {
			nstest.New(t)
			if out, err := exec.Command("ip", "tuntap", "add", "dev", "mail0", "mode", "tun").CombinedOutput(); err != nil {
				t.Fatalf("ip: %v, %s", err, out)
			}
			nstest.Nft(t, rules)
			if v.hand != "" {
				nstest.Nft(t, v.hand)
			}
			text := rules
			if v.edit != nil {
				text = v.edit(rules)
			}
			file := filepath.Join(t.TempDir(), "nftables.conf")
			if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			d, results := newDoctor(t, "")
			d.checkConfig(t.Context())
			d.checkKernel(t.Context())
			defer d.conn.Close()
			d.checkBootFile(t.Context(), file)
			expect(t, *results, v.want...)
		})
	}
}
