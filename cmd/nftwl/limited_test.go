package main

import (
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// With the shipped rules and real packets: unban ends what their limit did to an address,
// also on a port that is not in the configuration. A ban of the address's network is
// reported.
func TestLimitedByTheRules(t *testing.T) {
	nstest.New(t)
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(nstest.Root(t), "contrib/nftables"), filepath.Join(dir, "nftwl")); err != nil {
		t.Fatal(err)
	}
	load := exec.Command(nstest.Need(t, "nft", "nftables"), "-I", dir, "-f", filepath.Join(dir, "nftwl/nftables.conf"))
	if out, err := load.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	config := filepath.Join(dir, "nftwl.yaml")
	if err := os.WriteFile(config, []byte("ports: [993]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	internet := nstest.NewPeer(t, "198.51.100.0/24", "2001:db8:a::/48")
	nstest.Echo(t, 587)
	// answers reports whether a connection opens and stays open.
	answers := func(from netip.Addr, patience time.Duration) bool {
		server := nstest.ServerIPv4
		if from.Is6() {
			server = nstest.ServerIPv6
		}
		conn, err := internet.Dial(from, netip.AddrPortFrom(server, 587), patience)
		if err != nil {
			return false
		}
		t.Cleanup(func() { conn.Close() })
		b := []byte{'x'}
		if _, err := conn.Write(b); err != nil {
			return false
		}
		if err := conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
			t.Fatal(err)
		}
		_, err = io.ReadFull(conn, b)
		return err == nil
	}
	command := func(args ...string) (out, errs string, code int) {
		return output(t, nftwl(t, nil, append([]string{"--config", config}, args...)...))
	}

	const burst = 5
	for _, who := range []struct{ from, neighbour, listed string }{
		{"198.51.100.66", "198.51.100.66", "198.51.100.66"},
		{"2001:db8:a:1::66", "2001:db8:a:1:2:3:4:5", "2001:db8:a:1::/64"},
	} {
		from := netip.MustParseAddr(who.from)
		n := 0
		for n < 2*burst && answers(from, limit) {
			n++
		}
		if n < burst || n == 2*burst {
			t.Fatalf("%s opens %d connections, and the limit is %d", from, n, burst)
		}
		if answers(from, time.Second) {
			t.Errorf("%s is not limited", from)
		}
		if out, _, code := command("list", "limited"); code != 0 || !strings.Contains(out, "\nlimited  "+who.listed+"  587 ") {
			t.Errorf("%s is listed as\n%s", from, out)
		}
		if out, _, code := command("check", "--banned", "--port", "587", who.from); code != 1 {
			t.Errorf("the limit counts as a ban: exit %d, %s", code, out)
		}
		if out, errs, code := command("unban", who.neighbour); code != 0 {
			t.Errorf("unban: exit %d, %s%s", code, out, errs)
		}
		// The count is reset too.
		for i := range burst {
			if !answers(from, limit) {
				t.Fatalf("unbanned, %s opens %d connections, want %d", from, i, burst)
			}
		}
	}

	in := netip.MustParseAddr("2001:db8:a:2::66")
	if out, _, code := command("check", "--banned", "--port", "587", in.String()); code != 1 || !answers(in, limit) {
		t.Errorf("exit %d, %s", code, out)
	}
	command("ban", "--port", "587", "2001:db8:a:2::/64")
	if out, _, code := command("check", "--banned", "--port", "587", in.String()); code != 0 || answers(in, time.Second) {
		t.Errorf("exit %d, %s", code, out)
	}
}
