package fail2ban

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// Log lines that two jails count.
const (
	wrongPassword = "dovecot: imap-login: Disconnected: Connection closed (auth failed, 1 attempts in 2 secs): user=<alice>, method=PLAIN, rip=%s, lip=192.0.2.1, session=<S>"
	wrongSASL     = "postfix/smtpd[371]: warning: unknown[%s]: SASL LOGIN authentication failed: UGFzc3dvcmQ6"
)

// fail logs failures by an address.
func (m *machine) fail(line string, client netip.Addr, times int) {
	m.Helper()
	for range times {
		m.log(fmt.Sprintf(line, client))
	}
}

// login lets a user log in with Dovecot.
func (m *machine) login(client netip.Addr) {
	m.Helper()
	m.run("env", "IP="+client.String(), "USER=alice", "nftwl", "login", "/bin/true")
}

// An address that has logged in is never banned, however many wrong passwords come from
// it. That holds if the login comes after two wrong ones and before a third.
func TestTrusted(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{})
		users := []netip.Addr{addr("203.0.113.7"), addr("2001:db8:a:7::7")}
		late := []netip.Addr{addr("203.0.113.8"), addr("2001:db8:a:8::8")}
		for _, client := range users {
			m.login(client)
			m.fail(wrongPassword, client, 6)
			m.fail(wrongSASL, client, 6)
		}
		for _, client := range late {
			m.fail(wrongPassword, client, 2)
			nstest.Poll(m, "two failures", func() bool { return m.found("dovecot", client) == 2 })
			m.login(client)
			m.fail(wrongPassword, client, 4)
		}
		m.banned(m.endOfLog())
		for _, client := range slices.Concat(users, late) {
			ignored := m.count(fmt.Sprintf("[dovecot] Ignore %s by command", client))
			if n := m.found("dovecot", client); n+ignored != 6 || ignored < 4 {
				t.Errorf("of 6 failures of %s %d are counted, and %d are not", client, n, ignored)
			}
			m.pass(client, 993)
		}

		// When the trust ends, its protection ends too.
		for _, client := range late {
			m.run("nftwl", "remove", client.String())
			m.fail(wrongPassword, client, 1)
			nstest.Poll(m, "a ban", func() bool { return m.status("nftwl", "check", "-q", "--banned", client.String()) == 0 })
			m.drop(client, 993)
		}
	})
}

// With ipv6_prefix: 64, login, failure, ban and unban mean the same network.
func TestIPv6Network(t *testing.T) {
	user, colleague := addr("2001:db8:a:7::7"), addr("2001:db8:a:7:ffff::8")
	attacker, beside := addr("2001:db8:a:66::1"), addr("2001:db8:a:66:ffff::2")
	network := addr("2001:db8:a:66::")
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{
			config: "ipv6_prefix: 64\n",
			firewall: func(file string) string {
				return strings.ReplaceAll(file, `#include "nftwl/trusted-prefix64.nft"`, `include "nftwl/trusted-prefix64.nft"`)
			},
		})
		m.login(user)
		m.fail(wrongPassword, colleague, 6)
		m.fail(wrongPassword, attacker, 3)
		want := m.endOfLog()
		want[ban{"banned_ipv6", network.String(), "dovecot", time.Hour}] = imap
		m.banned(want)
		m.pass(colleague, 993)
		for _, client := range []netip.Addr{attacker, beside} {
			m.drop(client, 993)
			if m.status("nftwl", "check", "-q", "--banned", client.String()) != 0 {
				t.Errorf("`nftwl check --banned` says that %s is not banned", client)
			}
		}
		m.run("fail2ban-client", "set", "dovecot", "unbanip", attacker.String())
		delete(want, ban{"banned_ipv6", network.String(), "dovecot", time.Hour})
		m.banned(want)
		m.pass(attacker, 993)
		m.pass(beside, 993)
	})
}

// An unban removes only what its own jail has banned.
func TestUnban(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{})
		one, both, byHand := addr("198.51.100.66"), addr("198.51.100.67"), addr("2001:db8:a:66::1")
		m.run("nftwl", "ban", "--timeout", "7d", "--port", "143,993", "--comment", "by hand", byHand.String())
		m.fail(wrongPassword, one, 3)
		m.fail(wrongPassword, both, 3)
		m.fail(wrongPassword, byHand, 3)
		want := bans{
			{"banned_ipv4", one.String(), "dovecot", time.Hour}:             imap,
			{"banned_ipv4", both.String(), "dovecot", time.Hour}:            imap,
			{"banned_ipv6", byHand.String(), "by hand", 7 * 24 * time.Hour}: {143, 993},
			{"banned_ipv6", byHand.String(), "dovecot", time.Hour}:          {110, 465, 587, 995, 4190},
		}
		m.banned(want)

		// The second jail's shorter ban adds port 25, which is missing, and leaves the
		// other ports to the first jail.
		m.run("fail2ban-client", "set", "postfix-lost", "banip", both.String())
		want[ban{"banned_ipv4", both.String(), "postfix-lost", 10 * time.Minute}] = []int{25}
		m.banned(want)
		m.run("fail2ban-client", "set", "postfix-lost", "unbanip", both.String())
		delete(want, ban{"banned_ipv4", both.String(), "postfix-lost", 10 * time.Minute})
		m.banned(want)
		m.drop(both, 143)

		// A longer ban takes them over.
		m.run("fail2ban-client", "set", "postfix-lost", "bantime", "5h")
		m.run("fail2ban-client", "set", "postfix-lost", "banip", both.String())
		delete(want, ban{"banned_ipv4", both.String(), "dovecot", time.Hour})
		want[ban{"banned_ipv4", both.String(), "postfix-lost", 5 * time.Hour}] = all
		m.banned(want)
		m.run("fail2ban-client", "set", "dovecot", "unbanip", both.String())
		m.banned(want)
		m.drop(both, 143)

		// Ending it by hand opens the ports of both jails. fail2ban has another command
		// that ends the bans of all jails.
		m.run("fail2ban-client", "set", "dovecot", "banip", both.String())
		m.run("fail2ban-client", "set", "postfix-lost", "unbanip", both.String())
		delete(want, ban{"banned_ipv4", both.String(), "postfix-lost", 5 * time.Hour})
		m.banned(want)
		m.run("fail2ban-client", "unban", both.String())
		m.banned(want)

		// All jails unban the address; the administrator's ban stays.
		m.run("fail2ban-client", "unban", byHand.String())
		delete(want, ban{"banned_ipv6", byHand.String(), "dovecot", time.Hour})
		m.banned(want)
		m.drop(byHand, 993)
		m.pass(byHand, 995)

		// Unban by hand. fail2ban does not complain when its own unban then finds
		// nothing.
		m.run("nftwl", "unban", "--comment", "dovecot", one.String())
		m.pass(one, 993)
		m.run("fail2ban-client", "set", "dovecot", "unbanip", one.String())
		delete(want, ban{"banned_ipv4", one.String(), "dovecot", time.Hour})
		m.banned(want)
	})
}

// A ban ends when its time is over, in the kernel and in fail2ban. The next one can be
// longer. A permanent ban is a very long one.
func TestBantimes(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{jails: `[dovecot]
bantime = 8
bantime.increment = true
bantime.multipliers = 1 2
[postfix-sasl]
bantime = -1
[cyrus-imap]
action = nftwl
`})
		repeated, forGood := addr("198.51.100.66"), addr("2001:db8:a::66")
		m.fail(wrongSASL, forGood, 3)
		permanent := bans{{"banned_ipv6", forGood.String(), "postfix-sasl", 3650 * 24 * time.Hour}: sasl}
		m.banned(permanent)

		m.fail(wrongPassword, repeated, 3)
		first := ban{"banned_ipv4", repeated.String(), "dovecot", 8 * time.Second}
		nstest.Poll(m, "the ban", func() bool { return m.bans()[first] != nil })
		m.banned(permanent)
		nstest.Poll(m, "fail2ban to unban too", func() bool { return m.count("[dovecot] Unban "+repeated.String()) == 1 })

		m.fail(wrongPassword, repeated, 3)
		second := ban{"banned_ipv4", repeated.String(), "dovecot", 16 * time.Second}
		nstest.Poll(m, "the longer ban", func() bool { return m.bans()[second] != nil })
		m.run("fail2ban-client", "set", "dovecot", "unbanip", repeated.String())
		m.banned(permanent)

		m.run("fail2ban-client", "set", "postfix-sasl", "unbanip", forGood.String())
		m.banned(bans{})

		// An action without ports uses those of nftwl.yaml.
		m.run("fail2ban-client", "set", "cyrus-imap", "banip", repeated.String())
		m.banned(bans{{"banned_ipv4", repeated.String(), "cyrus-imap", 10 * time.Minute}: {143, 465, 587, 993, 995}})
		m.run("fail2ban-client", "set", "cyrus-imap", "unbanip", repeated.String())
		m.banned(bans{})
	})
}

// Neither a restart of fail2ban, nor a reload of the firewall, nor a reboot ends or
// extends a ban.
func TestRestarts(t *testing.T) {
	const slack = 3 * time.Second
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{})
		v4, v6 := addr("198.51.100.66"), addr("2001:db8:a:66::1")
		m.fail(wrongPassword, v4, 3)
		m.fail(wrongSASL, v6, 3)
		m.run("nftwl", "ban", "--timeout", "2h", "--comment", "by hand", "198.51.100.67")
		want := bans{
			{"banned_ipv4", v4.String(), "dovecot", time.Hour}:         imap,
			{"banned_ipv6", v6.String(), "postfix-sasl", time.Hour}:    sasl,
			{"banned_ipv4", "198.51.100.67", "by hand", 2 * time.Hour}: {143, 465, 587, 993, 995},
		}
		m.banned(want)
		before := m.left()
		same := func(what string) {
			t.Helper()
			now := m.left()
			if !slices.Equal(slices.Sorted(maps.Keys(now)), slices.Sorted(maps.Keys(before))) {
				t.Fatalf("%s: the bans are\n%v\nwant\n%v", what, m.bans(), want)
			}
			for key, end := range now {
				if d := end.Sub(before[key]); d.Abs() > slack {
					t.Errorf("%s: the ban of %s ends %v later", what, key, d)
				}
			}
			m.drop(v4, 993)
			m.drop(v6, 587)
		}
		reload := func() { m.run("nft", "-f", "/etc/nftables.conf") }
		restored := func(n int) {
			t.Helper()
			nstest.Poll(m, "fail2ban to restore its bans", func() bool { return strings.Count(m.logged(), "] Restore Ban ") == n })
			// When a jail has made a new ban, it has made all before it: fail2ban runs one
			// command of an action at a time.
			m.run("fail2ban-client", "set", "cyrus-imap", "banip", "203.0.113.200")
			nstest.Poll(m, "a ban after that", func() bool {
				return m.status("nftwl", "check", "-q", "--banned", "--port", "143", "203.0.113.200") == 0
			})
			m.run("fail2ban-client", "set", "cyrus-imap", "unbanip", "203.0.113.200")
		}

		m.stop()
		same("fail2ban is stopped")
		m.start()
		restored(2)
		same("fail2ban is restarted")
		if s := m.run("fail2ban-client", "status", "dovecot"); !strings.Contains(s, v4.String()) {
			t.Errorf("fail2ban-client does not show %s:\n%s", v4, s)
		}
		m.run("fail2ban-client", "reload")
		same("fail2ban is reloaded")

		// As nftwl-persist.service does around a reload of nftables.service.
		m.run("nftwl", "save")
		reload()
		m.run("nftwl", "restore")
		same("the firewall is reloaded")

		m.stop()
		m.run("nftwl", "save")
		reload()
		m.banned(bans{})
		m.run("nftwl", "restore")
		same("after a reboot")
		m.start()
		restored(4)
		same("after a reboot, with fail2ban")

		// Nothing was saved. fail2ban bans again what it had banned, for the time left:
		// its bans are half an hour old by now.
		m.stop()
		reload()
		m.age(30 * time.Minute)
		m.start()
		restored(6)
		for key, end := range before {
			before[key] = end.Add(-30 * time.Minute)
			if strings.HasSuffix(key, " by hand") {
				delete(before, key)
			}
		}
		same("the kernel has lost all")

		// fail2ban can unban what it has restored.
		m.run("fail2ban-client", "set", "dovecot", "unbanip", v4.String())
		m.pass(v4, 993)
	})
}

// After the firewall has lost the bans, every address that fails again is banned again,
// although fail2ban still lists all of them as banned.
func TestFlushedRuleset(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{})
		v4, v6, later := addr("198.51.100.66"), addr("2001:db8:a:66::1"), addr("198.51.100.67")
		banned := func(client netip.Addr) ban { return ban{setOf(client), client.String(), "dovecot", time.Hour} }
		// fail2ban ignores failures that come at the same moment as the ban.
		long := time.Now().Add(-10 * time.Second)
		fail := func(client netip.Addr, when time.Time) {
			m.logAt(when, slices.Repeat([]string{fmt.Sprintf(wrongPassword, client)}, 3)...)
		}
		fail(v4, long)
		fail(v6, long)
		m.banned(bans{banned(v4): imap, banned(v6): imap})

		m.run("nft", "-f", "/etc/nftables.conf")
		m.banned(bans{})
		fail(later, long)
		m.banned(bans{banned(later): imap})
		for _, client := range []netip.Addr{v4, v6} {
			fail(client, time.Now())
			nstest.Poll(m, "the ban, again", func() bool {
				n := 0
				for _, e := range m.list() {
					// fail2ban counts the time from the last failure.
					if e.Address == client.String() && e.Comment == "dovecot" && seconds(e.Timeout) > time.Hour-nstest.Patience && seconds(e.Timeout) <= time.Hour {
						n++
					}
				}
				return n == len(imap)
			})
			m.drop(client, 993)
		}

		// fail2ban logs this as an error, once for all bans of a jail.
		if n := strings.Count(m.logged(), "Invariant check failed. Trying to restore a sane environment\n"); n != 1 {
			t.Errorf("fail2ban has logged the new firewall %d times", n)
		}
		nstest.Must(m, os.Truncate(m.Path(journal), 0)) // because stop looks for complaints
	})
}

// age makes the bans older in the database of fail2ban, which must be stopped.
func (m *machine) age(by time.Duration) {
	m.Helper()
	m.run("python3", "-c", fmt.Sprintf(`
import sqlite3
with sqlite3.connect("/var/lib/fail2ban/fail2ban.sqlite3") as db:
    for table in "bans", "bips":
        db.execute("UPDATE %%s SET timeofban = timeofban - %d" %% table)
`, int(by.Seconds())))
}

// fail2ban's "unban --all" forgets its bans, and the firewall keeps them.
func TestUnbanAll(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{})
		client := addr("198.51.100.66")
		m.fail(wrongPassword, client, 3)
		want := bans{{"banned_ipv4", client.String(), "dovecot", time.Hour}: imap}
		m.banned(want)
		m.run("fail2ban-client", "unban", "--all")
		m.banned(want)
		m.run("nftwl", "flush", "banned")
		m.banned(bans{})
		m.fail(wrongPassword, client, 3)
		m.banned(want)
	})
}

// With norestored=1, fail2ban runs no command for the bans that it restores at its
// start. The price is that it runs none for their unban either.
func TestNoRestored(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{jails: "[dovecot]\naction = nftwl[norestored=1, port=\"%(port)s\"]\n"})
		client, lost := addr("198.51.100.66"), addr("198.51.100.67")
		m.fail(wrongPassword, client, 3)
		m.fail(wrongPassword, lost, 3)
		banned := func(client netip.Addr) ban { return ban{"banned_ipv4", client.String(), "dovecot", time.Hour} }
		m.banned(bans{banned(client): imap, banned(lost): imap})
		m.stop()
		m.run("nftwl", "unban", "--port", "110,143,465,587,993,995,4190", lost.String())
		m.start()
		nstest.Poll(m, "fail2ban to restore its bans", func() bool { return strings.Count(m.logged(), "[dovecot] Restore Ban ") == 2 })
		m.run("fail2ban-client", "set", "dovecot", "unbanip", client.String())
		// When it has banned another address, it has handled all bans before.
		last := addr("2001:db8:a::66")
		m.fail(wrongPassword, last, 3)
		m.banned(bans{banned(client): imap, {"banned_ipv6", last.String(), "dovecot", time.Hour}: imap})
	})
}

// After a restart with the files of contrib/fail2ban, nftwl bans the addresses that
// fail2ban's own action had banned.
func TestFromPlainFail2ban(t *testing.T) {
	each(t, func(t *testing.T, system nstest.Debian) {
		m := boot(t, system, with{jails: "[dovecot]\naction = nftables[port=\"imap,imaps\"]\n"})
		client := addr("198.51.100.66")
		m.fail(wrongPassword, client, 3)
		nstest.Poll(m, "fail2ban's own ban", func() bool { return strings.Contains(m.run("nft", "list", "ruleset"), "elements = { "+client.String()) })
		m.banned(bans{})
		m.stop()
		m.write("etc/fail2ban/jail.d/test.local", "")
		m.start()
		b := ban{set: "banned_ipv4", address: client.String(), comment: "dovecot"}
		nstest.Poll(m, "nftwl's ban", func() bool {
			for got, ports := range m.bans() {
				b.bantime = got.bantime
				if got == b && slices.Equal(ports, imap) {
					return true
				}
			}
			return false
		})
		if b.bantime > time.Hour || b.bantime < time.Hour-nstest.Patience {
			t.Errorf("banned for %v", b.bantime)
		}
		m.drop(client, 993)
		if tables := m.run("nft", "list", "tables"); strings.Contains(tables, "f2b") {
			t.Errorf("fail2ban's own table still exists:\n%s", tables)
		}
	})
}
