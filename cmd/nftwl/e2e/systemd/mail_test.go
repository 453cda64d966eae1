package systemd

import (
	"errors"
	"fmt"
	"net/netip"
	"net/textproto"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// The addresses of the mail server and its clients, on the machine's loopback. None is
// in 127.0.0.0/8, which nftwl ignores.
const (
	mailServer  = "198.51.100.1"
	mailClients = "198.18.0.0/15"
)

// client returns the address of a mail client. The numbers begin with 1.
func client(n int) string {
	a := netip.MustParsePrefix(mailClients).Addr().As4()
	a[2], a[3] = byte(n>>8), byte(n)
	return netip.AddrFrom4(a).String()
}

const dovecotConf = `
protocols = imap
!include_try conf.d/9[0-2]-*.conf
`

// mail configures a Dovecot without nftwl, but does not start it.
func (m *machine) mail() {
	m.Helper()
	if _, err := os.Stat(m.file("usr/lib/dovecot/imap")); err != nil {
		nstest.Skip(m, "Dovecot is not installed: apt-get install dovecot-imapd")
	}
	conf := nstest.DovecotConf{Dir: "/etc/dovecot"}.For(m.run("dovecot", "--version"))
	m.write("etc/dovecot/dovecot.conf", conf+dovecotConf)
	m.write("etc/dovecot/users", "alice:{PLAIN}secret:1000:1000::/srv/alice::\n")
	nstest.Must(m, os.MkdirAll(m.file("srv/alice"), 0o755))
	nstest.Must(m, os.Chown(m.file("srv/alice"), 1000, 1000))
	nstest.Must(m, os.MkdirAll(m.file("etc/dovecot/conf.d"), 0o755))
	m.addresses()
}

// addresses configures the network of a machine that has just booted.
func (m *machine) addresses() {
	m.Helper()
	m.run("ip", "address", "add", mailServer+"/32", "dev", "lo")
	m.run("ip", "route", "add", "local", mailClients, "dev", "lo")
}

// visit connects to the mail server from an address.
func (m *machine) visit(from string, v nstest.Visit, password string) error {
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The thread enters the machine's network, and ends with the goroutine.
		runtime.LockOSThread()
		if err = m.joinNetwork(); err != nil {
			return
		}
		conn, e := nstest.Dial(from, mailServer, "143")
		if err = e; err != nil {
			return
		}
		defer conn.Close()
		err = v(textproto.NewConn(conn), "alice", password)
	}()
	<-done
	if err != nil {
		err = fmt.Errorf("login from %s: %w", from, err)
	}
	return err
}

// imap logs in from an address, and logs out.
func (m *machine) imap(from string) error {
	return m.visit(from, func(c *textproto.Conn, user, password string) error {
		if err := nstest.IMAPLogin(c, user, password); err != nil {
			return err
		}
		if err := nstest.IMAPCommand(c, "", "NOOP"); err != nil {
			return err
		}
		return nstest.IMAPCommand(c, "BYE", "LOGOUT")
	}, "secret")
}

// logsIn lets a client log in, and fails the test if the login is denied.
func (m *machine) logsIn(n int) {
	m.Helper()
	if err := m.imap(client(n)); err != nil {
		m.Error(err)
	}
}

func (m *machine) joinNetwork() error {
	ns, err := os.Open(filepath.Join("/proc", strconv.Itoa(m.pid), "ns/net"))
	if err != nil {
		return err
	}
	defer ns.Close()
	return unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
}

// atOnce is how many clients log in at the same time.
const atOnce = 10

// crowd lets clients log in once each, with numbers from 1 on, while it runs a function.
// The function can wait for a client's turn. crowd stops when the function has returned
// and enough clients have logged in. It returns their number, and those that were
// denied.
func (m *machine) crowd(least int, meanwhile func(turn func(n int))) (n int, denied []error) {
	m.Helper()
	var last atomic.Int64
	var done atomic.Bool
	var mu sync.Mutex
	var clients sync.WaitGroup
	for range atOnce {
		clients.Go(func() {
			for !done.Load() || last.Load() < int64(least) {
				if err := m.imap(client(int(last.Add(1)))); err != nil {
					mu.Lock()
					denied = append(denied, err)
					mu.Unlock()
				}
			}
		})
	}
	func() {
		// Even if the test ends in it.
		defer clients.Wait()
		defer done.Store(true)
		meanwhile(func(n int) {
			nstest.Until(m, "the clients' turns", func() error {
				if at := last.Load(); at < int64(n) {
					return fmt.Errorf("at number %d, not %d", at, n)
				}
				return nil
			})
		})
	}()
	return int(last.Load()), denied
}

func upTo(n int) (numbers []int) {
	for i := range n {
		numbers = append(numbers, i+1)
	}
	return numbers
}

// trusts waits until the clients with these numbers are trusted on each port.
func (m *machine) trusts(numbers ...int) {
	m.Helper()
	nstest.Until(m, "all are trusted", func() error {
		got := m.elements()
		var missing []string
		for _, n := range numbers {
			for _, port := range []int{143, 465, 587, 993, 995} {
				if l, ok := got[element{"trusted", client(n), port}]; !ok || l.comment != "alice" {
					missing = append(missing, fmt.Sprintf("%s . %d", client(n), port))
				}
			}
		}
		if len(missing) > 0 {
			return errors.New(strings.Join(missing, ", "))
		}
		return nil
	})
}
