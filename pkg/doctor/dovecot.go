package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/doveconf"
	"nftwl/pkg/install"
)

// reload is a remedy in Dovecot's settings.
func reload(format string, args ...any) remedy {
	return remedy{fmt.Sprintf(format, args...) + "; then reload Dovecot", "doveadm reload"}
}

func (d *Doctor) checkDovecot(ctx context.Context) {
	if _, err := exec.LookPath("doveconf"); err != nil {
		d.skip("dovecot", "Dovecot is not installed here")
		return
	}
	// The settings refer to keys, which root alone can read.
	if os.Geteuid() != 0 {
		d.skip("dovecot.settings", "only root can read all of Dovecot's settings")
		return
	}
	out, err := run(ctx, "doveconf", doveconf.Arguments(append(doveconf.AuthPolicyNames, "haproxy_trusted_networks")...)...)
	switch {
	case errors.Is(err, errNoAnswer):
		d.warn("dovecot.settings", remedy{"see what it waits for, and run doctor again to check Dovecot", "doveconf -n"}, "%v", err)
		return
	case err != nil:
		d.fail("dovecot.settings", remedy{"see what this says: with an error, Dovecot would not start", "doveconf -n"}, "%v", err)
		return
	}
	d.dovecot = doveconf.Parse(out)
	d.checkRunning(ctx)
	for _, p := range d.checkProtocols() {
		d.checkPostLogin(p)
	}
}

// checkRunning checks that Dovecot runs, and with the configuration that is
// there.
func (d *Doctor) checkRunning(ctx context.Context) {
	const check = "dovecot.running"
	loaded, running := d.loaded()
	d.running = running
	unit := d.units["dovecot.service"]
	switch {
	case !running && (unit.startsAtBoot() || unit["ActiveState"] == "failed"):
		d.fail(check, remedy{"see why, and start it: systemctl start dovecot", unit.journal()}, "dovecot.service is %s: %s", unit["ActiveState"], unit.why(ctx))
		return
	case !running:
		d.skip(check, "Dovecot is not running, so no login can be tried")
		return
	}
	conf, _ := os.Readlink(d.dovecot.Path("dovecot.conf")) // which the master makes when it starts
	for _, line := range doveconf.Lines(conf) {
		info, err := os.Stat(line.File)
		if d.stale = err == nil && info.ModTime().After(loaded); d.stale {
			d.warn(check, remedy{"have Dovecot read it", "doveadm reload"},
				"Dovecot loaded its configuration %s ago, and has not read it since %s changed", ago(loaded), line.File)
			return
		}
	}
	d.ok(check, "Dovecot runs with the configuration that is there, loaded %s ago", ago(loaded))
}

// loaded returns when the running Dovecot loaded its configuration: when its log
// process started. The master starts that first, and another one at a reload that
// succeeds (services_destroy() of Dovecot's src/master/service.c).
func (d *Doctor) loaded() (at time.Time, running bool) {
	pid, _ := os.ReadFile(d.dovecot.Path("master.pid")) // without it, Dovecot does not run
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) // fails only for a bad address
	booted := time.Now().Add(-time.Duration(now.Nano()))
	files, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is right
	for _, file := range files {
		text, _ := os.ReadFile(file)         // the process can have ended
		stat := strings.Fields(string(text)) // proc_pid_stat(5)
		if len(stat) < 22 || stat[1] != "(log)" || stat[3] != strings.TrimSpace(string(pid)) {
			continue
		}
		const tick = time.Second / 100 // USER_HZ
		ticks, _ := strconv.ParseInt(stat[21], 10, 64)
		// Two more, since the kernel rounds down.
		if started := booted.Add(time.Duration(ticks+2) * tick); started.After(at) {
			at, running = started, true
		}
	}
	return at, running
}

// useDropIn is the remedy if a mail service does not ask nftwl.
func useDropIn() remedy {
	if !exists(install.DropIn) {
		return remedy{"write the settings that ask nftwl, and have Dovecot read them", "nftwl setup dovecot --write && doveadm reload"}
	}
	if _, later := install.Overriding(install.DovecotConf, install.DropIn); later != nil {
		return reload("delete %s: Dovecot reads it later, and it overrides the drop-in", later[0])
	}
	return remedy{"compare " + install.DropIn + " with what this prints, and see that Dovecot includes it", "nftwl setup dovecot"}
}

// checkProtocols checks whom the mail services ask after a login, and returns
// the post-login services among them.
func (d *Doctor) checkProtocols() []*postLogin {
	const check = "dovecot.protocols"
	dovecot := d.dovecot
	var services []*postLogin
	var whom, asking, silent []string
	for _, m := range doveconf.MailServices {
		if !dovecot.Protocols()[m.Protocol] {
			continue
		}
		asker := dovecot.Section("service " + m.Service)
		name, at := doveconf.SocketOf(asker.Values["executable"])
		if at < 0 {
			silent = append(silent, m.Protocol)
			continue
		}
		asking = append(asking, m.Protocol)
		post, listener := dovecot.Listener(dovecot.Path(name))
		switch {
		case name == "":
			d.fail(check, reload("remove one of the two spaces in a row from executable = %s in %s", asker.Values["executable"], asker.Name),
				"an empty name of a post-login service denies every login by %s", m.Protocol)
			return services
		case post == nil:
			d.fail(check, useDropIn(), "no Dovecot service has a listener %s: unless another program does, every login by %s is denied", name, m.Protocol)
			return services
		}
		i := slices.IndexFunc(services, func(p *postLogin) bool { return p.listener == listener })
		if i < 0 {
			i, services = len(services), append(services, &postLogin{Settings: post, listener: listener, socket: dovecot.Path(name)})
			whom = append(whom, post.Name)
		}
		services[i].askers = append(services[i].askers, asker)
	}
	switch {
	case asking == nil && silent == nil:
		d.skip(check, "Dovecot serves no protocol by which users log in")
	case silent == nil:
		d.ok(check, "after a login, %s ask %s", strings.Join(asking, ", "), strings.Join(whom, ", "))
	case d.config.Policy != nil:
		d.skip(check, "logins by %s run no nftwl; policy.dovecot tells whether Dovecot reports them", strings.Join(silent, ", "))
	case asking == nil:
		d.fail(check, useDropIn(), "no mail protocol runs nftwl: logins by %s trust no one", strings.Join(silent, ", "))
	default:
		d.fail(check, useDropIn(), "logins by %s trust no one", strings.Join(silent, ", "))
	}
	return services
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
