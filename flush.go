package chatbroadcast

import (
	"math"
	"runtime"
	"slices"
	"time"
)

// A turn is a woken client's claim to be served: it begins when a message wakes the client and ends when the client
// has everything, or turns out not to take it. Turns are what senders wait for, never slow clients.
type turn int8

const (
	turnNone   turn = iota // idle, or known to be slow
	turnQueued             // a flusher serves it, or will
	turnWriter             // its own writer serves it: its socket was full, or its connection knows no attempts
)

// turns are a hub's flushers and what they have to do. A flusher is a goroutine that serves one woken client after the
// other. It only ever attempts to write: a client whose connection takes less than all gets a writer of its own for
// the rest. So a few flushers serve thousands of clients, and none is ever held up by one of them. The fields are
// guarded by hub.mu.
type turns struct {
	first, last *client // the queue: clients whose turn it is, oldest first
	queued      int
	flushers    int
	open        int           // turns that have not ended
	allEnded    chan struct{} // if somebody waits: closed when open is 0
}

// clientsPerFlusher is when another flusher is worth its start, as long as there are processors for it: writing to so
// many takes a few hundred microseconds.
const clientsPerFlusher = 64

// writerPatience is how often senders that wait look whether a client which is served by its own writer is blocked. A
// sender that is far ahead loses up to twice that for each time that such a client gets stuck.
const writerPatience = 10 * time.Millisecond

// maxLooks bounds how often they look, for a listener wrapper that is slow without being blocked: half a second.
const maxLooks = 50

// beginTurnLocked begins c's turn, or goes on with it in another way.
func (b *hub) beginTurnLocked(c *client, t turn) {
	if c.turn == turnNone {
		b.open++
	}
	c.turn, c.looked = t, math.MaxUint64
}

// queueLocked begins c's turn, or continues it behind the others.
func (b *hub) queueLocked(c *client) {
	b.beginTurnLocked(c, turnQueued)
	if b.last == nil {
		b.first = c
	} else {
		b.last.nextTurn = c
	}
	b.last = c
	b.queued++
}

// dequeueLocked returns the client whose turn it is, or nil.
func (b *hub) dequeueLocked() *client {
	c := b.first
	if c == nil {
		return nil
	}
	b.first, c.nextTurn = c.nextTurn, nil
	if b.first == nil {
		b.last = nil
	}
	b.queued--
	return c
}

// endTurnLocked ends c's turn, if it has one.
func (b *hub) endTurnLocked(c *client) {
	if c.turn == turnNone {
		return
	}
	c.turn = turnNone
	b.open--
	if b.open == 0 {
		b.log.caughtUp()
		if b.events != nil {
			b.events.caughtUp()
		}
		if b.allEnded != nil {
			close(b.allEnded)
			b.allEnded = nil
		}
	}
}

// awaitTurnsLocked keeps senders from running away from clients that do take what they are sent, and only had no
// turn yet: it waits until no turn is open when a quarter of the buffer was appended meanwhile. It gives up the lock
// to wait. A client that is blocked has no turn, so that it delays nobody. from is the sender, or nil.
func (b *hub) awaitTurnsLocked(from *client) {
	for looks := 1; b.open > 0 && b.aheadLocked(); {
		if b.allEnded == nil {
			b.allEnded = make(chan struct{})
		}
		allEnded := b.allEnded
		b.mu.Unlock()
		if from != nil {
			from.endWork()
		}
		patience := time.NewTimer(writerPatience)
		select {
		case <-allEnded:
			b.mu.Lock()
		case <-patience.C:
			b.mu.Lock()
			b.endBlockedTurnsLocked(looks >= maxLooks)
			looks++
		}
		patience.Stop()
	}
}

// aheadLocked reports whether a quarter of the buffer was appended since all turns had ended.
func (b *hub) aheadLocked() bool { return b.log.ahead() || b.events != nil && b.events.ahead() }

// endBlockedTurnsLocked ends the turns of clients whose own writers cannot go on and have not since the last look, or of
// all that have one. It gives up the lock to look.
func (b *hub) endBlockedTurnsLocked(all bool) {
	var waiting []*client
	for _, c := range b.clients[b.idle:] {
		if c.turn != turnWriter {
			continue
		}
		if all || c.looked == c.cursor {
			waiting = append(waiting, c)
		}
		c.looked = c.cursor
	}
	b.mu.Unlock()
	blocked := slices.DeleteFunc(waiting, func(c *client) bool { return !all && writable(c.connection()) })
	b.mu.Lock()
	for _, c := range blocked {
		if c.turn == turnWriter {
			b.endTurnLocked(c)
		}
	}
}

// moreFlushersLocked returns how many flushers the caller must start.
func (b *hub) moreFlushersLocked() int {
	wanted := (b.queued + clientsPerFlusher - 1) / clientsPerFlusher
	if wanted <= b.flushers {
		return 0 // without a word to the scheduler: GOMAXPROCS takes its lock
	}
	more := min(wanted, runtime.GOMAXPROCS(0)) - b.flushers
	if more < 0 {
		return 0
	}
	b.flushers += more
	return more
}

// flush serves the queue until it is empty.
func (b *hub) flush() {
	a := attempts.Get().(*attempt)
	defer attempts.Put(a)
	var t tally
	var served *client // has taken what it was given
	for {
		if t.pending == tallySize {
			b.metrics.written.add(&t)
		}
		c, frames, n, p := b.serve(served)
		served = nil
		switch p {
		case progressIdle:
			b.metrics.written.add(&t)
			return
		case progressOrphaned:
			go c.finish() // it logs, for which the others need not wait
		case progressFrames:
			if rest := c.attempt(a, &t, frames, n); len(rest) > 0 {
				b.handOver(c)
				c.startWriter(rest, n)
			} else {
				served = c
			}
		default:
			c.startWriter(nil, 0)
		}
	}
}

// serve puts served, if any, behind the others in the queue, or makes it idle if it has everything. Then it returns the
// next client with something to do: frames to attempt, or else what only a writer of its own can do. progressIdle
// tells the flusher to end.
func (b *hub) serve(served *client) (c *client, frames []byte, n int, p progress) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c = served
	if c != nil && b.first != nil && c.cursor < c.log.head {
		b.unpinLocked(c)
		b.doneLocked(c)
		b.queueLocked(c)
		c = nil
	}
	for {
		if c == nil {
			c = b.dequeueLocked()
		}
		if c == nil {
			b.flushers--
			return nil, nil, 0, progressIdle
		}
		frames, n, p = b.nextLocked(c)
		switch {
		case p == progressOrphaned:
			return c, nil, 0, p
		case p == progressFrames && c.wire.raw != nil && !c.due.Load():
			return c, frames, n, p
		case p != progressIdle, c.due.Load() && c.state.CompareAndSwap(stateIdle, stateWriting):
			if p == progressFrames { // its writer will ask for them
				b.unpinLocked(c)
				c.cursor = c.taken
			}
			if c.turn != turnNone {
				b.beginTurnLocked(c, turnWriter)
			}
			return c, nil, 0, progressWriter
		}
		c = nil // idle
	}
}

// handOver leaves c's turn to its own writer.
func (b *hub) handOver(c *client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.beginTurnLocked(c, turnWriter)
}
