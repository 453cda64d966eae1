package install

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"nftwl/pkg/config"
)

// A liveTable is one that the kernel has now.
type liveTable struct {
	name   string   // as nft has it, "ip filter"; of legacy iptables "iptables-legacy filter"
	owners []string // the programs that have probably made it
	chains []string
	rules  bool // it has any
	closes bool // a chain of hook input has rules, or drops by its policy
}

const legacy = "iptables-legacy"

// iptablesTables are the tables that iptables-nft makes (builtin_table in
// iptables/nft.c), with chains whose names are in capitals.
var iptablesTables = []string{"filter", "nat", "mangle", "raw", "security", "broute"}

// makers are the beginnings of the names that a program gives to its tables or
// its chains.
var makers = []struct{ begins, program string }{
	{"DOCKER", "Docker"}, {"docker-", "Docker"},
	{"f2b-", "fail2ban"},
	{"firewalld", "firewalld"},
	{"ufw-", "ufw"}, {"ufw6-", "ufw"},
	{"NETAVARK", "Podman"}, {"netavark", "Podman"}, {"CNI-", "Podman or Kubernetes"},
	{"KUBE-", "Kubernetes"},
	{"LIBVIRT_", "libvirt"}, {"libvirt_", "libvirt"},
	{"crowdsec", "CrowdSec"},
	{"wg-quick-", "wg-quick"},
}

// liveTables returns the tables of nftables and of legacy iptables that the
// kernel has; without nft only the latter.
func liveTables() ([]liveTable, error) {
	var tables []liveTable
	for _, family := range []string{"ip", "ip6"} {
		// The names of legacy tables, which root alone can read.
		text, _ := os.ReadFile("/proc/net/" + family + "_tables_names")
		for _, name := range strings.Fields(string(text)) {
			tables = append(tables, liveTable{name: legacy + " " + name, owners: []string{iptables()}, closes: name == "filter"})
		}
	}
	nft, err := exec.LookPath("nft")
	if err != nil {
		if nft, err = exec.LookPath("/usr/sbin/nft"); err != nil { // which su without - does not find
			return tables, nil
		}
	}
	out, err := exec.Command(nft, "--stateless", "--terse", "list", "ruleset").Output()
	if err != nil {
		return tables, fmt.Errorf("nft list ruleset: %w", err)
	}
	return append(tables, parseRuleset(out)...), nil
}

// parseRuleset reads what nft lists, a line a rule.
func parseRuleset(text []byte) (tables []liveTable) {
	var table *liveTable
	chain, input := false, false // in a chain; in one of hook input
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		line := lines.Text()
		words := strings.Fields(line)
		switch depth := len(line) - len(strings.TrimLeft(line, "\t")); {
		case len(words) == 0:
		case depth == 0 && words[0] == "table" && len(words) > 2:
			tables = append(tables, liveTable{name: words[1] + " " + words[2]})
			table = &tables[len(tables)-1]
			table.madeBy(words[2])
		case table == nil:
		case depth == 1:
			chain, input = words[0] == "chain" && len(words) > 1, false
			if chain {
				table.chains = append(table.chains, words[1])
				table.madeBy(words[1])
			}
		case depth == 2 && chain && words[0] == "type":
			input = strings.Contains(line, " hook input ")
			table.closes = table.closes || input && strings.Contains(line, "policy drop")
		case depth == 2 && chain:
			table.rules = true
			// fail2ban's jumps to its own chains close nothing to strangers.
			table.closes = table.closes || input && maker(words[len(words)-1]) == ""
		}
	}
	for i := range tables {
		t := &tables[i]
		_, name, _ := strings.Cut(t.name, " ")
		if slices.Contains(iptablesTables, name) && slices.ContainsFunc(t.chains, func(chain string) bool {
			return slices.Contains([]string{"INPUT", "FORWARD", "OUTPUT", "PREROUTING", "POSTROUTING"}, chain)
		}) {
			t.owners = append([]string{iptables()}, t.owners...)
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

func maker(name string) string {
	for _, m := range makers {
		if strings.HasPrefix(name, m.begins) {
			return m.program
		}
	}
	return ""
}

func (t *liveTable) madeBy(name string) {
	if program := maker(name); program != "" && !slices.Contains(t.owners, program) {
		t.owners = append(t.owners, program)
	}
}

// ofIPTables tells whether the table is one of iptables, be it legacy.
func (t *liveTable) ofIPTables() bool {
	return len(t.owners) > 0 && t.owners[0] == iptables()
}

func (t *liveTable) legacy() bool { return strings.HasPrefix(t.name, legacy+" ") }

func (t *liveTable) String() string {
	if len(t.owners) == 0 {
		return t.name
	}
	return fmt.Sprintf("%s (%s)", t.name, strings.Join(t.owners, ", "))
}

// lost returns the tables whose rules are gone when the ruleset is flushed and
// the file is loaded. A flush does not reach legacy iptables, and nftwl's own
// table is no loss.
func lost(tables []liveTable, file string, c *config.Config) (gone []liveTable) {
	kept := func(string) bool { return false }
	if text, err := os.ReadFile(file); err == nil && !isEmptyFirewall(string(text)) {
		kept = fileTables(file)
	}
	for _, t := range tables {
		own := t.name == c.Table.String() && !slices.ContainsFunc(t.chains, func(chain string) bool {
			return !strings.HasPrefix(chain, "nftwl")
		})
		if (t.rules || t.closes) && !own && !kept(t.name) && !t.legacy() {
			gone = append(gone, t)
		}
	}
	return gone
}

// fileTables tells which tables a file makes, with those that it includes: it
// is loaded in a network namespace of its own. If it does not load there, where
// devices are missing, its text is searched.
func fileTables(path string) func(name string) bool {
	cmd := exec.Command("/bin/sh", "-c", `PATH=$PATH:/usr/sbin; nft -f "$1" && nft list tables`, "sh", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.Output()
	if err != nil {
		out, _ = os.ReadFile(path) // one that is not there has none
	}
	return func(name string) bool {
		return slices.ContainsFunc(strings.Split(string(out), "\n"), func(line string) bool {
			return strings.Join(strings.Fields(strings.TrimRight(line, " {")), " ") == "table "+name
		})
	}
}

// sshPorts returns the ports of the SSH server: those on which it listens, and
// those of its configuration, which it may not have read yet.
func sshPorts() []int {
	ports := map[int]bool{}
	out, _ := output("ss", "-Hltnp") // BusyBox has none
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		if len(fields) < 6 || !strings.Contains(fields[5], `"sshd"`) && !strings.Contains(fields[5], `"dropbear"`) {
			continue
		}
		host, port := fields[3], ""
		if i := strings.LastIndexByte(host, ':'); i >= 0 {
			host, port = strings.Trim(host[:i], "[]"), host[i+1:]
		}
		n, err := strconv.Atoi(port)
		// On the loopback are the ports that sessions forward.
		if addr, e := netip.ParseAddr(host); err == nil && (e != nil || !addr.IsLoopback()) {
			ports[n] = true
		}
	}
	out, _ = output("/usr/sbin/sshd", "-T")
	for line := range strings.Lines(out) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == "port" {
			if n, err := strconv.Atoi(fields[1]); err == nil {
				ports[n] = true
			}
		}
	}
	var sorted []int
	for port := range ports {
		sorted = append(sorted, port)
	}
	slices.Sort(sorted)
	return sorted
}
