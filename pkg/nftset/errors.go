package nftset

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// The reasons for which an operation fails. An *Error wraps one of them.
var (
	ErrNoTable    = errors.New("the table does not exist")
	ErrNoSet      = errors.New("the set does not exist")
	ErrUnfit      = errors.New("the set cannot hold addresses with a timeout")
	ErrFull       = errors.New("the set is full")
	ErrNotFound   = errors.New("the element does not exist")
	ErrExists     = errors.New("the element exists already")
	ErrPermission = errors.New("no permission for nftables: the capability CAP_NET_ADMIN is missing")
	ErrSupport    = errors.New("this kernel has no nf_tables")
	ErrDeadline   = errors.New("the kernel did not answer in time")

	// ErrGeneration: the transaction was for another generation of the ruleset,
	// and was not carried out.
	ErrGeneration = errors.New("the ruleset has changed")

	// ErrBusy: nothing was changed, because the ruleset changed between each
	// lookup and its transaction.
	ErrBusy = errors.New("the ruleset kept changing")

	// ErrInterrupted: the set changed during a dump, which may lack elements.
	ErrInterrupted = errors.New("the set changed while it was read")
)

// Error says what failed on which table or set, and why.
type Error struct {
	Table  Table  // zero for an error of the connection
	Set    string // empty if it concerns the table
	Err    error  // one of the reasons above, or an errno
	Detail string // what the table or set is or lacks; may be empty
}

func (e *Error) Unwrap() error { return e.Err }

func (e *Error) Error() string {
	what := "set " + e.Set
	switch {
	case e.Err == ErrPermission, e.Err == ErrSupport:
		return e.Err.Error()
	case e.Table.Name == "":
		what = "nftables"
	case e.Set == "":
		what = "table " + e.Table.String()
	}
	if e.Detail != "" {
		return what + " " + e.Detail
	}
	return fmt.Sprintf("%s: %v", what, e.Err)
}

// unfit returns an ErrUnfit.
func (s *Set) unfit(detail string) error {
	return &Error{Table: s.Table, Set: s.Name, Err: ErrUnfit, Detail: detail}
}

// error returns an *Error about the set, or err if it is one. It names an errno that
// can mean one thing only; what ENOENT means, only the caller knows.
func (s *Set) error(err error) error {
	if typed, ok := err.(*Error); ok {
		return typed
	}
	e := &Error{Table: s.Table, Set: s.Name, Err: err}
	switch err {
	case ErrNoTable:
		e.Detail = "does not exist"
	case ErrNoSet:
		e.Detail = "does not exist in table " + s.Table.String()
	case ErrFull, unix.ENFILE: // nft_add_set_elem() in net/netfilter/nf_tables_api.c
		e.Err, e.Detail = ErrFull, fmt.Sprintf("is full (%d elements)", s.Size)
	case unix.EEXIST:
		e.Err = ErrExists
	case unix.EPERM, unix.EACCES:
		e.Err = ErrPermission
	case unix.ERESTART: // nfnetlink_rcv_batch() in net/netfilter/nfnetlink.c
		e.Err = ErrGeneration
	case unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT:
		e.Err = ErrSupport
	}
	return e
}

// error returns an *Error about the table, or about the connection if it is zero.
func (t Table) error(err error) error { return (&Set{Table: t}).error(err) }
