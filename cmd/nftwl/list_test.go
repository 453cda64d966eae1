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

// tty is a user's terminal.
type tty struct {
	keys *os.File
	mu   sync.Mutex
	text []byte // everything that was written to it
	end  chan struct{}
}

// startOn starts a command on a terminal with a size. It is the controlling terminal.
func startOn(t *testing.T, columns, rows uint16, cmd *exec.Cmd) *tty {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	y := &tty{keys: os.NewFile(uintptr(fd), "terminal"), end: make(chan struct{})}
	t.Cleanup(func() { y.keys.Close() })
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows}); err != nil {
		t.Fatal(err)
	}
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
				return // EIO: nobody has the terminal open
			}
			y.mu.Lock()
			y.text = append(y.text, b[:n]...)
			y.mu.Unlock()
		}
	}()
	return y
}

func (y *tty) written() string {
	y.mu.Lock()
	defer y.mu.Unlock()
	return strings.ReplaceAll(string(y.text), "\r", "")
}

// wait waits for the command to end.
func (y *tty) wait(t *testing.T, cmd *exec.Cmd) (text string, code int) {
	t.Helper()
	ended := time.AfterFunc(limit, func() { _ = cmd.Process.Kill() })
	defer ended.Stop()
	_ = cmd.Wait() // the exit status shows whether it failed
	<-y.end
	return y.written(), cmd.ProcessState.ExitCode()
}

const fourSets = `
table inet filter {
	set trusted_ipv4 { type ipv4_addr . inet_service; flags timeout; }
	set trusted_ipv6 { type ipv6_addr . inet_service; flags timeout; }
	set banned_ipv4 { type ipv4_addr . inet_service; flags timeout; }
	set banned_ipv6 { type ipv6_addr; flags timeout; }
}
`

// Each address has a line of any length: nothing is cut.
func TestList(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, fourSets+`
add element inet filter trusted_ipv4 { 192.0.2.7 . 143, 192.0.2.7 . 993, 192.0.2.7 . 995 }
add element inet filter trusted_ipv4 {
	192.0.2.8 . 143 timeout 1d expires 20h59s comment "carol, of the office in Trier",
	192.0.2.8 . 465 timeout 1d expires 20h59s, 192.0.2.8 . 587 timeout 1d expires 20h59s,
	192.0.2.8 . 993 timeout 1d expires 20h59s, 192.0.2.8 . 995 timeout 1d expires 20h59s }
add element inet filter trusted_ipv6 { 2001:db8:1:2:3:4:5:6 . 993 timeout 30d expires 30d comment "Zoë" }
add element inet filter banned_ipv4 { 198.51.100.1 . 465 timeout 90d expires 8d59m comment "guessing" }
add element inet filter banned_ipv6 { 2001:db8:: timeout 90d expires 10d59m }
`)
	const want = `LIST     ADDRESS               PORTS                TIME LEFT  COMMENT
trusted  192.0.2.7             143,993,995          permanent
trusted  192.0.2.8             143,465,587,993,995  20h        carol, of the office in Trier
trusted  2001:db8:1:2:3:4:5:6  993                  TIME       Zoë
banned   198.51.100.1          465                  8d         guessing
banned   2001:db8::/64         all                  10d
`
	left := regexp.MustCompile(`30d   |29d23h`)
	cmd := nftwl(t, []string{"TERM=xterm"}, "list")
	on, code := startOn(t, 40, 24, cmd).wait(t, cmd)
	if on = left.ReplaceAllString(on, "TIME  "); on != want || code != 0 {
		t.Errorf("on a terminal: exit %d\n%swant\n%s", code, on, want)
	}
	if out, _, _ := output(t, nftwl(t, nil, "list")); left.ReplaceAllString(out, "TIME  ") != want {
		t.Errorf("through a pipe:\n%s", out)
	}
}

// On a terminal, and only there, a note reports an empty list.
func TestListEmpty(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, fourSets)
	for _, test := range []struct{ args, want string }{
		{"list", "nftwl: no address is trusted, banned or limited\n"},
		{"list banned", "nftwl: no address is banned\n"},
		{"list --json", "[]\n"},
	} {
		cmd := nftwl(t, nil, strings.Fields(test.args)...)
		if got, code := startOn(t, 80, 24, cmd).wait(t, cmd); got != test.want || code != 0 {
			t.Errorf("%s: exit %d, %q, want %q", test.args, code, got, test.want)
		}
	}
	if out, errs, code := output(t, nftwl(t, nil, "list")); out+errs != "" || code != 0 {
		t.Errorf("through a pipe: exit %d, %q", code, out+errs)
	}
}

// A user chooses the comment of an element, their name. list must print only its visible
// characters, in their order.
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
