package systemd

import (
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// Installed, and nothing else: whoever does what doctor says, and nothing but
// that, has logins that are trusted, and stay so. No command fails that it
// prints, nor one that the command then prints as the next.
func TestFreshDoctor(t *testing.T) {
	eachWay(t, func(t *testing.T, b nstest.Debian, source bool) {
		m := newUninstalled(t, b)
		m.write("etc/nftables.conf", debian)
		if source {
			m.inSources("make build && install -m 755 build/nftwld build/nftwl /usr/bin")
		} else {
			m.run("dpkg", "--install", "/root/new.deb")
		}
		done := map[string]bool{}
		for again := true; again; {
			again = false
			for _, r := range m.findings() {
				if r.Status != "ok" && r.Status != "skip" && r.Command != "" && !done[r.Command] {
					again, done[r.Command] = true, true
					if strings.HasPrefix(r.Command, "nftwl setup ") {
						m.next(m.shell(r.Command))
					} else {
						m.shell(r.Command)
					}
					m.settle()
					break
				}
			}
		}
		m.logsIn(1)
		m.trusts(1)
		m.run("systemctl", "reload", "nftables")
		m.settle()
		m.trusts(1)
	})
}
