//go:build unix

package conn

import (
	"crypto/tls"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// wrap returns the Conn with the most abilities.
func wrap(s stream) Conn {
	switch s.Conn.(type) {
	case *net.TCPConn, *net.UnixConn:
		if raw := rawConn(s.Conn); raw != nil {
			return &plain{socket{stream: s, raw: raw}}
		}
	case *tls.Conn:
		if raw := rawConn(innermost(s.Conn)); raw != nil {
			return &secure{socket: socket{stream: s, raw: raw}, fresh: true}
		}
	}
	other := s // the address of s would put it on the heap in each case
	return &other
}

// rawConn returns the file descriptor of a connection, or nil if it has none. Go's network sockets never block.
func rawConn(nc net.Conn) syscall.RawConn {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// writable reports whether nc is a socket that has room.
func writable(nc net.Conn) bool {
	raw := rawConn(nc)
	if raw == nil {
		return false
	}
	room := false
	err := raw.Control(func(fd uintptr) { room = poll(fd, unix.POLLOUT) })
	return err == nil && room
}

// poll reports whether the event, or an error, is pending.
func poll(fd uintptr, event int16) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: event}}, 0)
	return err == nil && n == 1
}

// A socket is a stream whose input can be waited for.
type socket struct {
	stream
	raw    syscall.RawConn
	looked bool // owned by the reader: the current wait has looked before
}

// wait returns when there is something to read from the socket, or an error to find by reading, or when the read deadline
// has passed.
func (s *socket) wait() error {
	s.looked = false
	return s.raw.Read(s.canRead)
}

// canRead polls once before the wait. When the runtime calls it again, the runtime's poller has seen something. To poll
// then would cost a system call for each message, only to find the rare stale event.
func (s *socket) canRead(fd uintptr) bool {
	if s.looked {
		return true
	}
	s.looked = true
	return poll(fd, unix.POLLIN)
}

// A plain is a TCP or Unix socket.
type plain struct{ socket }

// Wait implements Waiter.
func (c *plain) Wait() (sure bool, err error) {
	if c.early != nil {
		return true, nil
	}
	return true, c.wait()
}

// ReadsAhead implements Waiter.
func (c *plain) ReadsAhead() bool { return false }

// TryWrite implements TryWriter.
func (c *plain) TryWrite(p []byte) int {
	a := attempts.Get().(*attempt)
	defer attempts.Put(a)
	return a.write(c.raw, p)
}

// A secure is TLS above a socket.
type secure struct {
	socket
	fresh bool // owned by the reader: TLS may have read ahead during the handshake
}

// Wait implements Waiter.
func (c *secure) Wait() (sure bool, err error) {
	fresh := c.fresh
	c.fresh = false
	if c.early != nil {
		return true, nil
	}
	if fresh {
		return false, nil
	}
	return true, c.wait()
}

// ReadsAhead implements Waiter.
func (c *secure) ReadsAhead() bool { return true }

// An attempt is one write that does not wait. Its function is bound once: a closure for each write would be an
// allocation.
type attempt struct {
	p    []byte
	sent int
	try  func(fd uintptr) bool
}

// attempts keeps unused attempts.
var attempts = sync.Pool{New: func() any { return newAttempt() }}

func newAttempt() *attempt {
	a := new(attempt)
	a.try = func(fd uintptr) bool {
		n, err := syscall.Write(int(fd), a.p)
		if err == nil {
			a.sent = n
		}
		return true // do not wait
	}
	return a
}

// write returns how many bytes of p the socket took.
func (a *attempt) write(raw syscall.RawConn, p []byte) int {
	a.p, a.sent = p, 0
	_ = raw.Write(a.try) // a Write will find the error
	a.p = nil
	return a.sent
}

// Interface guards
var (
	_ TryWriter = (*plain)(nil)
	_ Waiter    = (*plain)(nil)
	_ Waiter    = (*secure)(nil)
)
