package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"nftwl/pkg/snapshot"
)

func newSave(configPath *string) *cobra.Command {
	return &cobra.Command{
		Use:   "save [FILE]",
		Short: "Save the trusted and banned sets to a file",
		Long: `Writes the four sets to FILE, or to the snapshot file of the configuration; "-"
is standard output. The file is replaced as a whole or not at all, and the one
before is kept as FILE.old. nft -f loads it as well as 'nftwl restore' does.

Exit status: 0, or 1 when a set cannot be read or the file cannot be written;
the file that was there stays then.`,
		Example: "  nftwl save\n  nftwl save /root/sets.nft",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			s, err := open(*configPath)
			if err != nil {
				return err
			}
			defer s.conn.Close()
			sets, err := s.sets(s.Sets()...)
			if err != nil {
				return err
			}
			path := s.Snapshot
			if len(args) == 1 {
				path = args[0]
			}
			if path == "-" {
				return failed(snapshot.Write(os.Stdout, s.conn, sets))
			}
			err = snapshot.Save(path, s.conn, sets)
			if errors.Is(err, fs.ErrNotExist) {
				printError(err)
				printHint("make the folder (install -d -m 700 " + filepath.Dir(path) + "), or name another file")
				return &status{exitFailed, nil}
			}
			return failed(err)
		},
	}
}

func newRestore(configPath *string) *cobra.Command {
	var verbose bool
	cmd := &cobra.Command{
		Use:   "restore [FILE…]",
		Short: "Merge saved sets into the kernel",
		Long: `Merges snapshots, or files that 'nft list set' or 'nft list ruleset' printed,
into the kernel: all of them, or nothing where one has an error. A table or set
that is missing is created as the file defines it. What the kernel holds already
is never shortened.

Without FILE it restores the snapshot file of the configuration, and does
nothing where that does not exist yet. "-" is standard input.

Exit status: 0, or 1 when something failed; nothing is changed then.`,
		Example: "  nftwl restore -v\n  nft list ruleset | ssh mail2.example.org nftwl restore -",
		RunE: func(_ *cobra.Command, args []string) error {
			s, err := open(*configPath)
			if err != nil {
				return err
			}
			defer s.conn.Close()
			paths := args
			if len(paths) == 0 {
				paths = []string{s.Snapshot}
				err := snapshot.CheckOwner(s.Snapshot)
				if errors.Is(err, fs.ErrNotExist) {
					if verbose {
						fmt.Printf("no snapshot yet: %s\n", s.Snapshot)
					}
					return nil
				}
				if err != nil {
					return failed(fmt.Errorf("%w; 'nftwl restore %s' takes it as it is", err, s.Snapshot))
				}
			}
			var files []*snapshot.File
			for _, path := range paths {
				f, err := s.parse(path)
				if err != nil {
					return failed(err)
				}
				files = append(files, f)
			}
			r, err := snapshot.Restore(s.conn, files, time.Now())
			if err == nil && verbose {
				fmt.Printf("restored %d, expired %d, already there %d\n", r.Restored, r.Expired, r.There)
			}
			return failed(err)
		},
	}
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "print how many elements were restored")
	return cmd
}

// parse reads a file of sets, of which it takes the four configured ones.
func (s *session) parse(path string) (*snapshot.File, error) {
	name := path
	if path == "-" {
		name, path = "standard input", "/dev/stdin"
	}
	text, err := snapshot.Read(path)
	if err != nil {
		return nil, err
	}
	f, err := snapshot.ParseSets(text, s.Table, s.Sets())
	if f != nil {
		for _, what := range f.Passed {
			printNote("%s: %s: passed over", name, what)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return f, nil
}
