// Package conn knows how bytes leave and arrive: a client's connection over TCP, a Unix socket, TLS or anything else that
// is a net.Conn. It knows no protocol above them.
package conn

import (
	"io"
	"net"
	"time"
)

// MaxTLSRecord is the most that one TLS record carries, in bytes (RFC 8446 §5.1). A write that times out breaks the record
// that it is in: to give each record the full timeout, write no more than this at once to a Conn that is no exact TryWriter.
const MaxTLSRecord = 16 << 10

// sendBuffer is how much the kernel may keep for a client, in bytes; Linux doubles it. Left alone the buffer grows to
// megabytes, and a third of it must be free before a blocked write goes on. A client that takes 100 kB a second would
// look stuck for longer than any timeout, and a ping would wait behind all that. With this buffer a client can receive
// a megabyte a second over a round trip of a quarter of a second.
const sendBuffer = 128 << 10

// A Conn is a client's connection. One goroutine at a time may read, and one may write. The other methods may be called by
// anyone at any time, also twice.
type Conn interface {
	// Read, Write and Close behave as those of a net.Conn. Read first returns what the HTTP server had already read.
	io.ReadWriteCloser

	// SetReadDeadline bounds the Reads and Waits from now on, and those that wait: they fail with os.ErrDeadlineExceeded.
	// The zero time means no bound.
	SetReadDeadline(t time.Time) error

	// SetWriteDeadline bounds Writes in the same way, and attempts that are not exact.
	SetWriteDeadline(t time.Time) error

	// CloseWrite closes the sending half, so that the peer sees the end and the Conn can still read. It returns false
	// if that is impossible or has failed.
	CloseWrite() bool

	// Abort closes the connection at once and does not wait for the peer. Over TCP the peer sees a reset, and the kernel
	// drops what the peer has not taken yet.
	Abort()

	// Writable reports whether the socket has room now: whether a Write would write something without waiting for the
	// peer. It returns false if that cannot be known.
	Writable() bool
}

// A TryWriter is a Conn that can write without waiting.
type TryWriter interface {
	// TryWrite writes as much of p as the socket has room for, and returns how many bytes that were. It takes less than
	// all of p if the socket is full or broken; only a Write can tell which.
	TryWrite(p []byte) int

	// Exact reports whether TryWrite never waits, and a Write that has timed out may go on where it stopped: n of its p
	// are written, the rest is not. TLS is not exact. Its TryWrite looks for room first, and waits like a Write if the
	// room has gone since. A timeout breaks the connection.
	Exact() bool
}

// A Waiter is a Conn that can wait for input without a buffer to read it into. Its methods are for the goroutine that
// reads.
type Waiter interface {
	// Wait returns when there is something to read, or an error that a Read would find, or with os.ErrDeadlineExceeded
	// when the read deadline has passed.
	//
	// With sure=false and no error it has not waited, because it cannot know whether there is something to read. The
	// caller must then find out with a Read that does not wait. The first Wait on TLS does that, because TLS may have
	// read ahead during its handshake. Rarely, a Wait with sure=true is wrong, because a past event reaches it late.
	// Then the Read after it waits, as any Read does.
	Wait() (sure bool, err error)

	// ReadsAhead reports whether the Conn may hold bytes that it has taken from the socket and Wait does not see. Before a
	// Wait the caller must have read all of them: up to a Read that would wait. TLS reads ahead.
	ReadsAhead() bool
}

// Wrap returns nc as a Conn. The Conn owns nc: the caller must no longer use it. early has the bytes that the HTTP
// server had read from nc beyond the request; the Conn keeps them until they are read. The result is a TryWriter and a
// Waiter for a *net.TCPConn, a *net.UnixConn or a *tls.Conn above a socket, and neither for other connections and on
// systems other than Unix. Above TLS it is a TryWriter on Linux alone, with a send buffer and segments of the usual size.
//
// Wrap limits the send buffer of a TCP socket below nc to 128 KiB.
func Wrap(nc net.Conn, early []byte) Conn {
	if len(early) == 0 {
		early = nil
	}
	if t, ok := innermost(nc).(*net.TCPConn); ok {
		_ = t.SetWriteBuffer(sendBuffer) // best effort: without it the server tells slow from stuck clients later
	}
	return wrap(stream{nc, early})
}

// innermost returns the connection below those that wrap it and say so: TLS, and listener wrappers such as Caddy's
// proxy_protocol.
func innermost(nc net.Conn) net.Conn {
	for {
		switch t := nc.(type) {
		case interface{ NetConn() net.Conn }:
			nc = t.NetConn()
		case interface{ Raw() net.Conn }:
			nc = t.Raw()
		default:
			return nc
		}
	}
}

// A stream is a Conn that needs nothing but a net.Conn.
type stream struct {
	net.Conn
	early []byte // owned by the reader: unread bytes of the HTTP server
}

// Read implements Conn.
func (s *stream) Read(p []byte) (int, error) {
	if s.early == nil {
		return s.Conn.Read(p)
	}
	n := copy(p, s.early)
	if s.early = s.early[n:]; len(s.early) == 0 {
		s.early = nil
	}
	return n, nil
}

// A halfCloser is a connection whose sending half can be closed alone: TCP, Unix sockets and TLS.
type halfCloser interface{ CloseWrite() error }

// CloseWrite implements Conn.
func (s *stream) CloseWrite() bool {
	hc, ok := s.Conn.(halfCloser)
	if !ok {
		// A listener's wrapper may hide it.
		var r interface{ Raw() net.Conn }
		if r, ok = s.Conn.(interface{ Raw() net.Conn }); ok {
			hc, ok = r.Raw().(halfCloser)
		}
	}
	return ok && hc.CloseWrite() == nil
}

// Abort implements Conn. It goes around TLS, whose Close may wait for the peer.
func (s *stream) Abort() {
	nc := innermost(s.Conn)
	if t, ok := nc.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // best effort: without it the close is merely slower
	}
	_ = nc.Close() // the connection is given up, so its error does not matter
}

// Writable implements Conn.
func (s *stream) Writable() bool { return writable(innermost(s.Conn)) }
