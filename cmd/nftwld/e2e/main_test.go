// Package e2e runs nftwld with real Dovecots and Postfixes. Only the users are
// faked: the servers, the kernel and every file in contrib/ are the real ones,
// inside namespaces.
package e2e

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
