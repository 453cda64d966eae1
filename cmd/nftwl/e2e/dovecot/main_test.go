// Package dovecot runs nftwl under a real Dovecot. Only the users are faked: the
// server, the kernel and every file in contrib/ are the real ones, inside namespaces.
package dovecot

import (
	"testing"

	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) {
	// Dovecot 2.3 sleeps for a second when it stops, so more tests than there are
	// processors can run at once.
	nstest.Parallel(4)
	nstest.Main(m)
}
