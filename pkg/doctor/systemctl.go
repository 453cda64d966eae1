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
	"ExecStart,ExecMainExitTimestamp,ExecMainExitTimestampMonotonic,StateChangeTimestampMonotonic"

// show asks systemd for units.
func show(ctx context.Context, systemctl string, names ...string) ([]unit, error) {
	out, err := output(ctx, systemctl, append([]string{"show", "--property=" + properties}, names...)...)
	if err != nil {
		return nil, err
	}
	var units []unit
	for block := range strings.SplitSeq(strings.TrimSpace(string(out)), "\n\n") {
		u := make(unit)
		for line := range strings.SplitSeq(block, "\n") {
			key, value, _ := strings.Cut(line, "=")
			if before := u[key]; before != "" { // as for each command
				value = before + " " + value
			}
			u[key] = value
		}
		units = append(units, u)
	}
	if len(units) != len(names) {
		return nil, fmt.Errorf("systemctl shows %d units of %d", len(units), len(names))
	}
	return units, nil
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
