package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// expect compares the results that are not ok with "STATUS CHECK: part of the
// text".
func expect(t *testing.T, got []Result, want ...string) {
	t.Helper()
	ok := slices.EqualFunc(got, want, func(r Result, want string) bool {
		head, text, _ := strings.Cut(want, ": ")
		return fmt.Sprintf("%s %s", r.Status, r.Check) == head && strings.Contains(r.Text, text)
	})
	if !ok {
		t.Errorf("not ok are %q, want %q", got, want)
	}
}

func TestConfig(t *testing.T) {
	for _, v := range []struct {
		name, text string
		mode       os.FileMode
		uid        int
		want       []string
	}{
		{name: "well", text: "timeout: 2d\n", mode: 0o644},
		{name: "comments alone", mode: 0o444},
		{name: "invalid", text: "timeout: 1d\ntiemout: 2d\n", mode: 0o644, want: []string{`fail config: nftwl.yaml:2: unknown key "tiemout"`}},
		{name: "another's", mode: 0o644, uid: 1000, want: []string{"fail config.mode: it belongs to user 1000"}},
		{name: "writable by a group", mode: 0o664, want: []string{"fail config.mode: with mode 0664"}},
		{name: "writable by all", mode: 0o646, want: []string{"fail config.mode: with mode 0646"}},
		{name: "not readable by all", mode: 0o640, want: []string{"warn config.mode: has mode 0640: nftwl's units"}},
	} {
		t.Run(v.name, func(t *testing.T) {
			d, results := newDoctor(t, v.text)
			if v.uid != 0 {
				nstest.NeedUsers(t)
				if err := os.Chown(d.ConfigPath, v.uid, 0); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Chmod(d.ConfigPath, v.mode); err != nil {
				t.Fatal(err)
			}
			d.checkConfig(t.Context())
			expect(t, *results, v.want...)
			if d.config == nil || d.valid != (v.name != "invalid") {
				t.Errorf("the configuration is %v, valid: %v", d.config, d.valid)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		d, results := newDoctor(t, "")
		d.ConfigPath = filepath.Join(t.TempDir(), "none.yaml")
		d.checkConfig(t.Context())
		expect(t, *results, "fail config: none.yaml: no such file or directory")
	})
	t.Run("no file at the usual place", func(t *testing.T) {
		nstest.New(t)
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", "/etc", "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		d, results := newDoctor(t, "")
		d.ConfigPath = ""
		d.checkConfig(t.Context())
		expect(t, *results)
		if !d.valid {
			t.Error("the defaults are not what the administrator wants")
		}
	})
}

func TestKernel(t *testing.T) {
	nstest.New(t)
	d, results := newDoctor(t, "")
	d.checkKernel(t.Context())
	expect(t, *results)
	if d.conn == nil {
		t.Fatal("no connection")
	}
	d.conn.Close()

	// Capabilities belong to the thread, which ends with the test.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		t.Fatal(err)
	}
	caps[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	if err := unix.Capset(&header, &caps[0]); err != nil {
		t.Fatal(err)
	}
	d, results = newDoctor(t, "")
	d.checkConfig(t.Context())
	d.checkKernel(t.Context())
	d.checkSets(t.Context())
	d.checkRules(t.Context())
	expect(t, *results, "fail kernel: CAP_NET_ADMIN is missing", "skip sets: ", "skip rules: ")
}

// A filter of system calls can deny the socket itself.
func TestKernelWithoutSocket(t *testing.T) {
	nstest.New(t)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // nr of struct seccomp_data, include/uapi/linux/seccomp.h
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SOCKET, Jf: 1},
		{Code: unix.BPF_RET, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	// It applies to the thread, which ends with the test.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0); err != nil {
		t.Fatal(err)
	}
	d, results := newDoctor(t, "")
	d.checkKernel(t.Context())
	expect(t, *results, "fail kernel: no permission")
	if d.conn != nil {
		t.Error("there is a connection")
	}
}

func TestRun(t *testing.T) {
	for _, v := range []struct {
		name, script string
		patience     time.Duration
		mute         bool   // the error is errNoAnswer
		want         string // the error
	}{
		{"well", "echo said; echo not this >&2", time.Minute, false, ""},
		{"failed", "echo said; echo why >&2; exit 1", time.Minute, false, "sh: why"},
		{"failed, and has more to say", "echo said; echo first >&2; echo Error: why >&2; echo '^^^' >&2; exit 1", time.Minute, false, "sh: Error: why"},
		{"failed in silence", "echo said; exit 1", time.Minute, false, "sh: exit status 1"},
		{"hangs", "echo said; exec sleep 60", time.Second / 2, true, "sh: no answer within 500ms"},
	} {
		t.Run(v.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), v.patience)
			defer cancel()
			out, err := run(ctx, "sh", "-c", v.script)
			if got := fmt.Sprint(err); (err != nil || v.want != "") && got != v.want || errors.Is(err, errNoAnswer) != v.mute {
				t.Errorf("the error is %q, want %q", got, v.want)
			}
			if strings.Contains(v.script, "said") && out != "said\n" {
				t.Errorf("%d bytes: %.20q", len(out), out)
			}
		})
	}
}

// doctor does not wait for a program that hangs, and does not blame what it reads.
func TestHangs(t *testing.T) {
	dir := t.TempDir()
	for _, program := range []string{"doveconf", "nft"} {
		if err := os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/sh\nexec sleep 60\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		t.Cleanup(cancel)
		return ctx
	}
	d, results := newDoctor(t, "")
	d.checkDovecot(short())
	d.checkBootFile(short(), filepath.Join(dir, "nft"))
	expect(t, *results, "warn dovecot.settings: doveconf: no answer within ", "warn persistence.boot: nft: no answer within ")
	if d.noRules {
		t.Error("nft loads no rules at boot")
	}
}

func TestSets(t *testing.T) {
	set := func(name, definition string) string { return "set " + name + " { " + definition + " }\n" }
	const (
		well4 = "type ipv4_addr . inet_service; flags dynamic,timeout; size 100; timeout 1d;"
		well6 = "type ipv6_addr . inet_service; flags dynamic,timeout; size 100; timeout 1d;"
	)
	size := func(n int) int {
		if n > 20 {
			return 100
		}
		return 20
	}
	elements := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "192.0.2.%d . 993,", i)
		}
		return "type ipv4_addr . inet_service; flags timeout; size " + strconv.Itoa(size(n)) + "; elements = { " + b.String() + " };"
	}
	for _, v := range []struct {
		name     string
		trusted4 string // the definition of trusted_ipv4; "-" if it is missing
		banned6  string
		config   string
		want     []string
	}{
		{name: "well"},
		{name: "addresses alone", trusted4: "type ipv4_addr; flags timeout;"},
		{name: "another table", config: "table: inet other\n", want: []string{"fail sets: table inet other does not exist"}},
		{name: "another family's table", config: "table: ip filter\n", want: []string{"fail sets: table ip filter does not exist"}},
		{name: "no set", trusted4: "-", want: []string{"fail sets.trusted_ipv4: set trusted_ipv4 does not exist in table inet filter"}},
		{name: "another name", config: "banned: {ipv6: guessers}\n", want: []string{"fail sets.guessers: set guessers does not exist"}},
		{name: "another type", trusted4: "type inet_service; flags timeout;", want: []string{"fail sets.trusted_ipv4: has keys of type inet_service"}},
		{name: "the other family", trusted4: well6, want: []string{"fail sets.trusted_ipv4: has keys of type ipv6_addr . inet_service"}},
		{name: "an interval set", banned6: "type ipv6_addr; flags interval,timeout;", want: []string{"fail sets.banned_ipv6: is an interval set"}},
		{name: "no timeouts", banned6: "type ipv6_addr . inet_service; size 100;", want: []string{"fail sets.banned_ipv6: has no timeout flag"}},
		{name: "full", trusted4: elements(20), want: []string{"fail sets.trusted_ipv4: full: 20 of 20 elements, and the next client takes 5"}},
		{name: "no room for one more", trusted4: elements(16), want: []string{"fail sets.trusted_ipv4: full: 16 of 20 elements, and the next client takes 5"}},
		{name: "nearly full", trusted4: elements(90), want: []string{"warn sets.trusted_ipv4: nearly full: 90 of 100 elements"}},
		{name: "not nearly full", trusted4: elements(89)},
		{name: "no sets", trusted4: "-", banned6: "-", want: []string{"fail sets: trusted_ipv4, banned_ipv6 do not exist in table inet filter"}},
	} {
		t.Run(v.name, func(t *testing.T) {
			nstest.New(t)
			definitions := map[string]string{"trusted_ipv4": well4, "trusted_ipv6": well6, "banned_ipv4": well4, "banned_ipv6": well6}
			if v.trusted4 != "" {
				definitions["trusted_ipv4"] = v.trusted4
			}
			if v.banned6 != "" {
				definitions["banned_ipv6"] = v.banned6
			}
			text := ""
			for name, definition := range definitions {
				if definition != "-" {
					text += set(name, definition)
				}
			}
			nstest.Nft(t, "table inet filter {\n"+text+"}\n")
			d, results := newDoctor(t, v.config)
			d.checkConfig(t.Context())
			d.checkKernel(t.Context())
			defer d.conn.Close()
			d.checkSets(t.Context())
			expect(t, *results, v.want...)
		})
	}
}
