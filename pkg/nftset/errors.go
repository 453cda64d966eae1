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
	ErrKeyType    = errors.New("the set's key type is not one of addresses")
	ErrInterval   = errors.New("the set is an interval set")
	ErrMap        = errors.New("the set is a map")
	ErrNoTimeout  = errors.New("the set has no timeout flag")
	ErrConstant   = errors.New("the set is constant")
	ErrFull       = errors.New("the set is full")
	ErrNotFound   = errors.New("the element does not exist")
	ErrPermission = errors.New("no permission")
	ErrDeadline   = errors.New("the kernel did not answer in time")
	ErrSupport    = errors.New("the kernel has no nf_tables")

	ErrExists = errors.New("the element exists already") // and was to be created

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
	Table Table  // zero for an error of the connection
	Set   string // empty if it concerns the table
	Size  uint32 // of the set, for ErrFull
	Type  string // of the set's keys as nft names it, for ErrKeyType
	Key   Key    // that does not fit the type, for ErrKeyType; else zero
	Err   error  // one of the reasons above, or an errno
}

func (e *Error) Unwrap() error { return e.Err }

func (e *Error) Error() string {
	what := "set " + e.Set
	switch {
	case e.Table.Name == "":
		what = "nftables"
	case e.Set == "":
		what = "table " + e.Table.String()
	}
	switch e.Err {
	case ErrNoTable:
		return fmt.Sprintf("table %s does not exist", e.Table)
	case ErrNoSet:
		return fmt.Sprintf("set %s does not exist in table %s", e.Set, e.Table)
	case ErrKeyType:
		if e.Key.Addr.IsValid() {
			return fmt.Sprintf("%s has keys of type %s, which %s is not", what, e.Type, e.Key)
		}
		return fmt.Sprintf("%s has keys of type %s, not of an address or an address . inet_service", what, e.Type)
	case ErrInterval:
		return what + " is an interval set; single addresses need a plain one"
	case ErrMap:
		return what + " is a map"
	case ErrNoTimeout:
		return what + " has no timeout flag, so its elements cannot expire"
	case ErrConstant:
		return what + " is constant, so its elements cannot change"
	case ErrFull:
		return fmt.Sprintf("%s is full (%d elements)", what, e.Size)
	case ErrPermission:
		return "no permission for nftables: the capability CAP_NET_ADMIN is missing"
	case ErrSupport:
		return "the kernel offers no nf_tables"
	}
	return fmt.Sprintf("%s: %v", what, e.Err)
}

// error returns an *Error about the set, or err if it is one.
func (s *Set) error(err error) error {
	if typed, ok := err.(*Error); ok {
		return typed
	}
	if err == unix.ENFILE {
		err = ErrFull // nft_add_set_elem() in net/netfilter/nf_tables_api.c
	}
	return &Error{Table: s.Table, Set: s.Name, Size: s.Size, Err: reason(err)}
}

func (t Table) error(err error) error {
	return &Error{Table: t, Err: reason(err)}
}

// reason names an errno that can mean one thing only. What ENOENT means, only the
// caller knows.
func reason(err error) error {
	errno, ok := err.(unix.Errno)
	if !ok {
		return err // it says more already
	}
	switch errno {
	case unix.EEXIST:
		return ErrExists
	case unix.EPERM, unix.EACCES:
		return ErrPermission
	case unix.ERESTART:
		return ErrGeneration // nfnetlink_rcv_batch() in net/netfilter/nfnetlink.c
	case unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT:
		return ErrSupport
	}
	return errno
}
