package e2e

import (
	"errors"
	"fmt"
	"testing"

	"nftwl/pkg/nstest"
)

// startPostfix starts Postfix with its submission service, which uses Dovecot
// SASL.
func (s *server) startPostfix() {
	s.t.Helper()
	s.d.StartPostfix(s.t, server4+":587",
		"maillog_file = "+dir+"/maillog\nmaillog_file_prefixes = /run\n",
		"postlog unix-dgram n - n - 1 postlogd\n")
}

// Postfix runs no post-login program, so only nftwld learns of its users.
func TestPostfix(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{config: "failures: {limit: 5}\n"})
		s.startPostfix()
		for _, c := range []struct{ from, set string }{{"192.0.2.7", "trusted_ipv4"}, {"2001:db8::7", "trusted_ipv6"}} {
			if err := smtp(c.from, "alice", password); err != nil {
				t.Errorf("from %s: %v", c.from, err)
			}
			nstest.Poll(s.t, c.from+" to be trusted", func() bool { return s.in(c.set, c.from+` \. 587 .*comment "alice"`) })
		}
		s.reported(`protocol="smtp",result="success"`, "2")
		for i := range 5 {
			if err := smtp("192.0.2.8", "alice", fmt.Sprint("wrong", i)); !errors.Is(err, nstest.ErrDenied) {
				t.Errorf("%v, want %v", err, nstest.ErrDenied)
			}
		}
		nstest.Poll(s.t, "the ban", func() bool { return s.in("banned_ipv4", `192.0.2.8 \. 587 timeout 1h`) })
		for range 10 {
			if err := smtp("192.0.2.9", "alice", "old"); !errors.Is(err, nstest.ErrDenied) {
				t.Errorf("%v, want %v", err, nstest.ErrDenied)
			}
		}
		s.reported(`protocol="smtp",result="failure"`, "15")
		if s.in("banned_ipv4", "192.0.2.9") {
			t.Error("an address is banned for repeating one wrong password")
		}
	})
}

// A guesser is banned on every port, whichever protocol they use, without fail2ban
// or logs, as long as Dovecot checks the passwords.
func TestGuessersByEachDoor(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{config: "failures: {limit: 3}\n"})
		s.startPostfix()
		for i, door := range []struct {
			name string
			try  func(from, user, password string) error
		}{
			{"IMAP", login},
			{"POP3", pop3},
			{"submission with PLAIN", smtp},
			{"submission with LOGIN", smtpLogin},
		} {
			from := fmt.Sprintf("192.0.2.%d", 10+i)
			for j, user := range []string{"alice", "info", "alice"} {
				if err := door.try(from, user, fmt.Sprint("guess", j)); !errors.Is(err, nstest.ErrDenied) {
					t.Errorf("%s: %v, want %v", door.name, err, nstest.ErrDenied)
				}
			}
			for _, port := range []int{143, 993, 995, 465, 587} {
				nstest.Poll(s.t, fmt.Sprintf("%s: the ban on %d", door.name, port), func() bool {
					return s.in("banned_ipv4", fmt.Sprintf(`%s \. %d timeout 1h`, from, port))
				})
			}
			good := fmt.Sprintf("192.0.2.%d", 20+i)
			if err := door.try(good, "alice", password); err != nil {
				t.Errorf("%s: %v", door.name, err)
			}
			nstest.Poll(s.t, door.name+": the trust", func() bool { return s.in("trusted_ipv4", good+` \. 993 `) })
		}
	})
}
