// Package dovecot runs nftwl under a real Dovecot. Nothing in it is
// faked but the people: the server, the kernel and every file in contrib/
// are the real ones, inside namespaces.
package dovecot

import (
	"testing"

	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) {
	// A Dovecot 2.3 sleeps for a second when it is stopped: more of them than
	// there are processors can take turns.
	nstest.Parallel(4)
	nstest.Main(m)
}
