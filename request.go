package chatbroadcast

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

// maxHubName and maxUser bound, in bytes, what a client can make the server keep of its request.
const (
	maxHubName = 255
	maxUser    = 1024
)

// The placeholders that the handler sets for the rest of the handler chain and the access log.
const (
	placeholderHub      = "http.chat_broadcast.hub"       // the hub's name
	placeholderClientID = "http.chat_broadcast.client_id" // once it has joined
	placeholderRefused  = "http.chat_broadcast.refused"   // the reason of a refusal
)

// hubFor returns the name of the hub that r is for, or an error for Caddy to answer: r's page must be allowed to
// connect, and the name be one.
func (h *Handler) hubFor(r *http.Request, repl *caddy.Replacer) (string, error) {
	if err := h.checkOrigin(r, repl); err != nil {
		return "", refuse(http.StatusForbidden, refusedOrigin, err)
	}
	name, err := h.hubName(r, repl)
	if err == nil {
		err = checkHubName(name)
	}
	if err != nil {
		return "", refuse(http.StatusBadRequest, refusedHubName, err)
	}
	repl.Set(placeholderHub, name)
	return name, nil
}

// hubName returns the name of the hub that r asks for.
func (h *Handler) hubName(r *http.Request, repl *caddy.Replacer) (string, error) {
	if h.Hub == "" {
		return h.placement().hubName(r)
	}
	name := repl.ReplaceAll(h.Hub, "")
	if isDefaultHubName(name) {
		return "", errDefaultHubName
	}
	return name, nil
}

// userOf returns who makes the request that repl knows, or an error for Caddy to answer.
func (h *Handler) userOf(repl *caddy.Replacer) (string, error) {
	user := repl.ReplaceAll(h.userValue, "")
	if len(user) > maxUser {
		return "", caddyhttp.Error(http.StatusBadRequest, fmt.Errorf("user is longer than %d bytes", maxUser))
	}
	// JSON would show it as somebody else, and who pages through a roster would ask for those after somebody else.
	if !utf8.ValidString(user) {
		return "", caddyhttp.Error(http.StatusBadRequest, errors.New("user is not valid UTF-8"))
	}
	return user, nil
}

// replacer returns what knows the placeholders of r.
func replacer(r *http.Request) *caddy.Replacer {
	return r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
}

// checkHubName accepts 1 to maxHubName bytes of valid UTF-8 without control characters, so that a name can be
// logged and shown.
func checkHubName(name string) error {
	switch {
	case name == "":
		return errors.New("the hub's name is empty")
	case len(name) > maxHubName:
		return fmt.Errorf("the hub's name is longer than %d bytes", maxHubName)
	case !utf8.ValidString(name):
		return errors.New("the hub's name is not valid UTF-8")
	case strings.ContainsFunc(name, unicode.IsControl):
		return errors.New("the hub's name contains a control character")
	case name == "." || name == "..": // as a segment of a path it would lead elsewhere
		return fmt.Errorf("the hub's name must not be %q", name)
	}
	return nil
}

// clientIP returns the address that Caddy takes for the client's, and the block that counts as one address:
// itself, and of IPv6 the /64 that a single customer usually has. Clients without an address, such as those on
// Unix sockets, share the zero block.
func clientIP(r *http.Request) (string, netip.Prefix) {
	ip, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	addr, err := netip.ParseAddr(ip)
	if err != nil {
		return ip, netip.Prefix{}
	}
	addr = addr.Unmap().WithZone("")
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	prefix, _ := addr.Prefix(bits) // fails only for a number of bits that the address does not have
	return ip, prefix
}

// warnWithoutAddress tells the operator that the named limit takes all clients without an address for one client, because
// Caddy does not know what a proxy on a Unix socket says. It does so once a minute at most.
func (h *Handler) warnWithoutAddress(limit string) {
	hubs.addressWarning.warn(1, func(int) {
		h.lease.scope.logger().Warn("clients without an address count as one client: "+
			"for a proxy on a Unix socket, set trusted_proxies_unix in the global option servers", zap.String("limit", limit))
	})
}
