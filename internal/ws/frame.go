// Package ws knows the WebSocket protocol on the wire (RFC 6455): frames, UTF-8, close codes, and how a server reads a
// client's messages. It knows no hub and no socket.
package ws

import "encoding/binary"

// The opcodes of data and control frames (RFC 6455 §11.8).
const (
	TextMessage   = 1
	BinaryMessage = 2
	CloseMessage  = 8
	PingMessage   = 9
	PongMessage   = 10
)

// MaxHeader is the longest header of a server's frame, in bytes: two bytes and a 64-bit length, no mask.
const MaxHeader = 2 + 8

// MaxClientHeader is the longest header of a client's frame, in bytes: a server's, and the mask.
const MaxClientHeader = MaxHeader + maskSize

// Parts of a frame's header (RFC 6455 §5.2).
const (
	finBit     = 0x80 // in the first byte: the last, and from this server the only, frame of a message
	controlBit = 0x08 // in the opcode of a control frame
	maskBit    = 0x80 // in the second byte: the payload is masked
	maskSize   = 4    // bytes of a mask
)

// Values of the second byte of a header that announce a longer length (RFC 6455 §5.2). Smaller values are the length.
const (
	length16 = 126 // it follows in 2 bytes
	length64 = 127 // it follows in 8 bytes
)

// maxControlPayload is the most that a control frame carries, in bytes (RFC 6455 §5.5). It is also the largest length
// that needs no further bytes.
const maxControlPayload = 125

// FrameSize returns how many bytes AppendFrame appends for a payload of n bytes.
func FrameSize(n int) int {
	switch {
	case n < length16:
		return 2 + n
	case n <= 0xffff:
		return 4 + n
	default:
		return MaxHeader + n
	}
}

// AppendFrame appends to dst the frame that carries payload from a server to a client. The frame is the whole message
// and is not masked. AppendFrame copies payload.
func AppendFrame(dst []byte, opcode int, payload []byte) []byte {
	return append(AppendHeader(dst, opcode, len(payload)), payload...)
}

// AppendHeader appends to dst the header of a frame of AppendFrame with a payload of n bytes: at most MaxHeader bytes.
// It writes the length in the fewest bytes that hold it, as RFC 6455 §5.2 demands.
func AppendHeader(dst []byte, opcode, n int) []byte {
	dst = append(dst, finBit|byte(opcode))
	switch {
	case n < length16:
		return append(dst, byte(n))
	case n <= 0xffff:
		return binary.BigEndian.AppendUint16(append(dst, length16), uint16(n))
	default:
		return binary.BigEndian.AppendUint64(append(dst, length64), uint64(n))
	}
}

// Parts returns the opcode and the payload of a frame that AppendFrame has made. payload is a part of frame, not a copy.
func Parts(frame []byte) (opcode int, payload []byte) {
	payload, _ = Cut(frame)
	return int(frame[0] &^ finBit), payload
}

// Cut returns the payload of the first of frames, which AppendFrame has made, and the frames after it. Both are parts of
// frames, not copies.
func Cut(frames []byte) (payload, rest []byte) {
	header, size := 2, uint64(frames[1])
	switch size {
	case length16:
		header, size = 4, uint64(binary.BigEndian.Uint16(frames[2:]))
	case length64:
		header, size = MaxHeader, binary.BigEndian.Uint64(frames[2:])
	}
	end := header + int(size)
	return frames[header:end:end], frames[end:]
}
