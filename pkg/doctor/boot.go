package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"nftwl/pkg/firewall"
	"nftwl/pkg/nftset"
)

// checkBoot checks that the rules survive a reboot: it loads those that a unit
// loads at boot into a network namespace of its own, and compares the table of
// the sets with the one that is there now.
func (d *Doctor) checkBoot(ctx context.Context) {
	if d.units == nil {
		d.skip("persistence.boot", "%s", d.noUnits)
		return
	}
	u := d.units["nftables.service"]
	if persist := d.units["nftwl-persist.service"]; loaded(persist) != "" {
		u = persist
	}
	d.checkBootOf(ctx, u)
}

func (d *Doctor) checkBootOf(ctx context.Context, u unit) {
	const check = "persistence.boot"
	file, id := loaded(u), strings.TrimSuffix(u["Id"], ".service")
	nft := find("nft")
	switch {
	case !u.startsAtBoot() && u["ActiveState"] != "active":
		return // persistence.unit says so
	case file == "" || nft == "" || d.conn == nil:
		d.skip(check, "what %s loads cannot be seen", u["Id"])
		return
	}
	d.noRules = true
	info, err := os.Stat(file)
	if err != nil {
		d.fail(check, remedy{"make the rules, and do what it prints then", "nftwl setup nftables --write"},
			"after a reboot there is no firewall: %s loads it, and it cannot be read: %v", u["Id"], err)
		return
	}
	// Ours runs as a user of its own.
	if strings.HasPrefix(id, "nftwl-") && info.Mode()&0o004 == 0 {
		d.fail(check, remedy{"let all read it; it holds no secrets", "chmod 644 " + quote(file)},
			"%s has mode %04o: %s, which runs as a user of its own, cannot read it", file, info.Mode().Perm(), u["Id"])
		return
	}
	table := d.config.Table
	then, untold := d.afterBoot(ctx, nft, file)
	if untold != nil { // which can be for want of what this machine has
		if _, errs, err := run(ctx, nft, "--check", "--file", file); err != nil {
			d.fail(check, remedy{"correct it, then: systemctl reload " + id, "nft -c -f " + quote(file)},
				"after a reboot there is no firewall: nft does not load %s: %v", file, firstError(errs, err))
			return
		}
		d.noRules = false
		d.skip(check, "nft loads %s; what it has cannot be compared with what is loaded: %v", file, untold)
		return
	}
	d.noRules = false
	if len(then) > 0 {
		d.reload = "nft -f " + quote(file)
		if d.units["nftwl-save.service"]["LoadState"] == "loaded" { // it restores, too
			d.reload += " && systemctl start nftwl-save"
		}
	}
	now, err := listTable(ctx, nft, table)
	if err != nil || len(now) == 0 { // sets says that the table is missing
		d.ok(check, "nft loads %s", file)
		return
	}
	lost, added := difference(now, then), difference(then, now)
	if i := slices.IndexFunc(lost, essential); i > 0 {
		lost[0] = lost[i]
	}
	reload := remedy{fmt.Sprintf("put it into %s, or what that includes; or, where that is what you want, load it", file), "systemctl reload " + id}
	const lacks = "%s lacks what is loaded now, so that after a reboot table %s has no %q"
	switch {
	case len(then) == 0:
		d.fail(check, remedy{fmt.Sprintf("include the rules in %s; or name in %s the table that it has", file, d.configPath()), "nftwl setup nftables"},
			"after a reboot table %s is gone: %s does not have it", table, file)
	case lost != nil && essential(lost[0]):
		d.fail(check, remedy{words: fmt.Sprintf("put it back into %s, or into what that includes", file)}, lacks, file, table, lost[0])
	case lost != nil:
		d.warn(check, reload, lacks, file, table, lost[0])
	case added != nil:
		d.warn(check, remedy{"load it", "systemctl reload " + id}, "%s has changed since it was loaded: %q", file, added[0])
	case !bytes.Equal(chains(now), chains(then)):
		d.warn(check, reload, "%s has the rules of table %s in another order than they are in now", file, table)
	default:
		d.ok(check, "%s has what table %s has now", file, table)
	}
}

// essential is about the lines of a listing that more hangs on than one rule: the
// sets and their lookups, and how packets come to a chain.
func essential(line string) bool {
	return slices.ContainsFunc([]string{"set ", "@", "hook ", "chain ", "jump ", "goto "}, func(word string) bool { return strings.Contains(line, word) })
}

// chains is the end of a table's listing, after the sets, whose order means nothing.
func chains(table []byte) []byte { return table[max(bytes.Index(table, []byte("\n\tchain ")), 0):] }

// firstError is the first error that nft printed.
func firstError(errs []byte, err error) error {
	for line := range strings.Lines(string(errs)) {
		if strings.Contains(line, "Error: ") {
			return errors.New(strings.TrimSpace(line))
		}
	}
	return err
}

// afterBoot lists the table as a file makes it; it is empty where the file does
// not.
func (d *Doctor) afterBoot(ctx context.Context, nft, file string) (table []byte, err error) {
	devices, err := net.Interfaces() // which rules can name, and an empty namespace lacks
	if err != nil {
		return nil, err
	}
	err = firewall.Inside(func() error {
		for _, device := range devices {
			if fd, err := firewall.MakeDevice(device.Name, 0); err == nil { // lo is there
				defer unix.Close(fd)
			}
		}
		if _, errs, err := run(ctx, nft, "--file", file); err != nil {
			return firstError(errs, err)
		}
		table, err = listTable(ctx, nft, d.config.Table)
		return err
	})
	return table, err
}

// listTable lists a table without the elements of its sets; it is empty if there
// is no such table. It is cut out of the whole ruleset, because nft 1.0.6 reads all
// elements of a table that it lists alone, which takes half a minute for a million.
func listTable(ctx context.Context, nft string, table nftset.Table) ([]byte, error) {
	all, _, err := run(ctx, nft, "-s", "-t", "list", "ruleset")
	_, rest, _ := bytes.Cut(append([]byte("\n"), all...), []byte("\ntable "+table.String()+" {\n"))
	text, _, _ := bytes.Cut(rest, []byte("\n}\n"))
	return text, err
}

// difference returns the lines that a listing has and another lacks.
func difference(of, other []byte) (lines []string) {
	count := make(map[string]int)
	for line := range bytes.Lines(other) {
		count[string(bytes.TrimSpace(line))]++
	}
	for line := range bytes.Lines(of) {
		line := string(bytes.TrimSpace(line))
		if count[line]--; count[line] < 0 {
			lines = append(lines, line)
		}
	}
	return lines
}
