package doctor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"nftwl/pkg/config"
	"nftwl/pkg/doveconf"
)

// setupPolicy is a remedy for what nftwl setup makes.
var setupPolicy = remedy{"put nftwld's key, units and settings of Dovecot in place, and do what it prints then", "nftwl setup policy --write"}

// policySettings is where setup puts the settings of Dovecot that have the key.
const policySettings = "/etc/dovecot/conf.d/91-nftwl-policy.conf.ext"

// ours are the attributes that only nftwl's drop-in has.
var ours = []string{"local", "mech", "proxy", "nftwl_trust", "nftwl_timeout"}

// checkPolicy checks nftwld, where it is in use.
func (d *Doctor) checkPolicy(ctx context.Context) {
	var dovecot *doveconf.AuthPolicy
	if d.dovecot != nil {
		dovecot = d.dovecot.AuthPolicy()
	}
	policy := d.config.Policy
	if policy == nil {
		switch {
		case dovecot == nil || dovecot.URL == "" || !d.valid:
		case dovecot.Attributes["nftwl_trust"] != "":
			d.fail("policy.dovecot", remedy{words: "write policy: {} into " + config.Path + ", then: systemctl restart nftwld"},
				"Dovecot reports to %s as nftwld wants it, and the configuration has no policy", dovecot.URL)
		default:
			d.skip("policy.dovecot", "Dovecot reports to %s, and the configuration has no policy", dovecot.URL)
		}
		return
	}
	d.checkPolicyService(ctx)
	metrics := d.checkPolicyReached(ctx, policy)
	d.checkPolicyDovecot(dovecot, policy)
	d.checkPolicyKey(ctx, dovecot, policy, metrics != nil)
	if metrics != nil {
		d.checkPolicyReports(metrics)
		d.checkPolicyPostfix(ctx, metrics)
	}
}

func (d *Doctor) checkPolicyService(ctx context.Context) {
	const check = "policy.service"
	program := systemctl()
	if program == "" {
		d.skip(check, "systemd does not run here")
		return
	}
	units, err := show(ctx, program, "nftwld.socket", "nftwld.service")
	if err != nil {
		d.skip(check, "%v", err)
		return
	}
	enable := remedy{"enable them", "systemctl enable --now nftwld.socket nftwld.service"}
	for _, u := range units {
		switch state := u["ActiveState"]; {
		case u["LoadState"] == "not-found":
			d.fail(check, setupPolicy, "%s is not installed", u["Id"])
		case u["LoadState"] != "loaded":
			d.fail(check, remedy{"take the unit as it was shipped", "systemctl status " + u["Id"]}, "%s is %s", u["Id"], u["LoadState"])
		case state == "failed":
			d.fail(check, remedy{"fix what it says, then: systemctl restart " + u["Id"], u.journal()}, "%s has failed: %s", u["Id"], u.why(ctx))
		case state != "active" && state != "activating" && state != "reloading":
			d.fail(check, enable, "%s is %s", u["Id"], state)
		case !u.startsAtBoot():
			d.fail(check, enable, "%s is not enabled: after a reboot nobody learns of logins", u["Id"])
		case u["NeedDaemonReload"] == "yes":
			d.warn(check, reloadUnits, "%s has another file than systemd has read", u["Id"])
		default:
			continue
		}
		return
	}
	d.ok(check, "nftwld.socket and nftwld.service are enabled and active")
}

// checkPolicyReached returns nftwld's metrics, nil if it does not answer.
func (d *Doctor) checkPolicyReached(ctx context.Context, policy *config.Policy) metrics {
	const check = "policy.reached"
	start := remedy{"start it, or see why it does not answer", "systemctl restart nftwld.socket nftwld.service"}
	status, body, err := request(ctx, policy.Listen, "GET /metrics HTTP/1.0\r\n\r\n")
	if err != nil {
		d.fail(check, start, "nftwld does not answer on %s: %v", policy.Listen, err)
		return nil
	}
	m := parseMetrics(body)
	if status != 200 || m["nftwl_start_timestamp_seconds"] == 0 {
		d.fail(check, remedy{"see which program listens there", fmt.Sprintf("ss -ltnp sport = :%d", policy.Listen.Port())},
			"what answers on %s is not nftwld, or another version of it (status %d)", policy.Listen, status)
		return nil
	}
	d.ok(check, "nftwld answers on %s", policy.Listen)
	return m
}

func (d *Doctor) checkPolicyDovecot(dovecot *doveconf.AuthPolicy, policy *config.Policy) {
	const check = "policy.dovecot"
	if dovecot == nil {
		d.skip(check, "%s", d.unread)
		return
	}
	var missing, useful []string
	for _, name := range []string{"login", "pwhash", "remote", "protocol"} {
		if dovecot.Attributes[name] == "" {
			missing = append(missing, name)
		}
	}
	for _, name := range ours {
		if dovecot.Attributes[name] == "" {
			useful = append(useful, name)
		}
	}
	attributes := reload("take auth_policy_request_attributes of the drop-in that nftwl setup policy prints")
	switch {
	case dovecot.URL == "":
		d.fail(check, setupPolicy, "Dovecot reports no logins: auth_policy_server_url is not set")
	case !leadsTo(dovecot.URL, policy.Listen):
		d.fail(check, reload("set auth_policy_server_url = http://%s/", policy.Listen),
			"Dovecot reports to %s, and nftwld listens on %s", dovecot.URL, policy.Listen)
	case dovecot.Nonce == "":
		d.fail(check, reload("set auth_policy_hash_nonce to a word of your own"), "auth_policy_hash_nonce is not set, which Dovecot needs to hash passwords")
	case !dovecot.Report:
		d.fail(check, reload("set auth_policy_report_after_auth = yes"), "Dovecot reports no logins: auth_policy_report_after_auth is no")
	case missing != nil:
		d.fail(check, attributes, "Dovecot's reports lack %s", strings.Join(missing, ", "))
	case useful != nil:
		d.warn(check, attributes, "Dovecot's reports lack %s", strings.Join(useful, ", "))
	case dovecot.Check && d.dovecot.Values["haproxy_trusted_networks"] == "":
		d.warn(check, reload("set auth_policy_check_before_auth = no and auth_policy_check_after_auth = no"),
			"each login waits for nftwld's answer, which only a proxy with the PROXY protocol is a reason for")
	default:
		d.ok(check, "Dovecot reports each login to %s", dovecot.URL)
	}
}

// leadsTo tells whether a URL is of what listens there: of the path that
// nftwld serves, without TLS.
func leadsTo(url string, listen netip.AddrPort) bool {
	rest, ok := strings.CutPrefix(url, "http://")
	address, path, _ := strings.Cut(rest, "/")
	address, _, _ = strings.Cut(address, "?")
	if !ok || path != "" && path[0] != '?' {
		return false
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil { // no port
		host, port = strings.Trim(address, "[]"), "80"
	}
	if port != strconv.Itoa(int(listen.Port())) {
		return false
	}
	addr, err := netip.ParseAddr(host)
	return listen.Addr().IsUnspecified() || err == nil && addr == listen.Addr() || host == "localhost" && listen.Addr().IsLoopback()
}

// checkPolicyKey follows the key, without a word of it: from the file to
// nftwld, which answers, and to Dovecot.
func (d *Doctor) checkPolicyKey(ctx context.Context, dovecot *doveconf.AuthPolicy, policy *config.Policy, answers bool) {
	const check = "policy.key"
	if os.Geteuid() != 0 {
		d.skip(check, "only root can read the key")
		return
	}
	b, err := os.ReadFile(policy.KeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		d.fail(check, setupPolicy, "%v", err)
		return
	}
	if err != nil {
		d.fail(check, remedy{words: "see who moves or replaces it"}, "%v", err)
		return
	}
	for _, path := range []string{policy.KeyFile, policySettings} {
		info, err := os.Stat(path)
		if err != nil { // the settings may be in another file
			continue
		}
		if owner := info.Sys().(*syscall.Stat_t).Uid; owner != 0 || info.Mode().Perm()&0o077 != 0 {
			d.fail(check, remedy{"let root alone read it: with the key, any program can have any address trusted or banned",
				fmt.Sprintf("chown root:root %s && chmod 600 %[1]s", quote(path))}, "%s belongs to user %d, with mode %04o", path, owner, info.Mode().Perm())
			return
		}
	}
	key := strings.TrimSpace(string(b))
	if dovecot != nil && dovecot.URL != "" {
		name, value, _ := strings.Cut(dovecot.Header, ":")
		if !strings.EqualFold(strings.TrimSpace(name), "X-API-Key") || strings.TrimSpace(value) != key || key == "" {
			d.fail(check, reload("set auth_policy_server_api_header = X-API-Key: and the key in %s", policy.KeyFile),
				"Dovecot's reports have another key than %s", policy.KeyFile)
			return
		}
	}
	if !answers {
		d.skip(check, "%s is root's, and nftwld does not answer", policy.KeyFile)
		return
	}
	// It asks whether nobody may log in, who may.
	status, _, err := request(ctx, policy.Listen, "POST /?command=allow HTTP/1.0\r\nX-API-Key: "+key+"\r\nContent-Length: 2\r\n\r\n{}")
	switch {
	case err != nil:
		d.fail(check, remedy{"see why", "journalctl -u nftwld"}, "nftwld does not answer: %v", err)
	case status != 200:
		d.fail(check, remedy{"have nftwld read it", "systemctl restart nftwld"}, "nftwld refuses the key in %s (status %d)", policy.KeyFile, status)
	default:
		d.ok(check, "nftwld takes the key in %s", policy.KeyFile)
	}
}

func (d *Doctor) checkPolicyReports(m metrics) {
	const check = "policy.reports"
	started := time.Unix(int64(m["nftwl_start_timestamp_seconds"]), 0)
	look := remedy{"see who sends them, and what is wrong with them", "journalctl -u nftwld"}
	reports := m.sum("nftwl_reports_total{", "")
	switch wrong, other := m[`nftwl_refused_total{reason="key"}`], m[`nftwl_refused_total{reason="request"}`]; {
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
}

// checkPolicyPostfix tells whether submission by Postfix is known to nftwld.
func (d *Doctor) checkPolicyPostfix(ctx context.Context, m metrics) {
	const check = "policy.postfix"
	postconf := find("postconf")
	if postconf == "" {
		d.skip(check, "Postfix is not installed here")
		return
	}
	main, err := output(ctx, postconf, "-h", "smtpd_sasl_type")
	if err != nil {
		d.skip(check, "%v", err)
		return
	}
	services, _ := output(ctx, postconf, "-P") // none has it without an answer
	reports := m.sum("nftwl_reports_total{", `protocol="smtp"`)
	switch {
	case strings.TrimSpace(string(main)) != "dovecot" && !bytes.Contains(services, []byte("smtpd_sasl_type = dovecot\n")):
		d.skip(check, "Postfix does not ask Dovecot (smtpd_sasl_type), so nftwld does not learn who submits")
	case reports == 0:
		d.skip(check, "nobody has logged in to Postfix since nftwld started")
	default:
		d.ok(check, "%.0f reports of logins to Postfix", reports)
	}
}

// metrics are nftwld's, by name and labels as they are written.
type metrics map[string]float64

// sum adds up those that begin so and have a label.
func (m metrics) sum(prefix, label string) (total float64) {
	for name, value := range m {
		if strings.HasPrefix(name, prefix) && strings.Contains(name, label) {
			total += value
		}
	}
	return total
}

// parseMetrics reads the text format of Prometheus, as far as nftwld uses it.
func parseMetrics(text []byte) metrics {
	m := make(metrics)
	for line := range strings.Lines(string(text)) {
		i := strings.LastIndexByte(line, ' ')
		if value, err := strconv.ParseFloat(strings.TrimSpace(line[i+1:]), 64); err == nil && i > 0 && line[0] != '#' {
			m[line[:i]] = value
		}
	}
	return m
}

// request sends a request of HTTP/1.0 and returns the status and the body of
// the answer. It is written by hand because net/http does not belong in the
// program that each login starts.
func request(ctx context.Context, to netip.AddrPort, text string) (status int, body []byte, err error) {
	if a := to.Addr(); a.IsUnspecified() {
		to = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), to.Port())
		if a.Is6() {
			to = netip.AddrPortFrom(netip.IPv6Loopback(), to.Port())
		}
	}
	dialer := net.Dialer{Timeout: patience}
	conn, err := dialer.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return 0, nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, text); err != nil {
		return 0, nil, err
	}
	r := bufio.NewReader(io.LimitReader(conn, maxAnswer))
	line, err := r.ReadString('\n')
	if err != nil {
		return 0, nil, err
	}
	if words := strings.Fields(line); len(words) > 1 && strings.HasPrefix(words[0], "HTTP/") {
		status, _ = strconv.Atoi(words[1]) // 0 is no status
	}
	all, err := io.ReadAll(r)
	_, body, _ = bytes.Cut(all, []byte("\r\n\r\n"))
	return status, body, err
}

// maxAnswer is more than nftwld's metrics ever have, in bytes.
const maxAnswer = 1 << 20
