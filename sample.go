package chatbroadcast

import (
	"math"
	"time"
)

// A sample is one message of a hub whose way to the clients is timed. The fields are guarded by hub.mu.
type sample struct {
	sampled uint64    // its number in the log
	event   uint64    // its position in the event log, or noEvent
	began   time.Time // when it was published
	passed  int       // messages since then
	owed    int       // clients that it has not been written to; 0 is no sample
	leaving int       // clients that have left and still get what was published before
}

// noEvent is the position of a sample that is older than the event log.
const noEvent = math.MaxUint64

// maxSample is when a sample is given up, and counted as having taken that long: a client is stuck.
const maxSample = time.Second

// clockEvery is how many messages may pass between two looks at the clock, which is most of what a sample costs.
const clockEvery = 16

// sampleLocked makes the message seq, which from has sent and which is at event in the event log, the hub's sample unless
// there is one. A client owes it, or what was published before it, for as long as done is not beyond it.
func (b *hub) sampleLocked(from *client, seq, event uint64) {
	if b.owed > 0 {
		b.passed++
		if b.passed%clockEvery > 0 || time.Since(b.began) < maxSample {
			return
		}
		b.metrics.delivered(maxSample)
	}
	b.sampled, b.event, b.began, b.passed, b.owed = seq, event, time.Now(), 0, len(b.clients)-b.leaving
	if from != nil && from.cursor > b.sampledFor(from) && from.index >= 0 { // with echo off it has everything already
		b.owed--
		from.done = from.cursor
	}
}

// sampledFor returns where the sample is in c's log.
func (b *hub) sampledFor(c *client) uint64 {
	if c.speaksEvents {
		return b.event
	}
	return b.sampled
}

// doneLocked notes that everything up to c's cursor has been written, or is not for c.
func (b *hub) doneLocked(c *client) {
	if at := b.sampledFor(c); b.owed > 0 && c.done <= at && at < c.cursor {
		b.paidLocked()
	}
	c.done = max(c.done, c.cursor) // at first it is what was published when it joined, of which it may be sent some
}

// owesNothingLocked notes that c will not get what it has not got.
func (b *hub) owesNothingLocked(c *client) {
	if at := b.sampledFor(c); b.owed > 0 && at < c.log.head && c.done <= at && (!c.left || at < c.until) {
		b.paidLocked()
	}
}

func (b *hub) paidLocked() {
	b.owed--
	if b.owed == 0 {
		b.metrics.delivered(time.Since(b.began))
	}
}
