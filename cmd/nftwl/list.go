package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	var interval string
	cmd := &cobra.Command{
		Use:   "list [trusted|banned|limited]",
		Short: "List the addresses that are trusted, banned and limited",
		Long: `Lists the addresses of all lists, or of one: a line for each address with its
ports, the time that is left (the shortest and the longest, where its ports
differ) and the comments. Whoever logged in or was banned last comes first in
each list; permanent elements, of which the kernel does not know since when they
are there, come last.

limited are those that exceeded the limit of the shipped rules; with other rules
there are none. An IPv6 element that the rules take for a network is shown as
one (2001:db8:1:2::/64); --json has its address as it is in the set.

On a terminal, lines are made to fit: comments are cut, ports become their
number ("all 5" are the configured ones), and columns are left out where that is
not enough. Colour is for terminals alone; NO_COLOR=1 turns it off. Programs
read --json: an array with an object for each element, ordered by list, address
and port, with the seconds that are left in "expires".

--watch shows the lists anew every two seconds, or at the INTERVAL that is given
after an equals sign, until Ctrl-C.

Exit status: 0, or 1 when a set cannot be read; the others are listed then.`,
		Example: `  nftwl list
  nftwl list --watch=5s banned
  nftwl list --json trusted`,
		Args:      cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{string(trusted), string(banned), string(limited)},
		RunE: func(cmd *cobra.Command, args []string) error {
			lists := allLists
			if len(args) == 1 {
				lists = []list{list(args[0])}
			}
			if cmd.Flags().Changed("watch") {
				every, err := nftset.ParseTimeout(interval)
				switch {
				case err != nil:
					return fmt.Errorf("--watch: %w", err)
				case asJSON:
					return errors.New("--watch and --json exclude each other")
				case !terminal().redraws:
					return errors.New("--watch: standard output is not a terminal that can be redrawn")
				}
				return watch(*configPath, lists, every)
			}
			s, err := open(*configPath)
			if err != nil {
				return err
			}
			defer s.conn.Close()
			rows, errs := s.rows(lists)
			for _, err := range errs {
				printError(err)
			}
			if asJSON {
				err = writeJSON(os.Stdout, rows)
			} else {
				t := terminal()
				if lines := table(byAddress(rows), s.Ports, t.width, t.colour); len(lines) > 0 {
					_, err = fmt.Println(strings.Join(lines, "\n"))
				}
			}
			if err == nil && len(errs) > 0 {
				return &status{code: exitFailed}
			}
			return failed(err)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "one object per element, for programs")
	cmd.Flags().StringVar(&interval, "watch", "", "show the lists anew every `INTERVAL`, such as 5s")
	cmd.Flags().Lookup("watch").NoOptDefVal = "2s"
	return cmd
}

// row is an element with the list and set that it is in.
type row struct {
	list list
	set  string
	name string // of the address, or of the network that it stands for
	nftset.Element
}

// rows reads all elements of the lists, ordered by list, address and port,
// but for the sets that cannot be read.
func (s *session) rows(lists []list) (rows []row, errs []error) {
	for _, l := range lists {
		for _, name := range l.sets(s.Config).Both() {
			set, err := s.conn.Set(s.Table, name)
			var elems []nftset.Element
			if err == nil {
				elems, err = s.conn.Elements(set)
			}
			if l == limited && errors.Is(err, nftset.ErrNoSet) {
				continue // the rules are others
			}
			if err != nil {
				errs = append(errs, err)
				if errors.Is(err, nftset.ErrNoTable) || errors.Is(err, nftset.ErrPermission) {
					return rows, errs // the other sets fail alike
				}
			}
			slices.SortFunc(elems, func(a, b nftset.Element) int {
				return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Port, b.Port))
			})
			for _, e := range elems {
				rows = append(rows, row{l, name, l.name(s.Config, e.Addr), e})
			}
		}
	}
	return rows, errs
}

// element is a row as JSON has it. Absent fields are those that the element
// has not.
type element struct {
	List    list     `json:"list"`
	Set     string   `json:"set"`
	Address string   `json:"address"`
	Port    uint16   `json:"port,omitempty"`
	Timeout *float64 `json:"timeout,omitempty"` // seconds
	Expires *float64 `json:"expires,omitempty"` // seconds
	Comment string   `json:"comment,omitempty"`
}

func writeJSON(w io.Writer, rows []row) error {
	elems := make([]element, len(rows))
	for i, r := range rows {
		elems[i] = element{List: r.list, Set: r.set, Address: nftset.Key{Addr: r.Addr}.String(), Port: r.Port, Comment: r.Comment}
		if !r.Permanent() {
			timeout, expires := r.Timeout.Seconds(), r.Expires.Seconds()
			elems[i].Timeout, elems[i].Expires = &timeout, &expires
		}
	}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return failed(enc.Encode(elems))
}

// listed is what a list has of an address.
type listed struct {
	list  list
	addr  netip.Addr
	name  string
	elems []nftset.Element // by port; never empty
	age   time.Duration    // since an element was added or renewed last; the most where that is not known
}

// byAddress groups rows by list and address, within a list the youngest first.
func byAddress(rows []row) (all []listed) {
	for i, r := range rows {
		if i == 0 || r.list != rows[i-1].list || r.Addr != rows[i-1].Addr {
			all = append(all, listed{list: r.list, addr: r.Addr, name: r.name, age: math.MaxInt64})
		}
		c := &all[len(all)-1]
		c.elems = append(c.elems, r.Element)
		if !r.Permanent() {
			c.age = min(c.age, r.Timeout-r.Expires)
		}
	}
	slices.SortFunc(all, func(a, b listed) int {
		return cmp.Or(cmp.Compare(slices.Index(allLists, a.list), slices.Index(allLists, b.list)), cmp.Compare(a.age, b.age), a.addr.Compare(b.addr))
	})
	return all
}

func (c *listed) ports() (ports []uint16) {
	for _, e := range c.elems {
		if e.Port != 0 {
			ports = append(ports, e.Port)
		}
	}
	return ports
}

// comment joins the different comments of the elements. Whoever else writes to
// the set may have noted anything.
func (c *listed) comment() string {
	var comments []string
	for _, e := range c.elems {
		if text := printable(nftset.CleanComment(e.Comment)); text != "" && !slices.Contains(comments, text) {
			comments = append(comments, text)
		}
	}
	return strings.Join(comments, ", ")
}

// ending tells that nothing of the address outlives the last tenth of its
// timeout, or that it has no end: the lines that ask for the least attention.
func (c *listed) ending() bool {
	return !slices.ContainsFunc(c.elems, func(e nftset.Element) bool {
		return !e.Permanent() && e.Expires >= e.Timeout/10
	})
}

// timeLeft says how long elements live: the shortest and the longest, where
// they differ by a second or more.
func timeLeft(elems []nftset.Element) string {
	left := func(e nftset.Element) time.Duration {
		if e.Permanent() {
			return math.MaxInt64
		}
		return e.Expires
	}
	order := func(a, b nftset.Element) int { return cmp.Compare(left(a), left(b)) }
	shortest, longest := left(slices.MinFunc(elems, order)), left(slices.MaxFunc(elems, order))
	if longest-shortest < time.Second {
		return life(shortest)
	}
	return life(shortest) + " to " + life(longest)
}

// The columns of the table.
const (
	inList = iota
	inAddress
	inPorts
	inTime
	inComment
	inAll
)

// table lays addresses out in columns below a header. A width that is not 0 is a
// terminal's: what is wider than that is cut, abbreviated and left out, in this
// order, but never the address.
func table(all []listed, configured []uint16, width int, colour bool) []string {
	if len(all) == 0 {
		return nil
	}
	cells := [][inAll]string{{"LIST", "ADDRESS", "PORTS", "TIME LEFT", "COMMENT"}}
	for _, c := range all {
		ports := "all"
		if p := c.ports(); p != nil {
			ports = joinPorts(p)
		}
		cells = append(cells, [inAll]string{string(c.list), c.name, ports, timeLeft(c.elems), c.comment()})
	}
	var wide [inAll]int
	for column := range wide {
		for _, line := range cells {
			wide[column] = max(wide[column], columns(line[column]))
		}
	}

	const gap = 2
	shown := []int{inList, inAddress, inPorts, inTime, inComment}
	if width > 0 {
		// The width of all, where comments are cut to what still says something.
		least := func() int {
			sum := -gap
			for _, column := range shown {
				sum += gap + wide[column]
				if column == inComment {
					sum -= max(0, wide[column]-10)
				}
			}
			return sum
		}
		if least() > width {
			wide[inPorts] = len(cells[0][inPorts])
			for i, c := range all {
				cells[i+1][inPorts] = countPorts(c.ports(), configured)
				wide[inPorts] = max(wide[inPorts], len(cells[i+1][inPorts]))
			}
		}
		for _, column := range []int{inComment, inPorts, inTime, inList} {
			if least() > width {
				shown = slices.DeleteFunc(shown, func(c int) bool { return c == column })
			}
		}
		room := width
		for _, column := range shown[:len(shown)-1] {
			room -= wide[column] + gap
		}
		for i := range cells {
			cells[i][inComment] = cut(cells[i][inComment], room)
		}
	}

	lines := make([]string, len(cells))
	for i, line := range cells {
		var b strings.Builder
		for _, column := range shown {
			text := line[column]
			style := ""
			switch {
			case !colour || text == "":
			case i == 0:
				style = "1" // bold
			case column == inList && all[i-1].list != trusted:
				style = "31" // red
			case column == inTime && all[i-1].ending():
				style = "2" // dim
			}
			padding := strings.Repeat(" ", gap+wide[column]-columns(text))
			if style != "" {
				text = "\x1b[" + style + "m" + text + "\x1b[0m"
			}
			b.WriteString(text + padding)
		}
		lines[i] = strings.TrimRight(b.String(), " ")
	}
	return lines
}

// countPorts is short for a list of ports.
func countPorts(ports, configured []uint16) string {
	switch {
	case len(ports) == 0:
		return "all"
	case len(ports) == 1:
		return joinPorts(ports)
	case slices.Equal(ports, slices.Sorted(slices.Values(configured))):
		return fmt.Sprint("all ", len(ports))
	}
	return fmt.Sprint(len(ports), " ports")
}
