// Package packaging tests the packages that `make packages` makes, as files.
// cmd/nftwl/e2e/systemd installs them.
package packaging

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/buildinfo"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"nftwl/pkg/config"
	"nftwl/pkg/nstest"
)

// run runs a program and returns its output.
func run(t *testing.T, env []string, program string, args ...string) string {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), env...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", program, args, err, out, &errs)
	}
	return string(out)
}

// nftwl.yaml has all keys, commented out, with their defaults.
func TestConfig(t *testing.T) {
	text, err := os.ReadFile("nftwl.yaml")
	if err != nil {
		t.Fatal(err)
	}
	keys := regexp.MustCompile(`(?m)^#(\w+: )`)
	for _, text := range [][]byte{text, keys.ReplaceAll(text, []byte("$1"))} {
		c, err := config.Parse(text)
		if err != nil || !reflect.DeepEqual(c, config.Default()) {
			t.Errorf("%+v, %v, of\n%s", c, err, text)
		}
	}
	// Except policy, failures and cluster, which are off by default.
	if n, want := len(keys.FindAll(text, -1)), reflect.TypeFor[config.Config]().NumField()-3; n != want {
		t.Errorf("%d keys of %d", n, want)
	}
}

// An older version sorts before a newer one.
func TestVersion(t *testing.T) {
	rpm := nstest.Need(t, "rpm", "rpm")
	dpkg := nstest.Need(t, "dpkg", "dpkg")
	var before struct{ deb, rpm string }
	for _, v := range []struct{ version, deb, apk string }{
		{"v0.0.0-20261121072950-adf3d211f29d", "0.0.0~git20261121072950.adf3d21", "0.0.0_pre20261121_p072950"},
		{"v0.0.0-20261121072950-adf3d211f29d+dirty", "0.0.0~git20261121072950.adf3d21+dirty", "0.0.0_pre20261121_p072950"},
		{"v1.2.3-0.20270101000000-0123456789ab", "1.2.3~git20270101000000.0123456", "1.2.3_pre20270101_p000000"},
		{"v1.2.3-rc.1", "1.2.3~rc.1", "1.2.3_rc1"},
		{"v1.2.3-rc.1.0.20270102000000-0123456789ab", "1.2.3~rc.1.git20270102000000.0123456", "1.2.3_rc1_git20270102_p000000"},
		{"v1.2.3-rc.2", "1.2.3~rc.2", "1.2.3_rc2"},
		{"1.2.3", "1.2.3", "1.2.3"},
		{"v1.2.3+dirty", "1.2.3+dirty", "1.2.3"},
		{"v1.2.4-0.20270103000000-0123456789ab", "1.2.4~git20270103000000.0123456", "1.2.4_pre20270103_p000000"},
		{"v1.2.4", "1.2.4", "1.2.4"},
	} {
		name := func(format string) string {
			return strings.TrimSpace(run(t, nil, "sh", "version.sh", format, v.version))
		}
		deb, rpmName, apk := name("deb"), name("rpm"), name("apk")
		if deb != v.deb || rpmName != v.deb || apk != v.apk {
			t.Errorf("%s is %s, %s, %s", v.version, deb, rpmName, apk)
		}
		if before.deb != "" {
			run(t, nil, dpkg, "--compare-versions", before.deb, "lt", deb)
			if order := run(t, nil, rpm, "--eval", fmt.Sprintf("%%{lua: print(rpm.vercmp(%q, %q))}", before.rpm, rpmName)); order != "-1\n" {
				t.Errorf("rpm: %s, %s: %s", before.rpm, rpmName, order)
			}
		}
		before.deb, before.rpm = deb, rpmName
	}
}

// A file is a file of a package.
type file struct {
	mode fs.FileMode
	text []byte
}

// untar returns the files of a package's tar, without the directories.
func untar(t *testing.T, from io.Reader) map[string]file {
	t.Helper()
	files := make(map[string]file)
	for r := tar.NewReader(from); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		mode := h.FileInfo().Mode()
		if mode.IsDir() && mode.Perm() != 0o755 || h.Uid != 0 || h.Gid != 0 {
			t.Errorf("%s is of %d:%d, with mode %v", h.Name, h.Uid, h.Gid, mode)
		}
		// apk does not accept a mode with Go's own bits, such as the one for a directory.
		if h.Mode > 0o7777 {
			t.Errorf("%s has mode %#o", h.Name, h.Mode)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if !mode.IsDir() {
			files[strings.TrimPrefix(h.Name, "./")] = file{mode, text}
		}
	}
}

func unzip(t *testing.T, text []byte) io.Reader {
	t.Helper()
	r, err := gzip.NewReader(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

const completions = `usr/share/bash-completion/completions/nftwl
usr/share/fish/vendor_completions.d/nftwl.fish
`

const units = `usr/lib/systemd/system/nftwl-.service.d/sandbox.conf
usr/lib/systemd/system/nftwl-persist.service
usr/lib/systemd/system/nftwl-save.service
usr/lib/systemd/system/nftwl-save.timer
usr/lib/systemd/system/nftwl-snapshot.service
usr/lib/systemd/system/nftwld.service
usr/lib/systemd/system/nftwld.socket
usr/share/nftwl/systemd/dovecot.service.d/nftwl.conf
usr/share/nftwl/systemd/nftwld.service.d/cluster.conf
usr/share/nftwl/systemd/standalone/nftwl-persist.service
`

const common = `etc/nftwl.yaml
usr/bin/nftwl
usr/bin/nftwld
usr/share/doc/nftwl/copyright
usr/share/man/man5/nftwl.yaml.5.gz
usr/share/man/man8/nftwl.8.gz
usr/share/man/man8/nftwld.8.gz
` + completions

// wanted returns the files that a package must have.
func wanted(t *testing.T, format string) []string {
	t.Helper()
	list := common
	switch format {
	case "deb":
		list += units + "usr/share/doc/nftwl/changelog.gz\nusr/share/lintian/overrides/nftwl\nusr/share/zsh/vendor-completions/_nftwl\n"
	case "rpm":
		list += units + "usr/share/licenses/nftwl/LICENSE\nusr/share/zsh/site-functions/_nftwl\n"
	case "apk":
		list += ".PKGINFO\n.post-deinstall\n.post-install\n.pre-deinstall\nusr/share/licenses/nftwl/LICENSE\nusr/share/zsh/site-functions/_nftwl\n"
	}
	names := strings.Fields(list)
	root := nstest.Root(t)
	for from, to := range map[string]string{
		"README.md": "usr/share/doc/nftwl/", "CHANGELOG.md": "usr/share/doc/nftwl/", "SECURITY.md": "usr/share/doc/nftwl/", "docs/*.md": "usr/share/doc/nftwl/",
		"contrib/dovecot/*": "usr/share/nftwl/", "contrib/fail2ban/*/*": "usr/share/nftwl/", "contrib/openrc/*": "usr/share/nftwl/",
		"contrib/nftables/*.nft": "usr/share/nftwl/", "contrib/nftables/nftables.conf": "usr/share/nftwl/",
	} {
		found, err := filepath.Glob(filepath.Join(root, from))
		if err != nil || len(found) == 0 {
			t.Fatalf("%s: %v", from, err)
		}
		for _, path := range found {
			name, _ := filepath.Rel(root, path)
			names = append(names, to+strings.TrimPrefix(name, "contrib/"))
		}
	}
	slices.Sort(names)
	return names
}

// A release that is built twice is the same, in directories with different names and
// by users with different settings.
func TestPackages(t *testing.T) {
	nstest.Need(t, "git", "git")
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "another", "two")
	run(t, []string{"HOME=" + dir}, "sh", "-euc", `
		mkdir -p "$2" "$3"
		cd "$1"
		cp -r cmd contrib docs pkg go.mod go.sum LICENSE Makefile .gitignore ./*.md "$2"
		cd "$2"
		git init --quiet
		git config user.name release
		git config user.email release
		git add .
		git commit --quiet --message release
		git tag v1.2.3
		(umask 077 && cp -r --no-preserve=mode "$2/." "$3")
		git -C "$3" config core.fileMode false`, "sh", nstest.Root(t), one, two)
	run(t, nil, "sh", "-euc", `umask 022; TZ=UTC make --silent -C "$1" packages`, "sh", one)
	run(t, nil, "sh", "-euc", `umask 077; TZ=Asia/Tokyo LC_ALL=C make --silent -C "$1" packages`, "sh", two)

	var names []string
	entries, err := os.ReadDir(filepath.Join(one, "build/packages"))
	if err != nil {
		t.Fatal(err)
	}
	var debs []string
	for _, e := range entries {
		name := e.Name()
		path := filepath.Join(one, "build/packages", name)
		names = append(names, name)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		again, err := os.ReadFile(filepath.Join(two, "build/packages", name))
		if err != nil || !bytes.Equal(text, again) {
			t.Errorf("%s differs between the builds: %v", name, err)
		}

		var files map[string]file
		format := strings.TrimPrefix(filepath.Ext(name), ".")
		switch format {
		case "deb":
			debs = append(debs, path)
			files = untar(t, strings.NewReader(run(t, nil, nstest.Need(t, "dpkg-deb", "dpkg"), "--fsys-tarfile", path)))
			if conf := run(t, nil, "dpkg-deb", "--info", path, "conffiles"); conf != "/etc/nftwl.yaml\n" {
				t.Errorf("%s: its configuration: %s", name, conf)
			}
		case "rpm":
			rpm := nstest.Need(t, "rpm", "rpm")
			run(t, nil, rpm, "--checksig", "--nosignature", path)
			if conf := run(t, nil, rpm, "--query", "--configfiles", "--package", path); conf != "/etc/nftwl.yaml\n" {
				t.Errorf("%s: its configuration: %s", name, conf)
			}
			files = untar(t, strings.NewReader(run(t, nil, "sh", "-euc", `rpm2archive --nocompression - <"$1"`, "sh", path)))
		case "apk":
			files = untar(t, unzip(t, text))
			if !bytes.Contains(files[".PKGINFO"].text, []byte("\npkgver = 1.2.3\n")) {
				t.Errorf("%s: %s", name, files[".PKGINFO"].text)
			}
		}
		if got, want := slices.Sorted(maps.Keys(files)), wanted(t, format); !slices.Equal(got, want) {
			t.Errorf("%s has\n%s\nand should have\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		check(t, name, files)
	}
	want := []string{
		"nftwl-1.2.3-1.aarch64.rpm", "nftwl-1.2.3-1.x86_64.rpm",
		"nftwl_1.2.3_aarch64.apk", "nftwl_1.2.3_amd64.deb", "nftwl_1.2.3_arm64.deb", "nftwl_1.2.3_x86_64.apk",
	}
	if !slices.Equal(names, want) {
		t.Errorf("the packages are %q", names)
	}
	lintian := nstest.Need(t, "lintian", "lintian")
	if out, err := exec.Command(lintian, append([]string{"--allow-root", "--tag-display-limit", "0", "--fail-on", "error,warning"}, debs...)...).CombinedOutput(); err != nil {
		t.Errorf("lintian: %v\n%s", err, out)
	}
}

// check checks the files of a package.
func check(t *testing.T, name string, files map[string]file) {
	t.Helper()
	for path, f := range files {
		mode := fs.FileMode(0o644)
		switch {
		case path == ".PKGINFO":
			continue
		case bytes.HasPrefix(f.text, []byte("#!")) || bytes.HasPrefix(f.text, []byte(elf.ELFMAG)):
			mode = 0o755
		}
		if f.mode != mode {
			t.Errorf("%s: %s has mode %v", name, path, f.mode)
		}
		if len(f.text) == 0 {
			t.Errorf("%s: %s is empty", name, path)
		}
	}

	for _, path := range []string{"usr/bin/nftwl", "usr/bin/nftwld"} {
		checkProgram(t, name+": "+path, files[path].text, string(files["usr/share/doc/nftwl/copyright"].text))
	}
}

func checkProgram(t *testing.T, name string, text []byte, copyright string) {
	t.Helper()
	program := bytes.NewReader(text)
	binary, err := elf.NewFile(program)
	if err != nil {
		t.Fatal(err)
	}
	machine := elf.EM_X86_64
	if strings.Contains(name, "arm64") || strings.Contains(name, "aarch64") {
		machine = elf.EM_AARCH64
	}
	if binary.Machine != machine {
		t.Errorf("%s: the program is for %v", name, binary.Machine)
	}
	for _, p := range binary.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("%s: the program is not static", name)
		}
	}
	info, err := buildinfo.Read(program)
	if err != nil {
		t.Fatal(err)
	}
	if info.Main.Version != "v1.2.3" {
		t.Errorf("%s: the program's version is %s", name, info.Main.Version)
	}
	modules := []string{"Go"}
	for _, m := range info.Deps {
		modules = append(modules, m.Path)
	}
	for _, m := range modules {
		if _, text, ok := strings.Cut(copyright, "\nFiles: "+m+"\n"); !ok || !strings.Contains(text, "\nLicense: "+m+"\n ") {
			t.Errorf("%s: no license of %s", name, m)
		}
	}
}
