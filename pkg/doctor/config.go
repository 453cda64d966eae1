package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"nftwl/pkg/config"
)

func (d *Doctor) checkConfig(context.Context) {
	path := d.configPath()
	c, err := config.Load(d.ConfigPath)
	if err != nil {
		d.config = config.Default()
		d.fail("config", remedy{words: "correct it: until then nftwl login trusts no one, and nftwld keeps what it has read before; what follows looks at the defaults"}, "%v", err)
		return
	}
	d.config, d.valid = c, true
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		d.ok("config", "no %s, so the defaults hold", path)
		return
	}
	if err != nil { // it has just been read
		d.fail("config", remedy{words: "see who moves or replaces it"}, "%v", err)
		return
	}
	// Who can write it says whom the firewall trusts; and the units read it as a
	// user of their own.
	owner, mode := info.Sys().(*syscall.Stat_t).Uid, info.Mode().Perm()
	switch {
	case owner != 0 || mode&0o022 != 0:
		d.fail("config.mode", remedy{"make it root's, who alone should say whom the firewall trusts", fmt.Sprintf("chown root:root %s && chmod 644 %[1]s", quote(path))},
			"others than root can write %s: it belongs to user %d, with mode %04o", path, owner, mode)
	case mode&0o004 == 0:
		d.warn("config.mode", remedy{"let all read it; it holds no secrets", "chmod 644 " + quote(path)},
			"%s has mode %04o: nftwl's units, which run as a user of their own, cannot read it", path, mode)
	default:
		d.ok("config", "%s is valid", path)
	}
}
