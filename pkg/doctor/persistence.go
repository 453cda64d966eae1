package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/install"
	"nftwl/pkg/nftset"
	"nftwl/pkg/snapshot"
)

func (d *Doctor) checkPersistence(ctx context.Context) {
	saving := false
	if d.units != nil {
		persist, save := d.units["nftwl-persist.service"], d.units["nftwl-save.service"]
		beforeReload := d.units["nftwl-snapshot.service"]
		for _, u := range []unit{persist, beforeReload} {
			// A later save has made good what a reload did not.
			if microseconds(save["ExecMainExitTimestampMonotonic"]) > microseconds(u["StateChangeTimestampMonotonic"]) {
				u["ReloadResult"] = "success"
			}
		}
		if d.checkPersist(ctx, d.units["nftables.service"], persist, loaded(persist) != "") {
			saving = d.checkSave(ctx, persist, beforeReload, d.units["nftwl-save.timer"], save)
		}
	}
	d.checkSnapshot(saving)
}

// checkPersist tells whether the unit that keeps the sets is in use. It can be
// one that loads the rules, too.
func (d *Doctor) checkPersist(ctx context.Context, nftables, persist unit, alone bool) bool {
	const check = "persistence.unit"
	const nothing = "after a reboot neither the rules nor the sets are there"
	lost := "the sets are empty after each reload of nftables and each reboot"
	enable := remedy{"enable it", "systemctl enable --now nftwl-persist"}
	follow := remedy{"enable it too: nftwl-persist.service follows it; where the firewall is ufw's or firewalld's, nftwl setup systemd has another unit", "systemctl enable nftables"}
	switch {
	case alone:
		lost = nothing
	case !nftables.startsAtBoot() && d.config.Table != config.Default().Table && exists(install.Standalone):
		lost = nothing
		enable = remedy{"take the unit that loads " + install.Standalone + " itself: move away what is in its place in " + install.UnitDir + "; afterwards: systemctl daemon-reload && systemctl enable --now nftwl-persist",
			"nftwl setup systemd --write"}
		follow = enable
	case nftables["ActiveState"] != "active":
		// Or systemd refuses the one for want of the other.
		enable = remedy{"enable it, and nftables.service, which loads /etc/nftables.conf in place of all rules; where the firewall is ufw's or firewalld's, nftwl setup systemd has another unit",
			"systemctl enable --now nftables nftwl-persist"}
	}
	state := persist["ActiveState"]
	switch {
	case persist["LoadState"] == "not-found":
		d.warn(check, remedy{"install the units, and do what it prints then", "nftwl setup systemd --write"}, "nftwl-persist.service is not installed: %s", lost)
		return false
	case !persist.startsAtBoot():
		report := d.warn
		if alone {
			report = d.fail
		}
		report(check, enable, "nftwl-persist.service is not enabled: %s", lost)
		return state == "active"
	case alone && (nftables.startsAtBoot() || nftables["ActiveState"] == "active"):
		d.fail(check, remedy{"disable it where another program owns the firewall; else include " + loaded(persist) + " in its file, and take the unit that follows it (nftwl setup systemd)", "systemctl disable nftables"},
			"a restart or reload of nftables.service flushes all tables, and nftwl-persist.service does not follow it")
	case !alone && !nftables.startsAtBoot():
		d.fail(check, follow, "nftwl-persist.service follows nftables.service, which is not enabled: %s", nothing)
	case d.noRules && (state == "failed" || nftables["ActiveState"] == "failed" || persist["ReloadResult"] != "success"): // persistence.boot says why
	case !alone && nftables["ActiveState"] != "active":
		d.fail(check, remedy{"fix what it says, then start it: it loads /etc/nftables.conf in place of all rules", nftables.journal()},
			"nftables.service is %s, and so the sets are not kept", nftables["ActiveState"])
	case state == "failed" || persist["ReloadResult"] != "success":
		d.fail(check, remedy{"repair or remove the file that it names, then: systemctl reload-or-restart nftwl-persist; after a failed start nothing is saved until then", persist.journal()},
			"the sets were not restored: %s", persist.why(ctx))
	case state != "active":
		d.fail(check, remedy{"start it", "systemctl start nftwl-persist"}, "nftwl-persist.service is %s: %s", state, lost)
	default:
		d.ok(check, "nftwl-persist.service is enabled and active")
	}
	return true
}

// checkSave tells whether the timer saves the snapshot, which must be young then.
func (d *Doctor) checkSave(ctx context.Context, persist, beforeReload, timer, save unit) bool {
	const check = "persistence.save"
	switch {
	case beforeReload["ReloadResult"] != "success" && loaded(persist) == "":
		d.fail(check, remedy{"fix what it says", beforeReload.journal()},
			"the sets were not saved before the last reload of nftables: %s", beforeReload.why(ctx))
	case save["Result"] != "success":
		d.fail(check, remedy{"fix what it says, then: systemctl start nftwl-save", save.journal()},
			"the last save failed (%s): %s", save["ExecMainExitTimestamp"], save.why(ctx))
	case timer["LoadState"] == "masked":
		d.ok(check, "nftwl-save.timer is masked: a power cut loses what was added since the last reload or stop")
	case persist["ActiveState"] != "active":
		d.skip(check, "nothing is saved while nftwl-persist.service is %s", persist["ActiveState"])
	case timer["ActiveState"] != "active":
		d.warn(check, remedy{"start it", "systemctl start nftwl-save.timer"},
			"nftwl-save.timer is %s: a power cut loses what was added since the last reload or stop", timer["ActiveState"])
	case save["ExecMainExitTimestamp"] == "":
		d.ok(check, "nftwl-save.timer is active; its first save is due within a minute")
	default:
		d.ok(check, "nftwl-save.timer is active, and the last save succeeded (%s)", save["ExecMainExitTimestamp"])
		return true
	}
	return false
}

func microseconds(s string) int64 {
	n, _ := strconv.ParseInt(s, 10, 64) // 0 where there is none
	return n
}

const (
	// maxParsed is the size of the largest snapshot that is parsed, in bytes.
	// It takes several times the memory.
	maxParsed = 64 << 20
	// maxAge is several times what the timer waits.
	maxAge = time.Hour
)

// checkSnapshot checks the file as the next restore will find it. One that is
// saved regularly must be young.
func (d *Doctor) checkSnapshot(saving bool) {
	const check = "persistence.snapshot"
	path := d.config.Snapshot
	err := snapshot.CheckOwner(path)
	var info fs.FileInfo
	if err == nil {
		info, err = os.Stat(path)
	}
	var owner *snapshot.OwnerError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		d.skip(check, "no snapshot yet: %s", path)
		return
	case errors.As(err, &owner):
		d.fail(check, remedy{"let none but the owner of its directory write it; nftwl restore refuses it until then",
			fmt.Sprintf("chown --no-dereference --reference=%s %s && chmod go-w %[1]s %[2]s", quote(filepath.Dir(path)), quote(path))}, "%v", err)
		return
	case err != nil:
		d.skip(check, "%v", err)
		return
	}
	elements, saved := "", info.ModTime()
	if info.Size() > maxParsed {
		elements = fmt.Sprintf("%d MiB, which is too much to look into here", info.Size()>>20)
	} else {
		text, err := snapshot.Read(path)
		var file *snapshot.File
		if err == nil {
			file, err = snapshot.ParseSets(text, snapshot.Sets{Table: d.config.Table, Names: d.config.Sets()})
		}
		if err != nil {
			d.fail(check, remedy{words: fmt.Sprintf("repair or remove it, since nftwl restore refuses it; the one before may be beside it as %s.old", filepath.Base(path))}, "%s: %v", path, err)
			return
		}
		n := 0
		for _, set := range file.Sets {
			n += len(set.Elements)
		}
		elements = fmt.Sprintf("%d elements", n)
		if !file.Saved.IsZero() { // or nft has written it
			saved = file.Saved
		}
	}
	if saving && time.Since(saved) > maxAge {
		d.warn(check, remedy{"see that no other program replaces it, and that nftwl-save.service saves to this file", "systemctl start nftwl-save"},
			"%s: %s, saved %s ago, though nftwl-save.timer saves every minute", path, elements, ago(saved))
		return
	}
	d.ok(check, "%s: %s, saved %s ago", path, elements, ago(saved))
}

// ago says how long ago something was, no more exactly than useful.
func ago(t time.Time) string {
	d := max(time.Since(t), 0)
	if d >= time.Hour {
		return nftset.FormatTimeout(d.Truncate(time.Minute))
	}
	return nftset.FormatTimeout(d.Truncate(time.Second))
}

// loaded returns the file of rules that a unit loads itself, or "" for none.
func loaded(u unit) string {
	_, rest, _ := strings.Cut(u["ExecStart"], "/nft -f ")
	file, _, _ := strings.Cut(rest, " ")
	return file
}
