package main

import (
	"errors"

	"github.com/spf13/cobra"

	"nftwl/pkg/cluster"
	"nftwl/pkg/config"
)

// newClear is the part of 'nftwl flush --everywhere' that nftwl cannot do: it links
// no client of the engine.
func newClear(configPath *string) *cobra.Command {
	return &cobra.Command{
		Use:       "clear trusted|banned",
		Short:     "Empty a list on all machines that share it",
		Hidden:    true,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"trusted", "banned"},
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := config.Load(*configPath)
			if err == nil && c.Cluster == nil {
				err = errors.New("the configuration has no cluster")
			}
			if err != nil {
				return failure{err, ""}
			}
			password, err := readPassword(c.Cluster)
			if err != nil {
				return err
			}
			if err := cluster.Clear(c.Cluster, password, args[0]); err != nil {
				return failure{err, ""}
			}
			return nil
		},
	}
}
