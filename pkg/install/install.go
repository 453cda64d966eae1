package install

import "nftwl/pkg/nftset"

// SetsFile is where setup puts the definitions of a table's sets: "" for a
// table that the shipped files are not of.
func SetsFile(table nftset.Table) string {
	switch table.String() {
	case "inet filter":
		return "/etc/nftwl/sets.nft"
	case "inet nftwl":
		return "/etc/nftwl/standalone.nft"
	}
	return ""
}
