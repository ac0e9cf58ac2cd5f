package hub

import (
	"math/rand/v2"
	"net/netip"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/conn"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"golang.org/x/time/rate"
)

// closeTimeout bounds each half of a close: first to flush the remaining messages and send the close frame, then to
// wait for the client's answer. Browsers wait for about as long themselves.
const closeTimeout = 5 * time.Second

// The values of Client.writing, the right to write. The goroutine that moves it from idle to running must write, or
// hand the right on.
const (
	writerIdle    int32 = iota // nobody writes: everything is written
	writerRunning              // a writer or a flusher writes, or is about to
	readerEnded                // nobody writes again: the writer that finds this finishes the client
)

// A Client is one connection and its place in a hub. Two goroutines work for it. A reader runs for as long as the
// connection lives; it is a new goroutine after each message. A writer runs only while there is something to write.
// life.go has the states.
type Client struct {
	// Set once, before the client joins or starts.
	id        feed.ClientID
	user      string
	address   netip.Prefix // an IPv4 address or an IPv6 /64; limits and shares count by it
	settings  *Settings
	protocol  protocol
	owner     Owner
	process   *Process
	hub       *Hub
	began     time.Time   // when the handshake began
	expiry    *time.Timer // of Settings.MaxAge, or nil
	token     string      // the token of its sends that name none
	since     *Resumption // or nil
	bundles   bool        // it takes replayed messages in bundles
	conn      conn.Conn   // nil before Attach; only goroutines that Start began read it without mu
	tryWriter conn.TryWriter
	exact     bool // tryWriter.Exact
	waiter    conn.Waiter
	release   func() // from Held until the first writer begins, otherwise nil; owned by the holder of the right to write

	life    life         // only the holder of the hub's lock changes it, mostly with mu
	writing atomic.Int32 // writerIdle, writerRunning or readerEnded
	due     atomic.Bool  // pending or answers are not empty

	// Added to by the reader and by the writer, read by anyone.
	messagesIn, bytesIn   atomic.Uint64
	messagesOut, bytesOut atomic.Uint64

	// Owned by the reader.
	in       ws.Reader
	heard    time.Time // when the last bytes came
	said     time.Time // when the last message came
	pinged   bool      // the server has sent a ping, and nothing has come since
	spared   bool      // the last deadline passed without a ping, because bytes had come
	polls    bool      // a read must not wait
	limiter  *rate.Limiter
	dropped  int // messages over the rate since the bucket was last full
	load     *fair.Load
	meter    fair.Meter
	incoming int // bytes taken from Process.Incoming for the message that arrives
	overhead int // bytes since the last pause that were no part of a message, see pace

	// Guarded by the hub's lock.
	index    int           // in Hub.clients; negative when dropped
	feed     *hubFeed      // the feed that it reads
	cursor   uint64        // the position in feed of the next frame that it needs
	written  uint64        // the position before which everything is written, or is not for it
	joinedAt uint64        // the head of feed when it joined
	until    uint64        // once it has left: the head of feed at that moment
	pinned   *feed.Segment // the segment that is being written to it, or nil
	skips    []feed.Range  // positions from cursor on whose frames are not for it
	turn     turn
	nextTurn *Client // the next in the queue of turns
	looked   uint64  // with turnWriter: the cursor when a sender last looked
	searched uint64  // the cursor, plus 1, at the last Trim; 0 for never
	counted  uint64  // the generation of the roster that counts it
	stalled  bool    // a flusher had to wait for it

	brokenOff bool // of the messages that it has sent the engine gets no more, because it will send them again

	// Guarded by mu.
	mu           sync.Mutex
	pending      []byte        // pongs and pings, as frames
	answers      []byte        // other frames for this client alone
	answered     chan struct{} // if the reader waits: closed when answers are taken
	cause        ws.Close      // once it has left; fixed then
	deadline     time.Time     // once it has left: bounds all reads and writes
	readDeadline time.Time     // before that: when the reader wakes up if the client is silent
	timed        bool          // a write has set its deadline
	halfClosed   bool          // in Goodbye: the server's half of the connection is closed, and the client can still send
	saidGoodbye  bool          // the client's close frame has come
	flushed      chan struct{} // if the reader waits: closed when the writer has ended
	unanswered   int           // its messages that wait for an engine
	allSent      chan struct{} // if the reader waits: closed when unanswered is 0, or when it has left
}

// A Resumption names the last message that a client received before it connected again.
type Resumption struct {
	Epoch string
	Seq   uint64
}

// Init prepares c, which is a new Client, to join a hub of p.
func (c *Client) Init(p *Process, owner Owner, user string, address netip.Prefix, s *Settings) {
	c.process, c.owner, c.user, c.address, c.settings = p, owner, user, address, s
	c.protocol = rawProtocol{}
	c.began = time.Now()
	c.limiter = s.Rate.Limiter()
	c.in.Init((*source)(c))
	c.writing.Store(writerRunning) // until Start
}

// SpeakEvents makes c a client of the events protocol. since is where c wants to go on, or nil.
func (c *Client) SpeakEvents(since *Resumption) {
	c.protocol, c.since = eventsProtocol{}, since
}

// TakeBundles makes c, a client of the events protocol, receive replayed messages in bundles.
func (c *Client) TakeBundles() { c.bundles = true }

// Reader returns the reader of c's messages, for the handshake.
func (c *Client) Reader() *ws.Reader { return &c.in }

// Pong queues the answer to a ping.
func (c *Client) Pong(payload []byte) { c.push(ws.PongMessage, payload) }

// Held gives c, before it starts, the function that ends what conn.Hold began, or nil. c calls it when it has written what
// waits for it, or finds nothing. Hold only clients for which something waits, see HasFrames: the 101 of others waits for nothing.
func (c *Client) Held(release func()) { c.release = release }

// Attach gives c its connection.
func (c *Client) Attach(cn conn.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = cn
	c.tryWriter, _ = cn.(conn.TryWriter)
	c.exact = c.tryWriter != nil && c.tryWriter.Exact()
	c.waiter, _ = cn.(conn.Waiter)
}

// Start runs the connection. It clears the deadlines that the HTTP server has left and starts the reader. The reader
// ends with the connection: at the latest when the client has been silent for the ping's interval and timeout or, once
// it has left, after twice closeTimeout. Start must run after the handler chain has returned, because wrappers may set
// deadlines until then.
func (c *Client) Start() {
	c.hub.open(c)
	if c.State() == Cut { // it was cut during its handshake
		c.conn.Abort()
	}
	if interval := c.pingInterval(); interval > 0 {
		// The first ping comes early and at a random time, so that clients that joined together get theirs at different
		// times.
		first := time.Now().Add(interval/2 + rand.N(interval/2+1))
		c.heard = first.Add(-interval)
		c.armRead(first)
	}
	if age := c.settings.MaxAge; age > 0 {
		spread := 0.9 + 0.2*rand.Float64()
		c.expiry = time.AfterFunc(time.Duration(spread*float64(age)), func() { c.Close(CloseMaxAge) })
	}
	if c.waiter == nil && c.in.IsOpen() {
		c.in.Own()
	}
	go c.listen() // nobody waits for the reader; its last act is end
	// Go runs the newest goroutine next, and the older ones after all others that can run. The client waits for the writer.
	c.startWriter(nil, 0)
}

// pingInterval returns how long the client may be silent, or 0 if it is never pinged. Only WebSocket has pings.
func (c *Client) pingInterval() time.Duration {
	if !c.in.IsOpen() {
		return 0
	}
	return c.settings.PingInterval
}

// open moves c from joining to open, unless it has left already, and sets its deadlines.
func (b *Hub) open(c *Client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.life.to(Open)
	c.setDeadlineLocked(c.deadline)
}

// Close ends the client politely. The client leaves the hub at once. Its writer flushes the earlier messages and sends
// the close frame, and its reader waits for the client's answer. The first cause holds. Close reports whether why is
// that cause.
func (c *Client) Close(why ws.Close) bool {
	if !c.hub.leave(c, Closing, why) {
		return false
	}
	c.departed()
	c.wake()
	return true
}

// Cut ends the client at once and never blocks; the client sees a reset. The first cause holds.
func (c *Client) Cut(why ws.Close) {
	c.gone(why)
	c.hub.move(c, Cut)
	if cn := c.connection(); cn != nil { // without one it is still in its handshake
		cn.Abort()
	}
}

// gone makes the client leave when the server can write nothing more to it.
func (c *Client) gone(why ws.Close) {
	if c.hub.leave(c, Cut, why) {
		c.departed()
	}
}

// Abandon cuts a client that has joined but never started. No goroutine works for it, so Abandon finishes it.
func (c *Client) Abandon() {
	c.Cut(CloseGone)
	if c.release != nil {
		c.release()
		c.release = nil
	}
	c.finish()
}

// departed reports to the owner that the client has left. The caller must have no lock.
func (c *Client) departed() { c.owner.Left() }

// decideLocked moves c to Closing or Cut, and fixes its cause and its deadline. It needs the hub's lock. It returns
// false if c has left before.
func (c *Client) decideLocked(next State, why ws.Close) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.State() == Deaf {
		next = Cut // the server can write nothing more to it
	}
	if !c.State().isMember() || !c.life.to(next) {
		return false
	}
	c.cause = why
	c.releaseSenderLocked()
	c.setDeadlineLocked(time.Now().Add(closeTimeout))
	return true
}

// move moves c to the given state, and reports whether that is allowed.
func (b *Hub) move(c *Client, next State) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.life.to(next)
}

// mute moves c on when writing to it has failed or has ended. An open client goes deaf, and its reader reads on: if a
// client closes the connection right after its close frame, writing fails before the reader has read that frame. A
// closing client is cut.
func (b *Hub) mute(c *Client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.life.to(Deaf) {
		_ = c.conn.SetReadDeadline(time.Now().Add(closeTimeout))
	} else if c.State() == Closing {
		c.life.to(Cut)
	}
}

// farewell moves c to Goodbye when the close frame is sent. halfClosed says that the server's half is closed, too. It reports
// whether the caller must close the connection: where both sides are done the client waits for the server to do so (RFC 6455
// §7.1.1).
func (b *Hub) farewell(c *Client, halfClosed bool) (done bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.life.to(Goodbye) {
		return false
	}
	c.halfClosed = halfClosed
	c.setDeadlineLocked(time.Now().Add(closeTimeout))
	return c.saidGoodbye && !halfClosed
}

// setDeadlineLocked bounds every read and write from now on. A client without a connection gets the bound at Start.
func (c *Client) setDeadlineLocked(t time.Time) {
	c.deadline = t
	if c.conn != nil {
		_ = c.conn.SetReadDeadline(t) // fails only on a dead connection; the next read finds that out
		_ = c.conn.SetWriteDeadline(t)
	}
}

// startWriting takes the right to write to c. It returns false if somebody has the right or the reader has ended.
func (c *Client) startWriting() bool { return c.writing.CompareAndSwap(writerIdle, writerRunning) }

// stopWriting gives the right to write back. It returns false if the reader has ended; then the caller must finish c.
func (c *Client) stopWriting() bool { return c.writing.CompareAndSwap(writerRunning, writerIdle) }

func (c *Client) isWriting() bool { return c.writing.Load() == writerRunning }

// startWriter starts a writer. The caller must have the right to write, and passes it on. The writer begins with rest,
// which ends n messages. It ends when nothing is left to write or the connection fails. Client.end closes the
// connection.
func (c *Client) startWriter(rest []byte, n int) { go c.write(rest, n) }

// wake starts a writer, unless one runs: that one finds everything new before it ends.
func (c *Client) wake() {
	if c.startWriting() {
		c.startWriter(nil, 0)
	}
}

// end is the reader's last act. It closes the connection, which makes a running writer fail. The later of reader and
// writer finishes the client.
func (c *Client) end() {
	c.returnIncoming() // for a message that a panic has interrupted
	_ = c.conn.Close() // the connection is given up, so its error does not matter
	c.hub.move(c, Cut)
	if c.writing.Swap(readerEnded) == writerIdle {
		c.finish()
	}
}

// finish ends the client's life. No goroutine works for it any more.
func (c *Client) finish() {
	c.hub.drop(c)
	if c.expiry != nil {
		c.expiry.Stop()
	}
	c.hub.move(c, Finished)
	c.load.Leave()
	c.owner.Finished()
}

// panicked reports a recovered panic. Without recovery it would end the process, because no HTTP server above these
// goroutines recovers panics.
func (c *Client) panicked(v any) { c.owner.Panicked(v, debug.Stack()) }

// State returns the client's state. It may change at once, unless the caller has the hub's lock.
func (c *Client) State() State { return c.life.now() }

// ID returns the client's id, which Join sets. In each hub, a client that joins later has a higher id.
func (c *Client) ID() feed.ClientID { return c.id }

// User returns the name of the client's user; "" is anonymous.
func (c *Client) User() string { return c.user }

// Address returns the address by which limits and shares count the client.
func (c *Client) Address() netip.Prefix { return c.address }

// Hub returns the hub that the client has joined.
func (c *Client) Hub() *Hub { return c.hub }

// Owner returns the owner that Init was given.
func (c *Client) Owner() Owner { return c.owner }

// Settings returns the settings that Init was given.
func (c *Client) Settings() *Settings { return c.settings }

// Began returns when the client's handshake began.
func (c *Client) Began() time.Time { return c.began }

// Cause returns why the client has left, or the zero value before that.
func (c *Client) Cause() ws.Close {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause
}

// Traffic counts what a client has sent and received.
type Traffic struct{ MessagesIn, MessagesOut, BytesIn, BytesOut uint64 }

// Traffic returns what the client has sent and received so far, in messages and in bytes before TLS.
func (c *Client) Traffic() Traffic {
	return Traffic{c.messagesIn.Load(), c.messagesOut.Load(), c.bytesIn.Load(), c.bytesOut.Load()}
}

// IsConnected reports whether the client has a connection: Attach has run.
func (c *Client) IsConnected() bool { return c.connection() != nil }

// Writable reports whether the client's socket has room. It returns false before Attach, and if the connection cannot
// know.
func (c *Client) Writable() bool {
	cn := c.connection()
	return cn != nil && cn.Writable()
}

// IsMute reports whether the server writes nothing more to the client.
func (c *Client) IsMute() bool { return c.State().isMute() }

// connection returns the client's connection, or nil before Attach.
func (c *Client) connection() conn.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn
}

// isEnding reports whether the server sends the client nothing more, except a close frame.
func (c *Client) isEnding() bool { return !c.State().takesMore() }

// hasLeft reports whether the client is no longer a member of its hub.
func (c *Client) hasLeft() bool { return !c.State().isMember() }

// skipFrameLocked marks the frame at a position as not for c. It does nothing if c has left, because its cursor must not
// pass until. It forgets ranges that were evicted, except the one at the cursor: behind a gap that is in no range the
// client has lagged.
func (c *Client) skipFrameLocked(at uint64) {
	if c.hasLeft() {
		return
	}
	if c.cursor == at {
		c.cursor++
		return
	}
	if n := len(c.skips); n > 0 && c.skips[n-1].End == at {
		c.skips[n-1].End++
		return
	}
	keep := 0
	if len(c.skips) > 0 && c.skips[0].First <= c.cursor {
		keep = 1
	}
	gone := keep
	for gone < len(c.skips) && c.skips[gone].End <= c.feed.Tail() {
		gone++
	}
	c.skips = append(slices.Delete(c.skips, keep, gone), feed.Range{First: at, End: at + 1})
}

// skipLocked moves the cursor over frames that are not for c. It returns the end of the frames that c may receive:
// limit, or the next frame that is not for c.
func (c *Client) skipLocked(limit uint64) uint64 {
	gone := 0
	for gone < len(c.skips) && c.skips[gone].First <= c.cursor {
		c.cursor = max(c.cursor, min(c.skips[gone].End, limit))
		gone++
	}
	c.skips = slices.Delete(c.skips, 0, gone)
	if len(c.skips) > 0 {
		return min(limit, c.skips[0].First)
	}
	return limit
}
