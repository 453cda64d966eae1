package dovecot

import (
	"cmp"
	"encoding/json"
	"os/exec"
	"slices"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// An element of a set, as nft (not nftwl) reads it.
type element struct {
	address, comment string
	port             int
	timeout, expires time.Duration // 0 if it is permanent
}

// loadSets loads the shipped set definitions.
func loadSets(t testing.TB) {
	t.Helper()
	nstest.Nft(t, nstest.Contrib(t, "nftables/sets.nft"))
}

// elements returns the elements of a set of table inet filter, by address and port.
func elements(t testing.TB, set string) []element {
	t.Helper()
	out, err := exec.Command(nstest.Need(t, "nft", "nftables"), "-j", "list", "set", "inet", "filter", set).Output()
	if err != nil {
		t.Fatalf("nft list set %s: %v", set, err)
	}
	var ruleset struct {
		Nftables []struct {
			Set struct {
				Timeout int // the set's default
				Elem    []json.RawMessage
			}
		}
	}
	nstest.Must(t, json.Unmarshal(out, &ruleset))
	type key struct{ Concat []json.RawMessage }
	var all []element
	for _, object := range ruleset.Nftables {
		for _, raw := range object.Set.Elem {
			var e struct {
				key  // if the element has only a key
				Elem struct {
					Val              key
					Timeout, Expires int
					Comment          string
				}
			}
			nstest.Must(t, json.Unmarshal(raw, &e))
			k := e.Concat
			if k == nil {
				k = e.Elem.Val.Concat
			}
			got := element{
				comment: e.Elem.Comment,
				timeout: time.Duration(e.Elem.Timeout) * time.Second,
				expires: time.Duration(e.Elem.Expires) * time.Second,
			}
			nstest.Must(t, json.Unmarshal(k[0], &got.address))
			nstest.Must(t, json.Unmarshal(k[1], &got.port))
			// nft prints a timeout only if it is not the set's default.
			if got.timeout == 0 && got.expires != 0 {
				got.timeout = time.Duration(object.Set.Timeout) * time.Second
			}
			all = append(all, got)
		}
	}
	slices.SortFunc(all, func(a, b element) int {
		return cmp.Or(cmp.Compare(a.address, b.address), cmp.Compare(a.port, b.port))
	})
	return all
}

// wantTrusted checks that the trusted set of an address's family has what a login
// writes: five ports, a full timeout, the user's name. The other family's set must be
// empty.
func wantTrusted(t *testing.T, address, user string, timeout time.Duration) {
	t.Helper()
	set, other := "trusted_ipv4", "trusted_ipv6"
	if address == client6 {
		set, other = other, set
	}
	got := elements(t, set)
	var ports []int
	for _, e := range got {
		ports = append(ports, e.port)
		if e.address != address || e.comment != user || e.timeout != timeout || e.expires < timeout-nstest.Patience {
			t.Errorf("set %s holds %+v; want %s for %v from now, comment %q", set, e, address, timeout, user)
		}
	}
	if !slices.Equal(ports, []int{143, 465, 587, 993, 995}) {
		t.Errorf("set %s holds the ports %v", set, ports)
	}
	if got := elements(t, other); len(got) > 0 {
		t.Errorf("set %s holds %+v", other, got)
	}
}

// wantNobody checks that all sets are empty.
func wantNobody(t *testing.T) {
	t.Helper()
	for _, set := range []string{"trusted_ipv4", "trusted_ipv6", "banned_ipv4", "banned_ipv6"} {
		if got := elements(t, set); len(got) > 0 {
			t.Errorf("set %s holds %+v", set, got)
		}
	}
}
