package resident

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

const (
	// maxWaiting is how many addresses wait for the kernel at most. Only a
	// transaction of another's that takes minutes makes so many wait.
	maxWaiting = 1 << 16
	// maxBatch is how many of them share a transaction. So many fit a socket's
	// buffer as it comes, even with the longest comments on five ports.
	maxBatch = 128
	// patience is how long the writer waits for the kernel's answer before it
	// takes it for lost. The logins do not wait for so long.
	patience = 10 * time.Second
)

// job is an address that is to be trusted, by one login or several.
type job struct {
	config *config.Config
	grant  *trust.Grant
	logins int

	done    chan struct{} // closed when what follows is known
	outcome nftset.Outcome
	err     error
}

var errWaiting = fmt.Errorf("%d addresses wait for the kernel already", maxWaiting)

// writer is the one that writes to the kernel, over one connection. What comes
// in while it writes goes into its next transaction.
type writer struct {
	finished func(*job) // called once for each job, before its done is closed

	mu      sync.Mutex
	waiting map[netip.Addr]*job
	wake    chan struct{} // has an item while jobs may be waiting

	conn *nftset.Conn // nil until dialled
}

func newWriter(finished func(*job)) *writer {
	return &writer{
		finished: finished,
		waiting:  make(map[netip.Addr]*job),
		wake:     make(chan struct{}, 1),
	}
}

// submit hands a grant over to be written. It does not wait. Logins from one
// address that wait together are one job, which trusts for the longest of
// their timeouts.
func (w *writer) submit(c *config.Config, g *trust.Grant) (*job, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	j := w.waiting[g.Addr]
	switch {
	case j == nil && len(w.waiting) == maxWaiting:
		return nil, errWaiting
	case j == nil:
		j = &job{config: c, grant: g, done: make(chan struct{})}
		w.waiting[g.Addr] = j
	case g.Timeout > j.grant.Timeout:
		j.config, j.grant = c, g
	}
	j.logins++
	select {
	case w.wake <- struct{}{}:
	default:
	}
	return j, nil
}

// take returns some of the jobs that wait, of one configuration and family.
func (w *writer) take() []*job {
	w.mu.Lock()
	defer w.mu.Unlock()
	var jobs []*job
	for addr, j := range w.waiting {
		if len(jobs) > 0 && (j.config != jobs[0].config || addr.Is4() != jobs[0].grant.Addr.Is4()) {
			continue
		}
		jobs = append(jobs, j)
		delete(w.waiting, addr)
		if len(jobs) == maxBatch {
			break
		}
	}
	return jobs
}

// run writes until stop is closed and nothing waits any more.
func (w *writer) run(stop <-chan struct{}) {
	for stopping := false; !stopping; {
		select {
		case <-w.wake:
		case <-stop:
			stopping = true
		}
		for jobs := w.take(); len(jobs) > 0; jobs = w.take() {
			w.write(jobs)
		}
	}
	if w.conn != nil {
		w.conn.Close()
	}
}

// write carries jobs out, each of which is finished afterwards.
func (w *writer) write(jobs []*job) {
	grants := make([]*trust.Grant, len(jobs))
	for i, j := range jobs {
		grants[i] = j.grant
	}
	outcomes, err := w.apply(jobs[0].config, grants)
	if errors.Is(err, nftset.ErrFull) && len(jobs) > 1 {
		// Some of them may find room, or need none.
		for i := range jobs {
			w.write(jobs[i : i+1])
		}
		return
	}
	for i, j := range jobs {
		if j.err = err; err == nil {
			j.outcome = outcomes[i]
		}
		w.finished(j)
		close(j.done)
	}
}

// apply is trust.Apply over the lasting connection. After an error it starts
// with a new one, and tries again at once where it was the old one that
// failed.
func (w *writer) apply(c *config.Config, grants []*trust.Grant) (outcomes []nftset.Outcome, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = defect{p}
		}
	}()
	for {
		old := w.conn != nil
		if !old {
			if w.conn, err = nftset.Dial(); err != nil {
				return nil, err
			}
		}
		w.conn.SetDeadline(time.Now().Add(patience))
		outcomes, err = trust.Apply(w.conn, c, grants...)
		if err == nil {
			return outcomes, nil
		}
		w.conn.Close()
		w.conn = nil
		if !old || errors.Is(err, nftset.ErrDeadline) {
			return nil, err
		}
	}
}
