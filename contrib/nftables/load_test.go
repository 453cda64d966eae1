package nftables_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"nftwl/pkg/nstest"
)

// Every version of nft can read back what another has loaded, and load what it
// prints, including the masks of concatenated keys.
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
					if got := other.nft("list", "ruleset"); spelling.Replace(got) != spelling.Replace(loaded) {
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

// spelling has the pairs that nft 1.0.6 and 1.1.3 print differently. A burst of five
// packets is nft's default.
var spelling = strings.NewReplacer(
	" burst 5 packets", "",
	"& (syn | rst | ack) == ack", "ack / syn,rst,ack",
	"& (fin | syn | rst | ack) == syn", "syn / fin,syn,rst,ack",
	"& (fin | syn | rst | ack) != syn", "!= syn / fin,syn,rst,ack",
	"& (126 | 127) == 126", "126 / 126,127",
	"meta l4proto tcp", "meta l4proto 6", // without /etc/protocols
)

// Loading a file again replaces its rules, duplicates none of them, and keeps the
// elements.
func TestReload(t *testing.T) {
	each(t, func(t *testing.T, l layout, root string) {
		f := install(t, l, root)
		f.up()
		user := addr("198.51.100.1")
		for _, list := range []string{"trusted", "banned", "limited"} {
			f.add(list, user, 587, "1h")
		}
		timeLeft := regexp.MustCompile(` expires \w+`)
		before := f.nft("list", "ruleset")
		f.nft("-f", "/etc/nftwl/"+l.main)
		if after := f.nft("list", "ruleset"); timeLeft.ReplaceAllString(after, "") != timeLeft.ReplaceAllString(before, "") {
			t.Errorf("was:\n%s\nafter a reload:\n%s", before, after)
		}
	})
}

// sets.nft loads alone, and nftwl.nft includes every other file.
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
			t.Errorf("%s does not name the configuration keys that belong to it", file)
		}
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "\tset ") && strings.Count(string(text), line) > 1 {
				t.Errorf("%s defines it twice: %s", file, line)
			}
		}
		if file != "nftwl.nft" && file != "standalone.nft" && !strings.Contains(string(top), `include "nftwl/`+file+`"`) {
			t.Errorf("nftwl.nft does not include %s", file)
		}
	}
}

// sets.nft has no variables, because programs read its definitions.
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
