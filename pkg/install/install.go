// Package install describes how nftwl is installed: the paths, which of contrib's
// files fit this machine, the post-login command line, and what to do about each
// error. login, setup, doctor and the hints of errors share this description.
//
// Each login links it, so it does nothing at init.
package install

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"time"

	"nftwl/contrib"
	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// Where the parts of the installation belong. The configuration is at
// config.Path, and the policy server's key at the path that it names.
const (
	nftwlPath      = "/usr/bin/nftwl"
	nftwldPath     = "/usr/bin/nftwld"
	rulesDir       = "/etc/nftwl"
	setsFile       = rulesDir + "/sets.nft"
	rulesFile      = rulesDir + "/nftwl.nft"
	exampleFile    = rulesDir + "/nftables.conf"  // a whole firewall
	standaloneFile = rulesDir + "/standalone.nft" // sets and rules in a table of their own
	DovecotConf    = "/etc/dovecot/dovecot.conf"
	dovecotDir     = "/etc/dovecot/conf.d"
	DropIn         = dovecotDir + "/90-nftwl.conf" // has Dovecot run nftwl login
	policyDropIn   = dovecotDir + "/91-nftwl-policy.conf"
	PolicySettings = policyDropIn + ".ext" // has the key; policyDropIn includes it
	unitDir        = "/etc/systemd/system"
	Fail2banDir    = "/etc/fail2ban"
	SystemdRuns    = "/run/systemd/system" // exists if systemd runs: sd_booted(3)

	packageUnits = "/usr/lib/systemd/system"
	stateDir     = "/var/lib/nftwl/" // StateDirectory= of the units
	shareDir     = "/usr/share/nftwl/"
)

// LoadSets is the command that makes a table's sets if they are missing: it loads
// the file that setup has written, or runs setup.
func LoadSets(table nftset.Table) string {
	for _, path := range []string{setsFile, standaloneFile} {
		text, _ := os.ReadFile(path)
		if strings.Contains(string(text), "\ntable "+table.String()+" {\n") {
			return "nft -f " + path
		}
	}
	return "nftwl setup nftables --write"
}

// Options are what a plan depends on.
type Options struct {
	Executable string         // path of this very program
	ConfigPath string         // of --config; "" for the default
	Config     *config.Config // what that file says
}

// shipped returns one of contrib's files.
func shipped(name string) string {
	text, err := contrib.Files.ReadFile(name)
	if err != nil {
		panic(err) // they are embedded
	}
	return string(text)
}

// output returns what a program prints, within ten seconds. If the program is not
// installed, the error is exec.ErrNotFound.
func output(program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second // a child may hold the pipe open
	out, err := cmd.Output()
	return string(out), err
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
