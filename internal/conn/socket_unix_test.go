//go:build unix

package conn

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWrap_AbilitiesAreThoseOfTheSocket(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			server, _ := kind.connect(t)
			c := Wrap(server, nil)
			if _, got := c.(TryWriter); got != kind.tries {
				t.Errorf("TryWriter: got %v, want %v", got, kind.tries)
			}
			w, got := c.(Waiter)
			if got != kind.waits {
				t.Fatalf("Waiter: got %v, want %v", got, kind.waits)
			}
			if got && w.ReadsAhead() != kind.readsAhead {
				t.Errorf("ReadsAhead: got %v, want %v", w.ReadsAhead(), kind.readsAhead)
			}
			if got := c.Writable(); got != kind.showsSockets {
				t.Errorf("Writable: got %v, want %v", got, kind.showsSockets)
			}
		})
	}
}

func TestWrap_IsOneAllocation(t *testing.T) {
	server, _ := tcp(t)
	ownAllocations := testing.AllocsPerRun(100, func() { rawConn(server) }) // Go's
	if got := testing.AllocsPerRun(100, func() { Wrap(server, nil) }) - ownAllocations; got != 1 {
		t.Errorf("got %v allocations, want 1", got)
	}
}

func TestWrap_ConnectionWithoutASocketHasNoAbilities(t *testing.T) {
	c := Wrap(new(net.TCPConn), nil)
	if _, ok := c.(Waiter); ok {
		t.Error("got a Waiter")
	}
	if c.Writable() {
		t.Error("got a writable one")
	}
}

// fill writes until the socket of w takes nothing, and returns how many bytes it took.
func fill(t *testing.T, w TryWriter) (n int) {
	t.Helper()
	p := make([]byte, 1<<20)
	deadline := time.Now().Add(patience)
	for quiet := 0; quiet < 10; { // it may take more when the peer's socket has taken some
		got := w.TryWrite(p)
		n += got
		if quiet++; got > 0 {
			quiet = 0
		}
		if time.Now().After(deadline) {
			t.Fatal("the socket does not fill")
		}
	}
	return n
}

func TestTryWrite_TakesWhatTheSocketTakes(t *testing.T) {
	for _, kind := range kinds {
		if !kind.tries {
			continue
		}
		t.Run(kind.name, func(t *testing.T) {
			server, client := kind.connect(t)
			c := Wrap(server, nil)
			w := c.(TryWriter)
			if got := w.TryWrite([]byte("hello")); got != 5 {
				t.Errorf("an empty socket: got %d bytes taken, want 5", got)
			}
			large := make([]byte, 64<<20)
			some := w.TryWrite(large)
			if some <= 0 || some == len(large) {
				t.Errorf("64 MiB: got %d bytes taken, want some", some)
			}
			total := 5 + some + fill(t, w)
			if c.Writable() {
				t.Error("a full socket is writable")
			}
			if got := received(t, client, 5); got != "hello" {
				t.Errorf("got %q", got)
			}
			if n, err := io.CopyN(io.Discard, client, int64(total-5)); err != nil {
				t.Errorf("the peer got %d of %d bytes: %v", n, total-5, err)
			}
			if err := waitFor(c.Writable); err != nil {
				t.Error("an empty socket is not writable")
			}
			c.Close()
			if got := w.TryWrite([]byte("hello")); got != 0 {
				t.Errorf("a closed connection: got %d bytes taken", got)
			}
			if c.Writable() {
				t.Error("a closed connection is writable")
			}
		})
	}
}

// waitFor polls until ok returns true.
func waitFor(ok func() bool) error {
	ticker := time.NewTicker(time.Millisecond)
	defer ticker.Stop()
	for end := time.Now().Add(patience); !ok(); <-ticker.C {
		if time.Now().After(end) {
			return os.ErrDeadlineExceeded
		}
	}
	return nil
}

func TestTryWrite_WriteGoesOnWhereItTimedOut(t *testing.T) {
	server, client := tcp(t)
	c := Wrap(server, nil)
	total := fill(t, c.(TryWriter))
	text := []byte("begin" + strings.Repeat("x", 1<<20) + "end")
	if err := c.SetWriteDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Write(text)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("got %d bytes, %v, want a timeout", n, err)
	}
	if got := c.(TryWriter).TryWrite(text[n:]); got != 0 {
		t.Errorf("a full socket: got %d bytes taken", got)
	}
	if err := c.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	send(t, c, string(text[n:]))
	if _, err := io.CopyN(io.Discard, client, int64(total)); err != nil {
		t.Fatal(err)
	}
	if got := received(t, client, len(text)); got != string(text) {
		t.Error("the peer got something else")
	}
}

func TestTryWrite_AllocatesNothing(t *testing.T) {
	for _, kind := range kinds {
		if !kind.tries {
			continue
		}
		t.Run(kind.name, func(t *testing.T) {
			server, _ := kind.connect(t)
			w := Wrap(server, nil).(TryWriter)
			p := []byte("x")
			least := math.Inf(1) // with the race detector a sync.Pool loses some of what it is given
			for range 10 {
				ownAllocations := 0.0
				if !w.Exact() {
					ownAllocations = testing.AllocsPerRun(100, func() { _, _ = server.Write(p) }) // those of crypto/tls
				}
				least = min(least, testing.AllocsPerRun(100, func() { w.TryWrite(p) })-ownAllocations)
			}
			if least > 0 {
				t.Errorf("got %v allocations", least)
			}
		})
	}
}

// TestTryWrite_NeverWaitsForATLSClientThatDoesNotRead fills sockets with writes of one size each. A write that waited would end
// with its deadline and break TLS, and then the peer would not get everything.
func TestTryWrite_NeverWaitsForATLSClientThatDoesNotRead(t *testing.T) {
	if !looksForRoom {
		t.Log("TLS is no TryWriter here")
		return
	}
	for _, size := range []int{1, 100, 1400, MaxTLSRecord - 1, MaxTLSRecord, 64 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			server, client := secured(t)
			c := Wrap(server, nil)
			if err := c.SetWriteDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}
			watchdog := time.AfterFunc(patience, c.Abort)
			defer watchdog.Stop()
			p := []byte(strings.Repeat("x", size))
			total := 0
			for quiet := 0; quiet < 10; { // it may take more when the peer's socket has taken some
				n := c.(TryWriter).TryWrite(p)
				total += n
				if quiet++; n > 0 {
					quiet = 0
				}
			}
			if total < size {
				t.Errorf("got %d bytes taken, want more", total)
			}
			send(t, c, "end")
			if n, err := io.CopyN(io.Discard, client, int64(total)); err != nil {
				t.Errorf("the peer got %d of %d bytes: %v", n, total, err)
			}
			if got := received(t, client, 3); got != "end" {
				t.Errorf("got %q", got)
			}
		})
	}
}

// TestTryWrite_LooksAgainWhenSomethingElseWasWritten fills the socket below TLS. A TryWrite that trusted its last look would wait.
func TestTryWrite_LooksAgainWhenSomethingElseWasWritten(t *testing.T) {
	if !looksForRoom {
		t.Log("TLS is no TryWriter here")
		return
	}
	for name, act := range map[string]func(t *testing.T, c Conn, client net.Conn){
		"by a Read": func(t *testing.T, c Conn, client net.Conn) {
			send(t, client, "x")
			received(t, c, 1)
		},
		"by a Write": func(t *testing.T, c Conn, _ net.Conn) { _, _ = c.Write([]byte("x")) },
	} {
		t.Run(name, func(t *testing.T) {
			server, client := secured(t)
			c := Wrap(server, nil)
			if got := c.(TryWriter).TryWrite([]byte("x")); got != 1 {
				t.Fatalf("got %d bytes taken, want 1", got)
			}
			act(t, c, client)
			_ = c.(*roomy).raw.Write(func(fd uintptr) bool {
				var err error
				for junk := make([]byte, 64<<10); err == nil; {
					_, err = unix.Write(int(fd), junk)
				}
				return true
			})
			watchdog := time.AfterFunc(time.Second, c.Abort)
			if got := c.(TryWriter).TryWrite([]byte("x")); got != 0 {
				t.Errorf("got %d bytes taken by a full socket", got)
			}
			if !watchdog.Stop() {
				t.Error("it has waited")
			}
		})
	}
}

func TestWrap_PeerWithTinySegmentsIsNotTried(t *testing.T) {
	if !looksForRoom {
		t.Log("TLS is no TryWriter here")
		return
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for size, want := range map[int]bool{100: false, 1000: true} {
		dialer := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
			failed := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, size) })
			return errors.Join(err, failed)
		}}
		client, err := dialer.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		server, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		s, _ := overTLS(t, server, client)
		if _, tries := Wrap(s, nil).(TryWriter); tries != want {
			t.Errorf("segments of %d bytes: got a TryWriter %v, want %v", size, tries, want)
		}
		client.Close()
		server.Close()
	}
}

func TestWrap_SmallSendBufferIsNotTried(t *testing.T) {
	server, _ := secured(t)
	nc := innermost(server)
	_ = nc.(*net.TCPConn).SetWriteBuffer(1)
	if _, tries := wrap(stream{server, nil}).(TryWriter); tries {
		t.Error("got a TryWriter, though a record may not fit into a third of the buffer")
	}
}

func TestWrap_BoundsTheSendBuffer(t *testing.T) {
	for name, connect := range map[string]func(testing.TB) (net.Conn, net.Conn){
		"TCP": tcp, "TLS": secured, "TCP with Raw": wrappedBy(asRaw, tcp), "TCP with NetConn": wrappedBy(asHidden, tcp),
	} {
		t.Run(name, func(t *testing.T) {
			server, _ := connect(t)
			Wrap(server, nil)
			size := 0
			err := rawConn(innermost(server)).Control(func(fd uintptr) {
				size, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF)
			})
			if err != nil || size < sendBuffer || size > 2*sendBuffer {
				t.Errorf("got %d bytes, %v, want %d, or twice that", size, err, sendBuffer)
			}
		})
	}
}

// begin calls Wait in a goroutine of its own, and calls it again when it returns for nothing.
func begin(w Waiter) <-chan error {
	done := make(chan error, 1)
	go func() { // ends with the connection
		const most = 3 // the handshake's last events may come late
		sure, err := w.Wait()
		for i := 0; i < most && sure && err == nil && !readable(w); i++ {
			sure, err = w.Wait()
		}
		if !sure && err == nil {
			err = errUnsure
		}
		done <- err
	}()
	return done
}

// readable reports whether w has something to read, or an error to find by reading.
func readable(w Waiter) bool {
	var s *socket
	switch c := w.(type) {
	case *plain:
		s = &c.socket
	case *secure:
		s = &c.socket
	case *roomy:
		s = &c.socket
	}
	ready := false
	err := s.raw.Control(func(fd uintptr) { ready = poll(fd, unix.POLLIN) })
	return err != nil || ready || s.early != nil
}

// errUnsure stands for a Wait that has not waited.
var errUnsure = errors.New("not sure")

// wantEnd checks how a Wait ends.
func wantEnd(t *testing.T, done <-chan error, want error) {
	t.Helper()
	select {
	case got := <-done:
		if !errors.Is(got, want) {
			t.Errorf("Wait: got %v, want %v", got, want)
		}
	case <-time.After(patience):
		t.Fatal("Wait goes on")
	}
}

// wantEmpty makes sure that c has nothing to read.
func wantEmpty(t *testing.T, c Conn) {
	t.Helper()
	if err := c.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("got %d bytes, %v, want none", n, err)
	}
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
}

func TestWait_EndsAtInputEndOrDeadline(t *testing.T) {
	soon := func() time.Time { return time.Now().Add(10 * time.Millisecond) }
	for _, tc := range []struct {
		name string
		test func(t *testing.T, c Conn, w Waiter, client net.Conn)
	}{
		{"input that is there", func(t *testing.T, c Conn, w Waiter, client net.Conn) {
			send(t, client, "hello")
			wantEnd(t, begin(w), nil)
			if got := received(t, c, 5); got != "hello" {
				t.Errorf("got %q", got)
			}
			wantEmpty(t, c)
		}},
		{"input that comes", func(t *testing.T, c Conn, w Waiter, client net.Conn) {
			for _, text := range []string{"one", "two", "three"} {
				done := begin(w)
				send(t, client, text)
				wantEnd(t, done, nil)
				if got := received(t, c, len(text)); got != text {
					t.Errorf("got %q", got)
				}
				wantEmpty(t, c)
			}
		}},
		{"only a deadline", func(t *testing.T, c Conn, w Waiter, client net.Conn) {
			for range 2 {
				if err := c.SetReadDeadline(soon()); err != nil {
					t.Fatal(err)
				}
				wantEnd(t, begin(w), os.ErrDeadlineExceeded)
			}
		}},
		{"a deadline that comes later", func(t *testing.T, c Conn, w Waiter, client net.Conn) {
			done := begin(w)
			if err := c.SetReadDeadline(soon()); err != nil {
				t.Fatal(err)
			}
			wantEnd(t, done, os.ErrDeadlineExceeded)
		}},
		{"the peer's end", func(t *testing.T, c Conn, w Waiter, client net.Conn) {
			done := begin(w)
			client.Close()
			wantEnd(t, done, nil)
			if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
				t.Errorf("got %d bytes, %v, want the end", n, err)
			}
		}},
		{"an abort", func(t *testing.T, c Conn, w Waiter, client net.Conn) {
			done := begin(w)
			c.Abort()
			wantEnd(t, done, net.ErrClosed)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, kind := range kinds {
				if !kind.waits {
					continue
				}
				t.Run(kind.name, func(t *testing.T) {
					server, client := kind.connect(t)
					c := Wrap(server, nil)
					w := c.(Waiter)
					if w.ReadsAhead() {
						wantEnd(t, begin(w), errUnsure)
					}
					wantEmpty(t, c)
					tc.test(t, c, w, client)
				})
			}
		})
	}
}

func TestWait_DoesNotWaitWhileSomethingWasReadEarly(t *testing.T) {
	for _, kind := range kinds {
		if !kind.waits {
			continue
		}
		t.Run(kind.name, func(t *testing.T) {
			server, client := kind.connect(t)
			c := Wrap(server, []byte("ab"))
			for _, want := range []string{"a", "b"} {
				wantEnd(t, begin(c.(Waiter)), nil)
				if got := received(t, c, 1); got != want {
					t.Errorf("got %q, want %q", got, want)
				}
			}
			wantEmpty(t, c)
			done := begin(c.(Waiter))
			send(t, client, "late")
			wantEnd(t, done, nil)
		})
	}
}

// A gathering is a connection that keeps what it should write, from hold until release.
type gathering struct {
	net.Conn
	mu      sync.Mutex
	held    bool
	pending []byte
}

func (g *gathering) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.held {
		return g.Conn.Write(p)
	}
	g.pending = append(g.pending, p...)
	return len(p), nil
}

func (g *gathering) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = true
}

func (g *gathering) release() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = false
	_, err := g.Conn.Write(g.pending)
	g.pending = nil
	return err
}

// TestWait_DoesNotSeeWhatTLSHasReadAhead shows why ReadsAhead is there: two records that come together are read together.
func TestWait_DoesNotSeeWhatTLSHasReadAhead(t *testing.T) {
	server, client := tcp(t)
	g := &gathering{Conn: client}
	s, tlsClient := overTLS(t, server, g)
	c := Wrap(s, nil)
	w := c.(Waiter)
	wantEnd(t, begin(w), errUnsure)
	wantEmpty(t, c)
	g.hold()
	for _, text := range []string{"one", "two"} {
		if _, err := io.WriteString(tlsClient, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.release(); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, begin(w), nil)
	if got := received(t, c, 3); got != "one" {
		t.Errorf("got %q", got)
	}
	past := time.Unix(1, 0)
	if err := c.SetReadDeadline(past); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, begin(w), os.ErrDeadlineExceeded)
	if got := received(t, c, 3); got != "two" {
		t.Errorf("past the deadline: got %q, want what TLS has read ahead", got)
	}
}

func TestConn_AbortResetsAStuckConnection(t *testing.T) {
	for name, connect := range map[string]func(testing.TB) (net.Conn, net.Conn){
		"TCP": tcp, "TLS": secured, "TCP with Raw": wrappedBy(asRaw, tcp),
	} {
		t.Run(name, func(t *testing.T) {
			server, client := connect(t)
			c := Wrap(server, nil)
			writer := make(chan error, 1)
			go func() { // ends with the connection
				p := make([]byte, 1<<20)
				for {
					if _, err := c.Write(p); err != nil {
						writer <- err
						return
					}
				}
			}()
			if err := waitFor(func() bool { return !c.Writable() }); err != nil {
				t.Fatal("the socket does not fill")
			}
			c.Abort()
			if err := <-writer; !errors.Is(err, net.ErrClosed) {
				t.Errorf("the writer got %v, want %v", err, net.ErrClosed)
			}
			if _, err := io.Copy(io.Discard, innermost(client)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the peer got %v, want a reset", err)
			}
		})
	}
}
