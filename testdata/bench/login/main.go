// Command login measures what a login costs with nftwl as Dovecot's post-login
// program, and with other programs in its place. make bench builds the binaries and
// runs it in a namespace.
//
// The programs take turns in random order, so that a machine whose speed changes
// treats all of them alike. Quote the ratios of the medians.
package main

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"time"
)

// candidate is a program to measure. address returns the address of each run's
// login.
type candidate struct {
	name    string
	command []string
	address func(run int) string
}

func main() {
	runs := flag.Int("runs", 500, "measured `runs` of each program")
	nftwl := flag.String("nftwl", "nftwl", "`path` of nftwl")
	empty := flag.String("empty", "empty", "`path` of the empty wrapper")
	library := flag.String("library", "library", "`path` of the wrapper through google/nftables")
	script := flag.String("script", "trust.sh", "`path` of the shell script")
	rules := flag.String("rules", "sets.nft", "`path` of the set definitions")
	flag.Parse()
	if err := measure(*runs, *nftwl, *empty, *library, *script, *rules); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func measure(runs int, nftwl, empty, library, script, rules string) error {
	if out, err := exec.Command(nftwl, "restore", rules).CombinedOutput(); err != nil {
		return fmt.Errorf("nftwl restore: %v: %s", err, out)
	}
	// Each run has its own address, and each program its own network. No packets are
	// sent.
	fresh := func(second int) func(int) string {
		return func(run int) string { return fmt.Sprintf("198.%d.%d.%d", second, run/250, run%250+1) }
	}
	const known = "192.0.2.7"
	candidates := []candidate{
		{"`/bin/true` alone", []string{"/bin/true"}, fresh(18)},
		{"an empty wrapper in Go", []string{empty, "/bin/true"}, fresh(18)},
		{"`nftwl login`, new address", []string{nftwl, "login", "/bin/true"}, fresh(18)},
		{"`nftwl login`, address trusted already", []string{nftwl, "login", "/bin/true"}, func(int) string { return known }},
		{"the same through google/nftables, new address", []string{library, "/bin/true"}, fresh(51)},
		{"the shell script, new address", []string{script, "/bin/true"}, fresh(19)},
	}
	times := make([][]time.Duration, len(candidates))
	const warmUp = 10
	order := rand.New(rand.NewPCG(1, 2))
	for run := range warmUp + runs {
		// The order changes each time, because a program that follows itself finds the
		// caches warm, and one that follows the script finds them cold.
		for _, i := range order.Perm(len(candidates)) {
			took, err := candidates[i].run(run)
			if err != nil {
				return err
			}
			if run >= warmUp {
				times[i] = append(times[i], took)
			}
		}
	}
	// Check that all of them did their work.
	for _, address := range []string{fresh(18)(warmUp), fresh(51)(runs), fresh(19)(runs), known} {
		if out, err := exec.Command(nftwl, "check", address).CombinedOutput(); err != nil {
			return fmt.Errorf("after the runs: %s", out)
		}
	}

	w := bufio.NewWriter(os.Stdout)
	defer w.Flush()
	fmt.Fprintf(w, "Whole process, median of %d runs that take turns, %s, %s.\n\n", runs, runtime.Version(), kernel())
	fmt.Fprintln(w, "| post-login program | median | 10th to 90th percentile | ratio to the empty wrapper |")
	fmt.Fprintln(w, "|---|--:|--:|--:|")
	base := median(times[1])
	for i, c := range candidates {
		slices.Sort(times[i])
		low, high := times[i][runs/10], times[i][runs*9/10]
		fmt.Fprintf(w, "| %s | %s ms | %s to %s ms | %.2f |\n", c.name,
			ms(median(times[i])), ms(low), ms(high), float64(median(times[i]))/float64(base))
	}
	fmt.Fprintf(w, "\nThe shell script takes %.1f times as long as `nftwl login` for a new address.\n",
		float64(median(times[5]))/float64(median(times[2])))
	return nil
}

// run executes the program once, and returns how long the whole process took.
func (c candidate) run(run int) (time.Duration, error) {
	cmd := exec.Command(c.command[0], c.command[1:]...)
	cmd.Env = []string{"IP=" + c.address(run), "USER=alice"}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	start := time.Now()
	err := cmd.Run()
	took := time.Since(start)
	if err != nil || stderr.Len() > 0 {
		return 0, fmt.Errorf("%s: %v: %s", c.name, err, &stderr)
	}
	return took, nil
}

func median(times []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(times))
	return sorted[len(sorted)/2]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f", float64(d)/float64(time.Millisecond)) }

func kernel() string {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "unknown kernel"
	}
	return "Linux " + string(bytes.TrimSpace(release))
}
