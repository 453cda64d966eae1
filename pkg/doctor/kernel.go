package doctor

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
)

func (d *Doctor) checkKernel(context.Context) {
	const check = "kernel"
	var uts unix.Utsname
	_ = unix.Uname(&uts) // fails only for a bad address
	release := unix.ByteSliceToString(uts.Release[:])
	conn, err := nftset.Dial()
	if err == nil {
		conn.SetTimeout(patience)
		_, err = conn.Generation()
	}
	switch {
	case err == nil:
		d.conn = conn
		d.ok(check, "Linux %s has nf_tables, which this process may read", release)
		return
	case errors.Is(err, nftset.ErrPermission):
		d.fail(check, remedy{"run it as root; most of what follows needs that", "sudo nftwl doctor"},
			"no permission to read the sets and rules (CAP_NET_ADMIN is missing)")
	default:
		d.fail(check, remedy{"load the module, or take a kernel that has it", "modprobe nf_tables"}, "Linux %s: nftables: %v", release, err)
	}
	if conn != nil {
		conn.Close()
	}
}
