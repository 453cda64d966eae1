package systemd

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// The README's installation, as it is written there, on a mail server that has
// never heard of nftwl. It ends with a doctor who finds nothing.
func TestReadmeInstall(t *testing.T) {
	t.Parallel()
	onEach(t, func(t *testing.T, b base) {
		t.Parallel()
		ways := []string{"package"}
		if b.root == "/" {
			ways = append(ways, "source")
		}
		for _, way := range ways {
			t.Run(way, func(t *testing.T) {
				t.Parallel()
				m := newUninstalled(t, b)
				m.must(os.Rename(m.file("root/new.deb"), m.file("root/nftwl_1.2.3_amd64.deb")))
				before := m.etc()
				start := time.Now()
				for _, block := range m.section("Install") {
					switch {
					case block.language == "nft":
						// What is pasted, below the distribution's first lines.
						m.write("etc/nftables.conf", flushed+block.text)
					case block.language != "sh":
						// Shown, but nothing to paste: setup writes it, or it is the default.
					case strings.Contains(block.text, "apt install") && way == "source":
						// install -m 755 build/nftwl /usr/bin/nftwl
						text, err := os.ReadFile(nstest.Build(t, "cmd/nftwl"))
						m.must(err)
						m.write("usr/bin/nftwl", string(text))
						m.must(os.Chmod(m.file("usr/bin/nftwl"), 0o755))
					case strings.Contains(block.text, "nftwl doctor"):
						// Until now nobody has logged in.
						m.healthy()
					default:
						m.run("sh", "-euc", "cd /root\n"+block.text)
					}
				}
				if v := m.run("nftwl", "version"); way == "package" && !strings.HasPrefix(v, "nftwl v1.2.3 go1.") {
					t.Errorf("version: %s", v)
				}
				m.settle()
				m.logsIn(1)
				m.trusts(1)
				t.Logf("%v from the first command to a trusted login, and doctor in between", time.Since(start).Round(100*time.Millisecond))
				m.run("systemctl", "reload", "nftables")
				m.settle()
				m.trusts(1)
				m.healthy()

				// The other way, which goes as well.
				if way == "source" {
					m.installNftwld()
				}
				m.write("etc/nftwl.yaml", "policy: {}\n")
				m.run("nftwl", "setup", "policy", "--write")
				m.run("sh", "-euc", "systemctl daemon-reload; systemctl enable --now nftwld.socket nftwld; doveadm reload")
				m.until("a report arrives", func() error {
					m.logsIn(3)
					if m.nftwldStatus().Reports["imap"]["success"] == 0 {
						return errors.New("not yet")
					}
					return nil
				})

				for _, block := range m.section("Undo") {
					switch {
					case strings.Contains(block.text, "reload nftables"):
						m.write("etc/nftables.conf", flushed)
						m.run("sh", "-euc", block.text)
					case strings.Contains(block.text, "apt purge"):
						if way == "source" {
							block.text = strings.Replace(block.text, "apt purge nftwl\n", "", 1)
						}
						m.run("sh", "-euc", strings.Replace(block.text, "apt purge", "apt-get --yes purge", 1))
					case way == "source":
						m.run("sh", "-euc", block.text)
					}
				}
				m.settle()
				m.logsIn(2)
				if rules := m.run("nft", "list", "ruleset"); rules != "" {
					t.Errorf("still in the kernel:\n%s", rules)
				}
				m.run("systemctl", "reload", "nftables") // which nothing is part of any more
				m.settle()
				after := m.etc()
				for path, text := range after {
					if before[path] != text && path != "nftables.conf" && !strings.HasPrefix(path, enabled) {
						t.Errorf("/etc/%s is left behind, or changed", path)
					}
				}
				m.left(defaults)
				if units := m.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "nftwl*"); units != "" {
					t.Errorf("still there: %s", units)
				}
			})
		}
	})
}

// enabled is where nftables.service is, which stays: it is not nftwl's.
const enabled = "systemd/system/sysinit.target.wants"

// flushed is how a distribution's /etc/nftables.conf begins.
const flushed = "#!/usr/sbin/nft -f\nflush ruleset\n\n"

// healthy runs the doctor, who may leave out what is not in use.
func (m *machine) healthy() {
	m.Helper()
	out, err := m.try("nftwl", "doctor", "--json")
	var results []struct{ Check, Status, Text, Remedy, Command string }
	if e := json.Unmarshal([]byte(out), &results); e != nil {
		m.Fatalf("%v, %v: %s", err, e, out)
	}
	groups := make(map[string]bool)
	for _, r := range results {
		group, _, _ := strings.Cut(r.Check, ".")
		groups[group] = true
		if r.Status != "ok" && r.Status != "skip" {
			m.Errorf("%s %s: %s (%s; %s)", r.Status, r.Check, r.Text, r.Remedy, r.Command)
		}
	}
	for _, group := range []string{"config", "kernel", "sets", "rules", "dovecot", "persistence", "fail2ban"} {
		if !groups[group] {
			m.Errorf("doctor has not looked at %s", group)
		}
	}
	if err != nil {
		m.Errorf("doctor: %v", err)
	}
}

type block struct{ language, text string }

// section returns the blocks of a section of the README.
func (m *machine) section(name string) (blocks []block) {
	m.Helper()
	readme, err := os.ReadFile(filepath.Join(nstest.Root(m), "README.md"))
	m.must(err)
	_, text, found := strings.Cut(string(readme), "\n## "+name+"\n")
	text, _, _ = strings.Cut(text, "\n## ")
	for _, b := range regexp.MustCompile("(?s)\n```(\\w*)\n(.*?\n)```\n").FindAllStringSubmatch(text, -1) {
		blocks = append(blocks, block{b[1], b[2]})
	}
	if !found || len(blocks) == 0 {
		m.Fatalf("the README has no blocks under %q", name)
	}
	return blocks
}
