package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"nftwl/pkg/nftset"
)

// device is an interface of the machine, which the copy has as a TUN device of
// the same name and index, since rules know it by both.
type device struct {
	name      string
	index     int // 0 for any
	addresses []netip.Prefix
	tun       int // file descriptor
}

// route is how packets of a source come in.
type route struct {
	source netip.Prefix
	device *device
	local  netip.Addr // this machine's address, to which they go
}

// What a machine without a route to a source has: an address of the documentation
// (RFC 5737, RFC 3849), at the device of its default route; without one, at a device
// that no rule names.
var (
	fallback = map[bool]netip.Addr{false: netip.MustParseAddr("192.0.2.1"), true: netip.MustParseAddr("2001:db8::1")} // by Is6
	anywhere = []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:ffff::1")}              // by the default route
)

// readDevices returns the machine's interfaces, except lo, and the routes of the
// sources.
func readDevices(sources []netip.Prefix) (devices []*device, routes []route, err error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, nil, err
	}
	r, err := dialRoute()
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(int(r))
	for _, i := range interfaces {
		addresses, err := i.Addrs()
		if err != nil {
			return nil, nil, err
		}
		d := &device{name: i.Name, index: i.Index, tun: -1}
		for _, a := range addresses {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsGlobalUnicast() {
				d.addresses = append(d.addresses, p)
			}
		}
		if i.Flags&net.FlagLoopback == 0 {
			devices = append(devices, d)
		}
	}
	for _, source := range sources {
		index, local, err := r.lookup(source.Addr())
		if err != nil {
			return nil, nil, err
		}
		for _, a := range anywhere {
			if index == 0 {
				index, _, _ = r.lookup(a) // an error is no route
			}
		}
		i := slices.IndexFunc(devices, func(d *device) bool { return d.index == index })
		if i < 0 {
			i, local = len(devices), netip.Addr{}
			devices = append(devices, &device{name: "nftwl0", tun: -1})
		}
		if !local.IsValid() {
			local = fallback[source.Addr().Is6()]
			devices[i].addresses = append(devices[i].addresses, netip.PrefixFrom(local, local.BitLen()))
		}
		routes = append(routes, route{source, devices[i], local})
	}
	return devices, routes, nil
}

// make makes the device in the namespace of the calling thread.
func (d *device) make(r routeConn) (err error) {
	if d.tun, err = MakeDevice(d.name, d.index); err != nil {
		return fmt.Errorf("%w: device %s: %w", ErrTUN, d.name, err)
	}
	if d.index == 0 {
		made, err := net.InterfaceByName(d.name)
		if err != nil {
			return err
		}
		d.index = made.Index
	}
	if err := r.up(d.index); err != nil {
		return fmt.Errorf("device %s: %w", d.name, err)
	}
	for _, a := range d.addresses {
		// One that the kernel refuses carries no packets: addRoute says so.
		_ = r.addAddress(d.index, a)
	}
	return nil
}

// MakeDevice makes a TUN device in the namespace of the calling thread, which is
// there until its file descriptor is closed. An index of 0 stands for any.
func MakeDevice(name string, index int) (fd int, err error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return -1, err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
		return -1, fmt.Errorf("/dev/net/tun: %w", err)
	}
	if index > 0 {
		err = unix.IoctlSetPointerInt(fd, unix.TUNSETIFINDEX, index)
	}
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// routeConn is a connection to the kernel's routing tables, by its file descriptor:
// rtnetlink(7).
type routeConn int

func dialRoute() (routeConn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	return routeConn(fd), err
}

// ask sends a request and returns the body of its one reply, which is empty for
// an acknowledgement.
func (r routeConn) ask(typ, flags uint16, body []byte) ([]byte, error) {
	req := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	req = binary.NativeEndian.AppendUint16(req, typ)
	req = binary.NativeEndian.AppendUint16(req, unix.NLM_F_REQUEST|flags)
	req = append(req, make([]byte, 8)...) // no number, since there is one reply
	if err := unix.Sendto(int(r), append(req, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	buf := make([]byte, 8<<10)
	n, _, err := unix.Recvfrom(int(r), buf, 0)
	if err != nil {
		return nil, err
	}
	if n < unix.NLMSG_HDRLEN+4 {
		return nil, unix.EBADMSG
	}
	if binary.NativeEndian.Uint16(buf[4:]) == unix.NLMSG_ERROR {
		if errno := int32(binary.NativeEndian.Uint32(buf[unix.NLMSG_HDRLEN:])); errno != 0 {
			return nil, unix.Errno(-errno)
		}
		return nil, nil
	}
	return buf[unix.NLMSG_HDRLEN:n], nil
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// lookup returns the interface by which this machine answers an address, and
// its own address there; 0 if it has no route.
func (r routeConn) lookup(to netip.Addr) (index int, local netip.Addr, err error) {
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[1] = family(to), byte(to.BitLen())
	reply, err := r.ask(unix.RTM_GETROUTE, 0, nftset.AppendAttribute(body, unix.RTA_DST, to.AsSlice()))
	var errno unix.Errno
	if errors.As(err, &errno) {
		return 0, local, nil // ENETUNREACH and what else a routing table can say
	}
	if err != nil || len(reply) < unix.SizeofRtMsg {
		return 0, local, err
	}
	if reply[7] == unix.RTN_LOCAL {
		return 0, local, fmt.Errorf("%s %w", to, ErrOwn)
	}
	err = nftset.Attributes(reply[unix.SizeofRtMsg:], func(typ uint16, data []byte) error {
		switch {
		case typ == unix.RTA_OIF && len(data) == 4:
			index = int(binary.NativeEndian.Uint32(data))
		case typ == unix.RTA_PREFSRC:
			local, _ = netip.AddrFromSlice(data)
		}
		return nil
	})
	return index, local, err
}

func (r routeConn) up(index int) error {
	body := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(body[4:], uint32(index))
	binary.NativeEndian.PutUint32(body[8:], unix.IFF_UP)
	binary.NativeEndian.PutUint32(body[12:], unix.IFF_UP)
	_, err := r.ask(unix.RTM_NEWLINK, unix.NLM_F_ACK, body)
	return err
}

func (r routeConn) addAddress(index int, a netip.Prefix) error {
	body := make([]byte, unix.SizeofIfAddrmsg)
	body[0], body[1], body[2] = family(a.Addr()), byte(a.Bits()), unix.IFA_F_NODAD
	binary.NativeEndian.PutUint32(body[4:], uint32(index))
	body = nftset.AppendAttribute(body, unix.IFA_LOCAL, a.Addr().AsSlice())
	body = nftset.AppendAttribute(body, unix.IFA_ADDRESS, a.Addr().AsSlice())
	_, err := r.ask(unix.RTM_NEWADDR, unix.NLM_F_ACK|unix.NLM_F_CREATE, body)
	return err
}

func (r routeConn) addRoute(to netip.Prefix, index int) error {
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[1] = family(to.Addr()), byte(to.Bits())
	body[4], body[5], body[6], body[7] = unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RT_SCOPE_LINK, unix.RTN_UNICAST
	body = nftset.AppendAttribute(body, unix.RTA_DST, to.Masked().Addr().AsSlice())
	body = nftset.AppendAttribute(body, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(index)))
	_, err := r.ask(unix.RTM_NEWROUTE, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body)
	return err
}

// forwarding are the files that say whether a machine forwards packets. Published
// ports of containers need it.
var forwarding = []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"}
