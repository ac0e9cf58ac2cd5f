package feed

import "github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"

// An Encoder makes the frames for clients of one kind. A frame is head followed by body: its bytes on the wire. head
// and body are valid until the next call and may refer to the message; the caller must not change them. An Encoder must
// not keep a message or a notice.
type Encoder interface {
	// Message returns the frame of a message.
	Message(m *Message) (head, body []byte)

	// Notice returns the frame of a notice, or ok = false if clients of this kind get no notices.
	Notice(n *Notice) (head, body []byte, ok bool)
}

// A raw encoder makes WebSocket frames with nothing but the payload.
type raw struct {
	header [ws.MaxHeader]byte
}

// NewRaw returns an encoder for clients that receive messages as they are: one unmasked WebSocket frame with the payload,
// which it does not copy (RFC 6455 §5.6). Such clients get no notices.
func NewRaw() Encoder { return new(raw) }

// Message implements Encoder.
func (r *raw) Message(m *Message) (head, body []byte) {
	return ws.AppendHeader(r.header[:0], m.Opcode, len(m.Payload)), m.Payload
}

// Notice implements Encoder.
func (r *raw) Notice(*Notice) (head, body []byte, ok bool) { return nil, nil, false }
