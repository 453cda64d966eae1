package fail2ban

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// firewall is the file that nftables.service would load at boot and at each reload.
const firewall = `flush ruleset
include "nftwl/nftwl.nft"
table inet filter {
	chain input {
		type filter hook input priority filter; policy accept;
		ct state established,related accept
		jump nftwl
	}
}
`

// allJails enables the jails of contrib/fail2ban, and disables Debian's. The logs are
// files; Debian 13 would use the journal.
const allJails = `[DEFAULT]
postfix_backend = auto
dovecot_backend = auto
syslog_backend = auto
[sshd]
enabled = false
[postfix-sasl]
enabled = true
[postfix-lost]
enabled = true
[postfix-spam]
enabled = true
[dovecot]
enabled = true
[dovecot-auth]
enabled = true
[cyrus-imap]
enabled = true
`

// with has what differs between the tests' machines.
type with struct {
	config   string              // /etc/nftwl.yaml; none if empty
	firewall func(string) string // edits a file of /etc/nftwl
	jails    string              // more lines of /etc/fail2ban/jail.local
}

// A machine is a mail server with a firewall, nftwl and fail2ban, all installed where
// they belong, and connected to the internet.
type machine struct {
	testing.TB
	nstest.Debian
	internet *nstest.Peer
	fail2ban *exec.Cmd // nil while it is stopped
	out      strings.Builder
}

// each runs a test on every system: their fail2ban is 1.0 and 1.1.
func each(t *testing.T, test func(t *testing.T, system nstest.Debian)) {
	t.Parallel()
	nstest.EachDebian(t, func(t *testing.T, system nstest.Debian) {
		system.Need(t, "usr/bin/fail2ban-server", "fail2ban")
		test(t, system)
	})
}

// boot makes a machine in new network and mount namespaces, loads its firewall and
// starts fail2ban. The calling goroutine stays in the namespaces: see nstest.New.
func boot(t testing.TB, system nstest.Debian, w with) *machine {
	t.Helper()
	m := &machine{TB: t, Debian: system}
	nftwl := nstest.Build(t, "cmd/nftwl")
	contrib := filepath.Join(nstest.Root(t), "contrib")

	nstest.New(t)
	m.internet = nstest.NewPeer(t, "198.51.100.0/24", "203.0.113.0/24", "2001:db8:a::/48",
		"46.38.145.0/24", "60.161.14.0/24", "68.236.203.0/24", "87.246.7.0/24")

	m.Tree(t, "var/log", "var/lib")
	for _, name := range []string{"run/fail2ban", "var/lib/fail2ban", "var/lib/nftwl", "run/etc/nftwl"} {
		nstest.Must(m, os.MkdirAll(m.Path(name), 0o755))
	}
	m.write("var/log/mail.log", "")
	m.write("var/log/auth.log", "")

	// Read-only overlays: our directories above those of the machine.
	m.Overlay(t, "usr/bin", filepath.Dir(nftwl))
	m.write("run/etc/nftables.conf", firewall)
	rules, err := filepath.Glob(filepath.Join(contrib, "nftables/*.nft"))
	nstest.Must(m, err)
	for _, name := range rules {
		text := nstest.Read(t, name)
		if w.firewall != nil {
			text = w.firewall(text)
		}
		m.write("run/etc/nftwl/"+filepath.Base(name), text)
	}
	if w.config != "" {
		m.write("run/etc/nftwl.yaml", w.config)
	} else {
		nstest.Whiteout(t, m.Path("run/etc/nftwl.yaml"))
	}
	// fail2ban looks up its own host name, and there is no name server.
	host, err := os.Hostname()
	nstest.Must(m, err)
	m.write("run/etc/hosts", "127.0.0.1 localhost "+host+"\n::1 localhost "+host+"\n")
	m.Overlay(t, "etc", m.Path("run/etc"))
	configureFail2ban(t, system, m.Path("run/jails"))
	nstest.Must(m, unix.Mount(m.Path("run/jails"), m.Path("etc/fail2ban"), "", unix.MS_BIND, ""))
	m.write("etc/fail2ban/jail.local", allJails)
	m.write("etc/fail2ban/jail.d/test.local", w.jails)

	for _, port := range []uint16{22, 25, 110, 143, 465, 587, 993, 995, 4190} {
		nstest.Echo(t, port)
	}
	m.run("nft", "-f", "/etc/nftables.conf")
	m.Cleanup(func() {
		if m.fail2ban != nil {
			m.stop()
		}
		if m.Failed() {
			m.Logf("fail2ban: %s\n%s", &m.out, m.logged())
		}
	})
	m.start()
	return m
}

// configureFail2ban makes a directory with the system's configuration and our files.
func configureFail2ban(t testing.TB, system nstest.Debian, dir string) {
	t.Helper()
	for _, from := range []string{system.Path("etc/fail2ban"), filepath.Join(nstest.Root(t), "contrib/fail2ban")} {
		nstest.Run(t, "cp", "-r", "-T", from, dir)
	}
}

// without runs a function while a file of the machine is missing.
func (m *machine) without(name string, f func()) {
	m.Helper()
	nstest.Must(m, os.Rename(m.Path(name), m.Path(name+".gone")))
	f()
	nstest.Must(m, os.Rename(m.Path(name+".gone"), m.Path(name)))
}

func (m *machine) write(name, text string) {
	m.Helper()
	nstest.Write(m, m.Path(name), text, 0o644)
}

func (m *machine) run(name string, args ...string) string {
	m.Helper()
	return m.Run(m, name, args...)
}

// status runs a command and returns its exit status.
func (m *machine) status(name string, args ...string) int {
	m.Helper()
	err := m.Command(name, args...).Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	nstest.Must(m, err)
	return 0
}

const journal = "var/log/fail2ban.log"

// logged returns fail2ban's log.
func (m *machine) logged() string {
	return nstest.Read(m, m.Path(journal))
}

// count returns how many lines of fail2ban's log end in text.
func (m *machine) count(text string) int { return strings.Count(m.logged(), text+"\n") }

// found returns how many failures of an address a jail has counted.
func (m *machine) found(jail string, client netip.Addr) int {
	return strings.Count(m.logged(), fmt.Sprintf("[%s] Found %s - ", jail, client))
}

// complaint matches the lines of fail2ban's log that an administrator should look at.
var complaint = regexp.MustCompile(`(?m)^.*(?:WARNING|ERROR|CRITICAL) .*$`)

// start starts fail2ban, and waits until it watches the logs.
func (m *machine) start() {
	m.Helper()
	started := regexp.MustCompile(`Jail '[\w-]+' started`)
	before, jails := len(started.FindAllString(m.logged(), -1)), 0
	cmd := m.Command("fail2ban-server", "-xf", "start")
	cmd.Stdout, cmd.Stderr = &m.out, &m.out
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	nstest.Must(m, cmd.Start())
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait() // its log has the reason
		close(done)
	}()
	m.fail2ban = cmd
	jails = strings.Count(m.run("fail2ban-client", "--dump"), "['start', ")
	nstest.Poll(m, "fail2ban to start its jails", func() bool {
		select {
		case <-done:
			m.Fatal("fail2ban does not start")
		default:
		}
		return len(started.FindAllString(m.logged(), -1)) == before+jails
	})
}

// stop stops fail2ban, and checks that it has logged no complaint.
func (m *machine) stop() {
	m.Helper()
	m.run("fail2ban-client", "stop")
	nstest.Poll(m, "fail2ban to end", func() bool {
		return m.fail2ban.Process.Signal(syscall.Signal(0)) != nil
	})
	m.fail2ban = nil
	for _, line := range complaint.FindAllString(m.logged(), -1) {
		if !strings.Contains(line, "New database created") {
			m.Errorf("fail2ban complains: %s", line)
		}
	}
}

// log writes lines, given without their time, to the mail server's log.
func (m *machine) log(lines ...string) { m.logAt(time.Now(), lines...) }

func (m *machine) logAt(when time.Time, lines ...string) {
	m.Helper()
	f, err := os.OpenFile(m.Path("var/log/mail.log"), os.O_APPEND|os.O_WRONLY, 0)
	nstest.Must(m, err)
	defer f.Close()
	var text strings.Builder
	for _, line := range lines {
		fmt.Fprintf(&text, "%s mail %s\n", when.UTC().Format(time.Stamp), line)
	}
	_, err = io.WriteString(f, text.String())
	nstest.Must(m, err)
}

// A ban has what the elements of an address have in common.
type ban struct {
	set, address, comment string
	bantime               time.Duration
}

// bans has the ports of each ban.
type bans map[ban][]int

func (m *machine) bans() bans {
	m.Helper()
	all := make(bans)
	for _, e := range m.list() {
		b := ban{e.Set, e.Address, e.Comment, seconds(e.Timeout)}
		all[b] = append(all[b], e.Port)
	}
	for _, ports := range all {
		slices.Sort(ports)
	}
	return all
}

// left returns the end of each ban, by address, port and comment.
func (m *machine) left() map[string]time.Time {
	m.Helper()
	all := make(map[string]time.Time)
	now := time.Now()
	for _, e := range m.list() {
		all[fmt.Sprintf("%s . %d %s", e.Address, e.Port, e.Comment)] = now.Add(seconds(e.Expires))
	}
	return all
}

type element struct {
	Set, Address, Comment string
	Port                  int
	Timeout, Expires      float64
}

func (m *machine) list() (elements []element) {
	m.Helper()
	nstest.Must(m, json.Unmarshal([]byte(m.run("nftwl", "list", "--json", "banned")), &elements))
	return elements
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// banned waits until there are exactly these bans.
func (m *machine) banned(want bans) {
	m.Helper()
	nstest.Until(m, "the bans", func() error {
		if got := m.bans(); !reflect.DeepEqual(got, want) {
			return fmt.Errorf("they are\n%v\nwant\n%v", got, want)
		}
		return nil
	})
}

func (b bans) String() string {
	var lines []string
	for ban, ports := range b {
		lines = append(lines, fmt.Sprintf("\t%s %s %q %v on %v", ban.set, ban.address, ban.comment, ban.bantime, ports))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// A client repeats a dropped SYN after one second. So if a connection opens sooner, its
// first packet got in.
const (
	soon  = 900 * time.Millisecond // for connections that must get in, on a busy machine
	never = 300 * time.Millisecond // for those that must not
)

// reaches reports whether the firewall lets an address in.
func (m *machine) reaches(from netip.Addr, port int, timeout time.Duration) bool {
	m.Helper()
	conn := m.internet.Connect(m, from, port, timeout)
	if conn == nil {
		return false
	}
	conn.Close()
	return true
}

func (m *machine) pass(from netip.Addr, port int) {
	m.Helper()
	if !m.reaches(from, port, soon) {
		m.Errorf("%s does not get to port %d", from, port)
	}
}

func (m *machine) drop(from netip.Addr, port int) {
	m.Helper()
	if m.reaches(from, port, never) {
		m.Errorf("%s gets to port %d", from, port)
	}
}
