package cluster

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"nftwl/pkg/nstest"
)

// Which of a login and a removal counts is decided by their time, and not by when
// they arrive.
func TestRemovals(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		l := newLAN(t, d, 2)
		l.start()
		a, b := l.nodes[0], l.nodes[1]
		const older, newer = "198.51.100.1", "198.51.100.2"
		a.login(newer, "alice")
		b.becomes("trusted", newer, true)

		b.stop()
		b.login(older, "bob") // of which a never hears
		a.nftwl("add", older)
		a.nftwl("remove", older, newer)
		l.quiet()
		if h := l.hash(); !strings.Contains(h, "trusted "+older+" -") || !strings.Contains(h, "trusted "+newer+" -") {
			t.Fatalf("the engine has no removal:\n%s", h)
		}
		b.login(newer, "bob")
		b.start()
		b.connected()
		a.becomes("trusted", newer, true)
		b.becomes("trusted", older, false) // it removes its own
		l.quiet()
		if a.is("trusted", older) || !b.is("trusted", newer) {
			t.Error("the other machine has another view")
		}
		l.same()

		// And in turn.
		for range 3 {
			b.nftwl("remove", newer)
			a.becomes("trusted", newer, false)
			a.login(newer, "alice")
			b.becomes("trusted", newer, true)
		}
	})
}

// A removal is seen as a whole, although the kernel tells of one element after the
// other.
func TestRemovalIsWhole(t *testing.T) {
	l := newLAN(t, nstest.Host, 2)
	l.start()
	a, b := l.nodes[0], l.nodes[1]
	var addrs []string
	for i := range 100 {
		addrs = append(addrs, fmt.Sprintf("198.51.100.%d", i))
	}
	for range 3 {
		a.nftwl(append([]string{"ban"}, addrs...)...)
		nstest.Poll(t, "all to be banned", func() bool { return len(b.list("banned")) == 5*len(addrs) })
		l.quiet()
		for _, addr := range addrs {
			a.nftwl("unban", addr)
		}
		nstest.Poll(t, "none to be banned", func() bool { return len(b.list("banned")) == 0 })
		l.quiet()
		if left := len(a.list("banned")) + len(b.list("banned")); left > 0 {
			t.Errorf("%d elements are banned again", left)
		}
		for line := range strings.Lines(l.hash()) {
			if len(strings.Fields(line)) != 3 || !strings.HasSuffix(strings.TrimSpace(line), " -") {
				t.Errorf("a record %q, want one removal an address", line)
			}
		}
	}
}

// A removal still counts if the engine loses it and the address is added again before
// anybody notices.
func TestRemovalOutlastsLoss(t *testing.T) {
	for _, loses := range []string{"everything", "the latest"} {
		t.Run(loses, func(t *testing.T) {
			eachEngine(t, func(t *testing.T, d nstest.Debian) {
				l := newLAN(t, d, 3)
				l.start()
				a, b, c := l.nodes[0], l.nodes[1], l.nodes[2]
				const client = "198.51.100.1"
				a.nftwl("add", "--timeout", "12h", client)
				b.becomes("trusted", client, true)
				c.becomes("trusted", client, true)
				l.engine.Do("SAVE")
				nstest.Unplug(t, 2)
				l.engine.Do("CLIENT", "KILL", "TYPE", "normal") // or the machine that is cut off would hear of it later
				b.nftwl("remove", client)
				a.becomes("trusted", client, false)
				b.nftwl("add", "--timeout", "10m", client)
				a.becomes("trusted", client, true)
				l.quiet()
				if loses == "everything" {
					l.engine.Do("FLUSHALL")
				} else {
					l.engine.Signal(syscall.SIGKILL)
					a.stop() // which knows of the removal, too
					b.disconnected("network")
				}
				b.nftwl("add", "--timeout", "20m", client)
				if loses == "the latest" {
					l.engine.Start()
					b.connected()
				}
				nstest.Poll(t, "the engine to hear of it", func() bool { return strings.Contains(l.hash(), client) })
				nstest.Plug(t, 2)
				c.connected()
				nstest.Must(t, c.cmd.Process.Signal(syscall.SIGHUP)) // so that it notices at once
				nstest.Until(t, "the removal to count everywhere", func() error {
					l.quiet()
					for _, n := range []*node{b, c} {
						all := n.list("trusted")
						for key, e := range all {
							if e.Expires > 20*60 {
								return fmt.Errorf("%s: %s has %v s left", n.name, key, e.Expires)
							}
						}
						if len(all) == 0 {
							return fmt.Errorf("%s: nothing is trusted", n.name)
						}
					}
					return nil
				})
			})
		})
	}
}

// What an unban of one tool leaves of a ban outlasts an engine that loses all, even if
// only the machine of the other tool still has it.
func TestPartOutlastsLoss(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		l := newLAN(t, d, 2)
		l.start()
		a, b := l.nodes[0], l.nodes[1]
		const guesser = "198.51.100.1"
		a.nftwl("ban", "--comment", "postfix", guesser)
		b.becomes("banned", guesser, true)
		b.nftwl("ban", "--timeout", "30h", "--comment", "dovecot", guesser)
		nstest.Poll(t, "the longer ban", func() bool { return a.list("banned")[guesser+" 143"].Timeout == 30*3600 })
		l.quiet()
		a.nftwl("unban", "--comment", "postfix", guesser)
		l.quiet()
		merges := []float64{a.metric("cluster_merges"), b.metric("cluster_merges")}
		l.engine.Do("FLUSHALL")
		a.nftwl("flush", "banned")
		a.nftwl("ban", "198.51.100.2") // so that all notice at once
		nstest.Poll(t, "all to be read", func() bool {
			return a.metric("cluster_merges") > merges[0] && b.metric("cluster_merges") > merges[1]
		})
		l.quiet()
		l.same()
		if !a.is("banned", guesser) || !b.is("banned", guesser) {
			t.Errorf("%s is not banned any more:\n%s", guesser, l.hash())
		}
	})
}

// What one machine loses is filled again, and nothing is removed elsewhere.
func TestLocalLoss(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		l := newLAN(t, d, 2)
		l.start()
		a, b := l.nodes[0], l.nodes[1]
		const client, guesser = "198.51.100.1", "2001:db8::66"
		a.login(client, "alice")
		b.nftwl("ban", guesser)
		a.becomes("banned", guesser, true)
		b.becomes("trusted", client, true)
		for _, loss := range []struct {
			name string
			lose func()
		}{
			{"reload", a.load},
			{"flush ruleset, and load later", func() {
				a.nft("flush ruleset")
				a.nft("add table inet filter")
				a.load()
			}},
			{"nft flush set", func() {
				a.nft("flush set inet filter trusted_ipv4")
				a.nft("flush set inet filter banned_ipv6")
			}},
			{"with the engine gone", func() {
				l.engine.Signal(syscall.SIGSTOP)
				a.disconnected("timeout")
				a.load()
				l.engine.Signal(syscall.SIGCONT)
			}},
			{"with nftwld stopped", func() {
				a.stop()
				a.load()
				a.start()
				a.connected()
			}},
		} {
			l.quiet()
			before := l.hash()
			loss.lose()
			a.becomes("trusted", client, true)
			a.becomes("banned", guesser, true)
			l.quiet()
			if after := l.hash(); after != before {
				t.Errorf("%s:\n%s\nthen\n%s", loss.name, before, after)
			}
			if !b.is("trusted", client) || !b.is("banned", guesser) {
				t.Errorf("%s: removed elsewhere", loss.name)
			}
		}
		if e := a.list("trusted")[client+" 993"]; e.Comment != "alice" || e.Timeout != 86400 {
			t.Errorf("%+v", e)
		}

		// What is emptied everywhere stays so.
		if out, err := a.output("nftwld", "clear", "trusted"); err != nil {
			t.Fatalf("clear: %v, %s", err, out)
		}
		for _, n := range l.nodes {
			n.becomes("trusted", client, false)
		}
		l.quiet()
		for _, n := range l.nodes {
			if !n.is("banned", guesser) || n.is("trusted", client) {
				t.Errorf("%s after clear", n.name)
			}
		}
	})
}

// What is removed while nftwld is stopped comes back: absence is no removal.
func TestRemovedWhileStopped(t *testing.T) {
	l := newLAN(t, nstest.Host, 2)
	l.start()
	a, b := l.nodes[0], l.nodes[1]
	a.login("198.51.100.1", "alice")
	b.becomes("trusted", "198.51.100.1", true)
	a.stop()
	a.nftwl("remove", "198.51.100.1")
	if a.is("trusted", "198.51.100.1") {
		t.Fatal("it is still there")
	}
	a.start()
	a.becomes("trusted", "198.51.100.1", true)
	if !b.is("trusted", "198.51.100.1") {
		t.Error("it was removed elsewhere")
	}
}

// fail2ban ends its bans just before they expire. That is worth no record.
func TestUnbanAtTheEnd(t *testing.T) {
	l := newLAN(t, nstest.Host, 2)
	l.start()
	a, b := l.nodes[0], l.nodes[1]
	a.nftwl("ban", "198.51.100.1", "--timeout", "12s")
	b.becomes("banned", "198.51.100.1", true)
	l.quiet()
	nstest.Poll(t, "the ban to end", func() bool {
		e, ok := a.list("banned")["198.51.100.1 993"]
		return !ok || e.Expires < 1.9
	})
	before := l.sequence("banned")
	a.nftwl("unban", "198.51.100.1")
	// A record that follows has all before it.
	a.nftwl("ban", "198.51.100.2")
	b.becomes("banned", "198.51.100.2", true)
	log := l.engine.Do("XREVRANGE", "nftwl:{mail}:banned:log", "+", "-")
	after, _, _ := strings.Cut(log, "\n"+before+"\n")
	if strings.Contains(after, "198.51.100.1") {
		t.Errorf("%s\n%s", before, log)
	}
	b.becomes("banned", "198.51.100.1", false)
}

// A set without room for all takes what fits, and the rest once there is room.
func TestFull(t *testing.T) {
	l := newLAN(t, nstest.Host, 2)
	a, b := l.nodes[0], l.nodes[1]
	small := strings.ReplaceAll(nstest.Contrib(t, "nftables/sets.nft"), "size 262144", "size 12")
	b.nft("flush ruleset\n" + small)
	l.start()
	addrs := []string{"198.51.100.1", "198.51.100.2", "198.51.100.3", "198.51.100.4", "198.51.100.5"}
	for _, addr := range addrs {
		a.login(addr, "alice")
		l.quiet()
	}
	nstest.Poll(t, "the set to be full", func() bool {
		return len(b.list("trusted")) == 12 && b.metric("cluster_refused full") > 0
	})
	if n := strings.Count(b.log(), "msg=full"); n != 1 {
		t.Errorf("%d log lines", n)
	}
	// What was there is kept, and so is what a login here adds when it can.
	if !b.is("trusted", addrs[0]) || a.metric("cluster_refused full") != 0 {
		t.Error("the first is gone")
	}
	b.load()
	for _, addr := range addrs {
		b.becomes("trusted", addr, true)
	}
	l.same()
}
