package dovecot

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/textproto"
	"strings"
	"testing"
	"time"
)

// message lies in every user's inbox before the first login.
const message = "From: <root@example.org>\nSubject: test\n\nYou have mail.\n"

const body = "You have mail."

// errDenied is the server's no to a user name and password, as opposed to
// anything that goes wrong later.
var errDenied = errors.New("login denied")

// A visit logs in and then does what a login is for: without that, it would
// not be known whether the mail process ever got the connection.
type visit func(c *textproto.Conn, user, password string) error

// protocols are Dovecot's that run a post-login service, under the names that
// its setting "protocols" has for them.
var protocols = map[string]struct {
	port  string
	visit visit
}{
	"imap":       {"143", imap},
	"pop3":       {"110", pop3},
	"submission": {"587", submission},
	"sieve":      {"4190", sieve},
}

// login visits the server from one of the client's addresses.
func login(from, port string, v visit, user, password string) error {
	c, err := dial(from, port)
	if err != nil {
		return err
	}
	defer c.Close()
	return v(textproto.NewConn(c), user, password)
}

// loginTLS is login with TLS from the first byte on.
func loginTLS(from, port string, v visit, user, password string) error {
	c, err := dial(from, port)
	if err != nil {
		return err
	}
	defer c.Close()
	return v(textproto.NewConn(tls.Client(c, &tls.Config{InsecureSkipVerify: true})), user, password)
}

func dial(from, port string) (net.Conn, error) {
	to := from // loopback, and the server's own address
	switch from {
	case client4:
		to = server4
	case client6:
		to = server6
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}
	c, err := d.Dial("tcp", net.JoinHostPort(to, port))
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(patience))
}

// imap is the least of RFC 9051 that reads a message.
func imap(c *textproto.Conn, user, password string) error {
	if _, err := c.ReadLine(); err != nil {
		return err
	}
	if err := imapCommand(c, "", "LOGIN %s %s", user, password); err != nil {
		return fmt.Errorf("%w: %w", errDenied, err)
	}
	if err := imapCommand(c, "1 EXISTS", "SELECT INBOX"); err != nil {
		return err
	}
	if err := imapCommand(c, body, "FETCH 1 BODY[]"); err != nil {
		return err
	}
	return imapCommand(c, "BYE", "LOGOUT")
}

// imapCommand sends a command and wants to see a text before its OK.
func imapCommand(c *textproto.Conn, want, format string, args ...any) error {
	if err := c.PrintfLine("a "+format, args...); err != nil {
		return err
	}
	var answer strings.Builder
	for {
		line, err := c.ReadLine()
		if err != nil {
			return fmt.Errorf("after %q: %w", answer.String(), err)
		}
		if strings.HasPrefix(line, "a OK ") && strings.Contains(answer.String(), want) {
			return nil
		}
		if strings.HasPrefix(line, "a ") {
			return fmt.Errorf("%s: no %q in %q, then %q", format, want, answer.String(), line)
		}
		fmt.Fprintln(&answer, line)
	}
}

// pop3 is the least of RFC 1939.
func pop3(c *textproto.Conn, user, password string) error {
	ask := func(format string, args ...any) error {
		if format != "" {
			if err := c.PrintfLine(format, args...); err != nil {
				return err
			}
		}
		line, err := c.ReadLine()
		if err == nil && !strings.HasPrefix(line, "+OK") {
			err = errors.New(line)
		}
		return err
	}
	if err := ask(""); err != nil {
		return err
	}
	if err := ask("USER %s", user); err != nil {
		return err
	}
	if err := ask("PASS %s", password); err != nil {
		return fmt.Errorf("%w: %w", errDenied, err)
	}
	if err := ask("RETR 1"); err != nil {
		return err
	}
	text, err := c.ReadDotBytes()
	if err != nil {
		return err
	}
	if !strings.Contains(string(text), body) {
		return fmt.Errorf("message is %q", text)
	}
	return ask("QUIT")
}

// submission sends a mail, which Dovecot hands to relay.
func submission(c *textproto.Conn, user, password string) error {
	if _, _, err := c.ReadResponse(220); err != nil {
		return err
	}
	steps := []struct {
		code int
		line string
	}{
		{250, "EHLO client.example.org"},
		{235, "AUTH PLAIN " + base64.StdEncoding.EncodeToString([]byte("\x00"+user+"\x00"+password))},
		{250, "MAIL FROM:<" + user + "@example.org>"},
		{250, "RCPT TO:<root@example.org>"},
		{354, "DATA"},
		{250, body + "\r\n."},
		{221, "QUIT"},
	}
	for _, s := range steps {
		if err := c.PrintfLine("%s", s.line); err != nil {
			return err
		}
		if _, _, err := c.ReadResponse(s.code); err != nil {
			if s.code == 235 {
				err = fmt.Errorf("%w: %w", errDenied, err)
			}
			return fmt.Errorf("%s: %w", s.line, err)
		}
	}
	return nil
}

// sieve is the least of RFC 5804.
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
	secret := base64.StdEncoding.EncodeToString([]byte("\x00" + user + "\x00" + password))
	if err := ask(`AUTHENTICATE "PLAIN" "%s"`, secret); err != nil {
		return fmt.Errorf("%w: %w", errDenied, err)
	}
	if err := ask("PUTSCRIPT \"test\" {5+}\r\nkeep;"); err != nil {
		return err
	}
	if err := ask("LISTSCRIPTS"); err != nil {
		return err
	}
	return ask("LOGOUT")
}

// relay is the mail server behind Dovecot's submission. It takes every mail.
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

// certificate makes a self-signed one, in PEM.
func certificate(t testing.TB) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.ParseIP(server4), net.ParseIP(server6)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	must(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	must(t, err)
	encode := func(kind string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", pkcs8)
}
