package chatbroadcast

import (
	"slices"
	"sync"
)

// A hub is one named broadcast group: a log, and the clients that read from it. All of them see the
// messages in the order in which publish appended them.
//
// A client with everything up to the head is idle and has no writer; publish wakes idle clients only. A busy
// client has a writer that comes back to next by itself and finds the new head there, so the busier the hub,
// the fewer wake-ups a message costs.
type hub struct {
	name string

	mu  sync.Mutex
	log log
	// clients[:idle] are idle, clients[idle:] are busy. A client that has left stays among the busy until
	// its writer has sent what was published before it left.
	clients []*client
	idle    int
	members int // clients that have not left
}

// progress says what a client's writer is to do next.
type progress int

const (
	progressFrames   progress = iota // write these frames, then ask again
	progressIdle                     // nothing to write: the writer has ended
	progressOrphaned                 // nothing to write, and the reader is gone: finish the client
	progressLagged                   // frames that the client needs are gone: close it
	progressFlushed                  // everything from before the client left is written: say goodbye
)

// join makes c a member: it will get every message published from now on. Its writer counts as running
// until it asks for next, so nothing is written before the connection is there. The log grows to c's buffer.
func (b *hub) join(c *client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.log.grow(c.settings.bufferMessages, c.settings.bufferBytes)
	b.members++
	c.cursor = b.log.head
	c.index = len(b.clients)
	b.clients = append(b.clients, c)
}

// leave ends c's membership: nothing published from now on is for c. What was published before stays within
// reach of its writer. It returns how many members remain. c must be a member.
func (b *hub) leave(c *client) (members int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.members--
	c.left, c.until = true, b.log.head
	if c.index < b.idle {
		b.removeLocked(c)
	}
	return b.members
}

// drop forgets c, which has left and will write no more frames. It may be called more than once.
func (b *hub) drop(c *client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unpinLocked(c)
	b.removeLocked(c)
}

// publish appends a message for every member and wakes those that are idle. from is its sender, or nil. It
// reports whether the message was published: not if the sender has left. ahead tells the caller that it is far
// ahead of the hub's writers and should let those run that can: this is no waiting for a slow client, whose
// writer cannot.
func (b *hub) publish(from *client, opcode int, payload []byte) (published, ahead bool) {
	wake, cut, published, ahead := b.append(from, opcode, payload)
	for wake != nil {
		c := wake
		wake, c.nextWoken = c.nextWoken, nil
		c.startWriter()
	}
	for _, c := range cut {
		c.cut(causeLagged)
	}
	return published, ahead
}

// append does publish's part under the lock. The caller starts the writers of the clients chained from wake,
// which are its own until then, and cuts those in cut, which pin more of the past than the hub may hold.
func (b *hub) append(from *client, opcode int, payload []byte) (wake *client, cut []*client, published, ahead bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if from != nil && from.left {
		return nil, nil, false, false
	}
	seq := b.log.append(opcode, payload)
	if from != nil && !from.settings.echo {
		from.skipOwnLocked(seq, b.log.tail)
	}
	for _, c := range b.clients[:b.idle] {
		// One that is already running, for a pong or a ping, comes by next before it ends.
		if c.state.CompareAndSwap(stateIdle, stateWriting) {
			c.nextWoken, wake = wake, c
		}
	}
	b.idle = 0
	if s := b.log.overstranded(); s != nil {
		for _, c := range b.clients {
			if c.pinned == s {
				cut = append(cut, c)
			}
		}
	}
	return wake, cut, true, b.log.takeAhead()
}

// next is the writer's way through the log: it gives back the frames of the last call and returns those that
// follow, n messages in one slice that stays valid until the next call or drop. Where there is nothing to
// write it makes c idle, in the same critical section, so that no message can come between.
func (b *hub) next(c *client) (frames []byte, n int, p progress) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unpinLocked(c)
	if c.index < 0 { // dropped: the log may be recycled under it
		return nil, 0, progressFlushed
	}
	limit := b.log.head
	if c.left {
		limit = c.until
	}
	if c.cursor < b.log.tail && c.cursor < limit {
		if c.left {
			b.removeLocked(c)
			return nil, 0, progressFlushed // as far as it goes
		}
		if !c.settings.skip {
			return nil, 0, progressLagged
		}
		c.missed += b.log.tail - c.cursor
		c.cursor = b.log.tail
	}
	skipTo := c.skipLocked(limit)
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

// skipOwnLocked notes that c is not to get its own message seq, and forgets those that it will not come by.
func (c *client) skipOwnLocked(seq, tail uint64) {
	i := 0
	for i < len(c.own) && c.own[i] < max(c.cursor, tail) {
		i++
	}
	c.own = append(slices.Delete(c.own, 0, i), seq)
}

// skipLocked moves the cursor over the client's own messages, with echo off, and returns where the frames that
// it may be sent end: at limit or at the next message of its own.
func (c *client) skipLocked(limit uint64) uint64 {
	for len(c.own) > 0 && c.own[0] <= c.cursor {
		if c.own[0] == c.cursor && c.cursor < limit {
			c.cursor++
		}
		c.own = slices.Delete(c.own, 0, 1)
	}
	if len(c.own) > 0 {
		return min(limit, c.own[0])
	}
	return limit
}

// size returns the number of members.
func (b *hub) size() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.members
}

func (b *hub) unpinLocked(c *client) {
	if c.pinned != nil {
		b.log.unpin(c.pinned)
		c.pinned = nil
	}
}

// removeLocked takes c out of clients, if it is still there.
func (b *hub) removeLocked(c *client) {
	if c.index < 0 {
		return
	}
	if c.index < b.idle {
		b.idle--
		b.swapLocked(c.index, b.idle)
	}
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
