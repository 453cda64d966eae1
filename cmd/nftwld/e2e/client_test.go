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
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"time"

	"nftwl/pkg/nstest"
)

// dial connects from a client's address, even if no interface has it.
func dial(from, port string) (*textproto.Conn, error) {
	to := server4
	if strings.Contains(from, ":") {
		to = server6
	}
	c, err := nstest.Dial(from, to, port)
	if err != nil {
		return nil, err
	}
	return textproto.NewConn(c), nil
}

// login logs in over IMAP, and logs out.
func login(from, user, password string) error { return authenticate(from, "", user, password) }

// authenticate logs in over IMAP with a mechanism, or with the command LOGIN if
// it is empty.
func authenticate(from, mech, user, password string) error {
	c, err := dial(from, "143")
	if err != nil {
		return err
	}
	return imap(c, mech, user, password)
}

// imap logs in over a new IMAP connection, and logs out.
func imap(c *textproto.Conn, mech, user, password string) error {
	defer c.Close()
	var err error
	if mech == "" {
		err = nstest.IMAPLogin(c, user, password)
	} else {
		err = imapSASL(c, mech, user, password)
	}
	if err != nil {
		return err
	}
	return nstest.IMAPCommand(c, "BYE", "LOGOUT")
}

// imapSASL waits for the greeting and logs in with a mechanism.
func imapSASL(c *textproto.Conn, mech, user, password string) error {
	_, err := c.ReadLine()
	if err != nil {
		return err
	}
	if err := c.PrintfLine("a AUTHENTICATE %s", mech); err != nil {
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
			return nil
		case strings.HasPrefix(line, "a "):
			return fmt.Errorf("%w: %s", nstest.ErrDenied, line)
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

// visit logs in with a protocol other than IMAP.
func visit(from, port string, v nstest.Visit, user, password string) error {
	c, err := dial(from, port)
	if err != nil {
		return err
	}
	defer c.Close()
	return v(c, user, password)
}

// pop3 logs in over POP3, and logs out.
func pop3(from, user, password string) error { return visit(from, "110", nstest.POP3, user, password) }

// smtp authenticates to the submission service, with PLAIN.
func smtp(from, user, password string) error {
	return visit(from, "587", func(c *textproto.Conn, user, password string) error {
		return nstest.SMTPLogin(c, "AUTH PLAIN "+nstest.PLAIN(user, password))
	}, user, password)
}

// smtpLogin is smtp with LOGIN, which most guessers use.
func smtpLogin(from, user, password string) error {
	return visit(from, "587", func(c *textproto.Conn, user, password string) error {
		return nstest.SMTPLogin(c, "AUTH LOGIN "+base64.StdEncoding.EncodeToString([]byte(user)), base64.StdEncoding.EncodeToString([]byte(password)))
	}, user, password)
}

// get returns nftwld's answer to a GET request. It connects in the calling
// goroutine, which is in the test's namespace.
func (s *server) get(path string) string {
	s.t.Helper()
	address := s.policy + ":8085"
	conn, err := net.Dial("tcp", address)
	nstest.Must(s.t, err)
	defer conn.Close()
	nstest.Must(s.t, conn.SetDeadline(time.Now().Add(nstest.Patience)))
	request, err := http.NewRequestWithContext(context.Background(), "GET", "http://"+address+path, nil)
	nstest.Must(s.t, err)
	nstest.Must(s.t, request.Write(conn))
	response, err := http.ReadResponse(bufio.NewReader(conn), request)
	nstest.Must(s.t, err)
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	nstest.Must(s.t, err)
	return string(b)
}
