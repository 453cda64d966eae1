package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
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
	program := find("doveconf")
	d.unread = "Dovecot's settings cannot be read"
	if program == "" {
		d.unread = "Dovecot is not installed here"
		d.skip("dovecot", "Dovecot is not installed here")
		return
	}
	out, err := output(ctx, find("dovecot"), "--version")
	version, _, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	if err != nil {
		d.fail("dovecot.version", remedy{words: "see why it does not run"}, "%v", err)
	} else {
		d.ok("dovecot.version", "Dovecot %s", version)
	}

	// The settings refer to keys, which root alone can read.
	if os.Geteuid() != 0 {
		d.skip("dovecot.settings", "only root can read all of Dovecot's settings")
		return
	}
	out, err = output(ctx, program, doveconf.Arguments(append(doveconf.AuthPolicyNames, "haproxy_trusted_networks")...)...)
	if errors.Is(err, errNoAnswer) {
		d.warn("dovecot.settings", remedy{"see why it does not answer; Dovecot's settings are not looked at", "doveconf -n"}, "%v", err)
		return
	}
	if err != nil {
		d.fail("dovecot.settings", remedy{"correct them: Dovecot would not start with them", "doveconf -n"}, "%s", strings.TrimPrefix(err.Error(), "doveconf: ")) // it says its name itself
		return
	}
	d.dovecot = doveconf.Parse(string(out))
	d.checkRunning(ctx)
	for _, p := range d.checkProtocols() {
		d.checkPostLogin(p)
	}
}

// checkRunning checks that Dovecot runs, and with the configuration that is
// there.
func (d *Doctor) checkRunning(ctx context.Context) {
	const check = "dovecot.running"
	loaded, err := master(d.dovecot.Path("master.pid"))
	if err != nil {
		unit := d.units["dovecot.service"]
		switch {
		case unit["ActiveState"] == "failed":
			d.fail(check, remedy{"fix what it says, then: systemctl restart dovecot", unit.journal()}, "dovecot.service has failed: %s", unit.why(ctx))
		case unit.startsAtBoot():
			d.fail(check, remedy{"start it", "systemctl start dovecot"}, "dovecot.service is enabled, and Dovecot is not running")
		default:
			d.skip(check, "Dovecot is not running, so no login can be tried")
		}
		return
	}
	d.running = true
	newer := d.newer(loaded)
	for end := time.Now().Add(time.Second); newer != nil && time.Now().Before(end); newer = d.newer(loaded) { // it may be about to
		time.Sleep(50 * time.Millisecond)
		if at, err := master(d.dovecot.Path("master.pid")); err == nil {
			loaded = at
		}
	}
	if newer != nil {
		d.stale = true
		d.warn(check, remedy{"have Dovecot read it", "doveadm reload"},
			"Dovecot loaded its configuration %s ago, and has not read it since %s changed", ago(loaded), strings.Join(newer, ", "))
		return
	}
	d.ok(check, "Dovecot runs with the configuration that is there, loaded %s ago", ago(loaded))
}

// newer returns the files of Dovecot's configuration that have changed since.
func (d *Doctor) newer(since time.Time) (files []string) {
	conf, _ := os.Readlink(d.dovecot.Path("dovecot.conf")) // which the master makes when it starts
	for _, line := range doveconf.Lines(conf) {
		info, err := os.Stat(line.File)
		if err == nil && info.ModTime().After(since) && !slices.Contains(files, line.File) {
			files = append(files, line.File)
		}
	}
	return files
}

// master returns when Dovecot's first process loaded its configuration.
// A reload starts another process log, see services_destroy() of Dovecot's
// src/master/service.c; one that fails does not.
func master(pidFile string) (loaded time.Time, err error) {
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return loaded, err
	}
	pid := strings.TrimSpace(string(text))
	main := stat(pid)
	if main[1] != "(dovecot)" { // the file is an old one
		return loaded, fs.ErrNotExist
	}
	ticks := func(s []string) int64 { n, _ := strconv.ParseInt(s[21], 10, 64); return n } // since the machine booted
	started := ticks(main)
	all, _ := filepath.Glob("/proc/[0-9]*") // the pattern is right
	for _, dir := range all {
		if s := stat(filepath.Base(dir)); s[1] == "(log)" && s[3] == pid {
			started = max(started, ticks(s))
		}
	}
	var now unix.Timespec
	err = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	const tick = time.Second / 100 // USER_HZ
	// Two more, since the kernel rounds down.
	return time.Now().Add(time.Duration(started+2)*tick - time.Duration(now.Nano())), err
}

// stat returns what proc_pid_stat(5) describes, of a process whose name has no
// spaces; of one that is gone, empty words.
func stat(pid string) []string {
	text, _ := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	return append(strings.Fields(string(text)), make([]string, 22)...)
}

// useDropIn is the remedy where a mail service does not ask nftwl.
func (d *Doctor) useDropIn() remedy {
	if !exists(install.DropIn) {
		return remedy{"put the settings that ask nftwl into " + install.DovecotDir + ", and have Dovecot read them", "nftwl setup dovecot --write && doveadm reload"}
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
	var enabled, silent, asking, foreign []string
	denied := false
	for _, m := range doveconf.MailServices {
		if !dovecot.Protocols()[m.Protocol] {
			continue
		}
		enabled = append(enabled, m.Protocol)
		asker := dovecot.Section("service " + m.Service)
		name, at := doveconf.SocketOf(asker.Values["executable"])
		if at < 0 {
			silent = append(silent, m.Protocol)
			continue
		}
		path := dovecot.Path(name)
		post, listener := dovecot.Listener(path)
		switch {
		case name == "" && !denied:
			denied = true
			d.fail(check, reload("take one of the two spaces in a row out of executable = %s in %s", asker.Values["executable"], asker.Name),
				"an empty name of a post-login service denies every login by %s", m.Protocol)
		case post != nil:
			i := slices.IndexFunc(services, func(p *postLogin) bool { return p.listener == listener })
			if i < 0 {
				i, services = len(services), append(services, &postLogin{Settings: post, listener: listener, socket: path})
			}
			services[i].askers = append(services[i].askers, asker)
			asking = append(asking, m.Protocol)
		case filepath.IsAbs(name) && exists(path): // another program listens there
			if !slices.Contains(foreign, path) {
				foreign = append(foreign, path)
			}
			asking = append(asking, m.Protocol)
		case !denied:
			denied = true
			d.fail(check, d.useDropIn(), "there is no service with a listener %s, which denies every login by %s", name, m.Protocol)
		}
	}
	var whom []string
	for _, p := range services {
		whom = append(whom, p.Name)
	}
	whom = append(whom, foreign...)
	switch {
	case enabled == nil:
		d.skip(check, "Dovecot serves no protocol by which users log in")
	case denied: // one failure says so, and hides the others
	case silent != nil && d.config.Policy != nil:
		d.skip(check, "logins by %s run no nftwl; policy.dovecot says whether Dovecot reports them", strings.Join(silent, ", "))
	case asking == nil:
		d.fail(check, d.useDropIn(), "no mail protocol runs nftwl: logins by %s trust no one", strings.Join(silent, ", "))
	case silent != nil:
		d.fail(check, d.useDropIn(), "logins by %s trust no one", strings.Join(silent, ", "))
	default:
		d.ok(check, "after a login, %s ask %s", strings.Join(asking, ", "), strings.Join(whom, ", "))
	}
	for _, path := range foreign {
		d.warn("dovecot.socket", remedy{words: "log in once, and look whether the client is trusted"},
			"no service of Dovecot's listens on %s, and whether what does runs nftwl cannot be seen", path)
	}
	return services
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
