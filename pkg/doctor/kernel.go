package doctor

import (
	"context"
	"errors"

	"nftwl/pkg/nftset"
)

func (d *Doctor) checkKernel(context.Context) {
	const check = "kernel"
	conn, err := nftset.Dial()
	if err == nil {
		conn.SetTimeout(patience)
		if _, err = conn.Generation(); err != nil {
			conn.Close()
		}
	}
	switch {
	case err == nil:
		d.conn = conn
		d.ok(check, "this process can read nftables")
	case errors.Is(err, nftset.ErrPermission):
		d.fail(check, remedy{"run it as root; most of what follows needs that", "sudo nftwl doctor"},
			"no permission to read the sets and rules (CAP_NET_ADMIN is missing)")
	default:
		d.fail(check, remedy{"load the module, or take a kernel that has it", "modprobe nf_tables"}, "nftables: %v", err)
	}
}
