package e2e

import (
	"bufio"
	"context"
	"crypto/hmac"
	"crypto/md5"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// errDenied is the server's no to a user name and password, as opposed to
// anything that goes wrong later.
var errDenied = errors.New("login denied")

// dial connects from an address of a client, which no interface need have.
func dial(from, port string) (*textproto.Conn, error) {
	to := server4
	if strings.Contains(from, ":") {
		to = server6
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience, Control: freeBind}
	c, err := d.Dial("tcp", net.JoinHostPort(to, port))
	if err != nil {
		return nil, err
	}
	return textproto.NewConn(c), c.SetDeadline(time.Now().Add(patience))
}

func freeBind(network, _ string, c syscall.RawConn) (err error) {
	if e := c.Control(func(fd uintptr) {
		if strings.HasSuffix(network, "6") {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
		}
	}); e != nil {
		return e
	}
	return err
}

// login logs in over IMAP, and out.
func login(from, user, password string) error { return authenticate(from, "", user, password) }

// authenticate logs in over IMAP with a mechanism; with LOGIN where it is
// empty.
func authenticate(from, mech, user, password string) error {
	c, err := dial(from, "143")
	if err != nil {
		return err
	}
	return imap(c, mech, user, password)
}

// imap logs in over a new connection, and out.
func imap(c *textproto.Conn, mech, user, password string) error {
	defer c.Close()
	_, err := c.ReadLine()
	if err != nil {
		return err
	}
	if mech == "" {
		err = c.PrintfLine("a LOGIN %s %s", user, password)
	} else {
		err = c.PrintfLine("a AUTHENTICATE %s", mech)
	}
	if err != nil {
		return err
	}
	answer := sasl(mech, user, password)
	for {
		line, err := c.ReadLine()
		switch {
		case err != nil:
			return err
		case strings.HasPrefix(line, "+ "), line == "+":
			challenge, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(strings.TrimPrefix(line, "+"), " "))
			if err != nil {
				return err
			}
			if err := c.PrintfLine("%s", base64.StdEncoding.EncodeToString([]byte(answer(string(challenge))))); err != nil {
				return err
			}
		case strings.HasPrefix(line, "a OK"):
			if err := c.PrintfLine("b LOGOUT"); err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, c.R)
			return err
		case strings.HasPrefix(line, "a "):
			return fmt.Errorf("%w: %s", errDenied, line)
		}
	}
}

// sasl returns the client's side of a mechanism.
func sasl(mech, user, password string) func(challenge string) string {
	step := 0
	var first string // of a SCRAM exchange
	return func(challenge string) string {
		step++
		switch mech {
		case "PLAIN":
			return "\x00" + user + "\x00" + password
		case "LOGIN":
			return []string{user, password}[min(step, 2)-1]
		case "XOAUTH2":
			if step == 1 {
				return "user=" + user + "\x01auth=Bearer " + password + "\x01\x01"
			}
		case "OAUTHBEARER": // RFC 7628
			if step == 1 {
				return "n,a=" + user + ",\x01auth=Bearer " + password + "\x01\x01"
			}
			return "\x01"
		case "EXTERNAL", "ANONYMOUS":
			return user
		case "CRAM-MD5": // RFC 2195
			mac := hmac.New(md5.New, []byte(password))
			io.WriteString(mac, challenge)
			return fmt.Sprintf("%s %x", user, mac.Sum(nil))
		case "SCRAM-SHA-1", "SCRAM-SHA-256": // RFC 5802
			switch step {
			case 1:
				first = "n=" + user + ",r=abcdef"
				return "n,," + first
			case 2:
				return scram(mech, first, challenge, password)
			}
			return ""
		}
		return ""
	}
}

func scram(mech, first, challenge, password string) string {
	var newHash func() hash.Hash = sha1.New
	if mech == "SCRAM-SHA-256" {
		newHash = sha256.New
	}
	fields := make(map[string]string)
	for _, f := range strings.Split(challenge, ",") {
		name, value, _ := strings.Cut(f, "=")
		fields[name] = value
	}
	salt, _ := base64.StdEncoding.DecodeString(fields["s"])
	rounds, _ := strconv.Atoi(fields["i"])
	salted, err := pbkdf2.Key(newHash, password, salt, max(rounds, 1), newHash().Size())
	if err != nil {
		panic(err)
	}
	mac := func(key []byte, text string) []byte {
		m := hmac.New(newHash, key)
		io.WriteString(m, text)
		return m.Sum(nil)
	}
	clientKey := mac(salted, "Client Key")
	h := newHash()
	h.Write(clientKey)
	final := "c=biws,r=" + fields["r"]
	proof := mac(h.Sum(nil), first+","+challenge+","+final)
	for i := range proof {
		proof[i] ^= clientKey[i]
	}
	return final + ",p=" + base64.StdEncoding.EncodeToString(proof)
}

// pop3 logs in over a new connection, and out.
func pop3(from, user, password string) error {
	c, err := dial(from, "110")
	if err != nil {
		return err
	}
	defer c.Close()
	for _, line := range []string{"", "USER " + user, "PASS " + password, "QUIT"} {
		if line != "" {
			if err := c.PrintfLine("%s", line); err != nil {
				return err
			}
		}
		answer, err := c.ReadLine()
		if err != nil {
			return err
		}
		if !strings.HasPrefix(answer, "+OK") {
			return fmt.Errorf("%w: %s", errDenied, answer)
		}
	}
	return nil
}

// smtp authenticates to a submission service, with PLAIN.
func smtp(from, port, user, password string) error {
	return smtpAuth(from, port, "AUTH PLAIN "+base64.StdEncoding.EncodeToString([]byte("\x00"+user+"\x00"+password)))
}

// smtpLogin is smtp with LOGIN, which most guessers take.
func smtpLogin(from, port, user, password string) error {
	return smtpAuth(from, port, "AUTH LOGIN "+base64.StdEncoding.EncodeToString([]byte(user)), base64.StdEncoding.EncodeToString([]byte(password)))
}

// smtpAuth sends the lines of an AUTH, the last of which is to succeed.
func smtpAuth(from, port string, lines ...string) error {
	c, err := dial(from, port)
	if err != nil {
		return err
	}
	defer c.Close()
	type step struct {
		code int
		line string
	}
	steps := []step{{220, ""}, {250, "EHLO client.example.org"}}
	for i, line := range lines {
		code := 334
		if i == len(lines)-1 {
			code = 235
		}
		steps = append(steps, step{code, line})
	}
	for _, step := range append(steps, step{221, "QUIT"}) {
		if step.line != "" {
			if err := c.PrintfLine("%s", step.line); err != nil {
				return err
			}
		}
		if _, _, err := c.ReadResponse(step.code); err != nil {
			if step.code == 235 {
				err = fmt.Errorf("%w: %w", errDenied, err)
			}
			return fmt.Errorf("%s: %w", step.line, err)
		}
	}
	return nil
}

// get asks nftwld. The connection is made here, in the test's namespace.
func (s *server) get(path string) string {
	s.t.Helper()
	address := s.policy + ":8085"
	conn, err := net.Dial("tcp", address)
	must(s.t, err)
	defer conn.Close()
	must(s.t, conn.SetDeadline(time.Now().Add(patience)))
	request, err := http.NewRequestWithContext(context.Background(), "GET", "http://"+address+path, nil)
	must(s.t, err)
	must(s.t, request.Write(conn))
	response, err := http.ReadResponse(bufio.NewReader(conn), request)
	must(s.t, err)
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	must(s.t, err)
	return string(b)
}
