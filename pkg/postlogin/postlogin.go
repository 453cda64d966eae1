// Package postlogin reads what Dovecot's mail processes ask of a post-login
// service, and makes the answer: the protocol that script-login speaks
// (Dovecot 2.3 src/lib-master/master-login.c, 2.4 src/lib-login/login-server.c,
// both src/util/script-login.c).
//
// A request is a line with the protocol's version and one with the login:
//
//	VERSION TAB script-login TAB 1 TAB 0 LF
//	LOCAL_IP TAB REMOTE_IP TAB USER [TAB KEY=VALUE]… LF
//
// to the first byte of which the client's descriptor is attached. The answer is
// the second line from the user on; what it says replaces what the mail
// process knew of the user. To close the connection without one is to deny the
// login.
package postlogin

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// MaxLine is the length of the longest line, with its LF, in bytes: many times
// what Dovecot's processes take for the fields of a user, which is 8 KiB
// (AUTH_MAX_INBUF_SIZE).
const MaxLine = 256 << 10

// ScanLines is a split function for a bufio.Scanner, which has whole lines, each
// with its LF.
func ScanLines(data []byte, atEOF bool) (advance int, token []byte, err error) {
	if n := bytes.IndexByte(data, '\n') + 1; n > 0 {
		return n, data[:n], nil
	}
	if atEOF && len(data) > 0 {
		return 0, nil, io.ErrUnexpectedEOF
	}
	return 0, nil, nil
}

// major is the version of the protocol. Another minor one is compatible
// (version_string_verify in src/lib/version.c).
const major = "1"

// CheckVersion looks at the first line, with or without its LF.
func CheckVersion(line []byte) error {
	fields := bytes.Split(bytes.TrimSuffix(line, []byte("\n")), []byte("\t"))
	if len(fields) != 4 || string(fields[0]) != "VERSION" {
		return errors.New("not a post-login request")
	}
	if string(fields[1]) != "script-login" {
		return fmt.Errorf("a request in the protocol %.40q, not in script-login", fields[1])
	}
	if _, err := strconv.ParseUint(string(fields[3]), 10, 32); err != nil || string(fields[2]) != major {
		return fmt.Errorf("a request in version %.20q.%.20q of the post-login protocol; known is %s", fields[2], fields[3], major)
	}
	return nil
}

// Request is a login. Its addresses are empty where Dovecot knows none.
type Request struct {
	LocalIP, IP, User string

	// Answer is the line that lets the user in, with its LF: the very bytes of
	// the request. It is part of the line that was parsed.
	Answer []byte
}

// Parse reads the line of a login, with its LF.
func Parse(line []byte) (Request, error) {
	if !bytes.HasSuffix(line, []byte("\n")) {
		return Request{}, errors.New("the line of the login has no end")
	}
	local, rest, ok1 := bytes.Cut(line, []byte("\t"))
	ip, answer, ok2 := bytes.Cut(rest, []byte("\t"))
	if !ok1 || !ok2 {
		return Request{}, errors.New("the line of the login has fewer than three fields")
	}
	user, _, _ := bytes.Cut(answer[:len(answer)-1], []byte("\t"))
	r := Request{
		LocalIP: unescape(local),
		IP:      unescape(ip),
		User:    unescape(user),
		Answer:  answer,
	}
	if r.User == "" {
		return Request{}, errors.New("the login has no user")
	}
	return r, nil
}

// Field returns the value of one of the user's fields, or "". As in the
// environment that script-login makes of them, upper and lower case are the
// same, and the last of several counts.
func (r Request) Field(name string) string {
	fields := strings.Split(string(r.Answer[:len(r.Answer)-1]), "\t")
	for i := len(fields) - 1; i > 0; i-- {
		key, value, ok := strings.Cut(unescape([]byte(fields[i])), "=")
		if ok && strings.EqualFold(key, name) {
			return value
		}
	}
	return ""
}

// unescape undoes str_tabescape() of Dovecot's src/lib/strescape.c.
func unescape(b []byte) string {
	if bytes.IndexByte(b, 1) < 0 {
		return string(b)
	}
	var s strings.Builder
	for i := 0; i < len(b); i++ {
		c := b[i]
		if c == 1 {
			i++
			if i == len(b) {
				break // as there
			}
			switch c = b[i]; c {
			case '0':
				c = 0
			case '1':
				c = 1
			case 't':
				c = '\t'
			case 'r':
				c = '\r'
			case 'n':
				c = '\n'
			}
		}
		s.WriteByte(c)
	}
	return s.String()
}
