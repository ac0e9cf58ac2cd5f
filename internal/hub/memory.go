package hub

import (
	"math"
	"sync/atomic"
	"time"
)

// The default bounds of the memory that all hubs and clients of a process keep together, in bytes. Go collects garbage
// late, so the process may grow by twice as much.
const (
	DefaultMaxHistory = 64 << 20 // with 100 messages of 200 bytes each, some 2000 hubs
	DefaultMaxBuffers = 64 << 20 // 64 hubs whose clients have all stopped reading
	maxIncoming       = 64 << 20 // 1000 messages of 64 KiB while they arrive
)

// Memory has the budgets of a process. Histories and buffers have one each, so that neither pushes out the other.
type Memory struct {
	Histories Budget // for clients that will join
	Buffers   Budget // for clients that are behind
}

// A Budget bounds memory that can be taken back. A hub that exceeds it starts a search for memory to give back. It is
// safe for concurrent use.
type Budget struct {
	used   atomic.Int64
	most   atomic.Int64 // the configured bound
	raised atomic.Int64 // four times the largest buffer, so that one hub cannot use up the budget
	pause  atomic.Int64 // no search is due before this time, in Unix nanoseconds
}

// SetMost sets the configured bound, in bytes.
func (b *Budget) SetMost(n int64) { b.most.Store(n) }

// Used returns the bytes in use.
func (b *Budget) Used() int64 { return b.used.Load() }

// Add adds n bytes to those in use; n may be negative.
func (b *Budget) Add(n int64) { b.used.Add(n) }

// Bound returns the most bytes that may be in use: the configured bound, or four times the largest buffer of a hub.
func (b *Budget) Bound() int64 { return max(b.most.Load(), b.raised.Load()) }

// Goal returns how many bytes a search may leave in use. It is less than Bound, so that the next search is not due at
// once.
func (b *Budget) Goal() int64 { return b.Bound() / 8 * 7 }

// Left returns how many more bytes hubs may use, up to a quarter beyond Bound. Between Bound and that, a search takes
// memory from the clients that hold the most. If the search comes too late, all hubs must keep less.
func (b *Budget) Left() int { return int(min(max(b.Bound()/4*5-b.used.Load(), 0), math.MaxInt32)) }

// raise makes room for a hub with the given buffer, in bytes.
func (b *Budget) raise(bufferBytes int) {
	want := 4 * int64(bufferBytes)
	for {
		raised := b.raised.Load()
		if raised >= want || b.raised.CompareAndSwap(raised, want) {
			return
		}
	}
}

// Exceeded reports whether a search is due.
func (b *Budget) Exceeded() bool {
	return b.used.Load() > b.Bound() && time.Now().UnixNano() > b.pause.Load()
}

// Rest keeps Exceeded false for d.
func (b *Budget) Rest(d time.Duration) { b.pause.Store(time.Now().Add(d).UnixNano()) }

// chargeLocked updates the budgets with the memory of the hub. When all clients have everything, the feeds are history.
// Otherwise the messages that have a record are history, as far as the history's part of the feeds goes, and the rest
// is for clients that are behind. A forgotten history does not count, even while clients still need its messages.
func (b *Hub) chargeLocked() {
	buffered, remembered := 0, 0
	for _, f := range b.feeds {
		buffered += f.Memory()
	}
	if b.history.messages > 0 && !b.closed {
		frames := buffered
		if b.idle < len(b.clients) {
			frames = b.historyFramesLocked()
		}
		buffered -= frames
		remembered = frames + len(b.history.records)*recordSize + b.history.users + b.history.receipts.size()
	}
	if d := remembered - b.history.charged; d != 0 {
		b.process.Memory.Histories.Add(int64(d))
		b.history.charged = remembered
	}
	if d := buffered - b.buffered; d != 0 {
		b.process.Memory.Buffers.Add(int64(d))
		b.buffered = buffered
	}
}

// historyFramesLocked returns about how many bytes of the feeds are history while clients are behind.
func (b *Hub) historyFramesLocked() int {
	if len(b.history.records) == 0 {
		return 0
	}
	share := b.historyBytesLocked()
	n := min(b.raw.Capacity(), b.raw.BytesFrom(max(b.history.first, b.raw.Tail())), share)
	for _, f := range b.feeds[1:] {
		n += min(f.Capacity(), share)
	}
	return n
}

// minHolding is how many bytes a client must hold back before a search may cut it.
const minHolding = 4 << 10

// A Holder is a client that is behind.
type Holder struct {
	Client *Client
	Bytes  int  // how many bytes the hub keeps for it
	Stuck  bool // it has not gone on since the last Trim
}

// Trim gives back the memory that neither a client nor the history needs. It returns the clients that hold back the
// rest, except those that wait for their turn or hold back less than 4 KiB.
func (b *Hub) Trim() (holders []Holder) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.buffered == 0 {
		return nil
	}
	floor := b.floorLocked(time.Now())
	for _, f := range b.feeds {
		f.needed = f.Position(max(floor, f.Seq(f.Tail())))
	}
	for _, c := range b.clients[b.idle:] {
		c.feed.needed = min(c.feed.needed, c.cursor)
	}
	for _, f := range b.feeds {
		f.Trim(f.needed)
		f.ForgetNotices()
	}
	if b.history.messages > 0 {
		b.forgetRecordsLocked()
	}
	b.chargeLocked()
	for _, c := range b.clients[b.idle:] {
		n := c.feed.BytesFrom(c.cursor)
		if c.pinned != nil {
			n += c.pinned.Capacity()
		}
		if c.turn != turnQueued && n >= minHolding {
			holders = append(holders, Holder{c, n, c.searched == c.cursor+1})
			c.searched = c.cursor + 1
		}
	}
	return holders
}
