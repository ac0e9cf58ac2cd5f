package chatbroadcast

import (
	"bytes"
	"encoding/json"
	"slices"
	"sort"
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

// appendEvent appends a frame of the protocol.
func (l *eventLog) appendEvent(event any) (position uint64) {
	l.buf.Reset()
	encodeEvent(&l.buf, event)
	position = l.append(websocket.TextMessage, l.buf.Bytes())
	if l.buf.Cap() > maxEventBuffer {
		l.buf = bytes.Buffer{}
	}
	return position
}

// appendBetween appends a frame that is no message.
func (l *eventLog) appendBetween(event any) (position uint64) {
	l.maxMessages++ // it takes no message's place
	position = l.appendEvent(event)
	l.between = append(l.between, position)
	l.forgetBetween()
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

// squeeze forgets the frames between the messages, of which who joins gets none. Nothing may be pinned and every cursor must
// be at head.
func (l *eventLog) squeeze() {
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
