package hub

import "github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"

// The closes that the server begins, besides those that package ws finds in a client's frames. docs/clients.md has the
// same table; a test compares the two.
var (
	CloseShuttingDown = ws.Close{Code: ws.CloseGoingAway, Reason: "shutting_down"}
	CloseReadOnly     = ws.Close{Code: ws.ClosePolicyViolation, Reason: "read_only"}
	CloseRateLimited  = ws.Close{Code: ws.ClosePolicyViolation, Reason: "rate_limited"}
	CloseKicked       = ws.Close{Code: ws.ClosePolicyViolation, Reason: "kicked"}
	CloseInternal     = ws.Close{Code: ws.CloseInternalServerErr, Reason: "internal"}
	CloseHubRemoved   = ws.Close{Code: ws.CloseServiceRestart, Reason: "hub_removed"}
	CloseHubReset     = ws.Close{Code: ws.CloseServiceRestart, Reason: "hub_reset"}
	CloseMaxAge       = ws.Close{Code: ws.CloseServiceRestart, Reason: "max_age"}
	CloseLagged       = ws.Close{Code: ws.CloseTryAgainLater, Reason: "lagged"}
	CloseWriteTimeout = ws.Close{Code: ws.CloseTryAgainLater, Reason: "write_timeout"}
	CloseBusy         = ws.Close{Code: ws.CloseTryAgainLater, Reason: "busy"}
	CloseUnavailable  = ws.Close{Code: ws.CloseTryAgainLater, Reason: "unavailable"}

	// ClosePingTimeout and CloseGone have no close frame: the client sees an abnormal closure, 1006 (RFC 6455 §7.1.5).
	ClosePingTimeout = ws.Close{Code: ws.CloseAbnormalClosure, Reason: "ping_timeout"}
	CloseGone        = ws.Close{Code: ws.CloseAbnormalClosure}
)

// Closes returns every close that the server begins, and the two most frequent closes of clients. Metrics have a label
// for each of them, and one more for all others.
func Closes() []ws.Close {
	return []ws.Close{
		CloseShuttingDown, ws.ProtocolError, ws.InvalidUTF8, CloseReadOnly, CloseRateLimited, CloseKicked, ws.TooBig,
		CloseInternal, CloseHubRemoved, CloseHubReset, CloseMaxAge, CloseLagged, CloseWriteTimeout, CloseBusy, CloseUnavailable, ClosePingTimeout, CloseGone,
		{Code: ws.CloseNormalClosure},
		{Code: ws.CloseGoingAway},
	}
}
