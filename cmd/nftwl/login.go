package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

// login trusts the client that has just logged in and becomes the command, which
// is Dovecot's. The command must be executed whatever happens, or a user cannot
// read their mail: what can fail is in trustClient, which at most prints one line
// on stderr. Stdin and stdout are the client's, and stay untouched.
func login(configPath string, command []string) int {
	if len(command) == 0 {
		complain("login: the command to execute is missing")
		return exitUsage
	}
	trustClient(configPath)

	// Dovecot ignores SIGPIPE, and its children inherit that. Go's runtime has
	// replaced it by a handler, which exec would turn into the default.
	signal.Ignore(unix.SIGPIPE)
	return execute(command)
}

func trustClient(configPath string) {
	defer func() {
		if p := recover(); p != nil {
			complain(fmt.Sprintf("login: internal error: %v", p))
		}
	}()
	ip := os.Getenv("IP")
	c, err := config.Load(configPath)
	if err != nil {
		complain(fmt.Sprintf("login: %s is not trusted: %v", nameOf(ip), err))
		return
	}
	grant, warning := trust.Decide(c, trust.Login{
		IP:      ip,
		LocalIP: os.Getenv("LOCAL_IP"),
		User:    os.Getenv("USER"),
		Trust:   os.Getenv("NFTWL_TRUST"),
		Timeout: os.Getenv("NFTWL_TIMEOUT"),
	})
	if grant != nil {
		conn, err := nftset.Dial()
		if err == nil {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(c.Deadline))
			_, err = trust.Apply(conn, c, grant)
		}
		if err != nil {
			complain(fmt.Sprintf("login: %s is not trusted: %v", grant.Addr, err))
			return
		}
	}
	if warning != nil {
		complain("login: " + warning.Error())
	}
}

// nameOf is the client whose address is ip, in an error.
func nameOf(ip string) string {
	addr, err := trust.ParseAddr(ip)
	switch {
	case err == nil:
		return addr.String()
	case ip == "":
		return "a client without an address"
	}
	return trust.Quote(ip)
}

// complain writes an error as one line to stderr, which is Dovecot's log. It never
// waits: if nobody reads, the line is lost. It writes to the descriptor, because
// os.Stderr ends the process if the reader is gone.
func complain(text string) {
	const most = 1000 // less than PIPE_BUF, so that a pipe takes all or nothing
	line := []byte("nftwl: error: " + printable(text))
	if len(line) > most {
		line = append(bytes.ToValidUTF8(line[:most], nil), "…"...)
	}
	fds := []unix.PollFd{{Fd: 2, Events: unix.POLLOUT}}
	if n, err := unix.Poll(fds, 0); err == nil && n == 1 && fds[0].Revents == unix.POLLOUT {
		_, _ = unix.Write(2, append(line, '\n'))
	}
}

// execute becomes the command, found as execvp(3) finds it. It returns only if
// that fails, with the exit code that a shell would give.
//
// The environment is what came in, except that Go drops the second definition of
// a variable; Dovecot defines none twice. syscall.Exec restores the limit of open
// files, which Go's runtime raised.
func execute(command []string) int {
	name, env := command[0], os.Environ()
	paths := []string{name}
	if !strings.Contains(name, "/") {
		path, ok := os.LookupEnv("PATH")
		if !ok {
			path = "/bin:/usr/bin" // as in glibc; Dovecot's environment has none
		}
		paths = paths[:0]
		for _, dir := range strings.Split(path, ":") {
			if dir == "" {
				dir = "."
			}
			paths = append(paths, dir+"/"+name)
		}
	}
	err := error(unix.ENOENT)
	for _, path := range paths {
		e := unix.Exec(path, command, env)
		if e != unix.ENOENT && e != unix.ENOTDIR {
			err = e
			if e != unix.EACCES {
				break
			}
		}
	}
	if err == unix.ENOENT {
		complain(fmt.Sprintf("login: command %q not found", name))
		return exitNotFound
	}
	why := err.Error()
	if err == unix.ENOEXEC {
		why = "not a program, and a script needs a #! line"
	}
	complain(fmt.Sprintf("login: cannot execute %q: %s", name, why))
	return exitNotExecutable
}

// loginHelp is the help of login; main runs it.
func loginHelp() *cobra.Command {
	return &cobra.Command{
		Use:   "login COMMAND [ARG…]",
		Short: "Trust $IP, then become COMMAND (for Dovecot's post-login hook)",
		Long: `Trusts the address in $IP for the configured ports, then becomes COMMAND, with
its arguments; environment and open files stay as they are. It does so whatever
happens: an error is one line on stderr.

Everything after the word login is the command; --config FILE stands before it.

From the user database, through Dovecot's extra fields:
  nftwl_trust=no      never trust this user's addresses
  nftwl_timeout=7d    trust them for this time

Exit status: COMMAND's; 127 if it is not found, 126 if it cannot be executed.`,
		DisableFlagParsing: true,
		// Whatever led here, stdout can be a client's, and is not for help.
		RunE: func(*cobra.Command, []string) error {
			return errors.New("login: only --config FILE can come before it")
		},
	}
}
