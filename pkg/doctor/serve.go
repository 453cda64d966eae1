package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/resident"
)

var startSocket = remedy{"start what listens on it", "systemctl start nftwl.socket"}

func (d *Doctor) checkServe(ctx context.Context) {
	var socket, service unit
	program := systemctl()
	if program != "" {
		units, err := show(ctx, program, "nftwl.socket", "nftwl.service")
		if err != nil {
			d.skip("serve.unit", "%v", err)
			program = ""
		} else {
			socket, service = units[0], units[1]
		}
	}
	paths, denied := d.asked, ", and Dovecot denies every login"
	if len(paths) == 0 {
		paths, denied = []string{d.Socket}, ""
		if socket["ActiveState"] != "active" && socket["UnitFileState"] != "enabled" && silent(d.Socket) {
			d.skip("serve", "nftwl serve is not in use")
			return
		}
	}
	if program != "" && !d.checkServeUnits(ctx, socket, service, denied) {
		return
	}
	for _, path := range paths {
		start := startSocket
		switch {
		case systemctl() == "":
			start.command = "nftwl serve --listen " + quote(path)
		case socket["LoadState"] == "loaded" && !socket.has("Listen", path):
			start.command = "" // by a unit of the administrator's
		}
		d.checkSocket(path, start, denied)
	}
	// The question has started the service where it was not running.
	if service["LoadState"] == "loaded" {
		units, err := show(ctx, program, "nftwl.service")
		switch {
		case err != nil:
			d.skip("serve.sandbox", "%v", err)
		case units[0]["MainPID"] == "0":
			d.skip("serve.sandbox", "nftwl.service is %s", units[0]["ActiveState"])
		default:
			d.checkSandbox(units[0])
			d.checkRunning(units[0])
		}
	}
}

// silent is about a socket that nobody listens on: systemd leaves the file
// where it was.
func silent(path string) bool {
	_, err := resident.Ask(path)
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED)
}

// checkServeUnits tells whether the server can be asked. With a service that
// cannot start, a question would make the socket fail, or wait in it.
func (d *Doctor) checkServeUnits(ctx context.Context, socket, service unit, denied string) bool {
	const check = "serve.unit"
	listens := func(path string) bool { return socket.has("Listen", path) }
	switch {
	case socket["LoadState"] == "not-found":
		d.skip(check, "nftwl.socket is not installed; see that nftwl serve starts at boot, and before Dovecot")
	case socket["LoadState"] == "loaded" && d.asked != nil && !slices.ContainsFunc(d.asked, listens):
		d.skip(check, "Dovecot asks %s, and nftwl.socket does not listen there; see that what does starts at boot, and before Dovecot", strings.Join(d.asked, ", "))
	case service["LoadState"] != "loaded":
		d.fail(check, remedy{"install the unit, or unmask it", "systemctl status nftwl.service"},
			"nftwl.service is %s, so nothing answers on nftwl.socket%s", service["LoadState"], denied)
		return false
	case service.failing():
		d.fail(check, remedy{"mend what it says; it is started again and again", service.journal()},
			"nftwl.service fails: %s%s", service.why(ctx), denied)
		return false
	case !socket.startsAtBoot() && !service.startsAtBoot():
		d.fail(check, remedy{"enable it", "systemctl enable --now nftwl"},
			"nftwl.socket is not enabled: after a reboot nothing listens%s", denied)
	case socket["ActiveState"] != "active":
		d.fail(check, startSocket, "nftwl.socket is %s%s", socket["ActiveState"], denied)
	case socket["NeedDaemonReload"] == "yes", service["NeedDaemonReload"] == "yes":
		d.warn(check, reloadUnits, "nftwl.socket or nftwl.service has another file than systemd has read")
	default:
		d.ok(check, "nftwl.socket is enabled and active")
	}
	return true
}

var reloadUnits = remedy{"have systemd read the files again", "systemctl daemon-reload"}

func (d *Doctor) checkSocket(path string, start remedy, denied string) {
	const check = "serve.socket"
	stats, err := resident.Ask(path)
	if errors.Is(err, unix.EACCES) {
		d.skip(check, "%s: only root can ask", path)
		return
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		d.fail(check, start, "nothing listens on %s%s", path, denied)
		return
	}
	if err != nil {
		d.fail(check, remedy{"see what the server says, and restart it", "systemctl restart nftwl"}, "%s: %v%s", path, err, denied)
		return
	}
	d.checkSocketMode(path)

	text := fmt.Sprintf("%d logins since %s: %d new, %d renewed, %d kept, %d ignored; %d late",
		stats.Logins, stats.Started.Local().Format(time.DateTime), stats.New, stats.Renewed, stats.Kept, stats.Ignored, stats.Late)
	look := remedy{"mend what the journal names; a restart of nftwl counts anew", "journalctl -u nftwl"}
	switch failed, refused := reasons(stats.Failed), reasons(stats.Refused); {
	case refused != "":
		d.warn("serve.counters", look, "requests refused, each of which denied a login (%s); %s", refused, text)
	case failed != "":
		d.warn("serve.counters", look, "logins whose client could not be trusted (%s); %s", failed, text)
	default:
		d.ok("serve.counters", "%s; none failed or refused", text)
	}
}

// reasons lists what has been counted: "full 3, missing 1".
func reasons(of map[string]uint64) string {
	var parts []string
	for _, reason := range slices.Sorted(maps.Keys(of)) {
		parts = append(parts, fmt.Sprintf("%s %d", reason, of[reason]))
	}
	return strings.Join(parts, ", ")
}

// checkSocketMode checks who can ask, and who can put another server in the
// place of ours.
func (d *Doctor) checkSocketMode(path string) {
	const check = "serve.socket"
	const others = 0o022 // it takes the right to write to connect, see unix(7)
	info, err := os.Stat(path)
	var folder fs.FileInfo
	if err == nil {
		folder, err = os.Stat(filepath.Dir(path))
	}
	if err != nil { // it has just been asked
		d.fail(check, remedy{words: "see who moves or replaces it"}, "%v", err)
		return
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	keeper := folder.Sys().(*syscall.Stat_t).Uid
	switch {
	case info.Mode().Perm()&others != 0:
		d.fail(check, remedy{"let its owner alone connect, and see that SocketMode= in nftwl.socket is 0600", "chmod 600 " + quote(path)},
			"%s has mode %04o: others than its owner can connect", path, info.Mode().Perm())
	case keeper != 0 || folder.Mode().Perm()&others != 0:
		dir := quote(filepath.Dir(path))
		d.fail(check, remedy{"let root alone write in the folder", "chown root " + dir + " && chmod go-w " + dir},
			"%s is in a folder where others than root can put another socket in its place", path)
	case owner != 0:
		d.ok(check, "%s answers, and is user %d's, who can ask besides root", path, owner)
	default:
		d.ok(check, "%s answers, and is root's", path)
	}
}

// checkSandbox looks at the process, and not at what the unit says by now.
func (d *Doctor) checkSandbox(service unit) {
	const check, netAdmin = "serve.sandbox", 1 << unix.CAP_NET_ADMIN
	is, err := procStatus(service["MainPID"])
	if err != nil {
		d.skip(check, "%v", err)
		return
	}
	effective, err := strconv.ParseUint(is["CapEff"], 16, 64)
	bounding, e := strconv.ParseUint(is["CapBnd"], 16, 64)
	again := remedy{"take the unit as it was shipped, without the drop-in or the edit that changes it, then restart it", "systemctl cat nftwl.service"}
	switch uid, _, _ := strings.Cut(is["Uid"], "\t"); {
	case err != nil || e != nil:
		d.skip(check, "no capabilities in /proc/%s/status", service["MainPID"])
	case effective&netAdmin == 0:
		d.fail(check, again, "nftwl.service runs without CAP_NET_ADMIN, and can trust nobody")
	case uid == "0":
		d.warn(check, again, "nftwl.service runs as root, and needs no user but one of its own")
	case effective|bounding != netAdmin:
		d.warn(check, again, "nftwl.service has more capabilities than CAP_NET_ADMIN, which is all that it needs")
	case is["NoNewPrivs"] != "1":
		d.warn(check, again, "nftwl.service runs without NoNewPrivileges=")
	default:
		d.ok(check, "nftwl.service runs as user %s, with no capability but CAP_NET_ADMIN", uid)
	}
}

// checkRunning sees whether the server is of this very program.
func (d *Doctor) checkRunning(service unit) {
	const check = "serve.executable"
	link := filepath.Join("/proc", service["MainPID"], "exe")
	name, err := os.Readlink(link)
	var running, ours fs.FileInfo
	if err == nil {
		running, err = os.Stat(link)
	}
	if err == nil {
		ours, err = os.Stat(d.Executable)
	}
	switch {
	case err != nil:
		d.skip(check, "%v", err)
	case os.SameFile(running, ours):
		d.ok(check, "nftwl.service runs %s", name)
	case strings.HasSuffix(name, " (deleted)"):
		d.warn(check, remedy{"let the new one take its place; no login is denied meanwhile", "systemctl restart nftwl"},
			"nftwl.service still runs the nftwl that was there before this one")
	default:
		d.warn(check, remedy{words: "see which of the two is meant, and what ExecStart= in nftwl.service says"},
			"nftwl.service runs %s, and this is %s", name, d.Executable)
	}
}
