package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
)

// load has nft load a file in a network namespace of its own, and returns the
// sets that are there then. So nft's language, and what is an error in it, is
// nft's alone; and whatever the file does to the rest of the ruleset is gone with
// the namespace.
//
// It needs root.
func load(text string, table nftset.Table, names []string) (*File, error) {
	if strings.HasPrefix(strings.TrimSpace(text), "{") {
		return nil, errors.New("this is JSON; restore reads what nft lists without --json")
	}
	var f File
	done := make(chan error)
	go func() {
		// The thread is not unlocked: it ends with the goroutine, and the
		// namespace with it.
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("it is no snapshot, and only root can have nft read it: %w", err)
			}
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
		}()
	}()
	if err := <-done; err != nil {
		return nil, err
	}
	return &f, nil
}

// nftError is the first line of what nft prints of a file that it refuses.
var nftError = regexp.MustCompile(`^[^:\s]*:(\d+):[-\d]+: Error: (.*)`)

// nft loads text in the network namespace of this thread.
func nft(text string) error {
	const patience = time.Minute // it takes seconds for a million elements
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nft", "-f", "-")
	cmd.Env = append(cmd.Environ(), "LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin")
	cmd.Stdin = strings.NewReader(text)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("nft has not read it within %v", patience)
	case errors.As(err, &exit):
		line, _, _ := strings.Cut(string(out), "\n")
		if m := nftError.FindStringSubmatch(line); m != nil {
			return fmt.Errorf("line %s: nft: %s", m[1], nftset.CleanComment(m[2]))
		}
		return fmt.Errorf("nft: %s", nftset.CleanComment(line))
	}
	return err
}
