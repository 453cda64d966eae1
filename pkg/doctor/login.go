package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

// checkLogin has nftwl itself trust an address of each family that belongs to
// no one (RFC 5737, RFC 3849), where it can do no harm.
func (d *Doctor) checkLogin(ctx context.Context) {
	if !d.valid {
		d.skip("login", "the configuration is not valid, so no login is trusted")
		return
	}
	var tried []string
	for _, address := range []string{"192.0.2.1", "2001:db8::1"} {
		if err := trust.Refuse(d.config, netip.MustParseAddr(address)); err != nil {
			continue // as it should be
		}
		err := d.try(ctx, 0, address)
		if errors.Is(err, errUntried) {
			d.skip("login", "%v", err)
			return
		}
		if err != nil {
			d.fail("login", remedy{words: "where the checks above do not explain it, it is a defect of nftwl's: report it, with this line"},
				"a login of %s, tried in a network namespace with sets of its own: %v", address, err)
			return
		}
		tried = append(tried, address)
	}
	if tried == nil {
		d.skip("login", "the configuration ignores the addresses that a login could be tried with, 192.0.2.1 and 2001:db8::1")
		return
	}
	d.ok("login", "a login of %s, tried in a network namespace with sets of its own, is trusted", strings.Join(tried, " and of "))
}

var errUntried = errors.New("a login cannot be tried")

// exitUntried is the exit status of a child that did not come to the login.
// nftwl has no other use for it.
const exitUntried = 3

// try runs a child that calls Try. An address is trusted in a network namespace
// of the child's own: only a new process can be the first in a user namespace,
// as a program with several threads, which every Go program is, cannot unshare
// its own.
func (d *Doctor) try(ctx context.Context, limit uint64, address string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, d.Executable, withConfig(d.ConfigPath, "doctor", "try", strconv.FormatUint(limit, 10))...)
	cmd.Env = []string{} // as little as Dovecot gives it
	cmd.WaitDelay = time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if address != "" {
		cmd.Args = append(cmd.Args, address)
		here, err := os.Open("/proc/self/ns/net")
		if err != nil {
			return fmt.Errorf("%w: %w", errUntried, err)
		}
		defer here.Close()
		cmd.ExtraFiles = []*os.File{here}
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
		if id := os.Geteuid(); id != 0 {
			cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: id, Size: 1}}
			cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
		}
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%w in a network namespace of its own: %w", errUntried, err)
	}
	err := cmd.Wait()
	// The first line: what Go's runtime says of its end goes on for pages.
	line, _, _ := strings.Cut(stderr.String(), "\n")
	line = strings.TrimPrefix(line, "nftwl: error: ")
	switch {
	case cmd.ProcessState.ExitCode() == exitUntried:
		return fmt.Errorf("%w: %s", errUntried, line)
	case err == nil && address == "": // whatever it says of the configuration
		return nil
	case line != "":
		return errors.New(line)
	case cmd.ProcessState.ExitCode() == 1:
		return errors.New("it goes on, but the address is not trusted")
	}
	return err
}

// Try makes this process a login under a limit on its address space, in bytes
// and as Dovecot sets it; 0 is none. With an address, the login is of that,
// and the command that goes on after it is the question whether it is trusted:
// exit status 0 says so. The table and sets for it are made here, in a network
// namespace that must not be the one that descriptor 3 is of.
//
// It returns only where it fails before the login, with a status to exit with.
func Try(executable, configPath string, limit uint64, address string) (status int, err error) {
	command, env := []string{"version"}, []string{}
	if address != "" {
		if err := makeSets(configPath); err != nil {
			return exitUntried, err
		}
		command, env = []string{"check", "-q", address}, []string{"IP=" + address}
	}
	login := withConfig(configPath, append([]string{"login", executable}, withConfig(configPath, command...)...)...)
	argv := append([]string{executable}, login...)
	if limit != 0 {
		// As restrict_process_size() of Dovecot's src/lib does, and last: from
		// here on this process may be over its limit.
		for _, resource := range []int{unix.RLIMIT_DATA, unix.RLIMIT_AS} {
			if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
				return exitUntried, fmt.Errorf("setrlimit: %w", err)
			}
		}
	}
	return exitUntried, fmt.Errorf("%s: %w", executable, unix.Exec(executable, argv, env))
}

// withConfig puts a configuration before the arguments of nftwl.
func withConfig(path string, args ...string) []string {
	if path == "" {
		return args
	}
	return append([]string{"--config", path}, args...)
}

// makeSets makes the table and the trusted sets, but never where the doctor is.
func makeSets(configPath string) error {
	var parent, own unix.Stat_t
	if err := unix.Fstat(3, &parent); err != nil {
		return fmt.Errorf("descriptor 3: %w", err)
	}
	if err := unix.Stat("/proc/self/ns/net", &own); err != nil {
		return fmt.Errorf("/proc/self/ns/net: %w", err)
	}
	if parent.Dev != own.Dev || parent.Ino == own.Ino {
		return errors.New("not in a network namespace of its own")
	}
	unix.CloseOnExec(3)
	c, err := config.Load(configPath)
	if err != nil {
		return err
	}
	conn, err := nftset.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	b := conn.Batch()
	b.CreateTable(c.Table)
	for i, name := range c.Trusted.Both() {
		b.CreateSet(&nftset.Set{
			Table: c.Table, Name: name, Key: nftset.KeyType{IPv6: i == 1, Port: true},
			Dynamic: true, Timeouts: true, Timeout: 24 * time.Hour,
		})
	}
	return b.Commit()
}
