package main

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// picture is what there was to be seen at a time.
type picture struct {
	at        time.Time
	lists     []list
	addresses []listed
	ports     []uint16 // configured
	errs      []error
}

// look opens everything anew, so that it goes on after whatever failed.
func look(configPath string, lists []list) *picture {
	p := &picture{at: time.Now(), lists: lists}
	s, err := open(configPath)
	if err != nil {
		p.errs = []error{err}
		return p
	}
	defer s.conn.Close()
	var rows []row
	rows, p.errs = s.rows(lists)
	p.addresses, p.ports = byAddress(rows), s.Ports
	return p
}

// watch shows the lists on the terminal until it is interrupted.
func watch(configPath string, lists []list, every time.Duration) error {
	const (
		// The terminal's other screen, without a cursor and without wrapping
		// lines (xterm's control sequences, ctlseqs.ms).
		enter = "\x1b[?1049h\x1b[?25l\x1b[?7l"
		leave = "\x1b[?7h\x1b[?25h\x1b[?1049l"
	)
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGTSTP, unix.SIGWINCH)
	// Beside the signals, since to read a large set takes long.
	pictures := make(chan *picture)
	go func() {
		for ; ; time.Sleep(every) {
			pictures <- look(configPath, lists)
		}
	}()
	_, err := io.WriteString(os.Stdout, enter)
	var last *picture
	for err == nil {
		select {
		case last = <-pictures:
		case s := <-signals:
			switch s {
			case unix.SIGTSTP:
				_, _ = io.WriteString(os.Stdout, leave)
				// To this very thread, which so stands still here.
				_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGSTOP)
				_, err = io.WriteString(os.Stdout, enter)
			case unix.SIGINT, unix.SIGQUIT, unix.SIGTERM:
				_, err = io.WriteString(os.Stdout, leave)
				return failed(err)
			}
		}
		if last != nil && err == nil {
			// At once, so that it does not flicker: from the first line on,
			// the rest of each line and the rest of the screen erased.
			lines := last.lines(terminal())
			_, err = io.WriteString(os.Stdout, "\x1b[H"+strings.Join(lines, "\x1b[K\r\n")+"\x1b[J")
		}
	}
	return failed(err)
}

// lines puts a picture into the lines of a screen.
func (p *picture) lines(on screen) []string {
	head := p.at.Format(time.TimeOnly)
	for _, l := range p.lists {
		n := 0
		for _, c := range p.addresses {
			if c.list == l {
				n++
			}
		}
		head += fmt.Sprintf("  %s: %d", l, n)
	}
	lines := []string{head}
	for _, err := range p.errs {
		lines = append(lines, "nftwl: error: "+printable(err.Error()))
	}
	shown, more := p.addresses, ""
	if room := on.height - len(lines) - 1; on.height > 0 && len(shown) > room {
		shown = shown[:max(0, room-1)]
		more = fmt.Sprintf("… and %d more", len(p.addresses)-len(shown))
	}
	lines = append(lines, table(shown, p.ports, on.width, on.colour)...)
	if more != "" {
		lines = append(lines, more)
	}
	if on.height > 0 {
		lines = lines[:min(len(lines), on.height)]
	}
	return lines
}
