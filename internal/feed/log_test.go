package feed

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// What a hub has by default.
const (
	defaultMessages    = 256
	defaultBytes       = 1 << 20
	defaultMessageSize = 64 << 10
)

// appendPayload appends a binary WebSocket frame to a log.
func appendPayload(l *Log, payload []byte) (position uint64) {
	return l.Append(ws.AppendHeader(nil, ws.BinaryMessage, len(payload)), payload)
}

// A logModel is the simplest correct log: it keeps every frame that was ever appended.
type logModel struct {
	maxMessages, maxBytes int
	frames                [][]byte
	forgotten             uint64 // by Recycle, Retain, Trim and Compact
}

// tail is the position of the oldest frame that the log must have.
func (m *logModel) tail() uint64 {
	tail, bytes := uint64(len(m.frames)), 0
	for tail > m.forgotten {
		bytes += len(m.frames[tail-1]) + indexSize
		newest := tail == uint64(len(m.frames))
		if !newest && (bytes > m.maxBytes || len(m.frames)-int(tail)+1 > m.maxMessages) {
			break
		}
		tail--
	}
	return tail
}

// within is the oldest position such that the frames from there on take at most maxBytes, or that of the newest frame.
func (m *logModel) within(maxBytes int) uint64 {
	tail, oldest := m.tail(), uint64(len(m.frames))
	for oldest > tail {
		maxBytes -= len(m.frames[oldest-1]) + indexSize
		if newest := oldest == uint64(len(m.frames)); !newest && maxBytes < 0 {
			break
		}
		oldest--
	}
	return oldest
}

// omit forgets some of the frames, as many as the given number says, and has those before them move up. It returns their
// positions.
func (m *logModel) omit(some uint64) (omitted []uint64) {
	var kept [][]byte
	tail := m.tail()
	for position := tail; position < uint64(len(m.frames)); position++ {
		if (position*position+some)%5 < some%6 {
			omitted = append(omitted, position)
		} else {
			kept = append(kept, m.frames[position])
		}
	}
	m.forgotten = tail + uint64(len(omitted))
	copy(m.frames[m.forgotten:], kept)
	return omitted
}

// A logReader is a client of the model test. It pins a batch and checks it when it lets go.
type logReader struct {
	cursor uint64
	pinned *Segment
	frames []byte
	want   []byte
}

// checkLog drives a log and its model with the same operations, three bytes each.
func checkLog(t *testing.T, maxMessages, maxBytes int, operations []byte) {
	t.Helper()
	l, m := new(Log), &logModel{maxMessages: maxMessages, maxBytes: maxBytes}
	l.Grow(maxMessages, maxBytes)
	var readers [4]logReader
	unpin := func(r *logReader) {
		if r.pinned == nil {
			return
		}
		if !bytes.Equal(r.frames, r.want) {
			t.Fatalf("the %d bytes before frame %d changed while they were pinned", len(r.want), r.cursor)
		}
		l.Unpin(r.pinned)
		r.pinned = nil
	}
	for ; len(operations) >= 3; operations = operations[3:] {
		r := &readers[operations[1]%4]
		switch size := int(binary.BigEndian.Uint16(operations[1:])); operations[0] % 4 {
		case 0, 1: // append
			payload := bytes.Repeat(operations[:1], size%5000)
			if operations[0]&0x80 != 0 {
				payload = bytes.Repeat(operations[:1], size*2)
			}
			if position := appendPayload(l, payload); position != uint64(len(m.frames)) {
				t.Fatalf("Append: got position %d, want %d", position, len(m.frames))
			}
			m.frames = append(m.frames, ws.AppendFrame(nil, ws.BinaryMessage, payload))
		case 2: // take a batch, as a writer does
			unpin(r)
			r.cursor = max(r.cursor, m.tail())
			if r.cursor == l.Head() {
				break
			}
			s, frames, n := l.Next(r.cursor, l.Head())
			if n == 0 {
				t.Fatalf("Next(%d): got no frames before the head %d", r.cursor, l.Head())
			}
			if most := size % 5000; operations[0]&0x80 != 0 {
				l.Unpin(s)
				all := n
				s, frames, n = l.NextWithin(r.cursor, l.Head(), most)
				if n > 1 && len(frames) > most || n < all && len(frames)+len(m.frames[r.cursor+uint64(n)]) <= most {
					t.Fatalf("NextWithin: got %d of %d frames with %d bytes, want as many as have at most %d", n, all, len(frames), most)
				}
			}
			r.pinned, r.frames = s, frames
			r.want = bytes.Join(m.frames[r.cursor:r.cursor+uint64(n)], nil)
			r.cursor += uint64(n)
			if !bytes.Equal(r.frames, r.want) {
				t.Fatalf("Next: got %d bytes before frame %d, want %d others", len(frames), r.cursor, len(r.want))
			}
			if n > 1 && len(frames) > MaxWrite {
				t.Fatalf("Next: got %d bytes in %d frames, want at most %d", len(frames), n, MaxWrite)
			}
		case 3: // let go, and once every reader is at the head recycle, omit or retain some
			unpin(r)
			idle := true
			for i := range readers {
				idle = idle && readers[i].pinned == nil && readers[i].cursor == l.Head()
			}
			switch {
			case !idle:
			case size%3 == 0:
				l.Recycle()
				m.forgotten = l.Head()
			case size%3 == 1:
				l.Compact(m.omit(uint64(size)))
			default:
				m.forgotten = m.tail() + uint64(size)%(l.Head()-m.tail()+1)
				l.Retain(m.forgotten)
				if got := held(l.segments); got > 3*l.Bytes()+2*segmentSizes[1] {
					t.Fatalf("got %d bytes in segments for %d retained", got, l.Bytes())
				}
			}
		}
		checkBounds(t, l, m)
	}
	for i := range readers {
		unpin(&readers[i])
	}
	if len(l.stranded) > 0 || l.Memory() != l.Capacity() {
		t.Fatalf("%d segments are stranded with nobody pinning them", len(l.stranded))
	}
}

func checkBounds(t *testing.T, l *Log, m *logModel) {
	t.Helper()
	if l.Head() != uint64(len(m.frames)) || l.Tail() != m.tail() {
		t.Fatalf("got frames %d to %d, want %d to %d", l.Tail(), l.Head(), m.tail(), len(m.frames))
	}
	want := 0
	for _, f := range m.frames[l.Tail():] {
		want += len(f) + indexSize
	}
	capacity, stranded := 0, 0
	for _, s := range l.segments {
		capacity += s.Capacity()
	}
	for _, s := range l.stranded {
		stranded += s.Capacity()
	}
	if l.Capacity() != capacity || l.Memory() != capacity+stranded {
		t.Fatalf("got a capacity of %d bytes and a memory of %d, want %d and %d", l.Capacity(), l.Memory(), capacity, capacity+stranded)
	}
	if l.Bytes() != want {
		t.Fatalf("got %d retained bytes, want %d", l.Bytes(), want)
	}
	for _, bytes := range []int{0, want / 3, want} {
		if got, want := l.Within(bytes), m.within(bytes); got != want {
			t.Fatalf("got frame %d as the oldest within %d bytes, want %d", got, bytes, want)
		}
	}
	for _, cursor := range []uint64{l.Tail(), (l.Tail() + l.Head()) / 2, l.Head()} {
		want := len(bytes.Join(m.frames[cursor:], nil))
		if got := l.BytesFrom(cursor); got != want {
			t.Fatalf("got %d bytes from frame %d on, want %d", got, cursor, want)
		}
	}
	newest := 0
	if len(m.frames) > 0 {
		newest = len(m.frames[len(m.frames)-1])
	}
	// Two neighbors hold more than one of them has room for. The ends and append's spare indexes come to that.
	most := 2*l.Bytes() + 2*max(l.maxBytes/8, segmentSizes[0]) + 2*newest + 2*indexSize*int(l.Head()-l.Tail())
	if got := held(l.segments); got > most {
		t.Fatalf("got %d bytes in segments for %d retained, want at most %d", got, l.Bytes(), most)
	}
}

func FuzzLog(f *testing.F) {
	f.Add(uint8(4), uint16(1000), []byte("\x00\x00\x10\x02\x00\x00\x00\x01\x00\x03\x00\x00"))
	f.Add(uint8(255), uint16(65535), bytes.Repeat([]byte("\x00\x10\x00\x02\x01\x00\x80\x70\x00\x03\x01\x00"), 40))
	f.Add(uint8(0), uint16(0), bytes.Repeat([]byte("\x80\xff\x00\x02\x00\x00"), 20))
	f.Fuzz(func(t *testing.T, messages uint8, size uint16, operations []byte) {
		checkLog(t, int(messages)+1, int(size)*8+1, operations[:min(len(operations), 600)])
	})
}

func TestLog_KeepsTheNewestMessageHoweverLarge(t *testing.T) {
	l := new(Log)
	l.Grow(10, 100)
	appendPayload(l, []byte("small"))
	appendPayload(l, bytes.Repeat([]byte("x"), 100_000))
	if l.Tail() != 1 || l.Head() != 2 {
		t.Fatalf("got messages %d to %d, want 1 to 2", l.Tail(), l.Head())
	}
	_, frames, n := l.Next(1, 2)
	if n != 1 || len(frames) != ws.FrameSize(100_000) {
		t.Errorf("got %d messages in %d bytes, want 1 in %d", n, len(frames), ws.FrameSize(100_000))
	}
}

func TestLog_NamesTheOldestSegmentWhenTooMuchIsStranded(t *testing.T) {
	l := new(Log)
	l.Grow(1, 64<<10)
	var pinned []*Segment
	for range 20 { // each message fills a segment, each of which somebody pins
		position := appendPayload(l, make([]byte, 8000))
		s, _, _ := l.Next(position, l.Head())
		pinned = append(pinned, s)
		if l.Overstranded() != nil {
			break
		}
	}
	if got := l.Overstranded(); got != pinned[0] {
		t.Fatalf("after %d pinned segments of 8 kB: got segment %p, want the oldest, %p", len(pinned), got, pinned[0])
	}
	if got := len(pinned); got > 18 {
		t.Errorf("got %d segments of 8 kB before one is named, want at most what twice a buffer of 64 KiB holds", got)
	}
	for _, s := range pinned { // several may be one
		if s == pinned[0] {
			l.Unpin(s)
		}
	}
	if got := l.Overstranded(); got != nil && got == pinned[0] {
		t.Error("got a segment that nobody pins")
	}
}

func TestLog_RecycledHoldsNoMemory(t *testing.T) {
	l := new(Log)
	l.Grow(1000, 1<<20)
	for range 100 {
		appendPayload(l, []byte(strings.Repeat("x", 1000)))
	}
	l.Recycle()
	if len(l.segments) != 0 || l.Bytes() != 0 || l.Memory() != 0 || l.Tail() != l.Head() {
		t.Errorf("got %d segments, %d bytes, messages %d to %d, want none", len(l.segments), l.Bytes(), l.Tail(), l.Head())
	}
}

func TestLog_GrowNeverLowersABound(t *testing.T) {
	l := new(Log)
	l.Grow(10, 1000)
	l.Grow(20, 500)
	l.Grow(5, 700)
	if l.maxMessages != 20 || l.maxBytes != 1000 {
		t.Errorf("got bounds of %d messages and %d bytes, want 20 and 1000", l.maxMessages, l.maxBytes)
	}
}

func TestLog_TrimDropsTheFramesBefore(t *testing.T) {
	l := new(Log)
	l.Grow(100, 1<<20)
	for range 10 {
		appendPayload(l, make([]byte, 500))
	}
	l.Trim(7)
	if l.Tail() != 7 || l.Head() != 10 || l.Bytes() != 3*(ws.FrameSize(500)+indexSize) {
		t.Errorf("got frames %d to %d in %d bytes, want 7 to 10", l.Tail(), l.Head(), l.Bytes())
	}
	l.Trim(3) // has no effect
	if l.Tail() != 7 {
		t.Errorf("got frames from %d on, want still from 7 on", l.Tail())
	}
}

// TestLog_KeepsLessWhileAllLogsTakeMuch lowers the memory that is left for all logs together.
func TestLog_KeepsLessWhileAllLogsTakeMuch(t *testing.T) {
	const size, history = 1000, 200_000
	l, left := new(Log), 1<<30
	l.Grow(1_000_000, 1<<20)
	l.SetHistory(history)
	l.SetSpare(func() int { return left })
	keeps := func(most int) {
		t.Helper()
		for range 1<<20/size + 1 {
			appendPayload(l, make([]byte, size))
		}
		if got := l.Bytes(); got > most || got < most-2*size {
			t.Errorf("with %d bytes left for all: got %d bytes kept, want %d", left, got, most)
		}
	}
	keeps(1 << 20)
	left = 500_000
	keeps(history + 500_000)
	left = 0
	keeps(history + minBuffer)
	l.SetSpare(nil)
	keeps(1 << 20)
}

func TestLog_IsAheadFromAQuarterOfItsBoundsOn(t *testing.T) {
	for _, tc := range []struct {
		name          string
		messages      int
		size          int // of a payload
		left, history int
		want          int // frames until the log is ahead
	}{
		{"messages", 100, 10, 1 << 30, 0, 26},
		{"bytes", 1000, 10_000, 1 << 30, 0, 1<<18/ws.FrameSize(10_000) + 1},
		{"bytes while all logs take much", 1000, 10_000, 0, 0, minBuffer/4/ws.FrameSize(10_000) + 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := new(Log)
			l.Grow(tc.messages, 1<<20)
			l.SetHistory(tc.history)
			l.SetSpare(func() int { return tc.left })
			for range 2 {
				got := 0
				for ; !l.Ahead(); got++ {
					appendPayload(l, make([]byte, tc.size))
				}
				if got != tc.want {
					t.Errorf("ahead after %d frames, want %d", got, tc.want)
				}
				l.CaughtUp()
			}
			appendPayload(l, make([]byte, 1))
			l.Recycle()
			if l.Ahead() {
				t.Error("ahead with nothing in it")
			}
		})
	}
}

func TestLog_BusySpellStartsWithALargerSegment(t *testing.T) {
	l := new(Log)
	l.Grow(1000, 1<<20)
	spell := func() int {
		for range 100 {
			appendPayload(l, make([]byte, 100))
		}
		n := len(l.segments)
		l.Recycle()
		return n
	}
	if first, second := spell(), spell(); first < 2 || second != 1 {
		t.Errorf("got %d segments in the first spell and %d in the second, want several and one", first, second)
	}
}

// BenchmarkLog appends messages and reads them back as one writer that has fallen a little behind.
func BenchmarkLog(b *testing.B) {
	for _, size := range []int{16, 128, 1024, 65536} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			f := New(NewRaw(), 0)
			f.Grow(defaultMessages, defaultBytes)
			m := Message{Opcode: ws.BinaryMessage, Payload: make([]byte, size)}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				f.AppendMessage(&m)
				if i%8 == 7 {
					for cursor := f.Head() - 8; cursor < f.Head(); {
						s, _, n := f.Next(cursor, f.Head())
						cursor += uint64(n)
						f.Unpin(s)
					}
				}
			}
		})
	}
}

func TestLog_MessageOfTheDefaultMaximumSizeIsPooled(t *testing.T) {
	l := new(Log)
	l.Grow(defaultMessages, defaultBytes)
	appendPayload(l, make([]byte, defaultMessageSize))
	if got := l.segments[0].Capacity(); got != segmentSizes[len(segmentSizes)-1] {
		t.Errorf("got a segment of %d bytes, which no pool takes back", got)
	}
}

func TestLog_RefusesAFrameThatItCannotIndex(t *testing.T) {
	checkFrame(MaxFrame)
	defer func() {
		if got := fmt.Sprint(recover()); !strings.Contains(got, "a frame of 4294967296 bytes is longer than the 4294967295 bytes") {
			t.Errorf("got %s", got)
		}
	}()
	checkFrame(MaxFrame + 1)
}
