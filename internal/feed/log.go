package feed

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sort"
	"sync"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A Log is the recent past of one hub: frames exactly as they go on the wire, one behind the other, numbered from 0. The
// number of a frame is its position. A reader is a cursor, the position of the next frame that it needs:
//
//	Tail <= cursor <  Head   the reader is Head-cursor frames behind
//	        cursor == Head   the reader has everything
//	        cursor <  Tail   the reader has lagged: Tail-cursor frames are gone
//
// The frames from Tail to Head are at most as many, and take at most as many bytes, as Grow has allowed, but a Log always
// keeps its newest frame. It drops the oldest frames first. A segment that is dropped while a writer still reads from it is
// stranded: it counts until the writer unpins it.
//
// The zero value is a Log that keeps one frame. A Log has no lock, clock or I/O of its own: every method needs the hub's
// lock. Only the bytes that Next and NextWithin return may be read without the lock, for as long as their segment is pinned.
type Log struct {
	maxMessages int
	maxBytes    int
	spare       func() int // what all logs together may still keep beyond histories, in bytes; or nil
	history     int        // the part of maxBytes that is for history

	tail, head uint64
	bytes      int        // of the frames from tail to head, and of their indexes
	segments   []*Segment // the retained ones, oldest first, without gaps
	capacity   int        // of their buffers, together

	stranded      []*Segment // dropped but pinned, oldest first
	strandedBytes int        // of their buffers, together
	sizeClass     int        // of the next segment
	appended      int        // bytes since the last rest, up to MaxWrite

	// What was appended since CaughtUp was last called.
	aheadMessages, aheadBytes int
}

// A Segment holds consecutive whole frames in one buffer, so that any run of them is one slice. Nothing changes the bytes
// of a frame while the segment is retained or pinned.
type Segment struct {
	first   uint64   // the position of the first frame
	buf     []byte   // the frames
	ends    []uint32 // ends[i] is where frame first+i ends in buf
	pins    int      // how many writers read from buf
	evicted bool
}

// Capacity returns how many bytes of memory the segment's buffer takes.
func (s *Segment) Capacity() int { return cap(s.buf) }

// MaxWrite bounds a segment and so, unless a single frame is longer, the bytes of one Write to a connection. It is
// large enough that a message no longer costs a system call, and for a message of the default maximum size (64 KiB). It
// is small enough that a stuck client pins little.
const MaxWrite = 64<<10 + ws.MaxHeader

// MaxFrame is the longest frame that a log can hold, in bytes: the index of a segment has 32 bits.
const MaxFrame = math.MaxUint32

// indexSize is the size of a frame's entry in ends, in bytes. It counts, because otherwise empty messages would be
// free.
const indexSize = 4

// segmentSizes are the capacities of pooled segments. A quiet hub stays with the first and a busy hub climbs, so that one
// message now and then in each of many hubs does not cost MaxWrite bytes a hub.
var segmentSizes = [...]int{1 << 10, 4 << 10, 16 << 10, MaxWrite}

// segmentPools keep segments between uses, a pool a size: a hub whose clients have all caught up holds none.
var segmentPools [len(segmentSizes)]sync.Pool

// minBuffer is how many bytes each log may keep for readers that are behind, however little is left for all logs.
const minBuffer = 2 * MaxWrite

// Grow raises the bounds to maxMessages frames and maxBytes bytes. It never lowers them.
func (l *Log) Grow(maxMessages, maxBytes int) {
	l.maxMessages = max(l.maxMessages, maxMessages)
	l.maxBytes = max(l.maxBytes, maxBytes)
}

// SetHistory reserves a part of the log's bytes for history. The default is 0.
func (l *Log) SetHistory(bytes int) { l.history = bytes }

// SetSpare makes the log ask spare, at each Append, how many bytes all logs together may still keep beyond their
// histories. The log then keeps its history and as much as all may still keep, but at least minBuffer, and no more than
// maxBytes. So all logs keep less while some take much. With nil, the default, the log always keeps up to maxBytes.
func (l *Log) SetSpare(spare func() int) { l.spare = spare }

// Begin makes the next frame that of the given position. The log must be empty.
func (l *Log) Begin(position uint64) { l.tail, l.head = position, position }

// Skip drops every frame, and leaves out the next n positions. A reader that needs one of them has lagged.
func (l *Log) Skip(n uint64) {
	l.Trim(l.head)
	l.Begin(l.head + n)
}

// Head returns the position of the next frame.
func (l *Log) Head() uint64 { return l.head }

// Tail returns the position of the oldest frame that the log has, or Head if it has none.
func (l *Log) Tail() uint64 { return l.tail }

// Bytes returns how many bytes the retained frames and their indexes take.
func (l *Log) Bytes() int { return l.bytes }

// Capacity returns the memory of the retained segments, in bytes.
func (l *Log) Capacity() int { return l.capacity }

// Memory returns the memory of all segments, in bytes: of the retained ones, and of those that only writers pin.
func (l *Log) Memory() int { return l.capacity + l.strandedBytes }

// Append adds a frame, which is head followed by body, and drops the frames that no longer fit. It returns the position of
// the frame. It copies head and body. It panics if the frame is longer than MaxFrame.
func (l *Log) Append(head, body []byte) (position uint64) {
	size := len(head) + len(body)
	checkFrame(uint64(size))
	s := l.room(size)
	s.buf = append(append(s.buf, head...), body...)
	s.ends = append(s.ends, uint32(len(s.buf)))
	position = l.head
	l.head++
	l.bytes += size + indexSize
	l.appended = min(l.appended+size, MaxWrite)
	l.aheadMessages++
	l.aheadBytes += size
	for bound := l.bound(); l.head-l.tail > 1 && (l.head-l.tail > uint64(l.maxMessages) || l.bytes > bound); {
		l.evict()
	}
	return position
}

// checkFrame panics if the index of a segment cannot hold a frame of size bytes: every reader would lose its place.
func checkFrame(size uint64) {
	if size > MaxFrame {
		panic(fmt.Sprintf("chat_broadcast: a frame of %d bytes is longer than the %d bytes that a log can index", size, uint64(MaxFrame)))
	}
}

// bound returns how many bytes the log may keep now, see SetSpare.
func (l *Log) bound() int {
	if l.spare == nil {
		return l.maxBytes
	}
	return min(l.maxBytes, l.history+max(l.spare(), minBuffer))
}

// room returns the newest segment if it has size bytes left, or else a new one.
func (l *Log) room(size int) *Segment {
	if n := len(l.segments); n > 0 {
		if s := l.segments[n-1]; cap(s.buf)-len(s.buf) >= size {
			return s
		}
		l.sizeClass++ // one was not enough
	}
	l.sizeClass = min(l.sizeClass, len(segmentSizes)-1)
	for l.sizeClass < len(segmentSizes)-1 && segmentSizes[l.sizeClass] < size {
		l.sizeClass++
	}
	// A small log takes many small segments: it holds the oldest one until the last frame in it is dropped.
	for l.sizeClass > 0 && segmentSizes[l.sizeClass] > l.maxBytes/8 {
		l.sizeClass--
	}
	s := newSegment(l.head, size, l.sizeClass)
	l.segments = append(l.segments, s)
	l.capacity += cap(s.buf)
	return s
}

// evict drops the oldest frame, and with the last frame of a segment also the segment.
func (l *Log) evict() {
	s := l.segments[0]
	i := l.tail - s.first
	l.bytes -= int(s.ends[i]) - s.start(i) + indexSize
	l.tail++
	if i+1 < uint64(len(s.ends)) {
		return
	}
	l.segments[0] = nil
	l.segments = l.segments[1:]
	l.capacity -= cap(s.buf)
	if s.pins == 0 {
		s.free()
		return
	}
	s.evicted = true
	l.stranded = append(l.stranded, s)
	l.strandedBytes += cap(s.buf)
}

// Trim drops the frames before position to.
func (l *Log) Trim(to uint64) {
	for l.tail < to {
		l.evict()
	}
}

// Within returns the oldest position such that the frames from there on take at most maxBytes, or the position of the newest
// frame if that frame alone takes more.
func (l *Log) Within(maxBytes int) uint64 {
	if l.bytes <= maxBytes {
		return l.tail
	}
	for _, s := range slices.Backward(l.segments) {
		oldest := max(l.tail, s.first) - s.first
		n := len(s.ends) - int(oldest)
		size := int(s.ends[len(s.ends)-1]) - s.start(oldest) + indexSize*n
		if size <= maxBytes {
			maxBytes -= size
			continue
		}
		end := int(s.ends[len(s.ends)-1])
		skip := sort.Search(n, func(i int) bool {
			return end-s.start(oldest+uint64(i))+indexSize*(n-i) <= maxBytes
		})
		return min(s.first+oldest+uint64(skip), l.head-1)
	}
	return l.tail
}

// frame returns a retained frame. It is valid until the log changes.
func (l *Log) frame(position uint64) []byte {
	s, frame, _ := l.Next(position, position+1)
	l.Unpin(s)
	return frame
}

// Ahead reports whether a quarter of what the log may keep, or more, has been appended since CaughtUp.
func (l *Log) Ahead() bool {
	return l.aheadMessages > l.maxMessages/4 || l.aheadBytes > l.maxBytes/4 || l.spare != nil && l.aheadBytes > l.bound()/4
}

// CaughtUp notes that the readers have taken what they can.
func (l *Log) CaughtUp() { l.aheadMessages, l.aheadBytes = 0, 0 }

// Next returns the frames from cursor on, up to limit, as far as they lie in one segment: n frames in one slice, at least
// one. It pins the segment, and the caller must unpin it. It needs Tail <= cursor < limit <= Head. The caller must not
// change the frames.
func (l *Log) Next(cursor, limit uint64) (s *Segment, frames []byte, n int) {
	last := len(l.segments) - 1
	s = l.segments[last]
	if cursor < s.first {
		i, found := slices.BinarySearchFunc(l.segments, cursor, func(s *Segment, position uint64) int {
			return cmp.Compare(s.first, position)
		})
		if !found {
			i--
		}
		s = l.segments[i]
	}
	from := cursor - s.first
	to := min(limit-s.first, uint64(len(s.ends)))
	s.pins++
	return s, s.buf[s.start(from):s.ends[to-1]:s.ends[to-1]], int(to - from)
}

// NextWithin is Next for frames of at most maxBytes bytes together, or one frame.
func (l *Log) NextWithin(cursor, limit uint64, maxBytes int) (s *Segment, frames []byte, n int) {
	s, frames, n = l.Next(cursor, limit)
	if len(frames) <= maxBytes {
		return s, frames, n
	}
	from := cursor - s.first
	size := func(n int) int { return s.start(from+uint64(n)) - s.start(from) } // of the first n frames
	n = max(1, sort.Search(n, func(i int) bool { return size(i+1) > maxBytes }))
	return s, frames[:size(n):size(n)], n
}

// Unpin takes back one pin of Next and of NextWithin.
func (l *Log) Unpin(s *Segment) {
	s.pins--
	if s.pins > 0 || !s.evicted {
		return
	}
	i := slices.Index(l.stranded, s)
	l.stranded = slices.Delete(l.stranded, i, i+1)
	l.strandedBytes -= cap(s.buf)
	s.free()
}

// BytesFrom returns how many bytes the frames from cursor to Head have.
func (l *Log) BytesFrom(cursor uint64) (n int) {
	for _, s := range slices.Backward(l.segments) {
		if cursor >= s.first {
			if i := cursor - s.first; i < uint64(len(s.ends)) {
				n += len(s.buf) - s.start(i)
			}
			return n
		}
		n += len(s.buf)
	}
	return n
}

// Overstranded returns the oldest stranded segment if the log holds more than twice its bytes, else nil. The clients that pin
// that segment must go, or memory would grow with the number of stuck clients. A single stranded segment is not enough,
// because the newest frame is always kept, and the one before it may be pinned.
func (l *Log) Overstranded() *Segment {
	if len(l.stranded) < 2 || held(l.segments)+held(l.stranded) <= 2*l.maxBytes {
		return nil
	}
	return l.stranded[0]
}

// held returns the memory of segments and their indexes, in bytes.
func held(segments []*Segment) (n int) {
	for _, s := range segments {
		n += cap(s.buf) + indexSize*cap(s.ends)
	}
	return n
}

// Retain drops the frames before position from, and gives back memory that the others do not need. Nothing may be pinned,
// and every reader must be at Head.
func (l *Log) Retain(from uint64) {
	if from == l.head {
		l.Recycle()
		return
	}
	l.Trim(from)
	if held(l.segments) > 2*l.bytes+segmentSizes[1] {
		l.Compact(nil)
	}
	l.rest()
}

// Compact moves the frames to segments that they fill. It omits the frames at the given positions, which are in order, and
// the frames before each move up by one. Nothing may be pinned, and every reader must be at Head. A hub that is busy needs
// the room that Compact takes away: call it only when all readers have everything.
func (l *Log) Compact(omit []uint64) {
	for _, position := range omit {
		l.bytes -= len(l.frame(position)) + indexSize
	}
	old, at := l.segments, l.tail
	l.segments, l.capacity = nil, 0
	l.tail += uint64(len(omit))
	rest := l.bytes - indexSize*int(l.head-l.tail)
	position := l.tail
	for _, s := range old {
		for i := at - s.first; i < uint64(len(s.ends)); i++ {
			at++
			if len(omit) > 0 && omit[0] == at-1 {
				omit = omit[1:]
				continue
			}
			frame := s.buf[s.start(i):s.ends[i]]
			n := len(l.segments)
			if n == 0 || cap(l.segments[n-1].buf)-len(l.segments[n-1].buf) < len(frame) {
				size := max(min(rest, MaxWrite), len(frame))
				l.segments = append(l.segments, &Segment{first: position, buf: make([]byte, 0, size)})
				l.capacity += size
				n++
			}
			into := l.segments[n-1]
			into.buf = append(into.buf, frame...)
			into.ends = append(into.ends, uint32(len(into.buf)))
			rest -= len(frame)
			position++
		}
		s.free()
	}
}

// Recycle drops every frame. Nothing may be pinned, and every reader must be at Head.
func (l *Log) Recycle() {
	for i, s := range l.segments {
		l.segments[i] = nil
		s.free()
	}
	l.segments = l.segments[:0]
	l.tail, l.bytes, l.capacity = l.head, 0, 0
	l.rest()
}

// rest notes that a busy spell is over.
func (l *Log) rest() {
	// The next spell will be like this one: start with a segment that would have held it twice.
	l.sizeClass = 0
	for l.sizeClass < len(segmentSizes)-1 && segmentSizes[l.sizeClass] < 2*l.appended {
		l.sizeClass++
	}
	l.appended = 0
	l.CaughtUp()
}

// newSegment returns an empty segment of the given class, or of just size bytes if that is more.
func newSegment(first uint64, size, class int) *Segment {
	if size > segmentSizes[class] {
		return &Segment{first: first, buf: make([]byte, 0, size)}
	}
	s, ok := segmentPools[class].Get().(*Segment)
	if !ok {
		s = &Segment{buf: make([]byte, 0, segmentSizes[class])}
	}
	s.first = first
	return s
}

// free returns s to its pool, if it came from one. Nothing may refer to it any more.
func (s *Segment) free() {
	class, pooled := slices.BinarySearch(segmentSizes[:], cap(s.buf))
	if !pooled {
		return
	}
	s.buf, s.ends, s.evicted = s.buf[:0], s.ends[:0], false
	segmentPools[class].Put(s)
}

// start returns where frame first+i begins in buf.
func (s *Segment) start(i uint64) int {
	if i == 0 {
		return 0
	}
	return int(s.ends[i-1])
}
