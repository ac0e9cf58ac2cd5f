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

// closeTimeout bounds each half of a close: flushing what is due and sending the close frame, and then waiting for the
// client's answer. Browsers wait for about as long themselves.
const closeTimeout = 5 * time.Second

// The values of Client.writing, which says who may write. Whoever moves it from idle to writing writes, or hands that
// right on.
const (
	writerIdle    int32 = iota // nobody writes: everything that was due is written
	writerRunning              // a writer or a flusher does, or is about to
	readerEnded                // nobody writes again: whoever finds this finishes the client
)

// A Client is one connection and its place in a hub. Two goroutines work for it: a reader for as long as the connection
// lives, which is a new goroutine after each message, and a writer for as long as there is something to write. life.go
// has its states.
//
// Five verbs make up its life. It joins a hub (Hub.Join) and leaves it (Hub.leave). Close ends it politely, Cut at once.
// It finishes when reader and writer have ended.
type Client struct {
	// Set once, before the client joins or starts.
	id        feed.ClientID
	user      string
	address   netip.Prefix // limits and shares count by it: an IPv4 address, or an IPv6 /64
	settings  *Settings
	protocol  protocol
	owner     Owner
	process   *Process
	hub       *Hub
	began     time.Time   // when the handshake began
	expiry    *time.Timer // of Settings.MaxAge, or nil
	token     string      // the token of its sends, unless they name another
	since     *Resumption // or nil
	conn      conn.Conn   // nil before Attach; whoever has not started the client needs mu
	tryWriter conn.TryWriter
	waiter    conn.Waiter

	life    life         // the hub's lock moves it, mostly with mu
	writing atomic.Int32 // writerIdle, writerRunning or readerEnded
	due     atomic.Bool  // pending or answers are not empty

	// Added to by the reader and by the writer, read by anyone.
	messagesIn, bytesIn   atomic.Uint64
	messagesOut, bytesOut atomic.Uint64

	// Owned by the reader.
	in       ws.Reader
	heard    time.Time // when the last bytes came
	pinged   bool      // a ping is out, and nothing has come since
	spared   bool      // the last deadline passed without a ping, because something had come
	polls    bool      // a read must not wait
	limiter  *rate.Limiter
	dropped  int // messages over the rate since the bucket was last full
	load     *fair.Load
	meter    fair.Meter
	incoming int // bytes taken from the memory that all messages share while they arrive
	overhead int // bytes received since the last pause that are no part of a message

	// Guarded by the hub's lock.
	index    int           // in Hub.clients; negative when dropped
	feed     *hubFeed      // that it reads
	cursor   uint64        // the position in feed of the next frame that it needs
	written  uint64        // the position up to which everything is written, or not for it
	joinedAt uint64        // the head of feed when it joined
	until    uint64        // once it has left: the head of feed at that moment
	pinned   *feed.Segment // what is being written to it
	skips    []feed.Range  // positions from cursor on that are not for it
	turn     turn
	nextTurn *Client // the next in the queue of turns
	looked   uint64  // in turnWriter: the cursor when a sender last looked
	searched uint64  // the cursor, plus 1, at the last Trim; 0 for never
	counted  uint64  // the generation of the hub's roster that it is in

	// Guarded by mu.
	mu           sync.Mutex
	pending      []byte        // pongs and pings, as frames
	answers      []byte        // frames for this client alone, but for pending
	answered     chan struct{} // if the reader waits: closed when answers are taken
	cause        ws.Close      // once it has left; fixed then
	deadline     time.Time     // once it has left: when patience with its connection ends
	readDeadline time.Time     // before that: when the reader wants to be woken from silence
	halfClosed   bool          // in Goodbye: our half of the connection is closed, and it can still send
	saidGoodbye  bool          // the client's close frame is in
	flushed      chan struct{} // if the reader waits: closed when the writer has ended
}

// A Resumption names the last message that a client has got before it connected again.
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

// SpeakEvents makes c a client of the events protocol. since is where it wants to go on, or nil.
func (c *Client) SpeakEvents(since *Resumption) {
	c.protocol, c.since = eventsProtocol{}, since
}

// Reader returns the reader of c's messages, for the handshake.
func (c *Client) Reader() *ws.Reader { return &c.in }

// Pong queues the answer to a ping.
func (c *Client) Pong(payload []byte) { c.push(ws.PongMessage, payload) }

// Attach gives c its connection.
func (c *Client) Attach(cn conn.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = cn
	c.tryWriter, _ = cn.(conn.TryWriter)
	c.waiter, _ = cn.(conn.Waiter)
}

// Start runs the connection. It clears what the HTTP server has left on it and starts the reader, which ends with the
// connection: at the latest when the client is silent for the ping's interval and timeout or, once it has left, after twice
// closeTimeout. It must run after the handler chain has returned, because wrappers may set deadlines until then.
func (c *Client) Start() {
	c.hub.open(c)
	if c.State() == Cut { // during its handshake
		c.conn.Abort()
	}
	if interval := c.settings.PingInterval; interval > 0 {
		// The first ping comes early, and at another time for each of the clients that joined together.
		first := time.Now().Add(interval/2 + rand.N(interval/2+1))
		c.heard = first.Add(-interval)
		c.armRead(first)
	}
	if age := c.settings.MaxAge; age > 0 {
		spread := 0.9 + 0.2*rand.Float64()
		c.expiry = time.AfterFunc(time.Duration(spread*float64(age)), func() { c.Close(CloseMaxAge) })
	}
	c.startWriter(nil, 0)
	if c.waiter == nil {
		c.in.Own()
	}
	go c.listen() // nobody waits for the reader: its last act is end
}

// open moves a client that has joined to open, unless it has left already, and sets its deadlines.
func (b *Hub) open(c *Client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.life.to(Open)
	c.setDeadlineLocked(c.deadline)
}

// Close ends the client politely. It leaves the hub at once, its writer flushes the messages from before that and sends the
// close frame, and its reader waits for the client's answer. The first cause holds; Close reports whether it was this one.
func (c *Client) Close(why ws.Close) bool {
	if !c.hub.leave(c, Closing, why) {
		return false
	}
	c.departed()
	c.wake()
	return true
}

// Cut ends the client without waiting for anything: the client sees a reset. It never blocks. The first cause holds.
func (c *Client) Cut(why ws.Close) {
	c.gone(why)
	c.hub.move(c, Cut)
	if cn := c.connection(); cn != nil { // it may still be in its handshake
		cn.Abort()
	}
}

// gone makes the client leave when there is nothing left to say to it.
func (c *Client) gone(why ws.Close) {
	if c.hub.leave(c, Cut, why) {
		c.departed()
	}
}

// Abandon ends a client that has joined but never started: nobody works for it, so Abandon finishes it.
func (c *Client) Abandon() {
	c.Cut(CloseGone)
	c.finish()
}

// departed does, without a lock, what follows a leave.
func (c *Client) departed() { c.owner.Left() }

// decideLocked moves c, which must be a member, to Closing or Cut, with the cause and the deadline that hold from then on.
// It needs the hub's lock. It returns false if c has left before.
func (c *Client) decideLocked(next State, why ws.Close) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.State() == Deaf {
		next = Cut // nothing more can be said to it
	}
	if !c.State().isMember() || !c.life.to(next) {
		return false
	}
	c.cause = why
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

// mute notes that writing to c has failed, or has ended. An open client goes deaf: its reader takes what is left, because a
// client that closes the connection right after its close frame makes writing fail before that frame is read.
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

// farewell notes that the close frame is out. halfClosed says that our half of the connection is closed, too.
func (b *Hub) farewell(c *Client, halfClosed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.life.to(Goodbye) {
		return
	}
	c.halfClosed = halfClosed
	c.setDeadlineLocked(time.Now().Add(closeTimeout))
	if c.saidGoodbye && !halfClosed {
		// Both sides are done, and the client waits for the server to close (RFC 6455 §7.1.1).
		_ = c.conn.Close()
	}
}

// setDeadlineLocked bounds every read and write from now on. A client without a connection gets the bound with Start.
func (c *Client) setDeadlineLocked(t time.Time) {
	c.deadline = t
	if c.conn != nil {
		_ = c.conn.SetReadDeadline(t) // fails only on a dead connection, as will the next read
		_ = c.conn.SetWriteDeadline(t)
	}
}

// startWriting takes the right to write to c, if nobody has it and the reader has not ended.
func (c *Client) startWriting() bool { return c.writing.CompareAndSwap(writerIdle, writerRunning) }

// stopWriting gives the right back. It returns false if the reader has ended meanwhile: then the caller must finish c.
func (c *Client) stopWriting() bool { return c.writing.CompareAndSwap(writerRunning, writerIdle) }

func (c *Client) isWriting() bool { return c.writing.Load() == writerRunning }

// startWriter starts a writer, for a caller that has the right to write. The writer begins with rest, which ends n
// messages. It ends when nothing is left to write or the connection fails, which end makes it do.
func (c *Client) startWriter(rest []byte, n int) { go c.write(rest, n) }

// wake starts a writer unless somebody writes, who then sees what is new before the end.
func (c *Client) wake() {
	if c.startWriting() {
		c.startWriter(nil, 0)
	}
}

// end is the reader's last act. With the connection closed a running writer fails, and the later of the two finishes the
// client.
func (c *Client) end() {
	c.returnIncoming() // of a message that a bug has interrupted
	_ = c.conn.Close() // the error of a connection that is given up helps nobody
	c.hub.move(c, Cut)
	if c.writing.Swap(readerEnded) == writerIdle {
		c.finish()
	}
}

// finish ends the client's life. Nothing works for it any more.
func (c *Client) finish() {
	c.hub.drop(c)
	if c.expiry != nil {
		c.expiry.Stop()
	}
	c.hub.move(c, Finished)
	c.load.Leave()
	c.owner.Finished()
}

// panicked reports a bug that would otherwise end the server, since no HTTP server stands above our goroutines to recover
// it.
func (c *Client) panicked(v any) { c.owner.Panicked(v, debug.Stack()) }

// State returns where the client is in its life. It may have moved on meanwhile, unless the caller has the hub's lock.
func (c *Client) State() State { return c.life.now() }

// ID returns the client's id, which it has from Join on. In each hub, a client that joins later has a higher one.
func (c *Client) ID() feed.ClientID { return c.id }

// User returns who the client is; "" is anonymous.
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

// Traffic counts what a client has sent and what was sent to it.
type Traffic struct{ MessagesIn, MessagesOut, BytesIn, BytesOut uint64 }

// Traffic returns what the client has sent and received so far, in messages and in bytes before TLS.
func (c *Client) Traffic() Traffic {
	return Traffic{c.messagesIn.Load(), c.messagesOut.Load(), c.bytesIn.Load(), c.bytesOut.Load()}
}

// IsConnected reports whether the client's handshake has come as far as Attach.
func (c *Client) IsConnected() bool { return c.connection() != nil }

// Writable reports whether the client's socket has room; false before Attach, or where that cannot be known.
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

// isEnding reports whether nothing more can be said to the client but a close frame.
func (c *Client) isEnding() bool { return !c.State().takesMore() }

// hasLeft reports whether the client is no member of its hub any more.
func (c *Client) hasLeft() bool { return !c.State().isMember() }

// skipFrameLocked notes that the frame at a position is not for c. Of the ranges that were evicted only the one at the
// cursor matters: behind a gap that is in no range the client has lagged.
func (c *Client) skipFrameLocked(at uint64) {
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

// skipLocked moves the cursor over frames that are not for c. It returns where the frames end that c may be sent: at limit,
// or at the next one that is not for it.
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
