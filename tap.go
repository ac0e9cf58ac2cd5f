package chatbroadcast

import (
	"sync"

	"github.com/gorilla/websocket"
)

// maxTapMessages and maxTapBytes bound what waits in a tap: a few seconds of a busy hub. The first message of all
// always fits.
const (
	maxTapMessages = 1024
	maxTapBytes    = 1 << 20
)

// A tap shows what is published in the hub of one name to somebody who is no client of it. It costs publish a copy of
// the message, and nothing where there is no tap. Nobody waits for it: what does not fit is counted and left out. It
// stays when the hub goes, and sees the next one of that name.
type tap struct {
	news chan struct{} // has an element when there may be something to take

	mu     sync.Mutex
	queue  []tapped
	bytes  int    // of the payloads in queue
	missed uint64 // messages that did not fit, all published after those in queue
}

// A tapped message has the number, counted from 1, that publish gave it, and the id of the client that sent it, 0 for
// none.
type tapped struct {
	seq     uint64
	from    clientID
	binary  bool
	payload []byte
}

func newTap() *tap { return &tap{news: make(chan struct{}, 1)} }

// offer queues a copy of the message, if it fits. It does not wake the reader, because it runs under hub.mu, where the
// order of messages is made: that is for wake.
func (t *tap) offer(seq uint64, from *client, opcode int, payload []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	full := len(t.queue) == maxTapMessages || t.bytes+len(payload) > maxTapBytes
	if t.missed > 0 || full && len(t.queue) > 0 {
		t.missed++
		return
	}
	m := tapped{seq: seq, binary: opcode == websocket.BinaryMessage, payload: append([]byte{}, payload...)}
	if from != nil {
		m.from = from.id
	}
	t.queue = append(t.queue, m)
	t.bytes += len(payload)
}

// wake tells the reader that there is something to take.
func (t *tap) wake() {
	select {
	case t.news <- struct{}{}:
	default: // it has been told
	}
}

// take returns what has been published since the last call, and how many messages after that did not fit.
func (t *tap) take() (messages []tapped, missed uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	messages, missed = t.queue, t.missed
	t.queue, t.bytes, t.missed = nil, 0, 0
	return messages, missed
}
