package hub

import (
	"errors"
	"io"
	"os"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// maxDiscarded bounds how many bytes the reader discards while it waits for the client's answer to a close. It is
// larger than the buffers of kernels, so that a client in the middle of a large message still sees the close frame
// instead of a reset.
const maxDiscarded = 16 << 20

// maxOverhead is how many bytes that are no part of a message (control frames, empty fragments) a client may send
// before the server stops reading from it for overheadPause. That makes 2 MiB a second. The smaller frames are, the
// more each of their bytes costs. At that rate a flood of the smallest frames takes a few percent of a processor and
// waits in its sender's own socket. The pings and fragments of a chat come nowhere near it.
const (
	maxOverhead   = 64 << 10
	overheadPause = 32 * time.Millisecond
)

// A source is a client as its ws.Reader sees it: the source of the client's bytes. It judges silence, and counts and
// paces the bytes.
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

// listen is the reader from one wait to the next. Between messages a client has no buffer, and a new goroutine waits for it,
// unless the client sends often. The stack of a new goroutine is half as large as after its first message, and stacks that have
// grown hardly ever shrink. A new goroutine costs less than the system calls of the message that it reads.
func (c *Client) listen() {
	sure, err := c.wait()
	if c.read(sure, err) {
		go c.listen()
		return
	}
	c.gone(CloseGone) // without effect if the client has left before
	c.awaitEnd()
	c.end()
}

// wait waits for input without a buffer, if the connection can do that; see conn.Waiter.
func (c *Client) wait() (sure bool, err error) {
	if c.waiter == nil {
		return true, nil
	}
	c.meter.Pay(c.isEnding)
	sure, err = c.waiter.Wait()
	c.meter.Begin(c.load)
	return sure, err
}

// read handles everything that has come, after a wait with the given result. It returns true when nothing is left to
// read, and false when the connection has failed or is closing.
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
	if !c.in.IsOpen() {
		return c.discardInput()
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
		if !c.noteMessage() && c.mayListen() {
			return true
		}
	}
	return true
}

// often is the most time between two messages of a client that sends often.
const often = time.Second

// noteMessage notes that a message has come, and reports whether the client sends often. Then the reader waits for the next one in
// a read, until a message comes later than that, or a pong.
func (c *Client) noteMessage() (sendsOften bool) {
	if c.pingInterval() == 0 {
		return false
	}
	quiet := c.heard.Sub(c.said)
	c.said = c.heard
	return quiet <= often
}

// discardInput reads once for a client without WebSocket, which can only listen. It returns false at the end of the
// connection.
func (c *Client) discardInput() bool {
	var discarded [ownInput]byte
	_, err := (*source)(c).Read(discarded[:])
	return err == nil
}

// ownInput is how many bytes discardInput reads at once.
const ownInput = 512

// mayListen reports whether all read bytes are used up, and the reader can wait for the connection without reading.
func (c *Client) mayListen() bool {
	if c.waiter == nil || c.in.Buffered() > 0 {
		return false
	}
	return !c.waiter.ReadsAhead() || c.drained()
}

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// drained reports whether a connection that reads ahead has returned everything that it has read. If not, the rest is
// in the buffer. drained reads once more, with a deadline that has passed, so that the connection reads nothing new.
func (c *Client) drained() bool {
	c.mu.Lock()
	if c.isEnding() { // the deadline of the close must stay
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

// onlyPongs drops whole pongs from the connection, and reports whether there was nothing else. Most clients send only
// pongs most of the time. ws.Reader.Next would drop them too, and then wait for the message behind them.
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

// receive reads one message and handles it. It returns false when the client is closing.
func (c *Client) receive(opcode int, r io.Reader) bool {
	b, ok := c.readMessage(opcode, r)
	if ok {
		ok = c.protocol.received(c, opcode, b.message)
	}
	b.free()
	c.returnIncoming()
	c.pace() // also here, because one read may bring many small requests with large answers
	return ok
}

// readMessage reads one message. It checks text as it arrives, so it refuses a message at its first bad byte and not at
// its end. It returns false when the client is closing.
func (c *Client) readMessage(opcode int, r io.Reader) (*messageBuffer, bool) {
	text := opcode == ws.TextMessage
	b := takeMessageBuffer(0)
	for valid := 0; ; {
		msg := b.message
		full := len(msg) == cap(msg)
		n, err := r.Read(msg[len(msg):cap(msg)]) // with a full buffer it reads nothing, or finds the end
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
			// The buffer grows to twice the bytes that have come, so a client that stalls within a message costs no
			// more. ws.Reader refuses a message over the maximum size before the reader gets its bytes.
			if b.class >= freeClass && !c.awaitIncoming(cap(msg)) {
				c.Close(CloseBusy)
				return b, false
			}
			b = b.doubled()
		}
	}
}

// awaitIncoming takes n more bytes from Process.Incoming for the message that c receives. While the address of c has
// its share, the server does not read from c. It returns false when that takes too long, or when the client is closing.
func (c *Client) awaitIncoming(n int) bool {
	c.meter.End()
	if !c.process.Incoming.Await(c.address, n, c.isEnding) {
		return false
	}
	c.incoming += n
	return true
}

// returnIncoming gives back the bytes that awaitIncoming has taken.
func (c *Client) returnIncoming() {
	if c.incoming > 0 {
		c.process.Incoming.Give(c.address, c.incoming)
		c.incoming = 0
	}
}

// message returns a message with c as its sender.
func (c *Client) message(opcode int, payload []byte) Message {
	return Message{
		Message: feed.Message{Sender: c.id, User: c.user, Opcode: opcode, Payload: payload},
		Source:  FromClient, Joined: c.began, Address: c.address,
	}
}

// publish publishes a message of c. It returns false when c is closing.
func (c *Client) publish(m *Message) (Receipt, bool) {
	r, published := c.hub.publish(c, m)
	c.meter.Exclude(r.waited)
	c.meter.Delivered(r.Members)
	return r, published
}

// allowMessage counts a received message, and reports whether it is within the client's rate. It closes a client that
// keeps sending while its bucket is empty.
func (c *Client) allowMessage(opcode int) bool {
	c.messagesIn.Add(1)
	c.process.Counters.received(opcode)
	c.overhead = max(0, c.overhead-ws.MaxClientHeader)
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

// readFailed closes the client for the reason of err, which has ended its reading.
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

// awaitEnd reads and discards after a close, until the client closes, the deadline passes, or the client has sent
// maxDiscarded bytes. If the server closed a socket with unread bytes, TCP would send a reset, and the client would
// throw away a close frame that it has not read yet.
func (c *Client) awaitEnd() {
	c.mu.Lock()
	done := c.State() == Goodbye && c.saidGoodbye && !c.halfClosed
	c.mu.Unlock()
	if done {
		return
	}
	_, _ = io.CopyN(io.Discard, (*source)(c), maxDiscarded) // the connection closes, whatever the error
	// A client that has closed only its own half still reads. Let the writer finish.
	c.mu.Lock()
	left := time.Until(c.deadline)
	if c.State() != Closing || left <= 0 {
		c.mu.Unlock()
		return
	}
	flushed := make(chan struct{})
	c.flushed = flushed
	c.mu.Unlock()
	select {
	case <-flushed:
	case <-time.After(left):
	}
}

// armRead sets when the reader wakes up if the client is silent.
func (c *Client) armRead(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.isEnding() { // otherwise the last deadline is set
		c.readDeadline = t
		_ = c.conn.SetReadDeadline(t)
		if !c.exact && !c.timed {
			_ = c.conn.SetWriteDeadline(c.betweenWritesLocked())
		}
	}
}

// errPingTimeout ends a read: the client has been silent since the ping.
var errPingTimeout = errors.New("nothing heard since the ping")

// onSilence handles an expired read deadline. It sends a ping, or gives the client up, or sets another deadline if
// bytes came since the last was set. With a nil error the read goes on.
func (c *Client) onSilence() error {
	if c.pingInterval() == 0 || c.isEnding() {
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
		// A client that keeps sending may rely on pings, too. It gets one at every other of these deadlines, which are
		// at most an interval apart. It need not answer these. An answer to its own ping stands for one.
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

// pace pauses the reader of a client that sends much overhead. The more it is, the longer the pause: one large frame
// may be worth many pauses.
func (c *Client) pace() {
	for c.overhead >= maxOverhead && !c.isEnding() {
		c.meter.End()
		c.overhead -= maxOverhead
		time.Sleep(overheadPause)
	}
}

// onHeard counts n received bytes, which are a sign of life.
func (c *Client) onHeard(n int) {
	c.bytesIn.Add(uint64(n))
	c.process.Counters.BytesReceived.Add(uint64(n))
	c.overhead += n
	if c.pingInterval() == 0 {
		return
	}
	c.heard = time.Now()
	if c.pinged { // the deadline is that of the timeout, which may be longer than the interval
		c.pinged = false
		c.armRead(c.heard.Add(c.settings.PingInterval))
	}
}
