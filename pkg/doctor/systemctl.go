package doctor

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"nftwl/pkg/install"
)

// unit has the properties of a systemd unit, even if there is no such unit.
type unit map[string]string

// findUnits asks systemd for the units that the checks look at.
func (d *Doctor) findUnits(ctx context.Context) {
	if !exists(install.SystemdRuns) {
		d.noUnits = "systemd does not run here"
		return
	}
	names := []string{"nftables.service", "nftwl-persist.service", "nftwl-save.timer", "nftwl-save.service",
		"nftwld.socket", "nftwld.service", "dovecot.service"}
	const properties = "Id,LoadState,ActiveState,UnitFileState,Result,ExecStart,ExecMainExitTimestamp"
	out, err := run(ctx, "systemctl", append([]string{"show", "--property=" + properties}, names...)...)
	blocks := strings.Split(strings.TrimSpace(out), "\n\n")
	if err == nil && len(blocks) != len(names) {
		err = fmt.Errorf("systemctl shows %d units of %d", len(blocks), len(names))
	}
	if err != nil {
		d.noUnits = err.Error()
		return
	}
	d.units = make(map[string]unit)
	for i, block := range blocks {
		u := make(unit)
		for line := range strings.SplitSeq(block, "\n") {
			key, value, _ := strings.Cut(line, "=")
			if before := u[key]; before != "" { // as for each command
				value = before + " " + value
			}
			u[key] = value
		}
		d.units[names[i]] = u
	}
}

// startsAtBoot tells whether systemd, or for a static unit another unit, starts it at boot.
func (u unit) startsAtBoot() bool {
	return slices.Contains([]string{"enabled", "static", "generated"}, u["UnitFileState"])
}

// why returns nftwl's last error in the journal of a unit; without one, what
// systemd says of its end.
func (u unit) why(ctx context.Context) string {
	out, _ := run(ctx, "journalctl", "--unit="+u["Id"], "--boot", "--no-pager", "--quiet", "--output=cat", "--lines=50")
	for _, line := range slices.Backward(strings.Split(out, "\n")) {
		for _, prefix := range []string{"nftwl: error: ", "nftwld: error: "} {
			if text, ok := strings.CutPrefix(line, prefix); ok {
				return text
			}
		}
	}
	return "result " + u["Result"]
}

// journal is where a unit says more.
func (u unit) journal() string { return "journalctl -u " + strings.TrimSuffix(u["Id"], ".service") }
