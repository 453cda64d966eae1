// Package fail2ban runs nftwl under a real fail2ban, inside namespaces. The servers, the
// kernel, its packets and every file in contrib/ are the real ones. Only the lines of
// the logs come from the tests.
package fail2ban

import (
	"testing"

	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) {
	// These tests wait more than they work: fail2ban looks at its logs and at the clock
	// only a few times in two seconds.
	nstest.Parallel(8)
	nstest.Main(m)
}
