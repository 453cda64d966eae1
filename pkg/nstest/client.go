package nstest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/textproto"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Body is the body of Message, the mail in every user's inbox.
const (
	Body    = "You have mail."
	Message = "From: <root@example.org>\nSubject: test\n\n" + Body + "\n"
)

// ErrDenied means that the server refused the user name and password. Later
// failures are other errors.
var ErrDenied = errors.New("login denied")

// A Visit logs in over a new connection and then uses it, which shows that the
// mail process really got the connection.
type Visit func(c *textproto.Conn, user, password string) error

// Dial connects from one address to a port of another, on the calling
// goroutine's thread. No interface needs to have the first. The connection has
// a deadline, Patience from now.
func Dial(from, to, port string) (*net.TCPConn, error) {
	c, err := dial(from, net.JoinHostPort(to, port), Patience)
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(Patience))
}

// dial takes addresses, not names, so that this thread makes the socket.
func dial(from, to string, timeout time.Duration) (*net.TCPConn, error) {
	address, err := netip.ParseAddr(from)
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{
		Timeout:   timeout,
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(address, 0)),
		Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			if e := c.Control(func(fd uintptr) { err = FreeBind(int(fd), address) }); e != nil {
				return e
			}
			return err
		},
	}
	conn, err := dialer.Dial("tcp", to)
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// IMAP reads a message, with as little of RFC 9051 as that takes.
func IMAP(c *textproto.Conn, user, password string) error {
	if err := IMAPLogin(c, user, password); err != nil {
		return err
	}
	return IMAPRead(c)
}

// IMAPLogin waits for the greeting and logs in. Dovecot answers after the
// post-login service; if that denies the login, Dovecot closes the connection.
func IMAPLogin(c *textproto.Conn, user, password string) error {
	if _, err := c.ReadLine(); err != nil {
		return fmt.Errorf("greeting: %w", err)
	}
	if err := IMAPCommand(c, "", "LOGIN %s %s", user, password); err != nil {
		return fmt.Errorf("%w: %w", ErrDenied, err)
	}
	return nil
}

// IMAPRead reads a message after a login, and logs out.
func IMAPRead(c *textproto.Conn) error {
	if err := IMAPCommand(c, "1 EXISTS", "SELECT INBOX"); err != nil {
		return err
	}
	if err := IMAPCommand(c, Body, "FETCH 1 BODY[]"); err != nil {
		return err
	}
	return IMAPCommand(c, "BYE", "LOGOUT")
}

// IMAPCommand sends a command, and fails unless a text comes before its OK.
func IMAPCommand(c *textproto.Conn, want, format string, args ...any) error {
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

// POP3 reads a message, with as little of RFC 1939 as that takes.
func POP3(c *textproto.Conn, user, password string) error {
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
		return fmt.Errorf("%w: %w", ErrDenied, err)
	}
	if err := ask("RETR 1"); err != nil {
		return err
	}
	text, err := c.ReadDotBytes()
	if err != nil {
		return err
	}
	if !strings.Contains(string(text), Body) {
		return fmt.Errorf("message is %q", text)
	}
	return ask("QUIT")
}

// PLAIN returns what a client sends with the SASL mechanism PLAIN.
func PLAIN(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte("\x00" + user + "\x00" + password))
}

// Submission sends a mail.
func Submission(c *textproto.Conn, user, password string) error {
	if err := SMTPLogin(c, "AUTH PLAIN "+PLAIN(user, password)); err != nil {
		return err
	}
	for _, step := range []struct {
		code int
		line string
	}{
		{250, "MAIL FROM:<" + user + "@example.org>"},
		{250, "RCPT TO:<root@example.org>"},
		{354, "DATA"},
		{250, Body + "\r\n."},
		{221, "QUIT"},
	} {
		if err := smtp(c, step.code, step.line); err != nil {
			return err
		}
	}
	return nil
}

// SMTPLogin waits for the greeting and sends the lines of an AUTH, the last of
// which must succeed.
func SMTPLogin(c *textproto.Conn, lines ...string) error {
	if _, _, err := c.ReadResponse(220); err != nil {
		return err
	}
	if err := smtp(c, 250, "EHLO client.example.org"); err != nil {
		return err
	}
	last := len(lines) - 1
	for _, line := range lines[:last] {
		if err := smtp(c, 334, line); err != nil {
			return err
		}
	}
	if err := smtp(c, 235, lines[last]); err != nil {
		return fmt.Errorf("%w: %w", ErrDenied, err)
	}
	return nil
}

// smtp sends a line, and fails unless the answer has a code.
func smtp(c *textproto.Conn, code int, line string) error {
	if err := c.PrintfLine("%s", line); err != nil {
		return err
	}
	if _, _, err := c.ReadResponse(code); err != nil {
		return fmt.Errorf("%s: %w", line, err)
	}
	return nil
}

// Certificate makes a self-signed certificate, in PEM.
func Certificate(t testing.TB) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	Must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	Must(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	Must(t, err)
	encode := func(kind string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", pkcs8)
}
