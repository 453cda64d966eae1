package resident

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"nftwl/pkg/nftset"
)

// Stats is what a server has counted. Each login that was answered is one of
// new, renewed, kept, ignored and failed, as soon as the kernel has answered.
type Stats struct {
	Started time.Time `json:"started"`
	Logins  uint64    `json:"logins"` // answered
	// Not trusted before, on one port at least; trusted for longer than
	// before; trusted for long enough already; not to be trusted.
	New     uint64 `json:"new"`
	Renewed uint64 `json:"renewed"`
	Kept    uint64 `json:"kept"`
	Ignored uint64 `json:"ignored"`
	// By the reason for which a client was not trusted, or a request got no
	// answer.
	Failed  map[string]uint64 `json:"failed"`
	Refused map[string]uint64 `json:"refused"`
	// Answered before the kernel had.
	Late uint64 `json:"late"`
	// How long the answers took, in seconds: of all together, of the slowest,
	// and how many took at most so long.
	Seconds float64  `json:"seconds"`
	Slowest float64  `json:"slowest"`
	Within  []Bucket `json:"within"`
}

// Bucket counts the answers that took at most so many seconds.
type Bucket struct {
	Seconds float64 `json:"seconds"`
	Count   uint64  `json:"count"`
}

// bounds are those of the buckets, in seconds.
var bounds = [...]float64{.0005, .001, .005, .01, .05, .1, .5, 1, 5, 30}

// Mean returns how long an answer took on average; 0 before the first.
func (s Stats) Mean() time.Duration {
	return time.Duration(s.Seconds / float64(max(s.Logins, 1)) * float64(time.Second))
}

// counter gathers a Stats.
type counter struct {
	mu sync.Mutex
	s  Stats
}

func (c *counter) start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.s = Stats{Started: time.Now(), Failed: make(map[string]uint64), Refused: make(map[string]uint64)}
	for _, b := range bounds {
		c.s.Within = append(c.s.Within, Bucket{Seconds: b})
	}
}

func (c *counter) stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.s
	s.Failed, s.Refused, s.Within = maps.Clone(s.Failed), maps.Clone(s.Refused), slices.Clone(s.Within)
	return s
}

func (c *counter) json() []byte {
	b, err := json.Marshal(c.stats())
	if err != nil {
		panic(err) // it has no value that cannot be marshalled
	}
	return append(b, '\n')
}

func (c *counter) answered(took time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.s.Logins++
	seconds := took.Seconds()
	c.s.Seconds += seconds
	c.s.Slowest = max(c.s.Slowest, seconds)
	for i := range c.s.Within {
		if seconds <= c.s.Within[i].Seconds {
			c.s.Within[i].Count++
		}
	}
}

func (c *counter) trusted(o nftset.Outcome, logins int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch o {
	case nftset.Added:
		c.s.New += uint64(logins)
	case nftset.Extended:
		c.s.Renewed += uint64(logins)
	default:
		c.s.Kept += uint64(logins)
	}
}

func (c *counter) failed(reason string, logins int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.s.Failed[reason] += uint64(logins)
}

func (c *counter) refused(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.s.Refused[reason]++
}

func (c *counter) ignored() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.s.Ignored++
}

func (c *counter) late() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.s.Late++
}

// WritePrometheus writes the counters in Prometheus' text format.
func (s Stats) WritePrometheus(w io.Writer) error {
	p := printer{w: w}
	p.metric("nftwl_start_time_seconds", "gauge", "When the server started, in seconds since 1970.")
	p.value("nftwl_start_time_seconds", "", float64(s.Started.UnixMilli())/1000)
	p.metric("nftwl_logins_total", "counter", "Logins, by what became of the client's address.")
	var failed uint64
	for _, n := range s.Failed {
		failed += n
	}
	for _, r := range []struct {
		result string
		n      uint64
	}{{"new", s.New}, {"renewed", s.Renewed}, {"kept", s.Kept}, {"ignored", s.Ignored}, {"failed", failed}} {
		p.value("nftwl_logins_total", fmt.Sprintf("{result=%q}", r.result), float64(r.n))
	}
	p.reasons("nftwl_failed_total", "Logins whose client could not be trusted, by reason.", s.Failed)
	p.reasons("nftwl_refused_total", "Requests that got no answer, by reason.", s.Refused)
	p.metric("nftwl_late_total", "counter", "Logins that were answered before the kernel had trusted the client.")
	p.value("nftwl_late_total", "", float64(s.Late))
	p.metric("nftwl_answer_seconds", "histogram", "How long the answers took.")
	for _, b := range s.Within {
		p.value("nftwl_answer_seconds_bucket", fmt.Sprintf(`{le="%v"}`, b.Seconds), float64(b.Count))
	}
	p.value("nftwl_answer_seconds_bucket", `{le="+Inf"}`, float64(s.Logins))
	p.value("nftwl_answer_seconds_sum", "", s.Seconds)
	p.value("nftwl_answer_seconds_count", "", float64(s.Logins))
	return p.err
}

// printer writes until the first error.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) printf(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}

func (p *printer) metric(name, kind, help string) {
	p.printf("# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

func (p *printer) value(name, labels string, v float64) { p.printf("%s%s %v\n", name, labels, v) }

func (p *printer) reasons(name, help string, of map[string]uint64) {
	p.metric(name, "counter", help)
	for _, reason := range slices.Sorted(maps.Keys(of)) {
		p.value(name, fmt.Sprintf("{reason=%q}", reason), float64(of[reason]))
	}
}
