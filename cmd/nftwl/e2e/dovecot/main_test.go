// Package dovecot runs nftwl under a real Dovecot. Nothing in it is
// faked but the people: the server, the kernel and every file in contrib/
// are the real ones, inside namespaces.
package dovecot

import (
	"testing"

	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }
