package cluster

import (
	"bufio"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"nftwl/pkg/nstest"
)

// key is of the reports to nftwld.
const key = "0123456789abcdef0123456789abcdef"

// takesReports writes a configuration with which nftwld takes Dovecot's reports.
func (n *node) takesReports() {
	nstest.Write(n.t, filepath.Join(n.dir, "key"), key+"\n", 0o600)
	n.config("policy: {key_file: " + n.dir + "/key}")
}

// report tells nftwld of a login, as Dovecot does.
func (n *node) report(addr, user string) {
	n.t.Helper()
	body := fmt.Sprintf(`{"login":%q,"pwhash":"0f6f","remote":%q,"local":"10.9.0.1","protocol":"imap","success":true}`, user, addr)
	local := netip.MustParseAddr("127.0.0.1")
	c, err := n.peer.Dial(local, netip.AddrPortFrom(local, 8085), nstest.Patience)
	nstest.Must(n.t, err)
	defer c.Close()
	_, err = fmt.Fprintf(c, "POST /?command=report HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", key, len(body), body)
	nstest.Must(n.t, err)
	if line, err := bufio.NewReader(c).ReadString('\n'); !strings.HasPrefix(line, "HTTP/1.1 200 ") {
		n.t.Fatalf("%s: a report: %q, %v", n.name, line, err)
	}
}

// An engine that is down, hangs or is busy delays no login, and what happens
// meanwhile is shared afterwards.
func TestEngineGone(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		l := newLAN(t, d, 2, "--lua-time-limit", "50")
		a, b := l.nodes[0], l.nodes[1]
		for _, n := range l.nodes {
			n.takesReports()
		}
		l.start()
		for i, gone := range []struct {
			name, reason string
			away, back   func()
		}{
			{"down", "network", func() { l.engine.Signal(syscall.SIGKILL) }, l.engine.Start},
			{"hanging", "timeout", func() { l.engine.Signal(syscall.SIGSTOP) }, func() { l.engine.Signal(syscall.SIGCONT) }},
			{"busy", "timeout", func() { l.engine.Spawn("EVAL", "while true do end", "0") }, func() { l.engine.Do("SCRIPT", "KILL") }},
		} {
			addr := func(host int) string { return fmt.Sprintf("198.51.100.%d", 10*i+host) }
			gone.away()
			a.disconnected(gone.reason)
			b.disconnected(gone.reason)
			// None of this returns before it has happened.
			a.login(addr(1), "alice")
			b.report(addr(2), "bob")
			a.nftwl("ban", addr(3))
			if !a.is("trusted", addr(1)) || !a.is("banned", addr(3)) {
				t.Errorf("%s: no login or ban on the machine itself", gone.name)
			}
			b.becomes("trusted", addr(2), true)
			gone.back()
			a.connected()
			b.connected()
			b.becomes("trusted", addr(1), true)
			b.becomes("banned", addr(3), true)
			a.becomes("trusted", addr(2), true)
		}
		if log := a.log(); !strings.Contains(log, "level=ERROR msg=cluster") || !strings.Contains(log, "reached again") {
			t.Error("the log does not say that the engine was gone and came back")
		}
	})
}

// nftwld ends while the engine hangs.
func TestStopWhileHanging(t *testing.T) {
	l := newLAN(t, nstest.Host, 1)
	l.start()
	l.engine.Signal(syscall.SIGSTOP)
	l.nodes[0].login("198.51.100.1", "alice")
	l.nodes[0].stop()
	l.engine.Signal(syscall.SIGCONT)
}

// A machine that is cut off goes on alone, with one pending record an address. Then
// both sides' changes are merged, each by its age.
func TestCutOff(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		l := newLAN(t, d, 2)
		l.start()
		a, b := l.nodes[0], l.nodes[1]
		const both, removed, again, unbanned = "198.51.100.1", "198.51.100.2", "198.51.100.3", "198.51.100.4"
		for _, addr := range []string{both, removed, again} {
			a.login(addr, "alice")
			b.becomes("trusted", addr, true)
		}
		a.nftwl("ban", unbanned)
		b.becomes("banned", unbanned, true)
		l.quiet()

		nstest.Unplug(t, 1)
		b.disconnected("timeout")
		a.login("203.0.113.1", "alice")
		a.nftwl("remove", removed) // which b still trusts
		a.nftwl("remove", again)
		a.nftwl("unban", unbanned)
		b.login(again, "bob") // later
		for range 3 {
			b.login("203.0.113.2", "bob")
			b.nftwl("remove", "203.0.113.2")
		}
		b.login("203.0.113.2", "bob")
		b.login("203.0.113.3", "bob")
		b.nftwl("ban", "203.0.113.4")
		nstest.Poll(t, "one pending record an address", func() bool {
			return b.metric("cluster_waiting trusted") == 2 && b.metric("cluster_waiting banned") == 1
		})

		nstest.Plug(t, 1)
		b.connected()
		for _, n := range l.nodes {
			for _, addr := range []string{both, again, "203.0.113.1", "203.0.113.2", "203.0.113.3"} {
				n.becomes("trusted", addr, true)
			}
			n.becomes("trusted", removed, false)
			n.becomes("banned", "203.0.113.4", true)
			n.becomes("banned", unbanned, false)
		}
		l.quiet()
		l.same()
		if waiting := b.metric("cluster_waiting trusted"); waiting != 0 {
			t.Errorf("%v records are still pending", waiting)
		}
	})
}

// An engine that has lost all that it had, or a part, is filled again from what the
// machines have, and no removal is undone.
func TestEngineLoses(t *testing.T) {
	const (
		kept, removed = "198.51.100.1", "198.51.100.2"
		ban, unbanned = "198.51.100.3", "198.51.100.4"
		late          = "198.51.100.5"
	)
	for name, test := range map[string]struct {
		args []string
		lose func(l *lan)
	}{
		"AOF": {[]string{"--appendonly", "yes", "--appendfsync", "always"}, func(l *lan) {
			l.engine.Signal(syscall.SIGKILL)
			l.engine.Start()
		}},
		"nothing saved": {nil, func(l *lan) {
			l.engine.Signal(syscall.SIGKILL)
			l.engine.Start()
		}},
		"FLUSHALL": {nil, func(l *lan) { l.engine.Do("FLUSHALL") }},
		"lagging replica": {nil, func(l *lan) {
			// It takes over the address, as a floating IP does.
			l.replica.Do("REPLICAOF", "NO", "ONE")
			a, b := l.nodes[0], l.nodes[1]
			a.login(late, "alice")
			b.becomes("trusted", late, true)
			a.nftwl("remove", "198.51.100.6")
			b.becomes("trusted", "198.51.100.6", false)
			l.quiet()
			l.engine.Signal(syscall.SIGKILL)
			l.replica.Do("CONFIG", "SET", "port", "6379")
			l.engine = l.replica.At(nstest.Hub + ":6379")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			eachEngine(t, func(t *testing.T, d nstest.Debian) {
				l := newLAN(t, d, 2, test.args...)
				if name == "lagging replica" {
					nstest.Must(t, os.Mkdir("/run/replica", 0o755))
					l.replica = d.NewEngine(t, nstest.Hub+":6400", "/run/replica")
					l.replica.Do("REPLICAOF", nstest.Hub, "6379")
					nstest.Poll(t, "the replica", func() bool { return strings.Contains(l.replica.Do("INFO", "replication"), "master_link_status:up") })
				}
				l.start()
				a, b := l.nodes[0], l.nodes[1]
				a.login(kept, "alice")
				a.login(removed, "alice")
				a.login("198.51.100.6", "alice")
				a.nftwl("ban", ban, "--comment", "by hand")
				b.nftwl("ban", unbanned)
				b.becomes("trusted", "198.51.100.6", true)
				b.becomes("banned", ban, true)
				a.becomes("banned", unbanned, true)
				a.nftwl("remove", removed)
				a.nftwl("unban", unbanned)
				b.becomes("trusted", removed, false)
				b.becomes("banned", unbanned, false)
				l.quiet()
				before := l.hash()
				if l.replica != nil {
					nstest.Poll(t, "the replica to have all", func() bool { return l.hashOf(l.replica) == before })
				}
				merges := []float64{a.metric("cluster_merges"), b.metric("cluster_merges")}

				test.lose(l)
				nstest.Poll(t, "the engine to be filled", func() bool {
					if name == "AOF" {
						return a.metric("cluster_connected") == 1 && b.metric("cluster_connected") == 1
					}
					return a.metric("cluster_merges") > merges[0] && b.metric("cluster_merges") > merges[1] &&
						strings.Contains(l.hash(), kept) && strings.Contains(l.hash(), ban)
				})
				// A login afterwards shows that all of it works.
				b.login("203.0.113.1", "bob")
				a.becomes("trusted", "203.0.113.1", true)
				l.quiet()
				for _, n := range l.nodes {
					n.becomes("trusted", kept, true)
					n.becomes("banned", ban, true)
					n.becomes("trusted", removed, false)
					n.becomes("banned", unbanned, false)
					n.becomes("trusted", "198.51.100.6", name != "lagging replica")
					n.becomes("trusted", late, name == "lagging replica")
				}
				l.same()
				if after := l.hash(); !strings.Contains(after, removed+" -") || !strings.Contains(after, unbanned+" -") {
					t.Errorf("the engine has lost removals:\n%s\nnow\n%s", before, after)
				}
			})
		})
	}
}

// hash is what the engine has of both lists: a line an address, "192.0.2.7 +".
func (l *lan) hash() string { return l.hashOf(l.engine) }

func (l *lan) hashOf(e *nstest.Engine) string {
	l.t.Helper()
	var lines []string
	for _, name := range []string{"trusted", "banned"} {
		words := strings.Split(e.Do("HGETALL", "nftwl:{mail}:"+name), "\n")
		for i := 0; i+1 < len(words); i += 2 {
			lines = append(lines, name+" "+words[i]+" "+words[i+1][:1])
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// The machines follow a failover that Sentinel makes, to an engine with an address
// and a certificate of its own.
func TestSentinel(t *testing.T) {
	for _, tls := range []bool{false, true} {
		t.Run(fmt.Sprintf("tls %v", tls), func(t *testing.T) {
			eachEngine(t, func(t *testing.T, d nstest.Debian) { testSentinel(t, d, tls) })
		})
	}
}

func testSentinel(t *testing.T, d nstest.Debian, tls bool) {
	const other = "10.9.0.250" // the replica's address
	ca := newAuthority(t)
	// encrypted are the arguments of an engine that others reach over TLS alone.
	encrypted := func(address, dir string, port int) []string {
		if !tls {
			return nil
		}
		cert, key := ca.sign(t, address)
		nstest.Write(t, dir+"/ca.pem", ca.pem, 0o600)
		nstest.Write(t, dir+"/cert.pem", cert, 0o600)
		nstest.Write(t, dir+"/key.pem", key, 0o600)
		return []string{"--tls-port", strconv.Itoa(port), "--tls-replication", "yes", "--tls-auth-clients", "no",
			"--tls-ca-cert-file", dir + "/ca.pem", "--tls-cert-file", dir + "/cert.pem", "--tls-key-file", dir + "/key.pem"}
	}
	l := newLAN(t, d, 2)
	nstest.IP(t, "addr add "+other+"/24 dev lan0")
	for _, dir := range []string{"/run/primary", "/run/replica", "/run/sentinel"} {
		nstest.Must(t, os.Mkdir(dir, 0o755))
	}
	port, scheme := "6400", "redis"
	if tls {
		port, scheme = "6401", "rediss"
	}
	l.engine = d.NewEngine(t, nstest.Hub+":6400", "/run/primary", encrypted(nstest.Hub, "/run/primary", 6401)...)
	l.replica = d.NewEngine(t, other+":6400", "/run/replica", append(encrypted(other, "/run/replica", 6401), "--replicaof", nstest.Hub+" "+port, "--replica-announce-ip", other)...)
	conf := strings.NewReplacer("HUB", nstest.Hub, "PORT", port).Replace(`port 26378
bind HUB
dir /run/sentinel
protected-mode no
sentinel monitor mailset HUB PORT 1
sentinel down-after-milliseconds mailset 500
sentinel failover-timeout mailset 5000
`)
	for words := range slices.Chunk(encrypted(nstest.Hub, "/run/sentinel", 26379), 2) {
		conf += strings.TrimPrefix(words[0], "--") + " " + words[1] + "\n"
	}
	nstest.Write(t, "/run/sentinel/sentinel.conf", conf, 0o644)
	sentinel := d.NewSentinel(t, nstest.Hub+":26378", "/run/sentinel/sentinel.conf")
	nstest.Until(t, "Sentinel to know the replica", func() error {
		replicas, link := sentinel.Do("SENTINEL", "REPLICAS", "mailset"), l.replica.Do("INFO", "replication")
		if !strings.Contains(replicas, other) || !strings.Contains(link, "master_link_status:up") {
			return fmt.Errorf("%s; %s", replicas, link)
		}
		return nil
	})
	url, caFile := scheme+"://"+nstest.Hub+":26378?master_set=mailset", ""
	if tls {
		url, caFile = strings.Replace(url, "26378", "26379", 1), "ca_file: "+writeFile(t, ca.pem)
	}
	for _, e := range []*nstest.Engine{l.engine, l.replica} { // which do not share their users
		user(e, "nftwl", nodeACL+" +role")
	}
	for _, n := range l.nodes {
		n.as("nftwl", url, password, caFile)
	}
	l.start()
	a, b := l.nodes[0], l.nodes[1]
	a.login("198.51.100.1", "alice")
	b.becomes("trusted", "198.51.100.1", true)

	l.engine.Signal(syscall.SIGKILL)
	a.login("198.51.100.2", "alice")                                                                                  // while there is none
	nstest.Poll(t, "Sentinel to fail over", func() bool { return strings.Contains(l.replica.Try("ROLE"), "master") }) // it closes connections then
	b.becomes("trusted", "198.51.100.2", true)
	b.login("198.51.100.3", "bob")
	a.becomes("trusted", "198.51.100.3", true)
	a.connected()
	b.connected()
	l.engine = l.replica
	l.quiet()
	l.same()
}

// An engine whose memory is full is as one that is down, and is named. What waits
// is sent once there is room.
func TestMemory(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		l := newLAN(t, d, 2)
		l.start()
		a, b := l.nodes[0], l.nodes[1]
		if evicts := a.metric("cluster_evicts"); evicts != 0 {
			t.Errorf("evicts %v", evicts)
		}
		l.engine.Do("CONFIG", "SET", "maxmemory", "1")
		a.login("198.51.100.1", "alice")
		a.disconnected("memory")
		if log := a.log(); !strings.Contains(log, "maxmemory") {
			t.Error("the log does not name maxmemory")
		}
		b.nftwl("ban", "198.51.100.2")
		l.engine.Do("CONFIG", "SET", "maxmemory", "0")
		a.connected()
		b.becomes("trusted", "198.51.100.1", true)
		a.becomes("banned", "198.51.100.2", true)

		// An engine that throws records away is named too.
		l.engine.Do("CONFIG", "SET", "maxmemory", "1gb")
		l.engine.Do("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
		l.engine.Do("CLIENT", "KILL", "TYPE", "normal")
		nstest.Poll(t, "evicts", func() bool { return a.metric("cluster_evicts") == 1 })
		if !strings.Contains(a.log(), "noeviction") {
			t.Error("the log does not say what to set")
		}
	})
}

// What waits for the engine counts whenever the address is looked at.
func TestWaiting(t *testing.T) {
	l := newLAN(t, nstest.Host, 2)
	l.start()
	a, b := l.nodes[0], l.nodes[1]
	const guesser, client, guest = "198.51.100.1", "198.51.100.2", "198.51.100.3"
	a.nftwl("ban", guesser)
	a.login(client, "alice")
	a.login(guest, "bob")
	b.becomes("banned", guesser, true)
	b.becomes("trusted", guest, true)
	b.becomes("trusted", client, true)
	a.nftwl("unban", "--port", "143", guesser)
	b.becomes("banned", guesser, false)
	l.quiet()
	l.engine.Do("CONFIG", "SET", "maxmemory", "1") // it can be read
	a.nftwl("ban", "--timeout", "never", guesser)
	a.nftwl("remove", client, guest)
	a.disconnected("memory")
	a.nftwl("add", "--timeout", "10m", guest)
	for range 3 {
		merges := a.metric("cluster_merges")
		nstest.Must(t, a.cmd.Process.Signal(syscall.SIGHUP))
		nstest.Poll(t, "all to be read", func() bool { return a.metric("cluster_merges") >= merges+2 })
	}
	permanent := func(n *node) bool {
		e, ok := n.list("banned")[guesser+" 143"]
		return ok && e.Timeout == 0
	}
	if !permanent(a) {
		t.Errorf("of %s there is left %v", guesser, a.list("banned"))
	}
	l.engine.Do("CONFIG", "SET", "maxmemory", "0")
	a.connected()
	nstest.Poll(t, "the ban to be permanent on both", func() bool { return permanent(b) })
	b.becomes("trusted", client, false)
	l.quiet()
	if a.is("trusted", client) {
		t.Errorf("%s is trusted again", client)
	}
	for _, n := range l.nodes {
		if e := n.list("trusted")[guest+" 143"]; e.Expires > 600 || e.Timeout == 0 {
			t.Errorf("%s: %s was removed and added again, and has %+v", n.name, guest, e)
		}
	}
}

// A machine that reads more slowly than the log is trimmed reads the whole list.
func TestTrimmed(t *testing.T) {
	eachEngine(t, func(t *testing.T, d nstest.Debian) {
		l := newLAN(t, d, 2)
		l.start()
		a, b := l.nodes[0], l.nodes[1]
		a.nftwl("add", "198.51.100.1")
		b.becomes("trusted", "198.51.100.1", true)
		for i, left := range []string{"0", "1"} {
			l.quiet()
			merges := b.metric("cluster_merges")
			nstest.Must(t, b.cmd.Process.Signal(syscall.SIGSTOP))
			first := 10 * (i + 1)
			for j := range 5 {
				n := l.sequence("trusted")
				a.nftwl("add", "203.0.113."+strconv.Itoa(first+j))
				nstest.Poll(t, "an entry each", func() bool { return l.sequence("trusted") != n })
			}
			n := l.sequence("trusted")
			a.nftwl("remove", "198.51.100.1")
			nstest.Poll(t, "the removal", func() bool { return l.sequence("trusted") != n })
			l.engine.Do("XTRIM", "nftwl:{mail}:trusted:log", "MAXLEN", left)
			nstest.Must(t, b.cmd.Process.Signal(syscall.SIGCONT))
			for j := range 5 {
				b.becomes("trusted", "203.0.113."+strconv.Itoa(first+j), true)
			}
			b.becomes("trusted", "198.51.100.1", false)
			if now := b.metric("cluster_merges"); now != merges+1 {
				t.Errorf("%v merges, then %v", merges, now)
			}
			a.nftwl("add", "198.51.100.1")
			b.becomes("trusted", "198.51.100.1", true)
		}
		l.quiet()
		l.same()
	})
}

// When the engine's clock jumps, trust stays, logins count and removals too. The
// clock cannot be set here: what the engine has is moved, as if it had been.
func TestEngineClock(t *testing.T) {
	for name, hours := range map[string]string{"back": "1", "forward": "-1"} {
		t.Run(name, func(t *testing.T) {
			eachEngine(t, func(t *testing.T, d nstest.Debian) {
				l := newLAN(t, d, 2)
				l.start()
				a, b := l.nodes[0], l.nodes[1]
				const kept, removed, ended = "198.51.100.1", "198.51.100.2", "198.51.100.3"
				for _, addr := range []string{kept, removed, ended} {
					a.login(addr, "alice")
					b.becomes("trusted", addr, true)
				}
				b.nftwl("remove", removed)
				a.becomes("trusted", removed, false)
				l.quiet()
				for _, n := range l.nodes {
					n.stop()
				}
				l.engine.Do("EVAL", `
local hour = ARGV[1] * 3600000
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
	local sign, set, ends, rest = string.match(all[i + 1], '^(.) (%d+) (%d+) (.*)$')
	redis.call('HSET', KEYS[1], all[i], string.format('%s %.0f %.0f %s', sign, set + hour, ends + hour, rest))
end
if hour > 0 then
	local clock = redis.call('TIME')
	redis.call('XSETID', KEYS[2], string.format('%.0f-0', clock[1] * 1000 + hour))
end
return 1`, "2", "nftwl:{mail}:trusted", "nftwl:{mail}:trusted:log", hours)
				for _, n := range l.nodes {
					n.start()
				}
				for _, n := range l.nodes {
					n.connected()
					n.becomes("trusted", kept, true)
					if e := n.list("trusted")[kept+" 993"]; e.Expires > 86400 || e.Expires < 86400-3700 {
						t.Errorf("%+v", e)
					}
				}
				b.login(removed, "bob")
				a.becomes("trusted", removed, true)
				a.nftwl("remove", ended)
				b.becomes("trusted", ended, false)
				l.quiet()
				l.same()
				for _, n := range l.nodes {
					if !n.is("trusted", removed) || n.is("trusted", ended) {
						t.Errorf("%s has lost a login or a removal", n.name)
					}
				}
			})
		})
	}
}
