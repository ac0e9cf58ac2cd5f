package chatbroadcast

import (
	"errors"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// The reasons for which a handshake is refused, as metrics, events and the placeholder give them.
const (
	refusedHandshake        = "handshake"
	refusedOrigin           = "origin"
	refusedHubName          = "hub_name"
	refusedMaxClients       = "max_clients"
	refusedMaxClientsPerHub = "max_clients_per_hub"
	refusedMaxClientsPerIP  = "max_clients_per_ip"
	refusedMaxHubs          = "max_hubs"
	refusedMaxHubsPerIP     = "max_hubs_per_ip"
	refusedShuttingDown     = "shutting_down"
)

var refusalReasons = []string{
	refusedHandshake, refusedOrigin, refusedHubName, refusedMaxClients, refusedMaxClientsPerHub, refusedMaxClientsPerIP,
	refusedMaxHubs, refusedMaxHubsPerIP, refusedShuttingDown,
}

// A refusal is an error with one of these reasons.
type refusal struct {
	error
	reason string
}

// refuse returns the error for Caddy to answer a request with.
func refuse(status int, reason string, err error) error {
	return caddyhttp.Error(status, &refusal{err, reason})
}

// Unwrap returns the error itself.
func (r *refusal) Unwrap() error { return r.error }

// refusalReason returns why a handshake was refused with err: what has no other reason was malformed, or of a kind that
// is not supported.
func refusalReason(err error) string {
	if r, ok := errors.AsType[*refusal](err); ok {
		return r.reason
	}
	return refusedHandshake
}
