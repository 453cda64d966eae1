package doctor

import (
	"context"
	"errors"
	"os"
	"regexp"
	"strings"

	"nftwl/pkg/install"
	"nftwl/pkg/nftset"
)

// checkBoot checks that the rules survive a reboot: that the file which a unit loads
// at boot can be loaded, and that it has what nftwl needs of what is loaded now.
func (d *Doctor) checkBoot(ctx context.Context) {
	const check = "persistence.boot"
	if d.units == nil {
		d.skip(check, "%s", d.noUnits)
		return
	}
	u := d.units["nftables.service"]
	if persist := d.units["nftwl-persist.service"]; loaded(persist) != "" {
		u = persist
	}
	file := loaded(u)
	info, err := os.Stat(file)
	switch {
	case !u.startsAtBoot() && u["ActiveState"] != "active": // persistence.unit reports it
	case file == "" || d.conn == nil:
		d.skip(check, "what %s loads cannot be seen", u["Id"])
	case err == nil && info.Mode()&0o004 == 0 && u["Id"] == "nftwl-persist.service":
		d.noRules = true
		d.fail(check, remedy{"let all read it; it holds no secrets", "chmod 644 " + quote(file)},
			"after a reboot there is no firewall: %s has mode %04o, and %s, which runs as a user of its own, cannot read it", file, info.Mode().Perm(), u["Id"])
	default:
		d.checkBootFile(ctx, file)
	}
}

func (d *Doctor) checkBootFile(ctx context.Context, file string) {
	const check = "persistence.boot"
	if _, err := os.Stat(file); err != nil {
		d.noRules = true
		d.fail(check, remedy{"make the rules, and do what it prints then", "nftwl setup nftables --write"},
			"after a reboot there is no firewall: the file of rules cannot be read: %v", err)
		return
	}
	switch _, err := run(ctx, "nft", "--check", "--file", file); {
	case errors.Is(err, errNoAnswer):
		d.warn(check, remedy{"see whether it loads", "nft -c -f " + quote(file)}, "whether nft loads %s at boot is unknown: %v", file, err)
		return
	case err != nil:
		d.noRules = true
		d.fail(check, remedy{"correct it, then load it", "nft -c -f " + quote(file)}, "after a reboot there is no firewall: nft does not load %s: %v", file, err)
		return
	}
	table := d.config.Table
	ruleset, err := install.FileRuleset(file)
	then := listed(ruleset, table)
	if then != "" {
		d.reload = "nft -f " + quote(file)
		if d.units["nftwl-save.service"]["LoadState"] == "loaded" { // it restores, too
			d.reload += " && systemctl start nftwl-save"
		}
	}
	ruleset, _ = run(ctx, "nft", "-s", "-t", "list", "ruleset")
	now := listed(ruleset, table)
	switch {
	case err != nil, now == "": // it can need what only this machine has; sets reports a missing table
		d.ok(check, "nft loads %s", file)
		return
	case then == "":
		d.fail(check, remedy{"include the rules in " + file + "; or name in " + d.configPath() + " the table that it has", "nftwl setup nftables"},
			"after a reboot there is no table %s: %s does not have it", table, file)
		return
	}
	// What nftwl depends on: sets and their lookups, and how packets come to a chain.
	essential := regexp.MustCompile(`^\s*(set|chain|type filter hook) |@|\b(jump|goto) `)
	for line := range strings.Lines(now) {
		if essential.MatchString(line) && strings.Count(now, line) > strings.Count(then, line) {
			d.fail(check, remedy{words: "put it back into " + file + ", or into what that includes"},
				"%s lacks what is loaded now: after a reboot, table %s has no %q", file, table, strings.TrimSpace(line))
			return
		}
	}
	d.ok(check, "%s loads, and has the sets, lookups and jumps that table %s has now", file, table)
}

// listed cuts a table out of a listed ruleset; "" if there is none. nft 1.0.6 would
// read all elements of a table that it lists alone, which takes half a minute for a
// million.
func listed(ruleset string, table nftset.Table) string {
	_, rest, _ := strings.Cut("\n"+ruleset, "\ntable "+table.String()+" {\n")
	text, _, _ := strings.Cut(rest, "\n}\n")
	return text
}
