package chatbroadcast

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"syscall"
	"time"
)

// A wire is a client's connection as gorilla/websocket sees it: it reads through, but what gorilla writes
// and the deadlines it sets stay here, because writing and patience are the client's (see client.go).
type wire struct {
	client *client
	conn   net.Conn // nil until the handshake is done

	early    []byte // what the HTTP server had read beyond the request
	response []byte // the 101 that gorilla has written
	refused  bool   // gorilla has written a close frame: a protocol error
	frames   frameScan

	// resumable says that a write that timed out may go on where it stopped. On TLS it may not: the record
	// is broken. There a write is one record, so that each gets the full timeout.
	resumable bool
	maxWrite  int

	raw syscall.RawConn // for attempts; nil where a write may block although the socket does not

	// For waits. The fields but the first are the reader's.
	socket syscall.RawConn // nil where waiting needs reading
	hides  bool            // TLS: what it has read ahead shows only by reading
	fresh  bool            // it may have done so during the handshake
	polls  bool            // a read is not to wait
	looked bool            // wait has looked before
}

// maxTLSRecord is the most that one TLS record carries (RFC 8446 §5.1).
const maxTLSRecord = 16 << 10

// attach gives the wire its connection and what was already read from it.
func (w *wire) attach(conn net.Conn, early []byte) {
	w.conn, w.early = conn, early
	switch conn.(type) {
	case *net.TCPConn, *net.UnixConn:
		w.raw, w.maxWrite = rawConn(conn), maxWrite
		w.socket, w.resumable = w.raw, w.raw != nil
	case *tls.Conn:
		w.socket, w.maxWrite = rawConn(innermost(conn)), maxTLSRecord
		w.hides, w.fresh = true, true
	default:
		w.maxWrite = maxTLSRecord
	}
	if t, ok := innermost(conn).(*net.TCPConn); ok {
		_ = t.SetWriteBuffer(sendBuffer) // best effort: slow clients are told from stuck ones the later without
	}
}

// sendBuffer is what the kernel may keep for a client, in bytes; Linux doubles it. Left alone it grows to megabytes,
// and a third of it must be free before a blocked write goes on: a client that takes 100 kB a second would look stuck
// for longer than any timeout, and a ping would wait behind all that. With it a client can be sent a megabyte a second
// over a round trip of a quarter of a second.
const sendBuffer = 128 << 10

// innermost returns the connection below those that wrap it and say so: TLS, and listener wrappers such as Caddy's
// proxy_protocol.
func innermost(conn net.Conn) net.Conn {
	for {
		switch t := conn.(type) {
		case interface{ NetConn() net.Conn }:
			conn = t.NetConn()
		case interface{ Raw() net.Conn }:
			conn = t.Raw()
		default:
			return conn
		}
	}
}

// wait returns when there is something to read, or an error to find by reading, or when the read deadline has passed. It
// reads nothing, and returns at once where waiting needs reading.
func (w *wire) wait() error {
	if w.socket == nil || w.fresh || len(w.early) > 0 {
		return nil
	}
	w.looked = false
	w.client.payWork()
	err := w.socket.Read(w.canRead)
	w.client.beginWork()
	return err
}

// canRead is asked before the wait, and again when the runtime's poller has seen something.
func (w *wire) canRead(fd uintptr) bool {
	if w.looked {
		return true
	}
	w.looked = true
	return readable(fd)
}

// Read reads for the client's reader. Silence is the client's to judge.
func (w *wire) Read(p []byte) (int, error) {
	if len(w.early) > 0 {
		n := copy(p, w.early)
		w.early = w.early[n:]
		if len(w.early) == 0 {
			w.early = nil
		}
		w.frames.scan(p[:n])
		w.client.onHeard(n)
		return n, nil
	}
	w.client.pace()
	w.client.payWork()
	for {
		n, err := w.conn.Read(p)
		if n > 0 {
			w.client.beginWork()
			w.frames.scan(p[:n])
			w.client.onHeard(n)
			return n, err
		}
		if err != nil && !w.polls && errors.Is(err, os.ErrDeadlineExceeded) {
			err = w.client.onSilence()
			if err == nil {
				continue
			}
		}
		return n, err
	}
}

// Write keeps what gorilla writes: during the handshake the response, and later a close frame, which says
// that it has refused what it read.
func (w *wire) Write(p []byte) (int, error) {
	if w.conn == nil {
		w.response = append(w.response, p...)
	} else {
		w.refused = true
	}
	return len(p), nil
}

// Close does nothing: the client closes its connection when its reader ends.
func (w *wire) Close() error { return nil }

// LocalAddr returns nil: gorilla does not need it.
func (w *wire) LocalAddr() net.Addr { return nil }

// RemoteAddr returns nil: gorilla does not need it.
func (w *wire) RemoteAddr() net.Addr { return nil }

// SetDeadline does nothing: deadlines are the client's.
func (w *wire) SetDeadline(time.Time) error { return nil }

// SetReadDeadline does nothing: deadlines are the client's.
func (w *wire) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline does nothing: deadlines are the client's.
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

// abort closes the connection with a reset, so that the kernel does not go on to send what a dead or stuck
// peer will never take. It goes around TLS, whose Close may wait for the peer.
func abort(conn net.Conn) {
	conn = innermost(conn)
	if t, ok := conn.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // best effort: without it the close is merely slower
	}
	_ = conn.Close() // the error of a connection that is given up helps nobody
}

// halfCloser is a connection whose sending half can be closed alone: TCP, Unix sockets and TLS.
type halfCloser interface{ CloseWrite() error }

func (w *wire) canCloseWrite() bool {
	_, ok := w.halfCloser()
	return ok
}

// halfCloser returns what closes the sending half, which a listener's wrapper may hide.
func (w *wire) halfCloser() (halfCloser, bool) {
	if hc, ok := w.conn.(halfCloser); ok {
		return hc, true
	}
	if r, ok := w.conn.(interface{ Raw() net.Conn }); ok {
		hc, ok := r.Raw().(halfCloser)
		return hc, ok
	}
	return nil, false
}

// closeWrite ends our half of the connection, so that the peer sees its end and can still be read. It returns
// false where that is impossible.
func (w *wire) closeWrite() bool {
	hc, ok := w.halfCloser()
	return ok && hc.CloseWrite() == nil
}

// Interface guards
var _ net.Conn = (*wire)(nil)
