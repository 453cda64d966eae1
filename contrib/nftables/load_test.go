package nftables_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// What one nft loads, every nft reads back, and what it prints loads again:
// the masks of concatenated keys in particular.
func TestLoad(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		for name, edits := range map[string][]edit{
			"plain":           nil,
			"prefix64":        {l.prefix64},
			"strict":          {l.strict},
			"prefix64+strict": {l.prefix64, l.strict},
		} {
			t.Run(name, func(t *testing.T) {
				f := install(t, l, root, edits...)
				for _, file := range f.load {
					f.nft("-c", "-f", "/etc/"+file)
				}
				if out := f.nft("list", "ruleset"); out != "" {
					t.Errorf("-c left:\n%s", out)
				}
				f.up()
				loaded := f.nft("list", "ruleset")

				for _, v := range nftVersions {
					other := &firewall{T: t, root: v.root(t)}
					if got := other.nft("list", "ruleset"); burst(got) != burst(loaded) {
						t.Errorf("nft of %s reads:\n%s\nand not:\n%s", v.name, got, loaded)
					}
				}

				f.nft("flush", "ruleset")
				if out, err := f.tryNft(loaded, "-f", "-"); err != nil {
					t.Fatalf("what nft prints does not load: %v\n%s\n%s", err, out, loaded)
				}
				if again := f.nft("list", "ruleset"); again != loaded {
					t.Errorf("was:\n%s\nafter a round trip:\n%s", loaded, again)
				}
			})
		}
	})
}

// burst takes away what nft 1.0.6 does not print, as it is nft's default.
func burst(ruleset string) string { return strings.ReplaceAll(ruleset, " burst 5 packets", "") }

// Loading a changed file again replaces its rules, doubles none of them, and
// leaves the elements alone.
func TestReload(t *testing.T) {
	files := map[string]string{"filter": "nftwl/nftwl.nft", "standalone": "nftwl/standalone.nft"}
	each(t, func(t *testing.T, l layout, root string) {
		f := install(t, l, root)
		f.up()
		before := f.nft("list", "ruleset")
		f.nft("-f", "/etc/"+files[l.name])
		if after := f.nft("list", "ruleset"); after != before {
			t.Errorf("was:\n%s\nafter a reload:\n%s", before, after)
		}

		user := netip.MustParseAddr("198.51.100.1")
		f.trust(user, 128, "1h")
		file := filepath.Join(root, "etc", "nftwl", "submission.nft")
		if l.name == "standalone" {
			file = filepath.Join(root, "etc", "nftwl", "standalone.nft")
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		faster := strings.ReplaceAll(string(text), "3/minute burst 5", "30/minute burst 50")
		if err := os.WriteFile(file, []byte(faster), 0o644); err != nil {
			t.Fatal(err)
		}
		f.nft("-f", "/etc/"+files[l.name])
		after := f.nft("list", "ruleset")
		if !strings.Contains(after, "30/minute burst 50") || strings.Contains(after, "3/minute burst 5 ") {
			t.Errorf("the new limit is not in force:\n%s", after)
		}
		if !f.has("trusted", user, 587) {
			t.Error("a reload took an element away")
		}
	})
}

// sets.nft is loaded alone by others, and every other file is of use.
func TestFiles(t *testing.T) {
	for _, v := range nftVersions {
		t.Run(v.name, func(t *testing.T) {
			f := install(t, layouts[0], v.root(t))
			for _, file := range []string{"sets.nft", "nftwl.nft", "standalone.nft"} {
				f.nft("-c", "-f", "/etc/nftwl/"+file)
				f.nft("-f", "/etc/nftwl/"+file)
				f.nft("flush", "ruleset")
			}
		})
	}
	top, err := os.ReadFile("nftwl.nft")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*.nft")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "# nftwl.yaml: ") {
			t.Errorf("%s does not say which keys belong to it", file)
		}
		if file != "nftwl.nft" && file != "standalone.nft" && !strings.Contains(string(top), `include "nftwl/`+file+`"`) {
			t.Errorf("nftwl.nft does not include %s", file)
		}
	}
}

// A program that reads the sets' definitions knows no variables.
func TestSetsArePlain(t *testing.T) {
	nstest.New(t)
	text, err := os.ReadFile("sets.nft")
	if err != nil {
		t.Fatal(err)
	}
	nstest.Nft(t, string(text))
	if strings.Contains(string(text), "define") || strings.Contains(string(text), "$") {
		t.Error("sets.nft has variables")
	}
}
