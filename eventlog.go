package chatbroadcast

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"slices"
	"sort"
	"strconv"
	"time"

	"github.com/gorilla/websocket"
)

// An eventLog has the messages of a hub as the events protocol says them, for the clients that speak it. Between the
// messages stand frames that are none: what a hub tells of its presence. Those have no sequence number, so that a
// frame's position here and the number of its message differ.
//
// A hub has one from its first such client on. It needs the hub's lock, as its log does.
type eventLog struct {
	log
	base     uint64    // the number, in the hub's log, of the first message that was appended here
	messages int       // how many it keeps; to maxMessages the frames between them are added
	between  []uint64  // the positions of frames that are no message, from maxPassed before tail on
	dropped  uint64    // how many of those were before these
	passing  int       // about how many bytes such frames have taken since squeeze
	clients  int       // that read from it
	read     time.Time // once there is none: when the last one went
	buf      bytes.Buffer
}

// maxPassed is how many frames before tail that are no message are remembered, to tell those who have lagged how many
// messages they have missed: at one a second, those of a quarter of an hour.
const maxPassed = 1024

// maxEventBuffer bounds what an eventLog keeps to encode the next event in.
const maxEventBuffer = 16 << 10

// grow raises the bounds, of messages and of all bytes; they are never lowered while the hub lives.
func (l *eventLog) grow(messages, maxBytes int) {
	l.messages = max(l.messages, messages)
	l.log.grow(0, maxBytes)
	l.forgetBetween()
}

// appendMessage appends m as the message of the given number, counted from 1.
func (l *eventLog) appendMessage(m *message, seq uint64, at time.Time) (position uint64) {
	l.buf.Reset()
	l.buf.Write(m.appendEvent(l.buf.AvailableBuffer(), seq, at))
	position = l.appendEncoded()
	l.forgetBetween()
	return position
}

// appendBetween appends a frame that is no message.
func (l *eventLog) appendBetween(event any) (position uint64) {
	l.buf.Reset()
	encodeEvent(&l.buf, event)
	l.maxMessages++ // it takes no message's place
	l.passing += l.buf.Len() + maxFrameHeader + indexSize
	position = l.appendEncoded()
	l.between = append(l.between, position)
	l.forgetBetween()
	return position
}

// appendEncoded appends the frame that is in buf.
func (l *eventLog) appendEncoded() (position uint64) {
	position = l.append(websocket.TextMessage, l.buf.Bytes())
	if l.buf.Cap() > maxEventBuffer {
		l.buf = bytes.Buffer{}
	}
	return position
}

// forgetBetween forgets the positions that are long before the tail, and makes room for the frames at the others.
func (l *eventLog) forgetBetween() {
	n, _ := slices.BinarySearch(l.between, l.tail)
	l.maxMessages = l.messages + len(l.between) - n
	if n > maxPassed {
		l.dropped += uint64(n - maxPassed)
		l.between = l.between[n-maxPassed:]
	}
}

// squeeze forgets the frames between the messages, of which who joins gets none, if they take more than a quarter of the bytes:
// so it costs less than it did to append. Nothing may be pinned and every cursor must be at head.
func (l *eventLog) squeeze() {
	if l.passing <= l.bytes/4 {
		return
	}
	l.passing = 0
	n, _ := slices.BinarySearch(l.between, l.tail)
	l.compact(l.between[n:])
	l.dropped += uint64(len(l.between))
	l.between = nil
	l.forgetBetween()
}

// seq returns the number of the message at position, or, where there is none, of the next.
func (l *eventLog) seq(position uint64) uint64 {
	n, _ := slices.BinarySearch(l.between, position)
	return l.base + position - l.dropped - uint64(n)
}

// position returns where the message of the given number is, or will be. The message must not be before the tail.
func (l *eventLog) position(seq uint64) uint64 {
	messages := seq - l.base // before it
	n := sort.Search(len(l.between), func(i int) bool { return l.between[i]-l.dropped-uint64(i) > messages })
	return messages + l.dropped + uint64(n)
}

// gaps returns the positions from cursor on at which no message stands, as ranges.
func (l *eventLog) gaps(cursor uint64) (gaps []seqRange) {
	i, _ := slices.BinarySearch(l.between, cursor)
	for _, p := range l.between[i:] {
		if n := len(gaps); n > 0 && gaps[n-1].end == p {
			gaps[n-1].end++
		} else {
			gaps = append(gaps, seqRange{p, p + 1})
		}
	}
	return gaps
}

// encodeEvent appends an event as JSON.
func encodeEvent(buf *bytes.Buffer, event any) {
	e := json.NewEncoder(buf)
	e.SetEscapeHTML(false)
	if err := e.Encode(event); err != nil {
		panic(err) // events have no fields that cannot be encoded
	}
	buf.Truncate(buf.Len() - 1) // the newline
}

// appendEvent appends m as JSON, as the message of the given number; user and text must be UTF-8. It is what each message
// costs more in a hub with events, under the hub's lock, so it does by hand what takes encoding/json three times as long.
func (m *message) appendEvent(dst []byte, seq uint64, at time.Time) []byte {
	dst = append(dst, `{"type":"message","seq":`...)
	dst = strconv.AppendUint(dst, seq, 10)
	dst = append(dst, `,"time":"`...)
	dst = at.UTC().AppendFormat(dst, timeLayout)
	dst = append(dst, '"')
	if m.sender != 0 {
		dst = append(dst, `,"client":"`...)
		dst = m.sender.append(dst)
		dst = append(dst, '"')
	}
	dst = append(dst, `,"user":`...)
	dst = appendJSONString(dst, m.user)
	if m.opcode == websocket.BinaryMessage {
		dst = append(dst, `,"data64":"`...)
		dst = base64.StdEncoding.AppendEncode(dst, m.payload)
		return append(dst, `"}`...)
	}
	dst = append(dst, `,"data":`...)
	dst = appendJSONString(dst, m.payload)
	return append(dst, '}')
}

// appendJSONString appends s, which must be UTF-8, as a JSON string (RFC 8259 §7).
func appendJSONString[T string | []byte](dst []byte, s T) []byte {
	const hex = "0123456789abcdef"
	dst = append(dst, '"')
	from := 0 // what is not appended yet
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
