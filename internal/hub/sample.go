package hub

import (
	"math"
	"time"
)

// A sample is one message of a hub, for which the hub measures the time to the last write. A client owes the sample if
// it was a member when the message was published, until the message is written to it. The hub's lock guards it.
type sample struct {
	began   time.Time // when the message was published
	passed  int       // how many messages were published since
	owed    int       // how many clients owe the sample; 0: the hub has none
	leaving int       // how many clients have left and still receive earlier messages
}

// notInFeed is the position of a sample in a feed that began after it.
const notInFeed = math.MaxUint64

// maxSample is when the hub gives up a sample and counts it as having taken that long: a client is stuck.
const maxSample = time.Second

// clockEvery is how many messages may pass between two looks at the clock. The clock is most of the cost of a sample.
const clockEvery = 16

// sampleLocked makes the newest message the hub's sample, unless the hub has one. quiet is the sender if it does not
// get its own messages, and otherwise nil; at is the position of the message in the sender's feed.
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

// owes reports whether c has yet to receive the sample of its feed.
func (c *Client) owes() bool {
	at := c.feed.sampled
	return c.joinedAt <= at && c.written <= at && at < c.feed.Head()
}

// writtenLocked notes that all frames before c's cursor are written, or are not for c.
func (b *Hub) writtenLocked(c *Client) {
	if b.sample.owed > 0 && c.owes() && c.feed.sampled < c.cursor {
		b.paidLocked()
	}
	c.written = c.cursor
}

// forgetSampleOfLocked removes c from the clients that the sample waits for.
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
