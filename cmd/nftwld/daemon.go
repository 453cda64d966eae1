package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	systemd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"nftwl/pkg/atomicfile"
	"nftwl/pkg/cluster"
	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/policy"
	"nftwl/pkg/trust"
)

const (
	// maxConns is how many connections can be open at once; more wait in the
	// socket. Any local process can connect, and this limits the memory it takes.
	maxConns = 4096
	// grace is how long, at the end, clients have to close their connections, and
	// then the writers to finish.
	grace = 3 * time.Second
	// saveEvery is the time whose failures a power cut can lose.
	saveEvery = time.Minute
)

// daemon has the command's options and state.
type daemon struct {
	configPath string
	stateDir   string // empty to keep no state
	verbose    bool

	log    *slog.Logger
	quiet  quiet
	server *policy.Server
	node   *cluster.Node // nil without a cluster
}

// run serves until SIGTERM.
func (d *daemon) run() error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	d.log = newLog(d.verbose)
	d.quiet.log = d.log

	c, key, err := load(d.configPath)
	if err != nil {
		return err
	}
	password, err := readPassword(c.Cluster)
	if err != nil {
		return err
	}
	listeners, err := listen(listenAddress(c))
	if err != nil {
		return failure{err, ""}
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	d.server = policy.New(c, key, registry)
	d.server.Problem = d.quiet.problem
	d.server.Trusted = func(g *trust.Grant, o nftset.Outcome) {
		if o != nftset.Unchanged {
			d.log.Debug("trusted", "address", g.Addr, "for", nftset.FormatTimeout(g.Timeout), "user", g.Comment)
		}
	}
	d.server.Banned = func(b policy.Ban) {
		d.log.Info("banned", "address", b.Addr, "for", nftset.FormatTimeout(b.Timeout),
			"failures", b.Failures, "user", nftset.CleanComment(b.Login), "trusted", b.Trusted)
	}
	d.loadState()

	writing, stopWriting := context.WithCancel(context.Background())
	var writer sync.WaitGroup
	writer.Go(func() { d.server.Run(writing) })
	if c.Cluster != nil {
		d.node = cluster.New(c, password, registry)
		d.node.Problem = d.quiet.problem
		d.node.Connected = func() { d.log.Info("the cluster can be reached again") }
		writer.Go(func() { d.node.Run(writing) })
	}
	mux := http.NewServeMux()
	mux.Handle("/{$}", d.server)
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	web := policy.HTTPServer(mux)
	conns := newConnections(web, maxConns)
	web.ErrorLog = slog.NewLogLogger(d.log.Handler(), slog.LevelWarn)
	ended := make(chan error, len(listeners))
	var serving sync.WaitGroup
	for _, l := range listeners {
		d.log.Info("listening", "address", l.Addr())
		serving.Go(func() { ended <- web.Serve(listener{l, conns}) })
	}
	d.notify(systemd.SdNotifyReady)

	err = d.wait(signals, ended, c)

	d.notify(systemd.SdNotifyStopping)
	for _, l := range listeners {
		l.Close()
	}
	conns.end()
	if !within(grace, func() { serving.Wait(); conns.open.Wait() }) {
		web.Close()
		within(grace, conns.open.Wait)
	}
	// The writer may be in a system call that waits for another's transaction.
	stopWriting()
	if !within(grace, writer.Wait) {
		d.log.Warn("exiting before the kernel has answered")
	}
	d.saveState()
	d.quiet.flush(0)
	return err
}

// within calls f, and reports whether it returned in time.
func within(d time.Duration, f func()) bool {
	done := make(chan struct{})
	go func() {
		f()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-time.After(d):
		return false
	}
}

// wait handles signals and timers until SIGTERM, SIGINT or an error of a socket.
func (d *daemon) wait(signals <-chan os.Signal, ended <-chan error, c *config.Config) error {
	pulse, err := systemd.SdWatchdogEnabled(true)
	if err != nil {
		d.log.Warn("watchdog", "error", err)
	}
	if pulse <= 0 {
		pulse = time.Hour
	}
	watchdog := time.NewTicker(pulse / 3)
	defer watchdog.Stop()
	save := time.NewTicker(saveEvery)
	defer save.Stop()
	for {
		select {
		case err := <-ended:
			return failure{err, ""}
		case <-watchdog.C:
			d.notify(systemd.SdNotifyWatchdog)
		case <-save.C:
			d.saveState()
			d.quiet.flush(quietFor)
		case s := <-signals:
			if s != unix.SIGHUP {
				return nil
			}
			d.notify(systemd.SdNotifyReloading)
			c = d.reload(c)
			d.notify(systemd.SdNotifyReady)
		}
	}
}

// reload reads the configuration and the key again, and returns the configuration
// in use: the old one if the new one has an error.
func (d *daemon) reload(old *config.Config) *config.Config {
	c, key, err := load(d.configPath)
	if err != nil {
		d.log.Error("the old configuration stays in use", "error", err)
		d.notify("STATUS=The old configuration stays in use: " + err.Error())
		return old
	}
	if listenAddress(c) != listenAddress(old) {
		d.log.Warn("policy.listen has changed, which needs a restart", "address", listenAddress(c))
	}
	if (c.Cluster == nil) != (d.node == nil) || d.node != nil && !c.Cluster.Same(old.Cluster) {
		d.log.Warn("cluster has changed, which needs a restart")
		c.Cluster = old.Cluster
	}
	d.server.Set(c, key)
	if d.node != nil {
		d.node.Set(c)
	}
	d.notify("STATUS=")
	d.log.Info("configuration reloaded")
	return c
}

// load returns the configuration, and the key of its policy.
func load(path string) (*config.Config, string, error) {
	c, err := config.Load(path)
	if err != nil {
		return nil, "", failure{err, ""}
	}
	if c.Policy == nil && c.Cluster == nil {
		return nil, "", failure{errors.New("the configuration has no policy and no cluster, so there is nothing to do"),
			"write policy: {} into " + config.Path}
	}
	if c.Policy == nil {
		return c, "", nil // with which every report is refused
	}
	key, err := readKey(c.Policy.KeyFile)
	if err != nil {
		return nil, "", failure{fmt.Errorf("key: %w", err), "the file must hold the same key as auth_policy_server_api_header in Dovecot's configuration"}
	}
	return c, key, nil
}

// listenAddress is where nftwld listens, for reports and for who asks for its metrics.
func listenAddress(c *config.Config) netip.AddrPort {
	if c.Policy == nil {
		return config.DefaultPolicy.Listen
	}
	return c.Policy.Listen
}

// readKey returns the key: systemd's credential if there is one, or else the contents
// of the file.
func readKey(path string) (string, error) { return config.ReadKey(secret("policy.key", path)) }

// passwordFile is root's, of which the unit makes the credential.
const passwordFile = "/etc/nftwl/cluster.password"

// readPassword returns the password of the cluster's server: systemd's credential, or
// the contents of a file; "" without either.
func readPassword(c *config.Cluster) (string, error) {
	if c == nil {
		return "", nil
	}
	text, err := os.ReadFile(secret("cluster.password", cmp.Or(c.PasswordFile, passwordFile)))
	if err != nil && c.PasswordFile != "" {
		return "", failure{fmt.Errorf("cluster.password_file: %w", err), "write the password of the user in cluster.server to this file"}
	}
	return strings.TrimSpace(string(text)), nil
}

// secret returns the path of systemd's credential, or else the given one.
func secret(credential, path string) string {
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
		credential = filepath.Join(dir, credential)
		if _, err := os.Stat(credential); !errors.Is(err, fs.ErrNotExist) {
			return credential
		}
	}
	return path
}

// listen returns systemd's sockets, or makes one.
func listen(address netip.AddrPort) ([]net.Listener, error) {
	inherited, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("sockets from systemd: %w", err)
	}
	for _, l := range inherited {
		if l == nil {
			return nil, errors.New("a socket from systemd is not a stream socket")
		}
	}
	if len(inherited) > 0 {
		return inherited, nil
	}
	l, err := net.Listen("tcp", address.String())
	if err != nil {
		return nil, err
	}
	return []net.Listener{l}, nil
}

// notify tells systemd the service's state, if systemd asked for it.
func (d *daemon) notify(state string) {
	if _, err := systemd.SdNotify(false, state); err != nil {
		d.log.Warn("cannot notify systemd", "error", err)
	}
}

func (d *daemon) stateFile() string { return filepath.Join(d.stateDir, "failures") }

// loadState reads the failures that the last run saved. Without them, counting
// starts from zero.
func (d *daemon) loadState() {
	if d.stateDir == "" {
		return
	}
	f, err := os.Open(d.stateFile())
	if err == nil {
		defer f.Close()
		err = d.server.Load(f)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.log.Warn("starting without the saved failures", "file", d.stateFile(), "error", err)
	}
}

// saveState replaces the file of failures, if there are new ones.
func (d *daemon) saveState() {
	if d.stateDir == "" {
		return
	}
	var state bytes.Buffer
	err := d.server.Save(&state)
	if err == nil && state.Len() > 0 {
		err = atomicfile.Replace(d.stateFile(), state.Bytes(), 0o600)
	}
	if err != nil {
		d.quiet.problem("state", fmt.Errorf("failures are not saved: %w", err))
	}
}
