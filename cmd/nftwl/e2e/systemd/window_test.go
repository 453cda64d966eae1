package systemd

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// BenchmarkReload reloads nftables.service again and again, with 10,000 elements, while
// about twenty users log in and twenty bans are removed each second. It counts logins
// whose address is not trusted afterwards, because they came between the save and the
// flush, and unbans that were undone, because they came between the save and the restore.
// From these numbers follows how long the gaps are.
//
//	go test -run '^$' -bench Reload -benchtime 60x ./cmd/nftwl/e2e/systemd
func BenchmarkReload(b *testing.B) {
	nstest.Need(b, "systemctl", "systemd")
	nstest.Need(b, "nft", "nftables")
	m := newMachine(b, nstest.Host)
	m.install()
	// The bans are there beforehand. A reload and what follows takes less than a second.
	const rate = 20
	trusted := func(i int) string { return fmt.Sprintf("2001:db8:1::%x", i) }
	banned := func(i int) string { return fmt.Sprintf("2001:db8:2::%x", i) }
	var fill strings.Builder
	for i := range 10000 {
		fmt.Fprintf(&fill, "add element inet filter trusted_ipv4 { 10.0.%d.%d . 993 timeout 1d }\n", i>>8, i&255)
	}
	for i := range b.N*rate + rate {
		fmt.Fprintf(&fill, "add element inet filter banned_ipv6 { %s . 993 timeout 1d }\n", banned(i))
	}
	m.write("run/fill.nft", fill.String())
	m.run("nft", "-f", "/run/fill.nft")

	var did int
	stop, done := make(chan bool), make(chan error)
	go func() {
		for tick := time.NewTicker(time.Second / rate); ; did++ {
			select {
			case <-stop:
				done <- nil
				return
			case <-tick.C:
			}
			// Between the flush and the restore the ban is missing, and unban reports that.
			out, err := m.try("sh", "-c", fmt.Sprintf("IP=%s USER=alice nftwl login true; nftwl unban --port 993 %s 2>&-", trusted(did), banned(did)))
			if out != "" || err != nil {
				done <- fmt.Errorf("login %d: %v %s", did, err, out)
				return
			}
		}
	}()
	b.ResetTimer()
	for range b.N {
		m.run("systemctl", "reload", nftables)
		m.settle()
	}
	b.StopTimer()
	close(stop)
	nstest.Must(m, <-done)

	after := m.elements()
	var logins, unbans int
	for i := range did {
		if _, ok := after[element{"trusted", trusted(i), 993}]; !ok {
			logins++
		}
		if _, ok := after[element{"banned", banned(i), 993}]; ok {
			unbans++
		}
	}
	fmt.Fprintf(os.Stderr, "%d reloads: of %d logins %d are lost, of %d unbans %d\n", b.N, did, logins, did, unbans)
	perSecond := float64(did) / b.Elapsed().Seconds()
	b.ReportMetric(float64(logins)/float64(b.N)/perSecond*1000, "ms-for-logins/op")
	b.ReportMetric(float64(unbans)/float64(b.N)/perSecond*1000, "ms-for-unbans/op")
}
