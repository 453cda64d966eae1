// Package doctor checks a whole installation: nftwl's own configuration, the
// kernel's sets and rules, Dovecot, nftwld, the units, fail2ban. It changes nothing
// but in a network namespace of its own, and that Dovecot trusts an address for a
// moment.
package doctor

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/doveconf"
	"nftwl/pkg/nftset"
)

// Status is what became of a check.
type Status string

// The outcomes. A check that is skipped has no say: what it looks at is not in
// use, or cannot be looked at for the reason given.
const (
	OK   Status = "ok"
	Warn Status = "warn"
	Fail Status = "fail"
	Skip Status = "skip"
)

// Result is the outcome of one check.
type Result struct {
	Check   string `json:"check"` // its name, which does not change: "sets.trusted_ipv4"
	Status  Status `json:"status"`
	Text    string `json:"text"`              // what was found; one line, but not escaped
	Remedy  string `json:"remedy,omitempty"`  // what to do about it, in words
	Command string `json:"command,omitempty"` // the same for a shell, where one command does it
}

// Doctor says where to look.
type Doctor struct {
	Executable string // path of this very program
	ConfigPath string // as config.Load takes it: "" for the default

	report func(Result)

	// What one check has found and others need.
	config *config.Config // never nil: the default where the file is wrong
	valid  bool           // config is what the administrator wrote
	conn   *nftset.Conn   // nil where the kernel's nftables cannot be read

	units    map[string]unit // nil where they cannot be seen
	noUnits  string          // why
	noRules  bool            // the file that a unit loads at boot does not load
	reload   string          // a command that loads it; "" where it does not have the table
	unusable map[string]bool // sets, by name

	dovecot *doveconf.Settings // nil where they cannot be read
	unread  string             // why
	running bool
	stale   bool            // its configuration has changed since it was loaded
	told    map[remedy]bool // for logins that fail
}

// Run makes every check, in the order in which a login and a reboot meet what
// they look at, and reports each result as soon as it is known.
func (d *Doctor) Run(ctx context.Context, report func(Result)) {
	d.report, d.told = report, make(map[remedy]bool)
	d.findUnits(ctx)
	for _, check := range []func(context.Context){
		d.checkConfig,
		d.checkKernel,
		d.checkBoot,
		d.checkSets,
		d.checkRules,
		d.checkDovecot,
		d.checkPolicy,
		d.checkPersistence,
		d.checkFail2ban,
	} {
		if ctx.Err() != nil {
			break
		}
		check(ctx)
	}
	if d.conn != nil {
		d.conn.Close()
	}
}

// configPath is the file that the configuration is read from.
func (d *Doctor) configPath() string { return cmp.Or(d.ConfigPath, config.Path) }

// remedy is what to do: in words, and as a command where there is one.
type remedy struct{ words, command string }

func (d *Doctor) ok(check, format string, args ...any) {
	d.report(Result{Check: check, Status: OK, Text: fmt.Sprintf(format, args...)})
}

func (d *Doctor) skip(check, format string, args ...any) {
	d.report(Result{Check: check, Status: Skip, Text: fmt.Sprintf(format, args...)})
}

func (d *Doctor) warn(check string, r remedy, format string, args ...any) {
	d.report(Result{check, Warn, fmt.Sprintf(format, args...), r.words, r.command})
}

func (d *Doctor) fail(check string, r remedy, format string, args ...any) {
	d.report(Result{check, Fail, fmt.Sprintf(format, args...), r.words, r.command})
}

// patience is how long a program of the system may take to say something.
const patience = 10 * time.Second

// errNoAnswer is about a program that may be well, and has not said so.
var errNoAnswer = errors.New("no answer")

// output runs a program, and returns what it wrote to stdout; where it fails,
// the error has the last line that it wrote to stderr.
func output(ctx context.Context, program string, args ...string) ([]byte, error) {
	out, errs, err := run(ctx, program, args...)
	if err == nil {
		return out, nil
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		lines := strings.Split(strings.TrimSpace(string(errs)), "\n")
		if last := lines[len(lines)-1]; last != "" {
			err = errors.New(last)
		}
	}
	return out, fmt.Errorf("%s: %w", filepath.Base(program), err)
}

// run runs a program, and returns what it wrote to stdout and stderr.
func run(ctx context.Context, program string, args ...string) (_, _ []byte, err error) {
	started := time.Now()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second // or a child of its that holds the pipe is waited for
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err = cmd.Run(); err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		end, _ := ctx.Deadline() // which can be the caller's
		err = fmt.Errorf("%w within %v", errNoAnswer, end.Sub(started).Round(100*time.Millisecond))
	}
	return out.Bytes(), errs.Bytes(), err
}

// quote makes a word for a shell of a path.
func quote(s string) string {
	if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+@%:,") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
