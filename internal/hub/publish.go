package hub

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
)

// A Message is one to be published. It names its sender by id, so that it can come from another process. The hub sets Seq and
// At.
type Message struct {
	feed.Message
	Source  Source
	Joined  time.Time    // when the sender joined; zero: no client
	Address netip.Prefix // the address that pays for remembering the message's key
	Key     Key          // if its ID is not empty, a message with the same key is not published again
	Again   bool         // it has a key, and may have been sent before on another connection
}

// publish is the one door for messages: those of clients, of HTTP requests and of operators. In a hub with an engine that
// is submit. What must hold for all of them before they get a number belongs in acceptsLocked. from is the client that has
// sent m, or nil.
//
// publish appends m for every member and wakes those that are idle. It reports whether it has: not if the sender has left or
// the hub is closed. With a key it also returns true for a message that was published before or may have been; see Receipt.
// Where senders are far ahead of clients that do read, publish first waits for these clients; see lockInTurn.
func (b *Hub) publish(from *Client, m *Message) (r Receipt, ok bool) {
	r.waited = b.lockInTurn()
	verdict := b.submitLocked(from, m, &r)
	if verdict != apply {
		b.mu.Unlock()
		return r, verdict == known
	}
	var w work
	b.applyLocked(m, &w)
	b.mu.Unlock()

	b.deliver(&w)
	b.process.Counters.Published[m.Source].Add(1)
	b.process.Published()
	return r, true
}

// A verdict says what becomes of a message that was submitted.
type verdict int

const (
	refuse verdict = iota // nothing: the hub is closed or about to be, or the sender has left
	known                 // nothing: it was published before, or may have been, as its receipt says
	apply                 // it gets a number
)

// acceptsLocked reports whether the hub takes messages from a sender: the client from, or anybody else with nil.
func (b *Hub) acceptsLocked(from *Client) bool {
	if from != nil {
		// An engine takes them even when this hub is over.
		return from.State().isMember() && !from.brokenOff && (!b.closed || b.session != nil)
	}
	gone := b.empty && b.history.messages == 0 && b.cluster == nil // nobody will get it
	return !b.closed && !gone
}

// submitLocked decides whether m is published, and then sets its number and time. It fills in the receipt for the sender.
func (b *Hub) submitLocked(from *Client, m *Message, r *Receipt) verdict {
	if !b.acceptsLocked(from) {
		return refuse
	}
	if m.Key.ID != "" && b.receiptLocked(m, r) {
		return known
	}
	m.Seq = b.raw.Head() + 1
	if b.history.messages > 0 || len(b.feeds) > 1 || m.Key.ID != "" { // nobody sees the time otherwise
		m.At = time.Now()
	}
	r.Seq, r.At, r.Members = m.Seq, m.At, b.members
	return apply
}

// applyLocked appends m under its number and wakes the clients that lack it. The caller passes w to deliver, without the
// lock.
func (b *Hub) applyLocked(m *Message, w *work) {
	b.appendLocked(m)
	b.appendedLocked(w)
	w.taps = b.taps
}

// appendLocked appends m under its number, which must be the next one. Everything that must have the same order for all
// clients happens here.
func (b *Hub) appendLocked(m *Message) {
	if next := b.raw.Head() + 1; m.Seq != next {
		panic(fmt.Sprintf("chat_broadcast: message %d applied where %d is next", m.Seq, next))
	}
	var quiet *Client // the sender, if it does not get its own messages
	if len(b.quiet) > 0 {
		quiet = b.quiet[m.Sender]
	}
	mine := uint64(notInFeed)
	for _, f := range b.feeds {
		at := f.AppendMessage(&m.Message)
		if quiet != nil && quiet.feed == f {
			quiet.skipFrameLocked(at)
			mine = at
		}
		f.newest = at
	}
	b.rememberLocked(m)
	b.sampleLocked(quiet, mine)
	for _, t := range b.taps {
		t.offer(m)
	}
}

// A work lists the steps that follow an append and need no lock.
type work struct {
	flushers int
	cut      []*Client
	taps     []*Tap
}

// appendedLocked wakes the clients that lack what was appended.
func (b *Hub) appendedLocked(w *work) {
	b.wakeLocked()
	b.chargeLocked()
	w.flushers, w.cut = b.moreFlushersLocked(), b.overstrandedLocked()
}

func (b *Hub) deliver(w *work) {
	b.startFlushers(w.flushers)
	for _, c := range w.cut {
		c.Cut(CloseLagged)
	}
	for _, t := range w.taps {
		t.wake()
	}
}
