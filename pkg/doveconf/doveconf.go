// Package doveconf reads Dovecot's settings, as doveconf of 2.3 and 2.4 prints
// them.
package doveconf

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Settings is a section of what doveconf prints, or all of it.
type Settings struct {
	Name     string // "service imap"; empty for all of it
	Values   map[string]string
	Sections []*Settings
}

// A MailService asks a post-login service after a login.
type MailService struct{ Protocol, Service string } // Protocol as the setting "protocols" has it

// MailServices are all of them.
var MailServices = []MailService{
	{"imap", "imap"}, {"pop3", "pop3"}, {"submission", "submission"}, {"sieve", "managesieve"},
}

// Arguments are those with which doveconf prints the named settings and all
// services, with their defaults, which -n and -a leave out. -x expands what a value
// refers to.
func Arguments(names ...string) []string {
	return append([]string{"-x", "base_dir", "libexec_dir", "protocols", "default_vsz_limit", "default_process_limit", "service"}, names...)
}

// Parse reads what doveconf of Dovecot 2.3 or 2.4 prints. It ignores what it does
// not know.
func Parse(text string) *Settings {
	open := []*Settings{{Values: map[string]string{}}}
	for line := range strings.Lines(text) {
		line = strings.TrimLeft(strings.TrimSuffix(line, "\n"), " \t")
		s := open[len(open)-1]
		if key, value, ok := strings.Cut(line, " = "); ok {
			s.Values[key] = unquote(value)
		} else if name, ok := strings.CutSuffix(line, " {"); ok {
			kind, name, _ := strings.Cut(name, " ")
			inner := &Settings{strings.TrimSpace(kind + " " + unquote(name)), map[string]string{}, nil}
			s.Sections = append(s.Sections, inner)
			open = append(open, inner)
		} else if line == "}" && len(open) > 1 {
			open = open[:len(open)-1]
		}
	}
	return open[0]
}

// Dovecot escapes an apostrophe, which Go refuses in double quotes.
var apostrophes = strings.NewReplacer(`\\`, `\\`, `\'`, `'`)

// unquote reads a value that has spaces at an end or a # in it, which doveconf
// puts in quotes (str_escape() of Dovecot's src/lib/strescape.c).
func unquote(s string) string {
	if text, err := strconv.Unquote(apostrophes.Replace(s)); err == nil && s[0] == '"' {
		return text
	}
	return s
}

// Section returns a section by its name; an empty one if it is missing.
func (s *Settings) Section(name string) *Settings {
	for _, inner := range s.Sections {
		if inner.Name == name {
			return inner
		}
	}
	return &Settings{Name: name}
}

// Protocols returns those that Dovecot serves: a setting, or in 2.4 a section.
func (s *Settings) Protocols() map[string]bool {
	enabled := map[string]bool{}
	for _, name := range strings.Fields(s.Values["protocols"]) {
		enabled[name] = true
	}
	for name, value := range s.Section("protocols").Values {
		enabled[name] = value == "yes"
	}
	return enabled
}

// AuthPolicy is what Dovecot reports to an auth policy server, and what it asks
// it.
type AuthPolicy struct {
	URL        string // empty where there is no server
	Header     string // "NAME: VALUE", sent with each request
	Nonce      string // or a note that doveconf hides it
	Report     bool
	Check      bool // before or after the password is checked; the login waits
	Attributes map[string]string
}

// AuthPolicyNames are those to pass to Arguments for AuthPolicy: of 2.4, and of
// 2.3, whose doveconf ignores the first.
var AuthPolicyNames = []string{
	"auth_policy", "auth_policy_server_url", "auth_policy_server_api_header", "auth_policy_hash_nonce", "auth_policy_report_after_auth",
	"auth_policy_check_before_auth", "auth_policy_check_after_auth", "auth_policy_request_attributes",
}

// AuthPolicy returns the settings of the auth policy server.
func (s *Settings) AuthPolicy() *AuthPolicy {
	attributes := make(map[string]string)
	value := func(name string) string { return s.Values["auth_policy_"+name] }
	// 2.4 prints a section, and the names of 2.3 with their defaults.
	if section := s.Section("auth_policy"); section.Values != nil {
		value = func(name string) string { return section.Values[name] }
		attributes = section.Section("request_attributes").Values
	} else {
		for _, word := range strings.Fields(value("request_attributes")) {
			name, text, _ := strings.Cut(word, "=")
			attributes[name] = text
		}
	}
	on := func(name string) bool { return value(name) != "no" } // the default
	return &AuthPolicy{
		URL: value("server_url"), Header: value("server_api_header"), Nonce: value("hash_nonce"),
		Report: on("report_after_auth"), Check: on("check_before_auth") || on("check_after_auth"),
		Attributes: attributes,
	}
}

// Path makes an absolute path of one that is in Dovecot's run directory.
func (s *Settings) Path(name string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(s.Values["base_dir"], name)
}

// Listener returns the service that listens on a path, and the listener; nil
// where none does.
func (s *Settings) Listener(path string) (service, listener *Settings) {
	for _, service := range s.Sections {
		for _, listener := range service.Sections {
			name, ok := strings.CutPrefix(listener.Name, "unix_listener ")
			if ok && s.Path(name) == path {
				return service, listener
			}
		}
	}
	return nil, nil
}

// ProcessLimit is the most processes that a service can have: 0, or nothing in
// 2.4, stands for the default.
func (s *Settings) ProcessLimit(service *Settings) uint64 {
	for _, value := range []string{service.Values["process_limit"], s.Values["default_process_limit"]} {
		if value == "unlimited" {
			break
		}
		if n, err := strconv.ParseUint(value, 10, 64); err == nil && n > 0 {
			return n
		}
	}
	return 1<<64 - 1
}

// VszLimit is the limit on a service's address space in bytes; 0 for none. In 2.3, the
// largest number stands for the default.
func (s *Settings) VszLimit(service *Settings) (bytes uint64, err error) {
	written := service.Values["vsz_limit"]
	if written == "" || strings.HasPrefix(written, "18446744073709551615") {
		written = s.Values["default_vsz_limit"]
	}
	if written == "unlimited" {
		return 0, nil
	}
	unit := strings.TrimLeft(written, "0123456789")
	n, err := strconv.ParseUint(written[:len(written)-len(unit)], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size", written)
	}
	shift := 0
	if unit = strings.ToUpper(strings.TrimSpace(unit)); unit != "" {
		shift = 10 * strings.IndexByte("BKMGT", unit[0])
	}
	if shift < 0 || n > (1<<63)>>shift {
		return 0, fmt.Errorf("%q is not a size", written)
	}
	return n << shift, nil
}

// SocketOf returns the socket that a mail service asks after a login: the first
// argument of its executable after the options, the -a, -t and -u of which have
// a value (main.c of Dovecot's src/imap, src/pop3 and src/submission). The index
// is that argument's; -1 if it asks none.
func SocketOf(executable string) (name string, index int) {
	words := strings.Split(executable, " ") // as Dovecot splits it
	for i := 1; i < len(words); i++ {
		if !strings.HasPrefix(words[i], "-") {
			return words[i], i
		}
		if slices.Contains([]string{"-a", "-t", "-u"}, words[i]) && i+1 < len(words) {
			i++
		}
	}
	return "", -1
}

// A Line is one of Dovecot's configuration.
type Line struct {
	File   string
	Number int // from 1; 0 is the beginning of the file
	Text   string
}

// Lines returns those of a configuration and of what it includes, in the order
// in which Dovecot reads them. What cannot be read has none. The files in missing
// have a line 0 where Dovecot would read them.
func Lines(main string, missing ...string) (lines []Line) {
	open := map[string]bool{} // Dovecot refuses a file that includes itself
	var read func(path string)
	read = func(path string) {
		text, err := os.ReadFile(path)
		if err != nil && !slices.Contains(missing, path) || open[path] {
			return
		}
		open[path] = true
		defer delete(open, path)
		lines = append(lines, Line{File: path})
		n := 0
		for line := range strings.Lines(string(text)) {
			n++
			lines = append(lines, Line{path, n, strings.TrimSpace(line)})
			words := strings.Fields(line)
			if len(words) < 2 || words[0] != "!include" && words[0] != "!include_try" {
				continue
			}
			pattern := words[1]
			if !filepath.IsAbs(pattern) {
				pattern = filepath.Join(filepath.Dir(path), pattern)
			}
			files, _ := filepath.Glob(pattern) // of a bad pattern none, as in Dovecot
			for _, file := range missing {
				if ok, _ := filepath.Match(pattern, file); ok && !slices.Contains(files, file) {
					files = append(files, file)
				}
			}
			slices.Sort(files)
			for _, file := range files {
				read(file)
			}
		}
	}
	read(main)
	return lines
}
