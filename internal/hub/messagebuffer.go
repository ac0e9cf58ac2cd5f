package hub

import "sync"

// minMessage is the first size of a message's buffer, in bytes. Most chat messages fit.
const minMessage = 512

// A messageBuffer holds a message while it arrives. A client between two messages has none. The buffer has room for
// minMessage bytes, doubled class times.
type messageBuffer struct {
	message []byte
	class   int
}

// messageBuffers keep buffers of up to 64 KiB between uses, one pool for each class.
var messageBuffers [8]sync.Pool

// takeMessageBuffer returns an empty buffer of the given class.
func takeMessageBuffer(class int) *messageBuffer {
	if class < len(messageBuffers) {
		if b, ok := messageBuffers[class].Get().(*messageBuffer); ok {
			return b
		}
	}
	return &messageBuffer{make([]byte, 0, minMessage<<class), class}
}

// free gives the buffer back. Nothing may refer to its bytes any more.
func (b *messageBuffer) free() {
	if b.class < len(messageBuffers) {
		b.message = b.message[:0]
		messageBuffers[b.class].Put(b)
	}
}

// FreeMessage is how many bytes of a message the server receives before it takes memory from Process.Incoming: as many
// as one read takes. freeClass is the class of such a buffer.
const (
	FreeMessage = minMessage << freeClass
	freeClass   = 3
)

// doubled returns a buffer of twice the size with the same bytes, and frees b.
func (b *messageBuffer) doubled() *messageBuffer {
	larger := takeMessageBuffer(b.class + 1)
	larger.message = append(larger.message, b.message...)
	b.free()
	return larger
}
