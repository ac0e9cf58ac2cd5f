package chatbroadcast

import (
	"encoding/binary"
	"unicode/utf8"

	"github.com/gorilla/websocket"
)

// A frameScan follows a client's frames, in whichever pieces they arrive, up to the first close frame or the first
// length with its top bit set. gorilla/websocket judges both otherwise than RFC 6455: it ignores a close body of one
// byte, knows fewer close codes than IANA, and reports a wrong reason for the rest. The zero frameScan is ready.
//
// A scan does not check anything else. gorilla/websocket stops at the first frame that is malformed, so a scan that has
// gone on past such a frame is never asked about what it found there: see verdict.
type frameScan struct {
	head  [2 + 8]byte // of the current frame, without the mask
	got   uint8       // bytes of head that have come
	ended bool        // the scan has found what it looks for

	// left is how many bytes of the current frame's mask and payload have yet to come. Once ended is set, it is how
	// many bytes came after the end of the scan.
	left uint64
	body []byte // of a close frame; until it is whole, behind its mask and masked
}

// scan takes the next bytes of the connection.
func (s *frameScan) scan(p []byte) {
	for len(p) > 0 && !s.ended {
		if s.left == 0 {
			if n := wholeFrame(p); n > 0 && s.got == 0 { // which is most of them; scanHead takes five times as long
				p = p[n:]
				continue
			}
			p = p[s.scanHead(p):]
			continue
		}
		n := int(min(s.left, uint64(len(p))))
		if s.inClose() {
			s.body = append(s.body, p[:n]...)
		}
		p = p[n:]
		s.left -= uint64(n)
		if s.left == 0 && s.body != nil {
			s.ended = true
			s.body = unmask(s.body)
		}
	}
	if s.ended {
		s.left += uint64(len(p))
	}
}

// wholeFrame returns the size of the data frame with which p begins. It returns 0 for one that is incomplete or has a
// 64-bit length, and for a control frame.
func wholeFrame(p []byte) (size int) {
	const controlBit = 0x08 // RFC 6455 §5.2
	if len(p) < 4 || p[0]&controlBit != 0 {
		return 0
	}
	switch length := int(p[1] &^ maskBit); length {
	case 126:
		size = 2 + 2 + maskSize + int(binary.BigEndian.Uint16(p[2:]))
	case 127:
		return 0
	default:
		size = 2 + maskSize + length
	}
	if size > len(p) {
		return 0
	}
	return size
}

// headSize returns the size of the current frame's header without its mask, as far as it is known (RFC 6455 §5.2).
func (s *frameScan) headSize() uint8 {
	if s.got >= 2 {
		switch s.head[1] &^ maskBit {
		case 126:
			return 2 + 2
		case 127:
			return 2 + 8
		}
	}
	return 2
}

// scanHead takes bytes of a frame's header and returns how many. With the last one it sets left.
func (s *frameScan) scanHead(p []byte) (n int) {
	n = copy(s.head[s.got:s.headSize()], p)
	s.got += uint8(n)
	if s.got < s.headSize() {
		return n
	}
	length := uint64(s.head[1] &^ maskBit)
	switch s.got {
	case 2 + 2:
		length = uint64(binary.BigEndian.Uint16(s.head[2:]))
	case 2 + 8:
		length = binary.BigEndian.Uint64(s.head[2:])
	}
	s.got = 0
	// gorilla/websocket stops at a long close frame, two bytes after its begin. The scan must not keep its body.
	if length>>63 != 0 || s.inClose() && length > maxControlPayload {
		s.ended = true
		return n
	}
	s.left = maskSize + length
	return n
}

// inClose reports whether the current frame is a close frame.
func (s *frameScan) inClose() bool { return s.head[0]&^finBit == websocket.CloseMessage }

// verdict returns why the connection must close, if the scan ended exactly before the last unread bytes that came. Only
// then the end of the scan is where gorilla/websocket has stopped. goodbye reports whether it is a close frame.
func (s *frameScan) verdict(unread int) (why cause, goodbye, ok bool) {
	if !s.ended || s.left != uint64(unread) {
		return cause{}, false, false
	}
	if s.body == nil {
		return causeProtocolError, false, true
	}
	return closedBy(s.body), true, true
}

// unmask returns the payload that p, a mask and a masked payload, carries. It changes p.
func unmask(p []byte) []byte {
	mask, payload := p[:maskSize], p[maskSize:]
	for i := range payload {
		payload[i] ^= mask[i%maskSize]
	}
	return payload
}

// closedBy returns how a connection ends whose client has sent a close frame with this body (RFC 6455 §5.5.1, §7.4).
func closedBy(body []byte) cause {
	if len(body) == 0 {
		return echoed(websocket.CloseNoStatusReceived)
	}
	if len(body) == 1 {
		return causeProtocolError
	}
	code := int(binary.BigEndian.Uint16(body))
	switch {
	case !legalCloseCode(code):
		return causeProtocolError
	case !utf8.Valid(body[2:]): // RFC 6455 §8.1
		return causeInvalidUTF8
	}
	return echoed(code)
}
