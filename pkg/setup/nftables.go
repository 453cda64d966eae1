package setup

import (
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"nftwl/contrib"
	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

const (
	rulesFolder = "/etc/nftwl"
	standalone  = "nftables/standalone.nft"
	ownRules    = rulesFolder + "/standalone.nft"
)

// Nftables plans the sets and rules as the configuration has them: to be
// included, or in a table of their own.
func Nftables(o *Options) (*Plan, error) {
	c := o.Config
	if c.Table.Family != nftset.INet {
		return nil, &Problem{fmt.Sprintf("the rules are for IPv4 and IPv6, and table %s is not", c.Table),
			"table: a table of the family inet, such as inet filter"}
	}
	names, err := fs.Glob(contrib.Files, "nftables/*")
	if err != nil {
		return nil, err
	}
	own, foreign := o.ownTable()
	table, from := c.Table, config.Default().Table
	if own {
		names = []string{standalone}
		from = nftset.Table{Family: nftset.INet, Name: "nftwl"}
		if table == config.Default().Table {
			table = from
		}
	} else {
		names = slices.DeleteFunc(names, func(name string) bool { return name == standalone })
	}
	p := new(Plan)
	for _, name := range names {
		text, err := contrib.Files.ReadFile(name)
		if err != nil {
			return nil, err
		}
		e := editor{name: name, text: string(text)}
		e.fit(c, from, table)
		if e.err != nil {
			return nil, e.err
		}
		p.add(filepath.Join(rulesFolder, filepath.Base(name)), e.text)
	}
	if c.IPv6Prefix > 64 && c.IPv6Prefix < 128 {
		p.note("With ipv6_prefix: %d the limit counts each /%d as a source of its own, of which a client has many.", c.IPv6Prefix, c.IPv6Prefix)
	}
	main := mainFile()
	if own {
		p.nextOwn(o, main, table, foreign)
	} else {
		p.nextInclude(o, main, table)
	}
	p.Undo = append(p.Undo,
		"# Unless something still includes them, or there would be no firewall at all:",
		"grep -sn nftwl/ "+main.path+" || "+p.remove(),
		"rmdir "+rulesFolder,
	)
	return p, nil
}

// ownTable reports whether the rules are to be in a table of their own, and
// names the program that the firewall belongs to, where that is known.
func (o *Options) ownTable() (own bool, foreign string) {
	foreign = foreignFirewall()
	return foreign != "" || o.Config.Table.Name == "nftwl", foreign
}

// unitLoads reports whether nftwl-persist.service is to load that table itself.
// Where nftables.service is in use, its file includes the rules: what it flushes
// would be gone otherwise.
func (o *Options) unitLoads() bool {
	own, foreign := o.ownTable()
	used, _ := filepath.Glob(unitFolder + "/*.wants/nftables.service") // the pattern is right
	return own && (foreign != "" || len(used) == 0)
}

// An editor makes small changes to a text, each of which must find its place.
type editor struct {
	name, text string
	err        error
}

func (e *editor) replace(old, new string) {
	if !strings.Contains(e.text, old) && e.err == nil {
		e.err = fmt.Errorf("a defect of nftwl's: contrib/%s does not have %q", e.name, old)
	}
	e.text = strings.ReplaceAll(e.text, old, new)
}

// fit makes the text agree with the configuration.
func (e *editor) fit(c *config.Config, from, table nftset.Table) {
	base := filepath.Base(e.name)
	defaults := config.Default()
	if base == "sets.nft" || base == "standalone.nft" {
		for _, l := range []struct {
			sets config.Names
			was  time.Duration
			is   time.Duration
		}{
			{defaults.Trusted, defaults.Timeout, c.Timeout},
			{defaults.Banned, defaults.BanTimeout, c.BanTimeout},
		} {
			if l.is == l.was {
				continue
			}
			for _, set := range l.sets.Both() {
				key := nftset.KeyType{IPv6: set == l.sets.IPv6, Port: true}
				block := fmt.Sprintf("\tset %s {\n\t\ttype %s\n\t\tsize 262144\n\t\tflags dynamic,timeout\n\t\ttimeout ", set, key)
				e.replace(block+nftset.FormatTimeout(l.was)+"\n", block+nftset.FormatTimeout(l.is)+"\n")
			}
		}
	}
	if c.IPv6Prefix != 128 {
		switch base {
		case "nftwl.nft":
			e.replace(`#include "nftwl/trusted-prefix64.nft"`, `include "nftwl/trusted-prefix64.nft"`)
		case "standalone.nft":
			const rule = "ip6 saddr & $nftwl_ipv6_network . tcp dport @trusted_ipv6 "
			e.replace("#"+rule, rule)
		}
	}
	if c.IPv6Prefix != 128 && c.IPv6Prefix != 64 && (base == "nftwl.nft" || base == "standalone.nft") {
		const define = "define nftwl_ipv6_network = "
		e.replace(define+mask(64)+"\n", define+mask(c.IPv6Prefix)+"\n")
	}
	if table != from {
		e.replace(from.String(), table.String())
	}
	// All at once, as one's new name can be the other's old one.
	e.text = strings.NewReplacer(
		defaults.Trusted.IPv4, c.Trusted.IPv4, defaults.Trusted.IPv6, c.Trusted.IPv6,
		defaults.Banned.IPv4, c.Banned.IPv4, defaults.Banned.IPv6, c.Banned.IPv6,
	).Replace(e.text)
}

func mask(bits int) string {
	ones := netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")
	return netip.PrefixFrom(ones, bits).Masked().Addr().String()
}

// A ruleset is the file that is loaded at boot, and how it is loaded again. It
// is never written here.
type ruleset struct{ path, load string }

func mainFile() ruleset {
	const systemd = "systemctl enable nftables && systemctl reload-or-restart nftables"
	files := []ruleset{
		{"/etc/nftables.conf", systemd},
		{"/etc/sysconfig/nftables.conf", systemd},
		{"/etc/nftables.nft", "rc-update add nftables boot && rc-service nftables reload"},
	}
	for _, f := range files {
		if exists(f.path) {
			return f
		}
	}
	return files[0]
}

func (p *Plan) nextInclude(o *Options, main ruleset, table nftset.Table) {
	text, err := os.ReadFile(main.path)
	switch {
	case err == nil && strings.Contains(string(text), "\ninclude \"nftwl/nftwl.nft\""):
	case err != nil || isEmptyFirewall(string(text)):
		p.Next = []string{
			"# " + main.path + " has no rules yet. " + rulesFolder + "/nftables.conf is a whole firewall as an",
			"# example: it opens the ports of SSH (22) and mail, and no others. Look at it, then:",
			"cp " + rulesFolder + "/nftables.conf " + main.path,
		}
	default:
		p.Next = []string{
			"# Put into " + main.path + ", before your table:",
			`#   include "nftwl/nftwl.nft"`,
			"# and into its input chain, after the rules for established connections and",
			"# SSH, and before any for the mail ports:",
			"#   jump nftwl",
		}
		if !strings.Contains(string(text), "table "+table.String()) {
			p.Next = append(p.Next, "# The chain must be in table "+table.String()+".")
		}
	}
	p.Next = append(p.Next, "nft -c -f "+main.path, main.load, o.shell()+" doctor")
	p.Undo = []string{
		"# Take the include and the jump out of " + main.path + ", then:",
		"nft -c -f " + main.path + " && systemctl reload nftables",
	}
}

// isEmptyFirewall reports whether a file is what Debian installs: three chains
// without a rule.
func isEmptyFirewall(text string) bool {
	var bare strings.Builder
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		bare.WriteString(line)
	}
	words := strings.FieldsFunc(bare.String(), func(r rune) bool { return strings.ContainsRune(" \t\n;{}", r) })
	return !slices.ContainsFunc(words, func(word string) bool {
		return !slices.Contains([]string{"flush", "ruleset", "table", "inet", "chain", "type", "filter", "hook",
			"input", "forward", "output", "priority", "0", "policy", "accept"}, word)
	})
}

func (p *Plan) nextOwn(o *Options, main ruleset, table nftset.Table, foreign string) {
	if table != o.Config.Table {
		file := o.ConfigPath
		if file == "" {
			file = config.Path
		}
		p.Next = []string{"# Put this into " + file + ":", "#   table: " + table.String()}
	}
	p.Undo = []string{"nft delete table " + table.String()}
	switch {
	case o.unitLoads() && exists("/run/systemd/system"):
		p.Next = append(p.Next,
			"nft -c -f "+ownRules,
			o.shell()+" setup systemd --write     # a unit loads it, now and at boot",
		)
		p.Undo = append([]string{"# First undo that of '" + o.shell() + " setup systemd', whose unit loads it at boot."}, p.Undo...)
	case foreign != "":
		p.Next = append(p.Next,
			"nft -c -f "+ownRules+" && nft -f "+ownRules,
			"# Nothing loads it at boot yet: let a service of your own do that.",
		)
	default:
		p.Next = append(p.Next,
			"# Put into "+main.path+":",
			`#   include "nftwl/standalone.nft"`,
			"nft -c -f "+main.path,
			main.load,
		)
	}
	if foreign != "" {
		p.Next = append(p.Next, "# Open the mail ports in "+foreign+", for everyone.")
	}
	p.Next = append(p.Next, o.shell()+" doctor")
}
