package feed

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// lines is an encoder of a third kind: a block of text lines for each message, with an empty line behind it, as a stream
// over HTTP might have. Its notices name the users that have joined, and not those that have left.
type lines struct{ buf bytes.Buffer }

// Message implements Encoder.
func (l *lines) Message(m *Message) (head, body []byte) {
	l.buf.Reset()
	fmt.Fprintf(&l.buf, "id: %d\nuser: %s\ndata: %s\n\n", m.Seq, m.User, m.Payload)
	return nil, l.buf.Bytes()
}

// Notice implements Encoder.
func (l *lines) Notice(n *Notice) (head, body []byte, ok bool) {
	if len(n.Joined) == 0 {
		return nil, nil, false
	}
	l.buf.Reset()
	fmt.Fprintf(&l.buf, "joined: %s\n\n", strings.Join(n.Joined, " "))
	return []byte("event: presence\n"), l.buf.Bytes(), true
}

// A kind is an encoder, and what its frames must be.
type kind struct {
	name    string
	encoder func() Encoder
	message func(t *testing.T, m *Message) string
	notice  func(t *testing.T, n *Notice) string // "" for none
}

var kinds = []kind{
	{
		"raw", NewRaw,
		func(_ *testing.T, m *Message) string { return string(ws.AppendFrame(nil, m.Opcode, m.Payload)) },
		func(*testing.T, *Notice) string { return "" },
	},
	{
		"events", NewEvents,
		func(t *testing.T, m *Message) string {
			return string(ws.AppendFrame(nil, ws.TextMessage, []byte(wantEvent(t, m))))
		},
		func(_ *testing.T, n *Notice) string {
			event := fmt.Sprintf(`{"type":"presence","clients":%d}`, n.Clients)
			switch {
			case len(n.Joined) == 1:
				event = fmt.Sprintf(`{"type":"join","user":"%s","clients":%d}`, n.Joined[0], n.Clients)
			case len(n.Left) == 1:
				event = fmt.Sprintf(`{"type":"leave","user":"%s","clients":%d}`, n.Left[0], n.Clients)
			}
			return string(ws.AppendFrame(nil, ws.TextMessage, []byte(event)))
		},
	},
	{
		"lines", func() Encoder { return new(lines) },
		func(_ *testing.T, m *Message) string {
			return fmt.Sprintf("id: %d\nuser: %s\ndata: %s\n\n", m.Seq, m.User, m.Payload)
		},
		func(_ *testing.T, n *Notice) string {
			if len(n.Joined) == 0 {
				return ""
			}
			return "event: presence\njoined: " + n.Joined[0] + "\n\n"
		},
	},
}

// A feedModel is the simplest correct feed: it keeps every frame that was ever appended, by its position.
type feedModel struct {
	t         *testing.T
	kind      kind
	feed      *Feed
	base      uint64
	messages  int // the bounds
	maxBytes  int
	frames    []modelFrame
	forgotten uint64 // by Trim, Retain, Recycle and Squeeze
	appended  uint64 // messages
}

type modelFrame struct {
	bytes  string
	notice bool
	before uint64 // how many messages of the hub come before it
}

func newFeedModel(t *testing.T, k kind, base uint64, messages, maxBytes int) *feedModel {
	m := &feedModel{t: t, kind: k, feed: New(k.encoder(), base), base: base, messages: messages, maxBytes: maxBytes}
	m.feed.Grow(messages, maxBytes)
	return m
}

// add notes a frame that was appended, and checks what the feed has dropped for it. kept is how many notices the feed had
// before.
func (m *feedModel) add(position uint64, frame string, notice bool, tail uint64, kept int) {
	if want := uint64(len(m.frames)); position != want {
		m.t.Fatalf("%s: got position %d, want %d", m.kind.name, position, want)
	}
	m.frames = append(m.frames, modelFrame{frame, notice, m.base + m.appended})
	if notice {
		kept++
	} else {
		m.appended++
	}
	if got := int(m.feed.Head() - m.feed.Tail()); got > 1 && got > m.messages+kept {
		m.t.Fatalf("%s: keeps %d frames, want %d messages and %d notices at most", m.kind.name, got, m.messages, kept)
	}
	if got := int(m.feed.Head() - m.feed.Tail()); got > 1 && m.feed.Bytes() > m.maxBytes {
		m.t.Fatalf("%s: keeps %d bytes, want %d at most", m.kind.name, m.feed.Bytes(), m.maxBytes)
	}
	if m.feed.Tail() == tail { // nothing was dropped
		return
	}
	messages, size := 0, 0
	for _, f := range m.frames[m.feed.Tail()-1:] {
		size += len(f.bytes) + indexSize
		if !f.notice {
			messages++
		}
	}
	if messages <= m.messages && size <= m.maxBytes {
		m.t.Fatalf("%s: dropped frame %d, with which there were %d messages in %d bytes: it had room for %d in %d",
			m.kind.name, m.feed.Tail()-1, messages, size, m.messages, m.maxBytes)
	}
}

func (m *feedModel) keptNotices() (n int) {
	for _, f := range m.frames[m.feed.Tail():] {
		if f.notice {
			n++
		}
	}
	return n
}

// appendMessage appends a message to the feed and to the model.
func (m *feedModel) appendMessage(message Message) {
	message.Seq = m.base + m.appended + 1
	tail, kept := m.feed.Tail(), m.keptNotices()
	m.add(m.feed.AppendMessage(&message), m.kind.message(m.t, &message), false, tail, kept)
}

// appendNotice appends a notice to the feed and to the model, if its kind has such a notice.
func (m *feedModel) appendNotice(n *Notice) {
	want := m.kind.notice(m.t, n)
	tail, kept := m.feed.Tail(), m.keptNotices()
	position, ok := m.feed.AppendNotice(n)
	if ok != (want != "") {
		m.t.Fatalf("%s: appended %t, want %t", m.kind.name, ok, want != "")
	}
	if ok {
		m.add(position, want, true, tail, kept)
	}
}

// squeeze squeezes the feed, as if every reader were at the head. The messages must be the same, and either all notices must
// be, or none.
func (m *feedModel) squeeze() {
	tail := m.feed.Tail()
	m.feed.Squeeze()
	if len(m.feed.notices) > 0 {
		return
	}
	var messages []modelFrame
	for _, f := range m.frames[tail:] {
		if !f.notice {
			messages = append(messages, f)
		}
	}
	m.forgotten = m.feed.Head() - uint64(len(messages))
	copy(m.frames[m.forgotten:], messages)
}

// check compares the feed with the model.
func (m *feedModel) check() {
	m.t.Helper()
	f := m.feed
	if f.Head() != uint64(len(m.frames)) || f.Tail() < m.forgotten {
		m.t.Fatalf("%s: got frames %d to %d, want up to %d, and none before %d", m.kind.name, f.Tail(), f.Head(), len(m.frames), m.forgotten)
	}
	var ranges []Range
	for position := m.forgotten; position < f.Head(); position++ {
		frame := m.frames[position]
		if got := f.Seq(position); got != frame.before {
			m.t.Fatalf("%s: got %d messages before position %d, want %d", m.kind.name, got, position, frame.before)
		}
		if position < f.Tail() {
			continue
		}
		if !frame.notice {
			if got := f.Position(frame.before); got != position {
				m.t.Fatalf("%s: got position %d for the message after %d others, want %d", m.kind.name, got, frame.before, position)
			}
		} else if n := len(ranges); n > 0 && ranges[n-1].End == position {
			ranges[n-1].End++
		} else {
			ranges = append(ranges, Range{position, position + 1})
		}
		if got := string(f.frame(position)); got != frame.bytes {
			m.t.Fatalf("%s: got frame %q at position %d, want %q", m.kind.name, got, position, frame.bytes)
		}
	}
	if got, want := f.Seq(f.Head()), m.base+m.appended; got != want {
		m.t.Fatalf("%s: got %d messages before the head, want %d", m.kind.name, got, want)
	}
	if got, want := f.Position(m.base+m.appended), f.Head(); got > want || f.Seq(got) != m.base+m.appended {
		m.t.Fatalf("%s: got position %d for the next message, want one up to %d", m.kind.name, got, want)
	}
	if got := f.Notices(f.Tail()); !slices.Equal(got, ranges) {
		m.t.Fatalf("%s: got notices at %v, want %v", m.kind.name, got, ranges)
	}
}

// checkFeeds drives feeds of all kinds with the same operations, two bytes each. The second feed begins late.
func checkFeeds(t *testing.T, messages, maxBytes int, operations []byte) {
	t.Helper()
	var feeds []*feedModel
	for i, k := range kinds {
		feeds = append(feeds, newFeedModel(t, k, uint64(7*i), messages, maxBytes))
	}
	for ; len(operations) >= 2; operations = operations[2:] {
		n := int(operations[1])
		for _, m := range feeds {
			f := m.feed
			switch operations[0] % 9 {
			case 0, 1, 2:
				text := strings.Repeat("x", n*n/64)
				m.appendMessage(Message{At: noon, Sender: ClientID(n), User: "ada", Opcode: ws.TextMessage, Payload: []byte(text)})
			case 3:
				m.appendNotice(&Notice{Clients: n, Joined: []string{strings.Repeat("a", n)}})
			case 4:
				m.appendNotice(&Notice{Clients: n, Left: []string{"bob"}})
			case 5:
				m.appendNotice(&Notice{Clients: n})
			case 6:
				m.forgotten = max(m.forgotten, f.Tail()+(f.Head()-f.Tail())*uint64(n)/255)
				if n%2 == 0 {
					f.Trim(m.forgotten)
				} else {
					f.Retain(max(m.forgotten, f.Tail()))
				}
			case 7:
				m.squeeze()
			case 8:
				if n%8 == 0 {
					f.Recycle()
					m.forgotten = f.Head()
				}
			}
			m.check()
		}
	}
}

func FuzzFeed(f *testing.F) {
	f.Add(uint8(10), uint16(4000), []byte("\x00\x10\x03\x05\x04\x00\x05\x09\x01\x00\x07\x00\x02\x20\x06\x40\x03\x20\x03\x20\x03\x20\x07\x00\x00\x00"))
	f.Add(uint8(2), uint16(65535), bytes.Repeat([]byte("\x03\x05\x03\x06\x00\x10\x04\x00\x01\x80"), 30))
	f.Add(uint8(50), uint16(300), bytes.Repeat([]byte("\x00\x30\x03\x09\x05\x01\x06\x20\x06\x21\x07\x00\x08\x08\x02\xff"), 20))
	f.Add(uint8(3), uint16(1000), bytes.Repeat([]byte("\x03\x40\x03\x40\x00\x01\x07\x00\x00\x02"), 30))
	f.Fuzz(func(t *testing.T, messages uint8, maxBytes uint16, operations []byte) {
		checkFeeds(t, int(messages)+1, int(maxBytes)+1, operations[:min(len(operations), 200)])
	})
}

// TestFeed_EachKindOfClientHasItsOwnPositions has the same three messages and two notices in feeds of three kinds.
func TestFeed_EachKindOfClientHasItsOwnPositions(t *testing.T) {
	const base = 5
	type positions struct {
		messages []uint64
		notices  []Range
		head     uint64
	}
	want := map[string]positions{
		"raw":    {[]uint64{0, 1, 2}, nil, 3},
		"events": {[]uint64{0, 3, 4}, []Range{{1, 3}}, 5},
		"lines":  {[]uint64{0, 2, 3}, []Range{{1, 2}}, 4},
	}
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			m := newFeedModel(t, k, base, 10, 1<<20)
			m.appendMessage(Message{At: noon, Sender: 1, User: "ada", Opcode: ws.TextMessage, Payload: []byte("one")})
			m.appendNotice(&Notice{Clients: 2, Joined: []string{"bob"}})
			m.appendNotice(&Notice{Clients: 1, Left: []string{"bob"}})
			m.appendMessage(Message{At: noon, Sender: 1, User: "ada", Opcode: ws.TextMessage, Payload: []byte("two")})
			m.appendMessage(Message{At: noon, Opcode: ws.BinaryMessage, Payload: []byte("three")})
			m.check()
			got := positions{notices: m.feed.Notices(0), head: m.feed.Head()}
			for seq := range uint64(3) {
				got.messages = append(got.messages, m.feed.Position(base+seq))
			}
			want := want[k.name]
			if !slices.Equal(got.messages, want.messages) || !slices.Equal(got.notices, want.notices) || got.head != want.head {
				t.Errorf("got %+v, want %+v", got, want)
			}
			if got := m.feed.Notices(2); k.name == "events" && !slices.Equal(got, []Range{{2, 3}}) || k.name != "events" && got != nil {
				t.Errorf("got notices %v from position 2 on", got)
			}
		})
	}
}

// TestFeed_RawPositionsAreNumbers holds for a raw feed that begins with its hub.
func TestFeed_RawPositionsAreNumbers(t *testing.T) {
	f := New(NewRaw(), 0)
	f.Grow(10, 1<<20)
	for i := range uint64(100) {
		payload := []byte(fmt.Sprint("message ", i))
		if got := f.AppendMessage(&Message{Seq: i + 1, Opcode: ws.BinaryMessage, Payload: payload}); got != i {
			t.Fatalf("got position %d, want %d", got, i)
		}
		if f.Seq(i) != i || f.Position(i) != i || f.Notices(0) != nil {
			t.Fatalf("got number %d and position %d, want %d", f.Seq(i), f.Position(i), i)
		}
		if opcode, got := f.Payload(i); opcode != ws.BinaryMessage || !bytes.Equal(got, payload) {
			t.Fatalf("got opcode %d with %q, want a binary message with %q", opcode, got, payload)
		}
	}
	if f.Head()-f.Tail() != 10 {
		t.Errorf("got %d messages kept, want 10", f.Head()-f.Tail())
	}
}

// TestFeed_KnowsNumbersAndPositions has more notices than a feed remembers, and forgets some at times.
func TestFeed_KnowsNumbersAndPositions(t *testing.T) {
	f := New(NewEvents(), 7)
	f.Grow(50, 1<<20)
	seq, numbers := uint64(7), []uint64{}
	for i := range 5 * maxPassed {
		numbers = append(numbers, seq) // messages before the frame
		if i%3 == 0 {
			f.AppendMessage(&Message{Seq: seq + 1})
			seq++
		} else if _, ok := f.AppendNotice(&Notice{}); !ok {
			t.Fatal("a notice was not appended")
		}
		if i%1000 == 999 {
			f.Retain(f.Head() - 10)
		}
		if f.Head()-f.Tail() > 3*50+3 {
			t.Fatalf("got %d frames kept, want 50 messages and the notices between them", f.Head()-f.Tail())
		}
		for at := f.Head() - min(f.Head(), maxPassed); at < f.Head(); at += 7 {
			if got := f.Seq(at); got != numbers[at] {
				t.Fatalf("at %d of %d: got number %d, want %d", at, f.Head(), got, numbers[at])
			}
			if at >= f.Tail() && at%3 == 0 && f.Position(numbers[at]) != at {
				t.Fatalf("message %d: got position %d, want %d", numbers[at], f.Position(numbers[at]), at)
			}
		}
	}
	if got := len(f.notices); got > maxPassed+2*50+2 {
		t.Errorf("got %d notices remembered, want %d before the tail at most", got, maxPassed)
	}
}

func TestFeed_GrowNeverLowersABound(t *testing.T) {
	f := New(NewEvents(), 0)
	f.Grow(10, 1000)
	f.AppendNotice(&Notice{Clients: 1})
	f.Grow(20, 500)
	f.Grow(5, 700)
	if f.maxMessages != 20+1 || f.maxBytes != 1000 {
		t.Errorf("got bounds of %d frames and %d bytes, want 20 messages and a notice, and 1000", f.maxMessages, f.maxBytes)
	}
}

// TestFeed_SqueezeDropsNoticesThatTakeMuch has notices that take a quarter of the bytes, and then a little more.
func TestFeed_SqueezeDropsNoticesThatTakeMuch(t *testing.T) {
	f := New(NewEvents(), 0)
	f.Grow(100, 1<<20)
	f.AppendNotice(&Notice{Clients: 1})
	notice := f.Bytes()
	for f.Bytes() < 4*notice {
		f.AppendMessage(&Message{Opcode: ws.TextMessage, Payload: []byte("x")})
	}
	messages := f.Seq(f.Head())
	f.Squeeze()
	if got := len(f.Notices(0)); got != 1 {
		t.Errorf("got %d notices, want the one that takes no more than a quarter", got)
	}
	for range 3 {
		f.AppendNotice(&Notice{Clients: 1})
	}
	head := f.Head()
	f.Squeeze()
	if got := f.Notices(0); got != nil {
		t.Errorf("got notices at %v, want none", got)
	}
	if f.Head() != head || f.Seq(head) != messages || f.Head()-f.Tail() != messages || f.maxMessages != 100 {
		t.Errorf("got %d frames up to %d of %d messages, want %d up to %d", f.Head()-f.Tail(), f.Head(), f.Seq(head), messages, head)
	}
}

// TestFeed_KeepsNothingOfAMessage has the caller reuse the message and its payload.
func TestFeed_KeepsNothingOfAMessage(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			f := New(k.encoder(), 0)
			f.Grow(10, 1<<20)
			m := Message{Seq: 1, At: noon, Sender: 1, User: "ada", Opcode: ws.TextMessage, Payload: []byte("one")}
			want := k.message(t, &m)
			f.AppendMessage(&m)
			copy(m.Payload, "two")
			m.Seq, m.User = 2, "bob"
			if got := string(f.frame(0)); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
			if f.message.Payload != nil || f.message.User != "" {
				t.Errorf("the feed holds on to %+v", f.message)
			}
		})
	}
}

func TestFeed_AppendMessageAllocatesNothing(t *testing.T) {
	for _, k := range kinds[:2] {
		t.Run(k.name, func(t *testing.T) {
			f := New(k.encoder(), 0)
			f.Grow(defaultMessages, defaultBytes)
			f.SetSpare(func() int { return 1 << 20 })
			payload := bytes.Repeat([]byte("x"), 128)
			seq := uint64(0)
			appendOne := func() {
				seq++
				m := Message{Seq: seq, At: noon, Sender: 1, User: "ada", Opcode: ws.TextMessage, Payload: payload}
				f.AppendMessage(&m)
			}
			for range 2 * defaultMessages {
				appendOne()
			}
			if got := testing.AllocsPerRun(2000, appendOne); got > 0 {
				t.Errorf("got %.1f allocations a message, want none", got)
			}
		})
	}
}

// BenchmarkFeed appends messages to feeds that drop as many.
func BenchmarkFeed(b *testing.B) {
	for _, k := range kinds[:2] {
		for _, size := range []int{16, 128, 1024, 65536} {
			b.Run(fmt.Sprintf("kind=%s/size=%d", k.name, size), func(b *testing.B) {
				f := New(k.encoder(), 0)
				f.Grow(defaultMessages, defaultBytes)
				payload, at := bytes.Repeat([]byte("x"), size), time.Now()
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for seq := uint64(1); b.Loop(); seq++ {
					m := Message{Seq: seq, At: at, Sender: 1e15, User: "ada", Opcode: ws.TextMessage, Payload: payload}
					f.AppendMessage(&m)
				}
			})
		}
	}
}
