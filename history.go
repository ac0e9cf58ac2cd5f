package chatbroadcast

import (
	"net/netip"
	"sort"
	"time"
)

// A history is what a hub remembers of its messages beyond what its clients have yet to be sent. The messages themselves
// are in the hub's log. It needs the hub's lock.
type history struct {
	messages int           // how many are kept for those who join; 0 is no history
	age      time.Duration // for how long, at most

	records     []record // of the messages in the hub's log; those before them have none
	firstRecord uint64   // the number of the first of records
	users       int      // the bytes of the users in records

	receipts receipts // of what was sent with an id

	sweep *time.Timer // while there is something that will be too old
}

// keeping is how a registry keeps a hub that has no clients, for its history. It is guarded by registry.mu.
type keeping struct {
	home      *scope          // through which a client with history came last
	owner     netip.Prefix    // the address that opened the hub, or that of a client that was there when it left
	keeper    *scope          // which keeps the hub, or nil
	place     *fairItem[*hub] // among those that keeper may close, or nil
	keptSince time.Time
	expiry    *time.Timer // while it is kept: when it closes
}

// A record is what a hub remembers of a message besides its frame.
type record struct {
	at     time.Time
	sender clientID
	user   string
}

// recordSize is about what a record takes, besides its strings.
const recordSize = 64

// growHistoryLocked raises the hub's bounds; they are never lowered while the hub lives. The log keeps the history and,
// beyond it, as many messages as a client may be behind: who joins starts with the oldest of the history.
func (b *hub) growHistoryLocked(s *settings) {
	if b.messages == 0 && s.historyMessages > 0 {
		b.firstRecord = b.log.head
	}
	b.messages = max(b.messages, s.historyMessages)
	b.age = max(b.age, s.historyAge)
	b.bufferMessages = max(b.bufferMessages, s.bufferMessages)
	b.log.grow(b.bufferMessages+b.messages, s.bufferBytes)
	if b.messages > 0 {
		b.log.history = b.historyBytesLocked()
	}
	if b.memory != nil {
		b.log.spare = &b.memory.buffers
		b.memory.buffers.raise(b.log.maxBytes)
		if b.messages > 0 {
			b.memory.histories.raise(b.log.maxBytes)
		}
	}
	if b.events != nil {
		b.growEventsLocked()
	}
}

// growEventsLocked raises the bounds of the event log to those of the log.
func (b *hub) growEventsLocked() {
	b.events.grow(b.log.maxMessages, b.log.maxBytes)
	b.events.history, b.events.spare = b.log.history, b.log.spare
}

// historyBytesLocked is how much of the log history may take. The other half is for falling behind.
func (b *hub) historyBytesLocked() int { return b.log.maxBytes / 2 }

// rememberLocked notes what was published last.
func (b *hub) rememberLocked(m *message, r receipt) {
	if b.messages == 0 {
		return
	}
	b.records = append(b.records, record{r.at, m.sender, m.user})
	b.users += len(m.user)
	b.forgetRecordsLocked()
	if m.key.id != "" {
		b.receipts.add(m, r)
	}
	if b.sweep == nil {
		b.sweep = time.AfterFunc(b.age, b.sweepHistory)
	}
}

// forgetRecordsLocked forgets the records of messages that the log no longer has.
func (b *hub) forgetRecordsLocked() {
	for b.firstRecord < b.log.tail {
		b.users -= len(b.records[0].user)
		b.records[0] = record{}
		b.records = b.records[1:]
		b.firstRecord++
	}
}

// floorLocked returns the oldest message that who joins now may be sent, the head if there is none.
func (b *hub) floorLocked(now time.Time) uint64 {
	if b.messages == 0 {
		return b.log.head
	}
	floor := max(b.firstRecord, b.log.tail, b.log.within(b.historyBytesLocked()))
	if n := uint64(b.messages); b.log.head-floor > n {
		floor = b.log.head - n
	}
	oldest := now.Add(-b.age)
	some := b.records[floor-b.firstRecord:]
	return floor + uint64(sort.Search(len(some), func(i int) bool { return some[i].at.After(oldest) }))
}

// restLocked gives back what a hub needs only while it is busy, if it is not: when every client is idle.
func (b *hub) restLocked() {
	if b.idle < len(b.clients) {
		return
	}
	if len(b.records) == 0 {
		b.recycleLocked()
	} else {
		b.retainLocked(b.records[len(b.records)-1].at) // the clock is sweepHistory's
	}
	if len(b.records) == 0 {
		b.endEventsLocked()
	}
	b.chargeLocked()
}

// endEventsLocked forgets the event log, if nobody reads it.
func (b *hub) endEventsLocked() {
	if b.events != nil && b.events.clients == 0 {
		b.events.recycle()
		b.events = nil
	}
}

// retainLocked forgets what is not for those who join from now on. Every client must be idle.
func (b *hub) retainLocked(now time.Time) {
	floor := b.floorLocked(now)
	b.log.retain(floor)
	b.forgetRecordsLocked()
	if b.events != nil {
		if b.events.bytes > b.historyBytesLocked()/2 {
			b.events.squeeze() // or what is told of presence would push the messages out
		}
		b.events.retain(max(b.events.tail, b.events.position(max(floor, b.events.seq(b.events.tail))),
			b.events.within(b.historyBytesLocked())))
		b.events.forgetBetween()
	}
}

// recycleLocked forgets all messages. Every client must be idle.
func (b *hub) recycleLocked() {
	b.log.recycle()
	if b.events != nil {
		b.events.recycle()
		b.events.forgetBetween()
	}
}

// sweepHistory forgets what has become too old.
func (b *hub) sweepHistory() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sweep = nil
	if b.closed {
		return
	}
	now := time.Now()
	oldest, some := b.receipts.forgetUntil(now.Add(-b.age))
	if b.idle == len(b.clients) && len(b.records) > 0 {
		b.retainLocked(now)
	}
	// Not when its last reader goes: to encode the history again for the next takes long, in a hub that has much of it.
	if len(b.records) == 0 || b.events != nil && now.Sub(b.events.read) >= b.age {
		b.endEventsLocked()
	}
	b.chargeLocked()
	if len(b.records) > 0 && (!some || b.records[0].at.Before(oldest)) {
		oldest, some = b.records[0].at, true
	}
	if !some {
		return
	}
	// Not for each message on its own, and not at once where clients are still busy with what is too old.
	wait := max(oldest.Add(b.age).Sub(now), b.age/8, time.Millisecond)
	b.sweep = time.AfterFunc(wait, b.sweepHistory)
}

// forgetHistoryLocked forgets all messages, as far as no client has yet to be sent them. It keeps the receipts.
func (b *hub) forgetHistoryLocked() {
	b.firstRecord, b.records, b.users = b.log.head, nil, 0
	if b.idle == len(b.clients) {
		b.recycleLocked()
	}
	b.chargeLocked()
}

// historyAge returns for how long the hub keeps messages, and is kept without clients.
func (b *hub) historyAge() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.age
}

// forget forgets the messages of the history. It returns how many bytes of history that has given back.
func (b *hub) forget() (freed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.messages == 0 || b.closed {
		return 0
	}
	before := b.remembered
	b.forgetHistoryLocked()
	return before - b.remembered
}

// forgetReceipts forgets which messages were sent with an id, so that a sender who repeats one learns that the hub cannot
// know. It returns how many bytes that has given back.
func (b *hub) forgetReceipts() (freed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.receipts.size() == 0 {
		return 0
	}
	before := b.remembered
	b.receipts.forgetEarly()
	b.chargeLocked()
	return before - b.remembered
}

// growHistory is growHistoryLocked for a hub that is opened without a client.
func (b *hub) growHistory(s *settings) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.growHistoryLocked(s)
	b.maxMessageSize = max(b.maxMessageSize, s.maxMessageSize)
}

// hasHistory reports whether the hub has a history, be it empty.
func (b *hub) hasHistory() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.messages > 0
}

// rememberedSince returns how many bytes the history takes, and when its newest message was published.
func (b *hub) rememberedSince() (bytes int, newest time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.records); n > 0 {
		newest = b.records[n-1].at
	}
	return b.remembered, newest
}

// closeIfAged closes the hub, unless its newest message is not too old yet: then it returns for how long.
func (b *hub) closeIfAged() (wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.records); n > 0 {
		wait = time.Until(b.records[n-1].at.Add(b.age))
	}
	if wait <= 0 {
		b.closeLocked()
	}
	return wait
}

// close is closeLocked.
func (b *hub) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closeLocked()
}

// closeLocked ends the hub: nothing is published in it any more.
func (b *hub) closeLocked() {
	b.closed = true
	b.receipts = receipts{}
	b.forgetHistoryLocked()
	b.endEventsLocked()
	if b.sweep != nil {
		b.sweep.Stop()
	}
}
