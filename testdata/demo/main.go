// Demo shows what nftwl does to connections. It makes two temporary network
// namespaces, connected by a pair of interfaces: a mail server with the rules of
// contrib/nftables, and the internet. It needs no root, and leaves the host's
// ruleset alone. Without nft or ip it prints a note, and shows only the sets.
//
//	PATH=$PWD/build:$PATH go run ./testdata/demo
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	server   = "203.0.113.1" // the mail server's address
	alice    = "192.0.2.7"
	bob      = "2001:db8::7"
	stranger = "198.51.100.8"
	guesser  = "198.51.100.66"
)

func main() {
	const inside = "NFTWL_DEMO_INSIDE"
	if os.Getenv(inside) == "" {
		os.Exit(enter(inside + "=yes"))
	}
	var d demo
	if d.show(); d.err != nil {
		fmt.Fprintln(os.Stderr, "demo: error:", d.err)
		os.Exit(1)
	}
}

// enter runs this program again as root of new namespaces, and returns its exit
// status.
func enter(inside string) int {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), inside)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
	}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return exit.ExitCode()
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo: error: no user namespace:", err)
		fmt.Fprintln(os.Stderr, "demo: hint: sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0, or run it as root")
		return 1
	}
	return 0
}

// A demo stops at its first error.
type demo struct {
	internet chan<- func() // runs the functions that it gets there; nil without nft or ip
	err      error
}

func (d *demo) show() {
	dir, err := os.MkdirTemp("", "nftwl-demo-")
	if err != nil {
		d.err = err
		return
	}
	defer os.RemoveAll(dir)
	contrib, err := filepath.Abs("contrib/nftables")
	if err == nil {
		err = os.Symlink(contrib, filepath.Join(dir, "nftwl")) // as /etc/nftwl
	}
	d.err = err
	snapshot := filepath.Join(dir, "snapshot.nft")
	reload := func() {
		d.print("$ nft -f nftables.conf")
		d.start(exec.Command("nft", "-I", dir, "-f", filepath.Join(contrib, "nftables.conf")))
	}

	if missing := lacks("nft", "nftables", "ip", "iproute2"); missing == "" {
		d.print("# A mail server loads the rules of contrib/nftables.")
		d.connect()
		reload()
		d.print("\n# A stranger can send a little: five connections at once, then three a minute.")
		d.opens(stranger, 587, 8)
	} else {
		d.print("# No connections are shown: " + missing)
		d.makeSets(filepath.Join(contrib, "sets.nft"), snapshot)
		reload = func() {
			d.run("nftwl", "flush", "trusted")
			d.run("nftwl", "flush", "banned")
		}
	}
	d.print("\n# Alice reads her mail. Dovecot runs this after her login. She is not limited.")
	d.login(alice, "alice")
	d.opens(alice, 587, 8)
	d.print("\n# Bob has an IPv6 address.")
	d.login(bob, "bob")
	d.print("\n# Someone who guesses passwords is banned.")
	d.opens(guesser, 993, 1)
	d.run("nftwl", "ban", "--timeout", "2h", "--comment", "guessing", guesser)
	d.opens(guesser, 993, 1)
	d.print("\n# The kernel has:")
	d.run("nftwl", "list")
	d.print("\n# A reload empties the sets. Save them before, and restore them after.")
	d.run("nftwl", "save", snapshot)
	reload()
	d.run("nftwl", "restore", snapshot)
	d.run("nftwl", "list")
	d.opens(alice, 587, 8)
	d.opens(guesser, 993, 1)
}

// makeSets makes the sets without nft: nftwl restore needs no nft for a snapshot. In
// a snapshot each set has its own block.
func (d *demo) makeSets(definitions, snapshot string) {
	text, err := os.ReadFile(definitions)
	if d.err == nil {
		d.err = err
	}
	const table = "table inet filter {\n"
	_, sets, _ := strings.Cut(string(text), table)
	sets = "# nftwl snapshot 1, saved " + time.Now().UTC().Format(time.RFC3339) + "\n" +
		table + strings.ReplaceAll(sets, "\n\n", "\n}\n"+table) + "# nftwl end, 0 elements\n"
	if err := os.WriteFile(snapshot, []byte(sets), 0o600); d.err == nil {
		d.err = err
	}
	d.run("nftwl", "restore", snapshot)
}

// lacks names the programs that are not installed, and their packages. It returns ""
// if all are installed.
func lacks(programs ...string) string {
	// The PATH of users other than root lacks these.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	var missing []string
	for i := 0; i < len(programs); i += 2 {
		if _, err := exec.LookPath(programs[i]); err != nil {
			missing = append(missing, fmt.Sprintf("%s is not installed (package %s)", programs[i], programs[i+1]))
		}
	}
	return strings.Join(missing, ", ")
}

func (d *demo) print(line string) {
	if d.err == nil {
		fmt.Println(line)
	}
}

func (d *demo) run(program string, args ...string) {
	line := "$ " + program
	for _, arg := range args {
		if filepath.IsAbs(arg) {
			arg = filepath.Base(arg)
		}
		line += " " + arg
	}
	d.print(line)
	d.start(exec.Command(program, args...))
}

func (d *demo) login(from, user string) {
	d.print(fmt.Sprintf("$ IP=%s USER=%s nftwl login …", from, user))
	cmd := exec.Command("nftwl", "login", "echo", "the mail process of "+user)
	cmd.Env = append(os.Environ(), "IP="+from, "USER="+user)
	d.start(cmd)
}

func (d *demo) start(cmd *exec.Cmd) {
	if d.err != nil {
		return
	}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	if err := cmd.Run(); err != nil {
		d.err = fmt.Errorf("%s: %w", cmd.Args[0], err)
	}
}

// connect makes both sides of the network, and starts a server that greets its
// clients.
func (d *demo) connect() {
	if d.err != nil {
		return
	}
	work, thread := make(chan func()), make(chan int)
	go func() {
		runtime.LockOSThread() // because the namespace belongs to the thread
		d.err = unix.Unshare(unix.CLONE_NEWNET)
		thread <- unix.Gettid()
		for f := range work {
			f()
		}
	}()
	tid := <-thread
	d.internet = work
	d.ip(fmt.Sprintf(`link set lo up
		link add net0 type veth peer name internet netns %d
		addr add %s/24 dev net0
		link set net0 up
		route add default via 203.0.113.2`, tid, server))
	d.there(func() {
		d.ip(`link set lo up
			addr add 203.0.113.2/24 dev internet
			link set internet up
			route add local 192.0.2.0/24 dev lo
			route add local 198.51.100.0/24 dev lo`)
	})
	for _, port := range []int{587, 993} {
		l, err := net.Listen("tcp4", address(port))
		if err == nil {
			go greet(l)
		} else if d.err == nil {
			d.err = err
		}
	}
}

// address returns the server's address with a port.
func address(port int) string { return net.JoinHostPort(server, strconv.Itoa(port)) }

// there runs f in the internet's namespace.
func (d *demo) there(f func()) {
	done := make(chan bool)
	d.internet <- func() { f(); close(done) }
	<-done
}

func (d *demo) ip(commands string) {
	if d.err != nil {
		return
	}
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(commands)
	if out, err := cmd.CombinedOutput(); err != nil {
		d.err = fmt.Errorf("ip: %w: %s", err, out)
	}
}

func greet(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		fmt.Fprint(conn, "hello\r\n")
		conn.Close()
	}
}

// opens opens connections, one after the other, and prints the result of each. A
// connection counts as open when the server has greeted the client, because the
// limit resets it at the last packet of the handshake, when the client already
// believes it open.
func (d *demo) opens(from string, port, times int) {
	if d.err != nil || d.internet == nil {
		return
	}
	fmt.Printf("%-13s to port %d:", from, port)
	for range times {
		word := " open"
		var err error
		d.there(func() { err = connect(from, address(port)) })
		if errors.Is(err, unix.ECONNRESET) {
			word = " reset"
		} else if err != nil {
			word = " dropped"
		}
		fmt.Print(word)
	}
	fmt.Println()
}

// connect opens a connection and waits for the server's greeting. Call it on a thread
// in the internet's namespace.
func connect(from, to string) error {
	// With an address, not a name, this thread makes the socket.
	dialer := net.Dialer{Timeout: time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := dialer.Dial("tcp4", to)
	if err != nil {
		return err
	}
	defer conn.Close()
	err = conn.SetDeadline(time.Now().Add(time.Second))
	if err == nil {
		_, err = conn.Read(make([]byte, 1))
	}
	return err
}
