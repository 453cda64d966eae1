package main

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

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

// The scripts run the real binary, each in its own network namespace. They use nft to
// prepare the ruleset and to read the sets.
func TestScripts(t *testing.T) {
	nstest.Need(t, "nft", "nftables")
	root := nstest.Root(t)
	bin := filepath.Dir(nstest.Build(t, "cmd/nftwl"))
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join(root, "testdata", "scripts"),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
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
