package chatbroadcast

import (
	"net/netip"
	"slices"
	"sync"
	"time"
)

// A hub is one named broadcast group: a log, and the clients that read from it. All of them see the
// messages in the order in which publish appended them. Clients that speak events read them from a second log, which has
// the same messages in another encoding.
//
// A client with everything up to the head is idle and has no writer; publish wakes idle clients only. A busy
// client has a writer that comes back by itself and finds the new head then, so the busier the hub, the fewer
// wake-ups a message costs. Who writes, and when, is in flush.go.
type hub struct {
	name    string
	epoch   string // no other hub has it, nor has this one when it is opened anew
	opened  time.Time
	metrics *metrics
	memory  *memory // or nil

	mu     sync.Mutex
	log    log
	events *eventLog // or nil
	closed bool      // nothing is published any more
	// clients[:idle] are idle, clients[idle:] are busy. A client that has left stays among the busy until
	// its writer has sent what was published before it left.
	clients []*client
	idle    int
	members int // clients that have not left
	// maxMessageSize and bufferMessages are the largest of the handlers through which its clients joined.
	maxMessageSize int
	bufferMessages int
	taps           []*tap // replaced, never changed
	// remembered and buffered are what memory has been told: bytes of history, and of messages for clients that are behind.
	remembered, buffered int

	turns
	sample
	history
	presence

	keeping // guarded by registry.mu
}

// A message is one that is to be published.
type message struct {
	from    *client  // who is not sent it, with echo off, and must be a member; nil for none
	sender  clientID // 0 for none
	user    string   // who sent it, "" for anonymous
	opcode  int
	payload []byte
	key     sendKey // if its id is not empty: a message of the same key is not published again
	again   bool    // it has a key, and may have been sent before on another connection
}

// address returns the address that the hub's stores charge m to.
func (m *message) address() netip.Prefix {
	if m.from == nil {
		return netip.Prefix{}
	}
	return m.from.prefix
}

// progress says what a client's writer is to do next.
type progress int

const (
	progressFrames   progress = iota // write these frames, then ask again
	progressIdle                     // nothing to write: the writer has ended
	progressOrphaned                 // nothing to write, and the reader is gone: finish the client
	progressLagged                   // frames that the client needs are gone: close it
	progressWriter                   // not for a flusher: the client's own writer sees what it is
	progressFlushed                  // everything from before the client left is written: say goodbye
)

// A welcome is what a hub was like for a client that joined.
type welcome struct {
	head    uint64 // the number of the newest message, counted from 1
	clients int
	replay  uint64 // how many messages up to head the client is sent
	missed  uint64 // after the client's since: how many it is not sent
	resumed bool   // none

	remembers time.Duration // for how long the hub remembers the ids of messages
}

// join makes c a member: it will get every message published from now on, and before those what the hub's history has,
// or of that what it has not had. Its writer counts as running until it asks for next, so nothing is written before the
// connection is there. The log grows to c's buffer and history.
func (b *hub) join(c *client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.growHistoryLocked(c.settings)
	b.maxMessageSize = max(b.maxMessageSize, c.settings.maxMessageSize)
	b.members++
	floor := b.log.head
	if b.messages > 0 {
		floor = b.floorLocked(time.Now())
	}
	c.log = &b.log
	if c.speaksEvents {
		floor = b.joinEventsLocked(c, floor)
	}
	w := welcome{head: b.log.head, clients: b.members, missed: floor}
	if b.messages > 0 {
		w.remembers = b.age
	}
	switch {
	case c.since == nil || c.since.epoch != b.epoch:
	case c.since.seq > b.log.head:
		w.missed = 0 // the hub has not come that far: it is sent what a new client is
	default:
		w.missed = max(floor, c.since.seq) - c.since.seq
		w.resumed = w.missed == 0
		floor = max(floor, c.since.seq)
	}
	w.replay = b.log.head - floor
	c.cursor, c.done = floor, c.log.head
	if c.speaksEvents {
		c.cursor = b.events.position(floor)
		c.own = b.events.gaps(c.cursor)
		b.completeToken(c)
		c.tell(c.hello(w))
	}
	c.index = len(b.clients)
	b.clients = append(b.clients, c)
	b.beginTurnLocked(c, turnWriter)
	b.arriveLocked(c)
}

// joinEventsLocked has c read from the hub's event log, which there may not be yet. It returns the oldest message that
// this has of those from floor on, and with half of its room still free for falling behind.
func (b *hub) joinEventsLocked(c *client, floor uint64) uint64 {
	if b.events == nil {
		b.events = &eventLog{base: floor}
		b.growEventsLocked()
		b.event = noEvent
		for seq := floor; seq < b.log.head; seq++ {
			r := b.records[seq-b.firstRecord]
			m := message{sender: r.sender, user: r.user}
			m.opcode, m.payload = b.log.payload(seq)
			b.events.appendMessage(&m, seq+1, r.at)
		}
		b.chargeLocked()
	}
	b.events.clients++
	c.log = &b.events.log
	return max(floor, b.events.seq(max(b.events.tail, b.events.within(b.historyBytesLocked()))))
}

// leave ends c's membership: nothing published from now on is for c. What was published before stays within
// reach of its writer. It returns how many members remain; with the last one a hub without history closes. c must be a
// member.
func (b *hub) leave(c *client) (members int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.members--
	c.left, c.until = true, c.log.head
	if c.index >= 0 {
		b.leaving++
	}
	b.departLocked(c)
	if b.members == 0 && b.messages == 0 {
		b.closeLocked()
	}
	if c.index < b.idle {
		b.removeLocked(c)
	}
	return b.members
}

// heir returns the given address if a client that has come in through s, or for nil through any scope, still has it, else that
// of another such client, if there is one.
func (b *hub) heir(s *scope, address netip.Prefix) netip.Prefix {
	b.mu.Lock()
	defer b.mu.Unlock()
	heir, found := address, false
	for _, c := range b.clients {
		switch {
		case s != nil && c.scope != s || c.left:
		case c.prefix == address:
			return address
		case !found:
			heir, found = c.prefix, true
		}
	}
	return heir
}

// drop forgets c, which will write no more frames: it has left, or its connection is broken. It may be called more than
// once.
func (b *hub) drop(c *client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unpinLocked(c)
	b.removeLocked(c)
}

// publish appends a message for every member and wakes those that are idle. It reports whether the message was
// published (not if its sender has left, or the hub is closed), now or, as its receipt says, before; or whether that is
// unknown. Where the senders are far ahead of those clients that take
// what they are sent, publish first waits for these; see awaitTurnsLocked.
func (b *hub) publish(m message) (r receipt, published bool) {
	b.mu.Lock()
	b.awaitTurnsLocked(m.from)
	if b.closed || m.from != nil && m.from.left {
		b.mu.Unlock()
		return receipt{}, false
	}
	if before, found := b.receiptLocked(&m); found {
		b.mu.Unlock()
		return before, true
	}
	at := b.log.append(m.opcode, m.payload)
	r = receipt{seq: b.log.head, members: b.members}
	if b.messages > 0 || b.events != nil || m.key.id != "" {
		r.at = time.Now()
	}
	eventAt := uint64(0)
	if b.events != nil {
		eventAt = b.events.appendMessage(&m, r.seq, r.at)
	}
	if m.from != nil && !m.from.settings.echo {
		if m.from.speaksEvents {
			m.from.skipOwnLocked(eventAt, m.from.log.tail)
		} else {
			m.from.skipOwnLocked(at, m.from.log.tail)
		}
	}
	b.rememberLocked(&m, r)
	b.sampleLocked(m.from, at, eventAt)
	taps := b.taps
	for _, t := range taps {
		t.offer(r.seq, m.from, m.opcode, m.payload)
	}
	work := b.appendedLocked()
	b.mu.Unlock()

	b.deliver(work)
	for _, t := range taps {
		t.wake()
	}
	return r, true
}

// work is what is left to do without the lock after something was appended.
type work struct {
	flushers int
	cut      []*client
}

// appendedLocked wakes the clients that lack what was appended.
func (b *hub) appendedLocked() work {
	b.wakeLocked()
	b.chargeLocked()
	return work{b.moreFlushersLocked(), b.overstrandedLocked()}
}

func (b *hub) deliver(w work) {
	for range w.flushers {
		go b.flush() // ends when the queue is empty; nobody waits for it, but for the turns
	}
	for _, c := range w.cut {
		c.cut(causeLagged)
	}
}

// wakeLocked makes the idle clients busy that lack a frame, which may be all but a message's sender, or only those that
// speak events.
func (b *hub) wakeLocked() {
	idle := b.clients[:b.idle]
	b.idle = 0
	for i, c := range idle {
		if c.cursor == c.log.head {
			b.swapLocked(i, b.idle) // what stood there has had its turn here
			b.idle++
			continue
		}
		if c.state.CompareAndSwap(stateIdle, stateWriting) {
			b.queueLocked(c)
		} else if c.state.Load() == stateWriting {
			b.beginTurnLocked(c, turnWriter) // a writer runs for a pong or a ping, and comes by next before it ends
		}
	}
	b.restLocked()
}

// overstrandedLocked returns the clients that pin more of the past than the hub may hold.
func (b *hub) overstrandedLocked() (cut []*client) {
	s := b.log.overstranded()
	var e *segment
	if b.events != nil {
		e = b.events.overstranded()
	}
	if s == nil && e == nil {
		return nil
	}
	for _, c := range b.clients[b.idle:] {
		if c.pinned != nil && (c.pinned == s || c.pinned == e) {
			cut = append(cut, c)
		}
	}
	return cut
}

// next is the writer's way through the log: it gives back the frames of the last call and returns those that
// follow, n messages in one slice that stays valid until the next call or drop. Where there is nothing to
// write it makes c idle, in the same critical section, so that no message can come between.
func (b *hub) next(c *client) (frames []byte, n int, p progress) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.nextLocked(c)
}

func (b *hub) nextLocked(c *client) (frames []byte, n int, p progress) {
	b.unpinLocked(c)
	if c.index < 0 { // dropped: the log may be recycled under it
		return nil, 0, progressFlushed
	}
	b.doneLocked(c)
	limit := c.log.head
	if c.left {
		limit = c.until
	}
	skipTo := c.skipLocked(limit)
	if c.cursor < c.log.tail && c.cursor < limit {
		if c.left {
			b.removeLocked(c)
			return nil, 0, progressFlushed // as far as it goes
		}
		if !c.settings.skip {
			return nil, 0, progressLagged
		}
		b.skipLaggedLocked(c)
		skipTo = c.skipLocked(limit)
	}
	if c.cursor == limit {
		if c.left {
			b.removeLocked(c)
			return nil, 0, progressFlushed
		}
		return nil, 0, b.parkLocked(c)
	}
	c.pinned, frames, n = c.log.next(c.cursor, skipTo)
	c.taken = c.cursor
	c.cursor += uint64(n)
	return frames, int(b.messagesLocked(c, c.taken, c.cursor)), progressFrames
}

// messagesLocked returns how many messages there are from one position of c's log up to another.
func (b *hub) messagesLocked(c *client, from, to uint64) uint64 {
	if c.speaksEvents {
		return b.events.seq(to) - b.events.seq(from)
	}
	return to - from
}

// skipLaggedLocked moves c over what is gone.
func (b *hub) skipLaggedLocked(c *client) {
	missed := b.messagesLocked(c, c.cursor, c.log.tail)
	c.missed += missed
	b.metrics.droppedByLag.Add(float64(missed))
	c.cursor = c.log.tail
	if c.speaksEvents {
		c.tell(laggedEvent{"lagged", missed, b.events.seq(c.cursor) + 1})
	}
}

// parkLocked makes c idle. When every client is, the log's memory is given back.
func (b *hub) parkLocked(c *client) progress {
	b.endTurnLocked(c)
	b.doneLocked(c)
	if !c.state.CompareAndSwap(stateWriting, stateIdle) {
		return progressOrphaned
	}
	if c.index >= b.idle {
		b.swapLocked(c.index, b.idle)
		b.idle++
	}
	b.restLocked()
	return progressIdle
}

// A seqRange is the sequence numbers from first up to, but not including, end.
type seqRange struct{ first, end uint64 }

// skipOwnLocked notes that c is not to get its own message seq. Of ranges that were evicted only the one at the cursor
// matters: behind a gap that is no range the client has lagged.
func (c *client) skipOwnLocked(seq, tail uint64) {
	if c.cursor == seq {
		c.cursor++
		return
	}
	if n := len(c.own); n > 0 && c.own[n-1].end == seq {
		c.own[n-1].end++
		return
	}
	keep := 0
	if len(c.own) > 0 && c.own[0].first <= c.cursor {
		keep = 1
	}
	gone := keep
	for gone < len(c.own) && c.own[gone].end <= tail {
		gone++
	}
	c.own = append(slices.Delete(c.own, keep, gone), seqRange{seq, seq + 1})
}

// skipLocked moves the cursor over the client's own messages, with echo off, and returns where the frames that it may
// be sent end: at limit or at the next message of its own.
func (c *client) skipLocked(limit uint64) uint64 {
	gone := 0
	for gone < len(c.own) && c.own[gone].first <= c.cursor {
		c.cursor = max(c.cursor, min(c.own[gone].end, limit))
		gone++
	}
	c.own = slices.Delete(c.own, 0, gone)
	if len(c.own) > 0 {
		return min(limit, c.own[0].first)
	}
	return limit
}

// size returns the number of members.
func (b *hub) size() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.members
}

// setTaps makes taps the ones that see what is published from now on.
func (b *hub) setTaps(taps []*tap) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.taps = taps
}

func (b *hub) unpinLocked(c *client) {
	if c.pinned != nil {
		c.log.unpin(c.pinned)
		c.pinned = nil
	}
}

// removeLocked takes c out of clients, if it is still there.
func (b *hub) removeLocked(c *client) {
	b.endTurnLocked(c)
	if c.index < 0 {
		return
	}
	if c.speaksEvents {
		b.events.clients--
		b.events.read = time.Now()
	}
	if c.index < b.idle {
		b.idle--
		b.swapLocked(c.index, b.idle)
	}
	if c.left {
		b.leaving--
	}
	b.owesNothingLocked(c)
	last := len(b.clients) - 1
	b.swapLocked(c.index, last)
	b.clients[last] = nil
	b.clients = b.clients[:last]
	c.index = -1
	if len(b.records) == 0 { // even if others are never idle
		b.endEventsLocked()
	}
	b.restLocked()
}

func (b *hub) swapLocked(i, j int) {
	b.clients[i], b.clients[j] = b.clients[j], b.clients[i]
	b.clients[i].index, b.clients[j].index = i, j
}
