package doctor

import (
	"cmp"
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
	"nftwl/pkg/nftset"
	"nftwl/pkg/snapshot"
)

var reloadUnits = remedy{"have systemd read the files again", "systemctl daemon-reload"}

func (d *Doctor) checkPersistence(ctx context.Context) {
	saving := false
	if program := systemctl(); program == "" {
		d.skip("persistence.unit", "systemd does not run here; for OpenRC there is contrib/openrc")
	} else if units, err := show(ctx, program, "nftables.service",
		"nftwl-persist.service", "nftwl-snapshot.service", "nftwl-save.timer", "nftwl-save.service"); err != nil {
		d.skip("persistence.unit", "%v", err)
	} else {
		nftables, persist, beforeReload := units[0], units[1], units[2]
		rules := loaded(persist)
		broken := rules != "" && !d.checkLoaded(ctx, rules)
		inUse := d.checkPersist(ctx, nftables, persist, rules, broken)
		switch {
		case inUse && rules == "":
			d.checkOrder(persist, beforeReload)
			saving = d.checkSave(ctx, persist, beforeReload, units[3], units[4])
		case inUse:
			d.checkAlone(nftables, persist)
			saving = d.checkSave(ctx, persist, nil, units[3], units[4])
		}
	}
	d.checkSnapshot(saving)
}

// loaded returns the file of rules that a unit loads itself, or "" where it
// leaves that to nftables.service.
func loaded(u unit) string {
	_, rest, _ := strings.Cut(u["ExecStart"], "/nft -f ")
	file, _, _ := strings.Cut(rest, " ")
	return file
}

// standalone is where the rules are that have a table of their own.
const standalone = "/etc/nftwl/standalone.nft"

// defines tells whether a file of rules has a table. One that includes others
// may have it there.
func defines(file string, table nftset.Table) bool {
	text, _ := os.ReadFile(file) // one that is not there has none
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(strings.ReplaceAll(line, "{", " "))
		switch {
		case len(words) == 3 && words[0] == "table" && words[1]+" "+words[2] == table.String(),
			len(words) == 2 && words[0] == "include":
			return true
		}
	}
	return false
}

// refusal is why nft does not load a file of rules: its first error.
func refusal(ctx context.Context, file string) error {
	nft := find("nft")
	if nft == "" {
		return errors.New("nft is not installed")
	}
	_, errs, err := run(ctx, nft, "--check", "--file", file)
	for line := range strings.Lines(string(errs)) {
		if err != nil && strings.Contains(line, "Error: ") {
			return errors.New(strings.TrimSpace(line))
		}
	}
	return err
}

// checkPersist tells whether the unit that keeps the sets is in use. It may
// load rules, too, which may be broken.
func (d *Doctor) checkPersist(ctx context.Context, nftables, persist unit, rules string, broken bool) bool {
	const check = "persistence.unit"
	const nothing = "after a reboot neither the rules nor the sets are there"
	lost := "the sets are empty after each reload of nftables and each reboot"
	reload := "the sets were not restored after the last reload of nftables"
	enable := remedy{"enable it", "systemctl enable --now nftwl-persist"}
	wrong := rules == "" && !nftables.startsAtBoot() && defines(standalone, d.config.Table)
	if wrong {
		lost = nothing
		enable = remedy{"take the unit that loads " + standalone + " itself: move away what is in its place in /etc/systemd/system; afterwards: systemctl daemon-reload && systemctl enable --now nftwl-persist",
			"nftwl setup systemd --write"}
	}
	why := persist.why
	if rules != "" {
		lost, reload = nothing, "the last reload of nftwl-persist.service failed"
		if broken {
			why = func(context.Context) string { return "persistence.rules says why" }
		}
	}
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
	case !persist.startsAtBoot() && rules != "":
		d.fail(check, enable, "nftwl-persist.service is not enabled: %s", lost)
		return state == "active"
	case !persist.startsAtBoot():
		d.warn(check, enable, "nftwl-persist.service is not enabled: %s", lost)
		return state == "active"
	case wrong:
		d.fail(check, enable, "nftwl-persist.service follows nftables.service, which is not enabled: %s", nothing)
	case rules == "" && !nftables.startsAtBoot():
		d.fail(check, remedy{"enable it too; nftwl-persist.service follows it. Where the firewall is ufw's or firewalld's, nftwl setup systemd has another unit", "systemctl enable nftables"},
			"nftables.service is not enabled: %s", nothing)
	case rules == "" && nftables["ActiveState"] != "active":
		d.fail(check, remedy{"mend what it says, then start it: it loads /etc/nftables.conf in place of all rules", nftables.journal()},
			"nftables.service is %s, and so the sets are not kept", nftables["ActiveState"])
	case state == "failed":
		d.fail(check, remedy{"repair or remove the file that it names, then: systemctl start nftwl-persist; nothing is saved until then", persist.journal()},
			"the sets were not restored: %s", why(ctx))
	case state != "active":
		d.fail(check, remedy{"start it", "systemctl start nftwl-persist"},
			"nftwl-persist.service is %s: %s", state, lost)
	case persist["ReloadResult"] != "success":
		d.fail(check, remedy{"repair or remove the file that it names, then: systemctl reload nftwl-persist", persist.journal()},
			"%s: %s", reload, why(ctx))
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

// checkLoaded tells whether the rules that the unit loads are those of the
// sets, and load at the next boot, too.
func (d *Doctor) checkLoaded(ctx context.Context, rules string) bool {
	const check = "persistence.rules"
	table := d.config.Table
	info, err := os.Stat(rules)
	if err != nil {
		d.fail(check, remedy{"write it, then: systemctl reload-or-restart nftwl-persist", "nftwl setup nftables --write"},
			"nftwl-persist.service loads it, and it cannot be read: %v", err)
		return false
	}
	if info.Mode()&0o004 == 0 {
		d.fail(check, remedy{"let all read it; it holds no secrets", "chmod 644 " + quote(rules)},
			"%s has mode %04o: nftwl-persist.service, which runs as a user of its own, cannot read it", rules, info.Mode().Perm())
		return false
	}
	if d.valid && !defines(rules, table) {
		d.fail(check, remedy{words: fmt.Sprintf("put the table that it has into %s; or, where nftables.service loads the rules, take the unit that follows that", cmp.Or(d.ConfigPath, config.Path))},
			"nftwl-persist.service loads %s, which lacks table %s, where the sets are", rules, table)
		return false
	}
	if d.conn == nil {
		d.skip(check, "nft cannot be asked about %s", rules)
		return true
	}
	if err := refusal(ctx, rules); err != nil {
		d.fail(check, remedy{"mend it, or the next boot is without it; then: systemctl reload-or-restart nftwl-persist", "nft -c -f " + quote(rules)},
			"nft does not load it: %v", err)
		return false
	}
	d.ok(check, "nft loads %s, which has table %s", rules, table)
	return true
}

// checkAlone sees that the unit which needs no nftables.service has none beside
// it, and is early.
func (d *Doctor) checkAlone(nftables, persist unit) {
	const check = "persistence.order"
	switch {
	case nftables.startsAtBoot() || nftables["ActiveState"] == "active":
		d.fail(check, remedy{words: "where another program owns the firewall, systemctl disable nftables; else include nftwl/standalone.nft in its file, and take the unit that follows it (nftwl setup systemd)"},
			"a restart or reload of nftables.service flushes all tables, and nftwl-persist.service does not follow it")
	case !persist.has("Before", "network-pre.target"):
		d.fail(check, remedy{"take the unit as it was shipped, without the drop-in or the edit that changes it", "systemctl cat nftwl-persist"},
			"the network can be up before the rules are: nftwl-persist.service lacks Before=network-pre.target")
	default:
		d.ok(check, "the rules and the sets are loaded before the network is up")
	}
}

// checkSave tells whether the snapshot has been saved by the timer since it
// runs, and so must be young. There need be no unit that saves before a reload.
func (d *Doctor) checkSave(ctx context.Context, persist, beforeReload, timer, save unit) bool {
	const check = "persistence.save"
	if beforeReload != nil && beforeReload["ReloadResult"] != "success" {
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
		d.ok(check, "nftwl-save.timer is active; its first save is due within a minute")
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
	file, err := snapshot.ParseSets(text, d.config.Table, d.config.Sets())
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
			"%s: %d elements, saved %s ago, though nftwl-save.timer saves every minute", path, elements, ago(saved))
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
