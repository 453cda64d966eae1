package install

import (
	"errors"
	"fmt"
	"io/fs"

	"nftwl/pkg/config"
	"nftwl/pkg/firewall"
	"nftwl/pkg/nftset"
	"nftwl/pkg/snapshot"
)

// OpenNetwork is the command that lets nftwld.service reach the cluster's server.
const OpenNetwork = "install -D -m 644 -t " + unitDir + "/nftwld.service.d " + shareDir + "systemd/nftwld.service.d/cluster.conf" +
	" && systemctl daemon-reload && systemctl restart nftwld"

// Remedy is what to do about an error, or "".
func Remedy(err error) string {
	var problem *Problem
	var owner *snapshot.OwnerError
	var old *snapshot.NotRestoredError
	switch {
	case errors.As(err, &problem):
		return problem.Remedy
	case errors.As(err, &owner):
		return "see who wrote it; 'nftwl restore " + owner.Path + "' restores it anyway"
	case errors.Is(err, firewall.ErrPermission), errors.Is(err, fs.ErrPermission):
		return "run it as root"
	case errors.Is(err, firewall.ErrTUN):
		return "load the kernel's module: modprobe tun"
	}
	var e *nftset.Error
	hint := ""
	if errors.As(err, &e) {
		hint = kernelRemedy(e)
	}
	if hint == "" && errors.As(err, &old) {
		hint = "repair it, or move it away (mv " + old.Path + " " + old.Path + ".bad), and save again"
	}
	return hint
}

func kernelRemedy(e *nftset.Error) string {
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
