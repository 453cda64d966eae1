package systemd

import (
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// On a machine where nftwl is only installed, an administrator who follows doctor and
// nothing else gets logins that are trusted and stay trusted. No command that doctor
// prints fails, nor the next steps that these commands print.
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
