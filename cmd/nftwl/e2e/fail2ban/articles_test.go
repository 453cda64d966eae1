package fail2ban

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

var addr = netip.MustParseAddr

// The ports of the jails.
var (
	sasl = []int{25, 110, 143, 465, 587, 993, 995}
	all  = []int{25, 110, 143, 465, 587, 993, 995, 4190}
	imap = []int{110, 143, 465, 587, 993, 995, 4190}
	smtp = []int{25, 465, 587}
)

// A setUp is a mail server's log line from an article, for an address, and the number
// of such lines after which the address must be banned.
type setUp struct {
	name     string
	line     string
	own      string // the address in the article, or ""
	jail     string
	maxretry int
	bantime  time.Duration
	ports    []int
}

var setUps = []setUp{
	{"Postfix and Dovecot, CentOS 8: SASL",
		"postfix/smtpd[175371]: warning: unknown[%s]: SASL LOGIN authentication failed: UGFzc3dvcmQ6",
		"46.38.145.252", "postfix-sasl", 3, time.Hour, sasl},
	{"Postfix and Dovecot, CentOS 8: auth_verbose",
		"auth-worker(175697): Info: sql(mcm@example.com,%s): unknown user",
		"87.246.7.66", "dovecot-auth", 5, 10 * time.Minute, imap},
	{"lost connections: AUTH",
		"postfix/smtpd[5912]: lost connection after AUTH from static-68-236-203-102.nwrk.east.example.net[%s]",
		"68.236.203.102", "postfix-lost", 5, 10 * time.Minute, all},
	{"lost connections: UNKNOWN",
		"postfix/smtpd[5908]: lost connection after UNKNOWN from unknown[%s]",
		"", "postfix-lost", 5, 10 * time.Minute, all},
	{"lost connections: EHLO",
		"postfix/submission/smtpd[5908]: lost connection after EHLO from unknown[%s]",
		"", "postfix-lost", 5, 10 * time.Minute, all},
	{"Dovecot with PAM",
		"dovecot-auth: pam_unix(dovecot:auth): authentication failure; logname= uid=0 euid=0 tty=dovecot ruser=tester rhost=%s",
		"60.161.14.153", "dovecot-auth", 5, 10 * time.Minute, imap},
	{"Dovecot 2.3 with PAM, auth_verbose",
		"dovecot: auth-worker(2711): pam(tester,%s,<ybIwVMJgYc3AAAIH>): pam_authenticate() failed: Authentication failure (password mismatch?)",
		"", "dovecot-auth", 5, 10 * time.Minute, imap},
	{"Dovecot 2.4, auth_verbose",
		"dovecot: auth(tester,%s,sasl:plain)<r28vVcJg/b3AAAIH>: passwd-file: Password mismatch",
		"", "dovecot-auth", 5, 10 * time.Minute, imap},
	{"Dovecot 2.0",
		"dovecot: pop3-login: Aborted login (auth failed, 1 attempts): user=<tester>, method=PLAIN, rip=%s, lip=192.0.2.1",
		"", "dovecot", 3, time.Hour, imap},
	{"Dovecot 2.3",
		"dovecot: imap-login: Disconnected: Connection closed (auth failed, 1 attempts in 2 secs): user=<tester>, method=PLAIN, rip=%s, lip=192.0.2.1, TLS, session=<ybIwVMJgYc3AAAIH>",
		"", "dovecot", 3, time.Hour, imap},
	{"Dovecot 2.4",
		"dovecot: imap-login: Login aborted: Logged out (auth failed, 2 attempts in 0 secs) (auth_failed): user=<tester>, method=PLAIN, rip=%s, lip=192.0.2.1, session=<VrAPVMJgU+3AAAIH>",
		"", "dovecot", 3, time.Hour, imap},
	{"Postfix, Cyrus and SASL: SASL",
		"postfix/smtpd[3325]: warning: host.example.net[%s]: SASL CRAM-MD5 authentication failed: authentication failure",
		"", "postfix-sasl", 3, time.Hour, sasl},
	{"Postfix, Cyrus and SASL: SASL without a reason",
		"postfix/smtpd[3325]: warning: host.example.net[%s]: SASL LOGIN authentication failed",
		"", "postfix-sasl", 3, time.Hour, sasl},
	{"SpamAssassin's milter",
		"postfix/cleanup[3325]: EB9DBAE: milter-reject: END-OF-MESSAGE from unknown[%s]: 5.7.1 Blocked by SpamAssassin; from=<a@example.net> to=<tester@example.com> proto=ESMTP helo=<x>",
		"", "postfix-spam", 5, 10 * time.Minute, smtp},
	{"Rspamd's milter",
		"postfix/cleanup[3325]: EB9DBAE: milter-reject: END-OF-MESSAGE from unknown[%s]: 5.7.1 Spam message rejected; from=<a@example.net> to=<tester@example.com> proto=ESMTP helo=<x>",
		"", "postfix-spam", 5, 10 * time.Minute, smtp},
	{"Postfix, Cyrus and SASL: IMAP",
		"cyrus/imap[18541]: badlogin: host.example.net[%s] plaintext tester SASL(-13): authentication failure: checkpass failed",
		"", "cyrus-imap", 3, 10 * time.Minute, imap},
	{"Postfix, Cyrus and SASL: POP3",
		"cyrus/pop3[18542]: badlogin: [%s] DIGEST-MD5 [SASL(-13): authentication failure: client response doesn't match what we generated]",
		"", "cyrus-imap", 3, 10 * time.Minute, imap},
}

// attackers returns the addresses that attack setUps[i]: one of each family for
// documentation, and the article's own.
func (s setUp) attackers(i int) []netip.Addr {
	list := []netip.Addr{addr(fmt.Sprintf("198.51.100.%d", 10+i)), addr(fmt.Sprintf("2001:db8:a:%d::66", i))}
	if s.own != "" {
		list = append(list, addr(s.own))
	}
	return list
}

func (s setUp) ban(client netip.Addr) ban {
	return ban{setOf(client), client.String(), s.jail, s.bantime}
}

func setOf(client netip.Addr) string {
	if client.Is4() {
		return "banned_ipv4"
	}
	return "banned_ipv6"
}

// Each line bans after exactly its number of failures, on its ports and for its time.
func TestSetUps(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{})
		want := make(bans)
		var lines, last []string
		for i, s := range setUps {
			for _, client := range s.attackers(i) {
				line := fmt.Sprintf(s.line, client)
				for range s.maxretry - 1 {
					lines = append(lines, line)
				}
				last = append(last, line)
				want[s.ban(client)] = s.ports
			}
		}
		m.log(lines...)
		for i, s := range setUps {
			for _, client := range s.attackers(i) {
				nstest.Poll(m, fmt.Sprintf("%s: %d failures of %s", s.name, s.maxretry-1, client), func() bool {
					return m.found(s.jail, client) == s.maxretry-1
				})
			}
		}
		m.banned(bans{})
		m.log(last...)
		m.banned(want)

		table := m.run("nftwl", "list", "banned")
		for i, s := range setUps {
			port := s.ports[i%len(s.ports)]
			for _, client := range s.attackers(i)[:2] {
				m.drop(client, port)
				m.pass(client, 22)
				m.pass(neighbour(client), port)
				if n := m.found(s.jail, client); n != s.maxretry {
					t.Errorf("%s: %d failures of %s, after %d lines", s.name, n, client, s.maxretry)
				}
			}
			for _, client := range s.attackers(i) {
				if row := rowOf(table, client); !strings.HasSuffix(row, s.jail) {
					t.Errorf("%s: `nftwl list` shows %q", s.name, row)
				}
			}
		}
	})
}

// neighbour is an address in a network without attackers.
func neighbour(client netip.Addr) netip.Addr {
	if client.Is4() {
		return addr("203.0.113.5")
	}
	return addr("2001:db8:a:ffff::5")
}

func rowOf(table string, client netip.Addr) string {
	for row := range strings.Lines(table) {
		if f := strings.Fields(row); len(f) > 1 && f[1] == client.String() {
			return strings.TrimSpace(row)
		}
	}
	return ""
}

// However many lines Postfix and Dovecot log about one attempt, it counts once in a
// jail. Counts of different jails are not added up.
func TestOneAttemptCountsOnce(t *testing.T) {
	postfix, dovecot23, pam, dovecot24 := addr("198.51.100.1"), addr("198.51.100.2"), addr("198.51.100.3"), addr("2001:db8:a::4")
	attempts := map[netip.Addr][]string{
		postfix: {
			"postfix/smtpd[371]: connect from unknown[%s]",
			"postfix/smtpd[371]: warning: unknown[%s]: SASL LOGIN authentication failed: UGFzc3dvcmQ6",
			"postfix/smtpd[371]: lost connection after AUTH from unknown[%s]",
			"postfix/smtpd[371]: disconnect from unknown[%s] ehlo=1 auth=0/1 commands=1/2",
		},
		dovecot23: {
			"dovecot: auth: passwd-file(alice,%s,<potQVcJgqZrAAAIH>): Password mismatch",
			"dovecot: imap-login: Disconnected: Connection closed (auth failed, 1 attempts in 1 secs): user=<alice>, method=PLAIN, rip=%s, lip=192.0.2.1, session=<potQVcJgqZrAAAIH>",
		},
		pam: {
			"auth: pam_unix(dovecot:auth): authentication failure; logname= uid=0 euid=0 tty=dovecot ruser=alice rhost=%s  user=alice",
			"dovecot: imap-login: Disconnected: Connection closed (auth failed, 1 attempts in 1 secs): user=<alice>, method=PLAIN, rip=%s, lip=192.0.2.1, session=<potQVcJgqZrAAAIH>",
		},
		dovecot24: {
			"dovecot: auth(alice,%s,sasl:plain)<r28vVcJg/b3AAAIH>: passwd-file: Password mismatch",
			"dovecot: imap-login: Login aborted: Connection closed (auth failed, 1 attempts in 0 secs) (auth_failed): user=<alice>, method=PLAIN, rip=%s, lip=2001:db8::1, session=<r28vVcJg/b3AAAIH>",
		},
	}
	counts := map[netip.Addr]map[string]int{
		postfix:   {"postfix-sasl": 1, "postfix-lost": 1},
		dovecot23: {"dovecot": 1, "dovecot-auth": 1},
		pam:       {"dovecot": 1, "dovecot-auth": 1},
		dovecot24: {"dovecot": 1, "dovecot-auth": 1},
	}
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{})
		const tries = 2
		for client, lines := range attempts {
			for range tries {
				for _, line := range lines {
					m.log(fmt.Sprintf(line, client))
				}
			}
		}
		// When the last address in the log is banned, every jail has read the whole log.
		end := m.endOfLog()
		for client, jails := range counts {
			for _, jail := range []string{"postfix-sasl", "postfix-lost", "postfix-spam", "dovecot", "dovecot-auth", "cyrus-imap"} {
				if got, want := m.found(jail, client), tries*jails[jail]; got != want {
					t.Errorf("%s has counted %d failures of %s, want %d", jail, got, client, want)
				}
			}
		}
		m.banned(end)

		// The third attempt is one too many: one jail bans.
		for client, lines := range attempts {
			for _, line := range lines {
				m.log(fmt.Sprintf(line, client))
			}
		}
		end[ban{"banned_ipv4", postfix.String(), "postfix-sasl", time.Hour}] = sasl
		end[ban{"banned_ipv4", dovecot23.String(), "dovecot", time.Hour}] = imap
		end[ban{"banned_ipv4", pam.String(), "dovecot", time.Hour}] = imap
		end[ban{"banned_ipv6", dovecot24.String(), "dovecot", time.Hour}] = imap
		m.banned(end)
	})
}

// endOfLog logs failures of a new address for each jail, and waits until these addresses
// are banned. The jails have then read every line before. It returns these bans.
func (m *machine) endOfLog() bans {
	m.Helper()
	want := make(bans)
	last := make(map[string]bool)
	for i, s := range setUps {
		if last[s.jail] {
			continue
		}
		last[s.jail] = true
		client := addr(fmt.Sprintf("203.0.113.%d", 100+i))
		for range s.maxretry {
			m.log(fmt.Sprintf(s.line, client))
		}
		want[s.ban(client)] = s.ports
	}
	nstest.Poll(m, "the bans for the last lines of the log", func() bool {
		got := m.bans()
		for b := range want {
			if got[b] == nil {
				return false
			}
		}
		return true
	})
	return want
}

// A jail's mode reaches the filter.
func TestAggressive(t *testing.T) {
	const noPassword = "dovecot: imap-login: Login aborted: Connection closed (no auth attempts in 0 secs) (no_auth_attempts): user=<>, rip=%s, lip=192.0.2.1, session=<S>"
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{jails: "[dovecot]\nmode = aggressive\n"})
		client, guesser := addr("198.51.100.66"), addr("2001:db8:a:66::1")
		m.fail(noPassword, client, 3)
		m.fail(wrongPassword, guesser, 3)
		m.banned(bans{
			{"banned_ipv4", client.String(), "dovecot", time.Hour}:  imap,
			{"banned_ipv6", guesser.String(), "dovecot", time.Hour}: imap,
		})
	})
}

// Text that a client chooses, such as a user name, neither bans another address nor
// runs as a command.
func TestHostileNames(t *testing.T) {
	attacker, victim := "198.51.100.66", "203.0.113.5"
	names := []string{
		"$(touch /run/ran)", "`touch /run/ran`", "';touch /run/ran;'", `";touch /run/ran;"`, "<ip>", "%(port)s",
		"x>, method=PLAIN, rip=" + victim + ", lip=192.0.2.1, session=<a",
		"x>, method=PLAIN, rip=" + victim + ", lip=192.0.2.1",
		"x> rip=" + victim + ", session=<a>",
		"x," + victim + ",",
		"x) rhost=" + victim + " ",
		"x[" + victim + "]: SASL LOGIN authentication failed: x",
	}
	// So that a single line bans.
	var jails strings.Builder
	for _, jail := range []string{"postfix-sasl", "dovecot", "dovecot-auth", "cyrus-imap"} {
		fmt.Fprintf(&jails, "[%s]\nmaxretry = 1\n", jail)
	}
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{jails: jails.String()})
		for _, name := range names {
			m.log(
				"postfix/smtpd[371]: warning: unknown["+attacker+"]: SASL LOGIN authentication failed: authentication failure, sasl_username="+name,
				"dovecot: imap-login: Disconnected: Connection closed (auth failed, 1 attempts in 1 secs): user=<"+name+">, method=PLAIN, rip="+attacker+", lip=192.0.2.1, session=<S>",
				"dovecot: imap-login: Login aborted: Connection closed (auth failed, 1 attempts in 0 secs) (auth_failed): user=<"+name+">, method=PLAIN, rip="+attacker+", lip=192.0.2.1, session=<S>",
				"dovecot: auth: passwd-file("+name+","+attacker+",<S>): Password mismatch",
				"auth: pam_unix(dovecot:auth): authentication failure; logname= uid=0 euid=0 tty=dovecot ruser="+name+" rhost="+attacker+"  user=root",
				"cyrus/imap[18541]: badlogin: host.example.net["+attacker+"] plaintext "+name+" SASL(-13): authentication failure: checkpass failed",
			)
		}
		m.endOfLog()
		caught := make(map[string]bool)
		for b := range m.bans() {
			switch b.address {
			case victim:
				t.Errorf("a user name bans %s, with the jail %s", victim, b.comment)
			case attacker:
				caught[b.comment] = true
			}
		}
		if len(caught) == 0 {
			t.Error("the attacker is not banned")
		}
		if m.status("test", "-e", "/run/ran") == 0 {
			t.Error("a user name ran as a command")
		}
	})
}

// nftwl never takes what fail2ban passes as an address for a flag.
func TestHostileAddress(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{})
		m.run("fail2ban-client", "set", "cyrus-imap", "banip", "--help")
		nstest.Poll(m, "the ban to fail", func() bool { return strings.Contains(m.logged(), "Failed to execute ban jail") })
		if log := m.logged(); !strings.Contains(log, `nftwl: error: "--help" is not an IP address`) {
			t.Error(log)
		}
		nstest.Must(m, os.Truncate(m.Path(journal), 0)) // because stop looks for complaints
	})
}
