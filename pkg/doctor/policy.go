package doctor

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/doveconf"
	"nftwl/pkg/install"
)

// setupPolicy is a remedy for what nftwl setup makes.
var setupPolicy = remedy{"put nftwld's key, units and settings of Dovecot in place, and do what it prints then", "nftwl setup policy --write"}

// checkPolicy checks nftwld, where it is in use.
func (d *Doctor) checkPolicy(ctx context.Context) {
	var dovecot *doveconf.AuthPolicy
	if d.dovecot != nil {
		dovecot = d.dovecot.AuthPolicy()
	}
	policy := d.config.Policy
	switch {
	case policy != nil:
		down := d.checkPolicyService(ctx)
		d.checkPolicyKey(policy)
		if d.checkPolicyReports(ctx, policy, down) {
			d.checkPolicyDovecot(ctx, dovecot, policy)
		}
	case dovecot == nil || dovecot.URL == "" || !d.valid:
	case dovecot.Attributes["nftwl_trust"] != "": // as only nftwl's drop-in has it
		d.fail("policy.dovecot", remedy{words: "write policy: {} into " + d.configPath() + ", then: systemctl restart nftwld"},
			"Dovecot reports to %s as nftwld wants it, and the configuration has no policy", dovecot.URL)
	default:
		d.skip("policy.dovecot", "Dovecot reports to %s, and the configuration has no policy", dovecot.URL)
	}
}

// checkPolicyService tells whether a unit is known to be down.
func (d *Doctor) checkPolicyService(ctx context.Context) (down bool) {
	const check = "policy.service"
	if d.units == nil {
		d.skip(check, "%s", d.noUnits)
		return false
	}
	enable := remedy{"enable them", "systemctl enable --now nftwld.socket nftwld.service"}
	for _, u := range []unit{d.units["nftwld.socket"], d.units["nftwld.service"]} {
		state := u["ActiveState"]
		down := !slices.Contains([]string{"active", "activating", "reloading"}, state)
		switch {
		case u["LoadState"] == "not-found":
			d.fail(check, setupPolicy, "%s is not installed", u["Id"])
		case state == "failed":
			d.fail(check, remedy{"fix what it says, then: systemctl restart " + u["Id"], u.journal()}, "%s has failed: %s", u["Id"], u.why(ctx))
		case down:
			d.fail(check, enable, "%s is %s", u["Id"], state)
		case !u.startsAtBoot():
			d.fail(check, enable, "%s is not enabled: after a reboot nobody learns of logins", u["Id"])
		default:
			continue
		}
		return down
	}
	d.ok(check, "nftwld.socket and nftwld.service are enabled and active")
	return false
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
			d.fail(check, remedy{"let root alone read it: with the key, any program can have any address trusted or banned",
				fmt.Sprintf("chown root:root %s && chmod 600 %[1]s", quote(path))},
				"%s belongs to user %d, with mode %04o", path, info.Sys().(*syscall.Stat_t).Uid, info.Mode().Perm())
		default:
			continue
		}
		return
	}
	d.ok(check, "%s is root's", policy.KeyFile)
}

// checkPolicyReports asks nftwld what it has counted, and tells whether it
// answers. One that is down has been reported.
func (d *Doctor) checkPolicyReports(ctx context.Context, policy *config.Policy, down bool) bool {
	const check = "policy.reports"
	status, body, err := request(ctx, policy.Listen.String(), "GET /metrics HTTP/1.0\r\n\r\n")
	if err != nil && down {
		return false
	}
	if err != nil {
		d.fail(check, remedy{"start it, or see why it does not answer", "systemctl restart nftwld.socket nftwld.service"}, "nftwld does not answer on %s: %v", policy.Listen, err)
		return false
	}
	metrics := make(map[string]float64)
	for line := range strings.Lines(string(body)) {
		name, text, _ := strings.Cut(strings.TrimSpace(line), " ")
		value, _ := strconv.ParseFloat(text, 64) // a comment has none
		if strings.HasPrefix(name, "nftwl_reports_total{") {
			name = "reports"
		}
		metrics[name] += value
	}
	start, reports := metrics["nftwl_start_timestamp_seconds"], metrics["reports"]
	wrong, other := metrics[`nftwl_refused_total{reason="key"}`], metrics[`nftwl_refused_total{reason="request"}`]
	started := time.Unix(int64(start), 0)
	look := remedy{"see who sends them, and what is wrong with them", "journalctl -u nftwld"}
	switch {
	case status != 200 || start == 0:
		d.fail(check, remedy{"see which program listens there", fmt.Sprintf("ss -ltnp sport = :%d", policy.Listen.Port())},
			"what answers on %s is not nftwld, or another version of it (status %d)", policy.Listen, status)
		return false
	case wrong > 0:
		d.warn(check, look, "nftwld has refused %.0f requests with a wrong key since it started %s ago", wrong, ago(started))
	case other > 0:
		d.warn(check, look, "nftwld has refused %.0f requests that it does not understand since it started %s ago", other, ago(started))
	case reports > 0:
		d.ok(check, "%.0f reports since nftwld started %s ago", reports, ago(started))
	case time.Since(started) < time.Minute:
		d.skip(check, "nftwld started %s ago, and has had no report yet", ago(started))
	default:
		d.warn(check, remedy{"log in once; if that changes nothing, see what Dovecot says", "doveadm log errors"},
			"no report has arrived since nftwld started %s ago", ago(started))
	}
	return true
}

// checkPolicyDovecot asks nftwld as Dovecot would: whether nobody may log in,
// who may. It is no report.
func (d *Doctor) checkPolicyDovecot(ctx context.Context, dovecot *doveconf.AuthPolicy, policy *config.Policy) {
	const check = "policy.dovecot"
	if dovecot == nil {
		d.skip(check, "%s", d.unread)
		return
	}
	attributes := reload("take auth_policy_request_attributes of the drop-in that nftwl setup policy prints")
	lacks := ""
	for _, name := range []string{"login", "pwhash", "remote", "protocol", "local", "mech", "proxy", "nftwl_trust", "nftwl_timeout"} {
		if dovecot.Attributes[name] == "" {
			lacks += " " + name
		}
	}
	key, err := os.ReadFile(policy.KeyFile)
	if err != nil {
		return // policy.key says so
	}
	name, value, _ := strings.Cut(dovecot.Header, ":")
	sameKey := strings.EqualFold(strings.TrimSpace(name), "X-API-Key") && strings.TrimSpace(value) == strings.TrimSpace(string(key))
	where := reload("set auth_policy_server_url = http://%s/", policy.Listen)
	u, err := url.Parse(dovecot.URL)
	for _, c := range []struct {
		wrong  bool
		remedy remedy
		text   string
	}{
		{dovecot.URL == "", setupPolicy, "Dovecot reports no logins: auth_policy_server_url is not set"},
		{dovecot.Nonce == "", reload("set auth_policy_hash_nonce to a word of your own"), "auth_policy_hash_nonce is not set, which Dovecot needs to hash passwords"},
		{!dovecot.Report, reload("set auth_policy_report_after_auth = yes"), "Dovecot reports no logins: auth_policy_report_after_auth is no"},
		{dovecot.Attributes["login"] == "" || dovecot.Attributes["pwhash"] == "" || dovecot.Attributes["remote"] == "", attributes, "Dovecot's reports lack" + lacks},
		{err != nil || u.Scheme != "http", where, "Dovecot reports to " + dovecot.URL + ", and nftwld speaks HTTP without TLS"},
		{!sameKey, reload("set auth_policy_server_api_header = X-API-Key: and the key in %s", policy.KeyFile), "Dovecot's reports have another key than " + policy.KeyFile},
	} {
		if c.wrong {
			d.fail(check, c.remedy, "%s", c.text)
			return
		}
	}
	status, _, err := request(ctx, net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "80")),
		fmt.Sprintf("POST %s/?command=allow HTTP/1.0\r\n%s\r\nContent-Length: 2\r\n\r\n{}", strings.TrimSuffix(u.Path, "/"), dovecot.Header))
	switch {
	case err != nil:
		d.fail(check, where, "Dovecot reports to %s, where nobody answers: %v", dovecot.URL, err)
	case status == 401:
		d.fail(check, remedy{"have nftwld read it", "systemctl restart nftwld"}, "nftwld refuses the key in %s", policy.KeyFile)
	case status != 200:
		d.fail(check, where, "Dovecot reports to %s, where nftwld takes none (status %d)", dovecot.URL, status)
	case lacks != "":
		d.warn(check, attributes, "Dovecot's reports lack%s", lacks)
	case dovecot.Check && d.dovecot.Values["haproxy_trusted_networks"] == "":
		d.warn(check, reload("set auth_policy_check_before_auth = no and auth_policy_check_after_auth = no"),
			"each login waits for nftwld's answer, which only a proxy with the PROXY protocol is a reason for")
	default:
		d.ok(check, "nftwld takes what Dovecot reports to %s", dovecot.URL)
	}
}

// request sends a request of HTTP/1.0 and returns the status and the body of
// the answer. It is written by hand because net/http does not belong in the
// program that each login starts.
func request(ctx context.Context, address, text string) (status int, body []byte, err error) {
	dialer := net.Dialer{Timeout: patience}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return 0, nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, text); err != nil {
		return 0, nil, err
	}
	const most = 1 << 20 // bytes, more than nftwld's metrics ever have
	answer, err := io.ReadAll(io.LimitReader(conn, most))
	if err != nil {
		return 0, nil, err
	}
	head, body, _ := bytes.Cut(answer, []byte("\r\n\r\n"))
	var minor int
	if _, err := fmt.Sscanf(string(head), "HTTP/1.%d %d", &minor, &status); err != nil {
		return 0, nil, errors.New("not an answer of HTTP")
	}
	return status, body, nil
}
