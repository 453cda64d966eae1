package doctor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
)

func (d *Doctor) checkKernel(context.Context) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		d.fail("kernel", remedy{words: "run it on Linux"}, "uname: %v", err)
		return
	}
	release := unix.ByteSliceToString(uts.Release[:])
	conn, err := nftset.Dial()
	if err == nil {
		conn.SetDeadline(time.Now().Add(patience))
		_, err = conn.Generation()
	}
	if errors.Is(err, nftset.ErrPermission) {
		d.skip("kernel", "Linux %s", release)
		d.fail("kernel.privilege", remedy{"run it as root; most of what follows needs that", "sudo nftwl doctor"},
			"no permission to read the sets and rules (CAP_NET_ADMIN is missing)")
	} else if err != nil {
		d.fail("kernel", remedy{"load the module, or take a kernel that has it", "modprobe nf_tables"}, "Linux %s: nftables: %v", release, err)
	}
	if err != nil {
		if conn != nil {
			conn.Close()
		}
		return
	}
	d.conn = conn
	// Lifetimes of elements can be changed from 6.12 on (NFTA_SET_ELEM_TIMEOUT
	// and _EXPIRATION of an element that is there).
	if atLeast(release, 6, 12) {
		d.ok("kernel", "Linux %s has nf_tables, and renews a trust in place", release)
	} else {
		d.ok("kernel", "Linux %s has nf_tables, and renews a trust by adding it anew, as kernels before 6.12 do", release)
	}
	d.ok("kernel.privilege", "the kernel lets this process read nftables")
}

// atLeast compares a release such as "6.1.0-44-amd64" with a version.
func atLeast(release string, major, minor int) bool {
	var x, y int
	if _, err := fmt.Sscanf(release, "%d.%d", &x, &y); err != nil {
		return false
	}
	return x > major || x == major && y >= minor
}
