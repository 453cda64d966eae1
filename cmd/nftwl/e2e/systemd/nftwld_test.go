package systemd

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

const policyKey = "0123456789abcdef0123456789abcdef"

// installNftwld installs the program where its unit expects it.
func (m *machine) installNftwld() {
	m.Helper()
	program, err := os.ReadFile(nstest.Build(m, "cmd/nftwld"))
	nstest.Must(m, err)
	m.write("usr/bin/nftwld", string(program))
	nstest.Must(m, os.Chmod(m.file("usr/bin/nftwld"), 0o755))
}

// nftwld enables the units of nftwld, as an administrator would.
func (m *machine) nftwld() {
	m.Helper()
	m.installNftwld()
	m.write("etc/nftwl/policy.key", policyKey+"\n")
	nstest.Must(m, os.Chmod(m.file("etc/nftwl/policy.key"), 0o600))
	m.write("etc/nftwl.yaml", "policy: {}\nfailures: {limit: 3}\n")
	m.run("nft", "-f", "/etc/nftwl/sets.nft")
	m.run("systemctl", "enable", "--now", "nftwld")
	m.settle()
}

// report sends the report of a login, like Dovecot's, and returns the status of the
// answer. While nftwld does not run, the report waits in the socket.
func (m *machine) report(user, hash, remote string, success bool) string {
	m.Helper()
	body := fmt.Sprintf(`{"login":%q,"pwhash":%q,"remote":%q,"protocol":"imap","success":%v}`, user, hash, remote, success)
	request := fmt.Sprintf("POST /?command=report HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", policyKey, len(body), body)
	out := m.run("bash", "-c", `exec 3<>/dev/tcp/127.0.0.1/8085; printf '%s' "$1" >&3; cat <&3`, "-", request)
	status, _, _ := strings.Cut(out, "\r\n")
	return status
}

func (m *machine) nftwldStatus() (s struct {
	Reports  map[string]map[string]int
	Failures map[string]int
	Banned   map[string]int
}) {
	m.Helper()
	nstest.Must(m, json.Unmarshal([]byte(m.run("nftwld", "status", "--json")), &s))
	return s
}

func (m *machine) holds(set, element string) {
	m.Helper()
	nstest.Until(m, element+" is in "+set, func() error {
		out, err := m.try("nft", "list", "set", "inet", "filter", set)
		if err == nil && !strings.Contains(out, element) {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
}

// In its sandbox nftwld trusts and bans, and its counts survive a restart. A report that
// comes while it does not run waits.
func TestNftwld(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.nftwld()
		m.state("nftwld.service", "active")
		const ok = "HTTP/1.1 200 OK"
		if got := m.report("alice", "1", "192.0.2.7", true); got != ok {
			t.Errorf("%s", got)
		}
		m.holds("trusted_ipv4", "192.0.2.7 . 993")
		for _, hash := range []string{"2", "3"} {
			m.report("alice", hash, "192.0.2.8", false)
		}
		m.run("systemctl", "restart", "nftwld")
		m.report("alice", "4", "192.0.2.8", false)
		m.holds("banned_ipv4", "192.0.2.8 . 993")
		if s := m.nftwldStatus(); s.Reports["imap"]["failure"] != 1 || s.Banned["stranger"] != 1 {
			t.Errorf("%+v", s)
		}

		// A report starts the stopped service.
		m.run("systemctl", "stop", "nftwld.service")
		m.state("nftwld.service", "inactive")
		if got := m.report("alice", "1", "192.0.2.9", true); got != ok {
			t.Errorf("%s", got)
		}
		m.holds("trusted_ipv4", "192.0.2.9 . 993")
		m.state("nftwld.service", "active")

		// After a reload with a wrong configuration the service goes on, and its status
		// has the error.
		m.write("etc/nftwl.yaml", "policy: {}\nfailures: {limit: none}\n")
		m.run("systemctl", "reload", "nftwld")
		nstest.Until(m, "the status has the error", func() error {
			if s := m.property("nftwld.service", "StatusText"); !strings.Contains(s, "/etc/nftwl.yaml:2: failures.limit") {
				return fmt.Errorf("status %q", s)
			}
			return nil
		})
		m.report("alice", "1", "192.0.2.10", true)
		m.holds("trusted_ipv4", "192.0.2.10 . 993")

		// systemd kills and restarts an nftwld that hangs, and no report is lost.
		m.write("etc/nftwl.yaml", "policy: {}\n")
		m.write("etc/systemd/system/nftwld.service.d/test.conf", "[Service]\nWatchdogSec=1s\nRestartSec=10ms\n")
		m.run("systemctl", "daemon-reload")
		m.run("systemctl", "restart", "nftwld")
		pid := m.property("nftwld.service", "MainPID")
		m.run("kill", "-STOP", pid)
		nstest.Until(m, "another process", func() error {
			if now := m.property("nftwld.service", "MainPID"); now == pid || now == "0" {
				return fmt.Errorf("process %s", now)
			}
			return nil
		})
		m.report("alice", "1", "192.0.2.11", true)
		m.holds("trusted_ipv4", "192.0.2.11 . 993")
	})
}
