package e2e

import (
	"errors"
	"fmt"
	"net/textproto"
	"testing"

	"nftwl/pkg/nstest"
)

func TestSuccessTrusts(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{})
		for _, c := range []struct{ from, user, set, element string }{
			{"192.0.2.7", "alice", "trusted_ipv4", `192.0.2.7 \. 587 expires 23h59m.*comment "alice"`},
			{"2001:db8::7", "alice", "trusted_ipv6", `2001:db8::7 \. 993 expires 23h59m.*comment "alice"`},
			{"192.0.2.8", "bob", "trusted_ipv4", `192.0.2.8 \. 143 timeout 7d expires 6d23h59m.*comment "bob"`},
		} {
			if err := login(c.from, c.user, password); err != nil {
				t.Errorf("%s: %v", c.user, err)
			}
			nstest.Poll(s.t, c.element+" in "+c.set, func() bool { return s.in(c.set, c.element) })
		}
		for _, c := range []struct{ from, user string }{
			{"192.0.2.9", "carol"},   // nftwl_trust=no
			{"192.0.2.10", "dave"},   // the same as a field of the user database
			{server4, "alice"},       // the server's own address
			{"127.0.0.1", "alice"},   // ignored
			{"2001:db8::9", "carol"}, // nftwl_trust=no
		} {
			if err := login(c.from, c.user, password); err != nil {
				t.Errorf("%s: %v", c.user, err)
			}
		}
		s.reported(`protocol="imap",result="success"`, "8")
		nstest.Poll(s.t, "the five logins to be ignored", func() bool { return s.metric(`nftwl_ignored_total{reason="exempt"}`) == "5" })
		for _, other := range []string{`192.0.2.9 `, `192.0.2.10 `, `198.51.100.1 `, `127.0.0.1 `} {
			if s.in("trusted_ipv4", other) {
				t.Errorf("%sis trusted", other)
			}
		}
	})
}

// Dovecot's own submission service reports like its others. There is no relay
// behind it, so the session ends after AUTH.
func TestSubmission(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{dovecot: "protocols = imap submission\nsubmission_relay_host = 127.0.0.1\nsubmission_relay_port = 1\n"})
		if err := smtp("192.0.2.8", "alice", "wrong"); !errors.Is(err, nstest.ErrDenied) {
			t.Errorf("%v, want %v", err, nstest.ErrDenied)
		}
		if err := smtp("192.0.2.7", "alice", password); errors.Is(err, nstest.ErrDenied) {
			t.Error(err)
		}
		s.reported(`protocol="submission",result="success"`, "1")
		s.reported(`protocol="submission",result="failure"`, "1")
		nstest.Poll(s.t, "the trust", func() bool { return s.in("trusted_ipv4", `192.0.2.7 \. 587 .*comment "alice"`) })
		if s.in("trusted_ipv4", "192.0.2.8 ") {
			t.Error("a wrong password is trusted")
		}
	})
}

// different returns n different wrong passwords.
func different(n int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprintf("wrong%d", i))
	}
	return all
}

// tryAll tries wrong passwords, all at once, because Dovecot delays its answer to
// each.
func tryAll(t *testing.T, from string, passwords []string) {
	t.Helper()
	tryOver(t, func() (*textproto.Conn, error) { return dial(from, "143") }, passwords)
}

// tryOver does the same over connections that dial makes.
func tryOver(t *testing.T, dial func() (*textproto.Conn, error), passwords []string) {
	t.Helper()
	results := make(chan error)
	for _, p := range passwords {
		c, err := dial() // in this goroutine: other threads are in another namespace
		nstest.Must(t, err)
		go func() { results <- imap(c, "", "alice", p) }()
	}
	for range passwords {
		if err := <-results; !errors.Is(err, nstest.ErrDenied) {
			t.Errorf("a wrong password: %v, want %v", err, nstest.ErrDenied)
		}
	}
}

func TestFailuresBan(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{config: "failures: {limit: 5}\n"})
		phone, guesser, home := "192.0.2.7", "192.0.2.8", "192.0.2.9"
		var same []string
		for range 100 {
			same = append(same, "old")
		}
		tryAll(t, phone, same)
		tryAll(t, guesser, different(4))
		s.reported(`protocol="imap",result="failure"`, "104")
		if s.in("banned_ipv4", "elements") {
			t.Error("banned before the limit")
		}
		tryAll(t, guesser, []string{"wrong4"})
		nstest.Poll(s.t, "the ban", func() bool { return s.in("banned_ipv4", `192.0.2.8 \. 143 timeout 1h expires 59m.*comment "nftwld"`) })
		if s.in("banned_ipv4", "192.0.2.7") {
			t.Error("an address is banned for repeating one wrong password")
		}
		// A trusted address can fail more often.
		if err := login(home, "alice", password); err != nil {
			t.Fatal(err)
		}
		tryAll(t, home, different(20))
		nstest.Poll(s.t, "it to be spared", func() bool { return s.metric("nftwl_spared_total") != "0" })
		if s.in("banned_ipv4", "192.0.2.9") {
			t.Error("a trusted address is banned")
		}
		// A /64 counts as one.
		for i := range 5 {
			tryAll(t, fmt.Sprintf("2001:db8::%d", i+1), []string{fmt.Sprint("wrong", i)})
		}
		nstest.Poll(s.t, "the ban", func() bool { return s.in("banned_ipv6", `2001:db8::5 \. 143 `) })
	})
}
