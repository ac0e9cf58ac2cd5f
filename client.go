package chatbroadcast

import (
	"bufio"
	"math/rand/v2"
	"net"
	"net/netip"
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
	id           clientID
	settings     *settings
	hub          *hub
	scope        *scope
	user         string
	ip           string       // as Caddy sees it, behind trusted proxies too
	prefix       netip.Prefix // what max_clients_per_ip counts as one address
	ws           *websocket.Conn
	wire         wire // what in reads from
	joined       time.Time
	expiry       *time.Timer // of max_age, or nil
	speaksEvents bool
	token        string      // with events: whose its sends are, unless they name another
	since        *resumption // with events: or nil

	state atomic.Int32
	due   atomic.Bool // whether pending or answers are not empty

	// Added to by the reader and by the writer, read by anyone.
	messagesIn, bytesIn   atomic.Uint64
	messagesOut, bytesOut atomic.Uint64

	// Owned by the reader.
	in       bufio.Reader  // what ws reads from; without a buffer between messages
	borrowed *bufio.Reader // whose buffer in has, to be returned
	heard    time.Time     // when the last bytes came
	pinged   bool          // a ping is out, and nothing has come since
	spared   bool          // the last deadline passed without a ping, because something had come
	limiter  *rate.Limiter
	dropped  int           // messages over the rate since the bucket was last full
	load     *workload     // of the client's address, or nil
	working  time.Duration // since when it works, on the clock of load; 0 while it waits
	worked   time.Duration // what it has yet to charge
	incoming int           // bytes taken from the memory that all messages which are being received share
	overhead int           // bytes received since the last pause that are no part of a message

	// Guarded by hub.mu.
	index    int  // in hub.clients; negative when dropped
	log      *log // what it reads from
	cursor   uint64
	taken    uint64 // the cursor before the last next
	done     uint64 // the cursor up to which everything is written
	left     bool
	until    uint64     // once left: the head at that moment
	pinned   *segment   // what the writer is writing from
	own      []seqRange // with echo off: the client's own messages, from cursor on
	missed   uint64     // messages lost under on_lag skip
	turn     turn
	nextTurn *client // the next in the hub's queue
	looked   uint64  // in turnWriter: the cursor when a sender last looked
	searched uint64  // the cursor, plus 1, when trim last looked; 0 for never
	counted  uint64  // the generation of the hub's roster that it is in

	// Guarded by registry.mu.
	scopeIndex int  // in scope.clients
	away       bool // has left

	// Guarded by mu.
	mu           sync.Mutex
	pending      []byte        // pongs and pings, wire-ready
	answers      []byte        // events for this client alone, wire-ready
	answered     chan struct{} // if the reader waits: closed when answers are taken
	closing      bool          // cause is decided; nothing more is published for the client
	cause        cause
	deadline     time.Time     // once closing: when patience with the peer ends
	readDeadline time.Time     // before that: when the reader wants to be woken from silence
	broken       bool          // a write has failed; whatever the peer has still sent is read
	saidGoodbye  bool          // our close frame is out
	gotGoodbye   bool          // the peer's close frame is in
	written      chan struct{} // if the reader waits: closed when the writer has nothing more to write
}

// A clientID names a client for as long as the process lives, and no other before or after it unless the clock is
// turned back.
type clientID uint64

// String returns the id as logs and APIs show it: lower-case letters and digits.
func (id clientID) String() string { return string(id.append(nil)) }

func (id clientID) append(dst []byte) []byte { return strconv.AppendUint(dst, uint64(id), 36) }

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
	if c.wire.socket == nil {
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
	c.returnIncoming()      // of a message that a bug has interrupted
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
		logName("hub", c.hub.name),
		zap.Stringer("client_id", c.id),
		logName("user", c.user),
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
	if conn := c.connection(); conn != nil { // it may still be in its handshake
		abort(conn)
	}
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

// isEnding reports whether nothing more can be said to the client, but for a close frame.
func (c *client) isEnding() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closing || c.broken
}

// isBroken reports whether nothing is written to the client any more.
func (c *client) isBroken() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

// isClosing reports whether the cause is decided.
func (c *client) isClosing() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closing
}
