package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/install"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

func (d *Doctor) checkSets(ctx context.Context) {
	if d.conn == nil {
		d.skip("sets", "nftables cannot be read")
		return
	}
	d.unusable = make(map[string]bool)
	var missing, bans []string
	for _, names := range []struct {
		config.Names
		life time.Duration
		key  string
	}{
		{d.config.Trusted, d.config.Timeout, "timeout"},
		{d.config.Banned, d.config.BanTimeout, "ban_timeout"},
	} {
		for i, name := range names.Both() {
			d.conn.SetTimeout(patience)
			set, err := d.conn.Set(d.config.Table, name)
			d.unusable[name] = err != nil
			switch {
			case errors.Is(err, nftset.ErrNoTable) && d.noRules:
				d.skip("sets", "%v: persistence.boot says why", err)
				return
			case errors.Is(err, nftset.ErrNoTable):
				d.fail("sets", d.loadSets(ctx), "%v", err)
				return
			case errors.Is(err, nftset.ErrNoSet):
				missing = append(missing, name)
			case err != nil || set.Writable() != nil || set.Key.IPv6 != (i == 1):
				d.unusable[name] = true
				if err == nil {
					err = set.Writable()
				}
				if err == nil {
					err = fmt.Errorf("set %s has keys of type %s", name, set.Key)
				}
				d.fail("sets."+name, remedy{words: fmt.Sprintf("define it as: type %s . inet_service; flags dynamic,timeout", [2]string{"ipv4_addr", "ipv6_addr"}[i])}, "%v", err)
			default:
				d.checkRoom(set, names.key)
				if set.Timeout != 0 && set.Timeout != names.life && names.key == "ban_timeout" {
					bans = append(bans, fmt.Sprintf("%s for %s", name, nftset.FormatTimeout(set.Timeout)))
				}
			}
		}
	}
	switch {
	case len(missing) == 1:
		d.fail("sets."+missing[0], d.loadSets(ctx), "set %s does not exist in table %s", missing[0], d.config.Table)
	case missing != nil:
		d.fail("sets", d.loadSets(ctx), "%s do not exist in table %s", strings.Join(missing, ", "), d.config.Table)
	}
	if bans != nil {
		d.warn("sets.ban_timeout", remedy{words: "make the set's timeout in the ruleset and ban_timeout equal"},
			"nftwl ban bans for %s, and who is added without a timeout is in %s", nftset.FormatTimeout(d.config.BanTimeout), strings.Join(bans, ", in "))
	}
}

// loadSets is the remedy for sets that are missing: another table may have them.
func (d *Doctor) loadSets(ctx context.Context) remedy {
	if nft := find("nft"); nft != "" {
		out, _ := output(ctx, nft, "-t", "list", "sets") // what cannot be listed has no such set
		table := ""
		for line := range strings.Lines(string(out)) {
			words := strings.Fields(line)
			switch {
			case len(words) == 4 && words[0] == "table":
				table = words[1] + " " + words[2]
			case len(words) == 3 && words[0] == "set" && words[1] == d.config.Trusted.IPv4 && table != d.config.Table.String():
				return remedy{words: fmt.Sprintf("table %s has a set %s: if those rules are the ones in use, put into %s: table: %[1]s", table, words[1], d.configPath())}
			}
		}
	}
	if d.reload != "" {
		return remedy{"load the rules again", d.reload}
	}
	return remedy{"load the set definitions, or name the right table and sets in " + d.configPath(), install.LoadSets(d.config.Table)}
}

// checkRoom checks that the next client has room in a set.
func (d *Doctor) checkRoom(set *nftset.Set, key string) {
	check := "sets." + set.Name
	used, more, err := count(set)
	if err != nil {
		d.skip(check, "%s; its elements cannot be counted: %v", set.Key, err)
		return
	}
	full := fmt.Sprintf("%s%d elements", more, used)
	if set.Size > 0 {
		full = fmt.Sprintf("%s%d of %d elements", more, used, set.Size)
	}
	client := len(trust.Keys(set, netip.Addr{}, d.config.Ports))
	room := remedy{words: fmt.Sprintf("give it a larger size in the ruleset, or a shorter %s in %s", key, d.configPath())}
	switch size := int(set.Size); {
	case size > 0 && used+client > size:
		d.unusable[set.Name] = true
		d.fail(check, room, "full: %s, and the next client takes %d", full, client)
	case size > 0 && used*10 >= size*9:
		d.warn(check, room, "nearly full: %s", full)
	default:
		d.ok(check, "%s, %s", set.Key, full)
	}
}

// count says how many elements a set has; more is not empty where it has more
// than the kernel lists within a second. Kernels before 6.16 do not count them.
func count(set *nftset.Set) (n int, more string, err error) {
	if set.Count > 0 {
		return int(set.Count), "", nil
	}
	conn, err := nftset.Dial() // one whose deadline ends a dump leaves the rest unread
	if err != nil {
		return 0, "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	err = conn.Dump(set, func(nftset.Element) error { n++; return nil })
	switch {
	case errors.Is(err, nftset.ErrDeadline):
		return n, "more than ", nil
	case errors.Is(err, nftset.ErrInterrupted):
		err = nil
	}
	return n, "", err
}
