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

// maxHubName and maxUser bound, in bytes, the names from a request that the server keeps.
const (
	maxHubName = 255
	maxUser    = 1024
)

// The placeholders that the handler sets for the rest of the handler chain and the access log.
const (
	placeholderHub      = "http.chat_broadcast.hub"       // the hub's name
	placeholderClientID = "http.chat_broadcast.client_id" // set once the client has joined
	placeholderRefused  = "http.chat_broadcast.refused"   // the reason of a refusal
)

// hubFor returns the name of the hub that r asks for. It returns an error for Caddy to answer if the page of r must not
// connect or the name is invalid.
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

// userOf returns the user who makes the request of repl; "" is anonymous. It returns an error for Caddy to answer if
// the name is too long or not UTF-8.
func (h *Handler) userOf(repl *caddy.Replacer) (string, error) {
	user := repl.ReplaceAll(h.userValue, "")
	if len(user) > maxUser {
		return "", caddyhttp.Error(http.StatusBadRequest, fmt.Errorf("user is longer than %d bytes", maxUser))
	}
	// JSON replaces bytes that are not UTF-8: it would show another user, and a client that pages through a roster
	// would ask for the users after that other one.
	if !utf8.ValidString(user) {
		return "", caddyhttp.Error(http.StatusBadRequest, errors.New("user is not valid UTF-8"))
	}
	return user, nil
}

// replacer returns the replacer for the placeholders of r.
func replacer(r *http.Request) *caddy.Replacer {
	return r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
}

// checkHubName returns an error unless name is 1 to maxHubName bytes of valid UTF-8 without control characters, so that
// logs and lists can show it.
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
	case name == "." || name == "..": // as a segment of a path they would lead elsewhere
		return fmt.Errorf("the hub's name must not be %q", name)
	}
	return nil
}

// clientIP returns Caddy's client IP, and the block that counts as one address: an IPv4 address itself, and of an IPv6
// address the /64, which a single customer usually has. Clients without an address, such as those on Unix sockets,
// share the zero block.
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

// warnWithoutAddress logs a warning, once a minute at most: the named limit takes all clients without an address for
// one client. Caddy ignores the addresses that a proxy on a Unix socket reports, unless it is configured to trust them.
func (h *Handler) warnWithoutAddress(limit string) {
	hubs.addressWarning.warn(1, func(int) {
		h.lease.scope.logger().Warn("clients without an address count as one client: "+
			"for a proxy on a Unix socket, set trusted_proxies_unix in the global option servers", zap.String("limit", limit))
	})
}
