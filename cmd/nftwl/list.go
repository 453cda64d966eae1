package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"nftwl/pkg/nftset"
)

func newList(configPath *string) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list [trusted|banned|limited]",
		Short: "List the addresses that are trusted, banned and limited",
		Long: `Lists the addresses of all lists, or of one: a line for each address with its
ports, the time left (the shortest and the longest, if its ports differ) and the
comments. Each list begins with the address that was added or renewed last, and
ends with the permanent ones.

limited are the addresses that exceeded the limit of the shipped rules. An IPv6
element that the rules take for a network is shown as one (2001:db8:1:2::/64).

On a terminal, lines are made to fit: comments are cut, and ports are counted
("all 5" are the configured ones) or left out. NO_COLOR=1 turns colour off.

For programs there is --json: an array with an object for each element, ordered
by list, address and port; "expires" is the time left in seconds.

'watch -n 5 nftwl list' shows the lists anew every five seconds.

Exit status: 0, or 1 if a set cannot be read; the others are still listed.`,
		Example: `  nftwl list
  nftwl list --json trusted`,
		RunE: withSession(configPath, func(s *session, args []string) error {
			lists := allLists
			if len(args) == 1 {
				lists = []list{list(args[0])}
			}
			rows, errs := s.rows(lists)
			for _, err := range errs {
				printError(err)
			}
			var err error
			switch on := terminal(); {
			case asJSON:
				err = writeJSON(rows)
			case len(rows) > 0:
				_, err = fmt.Println(strings.Join(table(byAddress(rows), s.Ports, on.width, on.colour), "\n"))
			case on.there && len(errs) == 0:
				printNote("no address is %s", cmp.Or(strings.Join(args, ""), "trusted, banned or limited"))
			}
			if err == nil && len(errs) > 0 {
				err = &status{code: exitFailed}
			}
			return err
		}),
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one object per element, for programs")
	return cmd
}

// row is an element with the list and set that it is in.
type row struct {
	list list
	set  string
	name string // of the address, or of the network that it stands for
	nftset.Element
}

// rows reads all elements of the lists, ordered by list, address and port. It
// returns an error for each set that it cannot read.
func (s *session) rows(lists []list) (rows []row, errs []error) {
	for _, l := range lists {
		for _, name := range l.sets(s.Config).Both() {
			set, err := s.conn.Set(s.Table, name)
			var elems []nftset.Element
			if err == nil {
				elems, err = s.conn.Elements(set)
			}
			switch {
			case l == limited && errors.Is(err, nftset.ErrNoSet): // the rules are others
			case errors.Is(err, nftset.ErrNoTable), errors.Is(err, nftset.ErrPermission):
				return rows, append(errs, err) // the other sets fail too
			case err != nil:
				errs = append(errs, err)
			}
			for _, e := range elems {
				rows = append(rows, row{l, name, l.name(s.Config, e.Addr), e})
			}
		}
	}
	return rows, errs
}

// element is a row in JSON. Fields that the element does not have are absent.
type element struct {
	List    list    `json:"list"`
	Set     string  `json:"set"`
	Address string  `json:"address"`
	Port    uint16  `json:"port,omitempty"`
	Timeout float64 `json:"timeout,omitempty"` // seconds
	Expires float64 `json:"expires,omitempty"` // seconds
	Comment string  `json:"comment,omitempty"`
}

func writeJSON(rows []row) error {
	elems := []element{}
	for _, r := range rows {
		address := nftset.Key{Addr: r.Addr}.String()
		elems = append(elems, element{r.list, r.set, address, r.Port, r.Timeout.Seconds(), r.Expires.Seconds(), r.Comment})
	}
	enc := json.NewEncoder(os.Stdout)
	enc.SetEscapeHTML(false)
	return enc.Encode(elems)
}

// listed is what a list has of an address.
type listed struct {
	list  list
	addr  netip.Addr
	name  string
	elems []nftset.Element // by port; never empty
	ports []uint16         // none if the set's keys have none
	age   time.Duration    // since an element was added or renewed last; the most for permanent ones
}

// byAddress groups rows by list and address, within a list the youngest first.
func byAddress(rows []row) (all []listed) {
	for i, r := range rows {
		if i == 0 || r.list != rows[i-1].list || r.Addr != rows[i-1].Addr {
			all = append(all, listed{list: r.list, addr: r.Addr, name: r.name, age: math.MaxInt64})
		}
		a := &all[len(all)-1]
		a.elems = append(a.elems, r.Element)
		if r.Port != 0 {
			a.ports = append(a.ports, r.Port)
		}
		if !r.Permanent() {
			a.age = min(a.age, r.Timeout-r.Expires)
		}
	}
	slices.SortFunc(all, func(a, b listed) int {
		return cmp.Or(cmp.Compare(slices.Index(allLists, a.list), slices.Index(allLists, b.list)), cmp.Compare(a.age, b.age), a.addr.Compare(b.addr))
	})
	return all
}

// comment joins the different comments of the elements, which any tool may have
// written.
func (a *listed) comment() string {
	var comments []string
	for _, e := range a.elems {
		if text := printable(nftset.CleanComment(e.Comment)); text != "" && !slices.Contains(comments, text) {
			comments = append(comments, text)
		}
	}
	return strings.Join(comments, ", ")
}

// timeLeft is how long elements live: the shortest and the longest, if they differ
// by a second or more.
func timeLeft(elems []nftset.Element) string {
	shortest, longest := time.Duration(math.MaxInt64), time.Duration(0)
	for _, e := range elems {
		left := e.Expires
		if e.Permanent() {
			left = math.MaxInt64
		}
		shortest, longest = min(shortest, left), max(longest, left)
	}
	if longest-shortest < time.Second {
		return life(shortest)
	}
	return life(shortest) + " to " + life(longest)
}

// table lays addresses out in columns below a header. A width that is not 0 is a
// terminal's: ports are counted or left out until comments have some room, and
// longer lines are cut.
func table(all []listed, configured []uint16, width int, colour bool) []string {
	const least = 10 // columns for a comment
	lists, addresses, times := []string{"LIST"}, []string{"ADDRESS"}, []string{"TIME LEFT"}
	ports, counts, comments := []string{"PORTS"}, []string{"PORTS"}, []string{"COMMENT"}
	for _, a := range all {
		lists = append(lists, string(a.list))
		addresses = append(addresses, a.name)
		times = append(times, timeLeft(a.elems))
		ports = append(ports, cmp.Or(joinPorts(a.ports), "all"))
		counts = append(counts, countPorts(a.ports, configured))
		comments = append(comments, a.comment())
	}
	var lines []string
	for _, ports := range [][]string{ports, counts, nil} {
		lines = sideBySide(lists, addresses, ports, times)
		if width == 0 || len(lines[0])+least <= width {
			break
		}
	}
	for i, line := range lines {
		line = strings.TrimRight(line+comments[i], " ")
		if width > 0 {
			line = cut(line, width)
		}
		switch {
		case !colour:
		case i == 0:
			line = "\x1b[1m" + line + "\x1b[0m" // bold
		case lists[i] != string(trusted):
			line = strings.Replace(line, lists[i], "\x1b[31m"+lists[i]+"\x1b[0m", 1) // red
		}
		lines[i] = line
	}
	return lines
}

// sideBySide makes lines of columns, each two spaces wider than its widest cell.
func sideBySide(columns ...[]string) []string {
	lines := make([]string, len(columns[0]))
	for _, cells := range columns {
		wide := 0
		for _, cell := range cells {
			wide = max(wide, len(cell))
		}
		for i, cell := range cells {
			lines[i] += fmt.Sprintf("%-*s", wide+2, cell)
		}
	}
	return lines
}

// countPorts is short for a list of ports.
func countPorts(ports, configured []uint16) string {
	switch n := len(ports); {
	case n < 2:
		return cmp.Or(joinPorts(ports), "all")
	case slices.Equal(ports, slices.Sorted(slices.Values(configured))):
		return fmt.Sprintf("all %d", n)
	default:
		return fmt.Sprintf("%d ports", n)
	}
}
