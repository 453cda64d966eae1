package fail2ban

import (
	"bufio"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"nftwl/pkg/nstest"
)

// A visit is a conversation with a server, and the number of failures that each jail
// counts for it.
type visit struct {
	name string
	port string
	tls  bool     // from the first byte
	talk []string // alternately the start of a line of the server, and what the client sends
	end  ending
	want counts
}

type counts map[string]int

// The jails that count, and "dovecot" with "mode = aggressive".
const (
	failed  = "dovecot"
	probed  = "dovecot, aggressive"
	guessed = "dovecot-auth"
	sasled  = "postfix-sasl"
	lost    = "postfix-lost"
	spammed = "postfix-spam"
)

type ending int

const (
	reset  ending = iota // a reset, from an attacker or a client that lost its network
	finish               // the client closes without saying goodbye
	leave                // the server closes, after the client has said goodbye
)

func b64(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }

// hello is the first half of a TLS client's first record.
const hello = "\x16\x03\x01\x02\x00\x01\x00"

// dial connects from a client's address, on the calling goroutine's thread.
func dial(from netip.Addr, port string) (*net.TCPConn, error) {
	server := server4
	if from.Is6() {
		server = server6
	}
	return nstest.Dial(from.String(), server, port)
}

// hold holds the visit's conversation, and ends it.
func (v visit) hold(raw *net.TCPConn) error {
	defer raw.Close()
	conn := net.Conn(raw)
	if v.tls {
		conn = tls.Client(raw, &tls.Config{InsecureSkipVerify: true})
	}
	lines := bufio.NewReader(conn)
	for i, text := range v.talk {
		if i%2 == 1 {
			if _, err := conn.Write([]byte(text)); err != nil {
				return err
			}
			continue
		}
		for text != "" {
			line, err := lines.ReadString('\n')
			if err != nil {
				return fmt.Errorf("waiting for %q: %w", text, err)
			}
			if strings.HasPrefix(line, text) {
				break
			}
		}
	}
	switch v.end {
	case reset:
		return raw.SetLinger(0)
	case leave:
		for {
			if _, err := lines.ReadString('\n'); err != nil {
				break
			}
		}
	}
	return nil
}

var visits = []visit{
	{"IMAP: login", "143", false, []string{"* OK", "a LOGIN alice secret\r\n", "a OK", "b LOGOUT\r\n"}, leave, nil},
	{"IMAP: login, reset", "143", false, []string{"* OK", "a LOGIN alice secret\r\n", "a OK"}, reset, nil},
	{"IMAP: reset after the greeting", "143", false, []string{"* OK"}, reset, counts{probed: 1}},
	{"IMAP: close after the greeting", "143", false, []string{"* OK"}, finish, counts{probed: 1}},
	{"IMAP: wrong password, logout", "143", false, []string{"* OK", "a LOGIN alice wrong\r\n", "a NO", "b LOGOUT\r\n"}, leave, counts{failed: 1, guessed: 1}},
	{"IMAP: wrong password, close", "143", false, []string{"* OK", "a LOGIN alice wrong\r\n", "a NO"}, finish, counts{failed: 1, guessed: 1}},
	{"IMAP: wrong password, reset", "143", false, []string{"* OK", "a LOGIN alice wrong\r\n", "a NO"}, reset, counts{failed: 1, guessed: 1}},
	{"IMAP: wrong password, no wait", "143", false, []string{"* OK", "a LOGIN alice wrong\r\n"}, reset, counts{failed: 1, guessed: 1}},
	{"IMAP: 3 wrong passwords, reset", "143", false, []string{"* OK", "a LOGIN alice a\r\n", "a NO", "a LOGIN alice b\r\n", "a NO", "a LOGIN alice c\r\n", "a NO"}, reset, counts{failed: 1, guessed: 3}},
	{"IMAP: unknown user, reset", "143", false, []string{"* OK", "a LOGIN info wrong\r\n", "a NO"}, reset, counts{failed: 1, guessed: 1}},
	{"IMAP: PAM, wrong password, reset", "143", false, []string{"* OK", "a LOGIN root wrong\r\n", "a NO"}, reset, counts{failed: 1, guessed: 2}},
	{"IMAP: PAM, unknown user, reset", "143", false, []string{"* OK", "a LOGIN pam-info wrong\r\n", "a NO"}, reset, counts{failed: 1, guessed: 2}},
	{"IMAP: wrong, then right password", "143", false, []string{"* OK", "a LOGIN alice wrong\r\n", "a NO", "b LOGIN alice secret\r\n", "b OK", "b LOGOUT\r\n"}, leave, counts{guessed: 1}},
	{"IMAP: wrong, then right password, reset", "143", false, []string{"* OK", "a LOGIN alice wrong\r\n", "a NO", "b LOGIN alice secret\r\n", "b OK"}, reset, counts{guessed: 1}},
	{"IMAP: AUTHENTICATE, reset", "143", false, []string{"* OK", "a AUTHENTICATE PLAIN\r\n", "+"}, reset, counts{probed: 1}},
	{"IMAP: AUTHENTICATE, aborted", "143", false, []string{"* OK", "a AUTHENTICATE PLAIN\r\n", "+", "*\r\n", "a "}, reset, counts{probed: 1}},
	{"IMAP: AUTHENTICATE PLAIN", "143", false, []string{"* OK", "a AUTHENTICATE PLAIN\r\n", "+", nstest.PLAIN("alice", "wrong") + "\r\n", "a NO"}, reset, counts{failed: 1, guessed: 1}},
	{"IMAP: CRAM-MD5", "143", false, []string{"* OK", "a AUTHENTICATE CRAM-MD5\r\n", "+", b64("alice 0123456789abcdef0123456789abcdef") + "\r\n", "a NO"}, reset, counts{failed: 1, guessed: 1}},
	{"IMAP: reset in STARTTLS", "143", false, []string{"* OK", "a STARTTLS\r\n", "a OK", hello}, reset, counts{probed: 1}},
	{"IMAPS: reset in the handshake", "993", false, []string{"", hello}, reset, counts{probed: 1}},
	{"IMAPS: no TLS", "993", false, []string{"", "a LOGIN alice wrong\r\n"}, leave, counts{probed: 1}},
	{"IMAPS: login", "993", true, []string{"* OK", "a LOGIN alice secret\r\n", "a OK", "b LOGOUT\r\n"}, leave, nil},
	{"IMAPS: reset after the greeting", "993", true, []string{"* OK"}, reset, counts{probed: 1}},
	{"IMAPS: wrong password, reset", "993", true, []string{"* OK", "a LOGIN alice wrong\r\n", "a NO"}, reset, counts{failed: 1, guessed: 1}},
	{"IMAPS: wrong password, close", "993", true, []string{"* OK", "a LOGIN alice wrong\r\n", "a NO"}, finish, counts{failed: 1, guessed: 1}},

	{"POP3: no password without TLS, reset", "110", false, []string{"+OK", "USER alice\r\n", "-ERR"}, reset, counts{failed: 1}},
	{"POP3: no password without TLS, logout", "110", false, []string{"+OK", "USER alice\r\n", "-ERR", "QUIT\r\n"}, leave, counts{failed: 1}},
	{"POP3S: login", "995", true, []string{"+OK", "USER alice\r\n", "+OK", "PASS secret\r\n", "+OK", "QUIT\r\n"}, leave, nil},
	{"POP3S: wrong password, reset", "995", true, []string{"+OK", "USER alice\r\n", "+OK", "PASS wrong\r\n", "-ERR"}, reset, counts{failed: 1, guessed: 1}},
	{"POP3S: wrong password, logout", "995", true, []string{"+OK", "USER alice\r\n", "+OK", "PASS wrong\r\n", "-ERR", "QUIT\r\n"}, leave, counts{failed: 1, guessed: 1}},
	{"POP3S: unknown user, close", "995", true, []string{"+OK", "USER info\r\n", "+OK", "PASS wrong\r\n", "-ERR"}, finish, counts{failed: 1, guessed: 1}},
	{"POP3: reset after the greeting", "110", false, []string{"+OK"}, reset, counts{probed: 1}},

	{"submission of Dovecot: wrong password, reset", "2587", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH PLAIN " + nstest.PLAIN("alice", "wrong") + "\r\n", "535"}, reset, counts{failed: 1, guessed: 1}},
	{"submission of Dovecot: wrong password, quit", "2587", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH PLAIN " + nstest.PLAIN("alice", "wrong") + "\r\n", "535", "QUIT\r\n"}, leave, counts{failed: 1, guessed: 1}},
	{"submission of Dovecot: unknown user, close", "2587", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH PLAIN " + nstest.PLAIN("info", "wrong") + "\r\n", "535"}, finish, counts{failed: 1, guessed: 1}},
	{"submission of Dovecot: reset after EHLO", "2587", false, []string{"220", "EHLO x\r\n", "250 "}, reset, counts{probed: 1}},

	{"ManageSieve: login", "4190", false, []string{"OK", `AUTHENTICATE "PLAIN" "` + nstest.PLAIN("alice", "secret") + "\"\r\n", "OK", "LOGOUT\r\n"}, leave, nil},
	{"ManageSieve: wrong password, reset", "4190", false, []string{"OK", `AUTHENTICATE "PLAIN" "` + nstest.PLAIN("alice", "wrong") + "\"\r\n", "NO"}, reset, counts{failed: 1, guessed: 1}},
	{"ManageSieve: wrong password, logout", "4190", false, []string{"OK", `AUTHENTICATE "PLAIN" "` + nstest.PLAIN("alice", "wrong") + "\"\r\n", "NO", "LOGOUT\r\n"}, leave, counts{failed: 1, guessed: 1}},
	{"ManageSieve: reset after the greeting", "4190", false, []string{"OK"}, reset, counts{probed: 1}},

	{"Postfix: login", "587", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH PLAIN " + nstest.PLAIN("alice", "secret") + "\r\n", "235", "QUIT\r\n"}, leave, nil},
	{"Postfix: wrong password, quit", "587", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH PLAIN " + nstest.PLAIN("alice", "wrong") + "\r\n", "535", "QUIT\r\n"}, leave, counts{sasled: 1, guessed: 1}},
	{"Postfix: wrong password, reset", "587", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH PLAIN " + nstest.PLAIN("alice", "wrong") + "\r\n", "535"}, reset, counts{sasled: 1, lost: 1, guessed: 1}},
	{"Postfix: LOGIN, close", "25", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH LOGIN\r\n", "334", b64("alice") + "\r\n", "334", b64("wrong") + "\r\n", "535"}, finish, counts{sasled: 1, lost: 1, guessed: 1}},
	{"Postfix: CRAM-MD5, quit", "25", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH CRAM-MD5\r\n", "334", b64("alice 0123456789abcdef0123456789abcdef") + "\r\n", "535", "QUIT\r\n"}, leave, counts{sasled: 1, guessed: 1}},
	{"Postfix: unknown user, quit", "587", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH PLAIN " + nstest.PLAIN("info", "wrong") + "\r\n", "535", "QUIT\r\n"}, leave, counts{sasled: 1, guessed: 1}},
	{"Postfix: unknown mechanism, quit", "587", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH NTLM\r\n", "535", "QUIT\r\n"}, leave, nil},
	{"Postfix: AUTH, aborted", "587", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH LOGIN\r\n", "334", "*\r\n", "501", "QUIT\r\n"}, leave, nil},
	{"Postfix: reset in AUTH", "587", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH LOGIN\r\n", "334"}, reset, counts{lost: 1}},
	{"Postfix: reset after the greeting", "587", false, []string{"220"}, reset, nil},
	{"Postfix: reset after EHLO", "587", false, []string{"220", "EHLO x\r\n", "250 "}, reset, counts{lost: 1}},
	{"Postfix: close after EHLO", "25", false, []string{"220", "EHLO x\r\n", "250 "}, finish, counts{lost: 1}},
	{"Postfix: reset after nonsense", "25", false, []string{"220", "EHLO x\r\n", "250 ", "FOO\r\n", "5"}, reset, counts{lost: 1}},
	{"Postfix: reset in STARTTLS", "587", false, []string{"220", "EHLO x\r\n", "250 ", "STARTTLS\r\n", "220", hello}, reset, nil},
	{"Postfix: a milter takes it for spam", "25", false, []string{"220", "EHLO x\r\n", "250 ", "MAIL FROM:<a@example.net>\r\n", "250", "RCPT TO:<alice@mail.example.org>\r\n", "250", "DATA\r\n", "354", "Subject: x\r\n\r\nx\r\n.\r\n", "550", "QUIT\r\n"}, leave, counts{spammed: 1}},
	{"Postfix: a milter greylists", "2525", false, []string{"220", "EHLO x\r\n", "250 ", "MAIL FROM:<a@example.net>\r\n", "250", "RCPT TO:<alice@mail.example.org>\r\n", "250", "DATA\r\n", "354", "Subject: x\r\n\r\nx\r\n.\r\n", "451", "QUIT\r\n"}, leave, nil},
}

const victim = "203.0.113.5"

// hostile has user names that look like a part of the log's line.
var hostile = []string{
	"<", ">", "a>b", "<a>", "a b", "a,b", "a)b", "a(b", "a:b", "a\tb", "é", "%u",
	victim, "a," + victim, "a," + victim + ",<S>", "a," + victim + "): unknown user", "a," + victim + ",sasl:plain",
	"a," + victim + ",<S>): Password mismatch",
	"a," + victim + ",sasl:plain)<S>: passwd-file: unknown user", "a," + victim + ",sasl:plain): x: unknown user (y",
	"a," + victim + "): x: pam_authenticate() failed: Permission denied",
	"a>, method=PLAIN, rip=" + victim + ", lip=192.0.2.1, session=<a",
	"a>, method=PLAIN, rip=" + victim + ", lip=192.0.2.1, session=<a>",
	"a>, method=PLAIN, rip=" + victim + ", lip=192.0.2.1",
	"a> rip=" + victim,
	"a(auth failed, 1 attempts): user=<x>, rip=" + victim,
	"a rhost=" + victim, "pam-a rhost=" + victim, "pam-a rhost=" + victim + "  user=root",
	"a[" + victim + "]: SASL LOGIN authentication failed: x",
	strings.Repeat("a", 200) + ">," + victim,
}

// withHostile adds the visits of clients with hostile user names. The filter does not
// count names with a parenthesis.
func withHostile(visits []visit) []visit {
	for _, name := range hostile {
		n := 1
		if strings.ContainsAny(name, "()") {
			n = 0
		}
		visits = append(visits,
			visit{"IMAP: " + name, "143", false, []string{"* OK", "a AUTHENTICATE PLAIN\r\n", "+", nstest.PLAIN(name, "wrong") + "\r\n", "a NO"}, reset, counts{failed: 1, guessed: n}},
			visit{"Postfix: " + name, "587", false, []string{"220", "EHLO x\r\n", "250 ", "AUTH PLAIN " + nstest.PLAIN(name, "wrong") + "\r\n", "5", "QUIT\r\n"}, leave, counts{sasled: 1, guessed: n}})
	}
	return visits
}

// The filters count what current programs log. Clients of every kind talk to a real
// Dovecot and a real Postfix, each from its own address. If a new release changes the
// wording of a line, this test fails.
func TestRealLogs(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		for _, log := range []string{"syslog", dir + "/dovecot.log"} {
			t.Run(filepath.Base(log), func(t *testing.T) {
				t.Parallel()
				d := startDaemons(t, system, log)
				clients := make(map[netip.Addr]visit)
				for i, v := range withHostile(visits) {
					clients[addr(fmt.Sprintf("192.0.2.%d", i+1))] = v
				}
				for i, v := range visits {
					clients[addr(fmt.Sprintf("2001:db8::%x", i+1))] = v
				}
				var wg sync.WaitGroup
				// A login process of Dovecot serves one client.
				slots := make(chan bool, 20)
				for from, v := range clients {
					slots <- true
					conn, err := dial(from, v.port)
					if err != nil {
						t.Fatalf("%s: %v", v.name, err)
					}
					wg.Go(func() {
						defer func() { <-slots }()
						if err := v.hold(conn); err != nil {
							t.Errorf("%s: %v", v.name, err)
						}
					})
				}
				wg.Wait()
				nstest.Write(d, dir+"/log", d.stop(), 0o644)

				for _, jail := range []string{failed, probed, guessed, sasled, lost, spammed} {
					got := d.count(jail, "file")
					delete(got, addr(server4)) // from which the test checked that both run
					if log == "syslog" {
						journal := d.count(jail, "journal")
						delete(journal, addr(server4))
						if !maps.Equal(journal, got) {
							t.Errorf("%s counts %v, and from the journal %v", jail, got, journal)
						}
					}
					for from, v := range clients {
						want := v.want[jail]
						if jail == probed {
							want += v.want[failed]
						}
						if got[from] != want {
							t.Errorf("%s counts %d, want %d: %s:\n%s", jail, got[from], want, v.name, d.linesOf(from))
						}
						delete(got, from)
					}
					if len(got) > 0 {
						t.Errorf("%s counts %v, which did not connect", jail, got)
					}
				}
			})
		}
	})
}

// linesOf returns the lines of the log that name an address.
func (d *daemons) linesOf(client netip.Addr) string {
	return strings.Join(regexp.MustCompile(`(?m)^.*\b`+regexp.QuoteMeta(client.String())+`\b.*$`).FindAllString(nstest.Read(d, dir+"/log"), -1), "\n")
}

// count returns how often a jail's filter finds each address in the log.
func (d *daemons) count(jail, logtype string) map[netip.Addr]int {
	d.Helper()
	found := make(map[netip.Addr]int)
	for _, f := range d.failures(jail, logtype) {
		found[f.address]++
	}
	return found
}

// A failure is a line that a filter matches.
type failure struct {
	address netip.Addr
	line    string
}

// failures returns a jail's failures in the log, as fail2ban-regex finds them, in a
// file or from the journal.
func (d *daemons) failures(jail, logtype string) (found []failure) {
	d.Helper()
	config := filepath.Join(dir, "fail2ban")
	if _, err := os.Stat(config); err != nil {
		configureFail2ban(d, d.Debian, config)
	}
	mode := "normal" // as in fail2ban's jail.conf
	if jail == probed {
		jail, mode = failed, "aggressive"
	}
	filter, options, _ := strings.Cut(strings.TrimSuffix(filterOf(d, jail), "]"), "[")
	options = strings.ReplaceAll(options, "%(mode)s", mode)
	filter += "[" + strings.TrimPrefix(options+",logtype="+logtype, ",") + "]"
	out := d.Run(d, "fail2ban-regex", "--config", config, "--out", "<ip> <matches>", dir+"/log", filter)
	for line := range strings.Lines(out) {
		client, line, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		address, err := netip.ParseAddr(client)
		if err != nil {
			d.Fatalf("fail2ban-regex: %s", out)
		}
		found = append(found, failure{address, line})
	}
	return found
}

// filterOf returns the filter that contrib has for a jail.
func filterOf(t testing.TB, jail string) string {
	t.Helper()
	_, section, _ := strings.Cut(nstest.Contrib(t, "fail2ban/jail.d/nftwl.conf"), "\n["+jail+"]\n")
	section, _, _ = strings.Cut(section, "\n[")
	if m := regexp.MustCompile(`(?m)^filter = (.*)$`).FindStringSubmatch(section); m != nil {
		return m[1]
	}
	return jail // as in fail2ban's jail.conf
}
