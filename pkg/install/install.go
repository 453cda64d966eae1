package install

import (
	"os"

	"nftwl/pkg/nftset"
)

// LoadSets is the command that makes a table's sets where they are missing: it
// loads what setup has put on this machine, or runs setup.
func LoadSets(table nftset.Table) string {
	file := map[string]string{"inet filter": "/etc/nftwl/sets.nft", "inet nftwl": "/etc/nftwl/standalone.nft"}[table.String()]
	if _, err := os.Stat(file); err != nil {
		return "nftwl setup nftables --write"
	}
	return "nft -f " + file
}
