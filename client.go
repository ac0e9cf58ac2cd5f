package chatbroadcast

import (
	"bufio"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
	"go.uber.org/zap"
	"golang.org/x/time/rate"
)

// closeTimeout bounds the two halves of a close: flushing what is due and sending the close frame, and then
// waiting for the peer's answer. Browsers wait for about as long themselves.
const closeTimeout = 5 * time.Second

// maxDiscarded bounds what is read and thrown away while waiting for the peer's answer. It is larger than
// what kernels buffer, so that a peer in the middle of a large message still sees our close frame instead of
// a reset.
const maxDiscarded = 16 << 20

// maxPending bounds the control frames that wait for the writer, in bytes: 16 of the largest. When they
// exceed it only the newest is kept, which RFC 6455 §5.5.3 allows for pongs.
const maxPending = 16 * 127

// maxOverhead is how many bytes that are no part of a message (control frames, empty fragments) a client may
// send before it is not read for overheadPause: 2 MiB a second. Frames cost the server the more the smaller they
// are; so paced, a flood of the smallest takes a few percent of a core and waits in its sender's own socket,
// while a chat's pings and fragments come nowhere near.
const (
	maxOverhead   = 64 << 10
	overheadPause = 32 * time.Millisecond
)

// maxClientHeader is the longest header of a client's frame: two bytes, a 64-bit length and the mask.
const maxClientHeader = 14

// The states of a client's writer. Whoever moves idle to writing must start the writer; whoever finds the
// other gone finishes the client.
const (
	stateIdle     int32 = iota // no writer: everything that was due is written
	stateWriting               // a writer runs, or is about to
	stateOrphaned              // the reader has ended: no writer may start
)

// A client is one connection and its place in a hub. Two goroutines work for it: a reader for as long as the
// connection lives, which is a new goroutine for each wait, and a writer for as long as there is something to write.
type client struct {
	// Set once, before the client joins or starts.
	id       clientID
	settings *settings
	hub      *hub
	scope    *scope
	user     string
	ip       string       // as Caddy sees it, behind trusted proxies too
	prefix   netip.Prefix // what max_clients_per_ip counts as one address
	ws       *websocket.Conn
	wire     wire // what in reads from
	joined   time.Time
	expiry   *time.Timer // of max_age, or nil

	state atomic.Int32
	due   atomic.Bool // whether pending is not empty

	// Added to by the reader and by the writer, read by anyone.
	messagesIn, bytesIn   atomic.Uint64
	messagesOut, bytesOut atomic.Uint64

	// Owned by the reader.
	in       bufio.Reader  // what ws reads from; without a buffer between messages
	borrowed *bufio.Reader // whose buffer in has, to be returned
	heard    time.Time     // when the last bytes came
	pinged   bool          // a ping is out, and nothing has come since
	limiter  *rate.Limiter
	dropped  int // messages over the rate since the bucket was last full
	overhead int // bytes received since the last pause that are no part of a message

	// Guarded by hub.mu.
	index    int // in hub.clients; negative when dropped
	cursor   uint64
	done     uint64 // the cursor up to which everything is written
	left     bool
	until    uint64     // once left: the head at that moment
	pinned   *segment   // what the writer is writing from
	own      []seqRange // with echo off: the client's own messages, from cursor on
	missed   uint64     // messages lost under on_lag skip
	turn     turn
	nextTurn *client // the next in the hub's queue
	looked   uint64  // in turnWriter: the cursor when a sender last looked

	// Guarded by registry.mu.
	scopeIndex int  // in scope.clients
	away       bool // has left

	// Guarded by mu.
	mu          sync.Mutex
	pending     []byte // pongs and pings, wire-ready
	closing     bool   // cause is decided; nothing more is published for the client
	cause       cause
	deadline    time.Time     // once closing: when patience with the peer ends
	broken      bool          // a write has failed; whatever the peer has still sent is read
	saidGoodbye bool          // our close frame is out
	gotGoodbye  bool          // the peer's close frame is in
	written     chan struct{} // if the reader waits: closed when the writer has nothing more to write
}

// A clientID names a client for as long as the process lives, and no other before or after it unless the clock is
// turned back.
type clientID uint64

// String returns the id as logs and APIs show it: lower-case letters and digits.
func (id clientID) String() string { return strconv.FormatUint(uint64(id), 36) }

// start runs the connection. It clears what the HTTP server has left on it and starts the reader, which
// ends with the connection: at the latest when the peer is silent for the ping's interval and timeout or,
// once closing, after twice closeTimeout. It must run after the handler chain has returned, because wrappers
// may set deadlines until then.
func (c *client) start() {
	c.mu.Lock()
	_ = c.wire.conn.SetDeadline(c.deadline) // fails only on a dead connection, as will the next read
	c.mu.Unlock()
	if interval := c.settings.pingInterval; interval > 0 {
		// The first ping comes early, and at another time for each of the clients that joined together.
		first := time.Now().Add(interval/2 + rand.N(interval/2+1))
		c.heard = first.Add(-interval)
		c.armRead(first)
	}
	if age := c.settings.maxAge; age > 0 {
		spread := 0.9 + 0.2*rand.Float64()
		c.expiry = time.AfterFunc(time.Duration(spread*float64(age)), func() { c.close(causeMaxAge) })
	}
	c.startWriter(nil, 0)
	if c.wire.raw == nil {
		c.in = *bufio.NewReaderSize(&c.wire, ownReadBuffer)
	}
	go c.listen() // nobody waits for the reader: its last act is end
}

// startWriter starts the writer of a client that the caller has put in stateWriting. It begins with rest, which
// ends n messages, and ends when nothing is left to write or the connection fails, which end makes it do.
func (c *client) startWriter(rest []byte, n int) { go c.write(rest, n) }

// wake starts a writer unless one runs, which then sees what is new before it ends.
func (c *client) wake() {
	if c.state.CompareAndSwap(stateIdle, stateWriting) {
		c.startWriter(nil, 0)
	}
}

// end is the reader's last act: with the connection closed a running writer fails, and the later of the two
// finishes the client.
func (c *client) end() {
	_ = c.wire.conn.Close() // the error of a connection that is given up helps nobody
	if c.state.Swap(stateOrphaned) == stateIdle {
		c.finish()
	}
}

// finish reports the connection. Nothing works for the client any more.
func (c *client) finish() {
	defer hubs.finished(c)
	c.hub.drop(c)
	if c.expiry != nil {
		c.expiry.Stop()
	}
	c.mu.Lock()
	why := c.cause
	c.mu.Unlock()
	c.hub.metrics.closed(why)
	c.scope.logger().Info("client closed",
		zap.String("hub", c.hub.name),
		zap.Stringer("client_id", c.id),
		zap.String("user", c.user),
		zap.String("client_ip", c.ip),
		zap.Int("code", why.code),
		zap.String("reason", why.reason),
		zap.Duration("duration", time.Since(c.joined)),
		zap.Uint64("messages_in", c.messagesIn.Load()),
		zap.Uint64("messages_out", c.messagesOut.Load()),
		zap.Uint64("bytes_in", c.bytesIn.Load()),
		zap.Uint64("bytes_out", c.bytesOut.Load()),
	)
}

// panicked reports a bug that would otherwise end the server, since no HTTP server stands above our
// goroutines to recover it.
func (c *client) panicked(v any) {
	c.scope.logger().Error("panic in a connection", zap.Any("panic", v), zap.ByteString("stack", debug.Stack()))
}

// close ends the client politely: it leaves the hub at once, its writer flushes what was published before and
// sends the close frame, and the reader waits for the peer's answer. The first cause holds; close reports whether it
// was this one.
func (c *client) close(why cause) bool {
	if !c.decide(why) {
		return false
	}
	hubs.leave(c)
	c.wake()
	return true
}

// cut ends the client without waiting for anything: the peer sees a reset. It never blocks.
func (c *client) cut(why cause) {
	if c.decide(why) {
		hubs.leave(c)
	}
	c.mu.Lock()
	c.broken = true // nothing more is written that the reader could wait for
	c.mu.Unlock()
	c.wire.abort()
}

// connection returns the client's connection, or nil if it has none yet.
func (c *client) connection() net.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wire.conn
}

// gone ends a client that has no connection left to say anything on.
func (c *client) gone() {
	if c.decide(causeGone) {
		hubs.leave(c)
	}
}

// decide makes why the client's cause, unless it has one, and starts the clock of closeTimeout.
func (c *client) decide(why cause) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing {
		return false
	}
	c.closing, c.cause = true, why
	c.setDeadlineLocked(time.Now().Add(closeTimeout))
	return true
}

// setDeadlineLocked bounds every read and write from now on. A client that has not started gets it then.
func (c *client) setDeadlineLocked(t time.Time) {
	c.deadline = t
	if c.wire.conn != nil {
		_ = c.wire.conn.SetDeadline(t)
	}
}

// ---- the reader ----

// readBuffer is what messages are read into as they come: dozens of chat messages in one system call. The rest of
// a larger one is read into the message's own buffer.
const readBuffer = 4 << 10

// ownReadBuffer is the buffer of a connection that can only be waited for by reading: a few chat messages.
const ownReadBuffer = 512

// readBuffers are readers with a buffer of readBuffer bytes, of which only the buffers are used.
var readBuffers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, readBuffer) }}

// borrowBuffer gives the client a buffer to read into.
func (c *client) borrowBuffer() {
	c.borrowed = readBuffers.Get().(*bufio.Reader)
	c.borrowed.Reset(&c.wire)
	c.in = *c.borrowed
}

// returnBuffer takes the buffer away; what is unread in it is lost.
func (c *client) returnBuffer() {
	*c.borrowed, c.in = c.in, bufio.Reader{}
	c.borrowed.Reset(nil)
	readBuffers.Put(c.borrowed)
	c.borrowed = nil
}

// listen is the reader from one wait to the next. Between messages a client has no buffer, and a goroutine that has
// done nothing else yet but wait: its stack is half of what it would be after the first message, and stacks that have
// grown hardly ever shrink. A goroutine costs less than the system calls of the message that it is for.
func (c *client) listen() {
	err := c.wire.wait()
	if c.read(err) {
		go c.listen()
		return
	}
	c.gone() // unless something was decided before
	c.awaitEnd()
	c.end()
}

// read relays what has come, after a wait that ended with the given error, until there is nothing left to read; then
// it returns true. It returns false when the connection has failed or is closing.
func (c *client) read(waited error) (idle bool) {
	defer func() {
		if v := recover(); v != nil {
			c.panicked(v)
			c.close(causeInternal)
		}
	}()
	if errors.Is(waited, os.ErrDeadlineExceeded) {
		err := c.onSilence()
		if err != nil {
			c.readFailed(err)
		}
		return err == nil
	}
	if c.wire.raw != nil {
		c.borrowBuffer()
		defer c.returnBuffer()
	}
	for !c.onlyPongs() {
		opcode, r, err := c.ws.NextReader()
		if err != nil {
			c.readFailed(err)
			return false
		}
		if c.settings.readOnly {
			c.close(causeReadOnly)
			return false
		}
		if !c.receive(opcode, r) {
			return false
		}
		if c.mayListen() {
			return true
		}
	}
	return true
}

// mayListen reports whether all that was read is used up, and the connection can be waited for without reading.
func (c *client) mayListen() bool {
	return c.wire.raw != nil && c.in.Buffered() == 0 && len(c.wire.early) == 0
}

// onlyPongs takes whole pongs from the connection and reports whether there was nothing else. They are what most
// clients send most of the time, and ws would go on to wait for the message behind them.
func (c *client) onlyPongs() bool {
	if c.wire.raw == nil {
		return false
	}
	for {
		_, _ = c.in.Peek(1) // ws will meet the same error
		head, _ := c.in.Peek(min(2, c.in.Buffered()))
		if len(head) < 2 || head[0] != finBit|websocket.PongMessage || head[1]&maskBit == 0 {
			return false
		}
		size := 2 + maskSize + int(head[1]&^maskBit)
		if size > 2+maskSize+maxControlPayload || size > c.in.Buffered() {
			return false
		}
		_, _ = c.in.Discard(size) // cannot fail: it is buffered
		if c.mayListen() {
			return true
		}
	}
}

// minMessage is what a message's buffer begins with: most chat messages fit.
const minMessage = 512

// A messageBuffer holds a message while it is received, so that a client between two messages has none. It has room for
// minMessage bytes, doubled class times.
type messageBuffer struct {
	message []byte
	class   int
}

// messageBuffers keep buffers of up to 64 KiB between uses, a pool a class.
var messageBuffers [8]sync.Pool

// takeMessageBuffer returns an empty buffer.
func takeMessageBuffer(class int) *messageBuffer {
	if class < len(messageBuffers) {
		if b, ok := messageBuffers[class].Get().(*messageBuffer); ok {
			return b
		}
	}
	return &messageBuffer{make([]byte, 0, minMessage<<class), class}
}

// free gives the buffer back. Nothing may refer to it any more.
func (b *messageBuffer) free() {
	if b.class < len(messageBuffers) {
		b.message = b.message[:0]
		messageBuffers[b.class].Put(b)
	}
}

// doubled returns a buffer of twice the size with the same message, and frees b.
func (b *messageBuffer) doubled() *messageBuffer {
	larger := takeMessageBuffer(b.class + 1)
	larger.message = append(larger.message, b.message...)
	b.free()
	return larger
}

// receive reads one message and publishes it. It returns false when the client is closing.
func (c *client) receive(opcode int, r io.Reader) bool {
	b, ok := c.readMessage(opcode, r)
	ok = ok && c.relay(opcode, b.message)
	b.free()
	return ok
}

// readMessage reads one message. Text is checked as it arrives, so that a message is refused at its first bad byte, not
// at its end. It returns false when the client is closing.
func (c *client) readMessage(opcode int, r io.Reader) (*messageBuffer, bool) {
	text := opcode == websocket.TextMessage
	b := takeMessageBuffer(0)
	for valid := 0; ; {
		msg := b.message
		full := len(msg) == cap(msg)
		n, err := r.Read(msg[len(msg):cap(msg)]) // if full, nothing, or the end
		msg = msg[:len(msg)+n]
		b.message = msg
		c.overhead -= n
		if text {
			whole, ok := validUTF8(msg[valid:])
			valid += whole
			if !ok || err == io.EOF && valid < len(msg) {
				c.close(causeInvalidUTF8)
				return b, false
			}
		}
		if err == io.EOF {
			return b, true
		}
		if err != nil {
			c.readFailed(err)
			return b, false
		}
		if full {
			// Twice what has come: a peer that stalls within a message costs no more. ws refuses what
			// exceeds the maximum size before it is read.
			b = b.doubled()
		}
	}
}

// relay publishes a message within the client's rate. It returns false when the client is closing.
func (c *client) relay(opcode int, msg []byte) bool {
	c.messagesIn.Add(1)
	c.hub.metrics.received(opcode)
	c.overhead = max(0, c.overhead-maxClientHeader)
	if !c.allow() {
		return !c.isClosing()
	}
	_, _, published := c.hub.publish(c, opcode, msg)
	if published {
		c.hub.metrics.publishedByClient.Inc()
	}
	return published
}

// allow takes one message from the client's bucket. A client that goes on sending at an empty one is closed.
func (c *client) allow() bool {
	if c.limiter == nil {
		return true
	}
	now := time.Now()
	if c.limiter.TokensAt(now) >= float64(c.limiter.Burst()) {
		c.dropped = 0
	}
	if c.limiter.AllowN(now, 1) {
		return true
	}
	c.dropped++
	c.hub.metrics.droppedByRate.Inc()
	if c.dropped >= c.limiter.Burst() {
		c.close(causeRateLimited)
	}
	return false
}

// readFailed closes the client for the reason that ended its reading.
func (c *client) readFailed(err error) {
	var peer *websocket.CloseError
	switch {
	case errors.As(err, &peer) && peer.Code != websocket.CloseAbnormalClosure:
		c.mu.Lock()
		c.gotGoodbye = true
		c.mu.Unlock()
		c.close(echoed(peer.Code))
	case errors.Is(err, errPingTimeout):
		c.cut(causePingTimeout)
	case errors.Is(err, websocket.ErrReadLimit):
		c.close(causeTooBig)
	case c.wire.refused:
		c.close(causeProtocolError)
	default:
		c.gone()
	}
}

// awaitEnd reads on and discards after a close, until the peer closes, patience ends, or it has sent too
// much. Closing a socket with unread bytes makes TCP send a reset, upon which the peer throws away the close
// frame that it has not read yet.
func (c *client) awaitEnd() {
	c.mu.Lock()
	done := c.saidGoodbye && c.gotGoodbye && !c.wire.canCloseWrite()
	c.mu.Unlock()
	if done {
		return
	}
	_, _ = io.CopyN(io.Discard, &c.wire, maxDiscarded) // however it ends, it ends
	// A peer that has closed only its own half still reads what is due.
	c.mu.Lock()
	if c.saidGoodbye || c.broken || c.cause.frame() == nil {
		c.mu.Unlock()
		return
	}
	written, deadline := make(chan struct{}), c.deadline
	c.written = written
	c.mu.Unlock()
	select {
	case <-written:
	case <-time.After(time.Until(deadline)):
	}
}

// isEnding reports whether nothing more can be said to the client, but for a close frame.
func (c *client) isEnding() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closing || c.broken
}

// isClosing reports whether the cause is decided.
func (c *client) isClosing() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closing
}

// armRead sets when the reader wants to be woken from silence.
func (c *client) armRead(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing && !c.broken { // else there is a deadline already
		_ = c.wire.conn.SetReadDeadline(t)
	}
}

// errPingTimeout ends a read: the peer has been silent since the ping.
var errPingTimeout = errors.New("nothing heard since the ping")

// onSilence handles an expired read deadline: time to ping, time to give up or, where something was heard
// since it was set, nothing yet. With a nil error the read goes on.
func (c *client) onSilence() error {
	if c.settings.pingInterval == 0 || c.isEnding() {
		return os.ErrDeadlineExceeded
	}
	now := time.Now()
	if c.pinged {
		if c.due.Load() {
			// The ping still waits for the writer: the client is slow, and the write timeout's business.
			c.armRead(now.Add(c.settings.pingTimeout))
			return nil
		}
		return errPingTimeout
	}
	if due := c.heard.Add(c.settings.pingInterval); due.After(now) {
		c.armRead(due)
		return nil
	}
	c.pinged = true
	c.armRead(now.Add(c.settings.pingTimeout))
	c.push(websocket.PingMessage, nil)
	return nil
}

// pace lets a client wait that sends much and says nothing.
func (c *client) pace() {
	if c.overhead >= maxOverhead && !c.isEnding() {
		c.overhead = 0
		time.Sleep(overheadPause)
	}
}

// onHeard notes a sign of life of n bytes.
func (c *client) onHeard(n int) {
	c.bytesIn.Add(uint64(n))
	c.hub.metrics.bytesReceived.Add(float64(n))
	c.overhead += n
	if c.settings.pingInterval > 0 {
		c.heard, c.pinged = time.Now(), false
	}
}

// push hands a control frame to the writer, unless the client is ending.
func (c *client) push(opcode int, payload []byte) {
	c.mu.Lock()
	if !c.closing && !c.broken {
		if len(c.pending)+frameSize(len(payload)) > maxPending {
			c.pending = c.pending[:0]
		}
		c.pending = appendFrame(c.pending, opcode, payload)
		c.due.Store(true)
	}
	c.mu.Unlock()
	c.wake()
}

// ---- the writer ----

// write is the client's only writer while it runs.
func (c *client) write(rest []byte, n int) {
	switch c.flush(rest, n) {
	case progressIdle:
	case progressOrphaned:
		c.finish()
	default:
		c.endWriting()
	}
}

// endWriting ends a writer whose connection takes nothing more.
func (c *client) endWriting() {
	c.hub.drop(c)
	c.mu.Lock()
	if c.written != nil {
		close(c.written)
		c.written = nil
	}
	c.broken = true // a reader that has yet to look must not wait
	c.mu.Unlock()
	if !c.state.CompareAndSwap(stateWriting, stateIdle) {
		c.finish()
	}
}

// flush writes rest and then the hub's frames, those of control before them, until there are none left or, for a
// client that has left, until the close frame is out. It returns progressFlushed also when the connection failed.
func (c *client) flush(rest []byte, n int) (last progress) {
	defer func() {
		if v := recover(); v != nil {
			c.panicked(v)
			c.cut(causeInternal) // in the middle of a frame, for all we know
			last = progressFlushed
		}
	}()
	if len(rest) > 0 {
		if !c.sendMessages(rest, n) {
			return progressFlushed
		}
	}
	for {
		frames, n, p := c.hub.next(c)
		switch p {
		case progressFrames:
			if !c.sendPending() || !c.sendMessages(frames, n) {
				return progressFlushed
			}
		case progressLagged:
			c.close(causeLagged)
			runtime.Gosched() // somebody else may be closing it, between deciding and leaving
		case progressFlushed:
			if c.sendPending() {
				c.sayGoodbye()
			}
			return p
		case progressIdle:
			// A control frame that came while a writer ran has started none.
			if !c.due.Load() || !c.state.CompareAndSwap(stateIdle, stateWriting) {
				return p
			}
			if !c.sendPending() {
				return progressFlushed
			}
		case progressOrphaned, progressWriter: // the latter is for flushers only
			return p
		}
	}
}

// sendMessages sends frames, which end n messages.
func (c *client) sendMessages(frames []byte, n int) bool {
	if !c.send(frames) {
		return false
	}
	c.messagesOut.Add(uint64(n))
	c.hub.metrics.written.wrote(n, 0)
	return true
}

// sendPending sends the control frames that are due. After hub.next it puts every pong before what was published
// after its ping had come: were it before, a pong and a message could come between the two.
func (c *client) sendPending() bool {
	return !c.due.Load() || c.send(c.takePending())
}

func (c *client) takePending() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.pending
	c.pending = nil
	c.due.Store(false)
	return p
}

// attempt writes as much of frames, which end n messages, as the connection takes without waiting, and returns the
// rest. t counts it.
func (c *client) attempt(a *attempt, t *tally, frames []byte, n int) (rest []byte) {
	defer func() {
		if v := recover(); v != nil {
			c.panicked(v)
			c.cut(causeInternal)
			rest = frames
		}
	}()
	sent := a.write(c.wire.raw, frames)
	c.bytesOut.Add(uint64(sent))
	if sent < len(frames) {
		n = 0
	}
	c.messagesOut.Add(uint64(n))
	t.wrote(n, sent)
	return frames[sent:]
}

// send writes p. It returns false when the connection takes nothing more: it has failed, or has made no progress
// for the write timeout and is cut, because what followed a broken frame would be garbage to the peer.
func (c *client) send(p []byte) bool {
	for len(p) > 0 {
		c.setWriteDeadline(time.Now().Add(c.settings.writeTimeout))
		n, err := c.wire.conn.Write(p[:min(len(p), c.wire.maxWrite)])
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			c.sent(n)
			c.writeFailed()
			return false
		}
		slow := err != nil && c.wire.resumable && !c.isEnding()
		if slow && n == 0 {
			// A blocked write goes on only when a third of the socket's buffer is free. What is free by now?
			c.setWriteDeadline(time.Time{})
			a := attempts.Get().(*attempt)
			n = a.write(c.wire.raw, p)
			attempts.Put(a)
		}
		c.sent(n)
		p = p[n:]
		if err != nil && (!slow || n == 0) {
			c.cut(causeWriteTimeout)
			return false
		}
	}
	if c.wire.raw != nil {
		c.setWriteDeadline(time.Time{}) // an attempt fails once there is one that has passed
	}
	return true
}

// sent counts bytes that the connection took.
func (c *client) sent(n int) {
	c.bytesOut.Add(uint64(n))
	c.hub.metrics.written.wrote(0, n)
}

// writeFailed leaves the rest to the reader: a peer that closes the connection at once after its close frame makes
// writing fail before that frame is read.
func (c *client) writeFailed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing {
		c.broken = true
		_ = c.wire.conn.SetReadDeadline(time.Now().Add(closeTimeout))
	}
}

// setWriteDeadline gives the next write its deadline.
func (c *client) setWriteDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing { // else the deadline is the close's
		_ = c.wire.conn.SetWriteDeadline(t)
	}
}

// sayGoodbye sends the close frame and ends our half of the connection.
func (c *client) sayGoodbye() {
	c.mu.Lock()
	frame := c.cause.frame()
	done := !c.closing || c.saidGoodbye || frame == nil
	c.mu.Unlock()
	if done || !c.send(frame) {
		return
	}
	halfClosed := c.wire.closeWrite()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.saidGoodbye = true
	c.setDeadlineLocked(time.Now().Add(closeTimeout))
	if c.gotGoodbye && !halfClosed {
		// Both sides are done, and the peer waits for the server to close (RFC 6455 §7.1.1).
		_ = c.wire.conn.Close()
	}
}
