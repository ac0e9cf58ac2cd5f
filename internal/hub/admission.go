package hub

import (
	"net/netip"
	"slices"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

const (
	// maxOutbox and maxOutboxBytes bound the queue of an outbox, together: a message takes as many bytes of room as it
	// has, but at least minRoom. An address may take as much as is left for the others, so one address alone gets half.
	maxOutbox      = 256
	maxOutboxBytes = 1 << 20
	minRoom        = maxOutboxBytes / maxOutbox

	// maxUnanswered is how many messages of one client may wait for the engine. So the throughput of a client is not
	// bound by the time of a round trip.
	maxUnanswered = 64

	// maxOutgoing bounds what the outboxes of all hubs take together, in bytes, besides the first message of each. An
	// address may take as much as is left for the others.
	maxOutgoing = 64 << 20
)

// submit passes m to the engine. While the outbox has no room for it, or from has too many messages in it, submit waits,
// but no longer than engineTimeout, and not after gone is closed. done gets the outcome, unless submit returns an error:
// ErrClosed, ErrUnavailable or, for a message that may have been sent before, ErrUnknown. members is how many clients the
// hub has here.
func (b *Hub) submit(from *Client, m *Message, gone <-chan struct{}, done func(Receipt, error)) (members int, err error) {
	s := &submission{
		message: encodeMessage(m), source: m.Source, from: from, address: m.Address, again: m.Again,
		since: time.Now(), done: done,
	}
	b.mu.Lock()
	members = b.members
	s.message.Attempt = b.attemptLocked(m)
	if len(b.outbox.waiting) == 0 && b.acceptsLocked(from) && b.takeRoomLocked(s) {
		b.enqueueLocked(s)
		b.mu.Unlock()
		return members, nil
	}
	s.admitted = make(chan error, 1)
	b.outbox.waiting = append(b.outbox.waiting, s)
	b.admitLocked()
	b.mu.Unlock()
	return members, b.awaitAdmission(s, gone)
}

// attemptLocked returns what the engine is to do with m. It cannot know whether m was published before if the hub has no
// history, or if m was first sent in another epoch.
func (b *Hub) attemptLocked(m *Message) engine.Attempt {
	switch {
	case m.Key.ID == "" || !m.Again:
		return engine.First
	case b.history.messages == 0 || !b.issued(m.Key.Token):
		return engine.Lookup
	}
	return engine.Again
}

// awaitAdmission waits until s is in the queue. Otherwise it returns an error.
func (b *Hub) awaitAdmission(s *submission, gone <-chan struct{}) error {
	patience := time.NewTimer(engineTimeout)
	defer patience.Stop()
	select {
	case err := <-s.admitted:
		return err
	case <-patience.C:
	case <-gone:
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.outbox.waiting, s)
	if i < 0 {
		return <-s.admitted // it was decided meanwhile
	}
	b.outbox.waiting = slices.Delete(b.outbox.waiting, i, i+1)
	b.admitLocked()
	return s.failure(ErrUnavailable)
}

// admitLocked moves the waiting messages for which there is room to the queue, in the order in which they came, and refuses
// those that the hub does not take any more. Where other addresses leave no room for a message, it holds up the messages
// behind it: otherwise smaller ones would always overtake it.
func (b *Hub) admitLocked() {
	o := &b.outbox
	blocked := false
	o.waiting = slices.DeleteFunc(o.waiting, func(s *submission) bool {
		switch {
		case !b.acceptsLocked(s.from):
			s.admitted <- ErrClosed
			return true
		case blocked:
			return false
		case b.takeRoomLocked(s):
			b.enqueueLocked(s)
			s.admitted <- nil
			return true
		}
		blocked = o.shares[s.address] == 0 && o.room+s.room() > maxOutboxBytes
		return false
	})
}

// enqueueLocked adds s, which has its room, to the queue.
func (b *Hub) enqueueLocked(s *submission) {
	o := &b.outbox
	o.queue = append(o.queue, s)
	if s.from != nil {
		s.from.expectAnswer()
	}
	if !o.sending {
		o.sending = true
		go b.drainOutbox() // ends when the outbox is empty; the owner of the session waits for IsDone
	}
}

// takeRoomLocked takes the room that s needs in the outbox, and reports whether there is enough. An empty outbox has room
// for a message of any size.
func (b *Hub) takeRoomLocked(s *submission) bool {
	o, n := &b.outbox, s.room()
	left, share := maxOutboxBytes-o.room-n, o.shares[s.address]
	switch {
	case s.from != nil && s.from.awaited() >= maxUnanswered:
		return false
	case len(o.queue) > 0 && (left < 0 || share > 0 && share+n > left):
		return false
	}
	s.pooled = b.process.Outgoing.Take(s.address, n)
	if !s.pooled && len(o.queue) > 0 {
		return false
	}
	if o.shares == nil {
		o.shares = map[netip.Prefix]int{}
	}
	o.room += n
	o.shares[s.address] += n
	return true
}

// giveRoomLocked gives back the room of s.
func (b *Hub) giveRoomLocked(s *submission) {
	o, n := &b.outbox, s.room()
	o.room -= n
	o.shares[s.address] -= n
	if o.shares[s.address] == 0 {
		delete(o.shares, s.address)
	}
	if s.pooled {
		b.process.Outgoing.Give(s.address, n)
	}
}

// room returns how much room s takes.
func (s *submission) room() int { return max(len(s.message.Data), minRoom) }

// submit passes a message of c to the engine. It returns false when c is closing. c learns of the outcome when it comes.
func (c *Client) submit(m *Message) bool {
	p, key := c.protocol, m.Key
	c.meter.End()
	members, err := c.hub.submit(c, m, nil, func(r Receipt, err error) {
		p.answered(c, key, r, err)
		c.gotAnswer()
	})
	c.meter.Begin(c.load)
	c.meter.Delivered(members)
	if err != nil {
		c.awaitSent()
		p.answered(c, key, Receipt{}, err)
	}
	return !c.hasLeft()
}

// awaited returns how many messages of c wait for the engine.
func (c *Client) awaited() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.unanswered
}

// expectAnswer notes that another message of c waits for the engine.
func (c *Client) expectAnswer() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unanswered++
}

// gotAnswer notes that c knows the outcome of one of its messages.
func (c *Client) gotAnswer() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unanswered--
	if c.unanswered == 0 {
		c.releaseSenderLocked()
	}
}

// releaseSenderLocked wakes a reader that waits in awaitSent.
func (c *Client) releaseSenderLocked() {
	if c.allSent != nil {
		close(c.allSent)
		c.allSent = nil
	}
}

// awaitSent waits until c knows the outcome of all its messages, or has left. An answer to a later frame must not come
// before that, because answers come in the order of the frames.
func (c *Client) awaitSent() {
	c.mu.Lock()
	if c.unanswered == 0 || c.hasLeft() {
		c.mu.Unlock()
		return
	}
	allSent := make(chan struct{})
	c.allSent = allSent
	c.mu.Unlock()
	c.meter.End()
	<-allSent
}
