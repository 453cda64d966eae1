package doctor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

var loadSets = remedy{"load the set definitions, or name the right table and sets in " + config.Path, "nft -f /etc/nftwl/sets.nft"}

func (d *Doctor) checkSets(context.Context) {
	if d.conn == nil {
		d.skip("sets", "nftables cannot be read")
		return
	}
	for _, names := range []struct {
		config.Names
		life time.Duration
		key  string
	}{
		{d.config.Trusted, d.config.Timeout, "timeout"},
		{d.config.Banned, d.config.BanTimeout, "ban_timeout"},
	} {
		for i, name := range names.Both() {
			if !d.checkSet(name, i == 1, names.life, names.key) {
				return
			}
		}
	}
}

// checkSet checks one set, and tells whether there is a table to look for the
// others in.
func (d *Doctor) checkSet(name string, ipv6 bool, life time.Duration, key string) bool {
	check := "sets." + name
	d.conn.SetDeadline(time.Now().Add(patience))
	set, err := d.conn.Set(d.config.Table, name)
	if errors.Is(err, nftset.ErrNoTable) {
		d.fail("sets", loadSets, "%v", err)
		return false
	}
	if errors.Is(err, nftset.ErrNoSet) {
		d.fail(check, loadSets, "%v", err)
		return true
	}
	if err == nil {
		err = set.Writable()
	}
	if err == nil && set.Key.IPv6 != ipv6 {
		err = fmt.Errorf("set %s has keys of type %s", name, set.Key)
	}
	if err != nil {
		family := "ipv4_addr"
		if ipv6 {
			family = "ipv6_addr"
		}
		d.fail(check, remedy{words: "define it as: type " + family + " . inet_service; flags dynamic,timeout, as in contrib/nftables/sets.nft"}, "%v", err)
		return true
	}

	used, most := d.count(set)
	full := fmt.Sprintf("%s elements", used)
	if set.Size > 0 {
		full = fmt.Sprintf("%s of %d elements", used, set.Size)
	}
	room := remedy{words: fmt.Sprintf("give it a larger size in the ruleset, or a shorter %s in %s", key, config.Path)}
	switch size := uint64(set.Size); {
	case size > 0 && most >= size:
		d.fail(check, room, "full: %s", full)
	case size > 0 && most*10 >= size*9:
		d.warn(check, room, "nearly full: %s", full)
	case set.Timeout != 0 && set.Timeout != life && key == "ban_timeout":
		d.warn(check, remedy{words: "make the two equal"}, "the firewall bans for %s, its set's timeout, and nftwl ban for %s (ban_timeout); %s",
			nftset.FormatTimeout(set.Timeout), nftset.FormatTimeout(life), full)
	default:
		d.ok(check, "%s, %s", set.Key, full)
	}
	return true
}

// count says how many elements a set has. A set that has more than the kernel
// lists within a second, and that it does not count itself (before 6.16), has
// at least as many as came.
func (d *Doctor) count(set *nftset.Set) (words string, n uint64) {
	if set.Count > 0 {
		return fmt.Sprint(set.Count), uint64(set.Count)
	}
	conn, err := nftset.Dial()
	if err != nil {
		return "an unknown number of", 0
	}
	defer conn.Close()
	errEnough := errors.New("enough")
	end := time.Now().Add(time.Second)
	err = conn.Dump(set, func(nftset.Element) error {
		if n++; n%1000 == 0 && time.Now().After(end) {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return fmt.Sprintf("more than %d", n), n
	}
	if err != nil && !errors.Is(err, nftset.ErrInterrupted) {
		return "an unknown number of", 0
	}
	return fmt.Sprint(n), n
}
