package hub

import (
	"errors"
	"io"
	"os"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// maxDiscarded bounds what is read and thrown away while waiting for the client's answer to a close. It is larger than what
// kernels buffer, so that a client in the middle of a large message still sees the close frame instead of a reset.
const maxDiscarded = 16 << 20

// maxOverhead is how many bytes that are no part of a message (control frames, empty fragments) a client may send before the
// server stops reading from it for overheadPause: 2 MiB a second. The smaller frames are, the more a byte of them costs. At
// that pace a flood of the smallest takes a few percent of a processor and waits in its sender's own socket, while a chat's
// pings and fragments come nowhere near it.
const (
	maxOverhead   = 64 << 10
	overheadPause = 32 * time.Millisecond
)

// maxClientHeader is the longest header of a client's frame: two bytes, a 64-bit length and the mask (RFC 6455 §5.2).
const maxClientHeader = 14

// A source is a client as its ws.Reader sees it: where the client's bytes come from. It judges silence, and counts and paces
// what comes.
type source Client

// Read implements io.Reader.
func (s *source) Read(p []byte) (int, error) {
	c := (*Client)(s)
	c.pace()
	c.meter.Pay(c.isEnding)
	for {
		n, err := c.conn.Read(p)
		if n > 0 {
			c.meter.Begin(c.load)
			c.onHeard(n)
			return n, err
		}
		if err != nil && !c.polls && errors.Is(err, os.ErrDeadlineExceeded) {
			err = c.onSilence()
			if err == nil {
				continue
			}
		}
		return n, err
	}
}

// listen is the reader from one wait to the next. Between messages a client has no buffer, and a goroutine that has done
// nothing yet but wait: its stack is half of what it would be after the first message, and stacks that have grown hardly
// ever shrink. A goroutine costs less than the system calls of the message that it is for.
func (c *Client) listen() {
	sure, err := c.wait()
	if c.read(sure, err) {
		go c.listen()
		return
	}
	c.gone(CloseGone) // unless something was decided before
	c.awaitEnd()
	c.end()
}

// wait waits for input without a buffer, where the connection can: see conn.Waiter.
func (c *Client) wait() (sure bool, err error) {
	if c.waiter == nil {
		return true, nil
	}
	c.meter.Pay(c.isEnding)
	sure, err = c.waiter.Wait()
	c.meter.Begin(c.load)
	return sure, err
}

// read relays what has come, after a wait with the given result, until there is nothing left to read. Then it returns true.
// It returns false when the connection has failed or is closing.
func (c *Client) read(sure bool, waited error) (idle bool) {
	defer func() {
		if v := recover(); v != nil {
			c.panicked(v)
			c.Close(CloseInternal)
		}
	}()
	if errors.Is(waited, os.ErrDeadlineExceeded) {
		err := c.onSilence()
		if err != nil {
			c.readFailed(err)
		}
		return err == nil
	}
	if c.waiter != nil {
		c.in.Borrow()
		defer c.in.Return()
		if !sure && c.mayListen() {
			return true
		}
	}
	for !c.onlyPongs() {
		opcode, r, err := c.in.Next()
		if err != nil {
			c.readFailed(err)
			return false
		}
		if !c.protocol.mayBegin(c) {
			c.Close(CloseReadOnly)
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

// mayListen reports whether everything read is used up, and the connection can be waited for without reading.
func (c *Client) mayListen() bool {
	if c.waiter == nil || c.in.Buffered() > 0 {
		return false
	}
	return !c.waiter.ReadsAhead() || c.drained()
}

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// drained reports whether a connection that reads ahead has given everything that it has read, and else leaves what there is
// in the buffer. To find out it reads once more, with a deadline that has passed, so that the connection cannot read on.
func (c *Client) drained() bool {
	c.mu.Lock()
	if c.isEnding() { // the deadline belongs to the end
		c.mu.Unlock()
		return false
	}
	_ = c.conn.SetReadDeadline(longAgo)
	c.mu.Unlock()
	c.polls = true
	err := c.in.Peek()
	c.polls = false
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.isEnding() {
		_ = c.conn.SetReadDeadline(c.readDeadline)
	}
	return c.in.Buffered() == 0 && errors.Is(err, os.ErrDeadlineExceeded)
}

// onlyPongs takes whole pongs from the connection and reports whether there was nothing else. They are what most clients
// send most of the time, and ws.Reader.Next would go on to wait for the message behind them.
func (c *Client) onlyPongs() bool {
	if c.waiter == nil {
		return false
	}
	for c.in.DropPong() {
		if c.mayListen() {
			return true
		}
	}
	return false
}

// receive reads one message and does what it asks for. It returns false when the client is closing.
func (c *Client) receive(opcode int, r io.Reader) bool {
	b, ok := c.readMessage(opcode, r)
	if ok {
		ok = c.protocol.received(c, opcode, b.message)
	}
	b.free()
	c.returnIncoming()
	c.pace() // not only before reading: many small requests come with one read, and their answers are not small
	return ok
}

// readMessage reads one message. Text is checked as it arrives, so that a message is refused at its first bad byte, not at
// its end. It returns false when the client is closing.
func (c *Client) readMessage(opcode int, r io.Reader) (*messageBuffer, bool) {
	text := opcode == ws.TextMessage
	b := takeMessageBuffer(0)
	for valid := 0; ; {
		msg := b.message
		full := len(msg) == cap(msg)
		n, err := r.Read(msg[len(msg):cap(msg)]) // if full, nothing, or the end
		msg = msg[:len(msg)+n]
		b.message = msg
		c.overhead -= n
		if text {
			whole, ok := ws.ValidUTF8(msg[valid:])
			valid += whole
			if !ok || err == io.EOF && valid < len(msg) {
				c.Close(ws.InvalidUTF8)
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
			// Twice what has come: a client that stalls within a message costs no more. ws.Reader refuses what exceeds the
			// maximum size before it is read.
			if b.class >= freeClass && !c.awaitIncoming(cap(msg)) {
				c.Close(CloseBusy)
				return b, false
			}
			b = b.doubled()
		}
	}
}

// awaitIncoming takes n more bytes, for the message that c receives, from the memory that all messages share while they
// arrive. While its address has its share, c is not read. It returns false when that takes too long, or when the client is
// closing.
func (c *Client) awaitIncoming(n int) bool {
	c.meter.End()
	if !c.process.Incoming.Await(c.address, n, c.isEnding) {
		return false
	}
	c.incoming += n
	return true
}

// returnIncoming gives back what awaitIncoming has taken.
func (c *Client) returnIncoming() {
	if c.incoming > 0 {
		c.process.Incoming.Give(c.address, c.incoming)
		c.incoming = 0
	}
}

// message returns a message of the client's.
func (c *Client) message(opcode int, payload []byte) Message {
	return Message{
		Message: feed.Message{Sender: c.id, User: c.user, Opcode: opcode, Payload: payload},
		Source:  FromClient, Joined: c.began, Address: c.address,
	}
}

// publish publishes a message of the client's. It returns false when the client is closing.
func (c *Client) publish(m *Message) (Receipt, bool) {
	r, published := c.hub.publish(c, m)
	c.meter.Exclude(r.waited)
	c.meter.Delivered(r.Members)
	return r, published
}

// allowMessage counts a message that has come, and reports whether it is within the client's rate. A client that goes on
// sending at an empty bucket is closed.
func (c *Client) allowMessage(opcode int) bool {
	c.messagesIn.Add(1)
	c.process.Counters.received(opcode)
	c.overhead = max(0, c.overhead-maxClientHeader)
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
	c.process.Counters.DroppedByRate.Add(1)
	if c.dropped >= c.limiter.Burst() {
		c.Close(CloseRateLimited)
	}
	return false
}

// readFailed closes the client for the reason that ended its reading.
func (c *Client) readFailed(err error) {
	why, goodbye, known := c.in.Why(err)
	switch {
	case known:
		c.mu.Lock()
		c.saidGoodbye = goodbye
		c.mu.Unlock()
		c.Close(why)
	case errors.Is(err, errPingTimeout):
		c.Cut(ClosePingTimeout)
	default:
		c.gone(CloseGone)
	}
}

// awaitEnd reads on and discards after a close, until the client closes, patience ends, or it has sent too much. Closing a
// socket with unread bytes makes TCP send a reset, upon which the client throws away a close frame that it has not read yet.
func (c *Client) awaitEnd() {
	c.mu.Lock()
	done := c.State() == Goodbye && c.saidGoodbye && !c.halfClosed
	c.mu.Unlock()
	if done {
		return
	}
	_, _ = io.CopyN(io.Discard, (*source)(c), maxDiscarded) // however it ends, it ends
	// A client that has closed only its own half still reads what is due.
	c.mu.Lock()
	if c.State() != Closing {
		c.mu.Unlock()
		return
	}
	flushed, deadline := make(chan struct{}), c.deadline
	c.flushed = flushed
	c.mu.Unlock()
	select {
	case <-flushed:
	case <-time.After(time.Until(deadline)):
	}
}

// armRead sets when the reader wants to be woken from silence.
func (c *Client) armRead(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.isEnding() { // else there is a deadline already
		c.readDeadline = t
		_ = c.conn.SetReadDeadline(t)
	}
}

// errPingTimeout ends a read: the client has been silent since the ping.
var errPingTimeout = errors.New("nothing heard since the ping")

// onSilence handles an expired read deadline: time to ping, time to give up or, where something was heard since it was set,
// another deadline. With a nil error the read goes on.
func (c *Client) onSilence() error {
	if c.settings.PingInterval == 0 || c.isEnding() {
		return os.ErrDeadlineExceeded
	}
	now := time.Now()
	if c.pinged {
		if c.due.Load() {
			// The ping still waits for the writer: the client is slow, and the write timeout decides.
			c.armRead(now.Add(c.settings.PingTimeout))
			return nil
		}
		return errPingTimeout
	}
	if due := c.heard.Add(c.settings.PingInterval); due.After(now) {
		c.armRead(due)
		// A client that keeps sending may rely on pings, too: it gets one at every other of these deadlines, which are at
		// most an interval apart. Nothing hangs on its pong.
		if c.spared && !c.due.Load() {
			c.push(ws.PingMessage, nil)
		}
		c.spared = !c.spared
		return nil
	}
	c.pinged, c.spared = true, true // the next deadline is an interval after the answer
	c.armRead(now.Add(c.settings.PingTimeout))
	c.push(ws.PingMessage, nil)
	return nil
}

// pace makes a client wait that sends much and says nothing, the longer the more that is: one large frame may be worth many
// pauses.
func (c *Client) pace() {
	for c.overhead >= maxOverhead && !c.isEnding() {
		c.meter.End()
		c.overhead -= maxOverhead
		time.Sleep(overheadPause)
	}
}

// onHeard notes a sign of life of n bytes.
func (c *Client) onHeard(n int) {
	c.bytesIn.Add(uint64(n))
	c.process.Counters.BytesReceived.Add(uint64(n))
	c.overhead += n
	if c.settings.PingInterval == 0 {
		return
	}
	c.heard = time.Now()
	if c.pinged { // the deadline is the timeout's, which may be longer than the interval
		c.pinged = false
		c.armRead(c.heard.Add(c.settings.PingInterval))
	}
}
