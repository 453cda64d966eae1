package doctor

import (
	"context"
	"fmt"
	"os"
	"syscall"

	"nftwl/pkg/config"
)

func (d *Doctor) checkConfig(context.Context) {
	path := d.configPath()
	c, err := config.Load(d.ConfigPath)
	if err != nil {
		d.config = config.Default()
		d.fail("config", remedy{words: "correct it: until then nftwl login trusts no one, and nftwld keeps the previous one; the checks below use the defaults"}, "%v", err)
		return
	}
	d.config, d.valid = c, true
	info, err := os.Stat(path)
	if err != nil {
		d.ok("config", "no %s, so the defaults hold", path)
		return
	}
	// Who can write it decides whom the firewall trusts.
	owner, mode := info.Sys().(*syscall.Stat_t).Uid, info.Mode().Perm()
	switch {
	case owner != 0 || mode&0o022 != 0:
		d.fail("config.mode", remedy{"let only root write it", fmt.Sprintf("chown root:root %s && chmod 644 %[1]s", quote(path))},
			"users other than root can write %s: it belongs to user %d, with mode %04o", path, owner, mode)
	case mode&0o004 == 0:
		d.warn("config.mode", remedy{"let all read it; it holds no secrets", "chmod 644 " + quote(path)},
			"%s has mode %04o: nftwl's units, which run as a user of their own, cannot read it", path, mode)
	default:
		d.ok("config", "%s is valid", path)
	}
}
