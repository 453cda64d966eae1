package main

import (
	"cmp"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// setups has the command lines of setup, and where each installs which directory of
// contrib.
var setups = []struct {
	args       []string
	dir, under string
	files      int
}{
	{[]string{"dovecot"}, "/etc/dovecot/conf.d", "dovecot", 1},
	{[]string{"nftables"}, "/etc/nftwl", "nftables", 8},
	{[]string{"systemd"}, "/etc/systemd/system", "systemd", 5},
	{[]string{"fail2ban"}, "/etc/fail2ban", "fail2ban", 5},
}

// A host has its own /etc and /run, and the program just built as /usr/bin/nftwl. It has
// the directories of Dovecot, fail2ban and systemd.
type host struct{ *testing.T }

func newHost(t *testing.T) *host {
	t.Helper()
	bin := filepath.Dir(nstest.Build(t, "cmd/nftwl"))
	nstest.New(t)
	h := &host{t}
	// doveconf and nft look these up.
	var names [2][]byte
	for i, name := range []string{"/etc/passwd", "/etc/group"} {
		var err error
		names[i], err = os.ReadFile(name)
		h.must(err)
	}
	h.must(unix.Unshare(unix.CLONE_NEWNS))
	h.must(unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	h.must(unix.Mount("overlay", "/usr/bin", "overlay", unix.MS_RDONLY, "lowerdir="+bin+":/usr/bin"))
	for _, dir := range []string{"/etc", "/run", "/opt"} {
		h.must(unix.Mount("none", dir, "tmpfs", 0, "mode=755"))
	}
	h.write("/etc/passwd", string(names[0]))
	h.write("/etc/group", string(names[1]))
	for _, dir := range []string{"/etc/dovecot/conf.d", "/etc/fail2ban/action.d", "/etc/fail2ban/filter.d", "/etc/fail2ban/jail.d", "/etc/systemd/system", "/run/systemd/system"} {
		h.must(os.MkdirAll(dir, 0o755))
	}
	return h
}

func (h *host) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

func (h *host) write(path, text string) {
	h.Helper()
	h.must(os.MkdirAll(filepath.Dir(path), 0o755))
	h.must(os.WriteFile(path, []byte(text), 0o644))
	h.must(os.Chmod(path, 0o644)) // whatever the umask
}

func (h *host) read(path string) string {
	h.Helper()
	text, err := os.ReadFile(path)
	h.must(err)
	return string(text)
}

const hostPath = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"

// try runs a program with the given environment.
func (h *host) try(env []string, program string, args ...string) (stdout, stderr string, code int) {
	h.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append([]string{hostPath}, env...)
	cmd.Dir = "/"
	return output(h.T, cmd)
}

// run runs a program that must not fail.
func (h *host) run(program string, args ...string) string {
	h.Helper()
	stdout, stderr, code := h.try(nil, program, args...)
	if code != 0 {
		h.Fatalf("%s %q: exit %d\n%s%s", program, args, code, stdout, stderr)
	}
	return stdout
}

func (h *host) setup(args ...string) string {
	h.Helper()
	return h.run("/usr/bin/nftwl", append([]string{"setup"}, args...)...)
}

// refuses runs setup, which must fail with these lines on stderr, and change nothing.
func (h *host) refuses(code int, want []string, args ...string) {
	h.Helper()
	before := h.tree()
	stdout, stderr, got := h.try(nil, "/usr/bin/nftwl", append([]string{"setup"}, args...)...)
	if got != code || stdout != "" {
		h.Errorf("setup %q: exit %d\n%s", args, got, stdout)
	}
	for _, words := range want {
		if !strings.Contains(stderr, words) {
			h.Errorf("setup %q: %q is not in\n%s", args, words, stderr)
		}
	}
	h.same(before)
}

// tree returns a line for each file in /etc.
func (h *host) tree() []string {
	h.Helper()
	var lines []string
	h.must(filepath.WalkDir("/etc", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		line := fmt.Sprint(path, " ", info.Mode())
		if info.Mode().IsRegular() {
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %s %q", info.ModTime(), text)
		}
		lines = append(lines, line)
		return nil
	}))
	return lines
}

func (h *host) same(before []string) {
	h.Helper()
	after := h.tree()
	for _, line := range after {
		if !slices.Contains(before, line) {
			h.Errorf("new or changed: %.200s", line)
		}
	}
	for _, line := range before {
		if !slices.Contains(after, line) {
			h.Errorf("gone or changed: %.200s", line)
		}
	}
}

// parsePlan returns the files in setup's output.
func parsePlan(text string) map[string]string {
	files := make(map[string]string)
	for _, part := range strings.Split("\n"+text, "\n### ") {
		if path, text, _ := strings.Cut(part, "\n"); strings.HasPrefix(path, "/") {
			files[path] = text
		}
	}
	return files
}

// problems is the line that setup prints before the reasons why --write would refuse.
const problems = "\n--write would write nothing:\n"

func TestSetupPrintsContrib(t *testing.T) {
	h := newHost(t)
	before := h.tree()
	for _, s := range setups {
		out := h.setup(s.args...)
		if strings.Contains(out, problems) || strings.Contains(out, "does not include") {
			t.Errorf("setup %q has a false alarm:\n%s", s.args, out)
		}
		files := parsePlan(out)
		if len(files) != s.files {
			t.Errorf("setup %q prints %d files", s.args, len(files))
		}
		for path, text := range files {
			name, err := filepath.Rel(s.dir, path)
			h.must(err)
			if text != h.read(filepath.Join(nstest.Root(t), "contrib", s.under, name)) {
				t.Errorf("setup %q: %s is\n%s", s.args, path, text)
			}
		}
	}
	h.same(before)
}

func TestSetupWrites(t *testing.T) {
	for _, s := range setups {
		t.Run(strings.Join(s.args, " "), func(t *testing.T) {
			h := newHost(t)
			before := h.tree()
			args := append(s.args, "--write")
			// The umask of a careful administrator.
			script := `umask 077; exec nftwl setup "$@"`
			out := h.run("/bin/sh", append([]string{"-c", script, "sh"}, args...)...)
			var written []string
			for _, m := range regexp.MustCompile(`(?m)^written: (/.*)$`).FindAllStringSubmatch(out, -1) {
				written = append(written, m[1])
				name, err := filepath.Rel(s.dir, m[1])
				h.must(err)
				if h.read(m[1]) != h.read(filepath.Join(nstest.Root(t), "contrib", s.under, name)) {
					t.Errorf("%s is\n%s", m[1], h.read(m[1]))
				}
			}
			if len(written) != s.files {
				t.Errorf("%d files are written", len(written))
			}
			news := h.tree()
			for _, line := range news {
				path, rest, _ := strings.Cut(line, " ")
				switch {
				case slices.Contains(before, line):
				case slices.Contains(written, path) && strings.HasPrefix(rest, "-rw-r--r-- "):
				case rest == "drwxr-xr-x" && filepath.Dir(written[0]) == path:
				case rest == "drwxr-xr-x" && filepath.Base(path) == "nftwl-.service.d":
				default:
					t.Errorf("%.100s", line)
				}
			}

			again := h.setup(args...)
			if strings.Contains(again, "written: ") || !strings.Contains(again, fmt.Sprintf("there already, and the same: %d\n", s.files)) {
				t.Errorf("the second time:\n%s", again)
			}
			h.same(news)

			// Run the undo as it is printed. Its reloads fail, because nothing runs here.
			_, undo, found := strings.Cut(out, "\nTo undo it:\n")
			if !found || undo == "" {
				t.Fatalf("no way back in\n%s", out)
			}
			h.try(nil, "/bin/sh", "-c", undo)
			h.same(before)
		})
	}
}

// If some of the files exist already, setup writes the others.
func TestSetupWritesWhatIsMissing(t *testing.T) {
	h := newHost(t)
	h.setup("nftables", "--write")
	h.must(os.Remove("/etc/nftwl/banned.nft"))
	out := h.setup("nftables", "--write")
	if !strings.HasPrefix(out, "written: /etc/nftwl/banned.nft\nthere already, and the same: 7\n") {
		t.Error(out)
	}
}

func TestSetupNeverOverwrites(t *testing.T) {
	ours := func(h *host) string { return h.read(filepath.Join(nstest.Root(t), "contrib/nftables/sets.nft")) }
	for name, put := range map[string]func(h *host, path string) string{
		"other contents": func(h *host, path string) string {
			h.write(path, ours(h)+"\n")
			return "other contents"
		},
		"symlink": func(h *host, path string) string {
			h.write("/etc/elsewhere", ours(h))
			h.must(os.Symlink("/etc/elsewhere", path))
			return "not a regular file"
		},
		"dangling symlink": func(h *host, path string) string {
			h.must(os.Symlink("/etc/nowhere", path))
			return "not a regular file"
		},
		"directory": func(h *host, path string) string {
			h.must(os.Mkdir(path, 0o755))
			return "not a regular file"
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.must(os.Mkdir("/etc/nftwl", 0o755))
			why := put(h, "/etc/nftwl/sets.nft")
			h.refuses(1, []string{"nftwl: error: setup: /etc/nftwl/sets.nft ", why, "nftwl: hint: "}, "nftables", "--write")
			if out := h.setup("nftables"); !strings.Contains(out, problems+"  /etc/nftwl/sets.nft ") {
				t.Errorf("not reported without --write:\n%s", out)
			}
		})
	}
	t.Run("two", func(t *testing.T) {
		h := newHost(t)
		h.write("/etc/systemd/system/nftwl-save.timer", "")
		h.write("/etc/systemd/system/nftwl-save.service", "")
		h.refuses(1, []string{"/nftwl-save.timer ", "/nftwl-save.service "}, "systemd", "--write")
	})
}

// If writing fails halfway, setup removes what it has written.
func TestSetupUnwritable(t *testing.T) {
	h := newHost(t)
	const dir = "/etc/systemd/system/nftwl-.service.d"
	h.must(os.Mkdir(dir, 0o755))
	h.must(unix.Mount("none", dir, "tmpfs", unix.MS_RDONLY, "mode=755"))
	h.refuses(1, []string{"nftwl: error: setup: nothing is written: ", "read-only file system"}, "systemd", "--write")

	nstest.NeedUsers(t)
	cmd := exec.Command("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "/usr/bin/nftwl", "setup", "nftables", "--write")
	cmd.Env = []string{hostPath}
	_, stderr, code := output(t, cmd)
	if code != 1 || !strings.Contains(stderr, "permission denied\nnftwl: hint: run it as root\n") {
		t.Errorf("as a user: exit %d: %s", code, stderr)
	}
}

// Reasons that keep setup from writing do not keep it from printing.
func TestSetupProblems(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(h *host)
		args  []string
		want  string
	}{
		{"no Dovecot", func(h *host) { h.must(os.RemoveAll("/etc/dovecot")) }, []string{"dovecot"}, "/etc/dovecot/conf.d is not a directory"},
		{"no fail2ban", func(h *host) { h.must(os.RemoveAll("/etc/fail2ban")) }, []string{"fail2ban"}, "/etc/fail2ban is not a directory"},
		{"no systemd", func(h *host) { h.must(os.RemoveAll("/run/systemd")) }, []string{"systemd"}, "systemd does not run here"},
		{"snapshot", func(h *host) { h.write("/etc/nftwl.yaml", "snapshot: /var/lib/nftwl/../x/sets.nft\n") }, []string{"systemd"}, "/var/lib/x/sets.nft"},
		{"directory is a file", func(h *host) { h.write("/etc/nftwl", "") }, []string{"nftables"}, "/etc/nftwl/banned.nft: not a directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			c.spoil(h)
			h.refuses(1, []string{"nftwl: error: ", c.want}, append(c.args, "--write")...)
			out := h.setup(c.args...)
			if !strings.Contains(out, problems) || !strings.Contains(out, c.want) || len(parsePlan(out)) == 0 {
				t.Errorf("without --write:\n%s", out)
			}
		})
	}
}

func TestSetupUsage(t *testing.T) {
	h := newHost(t)
	h.refuses(2, []string{`nftwl: error: setup: "postfix" is not one of `}, "postfix", "--write")
	h.refuses(2, []string{"is needed"})
	h.write("/etc/nftwl.yaml", "tabel: x\n")
	h.refuses(1, []string{`nftwl: error: config: /etc/nftwl.yaml:1: unknown key "tabel"`}, "dovecot", "--write")
	h.write("/etc/nftwl.yaml", "table: ip6 filter\n")
	h.refuses(1, []string{"nftwl: error: setup: the rules are for IPv4 and IPv6, and table ip6 filter is not", "nftwl: hint: table: "}, "nftables", "--write")
}

// setup does not write units that a package has installed.
func TestSetupPackagedUnits(t *testing.T) {
	h := newHost(t)
	const dir = "/usr/lib/systemd/system"
	h.must(unix.Mount("none", dir, "tmpfs", 0, "mode=755"))
	before := h.tree()
	h.must(os.CopyFS(dir, os.DirFS(filepath.Join(nstest.Root(t), "contrib/systemd"))))
	out := h.setup("systemd", "--write")
	if strings.Contains(out, "written: ") || !strings.Contains(out, "Installed already, in /usr/lib/systemd/system: nftwl-persist.service, ") || strings.Contains(out, "\n  rm ") {
		t.Error(out)
	}
	h.same(before)
	// All but one are there, from another version.
	h.write(dir+"/nftwl-save.timer", "")
	out = h.setup("systemd", "--write")
	if !strings.HasPrefix(out, "written: /etc/systemd/system/nftwl-save.timer\n\nInstalled already, in /usr/lib/systemd/system: nftwl-persist.service, ") {
		t.Error(out)
	}
}

// If the rules have their own table, another unit replaces the one that follows
// nftables.service, unless nftables.service loads the firewall.
func TestSetupStandaloneUnit(t *testing.T) {
	const dir = "/etc/systemd/system/"
	const unit = dir + "nftwl-persist.service"
	contrib := filepath.Join(nstest.Root(t), "contrib/systemd")
	const own = "table: inet nftwl\n"
	for _, c := range []struct {
		name, config string
		enabled      bool // nftables.service
		standalone   bool
	}{
		{"default", "# all defaults\n", false, false},
		{"own table", own, false, true},
		{"own table in nftables.conf", own, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.write("/etc/nftwl.yaml", c.config)
			if c.enabled {
				h.write(dir+"sysinit.target.wants/nftables.service", "")
			}
			before := h.tree()
			from, files := contrib, 5
			if c.standalone {
				from, files = filepath.Join(contrib, "standalone"), 4
			}
			want := h.read(filepath.Join(from, "nftwl-persist.service"))
			if got := parsePlan(h.setup("systemd")); got[unit] != want || len(got) != files {
				t.Errorf("%d files, and the unit is\n%s", len(got), got[unit])
			}
			out := h.setup("nftables", "--write")
			if strings.Contains(out, "\n  nftwl setup systemd --write\n") != c.standalone {
				t.Errorf("setup nftables says\n%s", out)
			}
			rules := h.tree()
			out = h.setup("systemd", "--write")
			if h.read(unit) != want || strings.Contains(out, "follow nftables.service") == c.standalone {
				t.Errorf("setup systemd says\n%s", out)
			}
			_, undo, _ := strings.Cut(out, "\nTo undo it:\n")
			h.try(nil, "/bin/sh", "-c", undo)
			h.same(rules)

			// It replaces a package's unit of the other kind.
			h.must(unix.Mount("none", "/usr/lib/systemd/system", "tmpfs", 0, "mode=755"))
			h.must(os.CopyFS("/usr/lib/systemd/system", os.DirFS(contrib)))
			out = h.setup("systemd", "--write")
			if c.standalone {
				if h.read(unit) != want || !strings.HasPrefix(out, "written: "+unit+"\n\nInstalled already, in /usr/lib/systemd/system: nftwl-save.service, ") {
					t.Errorf("beside a package's units:\n%s", out)
				}
				_, undo, _ = strings.Cut(out, "\nTo undo it:\n")
				h.try(nil, "/bin/sh", "-c", undo)
			}
			h.same(rules)
			h.must(os.RemoveAll("/etc/nftwl"))
			h.same(before)
		})
	}
	t.Run("no systemd", func(t *testing.T) {
		h := newHost(t)
		h.must(os.RemoveAll("/run/systemd"))
		h.write("/etc/nftwl.yaml", own)
		if out := h.setup("nftables"); !strings.Contains(out, `include "nftwl/standalone.nft"`) || strings.Contains(out, "setup systemd --write") {
			t.Error(out)
		}
	})
}

// setup does not replace what Dovecot runs after a login today.
func TestSetupPostLogin(t *testing.T) {
	doveconf := nstest.Need(t, "doveconf", "dovecot-imapd")
	h := newHost(t)
	conf := "protocols = imap\nssl = no\n!include conf.d/*.conf\n"
	if strings.HasPrefix(h.run("dovecot", "--version"), "2.4") {
		conf = "dovecot_config_version = 2.4.0\ndovecot_storage_version = 2.4.0\n" + conf
	}
	h.write("/etc/dovecot/dovecot.conf", conf)
	h.write("/etc/dovecot/conf.d/10-mail.conf", "") // an include of nothing is an error
	const dropIn = "/etc/dovecot/conf.d/90-nftwl.conf"
	out := h.setup("dovecot", "--write")
	if strings.Contains(out, "does not include") || strings.Contains(out, "post-login") {
		t.Errorf("a false alarm:\n%s", out)
	}
	parsed := h.run(doveconf, "-n")
	if !strings.Contains(parsed, "\n  executable = script-login /usr/bin/nftwl login\n") {
		t.Errorf("doveconf:\n%s", parsed)
	}
	h.must(os.Remove(dropIn))
	for _, executable := range []string{"imap hello", "imap -t 30 nftwl", "/usr/lib/dovecot/imap"} {
		h.write("/etc/dovecot/dovecot.conf", conf+"service imap {\n  executable = "+executable+"\n}\n")
		_, stderr, code := h.try(nil, "/usr/bin/nftwl", "setup", "dovecot", "--write")
		if code != 1 || !strings.Contains(stderr, "service imap has executable = "+executable+", and") || !strings.Contains(stderr, "docs/how-it-works.md") {
			t.Errorf("%s: exit %d: %s", executable, code, stderr)
		}
		if _, err := os.Lstat(dropIn); err == nil {
			t.Errorf("%s: it is written", executable)
		}
	}
	h.write("/etc/dovecot/dovecot.conf", "no such = setting\n"+conf)
	if out := h.setup("dovecot"); !strings.Contains(out, "\ndoveconf fails") {
		t.Errorf("that doveconf fails is not reported:\n%s", out)
	}
	h.write("/etc/dovecot/dovecot.conf", strings.ReplaceAll(conf, "!include", "#!include"))
	if out := h.setup("dovecot"); !strings.Contains(out, "does not include conf.d/*.conf") {
		t.Errorf("the include is not missed:\n%s", out)
	}
}

// The files name /usr/bin/nftwl, which can be a link, and /etc/nftwl.yaml.
func TestSetupPaths(t *testing.T) {
	h := newHost(t)
	const program, other = "/opt/nftwl-1.0/nftwl", "/etc/mail/nftwl.yaml"
	h.write(program, h.read("/usr/bin/nftwl"))
	h.must(os.Chmod(program, 0o755))
	h.write(other, "# all defaults\n")
	refuses := func(program, says string, args ...string) {
		h.Helper()
		for _, part := range []string{"dovecot", "systemd", "fail2ban"} {
			stdout, stderr, code := h.try(nil, program, append(args, "setup", part, "--write")...)
			if code != 1 || stdout != "" || !strings.Contains(stderr, says) || !strings.Contains(stderr, "nftwl: hint: ") {
				t.Errorf("%s: exit %d: %s%s", part, code, stdout, stderr)
			}
			if out := h.run(program, append(args, "setup", part)...); !strings.Contains(out, problems) {
				t.Errorf("without --write:\n%s", out)
			}
		}
	}
	refuses(program, "the files name /usr/bin/nftwl, and this is "+program)
	refuses("/usr/bin/nftwl", "the files have nftwl read /etc/nftwl.yaml, and not "+other, "--config", other)
	h.run("/usr/bin/nftwl", "--config", "/etc/mail/../mail/nftwl.yaml", "setup", "nftables", "--write")

	h.must(unix.Unmount("/usr/bin", 0))
	h.must(unix.Mount("none", "/usr/bin", "tmpfs", 0, "mode=755"))
	h.must(os.Symlink(program, "/usr/bin/nftwl"))
	if out := h.run(program, "setup", "dovecot"); strings.Contains(out, problems) || !strings.Contains(out, "script-login /usr/bin/nftwl login\n") {
		t.Error(out)
	}
	// Others must not be able to write what root runs.
	for _, path := range []string{program, filepath.Dir(program)} {
		h.must(os.Chmod(path, 0o775))
		refuses(program, "users other than root can change it: "+path+" has mode 0775\n")
		h.must(os.Chmod(path, 0o755))
	}
	h.write("/etc/nftwl.yaml", "# all defaults\n")
	h.must(os.Chmod("/etc/nftwl.yaml", 0o640))
	if out := h.run(program, "setup", "systemd"); !strings.Contains(out, ": chmod a+r /etc/nftwl.yaml\n") {
		t.Errorf("that the units cannot read the configuration is not reported:\n%s", out)
	}
}

// The rules with the configuration's names, in the real nft and with real packets: an
// address that has logged in passes, and so does every address of a trusted network.
func TestSetupRules(t *testing.T) {
	const names = "trusted: {ipv4: banned_ipv4, ipv6: good6}\nbanned: {ipv4: trusted_ipv4, ipv6: bad6}\n"
	for _, c := range []struct {
		name, config string
		table        string
		prefix       int
	}{
		{name: "default", table: "inet filter", prefix: 128},
		{name: "names", config: "table: inet mail\n" + names + "timeout: 12h\nban_timeout: 90m\n", table: "inet mail", prefix: 128},
		{name: "prefix 64", config: "ipv6_prefix: 64\n", table: "inet filter", prefix: 64},
		{name: "prefix 56", config: "ipv6_prefix: 56\n", table: "inet filter", prefix: 56},
		{name: "own table", config: "table: inet nftwl\n", table: "inet nftwl", prefix: 128},
		{name: "own table, names and prefix 56", config: "table: inet nftwl\nipv6_prefix: 56\n" + names, table: "inet nftwl", prefix: 56},
		{name: "own table, prefix 64", config: "table: inet nftwl\nipv6_prefix: 64\n", table: "inet nftwl", prefix: 64},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			nft := nstest.Need(t, "nft", "nftables")
			h := newHost(t)
			h.write("/etc/nftwl.yaml", cmp.Or(c.config, "# all defaults\n"))
			out := h.setup("nftables", "--write")
			h.onlyNames(c.config)
			next, undo, _ := strings.Cut(out, "\nTo undo it:\n")
			if strings.Contains(next, "# STOP: with ipv6_prefix: ") != (c.prefix != 128) {
				t.Errorf("whether the rules are to be edited:\n%s", next)
			}
			// The next steps, except those of systemd.
			for line := range strings.Lines(next) {
				if strings.HasPrefix(line, "  sed ") || strings.HasPrefix(line, "  cp ") {
					h.run("/bin/sh", "-euc", line)
				}
			}
			own := c.table == "inet nftwl"
			if own {
				h.run(nft, "-c", "-f", "/etc/nftwl/standalone.nft")
				h.run(nft, "-f", "/etc/nftwl/standalone.nft")
			} else {
				h.run(nft, "-c", "-f", "/etc/nftables.conf")
				h.run(nft, "-f", "/etc/nftables.conf")
			}

			internet := nstest.NewPeer(t, "198.51.100.0/24", "2001:db8:a::/48")
			l, err := net.Listen("tcp", ":587")
			h.must(err)
			t.Cleanup(func() { l.Close() })
			go func() {
				for conn, err := l.Accept(); err == nil; conn, err = l.Accept() {
					conn.Close()
				}
			}()
			// A stranger's sixth connection is reset, and its source limited. The others
			// get in, and end at once without a reset.
			opens := func(from string) int {
				t.Helper()
				addr, server := netip.MustParseAddr(from), nstest.ServerIPv4
				if addr.Is6() {
					server = nstest.ServerIPv6
				}
				for n := range 8 {
					conn, err := internet.Dial(addr, netip.AddrPortFrom(server, 587), 300*time.Millisecond)
					if err != nil {
						return n
					}
					conn.SetDeadline(time.Now().Add(10 * time.Second))
					_, err = conn.Read(make([]byte, 1))
					conn.Close()
					if err != io.EOF {
						return n
					}
				}
				return 8
			}
			const user4, user6 = "198.51.100.7", "2001:db8:a:100::7"
			for _, user := range []string{user4, user6} {
				if _, stderr, code := h.try([]string{"IP=" + user, "USER=alice"}, "/usr/bin/nftwl", "login", "/bin/true"); code != 0 || stderr != "" {
					t.Fatalf("login from %s: exit %d: %s", user, code, stderr)
				}
			}
			within := func(bits int) int { // for a neighbour in the network of so many bits
				if c.prefix <= bits {
					return 8
				}
				return 5
			}
			for _, s := range []struct {
				from string
				want int
			}{
				{user4, 8},
				{user6, 8},
				{"198.51.100.8", 5},
				{"2001:db8:a:100::8", within(64)},
				{"2001:db8:a:101::7", within(56)},
				{"2001:db8:a:201::7", 5},
			} {
				if n := opens(s.from); n != s.want {
					t.Errorf("%s opens %d connections, not %d", s.from, n, s.want)
				}
			}
			// The limit has its own sets, whatever the names of the others are.
			h.run(nft, "get", "element", c.table+" limited_ipv4", "{ 198.51.100.8 . 587 }")
			h.run("/usr/bin/nftwl", "ban", "2001:db8:a:301::7", "198.51.100.9")
			for _, from := range []string{"2001:db8:a:301::7", "198.51.100.9"} {
				if n := opens(from); n != 0 {
					t.Errorf("%s is banned, and opens %d connections", from, n)
				}
			}

			// After the undo, nothing is left, and submission is open as without nftwl.
			h.try(nil, "/bin/sh", "-c", undo)
			if _, err := os.Stat("/etc/nftwl"); err == nil {
				t.Error("/etc/nftwl is left")
			}
			if !own {
				h.run(nft, "-f", "/etc/nftables.conf") // as systemctl would
			}
			left := h.run(nft, "list", "ruleset")
			if strings.Contains(left, "nftwl") || own && left != "" {
				t.Errorf("left: %s", left)
			}
			for _, from := range []string{"198.51.100.10", "2001:db8:a:401::7"} {
				if n := opens(from); n != 8 {
					t.Errorf("without nftwl %s opens %d connections under\n%s", from, n, left)
				}
			}
		})
	}
}

// The next steps depend on what loads the firewall.
func TestSetupNextOfRules(t *testing.T) {
	const debian = "#!/usr/sbin/nft -f\n\nflush ruleset\n\ntable inet filter {\n\tchain input {\n\t\ttype filter hook input priority filter; policy accept;\n\t}\n\tchain forward {\n\t\ttype filter hook forward priority 0;\n\t}\n}\n"
	const mine = "flush ruleset\ntable inet filter {\n\tchain input {\n\t\ttype filter hook input priority filter;\n\t\ttcp dport 22 accept\n\t}\n}\n"
	const example = "cp /etc/nftwl/nftables.conf "
	const include = `include "nftwl/nftwl.nft"`
	for _, c := range []struct {
		name, path, text string
		want, not        []string
	}{
		{"none", "/etc/other", "", []string{example + "/etc/nftables.conf"}, nil},
		{"Debian's own", "/etc/nftables.conf", debian, []string{example + "/etc/nftables.conf", "nft -c -f /etc/nftables.conf"}, nil},
		{"Fedora's place", "/etc/sysconfig/nftables.conf", mine, []string{include, "nft -c -f /etc/sysconfig/nftables.conf"}, []string{example}},
		{"rules", "/etc/nftables.conf", mine, []string{include, "jump nftwl", "of table inet filter"}, []string{example}},
		{"included", "/etc/nftables.conf", "flush ruleset\n" + include + "\n" + mine, []string{"nft -c -f"}, []string{include, example}},
		{"included by its path", "/etc/nftables.conf", "flush ruleset\ninclude \"/etc/nftwl/nftwl.nft\"\n" + mine, nil, []string{example}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.write(c.path, c.text)
			out := h.setup("nftables", "--write")
			next, _, _ := strings.Cut(out, "\nTo undo it:\n")
			for _, words := range c.want {
				if !strings.Contains(next, words) {
					t.Errorf("%q is not in\n%s", words, next)
				}
			}
			for _, words := range c.not {
				if strings.Contains(next, words) {
					t.Errorf("%q is in\n%s", words, next)
				}
			}
			if h.read(c.path) != c.text {
				t.Error("it has been changed")
			}
			if strings.HasPrefix(c.name, "included") {
				_, undo, _ := strings.Cut(out, "\nTo undo it:\n")
				h.try(nil, "/bin/sh", "-c", undo)
				_, err := os.Stat("/etc/nftwl/nftwl.nft")
				// The files stay while something includes them.
				if included := strings.Contains(h.read(c.path), "include"); included != (err == nil) || included != (c.name != "included") {
					t.Errorf("%v, and %s is\n%s", err, c.path, h.read(c.path))
				}
				h.run("/usr/sbin/nft", "-c", "-f", c.path)
			}
		})
	}
}

// Rules that are in the kernel but in no file of nftables: those of the real iptables,
// with the names that Docker and fail2ban use, and those made by hand.
func TestSetupLooksAtTheKernel(t *testing.T) {
	const stop = "# STOP: loading /etc/nftables.conf deletes these tables"
	const debian = "flush ruleset\ntable inet filter {\n\tchain input {\n\t\ttype filter hook input priority filter;\n\t}\n}\n"
	const iptables = "iptables-nft -P INPUT DROP; iptables-nft -A INPUT -p tcp --dport 22 -j ACCEPT"
	const docker = "iptables-nft -t nat -N DOCKER; iptables-nft -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE; iptables-nft -N DOCKER-USER; iptables-nft -A FORWARD -j DOCKER-USER"
	const f2b = "nft 'table inet f2b-table { chain f2b-chain { type filter hook input priority filter - 1; tcp dport 25 ip saddr 192.0.2.66 reject; }; }'"
	const byHand = "nft 'table inet filter { chain input { type filter hook input priority filter; policy drop; tcp dport 22 accept; }; }'"
	const include = `include "nftwl/nftwl.nft"`
	for _, c := range []struct {
		name, rules, conf string
		want, not         []string
	}{
		{"iptables", iptables, debian, []string{stop, "#   ip filter\n"}, nil},
		{"iptables, no file", iptables, "", []string{stop, "#   ip filter\n"}, nil},
		{"iptables for IPv6", "ip6tables-nft -A INPUT -p tcp --dport 25 -j REJECT", debian, []string{stop, "#   ip6 filter\n"}, nil},
		{"Docker", docker, debian, []string{stop, "#   ip nat, ip filter\n"}, nil},
		{"fail2ban", f2b, debian, []string{stop, "#   inet f2b-table\n"}, nil},
		{"by hand", byHand, debian, []string{stop, "#   inet filter\n"}, nil},
		{"by hand, no file", byHand, "", []string{stop, "#   inet filter\n"}, nil},
		{"a policy alone", "nft 'table inet filter { chain input { type filter hook input priority filter; policy drop; }; }'", debian, []string{stop, "#   inet filter\n"}, nil},
		{"in the file", byHand, strings.Replace(debian, ";\n\t}", ";\n\t\ttcp dport 22 accept\n\t}", 1), []string{include}, []string{stop}},
		{"in a file for another machine", byHand, strings.Replace(debian, ";\n\t}", ";\n\t\tiif eth7 tcp dport 22 accept\n\t}", 1), []string{include}, []string{stop}},
		{"in what it includes", f2b, "flush ruleset\ninclude \"/etc/more.nft\"\n", []string{include}, []string{stop}},
		{"in what does not load here", f2b, "flush ruleset\ninclude \"/etc/eth7.nft\"\n", []string{stop, include}, []string{"cp /etc/nftwl/nftables.conf"}},
		{"no rules", "nft 'table inet filter { chain input { type filter hook input priority filter; }; }'", debian, []string{"cp /etc/nftwl/nftables.conf"}, []string{stop}},
		{"nftwl's own sets", "nftwl restore /etc/nftwl.sets", debian, []string{"cp /etc/nftwl/nftables.conf"}, []string{stop}},
	} {
		t.Run(c.name, func(t *testing.T) {
			nstest.Need(t, "iptables-nft", "iptables")
			h := newHost(t)
			h.write("/etc/more.nft", "table inet f2b-table { chain c { accept; }; }\n")
			h.write("/etc/eth7.nft", "table inet f2b-table { chain c { iif eth7 accept; }; }\n")
			h.write("/etc/nftwl.sets", h.read(filepath.Join(nstest.Root(t), "contrib/nftables/sets.nft")))
			if c.conf != "" {
				h.write("/etc/nftables.conf", c.conf)
			}
			h.run("/bin/sh", "-euc", c.rules)
			rules := h.run("/usr/sbin/nft", "--stateless", "list", "ruleset")
			out := h.setup("nftables", "--write")
			next, _, _ := strings.Cut(out, "\nTo undo it:\n")
			for _, words := range c.want {
				if !strings.Contains(next, words) {
					t.Errorf("%q is not in\n%s", words, next)
				}
			}
			for _, words := range c.not {
				if strings.Contains(next, words) {
					t.Errorf("%q is in\n%s", words, next)
				}
			}
			if now := h.run("/usr/sbin/nft", "--stateless", "list", "ruleset"); now != rules {
				t.Errorf("the rules have changed to\n%s", now)
			}

			if slices.Contains(c.want, stop) {
				// The solution that setup prints.
				h.write("/etc/nftwl.yaml", "table: inet nftwl\n")
				m := regexp.MustCompile(`(?m)^  #   (mv .*)$`).FindStringSubmatch(next)
				if m == nil {
					t.Fatalf("no way out in\n%s", next)
				}
				h.run("/bin/sh", "-euc", m[1])
				h.run("/usr/sbin/nft", "-f", "/etc/nftwl/standalone.nft")
				now := h.run("/usr/sbin/nft", "--stateless", "list", "ruleset")
				if !strings.HasPrefix(now, rules) || !strings.Contains(now, "table inet nftwl {") {
					t.Errorf("rules are lost; there are\n%s", now)
				}
			}
		})
	}
	t.Run("a user", func(t *testing.T) {
		nstest.NeedUsers(t)
		h := newHost(t)
		if out := h.run("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--inh-caps=-all", "/usr/bin/nftwl", "setup", "nftables"); !strings.Contains(out, "\nThe rules that the kernel has now are not known: ") {
			t.Error(out)
		}
	})
}

// The configuration names another table than the existing rules.
func TestSetupOtherTable(t *testing.T) {
	for _, c := range []struct{ before, after string }{
		{"# all defaults\n", "table: inet mail\n"},
		{"table: inet mail\n", "# all defaults\n"},
	} {
		h := newHost(t)
		h.write("/etc/nftwl.yaml", c.before)
		h.setup("nftables", "--write")
		h.write("/etc/nftwl.yaml", c.after)
		h.refuses(1, []string{"/etc/nftwl/sets.nft "}, "nftables", "--write")
		h.run("/bin/mv", "/etc/nftwl", "/etc/nftwl.old")
		h.setup("nftables", "--write")
		// The remedy for missing sets loads what setup has just written.
		const load = "nft -f /etc/nftwl/sets.nft"
		if _, stderr, code := h.try(nil, "/usr/bin/nftwl", "list"); code != 1 || !strings.Contains(stderr, "("+load+")") {
			t.Errorf("exit %d: %s", code, stderr)
		}
		h.run("/bin/sh", "-c", load)
		h.run("/usr/bin/nftwl", "list")
	}
}

// onlyNames checks that the rules differ from contrib's only in the names of the table and
// the sets. A configuration of TestSetupRules swaps the IPv4 sets.
func (h *host) onlyNames(config string) {
	h.Helper()
	var pairs []string
	if m := regexp.MustCompile(`table: (.*)\n`).FindStringSubmatch(config); m != nil {
		pairs = []string{"inet filter", m[1], "inet nftwl", m[1]}
	}
	if strings.Contains(config, "good6") {
		pairs = append(pairs, "trusted_ipv4", "banned_ipv4", "banned_ipv4", "trusted_ipv4", "trusted_ipv6", "good6", "banned_ipv6", "bad6")
	}
	files, err := filepath.Glob("/etc/nftwl/*")
	h.must(err)
	for _, path := range files {
		text := h.read(filepath.Join(nstest.Root(h.T), "contrib/nftables", filepath.Base(path)))
		if want := strings.NewReplacer(pairs...).Replace(text); h.read(path) != want {
			h.Errorf("%s is\n%s", path, h.read(path))
		}
	}
}

// testdata/setup.txt has what setup prints, to be read at a glance. No other test pins its
// wording.
func TestSetupWording(t *testing.T) {
	h := newPolicyHost(t)
	var b strings.Builder
	shows := func(args ...string) {
		h.Helper()
		stdout, stderr, code := h.try(nil, "/usr/bin/nftwl", append([]string{"setup"}, args...)...)
		if i := strings.LastIndex(stdout, "\n### What to do\n"); i >= 0 {
			stdout = "(the files)\n" + stdout[i+1:]
		}
		fmt.Fprintf(&b, "$ nftwl setup %s\n%s%s(exit %d)\n\n", strings.Join(args, " "), stdout, stderr, code)
	}
	for _, s := range setups {
		shows(s.args...)
		shows(append(s.args, "--write")...)
	}
	shows("policy")
	shows("policy", "--write")
	h.write("/etc/nftwl.yaml", "table: inet mail\nipv6_prefix: 56\n")
	shows("nftables")
	shows("nftables", "--write")
	h.write("/etc/nftwl.yaml", "table: inet nftwl\nipv6_prefix: 64\n")
	shows("nftables", "--write")
	shows("systemd", "--write")
	nstest.Golden(t, "testdata/setup.txt", b.String())
}
