// Package nstest lets tests use the real kernel without touching the host. It
// runs the test binary as root of a new user namespace, and each test that calls
// New in a new network namespace.
//
// A test package uses it from TestMain:
//
//	func TestMain(m *testing.M) { nstest.Main(m) }
package nstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// entered is the environment variable of a test binary that already runs inside its
// namespaces. Its value is the inode of the user namespace that the binary left,
// which shows whether the variable is stale.
const entered = "NFTWL_TEST_OUTSIDE_USERNS"

// Main runs the tests of a package inside new user, network and mount
// namespaces, and exits. It executes the test binary again, because a process with
// several threads, like every Go program, cannot unshare its user namespace.
//
// As root it maps 65,536 user ids, because Dovecot needs several; another user can
// map only its own.
func Main(m *testing.M) {
	outside := os.Getenv(entered)
	if outside != "" {
		if outside == userNamespace() {
			fmt.Fprintln(os.Stderr, "nstest:", entered, "is set, but the tests run outside of a namespace")
			os.Exit(1)
		}
		code := m.Run()
		if build.dir != "" {
			os.RemoveAll(build.dir)
		}
		os.Exit(code)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), entered+"="+userNamespace())
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	ids := 1
	if os.Geteuid() == 0 {
		ids = 65536
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: ids}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: ids}},
		// Otherwise a test binary that outlives its parent would keep the terminal.
		Pdeathsig:                  syscall.SIGKILL,
		GidMappingsEnableSetgroups: ids > 1,
	}
	// The child gets Pdeathsig when the thread that started it ends.
	runtime.LockOSThread()
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintf(os.Stderr, "nstest: no user namespace: %v\n", err)
		fmt.Fprintln(os.Stderr, "nstest: allow it (sysctl kernel.unprivileged_userns_clone=1, or kernel.apparmor_restrict_unprivileged_userns=0), or run as root")
		os.Exit(1)
	}
	os.Exit(0)
}

func userNamespace() string {
	link, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		fmt.Fprintln(os.Stderr, "nstest:", err)
		os.Exit(1)
	}
	return strings.Trim(strings.TrimPrefix(link, "user:"), "[]")
}

// New moves the calling goroutine's thread into a new network namespace with the
// loopback interface up. Sockets that the goroutine opens and processes that it
// starts are in that namespace. Other goroutines, including subtests, are not. The
// thread ends with the goroutine, and the namespace with its last process.
func New(t testing.TB) {
	t.Helper()
	if os.Getenv(entered) == "" {
		t.Fatal("nstest.New without nstest.Main in TestMain")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("unshare network namespace: %v", err)
	}
	if err := loopbackUp(); err != nil {
		t.Fatalf("loopback up: %v", err)
	}
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

// Need returns the path of a program, and skips the test if it is not installed.
// Under CI the test fails instead, because a skipped test proves nothing.
func Need(t testing.TB, program, debianPackage string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		for _, dir := range []string{"/usr/sbin", "/sbin"} {
			if p, e := exec.LookPath(filepath.Join(dir, program)); e == nil {
				return p
			}
		}
		Skip(t, "%s is not installed: apt-get install %s", program, debianPackage)
	}
	return path
}

// Skip skips the test, or fails it under CI.
func Skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("would be skipped: "+format, args...)
	}
	t.Skipf(format, args...)
}

// Nft runs nft with a ruleset on stdin and returns what it printed.
func Nft(t testing.TB, ruleset string) string {
	t.Helper()
	cmd := exec.Command(Need(t, "nft", "nftables"), "-f", "-")
	cmd.Stdin = strings.NewReader(ruleset)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v\n%s\nin:\n%s", err, out, ruleset)
	}
	return string(out)
}

// Root returns the root directory of the repository.
func Root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for !fileExists(filepath.Join(dir, "go.mod")) {
		up := filepath.Dir(dir)
		if up == dir {
			t.Fatal("no go.mod above the working directory")
		}
		dir = up
	}
	return dir
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

var build struct {
	sync.Mutex
	dir string // made by the first Build, removed by Main
}

// NeedUsers skips a test that needs more users than the one that runs it.
func NeedUsers(t testing.TB) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	if fields := strings.Fields(string(b)); len(fields) == 3 && fields[2] == "1" {
		Skip(t, "the tests' namespace has only one user: run the tests as root")
	}
}

// Build compiles a command of this module once for each test binary, with the
// flags of a release (static, trimmed), and returns its path. pkg is relative to
// the module: "cmd/nftwl".
func Build(t testing.TB, pkg string) string {
	t.Helper()
	build.Lock()
	defer build.Unlock()
	if build.dir == "" {
		dir, err := os.MkdirTemp("", "nftwl-test-")
		if err != nil {
			t.Fatal(err)
		}
		build.dir = dir
		// Users other than root must be able to execute the binary.
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	bin := filepath.Join(build.dir, filepath.Base(pkg))
	if fileExists(bin) {
		return bin
	}
	cmd := exec.Command("go", "build", "-trimpath", "-o", bin, "./"+pkg)
	cmd.Dir = Root(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, out)
	}
	return bin
}
