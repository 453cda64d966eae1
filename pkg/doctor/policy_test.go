package doctor

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/nstest"
)

func TestPolicyReports(t *testing.T) {
	old := time.Now().Add(-2 * time.Minute).Unix()
	const imap = "nftwl_reports_total{protocol=\"imap\",result=\"success\"} "
	start := func(at int64) string { return fmt.Sprintf("nftwl_start_timestamp_seconds %.9e\n", float64(at)) }
	for _, v := range []struct {
		name, metrics string
		want          []string
	}{
		{"well", start(old) + imap + "1\n", nil},
		{"none for minutes", start(old) + imap + "0\n", []string{"warn policy.reports: no report has arrived since nftwld started 2m"}},
		{"none yet", start(old+119) + imap + "0\n", []string{"skip policy.reports: nftwld started 1s ago"}},
		{"a wrong key", start(old) + imap + "1\nnftwl_refused_total{reason=\"key\"} 3\n", []string{"warn policy.reports: nftwld has refused 3 requests with a wrong key"}},
		{"no JSON", start(old) + imap + "1\nnftwl_refused_total{reason=\"request\"} 3\n", []string{"warn policy.reports: nftwld has refused 3 requests that it does not understand"}},
		{"another's", "# HELP\n", []string{"fail policy.reports: is not nftwld"}},
	} {
		t.Run(v.name, func(t *testing.T) {
			nstest.New(t)
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, v.metrics) })}
			go func() { _ = server.Serve(l) }() // it ends with the listener
			d, results := newDoctor(t, "")
			d.checkPolicyReports(t.Context(), &config.Policy{Listen: netip.MustParseAddrPort(l.Addr().String())}, false)
			expect(t, *results, v.want...)
		})
	}
}
