package systemd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	service = "nftwl.service"
	socket  = "nftwl.socket"
	// Where Dovecot asks.
	socketFile = "run/nftwl/post-login"
)

// server returns the process id of nftwl serve, as the tests see it.
func (m *machine) server() (pid int) {
	m.Helper()
	m.until("nftwl serve runs", func() error {
		text, err := os.ReadFile(filepath.Join(m.group, "system.slice", service, "cgroup.procs"))
		if err != nil {
			return err
		}
		for _, id := range strings.Fields(string(text)) {
			// Before it is nftwl it is systemd.
			if name, err := os.ReadFile(proc(id, "comm")); err == nil && string(name) == "nftwl\n" {
				pid, err = strconv.Atoi(id)
				return err
			}
		}
		return fmt.Errorf("its processes: %q", text)
	})
	return pid
}

func proc(pid any, name string) string { return filepath.Join("/proc", fmt.Sprint(pid), name) }

type counters struct {
	Started time.Time
	Logins  int
	Failed  map[string]int
}

// status asks the server, and waits in the socket for its answer.
func (m *machine) status() (c counters) {
	m.Helper()
	m.must(json.Unmarshal([]byte(m.run("nftwl", "status", "--json")), &c))
	return c
}

// shows checks a property of a unit.
func (m *machine) shows(unit, property, want string) {
	m.Helper()
	if got := m.property(unit, property); got != want {
		m.Errorf("%s has %s=%s and not %s", unit, property, got, want)
	}
}

func (m *machine) property(unit, name string) string {
	m.Helper()
	return strings.TrimSpace(m.run("systemctl", "show", "--value", "--property="+name, unit))
}

// dropIn does what "systemctl edit" does.
func (m *machine) dropIn(text string) {
	m.Helper()
	m.write("etc/systemd/system/"+service+".d/override.conf", text)
	m.run("systemctl", "daemon-reload")
}

// installs replaces the program, as an upgrade does.
func (m *machine) installs(program []byte) {
	m.Helper()
	const name = "usr/bin/nftwl"
	m.write(name+".new", string(program))
	m.must(os.Chmod(m.file(name+".new"), 0o755))
	m.must(os.Rename(m.file(name+".new"), m.file(name)))
}

func (m *machine) program() []byte {
	m.Helper()
	program, err := os.ReadFile(m.file("usr/bin/nftwl"))
	m.must(err)
	return program
}

// logsIn has a client log in, who must not be denied.
func (m *machine) logsIn(n int) {
	m.Helper()
	if err := m.imap(client(n)); err != nil {
		m.Error(err)
	}
}

// Requests wait in the socket while there is no server, or an old one ends.
func TestServeRestarts(t *testing.T) {
	onEach(t, func(t *testing.T, b base) {
		m := newMachine(t, b)
		m.serve()
		program := m.program()
		steps := []string{"restart", "reload", "upgrade", "restart", "stop", "reload-or-restart", "restart", "stop", "upgrade"}
		const logins = 300
		n, denied := m.crowd(logins, func(turn func(int)) {
			for i, step := range steps {
				turn((i + 1) * logins / (len(steps) + 1))
				if step == "upgrade" {
					m.installs(program)
					step = "restart"
				}
				// Stopped, it is started by the next login.
				m.run("systemctl", step, "nftwl")
			}
		})
		for _, err := range denied {
			t.Errorf("of %d logins: %v", n, err)
		}
		m.trusts(upTo(n)...)
		// It is the new program that runs.
		exe, err := os.Readlink(proc(m.server(), "exe"))
		m.must(err)
		if exe != "/usr/bin/nftwl" {
			t.Errorf("it runs %s", exe)
		}
	})
}

func upTo(n int) (numbers []int) {
	for i := range n {
		numbers = append(numbers, i+1)
	}
	return numbers
}

// A server that dies takes along what is in its hands, and nothing else.
func TestServeKilled(t *testing.T) {
	onEach(t, func(t *testing.T, b base) {
		m := newMachine(t, b)
		m.serve()
		var lost int
		var slowest time.Duration
		// Oftener than systemd starts an unprepared unit.
		n, denied := m.crowd(0, func(func(int)) {
			for range 7 {
				pid := m.server()
				lost += m.hold(pid)
				killed := time.Now()
				m.must(unix.Kill(pid, unix.SIGKILL))
				if s := m.status(); s.Started.Before(killed) {
					t.Errorf("killed at %v, it has run since %v", killed, s.Started)
				}
				slowest = max(slowest, time.Since(killed))
			}
		})
		t.Logf("%d logins, of which %d were denied and %d in hand; back after %v at most", n, len(denied), lost, slowest)
		if len(denied) > lost {
			t.Errorf("%d logins were denied, and %d in hand: %v", len(denied), lost, errors.Join(denied...))
		}
		if slowest > time.Second {
			t.Errorf("it was back after %v", slowest)
		}
		m.shows(service, "NRestarts", "7")
		m.state(service, "active")
		m.state(socket, "active")
	})
}

// hold stops the server where it is, and returns how many requests it has in
// its hands: not those that wait in the socket, and not those whose mail
// process has gone on.
func (m *machine) hold(pid int) (n int) {
	m.Helper()
	m.must(unix.Kill(pid, unix.SIGSTOP))
	m.until("all threads have stopped", func() error {
		threads, err := filepath.Glob(proc(pid, "task/*/stat"))
		for _, name := range threads {
			stat, err := os.ReadFile(name)
			if err == nil && !strings.Contains(string(stat), ") T ") {
				err = errors.New(string(stat))
			}
			if err != nil {
				return err
			}
		}
		return err
	})
	held := make(map[string]bool)
	files, err := filepath.Glob(proc(pid, "fd/*"))
	m.must(err)
	for _, name := range files {
		link, err := os.Readlink(name)
		m.must(err)
		held[link] = true
	}
	for _, line := range lines(m.run("ss", "--unix", "--no-header", "state", "connected", "src", "/"+socketFile)) {
		// Type, state, queues, path, number; the peer's path and number, which
		// is 0 once it has closed.
		f := strings.Fields(line)
		if len(f) != 8 {
			m.Fatalf("ss: %s", line)
		}
		if held["socket:["+f[5]+"]"] && f[7] != "0" {
			n++
		}
	}
	return n
}

// An upgrade that goes wrong: logins wait until there is a program again.
func TestServeBroken(t *testing.T) {
	onEach(t, func(t *testing.T, b base) {
		m := newMachine(t, b)
		m.serve()
		program := m.program()
		m.installs([]byte("no program\n"))
		m.fails("systemctl", "restart", "nftwl")
		_, denied := m.crowd(1, func(func(int)) {
			m.until("it has failed often", func() error {
				if n, err := strconv.Atoi(m.property(service, "NRestarts")); err != nil || n < 7 {
					return fmt.Errorf("%d times, %v", n, err)
				}
				return nil
			})
			m.installs(program)
		})
		for _, err := range denied {
			t.Error(err)
		}
		m.trusts(upTo(atOnce)...)
		m.state(service, "active")
		m.state(socket, "active")
	})
}

func TestServeStop(t *testing.T) {
	onEach(t, func(t *testing.T, b base) {
		m := newMachine(t, b)
		m.serve()
		// What is in its hands is answered first.
		conn, err := net.Dial("unix", m.file(socketFile))
		m.must(err)
		defer conn.Close()
		m.must(conn.SetDeadline(time.Now().Add(patience)))
		_, err = fmt.Fprintf(conn, "VERSION\tscript-login\t1\t0\n")
		m.must(err)
		m.status() // which it takes after the other
		m.run("systemctl", "stop", "--no-block", "nftwl")
		m.until("it stops", func() error {
			if state := m.property(service, "ActiveState"); state != "deactivating" {
				return errors.New(state)
			}
			return nil
		})
		_, err = fmt.Fprintf(conn, "%s\t%s\talice\n", mailServer, client(1))
		m.must(err)
		answer := make([]byte, len("alice\n"))
		if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != "alice\n" {
			t.Errorf("the answer is %q, %v", answer, err)
		}
		conn.Close()
		m.settle()
		m.state(service, "inactive")
		m.shows(service, "Result", "success")
		m.shows(service, "ExecMainCode", "1") // CLD_EXITED
		m.shows(service, "ExecMainStatus", "0")
		m.state(socket, "active")
		m.logsIn(2)
		m.trusts(1, 2)
		m.state(service, "active")
		// More starts than systemd lets an unprepared socket trigger at once.
		m.run("sh", "-c", "for i in $(seq 25); do systemctl stop nftwl && nftwl status || exit; done")
		m.state(socket, "active")
		m.logsIn(3)
	})
}

// One that hangs is killed, and requests wait for the next.
func TestServeWatchdog(t *testing.T) {
	t.Parallel()
	onEach(t, func(t *testing.T, b base) {
		t.Parallel()
		m := newMachine(t, b)
		m.serve()
		m.dropIn("[Service]\nWatchdogSec=3s\n")
		m.run("systemctl", "restart", "nftwl")
		pid := m.server()
		said := func() time.Duration {
			at, err := time.ParseDuration(m.property(service, "WatchdogTimestampMonotonic") + "us")
			m.must(err)
			return at
		}
		start := said()
		m.until("it says again that it is alive", func() error {
			if said() < start+500*time.Millisecond {
				return errors.New("it did at its start")
			}
			return nil
		})
		if n := m.hold(pid); n != 0 {
			t.Errorf("%d requests in hand", n)
		}
		m.logsIn(1)
		m.trusts(1)
		if m.server() == pid {
			t.Error("it has not been replaced")
		}
		if log := m.journal("--unit=nftwl"); !strings.Contains(log, "Watchdog timeout") {
			t.Errorf("the journal:\n%s", log)
		}
	})
}

// A bad configuration is refused, and shows.
func TestServeReload(t *testing.T) {
	onEach(t, func(t *testing.T, b base) {
		m := newMachine(t, b)
		m.serve()
		// trustsFor has clients log in until one is trusted for so long.
		var n int
		trustsFor := func(want time.Duration) {
			t.Helper()
			m.until(fmt.Sprintf("trusted for %v", want), func() error {
				n++
				m.logsIn(n)
				life, ok := m.elements()[element{"trusted", client(n), 993}]
				if !ok || (time.Until(life.until)-want).Abs() > time.Minute {
					return fmt.Errorf("%v, for %v", ok, time.Until(life.until))
				}
				return nil
			})
		}
		errorsLogged := func() string {
			return m.run("journalctl", "--boot", "--no-pager", "--unit=nftwl", "--priority=err", "--output=cat")
		}
		refuses := func(want bool) {
			t.Helper()
			m.until(fmt.Sprintf("refused: %v", want), func() error {
				got := m.run("systemctl", "status", "nftwl")
				if strings.Contains(got, `Status: "The configuration is refused: `) != want {
					return errors.New(got)
				}
				return nil
			})
		}
		trustsFor(24 * time.Hour)
		pid := m.server()
		m.write("etc/nftwl.yaml", "timeout: 1h\n")
		m.run("systemctl", "reload", "nftwl")
		trustsFor(time.Hour)
		if log := errorsLogged(); strings.Contains(log, "nftwl: ") {
			t.Errorf("errors in the journal: %s", log)
		}

		m.write("etc/nftwl.yaml", "ports: [143]\ntimeout: soon\n")
		m.run("systemctl", "reload", "nftwl")
		refuses(true)
		if log := errorsLogged(); !regexp.MustCompile(`(?m)^nftwl: error: config: .*timeout.*the old one stays in use$`).MatchString(log) {
			t.Errorf("errors in the journal: %s", log)
		}
		trustsFor(time.Hour)
		if m.server() != pid {
			t.Error("it has been replaced")
		}

		// At its start there is no old one.
		m.run("systemctl", "restart", "nftwl")
		refuses(true)
		m.logsIn(300)
		if s := m.status(); s.Logins != 1 || s.Failed["config"] != 1 {
			t.Errorf("its counters: %+v", s)
		}
		m.write("etc/nftwl.yaml", "timeout: 2h\n")
		m.run("systemctl", "reload", "nftwl")
		refuses(false)
		trustsFor(2 * time.Hour)
	})
}

func TestServeSandbox(t *testing.T) {
	onEach(t, func(t *testing.T, b base) {
		m := newMachine(t, b)
		m.serve()
		m.logsIn(1)
		text, err := os.ReadFile(proc(m.server(), "status"))
		m.must(err)
		is := make(map[string]string)
		for _, line := range lines(string(text)) {
			key, value, _ := strings.Cut(line, ":")
			is[key] = strings.TrimSpace(value)
		}
		const netAdmin = "0000000000001000" // CAP_NET_ADMIN, capability.h
		for key, want := range map[string]string{
			"CapInh": netAdmin, "CapPrm": netAdmin, "CapEff": netAdmin, "CapBnd": netAdmin, "CapAmb": netAdmin,
			"NoNewPrivs": "1",
			"Seccomp":    "2", // SECCOMP_MODE_FILTER
		} {
			if is[key] != want {
				t.Errorf("%s is %s", key, is[key])
			}
		}
		ids := strings.Fields(is["Uid"])
		// Those of dynamic users, see systemd.exec(5).
		if uid, err := strconv.Atoi(ids[0]); err != nil || uid < 61184 || uid > 65519 {
			t.Errorf("its user is %s", is["Uid"])
		}

		info, err := os.Stat(m.file(socketFile))
		m.must(err)
		if owner := info.Sys().(*syscall.Stat_t).Uid; info.Mode() != os.ModeSocket|0o600 || owner != 0 {
			t.Errorf("the socket has mode %v and is user %d's", info.Mode(), owner)
		}
		const nobody = "65534"
		if out := m.fails("setpriv", "--reuid="+nobody, "--clear-groups", "nftwl", "status"); !strings.Contains(out, "permission denied") {
			t.Errorf("nobody asks: %s", out)
		}

		// It can write where every user can, and nowhere else.
		table, err := os.ReadFile(proc(m.server(), "mountinfo"))
		m.must(err)
		find := []string{"--target", m.property(service, "MainPID"), "--mount",
			"setpriv", "--reuid=" + ids[0], "--regid=" + ids[0], "--clear-groups",
			"sh", "-c", `find "$@" -xdev '(' -type d -o -type f ')' -writable 2>/dev/null || :`, "find"}
		for _, line := range lines(string(table)) {
			f := strings.Fields(line) // see proc_pid_mountinfo(5)
			where, options := f[4], strings.Split(f[5], ",")
			if !slices.Contains(options, "rw") || where == "/proc" {
				continue
			}
			if !regexp.MustCompile(`^/(dev|run|sys|tmp|var/tmp)(/|$)`).MatchString(where) {
				t.Errorf("%s is mounted with %s", where, f[5])
			}
			find = append(find, where)
		}
		for _, name := range lines(m.run("nsenter", find...)) {
			if !slices.Contains([]string{"/dev/mqueue", "/dev/shm", "/run/lock", "/tmp", "/var/tmp"}, name) {
				t.Errorf("it can write to %s", name)
			}
		}

		// Where Dovecot's mail processes are a user's, as nftwl.socket says.
		m.write("etc/systemd/system/"+socket+".d/override.conf", "[Socket]\nSocketUser=nobody\n")
		m.run("systemctl", "daemon-reload")
		m.run("systemctl", "restart", socket)
		m.run("setpriv", "--reuid="+nobody, "--clear-groups", "nftwl", "status")
		m.logsIn(2)
		m.trusts(1, 2)
	})
}

func TestServeMetrics(t *testing.T) {
	t.Parallel()
	onEach(t, func(t *testing.T, b base) {
		t.Parallel()
		m := newMachine(t, b)
		m.serve()
		// What the comment in the unit says: a drop-in, a line of the
		// configuration, and a command.
		unit, err := os.ReadFile(m.file("etc/systemd/system/" + service))
		m.must(err)
		says := regexp.MustCompile(`(?m)^#   (.*)$`).FindAllStringSubmatch(string(unit), -1)
		if len(says) != 4 {
			t.Fatalf("the comment says %q", says)
		}
		m.dropIn(says[0][1] + "\n" + says[1][1] + "\n")
		m.write("etc/nftwl.yaml", says[2][1]+"\n")
		m.run("systemctl", "restart", "nftwl")
		const folder = "var/lib/prometheus/node-exporter"
		m.must(os.MkdirAll(m.file(folder), 0o755))
		m.run("sh", "-c", says[3][1])

		m.logsIn(1)
		m.run("systemctl", "reload", "nftwl") // or they are written in ten seconds
		// The node exporter is a user of its own.
		var text string
		m.until("the counters are written", func() error {
			text, err = m.try("setpriv", "--reuid=65534", "--clear-groups", "cat", "/"+folder+"/nftwl.prom")
			if err == nil && !strings.Contains(text, "\nnftwl_logins_total{result=\"new\"} 1\n") {
				err = errors.New("not yet")
			}
			if err != nil {
				return fmt.Errorf("%w\n%s", err, text)
			}
			return nil
		})
		// https://prometheus.io/docs/instrumenting/exposition_formats/
		valid := regexp.MustCompile(`^(# HELP \w+ .+|# TYPE \w+ (counter|gauge|histogram)|\w+(\{\w+="[^"\\]*"\})? [-+.e0-9]+)$`)
		for _, line := range lines(text) {
			if !valid.MatchString(line) {
				t.Errorf("not in Prometheus' format: %s", line)
			}
		}
	})
}

func TestServeBoot(t *testing.T) {
	onEach(t, func(t *testing.T, b base) {
		m := newMachine(t, b)
		m.serve()
		for _, unit := range []string{service, socket} {
			m.run("systemctl", "is-enabled", unit)
		}
		m.run("systemctl", "enable", "dovecot")
		m.reboot()
		m.addresses()
		m.noCycle()
		boot := m.jobs("start")
		order := []int{
			slices.Index(boot, socket),
			slices.Index(boot, socket+" done"),
			slices.Index(boot, service),
			slices.Index(boot, service+" done"),
			slices.Index(boot, "dovecot.service"),
			slices.Index(boot, "dovecot.service done"),
		}
		sets := slices.Index(boot, "nftwl-persist.service done")
		if order[0] < 0 || !slices.IsSorted(order) || sets < 0 || sets > order[2] {
			t.Errorf("the jobs of a boot: %q", boot)
		}
		m.logsIn(1)
		m.trusts(1)

		// The firewall's restart is none of the server's.
		was := m.server()
		m.run("systemctl", "restart", nftables)
		m.settle()
		m.logsIn(2)
		m.trusts(1, 2)
		if m.server() != was {
			t.Error("it was restarted with the firewall")
		}

		m.run("systemctl", "disable", "--now", "nftwl", "nftwl.socket")
		m.state(service, "inactive")
		m.state(socket, "inactive")
		for _, unit := range []string{service, socket} {
			if out := m.fails("systemctl", "is-enabled", unit); out != "disabled\n" {
				t.Errorf("%s is %s", unit, out)
			}
		}
	})
}
