package main

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nstest"
)

const (
	keyFile  = "/etc/nftwl/policy.key"
	policy   = "/etc/dovecot/conf.d/91-nftwl-policy.conf"
	settings = policy + ".ext"
	unit     = "/etc/systemd/system/nftwld.service"
	socket   = "/etc/systemd/system/nftwld.socket"
)

var policyFiles = []string{policy, settings, keyFile, unit, socket}

// newPolicyHost returns a host with nftwld, and with a Dovecot that reads conf.d.
func newPolicyHost(t *testing.T) *host {
	t.Helper()
	nstest.Need(t, "doveconf", "dovecot-core")
	nstest.Build(t, "cmd/nftwld")
	h := newHost(t)
	conf := "ssl = no\n!include conf.d/*.conf\n"
	if h.is24() {
		conf = "dovecot_config_version = 2.4.0\ndovecot_storage_version = 2.4.0\n" + conf
	}
	h.write("/etc/dovecot/dovecot.conf", conf)
	h.write("/etc/dovecot/conf.d/10-mail.conf", "") // because an include that matches no file is an error
	return h
}

func (h *host) is24() bool { return strings.HasPrefix(h.run("dovecot", "--version"), "2.4.") }

// shipped returns contrib's settings for the installed Dovecot.
func (h *host) shipped() string {
	version := "2.3"
	if h.is24() {
		version = "2.4"
	}
	return h.read(filepath.Join(nstest.Root(h.T), "contrib/dovecot/91-nftwl-policy-"+version+".conf"))
}

func (h *host) mode(path string) os.FileMode {
	h.Helper()
	info, err := os.Stat(path)
	h.must(err)
	return info.Mode()
}

func TestSetupPolicy(t *testing.T) {
	nstest.NeedUsers(t)
	h := newPolicyHost(t)
	before := h.tree()
	contrib := filepath.Join(nstest.Root(t), "contrib")
	plan := h.setup("policy")
	if strings.Contains(plan, problems) || strings.Contains(plan, "does not include") || !strings.Contains(plan, "\nKEY and SALT stand for secrets") {
		t.Errorf("a false alarm, or no word on the secrets:\n%s", plan)
	}
	want := map[string]string{
		keyFile: "KEY\n", settings: h.shipped(),
		policy: h.read(contrib + "/dovecot/91-nftwl-policy.conf"),
		unit:   h.read(contrib + "/systemd/nftwld.service"), socket: h.read(contrib + "/systemd/nftwld.socket"),
	}
	if got := parsePlan(plan); !maps.Equal(got, want) {
		t.Errorf("it prints\n%s", plan)
	}
	for _, words := range []string{"policy: {}", "failures: {}", "systemctl enable --now nftwld.socket nftwld", "doveadm reload", "nftwld status", "nftwl list"} {
		if !strings.Contains(plan, words) {
			t.Errorf("no %q in\n%s", words, plan)
		}
	}
	h.same(before)

	out := h.run("/bin/sh", "-c", "umask 0; exec nftwl setup policy --write")
	key, ok := strings.CutSuffix(h.read(keyFile), "\n")
	if !ok || !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(key) {
		t.Errorf("the key is %q", key)
	}
	salt := regexp.MustCompile(`(?m)^auth_policy_hash_nonce = ([0-9a-f]{32})$`).FindStringSubmatch(h.read(settings))
	if salt == nil {
		t.Fatalf("no salt in\n%s", h.read(settings))
	}
	fill := strings.NewReplacer("X-API-Key: KEY", "X-API-Key: "+key, "nonce = SALT", "nonce = "+salt[1])
	for path, text := range want {
		mode := os.FileMode(0o644)
		switch path {
		case keyFile:
			text, mode = key+"\n", 0o600
		case settings:
			text, mode = fill.Replace(text), 0o600
		}
		if h.read(path) != text || h.mode(path) != mode {
			t.Errorf("%s has mode %v:\n%s", path, h.mode(path), h.read(path))
		}
	}
	// root can read the settings, and other users can still read the rest.
	if text := h.run("doveconf", "-nP"); !strings.Contains(text, "server_api_header = X-API-Key: "+key) || !strings.Contains(text, salt[1]) {
		t.Errorf("doveconf:\n%s", text)
	}
	user := []string{"--reuid=1000", "--regid=1000", "--clear-groups", "doveconf", "-n"}
	if text := h.run("setpriv", user...); strings.Contains(text, key) || !strings.Contains(text, "ssl = no") {
		t.Errorf("doveconf of a user:\n%s", text)
	}

	written := h.tree()
	again := h.setup("policy", "--write")
	if strings.Contains(again, "written: ") || !strings.Contains(again, "there already, and the same: 5\n") {
		t.Errorf("the second time:\n%s", again)
	}
	for _, out := range []string{out, again, h.setup("policy")} {
		if strings.Contains(out, key) || strings.Contains(out, salt[1]) {
			t.Errorf("it prints secrets:\n%s", out)
		}
	}
	h.same(written)

	_, undo, _ := strings.Cut(out, "\nTo undo it:\n")
	h.try(nil, "/bin/sh", "-c", undo)
	h.same(before)
}

// Existing files stay, and setup uses them.
func TestSetupPolicyKeeps(t *testing.T) {
	const mine = "0123456789abcdef"
	put := func(h *host, path, text string) {
		h.write(path, text)
		h.must(os.Chmod(path, 0o600))
	}
	t.Run("key", func(t *testing.T) {
		h := newPolicyHost(t)
		put(h, keyFile, mine)
		h.setup("policy", "--write")
		if h.read(keyFile) != mine || !strings.Contains(h.read(settings), "X-API-Key: "+mine+"\n") {
			t.Errorf("the key is %s, and the settings are\n%s", h.read(keyFile), h.read(settings))
		}
	})
	t.Run("settings", func(t *testing.T) {
		h := newPolicyHost(t)
		text := strings.NewReplacer("X-API-Key: KEY", "X-API-Key: "+mine, "nonce = SALT", "nonce = pepper").Replace(h.shipped())
		put(h, settings, text)
		h.setup("policy", "--write")
		if h.read(keyFile) != mine+"\n" || h.read(settings) != text {
			t.Errorf("the key is %s, and the settings are\n%s", h.read(keyFile), h.read(settings))
		}
		h.must(os.WriteFile(keyFile, []byte("0123456789ABCDEF\n"), 0o600))
		h.refuses(1, []string{"the key in " + settings + " "}, "policy", "--write")
	})
	t.Run("open to others", func(t *testing.T) {
		h := newPolicyHost(t)
		h.write(keyFile, mine)
		if out := h.setup("policy", "--write"); !strings.Contains(out, "chmod 600 "+keyFile) {
			t.Error(out)
		}
	})
	for name, c := range map[string]struct{ path, text, says string }{
		"no key":                {keyFile, "", keyFile + " must hold one word"},
		"no key for Dovecot":    {keyFile, "#123456789abcdef", "the key in " + keyFile + " "},
		"other settings":        {settings, "", settings + " "},
		"another policy server": {"/etc/dovecot/conf.d/99.conf", "auth_policy_server_url = http://192.0.2.1/\nauth_policy_hash_nonce = x\n", "http://192.0.2.1/"},
		"another socket":        {socket, "[Socket]\n", socket + " "},
	} {
		t.Run(name, func(t *testing.T) {
			h := newPolicyHost(t)
			put(h, c.path, c.text)
			h.refuses(1, []string{c.says}, "policy", "--write")
			if out := h.setup("policy"); !strings.Contains(out, c.says) || len(parsePlan(out)) != 5 {
				t.Errorf("without --write:\n%s", out)
			}
		})
	}
	t.Run("as a user", func(t *testing.T) {
		nstest.NeedUsers(t)
		h := newPolicyHost(t)
		h.setup("policy", "--write")
		cmd := exec.Command("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "/usr/bin/nftwl", "setup", "policy")
		cmd.Env = []string{hostPath}
		if stdout, stderr, code := output(t, cmd); code != 0 || stderr != "" || len(parsePlan(stdout)) != 5 || !strings.Contains(stdout, "as root") {
			t.Errorf("exit %d: %s%s", code, stderr, stdout)
		}
		// The settings are right, although the key in them cannot be compared.
		h.must(os.Chmod(settings, 0o644))
		cmd = exec.Command(cmd.Path, cmd.Args[1:]...)
		cmd.Env = []string{hostPath}
		if stdout, stderr, code := output(t, cmd); code != 0 || strings.Contains(stdout, "the key in "+settings) || strings.Contains(stdout, settings+" exists") {
			t.Errorf("exit %d: %s%s", code, stderr, stdout)
		}
	})
}

// With another address, key and configuration, with a package's units, and without
// systemd.
func TestSetupPolicyFollows(t *testing.T) {
	for listen, url := range map[string]string{
		"172.17.0.1:8086": "http://172.17.0.1:8086/", "0.0.0.0:8086": "http://127.0.0.1:8086/", `"[::]:8086"`: "http://[::1]:8086/",
	} {
		t.Run(url, func(t *testing.T) {
			h := newPolicyHost(t)
			h.write("/etc/nftwl.yaml", fmt.Sprintf("policy: {listen: %s, key_file: /etc/mail/key}\nfailures: {}\n", listen))
			h.write("/etc/dovecot/conf.d/90-nftwl.conf", "")
			out := h.setup("policy", "--write")
			if strings.Contains(out, "policy: {}") || strings.Contains(out, "failures: {}") || !strings.Contains(out, "/90-nftwl.conf, ") {
				t.Errorf("it says\n%s", out)
			}
			for path, words := range map[string]string{
				settings: "\nauth_policy_server_url = " + url + "\n", socket: "\nListenStream=" + strings.Trim(listen, `"`) + "\n",
				unit: "\nLoadCredential=policy.key:/etc/mail/key\n", "/etc/mail/key": "",
			} {
				if !strings.Contains(h.read(path), words) {
					t.Errorf("%q is not in %s:\n%s", words, path, h.read(path))
				}
			}
		})
	}
	t.Run("no nftwld", func(t *testing.T) {
		h := newPolicyHost(t)
		program := h.read("/usr/bin/nftwl")
		h.must(unix.Mount("none", "/usr/bin", "tmpfs", 0, "mode=755"))
		h.write("/usr/bin/nftwl", program)
		h.must(os.Chmod("/usr/bin/nftwl", 0o755))
		h.refuses(1, []string{"/usr/bin/nftwld does not exist"}, "policy", "--write")
	})
	t.Run("packaged units", func(t *testing.T) {
		h := newPolicyHost(t)
		h.must(unix.Mount("none", "/usr/lib/systemd/system", "tmpfs", 0, "mode=755"))
		h.must(os.CopyFS("/usr/lib/systemd/system", os.DirFS(filepath.Join(nstest.Root(t), "contrib/systemd"))))
		out := h.setup("policy", "--write")
		if _, err := os.Stat(unit); err == nil || !strings.Contains(out, "Installed already, in /usr/lib/systemd/system: nftwld.service, nftwld.socket.") {
			t.Error(out)
		}
	})
	t.Run("no systemd", func(t *testing.T) {
		h := newPolicyHost(t)
		h.must(os.RemoveAll("/run/systemd"))
		out := h.setup("policy")
		if files := slices.Sorted(maps.Keys(parsePlan(out))); !slices.Equal(files, policyFiles[:3]) || strings.Contains(out, "systemctl") {
			t.Error(out)
		}
	})
}
