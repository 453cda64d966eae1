package install

import (
	"cmp"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
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

// Nftables plans the sets and rules for the configuration, which an
// administrator includes, or in a table of their own.
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
	ssh := cmp.Or(joined(sshPorts()), "22")
	for _, name := range names {
		text, err := contrib.Files.ReadFile(name)
		if err != nil {
			return nil, err
		}
		e := editor{name: name, text: string(text)}
		e.fit(c, from, table, ssh)
		if e.err != nil {
			return nil, e.err
		}
		p.add(filepath.Join(rulesFolder, filepath.Base(name)), e.text)
	}
	p.checkTable(o, table)
	if c.IPv6Prefix > 64 && c.IPv6Prefix < 128 {
		p.note("With ipv6_prefix: %d the limit counts each /%d as a source of its own, of which a client has many.", c.IPv6Prefix, c.IPv6Prefix)
	}
	main := mainFile()
	if own {
		p.nextOwn(o, main, table, foreign)
	} else {
		p.nextInclude(o, main, table, ssh)
	}
	p.Undo = append(p.Undo,
		"# The rules, unless something still includes them and would not load without:",
		"grep -sn nftwl/ "+main.path+" || "+p.remove(),
		"rmdir "+rulesFolder,
	)
	return p, nil
}

// checkTable replaces the problems of files that differ only in the table's name
// by one that says so.
func (p *Plan) checkTable(o *Options, table nftset.Table) {
	var paths []string
	var other string
	for _, f := range p.Files {
		text, err := os.ReadFile(f.Path)
		m := tableLine.FindSubmatch(text)
		if err != nil || m == nil || string(m[1]) == table.String() {
			continue
		}
		other = string(m[1])
		if strings.ReplaceAll(string(text), other, table.String()) != f.Text {
			return
		}
		paths = append(paths, f.Path)
	}
	if len(paths) == 0 {
		return
	}
	p.Problems = []Problem{{
		fmt.Sprintf("%s has the rules for table %s, and the configuration has table %s", rulesFolder, other, table),
		fmt.Sprintf("put table: %s into %s, or: sed -i 's/%s/%s/' %s", other, cmp.Or(o.ConfigPath, config.Path), other, table, strings.Join(paths, " ")),
	}}
}

var tableLine = regexp.MustCompile(`(?m)^table (\w+ \S+) \{$`)

// joined is how nft writes ports: "" for none.
func joined(ports []int) string {
	var words []string
	for _, port := range ports {
		words = append(words, strconv.Itoa(port))
	}
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return "{ " + strings.Join(words, ", ") + " }"
}

// ownTable reports whether the rules belong in a table of their own, and names
// the program that the firewall belongs to, if that is known.
func (o *Options) ownTable() (own bool, foreign string) {
	foreign = foreignFirewall()
	return foreign != "" || o.Config.Table.Name == "nftwl", foreign
}

// unitLoads reports whether nftwl-persist.service must load that table itself. If
// nftables.service is in use, its file includes the rules, because it flushes
// all others.
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
		e.err = fmt.Errorf("internal error: contrib/%s lacks %q", e.name, old)
	}
	e.text = strings.ReplaceAll(e.text, old, new)
}

// fit makes the text agree with the configuration, and with the ports of SSH.
func (e *editor) fit(c *config.Config, from, table nftset.Table, ssh string) {
	base := filepath.Base(e.name)
	if base == "nftables.conf" || base == "standalone.nft" {
		e.replace("\ttcp dport 22 ", "\ttcp dport "+ssh+" ")
	}
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

// A ruleset is the file that is loaded at boot, and the command that loads it
// again. It is never written here.
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

// warn puts first what a flush of the ruleset would delete.
func (p *Plan) warn(o *Options, main ruleset, own bool) {
	tables, err := liveTables()
	if err != nil {
		p.note("Which rules the kernel has now is not known: %v. Run it as root: loading %s deletes all rules that are not in it.", err, main.path)
	}
	for _, t := range tables {
		if t.legacy() {
			p.note("Table %s stays in force beside nftables: what it drops stays dropped.", &t)
		}
	}
	gone := lost(tables, main.path, o.Config)
	if len(gone) == 0 {
		return
	}
	p.Next = append(p.Next, "# STOP: loading "+main.path+" deletes these tables, whose rules it lacks:")
	for _, t := range gone {
		p.Next = append(p.Next, "#   "+t.String())
	}
	p.Next = append(p.Next, "# Add their rules to it, or have their programs make them again afterwards.")
	if !own {
		p.Next = append(p.Next,
			"# Or nftwl's rules get a table of their own, and nothing is deleted: put",
			"# \"table: inet nftwl\" into "+cmp.Or(o.ConfigPath, config.Path)+", and do this instead of what follows:",
			"#   mv "+rulesFolder+" "+rulesFolder+".old && "+o.shell()+" setup nftables --write",
		)
	}
}

func (p *Plan) nextInclude(o *Options, main ruleset, table nftset.Table, ssh string) {
	p.warn(o, main, false)
	text, err := os.ReadFile(main.path)
	switch {
	case err == nil && strings.Contains(string(text), "\ninclude \"nftwl/nftwl.nft\""):
	case err != nil || isEmptyFirewall(string(text)):
		p.Next = append(p.Next,
			"# "+main.path+" has no rules. "+rulesFolder+"/nftables.conf is a whole firewall as an",
			"# example: it opens the ports of SSH ("+strings.Trim(ssh, "{ }")+") and mail, and no others. Look at it, then:",
			"cp "+rulesFolder+"/nftables.conf "+main.path,
		)
	default:
		p.Next = append(p.Next,
			"# Put into "+main.path+", before your table:",
			`#   include "nftwl/nftwl.nft"`,
			"# and into its input chain, after the rules for established connections and",
			"# SSH, and before any for the mail ports:",
			"#   jump nftwl",
		)
		if !strings.Contains(string(text), "table "+table.String()) {
			p.Next = append(p.Next, "# The chain must be in table "+table.String()+".")
		}
	}
	p.Next = append(p.Next, "nft -c -f "+main.path, main.load, o.shell()+" doctor")
	p.Undo = []string{
		"# Take the include and the jump out. Your own rules must open the mail ports:",
		`sed -i '/include "nftwl\|jump nftwl/d' ` + main.path,
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
		p.Next = []string{"# Put this into " + cmp.Or(o.ConfigPath, config.Path) + ":", "#   table: " + table.String()}
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
			"# Nothing loads it at boot yet: a service of your own must.",
		)
	default:
		p.warn(o, main, true)
		p.Undo = append([]string{`sed -i '/include "nftwl/d' ` + main.path}, p.Undo...)
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
