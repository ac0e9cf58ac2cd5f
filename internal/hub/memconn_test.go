package hub

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/conn"
)

// A memoryConn is a connection in memory: the server's end as a conn.Conn, and the peer's end as a memoryPeer. It waits with
// channels and timers only, so it works in a synctest bubble. abilities says what optional parts of package conn the server
// sees.
type memoryConn struct {
	readsAhead bool // like TLS: a read takes everything that has come

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced with each change
	toServer stream
	toPeer   stream
	ahead    []byte // what the server's end has read ahead
	half     bool   // CloseWrite works
	fresh    bool   // the first Wait does not wait
	closed   bool   // by the server
	aborted  bool
	written  []byte // all that the server has written and the connection has taken
	tries    int    // calls of TryWrite
	writes   int    // calls of Write
	bug      bool   // writing panics
	readBy   time.Time
	writeBy  time.Time
}

// A stream is one direction of a memoryConn.
type stream struct {
	buf    []byte
	room   int   // how many bytes it holds; 0: a write waits until all of it is read
	ended  bool  // nothing more is written
	broken error // what writers get
}

// An ability is an optional part of a conn.Conn.
type ability int

const (
	triesWrites ability = 1 << iota // conn.TryWriter
	waits                           // conn.Waiter
	readsAhead                      // with waits: it may hold bytes that Wait does not see
	halfCloses                      // CloseWrite works
	mayWait                         // with triesWrites: TryWrite is not exact, and always waits as Write does
)

// newMemoryConn returns a connection whose server's end has the given abilities. Up to room
// bytes from the server wait for the peer; with 0 a write waits until the peer has read it.
func newMemoryConn(a ability, room int) (*memoryConn, conn.Conn) {
	m := &memoryConn{
		changed:    make(chan struct{}),
		half:       a&halfCloses != 0,
		readsAhead: a&readsAhead != 0,
		fresh:      a&readsAhead != 0,
	}
	m.toPeer.room = room // toServer has none: a peer writes no faster than the server reads
	tries, canWait := a&triesWrites != 0, a&waits != 0
	switch {
	case tries && canWait:
		return m, struct {
			*memoryConn
			conn.TryWriter
			conn.Waiter
		}{m, memoryTryWriter{m, a&mayWait == 0}, memoryWaiter{m}}
	case tries:
		return m, struct {
			*memoryConn
			conn.TryWriter
		}{m, memoryTryWriter{m, a&mayWait == 0}}
	case canWait:
		return m, struct {
			*memoryConn
			conn.Waiter
		}{m, memoryWaiter{m}}
	}
	return m, m
}

// await waits until done, which is called with the lock, returns true. It returns false when the deadline passes before that.
// The caller has the lock, and has it again.
func (m *memoryConn) await(deadline *time.Time, done func() bool) bool {
	for !done() {
		changed := m.changed
		var passed <-chan time.Time
		if !deadline.IsZero() {
			left := time.Until(*deadline)
			if left <= 0 {
				return false
			}
			timer := time.NewTimer(left)
			defer timer.Stop()
			passed = timer.C
		}
		m.mu.Unlock()
		select {
		case <-changed:
		case <-passed:
		}
		m.mu.Lock()
	}
	return true
}

// change wakes everybody who waits. It needs the lock.
func (m *memoryConn) change() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// write writes p to s, until the deadline. It needs the lock.
func (m *memoryConn) write(s *stream, p []byte, deadline *time.Time) (n int, err error) {
	if s.room == 0 {
		s.buf = append(s.buf, p...)
		m.change()
		ok := m.await(deadline, func() bool { return len(s.buf) == 0 || s.broken != nil })
		n = len(p) - len(s.buf)
		s.buf = nil
		switch {
		case n == len(p):
			return n, nil
		case !ok:
			return n, os.ErrDeadlineExceeded
		}
		return n, s.broken
	}
	for len(p) > n {
		if !m.await(deadline, func() bool { return len(s.buf) < s.room || s.broken != nil }) {
			return n, os.ErrDeadlineExceeded
		}
		if s.broken != nil {
			return n, s.broken
		}
		k := min(len(p)-n, s.room-len(s.buf))
		s.buf = append(s.buf, p[n:n+k]...)
		n += k
		m.change()
	}
	return n, nil
}

// take moves bytes from s to p. It needs the lock.
func (m *memoryConn) take(s *stream, p []byte) (int, error) {
	switch {
	case errors.Is(s.broken, syscall.ECONNRESET):
		return 0, s.broken
	case len(s.buf) == 0:
		return 0, io.EOF
	}
	n := copy(p, s.buf)
	s.buf = s.buf[n:]
	m.change()
	return n, nil
}

func hasPassed(t time.Time) bool { return !t.IsZero() && !t.After(time.Now()) }

func (m *memoryConn) Read(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.ahead) == 0 {
		if hasPassed(m.readBy) {
			return 0, os.ErrDeadlineExceeded
		}
		if !m.await(&m.readBy, m.readableLocked) {
			return 0, os.ErrDeadlineExceeded
		}
		if m.closed {
			return 0, net.ErrClosed
		}
		if !m.readsAhead {
			return m.take(&m.toServer, p)
		}
		m.ahead = make([]byte, len(m.toServer.buf)+1)
		n, err := m.take(&m.toServer, m.ahead)
		m.ahead = m.ahead[:n]
		if err != nil {
			return 0, err
		}
	}
	n := copy(p, m.ahead)
	m.ahead = m.ahead[n:]
	return n, nil
}

// readableLocked reports whether a read of the server's end would not wait.
func (m *memoryConn) readableLocked() bool {
	return m.closed || len(m.toServer.buf) > 0 || m.toServer.ended || m.toServer.broken != nil
}

func (m *memoryConn) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writes++
	switch {
	case m.bug:
		panic("a bug")
	case m.closed:
		return 0, net.ErrClosed
	case m.toPeer.broken != nil:
		return 0, m.toPeer.broken
	case hasPassed(m.writeBy):
		return 0, os.ErrDeadlineExceeded
	}
	n, err := m.write(&m.toPeer, p, &m.writeBy)
	m.written = append(m.written, p[:n]...)
	return n, err
}

func (m *memoryConn) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	m.toPeer.ended = true
	m.toServer.broken = syscall.EPIPE
	if m.toPeer.broken == nil {
		m.toPeer.broken = syscall.EPIPE
	}
	m.change()
	return nil
}

func (m *memoryConn) Abort() {
	_ = m.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.aborted = true
	m.toPeer.broken = syscall.ECONNRESET
	m.change()
}

func (m *memoryConn) CloseWrite() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.half && !m.closed {
		m.toPeer.ended = true
		m.change()
	}
	return m.half && !m.closed
}

func (m *memoryConn) SetReadDeadline(t time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.readBy = t
	m.change()
	return nil
}

func (m *memoryConn) SetWriteDeadline(t time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writeBy = t
	m.change()
	return nil
}

func (m *memoryConn) Writable() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.closed && len(m.toPeer.buf) < m.toPeer.room
}

// breakWrites makes the server's writes fail from now on, and leaves its reads alone.
func (m *memoryConn) breakWrites() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.toPeer.broken = syscall.EPIPE
	m.change()
}

// sent returns what the connection has taken from the server.
func (m *memoryConn) sent() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]byte{}, m.written...)
}

// wasAborted reports whether the server has cut the connection.
func (m *memoryConn) wasAborted() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.aborted
}

type memoryTryWriter struct {
	m     *memoryConn
	exact bool
}

func (w memoryTryWriter) Exact() bool { return w.exact }

func (w memoryTryWriter) TryWrite(p []byte) int {
	m := w.m
	if !w.exact {
		n, err := m.Write(p)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.toPeer.broken = err // as TLS is from then on
		}
		return n
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tries++
	if m.bug {
		panic("a bug")
	}
	if m.closed || m.toPeer.broken != nil {
		return 0
	}
	n := min(len(p), max(m.toPeer.room-len(m.toPeer.buf), 0))
	m.toPeer.buf = append(m.toPeer.buf, p[:n]...)
	m.written = append(m.written, p[:n]...)
	m.change()
	return n
}

type memoryWaiter struct{ m *memoryConn }

func (w memoryWaiter) Wait() (sure bool, err error) {
	m := w.m
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.fresh:
		m.fresh = false
		return false, nil
	case hasPassed(m.readBy):
		return true, os.ErrDeadlineExceeded
	case len(m.ahead) > 0:
		panic("Wait with bytes that were read ahead: nobody would come back for them")
	case !m.await(&m.readBy, m.readableLocked):
		return true, os.ErrDeadlineExceeded
	case m.closed:
		return true, net.ErrClosed
	}
	return true, nil
}

func (w memoryWaiter) ReadsAhead() bool { return w.m.readsAhead }

// A memoryPeer is the peer's end of a memoryConn.
type memoryPeer struct {
	*memoryConn
	by *time.Time // until when it reads; the zero time is no bound
}

func (m *memoryConn) peer() memoryPeer { return memoryPeer{m, new(time.Time)} }

func (p memoryPeer) SetReadDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	*p.by = t
	p.change()
	return nil
}

func (p memoryPeer) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.toPeer
	ready := func() bool { return len(s.buf) > 0 || s.ended || s.broken != nil }
	if hasPassed(*p.by) || !p.await(p.by, ready) {
		return 0, os.ErrDeadlineExceeded
	}
	return p.take(s, b)
}

func (p memoryPeer) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.toServer.broken != nil {
		return 0, p.toServer.broken
	}
	return p.write(&p.toServer, b, new(time.Time))
}

// Close ends the connection: the server reads what has come, then the end, and its writes fail.
func (p memoryPeer) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.toServer.ended = true
	if p.toPeer.broken == nil {
		p.toPeer.broken = syscall.EPIPE
	}
	p.change()
	return nil
}

// CloseWrite ends the peer's half: the server reads what has come, then the end, and can still write.
func (p memoryPeer) CloseWrite() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.toServer.ended = true
	p.change()
}

func TestMemoryConn_HasTheAbilitiesThatItIsGiven(t *testing.T) {
	for _, tc := range []struct {
		name       string
		abilities  ability
		tries, can bool
	}{
		{"none", 0, false, false},
		{"attempts", triesWrites, true, false},
		{"waits", waits, false, true},
		{"both", triesWrites | waits, true, true},
	} {
		_, c := newMemoryConn(tc.abilities, 0)
		_, tries := c.(conn.TryWriter)
		_, can := c.(conn.Waiter)
		if tries != tc.tries || can != tc.can {
			t.Errorf("%s: got a TryWriter %v and a Waiter %v, want %v and %v", tc.name, tries, can, tc.tries, tc.can)
		}
	}
}

// Interface guards
var (
	_ conn.Conn      = (*memoryConn)(nil)
	_ conn.TryWriter = memoryTryWriter{}
	_ conn.Waiter    = memoryWaiter{}
)
