package install

import (
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"nftwl/contrib"
	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// ownTable is the table of Standalone, as contrib has it.
const ownTable = "nftwl"

// Nftables plans the sets and rules, which the administrator includes, or in a
// table of their own. It changes the names of the table and the sets in contrib's
// files, and nothing else. Next has the edits that ipv6_prefix or sshd needs.
func Nftables(o *Options) (*Plan, error) {
	c, defaults := o.Config, config.Default()
	if c.Table.Family != nftset.INet {
		return nil, &Problem{fmt.Sprintf("the rules are for IPv4 and IPv6, and table %s is not", c.Table),
			"table: a table of the family inet, such as inet filter"}
	}
	names, _ := fs.Glob(contrib.Files, "nftables/*") // the pattern is right
	own, foreign := o.ownTable()
	from, table := defaults.Table, c.Table
	if own {
		from.Name = ownTable
		if table == defaults.Table {
			table = from
		}
	}
	is := map[string]string{
		from.String():         table.String(),
		defaults.Trusted.IPv4: c.Trusted.IPv4, defaults.Trusted.IPv6: c.Trusted.IPv6,
		defaults.Banned.IPv4: c.Banned.IPv4, defaults.Banned.IPv6: c.Banned.IPv6,
	}
	words := regexp.MustCompile(`\b(` + strings.Join(slices.Collect(maps.Keys(is)), "|") + `)\b`)
	p := new(Plan)
	for _, name := range names {
		path := filepath.Join(RulesDir, filepath.Base(name))
		if own != (path == Standalone) {
			continue
		}
		// All at once, because one's new name can be another's old one.
		p.add(path, words.ReplaceAllStringFunc(shipped(name), func(word string) string { return is[word] }))
	}
	p.nextPrefix(c.IPv6Prefix, own)
	main := mainFile()
	if own {
		p.nextOwn(o, main, table, foreign)
	} else {
		p.nextInclude(o, main)
	}
	p.Undo = append(p.Undo,
		"# The rules, unless something still includes them and would not load without:",
		"grep -sn nftwl/ "+main.path+" || "+p.remove(),
		"rmdir "+RulesDir,
	)
	return p, nil
}

// ownTable reports whether the rules belong in a table of their own, and names
// the program that the firewall belongs to, if that is known.
func (o *Options) ownTable() (own bool, foreign string) {
	foreign = foreignFirewall()
	return foreign != "" || o.Config.Table.Name == ownTable, foreign
}

// unitLoads reports whether nftwl-persist.service must load that table itself. If
// nftables.service is in use, its file includes the rules, because it flushes all
// others.
func (o *Options) unitLoads() bool {
	own, foreign := o.ownTable()
	used, _ := filepath.Glob(UnitDir + "/*.wants/nftables.service") // the pattern is right
	return own && (foreign != "" || len(used) == 0)
}

// A ruleset is the file that is loaded at boot, and the command that loads it
// again. setup never writes it.
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

// nextPrefix has the rules look up networks, as nftwl stores them.
func (p *Plan) nextPrefix(bits int, own bool) {
	if bits == 128 {
		return
	}
	path, line, edit := Rules, `#include "nftwl/trusted-prefix64.nft"`, `/trusted-prefix64.nft"$/s/^#//`
	if own {
		path, line, edit = Standalone, `#ip6 … "nftwl: trusted IPv6 network"`, `/trusted IPv6 network"$/s/#//`
	}
	p.Next = append(p.Next,
		fmt.Sprintf("# STOP: with ipv6_prefix: %d, the rules trust no IPv6 client until you edit them:", bits),
		"# take the # from the line "+line+".",
		"sed -i '"+edit+"' "+path)
	if bits != 64 {
		ones := netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")
		mask := netip.PrefixFrom(ones, bits).Masked().Addr().String()
		p.Next = append(p.Next, fmt.Sprintf("# Define the network as a /%d.", bits),
			"sed -i 's/^\\(define nftwl_ipv6_network = \\).*/\\1"+mask+"/' "+path)
	}
}

// warn says first what a flush of the ruleset would delete.
func (p *Plan) warn(o *Options, main ruleset, own bool) {
	tables, err := liveTables()
	if err != nil {
		p.note("The rules that the kernel has now are not known: %v. Run setup as root: loading %s deletes all rules that it lacks.", err, main.path)
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
			"# Or give nftwl's rules a table of their own, and nothing is deleted: put",
			"# \"table: inet "+ownTable+"\" into "+o.configPath()+", and do this instead of what follows:",
			"#   mv "+RulesDir+" "+RulesDir+".old && "+o.shell("nftwl")+" setup nftables --write",
		)
	}
}

func (p *Plan) nextInclude(o *Options, main ruleset) {
	p.warn(o, main, false)
	text, err := os.ReadFile(main.path)
	switch {
	case err == nil && strings.Contains(string(text), "\ninclude \"nftwl/nftwl.nft\""):
	case err != nil || isEmptyFirewall(string(text)):
		p.Next = append(p.Next,
			"# "+main.path+" has no rules. "+Example+" is a whole firewall as an",
			"# example: it opens port 22 for SSH, the mail ports, and no others. Look at it, then:")
		if ports := otherSSH(); ports == "" {
			p.Next = append(p.Next, "cp "+Example+" "+main.path)
		} else {
			p.Next = append(p.Next,
				"# STOP: sshd uses "+ports+", and not 22 alone. As it is, the example locks you out.",
				"# This opens "+ports+" in place of 22:",
				"sed 's/tcp dport 22 /tcp dport "+ports+" /' "+Example+" >"+main.path)
		}
	default:
		p.Next = append(p.Next,
			"# Put into "+main.path+", before your table:",
			`#   include "nftwl/nftwl.nft"`,
			"# and into its input chain, after the rules for established connections and",
			"# SSH, and before any for the mail ports:",
			"#   jump nftwl",
		)
		if table := o.Config.Table.String(); !strings.Contains(string(text), "table "+table) {
			p.Next = append(p.Next, "# The chain must be in table "+table+".")
		}
	}
	p.Next = append(p.Next, "nft -c -f "+main.path, main.load, o.shell("nftwl")+" doctor")
	p.Undo = []string{
		"# Take the include and the jump out. Your own rules must open the mail ports:",
		`sed -i '/include "nftwl\|jump nftwl/d' ` + main.path,
		"nft -c -f " + main.path + " && systemctl reload nftables",
	}
}

func (p *Plan) nextOwn(o *Options, main ruleset, table nftset.Table, foreign string) {
	if table != o.Config.Table {
		p.Next = append(p.Next, "# Put this into "+o.configPath()+":", "#   table: "+table.String())
	}
	if ports := otherSSH(); ports != "" {
		p.Next = append(p.Next, "# sshd uses "+ports+", and not 22 alone: so that no ban locks you out, replace 22 by",
			"# "+ports+" in "+Standalone+".")
	}
	p.Undo = []string{"nft delete table " + table.String()}
	switch {
	case o.unitLoads() && exists("/run/systemd/system"):
		p.Next = append(p.Next,
			"nft -c -f "+Standalone,
			o.shell("nftwl")+" setup systemd --write     # a unit loads it, now and at boot",
		)
		p.Undo = append([]string{"# First undo that of '" + o.shell("nftwl") + " setup systemd', whose unit loads it at boot."}, p.Undo...)
	case foreign != "":
		p.Next = append(p.Next,
			"nft -c -f "+Standalone+" && nft -f "+Standalone,
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
	p.Next = append(p.Next, o.shell("nftwl")+" doctor")
}

// otherSSH is how nft writes the ports of the SSH server; "" for none but 22.
func otherSSH() string {
	switch ports := sshPorts(); {
	case len(ports) == 0 || len(ports) == 1 && ports[0] == "22":
		return ""
	case len(ports) == 1:
		return ports[0]
	default:
		return "{ " + strings.Join(ports, ", ") + " }"
	}
}
