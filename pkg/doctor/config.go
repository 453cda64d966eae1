package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
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
	d.checkPorts()
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
	readable := remedy{"let all read it; it holds no secrets", "chmod 644 " + quote(path)}
	switch {
	case owner != 0 || mode&0o022 != 0:
		d.fail("config.mode", remedy{"make it root's, who alone should say whom the firewall trusts", fmt.Sprintf("chown root:root %s && chmod 644 %[1]s", quote(path))},
			"others than root can write %s: it belongs to user %d, with mode %04o", path, owner, mode)
	case mode&0o004 == 0 && systemctl() != "":
		d.fail("config.mode", readable, "%s has mode %04o: the units of nftwl, which run as a user of their own, cannot read it", path, mode)
	case mode&0o004 == 0:
		d.warn("config.mode", readable, "%s has mode %04o: where nftwl does not run as root, it cannot read it", path, mode)
	default:
		d.ok("config", "%s is valid", path)
	}
}

// checkPorts looks at the ports of submission: who reads mail sends some, too.
func (d *Doctor) checkPorts() {
	missing := slices.DeleteFunc([]uint16{465, 587}, func(port uint16) bool { return slices.Contains(d.config.Ports, port) })
	open := listening(missing)
	switch {
	case open != nil:
		d.warn("config.ports", remedy{words: "add them to ports in " + d.configPath()},
			"nobody is trusted to send mail by %s, which this machine listens on, and which ports lacks", ports(open))
	case len(missing) == 2:
		d.skip("config.ports", "ports has neither 465 nor 587, and nothing listens on them here")
	}
}

// listening returns those of TCP's ports that somebody listens on: see
// proc_net_tcp(5).
func listening(ports []uint16) (open []uint16) {
	for _, name := range []string{"tcp", "tcp6"} {
		text, _ := os.ReadFile("/proc/thread-self/net/" + name) // without IPv6 there is none
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			for _, port := range ports {
				const listen = "0A" // TCP_LISTEN of include/net/tcp_states.h
				if len(fields) > 3 && fields[3] == listen && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", port)) && !slices.Contains(open, port) {
					open = append(open, port)
				}
			}
		}
	}
	return open
}

func ports(list []uint16) string {
	words := make([]string, len(list))
	for i, port := range list {
		words[i] = fmt.Sprint(port)
	}
	return strings.Join(words, " and ")
}
