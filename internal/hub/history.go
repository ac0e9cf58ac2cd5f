package hub

import (
	"sort"
	"sync"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
)

// A history describes the messages that a hub keeps for clients that will join. The messages themselves are in the
// hub's feeds. The hub's lock guards it.
type history struct {
	messages int           // how many messages clients that join get at most; 0: the hub has no history
	age      time.Duration // how old these messages are at most

	records []record // of the newest messages in the raw feed; older ones have none
	first   uint64   // the position in the raw feed of the message of records[0]
	users   int      // the bytes of the users in records

	receipts receipts // of messages that were sent with an id

	charged int         // bytes that the budget of histories has been charged for
	sweep   *time.Timer // runs sweepHistory, while there is something that will become too old
}

// A record has the sender and the time of a message, which its raw frame does not have.
type record struct {
	at     time.Time
	sender feed.ClientID
	user   string
}

// recordSize is about how many bytes a record takes, besides its strings.
const recordSize = 64

// Grow raises the bounds of a hub to those of the given settings. It is for a hub that opens without a client.
func (b *Hub) Grow(s *Settings) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.growHistoryLocked(s)
	b.maxMessageSize = max(b.maxMessageSize, s.MaxMessageSize)
}

// growHistoryLocked raises the hub's bounds. Nothing lowers them while the hub lives. The feeds keep as many messages
// as the history has and as a client may be behind, together, because a client that joins starts with the oldest of the
// history.
func (b *Hub) growHistoryLocked(s *Settings) {
	h := &b.history
	if h.messages == 0 && s.HistoryMessages > 0 {
		h.first = b.raw.Head()
	}
	h.messages = max(h.messages, s.HistoryMessages)
	h.age = max(h.age, s.HistoryAge)
	b.bufferMessages = max(b.bufferMessages, s.BufferMessages)
	b.bufferBytes = max(b.bufferBytes, s.BufferBytes)
	b.process.Memory.Buffers.raise(b.bufferBytes)
	if h.messages > 0 {
		b.process.Memory.Histories.raise(b.bufferBytes)
	}
	for _, f := range b.feeds {
		b.growFeedLocked(f)
	}
}

// growFeedLocked raises the bounds of a feed to those of the hub.
func (b *Hub) growFeedLocked(f *hubFeed) {
	f.Grow(b.bufferMessages+b.history.messages, b.bufferBytes)
	if b.history.messages > 0 {
		f.SetHistory(b.historyBytesLocked())
	}
	f.SetSpare(b.process.spare)
}

// historyBytesLocked returns how many bytes of a feed the history may take. The other half is for clients that fall
// behind.
func (b *Hub) historyBytesLocked() int { return b.bufferBytes / 2 }

// rememberLocked adds the message that was appended last to the history.
func (b *Hub) rememberLocked(m *Message) {
	h := &b.history
	if h.messages == 0 {
		return
	}
	h.records = append(h.records, record{m.At, m.Sender, m.User})
	h.users += len(m.User)
	b.forgetRecordsLocked()
	if m.Key.ID != "" {
		h.receipts.add(m, b.members)
	}
	if h.sweep == nil {
		h.sweep = time.AfterFunc(h.age, b.sweepHistory)
	}
}

// forgetRecordsLocked forgets the records of messages that the raw feed no longer has.
func (b *Hub) forgetRecordsLocked() {
	h := &b.history
	for h.first < b.raw.Tail() {
		h.users -= len(h.records[0].user)
		h.records[0] = record{}
		h.records = h.records[1:]
		h.first++
	}
}

// floorLocked returns the position in the raw feed of the oldest message that a client which joins now may get, or the
// head if it gets none.
func (b *Hub) floorLocked(now time.Time) uint64 {
	h, head := &b.history, b.raw.Head()
	if h.messages == 0 {
		return head
	}
	floor := max(h.first, b.raw.Tail(), b.raw.Within(b.historyBytesLocked()))
	if n := uint64(h.messages); head-floor > n {
		floor = head - n
	}
	oldest := now.Add(-h.age)
	some := h.records[floor-h.first:]
	return floor + uint64(sort.Search(len(some), func(i int) bool { return some[i].at.After(oldest) }))
}

// maxBundle bounds a bundle of replayed messages, in bytes. Unlike other frames a bundle is a copy, which a client that does not
// read keeps until it is cut; larger bundles would hardly save more.
const maxBundle = 16 << 10

// nextBundleLocked returns the next frames from before c joined, for a bundle, with the notices between them. A frame that has
// no place in a bundle, or is the only one, stays as it is.
func (c *Client) nextBundleLocked() (s *feed.Segment, frames []byte, n int, p progress) {
	s, frames, n = c.feed.NextWithin(c.cursor, c.joinedAt, maxBundle)
	if n == 1 {
		return s, frames, n, progressFrames
	}
	return s, frames, n, progressReplay
}

// bundles has buffers between uses, which hold a bundle each.
var bundles = sync.Pool{New: func() any { return new([maxBundle + feed.ReplayOverhead]byte) }}

// sendBundle sends the messages of frames as one bundle, like sendMessages.
func (c *Client) sendBundle(frames []byte, n int) bool {
	buffer := bundles.Get().(*[maxBundle + feed.ReplayOverhead]byte)
	defer bundles.Put(buffer)
	return c.sendMessages(feed.AppendReplay(buffer[:0], frames), n)
}

// restLocked gives back the memory that a hub needs only while it is busy, if every client is idle.
func (b *Hub) restLocked() {
	if b.idle < len(b.clients) {
		return
	}
	h := &b.history
	if len(h.records) == 0 {
		b.recycleLocked()
	} else {
		b.retainLocked(h.records[len(h.records)-1].at) // not the clock, which sweepHistory reads
	}
	if len(h.records) == 0 {
		b.endFeedsLocked(time.Time{})
	}
	b.chargeLocked()
}

// endFeedsLocked forgets the feeds that no client reads, except the raw one. A feed of a hub with history stays for the
// history's age, because encoding a long history again for the feed's next client takes long.
func (b *Hub) endFeedsLocked(now time.Time) {
	kept := b.feeds[:1]
	for _, f := range b.feeds[1:] {
		if f.Clients == 0 && (len(b.history.records) == 0 || now.Sub(f.LastRead) >= b.history.age) {
			f.Recycle()
		} else {
			kept = append(kept, f)
		}
	}
	clear(b.feeds[len(kept):])
	b.feeds = kept
}

// retainLocked forgets the messages that clients which join from now on do not get. Every client must be idle.
func (b *Hub) retainLocked(now time.Time) {
	floor := b.floorLocked(now)
	b.raw.Retain(floor)
	b.forgetRecordsLocked()
	share := b.historyBytesLocked()
	for _, f := range b.feeds[1:] {
		if f.Bytes() > share/2 {
			f.Squeeze() // otherwise notices would push the messages out
		}
		f.Retain(max(f.Tail(), f.Position(max(floor, f.Seq(f.Tail()))), f.Within(share)))
	}
}

// recycleLocked forgets all messages. Every client must be idle.
func (b *Hub) recycleLocked() {
	for _, f := range b.feeds {
		f.Recycle()
	}
}

// sweepHistory forgets messages and receipts that have become too old. It runs in the goroutine of a timer.
func (b *Hub) sweepHistory() {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := &b.history
	h.sweep = nil
	if b.closed {
		return
	}
	now := time.Now()
	oldest, some := h.receipts.forgetUntil(now.Add(-h.age))
	if b.idle == len(b.clients) && len(h.records) > 0 {
		b.retainLocked(now)
	}
	b.endFeedsLocked(now)
	b.chargeLocked()
	if len(h.records) > 0 && (!some || h.records[0].at.Before(oldest)) {
		oldest, some = h.records[0].at, true
	}
	if !some {
		return
	}
	// The timer does not run for each message, nor at once while clients are still busy with messages that are too old.
	wait := max(oldest.Add(h.age).Sub(now), h.age/8, time.Millisecond)
	h.sweep = time.AfterFunc(wait, b.sweepHistory)
}

// forgetHistoryLocked forgets all messages, except those that some client has yet to receive. It keeps the receipts.
func (b *Hub) forgetHistoryLocked() {
	h := &b.history
	h.first, h.records, h.users = b.raw.Head(), nil, 0
	if b.idle == len(b.clients) {
		b.recycleLocked()
	}
	b.chargeLocked()
}

// KeptFor returns how long the hub is kept without clients: as long as its messages. A hub that several nodes share is kept for
// a moment, because the next message may come soon and opening it takes some round trips.
func (b *Hub) KeptFor() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cluster != nil {
		return max(b.history.age, lingering)
	}
	return b.history.age
}

// HasHistory reports whether the hub has a history, which may be empty.
func (b *Hub) HasHistory() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.history.messages > 0
}

// Forget forgets the messages of the history. It returns how many bytes of history it has given back.
func (b *Hub) Forget() (freed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.history.messages == 0 || b.closed {
		return 0
	}
	before := b.history.charged
	b.forgetHistoryLocked()
	return before - b.history.charged
}

// ForgetReceipts forgets the receipts of messages that were sent with an id. A sender that repeats such a message then
// learns that the hub cannot know whether it was published. It returns how many bytes it has given back.
func (b *Hub) ForgetReceipts() (freed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.history.receipts.size() == 0 {
		return 0
	}
	before := b.history.charged
	b.history.receipts.forgetEarly()
	b.chargeLocked()
	return before - b.history.charged
}

// Remembered returns how many bytes the history takes, and when its newest message was published.
func (b *Hub) Remembered() (bytes int, newest time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.history.records); n > 0 {
		newest = b.history.records[n-1].at
	}
	return b.history.charged, newest
}

// CloseIfAged closes the hub, as Close does, unless the newest message of the history is not too old yet. Then it returns
// how long that message has left.
func (b *Hub) CloseIfAged() (wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.history.records); n > 0 {
		wait = time.Until(b.history.records[n-1].at.Add(b.history.age))
	}
	if wait <= 0 {
		b.closeLocked()
	}
	return wait
}

// Close ends the hub. It publishes nothing from then on, and no client can join. Its clients stay until they are
// closed.
func (b *Hub) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closeLocked()
}

func (b *Hub) closeLocked() {
	if b.closed {
		return
	}
	b.closed = true
	b.history.receipts = receipts{}
	b.forgetHistoryLocked()
	b.endFeedsLocked(time.Time{})
	if b.history.sweep != nil {
		b.history.sweep.Stop()
	}
	if b.remote.pause != nil {
		b.remote.pause.Stop()
	}
	if b.session != nil {
		b.admitLocked()               // those who wait and are no clients publish in the next hub
		go b.session.Leave(b.name, b) // returns at once; without the lock, because a session may call the hub
	}
}
