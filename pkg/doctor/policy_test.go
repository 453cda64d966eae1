package doctor

import (
	"net/netip"
	"testing"
	"time"
)

func TestPolicyReports(t *testing.T) {
	old := float64(time.Now().Add(-2 * time.Minute).Unix())
	const imap = `nftwl_reports_total{protocol="imap",result="success"}`
	for _, v := range []struct {
		name    string
		metrics metrics
		want    []string
	}{
		{"well", metrics{"nftwl_start_timestamp_seconds": old, imap: 1}, nil},
		{"none for minutes", metrics{"nftwl_start_timestamp_seconds": old, imap: 0}, []string{"warn policy.reports: no report has arrived since nftwld started 2m"}},
		{"none yet", metrics{"nftwl_start_timestamp_seconds": old + 119}, []string{"skip policy.reports: nftwld started 1s ago"}},
		{"a wrong key", metrics{"nftwl_start_timestamp_seconds": old, imap: 1, `nftwl_refused_total{reason="key"}`: 3}, []string{"warn policy.reports: nftwld has refused 3 requests with a wrong key"}},
		{"no JSON", metrics{"nftwl_start_timestamp_seconds": old, imap: 1, `nftwl_refused_total{reason="request"}`: 3}, []string{"warn policy.reports: nftwld has refused 3 requests that it does not understand"}},
	} {
		t.Run(v.name, func(t *testing.T) {
			d, results := newDoctor(t, "")
			d.checkPolicyReports(v.metrics)
			expect(t, *results, v.want...)
		})
	}
}

func TestLeadsTo(t *testing.T) {
	for _, v := range []struct {
		url, listen string
		want        bool
	}{
		{"http://127.0.0.1:8085/", "127.0.0.1:8085", true},
		{"http://127.0.0.1:8085", "127.0.0.1:8085", true},
		{"http://127.0.0.1:8085/?a=b", "127.0.0.1:8085", true},
		{"http://[::1]:8085/", "[::1]:8085", true},
		{"http://localhost:8085/", "[::1]:8085", true},
		{"http://192.0.2.1:8085/", "0.0.0.0:8085", true},
		{"http://host.example:8085/", "[::]:8085", true},
		{"http://127.0.0.1/", "127.0.0.1:80", true},
		{"http://[::1]/", "[::1]:80", true},
		{"http://127.0.0.1:8084/", "127.0.0.1:8085", false},
		{"http://127.0.0.1:8085/x", "127.0.0.1:8085", false},
		{"http://127.0.0.2:8085/", "127.0.0.1:8085", false},
		{"http://localhost:8085/", "192.0.2.1:8085", false},
		{"https://127.0.0.1:8085/", "127.0.0.1:8085", false},
		{"", "127.0.0.1:8085", false},
	} {
		if got := leadsTo(v.url, netip.MustParseAddrPort(v.listen)); got != v.want {
			t.Errorf("%s leads to %s: %v", v.url, v.listen, got)
		}
	}
}
