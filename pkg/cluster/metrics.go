package cluster

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the counters of a Node.
type metrics struct {
	connected prometheus.Gauge
	since     prometheus.Gauge
	down      *prometheus.GaugeVec
	evicts    prometheus.Gauge
	lag       prometheus.Gauge
	sent      *prometheus.CounterVec
	stale     *prometheus.CounterVec
	applied   *prometheus.CounterVec
	refused   *prometheus.CounterVec
	records   *prometheus.GaugeVec
	waiting   *prometheus.GaugeVec
	merges    prometheus.Counter
	overruns  prometheus.Counter
	repaired  prometheus.Counter

	reason  string // of the last call of connection
	begun   bool
	counted time.Time
}

func newMetrics(registry prometheus.Registerer) *metrics {
	name := func(s string) string { return "nftwl_cluster_" + s }
	gauge := func(s, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name(s), Help: help})
		registry.MustRegister(g)
		return g
	}
	counter := func(s, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name(s), Help: help})
		registry.MustRegister(c)
		return c
	}
	counters := func(s, help string, labels ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name(s), Help: help}, labels)
		registry.MustRegister(v)
		return v
	}
	gauges := func(s, help, label string) *prometheus.GaugeVec {
		v := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name(s), Help: help}, []string{label})
		registry.MustRegister(v)
		return v
	}
	m := &metrics{
		connected: gauge("connected", "1 if records can be sent and received, else 0."),
		since:     gauge("since_timestamp_seconds", "Since when that is so, in seconds since 1970."),
		down:      gauges("down", "1 for the reason for which records cannot be sent or received.", "reason"),
		evicts:    gauge("evicts", "1 if the engine throws away records when its memory is full."),
		lag:       gauge("lag_seconds", "How old the last entry was that came, by the engine's clock."),
		sent:      counters("sent_total", "Records that this machine sent, and that were accepted.", "list"),
		stale:     counters("stale_total", "Records that this machine sent and that were out of date.", "list"),
		applied:   counters("applied_total", "Elements that were changed here because of others.", "list", "outcome"),
		refused:   counters("refused_total", "Records of others that this machine refused.", "reason"),
		records:   gauges("records", "Addresses that the machines share.", "list"),
		waiting:   gauges("waiting", "Addresses that wait until they can be sent.", "list"),
		merges:    counter("merges_total", "How often a whole list was read."),
		overruns:  counter("overruns_total", "How often the kernel had more news than could be kept."),
		repaired:  counter("repaired_total", "Addresses on which this machine and the others differed, although nothing had failed."),
	}
	return m
}

// connection notes why the engine cannot be used; "" if it can.
func (m *metrics) connection(reason string) {
	if m.begun && m.reason == reason {
		return
	}
	if !m.begun || (m.reason == "") != (reason == "") {
		m.since.SetToCurrentTime()
	}
	m.down.Reset()
	m.connected.Set(1)
	if reason != "" {
		m.connected.Set(0)
		m.down.WithLabelValues(reason).Set(1)
	}
	m.reason, m.begun = reason, true
}

// entries counts records, once a second.
func (m *metrics) entries(shares []*share, now int64) {
	if time.Since(m.counted) < time.Second {
		return
	}
	m.counted = time.Now()
	for _, s := range shares {
		m.records.WithLabelValues(string(s.list)).Set(float64(len(s.records)))
		m.waiting.WithLabelValues(string(s.list)).Set(float64(len(s.unsent)))
	}
}
