package systemd

import (
	"errors"
	"os"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// nftwld, set up as docs/policy.md says on a machine that was installed as the README
// says, and then back to the wrapper. In between doctor finds nothing.
func TestOtherWay(t *testing.T) {
	eachWay(t, func(t *testing.T, b nstest.Debian, source bool) {
		m := newUninstalled(t, b)
		m.installs(source)
		m.settle()
		for _, b := range nstest.Blocks(t, "docs/policy.md", "Setting it up") {
			m.shell(b.Text)
		}
		m.learns(1)
		m.healthy()
		m.diagnoses("the other way", "policy", map[string]string{"policy.dovecot": "ok: "})

		// Another key.
		for _, b := range nstest.Blocks(t, "docs/operation.md", "Changing the configuration") {
			m.shell(b.Text)
		}
		m.learns(2)
		m.healthy()
		m.shell("systemctl reload nftwld; systemctl restart nftwld.socket nftwld")
		m.learns(3)

		for _, b := range nstest.Blocks(t, "docs/policy.md", "The way back") {
			m.shell(b.Text)
		}
		m.learns(4)
		m.healthy()
		m.state("nftwld.socket", "inactive")
		if m.exists("etc/nftwl/policy.key") || strings.Contains(m.run("cat", "/etc/nftwl.yaml"), "\npolicy:") {
			t.Error("something of nftwld is left")
		}
	})
}

// exists reports whether the machine has a file.
func (m *machine) exists(path string) bool {
	_, err := os.Lstat(m.file(path))
	return err == nil
}

// learns lets a client log in, and waits until it is trusted.
func (m *machine) learns(n int) {
	m.Helper()
	nstest.Until(m, client(n)+" is trusted", func() error {
		// The first login can be by the old configuration, while Dovecot reads the new
		// one.
		m.logsIn(n)
		if _, err := m.try("nftwl", "check", "-q", client(n)); err != nil {
			return errors.New("it is not")
		}
		return nil
	})
}
