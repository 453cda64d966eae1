package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"nftwl/pkg/install"
	"nftwl/pkg/nftset"
	"nftwl/pkg/snapshot"
	"nftwl/pkg/trust"
)

func newSave(configPath *string) *cobra.Command {
	return &cobra.Command{
		Use:   "save [FILE]",
		Short: "Save the trusted and banned sets to a file",
		Long: `Writes the four sets to FILE, or to the snapshot file of the configuration; "-"
is standard output. FILE is replaced as a whole or not at all, and the previous
one is kept as FILE.old. 'nft -f' can load it, too.

If the ruleset was loaded again since FILE was saved, save restores FILE first,
so that nothing is lost.

Exit status: 0, or 1 if something failed; FILE is then left as it is.`,
		Example: "  nftwl save\n  nftwl save /root/sets.nft",
		// Local, as it can restore first.
		RunE: withSession(configPath, nftset.Local, func(s *session, args []string) error {
			path := s.Snapshot
			if len(args) == 1 {
				path = args[0]
			}
			if path == "-" {
				return snapshot.Write(os.Stdout, s.conn, s.saved())
			}
			r, err := snapshot.Save(path, s.conn, s.saved())
			dir := filepath.Dir(path)
			if _, missing := os.Stat(dir); err != nil && errors.Is(missing, fs.ErrNotExist) {
				err = &install.Problem{Text: err.Error(), Remedy: "make the directory (install -d -m 700 " + dir + "), or name another file"}
			}
			if r.First != nil {
				printNote("table %s was loaded again since %s was saved: restored it first (%s)", s.Table, path, r.First)
				printRefused(path, r.First.Refused)
			}
			if r.NotKept != nil {
				printNote("the previous snapshot could not be kept as %s.old: %v", path, r.NotKept)
			}
			return err
		}),
	}
}

// saved are the sets that the configuration names.
func (s *session) saved() snapshot.Sets {
	return snapshot.Sets{Table: s.Table, Names: s.Sets(), Refuse: func(addr netip.Addr) error { return trust.Refuse(s.Config, addr) }}
}

// printRefused tells what of a file was not restored.
func printRefused(file string, refused []error) {
	const most = 3
	for i, err := range refused {
		if i == most {
			printNote("%s: %d more like these", file, len(refused)-most)
			return
		}
		printNote("%s: not restored: %v", file, err)
	}
}

func newRestore(configPath *string) *cobra.Command {
	var verbose bool
	cmd := &cobra.Command{
		Use:   "restore [FILE…]",
		Short: "Merge saved sets into the kernel",
		Long: `Merges files into the kernel: all of them, or none if one has an error. A file
is a snapshot, or what 'nft list set' or 'nft list ruleset' printed, of which
restore takes the four sets alone. It creates a table or set that is missing as
the file defines it, and never shortens what the kernel holds.

Without FILE it restores the snapshot file of the configuration, and does
nothing if that does not exist yet. "-" is standard input.

Exit status: 0, or 1 if something failed; nothing is changed then. But a part
can be restored if logins keep adding the same elements, and of more than 10,000
elements while nftwld shares the sets.`,
		Example: "  nftwl restore -v\n  nft list ruleset | ssh mail2.example.org nftwl restore -",
		RunE: withSession(configPath, nftset.Local, func(s *session, args []string) (err error) {
			var r snapshot.Result
			switch {
			case len(args) == 0:
				r, err = s.restoreSnapshot(false)
			case len(args) == 1 && args[0] == s.Snapshot:
				r, err = s.restoreSnapshot(true)
			default:
				r, err = s.restore(args)
			}
			switch {
			case len(args) == 0 && errors.Is(err, fs.ErrNotExist):
				if verbose {
					fmt.Printf("no snapshot yet: %s\n", s.Snapshot)
				}
				return nil
			case err == nil && verbose:
				_, err = fmt.Println(r)
			}
			return err
		}),
	}
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "print how many elements were restored")
	return cmd
}

// restoreSnapshot restores the snapshot of the configuration.
func (s *session) restoreSnapshot(anyone bool) (snapshot.Result, error) {
	r, err := snapshot.RestoreSnapshot(s.Snapshot, s.conn, s.saved(), anyone)
	printRefused(s.Snapshot, r.Refused)
	if r.NotNoted != nil {
		printNote("the next save will restore %s once more, because it cannot be written now: %v", s.Snapshot, r.NotNoted)
	}
	return r.Result, err
}

// restore restores any files.
func (s *session) restore(paths []string) (snapshot.Result, error) {
	var files []*snapshot.File
	for _, path := range paths {
		f, err := s.parse(path)
		if err != nil {
			return snapshot.Result{}, err
		}
		files = append(files, f)
	}
	// From now on, because a file may have taken long to arrive.
	s.conn.SetTimeout(patience)
	return snapshot.Restore(s.conn, files)
}

// parse reads a file, and prints what of it will not be restored.
func (s *session) parse(path string) (*snapshot.File, error) {
	name := path
	if path == "-" {
		name = "standard input"
	}
	text, err := snapshot.Read(path)
	if err != nil {
		return nil, err
	}
	f, err := snapshot.ParseSets(text, s.saved())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	printRefused(name, f.Refused)
	return f, nil
}
