package ws

import (
	"encoding/binary"
	"unicode/utf8"
)

// The close codes that the server uses (RFC 6455 §7.4.1 and IANA's registry).
const (
	CloseNormalClosure           = 1000
	CloseGoingAway               = 1001
	CloseProtocolError           = 1002
	CloseNoStatusReceived        = 1005 // in no frame: stands for a close frame without a code
	CloseAbnormalClosure         = 1006 // in no frame: stands for an end without a close frame
	CloseInvalidFramePayloadData = 1007
	ClosePolicyViolation         = 1008
	CloseMessageTooBig           = 1009
	CloseInternalServerErr       = 1011
	CloseServiceRestart          = 1012
	CloseTryAgainLater           = 1013
)

// A Close is why a connection ends: the code (RFC 6455 §7.4) and the reason that the close frame and the log give.
type Close struct {
	Code   int
	Reason string // at most 123 bytes of UTF-8
}

// The closes that this package decides on. Nobody changes them.
var (
	ProtocolError = Close{Code: CloseProtocolError}
	InvalidUTF8   = Close{CloseInvalidFramePayloadData, "invalid_utf8"}
	TooBig        = Close{CloseMessageTooBig, "too_big"}
)

// Frame returns the close frame that tells the peer. It returns nil for CloseAbnormalClosure, which no frame carries, and
// an empty frame for CloseNoStatusReceived (RFC 6455 §7.1.5).
func (c Close) Frame() []byte {
	switch c.Code {
	case CloseAbnormalClosure:
		return nil
	case CloseNoStatusReceived:
		return AppendFrame(nil, CloseMessage, nil)
	}
	body := append(binary.BigEndian.AppendUint16(nil, uint16(c.Code)), c.Reason...)
	return AppendFrame(nil, CloseMessage, body)
}

// LegalCloseCode reports whether an endpoint may send a close frame with this code: one that IANA has registered, or one
// of those for libraries and applications (RFC 6455 §7.4).
func LegalCloseCode(code int) bool {
	switch code {
	case 1004, CloseNoStatusReceived, CloseAbnormalClosure: // reserved
		return false
	}
	const badGateway = 1014 // the last registered one, except for 1015, which is reserved
	return code >= CloseNormalClosure && code <= badGateway || code >= 3000 && code <= 4999
}

// closedBy returns how a connection ends whose client has sent a close frame with this body (RFC 6455 §5.5.1, §7.4). The
// server answers with the client's code, or refuses a body that is malformed.
func closedBy(body []byte) Close {
	if len(body) == 0 {
		return Close{Code: CloseNoStatusReceived}
	}
	if len(body) == 1 {
		return ProtocolError
	}
	code := int(binary.BigEndian.Uint16(body))
	switch {
	case !LegalCloseCode(code):
		return ProtocolError
	case !utf8.Valid(body[2:]): // RFC 6455 §8.1
		return InvalidUTF8
	}
	return Close{Code: code}
}
