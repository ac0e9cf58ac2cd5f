// Package hub has one named broadcast group, the hub, and its clients: membership, the order of messages, turns,
// history and presence. It knows neither Caddy nor HTTP.
package hub

import (
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A Hub is one named broadcast group: feeds of its messages, and the clients that read them. All clients see the messages
// in the order in which Publish appended them.
//
// A client that has everything up to the head of its feed is idle and has no writer. Publish wakes only idle clients. A
// busy client finds the new head by itself, so the busier the hub, the fewer wake-ups a message costs. turns.go decides
// who writes and when.
type Hub struct {
	name    string
	epoch   string // unique, even among hubs of the same name
	opened  time.Time
	process *Process

	session engine.Session // numbers the messages and keeps them; nil: the hub does so itself
	cluster engine.Cluster // the session, if several nodes share the hub; or nil
	node    engine.NodeID  // of cluster
	began   uint64         // the newest message of another epoch, from which this one goes on; or 0

	mu     sync.Mutex
	raw    *hubFeed   // the first of feeds: sequence numbers are its positions
	feeds  []*hubFeed // raw, and the other encodings that clients read
	closed bool       // Publish accepts nothing more
	empty  bool       // the last client has left; without a history Publish accepts nothing until another joins

	// clients[:idle] are idle, clients[idle:] are busy. A client that has left stays among the busy until its writer has
	// sent the messages from before it left.
	clients []*Client
	idle    int
	members int // clients that have not left
	// quiet has the clients that do not receive their own messages (echo off), by id.
	quiet map[feed.ClientID]*Client

	// The largest values among the settings of the clients that have joined.
	maxMessageSize int
	bufferMessages int
	bufferBytes    int

	taps     []*Tap // replaced, never changed
	buffered int    // bytes that the budget of buffers has been charged for

	turns    turns
	sample   sample
	history  history
	presence presence
	outbox   outbox
	arrivals arrivals
	remote   remote
}

// A hubFeed is one of a hub's feeds, with the state that the hub keeps for it.
type hubFeed struct {
	*feed.Feed
	protocol protocol
	sampled  uint64 // the position of the hub's sample, or notInFeed
	newest   uint64 // the position of the newest message
	needed   uint64 // during Trim: the oldest position that a client or the history needs
}

// New returns a hub without clients, which numbers its messages itself, with an epoch of its own.
func New(p *Process, name string) *Hub {
	b := &Hub{name: name, epoch: p.NextID().String(), opened: time.Now(), process: p}
	b.raw = &hubFeed{Feed: feed.New(feed.NewRaw(), 0), protocol: rawProtocol{}}
	b.feeds = []*hubFeed{b.raw}
	return b
}

// Name returns the hub's name.
func (b *Hub) Name() string { return b.name }

// The errors of Join.
var (
	ErrClosed = errors.New("the hub is closed")
	ErrFull   = errors.New("the hub has as many clients as it may have")
)

// A welcome describes the hub to a client that has just joined.
type welcome struct {
	head    uint64 // the number of the newest message, counted from 1
	clients int
	replay  uint64 // how many messages up to head the client receives
	missed  uint64 // how many messages after its since it does not receive
	resumed bool   // missed is 0

	remembers time.Duration // how long the hub remembers the ids of messages
}

// Join makes c a member. It returns ErrClosed if the hub is closed, and ErrFull if the hub already has most members;
// most 0 is no limit. c receives the hub's history, or the part after its since, and then every message published from
// now on. Nothing is written before Client.Start. If c has had messages that the hub lacks, Join fetches them first; it
// returns ErrUnavailable if it cannot.
func (b *Hub) Join(c *Client, most int) error {
	if err := b.awaitSince(c.since); err != nil {
		return err
	}
	err := b.join(c, most)
	if errors.Is(err, errReset) {
		b.process.Reset(b) // again, because the first time may have been before anybody knew the hub
		err = ErrClosed
	}
	return err
}

// errReset means that the hub's epoch is over.
var errReset = errors.New("the hub begins again")

func (b *Hub) join(c *Client, most int) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed:
		return ErrClosed
	case b.arrivals.reset:
		return errReset
	case most > 0 && b.members >= most:
		return ErrFull
	}
	c.hub, c.id, c.load = b, b.process.NextID(), b.process.Processors.Enter(c.address)
	c.meter.Owe(c.load, fair.RequestWork) // the handshake
	b.growHistoryLocked(c.settings)
	b.maxMessageSize = max(b.maxMessageSize, c.settings.MaxMessageSize)
	b.members++
	b.empty = false
	floor := b.floorLocked(time.Now())
	c.feed = b.feedLocked(c.protocol, floor)
	c.feed.Clients++
	if c.feed != b.raw {
		// Half of the feed's room stays free for falling behind.
		floor = max(floor, c.feed.Seq(max(c.feed.Tail(), c.feed.Within(b.historyBytesLocked()))))
	}
	w := welcome{head: b.raw.Head(), clients: b.audienceLocked(), missed: max(floor, b.began) - b.began}
	if b.history.messages > 0 {
		w.remembers = b.history.age
	}
	switch {
	case c.since == nil || c.since.Epoch != b.epoch:
	case c.since.Seq > b.raw.Head():
		w.missed = 0 // the hub has no such message yet: c receives the same as a new client
	default:
		w.missed = max(floor, c.since.Seq) - c.since.Seq
		w.resumed = w.missed == 0
		floor = max(floor, c.since.Seq)
	}
	w.replay = b.raw.Head() - floor
	c.cursor, c.joinedAt = c.feed.Position(floor), c.feed.Head()
	c.written = c.cursor
	c.skips = c.feed.Notices(c.cursor)
	c.protocol.joined(c, w)
	c.index = len(b.clients)
	b.clients = append(b.clients, c)
	if !c.settings.Echo {
		if b.quiet == nil {
			b.quiet = map[feed.ClientID]*Client{}
		}
		b.quiet[c.id] = c
	}
	b.beginTurnLocked(c, turnWriter)
	b.arriveLocked(c)
	return nil
}

// feedLocked returns the feed of a protocol. If no client reads that protocol yet, it makes a feed with the messages
// from floor on.
func (b *Hub) feedLocked(p protocol, floor uint64) *hubFeed {
	for _, f := range b.feeds {
		if f.protocol == p {
			return f
		}
	}
	f := &hubFeed{Feed: feed.New(p.encoder(), floor), protocol: p, sampled: notInFeed}
	b.growFeedLocked(f)
	b.feeds = append(b.feeds, f)
	for seq := floor; seq < b.raw.Head(); seq++ {
		r := b.history.records[seq-b.history.first]
		m := feed.Message{Seq: seq + 1, At: r.at, Sender: r.sender, User: r.user}
		m.Opcode, m.Payload = b.raw.Payload(seq)
		f.AppendMessage(&m)
	}
	b.chargeLocked()
	return f
}

// leave ends c's membership with the cause why. next is Closing or Cut. It returns false if c has left before. If it
// returns true, the caller must call c.departed without a lock.
func (b *Hub) leave(c *Client, next State, why ws.Close) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.leaveLocked(c, next, why)
}

// leaveLocked is leave for a caller that has the lock. c receives nothing that is published from now on; its writer can
// still send earlier messages.
func (b *Hub) leaveLocked(c *Client, next State, why ws.Close) bool {
	if !c.decideLocked(next, why) {
		return false
	}
	b.members--
	b.empty = b.members == 0
	c.until = c.feed.Head()
	if c.index >= 0 {
		b.sample.leaving++
	}
	b.departLocked(c)
	b.admitLocked() // its message may wait
	if c.index < b.idle {
		b.removeLocked(c)
	}
	return true
}

// drop removes c from the hub. The server must write nothing more to c, whose state or connection must have ended. A
// second call does nothing.
func (b *Hub) drop(c *Client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unpinLocked(c)
	b.removeLocked(c)
}

// wakeLocked makes the idle clients busy that lack a frame. Those may be all except a message's sender, or only the
// readers of one feed.
func (b *Hub) wakeLocked() {
	idle := b.clients[:b.idle]
	b.idle = 0
	for i, c := range idle {
		if c.cursor == c.feed.Head() {
			b.swapLocked(i, b.idle) // the loop has already looked at the client that stood there
			b.idle++
			continue
		}
		if c.startWriting() {
			b.queueLocked(c)
		} else if c.isWriting() {
			b.beginTurnLocked(c, turnWriter) // its writer sends a pong or a ping, and calls next before it ends
		}
	}
	b.restLocked()
}

// overstrandedLocked returns the clients that pin more of the past than the hub may hold.
func (b *Hub) overstrandedLocked() (cut []*Client) {
	for _, f := range b.feeds {
		s := f.Overstranded()
		if s == nil {
			continue
		}
		for _, c := range b.clients[b.idle:] {
			if c.pinned == s {
				cut = append(cut, c)
			}
		}
	}
	return cut
}

// A progress says what a client's writer must do next.
type progress int

const (
	progressFrames  progress = iota // write these frames, then ask again
	progressReplay                  // the same, but write their messages as one bundle; only a client's own writer can
	progressIdle                    // nothing to write: the writer ends
	progressAlone                   // nothing to write, and the reader has ended: finish the client
	progressFlushed                 // everything from before the client left is written: say goodbye
	progressLagged                  // frames that the client needs are gone, and so it has left: call departed, say goodbye
)

// HasFrames reports whether frames wait for c: the beginning of its protocol, or messages.
func (c *Client) HasFrames() bool {
	c.hub.mu.Lock()
	defer c.hub.mu.Unlock()
	return c.due.Load() || c.cursor < c.feed.Head()
}

// next gives back the frames of the last call and returns the next frames: n messages in one slice, valid until the
// following call or drop. If there is nothing to write it makes c idle in the same critical section, so no message can
// come between the two.
func (b *Hub) next(c *Client) (frames []byte, n int, p progress) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.nextLocked(c)
}

func (b *Hub) nextLocked(c *Client) (frames []byte, n int, p progress) {
	b.unpinLocked(c)
	if c.index < 0 { // dropped: the feed may have been recycled
		return nil, 0, progressFlushed
	}
	limit, left := c.feed.Head(), !c.State().isMember()
	if left {
		limit = c.until
	}
	end := c.skipLocked(limit)
	if c.cursor < c.feed.Tail() && c.cursor < limit {
		switch {
		case left: // it has received as much as is left
			b.removeLocked(c)
			return nil, 0, progressFlushed
		case !c.settings.SkipLag:
			b.leaveLocked(c, Closing, CloseLagged)
			b.removeLocked(c)
			return nil, 0, progressLagged
		}
		b.skipLaggedLocked(c)
		end = c.skipLocked(limit)
	}
	b.writtenLocked(c)
	if c.cursor == limit {
		if left {
			b.removeLocked(c)
			return nil, 0, progressFlushed
		}
		return nil, 0, b.parkLocked(c)
	}
	p = progressFrames
	if c.bundles && c.cursor < c.joinedAt {
		c.pinned, frames, n, p = c.nextBundleLocked()
	} else {
		c.pinned, frames, n = c.feed.Next(c.cursor, end)
	}
	c.cursor += uint64(n)
	return frames, int(c.feed.Seq(c.cursor) - c.feed.Seq(c.written)), p
}

// skipLaggedLocked moves c over the frames that are gone, and tells it how many messages it has missed. If all of them are
// notices, that is 0.
func (b *Hub) skipLaggedLocked(c *Client) {
	next := c.feed.Seq(c.feed.Tail())
	missed := next - c.feed.Seq(c.cursor)
	b.process.Counters.DroppedByLag.Add(missed)
	c.cursor = c.feed.Tail()
	c.protocol.lagged(c, missed, next+1)
}

// parkLocked makes c idle. When all clients are idle, the feeds give back their memory.
func (b *Hub) parkLocked(c *Client) progress {
	b.endTurnLocked(c)
	if !c.stopWriting() {
		return progressAlone
	}
	if c.index >= b.idle {
		b.swapLocked(c.index, b.idle)
		b.idle++
	}
	b.restLocked()
	return progressIdle
}

func (b *Hub) unpinLocked(c *Client) {
	if c.pinned != nil {
		c.feed.Unpin(c.pinned)
		c.pinned = nil
	}
}

// removeLocked takes c out of clients, if c is in it.
func (b *Hub) removeLocked(c *Client) {
	b.endTurnLocked(c)
	if c.index < 0 {
		return
	}
	c.feed.Clients--
	c.feed.LastRead = time.Now()
	if c.index < b.idle {
		b.idle--
		b.swapLocked(c.index, b.idle)
	}
	b.forgetSampleOfLocked(c)
	delete(b.quiet, c.id)
	last := len(b.clients) - 1
	b.swapLocked(c.index, last)
	b.clients[last] = nil
	b.clients = b.clients[:last]
	c.index = -1
	if len(b.history.records) == 0 { // even if other clients are never idle
		b.endFeedsLocked(time.Time{})
	}
	b.restLocked()
}

func (b *Hub) swapLocked(i, j int) {
	b.clients[i], b.clients[j] = b.clients[j], b.clients[i]
	b.clients[i].index, b.clients[j].index = i, j
}

// Size returns the number of members.
func (b *Hub) Size() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.members
}

// SetTaps sets the taps that see messages published from now on. The caller must not change the slice any more.
func (b *Hub) SetTaps(taps []*Tap) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.taps = taps
}

// MessageLimit returns the largest maximum message size of the clients that have joined, in bytes.
func (b *Hub) MessageLimit() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.maxMessageSize
}

// Heir returns the address that pays for the hub when a client of the given address has left. That is the given address
// if a member that counts has it, or if no member counts; otherwise it is the address of a member that counts. counts
// runs under the hub's lock.
func (b *Hub) Heir(address netip.Prefix, counts func(*Client) bool) netip.Prefix {
	b.mu.Lock()
	defer b.mu.Unlock()
	heir, found := address, false
	for _, c := range b.clients {
		switch {
		case !c.State().isMember() || !counts(c):
		case c.address == address:
			return address
		case !found:
			heir, found = c.address, true
		}
	}
	return heir
}

// Info describes a hub for operators.
type Info struct {
	Clients          int
	Head             uint64 // the number of the newest message
	RetainedMessages uint64
	RetainedBytes    int
	Opened           time.Time
}

// Info describes the hub for operators, and reports whether the hub is still open.
func (b *Hub) Info() (info Info, open bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return Info{
		Clients:          b.members,
		Head:             b.raw.Head(),
		RetainedMessages: b.raw.Head() - b.raw.Tail(),
		RetainedBytes:    b.raw.Bytes(),
		Opened:           b.opened,
	}, !b.closed
}

// Clients returns the members and some clients that have left, in no order. It only copies under the lock, which takes
// 0.1 ms for 100,000 clients. It makes room for the copy before, because the allocation may have to help the garbage
// collector.
func (b *Hub) Clients() []*Client {
	n := b.Size()
	all := make([]*Client, 0, n+n/8)
	b.mu.Lock()
	defer b.mu.Unlock()
	return append(all, b.clients...)
}

// Lags returns for each of the clients how many messages it has yet to take, or -1 if it has left. It holds the hub's
// lock all the time, so pass it a thousand clients at most.
func (b *Hub) Lags(clients []*Client) []int {
	lags := make([]int, len(clients))
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, c := range clients {
		switch {
		case !c.State().isMember():
			lags[i] = -1
		case c.index >= 0:
			lags[i] = int(c.feed.Seq(c.feed.Head()) - c.feed.Seq(c.cursor))
		}
	}
	return lags
}
