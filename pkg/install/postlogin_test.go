package install

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestLoginArgs(t *testing.T) {
	for _, c := range []struct{ line, config, command string }{
		{"login", "", ""},
		{"login script-login", "", "script-login"},
		{"  login  script-login", "", "script-login"},
		{"--config f login x --config g login", "f", "x --config g login"},
		{"--config=f login x", "f", "x"},
		{"--config=f --config=g login x", "g", "x"},
		{"--config  f login x", "f", "x"},
		{" --config   f  login  x  y", "f", "x  y"},
		{"--config=  login x", "", "x"},
		{"--config  login x", "", "x"}, // a script's --config "$EMPTY"
		{"--config login login x", "login", "x"},
		{"login -h", "", "-h"},
		{"login login", "", "login"},
	} {
		config, command, ok := LoginArgs(strings.Split(c.line, " "))
		if got := strings.Join(command, " "); config != c.config || got != c.command || !ok {
			t.Errorf("%q: %q, %q, %v", c.line, config, got, ok)
		}
	}
	for _, line := range []string{"", " ", "--config", "--config f", "--config login", "--config=login", "-h login", "list login", "--config f list login", "--configs f login"} {
		if _, _, ok := LoginArgs(strings.Split(line, " ")); ok {
			t.Errorf("%q is a login", line)
		}
	}
}

func TestParsePostLogin(t *testing.T) {
	for _, c := range []struct {
		executable string
		want       PostLogin
	}{
		{"script-login /usr/bin/nftwl login", PostLogin{Nftwl: "/usr/bin/nftwl"}},
		{"/usr/lib/dovecot/script-login nftwl login x  y", PostLogin{Nftwl: "nftwl", Command: []string{"x", "", "y"}}},
		{"script-login /usr/bin/nftwl --config  /etc/x.yaml login", PostLogin{Nftwl: "/usr/bin/nftwl", Config: "/etc/x.yaml"}},
		{"script-login /hop  /usr/bin/nftwl login /y", PostLogin{Command: []string{"/hop", "", "/usr/bin/nftwl", "login", "/y"}}},
		{"script-login -d /x.sh -d y", PostLogin{MailUser: true, Command: []string{"/x.sh", "-d", "y"}}},
		{"script-login -d -- rawlog -t", PostLogin{MailUser: true, Command: []string{"rawlog", "-t"}}},
		{"script-login - x", PostLogin{Command: []string{"-", "x"}}},
		{"script-login login", PostLogin{Command: []string{"login"}}},
		{"script-login /nftwl.sh  x", PostLogin{Command: []string{"/nftwl.sh", "", "x"}}},
	} {
		p, err := ParsePostLogin(c.executable)
		if err != nil {
			t.Errorf("%s: %v", c.executable, err)
			continue
		}
		if p.MailUser != c.want.MailUser || p.Nftwl != c.want.Nftwl || p.Config != c.want.Config ||
			!slices.Equal(p.Command, c.want.Command) {
			t.Errorf("%s: %+v", c.executable, *p)
		}
	}
	for executable, empty := range map[string]bool{
		"": false, "imap": false, "/usr/bin/nftwl login": false, "script-login": false, "script-login -d": false, "script-login --": false,
		"script-login -x /x.sh": false, "script-login --help": false, "script-login /usr/bin/nftwl": false,
		"script-login nftwl list": false, "script-login /usr/bin/nftwl --config login": false,
		"script-login  /usr/bin/nftwl login": true, "script-login ": true, "script-login -d  /x.sh": true,
		" script-login x": false,
	} {
		if p, err := ParsePostLogin(executable); err == nil || errors.Is(err, ErrEmptyWord) != empty || errors.Is(err, ErrOption) {
			t.Errorf("%q: %+v, %v", executable, p, err)
		}
	}
	for _, options := range []string{"-o x=y", "-ox=y", "-c /x.conf", "-i x", "-k", "-O", "-L", "-d -k", "-dk"} {
		if p, err := ParsePostLogin("script-login " + options + " /usr/bin/nftwl login"); !errors.Is(err, ErrOption) {
			t.Errorf("%q: %+v, %v", options, p, err)
		}
	}
}

// A second space anywhere does not change whether a line is a login, and doctor and login
// agree on that.
func FuzzParsePostLogin(f *testing.F) {
	for _, line := range []string{"/usr/bin/nftwl login", "nftwl --config /etc/x.yaml login /x.sh y", "nftwl --config login login", "x nftwl --config=  login"} {
		f.Add(line, uint8(3))
	}
	f.Fuzz(func(t *testing.T, line string, at uint8) {
		words := strings.Split(line, " ")
		p, err := ParsePostLogin("script-login " + line)
		if err == nil && p.Nftwl != "" && !p.MailUser && words[0] == p.Nftwl {
			config, command, ok := LoginArgs(words[1:])
			if !ok || config != p.Config || !slices.Equal(command, p.Command) {
				t.Errorf("%q: %+v, and to login %q, %q, %v", line, *p, config, command, ok)
			}
		}
		_, command, ok := LoginArgs(words)
		if ok && (len(command) > len(words) || !slices.Equal(command, words[len(words)-len(command):]) || len(command) > 0 && command[0] == "") {
			t.Errorf("%q: the command is %q", line, command)
		}
		before := min(int(at), len(words)-len(command))
		if _, _, spaced := LoginArgs(slices.Insert(slices.Clone(words), before, "")); ok && !spaced {
			t.Errorf("%q with a second space before word %d is no login", line, before)
		}
	})
}
