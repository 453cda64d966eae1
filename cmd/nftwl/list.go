package main

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
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
comments. The list "limited" has addresses that exceeded the limit of the
shipped rules.

--json prints an array with an object for each element; "expires" is the time
left in seconds.

Exit status: 0, or 1 if a set cannot be read; the others are still listed.`,
		Example: `  nftwl list
  nftwl list --json trusted
  watch -n 5 nftwl list`,
		RunE: withSession(configPath, nftset.Decided, func(s *session, args []string) error {
			lists := allLists
			if len(args) == 1 {
				lists = []list{list(args[0])}
			}
			rows, errs := s.rows(lists)
			for _, err := range errs {
				printError(err)
			}
			var err error
			switch {
			case asJSON:
				err = writeJSON(rows)
			case len(rows) > 0:
				_, err = fmt.Println(strings.Join(table(rows), "\n"))
			case terminal().there && len(errs) == 0:
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
	return printJSON(elems)
}

// listed is what a list has of an address.
type listed struct {
	list  list
	name  string
	elems []nftset.Element // by port; never empty
}

// byAddress groups rows by list and address.
func byAddress(rows []row) (all []listed) {
	for i, r := range rows {
		if i == 0 || r.list != rows[i-1].list || r.Addr != rows[i-1].Addr {
			all = append(all, listed{list: r.list, name: r.name})
		}
		a := &all[len(all)-1]
		a.elems = append(a.elems, r.Element)
	}
	return all
}

// ports are those of the elements; "all" if the set's keys have none.
func (a *listed) ports() string {
	var ports []uint16
	for _, e := range a.elems {
		if e.Port != 0 {
			ports = append(ports, e.Port)
		}
	}
	return cmp.Or(joinPorts(ports), "all")
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

// timeLeft is that of elements: the shortest and the longest, if they differ by a
// second or more.
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
		return inWords(shortest)
	}
	return inWords(shortest) + " to " + inWords(longest)
}

// inWords is a time left, rounded to what is useful.
func inWords(d time.Duration) string {
	switch {
	case d == math.MaxInt64:
		return "permanent"
	case d >= 24*time.Hour:
		d = d.Truncate(time.Hour)
	case d >= time.Hour:
		d = d.Truncate(time.Minute)
	case d >= time.Second:
		d = d.Truncate(time.Second)
	}
	return nftset.FormatTimeout(d)
}

// table has a line for each address, below a header.
func table(rows []row) []string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "LIST\tADDRESS\tPORTS\tTIME LEFT\tCOMMENT")
	for _, a := range byAddress(rows) {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", a.list, a.name, a.ports(), timeLeft(a.elems), a.comment())
	}
	_ = w.Flush() // a Builder takes everything
	var lines []string
	for line := range strings.Lines(b.String()) {
		lines = append(lines, strings.TrimRight(line, " \n"))
	}
	return lines
}
