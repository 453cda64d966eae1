package trust

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// Each grant of a transaction has its own outcome: that of the port with the largest
// change.
func TestApplyOutcomes(t *testing.T) {
	nstest.New(t)
	nstest.Nft(t, `table inet filter { set trusted_ipv4 {
		type ipv4_addr . inet_service; timeout 1d
		elements = {
			192.0.2.1 . 993, 192.0.2.1 . 465,
			192.0.2.2 . 993, 192.0.2.2 . 465 expires 1h,
			192.0.2.3 . 993
		}
	}; }`)
	conn, err := nftset.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := config.Default()
	c.Ports = []uint16{993, 465}
	var grants []*Grant
	for _, ip := range []string{"192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"} {
		grants = append(grants, &Grant{Addr: netip.MustParseAddr(ip), Timeout: 24 * time.Hour})
	}
	got, err := Apply(conn, c, grants...)
	if want := []nftset.Outcome{nftset.Unchanged, nftset.Renewed, nftset.Added, nftset.Added}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	all := []nftset.Outcome{nftset.Unchanged, nftset.Unchanged, nftset.Unchanged, nftset.Unchanged}
	if got, err := Apply(conn, c, grants...); err != nil || !slices.Equal(got, all) {
		t.Errorf("again: %v, %v; want %v", got, err, all)
	}
}
