package chatbroadcast

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"github.com/gorilla/websocket"
)

// ---- from a sender to all clients ----

// maxFanOut leaves out what would measure the memory of the machine: a message that is more bytes than this to all
// clients together. For such there is the scenario "large" of cmd/chatbench.
const maxFanOut = 10 << 20

// Messages under way: enough that a server can put several into one write, and at most half of what the hub keeps, so
// that no client can lag, whoever gets the processor when.
const (
	maxUnderWay      = 32
	maxBytesUnderWay = defaultBufferSize / 2
)

// maxReceive is the buffer of a receiver: as much as a server writes at once.
const maxReceive = maxFrame

// BenchmarkFanOut measures whole servers, from a sender's Write to the last client's Read; an operation is one message
// that all clients have received. Beside Caddy stands the floor, see serveFloor. The receivers share the process, but
// allocate nothing and look at nothing, so that allocations are the server's.
func BenchmarkFanOut(b *testing.B) {
	for _, clients := range []int{10, 100, 1000} {
		for _, size := range []int{128, 4096, 65536} {
			if clients*size > maxFanOut {
				continue
			}
			for _, conn := range []string{"tcp", "logged", "tls"} {
				name := fmt.Sprintf("clients=%d/size=%d/conn=%s/server=", clients, size, conn)
				b.Run(name+"caddy", func(b *testing.B) {
					f := newFanOut(b, clients, size, conn == "tls")
					f.connectCaddy(conn)
					f.measure()
				})
				b.Run(name+"floor", func(b *testing.B) {
					f := newFanOut(b, clients, size, conn == "tls")
					f.connectFloor()
					f.measure()
				})
			}
		}
	}
}

// A fanOut is one server, and the clients of its one hub, of which the first sends.
type fanOut struct {
	b             *testing.B
	clients, size int // size is that of the payload, in bytes
	tls           bool
	sent          []byte // a message as the sender writes it
	frameSize     int    // of the same message as clients receive it
	underWay      int    // messages, at most

	sender  net.Conn
	sockets []net.Conn   // of all clients; below TLS, if there is
	writes  atomic.Int64 // by the clients
	work    sync.WaitGroup

	missing []atomic.Int64 // missing[i%underWay] is how many clients have yet to receive message i
	ready   chan struct{}  // holds one for each message that may be sent
	failed  chan error     // the first error of a client
}

func newFanOut(b *testing.B, clients, size int, encrypted bool) *fanOut {
	f := &fanOut{b: b, clients: clients, size: size, tls: encrypted, frameSize: ws.FrameSize(size), failed: make(chan error, 1)}
	f.sent = clientFrame(finBit|websocket.TextMessage, bytes.Repeat([]byte("x"), size))
	f.underWay = min(maxUnderWay, maxBytesUnderWay/f.frameSize)
	f.missing = make([]atomic.Int64, f.underWay)
	f.ready = make(chan struct{}, f.underWay)
	for i := range f.missing {
		f.missing[i].Store(int64(clients))
		f.ready <- struct{}{}
	}
	return f
}

// connectCaddy joins the clients to a hub of a Caddy. It sends no pings: receivers take every byte for a message's.
func (f *fanOut) connectCaddy(conn string) {
	addr, site, directives := httpAddr, "http://"+httpAddr, ""
	if f.tls {
		addr, site = httpsAddr, "https://"+httpsAddr
	}
	if conn == "logged" {
		directives = "log"
	}
	sites := fmt.Sprintf("%s {\n%s\nchat_broadcast * {\nhub hub\nping off\n}\n}", site, directives)
	s := startCaddy(f.b, sites)
	if conn == "logged" {
		s.loadWith("metrics", sites)
	}
	if f.tls {
		dialTLS(f.b).Close() // waits for the certificate
	}
	for range f.clients {
		joinOn(f.b, f.dial(addr), addr, "/")
	}
}

// connectFloor connects the clients to a floor. They make no handshake but that of TLS.
func (f *fanOut) connectFloor() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.b.Fatal(err)
	}
	defer listener.Close()
	if f.tls {
		s := httptest.NewTLSServer(nil) // for its certificate
		s.Close()
		listener = tls.NewListener(listener, &tls.Config{
			Certificates:           s.TLS.Certificates,
			SessionTicketsDisabled: true, // receivers would take them for messages
		})
	}
	accepted := make(chan error, 1)
	f.work.Go(func() { f.serveFloor(listener, accepted) }) // ends with the sender's connection
	for range f.clients {
		f.dial(listener.Addr().String())
	}
	if err := <-accepted; err != nil {
		f.b.Fatal(err)
	}
}

// serveFloor does the least that a server in Go can do: one goroutine knows how long a message is, and writes one
// frame, made beforehand, to one client after the other. It never looks at the bytes that it reads. It stops with the
// first connection that fails.
func (f *fanOut) serveFloor(listener net.Listener, accepted chan<- error) {
	conns, err := acceptAll(listener, f.clients)
	accepted <- err
	frame := ws.AppendFrame(nil, websocket.TextMessage, bytes.Repeat([]byte("x"), f.size))
	received := make([]byte, len(f.sent))
	for err == nil {
		_, err = io.ReadFull(conns[0], received)
		for i := 0; i < len(conns) && err == nil; i++ {
			_, err = conns[i].Write(frame)
		}
	}
	for _, conn := range conns {
		conn.Close()
	}
}

// acceptAll accepts n connections, and makes their TLS handshakes.
func acceptAll(listener net.Listener, n int) (conns []net.Conn, err error) {
	for range n {
		conn, err := listener.Accept()
		if err != nil {
			return conns, err
		}
		conns = append(conns, conn)
		if t, ok := conn.(*tls.Conn); ok {
			if err := t.Handshake(); err != nil {
				return conns, err
			}
		}
	}
	return conns, nil
}

// A countedConn counts the writes of clients, to tell them from the server's.
type countedConn struct {
	net.Conn
	writes *atomic.Int64
}

// Write counts as one system call, which it is unless the socket is full.
func (c *countedConn) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

// dial connects a client. The first is the sender.
func (f *fanOut) dial(addr string) net.Conn {
	socket, err := net.Dial("tcp", addr)
	if err != nil {
		f.b.Fatal(err)
	}
	f.b.Cleanup(func() { socket.Close() })
	conn := net.Conn(&countedConn{socket, &f.writes})
	if f.tls {
		t := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: "localhost", MinVersion: tls.VersionTLS13})
		if err := t.Handshake(); err != nil {
			f.b.Fatal(err)
		}
		conn = t
	}
	if f.sender == nil {
		f.sender = conn
	}
	f.sockets = append(f.sockets, socket)
	return conn
}

// receiveAll starts a receiver for each client, which ends with its connection. The benchmark's end waits for them.
func (f *fanOut) receiveAll() {
	f.b.Cleanup(func() {
		for _, socket := range f.sockets {
			socket.Close()
		}
		f.work.Wait()
	})
	for _, socket := range f.sockets {
		// Both before the clock runs: the handshake's deadline is still there, and a receiver allocates nothing.
		socket.SetDeadline(time.Time{})
		buf := make([]byte, min(maxReceive, f.underWay*f.frameSize))
		f.work.Go(func() { f.receive(socket, buf) })
	}
}

// receive counts what arrives at a client.
func (f *fanOut) receive(socket net.Conn, buf []byte) {
	var r records
	for received, i := 0, 0; ; {
		n, err := socket.Read(buf)
		if f.tls {
			n = r.count(buf[:n])
		}
		for received += n; received >= f.frameSize; received -= f.frameSize {
			if f.missing[i].Add(-1) == 0 {
				f.missing[i].Store(int64(f.clients))
				f.ready <- struct{}{} // has room: the message was taken from it
			}
			i = (i + 1) % f.underWay
		}
		if err != nil {
			select {
			case f.failed <- err:
			default: // not the first
			}
			return
		}
	}
}

// records are those of a TLS 1.3 connection after its handshake, of which only the lengths are read: crypto/tls would
// decrypt them, which takes as long as what is measured, and allocate.
type records struct {
	header [5]byte // type, version and length
	have   int     // bytes of the header
	size   int     // of the record behind it
	left   int     // bytes of it that have yet to come
}

// recordOverhead is the number of bytes that a record adds to its data: one for the type of its content, and 16 for the
// tag, with every cipher that Go offers (RFC 8446 §5.2). Go does not pad.
const recordOverhead = 1 + 16

// count returns how much application data is in the records that end in p.
func (r *records) count(p []byte) (n int) {
	for len(p) > 0 {
		if r.left == 0 {
			took := copy(r.header[r.have:], p)
			p = p[took:]
			r.have += took
			if r.have == len(r.header) {
				r.have = 0
				r.size = int(binary.BigEndian.Uint16(r.header[3:]))
				r.left = r.size
			}
			continue
		}
		took := min(r.left, len(p))
		p = p[took:]
		r.left -= took
		if r.left == 0 {
			n += r.size - recordOverhead
		}
	}
	return n
}

// awaitReady waits until another message may be sent.
func (f *fanOut) awaitReady() {
	select {
	case <-f.ready:
	case err := <-f.failed:
		f.b.Fatalf("a client was disconnected: %v", err)
	}
}

// measure sends messages, and stops the clock when every client has all of them.
func (f *fanOut) measure() {
	f.receiveAll()
	runtime.GC() // what the handshakes left is no message's
	ownBefore := f.writes.Load()
	before, counted := writeCalls()
	f.b.ReportAllocs()
	for f.b.Loop() {
		f.awaitReady()
		if _, err := f.sender.Write(f.sent); err != nil {
			f.b.Fatal(err)
		}
	}
	f.b.StartTimer() // Loop has stopped it with messages under way
	for range f.underWay {
		f.awaitReady()
	}
	f.b.StopTimer()
	messages := float64(f.b.N)
	f.b.ReportMetric(messages*float64(f.clients)/f.b.Elapsed().Seconds(), "deliveries/s")
	if counted {
		after, _ := writeCalls()
		f.b.ReportMetric(float64(after-before-(f.writes.Load()-ownBefore))/messages, "writes/msg")
	}
}

// writeCalls returns how many system calls this process has made that write, to whatever, where the system counts them:
// Linux, proc_pid_io(5). The runtime's own, to wake a thread that waits for the network, are among them.
func writeCalls() (n int64, counted bool) {
	data, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "syscw: "); ok {
			n, err = strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
