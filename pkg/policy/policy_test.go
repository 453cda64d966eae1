package policy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
	"nftwl/pkg/nstest"
	"nftwl/pkg/trust"
)

func TestMain(m *testing.M) { nstest.Main(m) }

const testKey = "0123456789abcdef"

// policyServer is a Server that runs in its own network namespace.
type policyServer struct {
	*Server
	t        *testing.T
	registry *prometheus.Registry
	stop     func() // ends Run, and waits for it

	mu       sync.Mutex
	problems []string
	bans     []Ban
}

// serve runs a server with a ruleset: the shipped sets if it is empty, no rules
// if it is "none".
func serve(t *testing.T, configuration, ruleset string) *policyServer {
	t.Helper()
	nstest.New(t)
	if ruleset == "" {
		ruleset = fmt.Sprintf("include %q\n", filepath.Join(nstest.Root(t), "contrib/nftables/sets.nft"))
	}
	if ruleset != "none" {
		nstest.Nft(t, ruleset)
	}
	c, err := config.Parse([]byte("policy: {}\n" + configuration))
	if err != nil {
		t.Fatal(err)
	}
	s := &policyServer{t: t, registry: prometheus.NewRegistry()}
	s.Server = New(c, testKey, s.registry)
	s.Problem = func(reason string, err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.problems = append(s.problems, reason+": "+err.Error())
	}
	s.Banned = func(b Ban) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.bans = append(s.bans, b)
	}
	// A socket belongs to the namespace of the thread that makes it.
	namespace, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { namespace.Close() })
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread()
		if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		s.Run(ctx)
	}()
	s.stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(s.stop)
	return s
}

// send sends a request like Dovecot's, and returns the answer.
func (s *policyServer) send(command string, r report) *httptest.ResponseRecorder {
	s.t.Helper()
	if r.Proxy == "" {
		r.Proxy = "no"
	}
	body, err := json.Marshal(r)
	if err != nil {
		s.t.Fatal(err)
	}
	request := httptest.NewRequest("POST", "/?command="+command, bytes.NewReader(body))
	request.Header.Set("X-API-Key", testKey)
	w := httptest.NewRecorder()
	s.ServeHTTP(w, request)
	return w
}

// reports sends reports that must be accepted.
func (s *policyServer) reports(r ...report) {
	s.t.Helper()
	for _, r := range r {
		if w := s.send("report", r); w.Code != http.StatusOK || w.Body.String() != `{"status":0,"msg":""}`+"\n" {
			s.t.Errorf("%+v: %d %s", r, w.Code, w.Body)
		}
	}
}

// list stops the server, which writes everything that was reported, and returns a
// set.
func (s *policyServer) list(set string) string {
	s.t.Helper()
	s.stop()
	out, err := exec.Command(nstest.Need(s.t, "nft", "nftables"), "list", "set", "inet", "filter", set).CombinedOutput()
	if err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func (s *policyServer) count(metric string, labels ...string) float64 {
	s.t.Helper()
	for _, v := range []*prometheus.CounterVec{s.metrics.trusted, s.metrics.ignored, s.metrics.failures, s.metrics.banned, s.metrics.allowed, s.metrics.refused, s.metrics.errors} {
		if c, err := v.GetMetricWithLabelValues(labels...); err == nil && strings.Contains(c.Desc().String(), `"`+metric+`"`) {
			return testutil.ToFloat64(c)
		}
	}
	s.t.Fatalf("no metric %s", metric)
	return 0
}

func success(remote string) report {
	return report{Login: "alice", Hash: "1", Remote: remote, Protocol: "imap", Success: true}
}

func failed(remote string, n int) report {
	return report{Login: "alice", Hash: fmt.Sprint("wrong", n), Remote: remote, Protocol: "smtp"}
}

func TestSuccess(t *testing.T) {
	s := serve(t, "", "")
	week, never, own, anonymous, odd := success("192.0.2.2"), success("192.0.2.3"), success("192.0.2.4"), success("192.0.2.5"), success("192.0.2.6")
	week.Timeout = "7d"
	never.Trust = "no"
	own.Local = own.Remote
	anonymous.Mech = "ANONYMOUS"
	proxied, confirmed := success("192.0.2.7"), success("192.0.2.8")
	proxied.Proxy, confirmed.Proxy = "y", "y"
	confirmed.Trust = "yes"
	odd.Trust = "maybe"
	s.reports(success("192.0.2.1"), success("::ffff:192.0.2.1"), week, never, own, anonymous, odd, proxied, confirmed, success(""), success("127.0.0.1"), success("junk"))
	got := s.list("trusted_ipv4")
	for _, want := range []string{`192\.0\.2\.1 \. 993 expires .*comment "alice"`, `192\.0\.2\.2 \. 587 timeout 7d`} {
		if !regexp.MustCompile(want).MatchString(got) {
			t.Errorf("%s is not in %s", want, got)
		}
	}
	if n := strings.Count(got, `"alice"`); n != 15 {
		t.Errorf("%d elements, want 15: %s", n, got)
	}
	if exempt, unverified := s.count("nftwl_ignored_total", "exempt"), s.count("nftwl_ignored_total", "unverified"); exempt != 6 || unverified != 2 {
		t.Errorf("%v exempt, %v unverified", exempt, unverified)
	}
}

func TestBan(t *testing.T) {
	s := serve(t, "failures: {limit: 3, trusted_limit: 5}\nignore: [192.0.2.99]\n", "")
	internalFailure, rejected := failed("192.0.2.6", 0), failed("192.0.2.7", 0)
	internalFailure.FailType = "internal"
	rejected.Rejected = true
	s.reports(success("192.0.2.2"))
	for i := range 5 {
		internalFailure.Hash, rejected.Hash = fmt.Sprint(i), fmt.Sprint(i)
		own := failed("192.0.2.8", i)
		own.Local = own.Remote
		cram := report{Login: "alice", Hash: "same", Remote: "192.0.2.9", Mech: "CRAM-MD5"}
		s.reports(failed("192.0.2.1", 0), failed("192.0.2.2", i), failed("192.0.2.99", i), failed("", i), internalFailure, rejected, own, cram)
	}
	s.reports(failed("192.0.2.3", 1), failed("192.0.2.3", 2), failed("192.0.2.3", 3))
	got := s.list("banned_ipv4")
	for _, address := range []string{"192.0.2.3", "192.0.2.9"} {
		if !strings.Contains(got, address+" . 143 timeout 1h") {
			t.Errorf("%s is not banned: %s", address, got)
		}
	}
	if n := strings.Count(got, `"nftwld"`); n != 10 {
		t.Errorf("%d elements, want 10: %s", n, got)
	}
	if len(s.bans) != 2 || s.count("nftwl_banned_total", "stranger") != 2 || testutil.ToFloat64(s.metrics.spared) == 0 {
		t.Errorf("%+v", s.bans)
	}
}

// A trusted address that guesses uses a stolen account: its trust ends, and a
// login does not bring it back.
func TestStolenAccount(t *testing.T) {
	s := serve(t, "failures: {limit: 3, trusted_limit: 5}\n", "")
	s.reports(success("192.0.2.1"))
	for i := range 6 {
		s.reports(failed("192.0.2.1", i))
	}
	nstest.Poll(t, "the ban", func() bool { return s.count("nftwl_banned_total", "trusted") > 0 })
	s.reports(success("192.0.2.1"))
	if got := s.list("trusted_ipv4"); strings.Contains(got, "192.0.2.1") {
		t.Errorf("it is trusted: %s", got)
	}
	if got := s.list("banned_ipv4"); strings.Count(got, "192.0.2.1 . ") != 5 {
		t.Errorf("it is not banned: %s", got)
	}
	if len(s.bans) != 1 || !s.bans[0].Trusted || s.bans[0].Failures != 6 {
		t.Errorf("%+v", s.bans)
	}
}

// After an unban by the administrator, the address is banned again only after
// enough new failures.
func TestUnban(t *testing.T) {
	s := serve(t, "failures: {limit: 2}\n", "")
	for i := range 2 {
		s.reports(failed("192.0.2.1", i))
	}
	nstest.Poll(t, "the ban", func() bool { return s.count("nftwl_banned_total", "stranger") > 0 })
	nstest.Nft(t, "flush set inet filter banned_ipv4")
	s.reports(failed("192.0.2.1", 7))
	if got := s.list("banned_ipv4"); strings.Contains(got, "192.0.2.1") {
		t.Errorf("banned again: %s", got)
	}
}

func TestNetworkPrefix(t *testing.T) {
	s := serve(t, "failures: {limit: 2}\nipv6_prefix: 64\n", "")
	s.reports(failed("2001:db8::1", 1), failed("2001:db8::2", 2))
	for n := range 2 {
		neighbour := failed("2001:db8:1::7", n) // in the server's own /64
		neighbour.Local = "2001:db8:1::1"
		s.reports(neighbour)
	}
	if got := s.list("banned_ipv6"); !strings.Contains(got, "2001:db8:: . 143") || strings.Contains(got, "2001:db8:1:") {
		t.Errorf("%s", got)
	}
}

// A ban of an IPv6 address that ends in zeros bans its whole /64. So it is not
// banned if the /64 contains an address that is never banned.
func TestIgnoredInNetwork(t *testing.T) {
	s := serve(t, "failures: {limit: 2}\nignore: [\"2001:db8::5\"]\n", "")
	for n := range 2 {
		s.reports(failed("2001:db8::", n), failed("2001:db8:1::", n))
	}
	if got := s.list("banned_ipv6"); !strings.Contains(got, "2001:db8:1:: . 143") || strings.Contains(got, "2001:db8:: ") {
		t.Errorf("%s", got)
	}
}

func TestAllow(t *testing.T) {
	s := serve(t, "", "")
	nstest.Nft(t, `add element inet filter banned_ipv4 { 192.0.2.1 . 587, 192.0.2.2 . 587 }
		add element inet filter trusted_ipv4 { 192.0.2.2 . 143 }
		add element inet filter banned_ipv6 { 2001:db8::1 . 143, 2001:db8:0:1:: . 143 }`)
	for _, c := range []struct {
		remote string
		status int
	}{{"192.0.2.1", -1}, {"192.0.2.2", 0}, {"192.0.2.3", 0}, {"2001:db8::1", -1}, {"2001:db8::2", 0}, {"2001:db8:0:1::2", -1}, {"", 0}, {"127.0.0.1", 0}, {"junk", 0}} {
		w := s.send("allow", report{Login: "alice", Remote: c.remote})
		var answer struct{ Status int }
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || w.Code != http.StatusOK || answer.Status != c.status {
			t.Errorf("%q: %d %s, want status %d", c.remote, w.Code, w.Body, c.status)
		}
	}
}

func TestRefused(t *testing.T) {
	s := serve(t, "", "")
	good := `{"login":"alice","remote":"192.0.2.1","success":true}`
	for name, c := range map[string]struct {
		method, url, key, body string
		code                   int
	}{
		"no key":          {"POST", "/?command=report", "", good, http.StatusUnauthorized},
		"wrong key":       {"POST", "/?command=report", testKey + "x", good, http.StatusUnauthorized},
		"prefix of key":   {"POST", "/?command=report", testKey[:8], good, http.StatusUnauthorized},
		"GET":             {"GET", "/?command=report", testKey, good, http.StatusMethodNotAllowed},
		"no command":      {"POST", "/", testKey, good, http.StatusBadRequest},
		"another command": {"POST", "/?command=reset", testKey, good, http.StatusBadRequest},
		"junk":            {"POST", "/?command=report", testKey, "\x00\xff{", http.StatusBadRequest},
		"half":            {"POST", "/?command=report", testKey, good[:20], http.StatusBadRequest},
		"empty":           {"POST", "/?command=report", testKey, "", http.StatusBadRequest},
		"other types":     {"POST", "/?command=report", testKey, `{"success":"yes"}`, http.StatusBadRequest},
		"deep":            {"POST", "/?command=report", testKey, `{"x":` + strings.Repeat("[", 20000), http.StatusBadRequest},
		"large":           {"POST", "/?command=report", testKey, `{"login":"` + strings.Repeat("x", maxBody), http.StatusRequestEntityTooLarge},
	} {
		request := httptest.NewRequest(c.method, c.url, strings.NewReader(c.body))
		if c.key != "" {
			request.Header.Set("X-API-Key", c.key)
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, request)
		if w.Code != c.code {
			t.Errorf("%s: %d %s, want %d", name, w.Code, w.Body, c.code)
		}
	}
	if got := s.list("trusted_ipv4"); strings.Contains(got, "192.0.2.1") {
		t.Errorf("%s", got)
	}
	if len(s.problems) != 12 || s.count("nftwl_refused_total", "key") != 3 || s.count("nftwl_refused_total", "request") != 9 {
		t.Errorf("%q", s.problems)
	}
}

// Whatever is wrong with the kernel's sets, Dovecot gets its answer, and the
// reason is logged and counted.
func TestFaults(t *testing.T) {
	full := `table inet filter {
		set trusted_ipv4 { type ipv4_addr . inet_service; flags timeout; size 5; elements = { 203.0.113.1 . 1, 203.0.113.1 . 2, 203.0.113.1 . 3, 203.0.113.1 . 4, 203.0.113.1 . 5 }; }
		set banned_ipv4 { type ipv4_addr . inet_service; flags timeout; size 5; elements = { 203.0.113.1 . 1, 203.0.113.1 . 2, 203.0.113.1 . 3, 203.0.113.1 . 4, 203.0.113.1 . 5 }; }
	}`
	for _, c := range []struct{ name, ruleset, reason string }{
		{"no table", "none", "missing"},
		{"no set", "table inet filter { set banned_ipv4 { type ipv4_addr; flags timeout; }; }", "missing"},
		{"full", full, "full"},
		{"another type", "table inet filter { set trusted_ipv4 { type inet_service; flags timeout; }; }", "type"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, "failures: {limit: 2}\n", c.ruleset)
			s.reports(success("192.0.2.1"), failed("192.0.2.2", 1), failed("192.0.2.2", 2))
			s.stop()
			if len(s.problems) != 2 || s.count("nftwl_errors_total", c.reason) != 2 {
				t.Errorf("%q", s.problems)
			}
			// A ban that failed does not count: the next one is not doubled.
			s.tracker.Failure(now(), addr("192.0.2.2"), wrong(3))
			if v := s.tracker.Judge(now(), addr("192.0.2.2")); v.Ban != time.Hour {
				t.Errorf("the ban that failed counts as one: %+v", v)
			}
		})
	}
}

// If a set has no room for some of a transaction's addresses, the others are
// still written.
func TestFullForSome(t *testing.T) {
	s := serve(t, "ports: [993]\n", "table inet filter { set trusted_ipv4 { type ipv4_addr . inet_service; flags timeout; size 2; elements = { 192.0.2.1 . 993 timeout 1h }; }; }")
	s.writer.mu.Lock() // so that they wait together
	go s.writer.mu.Unlock()
	s.reports(success("192.0.2.1"), success("192.0.2.2"), success("192.0.2.3"))
	got := s.list("trusted_ipv4")
	if !strings.Contains(got, `192.0.2.1 . 993 timeout 1d`) || len(s.problems) != 1 {
		t.Errorf("%s: %q", got, s.problems)
	}
}

// A slow, endless or incomplete body holds a connection only for a limited time.
func TestSlowBodies(t *testing.T) {
	s := serve(t, "", "")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	web := HTTPServer(s)
	web.ReadHeaderTimeout, web.ReadTimeout = 300*time.Millisecond, 600*time.Millisecond
	go web.Serve(l)
	defer web.Close()
	head := "POST /?command=report HTTP/1.1\r\nHost: x\r\nX-API-Key: " + testKey + "\r\n"
	for name, text := range map[string]string{
		"nothing":      "",
		"half a head":  head,
		"no body":      head + "Content-Length: 10\r\n\r\n",
		"half a body":  head + "Content-Length: 100\r\n\r\n{\"login\":",
		"endless body": head + "Transfer-Encoding: chunked\r\n\r\n7fffffff\r\n{\"login\":\"",
		"endless head": head + strings.Repeat("X-Y: z\r\n", 10000),
	} {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		go func() {
			_, err := io.WriteString(conn, text)
			for name == "endless body" && err == nil {
				_, err = conn.Write(make([]byte, 4096))
			}
		}()
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, http.ErrHandlerTimeout) || err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("%s: the connection stays open: %v", name, err)
		}
	}
}

// Failures survive a restart. Without failures in the configuration, nothing is
// saved.
func TestState(t *testing.T) {
	s := serve(t, "failures: {limit: 3}\n", "")
	s.reports(failed("192.0.2.1", 1), failed("192.0.2.1", 2))
	var file bytes.Buffer
	if err := s.Save(&file); err != nil {
		t.Fatal(err)
	}
	size := file.Len()
	if err := s.Save(&file); err != nil || file.Len() != size {
		t.Errorf("without a change: %v, %d bytes", err, file.Len()-size)
	}
	s.stop()
	s = serve(t, "failures: {limit: 3}\n", "")
	if err := s.Load(bytes.NewReader(file.Bytes()[1:])); err == nil {
		t.Error("a damaged file is accepted")
	}
	if err := s.Load(&file); err != nil {
		t.Fatal(err)
	}
	s.reports(failed("192.0.2.1", 1), failed("192.0.2.1", 3))
	if got := s.list("banned_ipv4"); !strings.Contains(got, "192.0.2.1") {
		t.Errorf("%s", got)
	}
	off, err := config.Parse([]byte("policy: {}"))
	if err != nil {
		t.Fatal(err)
	}
	s.Set(off, testKey)
	if err := s.Save(&file); err != nil || file.Len() > 0 {
		t.Errorf("%v, %d bytes", err, file.Len())
	}
}

func TestMetrics(t *testing.T) {
	s := serve(t, "failures: {}\n", "")
	s.reports(success("192.0.2.1"), failed("192.0.2.2", 1))
	s.stop()
	problems, err := testutil.GatherAndLint(s.registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	families, err := s.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range families {
		names = append(names, f.GetName())
	}
	for _, name := range []string{"nftwl_reports_total", "nftwl_trusted_total", "nftwl_failing_networks"} {
		if !slices.Contains(names, name) {
			t.Errorf("%s is not among %q", name, names)
		}
	}
	// Gather collects in other threads, which are in another namespace.
	counts := (&sets{server: s.Server}).read()
	if got := counts["trusted_ipv4"]; len(counts) != 4 || got.elements != 5 || got.size == 0 {
		t.Errorf("%+v", counts)
	}
	// Those of the limit, with rules that have it.
	nstest.Nft(t, "table inet filter { set limited_ipv4 { type ipv4_addr . inet_service; size 9; flags timeout; elements = { 192.0.2.3 . 465 }; }; }")
	counts = (&sets{server: s.Server}).read()
	if got := counts["limited_ipv4"]; len(counts) != 5 || got.elements != 1 || got.size != 9 {
		t.Errorf("%+v", counts)
	}
}

// Logins from one address that wait together get the longest timeout and all
// names.
func TestGrantsTogether(t *testing.T) {
	w := newWriter(nil)
	a := addr("192.0.2.1")
	for _, g := range []trust.Grant{
		{Addr: a, Timeout: 2 * time.Hour, Comment: "alice"},
		{Addr: a, Timeout: time.Hour, Comment: "bob"},
		{Addr: a, Timeout: 3 * time.Hour, Comment: "alice"},
	} {
		w.trust(config.Default(), &g)
	}
	if got := *w.grants[a].grant; len(w.grants) != 1 || got != (trust.Grant{Addr: a, Timeout: 3 * time.Hour, Comment: "bob, alice"}) {
		t.Errorf("%+v", got)
	}
}
