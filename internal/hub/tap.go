package hub

import (
	"sync"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// maxTapMessages and maxTapBytes bound what waits in a tap: a few seconds of a busy hub. The first message of all
// always fits.
const (
	maxTapMessages = 1024
	maxTapBytes    = 1 << 20
)

// A Tap streams the messages of a hub to somebody who is no client of it, such as an operator. It costs publish a copy of
// the message. Nobody waits for it: messages that do not fit are counted and left out.
type Tap struct {
	news chan struct{} // has an element when there may be something to take

	mu     sync.Mutex
	queue  []Tapped
	bytes  int    // of the payloads in queue
	missed uint64 // messages that did not fit, all published after those in queue
}

// A Tapped is a message that a Tap has seen.
type Tapped struct {
	Seq     uint64        // the message's number, counted from 1
	Sender  feed.ClientID // 0 for none
	Binary  bool
	Payload []byte
}

// NewTap returns a tap that sees nothing until a hub has it.
func NewTap() *Tap { return &Tap{news: make(chan struct{}, 1)} }

// News returns a channel that has an element when there may be something to Take.
func (t *Tap) News() <-chan struct{} { return t.news }

// offer queues a copy of the message, if it fits. It does not wake the reader, because it runs under the hub's lock, where
// the order of messages is made; wake does.
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

// wake tells the reader that there is something to take.
func (t *Tap) wake() {
	select {
	case t.news <- struct{}{}:
	default: // it knows already
	}
}

// Take returns the messages published since the last call, and how many after those did not fit.
func (t *Tap) Take() (messages []Tapped, missed uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	messages, missed = t.queue, t.missed
	t.queue, t.bytes, t.missed = nil, 0, 0
	return messages, missed
}
