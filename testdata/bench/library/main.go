// Command library trusts $IP and executes its arguments, as nftwl login does,
// but uses the library google/nftables. The benchmark compares nftwl's own netlink
// code with it.
package main

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/google/nftables"
)

func main() {
	if err := trust(os.Getenv("IP"), os.Getenv("USER")); err != nil {
		fmt.Fprintln(os.Stderr, "library:", err)
	}
	path, err := exec.LookPath(os.Args[1])
	if err == nil {
		err = syscall.Exec(path, os.Args[1:], os.Environ())
	}
	fmt.Fprintln(os.Stderr, "library:", err)
	os.Exit(127)
}

func trust(ip, user string) error {
	addr, err := netip.ParseAddr(ip)
	if err != nil {
		return err
	}
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return err
	}
	defer conn.CloseLasting()
	table := &nftables.Table{Name: "filter", Family: nftables.TableFamilyINet}
	set, err := conn.GetSetByName(table, "trusted_ipv4")
	if err != nil {
		return err
	}
	var add []nftables.SetElement
	for _, port := range []uint16{143, 993, 995, 465, 587} {
		key := append(addr.AsSlice(), byte(port>>8), byte(port), 0, 0)
		// An error means that the element is missing: add it.
		_, err := conn.FindSetElements(set, []nftables.SetElement{{Key: key}})
		if err != nil {
			add = append(add, nftables.SetElement{Key: key, Timeout: 24 * time.Hour, Comment: user})
		}
	}
	if err := conn.SetAddElements(set, add); err != nil {
		return err
	}
	return conn.Flush()
}
