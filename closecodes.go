package chatbroadcast

import "github.com/gorilla/websocket"

// cause is why a connection ended: the close code (RFC 6455 §7.4) and the reason that the close frame,
// the log and the documentation give for it.
type cause struct {
	code   int
	reason string
}

// Every close that the server initiates is listed here, once. The README's table is this one; a test
// compares the two.
var (
	causeShuttingDown  = cause{websocket.CloseGoingAway, "shutting_down"}
	causeProtocolError = cause{websocket.CloseProtocolError, ""}
	causeInvalidUTF8   = cause{websocket.CloseInvalidFramePayloadData, "invalid_utf8"}
	causeReadOnly      = cause{websocket.ClosePolicyViolation, "read_only"}
	causeRateLimited   = cause{websocket.ClosePolicyViolation, "rate_limited"}
	causeKicked        = cause{websocket.ClosePolicyViolation, "kicked"}
	causeTooBig        = cause{websocket.CloseMessageTooBig, "too_big"}
	causeInternal      = cause{websocket.CloseInternalServerErr, "internal"}
	causeHubRemoved    = cause{websocket.CloseServiceRestart, "hub_removed"}
	causeMaxAge        = cause{websocket.CloseServiceRestart, "max_age"}
	causeLagged        = cause{websocket.CloseTryAgainLater, "lagged"}
	causeWriteTimeout  = cause{websocket.CloseTryAgainLater, "write_timeout"}
	causeBusy          = cause{websocket.CloseTryAgainLater, "busy"}

	// The two that no frame carries: the peer sees an abnormal closure, 1006 (RFC 6455 §7.1.5).
	causePingTimeout = cause{websocket.CloseAbnormalClosure, "ping_timeout"}
	causeGone        = cause{websocket.CloseAbnormalClosure, ""}
)

// causes are the closed set of what a metric may be labeled with: those above, and the peer's own goodbye.
var causes = []cause{
	causeShuttingDown, causeProtocolError, causeInvalidUTF8, causeReadOnly, causeRateLimited, causeKicked, causeTooBig,
	causeInternal, causeHubRemoved, causeMaxAge, causeLagged, causeWriteTimeout, causeBusy, causePingTimeout, causeGone,
	{code: websocket.CloseNormalClosure},
	{code: websocket.CloseGoingAway},
}

// echoed returns the cause of a close that the peer asked for. code is legal to send (RFC 6455 §7.4.1)
// or 1005, which stands for a close frame without one.
func echoed(code int) cause { return cause{code: code} }

// legalCloseCode reports whether an endpoint may send a close frame with this code: those that IANA has registered, and
// those that libraries and applications may use (RFC 6455 §7.4).
func legalCloseCode(code int) bool {
	switch code {
	case 1004, websocket.CloseNoStatusReceived, websocket.CloseAbnormalClosure: // reserved
		return false
	}
	const badGateway = 1014 // the last one that is registered, but for 1015, which is reserved
	return code >= websocket.CloseNormalClosure && code <= badGateway || code >= 3000 && code <= 4999
}

// frame returns the close frame that tells the peer, or nil where none can.
func (w cause) frame() []byte {
	if w.code == websocket.CloseAbnormalClosure {
		return nil
	}
	return appendFrame(nil, websocket.CloseMessage, websocket.FormatCloseMessage(w.code, w.reason))
}
