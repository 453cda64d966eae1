package main

import "github.com/spf13/cobra"

func newFlush(configPath *string) *cobra.Command {
	return &cobra.Command{
		Use:   "flush trusted|banned",
		Short: "Empty the trusted or the banned sets",
		Long: `Removes every element from the two sets of a list, permanent ones and those of
other tools too. The sets stay.

Exit status: 0, or 1 if a set is missing or cannot be written; then nothing is
changed.`,
		Example: `  nftwl save - >before.nft && nftwl flush banned`,
		RunE: withSession(configPath, func(s *session, args []string) error {
			batch := s.conn.Batch()
			for _, name := range list(args[0]).sets(s.Config).Both() {
				set, err := s.conn.Set(s.Table, name)
				if err != nil {
					return err
				}
				batch.Flush(set)
			}
			return batch.Commit()
		}),
	}
}
