// Package fail2ban runs nftwl under a real fail2ban: the servers, the kernel,
// its packets and every file in contrib/ are the real ones, inside namespaces.
// Only the lines of the logs are written by the tests.
package fail2ban

import (
	"testing"

	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) {
	// These tests wait rather than work: fail2ban looks at its logs, and at its
	// clock, a few times in two seconds.
	nstest.Parallel(8)
	nstest.Main(m)
}
