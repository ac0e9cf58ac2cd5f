package chatbroadcast

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
)

// A logModel is what a log must be, in the plainest way: every frame ever appended.
type logModel struct {
	maxMessages, maxBytes int
	frames                [][]byte
	forgotten             uint64 // by recycling
}

// tail is the sequence number of the oldest frame that must be there.
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

// within is the oldest frame such that it and all after it take at most maxBytes, or the newest.
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
// numbers.
func (m *logModel) omit(some uint64) (omitted []uint64) {
	var kept [][]byte
	tail := m.tail()
	for seq := tail; seq < uint64(len(m.frames)); seq++ {
		if (seq*seq+some)%5 < some%6 {
			omitted = append(omitted, seq)
		} else {
			kept = append(kept, m.frames[seq])
		}
	}
	m.forgotten = tail + uint64(len(omitted))
	copy(m.frames[m.forgotten:], kept)
	return omitted
}

// A logReader is a client of the model test: it pins a batch, and checks it only when it lets go.
type logReader struct {
	cursor uint64
	pinned *segment
	frames []byte
	want   []byte
}

// checkLog drives a log and its model with the same operations, three bytes each.
func checkLog(t *testing.T, maxMessages, maxBytes int, operations []byte) {
	t.Helper()
	l, m := new(log), &logModel{maxMessages: maxMessages, maxBytes: maxBytes}
	l.grow(maxMessages, maxBytes)
	var readers [4]logReader
	unpin := func(r *logReader) {
		if r.pinned == nil {
			return
		}
		if !bytes.Equal(r.frames, r.want) {
			t.Fatalf("the %d bytes before message %d changed while they were pinned", len(r.want), r.cursor)
		}
		l.unpin(r.pinned)
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
			if seq := l.append(websocket.BinaryMessage, payload); seq != uint64(len(m.frames)) {
				t.Fatalf("append: got sequence number %d, want %d", seq, len(m.frames))
			}
			m.frames = append(m.frames, appendFrame(nil, websocket.BinaryMessage, payload))
		case 2: // take a batch, like a writer
			unpin(r)
			r.cursor = max(r.cursor, m.tail())
			if r.cursor == l.head {
				break
			}
			s, frames, n := l.next(r.cursor, l.head)
			if n == 0 {
				t.Fatalf("next(%d): got no frames before the head %d", r.cursor, l.head)
			}
			r.pinned, r.frames = s, frames
			r.want = bytes.Join(m.frames[r.cursor:r.cursor+uint64(n)], nil)
			r.cursor += uint64(n)
			if !bytes.Equal(r.frames, r.want) {
				t.Fatalf("next: got %d bytes before message %d, want %d others", len(frames), r.cursor, len(r.want))
			}
			if n > 1 && len(frames) > maxWrite {
				t.Fatalf("next: got %d bytes in %d frames, want at most %d", len(frames), n, maxWrite)
			}
		case 3: // let go, and when everyone is at the head recycle, omit or retain some
			unpin(r)
			idle := true
			for i := range readers {
				idle = idle && readers[i].pinned == nil && readers[i].cursor == l.head
			}
			switch {
			case !idle:
			case size%3 == 0:
				l.recycle()
				m.forgotten = l.head
			case size%3 == 1:
				l.compact(m.omit(uint64(size)))
			default:
				m.forgotten = m.tail() + uint64(size)%(l.head-m.tail()+1)
				l.retain(m.forgotten)
				if got := held(l.segments); got > 3*l.bytes+2*segmentSizes[1] {
					t.Fatalf("got %d bytes in segments for %d retained", got, l.bytes)
				}
			}
		}
		checkBounds(t, l, m)
	}
	for i := range readers {
		unpin(&readers[i])
	}
	if len(l.stranded) > 0 {
		t.Fatalf("%d segments are stranded with nobody pinning them", len(l.stranded))
	}
}

func checkBounds(t *testing.T, l *log, m *logModel) {
	t.Helper()
	if l.head != uint64(len(m.frames)) || l.tail != m.tail() {
		t.Fatalf("got messages %d to %d, want %d to %d", l.tail, l.head, m.tail(), len(m.frames))
	}
	want := 0
	for _, f := range m.frames[l.tail:] {
		want += len(f) + indexSize
	}
	capacity := 0
	for _, s := range l.segments {
		capacity += cap(s.buf)
	}
	if l.capacity != capacity {
		t.Fatalf("got a capacity of %d bytes, want %d", l.capacity, capacity)
	}
	if l.bytes != want {
		t.Fatalf("got %d retained bytes, want %d", l.bytes, want)
	}
	for _, bytes := range []int{0, want / 3, want} {
		if got, want := l.within(bytes), m.within(bytes); got != want {
			t.Fatalf("got message %d as the oldest within %d bytes, want %d", got, bytes, want)
		}
	}
	newest := 0
	if len(m.frames) > 0 {
		newest = len(m.frames[len(m.frames)-1])
	}
	// Two neighbours hold more than one of them has room for; to that come the ends, and append's spare indexes.
	most := 2*l.bytes + 2*max(l.maxBytes/8, segmentSizes[0]) + 2*newest + 2*indexSize*int(l.head-l.tail)
	if got := held(l.segments); got > most {
		t.Fatalf("got %d bytes in segments for %d retained, want at most %d", got, l.bytes, most)
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
	l := new(log)
	l.grow(10, 100)
	l.append(websocket.TextMessage, []byte("small"))
	l.append(websocket.TextMessage, bytes.Repeat([]byte("x"), 100_000))
	if l.tail != 1 || l.head != 2 {
		t.Fatalf("got messages %d to %d, want 1 to 2", l.tail, l.head)
	}
	_, frames, n := l.next(1, 2)
	if n != 1 || len(frames) != frameSize(100_000) {
		t.Errorf("got %d messages in %d bytes, want 1 in %d", n, len(frames), frameSize(100_000))
	}
}

func TestLog_NamesTheOldestSegmentWhenTooMuchIsStranded(t *testing.T) {
	l := new(log)
	l.grow(1, 64<<10)
	var pinned []*segment
	for range 20 { // each message fills a segment, each of which somebody pins
		seq := l.append(websocket.BinaryMessage, make([]byte, 8000))
		s, _, _ := l.next(seq, l.head)
		pinned = append(pinned, s)
		if l.overstranded() != nil {
			break
		}
	}
	if got := l.overstranded(); got != pinned[0] {
		t.Fatalf("after %d pinned segments of 8 kB: got segment %p, want the oldest, %p", len(pinned), got, pinned[0])
	}
	if got := len(pinned); got > 18 {
		t.Errorf("got %d segments of 8 kB before one is named, want at most what twice a buffer of 64 KiB holds", got)
	}
	for _, s := range pinned { // several may be one
		if s == pinned[0] {
			l.unpin(s)
		}
	}
	if got := l.overstranded(); got != nil && got == pinned[0] {
		t.Error("got a segment that nobody pins")
	}
}

func TestLog_RecycledHoldsNoMemory(t *testing.T) {
	l := new(log)
	l.grow(1000, 1<<20)
	for range 100 {
		l.append(websocket.TextMessage, []byte(strings.Repeat("x", 1000)))
	}
	l.recycle()
	if len(l.segments) != 0 || l.bytes != 0 || l.tail != l.head {
		t.Errorf("got %d segments, %d bytes, messages %d to %d, want none", len(l.segments), l.bytes, l.tail, l.head)
	}
}

// BenchmarkLog appends messages and reads them back as one writer that has fallen a little behind.
func BenchmarkLog(b *testing.B) {
	for _, size := range []int{16, 128, 1024, 65536} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			l := new(log)
			l.grow(defaultBufferMessages, defaultBufferSize)
			payload := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				l.append(websocket.BinaryMessage, payload)
				if i%8 == 7 {
					for cursor := l.head - 8; cursor < l.head; {
						s, _, n := l.next(cursor, l.head)
						cursor += uint64(n)
						l.unpin(s)
					}
				}
			}
		})
	}
}

func TestLog_MessageOfTheDefaultMaximumSizeIsPooled(t *testing.T) {
	l := log{maxMessages: defaultBufferMessages, maxBytes: defaultBufferSize}
	l.append(websocket.BinaryMessage, make([]byte, defaultMaxMessageSize))
	if got := cap(l.segments[0].buf); got != segmentSizes[len(segmentSizes)-1] {
		t.Errorf("got a segment of %d bytes, which no pool takes back", got)
	}
}

func TestLog_RefusesAFrameThatItCannotIndex(t *testing.T) {
	checkFrame(maxFrame)
	defer func() {
		if got := fmt.Sprint(recover()); !strings.Contains(got, "a frame of 4294967296 bytes is longer than the 4294967295 bytes") {
			t.Errorf("got %s", got)
		}
	}()
	checkFrame(maxFrame + 1)
}

// TestLog_LargestMessageFits holds for text of control characters, of which JSON makes six bytes each.
func TestLog_LargestMessageFits(t *testing.T) {
	const around = 1 << 20 // the other fields of an event
	if got := uint64(6*maxMessageSize + around); got > math.MaxInt32 || got > maxFrame {
		t.Errorf("got an event of %d bytes, want one that a log can index on 32 bits", got)
	}
	if got := uint64(2 * maxBufferSize); got > math.MaxInt32 {
		t.Errorf("got logs of %d bytes, want at most %d", got, math.MaxInt32)
	}
}
