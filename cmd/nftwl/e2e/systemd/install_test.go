package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// The README's installation, run as it is written, from a package and from source, on a
// mail server without nftwl. At the end doctor finds nothing. After the README's undo,
// mail still works.
func TestReadmeInstall(t *testing.T) {
	eachWay(t, func(t *testing.T, b nstest.Debian, source bool) {
		m := newUninstalled(t, b)
		before := m.etc()
		start := time.Now()
		m.installs(source)
		if v := m.run("nftwl", "version"); !source && !strings.HasPrefix(v, "nftwl v1.2.3 go1.") {
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

		// 587 is open to strangers, up to the limit.
		opens := m.internet()
		if n := opens("587", 12); n == 0 || n == 12 {
			t.Errorf("with nftwl, a stranger can open %d of 12 connections", n)
		}

		// The README's other way works too.
		m.write("etc/nftwl.yaml", "policy: {}\n")
		m.run("nftwl", "setup", "policy", "--write")
		m.run("sh", "-euc", "systemctl daemon-reload; systemctl enable --now nftwld.socket nftwld; doveadm reload")
		nstest.Until(m, "a report arrives", func() error {
			m.logsIn(3)
			if m.nftwldStatus().Reports["imap"]["success"] == 0 {
				return errors.New("not yet")
			}
			return nil
		})

		m.undoes(source)
		m.settle()
		m.logsIn(2)
		rules := m.run("nft", "list", "ruleset")
		if strings.Contains(rules, "nftwl") || strings.Contains(rules, "trusted") {
			t.Errorf("still in the kernel:\n%s", rules)
		}
		for _, port := range []string{"465", "587"} {
			if n := opens(port, 12); n != 12 {
				t.Errorf("port %s: %d of 12 connections open after the undo, under\n%s", port, n, rules)
			}
		}
		m.run("systemctl", "reload", "nftables") // from here on, no unit of nftwl's takes part
		m.settle()
		after := m.etc()
		for path, text := range after {
			if before[path] != text && path != "nftables.conf" && !strings.HasPrefix(path, enabled) {
				t.Errorf("/etc/%s is left behind, or changed", path)
			}
		}
		m.left(defaults)
		if units := m.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "nftwl*"); units != "" {
			t.Errorf("not removed: %s", units)
		}
	})
}

// eachWay runs a test for each way to install: from a package and, if there is Go, from
// source.
func eachWay(t *testing.T, test func(t *testing.T, b nstest.Debian, source bool)) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		t.Run("package", func(t *testing.T) { t.Parallel(); test(t, b, false) })
		if b.Root == "/" {
			t.Run("source", func(t *testing.T) { t.Parallel(); test(t, b, true) })
		}
	})
}

// installs follows the README's installation.
func (m *machine) installs(source bool) {
	m.Helper()
	m.write("etc/apt/apt.conf.d/90-nftwl-test", "APT::Get::Assume-Yes \"true\";\n")
	nstest.Must(m, os.Rename(m.file("root/new.deb"), m.file("root/nftwl_1.2.3_amd64.deb")))
	for _, b := range nstest.Blocks(m, "README.md", "Install") {
		switch {
		case b.Language == "nft":
			// The example, pasted below the distribution's first lines.
			m.write("etc/nftables.conf", flushed+b.Text)
		case b.Language != "sh":
			// Not to be pasted: setup writes it, or it is the default.
		case strings.Contains(b.Text, "make build"):
			if source {
				m.inSources(b.Text)
			}
		case source && strings.Contains(b.Text, "apt install"):
		default:
			m.shell(b.Text)
		}
	}
	m.healthy()
}

// undoes follows the README's undo.
func (m *machine) undoes(source bool) {
	m.Helper()
	text := nstest.Blocks(m, "README.md", "Undo")[0].Text
	if source {
		purge := regexp.MustCompile("(?m)^apt purge nftwl .*\n").FindString(text)
		if purge == "" {
			m.Fatalf("nothing to replace in\n%s", text)
		}
		text = strings.Replace(text, purge, nstest.Blocks(m, "docs/operation.md", "Removing what was installed from source")[0].Text+"\n", 1)
	}
	m.shell(text)
	m.run("rm", "/etc/apt/apt.conf.d/90-nftwl-test")
}

// shell runs a block of a document.
func (m *machine) shell(text string) string {
	m.Helper()
	return m.run("sh", "-euc", "cd /root\n"+text)
}

// inSources runs a block of a document in a copy of the source, with Go.
func (m *machine) inSources(text string) {
	m.Helper()
	out, err := exec.Command("go", "env", "GOROOT", "GOCACHE", "GOMODCACHE").Output()
	nstest.Must(m, err)
	env := lines(string(out))
	// The machine lacks some of the host's directories, such as /tmp.
	nstest.Run(m, "tar", "-cf", m.file("root/sources.tar"), "-C", nstest.Root(m), "cmd", "contrib", "pkg", "go.mod", "go.sum", "Makefile")
	m.run("sh", "-euc", `mkdir -p /root/sources; cd /root/sources; tar -xf ../sources.tar
		export PATH="$PATH:$1/bin" GOCACHE="$2" GOMODCACHE="$3"
		`+text, "sh", env[0], env[1], env[2])
}

// internet connects the machine to another one, and starts submission servers that greet
// their clients. It returns a function that opens connections and counts how many of
// them are greeted.
func (m *machine) internet() (opens func(port string, times int) int) {
	m.Helper()
	inNetwork := func(join func() error, f func()) {
		m.Helper()
		var err error
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
			if err = join(); err == nil {
				f()
			}
		}()
		<-done
		nstest.Must(m, err)
	}
	for _, port := range []string{"465", "587"} {
		inNetwork(m.joinNetwork, func() {
			l, err := net.Listen("tcp4", ":"+port)
			if err != nil {
				m.Error(err)
				return
			}
			m.Cleanup(func() { l.Close() })
			go func() {
				for conn, err := l.Accept(); err == nil; conn, err = l.Accept() {
					fmt.Fprint(conn, "220\r\n")
					conn.Close()
				}
			}()
		})
	}
	work, thread := make(chan func()), make(chan int)
	go inNetwork(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() {
		thread <- unix.Gettid()
		for f := range work {
			f()
		}
	})
	m.Cleanup(func() { close(work) })
	network := func(id int, commands ...string) {
		m.Helper()
		cmd := exec.Command("nsenter", "-t", strconv.Itoa(id), "-n", "ip", "-batch", "-")
		cmd.Stdin = strings.NewReader(strings.Join(commands, "\n"))
		if out, err := cmd.CombinedOutput(); err != nil {
			m.Fatalf("ip: %v: %s", err, out)
		}
	}
	id := <-thread
	network(m.pid, fmt.Sprintf("link add net0 type veth peer name net0 netns %d", id), "address add 203.0.113.1/24 dev net0", "link set net0 up")
	network(id, "address add 203.0.113.2/24 dev net0", "link set net0 up")
	return func(port string, times int) (n int) {
		for range times {
			done := make(chan struct{})
			work <- func() {
				defer close(done)
				conn, err := net.DialTimeout("tcp4", "203.0.113.1:"+port, time.Second)
				if err != nil {
					return
				}
				defer conn.Close()
				if err := conn.SetDeadline(time.Now().Add(nstest.Patience)); err != nil {
					return
				}
				if _, err := conn.Read(make([]byte, 1)); err == nil {
					n++
				}
			}
			<-done
		}
		return n
	}
}

// enabled is the link that enables nftables.service. It stays, because it is not
// nftwl's.
const enabled = "systemd/system/sysinit.target.wants"

// flushed is the start of a distribution's /etc/nftables.conf.
const flushed = "#!/usr/sbin/nft -f\nflush ruleset\n\n"

// healthy checks that doctor finds nothing wrong, and has checks of every group, even if
// it skips them.
func (m *machine) healthy() {
	m.Helper()
	groups := make(map[string]bool)
	for _, r := range m.findings() {
		group, _, _ := strings.Cut(r.Check, ".")
		groups[group] = true
		if r.Status != "ok" && r.Status != "skip" {
			m.Errorf("%s %s: %s (%s; %s)", r.Status, r.Check, r.Text, r.Remedy, r.Command)
		}
	}
	for _, group := range []string{"config", "kernel", "sets", "rules", "dovecot", "persistence", "fail2ban"} {
		if !groups[group] {
			m.Errorf("doctor has no checks of %s", group)
		}
	}
}
