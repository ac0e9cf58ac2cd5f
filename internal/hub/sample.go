package hub

import (
	"math"
	"time"
)

// A sample is one message of a hub whose way to the clients is timed. It is guarded by the hub's lock. A client owes the
// sample from the moment it is published, as a member of the hub, until the sample's frame is written to it.
type sample struct {
	began   time.Time // when it was published
	passed  int       // messages since then
	owed    int       // clients that owe it; 0 is no sample
	leaving int       // clients that have left and still get what was published before
}

// notInFeed is the position of a sample in a feed that began later.
const notInFeed = math.MaxUint64

// maxSample is when a sample is given up, and counts as having taken that long: a client is stuck.
const maxSample = time.Second

// clockEvery is how many messages may pass between two looks at the clock, which is most of what a sample costs.
const clockEvery = 16

// sampleLocked makes the newest message the hub's sample, unless there is one. quiet is its sender if that does not get
// it, and else nil; at is where it is in the sender's feed.
func (b *Hub) sampleLocked(quiet *Client, at uint64) {
	s := &b.sample
	if s.owed > 0 {
		s.passed++
		if s.passed%clockEvery > 0 || time.Since(s.began) < maxSample {
			return
		}
		b.process.Delivered(maxSample)
	}
	s.began, s.passed, s.owed = time.Now(), 0, len(b.clients)-s.leaving
	for _, f := range b.feeds {
		f.sampled = f.newest
	}
	if quiet != nil && quiet.cursor > at && quiet.index >= 0 { // it has everything before the sample already
		s.owed--
		quiet.written = quiet.cursor
	}
}

// owes reports whether c has yet to be sent the sample in its feed.
func (c *Client) owes() bool {
	at := c.feed.sampled
	return c.joinedAt <= at && c.written <= at && at < c.feed.Head()
}

// writtenLocked notes that everything before c's cursor is written, or is not for c.
func (b *Hub) writtenLocked(c *Client) {
	if b.sample.owed > 0 && c.owes() && c.feed.sampled < c.cursor {
		b.paidLocked()
	}
	c.written = c.cursor
}

// forgetSampleOfLocked takes c, which goes, out of those that the sample waits for.
func (b *Hub) forgetSampleOfLocked(c *Client) {
	left := !c.State().isMember()
	if left {
		b.sample.leaving--
	}
	if b.sample.owed > 0 && c.owes() && (!left || c.feed.sampled < c.until) {
		b.paidLocked()
	}
}

func (b *Hub) paidLocked() {
	b.sample.owed--
	if b.sample.owed == 0 {
		b.process.Delivered(time.Since(b.sample.began))
	}
}
