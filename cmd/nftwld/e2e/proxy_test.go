package e2e

import "testing"

// A proxy that takes any password reports a success for each. Only where the
// administrator says that it looks at passwords does a login trust.
func TestProxy(t *testing.T) {
	t.Parallel()
	eachSystem(t, func(t *testing.T, d system) {
		for name, c := range map[string]struct {
			fields  string
			trusted bool
		}{
			"any password": {"nopassword=y", false},
			"verified":     {"password={PLAIN}secret nftwl_trust=yes", true},
		} {
			t.Run(name, func(t *testing.T) {
				passdb := "passdb {\n  driver = static\n  args = proxy=y host=127.0.0.1 port=1 proxy_timeout=1 " + c.fields + "\n}\n" + static23
				if !d.is23 {
					fields := "nopassword = y\n"
					if c.trusted {
						fields = "nftwl_trust = yes\n"
					}
					passdb = "passdb static {\n  password = secret\n  fields {\n    proxy = y\n    host = 127.0.0.1\n    port = 1\n    proxy_timeout = 1\n    " + fields + "  }\n}\n" + static24
					if !c.trusted {
						passdb = "passdb static {\n  fields {\n    proxy = y\n    host = 127.0.0.1\n    port = 1\n    proxy_timeout = 1\n    " + fields + "  }\n}\n" + static24
					}
				}
				s := d.start(t, with{passdb: passdb})
				if err := authenticate("192.0.2.7", "PLAIN", "alice", "secret"); err == nil {
					t.Error("there is no server behind the proxy, and the login succeeds")
				}
				s.reported(`protocol="imap",result="success"`, "1")
				if c.trusted {
					s.poll("the trust", func() bool { return s.in("trusted_ipv4", "192.0.2.7 ") })
				} else {
					s.poll("it to be ignored", func() bool { return s.metric(`nftwl_ignored_total{reason="unverified"}`) == "1" })
				}
			})
		}
	})
}
