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
	if snapshot := filepath.Clean(o.Config.Snapshot); !strings.HasPrefix(snapshot, stateDir) {
		p.problem("set snapshot to a file in that directory, in "+o.configPath()+", or write the units by hand, with another StateDirectory= in sandbox.conf",
			"snapshot: the units can write in %s alone, and %s is elsewhere", stateDir, snapshot)
	}
	p.addUnits(names, o.read)
	if loads {
		if !exists(Standalone) {
			p.note("nftwl-persist.service loads %s, which does not exist yet: %s setup nftables --write", Standalone, o.shell("nftwl"))
		}
		p.Next = []string{"# The unit loads " + Standalone + ", now and at boot.", "nft -c -f " + Standalone}
	} else {
		p.Next = []string{"# The units follow nftables.service, which must be enabled and running."}
	}
	p.Next = append(p.Next, "systemctl daemon-reload && systemctl enable --now nftwl-persist", o.shell("nftwl")+" doctor")
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

// addUnits adds units of contrib's, except those that a package has installed with
// the same text.
func (p *Plan) addUnits(names []string, read func(name string) string) {
	var packaged []string
	for _, name := range names {
		text := read("systemd/" + name)
		name = strings.TrimPrefix(name, variantDir)
		path := filepath.Join(UnitDir, name)
		same, err := os.ReadFile(filepath.Join(packageUnits, name))
		if err == nil && string(same) == text && !exists(path) {
			packaged = append(packaged, name)
		} else {
			p.add(path, text)
		}
	}
	if packaged != nil {
		p.note("Installed already, in %s: %s.", packageUnits, strings.Join(packaged, ", "))
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
