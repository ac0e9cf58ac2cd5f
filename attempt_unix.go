//go:build unix

package chatbroadcast

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// rawConn returns conn's file descriptor, for attempts, or nil if it has none. Go's network sockets never block.
func rawConn(conn net.Conn) syscall.RawConn {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// writable reports whether the socket below conn has room: whether who writes to conn is not held up by the peer. conn may
// be nil.
func writable(conn net.Conn) bool {
	if conn == nil {
		return false
	}
	raw := rawConn(innermost(conn))
	if raw == nil {
		return false
	}
	room := false
	err := raw.Control(func(fd uintptr) { room = poll(fd, unix.POLLOUT) })
	return err == nil && room
}

// readable reports whether reading from fd would not wait: something has come, or the end.
func readable(fd uintptr) bool { return poll(fd, unix.POLLIN) }

func poll(fd uintptr, event int16) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: event}}, 0)
	return err == nil && n == 1
}

// processorTime returns how much processor time the process has used.
func processorTime() (used time.Duration, known bool) {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0, false
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), true
}

func writeNonBlocking(fd uintptr, p []byte) int {
	n, err := syscall.Write(int(fd), p)
	if err != nil {
		return 0
	}
	return n
}
