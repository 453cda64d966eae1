// Package snapshot keeps nftables sets in a file over restarts.
//
// The file is text that nft -f loads as it is: a line with the format's version,
// the time, and the table that was saved; the definition of each set with its
// elements, ordered by address; and a last line with the number of elements.
// Restore also reads what nft list set and nft list ruleset print.
package snapshot

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"nftwl/pkg/nftset"
)

// Sets are the sets of a snapshot.
type Sets struct {
	Table nftset.Table
	Names []string
	// Refuse returns why an address must not be restored, or nil. If Refuse is nil,
	// every address is restored.
	Refuse func(netip.Addr) error
}

// describe returns the definitions of the sets, all of which must exist.
func (s Sets) describe(conn *nftset.Conn) ([]*nftset.Set, error) {
	var sets []*nftset.Set
	for _, name := range s.Names {
		set, err := conn.Set(s.Table, name)
		if err != nil {
			return nil, err
		}
		sets = append(sets, set)
	}
	return sets, nil
}

const (
	headerStart  = "# nftwl snapshot "
	version      = "1"
	trailerStart = "# nftwl end, "

	// permanent is the timeout of a permanent element in a set with a default
	// timeout: nft before 1.1.1 has no word for it, and gives an element without
	// a timeout the default.
	permanent = nftset.MaxTimeout
	// longest is the longest other timeout. It is written for any that is longer.
	longest = permanent - time.Millisecond
)

func header(saved time.Time, table nftset.Instance) string {
	of := ""
	if table != (nftset.Instance{}) {
		of = fmt.Sprintf(", table %d, namespace %d, boot %s", table.Handle, table.Namespace, table.Boot)
	}
	return headerStart + version + ", saved " + saved.UTC().Format(time.RFC3339Nano) + of + "\n"
}

func trailer(elements int) string {
	return trailerStart + strconv.Itoa(elements) + " elements\n"
}

// parseHeader returns when a snapshot was saved, and from which table. The time is
// zero if the line is not a snapshot's, the table if the line names none.
func parseHeader(line string) (saved time.Time, table nftset.Instance, err error) {
	rest, ok := strings.CutPrefix(line, headerStart)
	if !ok {
		return time.Time{}, table, nil
	}
	v, rest, _ := strings.Cut(rest, ", saved ")
	if v != version {
		return time.Time{}, table, fmt.Errorf("the snapshot has format %.20q; this nftwl knows format %s", v, version)
	}
	at, of, named := strings.Cut(rest, ", ")
	saved, err = time.Parse(time.RFC3339Nano, at)
	if err != nil || saved.IsZero() {
		return time.Time{}, table, fmt.Errorf("the snapshot's time %.40q is not one", at)
	}
	if named {
		n, err := fmt.Sscanf(of, "table %d, namespace %d, boot %36s", &table.Handle, &table.Namespace, &table.Boot)
		if err != nil || n != 3 || header(saved, table) != line+"\n" {
			return time.Time{}, nftset.Instance{}, fmt.Errorf("the snapshot's table %.80q is not one", of)
		}
	}
	return saved, table, nil
}

// parseTrailer returns what is before the last line of a snapshot, and how many
// elements that line says it has. A file that was cut short lacks the line.
func parseTrailer(text string) (before string, elements int, err error) {
	text = strings.TrimSuffix(text, "\n")
	i := strings.LastIndexByte(text, '\n') + 1
	elements, err = strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(text[i:], trailerStart), " elements"))
	if err != nil || elements < 0 || trailer(elements) != text[i:]+"\n" {
		return "", 0, errors.New("it was cut short: its last line is missing")
	}
	return text[:i], elements, nil
}

// appendSet writes the definition of a set, up to its elements.
func appendSet(b []byte, s *nftset.Set) []byte {
	b = fmt.Appendf(b, "table %s {\n\tset %s {\n\t\ttype %s\n", s.Table, s.Name, s.Key)
	if s.Memory {
		b = append(b, "\t\tpolicy memory\n"...)
	}
	if s.Size > 0 {
		b = fmt.Appendf(b, "\t\tsize %d\n", s.Size)
	}
	switch {
	case s.Dynamic && s.Timeouts:
		b = append(b, "\t\tflags dynamic,timeout\n"...)
	case s.Dynamic:
		b = append(b, "\t\tflags dynamic\n"...)
	case s.Timeouts:
		b = append(b, "\t\tflags timeout\n"...)
	}
	if s.Counter {
		b = append(b, "\t\tcounter\n"...)
	}
	if s.Timeout > 0 {
		b = fmt.Appendf(b, "\t\ttimeout %s\n", nftset.FormatTimeout(min(s.Timeout, longest)))
	}
	if s.GCInterval > 0 {
		b = fmt.Appendf(b, "\t\tgc-interval %s\n", nftset.FormatTimeout(s.GCInterval))
	}
	if s.Comment != "" {
		b = fmt.Appendf(b, "\t\tcomment \"%s\"\n", nftset.CleanComment(s.Comment))
	}
	return b
}

// appendElement writes an element.
func appendElement(b []byte, s *nftset.Set, e nftset.Element) []byte {
	b = append(b, "\t\t\t"...)
	if e.CatchAll() {
		b = append(b, '*')
	} else {
		b = e.Addr.AppendTo(b)
		if s.Key.Port {
			b = append(b, " . "...)
			b = strconv.AppendUint(b, uint64(e.Port), 10)
		}
	}
	switch {
	case !e.Permanent():
		timeout := min(e.Timeout, longest)
		b = append(b, " timeout "...)
		b = nftset.AppendTimeout(b, timeout)
		b = append(b, " expires "...)
		// nft refuses a file in which the time left is more than the timeout.
		b = nftset.AppendTimeout(b, min(max(e.Expires, time.Millisecond), timeout))
	case s.Timeout > 0:
		b = append(b, " timeout "...)
		b = nftset.AppendTimeout(b, permanent)
	}
	if e.Comment != "" {
		b = append(b, " comment \""...)
		b = append(b, nftset.CleanComment(e.Comment)...)
		b = append(b, '"')
	}
	return b
}

// What stands before, between and after the elements of a set, and at its end.
const (
	elementsStart = "\t\telements = {\n"
	elementsNext  = ",\n"
	elementsEnd   = "\n\t\t}\n"
	setEnd        = "\t}\n}\n"
)
