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
	ErrSupport    = errors.New("the kernel offers no nf_tables")
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

// error returns an *Error about the set, or err if it is one.
func (s *Set) error(err error) error {
	if typed, ok := err.(*Error); ok {
		return typed
	}
	detail := ""
	switch err {
	case ErrNoSet:
		detail = "does not exist in table " + s.Table.String()
	case ErrFull, unix.ENFILE: // nft_add_set_elem() in net/netfilter/nf_tables_api.c
		err, detail = ErrFull, fmt.Sprintf("is full (%d elements)", s.Size)
	}
	return &Error{s.Table, s.Name, reason(err), detail}
}

func (t Table) error(err error) error {
	detail := ""
	if err == ErrNoTable {
		detail = "does not exist"
	}
	return &Error{Table: t, Err: reason(err), Detail: detail}
}

// reason names an errno that can mean one thing only. What ENOENT means, only the
// caller knows.
func reason(err error) error {
	switch err {
	case unix.EEXIST:
		return ErrExists
	case unix.EPERM, unix.EACCES:
		return ErrPermission
	case unix.ERESTART:
		return ErrGeneration // nfnetlink_rcv_batch() in net/netfilter/nfnetlink.c
	case unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT:
		return ErrSupport
	}
	return err
}
