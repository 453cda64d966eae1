package dovecot

import (
	"testing"

	"nftwl/pkg/nstest"
)

// What nftwl login does for a login, nftwl serve does, too.
func TestServeTrusts(t *testing.T) {
	t.Parallel()
	eachDovecot(t, func(t *testing.T, d dovecot) {
		s := d.start(t, with{serve: true})
		check := func(what, client string, err error) {
			t.Helper()
			if err != nil {
				t.Errorf("%s from %s: %v", what, client, err)
			}
			wantTrusted(t, client, "alice", day)
			nstest.Nft(t, "flush ruleset")
			loadSets(t)
		}
		loadSets(t)
		for _, name := range d.protocols {
			p := protocols[name]
			for _, client := range []string{client4, client6} {
				check(name, client, login(client, p.port, p.visit, "alice", password))
			}
		}
		check("imaps", client4, loginTLS(client4, "993", imap, "alice", password))
		check("pop3s", client6, loginTLS(client6, "995", pop3, "alice", password))
		s.wantLog()
	})
}
