package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"nftwl/pkg/nftset"
)

func newFlush(configPath *string) *cobra.Command {
	var everywhere bool
	cmd := &cobra.Command{
		Use:   "flush trusted|banned",
		Short: "Empty the trusted or the banned sets",
		Long: `Removes every element from the two sets of a list, permanent ones and those of
other tools too. The sets stay. If other machines share the list, they fill it
again; --everywhere empties it on all of them.

Exit status: 0, or 1 if a set is missing or cannot be written; then nothing is
changed. But of large sets, a part can be gone while nftwld shares them.`,
		Example: `  nftwl save - >before.nft && nftwl flush banned`,
	}
	// Other machines take what is flushed here for lost, not for removed.
	cmd.RunE = withSession(configPath, nftset.Local, func(s *session, args []string) error {
		var sets []*nftset.Set
		for _, name := range list(args[0]).sets(s.Config).Both() {
			set, err := s.conn.Set(s.Table, name)
			if err == nil {
				err = set.Writable()
			}
			if err != nil {
				return err
			}
			sets = append(sets, set)
		}
		if everywhere {
			if err := clearCluster(*configPath, args[0]); err != nil {
				return err
			}
		} else if c := s.Cluster; c != nil && slices.Contains(c.Take, args[0]) {
			printNote("other machines share this list and will fill it again; use --everywhere to empty it on all of them")
		}
		return s.flush(sets)
	})
	cmd.Flags().BoolVar(&everywhere, "everywhere", false, "on all machines that share the list")
	return cmd
}

// flush empties sets: in one transaction or, while a program listens to changes,
// large sets in several.
func (s *session) flush(sets []*nftset.Set) error {
	if room := nftset.Room(); room < math.MaxInt {
		for _, set := range sets {
			elems, err := s.conn.Elements(set)
			if err != nil {
				return err
			}
			for len(elems) > room {
				var keys []nftset.Key
				for _, e := range elems[:atOnce] {
					keys = append(keys, e.Key)
				}
				s.conn.SetTimeout(patience)
				if _, err := s.conn.Remove(set, keys, nil); err != nil {
					return err
				}
				elems = elems[atOnce:]
			}
		}
	}
	batch := s.conn.Batch()
	for _, set := range sets {
		batch.Flush(set)
	}
	return batch.Commit()
}

// clearCluster empties a list on all machines that share it. nftwld does it, which
// has a client for their server.
func clearCluster(configPath, name string) error {
	program := "nftwld"
	if own, err := os.Executable(); err == nil {
		if beside, err := exec.LookPath(filepath.Join(filepath.Dir(own), program)); err == nil {
			program = beside
		}
	}
	args := []string{"clear", name}
	if configPath != "" {
		args = append(args, "--config", configPath)
	}
	cmd := exec.Command(program, args...)
	cmd.Stderr = os.Stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("%s is not emptied everywhere, and nothing was changed here", name) // nftwld has said why
	}
	return err
}
