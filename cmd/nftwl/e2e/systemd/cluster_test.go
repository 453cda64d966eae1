package systemd

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// clusterDropIn is where the administrator puts it.
const clusterDropIn = "etc/systemd/system/nftwld.service.d/cluster.conf"

// clusterStatus is why nftwld cannot share, by its own word; "" if it can.
func (m *machine) clusterStatus() (reason string, err error) {
	out, err := m.try("nftwld", "status", "--json")
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	var s struct {
		Connected *float64           `json:"cluster_connected"`
		Down      map[string]float64 `json:"cluster_down"`
	}
	nstest.Must(m, json.Unmarshal([]byte(out), &s))
	switch {
	case s.Connected == nil:
		return "", errors.New("no cluster_connected in " + out)
	case *s.Connected == 1:
		return "", nil
	}
	for reason := range s.Down {
		return reason, nil
	}
	return "", errors.New("neither connected nor a reason: " + out)
}

func (m *machine) clusterIs(want string) {
	m.Helper()
	nstest.Until(m, fmt.Sprintf("the cluster is %q", want), func() error {
		reason, err := m.clusterStatus()
		if err == nil && reason != want {
			err = fmt.Errorf("it is %q", reason)
		}
		return err
	})
}

// In its own sandbox nftwld reaches no engine, and the log says what to do. With the
// drop-in it does, with the password that root alone can read.
func TestClusterSandbox(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.nftwld()
		engine := "redis"
		if m.exists("usr/bin/valkey-server") {
			engine = "valkey"
		}
		b.Need(t, "usr/bin/"+engine+"-server", engine+"-server")
		m.run("systemd-run", "--unit=engine", "/usr/bin/"+engine+"-server", "--port", "6379", "--save", "",
			"--user", "default", "off", "--user", "nftwl", "on", ">secret", "~nftwl:*", "+@all")
		m.write("etc/nftwl.yaml", "policy: {}\ncluster: {server: \"redis://nftwl@127.0.0.1\", node: one}\n")

		m.run("systemctl", "restart", "nftwld")
		m.clusterIs("sandbox")
		if log := m.run("journalctl", "--unit=nftwld"); !strings.Contains(log, "hint=") || !strings.Contains(log, "nftwld.service.d/cluster.conf") {
			t.Errorf("no hint at the drop-in in\n%s", log)
		}

		m.copy(nstest.Root(t)+"/contrib/systemd", "usr/share/nftwl/systemd")
		if got := m.doctor("cluster")["cluster"]; !strings.HasPrefix(got, "fail: ") {
			t.Errorf("doctor: %s", got)
		}
		m.run("sh", "-euc", m.remedies("cluster")["cluster"])
		m.clusterIs("login") // without a password
		m.write("etc/nftwl/cluster.password", "secret\n")
		nstest.Must(m, os.Chmod(m.file("etc/nftwl/cluster.password"), 0o600))
		m.run("systemctl", "restart", "nftwld")
		m.clusterIs("")
		m.run("nftwl", "add", "192.0.2.7")
		cli := []string{"--user", "nftwl", "--pass", "secret", "--no-auth-warning", "HGETALL", "nftwl:{mail}:trusted"}
		nstest.Until(m, "the engine has it", func() error {
			out := m.run(engine+"-cli", cli...)
			if !strings.Contains(out, "192.0.2.7") {
				return errors.New(out)
			}
			return nil
		})

		// Where Dovecot does not report, there is no key.
		m.run("rm", "/etc/nftwl/policy.key")
		m.write("etc/nftwl.yaml", "cluster: {server: \"redis://nftwl@127.0.0.1\", node: one}\n")
		m.run("systemctl", "restart", "nftwld")
		m.clusterIs("")
		m.run("systemd-analyze", "verify", "--man=no", "/etc/systemd/system/nftwld.service")
	})
}

// docs/cluster.md as it is written, with a Redis or Valkey on the first of two
// machines, and a third that has the role of a submission host.
func TestDocsCluster(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		engine := "redis"
		if _, err := os.Stat(b.Path("usr/bin/valkey-server")); err == nil {
			engine = "valkey"
		}
		b.Need(t, "usr/bin/"+engine+"-server", engine+"-server")
		b.Need(t, "usr/bin/openssl", "openssl")
		password := map[string]string{"PASSWORD2": "of-submit", "PASSWORD": "of-nftwl"}
		fill := func(text string) string {
			return strings.NewReplacer("PASSWORD2", password["PASSWORD2"], "PASSWORD", password["PASSWORD"]).Replace(text)
		}
		sets := func(m *machine) {
			m.installNftwld()
			m.copy(nstest.Root(t)+"/contrib/systemd", "usr/share/nftwl/systemd")
			m.write("etc/nftwl.yaml", "ports: [143, 465, 587, 993, 995]\n")
			m.write("etc/hosts", "127.0.0.1 localhost\n10.9.0.1 redis.example\n")
			m.run("nft", "-f", "/etc/nftwl/sets.nft")
		}

		imap1, imap2, submit1 := newMachine(t, b), newMachine(t, b), newMachine(t, b)
		all := []*machine{imap1, imap2, submit1}
		imap1.wire(imap2, submit1)
		for _, m := range all {
			sets(m)
		}
		// What its package makes.
		for _, dir := range []string{"/var/lib/", "/var/log/"} {
			imap1.run("install", "-d", "-o", engine, "-g", engine, dir+engine)
		}
		roles := nstest.Blocks(t, "docs/cluster.md", "Roles")
		for _, block := range nstest.Blocks(t, "docs/cluster.md", "1. Redis") {
			text := strings.ReplaceAll(strings.ReplaceAll(block.Text, "redis", engine), engine+".example", "redis.example")
			switch {
			case block.Language == "sh":
				imap1.shell(text)
			default:
				imap1.write("etc/"+engine+"/nftwl.conf", fill(text+roles[1].Text))
			}
		}
		certificate := imap1.run("cat", "/etc/"+engine+"/cert.pem")

		joins := func(m *machine, node, password string) {
			m.Helper()
			for _, block := range nstest.Blocks(t, "docs/cluster.md", "2. Each machine") {
				if block.Language == "yaml" {
					m.write("etc/nftwl.yaml", strings.ReplaceAll(block.Text, "imap1", node))
					continue
				}
				m.shell(block.Text)
				if strings.Contains(block.Text, "cluster.password") {
					m.write("etc/nftwl/cluster.password", password+"\n")
					m.write("etc/nftwl/cluster.pem", certificate)
				}
			}
		}
		joins(imap1, "imap1", password["PASSWORD"])
		joins(imap2, "imap2", password["PASSWORD"])
		joins(submit1, "submit1", password["PASSWORD2"])
		submit1.write("etc/nftwl.yaml", roles[0].Text)
		submit1.run("systemctl", "restart", "nftwld")
		for _, m := range all {
			m.clusterIs("")
		}

		shown := nstest.Blocks(t, "docs/cluster.md", "3. See that it works")
		if out := imap1.shell(shown[0].Text); !strings.Contains(out, "cluster connected    1") {
			t.Errorf("%s", out)
		}
		for _, m := range all[1:] {
			nstest.Until(m, "the trust of imap1", func() error {
				out := m.run("nftwl", "list", "trusted")
				if _, want, _ := strings.Cut(shown[1].Text, "\n"); timeLeft(out) != timeLeft(want) {
					return errors.New(out)
				}
				return nil
			})
		}
		// A submission host bans for all, and trusts for itself.
		submit1.run("nftwl", "add", "192.0.2.9")
		submit1.run("nftwl", "ban", "192.0.2.8")
		submit1.run("nftwl", "remove", "192.0.2.7")
		for _, m := range all[:2] {
			m.holds("banned_ipv4", "192.0.2.8 . 993")
			if out := m.run("nftwl", "list", "trusted"); strings.Contains(out, "192.0.2.9") || !strings.Contains(out, "192.0.2.7") {
				t.Errorf("the trusts of imap1 changed to\n%s", out)
			}
		}
		cli := []string{engine + "-cli", "--tls", "--cacert", "/etc/nftwl/cluster.pem", "-h", "redis.example", "-p", "6380",
			"--no-auth-warning", "--user", "submit", "--pass", password["PASSWORD2"], "DEL", "nftwl:{mail}:trusted"}
		if out, _ := submit1.try(cli[0], cli[1:]...); !strings.Contains(out, "NOPERM") {
			t.Errorf("submit1 can delete the trusts: %s", out)
		}
		// An emptied set is filled again, unless it is emptied everywhere.
		imap2.shell("nft flush set inet filter trusted_ipv4")
		imap2.holds("trusted_ipv4", "192.0.2.7 . 993")
		imap2.shell("nftwl flush --everywhere trusted")
		nstest.Until(imap1, "nobody is trusted", func() error {
			if out := imap1.run("nftwl", "list", "trusted"); strings.Contains(out, "192.0.2") {
				return errors.New(out)
			}
			return nil
		})

		for _, block := range nstest.Blocks(t, "docs/cluster.md", "Undo") {
			imap2.shell(block.Text)
		}
		imap2.state("nftwld.service", "inactive")
		if out := imap2.run("cat", "/etc/nftwl.yaml"); strings.Contains(out, "cluster") || strings.Contains(out, "rediss") {
			t.Errorf("left in the configuration: %s", out)
		}
	})
}

// timeLeft is a list without how much time is left.
func timeLeft(list string) string {
	return strings.TrimSpace(regexp.MustCompile(` (1d|23h59m) +`).ReplaceAllString(list, " TIME "))
}

// wire joins machines by a bridge on this one, which has 10.9.0.1; the others have
// 10.9.0.2 and so on.
func (m *machine) wire(others ...*machine) {
	m.Helper()
	ip := func(on *machine, commands ...string) {
		m.Helper()
		cmd := exec.Command("nsenter", "-t", strconv.Itoa(on.pid), "-n", "ip", "-batch", "-")
		cmd.Stdin = strings.NewReader(strings.Join(commands, "\n"))
		if out, err := cmd.CombinedOutput(); err != nil {
			m.Fatalf("ip: %v: %s", err, out)
		}
	}
	ip(m, "link add lan0 type bridge", "link set lan0 up", "address add 10.9.0.1/24 dev lan0")
	for i, other := range others {
		ip(m, fmt.Sprintf("link add host%d type veth peer name lan0 netns %d", i, other.pid),
			fmt.Sprintf("link set host%d master lan0", i), fmt.Sprintf("link set host%d up", i))
		ip(other, fmt.Sprintf("address add 10.9.0.%d/24 dev lan0", 2+i), "link set lan0 up")
	}
}
