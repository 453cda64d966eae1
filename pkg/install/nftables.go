package install

import (
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"nftwl/contrib"
	"nftwl/pkg/config"
	"nftwl/pkg/firewall"
	"nftwl/pkg/nftset"
)

// ownTable is the table of standaloneFile. A configuration that names it has the rules
// in a table of their own.
const ownTable = "inet nftwl"

func (o *Options) hasOwnTable() bool { return o.Config.Table.String() == ownTable }

// unitLoads reports whether nftwl-persist.service must load that table itself. If
// nftables.service is in use, its file includes the rules, because it flushes all
// others.
func (o *Options) unitLoads() bool {
	used, _ := filepath.Glob(unitDir + "/*.wants/nftables.service") // the pattern is right
	return o.hasOwnTable() && exists(SystemdRuns) && len(used) == 0
}

// Nftables plans the sets and rules, which the administrator includes, or in a
// table of their own. It changes the names of the table and the sets in contrib's
// files, and nothing else. Next has the edit that ipv6_prefix needs.
func Nftables(o *Options) *Plan {
	c, defaults := o.Config, config.Default()
	own := o.hasOwnTable()
	is := map[string]string{
		defaults.Table.String(): c.Table.String(),
		defaults.Trusted.IPv4:   c.Trusted.IPv4, defaults.Trusted.IPv6: c.Trusted.IPv6,
		defaults.Banned.IPv4: c.Banned.IPv4, defaults.Banned.IPv6: c.Banned.IPv6,
	}
	words := regexp.MustCompile(`\b(` + strings.Join(slices.Collect(maps.Keys(is)), "|") + `)\b`)
	names, _ := fs.Glob(contrib.Files, "nftables/*") // the pattern is right
	p := new(Plan)
	if c.Table.Family != nftset.INet {
		p.problem("table: a table of the family inet, such as inet filter", "the rules are for IPv4 and IPv6, and table %s is not", c.Table)
	}
	for _, name := range names {
		path := filepath.Join(rulesDir, filepath.Base(name))
		if own == (path == standaloneFile) {
			// All at once, because one's new name can be another's old one.
			p.add(path, words.ReplaceAllStringFunc(shipped(name), func(word string) string { return is[word] }))
		}
	}
	p.nextPrefix(c.IPv6Prefix, own)
	main := mainFile()
	switch {
	case o.unitLoads():
		p.nextUnit()
	case own:
		p.nextStandalone(main)
	default:
		p.nextInclude(o, main)
	}
	p.Next = append(p.Next, "nftwl doctor")
	p.Undo = append(p.Undo,
		"# The rules, unless something still includes them and would not load without:",
		"grep -sn nftwl/ "+main.path+" || "+remove(p.Files),
		"rmdir "+rulesDir,
	)
	return p
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
	path, edit := rulesFile, `/trusted-prefix64.nft"$/s/^#//`
	if own {
		path, edit = standaloneFile, `/trusted IPv6 network"$/s/#//`
	}
	ones := netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")
	mask := netip.PrefixFrom(ones, bits).Masked().Addr().String()
	p.Next = append(p.Next,
		fmt.Sprintf("# STOP: with ipv6_prefix: %d, the rules trust no IPv6 client until this edit:", bits),
		`sed -i '`+edit+`; s/^\(define nftwl_ipv6_network = \).*/\1`+mask+`/' `+path)
}

// nextInclude has the administrator's own firewall include the rules.
func (p *Plan) nextInclude(o *Options, main ruleset) {
	tables, loaded := fileTables(main.path)
	if p.warn(main, tables) {
		p.Next = append(p.Next,
			"# Or give nftwl's rules a table of their own, and nothing is deleted: put",
			"# \"table: "+ownTable+"\" into "+config.Path+", and do this instead of what follows:",
			"#   mv "+rulesDir+" "+rulesDir+".old && nftwl setup nftables --write",
		)
	}
	text, _ := os.ReadFile(main.path)
	switch {
	case strings.Contains(string(text), "\ninclude \"nftwl/nftwl.nft\""):
	case loaded && len(tables) == 0 || !exists(main.path):
		p.Next = append(p.Next,
			"# "+main.path+" has no rules. "+exampleFile+" is a whole firewall as an",
			"# example: it opens port 22 for SSH, the mail ports, and no others. Look at it.",
			"# STOP if sshd listens on another port than 22: write that one into it, or be locked out.",
			"cp "+exampleFile+" "+main.path)
	default:
		p.Next = append(p.Next,
			"# Put into "+main.path+", before your table:",
			`#   include "nftwl/nftwl.nft"`,
			"# and into the input chain of table "+o.Config.Table.String()+", after the rules for established",
			"# connections and SSH, and before any for the mail ports:",
			"#   jump nftwl",
		)
	}
	p.Next = append(p.Next, "nft -c -f "+main.path, main.load)
	p.Undo = []string{
		"# Take the include and the jump out. Your own rules must open the mail ports:",
		`sed -i '/include "nftwl\|jump nftwl/d' ` + main.path,
		"nft -c -f " + main.path + " && systemctl reload nftables",
	}
}

const standaloneSSH = "# If sshd listens on another port than 22, write that one into " + standaloneFile + "."

// nextUnit has nftwl-persist.service load the rules, in a table of their own.
func (p *Plan) nextUnit() {
	p.Next = append(p.Next,
		standaloneSSH,
		"nft -c -f "+standaloneFile,
		"# A unit loads it, now and at boot:",
		"nftwl setup systemd --write",
		"# Open the mail ports in the other firewall, for everyone.",
	)
	p.Undo = []string{
		"# First undo that of 'nftwl setup systemd', whose unit loads it at boot.",
		"nft delete table " + ownTable,
	}
}

// nextStandalone has the file that is loaded at boot include that table.
func (p *Plan) nextStandalone(main ruleset) {
	tables, _ := fileTables(main.path)
	p.warn(main, append(tables, ownTable))
	p.Next = append(p.Next,
		standaloneSSH,
		"# Put into "+main.path+":",
		`#   include "nftwl/standalone.nft"`,
		"nft -c -f "+main.path, main.load,
	)
	p.Undo = []string{`sed -i '/include "nftwl/d' ` + main.path, "nft delete table " + ownTable}
}

// warn says first which tables a flush of the ruleset would delete, and reports
// whether there are any: those that have rules in the kernel, and none in the file.
func (p *Plan) warn(main ruleset, tables []string) bool {
	out, err := output("nft", "--stateless", "--terse", "list", "ruleset")
	if err != nil {
		p.note("The rules that the kernel has now are not known: nft list ruleset: %v. Run setup as root: loading %s deletes all rules that it lacks.", err, main.path)
	}
	lost := slices.DeleteFunc(withRules(out), func(table string) bool { return slices.Contains(tables, table) })
	if len(lost) > 0 {
		p.Next = append(p.Next,
			"# STOP: loading "+main.path+" deletes these tables, whose rules it lacks:",
			"#   "+strings.Join(lost, ", "),
			"# Add their rules to it, or have their programs make them again afterwards.")
	}
	return len(lost) > 0
}

// withRules returns the tables that have rules, or drop by a policy, in what nft
// lists.
func withRules(ruleset string) (tables []string) {
	table, chain := "", false
	for line := range strings.Lines(ruleset) {
		words := strings.Fields(line)
		switch depth := len(line) - len(strings.TrimLeft(line, "\t")); {
		case len(words) == 0:
		case depth == 0 && words[0] == "table" && len(words) > 2:
			table = words[1] + " " + words[2]
		case depth == 1:
			chain = words[0] == "chain"
		case depth == 2 && chain && (words[0] != "type" || strings.Contains(line, "policy drop")) && !slices.Contains(tables, table):
			tables = append(tables, table)
		}
	}
	return tables
}

// fileTables returns the tables to which a file gives rules, with those that it
// includes. If it does not load, they are all those that its text names.
func fileTables(path string) (tables []string, loaded bool) {
	if ruleset, err := FileRuleset(path); err == nil {
		return withRules(ruleset), true
	}
	text, _ := os.ReadFile(path) // one that is not there has none
	for _, m := range regexp.MustCompile(`(?m)^\s*table (\S+ [^\s{]+)`).FindAllSubmatch(text, -1) {
		tables = append(tables, string(m[1]))
	}
	return tables, false
}

// FileRuleset lists the ruleset that a file makes, without the elements of its
// sets. nft loads it in a network namespace of its own, which has devices of the
// names that this machine's have.
func FileRuleset(path string) (ruleset string, err error) {
	devices, err := net.Interfaces()
	if err != nil {
		return "", err
	}
	err = firewall.Inside(func() error {
		for _, device := range devices {
			if fd, err := firewall.MakeDevice(device.Name, 0); err == nil { // lo is there
				defer unix.Close(fd)
			}
		}
		if _, err := output("nft", "-f", path); err != nil {
			return err
		}
		ruleset, err = output("nft", "-s", "-t", "list", "ruleset")
		return err
	})
	return ruleset, err
}
