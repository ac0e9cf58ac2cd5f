package feed

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"strconv"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// maxEventBuffer bounds the buffer that an events encoder keeps between calls, in bytes. Events are rarely larger, and each
// hub with events has such a buffer.
const maxEventBuffer = 16 << 10

// An events encoder makes the events of the subprotocol chat-broadcast.v1.
type events struct {
	header [ws.MaxHeader]byte
	buf    []byte
}

// NewEvents returns an encoder for clients that speak the events protocol: a text frame with a JSON object, which is a
// message, join, leave or presence event. Between calls it keeps a buffer of at most 16 KiB.
func NewEvents() Encoder { return new(events) }

// Message implements Encoder.
func (e *events) Message(m *Message) (head, body []byte) {
	return e.frame(appendMessage(e.buf[:0], m))
}

// Notice implements Encoder. One user that has come is a join event and one that has gone is a leave event. Everything else
// is a presence event, with nobody in it if only the number of clients has changed.
func (e *events) Notice(n *Notice) (head, body []byte, ok bool) {
	var event any
	switch {
	case len(n.Joined) == 1 && len(n.Left) == 0:
		event = userEvent{"join", n.Joined[0], n.Clients}
	case len(n.Joined) == 0 && len(n.Left) == 1:
		event = userEvent{"leave", n.Left[0], n.Clients}
	default:
		event = changesEvent{"presence", n.Clients, n.Joined, n.Left}
	}
	head, body = e.frame(AppendEvent(e.buf[:0], event))
	return head, body, true
}

// frame returns the frame of an event that was encoded in buf, and keeps the buffer unless it has become too large.
func (e *events) frame(event []byte) (head, body []byte) {
	if e.buf = event; cap(event) > maxEventBuffer {
		e.buf = nil
	}
	return ws.AppendHeader(e.header[:0], ws.TextMessage, len(event)), event
}

// A userEvent is a join or leave event.
type userEvent struct {
	Type    string `json:"type"`
	User    string `json:"user"`
	Clients int    `json:"clients"`
}

// A changesEvent is a presence event with the changes of the roster.
type changesEvent struct {
	Type    string   `json:"type"`
	Clients int      `json:"clients"`
	Joined  []string `json:"joined,omitempty"`
	Left    []string `json:"left,omitempty"`
}

// AppendEvent appends an event as JSON, without escapes for HTML. It panics if a field of the event cannot be encoded.
func AppendEvent(dst []byte, event any) []byte {
	buf := bytes.NewBuffer(dst)
	e := json.NewEncoder(buf)
	e.SetEscapeHTML(false)
	if err := e.Encode(event); err != nil {
		panic(err)
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n"))
}

// timeLayout is RFC 3339 in UTC, with milliseconds.
const timeLayout = "2006-01-02T15:04:05.000Z"

// EventTime returns t in the form that events use: RFC 3339 in UTC, with milliseconds. It drops anything below a
// millisecond.
func EventTime(t time.Time) string { return t.UTC().Format(timeLayout) }

// Parts of a message event and of a replay event. No other event begins like a message event.
const (
	messageStart = `{"type":"message","seq":`
	replayStart  = `{"type":"replay","messages":[`
	replayEnd    = `]}`
)

// ReplayOverhead is the most that AppendReplay adds to the bytes of the frames.
const ReplayOverhead = ws.MaxHeader + len(replayStart) + len(replayEnd)

// AppendReplay appends one frame with a replay event. It has the message events of frames, which an events encoder has made,
// and leaves out the notices between them.
func AppendReplay(dst, frames []byte) []byte {
	begin := len(dst)
	event := append(append(dst, make([]byte, ws.MaxHeader)...), replayStart...)
	for first := true; len(frames) > 0; {
		var message []byte
		if message, frames = ws.Cut(frames); !bytes.HasPrefix(message, []byte(messageStart)) {
			continue
		}
		if !first {
			event = append(event, ',') // in the place of a header
		}
		event, first = append(event, message...), false
	}
	event = append(event, replayEnd...)
	size := len(event) - begin - ws.MaxHeader
	header := len(ws.AppendHeader(event[:begin], ws.TextMessage, size)) - begin
	return append(event[:begin+header], event[begin+ws.MaxHeader:]...)
}

// appendMessage appends a message event. It does not use encoding/json, because it runs under the hub's lock for each
// message of a hub with events.
func appendMessage(dst []byte, m *Message) []byte {
	dst = append(dst, messageStart...)
	dst = strconv.AppendUint(dst, m.Seq, 10)
	dst = append(dst, `,"time":"`...)
	dst = m.At.UTC().AppendFormat(dst, timeLayout)
	dst = append(dst, '"')
	if m.Sender != 0 {
		dst = append(dst, `,"client":"`...)
		dst = m.Sender.Append(dst)
		dst = append(dst, '"')
	}
	dst = append(dst, `,"user":`...)
	dst = AppendJSONString(dst, m.User)
	if m.Opcode == ws.BinaryMessage {
		dst = append(dst, `,"data64":"`...)
		dst = base64.StdEncoding.AppendEncode(dst, m.Payload)
		return append(dst, `"}`...)
	}
	dst = append(dst, `,"data":`...)
	dst = AppendJSONString(dst, m.Payload)
	return append(dst, '}')
}

// AppendJSONString appends s, which must be UTF-8, as a JSON string. It escapes only the characters that JSON demands
// (RFC 8259 §7).
func AppendJSONString[T string | []byte](dst []byte, s T) []byte {
	const hex = "0123456789abcdef"
	dst = append(dst, '"')
	from := 0 // the first byte that is not appended yet
	for i := range len(s) {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' {
			continue
		}
		dst = append(dst, s[from:i]...)
		from = i + 1
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		case '\n':
			dst = append(dst, `\n`...)
		default:
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&0xf])
		}
	}
	dst = append(dst, s[from:]...)
	return append(dst, '"')
}

// JSONSize returns about how many bytes AppendJSONString appends for s and a comma: at least as many, and more if s has line
// feeds.
func JSONSize(s string) int {
	n := len(s) + 3 // the quotes and the comma
	for i := range len(s) {
		switch {
		case s[i] < ' ':
			n += 5
		case s[i] == '"' || s[i] == '\\':
			n++
		}
	}
	return n
}
