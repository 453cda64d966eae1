package doctor

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"syscall"

	"nftwl/pkg/config"
)

func (d *Doctor) checkConfig(context.Context) {
	path := d.ConfigPath
	if path == "" {
		path = config.Path
	}
	c, err := config.Load(d.ConfigPath)
	if err != nil {
		d.config = config.Default()
		d.fail("config", remedy{words: "correct it; until then no login is trusted, and what follows looks at the defaults"}, "%v", err)
		return
	}
	d.config, d.valid = c, true
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		d.ok("config", "no %s, so the defaults hold", path)
		return
	case err != nil: // it has just been read
		d.fail("config", remedy{words: "see who moves or replaces it"}, "%v", err)
		return
	}
	d.ok("config", "%s is valid", path)

	// Who can write it says whom the firewall trusts; and the units read it as a
	// user of their own.
	readable := remedy{"let all read it; it holds no secrets", "chmod 644 " + quote(path)}
	owner := info.Sys().(*syscall.Stat_t).Uid
	switch mode := info.Mode().Perm(); {
	case owner != 0:
		d.fail("config.mode", remedy{"make it root's, who alone should say whom the firewall trusts", "chown root:root " + quote(path)},
			"%s belongs to user %d", path, owner)
	case mode&0o022 != 0:
		d.fail("config.mode", remedy{"let root alone write it", "chmod 644 " + quote(path)},
			"%s has mode %04o: others than root can write it", path, mode)
	case mode&0o004 == 0 && systemctl() != "":
		d.fail("config.mode", readable, "%s has mode %04o: the units of nftwl, which run as a user of their own, cannot read it", path, mode)
	case mode&0o004 == 0:
		d.warn("config.mode", readable, "%s has mode %04o: where nftwl does not run as root, it cannot read it", path, mode)
	default:
		d.ok("config.mode", "%s is root's, with mode %04o", path, mode)
	}
}
