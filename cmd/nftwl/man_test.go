package main

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"nftwl/pkg/config"
	"nftwl/pkg/manpage"
	"nftwl/pkg/nstest"
)

//go:generate env UPDATE_DOCS=1 go test -count=1 -run TestManCommands|TestFaults|TestSetupWording|TestTroubleshootingWhy .

// nftwl(8) has the help of the commands, in a frame.
func TestManCommands(t *testing.T) {
	root := newRoot()
	about, exit, ok := strings.Cut(root.Long, "\n\nExit status: ")
	if !ok {
		t.Fatal("the help of nftwl has no exit status")
	}
	var commands strings.Builder
	for _, cmd := range root.Commands() {
		if name := cmd.Name(); name != "help" && name != "completion" { // cobra's
			manpage.Command(&commands, cmd)
		}
	}
	want := strings.NewReplacer("@about@\n", manpage.Text(about), "@exit@\n", manpage.Text(exit), "@commands@\n", commands.String()).Replace(manFrame)
	nstest.Golden(t, "contrib/man/nftwl.8", want)
}

const manFrame = `.\" Written by go generate ./cmd/nftwl
.TH NFTWL 8 "" nftwl "System Manager\(aqs Manual"
.SH NAME
nftwl \- trust the addresses of a mail server\(aqs users in nftables
.SH SYNOPSIS
.B nftwl
.RB [ \-\-config
.IR FILE ]
.I COMMAND
.RI [ ARGUMENT \[u2026]]
.SH DESCRIPTION
@about@
.PP
Trusted and banned addresses are in four sets, two for each family, in which the
firewall\(aqs rules look them up;
.BR nftwl.yaml (5)
names the sets.
nftwl changes nothing else in nftables, and no rules.
Only
.B restore
makes a set that is missing.
.SH OPTIONS
.TP
.BI \-\-config\~ FILE
Read
.I FILE
in place of
.IR /etc/nftwl.yaml ;
it must exist.
For
.B login
it stands before that word.
.TP
.BR \-h ,\~ \-\-help
Show what a command does; after
.BR login ,
it is an argument of the command that is executed.
.TP
.BR \-v ,\~ \-\-version
Print the version.
.SH COMMANDS
@commands@
.SS nftwl completion bash|fish|powershell|zsh
Prints the script that has a shell complete commands, flags, ports, and the
addresses that are on the lists now.
.B nftwl completion bash \-\-help
tells where to put it.
.SH NOTES
No login renews trust on ports that are not configured.
It ends, as bans there do, with the same
.BR \-\-port .
.PP
With
.I ipv6_prefix: 64
every IPv6 address stands for its whole /64, in bans too.
An IPv6 element that the rules take for a network is listed as one.
An address is banned if its /64 is;
.B unban
of the address leaves that ban alone, and prints the command that ends it.
.PP
.B restore
has
.BR nft (8)
itself read what is no snapshot, in a network namespace of its own, which only
root can make.
.PP
What
.B setup
prints names
.I /usr/bin/nftwl
and means
.IR /etc/nftwl.yaml ;
for others, edit it.
.SH EXIT STATUS
@exit@
.PP
.B login
and
.B check
have their own, see above.
An error is a line on standard error that begins with
.BR "nftwl: error:" .
A line that begins with
.B nftwl: hint:
says what to do about it.
.SH ENVIRONMENT
.B nftwl login
reads these, which Dovecot sets for a post\-login script:
.TP
.B IP
The client\(aqs address.
.TP
.B LOCAL_IP
The address that the client has connected to, which is never trusted.
.TP
.B USER
The user\(aqs name, which becomes the comment of the elements.
.TP
.B NFTWL_TRUST
.B no
if this user\(aqs addresses are never trusted; from the extra field
.I nftwl_trust
of the user database.
.TP
.B NFTWL_TIMEOUT
How long to trust this user\(aqs addresses; from the extra field
.IR nftwl_timeout .
.TP
.B PATH
Where to look for
.I COMMAND
if it has no slash. Dovecot sets none.
.PP
The others read:
.TP
.B NO_COLOR
If it is not empty, there is no colour.
.TP
.B TERM
If it is empty or
.BR dumb ,
there is no colour either.
.SH FILES
.TP
.I /etc/nftwl.yaml
The configuration, see
.BR nftwl.yaml (5).
.TP
.I /var/lib/nftwl/sets.nft
The snapshot that
.B save
writes and
.B restore
reads, and
.IR sets.nft.old ,
the one before.
.SH SEE ALSO
.BR nftwld (8),
.BR nftwl.yaml (5),
.BR nft (8),
.BR doveconf (1),
.BR systemctl (1),
.BR fail2ban (1)
`

// nftwl.yaml(5) has every key of the configuration. Its defaults are those of its example,
// and those of the program.
func TestManConfig(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(nstest.Root(t), "contrib/man/nftwl.yaml.5"))
	if err != nil {
		t.Fatal(err)
	}
	examples := regexp.MustCompile(`(?s)\n\.EX\n(.*?)\.EE\n`).FindAllStringSubmatch(string(page), -1)
	if len(examples) < 2 {
		t.Fatalf("%d examples", len(examples))
	}
	c, err := config.Parse([]byte(examples[0][1]))
	if err != nil || !reflect.DeepEqual(c, config.Default()) {
		t.Errorf("the defaults: %+v, %v", c, err)
	}
	for _, e := range examples {
		if _, err := config.Parse([]byte(e[1])); err != nil {
			t.Errorf("%v in\n%s", err, e[1])
		}
	}

	_, err = config.Parse([]byte("x: 1"))
	_, keys, ok := strings.Cut(fmt.Sprint(err), "the keys are ")
	if !ok {
		t.Fatalf("no list of keys in %v", err)
	}
	var want, got []string
	for _, key := range strings.Split(strings.Replace(keys, " and ", ", ", 1), ", ") {
		value := "none"
		if _, after, ok := strings.Cut("\n"+examples[0][1], "\n"+key+": "); ok {
			value, _, _ = strings.Cut(after, "\n")
		}
		want = append(want, key+": "+value)
	}
	for _, m := range regexp.MustCompile(`(?m)^\.TP\n\.B (\w+)\nDefault: (.*)\.$`).FindAllStringSubmatch(string(page), -1) {
		got = append(got, m[1]+": "+m[2])
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the entries and their defaults are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// man shows the pages without warnings, and finds them by their subject.
func TestManPages(t *testing.T) {
	root := nstest.Root(t)
	manpage.Check(t, filepath.Join(root, "contrib/man/nftwl.8"), "nftwl - trust the addresses of a mail server's users in nftables",
		"nftwl [--config FILE] COMMAND [ARGUMENT…]", "nftwl login COMMAND [ARG…]", "nftwl_timeout=7d    trust them",
		"--timeout TIMEOUT", "-q, --quiet", "nftwl check -q --banned 198.51.100.66 && echo banned")
	manpage.Check(t, filepath.Join(root, "contrib/man/nftwl.yaml.5"), "nftwl.yaml - configuration of nftwl",
		`Default: [127.0.0.0/8, "::1/128", "fe80::/10"].`, "ipv6_prefix: 64")
}
