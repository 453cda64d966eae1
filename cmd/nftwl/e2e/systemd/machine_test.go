package systemd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// A machine boots systemd on a tree of files, which stays unchanged: the machine's disk is
// a layer above it, and lasts from one boot to the next.
type machine struct {
	testing.TB
	dir    string // upper is the disk
	lower  string
	pid    int    // of PID 1, 0 while it is off
	group  string // of cgroup2
	exited chan syscall.WaitStatus
}

// newMachine prepares a machine with nftwl, its units and a ruleset installed, but not
// enabled, and boots it.
func newMachine(t testing.TB, b nstest.Debian) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		nstest.Skip(t, "only root can boot a systemd: run the tests as root")
	}
	m := &machine{TB: t, dir: t.TempDir(), lower: b.Root}
	m.write("etc/fstab", "")
	m.write("etc/machine-id", strings.Repeat("6e667477", 4)+"\n")
	m.write("etc/nftwl.yaml", "# all defaults\n")
	m.write(defaults, "# all defaults\n")
	m.write("etc/systemd/journald.conf.d/volatile.conf", "[Journal]\nStorage=volatile\n")
	// Without anything that was installed or enabled by hand, without state, and without
	// consoles and sessions.
	for _, dir := range []string{"etc/systemd/system", "etc/nftwl", "usr/lib/systemd/system/multi-user.target.wants", "var"} {
		dir := m.disk(dir)
		nstest.Must(m, os.MkdirAll(dir, 0o755))
		nstest.Must(m, unix.Setxattr(dir, "trusted.overlay.opaque", []byte("y"), 0))
	}
	m.sparse()
	// Otherwise the first boot does what systemd does after an update.
	m.write("etc/.updated", "")
	m.write("var/.updated", "")
	nstest.Must(m, os.MkdirAll(m.disk("var/lib"), 0o755))
	nstest.Must(m, os.Symlink("../run", m.disk("var/run")))

	m.write("usr/bin/nftwl", nstest.Read(t, nstest.Build(t, "cmd/nftwl")))
	nstest.Must(m, os.Chmod(m.disk("usr/bin/nftwl"), 0o755))
	contrib := filepath.Join(nstest.Root(t), "contrib")
	m.copy(filepath.Join(contrib, "systemd"), "etc/systemd/system")
	nstest.Must(m, os.Remove(m.disk(clusterDropIn))) // for a cluster alone
	m.copy(filepath.Join(contrib, "nftables"), "etc/nftwl")
	m.write("etc/nftables.conf", nstest.Contrib(t, "nftables/nftables.conf"))
	// Tests restart it more often than its limit allows.
	m.write("etc/systemd/system/nftables.service.d/test.conf", "[Unit]\nStartLimitIntervalSec=0\n")
	t.Cleanup(func() {
		if m.pid != 0 {
			if t.Failed() {
				t.Logf("the journal:\n%s", m.journal())
			}
			m.kill()
		}
	})
	m.boot()
	return m
}

// sparse masks units and generators that no test needs. They would take a third of a
// boot's time, and the generators would also run at each daemon-reload.
func (m *machine) sparse() {
	m.Helper()
	masked := []string{"system/dev-hugepages.mount", "system/dev-mqueue.mount", "system/sys-fs-fuse-connections.mount",
		"system/systemd-sysusers.service", "system/systemd-update-utmp.service"}
	tree := m.lower[strings.LastIndex(m.lower, ":")+1:]
	generators, err := os.ReadDir(filepath.Join(tree, "usr/lib/systemd/system-generators"))
	nstest.Must(m, err)
	for _, g := range generators {
		masked = append(masked, "system-generators/"+g.Name())
	}
	for _, name := range masked {
		name = m.disk("etc/systemd/" + name)
		nstest.Must(m, os.MkdirAll(filepath.Dir(name), 0o755))
		nstest.Must(m, os.Symlink("/dev/null", name))
	}
}

// install does what the README tells the administrator to do.
func (m *machine) install() {
	m.Helper()
	m.run("systemctl", "enable", "--now", "nftables", "nftwl-persist")
	m.settle()
}

// disk returns the path of a file on the machine's disk, which hides the tree's.
func (m *machine) disk(path string) string { return filepath.Join(m.dir, "upper", path) }

// file returns the path of a file as the running machine sees it.
func (m *machine) file(path string) string {
	return filepath.Join("/proc", strconv.Itoa(m.pid), "root", path)
}

// write writes a file to the disk of a machine that is on or off.
func (m *machine) write(path, text string) {
	m.Helper()
	name := m.disk(path)
	if m.pid != 0 {
		name = m.file(path)
	}
	nstest.Must(m, os.MkdirAll(filepath.Dir(name), 0o755))
	nstest.Must(m, os.WriteFile(name, []byte(text), 0o644)) // an existing file keeps its mode
}

func (m *machine) copy(from, to string) {
	m.Helper()
	nstest.Must(m, filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(path, ".go") {
			return err
		}
		text, err := os.ReadFile(path)
		if err == nil {
			name, _ := filepath.Rel(from, path)
			m.write(filepath.Join(to, name), string(text))
		}
		return err
	}))
}

const bootName = "nftwl-test-boot"

// boot starts PID 1 with an empty ruleset, and waits until the machine is up.
func (m *machine) boot() {
	m.Helper()
	if m.pid != 0 {
		m.Fatal("the machine is on")
	}
	var err error
	m.group, err = os.MkdirTemp(groupRoot(), groupPrefix())
	nstest.Must(m, err)
	fd, err := os.Open(m.group)
	nstest.Must(m, err)
	defer fd.Close()
	cmd := exec.Command("/proc/self/exe", m.lower, m.dir)
	cmd.Args[0] = bootName
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		// systemd makes control groups below this one, and deletes only its own.
		UseCgroupFD: true,
		CgroupFD:    int(fd.Fd()),
		Setsid:      true,
	}
	nstest.Must(m, cmd.Start())
	m.pid = cmd.Process.Pid
	m.exited = make(chan syscall.WaitStatus, 1)
	go func() {
		_ = cmd.Wait() // the tests look at the status
		m.exited <- cmd.ProcessState.Sys().(syscall.WaitStatus)
	}()
	nstest.Until(m, "systemd is up", func() error {
		select {
		case status := <-m.exited:
			m.pid = 0
			m.Fatalf("PID 1 exits with %v: %s", status, out.String())
		default:
		}
		// Once systemd answers, this waits, instead of asking again and again during the
		// boot.
		state, err := m.try("systemctl", "is-system-running", "--wait")
		switch strings.TrimSpace(state) {
		case "running", "degraded":
			return nil
		}
		return fmt.Errorf("%s%v", state, err)
	})
	m.settle()
}

// boot runs as PID 1, and becomes systemd.
func boot(args []string) error {
	lower, dir := args[0], args[1]
	// Its control group becomes the root of those that it sees. The thread that unshares
	// must also call exec.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare cgroup namespace: %w", err)
	}
	root := filepath.Join(dir, "root")
	for _, d := range []string{"work", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	const ro, nodev, nosuid, noexec = unix.MS_RDONLY, unix.MS_NODEV, unix.MS_NOSUID, unix.MS_NOEXEC
	for _, mnt := range []struct {
		kind, on string
		flags    uintptr
		options  string
	}{
		{"overlay", "", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, dir, dir)},
		{"proc", "proc", nodev | nosuid | noexec, ""},
		{"sysfs", "sys", ro | nodev | nosuid | noexec, ""},
		{"cgroup2", "sys/fs/cgroup", nodev | nosuid | noexec, ""},
		{"tmpfs", "run", nodev | nosuid, "mode=755"},
		{"tmpfs", "tmp", nodev | nosuid, ""},
		{"tmpfs", "dev", nosuid, "mode=755"},
	} {
		if err := unix.Mount(mnt.kind, filepath.Join(root, mnt.on), mnt.kind, mnt.flags, mnt.options); err != nil {
			return fmt.Errorf("mount %s on /%s: %w", mnt.kind, mnt.on, err)
		}
	}
	for name, number := range map[string]uint64{
		"null": unix.Mkdev(1, 3), "zero": unix.Mkdev(1, 5), "full": unix.Mkdev(1, 7),
		"random": unix.Mkdev(1, 8), "urandom": unix.Mkdev(1, 9), "tty": unix.Mkdev(5, 0), "net/tun": unix.Mkdev(10, 200),
	} {
		name = filepath.Join(root, "dev", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), unix.Mknod(name, unix.S_IFCHR, int(number)), os.Chmod(name, 0o666)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, d := range []string{"pts", "shm"} {
		if err := os.Mkdir(filepath.Join(root, "dev", d), 0o755); err != nil {
			return err
		}
	}
	if err := errors.Join(
		unix.Mount("devpts", filepath.Join(root, "dev/pts"), "devpts", 0, "newinstance,ptmxmode=0666"),
		os.Symlink("pts/ptmx", filepath.Join(root, "dev/ptmx")),
	); err != nil {
		return err
	}
	// The machine must not change the host's sysctls. It has the host's boot id, because
	// another one, mounted here, would be missing in the units' own /proc.
	sysctl := filepath.Join(root, "proc/sys")
	err := unix.Mount(sysctl, sysctl, "", unix.MS_BIND, "")
	if err == nil {
		err = unix.Mount("", sysctl, "", unix.MS_BIND|unix.MS_REMOUNT|ro, "")
	}
	if err != nil {
		return fmt.Errorf("/proc/sys read-only: %w", err)
	}
	// Nor must it change the host's modules, clock and devices.
	for _, c := range []uintptr{unix.CAP_SYS_MODULE, unix.CAP_SYS_TIME, unix.CAP_SYS_RAWIO} {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return err
		}
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	// The old root is then mounted on the new one: see pivot_root(2).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	// As systemd does outside of a container: a process of its own mounts credentials,
	// and the mounts must spread from there.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the mounts: %w", err)
	}
	return unix.Exec("/lib/systemd/systemd", []string{"/lib/systemd/systemd", "--system", "--unit=multi-user.target"},
		[]string{"container=nftwl-test", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"})
}

// off waits until a signal has ended PID 1. From outside of a PID namespace, a reboot
// looks like SIGHUP, and a power-off like SIGINT (reboot(2)).
func (m *machine) off(signal syscall.Signal) {
	m.Helper()
	select {
	case status := <-m.exited:
		m.pid = 0
		if err := removeGroup(m.group); err != nil {
			m.Error(err)
		}
		if !status.Signaled() || status.Signal() != signal {
			m.Fatalf("PID 1 ended with %#x, want %v", status, signal)
		}
	case <-time.After(nstest.Patience):
		m.Fatalf("the machine does not go down:\n%s", m.journal())
	}
}

// reboot, powerOff and kill are the ways to end a machine.
func (m *machine) reboot() {
	m.Helper()
	m.run("systemctl", "reboot")
	m.off(syscall.SIGHUP)
	m.boot()
}

func (m *machine) powerOff() {
	m.Helper()
	m.run("systemctl", "poweroff")
	m.off(syscall.SIGINT)
}

func (m *machine) kill() {
	m.Helper()
	nstest.Must(m, unix.Kill(m.pid, unix.SIGKILL))
	m.off(syscall.SIGKILL)
}

// command returns a command that runs on the machine.
func (m *machine) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", strconv.Itoa(m.pid), "-m", "-u", "-i", "-n", "-p", "-C", program}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"}
	return cmd
}

// try runs a program on the machine.
func (m *machine) try(program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), nstest.Patience)
	defer cancel()
	out, err := m.command(ctx, program, args...).CombinedOutput()
	return string(out), err
}

// findings returns nftwl doctor's results in a group of checks, or in all.
func (m *machine) findings(groups ...string) []nstest.Finding {
	m.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), nstest.Patience)
	defer cancel()
	return nstest.Findings(m, m.command(ctx, "nftwl", "doctor", "--json"), groups...)
}

func (m *machine) run(program string, args ...string) string {
	m.Helper()
	out, err := m.try(program, args...)
	if err != nil {
		m.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
	return out
}

// fails runs a program that must fail, and returns its output.
func (m *machine) fails(program string, args ...string) string {
	m.Helper()
	out, err := m.try(program, args...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		m.Fatalf("%s %s does not fail: %v\n%s", program, strings.Join(args, " "), err, out)
	}
	return out
}

// settle waits until no jobs are left. systemctl waits only for the unit that it is given,
// not for those that follow.
func (m *machine) settle() {
	m.Helper()
	nstest.Until(m, "no jobs", func() error {
		out, err := m.try("systemctl", "list-jobs", "--no-legend", "--plain")
		if err == nil && strings.TrimSpace(out) != "" && !strings.Contains(out, "No jobs") {
			err = errors.New(out)
		}
		return err
	})
}

// state checks a unit's state.
func (m *machine) state(unit, want string) {
	m.Helper()
	got, _ := m.try("systemctl", "is-active", unit)
	if strings.TrimSpace(got) != want {
		m.Errorf("%s is %s, want %s", unit, strings.TrimSpace(got), want)
	}
}

func (m *machine) journal(args ...string) string {
	out, _ := m.try("journalctl", append([]string{"--boot", "--no-pager", "--output=short-precise"}, args...)...)
	return out
}

// An entry of the journal about a job, which PID 1 has written.
type entry struct {
	Unit    string `json:"UNIT"`
	Job     string `json:"JOB_TYPE"`
	Result  string `json:"JOB_RESULT"`
	Message any    `json:"MESSAGE"`
}

func (m *machine) jobs(kind string) (done []string) {
	m.Helper()
	for _, line := range lines(m.run("journalctl", "--boot", "--no-pager", "--output=json", "JOB_TYPE="+kind)) {
		var e entry
		nstest.Must(m, json.Unmarshal([]byte(line), &e))
		if e.Result != "" {
			done = append(done, e.Unit+" "+e.Result)
		} else {
			done = append(done, e.Unit)
		}
	}
	return done
}

// Control groups outlive the processes in them and the namespaces. The names of a run's
// groups begin with groupPrefix.
func groupPrefix() string { return filepath.Base(os.Getenv(scratch)) + "-" }

// groupRoot is where enter mounts cgroup2, wherever the host has it.
func groupRoot() string { return filepath.Join(os.Getenv(scratch), "cgroup") }

func removeGroup(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeGroup(filepath.Join(dir, e.Name())))
		}
	}
	// Processes that have just ended can still be counted.
	for range 100 {
		e := unix.Rmdir(dir)
		if e != unix.EBUSY {
			return errors.Join(err, e)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.Join(err, fmt.Errorf("%s is busy", dir))
}

// shows checks a property of a unit.
func (m *machine) shows(unit, property, want string) {
	m.Helper()
	if got := m.property(unit, property); got != want {
		m.Errorf("%s has %s=%s, want %s", unit, property, got, want)
	}
}

func (m *machine) property(unit, name string) string {
	m.Helper()
	return strings.TrimSpace(m.run("systemctl", "show", "--value", "--property="+name, unit))
}
