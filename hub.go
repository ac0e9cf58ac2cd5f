package chatbroadcast

import (
	"slices"
	"sync"
	"time"
)

// A hub is one named broadcast group: a log, and the clients that read from it. All of them see the
// messages in the order in which publish appended them.
//
// A client with everything up to the head is idle and has no writer; publish wakes idle clients only. A busy
// client has a writer that comes back by itself and finds the new head then, so the busier the hub, the fewer
// wake-ups a message costs. Who writes, and when, is in flush.go.
type hub struct {
	name    string
	opened  time.Time
	metrics *metrics

	mu  sync.Mutex
	log log
	// clients[:idle] are idle, clients[idle:] are busy. A client that has left stays among the busy until
	// its writer has sent what was published before it left.
	clients []*client
	idle    int
	members int // clients that have not left
	// maxMessageSize is the largest of the handlers through which its clients joined.
	maxMessageSize int
	taps           []*tap // replaced, never changed

	turns
	sample
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

// join makes c a member: it will get every message published from now on. Its writer counts as running
// until it asks for next, so nothing is written before the connection is there. The log grows to c's buffer.
func (b *hub) join(c *client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.log.grow(c.settings.bufferMessages, c.settings.bufferBytes)
	b.maxMessageSize = max(b.maxMessageSize, c.settings.maxMessageSize)
	b.members++
	c.cursor, c.done = b.log.head, b.log.head
	c.index = len(b.clients)
	b.clients = append(b.clients, c)
	b.beginTurnLocked(c, turnWriter)
}

// leave ends c's membership: nothing published from now on is for c. What was published before stays within
// reach of its writer. It returns how many members remain. c must be a member.
func (b *hub) leave(c *client) (members int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.members--
	c.left, c.until = true, b.log.head
	if c.index >= 0 {
		b.leaving++
	}
	if c.index < b.idle {
		b.removeLocked(c)
	}
	return b.members
}

// drop forgets c, which will write no more frames: it has left, or its connection is broken. It may be called more than
// once.
func (b *hub) drop(c *client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unpinLocked(c)
	b.removeLocked(c)
}

// publish appends a message for every member and wakes those that are idle. from is its sender, or nil. It
// reports whether the message was published (not if the sender has left, or everybody), under which number, counted from 1, and
// how many members the hub had then. Where the senders are far ahead of those clients that take what they are sent,
// publish first waits for these; see awaitTurnsLocked.
func (b *hub) publish(from *client, opcode int, payload []byte) (seq uint64, members int, published bool) {
	b.mu.Lock()
	b.awaitTurnsLocked()
	if from != nil && from.left || b.members == 0 {
		b.mu.Unlock()
		return 0, 0, false
	}
	at := b.log.append(opcode, payload)
	if from != nil && !from.settings.echo {
		from.skipOwnLocked(at, b.log.tail)
	}
	seq, members = b.log.head, b.members
	b.sampleLocked(from, at)
	taps := b.taps
	for _, t := range taps {
		t.offer(seq, from, opcode, payload)
	}
	b.wakeLocked()
	flushers := b.moreFlushersLocked()
	cut := b.overstrandedLocked()
	b.mu.Unlock()

	for range flushers {
		go b.flush() // ends when the queue is empty; nobody waits for it, but for the turns
	}
	for _, c := range cut {
		c.cut(causeLagged)
	}
	for _, t := range taps {
		t.wake()
	}
	return seq, members, true
}

// wakeLocked makes the idle clients busy that lack a message, which may be all but its sender.
func (b *hub) wakeLocked() {
	idle := b.clients[:b.idle]
	b.idle = 0
	for i, c := range idle {
		if c.cursor == b.log.head {
			b.swapLocked(i, 0) // what stood there has had its turn here
			b.idle = 1
			continue
		}
		if c.state.CompareAndSwap(stateIdle, stateWriting) {
			b.queueLocked(c)
		} else if c.state.Load() == stateWriting {
			b.beginTurnLocked(c, turnWriter) // a writer runs for a pong or a ping, and comes by next before it ends
		}
	}
	if b.idle == len(b.clients) {
		b.log.recycle()
	}
}

// overstrandedLocked returns the clients that pin more of the past than the hub may hold.
func (b *hub) overstrandedLocked() (cut []*client) {
	s := b.log.overstranded()
	if s == nil {
		return nil
	}
	for _, c := range b.clients[b.idle:] {
		if c.pinned == s {
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
	limit := b.log.head
	if c.left {
		limit = c.until
	}
	skipTo := c.skipLocked(limit)
	if c.cursor < b.log.tail && c.cursor < limit {
		if c.left {
			b.removeLocked(c)
			return nil, 0, progressFlushed // as far as it goes
		}
		if !c.settings.skip {
			return nil, 0, progressLagged
		}
		c.missed += b.log.tail - c.cursor
		b.metrics.droppedByLag.Add(float64(b.log.tail - c.cursor))
		c.cursor = b.log.tail
		skipTo = c.skipLocked(limit)
	}
	if c.cursor == limit {
		if c.left {
			b.removeLocked(c)
			return nil, 0, progressFlushed
		}
		return nil, 0, b.parkLocked(c)
	}
	c.pinned, frames, n = b.log.next(c.cursor, skipTo)
	c.cursor += uint64(n)
	return frames, n, progressFrames
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
	if b.idle == len(b.clients) {
		b.log.recycle()
	}
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
		b.log.unpin(c.pinned)
		c.pinned = nil
	}
}

// removeLocked takes c out of clients, if it is still there.
func (b *hub) removeLocked(c *client) {
	b.endTurnLocked(c)
	if c.index < 0 {
		return
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
	if b.idle == len(b.clients) {
		b.log.recycle()
	}
}

func (b *hub) swapLocked(i, j int) {
	b.clients[i], b.clients[j] = b.clients[j], b.clients[i]
	b.clients[i].index, b.clients[j].index = i, j
}
