// Package feed keeps the recent messages of a hub in the encodings that its clients read.
//
// A Log is a bounded run of frames as they go on the wire. A Feed is a Log with an Encoder, which decides how a frame
// looks and whether notices stand between the messages. A hub has a feed for each kind of client. The package is pure:
// it has no lock, no clock and no I/O.
package feed

import (
	"slices"
	"sort"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A Feed is one encoding of a hub's messages, with notices between them. A notice takes a position but has no number, so a
// position and the number of messages before it differ from the first notice on, and in a feed that began late. Seq and
// Position convert one into the other. In a raw feed with base 0 the two are always the same.
//
// Like a Log, a Feed needs the hub's lock for every method. Make one with New.
type Feed struct {
	Log

	// Clients and LastRead are kept by the hub: how many clients read from the feed and, once that is 0, since when.
	Clients  int
	LastRead time.Time

	encoder Encoder
	raw     *raw    // the encoder if it is raw, called without the interface; or nil
	message Message // the argument of encoder; as a field it needs no allocation for each message

	base     uint64   // how many messages the hub had before the first that was appended here
	messages int      // how many messages the feed keeps; maxMessages of the log also counts the notices between them
	notices  []uint64 // the positions of notices, from maxPassed notices before the tail on
	dropped  uint64   // how many notices there were before these
	noticed  int      // how many bytes the notices since Squeeze have taken
}

// maxPassed is how many notices before the tail a feed remembers, to tell clients that have lagged how many messages they
// have missed. A hub sends at most one notice a second, so these are the notices of a quarter of an hour or more.
const maxPassed = 1024

// New returns an empty feed. base is the number of messages that the hub had before the first that the feed gets.
func New(e Encoder, base uint64) *Feed {
	f := &Feed{encoder: e, base: base}
	f.raw, _ = e.(*raw)
	return f
}

// Grow raises the bounds to the given number of messages, besides the notices between them, and to maxBytes bytes of both. It
// never lowers them.
func (f *Feed) Grow(messages, maxBytes int) {
	f.messages = max(f.messages, messages)
	f.Log.Grow(0, maxBytes)
	f.ForgetNotices()
}

// AppendMessage appends a message and returns its position. It copies the payload and keeps nothing of m.
func (f *Feed) AppendMessage(m *Message) (position uint64) {
	if f.raw != nil {
		return f.Append(f.raw.Message(m))
	}
	f.message = *m
	position = f.Append(f.encoder.Message(&f.message))
	f.message = Message{}
	f.ForgetNotices()
	return position
}

// AppendNotice appends a notice and returns its position. If the clients of the feed get no notices, it appends nothing and
// returns ok = false.
func (f *Feed) AppendNotice(n *Notice) (position uint64, ok bool) {
	head, body, ok := f.encoder.Notice(n)
	if !ok {
		return 0, false
	}
	f.maxMessages++ // it takes no message's place
	f.noticed += len(head) + len(body) + indexSize
	position = f.Append(head, body)
	f.notices = append(f.notices, position)
	f.ForgetNotices()
	return position, true
}

// Trim drops the frames before position to.
func (f *Feed) Trim(to uint64) {
	f.Log.Trim(to)
	f.ForgetNotices()
}

// Skip drops everything, and leaves out the numbers of n messages that the feed will never have.
func (f *Feed) Skip(n uint64) {
	f.Log.Skip(n)
	f.ForgetNotices()
}

// Retain does what Log.Retain does.
func (f *Feed) Retain(from uint64) {
	f.Log.Retain(from)
	f.ForgetNotices()
}

// Recycle does what Log.Recycle does.
func (f *Feed) Recycle() {
	f.Log.Recycle()
	f.ForgetNotices()
}

// ForgetNotices forgets the positions of notices that are long before the tail. It lets the log keep one more frame for
// each notice after the tail, so that notices take no message's place. The other methods of a Feed call it when they
// drop frames.
func (f *Feed) ForgetNotices() {
	n := f.noticesBefore(f.tail)
	f.maxMessages = f.messages + len(f.notices) - n
	if n > maxPassed {
		f.dropped += uint64(n - maxPassed)
		f.notices = f.notices[n-maxPassed:]
	}
}

// Squeeze drops the notices if they take more than a quarter of the bytes: a client that joins needs none. So dropping
// them costs less than appending them did. Nothing may be pinned, and every reader must be at Head.
func (f *Feed) Squeeze() {
	if f.noticed <= f.bytes/4 {
		return
	}
	f.noticed = 0
	f.Compact(f.notices[f.noticesBefore(f.tail):])
	f.dropped += uint64(len(f.notices))
	f.notices = nil
	f.ForgetNotices()
}

// Seq returns how many messages of the hub come before a position: the Message.Seq of the message before it, and one less
// than that of the message at it.
func (f *Feed) Seq(position uint64) uint64 {
	return f.base + position - f.dropped - uint64(f.noticesBefore(position))
}

// noticesBefore returns how many of the remembered notices stand before a position.
func (f *Feed) noticesBefore(position uint64) int {
	if len(f.notices) == 0 {
		return 0
	}
	n, _ := slices.BinarySearch(f.notices, position)
	return n
}

// Position returns the position of the message that has seq messages before it in the hub, or will have. That message
// must not be before the tail.
func (f *Feed) Position(seq uint64) uint64 {
	messages := seq - f.base // before it
	n := sort.Search(len(f.notices), func(i int) bool { return f.notices[i]-f.dropped-uint64(i) > messages })
	return messages + f.dropped + uint64(n)
}

// Notices returns the positions from the given one on at which notices stand.
func (f *Feed) Notices(from uint64) (ranges []Range) {
	for _, p := range f.notices[f.noticesBefore(from):] {
		if n := len(ranges); n > 0 && ranges[n-1].End == p {
			ranges[n-1].End++
		} else {
			ranges = append(ranges, Range{p, p + 1})
		}
	}
	return ranges
}

// Payload returns the opcode and the payload of the message at a retained position of a raw feed. The bytes are the feed's:
// they are valid until it changes, and the caller must not change them.
func (f *Feed) Payload(position uint64) (opcode int, payload []byte) {
	return ws.Parts(f.frame(position))
}
