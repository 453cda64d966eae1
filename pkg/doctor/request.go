package doctor

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/doveconf"
	"nftwl/pkg/nftset"
	"nftwl/pkg/trust"
)

const (
	// maxLogin is how long a post-login service may take to answer.
	maxLogin = time.Second
	// loginUser need not exist: Dovecot looks a user up before the request.
	loginUser = "nftwl-doctor"
)

var (
	errDenied    = errors.New(denied)
	errUntrusted = errors.New(untrusted)
)

// tryLogins has a post-login service trust an address of each family that
// belongs to no one (RFC 5737, RFC 3849), and removes them again. It returns
// those that were trusted, none where none can be tried; an error is that of the
// first that was not trusted.
func (d *Doctor) tryLogins(p *postLogin) (trusted []string, err error) {
	for _, ipv6 := range []bool{false, true} {
		for range 10 { // most often the first is not trusted already
			addr, local := documentation(ipv6)
			tried, err := d.tryLogin(p, addr, local)
			if err != nil {
				return nil, err
			}
			if tried {
				trusted = append(trusted, addr.String())
				break
			}
		}
	}
	return trusted, nil
}

// documentation returns an address of the documentation, another one each time,
// and one that is no client's.
func documentation(ipv6 bool) (addr netip.Addr, local string) {
	four, six := [4]byte{192, 0, 2}, [16]byte{0x20, 0x01, 0x0d, 0xb8}
	_, _ = rand.Read(six[4:]) // never fails
	if ipv6 {
		return netip.AddrFrom16(six), "2001:db9::"
	}
	four[3] = six[4] | 1
	return netip.AddrFrom4(four), "192.0.2.0"
}

// tryLogin tells whether an address can be tried, and if so, why it was not
// trusted.
func (d *Doctor) tryLogin(p *postLogin, addr netip.Addr, local string) (tried bool, err error) {
	if d.unusable[d.config.Trusted.For(addr)] || trust.Refuse(d.config, addr) != nil {
		return false, nil
	}
	d.conn.SetTimeout(patience)
	set, err := d.conn.Set(d.config.Table, d.config.Trusted.For(addr))
	if err != nil {
		return false, err
	}
	keys := trust.Keys(set, trust.Network(d.config, addr), d.config.Ports)
	if before, err := d.conn.Lookup(set, keys...); err != nil || len(before) > 0 {
		return false, err
	}
	// What an interrupted doctor leaves there ends by itself.
	answer := askPostLogin(p.socket, local, addr.String(), p.login.MailUser)
	d.conn.SetTimeout(patience)
	added, err := d.conn.Remove(set, keys, func(e nftset.Element) bool { return e.Timeout <= time.Minute })
	if err == nil && len(added) < len(keys) {
		err = errUntrusted
	}
	return true, cmp.Or(answer, err)
}

// askPostLogin asks a post-login service as a mail process does: see
// master_login_postlogin() of src/lib-master/master-login.c in Dovecot 2.3,
// login_server_postlogin() of src/lib-login/login-server.c in 2.4, and
// src/util/script-login.c of both. No mail process is started: the one that
// asks is that. script-login ends by sending the answer.
func askPostLogin(path, local, remote string, mailUser bool) error {
	conn, err := net.DialTimeout("unix", path, maxLogin)
	if err != nil {
		return err
	}
	defer conn.Close()
	// For a client with TLS, too, it is a socket of this family.
	client, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(client[0])
	defer unix.Close(client[1])
	line := fmt.Sprintf("VERSION\tscript-login\t1\t0\n%s\t%s\t%s\tnftwl_timeout=1m", local, remote, loginUser)
	if mailUser { // the privileges that script-login -d takes on
		line += "\tuid=65534\tgid=65534\thome=/nonexistent"
	}
	_ = conn.SetDeadline(time.Now().Add(maxLogin))
	if _, _, err := conn.(*net.UnixConn).WriteMsgUnix([]byte(line+"\n"), unix.UnixRights(client[1]), nil); err != nil {
		return err
	}
	answer := make([]byte, 1024)
	n, err := conn.Read(answer) // which closes the descriptor that comes back
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w within %v", errNoAnswer, maxLogin)
	case err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET):
		return err
	case n == 0:
		return errDenied
	case !bytes.HasPrefix(answer[:n], []byte(loginUser)):
		return fmt.Errorf("an answer that is none: %.40q", answer[:n])
	}
	return nil
}

// logged returns ": " and the first line that a service has logged as an error since
// then, "" for none: Dovecot's log process keeps them, for `doveadm log errors`
// (doveadm_connection_send_errors() of src/log/doveadm-connection.c).
func logged(dovecot *doveconf.Settings, service string, since time.Time) string {
	// They come by a pipe, and so a moment after the answer.
	for end := time.Now().Add(maxLogin); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		conn, err := net.DialTimeout("unix", dovecot.Path("log-errors"), maxLogin)
		if err != nil {
			return ""
		}
		_ = conn.SetDeadline(end)
		text, _ := io.ReadAll(conn) // what came until then
		conn.Close()
		for line := range strings.Lines(string(text)) {
			words := strings.SplitN(strings.TrimSpace(line), "\t", 4)
			if len(words) < 4 || words[1] < fmt.Sprint(since.Unix()) {
				continue
			}
			if strings.HasPrefix(words[2], service+": ") || strings.HasPrefix(words[2], "script-login("+loginUser+")") {
				return ": " + strings.TrimPrefix(strings.TrimPrefix(words[3], "nftwl: error: "), "login: ")
			}
		}
	}
	return ""
}
