package dovecot

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/textproto"
	"strings"

	"nftwl/pkg/nstest"
)

// protocols has Dovecot's protocols that run a post-login service, by their names in
// the setting "protocols".
var protocols = map[string]struct {
	port  string
	visit nstest.Visit
}{
	"imap":       {"143", nstest.IMAP},
	"pop3":       {"110", nstest.POP3},
	"submission": {"587", nstest.Submission},
	"sieve":      {"4190", sieve},
}

// login logs in and uses the server, from one of the client's addresses.
func login(from, port string, v nstest.Visit, user, password string) error {
	c, err := dial(from, port)
	if err != nil {
		return err
	}
	defer c.Close()
	return v(textproto.NewConn(c), user, password)
}

// loginTLS is login with TLS from the first byte on.
func loginTLS(from, port string, v nstest.Visit, user, password string) error {
	c, err := dial(from, port)
	if err != nil {
		return err
	}
	defer c.Close()
	return v(textproto.NewConn(tls.Client(c, &tls.Config{InsecureSkipVerify: true})), user, password)
}

// dial connects from one of the client's addresses, or over loopback.
func dial(from, port string) (net.Conn, error) {
	to := from // loopback, and the server's own address
	switch from {
	case client4:
		to = server4
	case client6:
		to = server6
	}
	return nstest.Dial(from, to, port)
}

// sieve logs in and out, with as little of RFC 5804 as that takes.
func sieve(c *textproto.Conn, user, password string) error {
	ask := func(format string, args ...any) error {
		if format != "" {
			if err := c.PrintfLine(format, args...); err != nil {
				return err
			}
		}
		for {
			line, err := c.ReadLine()
			switch {
			case err != nil:
				return err
			case strings.HasPrefix(line, "OK"):
				return nil
			case strings.HasPrefix(line, "NO"), strings.HasPrefix(line, "BYE"):
				return errors.New(line)
			}
		}
	}
	if err := ask(""); err != nil {
		return err
	}
	if err := ask(`AUTHENTICATE "PLAIN" "%s"`, nstest.PLAIN(user, password)); err != nil {
		return fmt.Errorf("%w: %w", nstest.ErrDenied, err)
	}
	if err := ask("PUTSCRIPT \"test\" {5+}\r\nkeep;"); err != nil {
		return err
	}
	if err := ask("LISTSCRIPTS"); err != nil {
		return err
	}
	return ask("LOGOUT")
}

// relay is the mail server behind Dovecot's submission service. It accepts every
// mail.
func relay(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return // the test is over
		}
		go func() {
			defer conn.Close()
			c := textproto.NewConn(conn)
			answer := "220 relay.example.org"
			for {
				if err := c.PrintfLine("%s", answer); err != nil {
					return
				}
				line, err := c.ReadLine()
				if err != nil {
					return
				}
				answer = "250 OK"
				if line == "DATA" {
					if err := c.PrintfLine("354 go on"); err != nil {
						return
					}
					if _, err := c.ReadDotBytes(); err != nil {
						return
					}
				}
			}
		}()
	}
}
