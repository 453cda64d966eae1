package fail2ban

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"nftwl/pkg/nstest"
)

// BenchmarkRestart measures how many seconds a restart of fail2ban with a thousand bans
// takes: the stop, the start until all bans are restored while the kernel still has
// them, and the same after the kernel has lost them.
func BenchmarkRestart(b *testing.B) {
	const count = 1000
	for _, system := range []nstest.Debian{nstest.Host, {Release: "trixie", Root: nstest.Trixie(b)}} {
		for _, jail := range []struct{ name, text string }{
			{"shipped", ""},
			{"norestored", "action = nftwl[norestored=1, port=\"%(port)s\"]\n"},
			{"no-ignorecommand", "ignorecommand =\n"},
		} {
			b.Run(system.Release+"/"+jail.name, func(b *testing.B) {
				m := boot(b, system, with{jails: "[dovecot]\n" + jail.text})
				args := []string{"set", "dovecot", "banip"}
				for i := range count {
					args = append(args, fmt.Sprintf("198.51.%d.%d", i/250, i%250+1))
				}
				m.run("fail2ban-client", args...)
				all := func() bool { return len(m.bans()) == count }
				nstest.Poll(m, "the bans", all)

				measure := func(name string, f func()) {
					start := time.Now()
					f()
					b.ReportMetric(time.Since(start).Seconds(), name)
				}
				restored := func(n int) {
					nstest.Poll(m, "fail2ban to restore its bans", func() bool { return strings.Count(m.logged(), "] Restore Ban ") == n })
				}
				b.ReportMetric(0, "ns/op")
				measure("stop", m.stop)
				measure("kept", func() {
					m.start()
					restored(count)
				})
				if jail.name == "norestored" {
					return
				}
				m.stop()
				m.run("nftwl", "flush", "banned")
				measure("lost", func() {
					m.start()
					restored(2 * count)
					nstest.Poll(m, "the bans", all)
				})
			})
		}
	}
}
