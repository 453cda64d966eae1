package nftables_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) {
	// These tests mostly wait for timeouts. With one test for each core, the default,
	// they would take four times as long.
	nstest.Parallel(8)
	nstest.Main(m)
}

// An edit is an administrator's change to the files: new replaces old.
type edit struct{ old, new string }

func uncomment(line string) edit { return edit{"#" + line, line} }

// A layout is one of the two ways to use the files.
type layout struct {
	name       string
	load       []string // files, in /etc
	main       string   // the file to load again, in /etc/nftwl
	limit      string   // the file with the limit
	table      string
	prefix64   edit
	strict     edit
	ownsPolicy bool // it drops what it does not accept
}

var layouts = []layout{
	{
		name:       "filter",
		load:       []string{"nftables.conf"},
		main:       "nftwl.nft",
		limit:      "submission.nft",
		table:      "inet filter",
		prefix64:   uncomment(`include "nftwl/trusted-prefix64.nft"`),
		strict:     uncomment(`include "nftwl/strict.nft"`),
		ownsPolicy: true,
	},
	{
		name:     "standalone",
		load:     []string{"nftwl/standalone.nft"},
		main:     "standalone.nft",
		limit:    "standalone.nft",
		table:    "inet nftwl",
		prefix64: uncomment(`ip6 saddr & $nftwl_ipv6_network . tcp dport @trusted_ipv6`),
		strict:   uncomment(`tcp dport $nftwl_submission_ports counter drop`),
	},
}

// nftVersions has the roots of the systems whose nft must load the files.
var nftVersions = []struct {
	name string
	root func(testing.TB) string
}{
	{"host", func(testing.TB) string { return "/" }},
	{"trixie", nstest.Trixie},
}

// each runs a test with every layout and every nft.
func each(t *testing.T, test func(*testing.T, layout, string)) {
	for _, l := range layouts {
		for _, v := range nftVersions {
			t.Run(l.name+"/"+v.name, func(t *testing.T) {
				t.Parallel()
				test(t, l, v.root(t))
			})
		}
	}
}

// A firewall is a machine with the files of this directory installed.
type firewall struct {
	*testing.T
	layout
	root string
}

// install makes a machine, and installs the edited files where an administrator
// would: in /etc/nftwl, and the example as /etc/nftables.conf. The machine has its
// own /etc, with nothing else in it.
func install(t *testing.T, l layout, root string, edits ...edit) *firewall {
	t.Helper()
	nstest.New(t)
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatalf("unshare mount namespace: %v", err)
	}
	etc := filepath.Join(root, "etc")
	if err := unix.Mount("tmpfs", etc, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatalf("mount on %s: %v", etc, err)
	}
	if err := os.Mkdir(filepath.Join(etc, "nftwl"), 0o755); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*.nft")
	if err != nil || len(files) == 0 {
		t.Fatalf("no rule files: %v", err)
	}
	used := make([]bool, len(edits))
	for _, name := range append(files, "nftables.conf") {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text := string(data)
		for i, e := range edits {
			used[i] = used[i] || strings.Contains(text, e.old)
			text = strings.ReplaceAll(text, e.old, e.new)
		}
		to := filepath.Join(etc, "nftwl", name)
		if name == "nftables.conf" {
			to = filepath.Join(etc, name)
		}
		if err := os.WriteFile(to, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for i, e := range edits {
		if !used[i] {
			t.Fatalf("no file holds %q", e.old)
		}
	}
	return &firewall{T: t, layout: l, root: root}
}

// nft runs the firewall's nft and returns its output.
func (f *firewall) nft(args ...string) string {
	f.Helper()
	out, err := f.tryNft("", args...)
	if err != nil {
		f.Fatalf("nft %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (f *firewall) tryNft(stdin string, args ...string) (string, error) {
	cmd := exec.Command("/usr/sbin/nft", args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: f.root}
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// up loads the rules.
func (f *firewall) up() {
	f.Helper()
	for _, file := range f.load {
		f.nft("-f", "/etc/"+file)
	}
}

// trust logs in from the address, with nftwl login as Dovecot runs it. prefix is the
// ipv6_prefix of the configuration.
func (f *firewall) trust(address netip.Addr, prefix int, timeout string) {
	f.Helper()
	f.nftwl(prefix, []string{"IP=" + address.String(), "NFTWL_TIMEOUT=" + timeout}, "login", "/bin/true")
}

// run runs a command of nftwl.
func (f *firewall) run(args ...string) {
	f.Helper()
	f.nftwl(128, nil, args...)
}

func (f *firewall) nftwl(prefix int, env []string, args ...string) {
	f.Helper()
	config := filepath.Join(f.TempDir(), "nftwl.yaml")
	text := fmt.Sprintf("table: %s\nipv6_prefix: %d\n", f.table, prefix)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		f.Fatal(err)
	}
	cmd := exec.Command(nstest.Build(f.T, "cmd/nftwl"), append([]string{"--config", config}, args...)...)
	cmd.Env = env
	if out, err := cmd.CombinedOutput(); err != nil || args[0] == "login" && len(out) > 0 {
		f.Fatalf("%q nftwl %q: %v\n%s", env, args, err, out)
	}
}

func (f *firewall) add(list string, address netip.Addr, port int, timeout string) {
	f.Helper()
	f.nft("add", "element", f.table+" "+set(list, address),
		fmt.Sprintf("{ %s . %d timeout %s }", address, port, timeout))
}

func (f *firewall) has(list string, address netip.Addr, port int) bool {
	out, err := f.tryNft("", "get", "element", f.table+" "+set(list, address),
		fmt.Sprintf("{ %s . %d }", address, port))
	if err != nil && !strings.Contains(out, "No such file or directory") {
		f.Fatalf("nft get element: %v\n%s", err, out)
	}
	return err == nil
}

func set(list string, address netip.Addr) string {
	if address.Is4() {
		return list + "_ipv4"
	}
	return list + "_ipv6"
}

// packets returns the sum of the counters of all rules with the comment.
func (f *firewall) packets(comment string) int {
	f.Helper()
	rules := regexp.MustCompile(`counter packets (\d+) .*comment "`+regexp.QuoteMeta(comment)+`"`).
		FindAllStringSubmatch(f.nft("list", "table", f.table), -1)
	if len(rules) == 0 {
		f.Fatalf("no rule with a counter has the comment %q", comment)
	}
	sum := 0
	for _, m := range rules {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			f.Fatal(err)
		}
		sum += n
	}
	return sum
}

// A mailserver is a firewall with servers behind it: each port echoes.
type mailserver struct {
	*firewall
	internet *nstest.Peer
}

// unnamed is a port that no rule names.
const unnamed = 8080

func serve(t *testing.T, l layout, root string, edits ...edit) *mailserver {
	t.Helper()
	s := &mailserver{firewall: install(t, l, root, edits...)}
	s.up()
	s.internet = nstest.NewPeer(t, "198.51.100.0/24", "203.0.113.0/24", "2001:db8:a::/48", "2001:db8:b::/48", "64:ff9b::/96")
	for _, port := range []uint16{22, 25, 143, 465, 587, 993, 995, unnamed} {
		nstest.Echo(t, port)
	}
	return s
}

// A client repeats a dropped SYN after one second. So if a connection opens sooner,
// its first packet got in.
const (
	soon  = 900 * time.Millisecond // for connections that must get in, on a busy machine
	never = 300 * time.Millisecond // for those that must not
)

// open opens a connection that the firewall must let in.
func (s *mailserver) open(from netip.Addr, port int) *net.TCPConn {
	s.Helper()
	conn := s.internet.Connect(s, from, port, soon)
	if conn == nil {
		s.Fatalf("%s does not get to port %d", from, port)
	}
	s.Cleanup(func() { conn.Close() })
	// The client sees it as open before the last packet of the handshake arrives.
	s.alive(conn)
	return conn
}

// pass opens n connections, one after the other, which must all get in.
func (s *mailserver) pass(from netip.Addr, port, n int) {
	s.Helper()
	for range n {
		s.open(from, port).Close()
	}
}

// drop tries a connection that the firewall must keep out.
func (s *mailserver) drop(from netip.Addr, port int) {
	s.Helper()
	if conn := s.internet.Connect(s, from, port, never); conn != nil {
		conn.Close()
		s.Errorf("%s gets to port %d", from, port)
	}
}

// refuse opens a connection that the firewall must reset once it is complete.
func (s *mailserver) refuse(from netip.Addr, port int) {
	s.Helper()
	if in, err := s.try(from, port); in || !errors.Is(err, unix.ECONNRESET) {
		s.Errorf("%s to port %d: %v, and no reset", from, port, err)
	}
}

// try opens a connection, and reports whether data flows both ways.
func (s *mailserver) try(from netip.Addr, port int) (bool, error) {
	server := nstest.ServerIPv4
	if from.Is6() {
		server = nstest.ServerIPv6
	}
	conn, err := s.internet.Dial(from, netip.AddrPortFrom(server, uint16(port)), soon)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	err = echo(conn)
	return err == nil, err
}

// echo sends a line and reads it back.
func echo(conn *net.TCPConn) error {
	conn.SetDeadline(time.Now().Add(soon))
	line := []byte("NOOP\r\n")
	if _, err := conn.Write(line); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, line)
	return err
}

// until tries until a connection gets in, or until none does.
func (s *mailserver) until(open bool, from netip.Addr, port int) {
	s.Helper()
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); {
		conn := s.internet.Connect(s, from, port, never)
		if conn != nil {
			conn.Close()
		}
		if (conn != nil) == open {
			return
		}
	}
	s.Fatalf("%s to port %d: open is still %v", from, port, !open)
}

// alive proves that data still flows both ways on an open connection.
func (s *mailserver) alive(conn *net.TCPConn) {
	s.Helper()
	if err := echo(conn); err != nil {
		s.Fatalf("no data flows on an open connection: %v", err)
	}
}
