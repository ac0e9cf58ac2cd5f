package chatbroadcast

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sort"
	"sync"
)

// A log is the recent past of one hub: server frames exactly as they go on the wire, one behind the
// other, numbered from 0. A client is a cursor into it, the sequence number of the next frame it needs.
//
//	tail <= cursor <  head   the client is head-cursor messages behind
//	        cursor == head   it has everything
//	        cursor <  tail   it has lagged: tail-cursor messages are gone
//
// What is bounded: the frames from tail to head are at most maxMessages and at most maxBytes, but the
// newest frame is always kept. What is lost first: the oldest. Segments that were evicted while a writer
// still read from them are counted in stranded until the writer lets go.
//
// A log has no lock, clock or I/O of its own: every method needs the hub's lock. The bytes that next
// returns may be read without it, for as long as their segment is pinned: they are never written again.
type log struct {
	maxMessages int
	maxBytes    int
	spare       *budget // what all logs together may keep beyond histories, or nil
	history     int     // of maxBytes, for history

	tail, head uint64
	bytes      int        // of the frames from tail to head, and their indexes
	segments   []*segment // the retained ones, oldest first, without gaps
	capacity   int        // of their buffers, together

	stranded      []*segment // evicted but pinned, oldest first
	strandedBytes int        // of their buffers, together
	sizeClass     int        // of the next segment
	appended      int        // bytes since the last recycle, up to maxWrite

	// What was appended since caughtUp was last called.
	aheadMessages, aheadBytes int
}

// A segment holds consecutive whole frames in one buffer that never moves, so that any run of them is one
// slice.
type segment struct {
	first   uint64   // the sequence number of the first frame
	buf     []byte   // the frames; appended to, never rewritten while pinned or retained
	ends    []uint32 // ends[i] is where frame first+i ends in buf
	pins    int      // writers that read from buf
	evicted bool
}

// maxWrite bounds what goes to a connection in one Write, and so the segments: large enough that the system call is no
// longer what a message costs, and for a message of the default maximum size; small enough that a stuck client pins
// little.
const maxWrite = defaultMaxMessageSize + maxFrameHeader

// indexSize is what a frame costs beyond its bytes: its entry in ends. It counts, or empty messages would be free.
const indexSize = 4

// maxFrame is the longest frame that a segment can hold, since its index has 32 bits.
const maxFrame = math.MaxUint32

// segmentSizes are the capacities of pooled segments. A quiet hub stays with the first, a busy one climbs,
// so that an occasional message in each of many hubs does not cost maxWrite bytes each.
var segmentSizes = [...]int{1 << 10, 4 << 10, 16 << 10, maxWrite}

// segmentPools keep segments between uses, one pool a size: a hub whose clients have all caught up holds
// none.
var segmentPools [len(segmentSizes)]sync.Pool

// grow raises the bounds; they are never lowered while the hub lives.
func (l *log) grow(maxMessages, maxBytes int) {
	l.maxMessages = max(l.maxMessages, maxMessages)
	l.maxBytes = max(l.maxBytes, maxBytes)
}

// append adds one message, evicts what no longer fits and returns the message's sequence number. It copies
// payload. The bounds of `max_message_size` keep frames below maxFrame.
func (l *log) append(opcode int, payload []byte) uint64 {
	size := frameSize(len(payload))
	checkFrame(uint64(size))
	s := l.room(size)
	s.buf = appendFrame(s.buf, opcode, payload)
	s.ends = append(s.ends, uint32(len(s.buf)))
	seq := l.head
	l.head++
	l.bytes += size + indexSize
	l.appended = min(l.appended+size, maxWrite)
	l.aheadMessages++
	l.aheadBytes += size
	for bound := l.bound(); l.head-l.tail > 1 && (l.head-l.tail > uint64(l.maxMessages) || l.bytes > bound); {
		l.evict()
	}
	return seq
}

// checkFrame panics if a segment's index cannot hold a frame of size bytes: every client would lose its place in the
// stream.
func checkFrame(size uint64) {
	if size > maxFrame {
		panic(fmt.Sprintf("chat_broadcast: a frame of %d bytes is longer than the %d bytes that a log can index", size, uint64(maxFrame)))
	}
}

// minBuffer is how many bytes each hub may keep for clients that are behind, however little is left for all.
const minBuffer = 2 * maxWrite

// bound returns how many bytes of frames the log may keep now. Each log may have as much for clients that are behind as is
// left for all, so that what it may have shrinks while others take much.
func (l *log) bound() int {
	if l.spare == nil {
		return l.maxBytes
	}
	return min(l.maxBytes, l.history+max(l.spare.left(), minBuffer))
}

// room returns the newest segment if it has size bytes left, or a new one.
func (l *log) room(size int) *segment {
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
	// Many small segments in a small buffer: the oldest is held until its last frame is evicted.
	for l.sizeClass > 0 && segmentSizes[l.sizeClass] > l.maxBytes/8 {
		l.sizeClass--
	}
	s := newSegment(l.head, size, l.sizeClass)
	l.segments = append(l.segments, s)
	l.capacity += cap(s.buf)
	return s
}

// evict drops the oldest frame, and its segment with the last frame of it.
func (l *log) evict() {
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

// trim evicts the frames before to.
func (l *log) trim(to uint64) {
	for l.tail < to {
		l.evict()
	}
}

// within returns the oldest frame from which on all frames together take at most maxBytes, or else the newest one.
func (l *log) within(maxBytes int) uint64 {
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

// payload returns the opcode and the payload of a retained frame. The bytes are the log's: they are valid until it
// changes.
func (l *log) payload(seq uint64) (opcode int, payload []byte) {
	s, frame, _ := l.next(seq, seq+1)
	l.unpin(s)
	return frameParts(frame)
}

// ahead reports whether a quarter of the buffer or more has been appended since caughtUp.
func (l *log) ahead() bool {
	return l.aheadMessages > l.maxMessages/4 || l.aheadBytes > l.maxBytes/4 || l.spare != nil && l.aheadBytes > l.bound()/4
}

// caughtUp notes that the clients have taken what they can.
func (l *log) caughtUp() { l.aheadMessages, l.aheadBytes = 0, 0 }

// next pins and returns the frames from cursor to limit, as far as they lie in one segment: n messages in
// one slice. It needs tail <= cursor < limit <= head; the caller unpins the segment.
func (l *log) next(cursor, limit uint64) (s *segment, frames []byte, n int) {
	last := len(l.segments) - 1
	s = l.segments[last]
	if cursor < s.first {
		i, found := slices.BinarySearchFunc(l.segments, cursor, func(s *segment, seq uint64) int {
			return cmp.Compare(s.first, seq)
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

// unpin gives back what next pinned.
func (l *log) unpin(s *segment) {
	s.pins--
	if s.pins > 0 || !s.evicted {
		return
	}
	i := slices.Index(l.stranded, s)
	l.stranded = slices.Delete(l.stranded, i, i+1)
	l.strandedBytes -= cap(s.buf)
	s.free()
}

// bytesFrom returns the bytes of the frames from cursor to head.
func (l *log) bytesFrom(cursor uint64) (n int) {
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

// overstranded returns the oldest stranded segment when the log holds more than twice maxBytes, else nil: those who pin
// it must go, or memory would grow with the number of stuck clients. A single one is left to them, because the newest
// message is always kept, and so may be the one before it.
func (l *log) overstranded() *segment {
	if len(l.stranded) < 2 || held(l.segments)+held(l.stranded) <= 2*l.maxBytes {
		return nil
	}
	return l.stranded[0]
}

// memory returns the memory of all segments, in bytes: of the retained ones and of those that writers pin.
func (l *log) memory() int { return l.capacity + l.strandedBytes }

// held returns the memory of segments, in bytes.
func held(segments []*segment) (n int) {
	for _, s := range segments {
		n += cap(s.buf) + indexSize*cap(s.ends)
	}
	return n
}

// retain forgets the frames before from, and gives back memory that the others do not need. Nothing may be pinned and
// every cursor must be at head.
func (l *log) retain(from uint64) {
	if from == l.head {
		l.recycle()
		return
	}
	l.trim(from)
	if held(l.segments) > 2*l.bytes+segmentSizes[1] {
		l.compact(nil)
	}
	l.rest()
}

// compact moves the frames to segments that they fill. It omits those of the given numbers, in order: the frames before
// them move up. A busy hub needs the room: nothing may be pinned and every cursor must be at head.
func (l *log) compact(omit []uint64) {
	for _, seq := range omit {
		s, frame, _ := l.next(seq, seq+1)
		l.unpin(s)
		l.bytes -= len(frame) + indexSize
	}
	old, at := l.segments, l.tail
	l.segments, l.capacity = nil, 0
	l.tail += uint64(len(omit))
	rest := l.bytes - indexSize*int(l.head-l.tail)
	seq := l.tail
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
				size := max(min(rest, maxWrite), len(frame))
				l.segments = append(l.segments, &segment{first: seq, buf: make([]byte, 0, size)})
				l.capacity += size
				n++
			}
			into := l.segments[n-1]
			into.buf = append(into.buf, frame...)
			into.ends = append(into.ends, uint32(len(into.buf)))
			rest -= len(frame)
			seq++
		}
		s.free()
	}
}

// recycle forgets every frame. Nothing may be pinned and every cursor must be at head.
func (l *log) recycle() {
	for i, s := range l.segments {
		l.segments[i] = nil
		s.free()
	}
	l.segments = l.segments[:0]
	l.tail, l.bytes, l.capacity = l.head, 0, 0
	l.rest()
}

// rest notes that a busy spell is over.
func (l *log) rest() {
	// The next spell will be like this one: start with a segment that would have held it twice.
	l.sizeClass = 0
	for l.sizeClass < len(segmentSizes)-1 && segmentSizes[l.sizeClass] < 2*l.appended {
		l.sizeClass++
	}
	l.appended = 0
	l.caughtUp()
}

// newSegment returns an empty segment of the given class, or of just size bytes if it takes more.
func newSegment(first uint64, size, class int) *segment {
	if size > segmentSizes[class] {
		return &segment{first: first, buf: make([]byte, 0, size)}
	}
	s, ok := segmentPools[class].Get().(*segment)
	if !ok {
		s = &segment{buf: make([]byte, 0, segmentSizes[class])}
	}
	s.first = first
	return s
}

// free returns s to its pool, if it came from one. Nothing may refer to it any more.
func (s *segment) free() {
	class, pooled := slices.BinarySearch(segmentSizes[:], cap(s.buf))
	if !pooled {
		return
	}
	s.buf, s.ends, s.evicted = s.buf[:0], s.ends[:0], false
	segmentPools[class].Put(s)
}

// start returns where frame first+i begins in buf.
func (s *segment) start(i uint64) int {
	if i == 0 {
		return 0
	}
	return int(s.ends[i-1])
}
