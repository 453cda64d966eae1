package install

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"nftwl/pkg/config"
)

// A liveTable is one that the kernel has now.
type liveTable struct {
	name   string   // as nft has it, "ip filter"; of legacy iptables "iptables-legacy filter"
	makers []string // the programs that have probably made it
	chains []string
	rules  bool // it has any
	closes bool // a chain of hook input has rules, or drops by its policy
}

const legacy = "iptables-legacy"

// makers are the beginnings of the names that a program gives to its tables or
// its chains.
var makers = []struct{ begins, program string }{
	{"DOCKER", "Docker"}, {"docker-", "Docker"}, {"f2b-", "fail2ban"}, {"firewalld", "firewalld"},
	{"ufw-", "ufw"}, {"ufw6-", "ufw"}, {"NETAVARK", "Podman"}, {"netavark", "Podman"},
	{"CNI-", "Podman or Kubernetes"}, {"KUBE-", "Kubernetes"}, {"LIBVIRT_", "libvirt"},
	{"libvirt_", "libvirt"}, {"crowdsec", "CrowdSec"}, {"wg-quick-", "wg-quick"},
}

func maker(name string) string {
	for _, m := range makers {
		if strings.HasPrefix(name, m.begins) {
			return m.program
		}
	}
	return ""
}

// liveTables returns the tables of nftables and of legacy iptables that the
// kernel has; without nft only the latter.
func liveTables() ([]liveTable, error) {
	var tables []liveTable
	for _, family := range []string{"ip", "ip6"} {
		// The names of legacy tables, which root alone can read.
		text, _ := os.ReadFile("/proc/net/" + family + "_tables_names")
		for _, name := range strings.Fields(string(text)) {
			tables = append(tables, liveTable{name: legacy + " " + name, makers: []string{iptables()}, closes: name == "filter"})
		}
	}
	out, err := output("nft", "--stateless", "--terse", "list", "ruleset")
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return tables, nil
	case err != nil:
		return tables, fmt.Errorf("nft list ruleset: %w", err)
	}
	return append(tables, parseRuleset(out)...), nil
}

// iptablesChains are those of the tables that iptables-nft makes, none of which is
// of the family inet (builtin_table in iptables/nft.c).
var iptablesChains = []string{"INPUT", "FORWARD", "OUTPUT", "PREROUTING", "POSTROUTING"}

// parseRuleset reads what nft lists, a line a rule.
func parseRuleset(text string) (tables []liveTable) {
	var t *liveTable
	chain, input := false, false // in a chain; in one of hook input
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		depth := len(line) - len(strings.TrimLeft(line, "\t"))
		switch {
		case len(words) < 2:
		case depth == 0 && words[0] == "table" && len(words) > 2:
			tables = append(tables, liveTable{name: words[1] + " " + words[2]})
			t = &tables[len(tables)-1]
			t.madeBy(maker(words[2]))
		case t == nil:
		case depth == 1:
			if chain, input = words[0] == "chain", false; chain {
				t.chains = append(t.chains, words[1])
				t.madeBy(maker(words[1]))
				if slices.Contains(iptablesChains, words[1]) && !strings.HasPrefix(t.name, "inet ") && !t.ofIPTables() {
					t.makers = slices.Insert(t.makers, 0, iptables())
				}
			}
		case depth == 2 && chain && words[0] == "type":
			input = strings.Contains(line, " hook input ")
			t.closes = t.closes || input && strings.Contains(line, "policy drop")
		case depth == 2 && chain:
			t.rules = true
			// fail2ban's jumps to its own chains close nothing to strangers.
			t.closes = t.closes || input && maker(words[len(words)-1]) == ""
		}
	}
	return tables
}

// iptables names the program by which the rules of iptables come at boot.
func iptables() string {
	if exists("/etc/iptables/rules.v4") || exists("/etc/iptables/rules.v6") {
		return "iptables-persistent"
	}
	return "iptables"
}

func (t *liveTable) madeBy(program string) {
	if program != "" && !slices.Contains(t.makers, program) {
		t.makers = append(t.makers, program)
	}
}

// ofIPTables reports whether iptables has made the table, legacy or not.
func (t *liveTable) ofIPTables() bool {
	return len(t.makers) > 0 && t.makers[0] == iptables()
}

func (t *liveTable) legacy() bool { return strings.HasPrefix(t.name, legacy+" ") }

func (t *liveTable) String() string {
	if len(t.makers) == 0 {
		return t.name
	}
	return fmt.Sprintf("%s (%s)", t.name, strings.Join(t.makers, ", "))
}

// foreignFirewall names the program that the firewall belongs to, if nothing can
// be included into its rules: ufw, firewalld, or iptables, if its rules are in
// the kernel and nftables' own file has none.
func foreignFirewall() string {
	ufw, _ := os.ReadFile("/etc/ufw/ufw.conf") // none without ufw
	if regexp.MustCompile(`(?mi)^\s*enabled=yes\s*$`).Match(ufw) {
		return "ufw"
	}
	// Stat: a removed one leaves a dangling link.
	if _, err := os.Stat(UnitDir + "/multi-user.target.wants/firewalld.service"); err == nil {
		return "firewalld"
	}
	text, err := os.ReadFile(mainFile().path)
	if err == nil && !isEmptyFirewall(string(text)) {
		return ""
	}
	tables, _ := liveTables() // warn reports the error
	for _, t := range tables {
		if t.closes && t.ofIPTables() {
			return t.makers[0]
		}
	}
	return ""
}

// isEmptyFirewall reports whether a file is what Debian installs: three chains
// without a rule.
func isEmptyFirewall(text string) bool {
	text = regexp.MustCompile(`#.*`).ReplaceAllString(text, "")
	empty := regexp.MustCompile(`^(?:flush|ruleset|table|inet|chain|type|filter|hook|input|forward|output|priority|0|policy|accept|[\s;{}])*$`)
	return empty.MatchString(text)
}

// lost returns the tables whose rules are gone once the ruleset is flushed and the
// file is loaded. A flush does not reach legacy iptables, and nftwl's own table is
// no loss.
func lost(tables []liveTable, file string, c *config.Config) (gone []liveTable) {
	kept := ""
	if text, err := os.ReadFile(file); err == nil && !isEmptyFirewall(string(text)) {
		kept = fileTables(file)
	}
	for _, t := range tables {
		own := t.name == c.Table.String() && !slices.ContainsFunc(t.chains, func(chain string) bool {
			return !strings.HasPrefix(chain, "nftwl")
		})
		in := regexp.MustCompile(`(?m)^\s*table ` + regexp.QuoteMeta(t.name) + `\s*(?:\{.*)?$`).MatchString(kept)
		if (t.rules || t.closes) && !own && !in && !t.legacy() {
			gone = append(gone, t)
		}
	}
	return gone
}

// fileTables lists the tables that a file makes, with those that it includes: it
// is loaded in a network namespace of its own. If it does not load there, where
// devices are missing, its text is returned.
func fileTables(path string) string {
	cmd := exec.Command("/bin/sh", "-c", `PATH=$PATH:/usr/sbin; nft -f "$1" && nft list tables`, "sh", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.Output()
	if err != nil {
		out, _ = os.ReadFile(path) // one that is not there has none
	}
	return string(out)
}

// sshPorts returns the ports of the SSH server, sorted: those on which it listens,
// and those of its configuration, which it may not have read yet.
func sshPorts() (ports []string) {
	sockets, _ := output("ss", "-Hltnp") // BusyBox has none
	listens := regexp.MustCompile(`(?m)^(?:\S+ +){3}(\S+):(\d+) .*"(?:sshd|dropbear)"`)
	for _, m := range listens.FindAllStringSubmatch(sockets, -1) {
		// On the loopback are the ports that sessions forward.
		if !strings.HasPrefix(m[1], "127.") && m[1] != "[::1]" {
			ports = append(ports, m[2])
		}
	}
	settings, _ := output("sshd", "-T")
	for _, m := range regexp.MustCompile(`(?m)^port (\d+)$`).FindAllStringSubmatch(settings, -1) {
		ports = append(ports, m[1])
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}
