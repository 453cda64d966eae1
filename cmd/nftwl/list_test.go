package main

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// tty is a terminal as its user has it.
type tty struct {
	keys *os.File
	fd   int
	mu   sync.Mutex
	text []byte // all that was written to it
	end  chan struct{}
}

// startOn starts a command on a terminal of a size, which controls it.
func startOn(t *testing.T, columns, rows uint16, cmd *exec.Cmd) *tty {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	y := &tty{keys: os.NewFile(uintptr(fd), "terminal"), fd: fd, end: make(chan struct{})}
	t.Cleanup(func() { y.keys.Close() })
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	y.resize(t, columns, rows)
	program, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = program, program, program
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	go func() {
		defer close(y.end)
		for b := make([]byte, 4096); ; {
			n, err := y.keys.Read(b)
			if err != nil {
				return // EIO: nobody has it open any more
			}
			y.mu.Lock()
			y.text = append(y.text, b[:n]...)
			y.mu.Unlock()
		}
	}()
	return y
}

func (y *tty) resize(t *testing.T, columns, rows uint16) {
	t.Helper()
	if err := unix.IoctlSetWinsize(y.fd, unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows}); err != nil {
		t.Fatal(err)
	}
}

func (y *tty) written() string {
	y.mu.Lock()
	defer y.mu.Unlock()
	return strings.ReplaceAll(string(y.text), "\r", "")
}

// wait ends with the command.
func (y *tty) wait(t *testing.T, cmd *exec.Cmd) (text string, code int) {
	t.Helper()
	ended := time.AfterFunc(limit, func() { _ = cmd.Process.Kill() })
	defer ended.Stop()
	_ = cmd.Wait() // the code tells
	<-y.end
	return y.written(), cmd.ProcessState.ExitCode()
}

// until waits for something to be on the screen of nftwl list --watch, and
// returns the lines of it.
func (y *tty) until(t *testing.T, what string, ok func(screen []string) bool) {
	t.Helper()
	var lines []string
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		text := y.written()
		screen, whole := strings.CutSuffix(text[strings.LastIndex(text, "\x1b[H")+1:], "\x1b[J")
		lines = strings.Split(strings.TrimPrefix(screen, "[H"), "\x1b[K\n")
		if whole && ok(lines) {
			return
		}
	}
	t.Fatalf("%s is not on the screen:\n%q", what, lines)
}

const fourSets = `
table inet filter {
	set trusted_ipv4 { type ipv4_addr . inet_service; flags timeout; }
	set trusted_ipv6 { type ipv6_addr . inet_service; flags timeout; }
	set banned_ipv4 { type ipv4_addr . inet_service; flags timeout; }
	set banned_ipv6 { type ipv6_addr; flags timeout; }
}
`

const listedElements = `
add element inet filter trusted_ipv4 { 192.0.2.7 . 143, 192.0.2.7 . 993, 192.0.2.7 . 995 }
add element inet filter trusted_ipv4 {
	192.0.2.8 . 143 timeout 1d expires 20h59s comment "carol, of the office in Trier",
	192.0.2.8 . 465 timeout 1d expires 20h59s, 192.0.2.8 . 587 timeout 1d expires 20h59s,
	192.0.2.8 . 993 timeout 1d expires 20h59s, 192.0.2.8 . 995 timeout 1d expires 20h59s }
add element inet filter trusted_ipv6 { 2001:db8:1:2:3:4:5:6 . 993 timeout 30d expires 30d comment "漢字漢字漢字漢字" }
add element inet filter banned_ipv4 { 198.51.100.1 . 465 timeout 90d expires 8d59m comment "guessing" }
add element inet filter banned_ipv6 { 2001:db8:: timeout 90d expires 10d59m }
`

// Each width has the most that fits into it, and never less than the addresses.
func TestListWidths(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, fourSets+listedElements)
	const whole = `
LIST     ADDRESS               PORTS                TIME LEFT  COMMENT
trusted  2001:db8:1:2:3:4:5:6  993                  LIFE       漢字漢字漢字漢字
trusted  192.0.2.8             143,465,587,993,995  20h        carol, of the office in Trier
trusted  192.0.2.7             143,993,995          permanent
banned   2001:db8::/64         all                  10d
banned   198.51.100.1          465                  8d         guessing
`
	for _, test := range []struct {
		columns uint16
		want    string
	}{
		{0, whole},
		{92, whole},
		{80, `
LIST     ADDRESS               PORTS                TIME LEFT  COMMENT
trusted  2001:db8:1:2:3:4:5:6  993                  LIFE       漢字漢字漢字漢字
trusted  192.0.2.8             143,465,587,993,995  20h        carol, of the of…
trusted  192.0.2.7             143,993,995          permanent
banned   2001:db8::/64         all                  10d
banned   198.51.100.1          465                  8d         guessing
`},
		{66, `
LIST     ADDRESS               PORTS    TIME LEFT  COMMENT
trusted  2001:db8:1:2:3:4:5:6  993      LIFE       漢字漢字漢字漢…
trusted  192.0.2.8             all 5    20h        carol, of the…
trusted  192.0.2.7             3 ports  permanent
banned   2001:db8::/64         all      10d
banned   198.51.100.1          465      8d         guessing
`},
		{60, `
LIST     ADDRESS               PORTS    TIME LEFT
trusted  2001:db8:1:2:3:4:5:6  993      LIFE
trusted  192.0.2.8             all 5    20h
trusted  192.0.2.7             3 ports  permanent
banned   2001:db8::/64         all      10d
banned   198.51.100.1          465      8d
`},
		{45, `
LIST     ADDRESS               TIME LEFT
trusted  2001:db8:1:2:3:4:5:6  LIFE
trusted  192.0.2.8             20h
trusted  192.0.2.7             permanent
banned   2001:db8::/64         10d
banned   198.51.100.1          8d
`},
		{39, `
LIST     ADDRESS
trusted  2001:db8:1:2:3:4:5:6
trusted  192.0.2.8
trusted  192.0.2.7
banned   2001:db8::/64
banned   198.51.100.1
`},
		{10, `
ADDRESS
2001:db8:1:2:3:4:5:6
192.0.2.8
192.0.2.7
2001:db8::/64
198.51.100.1
`},
	} {
		cmd := nftwl(t, []string{"TERM=dumb"}, "list")
		got, code := startOn(t, test.columns, 24, cmd).wait(t, cmd)
		got = regexp.MustCompile(`30d   |29d23h`).ReplaceAllString(got, "LIFE  ")
		got = strings.ReplaceAll(got, "LIFE  \n", "LIFE\n")
		if got != test.want[1:] || code != 0 {
			t.Errorf("%d columns: exit %d\n%swant\n%s", test.columns, code, got, test.want[1:])
		}
	}
	// What is not a terminal has no width.
	if out, _, _ := output(t, nftwl(t, []string{"TERM=xterm", "COLUMNS=40"}, "list")); !strings.Contains(out, "carol, of the office in Trier\n") || strings.Contains(out, "\x1b") {
		t.Errorf("through a pipe:\n%q", out)
	}
}

func TestListColours(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, fourSets+`
add element inet filter trusted_ipv4 { 192.0.2.7 . 143 timeout 1d expires 20h59s, 192.0.2.8 . 143, 192.0.2.9 . 143 timeout 1d expires 2h59s }
add element inet filter banned_ipv4 { 198.51.100.1 . 465 timeout 90d expires 80d59m }
`)
	const (
		plain = `LIST     ADDRESS       PORTS  TIME LEFT  COMMENT
trusted  192.0.2.7     143    20h
trusted  192.0.2.9     143    2h
trusted  192.0.2.8     143    permanent
banned   198.51.100.1  465    80d
`
		coloured = "\x1b[1mLIST\x1b[0m     \x1b[1mADDRESS\x1b[0m       \x1b[1mPORTS\x1b[0m  \x1b[1mTIME LEFT\x1b[0m  \x1b[1mCOMMENT\x1b[0m\n" +
			"trusted  192.0.2.7     143    20h\n" +
			"trusted  192.0.2.9     143    \x1b[2m2h\x1b[0m\n" +
			"trusted  192.0.2.8     143    \x1b[2mpermanent\x1b[0m\n" +
			"\x1b[31mbanned\x1b[0m   198.51.100.1  465    80d\n"
	)
	for _, test := range []struct {
		env  []string
		want string
	}{
		{[]string{"TERM=xterm"}, coloured},
		{[]string{"TERM=xterm", "NO_COLOR="}, coloured}, // no-color.org: when not empty
		{[]string{"TERM=xterm", "NO_COLOR=0"}, plain},
		{[]string{"TERM=dumb"}, plain},
		{nil, plain},
	} {
		cmd := nftwl(t, test.env, "list")
		if got, _ := startOn(t, 80, 24, cmd).wait(t, cmd); got != test.want {
			t.Errorf("%q:\n%q\nwant\n%q", test.env, got, test.want)
		}
	}
}

// A user's name is the comment of an element. It must not write to a terminal
// but what can be seen, in the order in which it is.
func TestListShowsCommentsAsTheyAre(t *testing.T) {
	nstest.New(t)
	for comment, want := range map[string]string{
		"a\x1b[31mb":             "a?[31mb",
		"a\u009b31mb":            "a?31mb",
		"a\u202eb":               "a?b",
		"a\u2066b":               "a?b",
		"a\u061cb":               "a?b",
		"a\u200bb":               "a?b",
		"a\u2060b":               "a?b",
		"a\u00adb":               "a?b",
		"a\ufeffb":               "a?b",
		"a\U000e0041b":           "a?b",
		"a\xffb":                 "a?b",
		"Zoë 漢字":                 "Zoë 漢字",
		"\u05d0\u05d1 of Haifa…": "\u05d0\u05d1 of Haifa…",
	} {
		nstest.Nft(t, "flush ruleset\n"+fourSets+`add element inet filter trusted_ipv4 { 192.0.2.7 . 143 comment "`+comment+`" }`)
		out, _, _ := output(t, nftwl(t, nil, "list"))
		if !strings.HasSuffix(out, "  "+want+"\n") {
			t.Errorf("%+q is shown as %+q", comment, out)
		}
	}
}

func TestListWatch(t *testing.T) {
	const (
		enter = "\x1b[?1049h\x1b[?25l\x1b[?7l"
		leave = "\x1b[?7h\x1b[?25h\x1b[?1049l"
	)
	add := func(t *testing.T, address string) {
		nstest.Nft(t, "add element inet filter trusted_ipv4 { "+address+" . 993 timeout 1h }")
	}
	has := func(words string) func([]string) bool {
		return func(screen []string) bool { return strings.Contains(strings.Join(screen, "\n"), words) }
	}
	watching := func(t *testing.T, args ...string) (*exec.Cmd, *tty) {
		t.Helper()
		nstest.New(t)
		nstest.Nft(t, fourSets)
		for i := range 20 {
			add(t, fmt.Sprint("192.0.2.", i+1))
		}
		cmd := nftwl(t, []string{"TERM=xterm"}, append([]string{"list"}, args...)...)
		return cmd, startOn(t, 70, 8, cmd)
	}
	ends := func(t *testing.T, cmd *exec.Cmd, y *tty) {
		t.Helper()
		text, code := y.wait(t, cmd)
		text = text[strings.LastIndex(text, "\x1b[J")+len("\x1b[J"):]
		text = strings.TrimPrefix(strings.TrimPrefix(text, "^C"), `^\`)
		if text != leave || code != 0 {
			t.Errorf("exit %d, and the last that it writes is %q", code, text)
		}
	}

	t.Run("what changes", func(t *testing.T) {
		cmd, y := watching(t, "--watch=50ms")
		y.until(t, "a full screen", has("trusted: 20  banned: 0  limited: 0"))
		if text := y.written(); !strings.HasPrefix(text, enter) {
			t.Errorf("it begins with %q", text[:min(len(text), 40)])
		}
		add(t, "203.0.113.7")
		y.until(t, "who came last, first", func(screen []string) bool {
			return len(screen) > 2 && strings.HasPrefix(screen[2], "trusted  203.0.113.7 ")
		})
		nstest.Nft(t, "delete table inet filter")
		y.until(t, "the error", has("nftwl: error: table inet filter does not exist"))
		nstest.Nft(t, fourSets)
		add(t, "203.0.113.8")
		y.until(t, "the table", has("trusted  203.0.113.8 "))
		fmt.Fprint(y.keys, "\x03") // Ctrl-C
		ends(t, cmd, y)
	})

	t.Run("the terminal's size", func(t *testing.T) {
		cmd, y := watching(t, "--watch=1h", "trusted")
		y.until(t, "8 lines", func(screen []string) bool {
			return len(screen) == 8 && screen[7] == "… and 15 more"
		})
		y.resize(t, 70, 24)
		y.until(t, "22 lines", func(screen []string) bool { return len(screen) == 22 && has("192.0.2.20 ")(screen) })
		y.resize(t, 20, 3)
		y.until(t, "two lines", func(screen []string) bool {
			return len(screen) == 2 && strings.HasSuffix(screen[0], "  trusted: 20") && screen[1] == "… and 20 more"
		})
		if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		ends(t, cmd, y)
	})

	t.Run("quit", func(t *testing.T) {
		cmd, y := watching(t, "--watch")
		y.until(t, "the table", has("trusted: 20"))
		fmt.Fprint(y.keys, "\x1c") // Ctrl-\
		ends(t, cmd, y)
	})

	t.Run("stopped and continued", func(t *testing.T) {
		cmd, y := watching(t, "--watch")
		y.until(t, "the table", has("trusted: 20"))
		fmt.Fprint(y.keys, "\x1a") // Ctrl-Z
		var status unix.WaitStatus
		for end := time.Now().Add(limit); !status.Stopped(); time.Sleep(2 * time.Millisecond) {
			if _, err := unix.Wait4(cmd.Process.Pid, &status, unix.WUNTRACED|unix.WNOHANG, nil); err != nil || time.Now().After(end) {
				t.Fatalf("not stopped: %v, status %#x", err, status)
			}
		}
		for end := time.Now().Add(limit); !strings.HasSuffix(y.written(), leave); time.Sleep(2 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("stopped with the screen like this: %q", y.written())
			}
		}
		before := len(y.written())
		if err := cmd.Process.Signal(unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(limit); !strings.Contains(y.written()[before:], enter+"\x1b[H"); time.Sleep(2 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("continued with %q", y.written()[before:])
			}
		}
		fmt.Fprint(y.keys, "\x03")
		ends(t, cmd, y)
	})
}
