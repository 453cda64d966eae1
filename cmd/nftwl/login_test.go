package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

const sets = `
table inet filter {
	set trusted_ipv4 { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1d; size 65535; }
	set trusted_ipv6 { type ipv6_addr . inet_service; flags dynamic,timeout; timeout 1d; size 65535; }
}`

// nftwl returns a command that runs the real binary as Dovecot would, with only the given
// environment.
func nftwl(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(nstest.Build(t, "cmd/nftwl"), args...)
	cmd.Env = env
	if cmd.Env == nil {
		cmd.Env = []string{}
	}
	return cmd
}

// output runs cmd, and returns its stdout, its stderr and its exit status.
func output(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func trustedNow(t *testing.T, set string) string {
	t.Helper()
	out, err := exec.Command("nft", "list", "set", "inet", "filter", set).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func TestLoginKeepsArguments(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, sets)
	// cat prints its own command line, which begins with an argument that is no file.
	want := []string{"cat", "/proc/self/cmdline", "--", "with space", "", " ", "line\nfeed", "--config", "-h", "login", `"'\`, "\xff"}
	out, _, _ := output(t, nftwl(t, []string{"IP=192.0.2.7"}, append([]string{"login"}, want...)...))
	if got := strings.Join(want, "\x00") + "\x00"; out != got {
		t.Errorf("got  %q\nwant %q", out, got)
	}
}

func TestLoginKeepsEnvironment(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, sets)
	env := []string{
		"IP=192.0.2.7", "LOCAL_IP=203.0.113.1", "USER=al ice\x01\n", "UID=1000", "GID=", "HOME=/home/x y",
		"AUTH_TOKEN=a=b=c", "USERDB_KEYS=A B ", "A=\xff", "lower=1", "=odd", "noequals", "Z=last",
	}
	out, errs, _ := output(t, nftwl(t, env, "login", "/bin/cat", "/proc/self/environ"))
	if want := strings.Join(env, "\x00") + "\x00"; out != want || errs != "" {
		t.Errorf("got  %q\nwant %q\nstderr %q", out, want, errs)
	}
}

// Descriptors 0, 1 and 3 belong to the client and to Dovecot. The command has these and no
// others, as without nftwl.
func TestLoginKeepsDescriptors(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, sets)
	dir := t.TempDir()
	var files []*os.File
	for i := range 4 {
		f, err := os.Create(filepath.Join(dir, fmt.Sprint("fd", i)))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	config := filepath.Join(dir, "config")
	if err := os.WriteFile(config, []byte("timeout: 1h\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// This reads the shell's /proc entry. What the shell opens itself is closed when
	// readlink looks, or is the same in both runs.
	command := []string{"/bin/sh", "-c", "readlink /proc/$$/fd/* >" + dir + "/links; true"}
	links := func(cmd *exec.Cmd) string {
		t.Helper()
		cmd.Stdin, cmd.Stdout, cmd.Stderr = files[0], files[1], files[2]
		cmd.ExtraFiles = files[3:]
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(dir + "/links")
		if err != nil {
			t.Fatal(err)
		}
		return string(got)
	}
	want := links(exec.Command(command[0], command[1:]...))
	if !strings.Contains(want, "/fd3\n") {
		t.Fatalf("descriptor 3 is not in %q", want)
	}
	for _, ip := range []string{"192.0.2.7", "", "bad", "2001:db8::7"} {
		got := links(nftwl(t, []string{"IP=" + ip}, append([]string{"--config", config, "login"}, command...)...))
		if got != want {
			t.Errorf("IP=%s: got\n%swant\n%s", ip, got, want)
		}
	}
	if out, _ := os.ReadFile(files[1].Name()); len(out) > 0 {
		t.Errorf("stdout has %q", out)
	}
	if offset, _ := files[0].Seek(0, io.SeekCurrent); offset != 0 {
		t.Error("stdin was read")
	}
}

// A signal, such as those with which Go preempts its threads, can interrupt the open and
// the read of a file on FUSE or NFS.
func TestLoginConfigInterrupted(t *testing.T) {
	nstest.New(t)
	strace := nstest.Need(t, "strace", "strace")
	nstest.Nft(t, sets)
	config := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(config, []byte("timeout: 1h\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	bin := nstest.Build(t, "cmd/nftwl")
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command(strace, "-f", "-o", trace, "-P", config, "-e", "inject=openat,read:error=EINTR:when=1", bin, "--config", config, "login", "true")
	cmd.Env = []string{"IP=192.0.2.7", "PATH=" + os.Getenv("PATH")}
	if out, errs, code := output(t, cmd); out != "" || errs != "" || code != 0 {
		t.Errorf("exit %d, stdout %q, stderr %q", code, out, errs)
	}
	if got := strings.Count(trustedNow(t, "trusted_ipv4"), " expires "); got != 5 {
		t.Errorf("%d elements", got)
	}
	if calls, err := os.ReadFile(trace); err != nil || strings.Count(string(calls), "INJECTED") != 2 {
		t.Errorf("%v: %s", err, calls)
	}
}

// However few descriptors are left, the command is executed. Two are enough to trust the
// address. (One would be, but Go 1.26 loses it in a cgroup of version 1.) The command is
// a static program, because a dynamic loader needs a descriptor.
//
// If stdin, stdout or stderr is nonblocking, package os starts Go's poller before main,
// which takes two descriptors.
func TestLoginWithFewDescriptors(t *testing.T) {
	nstest.New(t)
	prlimit := nstest.Need(t, "prlimit", "util-linux")
	bin := nstest.Build(t, "cmd/nftwl")
	config := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(config, []byte("timeout: 1h\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	want, _, _ := output(t, nftwl(t, nil, "version"))
	try := func(n, poller int, stdin *os.File) {
		t.Helper()
		nstest.Nft(t, "flush ruleset\n"+sets)
		cmd := exec.Command(prlimit, fmt.Sprintf("--nofile=%d", n+poller), bin, "--config", config, "login", bin, "version")
		cmd.Env = []string{"IP=192.0.2.7"}
		if stdin != nil {
			cmd.Stdin = stdin
		}
		out, errs, code := output(t, cmd)
		keys, says := 5, ""
		if n == 3 || n == 4 && errs != "" {
			keys, says = 0, "nftwl: error: login: 192.0.2.7 is not trusted: config: open "+config+": too many open files\n"
		}
		if out != want || code != 0 || errs != says {
			t.Errorf("%d descriptors: exit %d, stdout %q, stderr %q", n+poller, code, out, errs)
		}
		if got := strings.Count(trustedNow(t, "trusted_ipv4"), " expires "); got != keys {
			t.Errorf("%d descriptors: %d elements, want %d", n+poller, got, keys)
		}
	}
	for n := 3; n <= 16; n++ {
		try(n, 0, nil)
		try(n, 2, nonBlocking(t))
	}
}

// nonBlocking returns a nonblocking file for stdin, like Dovecot's.
func nonBlocking(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "/dev/null")
	t.Cleanup(func() { f.Close() })
	return f
}

func TestLoginKeepsSignals(t *testing.T) {
	nstest.New(t)
	// The children ignore what is ignored here. Dovecot ignores SIGPIPE.
	signal.Ignore(unix.SIGPIPE, unix.SIGHUP)
	defer signal.Reset(unix.SIGPIPE, unix.SIGHUP)
	command := []string{"/bin/grep", "^Sig[BI]", "/proc/self/status"}
	want, _, _ := output(t, exec.Command(command[0], command[1:]...))
	ignored := uint64(0)
	_, line, _ := strings.Cut(want, "SigIgn:")
	if _, err := fmt.Sscanf(strings.TrimSpace(line), "%x", &ignored); err != nil || ignored&(1<<(unix.SIGPIPE-1)) == 0 {
		t.Fatalf("SIGPIPE is not ignored to begin with: %v in %q", err, want)
	}
	got, _, _ := output(t, nftwl(t, nil, append([]string{"login"}, command...)...))
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestLoginKeepsLimits(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, sets)
	out, _, _ := output(t, nftwl(t, []string{"IP=192.0.2.7"}, "login", "/bin/sh", "-c",
		"ulimit -Sn 57; ulimit -Hn 91; exec "+nstest.Build(t, "cmd/nftwl")+" login /bin/grep 'open files' /proc/self/limits"))
	if fields := strings.Fields(out); len(fields) < 5 || fields[3] != "57" || fields[4] != "91" {
		t.Errorf("got %q", out)
	}
}

func TestLoginExitCodes(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, sets)
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"plain": 0o644, "noformat": 0o755} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("no program\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "good"), []byte("#!/bin/sh\nexit 7\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		env     []string
		command []string
		code    int
		words   string
	}{
		{nil, []string{"true"}, 0, ""}, // without PATH, execvp's default applies
		{nil, []string{"sh", "-c", "exit 42"}, 42, ""},
		{nil, []string{"no-such-command"}, 127, `command "no-such-command" not found`},
		{nil, []string{"", "", "sh", "-c", "exit 3"}, 3, ""},
		{nil, []string{""}, 2, "the command to execute is missing"},
		{nil, []string{dir + "/missing"}, 127, "not found"},
		{nil, []string{dir + "/plain/x"}, 127, "not found"},
		{nil, []string{dir}, 126, "cannot execute"},
		{nil, []string{dir + "/plain"}, 126, "permission denied"},
		{nil, []string{dir + "/noformat"}, 126, "a script needs a #! line"},
		{[]string{"PATH=/nowhere:" + dir}, []string{"good"}, 7, ""},
		{[]string{"PATH=" + dir}, []string{"plain"}, 126, "permission denied"},
		{[]string{"PATH=" + dir + ":/bin"}, []string{"true"}, 0, ""},
		{[]string{"PATH="}, []string{"true"}, 127, "not found"},
		{nil, nil, 2, "the command to execute is missing"},
	} {
		_, errs, code := output(t, nftwl(t, test.env, append([]string{"login"}, test.command...)...))
		if code != test.code || !strings.Contains(errs, test.words) || strings.Count(errs, "\n") > 1 || test.words == "" && errs != "" {
			t.Errorf("%q with %q: exit %d, stderr %q; want %d, %q", test.command, test.env, code, errs, test.code, test.words)
		}
	}
}

// Which addresses a login trusts. stdout has only the command's output, and stderr only
// errors, because Dovecot logs each line there as an error.
func TestLoginDecides(t *testing.T) {
	const port = " . 993"
	for _, test := range []struct {
		name  string
		env   []string
		key   string // in the sets afterwards, or "" for none
		words string // on stderr, or "" for nothing
	}{
		{"v4", []string{"IP=192.0.2.7"}, "192.0.2.7" + port, ""},
		{"v6", []string{"IP=2001:db8::7"}, "2001:db8::7" + port, ""},
		{"mapped", []string{"IP=::ffff:192.0.2.7"}, "192.0.2.7" + port, ""},
		{"zone", []string{"IP=2001:db8::7%eth0"}, "2001:db8::7" + port, ""},
		{"link-local", []string{"IP=fe80::1"}, "", ""},
		{"unset", nil, "", ""},
		{"empty", []string{"IP="}, "", ""},
		{"unspecified", []string{"IP=0.0.0.0"}, "", ""},
		{"unspecified v6", []string{"IP=::"}, "", ""},
		{"mapped unspecified", []string{"IP=::ffff:0.0.0.0"}, "", ""},
		{"loopback", []string{"IP=127.0.0.1"}, "", ""},
		{"mapped loopback", []string{"IP=::ffff:127.0.0.1"}, "", ""},
		{"loopback v6", []string{"IP=::1"}, "", ""},
		{"multicast", []string{"IP=224.0.0.1"}, "", ""},
		{"broadcast", []string{"IP=255.255.255.255"}, "", ""},
		{"multicast v6", []string{"IP=ff02::1"}, "", ""},
		{"own address", []string{"IP=192.0.2.7", "LOCAL_IP=192.0.2.7"}, "", ""},
		{"own address, mapped", []string{"IP=192.0.2.7", "LOCAL_IP=::ffff:192.0.2.7"}, "", ""},
		{"another own address", []string{"IP=192.0.2.7", "LOCAL_IP=192.0.2.8"}, "192.0.2.7" + port, ""},
		{"own address nonsense", []string{"IP=192.0.2.7", "LOCAL_IP=x"}, "192.0.2.7" + port, ""},
		{"nonsense", []string{"IP=mail.example.org"}, "", `"mail.example.org" is not an IP address`},
		{"two", []string{"IP=192.0.2.7 192.0.2.8"}, "", "is not an IP address"},
		{"prefix", []string{"IP=192.0.2.0/24"}, "", "is not an IP address"},
		{"newline", []string{"IP=192.0.2.7\nnftwl: error: forged"}, "", `\nnftwl`},
		{"long", []string{"IP=" + strings.Repeat("1", 10<<10)}, "", "is not an IP address"},
		{"not this user", []string{"IP=192.0.2.7", "NFTWL_TRUST=no"}, "", ""},
		{"this user", []string{"IP=192.0.2.7", "NFTWL_TRUST=yes"}, "192.0.2.7" + port, ""},
		{"unclear user", []string{"IP=192.0.2.7", "NFTWL_TRUST=nope"}, "", `nftwl_trust: "nope"`},
		{"no other variable", []string{"IP=192.0.2.7", "NFTWL_CONFIG=/etc/passwd", "CONFIG=/x"}, "192.0.2.7" + port, ""},
		{"user's own timeout", []string{"IP=192.0.2.7", "NFTWL_TIMEOUT=7d"}, "192.0.2.7" + port + " timeout 7d expires ", ""},
		{"bad timeout", []string{"IP=192.0.2.7", "NFTWL_TIMEOUT=week"}, "192.0.2.7" + port + " expires ", `nftwl_timeout: "week"`},
		{"comment", []string{"IP=192.0.2.7", "USER=alice@example.org"}, `comment "alice@example.org"`, ""},
		{"hostile comment", []string{"IP=192.0.2.7", "USER=\" }; flush ruleset; #\n"}, `comment "' }; flush ruleset; #?"`, ""},
		{"long comment", []string{"IP=192.0.2.7", "USER=" + strings.Repeat("ü", 1000)}, `comment "` + strings.Repeat("ü", 64) + `"`, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			nstest.New(t)
			nstest.Nft(t, sets)
			out, errs, code := output(t, nftwl(t, test.env, "login", "/bin/echo", "mail"))
			if out != "mail\n" || code != 0 {
				t.Errorf("stdout %q, exit %d", out, code)
			}
			lines := strings.Count(errs, "\n")
			if (test.words == "") != (errs == "") || !strings.Contains(errs, test.words) || lines > 1 || len(errs) > 1100 {
				t.Errorf("stderr %q, want %q", errs, test.words)
			}
			if errs != "" && !strings.HasPrefix(errs, "nftwl: error: ") {
				t.Errorf("stderr %q", errs)
			}
			now := trustedNow(t, "trusted_ipv4") + trustedNow(t, "trusted_ipv6")
			switch {
			case test.key == "" && strings.Contains(now, "elements"):
				t.Errorf("trusts\n%s", now)
			case !strings.Contains(now, test.key):
				t.Errorf("want %q in\n%s", test.key, now)
			case test.key != "":
				for _, p := range []string{"143", "993", "995", "465", "587"} {
					if !strings.Contains(now, " . "+p+" ") {
						t.Errorf("port %s is missing in\n%s", p, now)
					}
				}
				if n := strings.Count(now, " expires "); n != 5 {
					t.Errorf("%d elements in\n%s", n, now)
				}
			}
		})
	}
}

// However much is wrong, a login prints one line, which names the address and says that
// it is not trusted.
func TestLoginPrintsOneLine(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(bad, []byte("timeout: 1d\ntiemout: 2d\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, rules, config string
		env                 []string
		want                string // after "nftwl: error: login: "
	}{
		{"timeout and table", "table inet other { }", "", []string{"IP=192.0.2.7", "NFTWL_TIMEOUT=week"}, "192.0.2.7 is not trusted: table inet filter does not exist"},
		{"timeout", sets, "", []string{"IP=192.0.2.7", "NFTWL_TIMEOUT=week"}, `nftwl_timeout: "week" is not a timeout`},
		{"configuration", sets, bad, []string{"IP=192.0.2.7", "NFTWL_TIMEOUT=week"}, "192.0.2.7 is not trusted: config: " + bad + `:2: unknown key "tiemout"`},
		{"configuration, mapped address", sets, bad, []string{"IP=::ffff:192.0.2.7"}, "192.0.2.7 is not trusted: config: "},
		{"configuration and address", sets, bad, []string{"IP=x\ny"}, `"x\ny" is not trusted: config: `},
		{"configuration, long address", sets, bad, []string{"IP=" + strings.Repeat("1", 10<<10)}, `"` + strings.Repeat("1", 60) + `"… is not trusted: config: `},
		{"configuration, no address", sets, bad, nil, "a client without an address is not trusted: config: "},
	} {
		t.Run(test.name, func(t *testing.T) {
			nstest.New(t)
			nstest.Nft(t, test.rules)
			args := []string{"login", "/bin/true"}
			if test.config != "" {
				args = append([]string{"--config", test.config}, args...)
			}
			_, errs, code := output(t, nftwl(t, test.env, args...))
			if code != 0 || !strings.HasPrefix(errs, "nftwl: error: login: "+test.want) || strings.Count(errs, "\n") != 1 {
				t.Errorf("exit %d, stderr %q, want %q", code, errs, test.want)
			}
		})
	}
}
