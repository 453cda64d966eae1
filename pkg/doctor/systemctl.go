package doctor

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
)

// systemctl returns the path of that program, or "" where systemd does not run
// (sd_booted(3)).
func systemctl() string {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return ""
	}
	return find("systemctl")
}

// unit has the properties of a unit of systemd's; of one that does not exist
// as well.
type unit map[string]string

// properties are those that the checks look at; a unit has those of its type.
const properties = "Id,LoadState,ActiveState,UnitFileState,Result,ReloadResult," +
	"CapabilityBoundingSet,RestrictAddressFamilies,ExecStart,ExecMainExitTimestamp,ExecMainExitTimestampMonotonic,StateChangeTimestampMonotonic"

// findUnits asks systemd for the units that the checks look at.
func (d *Doctor) findUnits(ctx context.Context) {
	program := systemctl()
	if program == "" {
		d.noUnits = "systemd does not run here"
		return
	}
	names := []string{"nftables.service", "nftwl-persist.service", "nftwl-snapshot.service", "nftwl-save.timer", "nftwl-save.service",
		"nftwld.socket", "nftwld.service", "dovecot.service"}
	out, err := output(ctx, program, append([]string{"show", "--property=" + properties}, names...)...)
	blocks := strings.Split(strings.TrimSpace(string(out)), "\n\n")
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

// startsAtBoot is about what is told to; a static unit is started by another.
func (u unit) startsAtBoot() bool {
	return slices.Contains([]string{"enabled", "static", "generated"}, u["UnitFileState"])
}

// why returns the last error of nftwl's in the journal of a unit, or else what
// systemd says of its end.
func (u unit) why(ctx context.Context) string {
	if journalctl := find("journalctl"); journalctl != "" {
		// Without an answer there is systemd's word.
		out, _ := output(ctx, journalctl, "--unit="+u["Id"], "--boot", "--no-pager", "--quiet", "--output=cat", "--lines=50")
		lines := strings.Split(string(out), "\n")
		for _, line := range slices.Backward(lines) {
			for _, prefix := range []string{"nftwl: error: ", "nftwld: error: "} {
				if text, ok := strings.CutPrefix(line, prefix); ok {
					return text
				}
			}
		}
	}
	if u["Result"] == "success" { // but not that of a reload
		return "result " + u["ReloadResult"]
	}
	return "result " + u["Result"]
}

// journal is where a unit says more.
func (u unit) journal() string { return "journalctl -u " + strings.TrimSuffix(u["Id"], ".service") }
