package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

// A fault is something that is wrong when a user logs in. Whatever it is, nftwl login
// executes the command, so the login goes on.
type fault struct {
	group, name string

	ip      string   // the client's address; 192.0.2.7 if empty
	noIP    bool     // $IP is unset
	rules   string   // the ruleset; the sets if empty
	config  string   // of the file that --config names
	wrap    []string // a command that runs nftwl
	seccomp string   // a system call that fails: see seccompRun
	close   string   // a shell's redirection
	stdin   func(t *testing.T) *os.File
	stderr  func(t *testing.T) *os.File
	// variable is added to the environment, like a field of the user database.
	variable string
	static   bool // the login executes a static program, which needs no descriptor
	during   func(t *testing.T) (end func())

	says  string // the line on stderr has this in it; empty for no line
	keys  int    // elements in the trusted sets afterwards
	waits string // what the login waits for; empty for nothing
}

// deadline is the default configuration's.
const deadline = 500 * time.Millisecond

const theDeadline = "the deadline"

const client = "192.0.2.7"

// faults returns all faults. prepare makes the files that they name.
func faults() []fault {
	const notAddress = "is not an IP address"
	unprivileged := []string{"setpriv", "--bounding-set=-net_admin"}
	bounded := []string{"setpriv", "--bounding-set=-dac_override,-dac_read_search"}
	set := func(s string) string { return "table inet filter { set trusted_ipv4 { " + s + " }; }" }
	return []fault{
		{group: "nothing is wrong", name: "a login", keys: 5},

		{group: "configuration", name: "named and missing", config: "none", says: "no such file or directory"},
		{name: "not readable", config: "mode 000", wrap: bounded, says: "permission denied"},
		{name: "a directory", config: ".", says: "is not a regular file"},
		{name: "of 0 bytes", config: "empty", says: "is empty; remove the file to use the defaults"},
		{name: "10 MB long", config: "large", says: "is larger than 32 KiB"},
		{name: "not UTF-8", config: "latin1", says: "latin1:2: not UTF-8"},
		{name: "an unknown key", config: "unknown", says: `unknown:2: unknown key "tiemout"`},

		{group: "`$IP`", name: "unset", noIP: true},
		{name: "the unspecified address", ip: "0.0.0.0"},
		{name: "loopback", ip: "::1"},
		{name: "an IPv4-mapped address", ip: "::ffff:192.0.2.7", keys: 5},
		{name: "with a zone", ip: "2001:db8::7%eth0", keys: 5},
		{name: "10 kB long", ip: strings.Repeat("1", 10_000), says: notAddress},
		{name: "with a line feed", ip: "192.0.2.7\nnftwl: error: forged", says: `"192.0.2.7\nnftwl: error: forged" ` + notAddress},
		{name: "several addresses", ip: "192.0.2.7 192.0.2.8", says: notAddress},
		{name: "a prefix", ip: "0.0.0.0/0", says: notAddress},

		{group: "nftables", name: "no table", rules: "table inet other { }", says: "table inet filter does not exist"},
		{name: "no set", rules: "table inet filter { }", says: "set trusted_ipv4 does not exist in table inet filter"},
		{name: "a set of another type", rules: set("type inet_service; flags timeout;"), says: "has keys of type inet_service"},
		{name: "a set of the other family", rules: set("type ipv6_addr; flags timeout;"), says: "which 192.0.2.7 is not"},
		{name: "a set without timeouts", rules: set("type ipv4_addr;"), says: "has no timeout flag"},
		{name: "an interval set", rules: set("type ipv4_addr; flags interval, timeout;"), says: "is an interval set"},
		{name: "a set that is full", rules: set("type ipv4_addr . inet_service; flags timeout; size 2;"), says: "is full (2 elements)"},
		{name: "another's transaction of a million elements meanwhile", config: "short", during: hugeTransaction, keys: 5, waits: "that transaction"},

		{group: "privileges", name: "no CAP_NET_ADMIN", wrap: unprivileged, says: "the capability CAP_NET_ADMIN is missing"},
		{name: "another user", wrap: []string{"setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"}, says: "the capability CAP_NET_ADMIN is missing"},

		{group: "kernel", name: "netlink sockets are refused", seccomp: "socket EAFNOSUPPORT", says: "this kernel has no nf_tables"},
		{name: "netlink sockets are forbidden", seccomp: "socket EPERM", says: "CAP_NET_ADMIN is missing"},
		{name: "no answer ever comes", seccomp: "sendto 0", says: "the kernel did not answer in time", waits: theDeadline},
		{name: "the answer is lost (ENOBUFS)", seccomp: "recvfrom ENOBUFS", says: "no buffer space available"},
		{name: "each wait for it is interrupted (EINTR)", seccomp: "recvfrom EINTR", says: "the kernel did not answer in time", waits: theDeadline},
		{name: "each request is interrupted (EINTR)", seccomp: "sendto EINTR", says: "the kernel did not answer in time", waits: theDeadline},
		{name: "the answer is empty", seccomp: "recvfrom 0", says: "a truncated netlink message"},
		{name: "no memory (ENOMEM)", seccomp: "sendto ENOMEM", says: "cannot allocate memory"},

		{group: "process", name: "no descriptor is left", wrap: []string{"prlimit", "--nofile=3:3"}, static: true, says: "too many open files"},
		{name: "a soft limit of memory that is passed", variable: "GOMEMLIMIT=1", keys: 5},
		{name: "stderr is closed", rules: "table inet other { }", close: "2>&-"},
		{name: "stderr is a pipe that nobody reads", rules: "table inet other { }", stderr: fullPipe},
		{name: "stderr is a pipe whose reader is gone", rules: "table inet other { }", stderr: brokenPipe},
		{name: "stdout is closed", close: ">&-", keys: 5},
	}
}

// prepare makes the files that faults name.
func prepare(t *testing.T, dir string) {
	t.Helper()
	for name, text := range map[string]string{
		"mode 000": "timeout: 1d\n",
		"empty":    "",
		"large":    strings.Repeat("# ten million bytes\n", 500_000),
		"latin1":   "timeout: 1d\ntable: inet f\xfclter\n",
		"unknown":  "timeout: 1d\ntiemout: 2d\n",
		"short":    "deadline: 20ms\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(dir, "mode 000"), 0); err != nil {
		t.Fatal(err)
	}
	letIn(t, dir)
}

// result is the result of a login with a fault.
type result struct {
	went   bool // the command was executed
	took   time.Duration
	stderr string
	keys   int // in the trusted sets
}

// The results are in docs/faults.md.
func TestFaults(t *testing.T) {
	nstest.NeedUsers(t)
	nstest.Need(t, "setpriv", "util-linux")
	nstest.Need(t, "prlimit", "util-linux")
	dir := t.TempDir()
	prepare(t, dir)
	all := faults()
	rows := make([]string, len(all))
	t.Run("all", func(t *testing.T) {
		group := ""
		for i, f := range all {
			group = cmp.Or(f.group, group)
			t.Run(group+"/"+f.name, func(t *testing.T) {
				t.Parallel()
				login := f.login(t, dir)
				f.check(t, login)
				said := strings.TrimSpace(strings.ReplaceAll(login.stderr, filepath.Join(dir, f.config), "/etc/nftwl.yaml"))
				if said != "" {
					said = "`" + strings.ReplaceAll(said, "|", "\\|") + "`"
				}
				trusted := "no"
				if login.keys > 0 {
					trusted = "yes"
				}
				rows[i] = fmt.Sprintf("| %s | %s | executes | %s | %s | %s |\n", f.group, f.name, f.waits, trusted, said)
			})
		}
	})
	if t.Failed() {
		return
	}
	nstest.Golden(t, "docs/faults.md", faultsHead+strings.Join(rows, ""))
}

const faultsHead = `# When something is wrong

Whatever goes wrong in nftwl, the kernel or the configuration, the login goes on. For each
row, the real binary ran on the kernel's nftables. "executes" means that the user got to
their mail, and "trusted" whether the client's address was in the sets afterwards. The last
column is the line in Dovecot's log.

` + "`go generate ./cmd/nftwl`" + ` writes this table.

| | what is wrong | ` + "`nftwl login`" + ` | waits for | trusted | in the log |
|---|---|---|---|---|---|
`

func (f *fault) check(t *testing.T, r result) {
	t.Helper()
	if !r.went {
		t.Error("the login failed")
	}
	line, more, _ := strings.Cut(r.stderr, "\n")
	if more != "" || (f.says == "") != (line == "") || !strings.Contains(line, f.says) {
		t.Errorf("stderr %q, want a line with %q", r.stderr, f.says)
	}
	if r.keys != f.keys {
		t.Errorf("%d elements in the sets, want %d", r.keys, f.keys)
	}
	if f.waits == theDeadline && r.took < deadline {
		t.Errorf("after %v, want the deadline of %v", r.took, deadline)
	}
	t.Logf("%v, %q", r.took.Round(100*time.Microsecond), r.stderr)
}

// command returns a command that runs nftwl with the fault.
func (f *fault) command(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	argv := []string{nstest.Build(t, "cmd/nftwl")}
	if f.config != "" {
		argv = append(argv, "--config", filepath.Join(dir, f.config))
	}
	argv = append(argv, args...)
	if f.seccomp != "" {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		argv = append([]string{self, seccompRun, f.seccomp}, argv...)
	}
	if f.close != "" {
		argv = append([]string{"/bin/sh", "-c", `exec "$@" ` + f.close, "sh"}, argv...)
	}
	argv = append(slices.Clone(f.wrap), argv...)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = t.TempDir()
	letIn(t, cmd.Dir)
	cmd.Env = []string{}
	return cmd
}

// around runs a function in a new namespace with the ruleset, and returns how many
// elements the trusted sets have afterwards.
func (f *fault) around(t *testing.T, run func()) (keys int) {
	t.Helper()
	nstest.New(t)
	nstest.Nft(t, cmp.Or(f.rules, sets))
	run()
	out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return strings.Count(string(out), " expires ")
}

func (f *fault) login(t *testing.T, dir string) (r result) {
	t.Helper()
	command, executed := []string{"/bin/sh", "-c", "exit 42"}, 42
	if f.static {
		command, executed = []string{nstest.Build(t, "cmd/nftwl"), "version"}, 0
	}
	r.keys = f.around(t, func() {
		cmd := f.command(t, dir, append([]string{"login"}, command...)...)
		if f.variable != "" {
			cmd.Env = append(cmd.Env, f.variable)
		}
		if !f.noIP {
			cmd.Env = append(cmd.Env, "IP="+cmp.Or(f.ip, client))
		}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if f.stdin != nil {
			cmd.Stdin = f.stdin(t)
		}
		if f.stderr != nil {
			cmd.Stderr = f.stderr(t)
		}
		if f.during != nil {
			defer f.during(t)()
		}
		start := time.Now()
		err := cmd.Run()
		r.took = time.Since(start)
		var exit *exec.ExitError
		r.went = (err == nil || errors.As(err, &exit)) && cmd.ProcessState.ExitCode() == executed
		r.stderr = stderr.String()
	})
	return r
}

// limit is the longest wait for something that must happen.
const limit = 20 * time.Second

// If Go's runtime gives up before main, the command is not executed, and Dovecot's log
// has words that docs/troubleshooting.md explains. The drop-in's limit is high enough.
func TestBeforeMain(t *testing.T) {
	nstest.NeedUsers(t)
	nstest.Need(t, "setpriv", "util-linux")
	nstest.Need(t, "prlimit", "util-linux")
	dropIn, err := os.ReadFile(filepath.Join(nstest.Root(t), "contrib/dovecot/90-nftwl.conf"))
	if err != nil {
		t.Fatal(err)
	}
	_, limit, _ := strings.Cut(string(dropIn), "\n  vsz_limit = ")
	var gigabytes int
	if _, err := fmt.Sscanf(limit, "%dG\n", &gigabytes); err != nil {
		t.Fatalf("the drop-in's vsz_limit: %v", err)
	}
	troubleshooting, err := os.ReadFile(filepath.Join(nstest.Root(t), "docs", "troubleshooting.md"))
	if err != nil {
		t.Fatal(err)
	}
	memory := func(bytes int) []string {
		return []string{"prlimit", fmt.Sprintf("--as=%d", bytes), fmt.Sprintf("--data=%d", bytes)}
	}
	for _, test := range []struct {
		what  string
		wrap  []string
		words string // on stderr; empty if nftwl runs
	}{
		{"the drop-in's vsz_limit", memory(gigabytes << 30), ""},
		{"Dovecot's default of 256 MB", memory(256 << 20), "failed to reserve page summary memory"},
		{"no two descriptors for the poller", []string{"prlimit", "--nofile=4"}, "netpollinit failed"},
		{"one task", []string{"setpriv", "--reuid=1000", "--clear-groups", "prlimit", "--nproc=1"}, "failed to create new OS thread"},
	} {
		f := fault{wrap: test.wrap, stdin: nonBlocking}
		switch r := f.login(t, t.TempDir()); {
		case test.words == "" && (!r.went || r.keys != 5 || r.stderr != ""):
			t.Errorf("%s: %+v", test.what, r)
		case test.words != "" && (r.went || r.keys != 0 || !strings.Contains(r.stderr, test.words)):
			t.Errorf("%s: %+v", test.what, r)
		case !strings.Contains(string(troubleshooting), "`"+test.words+"`") && test.words != "":
			t.Errorf("docs/troubleshooting.md does not have %q", test.words)
		}
	}
}

// hugeTransaction starts a transaction that takes the kernel a second, during which
// nothing else can write. It first adds the elements, in transactions as large as any
// user can send; emptying the set is a single one.
func hugeTransaction(t *testing.T) (end func()) {
	t.Helper()
	nstest.Nft(t, "table inet other { set s { type ipv4_addr; }; }")
	conn, err := nftset.Dial()
	var set *nftset.Set
	if err == nil {
		set, err = conn.Set(nftset.Table{Family: nftset.INet, Name: "other"}, "s")
	}
	addr := netip.MustParseAddr("10.0.0.0")
	for range 200 {
		if err != nil {
			t.Fatal(err)
		}
		batch := conn.Batch()
		for range 5000 {
			batch.Add(set, nftset.Element{Key: nftset.Key{Addr: addr}})
			addr = addr.Next()
		}
		err = batch.Commit()
	}
	batch := conn.Batch()
	batch.Flush(set)
	committed, thread := make(chan error, 1), make(chan int)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		committed <- batch.Commit()
	}()
	// It has begun when the process has used time in the kernel.
	schedstat := fmt.Sprintf("/proc/self/task/%d/schedstat", <-thread)
	worked := func() (ns int64) {
		b, err := os.ReadFile(schedstat)
		if err == nil {
			_, err = fmt.Sscan(string(b), &ns)
		}
		if err != nil {
			t.Fatal(err)
		}
		return ns
	}
	for begin, end := worked(), time.Now().Add(limit); worked() < begin+int64(10*time.Millisecond); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the transaction does not begin")
		}
	}
	return func() {
		if err := <-committed; err != nil {
			t.Error(err)
		}
		conn.Close()
	}
}

// fullPipe returns the write end of a full pipe that nobody reads.
func fullPipe(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	fd := int(w.Fd())
	for err = unix.SetNonblock(fd, true); err == nil; {
		_, err = unix.Write(fd, make([]byte, 4096))
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	return w
}

// brokenPipe returns the write end of a pipe whose read end is closed.
func brokenPipe(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	t.Cleanup(func() { w.Close() })
	return w
}

// letIn lets every user enter a directory.
func letIn(t *testing.T, dir string) {
	t.Helper()
	for ; len(dir) > len(os.TempDir()); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
	}
}

// With seccompRun as its first argument, the test binary executes the command that
// follows, with a system call that fails ("sendto ENOMEM") or does nothing but reports
// success ("sendto 0"). This affects only nftwl's netlink socket.
const seccompRun = "seccomp-run"

func runSeccomp(args []string) error {
	name, result, _ := strings.Cut(args[0], " ")
	call := map[string]uint32{"socket": unix.SYS_SOCKET, "sendto": unix.SYS_SENDTO, "recvfrom": unix.SYS_RECVFROM}[name]
	errno, ok := map[string]unix.Errno{"0": 0, "EPERM": unix.EPERM, "EAFNOSUPPORT": unix.EAFNOSUPPORT, "EINTR": unix.EINTR, "ENOBUFS": unix.ENOBUFS, "ENOMEM": unix.ENOMEM}[result]
	if call == 0 || !ok {
		return fmt.Errorf("%q is not known", args[0])
	}
	const load, equal, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	family := []unix.SockFilter{ // of a socket, its first argument
		{Code: load, K: 16},
		{Code: equal, K: unix.AF_NETLINK, Jf: 1},
	}
	if name != "socket" {
		family = nil
	}
	// struct seccomp_data begins with the number of the call.
	filter := slices.Concat(
		[]unix.SockFilter{{Code: load, K: 0}, {Code: equal, K: call, Jf: uint8(len(family)) + 1}},
		family,
		[]unix.SockFilter{{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(errno)}, {Code: ret, K: unix.SECCOMP_RET_ALLOW}},
	)
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread() // because the filter belongs to the thread that calls exec
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0); err != nil {
		return err
	}
	return unix.Exec(args[1], args[1:], os.Environ())
}
