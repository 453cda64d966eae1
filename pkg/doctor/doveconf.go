package doctor

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// settings is a section of what doveconf prints, or all of it.
type settings struct {
	name     string // "service imap"; empty for all of it
	values   map[string]string
	sections []*settings
}

// parseDoveconf reads what doveconf of Dovecot 2.3 or 2.4 prints. It passes
// over what it does not know: the settings that are looked for are missing
// then, which is said.
func parseDoveconf(text string) *settings {
	open := []*settings{{values: map[string]string{}}}
	for line := range strings.Lines(text) {
		line = strings.TrimLeft(strings.TrimSuffix(line, "\n"), " \t")
		s := open[len(open)-1]
		if key, value, ok := strings.Cut(line, " = "); ok {
			s.values[key] = unquote(value)
		} else if name, ok := strings.CutSuffix(line, " {"); ok {
			kind, name, _ := strings.Cut(name, " ")
			inner := &settings{strings.TrimSpace(kind + " " + unquote(name)), map[string]string{}, nil}
			s.sections = append(s.sections, inner)
			open = append(open, inner)
		} else if line == "}" && len(open) > 1 {
			open = open[:len(open)-1]
		}
	}
	return open[0]
}

// unquote undoes str_escape() of Dovecot's src/lib/strescape.c, which doveconf
// applies to a value that has spaces at an end or a # in it.
func unquote(s string) string {
	if len(s) < 2 || s[0] != '"' || s[len(s)-1] != '"' {
		return s
	}
	var b strings.Builder
	for s = s[1 : len(s)-1]; s != ""; s = s[1:] {
		if s[0] == '\\' && len(s) > 1 {
			s = s[1:]
		}
		b.WriteByte(s[0])
	}
	return b.String()
}

// section returns one by its name; one that is not there is empty.
func (s *settings) section(name string) *settings {
	for _, inner := range s.sections {
		if inner.name == name {
			return inner
		}
	}
	return &settings{name: name}
}

// protocols returns those that Dovecot serves: one setting, or in 2.4 a section
// of them.
func (s *settings) protocols() map[string]bool {
	enabled := map[string]bool{}
	for _, name := range strings.Fields(s.values["protocols"]) {
		enabled[name] = true
	}
	for name, value := range s.section("protocols").values {
		enabled[name] = value == "yes"
	}
	return enabled
}

// path makes an absolute path of one that is in Dovecot's run folder.
func (s *settings) path(name string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(s.values["base_dir"], name)
}

// listener returns the service that listens on a path, and the listener; nil
// where none does.
func (s *settings) listener(path string) (service, listener *settings) {
	for _, service := range s.sections {
		for _, listener := range service.sections {
			name, ok := strings.CutPrefix(listener.name, "unix_listener ")
			if ok && s.path(name) == path {
				return service, listener
			}
		}
	}
	return nil, nil
}

// processLimit is the most processes that a service may have: 0, or nothing in
// 2.4, stands for the default.
func (s *settings) processLimit(service *settings) uint64 {
	for _, value := range []string{service.values["process_limit"], s.values["default_process_limit"]} {
		if value == "unlimited" {
			break
		}
		if n, err := strconv.ParseUint(value, 10, 64); err == nil && n > 0 {
			return n
		}
	}
	return 1<<64 - 1
}

// vszLimit is the limit on a service's address space as it is written, and in
// bytes, where 0 is none. In 2.3, the largest number stands for the default.
func (s *settings) vszLimit(service *settings) (written string, bytes uint64, err error) {
	written = service.values["vsz_limit"]
	if written == "" || strings.HasPrefix(written, "18446744073709551615") {
		written = s.values["default_vsz_limit"]
	}
	if written == "unlimited" {
		return written, 0, nil
	}
	unit := strings.TrimLeft(written, "0123456789")
	n, err := strconv.ParseUint(written[:len(written)-len(unit)], 10, 64)
	if err != nil {
		return written, 0, fmt.Errorf("%q is not a size", written)
	}
	shift := 0
	if unit = strings.ToUpper(strings.TrimSpace(unit)); unit != "" {
		shift = 10 * strings.IndexByte("BKMGT", unit[0])
	}
	if shift < 0 || n > (1<<63)>>shift {
		return written, 0, fmt.Errorf("%q is not a size", written)
	}
	return written, n << shift, nil
}
