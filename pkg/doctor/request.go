package doctor

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
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

// noClients are the addresses that the logins come to, by Is6.
var noClients = map[bool]string{false: "198.51.100.1", true: "2001:db8::"}

var (
	errDenied    = errors.New("every login is denied")
	errUntrusted = errors.New("logins go on, and no client is trusted")
)

// tryLogins has a post-login service trust an address of each family that
// belongs to no one (RFC 5737, RFC 3849), and removes them again. It returns
// those that were trusted, none if none can be tried; an error is that of the
// first that was not trusted.
func (d *Doctor) tryLogins(p *postLogin) (trusted []string, err error) {
	// Another one each time, since the one before can be trusted still.
	four, six := [4]byte{192, 0, 2}, [16]byte{0x20, 0x01, 0x0d, 0xb8}
	four[3] = byte(rand.Uint32()) | 1                     // 0 is the network's
	binary.NativeEndian.PutUint32(six[4:], rand.Uint32()) // not the network of noClients
	binary.NativeEndian.PutUint64(six[8:], rand.Uint64())
	for _, addr := range []netip.Addr{netip.AddrFrom4(four), netip.AddrFrom16(six)} {
		if d.unusable[d.config.Trusted.For(addr)] || trust.Refuse(d.config, addr) != nil {
			continue
		}
		d.conn.SetTimeout(patience)
		set, err := d.conn.Set(d.config.Table, d.config.Trusted.For(addr))
		if err != nil {
			return nil, err
		}
		keys := trust.Keys(set, trust.Network(d.config, addr), d.config.Ports)
		if before, err := d.conn.Lookup(set, keys...); err != nil {
			return nil, err
		} else if len(before) > 0 {
			continue
		}
		// What an interrupted doctor leaves there expires by itself.
		answer := askPostLogin(p.socket, addr)
		d.conn.SetTimeout(patience)
		added, err := d.conn.Remove(set, keys, func(e nftset.Element) bool { return e.Timeout <= time.Minute })
		if err == nil && len(added) < len(keys) {
			err = errUntrusted
		}
		if err = cmp.Or(answer, err); err != nil {
			return nil, err
		}
		trusted = append(trusted, addr.String())
	}
	return trusted, nil
}

// askPostLogin asks a post-login service as a mail process does: see
// master_login_postlogin() of src/lib-master/master-login.c in Dovecot 2.3,
// login_server_postlogin() of src/lib-login/login-server.c in 2.4, and
// src/util/script-login.c of both. No mail process is started: the one that
// asks is that. script-login ends by sending the answer.
func askPostLogin(path string, remote netip.Addr) error {
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
	line := fmt.Sprintf("VERSION\tscript-login\t1\t0\n%s\t%s\t%s\tnftwl_timeout=1m\n", noClients[remote.Is6()], remote, loginUser)
	_ = conn.SetDeadline(time.Now().Add(maxLogin))
	if _, _, err := conn.(*net.UnixConn).WriteMsgUnix([]byte(line), unix.UnixRights(client[1]), nil); err != nil {
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
		return fmt.Errorf("not an answer: %.40q", answer[:n])
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
