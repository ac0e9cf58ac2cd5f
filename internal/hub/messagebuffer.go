package hub

import "sync"

// minMessage is what a message's buffer begins with: most chat messages fit.
const minMessage = 512

// A messageBuffer holds a message while it is received, so that a client between two messages has none. It has room for
// minMessage bytes, doubled class times.
type messageBuffer struct {
	message []byte
	class   int
}

// messageBuffers keep buffers of up to 64 KiB between uses, a pool a class.
var messageBuffers [8]sync.Pool

// takeMessageBuffer returns an empty buffer.
func takeMessageBuffer(class int) *messageBuffer {
	if class < len(messageBuffers) {
		if b, ok := messageBuffers[class].Get().(*messageBuffer); ok {
			return b
		}
	}
	return &messageBuffer{make([]byte, 0, minMessage<<class), class}
}

// free gives the buffer back. Nothing may refer to it any more.
func (b *messageBuffer) free() {
	if b.class < len(messageBuffers) {
		b.message = b.message[:0]
		messageBuffers[b.class].Put(b)
	}
}

// FreeMessage is how much of a message is received without counting, in bytes: as much as is read at once. freeClass is
// its class.
const (
	FreeMessage = minMessage << freeClass
	freeClass   = 3
)

// doubled returns a buffer of twice the size with the same message, and frees b.
func (b *messageBuffer) doubled() *messageBuffer {
	larger := takeMessageBuffer(b.class + 1)
	larger.message = append(larger.message, b.message...)
	b.free()
	return larger
}
