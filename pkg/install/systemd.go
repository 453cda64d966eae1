package install

import (
	"os"
	"path/filepath"
	"strings"

	"nftwl/pkg/config"
)

const (
	sandboxDir = "nftwl-.service.d"
	variantDir = "standalone/" // in contrib, of units that take the place of others
)

// Systemd plans the units that keep the sets.
func Systemd(o *Options) (*Plan, error) {
	if err := o.checkPaths(); err != nil {
		return nil, err
	}
	loads := o.unitLoads()
	names := []string{"nftwl-persist.service", "nftwl-save.service", "nftwl-save.timer", "nftwl-snapshot.service", sandboxDir + "/sandbox.conf"}
	if loads {
		names = []string{variantDir + "nftwl-persist.service", "nftwl-save.service", "nftwl-save.timer", sandboxDir + "/sandbox.conf"}
	}
	p := new(Plan)
	if !exists("/run/systemd/system") {
		p.problem("for OpenRC, use "+share("openrc")+"; elsewhere, run 'nftwl save' and 'nftwl restore' yourself",
			"systemd does not run here")
	}
	p.needRoots(o.Executable, o.move())
	p.checkSandbox(o, o.Executable, o.move())
	p.checkSnapshot(o)
	var packaged []string
	for _, name := range names {
		text, err := o.read("systemd/" + name)
		if err != nil {
			return nil, err
		}
		name = strings.TrimPrefix(name, variantDir)
		if !p.addUnit(name, text) {
			packaged = append(packaged, name)
		}
	}
	p.notePackaged(packaged)
	if loads {
		if !exists(Standalone) {
			p.note("nftwl-persist.service loads %s, which does not exist yet: %s setup nftables --write", Standalone, o.shell("nftwl"))
		}
		p.Next = []string{
			"# The unit loads " + Standalone + ", now and at boot.",
			"nft -c -f " + Standalone,
			"systemctl daemon-reload && systemctl enable --now nftwl-persist",
			o.shell("nftwl") + " doctor",
		}
	} else {
		p.Next = []string{
			"# The units follow nftables.service, which must be enabled and running.",
			"systemctl daemon-reload && systemctl enable --now nftwl-persist",
			o.shell("nftwl") + " doctor",
		}
	}
	p.Undo = []string{"systemctl disable --now nftwl-persist"}
	if len(p.Files) > 0 {
		p.Undo = append(p.Undo, p.remove())
	}
	for _, f := range p.Files {
		if dir := filepath.Dir(f.Path); filepath.Base(dir) == sandboxDir {
			p.Undo = append(p.Undo, "rmdir "+dir)
		}
	}
	p.Undo = append(p.Undo, "systemctl daemon-reload")
	return p, nil
}

// addUnit adds a unit, and returns true, unless a package has installed the same
// one.
func (p *Plan) addUnit(name, text string) bool {
	path := filepath.Join(UnitDir, name)
	same, err := os.ReadFile(filepath.Join(packageUnits, name))
	if err == nil && string(same) == text && !exists(path) {
		return false
	}
	p.add(path, text)
	return true
}

func (p *Plan) notePackaged(names []string) {
	if len(names) > 0 {
		p.note("Installed already, in %s: %s.", packageUnits, strings.Join(names, ", "))
	}
}

// checkSandbox reports what a unit that executes program cannot read.
func (p *Plan) checkSandbox(o *Options, program, install string) {
	path := o.configPath()
	for _, path := range []string{program, path} {
		// ProtectHome= and PrivateTmp=
		for _, hidden := range []string{"/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/"} {
			if strings.HasPrefix(path, hidden) {
				remedy := "move it to " + config.Path
				if path == program {
					remedy = install
				}
				p.problem(remedy, "the units have no access to %s, where %s is", hidden, path)
			}
		}
	}
	if info, err := os.Stat(path); err == nil && info.Mode()&0o004 == 0 {
		p.note("The units do not run as root, and cannot read %s: chmod a+r %s", path, path)
	}
}

// checkSnapshot reports a snapshot in a directory that the units cannot write.
func (p *Plan) checkSnapshot(o *Options) {
	if snapshot := filepath.Clean(o.Config.Snapshot); !strings.HasPrefix(snapshot, stateDir) {
		p.problem("set snapshot to a file in that directory, in "+o.configPath()+", or write the units by hand, with another StateDirectory= in sandbox.conf",
			"snapshot: the units can write in %s alone, and %s is elsewhere", stateDir, snapshot)
	}
}
