package systemd

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"nftwl/pkg/nstest"
)

// systemd-analyze reads the units as files. It runs on the machine, because verify looks
// for the programs that the units start.
func TestAnalyze(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.installNftwld()
		units, err := filepath.Glob(m.file("etc/systemd/system/nftwl*.*"))
		nstest.Must(m, err)
		n := 0
		for _, path := range units {
			if strings.HasSuffix(path, ".d") {
				continue
			}
			n++
			unit := filepath.Base(path)
			if out := m.run("systemd-analyze", "verify", "--man=no", unit); out != "" {
				t.Errorf("verify %s: %s", unit, out)
			}
			if strings.HasSuffix(unit, ".service") {
				m.run("systemd-analyze", "security", "--offline=yes", "--threshold=12", unit)
			}
		}
		if n != 6 {
			t.Errorf("%d units: %q", n, units)
		}
	})
}

// Only root and the units can read the directory.
func TestModes(t *testing.T) {
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.install()
		m.fill()
		// All units run as one user. Otherwise each start would change the files' owner.
		owner := func() uint32 {
			info, err := os.Stat(m.file("var/lib/nftwl"))
			nstest.Must(m, err)
			return info.Sys().(*syscall.Stat_t).Uid
		}
		was := owner()
		m.run("systemctl", "start", "nftwl-save")
		if is := owner(); is != was || is == 0 {
			t.Errorf("the directory's owner is %d, and was %d", is, was)
		}
		for path, want := range map[string]os.FileMode{
			"var/lib/nftwl":   os.ModeDir | 0o700,
			snapshotFile:      0o600,
			"var/lib/private": os.ModeDir | 0o700,
		} {
			info, err := os.Stat(m.file(path))
			nstest.Must(m, err)
			if info.Mode() != want {
				t.Errorf("/%s has mode %v", path, info.Mode())
			}
		}
	})
}

// Dovecot's unit comes in three kinds: Debian's restricts nothing, that of Dovecot 2.3.0
// names the capabilities that it keeps, and the third names those that it removes.
func TestDovecotDropIn(t *testing.T) {
	const keeps = "CAP_CHOWN CAP_DAC_OVERRIDE CAP_IPC_LOCK CAP_KILL CAP_NET_BIND_SERVICE CAP_SETGID CAP_SETUID CAP_SYS_CHROOT CAP_SYS_RESOURCE"
	onEach(t, func(t *testing.T, b nstest.Debian) {
		m := newMachine(t, b)
		m.install()
		for _, unit := range []struct {
			name, line string
			trusts     bool // without the drop-in
		}{
			{"all", "", true},
			{"keeps", "CapabilityBoundingSet=" + keeps + "\n", false},
			{"drops", "CapabilityBoundingSet=~CAP_NET_ADMIN CAP_SYS_MODULE\n", false},
		} {
			const service = "etc/systemd/system/dovecot.service"
			const dropIn = service + ".d/nftwl.conf"
			m.write(service, "[Service]\nType=oneshot\nExecStart=/usr/bin/nftwl add 192.0.2.50\n"+unit.line)
			text, err := os.ReadFile(m.file(dropIn))
			nstest.Must(m, err)
			nstest.Must(m, os.Remove(m.file(dropIn)))
			m.run("systemctl", "daemon-reload")
			had := m.capabilities("dovecot.service")
			if _, err := m.try("systemctl", "start", "dovecot"); (err == nil) != unit.trusts {
				t.Errorf("%s: trusts without the drop-in: %v", unit.name, err)
			}
			m.write(dropIn, string(text))
			m.run("systemctl", "daemon-reload")
			has := m.capabilities("dovecot.service")
			m.run("systemctl", "start", "dovecot")
			had["cap_net_admin"] = true
			for c := range had {
				if !has[c] {
					t.Errorf("%s: the drop-in removes %s", unit.name, c)
				}
				delete(has, c)
			}
			for c := range has {
				t.Errorf("%s: the drop-in adds %s", unit.name, c)
			}
		}
	})
}

func (m *machine) capabilities(unit string) map[string]bool {
	m.Helper()
	set := make(map[string]bool)
	for _, c := range strings.Fields(m.run("systemctl", "show", "--value", "--property=CapabilityBoundingSet", unit)) {
		set[c] = true
	}
	return set
}
