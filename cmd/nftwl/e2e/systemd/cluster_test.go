package systemd

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// clusterDropIn is where the administrator puts it.
const clusterDropIn = "etc/systemd/system/nftwld.service.d/cluster.conf"

// clusterStatus is why nftwld cannot share, by its own word; "" if it can.
func (m *machine) clusterStatus() (reason string, err error) {
	out, err := m.try("nftwld", "status", "--json")
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	var s struct {
		Connected *float64           `json:"cluster_connected"`
		Down      map[string]float64 `json:"cluster_down"`
	}
	nstest.Must(m, json.Unmarshal([]byte(out), &s))
	switch {
	case s.Connected == nil:
		return "", errors.New("no cluster_connected in " + out)
	case *s.Connected == 1:
		return "", nil
	}
	for reason := range s.Down {
		return reason, nil
	}
	return "", errors.New("neither connected nor a reason: " + out)
}

func (m *machine) clusterIs(want string) {
	m.Helper()
	nstest.Until(m, fmt.Sprintf("the cluster is %q", want), func() error {
		reason, err := m.clusterStatus()
		if err == nil && reason != want {
			err = fmt.Errorf("it is %q", reason)
		}
		return err
	})
}

// In its own sandbox nftwld reaches no engine, and the log says what to do. With the
// drop-in it does, with the password that root alone can read.
func TestClusterSandbox(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.nftwld()
		engine := "redis"
		if m.exists("usr/bin/valkey-server") {
			engine = "valkey"
		}
		b.Need(t, "usr/bin/"+engine+"-server", engine+"-server")
		m.run("systemd-run", "--unit=engine", "/usr/bin/"+engine+"-server", "--port", "6379", "--save", "",
			"--user", "default", "off", "--user", "nftwl", "on", ">secret", "~nftwl:*", "+@all")
		m.write("etc/nftwl.yaml", "policy: {}\ncluster: {server: \"redis://nftwl@127.0.0.1\", node: one}\n")

		m.run("systemctl", "restart", "nftwld")
		m.clusterIs("sandbox")
		if log := m.run("journalctl", "--unit=nftwld"); !strings.Contains(log, "hint=") || !strings.Contains(log, "nftwld.service.d/cluster.conf") {
			t.Errorf("no hint at the drop-in in\n%s", log)
		}

		m.write(clusterDropIn, nstest.Contrib(t, "systemd/nftwld.service.d/cluster.conf"))
		m.run("systemctl", "daemon-reload")
		m.run("systemctl", "restart", "nftwld")
		m.clusterIs("login") // without a password
		m.write("etc/nftwl/cluster.password", "secret\n")
		nstest.Must(m, os.Chmod(m.file("etc/nftwl/cluster.password"), 0o600))
		m.run("systemctl", "restart", "nftwld")
		m.clusterIs("")
		m.run("nftwl", "add", "192.0.2.7")
		cli := []string{"--user", "nftwl", "--pass", "secret", "--no-auth-warning", "HGETALL", "nftwl:{mail}:trusted"}
		nstest.Until(m, "the engine has it", func() error {
			out := m.run(engine+"-cli", cli...)
			if !strings.Contains(out, "192.0.2.7") {
				return errors.New(out)
			}
			return nil
		})

		// Where Dovecot does not report, there is no key.
		m.run("rm", "/etc/nftwl/policy.key")
		m.write("etc/nftwl.yaml", "cluster: {server: \"redis://nftwl@127.0.0.1\", node: one}\n")
		m.run("systemctl", "restart", "nftwld")
		m.clusterIs("")
		m.run("systemd-analyze", "verify", "--man=no", "/etc/systemd/system/nftwld.service")
	})
}
