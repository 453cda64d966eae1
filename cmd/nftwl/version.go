package main

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Long:  "Prints the version or the commit that nftwl was built from, and Go's version.",
		RunE:  func(*cobra.Command, []string) error { return printVersion() },
	}
}

func printVersion() error {
	_, err := fmt.Println("nftwl", version())
	return failed(err)
}

// release is the version that contrib/packaging/build.sh sets; empty without it.
var release string

func version() string {
	built := "(devel)"
	if info, ok := debug.ReadBuildInfo(); ok {
		built = cmp.Or(info.Main.Version, built) // a tag, or the commit
	}
	return cmp.Or(release, built) + " " + runtime.Version()
}
