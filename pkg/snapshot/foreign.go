package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/firewall"
	"nftwl/pkg/nftset"
)

// load makes nft load a file in a network namespace of its own, and returns the
// sets that are there then. So nft alone decides what the file means, and whatever
// else it does ends with the namespace. load needs root.
func load(text string, table nftset.Table, names []string) (*File, error) {
	if strings.HasPrefix(strings.TrimSpace(text), "{") {
		return nil, errors.New("this is JSON; restore reads what nft lists without --json")
	}
	var f File
	err := firewall.Inside(func() error {
		defer makeDevices(text)()
		if err := nft(text); err != nil {
			return err
		}
		conn, err := nftset.Dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		for _, name := range names {
			set, err := conn.Set(table, name)
			if errors.Is(err, nftset.ErrNoTable) || errors.Is(err, nftset.ErrNoSet) {
				continue
			}
			if err != nil {
				return err
			}
			elems, err := conn.Elements(set)
			if err != nil {
				return err
			}
			f.Sets = append(f.Sets, Section{*set, elems})
		}
		return nil
	})
	if errors.Is(err, firewall.ErrPermission) {
		err = fmt.Errorf("it is not a snapshot, and only root can have nft read other files: %w", err)
	}
	if err != nil {
		return nil, err
	}
	return &f, nil
}

// makeDevices makes the interfaces that a file names in the network namespace of
// this thread. nft reports any that cannot be made.
func makeDevices(text string) (remove func()) {
	// Of iif, oif, chains and flowtables, one or a list.
	ofDevices := regexp.MustCompile(`\b(?:[io]if|devices?)\b[ !=]+(?:\{[^}]*\}|[^\s;]+)`)
	var names []string
	for _, found := range ofDevices.FindAllString(text, -1) {
		words := strings.FieldsFunc(found, func(r rune) bool { return strings.ContainsRune(" \t\n!={},\"", r) })
		names = append(names, words[1:]...)
	}
	slices.Sort(names)
	var fds []int
	for _, name := range slices.Compact(names) {
		if fd, err := firewall.MakeDevice(name, 0); err == nil {
			fds = append(fds, fd)
		}
	}
	return func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
}

// nft loads text in the network namespace of this thread.
func nft(text string) error {
	const patience = time.Minute // it takes seconds for a million elements
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(text)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("nft took longer than %v to read it", patience)
	case errors.As(err, &exit):
		line, _, _ := strings.Cut(string(out), "\n")
		if m := regexp.MustCompile(`^[^:\s]*:(\d+):[-\d]+: Error: (.*)`).FindStringSubmatch(line); m != nil {
			return fmt.Errorf("line %s: nft: %s", m[1], nftset.CleanComment(m[2]))
		}
		return fmt.Errorf("nft: %s", nftset.CleanComment(line))
	}
	return err
}
