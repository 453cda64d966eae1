package doctor

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/doveconf"
	"nftwl/pkg/install"
)

// setupPolicy is a remedy for what nftwl setup makes.
var setupPolicy = remedy{"put nftwld's key, units and settings of Dovecot in place, and do what it prints then", "nftwl setup policy --write"}

// checkPolicy checks nftwld, if it is in use.
func (d *Doctor) checkPolicy(ctx context.Context) {
	var dovecot *doveconf.AuthPolicy
	if d.dovecot != nil {
		dovecot = d.dovecot.AuthPolicy()
	}
	switch {
	case d.config.Policy != nil:
		d.checkPolicyService(ctx)
		d.checkPolicyKey(d.config.Policy)
		d.checkPolicyDovecot(ctx, dovecot, d.config.Policy)
	case d.valid && dovecot != nil && dovecot.Attributes["nftwl_trust"] != "": // as only nftwl's drop-in has it
		d.fail("policy.dovecot", remedy{words: "write policy: {} into " + d.configPath() + ", then: systemctl restart nftwld"},
			"Dovecot reports to %s as nftwld wants it, and the configuration has no policy", dovecot.URL)
	}
}

func (d *Doctor) checkPolicyService(ctx context.Context) {
	const check = "policy.service"
	if d.units == nil {
		d.skip(check, "%s", d.noUnits)
		return
	}
	enable := remedy{"enable them", "systemctl enable --now nftwld.socket nftwld.service"}
	for _, u := range []unit{d.units["nftwld.socket"], d.units["nftwld.service"]} {
		state := u["ActiveState"]
		switch {
		case u["LoadState"] == "not-found":
			d.fail(check, setupPolicy, "%s is not installed", u["Id"])
		case state == "failed":
			d.fail(check, remedy{"fix what it says, then: systemctl restart " + u["Id"], u.journal()}, "%s has failed: %s", u["Id"], u.why(ctx))
		case !slices.Contains([]string{"active", "activating", "reloading"}, state):
			d.fail(check, enable, "%s is %s", u["Id"], state)
		case !u.startsAtBoot():
			d.fail(check, enable, "%s is not enabled: after a reboot nobody learns of logins", u["Id"])
		default:
			continue
		}
		return
	}
	d.ok(check, "nftwld.socket and nftwld.service are enabled and active")
}

// checkPolicyKey checks that nobody but root can read the key.
func (d *Doctor) checkPolicyKey(policy *config.Policy) {
	const check = "policy.key"
	for _, path := range []string{policy.KeyFile, install.PolicySettings} {
		info, err := os.Stat(path)
		switch {
		case err != nil && path == policy.KeyFile:
			d.fail(check, setupPolicy, "%v", err)
		case err != nil: // the settings may be in another file
			continue
		case info.Sys().(*syscall.Stat_t).Uid != 0 || info.Mode().Perm()&0o077 != 0:
			d.fail(check, remedy{"let only root read it: with the key, any program can have any address trusted or banned",
				fmt.Sprintf("chown root:root %s && chmod 600 %[1]s", quote(path))},
				"%s belongs to user %d, with mode %04o", path, info.Sys().(*syscall.Stat_t).Uid, info.Mode().Perm())
		default:
			continue
		}
		return
	}
	d.ok(check, "%s is root's", policy.KeyFile)
}

// checkPolicyDovecot checks that Dovecot reports logins, and asks nftwld as Dovecot
// would, with its key, whether a login without a name is allowed. That is no report.
func (d *Doctor) checkPolicyDovecot(ctx context.Context, dovecot *doveconf.AuthPolicy, policy *config.Policy) {
	const check = "policy.dovecot"
	if dovecot == nil {
		d.skip(check, "Dovecot's settings cannot be read")
		return
	}
	lacks := ""
	for _, name := range []string{"login", "pwhash", "remote", "protocol", "local", "mech", "proxy", "nftwl_trust", "nftwl_timeout"} {
		if dovecot.Attributes[name] == "" {
			lacks += " " + name
		}
	}
	u, err := url.Parse(dovecot.URL)
	where := reload("set auth_policy_server_url = http://%s/", policy.Listen)
	switch {
	case dovecot.URL == "":
		d.fail(check, setupPolicy, "Dovecot reports no logins: auth_policy_server_url is not set")
		return
	case !dovecot.Report || dovecot.Nonce == "":
		d.fail(check, reload("set auth_policy_report_after_auth = yes, and auth_policy_hash_nonce to a word of your own"),
			"Dovecot reports no logins: auth_policy_report_after_auth is no, or auth_policy_hash_nonce is not set")
		return
	case err != nil || u.Scheme != "http":
		d.fail(check, where, "Dovecot reports to %s, and nftwld speaks HTTP without TLS", dovecot.URL)
		return
	}
	status, err := ask(ctx, u, dovecot.Header)
	switch {
	case err != nil && d.units != nil && d.units["nftwld.socket"]["ActiveState"] != "active": // policy.service reports it
	case err != nil:
		d.fail(check, where, "Dovecot reports to %s, where nobody answers; nftwld listens on %s: %v", dovecot.URL, policy.Listen, err)
	case status == 401:
		d.fail(check, remedy{"set auth_policy_server_api_header = X-API-Key: and the key in " + policy.KeyFile + ", and have both programs read it", "systemctl restart nftwld && doveadm reload"},
			"nftwld refuses the key of Dovecot's reports")
	case status != 200:
		d.fail(check, where, "Dovecot reports to %s, where nftwld takes none (status %d)", dovecot.URL, status)
	case lacks != "":
		d.fail(check, reload("take auth_policy_request_attributes of the drop-in that nftwl setup policy prints"), "Dovecot's reports lack%s", lacks)
	case dovecot.Check && d.dovecot.Values["haproxy_trusted_networks"] == "":
		d.warn(check, reload("set auth_policy_check_before_auth = no and auth_policy_check_after_auth = no"),
			"each login waits for nftwld's answer, which only a proxy with the PROXY protocol is a reason for")
	default:
		d.ok(check, "nftwld takes what Dovecot reports to %s", dovecot.URL)
	}
}

// ask sends a policy server the question whether a login without a name is allowed, and
// returns the status of the answer.
func ask(ctx context.Context, u *url.URL, header string) (status int, err error) {
	status, _, err = exchange(ctx, net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "80")),
		fmt.Sprintf("POST %s/?command=allow HTTP/1.0\r\n%s\r\nContent-Length: 2\r\n\r\n{}", strings.TrimSuffix(u.Path, "/"), header))
	return status, err
}

// exchange sends a request, and returns the status and the text of the answer. It is
// HTTP by hand, because net/http does not belong in the program that each login
// starts.
func exchange(ctx context.Context, address, request string) (status int, text string, err error) {
	dialer := net.Dialer{Timeout: patience}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return 0, "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, request); err != nil {
		return 0, "", err
	}
	const most = 1 << 20 // bytes, which is more than nftwld's metrics
	answer, err := io.ReadAll(io.LimitReader(conn, most))
	if err != nil {
		return 0, "", err
	}
	head, text, _ := strings.Cut(string(answer), "\r\n\r\n")
	var minor int
	if _, err := fmt.Sscanf(head, "HTTP/1.%d %d", &minor, &status); err != nil {
		return 0, "", fmt.Errorf("not an answer of HTTP: %.40q", head)
	}
	return status, text, nil
}
