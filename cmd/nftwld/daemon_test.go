package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

const (
	key     = "0123456789abcdef0123456789abcdef"
	address = "127.0.0.1:8085"
)

// An instance is nftwld with its own files, in its own network namespace.
type instance struct {
	t    *testing.T
	dir  string
	env  []string
	file *os.File // becomes descriptor 3
	cmd  *exec.Cmd
}

func newInstance(t *testing.T, config string) *instance {
	t.Helper()
	nstest.New(t)
	nstest.Nft(t, fmt.Sprintf("include %q\n", filepath.Join(nstest.Root(t), "contrib/nftables/sets.nft")))
	n := &instance{t: t, dir: t.TempDir()}
	n.write("policy.key", key+"\n")
	n.write("nftwl.yaml", config)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("nftwld:\n%s", n.log())
		}
	})
	return n
}

func (n *instance) write(name, text string) {
	n.t.Helper()
	text = strings.ReplaceAll(text, "policy: {}", "policy: {key_file: "+n.dir+"/policy.key}")
	if err := os.WriteFile(filepath.Join(n.dir, name), []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

func (n *instance) log() string {
	b, _ := os.ReadFile(filepath.Join(n.dir, "log")) // missing before the start
	return string(b)
}

// start starts nftwld, and waits until it listens.
func (n *instance) start(args ...string) {
	n.t.Helper()
	log, err := os.OpenFile(filepath.Join(n.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	before := strings.Count(n.log(), "msg=listening")
	args = append([]string{nstest.Build(n.t, "cmd/nftwld"), "--config", n.dir + "/nftwl.yaml"}, args...)
	if n.file != nil {
		args = append([]string{"/bin/sh", "-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"`, "sh"}, args...)
	}
	n.cmd = exec.Command(args[0], args[1:]...)
	n.cmd.Env = append([]string{}, n.env...)
	n.cmd.Stdout, n.cmd.Stderr = log, log
	if n.file != nil {
		n.cmd.ExtraFiles = []*os.File{n.file}
	}
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	cmd := n.cmd
	n.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	nstest.Poll(n.t, "nftwld to listen", func() bool { return strings.Count(n.log(), "msg=listening") > before })
}

// stop ends nftwld with SIGTERM, and waits for its exit.
func (n *instance) stop() {
	n.t.Helper()
	if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		n.t.Fatal(err)
	}
	if err := n.cmd.Wait(); err != nil {
		n.t.Errorf("after SIGTERM: %v", err)
	}
}

func (n *instance) hangUp() {
	n.t.Helper()
	if err := n.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		n.t.Fatal(err)
	}
}

// run runs a command of nftwld, and returns its output and exit status.
func (n *instance) run(args ...string) (out string, code int) {
	n.t.Helper()
	cmd := exec.Command(nstest.Build(n.t, "cmd/nftwld"), append([]string{"--config", n.dir + "/nftwl.yaml"}, args...)...)
	cmd.Env = append([]string{}, n.env...)
	b, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		n.t.Fatal(err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

func (n *instance) dial() net.Conn {
	n.t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	return conn
}

func request(key, user, hash, remote string, success bool) []byte {
	body := fmt.Sprintf(`{"login":%q,"pwhash":%q,"remote":%q,"protocol":"imap","success":%v}`, user, hash, remote, success)
	return fmt.Appendf(nil, "POST /?command=report HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Length: %d\r\n\r\n%s", key, len(body), body)
}

// answer reads an HTTP answer and returns its status.
func answer(r *bufio.Reader) (status int, err error) {
	var length int
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return 0, err
		}
		if line = strings.TrimSpace(line); line == "" {
			break
		}
		if after, ok := strings.CutPrefix(line, "HTTP/1.1 "); ok {
			status, _ = strconv.Atoi(after[:3])
		}
		if after, ok := strings.CutPrefix(line, "Content-Length: "); ok {
			length, _ = strconv.Atoi(after)
		}
	}
	_, err = r.Discard(length)
	return status, err
}

// report sends a report and returns the status of the answer.
func (n *instance) report(key, user, hash, remote string, success bool) int {
	n.t.Helper()
	conn := n.dial()
	defer conn.Close()
	if _, err := conn.Write(request(key, user, hash, remote, success)); err != nil {
		n.t.Fatal(err)
	}
	status, err := answer(bufio.NewReader(conn))
	if err != nil {
		n.t.Fatal(err)
	}
	return status
}

func (n *instance) in(set, element string) bool {
	n.t.Helper()
	out, err := exec.Command(nstest.Need(n.t, "nft", "nftables"), "list", "set", "inet", "filter", set).CombinedOutput()
	if err != nil {
		n.t.Fatalf("%v: %s", err, out)
	}
	return strings.Contains(string(out), element)
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		name, config, key string
		args              []string
		code              int
		says              string
	}{
		{"no policy", "# all defaults\n", key, nil, 1, "the configuration has no policy"},
		{"wrong configuration", "policy: {}\nfailures: {limit: x}\n", key, nil, 1, "nftwl.yaml:2: failures.limit"},
		{"no such configuration", "", key, []string{"--config", "/nowhere"}, 1, "/nowhere"},
		{"no key", "policy: {key_file: /nowhere}\n", key, nil, 1, "key: open /nowhere"},
		{"empty key", "policy: {}\n", "\n", nil, 1, "must hold one word"},
		{"short key", "policy: {}\n", "secret", nil, 1, "at least 16"},
		{"two words", "policy: {}\n", "0123456789abcdef 0123456789abcdef", nil, 1, "must hold one word"},
		{"not ours to listen on", "policy: {listen: 192.0.2.1:1}\n", key, nil, 1, "192.0.2.1:1"},
		{"unknown flag", "policy: {}\n", key, []string{"--nonsense"}, 2, "--nonsense"},
		{"unknown command", "policy: {}\n", key, []string{"nonsense"}, 2, "nonsense"},
		{"status without a daemon", "policy: {}\n", key, []string{"status"}, 1, "connection refused"},
		{"help", "", key, []string{"--help"}, 0, "Exit status"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newInstance(t, c.config)
			n.write("policy.key", c.key)
			if strings.Contains(c.config, "listen") {
				n.write("nftwl.yaml", "policy: {listen: 192.0.2.1:1, key_file: "+n.dir+"/policy.key}\n")
			}
			out, code := n.run(c.args...)
			if code != c.code || !strings.Contains(out, c.says) {
				t.Errorf("exit %d: %s", code, out)
			}
			if code != 0 && !regexp.MustCompile(`^nftwld: error: .*\n(nftwld: hint: .*\n)?$`).MatchString(out) {
				t.Errorf("not an error and a hint: %s", out)
			}
		})
	}
}

func TestReload(t *testing.T) {
	n := newInstance(t, "policy: {}\nfailures: {limit: 5}\n")
	n.start()
	for i, text := range []string{"policy: {}\nfailures: {limit: x}\n", "timeout: 1d\n", "policy: {key_file: /nowhere}\n", "policy: {}\ntiemout: 1d\n"} {
		n.write("nftwl.yaml", text)
		n.hangUp()
		nstest.Poll(n.t, "nftwld to refuse it", func() bool { return strings.Count(n.log(), "the old configuration stays in use") == i+1 })
	}
	for i := range 4 {
		n.report(key, "alice", fmt.Sprint(i), "192.0.2.1", false)
	}
	// With another limit and another key, the failures so far still count.
	n.write("nftwl.yaml", "policy: {}\nfailures: {limit: 3}\n")
	other := strings.ToUpper(key)
	n.write("policy.key", other)
	n.hangUp()
	nstest.Poll(n.t, "nftwld to reload", func() bool { return strings.Contains(n.log(), "configuration reloaded") })
	if got := n.report(key, "alice", "1", "192.0.2.1", false); got != 401 {
		t.Errorf("the old key: %d", got)
	}
	if n.in("banned_ipv4", "192.0.2.1") {
		t.Error("banned already")
	}
	if got := n.report(other, "alice", "1", "192.0.2.1", false); got != 200 {
		t.Errorf("the new key: %d", got)
	}
	nstest.Poll(n.t, "the ban", func() bool { return n.in("banned_ipv4", "192.0.2.1") })
	n.stop()
}

func TestStatus(t *testing.T) {
	n := newInstance(t, "policy: {}\nfailures: {}\n")
	n.start()
	n.report(key, "alice", "1", "192.0.2.1", true)
	n.report(key, "alice", "2", "192.0.2.2", false)
	n.report("wrong", "alice", "2", "192.0.2.2", false)
	nstest.Poll(n.t, "the trust", func() bool { return n.in("trusted_ipv4", "192.0.2.1") })
	out, code := n.run("status", "--json")
	var got struct {
		Reports  map[string]map[string]int
		Trusted  map[string]int
		Failures map[string]int
		Refused  map[string]int
		Elements map[string]int `json:"set_elements"`
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != 0 {
		t.Fatalf("exit %d, %v: %s", code, err, out)
	}
	if got.Reports["imap"]["success"] != 1 || got.Reports["imap"]["failure"] != 1 || got.Trusted["added"] != 1 ||
		got.Failures["counted"] != 1 || got.Refused["key"] != 1 || got.Elements["trusted_ipv4"] != 5 {
		t.Errorf("%+v of %s", got, out)
	}
	out, code = n.run("status")
	for _, want := range []string{`(?m)^reports +imap failure 1, imap success 1$`, `(?m)^trusted +added 1$`, `(?m)^banned +0$`, `(?m)^last report +20\d\d-`} {
		if code != 0 || !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("exit %d, no %s in\n%s", code, want, out)
		}
	}
	n.stop()
}

// With what systemd passes to nftwld: a socket, a credential, and a socket for
// notifications.
func TestUnderSystemd(t *testing.T) {
	n := newInstance(t, "policy: {listen: 127.0.0.1:1, key_file: /nowhere}\n")
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	if n.file, err = l.(*net.TCPListener).File(); err != nil {
		t.Fatal(err)
	}
	l.Close()
	defer n.file.Close()
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: n.dir + "/notify", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	_ = notify.SetDeadline(time.Now().Add(nstest.Patience))
	told := func(want string) {
		t.Helper()
		b := make([]byte, 4096)
		for {
			size, err := notify.Read(b)
			if err != nil {
				t.Fatalf("nftwld does not send %s to systemd: %v", want, err)
			}
			if strings.HasPrefix(string(b[:size]), want) {
				return
			}
		}
	}
	n.env = []string{"NOTIFY_SOCKET=" + n.dir + "/notify", "WATCHDOG_USEC=300000", "CREDENTIALS_DIRECTORY=" + n.dir, "STATE_DIRECTORY=" + n.dir, "JOURNAL_STREAM=1:1"}
	n.start()
	told("READY=1")
	told("WATCHDOG=1")
	told("WATCHDOG=1")
	if got := n.report(key, "alice", "1", "192.0.2.1", true); got != 200 {
		t.Errorf("%d", got)
	}
	n.write("nftwl.yaml", "nonsense\n")
	n.hangUp()
	told("RELOADING=1")
	told("STATUS=The old configuration stays in use")
	told("READY=1")
	n.stop()
	told("STOPPING=1")
	if strings.Contains(n.log(), "time=") {
		t.Errorf("lines for the journal have a time: %s", n.log())
	}
}

// usage returns the resident memory in MiB and the number of open descriptors.
func (n *instance) usage() (mib, descriptors int) {
	n.t.Helper()
	proc := filepath.Join("/proc", strconv.Itoa(n.cmd.Process.Pid))
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		n.t.Fatal(err)
	}
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(status)
	kib, _ := strconv.Atoi(string(m[1]))
	files, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		n.t.Fatal(err)
	}
	return kib / 1024, len(files)
}

// 100,000 reports over 20 connections, like Dovecot's: successes, failures that
// repeat themselves, and guesses from everywhere.
func TestManyReports(t *testing.T) {
	n := newInstance(t, "policy: {}\nfailures: {limit: 3}\n")
	n.start("--state", n.dir)
	const connections, each, depth = 20, 5000, 100
	_, before := n.usage()
	var all sync.WaitGroup
	start := time.Now()
	for c := range connections {
		conn := n.dial()
		all.Go(func() {
			r := bufio.NewReader(conn)
			for i := 0; i < each; i += depth {
				var b bytes.Buffer
				for j := range depth {
					k := c*each + i + j
					switch k % 4 {
					case 0:
						b.Write(request(key, "alice", "1", fmt.Sprintf("192.0.2.%d", k/4%250), true))
					case 1:
						b.Write(request(key, "alice", "old", fmt.Sprintf("198.51.100.%d", k/4%250), false))
					default:
						b.Write(request(key, "alice", fmt.Sprint(k), fmt.Sprintf("10.%d.%d.%d", k>>16, k>>8&255, k&255), false))
					}
				}
				if _, err := conn.Write(b.Bytes()); err != nil {
					t.Error(err)
					return
				}
				for range depth {
					if status, err := answer(r); err != nil || status != 200 {
						t.Errorf("%d, %v", status, err)
						return
					}
				}
			}
			conn.Close()
		})
	}
	all.Wait()
	took := time.Since(start)
	mib, _ := n.usage()
	var descriptors int
	nstest.Poll(n.t, "the connections to be closed", func() bool {
		_, descriptors = n.usage()
		return descriptors <= before+2
	})
	t.Logf("%v, %d MiB, %d descriptors", took, mib, descriptors)
	if mib > 200 {
		t.Errorf("%d MiB", mib)
	}
	if n.in("banned_ipv4", "198.51.100.") || !n.in("trusted_ipv4", "192.0.2.249 . 993") {
		t.Error("a user is banned, or not trusted")
	}
	n.stop()
}

// A local process that opens as many connections as it can takes little memory.
// Once they are closed, or time out, Dovecot's reports get through again.
func TestManyConnections(t *testing.T) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	n := newInstance(t, "policy: {}\n")
	n.start()
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for range min(10_000, int(limit.Cur)-200) {
		c, err := net.DialTimeout("tcp", address, 100*time.Millisecond)
		if err != nil {
			break // the socket's queue is full, which will do
		}
		open = append(open, c)
	}
	mib, descriptors := n.usage()
	t.Logf("%d connections: %d MiB, %d descriptors", len(open), mib, descriptors)
	if mib > 150 || descriptors > maxConns+100 {
		t.Errorf("%d MiB, %d descriptors", mib, descriptors)
	}
	for _, c := range open {
		c.Close()
	}
	open = nil
	if got := n.report(key, "alice", "1", "192.0.2.1", true); got != 200 {
		t.Errorf("%d", got)
	}
	nstest.Poll(n.t, "the trust", func() bool { return n.in("trusted_ipv4", "192.0.2.1") })
	n.stop()
}

// A report that meets nftwld's end counts, on whatever connection it comes. Dovecot
// keeps idle ones open for 10 s, and does not repeat a report.
func TestStopLosesNoReport(t *testing.T) {
	n := newInstance(t, "policy: {}\n")
	n.start()
	idle, fresh := n.dial(), n.dial()
	replies := bufio.NewReader(idle)
	send := func(c net.Conn, remote string) {
		t.Helper()
		_, err := c.Write(request(key, "alice", "1", remote, true))
		nstest.Must(t, err)
	}
	send(idle, "192.0.2.1")
	if status, err := answer(replies); status != 200 {
		t.Fatal(status, err)
	}
	nstest.Must(t, n.cmd.Process.Signal(syscall.SIGTERM))
	if _, err := replies.ReadByte(); err != io.EOF {
		t.Fatalf("an idle connection ends with %v", err)
	}
	send(idle, "192.0.2.2")
	send(fresh, "192.0.2.3")
	if status, err := answer(bufio.NewReader(fresh)); status != 200 {
		t.Error(status, err)
	}
	idle.Close()
	fresh.Close()
	nstest.Must(t, n.cmd.Wait())
	for _, a := range []string{"192.0.2.2", "192.0.2.3"} {
		if !n.in("trusted_ipv4", a+" ") {
			t.Errorf("%s is not trusted", a)
		}
	}
}

// Clients that keep their connections do not keep nftwld, however many they are.
func TestStopEnds(t *testing.T) {
	n := newInstance(t, "policy: {}\n")
	n.start()
	for range maxConns {
		idle := n.dial()
		_, err := idle.Write(request(key, "alice", "1", "192.0.2.1", true))
		nstest.Must(t, err)
		if status, err := answer(bufio.NewReader(idle)); status != 200 {
			t.Fatal(status, err)
		}
	}
	n.dial() // waits for a place
	start := time.Now()
	n.stop()
	if took := time.Since(start); took > 10*time.Second { // systemd kills it after 15 s
		t.Errorf("took %v", took)
	}
}

// A flood of problems makes one line a minute for each reason.
func TestQuietLog(t *testing.T) {
	n := newInstance(t, "policy: {}\n")
	n.start()
	for range 200 {
		n.report("wrong", "alice", "1", "192.0.2.1", true)
	}
	n.stop()
	lines := slices.DeleteFunc(strings.Split(n.log(), "\n"), func(l string) bool { return !strings.Contains(l, "level=ERROR") })
	if len(lines) != 2 || !strings.Contains(lines[1], "more=198") {
		t.Errorf("%q", lines)
	}
}
