package install

import (
	"cmp"
	"os"
	"path/filepath"
	"strings"

	"nftwl/pkg/config"
)

const (
	unitFolder    = "/etc/systemd/system"
	packageFolder = "/usr/lib/systemd/system"
	sandboxFolder = "nftwl-.service.d"
	stateFolder   = "/var/lib/nftwl/" // StateDirectory= of the sandbox
	variantFolder = "standalone/"     // in contrib, of units that take the place of others
)

// Systemd plans the units that keep the sets.
func Systemd(o *Options) (*Plan, error) {
	if err := o.checkPaths(); err != nil {
		return nil, err
	}
	loads := o.unitLoads()
	names := []string{"nftwl-persist.service", "nftwl-save.service", "nftwl-save.timer", "nftwl-snapshot.service", sandboxFolder + "/sandbox.conf"}
	if loads {
		names = []string{variantFolder + "nftwl-persist.service", "nftwl-save.service", "nftwl-save.timer", sandboxFolder + "/sandbox.conf"}
	}
	p := new(Plan)
	if !exists("/run/systemd/system") {
		p.problem(share("openrc")+" has the same for OpenRC; otherwise run 'nftwl save' and 'nftwl restore' yourself",
			"systemd does not run here")
	}
	p.checkProgram(o.Executable, o.installed())
	p.checkSandbox(o, o.Executable, o.installed())
	p.checkSnapshot(o)
	var packaged []string
	for _, name := range names {
		text, err := o.read("systemd/" + name)
		if err != nil {
			return nil, err
		}
		name = strings.TrimPrefix(name, variantFolder)
		if !p.addUnit(name, text) {
			packaged = append(packaged, name)
		}
	}
	p.notePackaged(packaged)
	if loads {
		if !exists(ownRules) {
			p.note("nftwl-persist.service loads %s, which is not there yet: %s setup nftables --write", ownRules, o.shell())
		}
		p.Next = []string{
			"# It loads " + ownRules + ", now and at boot.",
			"nft -c -f " + ownRules,
			"systemctl daemon-reload && systemctl enable --now nftwl-persist",
			o.shell() + " doctor",
		}
	} else {
		p.Next = []string{
			"# nftables.service must be enabled and running: the units follow it.",
			"systemctl daemon-reload && systemctl enable --now nftwl-persist",
			o.shell() + " doctor",
		}
	}
	p.Undo = []string{"systemctl disable --now nftwl-persist"}
	if len(p.Files) > 0 {
		p.Undo = append(p.Undo, p.remove())
	}
	for _, f := range p.Files {
		if dir := filepath.Dir(f.Path); filepath.Base(dir) == sandboxFolder {
			p.Undo = append(p.Undo, "rmdir "+dir)
		}
	}
	p.Undo = append(p.Undo, "systemctl daemon-reload")
	return p, nil
}

// addUnit adds a unit, unless a package has installed the same one.
func (p *Plan) addUnit(name, text string) bool {
	path := filepath.Join(unitFolder, name)
	same, err := os.ReadFile(filepath.Join(packageFolder, name))
	if err == nil && string(same) == text && !exists(path) {
		return false
	}
	p.add(path, text)
	return true
}

func (p *Plan) notePackaged(names []string) {
	if len(names) > 0 {
		p.note("Installed already, in %s: %s.", packageFolder, strings.Join(names, ", "))
	}
}

// checkSandbox reports what a unit that executes program could not read.
func (p *Plan) checkSandbox(o *Options, program, install string) {
	path := cmp.Or(o.ConfigPath, config.Path)
	for _, path := range []string{program, path} {
		// ProtectHome= and PrivateTmp=
		for _, hidden := range []string{"/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/"} {
			if strings.HasPrefix(path, hidden) {
				remedy := "move it to " + config.Path
				if path == program {
					remedy = install
				}
				p.problem(remedy, "the units have no access to %s, and so not to %s", hidden, path)
			}
		}
	}
	if info, err := os.Stat(path); err == nil && info.Mode()&0o004 == 0 {
		p.note("%s must be readable by all, as the units do not run as root: chmod a+r %s", path, path)
	}
}

// checkSnapshot reports a snapshot where the units could not write it.
func (p *Plan) checkSnapshot(o *Options) {
	path := cmp.Or(o.ConfigPath, config.Path)
	if snapshot := filepath.Clean(o.Config.Snapshot); !strings.HasPrefix(snapshot, stateFolder) {
		p.problem("put it into that directory ("+path+"), or write the units by hand, with another StateDirectory= in sandbox.conf",
			"snapshot: the units can write in %s alone, and not %s", stateFolder, snapshot)
	}
}
