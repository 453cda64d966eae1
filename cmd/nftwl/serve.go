package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/resident"
	"nftwl/pkg/trust"
)

// socketPath is where nftwl.socket listens.
const socketPath = "/run/nftwl/post-login"

func newServe(configPath *string) *cobra.Command {
	var path string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Answer Dovecot's post-login requests on a socket, and trust (in place of login)",
		Long: `Does what login does without a process per login: answers the post-login
requests of Dovecot's mail processes on a socket, and trusts the clients. Each
request is answered within the configured deadline with the fields that came, so
that an error of its own never denies a login.

The socket comes from systemd (nftwl.socket), or is made with --listen. Only
root's processes may ask, and those of the user who owns the socket.

SIGHUP reads the configuration again; one that is wrong is refused, and the
old one stays. SIGUSR1 writes the counters to the log, as 'nftwl status' shows
them. SIGTERM answers what has come in and ends it.

Exit status: 0 after SIGTERM, 1 when something failed, 2 when the command line
was wrong.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			l, err := inherited()
			own := l == nil
			switch {
			case err != nil:
				return failed(err)
			case l == nil && path == "":
				return errors.New("serve: no socket from systemd; --listen PATH makes one")
			case l != nil && path != "":
				return errors.New("serve: there is a socket from systemd, so --listen has no place")
			case l != nil:
				path = l.Addr().String()
			default:
				if l, err = listen(path); err != nil {
					return failed(fmt.Errorf("serve: %w", err))
				}
			}
			// Nothing that this process might start has a use for these.
			for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
				os.Unsetenv(name)
			}
			return failed(serve(*configPath, l, path, own, verbose))
		},
	}
	cmd.Flags().StringVar(&path, "listen", "", "make the socket at `PATH`, in place of systemd's")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "write a line for each client that is trusted")
	return cmd
}

// serve answers the requests on a socket, which is at the path, until SIGTERM.
// The socket is its own where systemd does not keep it.
func serve(configPath string, l *net.UnixListener, path string, own, verbose bool) error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1)

	var socket unix.Stat_t
	if err := unix.Stat(path, &socket); err != nil {
		return fmt.Errorf("serve: %s: %w", path, err)
	}
	log := &problemLog{seen: make(map[string]*problem)}
	server := resident.New()
	server.Owner = socket.Uid
	server.OwnSocket = own
	server.Problem = log.problem
	if timeout := watchdog(); timeout > 0 {
		server.Alive, server.Pulse = func() { notify("WATCHDOG=1") }, timeout/3
	}
	if verbose {
		server.Trusted = func(g *trust.Grant, o nftset.Outcome) {
			what := map[nftset.Outcome]string{
				nftset.Added:    "is trusted for " + nftset.FormatTimeout(g.Timeout),
				nftset.Extended: "stays trusted for " + nftset.FormatTimeout(g.Timeout),
				nftset.Kept:     "was trusted already",
			}[o]
			logLine(fmt.Sprintf("nftwl: %s %s (%s)", g.Addr, what, g.Comment))
		}
	}
	var metrics string
	load := func(otherwise string) bool {
		c, err := config.Load(configPath)
		if err != nil {
			log.error(err, otherwise)
			notify("STATUS=The configuration is refused: " + printable(err.Error()))
			return false
		}
		server.SetConfig(c)
		metrics = c.Metrics
		writeMetrics(metrics, server, log)
		notify("STATUS=")
		return true
	}
	// A server that ended here would deny every login.
	load("nobody is trusted until it is mended and read again")

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ctx, l) }()
	notify("READY=1")

	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			writeMetrics(metrics, server, log)
			log.flush(0)
			return err
		case <-tick.C:
			writeMetrics(metrics, server, log)
			log.flush(quietFor)
		case s := <-signals:
			switch s {
			case unix.SIGHUP:
				notify("RELOADING=1")
				if load("the old one stays in use") {
					logLine("nftwl: the configuration was read again")
				}
				notify("READY=1")
			case unix.SIGUSR1:
				for _, line := range statusLines(server.Stats()) {
					logLine("nftwl: " + line)
				}
			default:
				notify("STOPPING=1")
				cancel()
			}
		}
	}
}

// writeMetrics writes the counters for Prometheus, where a path is configured.
// Its collector reads whole files that end in .prom only, and is not root.
func writeMetrics(path string, server *resident.Server, log *problemLog) {
	if path == "" {
		return
	}
	err := func() error {
		f, err := os.CreateTemp(filepath.Dir(path), ".nftwl-*")
		if err != nil {
			return err
		}
		defer os.Remove(f.Name()) // fails once it is renamed
		defer f.Close()
		var text bytes.Buffer
		if err := server.Stats().WritePrometheus(&text); err != nil {
			return err
		}
		if _, err := f.Write(text.Bytes()); err != nil {
			return err
		}
		if err := f.Chmod(0o644); err != nil {
			return err
		}
		return os.Rename(f.Name(), path)
	}()
	if err != nil {
		log.problem("metrics", fmt.Errorf("metrics: %w", err))
	}
}

// quietFor is how long a problem is not written again.
const quietFor = time.Minute

// problemLog writes problems to the log: the first of a reason at once, and then
// one line a minute for all that follow.
type problemLog struct {
	mu   sync.Mutex
	seen map[string]*problem // by reason, of which there are few
}

type problem struct {
	written time.Time
	more    int   // not written since
	last    error // of these
}

func (l *problemLog) problem(reason string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.seen[reason]
	if p != nil && time.Since(p.written) < quietFor {
		p.more++
		p.last = err
		return
	}
	if p == nil {
		p = new(problem)
		l.seen[reason] = p
	}
	p.write(err)
}

// flush writes the problems of which a line was held back, and none written
// for so long.
func (l *problemLog) flush(after time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.seen {
		if p.more > 0 && time.Since(p.written) >= after {
			p.more--
			p.write(p.last)
		}
	}
}

func (p *problem) write(err error) {
	text := err.Error()
	if p.more > 0 {
		text = fmt.Sprintf("%s (and %d more like it)", text, p.more)
	}
	logError(text, hintFor(err))
	p.written, p.more, p.last = time.Now(), 0, nil
}

// error writes what happens too seldom to be held back.
func (l *problemLog) error(err error, otherwise string) {
	logError(err.Error()+"; "+otherwise, hintFor(err))
}

// logError is complain with a hint, and for systemd's journal the priority.
func logError(text, hint string) {
	var priority string
	if os.Getenv("JOURNAL_STREAM") != "" {
		priority = "<3>" // sd-daemon(3)
	}
	logLine(priority + "nftwl: error: " + text)
	if hint != "" {
		logLine(priority + "nftwl: hint: " + hint)
	}
}
