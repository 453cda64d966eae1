package install

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
	"nftwl/pkg/doveconf"
)

// Policy plans what has Dovecot report authentications to nftwld: the key, the
// units and Dovecot's settings. It keeps an existing key and salt.
func Policy(o *Options) *Plan {
	policy := config.DefaultPolicy
	if o.Config.Policy != nil {
		policy = *o.Config.Policy
	}
	p := newPlan(o)
	old, _ := os.ReadFile(PolicySettings) // add reports an error
	key := p.addKey(policy.KeyFile, old)
	units := p.addDaemon(&policy)
	daemon := p.Files
	p.addSettings(policy.Listen, key, old)

	if o.Config.Policy == nil {
		p.Next = append(p.Next, "# Put this into "+config.Path+":", "#   policy: {}")
	}
	if o.Config.Failures == nil {
		p.Next = append(p.Next, "# To ban the addresses that guess passwords, put this into "+config.Path+":", "#   failures: {}")
	}
	if units {
		p.Next = append(p.Next, "systemctl daemon-reload && systemctl enable --now nftwld.socket nftwld")
	} else {
		p.Next = append(p.Next, "# Run nftwld, as root or with CAP_NET_ADMIN:", "nftwld")
	}
	p.Next = append(p.Next,
		"doveconf -n >/dev/null && doveadm reload",
		"nftwld status",
		"# Log in once with a mail client. Its address is then in the list:",
		"nftwl list",
	)

	p.Undo = []string{remove(p.Files[len(daemon):]), "doveadm reload"}
	if units {
		p.Undo = append(p.Undo, "systemctl disable --now nftwld.socket nftwld")
	}
	p.Undo = append(p.Undo, remove(daemon), "rm -rf /var/lib/nftwld /var/lib/private/nftwld")
	if dir := filepath.Dir(policy.KeyFile); !exists(dir) {
		p.Undo = append(p.Undo, "rmdir "+dir)
	}
	if units {
		p.Undo = append(p.Undo, "systemctl daemon-reload")
	}
	return p
}

// addSecret adds a file that root alone can read.
func (p *Plan) addSecret(path, text, shown string) {
	f := p.add(path, text)
	f.Shown, f.Mode = shown, 0o600
	if info, err := os.Stat(path); err == nil && info.Mode()&0o077 != 0 {
		p.note("%s has a key, and users other than root can read it: chmod 600 %s", path, path)
	}
}

// addKey adds the file of the key, and returns the key: that of the file, or else
// that of Dovecot's settings, or a new one.
func (p *Plan) addKey(path string, settings []byte) string {
	key, err := config.ReadKey(path)
	text, _ := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		key = cmp.Or(value(settings, apiHeader), random(32))
		text = []byte(key + "\n")
	case errors.Is(err, fs.ErrPermission): // add reports it
	case err != nil:
		p.problem("move it away", "%v", err)
	case !plain(key):
		p.problem("use a key of letters and digits", "the key in %s has a character that Dovecot would not read as it is", path)
	}
	if strings.ContainsAny(path, " :%#") {
		p.problem("use another path", "policy.key_file: systemd would not read %s as it is", path)
	}
	p.addSecret(path, string(text), "KEY\n")
	return key
}

// addDaemon adds nftwld's units, where systemd runs.
func (p *Plan) addDaemon(policy *config.Policy) (systemd bool) {
	if exists(nftwldPath) {
		p.needRoots(nftwldPath)
	} else {
		p.problem("install nftwld beside nftwl", "%s does not exist", nftwldPath)
	}
	if !exists(SystemdRuns) {
		p.note("systemd does not run here: keep nftwld running with a service of your own.")
		return false
	}
	p.checkReadable()
	p.addUnits([]string{"nftwld.service", "nftwld.socket"}, func(name string) string {
		return strings.NewReplacer(
			"policy.key:"+config.DefaultPolicy.KeyFile, "policy.key:"+policy.KeyFile,
			"ListenStream="+config.DefaultPolicy.Listen.String(), "ListenStream="+policy.Listen.String(),
		).Replace(shipped(name))
	})
	return true
}

// addSettings adds Dovecot's settings, with the key, and the salt that they have.
func (p *Plan) addSettings(listen netip.AddrPort, key string, old []byte) {
	p.needDir(dovecotDir, "Dovecot")
	version := "2.4"
	switch out, err := output("dovecot", "--version"); { // "2.4.1-4 (7d8c0e5759)"
	case err != nil:
		p.problem("", "setup cannot tell whether this is Dovecot 2.3 or 2.4: %v", err)
	case strings.HasPrefix(out, "2.3."):
		version = "2.3"
	case !strings.HasPrefix(out, "2.4."):
		p.problem("", "nftwl has settings for Dovecot 2.3 and 2.4, and none for %s", strings.TrimSpace(out))
	}
	its := value(old, apiHeader)
	key = cmp.Or(key, its) // addKey reports a key that cannot be read
	if its != "" && its != key {
		p.problem("put the same key into both, or move one of them away", "the key in %s is not the one in nftwld's file", PolicySettings)
	}
	salt := cmp.Or(value(old, "auth_policy_hash_nonce ="), random(16))
	text := strings.ReplaceAll(shipped("dovecot/91-nftwl-policy-"+version+".conf"), "http://"+config.DefaultPolicy.Listen.String()+"/", policyURL(listen))
	p.addSecret(PolicySettings, strings.NewReplacer("X-API-Key: KEY\n", "X-API-Key: "+key+"\n", "_nonce = SALT\n", "_nonce = "+salt+"\n").Replace(text), text)
	p.add(policyDropIn, shipped("dovecot/"+filepath.Base(policyDropIn)))

	if read, _ := Overriding(DovecotConf, policyDropIn); !read {
		p.note("%s does not include conf.d/*.conf: without that Dovecot does not read the drop-in.", DovecotConf)
	}
	out, _ := output("doveconf", doveconf.Arguments(doveconf.AuthPolicyNames...)...) // without settings, there is no other server
	if url := doveconf.Parse(out).AuthPolicy().URL; url != "" && url != policyURL(listen) {
		p.problem("remove the settings auth_policy_* from Dovecot's configuration, or do without nftwld",
			"Dovecot reports to another policy server, %s, and can have only one", url)
	}
	if exists(DropIn) {
		p.note("With %s, Dovecot also runs 'nftwl login'. Both work together, but one is enough: you can remove that file.", DropIn)
	}
}

// policyURL is the URL by which a Dovecot on this machine reaches an address.
func policyURL(listen netip.AddrPort) string {
	if listen.Addr().IsUnspecified() {
		host := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if listen.Addr().Is6() {
			host = netip.IPv6Loopback()
		}
		listen = netip.AddrPortFrom(host, listen.Port())
	}
	return "http://" + listen.String() + "/"
}

const apiHeader = "auth_policy_server_api_header = X-API-Key:"

// value is the word after a setting's name, or "".
func value(settings []byte, name string) string {
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindSubmatch(settings)
	if m == nil {
		return ""
	}
	return string(m[1])
}

// random returns n random bytes, up to 256, in hexadecimal. crypto/rand would make
// the start of every login longer.
func random(n int) string {
	b := make([]byte, n)
	if got, err := unix.Getrandom(b, 0); err != nil || got != n { // whole up to 256 bytes: getrandom(2)
		panic(fmt.Sprintf("getrandom: %d bytes, %v", got, err))
	}
	return hex.EncodeToString(b)
}

// plain reports whether Dovecot reads a value as it is, without quotes.
func plain(s string) bool {
	return strings.TrimSpace(s) == s && !strings.ContainsAny(s, "#\"'\\$%{}<\t\n")
}
