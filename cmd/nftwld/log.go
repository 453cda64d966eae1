package main

import (
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"

	"nftwl/pkg/cluster"
	"nftwl/pkg/install"
)

// newLog returns a log on standard error, without the time if it goes to the
// journal, which adds its own.
func newLog(verbose bool) *slog.Logger {
	options := &slog.HandlerOptions{}
	if verbose {
		options.Level = slog.LevelDebug
	}
	if os.Getenv("JOURNAL_STREAM") != "" {
		options.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey && len(groups) == 0 {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options))
}

// quietFor is how long problems of one reason are counted before the next line.
const quietFor = time.Minute

// quiet logs problems: the first of a reason at once, and then one line a minute
// for all others of that reason.
type quiet struct {
	log *slog.Logger

	mu   sync.Mutex
	seen map[string]*problem // by reason, of which there are few
}

type problem struct {
	logged time.Time
	more   int   // how many since then
	last   error // the last of them
}

func (q *quiet) problem(reason string, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	p := q.seen[reason]
	if p != nil && time.Since(p.logged) < quietFor {
		p.more++
		p.last = err
		return
	}
	if p == nil {
		if q.seen == nil {
			q.seen = make(map[string]*problem)
		}
		p = new(problem)
		q.seen[reason] = p
	}
	q.write(reason, p, err)
}

// flush logs the problems that were held back, of each reason whose last line is at
// least that old.
func (q *quiet) flush(after time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for reason, p := range q.seen {
		if p.more > 0 && time.Since(p.logged) >= after {
			p.more--
			q.write(reason, p, p.last)
		}
	}
}

func (q *quiet) write(reason string, p *problem, err error) {
	args := []any{"error", err}
	if p.more > 0 {
		args = append(args, "more", p.more)
	}
	hint := install.Remedy(err)
	if errors.Is(err, cluster.ErrSandbox) {
		hint = install.OpenNetwork
	}
	if hint != "" {
		args = append(args, "hint", hint)
	}
	q.log.Error(reason, args...)
	p.logged, p.more, p.last = time.Now(), 0, nil
}
