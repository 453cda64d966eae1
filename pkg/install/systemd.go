package install

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"nftwl/pkg/config"
)

const (
	sandboxDir = "nftwl-.service.d"
	variantDir = "standalone/" // in contrib, of units that take the place of others
)

// Systemd plans the units that keep the sets.
func Systemd(o *Options) *Plan {
	names := []string{"nftwl-persist.service", "nftwl-snapshot.service"}
	first := []string{
		"# The units follow nftables.service, which must be enabled and running. STOP if",
		"# another program owns the firewall: put \"table: " + ownTable + "\" into " + config.Path + ",",
		"# and run setup for nftables and systemd again.",
	}
	if o.unitLoads() {
		names = []string{variantDir + "nftwl-persist.service"}
		first = []string{"# The unit loads " + standaloneFile + ", now and at boot: first run 'nftwl setup nftables --write'."}
	}
	p := newPlan(o)
	if !exists(SystemdRuns) {
		p.problem("for OpenRC, use openrc/nftwl.conf of "+shareDir+" or of contrib; elsewhere, run 'nftwl save' and 'nftwl restore' yourself",
			"systemd does not run here")
	}
	p.checkReadable()
	if snapshot := filepath.Clean(o.Config.Snapshot); !strings.HasPrefix(snapshot, stateDir) {
		p.problem("set snapshot to a file in that directory, in "+config.Path+", or write the units by hand, with another StateDirectory= in sandbox.conf",
			"snapshot: the units can write in %s alone, and %s is elsewhere", stateDir, snapshot)
	}
	p.addUnits(append(names, "nftwl-save.service", "nftwl-save.timer", sandboxDir+"/sandbox.conf"), shipped)
	p.Next = append(first, "systemctl daemon-reload && systemctl enable --now nftwl-persist", "nftwl doctor")
	p.Undo = []string{"systemctl disable --now nftwl-persist"}
	if len(p.Files) > 0 {
		p.Undo = append(p.Undo, remove(p.Files))
	}
	if dir := filepath.Join(unitDir, sandboxDir); slices.ContainsFunc(p.Files, func(f File) bool { return filepath.Dir(f.Path) == dir }) {
		p.Undo = append(p.Undo, "rmdir "+dir)
	}
	p.Undo = append(p.Undo, "systemctl daemon-reload")
	return p
}

// addUnits adds units of contrib, except those that a package has installed with
// the same text.
func (p *Plan) addUnits(names []string, read func(name string) string) {
	var packaged []string
	for _, name := range names {
		text := read("systemd/" + name)
		name = strings.TrimPrefix(name, variantDir)
		path := filepath.Join(unitDir, name)
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

// checkReadable notes that the units, which do not run as root, cannot read the
// configuration.
func (p *Plan) checkReadable() {
	if info, err := os.Stat(config.Path); err == nil && info.Mode()&0o004 == 0 {
		p.note("The units do not run as root, and cannot read %s: chmod a+r %[1]s", config.Path)
	}
}
