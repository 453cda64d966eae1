package main

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// A second Ctrl-C ends doctor, whatever it waits for: here for a process that a program
// has started, and that keeps the program's output open.
func TestDoctorInterruptedTwice(t *testing.T) {
	h := newHost(t)
	h.must(unix.Mkfifo("/run/held", 0o600))
	h.write("/run/bin/doveconf", "#!/bin/sh\ncat /run/held &\nwait\n")
	h.must(os.Chmod("/run/bin/doveconf", 0o755))
	cmd := exec.Command("/usr/bin/nftwl", "doctor")
	cmd.Env = []string{"PATH=/run/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	h.must(cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	late := time.After(limit)
	for held := false; ; {
		select {
		case err := <-ended:
			var exit *exec.ExitError
			if !held || !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
				t.Errorf("nftwl doctor: %v, when it waited: %v", err, held)
			}
			return
		case <-late:
			_ = cmd.Process.Kill()
			t.Fatal("it goes on")
		case <-time.After(10 * time.Millisecond):
		}
		if !held {
			// Opening it fails until somebody reads; closing it ends cat.
			f, err := os.OpenFile("/run/held", os.O_WRONLY|unix.O_NONBLOCK, 0)
			if err != nil {
				continue
			}
			defer f.Close()
			held = true
		}
		_ = cmd.Process.Signal(syscall.SIGINT) // fails if it has ended
	}
}

// doctor's output fits the terminal, uses its colours and loses no word. Commands are
// not wrapped.
func TestDoctorOnTerminal(t *testing.T) {
	h := newHost(t)
	h.write("/etc/nftwl.yaml", "snapshot: /etc/state/sets.nft\n")
	h.write("/etc/state/sets.nft", "")
	h.must(os.Chmod("/etc/state/sets.nft", 0o666)) // because its remedy is long
	results := func(text string) (words, commands []string) {
		text = regexp.MustCompile("\x1b\\[[0-9;]*m").ReplaceAllString(text, "")
		for _, m := range regexp.MustCompile(`(?m)^ +# (.*)$`).FindAllStringSubmatch(text, -1) {
			if out, err := exec.Command("sh", "-nc", m[1]).CombinedOutput(); err != nil {
				t.Errorf("%s: %v, %s", m[1], err, out)
			}
			commands = append(commands, m[1])
		}
		return strings.Fields(text), commands
	}
	plain, _, code := output(t, nftwl(t, nil, "doctor"))
	if code != 1 || strings.Contains(plain, "\x1b") || !regexp.MustCompile(`\n\d+ ok, \d+ failed, \d+ skipped\n$`).MatchString(plain) {
		t.Fatalf("exit status %d:\n%s", code, plain)
	}
	words, commands := results(plain)
	if len(commands) < 2 {
		t.Errorf("too few commands to see anything: %q", commands)
	}
	for _, width := range []uint16{40, 60, 72, 100, 200} {
		for _, v := range []struct {
			env      string
			coloured bool
		}{{"TERM=xterm", true}, {"TERM=dumb", false}} {
			cmd := nftwl(t, []string{v.env}, "doctor")
			got, _ := startOn(t, width, 24, cmd).wait(t, cmd)
			if strings.Contains(got, "\x1b[1;31mfail\x1b[0m  sets ") != v.coloured || !v.coloured && strings.Contains(got, "\x1b") {
				t.Errorf("%s: %q", v.env, got)
			}
			if seen, _ := results(got); !slices.Equal(seen, words) {
				t.Errorf("in %d columns, there is\n%s\nand without a terminal\n%s", width, got, plain)
			}
			for line := range strings.Lines(regexp.MustCompile("\x1b\\[[0-9;]*m").ReplaceAllString(got, "")) {
				line = strings.TrimRight(line, "\n")
				if text := strings.TrimLeft(line, " "); len(line) > int(width) && strings.Contains(text, " ") && text[0] != '#' {
					t.Errorf("%d columns, and not %d: %s", len(line), width, line)
				}
			}
		}
	}
	cmd := nftwl(t, []string{"TERM=xterm"}, "doctor", "--json")
	got, _ := startOn(t, 40, 24, cmd).wait(t, cmd)
	if !json.Valid([]byte(got)) {
		t.Errorf("no JSON: %s", got)
	}
}

// One cause makes one finding, and its remedy works on a machine that has nothing yet.
func TestDoctorOnFreshMachine(t *testing.T) {
	h := newHost(t)
	var results []struct{ Check, Status, Command string }
	find := func(check string) (command string, status string) {
		t.Helper()
		out, _, _ := output(t, nftwl(t, nil, "doctor", "--json"))
		results = nil
		h.must(json.Unmarshal([]byte(out), &results))
		for _, r := range results {
			if r.Check == check {
				return r.Command, r.Status
			}
		}
		return "", ""
	}
	command, status := find("sets")
	if status != "fail" || command != "nftwl setup nftables --write" {
		t.Errorf("%s: %q", status, command)
	}
	if _, stderr, _ := output(t, nftwl(t, nil, "list")); !strings.Contains(stderr, "hint: load the set definitions ("+command+")") {
		t.Errorf("list: %s", stderr)
	}
	if out, err := exec.Command("sh", "-ec", command).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	command, _ = find("sets")
	if command != "nft -f /etc/nftwl/sets.nft" {
		t.Errorf("then %q", command)
	}
	if out, err := exec.Command("sh", "-ec", command).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, status := find("sets"); status != "" {
		t.Errorf("it is still %s", status)
	}
	if _, status := find("sets.trusted_ipv4"); status != "ok" {
		t.Errorf("the set is %s", status)
	}

	// The table has another name than the configuration: that is the cause.
	nstest.Nft(t, "flush ruleset; table inet mail { set trusted_ipv4 { type ipv4_addr . inet_service; flags timeout; }\n}")
	out, _, _ := output(t, nftwl(t, nil, "doctor"))
	if want := "put into /etc/nftwl.yaml: table: inet mail\n"; !strings.Contains(out, want) {
		t.Errorf("not %q in\n%s", want, out)
	}
}
