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

	"nftwl/pkg/nftset"
	"nftwl/pkg/snapshot"
)

func (d *Doctor) checkPersistence(ctx context.Context) {
	saving := false
	if program := systemctl(); program == "" {
		d.skip("persistence.unit", "systemd does not run here; for OpenRC there is contrib/openrc")
	} else if units, err := show(ctx, program, "nftables.service",
		"nftwl-persist.service", "nftwl-snapshot.service", "nftwl-save.timer", "nftwl-save.service"); err != nil {
		d.skip("persistence.unit", "%v", err)
	} else if d.checkPersist(ctx, units[0], units[1]) {
		d.checkOrder(units[1], units[2])
		saving = d.checkSave(ctx, units[1], units[2], units[3], units[4])
	}
	d.checkSnapshot(saving)
}

// checkPersist tells whether the unit that keeps the sets is in use.
func (d *Doctor) checkPersist(ctx context.Context, nftables, persist unit) bool {
	const check = "persistence.unit"
	const lost = "the sets are empty after each reload of nftables and each reboot"
	enable := remedy{"enable it", "systemctl enable --now nftwl-persist"}
	state := persist["ActiveState"]
	switch {
	case persist["LoadState"] == "not-found":
		d.warn(check, remedy{"install the units, then: systemctl enable --now nftwl-persist", "nftwl setup systemd --write"},
			"nftwl-persist.service is not installed: %s", lost)
		return false
	case persist["LoadState"] != "loaded":
		d.warn(check, remedy{"take the unit as it was shipped, then: systemctl enable --now nftwl-persist", "systemctl status nftwl-persist"},
			"nftwl-persist.service is %s: %s", persist["LoadState"], lost)
		return false
	case !persist.startsAtBoot():
		d.warn(check, enable, "nftwl-persist.service is not enabled: %s", lost)
		return state == "active"
	case !nftables.startsAtBoot():
		d.fail(check, remedy{"enable it too; nftwl-persist.service follows it", "systemctl enable nftables"},
			"nftables.service is not enabled: after a reboot neither the rules nor the sets are there")
	case nftables["ActiveState"] != "active":
		d.fail(check, remedy{"mend what it says, then start it: it loads /etc/nftables.conf in place of all rules", nftables.journal()},
			"nftables.service is %s, and so the sets are not kept", nftables["ActiveState"])
	case state == "failed":
		d.fail(check, remedy{"repair or remove the file that it names, then: systemctl start nftwl-persist; nothing is saved until then", persist.journal()},
			"the sets were not restored: %s", persist.why(ctx))
	case state != "active":
		d.fail(check, remedy{"start it", "systemctl start nftwl-persist"},
			"nftwl-persist.service is %s: %s", state, lost)
	case persist["ReloadResult"] != "success":
		d.fail(check, remedy{"repair or remove the file that it names, then: systemctl reload nftwl-persist", persist.journal()},
			"the sets were not restored after the last reload of nftables: %s", persist.why(ctx))
	case persist["NeedDaemonReload"] == "yes":
		d.warn(check, reloadUnits, "nftwl-persist.service has another file than systemd has read")
	default:
		d.ok(check, "nftwl-persist.service is enabled and active")
	}
	return true
}

// checkOrder sees that the units save before the flush, and restore after it.
func (d *Doctor) checkOrder(persist, beforeReload unit) {
	const nftables = "nftables.service"
	var lacks []string
	for _, need := range []struct {
		unit
		property, word string
	}{
		{persist, "After", nftables},
		{persist, "Requisite", nftables},
		{persist, "ReloadPropagatedFrom", nftables},
		{beforeReload, "Before", nftables},
		{beforeReload, "BindsTo", "nftwl-persist.service"},
		{beforeReload, "ReloadPropagatedFrom", nftables},
	} {
		if !need.has(need.property, need.word) {
			lacks = append(lacks, fmt.Sprintf("%s lacks %s=%s", need.unit["Id"], need.property, need.word))
		}
	}
	if len(lacks) > 0 {
		d.fail("persistence.order", remedy{"take the units as they were shipped, without the drop-in or the edit that changes them", "systemctl cat nftwl-persist nftwl-snapshot"},
			"a restart or reload of nftables loses elements: %s", strings.Join(lacks, ", "))
		return
	}
	d.ok("persistence.order", "the sets are saved before nftables.service flushes them, and restored after")
}

// checkSave tells whether the snapshot has been saved by the timer since it
// runs, and so must be young.
func (d *Doctor) checkSave(ctx context.Context, persist, beforeReload, timer, save unit) bool {
	const check = "persistence.save"
	if beforeReload["ReloadResult"] != "success" {
		d.fail(check, remedy{"mend what it says", beforeReload.journal()},
			"the sets were not saved before the last reload of nftables: %s", beforeReload.why(ctx))
		return false
	}
	if save["Result"] != "success" {
		d.fail(check, remedy{"mend what it says, then: systemctl start nftwl-save", save.journal()},
			"the last save failed (%s): %s", save["ExecMainExitTimestamp"], save.why(ctx))
		return false
	}
	switch {
	case timer["LoadState"] == "masked":
		d.ok(check, "nftwl-save.timer is masked: a power cut loses what was added since the last reload or stop")
		return false
	case persist["ActiveState"] != "active":
		d.skip(check, "nothing is saved while nftwl-persist.service is %s", persist["ActiveState"])
		return false
	case timer["ActiveState"] != "active":
		d.warn(check, remedy{"start it", "systemctl start nftwl-save.timer"},
			"nftwl-save.timer is %s: a power cut loses what was added since the last reload or stop", timer["ActiveState"])
		return false
	case save["ExecMainExitTimestamp"] == "":
		d.ok(check, "nftwl-save.timer is active; its first save is due within ten minutes")
		return false
	}
	d.ok(check, "nftwl-save.timer is active, and the last save succeeded (%s)", save["ExecMainExitTimestamp"])
	return microseconds(save["ExecMainExitTimestampMonotonic"]) > microseconds(timer["ActiveEnterTimestampMonotonic"])
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
	dir := filepath.Dir(path)
	err := snapshot.CheckOwner(path)
	if errors.Is(err, fs.ErrNotExist) {
		d.skip(check, "no snapshot yet: %s", path)
		return
	}
	if errors.Is(err, fs.ErrPermission) {
		d.skip(check, "%v", err)
		return
	}
	if err != nil {
		d.fail(check, remedy{"let none but the owner of its folder write it; nftwl restore refuses it until then",
			fmt.Sprintf("chown --no-dereference --reference=%s %s && chmod go-w %[1]s %[2]s", quote(dir), quote(path))}, "%v", err)
		return
	}
	if _, err := os.Stat(path + ".bad"); err == nil {
		d.warn("persistence.bad", remedy{"see whether anything in it is still wanted, and remove it", "rm " + quote(path+".bad")},
			"nftwl save found a damaged snapshot, and kept it as %s.bad", path)
	}
	info, err := os.Stat(path)
	if err != nil {
		d.fail(check, remedy{words: "see who moves or replaces it"}, "%v", err)
		return
	}
	if info.Size() > maxParsed {
		d.ok(check, "%s: %d MiB, which is too much to look into here; written %s ago", path, info.Size()>>20, ago(info.ModTime()))
		return
	}
	text, err := snapshot.Read(path)
	if err != nil {
		d.fail(check, remedy{words: "make it readable, or remove it"}, "%v", err)
		return
	}
	ours := append(d.config.Trusted.Both(), d.config.Banned.Both()...)
	file, err := snapshot.Parse(text, func(table nftset.Table, set string) bool {
		return table == d.config.Table && slices.Contains(ours, set)
	})
	if err == nil && len(file.Sets) == 0 {
		err = fmt.Errorf("none of the sets in it is one of table %s that the configuration names", d.config.Table)
	}
	if err != nil {
		d.fail(check, remedy{words: fmt.Sprintf("repair or remove it, since nftwl restore refuses it; the one before may be beside it as %s.old", filepath.Base(path))}, "%s: %v", path, err)
		return
	}
	elements := 0
	for _, set := range file.Sets {
		elements += len(set.Elements)
	}
	saved := file.Saved
	if saved.IsZero() { // nft has written it
		saved = info.ModTime()
	}
	if age := time.Since(saved); saving && age > maxAge {
		d.warn(check, remedy{"see that no other program replaces it, and that nftwl-save.service saves to this file", "systemctl start nftwl-save"},
			"%s: %d elements, saved %s ago, though nftwl-save.timer saves every ten minutes", path, elements, ago(saved))
		return
	}
	d.ok(check, "%s: %d elements, saved %s ago", path, elements, ago(saved))
}

// ago says how long ago something was, no more exactly than useful.
func ago(t time.Time) string {
	d := max(time.Since(t), 0)
	if d >= time.Hour {
		return nftset.FormatTimeout(d.Truncate(time.Minute))
	}
	return nftset.FormatTimeout(d.Truncate(time.Second))
}
