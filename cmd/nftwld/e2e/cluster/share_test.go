package cluster

import (
	"testing"

	"nftwl/pkg/nstest"
)

// A login, a trust, a ban, and their ends, on one machine are those of all.
func TestShare(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		l := newLAN(t, d, 3)
		l.start()
		a, b, c := l.nodes[0], l.nodes[1], l.nodes[2]

		a.login("198.51.100.7", "alice")
		b.becomes("trusted", "198.51.100.7", true)
		c.becomes("trusted", "198.51.100.7", true)
		e := b.list("trusted")["198.51.100.7 465"]
		if e.Comment != "alice @node0" || e.Timeout != 86400 || e.Expires < 86300 {
			t.Errorf("%+v", e)
		}
		b.nftwl("remove", "198.51.100.7")
		a.becomes("trusted", "198.51.100.7", false)
		c.becomes("trusted", "198.51.100.7", false)
		c.login("198.51.100.7", "alice")
		a.becomes("trusted", "198.51.100.7", true)
		b.becomes("trusted", "198.51.100.7", true)

		c.nftwl("ban", "2001:db8::66", "--comment", "by hand")
		a.becomes("banned", "2001:db8::66", true)
		a.nftwl("unban", "2001:db8::66")
		c.becomes("banned", "2001:db8::66", false)
	})
}

// Machines with the same name, as clones have, share all the same.
func TestSameName(t *testing.T) {
	l := newLAN(t, nstest.Host, 2)
	for _, n := range l.nodes {
		n.name = "localhost"
		n.config("")
	}
	l.start()
	a, b := l.nodes[0], l.nodes[1]
	a.login("198.51.100.7", "alice")
	b.becomes("trusted", "198.51.100.7", true)
	b.nftwl("ban", "198.51.100.8", "--comment", "by hand")
	a.becomes("banned", "198.51.100.8", true)
	a.nftwl("unban", "198.51.100.8")
	b.becomes("banned", "198.51.100.8", false)
	l.quiet()
	l.same()
}
