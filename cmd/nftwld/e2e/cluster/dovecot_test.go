package cluster

import (
	"net/netip"
	"net/textproto"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// A user reads mail on one machine, and can then send on another whose submission
// ports are closed to strangers: with a real Dovecot, the shipped rules and real
// connections.
func TestDovecotAndStrictRules(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		version := d.DovecotVersion(t)
		binary := nstest.Build(t, "cmd/nftwl")
		l := newLAN(t, d, 3)
		imap, submission, client := l.nodes[0], l.nodes[1], l.nodes[2]
		submission.strict()
		submission.peer.Echo(t, 465)
		imap.start()
		submission.start()
		imap.connected()
		submission.connected()

		dir := nstest.Dir
		for _, name := range []string{"state", "mail"} {
			nstest.Must(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
		}
		nstest.Run(t, "cp", binary, dir+"/nftwl")
		nstest.Write(t, dir+"/nftwl.yaml", nstest.Read(t, imap.dir+"/nftwl.yaml"), 0o644)
		nstest.Write(t, dir+"/users", "alice:{PLAIN}secret:1000:1000::"+dir+"/mail/alice::\n", 0o644)
		nstest.Write(t, dir+"/mail/alice/Maildir/new/1.e2e", nstest.Message, 0o644)
		nstest.Run(t, "chown", "-R", "1000:1000", dir+"/mail")
		nstest.Write(t, dir+"/90-nftwl.conf", strings.ReplaceAll(nstest.Contrib(t, "dovecot/90-nftwl.conf"),
			"/usr/bin/nftwl login", dir+"/nftwl --config "+dir+"/nftwl.yaml login"), 0o644)
		address := nstest.LANAddress(0).String()
		nstest.Write(t, dir+"/dovecot.conf", nstest.DovecotConf{Dir: dir}.For(version)+`
state_dir = `+dir+`/state
log_path = `+dir+`/log
listen = `+address+`
protocols = imap
!include `+dir+`/90-nftwl.conf
`, 0o644)
		// Dovecot needs this mount namespace, and that machine's network.
		var inside *os.File
		var err error
		imap.peer.Do(func() { inside, err = os.Open("/proc/thread-self/ns/net") })
		nstest.Must(t, err)
		defer inside.Close()
		outside, err := os.Open("/proc/thread-self/ns/net")
		nstest.Must(t, err)
		defer outside.Close()
		nstest.Must(t, unix.Setns(int(inside.Fd()), unix.CLONE_NEWNET))
		d.StartDovecot(t, dir+"/dovecot.conf", address+":143")
		nstest.Must(t, unix.Setns(int(outside.Fd()), unix.CLONE_NEWNET))

		from, to := nstest.LANAddress(2), netip.AddrPortFrom(nstest.LANAddress(1), 465)
		if c, err := client.peer.Dial(from, to, 2*time.Second); err == nil {
			c.Close()
			t.Fatal("a stranger gets in")
		}
		c, err := client.peer.Dial(from, netip.AddrPortFrom(nstest.LANAddress(0), 143), nstest.Patience)
		nstest.Must(t, err)
		nstest.Must(t, c.SetDeadline(time.Now().Add(nstest.Patience)))
		nstest.Must(t, nstest.IMAP(textproto.NewConn(c), "alice", "secret"))
		c.Close()

		nstest.Until(t, "the user to get in", func() error {
			c, err := client.peer.Dial(from, to, time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
		if e := submission.list("trusted")[from.String()+" 465"]; e.Comment != "alice @node0" {
			t.Errorf("%+v", e)
		}
		if !imap.is("trusted", from.String()) {
			t.Error("not trusted where the login was")
		}
	})
}

// strict loads the shipped firewall in its strict variant.
func (n *node) strict() {
	n.t.Helper()
	files, err := filepath.Glob(filepath.Join(nstest.Root(n.t), "contrib/nftables/*.nft"))
	nstest.Must(n.t, err)
	for _, f := range files {
		text := strings.Replace(nstest.Read(n.t, f), `#include "nftwl/strict.nft"`, `include "nftwl/strict.nft"`, 1)
		nstest.Write(n.t, filepath.Join(n.dir, "nftwl", filepath.Base(f)), text, 0o644)
	}
	n.peer.Do(func() {
		nstest.Run(n.t, nstest.Need(n.t, "nft", "nftables"), "-I", n.dir, "-f", filepath.Join(nstest.Root(n.t), "contrib/nftables/nftables.conf"))
	})
}
