package ws

import (
	"bufio"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// pooledBuffer is the size of a buffer that a Reader borrows, in bytes. One read takes dozens of chat messages. The
// rest of a larger message goes into the buffer of the reader of its body.
const pooledBuffer = 4 << 10

// ownBuffer is the size of a buffer that a Reader keeps, in bytes: a few chat messages.
const ownBuffer = 512

// buffers are bufio.Readers of pooledBuffer bytes. Readers use only their memory.
var buffers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, pooledBuffer) }}

// A Reader reads the messages of one client with gorilla/websocket, which checks them, except for close frames and
// lengths that are too large: those the Reader judges itself, see Why. It writes nothing and sets no deadline.
//
// The order of calls is Init, a handshake with Hijack and TakeResponse, Open, then the rest. Between messages a Reader
// needs no buffer: Borrow one before Peek, DropPong and Next, and Return it when Buffered is 0 and the Reader waits. A
// Reader is for one goroutine at a time. It must not be copied after Init.
type Reader struct {
	src      io.Reader
	in       bufio.Reader  // gorilla reads from it, and keeps a pointer to it; without a buffer between messages
	borrowed *bufio.Reader // in has its buffer until Return
	conn     *websocket.Conn
	frames   frameScan
	response []byte // what gorilla has written during the handshake
	refused  bool   // gorilla has written since then: it refuses the bytes that it has read
}

// Init makes r read the client's bytes from src. An error of src ends Peek, Next or the body of a message, which return it
// as it is, with two exceptions: Next and bodies return io.EOF as a *websocket.CloseError with code 1006, and a net.Error
// in a wrapper that errors.Is does not look into.
func (r *Reader) Init(src io.Reader) { r.src = src }

// Hijack implements http.Hijacker for gorilla's Upgrader. It gives away a connection that sends nothing: TakeResponse
// returns what the Upgrader writes, so that the handshake can still be refused. Hijack borrows a buffer, because gorilla
// uses a bufio.Reader only if that has one; Open returns it.
func (r *Reader) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	r.Borrow()
	c := (*connection)(r)
	return c, bufio.NewReadWriter(&r.in, bufio.NewWriterSize(c, 1)), nil
}

// TakeResponse returns what the Upgrader has written, the 101 (RFC 6455 §4.2.2), and forgets it.
func (r *Reader) TakeResponse() []byte {
	response := r.response
	r.response = nil
	return response
}

// Open ends the handshake. c is the connection that the Upgrader has made of r. A message longer than maxMessage bytes
// ends the connection (see Why); 0 means no limit. r calls onPing with the payload of each ping, which onPing may keep,
// from within Next or the body of a message, and ignores pongs.
func (r *Reader) Open(c *websocket.Conn, maxMessage int, onPing func(payload []byte)) {
	r.Return()
	r.conn = c
	c.SetReadLimit(int64(maxMessage))
	c.SetPingHandler(func(payload string) error {
		onPing([]byte(payload))
		return nil
	})
	c.SetCloseHandler(func(int, string) error { return nil }) // gorilla's own would answer
}

// IsOpen reports whether Open was called: a Reader without a handshake reads no messages.
func (r *Reader) IsOpen() bool { return r.conn != nil }

// Borrow gives r a buffer to read into, of 4 KiB, until Return.
func (r *Reader) Borrow() {
	r.borrowed = buffers.Get().(*bufio.Reader)
	r.borrowed.Reset((*connection)(r))
	r.in = *r.borrowed
}

// Return takes the buffer of Borrow away, with the bytes that are unread in it.
func (r *Reader) Return() {
	*r.borrowed, r.in = r.in, bufio.Reader{}
	r.borrowed.Reset(nil)
	buffers.Put(r.borrowed)
	r.borrowed = nil
}

// Own gives r a buffer of 512 bytes for good. It is for connections that can only be waited for by reading.
func (r *Reader) Own() { r.in = *bufio.NewReaderSize((*connection)(r), ownBuffer) }

// Buffered returns how many bytes are in r's buffer: read, but not yet part of a message that Next has returned.
func (r *Reader) Buffered() int { return r.in.Buffered() }

// Peek reads from the source, unless Buffered is at least 1 already. It returns the source's error if nothing has come.
// It does not keep that error: the next read asks the source again.
func (r *Reader) Peek() error {
	_, err := r.in.Peek(1)
	return err
}

// DropPong discards the next frame if it is a pong and wholly in the buffer, and reports whether it was. With an empty
// buffer it first calls Peek, and leaves Peek's error for Next to find. Most clients send only pongs most of the time.
// Next would discard them too, and then wait for the message behind them.
func (r *Reader) DropPong() bool {
	_ = r.Peek()
	head, _ := r.in.Peek(min(2, r.in.Buffered())) // cannot fail: it is buffered
	if len(head) < 2 || head[0] != finBit|PongMessage || head[1]&maskBit == 0 {
		return false
	}
	length := int(head[1] &^ maskBit)
	size := 2 + maskSize + length
	if length > maxControlPayload || size > r.in.Buffered() {
		return false
	}
	_, _ = r.in.Discard(size) // cannot fail: it is buffered
	return true
}

// Next waits for the next message and returns its opcode, TextMessage or BinaryMessage, and its payload, which is valid
// until the next call. gorilla does not check the UTF-8 of a text: see ValidUTF8. After an error of Next or of body every
// further call fails; Why tells the reason.
func (r *Reader) Next() (opcode int, body io.Reader, err error) { return r.conn.NextReader() }

// Why returns the reason why reading has ended with err, if that was something the client has sent: a close frame, a
// message that is too long, or a malformed frame. goodbye reports whether it was a close frame, be it a malformed one.
// known is false if the source has failed. The caller must not have read since.
func (r *Reader) Why(err error) (why Close, goodbye, known bool) {
	if why, goodbye, ok := r.frames.verdict(r.in.Buffered()); ok {
		return why, goodbye, true
	}
	switch {
	case errors.Is(err, websocket.ErrReadLimit):
		return TooBig, false, true
	case r.refused:
		return ProtocolError, false, true
	}
	return Close{}, false, false
}

// A connection is a Reader as gorilla sees it: the connection of which it reads and to which it writes.
type connection Reader

// Read reads from the source. Every byte of the client passes the scan here, once.
func (c *connection) Read(p []byte) (int, error) {
	n, err := c.src.Read(p)
	c.frames.scan(p[:n])
	return n, err
}

// Write sends nothing. During the handshake it keeps the response. Afterwards gorilla only writes a close frame, which
// says that it refuses the bytes that it has read.
func (c *connection) Write(p []byte) (int, error) {
	if c.conn == nil {
		c.response = append(c.response, p...)
	} else {
		c.refused = true
	}
	return len(p), nil
}

// Close does nothing: whoever owns the source closes it.
func (c *connection) Close() error { return nil }

// LocalAddr returns nil: gorilla does not need it.
func (c *connection) LocalAddr() net.Addr { return nil }

// RemoteAddr returns nil: gorilla does not need it.
func (c *connection) RemoteAddr() net.Addr { return nil }

// SetDeadline does nothing: deadlines belong to the source's owner.
func (c *connection) SetDeadline(time.Time) error { return nil }

// SetReadDeadline does nothing: deadlines belong to the source's owner.
func (c *connection) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline does nothing: deadlines belong to the source's owner.
func (c *connection) SetWriteDeadline(time.Time) error { return nil }
