package cluster

import (
	"testing"

	"nftwl/pkg/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }
