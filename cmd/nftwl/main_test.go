package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == seccompRun {
		fmt.Fprintln(os.Stderr, "seccomp-run:", runSeccomp(os.Args[2:]))
		os.Exit(1)
	}
	nstest.Main(m)
}

// The scripts run the real binary, each in a network namespace of its own,
// with nft to prepare the ruleset and to say what the kernel then holds.
func TestScripts(t *testing.T) {
	nstest.Need(t, "nft", "nftables")
	root := nstest.Root(t)
	bin := filepath.Dir(nstest.Build(t, "cmd/nftwl"))
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join(root, "testdata", "scripts"),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"post-login": postLogin},
		Setup: func(env *testscript.Env) error {
			// testscript runs a script's commands on the goroutine that
			// calls Setup.
			nstest.New(t)
			env.Setenv("PATH", bin+":/usr/sbin:/usr/bin:/sbin:/bin")
			env.Setenv("CONTRIB", filepath.Join(root, "contrib"))
			return nil
		},
	})
}

// postLogin asks the server on a socket as Dovecot does, with the line of a
// login, in which \t, \n and \x01 are replaced. The answer is in the file
// "answer". It waits for the server to listen.
func postLogin(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: post-login SOCKET LINE")
	}
	line, err := strconv.Unquote(`"` + args[1] + `"`)
	ts.Check(err)
	var conn net.Conn
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if conn, err = net.Dial("unix", ts.MkAbs(args[0])); err == nil || time.Now().After(end) {
			break
		}
	}
	ts.Check(err)
	defer conn.Close()
	_, err = io.WriteString(conn, "VERSION\tscript-login\t1\t0\n"+line)
	ts.Check(err)
	answer, err := bufio.NewReader(conn).ReadBytes('\n')
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs("answer"), answer, 0o644))
}
