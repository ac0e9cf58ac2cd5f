package chatbroadcast

import (
	"encoding/binary"
	"unicode/utf8"
)

// maxFrameHeader is the longest header of a server's frame: two bytes and a 64-bit length, no mask.
const maxFrameHeader = 10

// finBit marks the last, here always the only, frame of a message (RFC 6455 §5.2).
const finBit = 0x80

// Of a client's frame (RFC 6455 §5.2, §5.5): the bit in its second byte that says that it is masked, the size of the
// mask, and the most that a control frame carries.
const (
	maskBit           = 0x80
	maskSize          = 4
	maxControlPayload = 125
)

// frameSize returns how many bytes appendFrame adds for a payload of n bytes.
func frameSize(n int) int {
	switch {
	case n <= 125:
		return 2 + n
	case n <= 0xffff:
		return 4 + n
	default:
		return maxFrameHeader + n
	}
}

// appendFrame appends one unfragmented, unmasked frame to dst, as a server sends it: the length in the
// fewest bytes that hold it (RFC 6455 §5.2). It copies payload.
func appendFrame(dst []byte, opcode int, payload []byte) []byte {
	dst = append(dst, finBit|byte(opcode))
	switch n := len(payload); {
	case n <= 125:
		dst = append(dst, byte(n))
	case n <= 0xffff:
		dst = append(dst, 126)
		dst = binary.BigEndian.AppendUint16(dst, uint16(n))
	default:
		dst = append(dst, 127)
		dst = binary.BigEndian.AppendUint64(dst, uint64(n))
	}
	return append(dst, payload...)
}

// frameParts returns the opcode and the payload of a frame that appendFrame has made.
func frameParts(frame []byte) (opcode int, payload []byte) {
	header := 2
	switch frame[1] {
	case 126:
		header = 4
	case 127:
		header = maxFrameHeader
	}
	return int(frame[0] &^ finBit), frame[header:]
}

// validUTF8 checks text that is still arriving. It returns how many leading bytes of p are whole,
// valid characters, and whether p can still become valid: false at the first byte that no
// continuation can save (RFC 6455 §8.1). At the end of a message n must be len(p).
func validUTF8(p []byte) (n int, ok bool) {
	n = len(p)
	// A character is at most utf8.UTFMax bytes: an unfinished one starts in the last three.
	for i := n - 1; i >= 0 && n-i < utf8.UTFMax; i-- {
		if utf8.RuneStart(p[i]) {
			if !utf8.FullRune(p[i:]) {
				n = i
			}
			break
		}
	}
	return n, utf8.Valid(p[:n])
}
