package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

// With the files that nftwl setup has written, Dovecot reports, and other users can
// still read its configuration: dovecot-lda does, with the user's rights.
func TestSetup(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		s := d.start(t, with{})
		s.dovecot.Stop()
		etc := d.Path("etc")
		names := map[string]string{}
		for _, name := range []string{"passwd", "group"} {
			names[name] = nstest.Read(t, filepath.Join(etc, name))
		}
		nstest.Must(t, unix.Mount("none", etc, "tmpfs", 0, "mode=755"))
		for name, text := range names {
			nstest.Must(t, os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644))
		}
		nstest.Must(t, os.MkdirAll(filepath.Join(etc, "dovecot/conf.d"), 0o755))
		conf := strings.Replace(s.read("dovecot.conf"), "!include "+dir+"/91-nftwl-policy.conf", "!include /etc/dovecot/conf.d/*.conf", 1) +
			"log_path = /dev/stderr\n"
		nstest.Must(t, os.WriteFile(filepath.Join(etc, "dovecot/dovecot.conf"), []byte(conf), 0o644))
		nstest.Must(t, os.WriteFile(filepath.Join(etc, "dovecot/conf.d/10.conf"), nil, 0o644))
		s.write("dovecot.conf", conf, 0o644)
		nstest.Must(t, os.WriteFile(filepath.Join(etc, "nftwl.yaml"), []byte(s.read("nftwl.yaml")), 0o644))
		nstest.Build(t, "cmd/nftwld") // beside nftwl
		bin, usr := filepath.Dir(nstest.Build(t, "cmd/nftwl")), d.Path("usr/bin")
		nstest.Must(t, unix.Mount("overlay", usr, "overlay", unix.MS_RDONLY, "lowerdir="+bin+":"+usr))

		inside := func(uid uint32, stdin, name string, args ...string) string {
			t.Helper()
			cmd := exec.Command(name, args...)
			cmd.Dir = "/"
			cmd.Env = []string{"PATH=/usr/sbin:/usr/bin", "HOME=" + dir + "/mail/alice", "USER=alice"}
			cmd.Stdin = strings.NewReader(stdin)
			cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: d.Root, Credential: &syscall.Credential{Uid: uid, Gid: uid}}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%s %q: %v\n%s", name, args, err, out)
			}
			return string(out)
		}
		if out := inside(0, "", "/usr/bin/nftwl", "setup", "policy", "--write"); strings.Contains(out, "does not include") {
			t.Error(out)
		}
		if out := inside(1000, "", "/usr/bin/doveconf", "-n"); strings.Contains(out, key) || !strings.Contains(out, "ssl = no") {
			t.Errorf("doveconf of a user:\n%s", out)
		}
		inside(1000, "Subject: test\n\nDelivered.\n", "/usr/lib/dovecot/dovecot-lda")

		s.startDovecot()
		nstest.Must(t, login("192.0.2.7", "alice", password))
		nstest.Poll(s.t, "the trust", func() bool { return s.in("trusted_ipv4", "192.0.2.7 ") })
	})
}
