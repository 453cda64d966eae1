package policy

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// metrics are the counters of a Server.
type metrics struct {
	reports  *prometheus.CounterVec
	last     prometheus.Gauge
	trusted  *prometheus.CounterVec
	ignored  *prometheus.CounterVec
	failures *prometheus.CounterVec
	banned   *prometheus.CounterVec
	spared   prometheus.Counter
	allowed  *prometheus.CounterVec
	refused  *prometheus.CounterVec
	errors   *prometheus.CounterVec
	late     prometheus.Counter
}

func newMetrics(registry prometheus.Registerer, s *Server) *metrics {
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		registry.MustRegister(c)
		return c
	}
	// Each value exists from the start, with 0.
	vector := func(name, help, label string, values ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
		for _, value := range values {
			v.WithLabelValues(value)
		}
		registry.MustRegister(v)
		return v
	}
	m := &metrics{
		reports: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nftwl_reports_total", Help: "Authentications that Dovecot reported.",
		}, []string{"protocol", "result"}),
		last: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "nftwl_last_report_timestamp_seconds", Help: "Time of Dovecot's last report, in seconds since 1970; 0 before the first report.",
		}),
		trusted:  vector("nftwl_trusted_total", "Successful logins: the client's address was added, renewed or left unchanged.", "outcome", "added", "renewed", "unchanged"),
		ignored:  vector("nftwl_ignored_total", "Successful logins that do not trust the client's address: it is exempt, it uses a stolen account, or no password was verified here.", "reason", "exempt", "stolen", "unverified"),
		failures: vector("nftwl_failures_total", "Failed logins, by whether they count towards a ban.", "outcome", string(Counted), string(Repeated), string(Right), string(internal), string(rejected), string(exempt)),
		banned:   vector("nftwl_banned_total", "Addresses banned for failed logins.", "client", "stranger", "trusted"),
		spared:   counter("nftwl_spared_total", "Failures over the limit that did not ban the address, because it is trusted."),
		allowed:  vector("nftwl_allow_total", "Answers to command=allow.", "answer", "accepted", "refused"),
		refused:  vector("nftwl_refused_total", "Refused requests: a wrong key, or not a request of Dovecot's.", "reason", "key", "request"),
		errors: vector("nftwl_errors_total", "Addresses that could not be trusted or banned.", "reason",
			"busy", "deadline", "full", "internal", "kernel", "login", "missing", "permission", "type"),
		late: counter("nftwl_late_total", "Logins whose client was trusted only after the configured deadline."),
	}
	started := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "nftwl_start_timestamp_seconds", Help: "Start time of nftwld, in seconds since 1970.",
	})
	started.SetToCurrentTime()
	registry.MustRegister(started)
	registry.MustRegister(m.reports, m.last, &sets{server: s})
	gauge := func(name, help string, value func(*Tracker) int) {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() (v float64) {
			s.track(func(t *Tracker) { v = float64(value(t)) })
			return v
		}))
	}
	gauge("nftwl_failing_networks", "Networks (IPv4 addresses, /64s) whose failures or bans nftwld remembers.", func(t *Tracker) int { return len(t.networks) })
	gauge("nftwl_forgotten_networks", "Networks that nftwld forgot early, to limit its memory.", func(t *Tracker) int { return int(t.forgotten) })
	return m
}

func (m *metrics) report(r *report) {
	protocol := "other"
	switch r.Protocol {
	case "imap", "pop3", "smtp", "submission", "sieve", "doveadm", "lmtp":
		protocol = r.Protocol
	}
	result := "failure"
	if r.Success {
		result = "success"
	}
	m.reports.WithLabelValues(protocol, result).Inc()
	m.last.SetToCurrentTime()
}

func (m *metrics) trust(o nftset.Outcome, late bool) {
	m.trusted.WithLabelValues(o.String()).Inc()
	if late {
		m.late.Inc()
	}
}

// sets collects how full the sets are.
type sets struct {
	server *Server

	mu     sync.Mutex
	taken  time.Time
	counts map[string]count
}

type count struct {
	elements int
	size     uint32 // 0 for no limit
}

var (
	elementsDesc = prometheus.NewDesc("nftwl_set_elements", "Elements in a set.", []string{"set"}, nil)
	sizeDesc     = prometheus.NewDesc("nftwl_set_size", "Maximum number of elements in a set; 0 for no limit.", []string{"set"}, nil)
)

// Describe implements prometheus.Collector.
func (s *sets) Describe(descs chan<- *prometheus.Desc) {
	descs <- elementsDesc
	descs <- sizeDesc
}

// Collect implements prometheus.Collector. It leaves out a set that it cannot
// read.
func (s *sets) Collect(metrics chan<- prometheus.Metric) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Anyone on the machine can ask, as often as they like.
	if time.Since(s.taken) > 5*time.Second {
		s.counts = s.read()
		s.taken = time.Now()
	}
	for name, c := range s.counts {
		metrics <- prometheus.MustNewConstMetric(elementsDesc, prometheus.GaugeValue, float64(c.elements), name)
		metrics <- prometheus.MustNewConstMetric(sizeDesc, prometheus.GaugeValue, float64(c.size), name)
	}
}

func (s *sets) read() map[string]count {
	c := s.server.config.Load()
	counts := make(map[string]count)
	conn, err := nftset.Dial()
	if err != nil {
		return counts
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	for _, name := range append(c.Sets(), config.Limited.Both()...) {
		set, err := conn.Set(c.Table, name)
		if err != nil {
			continue
		}
		n := int(set.Count)
		if n == 0 { // the set is empty, or the kernel is older than 6.16 and does not tell
			elems, err := conn.Elements(set)
			if err != nil {
				continue
			}
			n = len(elems)
		}
		counts[name] = count{n, set.Size}
	}
	return counts
}
