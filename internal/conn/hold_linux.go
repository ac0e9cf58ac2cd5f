package conn

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Hold has the kernel keep back what is written to nc, so that several writes leave as one segment. It returns the function that
// sends it all, or nil without a TCP socket below nc, and on systems other than Linux. Until that call each write may wait for
// 200 ms (TCP_CORK in tcp(7)), and for longer over a connection whose retransmission timeout is longer.
func Hold(nc net.Conn) (release func()) {
	raw := rawConn(innermost(nc))
	if raw == nil || !cork(raw, 1) {
		return nil
	}
	return func() { cork(raw, 0) }
}

// cork sets TCP_CORK, and reports whether it could.
func cork(raw syscall.RawConn, value int) bool {
	var err error
	controlErr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_CORK, value) })
	return controlErr == nil && err == nil
}
