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
	var missing []string
	for _, names := range []struct {
		config.Names
		key string
	}{{d.config.Trusted, "timeout"}, {d.config.Banned, "ban_timeout"}} {
		for i, name := range names.Both() {
			d.conn.SetTimeout(patience)
			set, err := d.conn.Set(d.config.Table, name)
			if err == nil {
				err = set.Writable()
			}
			if err == nil && set.Key.IPv6 != (i == 1) {
				err = fmt.Errorf("set %s has keys of type %s", name, set.Key)
			}
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
			case err != nil:
				d.fail("sets."+name, remedy{words: fmt.Sprintf("define it as: type %s . inet_service; flags dynamic,timeout", [2]string{"ipv4_addr", "ipv6_addr"}[i])}, "%v", err)
			default:
				d.checkRoom(set, names.key)
			}
		}
	}
	switch {
	case len(missing) == 1:
		d.fail("sets."+missing[0], d.loadSets(ctx), "set %s does not exist in table %s", missing[0], d.config.Table)
	case missing != nil:
		d.fail("sets", d.loadSets(ctx), "%s do not exist in table %s", strings.Join(missing, ", "), d.config.Table)
	}
}

// loadSets is the remedy for sets that are missing: another table may have them.
func (d *Doctor) loadSets(ctx context.Context) remedy {
	out, _ := run(ctx, "nft", "-t", "list", "sets") // what cannot be listed has no such set
	table := ""
	for line := range strings.Lines(out) {
		switch words := strings.Fields(line); {
		case len(words) == 4 && words[0] == "table":
			table = words[1] + " " + words[2]
		case len(words) == 3 && words[1] == d.config.Trusted.IPv4 && table != d.config.Table.String():
			return remedy{words: fmt.Sprintf("table %s has a set %s: if those rules are the ones in use, put into %s: table: %[1]s", table, words[1], d.configPath())}
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
	elements := fmt.Sprintf("%s%d elements", more, used)
	if set.Size > 0 {
		elements = fmt.Sprintf("%s%d of %d elements", more, used, set.Size)
	}
	client := len(trust.Keys(set, netip.Addr{}, d.config.Ports))
	room := remedy{words: fmt.Sprintf("give it a larger size in the ruleset, or a shorter %s in %s", key, d.configPath())}
	switch size := int(set.Size); {
	case size > 0 && used+client > size:
		d.unusable[set.Name] = true
		d.fail(check, room, "full: %s, and the next client takes %d", elements, client)
	case size > 0 && used*10 >= size*9:
		d.warn(check, room, "nearly full: %s", elements)
	default:
		d.ok(check, "%s, %s", set.Key, elements)
	}
}

// count returns how many elements a set has. Kernels before 6.16 do not tell: then
// it lists them for a second, and more is "more than " if that was not enough.
func count(set *nftset.Set) (n int, more string, err error) {
	if set.Count > 0 {
		return int(set.Count), "", nil
	}
	conn, err := nftset.Dial() // the deadline leaves the rest of the dump unread
	if err != nil {
		return 0, "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	err = conn.Dump(set, func(nftset.Element) { n++ })
	switch {
	case errors.Is(err, nftset.ErrDeadline):
		return n, "more than ", nil
	case errors.Is(err, nftset.ErrInterrupted):
		err = nil
	}
	return n, "", err
}
