package chatbroadcast

import (
	"bufio"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// maxDiscarded bounds what is read and thrown away while waiting for the peer's answer. It is larger than
// what kernels buffer, so that a peer in the middle of a large message still sees our close frame instead of
// a reset.
const maxDiscarded = 16 << 20

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
	if c.wire.socket != nil {
		c.borrowBuffer()
		defer c.returnBuffer()
	}
	if c.wire.fresh {
		c.wire.fresh = false
		if c.mayListen() {
			return true
		}
	}
	for !c.onlyPongs() {
		opcode, r, err := c.ws.NextReader()
		if err != nil {
			c.readFailed(err)
			return false
		}
		if c.settings.readOnly && !c.speaksEvents {
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
	if c.wire.socket == nil || c.in.Buffered() > 0 || len(c.wire.early) > 0 {
		return false
	}
	return !c.wire.hides || c.drained()
}

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// drained reports whether TLS has given all that it has read from the connection, and else leaves what there is in c.in.
// To find out it is read from once more, but cannot read on, because the deadline for that has passed.
func (c *client) drained() bool {
	c.mu.Lock()
	if c.closing || c.broken { // the deadline is theirs
		c.mu.Unlock()
		return false
	}
	_ = c.wire.conn.SetReadDeadline(longAgo)
	c.mu.Unlock()
	c.wire.polls = true
	_, err := c.in.Peek(1)
	c.wire.polls = false
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing && !c.broken {
		_ = c.wire.conn.SetReadDeadline(c.readDeadline)
	}
	return c.in.Buffered() == 0 && errors.Is(err, os.ErrDeadlineExceeded)
}

// onlyPongs takes whole pongs from the connection and reports whether there was nothing else. They are what most
// clients send most of the time, and ws would go on to wait for the message behind them.
func (c *client) onlyPongs() bool {
	if c.wire.socket == nil {
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

// receive reads one message and publishes it. It returns false when the client is closing.
func (c *client) receive(opcode int, r io.Reader) bool {
	b, ok := c.readMessage(opcode, r)
	switch {
	case !ok:
	case c.speaksEvents:
		ok = c.handle(opcode, b.message)
	default:
		ok = c.relay(opcode, b.message)
	}
	b.free()
	c.returnIncoming()
	c.pace() // not only before reading: many small requests come with one read, and their answers are not small
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
			if b.class >= freeClass && !c.awaitIncoming(cap(msg)) {
				c.close(causeBusy)
				return b, false
			}
			b = b.doubled()
		}
	}
}

// awaitIncoming takes n more bytes for the message that c receives from what there is for all. While its address has its
// share, c is not read. It returns false when that takes too long, or when the client is closing.
func (c *client) awaitIncoming(n int) bool {
	c.endWork()
	if !hubs.memory.incoming.await(c.prefix, n, c.isEnding) {
		return false
	}
	c.incoming += n
	return true
}

// returnIncoming gives back what awaitIncoming has taken.
func (c *client) returnIncoming() {
	if c.incoming > 0 {
		hubs.memory.incoming.give(c.prefix, c.incoming)
		c.incoming = 0
	}
}

// relay publishes a message within the client's rate. It returns false when the client is closing.
func (c *client) relay(opcode int, payload []byte) bool {
	if !c.allowMessage(opcode) {
		return !c.isClosing()
	}
	_, ok := c.publish(message{from: c, sender: c.id, user: c.user, opcode: opcode, payload: payload})
	return ok
}

// publish publishes a message of the client's. It returns false when the client is closing.
func (c *client) publish(m message) (receipt, bool) {
	r, published := c.hub.publish(m)
	if c.working == 0 {
		c.beginWork() // publish has waited
	}
	c.workDelivered(r.members)
	if published && !r.repeated && !r.unknown {
		c.hub.metrics.publishedByClient.Inc()
	}
	hubs.shed()
	hubs.relieve()
	return r, published
}

// allowMessage counts a message that has come, and reports whether it is within the client's rate.
func (c *client) allowMessage(opcode int) bool {
	c.messagesIn.Add(1)
	c.hub.metrics.received(opcode)
	c.overhead = max(0, c.overhead-maxClientHeader)
	return c.allow()
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
	if why, goodbye, ok := c.wire.frames.verdict(c.in.Buffered()); ok {
		c.mu.Lock()
		c.gotGoodbye = goodbye
		c.mu.Unlock()
		c.close(why)
		return
	}
	switch {
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

// armRead sets when the reader wants to be woken from silence.
func (c *client) armRead(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing && !c.broken { // else there is a deadline already
		c.readDeadline = t
		_ = c.wire.conn.SetReadDeadline(t)
	}
}

// errPingTimeout ends a read: the peer has been silent since the ping.
var errPingTimeout = errors.New("nothing heard since the ping")

// onSilence handles an expired read deadline: time to ping, time to give up or, where something was heard
// since it was set, another deadline. With a nil error the read goes on.
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
		// A client that keeps sending may rely on pings, too: it gets one at every other of these deadlines, which are at
		// most an interval apart. Nothing hangs on its pong.
		if c.spared && !c.due.Load() {
			c.push(websocket.PingMessage, nil)
		}
		c.spared = !c.spared
		return nil
	}
	c.pinged, c.spared = true, true // the next deadline is an interval after the answer
	c.armRead(now.Add(c.settings.pingTimeout))
	c.push(websocket.PingMessage, nil)
	return nil
}

// pace lets a client wait that sends much and says nothing, the longer the more that is: one large frame may be worth many
// pauses.
func (c *client) pace() {
	for c.overhead >= maxOverhead && !c.isEnding() {
		c.endWork()
		c.overhead -= maxOverhead
		time.Sleep(overheadPause)
	}
}

// onHeard notes a sign of life of n bytes.
func (c *client) onHeard(n int) {
	c.bytesIn.Add(uint64(n))
	c.hub.metrics.bytesReceived.Add(float64(n))
	c.overhead += n
	if c.settings.pingInterval == 0 {
		return
	}
	c.heard = time.Now()
	if c.pinged { // the deadline is the timeout's, which may be longer than the interval
		c.pinged = false
		c.armRead(c.heard.Add(c.settings.pingInterval))
	}
}
