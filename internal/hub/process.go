package hub

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A Process has everything that all hubs of one process share. Make it with NewProcess.
type Process struct {
	Counters   Counters
	Memory     Memory
	Incoming   *fair.Pool       // memory for messages while they arrive
	Outgoing   *fair.Pool       // memory for messages while they wait for an engine
	Processors *fair.Processors // shared by the addresses of clients

	spare     func() int // Memory.Buffers.Left
	lastID    atomic.Uint64
	node      atomic.Uint64 // of its cluster
	lastBatch atomic.Uint64 // of any hub

	// Delivered gets how long a message took from its receipt to its last write. Each hub times one message at a time.
	// It runs under the hub's lock, so it must not wait.
	Delivered func(time.Duration)
	// Published runs after each message, without a lock. It is the place to give memory back when a budget is exceeded.
	Published func()

	// EnginePublished gets how long an engine took for a batch, and its error. Reset gets a hub whose epoch is over: its
	// clients must join again, and find another hub. It may get a hub more than once. Both run without a lock.
	EnginePublished func(time.Duration, error)
	Reset           func(*Hub)
}

// NewProcess returns a Process with the default bounds. Its functions do nothing.
func NewProcess() *Process {
	p := &Process{
		Incoming:   fair.NewPool(maxIncoming),
		Outgoing:   fair.NewPool(maxOutgoing),
		Processors: fair.NewProcessors(),
		Delivered:  func(time.Duration) {},
		Published:  func() {},

		EnginePublished: func(time.Duration, error) {},
		Reset:           func(*Hub) {},
	}
	p.spare = p.Memory.Buffers.Left
	p.Memory.Histories.SetMost(DefaultMaxHistory)
	p.Memory.Buffers.SetMost(DefaultMaxBuffers)
	return p
}

// nodes is how many nodes can make ids at the same moment. An id is a time in nanoseconds, of which the lowest bits are the
// node's number.
const nodes = 1 << 10

// SetNode sets the number of this node in its cluster.
func (p *Process) SetNode(number uint64) { p.node.Store(number % nodes) }

// NextID returns an id that no client or hub has had, neither in this process nor, unless the clock is turned back, in
// another one or on another node.
func (p *Process) NextID() feed.ClientID {
	for {
		last := p.lastID.Load()
		id := max(last/nodes+1, uint64(time.Now().UnixNano())/nodes)*nodes + p.node.Load()
		if p.lastID.CompareAndSwap(last, id) {
			return feed.ClientID(id)
		}
	}
}

// nextBatch returns the number of a batch. Numbers of batches grow also from one hub to the next of the same name, because
// an engine knows the hub by its name.
func (p *Process) nextBatch() uint64 { return p.lastBatch.Add(1) }

// An Owner follows the life of one client. No lock is held during its calls.
type Owner interface {
	// Left runs once, when the client is no longer a member of its hub. Finished may run before it.
	Left()
	// Finished runs once, as the last act of the client.
	Finished()
	// Panicked reports a bug that was recovered, with the stack. The client is closed.
	Panicked(v any, stack []byte)
}

// Counters count what happens in all hubs of a process. They only grow.
type Counters struct {
	ReceivedTexts    atomic.Uint64
	ReceivedBinaries atomic.Uint64
	BytesReceived    atomic.Uint64 // after the handshake, headers and control frames included, before TLS
	DroppedByRate    atomic.Uint64
	DroppedByLag     atomic.Uint64 // messages that a client under on_lag skip has missed
	Repaired         atomic.Uint64 // messages that a hub has fetched from its engine because it had missed them
	Epochs           atomic.Uint64 // hubs whose epoch an engine has ended
	Published        [sources]atomic.Uint64

	written written
}

// A Source says where a message comes from.
type Source int

// The sources of messages.
const (
	FromClient Source = iota
	FromHTTP
	FromAdmin
	sources
)

func (c *Counters) received(opcode int) {
	if opcode == ws.BinaryMessage {
		c.ReceivedBinaries.Add(1)
	} else {
		c.ReceivedTexts.Add(1)
	}
}

// Written returns the sum of all writes to clients so far.
func (c *Counters) Written() Tally {
	c.written.mu.Lock()
	defer c.written.mu.Unlock()
	return c.written.total
}

// A Tally counts writes to clients. A flusher keeps one of its own and adds it to the process's from time to time,
// because one update that all processors share costs as much as everything else that is counted for a write.
type Tally struct {
	Writes   [perWriteBuckets + 1]uint64 // by messages in a write: 1, 2, 3 to 4, 5 to 8 and so on; the last counts all larger ones
	Messages uint64
	Bytes    uint64
	pending  int // writes since the last add
}

// perWriteBuckets is the number of bounded buckets of Tally.Writes. The last of them ends at 512 messages.
const perWriteBuckets = 10

// tallySize is how many writes a flusher collects at most. A busy flusher makes so many in a fraction of a second.
const tallySize = 256

// wrote counts one write of the given bytes that has completed n messages.
func (t *Tally) wrote(n, bytes int) {
	t.Bytes += uint64(bytes)
	t.pending++
	if n > 0 {
		t.Messages += uint64(n)
		t.Writes[min(bits.Len(uint(n-1)), perWriteBuckets)]++
	}
}

// A written is the sum of all tallies.
type written struct {
	mu    sync.Mutex
	total Tally
}

// add adds t and empties it.
func (w *written) add(t *Tally) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, n := range t.Writes {
		w.total.Writes[i] += n
	}
	w.total.Messages += t.Messages
	w.total.Bytes += t.Bytes
	*t = Tally{}
}

// wrote counts a single write.
func (w *written) wrote(n, bytes int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.total.wrote(n, bytes)
}
