package e2e

import (
	"slices"
	"testing"
	"time"
)

// BenchmarkLogin has logins over IMAP without a hook and with nftwld, in turn:
// the ratio of their medians is what policy costs a login.
func BenchmarkLogin(b *testing.B) {
	const logins = 400
	kinds := []with{{bare: true, dovecot: "auth_policy_server_url =\n"}, {}}
	medians := make([]time.Duration, len(kinds))
	turns := make([]chan chan time.Duration, len(kinds))
	// What a thread has started is killed when it ends: last of all.
	ended, release := make(chan struct{}), make(chan struct{})
	b.Cleanup(func() { close(release) })
	for i, w := range kinds {
		turns[i] = make(chan chan time.Duration)
		// Each server is in the namespaces of a goroutine's thread.
		go func() {
			find(b, "/").start(b, w)
			for result := range turns[i] {
				start := time.Now()
				if err := login("192.0.2.7", "alice", password); err != nil {
					b.Error(err)
				}
				result <- time.Since(start)
			}
			ended <- struct{}{}
			<-release
		}()
	}
	took := make([][]time.Duration, len(kinds))
	for range logins {
		for i := range kinds {
			result := make(chan time.Duration)
			turns[i] <- result
			took[i] = append(took[i], <-result)
		}
	}
	for i := range kinds {
		close(turns[i])
		<-ended
		slices.Sort(took[i])
		medians[i] = took[i][logins/2]
	}
	b.ReportMetric(float64(medians[1])/float64(medians[0]), "x")
	b.ReportMetric(float64(medians[0].Microseconds()), "none-µs")
	b.ReportMetric(float64(medians[1].Microseconds()), "policy-µs")
	b.ReportMetric(0, "ns/op")
}
