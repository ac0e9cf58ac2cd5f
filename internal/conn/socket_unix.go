//go:build unix

package conn

import (
	"crypto/tls"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
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
			below := socket{stream: s, raw: raw}
			if room := sendBufferOf(raw)/3 - unseenWrites; looksForRoom && room >= spaceFor(MaxTLSRecord) && hasWholeSegments(raw) {
				return &roomy{secure: secure{socket: below, fresh: true}, most: int64(room)}
			}
			return &secure{socket: below, fresh: true}
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

// looksForRoom says that POLLOUT means room for a TLS record, as it does on Linux. There a TCP socket has that event while
// a third of its send buffer is free (sk_stream_is_writeable in include/net/sock.h), and a Unix socket while three quarters
// are. Elsewhere 2 KiB of room are enough for it.
const looksForRoom = runtime.GOOS == "linux"

// sendBufferOf returns the size of a socket's send buffer, or 0 if it is unknown.
func sendBufferOf(raw syscall.RawConn) int { return option(raw, unix.SOL_SOCKET, unix.SO_SNDBUF) }

// option returns an option of a socket, or 0 if the socket does not have it.
func option(raw syscall.RawConn, level, name int) (value int) {
	_ = raw.Control(func(fd uintptr) { value, _ = unix.GetsockoptInt(int(fd), level, name) })
	return value
}

// hasWholeSegments reports whether a socket sends segments of at least 500 bytes, as all but hostile peers allow. A peer with a
// window of 100 bytes gets its bytes in segments that take ten times as much space in the send buffer. The kernel bounds them by
// the largest window that the peer has ever had. A Unix socket has no segments.
func hasWholeSegments(raw syscall.RawConn) bool {
	size := option(raw, unix.IPPROTO_TCP, unix.TCP_MAXSEG)
	return size == 0 || size >= 500
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

// Exact implements TryWriter.
func (c *plain) Exact() bool { return true }

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

// A roomy is TLS above a socket that shows when it has room for a record. It looks again only when the room that it has seen
// may be used up. Until then the room only grows, but for what TLS itself writes when it reads: answers to key updates.
type roomy struct {
	secure
	most int64        // what a look that finds room is good for, in bytes as spaceFor counts them
	room atomic.Int64 // what is left of the last look
}

// unseenWrites bounds what TLS writes during one Read, in bytes as spaceFor counts them. crypto/tls gives up after 16 records
// without data.
const unseenWrites = 16 * 2 << 10

// spaceFor bounds the space that n bytes take in a send buffer, as the kernel counts it. Each segment takes 1.3 KB more than its
// bytes, and TLS makes its first records as small as segments.
func spaceFor(n int) int { return 3*n + 4<<10 }

// TryWrite implements TryWriter.
func (c *roomy) TryWrite(p []byte) (sent int) {
	for sent < len(p) {
		n := min(len(p)-sent, MaxTLSRecord)
		if !c.takeRoom(int64(spaceFor(n))) {
			break
		}
		n, err := c.Conn.Write(p[sent : sent+n])
		sent += n
		if err != nil {
			break // the next Write finds it, too
		}
	}
	return sent
}

// takeRoom takes space for a record, and reports whether there is enough.
func (c *roomy) takeRoom(space int64) bool {
	if c.room.Add(-space) >= 0 {
		return true
	}
	a := attempts.Get().(*attempt)
	defer attempts.Put(a)
	if !a.hasRoom(c.raw) {
		return false
	}
	c.room.Store(c.most - space)
	return true
}

// Write implements Conn.
func (c *roomy) Write(p []byte) (int, error) {
	defer c.room.Store(0)
	return c.Conn.Write(p)
}

// Read implements Conn. A look from before it does not hold after it.
func (c *roomy) Read(p []byte) (int, error) {
	c.room.Store(0)
	defer c.room.Store(0)
	return c.secure.Read(p)
}

// Exact implements TryWriter.
func (c *roomy) Exact() bool { return false }

// An attempt is one write that does not wait, or one look for room. Its functions are bound once: a closure for each write
// would be an allocation.
type attempt struct {
	p    []byte
	sent int
	try  func(fd uintptr)
	room bool
	look func(fd uintptr)
}

// attempts keeps unused attempts.
var attempts = sync.Pool{New: func() any { return newAttempt() }}

func newAttempt() *attempt {
	a := new(attempt)
	a.try = func(fd uintptr) {
		n, err := syscall.Write(int(fd), a.p)
		if err == nil {
			a.sent = n
		}
	}
	a.look = func(fd uintptr) { a.room = poll(fd, unix.POLLOUT) }
	return a
}

// write returns how many bytes of p the socket took.
func (a *attempt) write(raw syscall.RawConn, p []byte) int {
	a.p, a.sent = p, 0
	_ = raw.Control(a.try) // a Write will find the error; raw.Write would prepare to wait, which takes a fiftieth of a delivery
	a.p = nil
	return a.sent
}

// hasRoom reports whether the socket has room, or an error that a write finds at once.
func (a *attempt) hasRoom(raw syscall.RawConn) bool {
	a.room = false
	return raw.Control(a.look) == nil && a.room
}

// Interface guards
var (
	_ TryWriter = (*plain)(nil)
	_ TryWriter = (*roomy)(nil)
	_ Waiter    = (*plain)(nil)
	_ Waiter    = (*secure)(nil)
)
