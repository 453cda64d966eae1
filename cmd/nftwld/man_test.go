package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"nftwl/pkg/manpage"
	"nftwl/pkg/nstest"
)

//go:generate env UPDATE_DOCS=1 go test -count=1 -run TestManCommands .

// nftwld(8) has the help of the commands, in a frame.
func TestManCommands(t *testing.T) {
	t.Setenv("STATE_DIRECTORY", "") // the default of a flag
	root := newRoot()
	about, exit, ok := strings.Cut(root.Long, "\n\nExit status: ")
	if !ok {
		t.Fatal("the help of nftwld has no exit status")
	}
	// With the flags that all commands have.
	all := &cobra.Command{}
	all.Flags().AddFlagSet(root.PersistentFlags())
	all.Flags().AddFlagSet(root.Flags())
	var commands strings.Builder
	for _, cmd := range root.Commands() {
		manpage.Command(&commands, cmd)
	}
	const page = "contrib/man/nftwld.8"
	nstest.Golden(t, page, strings.NewReplacer("@about@\n", manpage.Text(about), "@options@\n", manpage.Flags(all),
		"@exit@\n", manpage.Text(exit), "@commands@\n", commands.String()).Replace(manFrame))
	manpage.Check(t, filepath.Join(nstest.Root(t), page), "nftwld - trust and ban a mail server's clients by Dovecot's reports",
		"nftwld [--config FILE] status [--json]", "--config FILE", "--state DIR", "-v, --verbose", "SIGHUP", "policy.key")
}

const manFrame = `.\" Written by go generate ./cmd/nftwld
.TH NFTWLD 8 "" nftwl "System Manager\(aqs Manual"
.SH NAME
nftwld \- trust and ban a mail server\(aqs clients by Dovecot\(aqs reports
.SH SYNOPSIS
.B nftwld
.RB [ \-\-config
.IR FILE ]
.RB [ \-\-state
.IR DIR ]
.RB [ \-\-verbose ]
.br
.B nftwld
.RB [ \-\-config
.IR FILE ]
.B status
.RB [ \-\-json ]
.SH DESCRIPTION
@about@
.PP
.B nftwl setup policy
installs what it needs: the key, the units, and Dovecot\(aqs settings.
No login waits for
.BR nftwld ,
and none fails if it does not run.
There is one exception, for a Dovecot behind a proxy with the PROXY protocol,
where the packet filter sees only the proxy.
If you set
.I auth_policy_check_before_auth
to yes in Dovecot\(aqs settings, Dovecot asks
.B nftwld
before each login whether the client is banned, and waits up to 2 seconds for
the answer.
Without an answer it lets the client in, unless
.I auth_policy_reject_on_fail
is set, too.
.SH OPTIONS
@options@
.SH COMMANDS
@commands@
.SH EXIT STATUS
@exit@
.SH SIGNALS
.TP
.B SIGHUP
Read the configuration and the key again.
A change of
.I policy.listen
or
.IR cluster ,
except for
.I send
and
.IR take ,
needs a restart.
.TP
.BR SIGTERM ,\~ SIGINT
Write everything that was reported, save the failures, and exit.
.SH ENVIRONMENT
systemd sets these:
.TP
.B CREDENTIALS_DIRECTORY
The directory with the credentials
.I policy.key
and
.IR cluster.password ,
which are used instead of
.I policy.key_file
and
.IR cluster.password_file .
.TP
.B STATE_DIRECTORY
The default of
.BR \-\-state .
.TP
.B LISTEN_FDS
The sockets that
.B nftwld
inherits. It listens on them instead of on
.IR policy.listen .
.SH FILES
.TP
.I /etc/nftwl.yaml
The configuration; see
.BR nftwl.yaml (5).
.IR policy ,
.I failures
and
.I cluster
are for
.BR nftwld .
.TP
.I /etc/nftwl/policy.key
The key that each report must have: one word of at least 16 characters,
readable by root alone.
.TP
.I /etc/nftwl/cluster.password
The password for the cluster\(aqs server, readable by root alone.
.TP
.I /etc/dovecot/conf.d/91\-nftwl\-policy.conf.ext
Dovecot\(aqs settings, with the same key, readable by root alone.
.I 91\-nftwl\-policy.conf
includes them.
.TP
.I /var/lib/nftwld/failures
The failures, so that a restart keeps them.
.SH SEE ALSO
.BR nftwl (8),
.BR nftwl.yaml (5),
.BR doveconf (1),
.BR systemd.socket (5)
`
