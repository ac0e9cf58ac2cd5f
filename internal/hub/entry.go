package hub

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// The first byte of an entry is its kind. Engines keep entries, so a kind never gets another meaning. All kinds so far are
// messages and have the same form: the sender's id and the length of the user as varints, the user, the payload.
const (
	textEntry   = 1
	binaryEntry = 2
)

// encodeMessage returns m as the engine gets it. It copies the payload.
func encodeMessage(m *Message) engine.Message {
	kind := byte(textEntry)
	if m.Opcode == ws.BinaryMessage {
		kind = binaryEntry
	}
	data := make([]byte, 0, 1+2*binary.MaxVarintLen64+len(m.User)+len(m.Payload))
	data = append(data, kind)
	data = binary.AppendUvarint(data, uint64(m.Sender))
	data = binary.AppendUvarint(data, uint64(len(m.User)))
	data = append(data, m.User...)
	return engine.Message{Data: append(data, m.Payload...), Key: m.Key.hash()}
}

var errEntry = errors.New("an entry that is no message")

// decodeEntry returns the message of an entry. The payload refers to the entry.
func decodeEntry(data []byte) (m feed.Message, err error) {
	if len(data) == 0 || data[0] != textEntry && data[0] != binaryEntry {
		return m, errEntry
	}
	m.Opcode = ws.TextMessage
	if data[0] == binaryEntry {
		m.Opcode = ws.BinaryMessage
	}
	rest := data[1:]
	sender, n := binary.Uvarint(rest)
	if n <= 0 {
		return m, errEntry
	}
	rest = rest[n:]
	size, n := binary.Uvarint(rest)
	if n <= 0 || size > uint64(len(rest)-n) {
		return m, errEntry
	}
	rest = rest[n:]
	m.Sender, m.User, m.Payload = feed.ClientID(sender), string(rest[:size]), rest[size:]
	return m, nil
}

// hash returns what an engine keeps of k: the zero key for a message without id.
func (k Key) hash() (h engine.Key) {
	if k.ID == "" {
		return h
	}
	var text bytes.Buffer
	for _, part := range []string{k.User, k.Token, k.ID} {
		_, _ = text.Write(binary.AppendUvarint(nil, uint64(len(part)))) // cannot fail
		_, _ = text.WriteString(part)
	}
	sum := sha256.Sum256(text.Bytes())
	copy(h[:], sum[:])
	return h
}

// The least that an engine keeps of a hub that several nodes share, so that a node can fetch what it has missed.
const (
	repairMessages = 256
	repairBytes    = 1 << 20
	repairAge      = time.Minute

	// lingering is how long a hub without history is kept without clients.
	lingering = 5 * time.Second
)

// boundsLocked returns what the engine is to keep of the hub.
func (b *Hub) boundsLocked() engine.Bounds {
	bounds := engine.Bounds{Messages: b.history.messages, Bytes: b.historyBytesLocked(), Age: b.history.age}
	if b.history.messages > 0 {
		bounds.Receipts = maxReceipts
	}
	if b.cluster != nil {
		bounds.Messages = max(bounds.Messages, repairMessages)
		bounds.Bytes = max(bounds.Bytes, repairBytes)
		bounds.Age = max(bounds.Age, repairAge)
	}
	return bounds
}

// positionLocked returns the newest message that the hub has.
func (b *Hub) positionLocked() engine.Position {
	return engine.Position{Epoch: b.epoch, Seq: b.raw.Head()}
}
