// Package doctor checks a whole installation: nftwl's own configuration, the
// kernel's sets and rules, Dovecot, nftwld, the units, fail2ban. It changes nothing,
// except that Dovecot trusts an address for a moment.
package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/doveconf"
	"nftwl/pkg/nftset"
)

// Status is the outcome of a check.
type Status string

// The outcomes. A check is skipped if what it looks at is not in use, or cannot be
// looked at.
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
	Text    string `json:"text"`              // what was found; one line, not escaped
	Remedy  string `json:"remedy,omitempty"`  // what to do about it, in words
	Command string `json:"command,omitempty"` // the same for a shell, or "" if no command does it
}

// Doctor checks the installation of one configuration.
type Doctor struct {
	Executable string // path of this very program
	ConfigPath string // as config.Load takes it: "" for the default

	report func(Result)

	// What one check has found and others need.
	config *config.Config // never nil: the default if the file is wrong
	valid  bool           // config is what the administrator wrote
	conn   *nftset.Conn   // nil if nftables cannot be read

	units    map[string]unit // nil if they cannot be seen
	noUnits  string          // why
	noRules  bool            // nft does not load the file that a unit loads at boot
	reload   string          // a command that loads it; "" if it lacks the table
	unusable map[string]bool // sets, by name

	dovecot *doveconf.Settings // nil if they cannot be read
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
		d.checkCluster,
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

// remedy is what to do: in words, and as a command if there is one.
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

// patience is how long a program, a server or the kernel may take to answer.
const patience = 10 * time.Second

// errNoAnswer: a program did not answer in time. It can be healthy nevertheless.
var errNoAnswer = errors.New("no answer")

// run runs a program, and returns what it wrote to stdout. If it fails, the error
// has the first line with an error that it wrote, or else the last to stderr.
func run(ctx context.Context, program string, args ...string) (string, error) {
	started := time.Now()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second // a child of the program's may hold the pipe open
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err == nil {
		return out.String(), nil
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		end, _ := ctx.Deadline() // the caller's can be earlier
		return out.String(), fmt.Errorf("%s: %w within %v", program, errNoAnswer, end.Sub(started).Round(100*time.Millisecond))
	}
	lines := strings.Split(strings.TrimSpace(errs.String()), "\n")
	why := cmp.Or(lines[len(lines)-1], err.Error())
	for line := range strings.Lines(errs.String() + out.String()) {
		if strings.Contains(strings.ToLower(line), "error") {
			why = strings.TrimSpace(line)
			break
		}
	}
	return out.String(), fmt.Errorf("%s: %s", program, why)
}

// quote makes a word of a shell's.
func quote(s string) string {
	if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+@%:,") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
