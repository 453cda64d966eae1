package install

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// LoginArgs parses the arguments of `nftwl [--config FILE] login COMMAND…`; ok
// is false if they are not those of login. It skips empty arguments up to the
// command: Dovecot makes one of a second space in its configuration, and each
// of them would otherwise deny every login.
func LoginArgs(args []string) (config string, command []string, ok bool) {
	for args = skipEmpty(args); len(args) > 0; args = skipEmpty(args) {
		if args[0] == "login" {
			return config, skipEmpty(args[1:]), true
		}
		if file, ok := strings.CutPrefix(args[0], "--config="); ok {
			config, args = file, args[1:]
			continue
		}
		if args[0] != "--config" {
			break
		}
		rest := skipEmpty(args[1:])
		if len(rest) > 0 && (rest[0] != "login" || len(rest) == len(args)-1) {
			config, args = rest[0], rest[1:]
		} else {
			config, args = "", rest // --config "" login
		}
	}
	return "", nil, false
}

func skipEmpty(args []string) []string {
	for len(args) > 0 && args[0] == "" {
		args = args[1:]
	}
	return args
}

// A PostLogin is what Dovecot runs after a login: the setting executable of a
// post-login service.
type PostLogin struct {
	MailUser bool     // script-login -d: as the mail user, not as the service's
	Nftwl    string   // as it is written; "" if another program runs first
	Config   string   // of its --config; "" for the default
	Command  []string // what runs after nftwl, without Dovecot's own script-login; all of it without nftwl
}

// ErrEmptyWord reports a second space before the program.
var ErrEmptyWord = errors.New("two spaces in a row make an empty word, which is executed")

// ErrOption reports an option that ParsePostLogin does not know. Logins can work.
var ErrOption = errors.New("script-login has an option that nftwl does not know")

// ParsePostLogin parses it as Dovecot does. An error, except ErrOption, says why it
// denies every login.
func ParsePostLogin(executable string) (*PostLogin, error) {
	// process_exec() of Dovecot's src/master/main.c splits at each single space.
	words := strings.Split(executable, " ")
	if path.Base(words[0]) != "script-login" {
		return nil, errors.New("script-login does not run it")
	}
	p := new(PostLogin)
	words = words[1:]
	for len(words) > 0 && len(words[0]) > 1 && words[0][0] == '-' {
		option := words[0]
		words = words[1:]
		if option == "--" {
			break
		}
		// Nobody needs the others, which all of Dovecot's programs have:
		// master_service_getopt_string() of src/lib-master/master-service.c.
		if option != "-d" && strings.Contains("cdikoOL", option[1:2]) {
			return nil, fmt.Errorf("%w: %s", ErrOption, option)
		} else if option != "-d" {
			return nil, fmt.Errorf("script-login has no option %s", option)
		}
		p.MailUser = true
	}
	if len(words) == 0 {
		return nil, errors.New("script-login has no program to run")
	}
	if words[0] == "" {
		return nil, ErrEmptyWord
	}
	if path.Base(words[0]) != "nftwl" {
		p.Command = words
		return p, nil
	}
	p.Nftwl = words[0]
	var ok bool
	if p.Config, p.Command, ok = LoginArgs(words[1:]); !ok {
		return nil, fmt.Errorf("%s has no word login after it", p.Nftwl)
	}
	return p, nil
}
