package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"nftwl/pkg/nftset"
	"nftwl/pkg/snapshot"
)

func (d *Doctor) checkPersistence(ctx context.Context) {
	saving := d.units != nil && d.checkPersist(ctx) && d.checkSave(ctx)
	d.checkSnapshot(saving)
}

// checkPersist tells whether the unit that keeps the sets is in use. It can be
// one that loads the rules, too.
func (d *Doctor) checkPersist(ctx context.Context) bool {
	const check = "persistence.unit"
	nftables, persist := d.units["nftables.service"], d.units["nftwl-persist.service"]
	state, alone := persist["ActiveState"], loaded(persist) != ""
	lost := "the sets are empty after each reload of nftables and each reboot"
	enable := remedy{"enable it, and nftables.service, which loads /etc/nftables.conf in place of all rules; if ufw or firewalld owns the firewall, see docs/firewall.md",
		"systemctl enable --now nftables nftwl-persist"}
	if alone {
		lost = "after a reboot neither the rules nor the sets are there"
		enable = remedy{"enable it", "systemctl enable --now nftwl-persist"}
	}
	switch {
	case persist["LoadState"] == "not-found":
		d.warn(check, remedy{"install the units, and do what it prints then", "nftwl setup systemd --write"}, "nftwl-persist.service is not installed: %s", lost)
		return false
	case !persist.startsAtBoot():
		d.fail(check, enable, "nftwl-persist.service is not enabled: %s", lost)
		return state == "active"
	case alone && (nftables.startsAtBoot() || nftables["ActiveState"] == "active"):
		d.fail(check, remedy{"disable it if another program owns the firewall; otherwise include " + loaded(persist) + " in its file, and take the unit that follows it (nftwl setup systemd)", "systemctl disable nftables"},
			"a restart or reload of nftables.service flushes all tables, and nftwl-persist.service does not follow it")
	case !alone && !nftables.startsAtBoot():
		d.fail(check, enable, "nftwl-persist.service follows nftables.service, which is not enabled: after a reboot neither the rules nor the sets are there")
	case d.noRules: // persistence.boot reports it
	case !alone && nftables["ActiveState"] != "active":
		d.fail(check, remedy{"fix what it says, then start it: it loads /etc/nftables.conf in place of all rules", nftables.journal()},
			"nftables.service is %s, so the sets are not kept", nftables["ActiveState"])
	case state == "failed":
		d.fail(check, remedy{"repair or remove the file that it names, then: systemctl restart nftwl-persist; nothing is saved until then", persist.journal()},
			"the sets were not restored: %s", persist.why(ctx))
	case state != "active":
		d.fail(check, remedy{"start it", "systemctl start nftwl-persist"}, "nftwl-persist.service is %s: %s", state, lost)
	default:
		d.ok(check, "nftwl-persist.service is enabled and active")
	}
	return true
}

// checkSave tells whether the timer saves the snapshot, which must be young then.
func (d *Doctor) checkSave(ctx context.Context) bool {
	const check = "persistence.save"
	timer, save := d.units["nftwl-save.timer"], d.units["nftwl-save.service"]
	const lost = "a power cut loses what was added since the last reload or stop"
	switch {
	case save["Result"] != "success":
		d.fail(check, remedy{"fix what it says, then: systemctl start nftwl-save", save.journal()},
			"the last save failed (%s): %s", save["ExecMainExitTimestamp"], save.why(ctx))
	case timer["LoadState"] == "masked":
		d.ok(check, "nftwl-save.timer is masked: %s", lost)
	case d.units["nftwl-persist.service"]["ActiveState"] != "active":
		d.skip(check, "nothing is saved while nftwl-persist.service is not active")
	case timer["ActiveState"] != "active":
		d.warn(check, remedy{"start it", "systemctl start nftwl-save.timer"}, "nftwl-save.timer is %s: %s", timer["ActiveState"], lost)
	case save["ExecMainExitTimestamp"] == "":
		d.ok(check, "nftwl-save.timer is active; its first save is due within a minute")
	default:
		d.ok(check, "nftwl-save.timer is active, and the last save succeeded (%s)", save["ExecMainExitTimestamp"])
		return true
	}
	return false
}

// maxAge is several times what the timer waits.
const maxAge = time.Hour

// checkSnapshot checks the file as the next restore will find it. One that is
// saved regularly must be young.
func (d *Doctor) checkSnapshot(saving bool) {
	const check = "persistence.snapshot"
	path := d.config.Snapshot
	var file *snapshot.File
	var text string
	err := snapshot.CheckOwner(path)
	if err == nil {
		text, err = snapshot.Read(path)
	}
	if err == nil {
		file, err = snapshot.ParseSets(text, snapshot.Sets{Table: d.config.Table, Names: d.config.Sets()})
	}
	var owner *snapshot.OwnerError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		d.skip(check, "no snapshot yet: %s", path)
		return
	case errors.Is(err, fs.ErrPermission):
		d.skip(check, "%v", err)
		return
	case errors.As(err, &owner):
		d.fail(check, remedy{"let only the owner of its directory write it; nftwl restore refuses it until then",
			fmt.Sprintf("chown --no-dereference --reference=%s %s && chmod go-w %[1]s %[2]s", quote(filepath.Dir(path)), quote(path))}, "%v", err)
		return
	case err != nil:
		d.fail(check, remedy{words: "repair or remove it, because nftwl restore refuses it; the previous one can be beside it as " + filepath.Base(path) + ".old"}, "%s: %v", path, err)
		return
	}
	elements := 0
	for _, set := range file.Sets {
		elements += len(set.Elements)
	}
	switch {
	case file.Saved.IsZero(): // nft has written it
		d.ok(check, "%s: %d elements", path, elements)
	case saving && time.Since(file.Saved) > maxAge:
		d.warn(check, remedy{"see that no other program replaces it, and that nftwl-save.service saves to this file", "systemctl start nftwl-save"},
			"%s: %d elements, saved %s ago, though nftwl-save.timer saves every minute", path, elements, ago(file.Saved))
	default:
		d.ok(check, "%s: %d elements, saved %s ago", path, elements, ago(file.Saved))
	}
}

// ago tells how long ago something was, rounded to what is useful.
func ago(t time.Time) string {
	d := max(time.Since(t), 0)
	if d >= time.Hour {
		return nftset.FormatTimeout(d.Truncate(time.Minute))
	}
	return nftset.FormatTimeout(d.Truncate(time.Second))
}

// loaded returns the file of rules that a unit loads itself; "" if it loads none.
func loaded(u unit) string {
	_, rest, _ := strings.Cut(u["ExecStart"], "/nft -f ")
	file, _, _ := strings.Cut(rest, " ")
	return file
}
