package hub

import (
	"sync"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// maxTapMessages and maxTapBytes bound the messages that wait in a tap: a few seconds of a busy hub. An empty tap takes
// a message of any size.
const (
	maxTapMessages = 1024
	maxTapBytes    = 1 << 20
)

// A Tap streams the messages of a hub to a reader that is no client of it, such as an operator. It costs each publish a
// copy of the message. Nobody waits for the reader: the tap omits and counts messages that do not fit. Taps are safe
// for concurrent use.
type Tap struct {
	news chan struct{} // has an element when there may be messages to take

	mu     sync.Mutex
	queue  []Tapped
	bytes  int    // of the payloads in queue
	missed uint64 // messages that did not fit, all of them after those in queue
}

// A Tapped is a message that a Tap has copied.
type Tapped struct {
	Seq     uint64        // the message's number, counted from 1
	Sender  feed.ClientID // 0 for none
	Binary  bool
	Payload []byte
}

// NewTap returns a tap that sees nothing until a hub has it.
func NewTap() *Tap { return &Tap{news: make(chan struct{}, 1)} }

// News returns a channel that has an element when there may be messages to Take.
func (t *Tap) News() <-chan struct{} { return t.news }

// offer queues a copy of the message, if it fits. It runs under the hub's lock, which decides the order of messages, so
// it leaves waking the reader to wake.
func (t *Tap) offer(m *Message) {
	t.mu.Lock()
	defer t.mu.Unlock()
	full := len(t.queue) == maxTapMessages || t.bytes+len(m.Payload) > maxTapBytes
	if t.missed > 0 || full && len(t.queue) > 0 {
		t.missed++
		return
	}
	t.queue = append(t.queue, Tapped{m.Seq, m.Sender, m.Opcode == ws.BinaryMessage, append([]byte{}, m.Payload...)})
	t.bytes += len(m.Payload)
}

// wake wakes the reader.
func (t *Tap) wake() {
	select {
	case t.news <- struct{}{}:
	default: // it is awake, or will be
	}
}

// Take returns the messages since the last call, and how many messages after those did not fit.
func (t *Tap) Take() (messages []Tapped, missed uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	messages, missed = t.queue, t.missed
	t.queue, t.bytes, t.missed = nil, 0, 0
	return messages, missed
}
