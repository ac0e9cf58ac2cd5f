package ws

import "encoding/binary"

// A frameScan follows a client's frames, in whichever pieces they arrive, up to the first close frame or the first
// length with its top bit set. On both gorilla/websocket and RFC 6455 disagree: gorilla ignores a close body of one byte,
// knows fewer close codes than IANA, and gives a wrong reason for the others. The zero frameScan is ready.
//
// A scan checks nothing else. gorilla stops at the first malformed frame. A scan that has gone on beyond such a frame is
// never asked what it found there: see verdict.
type frameScan struct {
	head  [MaxHeader]byte // of the current frame, without the mask
	got   uint8           // bytes of head that have arrived
	ended bool            // the scan has found a close frame or such a length

	// left is how many bytes of the current frame's mask and payload are still to come. Once ended is set, it is how many
	// bytes came after the end of the scan.
	left uint64
	body []byte // of a close frame; while it is incomplete, behind its mask and masked
}

// scan takes the next bytes of the connection.
func (s *frameScan) scan(p []byte) {
	for len(p) > 0 && !s.ended {
		if s.left == 0 {
			if n := wholeFrame(p); n > 0 && s.got == 0 { // most frames take this way; scanHead takes five times as long
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

// wholeFrame returns the size of the data frame with which p begins. It returns 0 for an incomplete frame, a frame with a
// 64-bit length, and a control frame.
func wholeFrame(p []byte) (size int) {
	if len(p) < 4 || p[0]&controlBit != 0 {
		return 0
	}
	switch length := int(p[1] &^ maskBit); length {
	case length16:
		size = 2 + 2 + maskSize + int(binary.BigEndian.Uint16(p[2:]))
	case length64:
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
		case length16:
			return 2 + 2
		case length64:
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
	// gorilla stops at a long close frame, two bytes after its beginning. The scan must not keep its body.
	if length>>63 != 0 || s.inClose() && length > maxControlPayload {
		s.ended = true
		return n
	}
	s.left = maskSize + length
	return n
}

// inClose reports whether the current frame is a close frame.
func (s *frameScan) inClose() bool { return s.head[0]&^finBit == CloseMessage }

// verdict returns why the connection must close, if the scan ended exactly before the last unread bytes that arrived. Only
// then the scan ended where gorilla stopped. goodbye reports whether it ended with a close frame.
func (s *frameScan) verdict(unread int) (why Close, goodbye, ok bool) {
	if !s.ended || s.left != uint64(unread) {
		return Close{}, false, false
	}
	if s.body == nil {
		return ProtocolError, false, true
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
