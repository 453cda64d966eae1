package main

import (
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

// release is the version that contrib/packaging/build.sh sets; empty without it.
var release string

func printVersion() error {
	version := "(devel)"
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		version = info.Main.Version // a tag, or the commit
	}
	if release != "" {
		version = release
	}
	_, err := fmt.Println("nftwl", version, runtime.Version())
	return failed(err)
}
