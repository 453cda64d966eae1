package install

import (
	"errors"
	"fmt"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// Remedy is what to do about an error of the kernel's or a Problem, or "".
func Remedy(err error) string {
	var problem *Problem
	if errors.As(err, &problem) {
		return problem.Remedy
	}
	var e *nftset.Error
	if !errors.As(err, &e) {
		return ""
	}
	switch e.Err {
	case nftset.ErrNoTable, nftset.ErrNoSet:
		return "load the set definitions (" + LoadSets(e.Table) + "), or name the right table and sets in " + config.Path
	case nftset.ErrUnfit:
		return "define it as: type ipv4_addr . inet_service (or ipv6_addr); flags dynamic,timeout"
	case nftset.ErrFull:
		return fmt.Sprintf("give set %s a larger size in the ruleset, or a shorter timeout", e.Set)
	case nftset.ErrPermission:
		return "run it as root, or with CAP_NET_ADMIN"
	case nftset.ErrBusy:
		return "run it again"
	}
	return ""
}
