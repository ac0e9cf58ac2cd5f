package chatbroadcast

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/gorilla/websocket"
	"go.uber.org/zap"
)

// retryAfter is what a refused client is told to wait, in seconds.
const retryAfter = "5"

// maxHubName and maxUser bound, in bytes, what a client can make the server keep of its request.
const (
	maxHubName = 255
	maxUser    = 1024
)

// upgrader does the handshake of RFC 6455 §4.2. The origin is checked before it is asked.
var upgrader = websocket.Upgrader{
	WriteBufferPool: new(sync.Pool), // gorilla writes no messages for us: let it keep no buffer for that
	CheckOrigin:     func(*http.Request) bool { return true },
	Error: func(w http.ResponseWriter, _ *http.Request, status int, reason error) {
		h := w.(*handshake)
		h.refusal = caddyhttp.Error(status, reason)
	},
}

// handshake is the response writer on which gorilla upgrades. The connection that it gives away is a wire
// without one: the response that gorilla writes is kept there, so that everything can still be refused.
type handshake struct {
	http.ResponseWriter
	wire    *wire
	refusal error
}

// Hijack implements http.Hijacker.
func (h *handshake) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.wire, bufio.NewReadWriter(&h.wire.client.in, bufio.NewWriterSize(h.wire, 1)), nil
}

// isUpgrade reports whether r asks for WebSocket, in whichever version of HTTP.
func isUpgrade(r *http.Request) bool {
	return websocket.IsWebSocketUpgrade(r) || isExtendedConnect(r)
}

// isExtendedConnect reports whether r asks for WebSocket by the CONNECT method of HTTP/2 (RFC 8441), where Go
// passes the protocol as a header, or HTTP/3 (RFC 9220), where quic-go passes it as the request's protocol.
func isExtendedConnect(r *http.Request) bool {
	return r.Method == http.MethodConnect && (r.Header.Get(":protocol") == "websocket" || r.Proto == "websocket")
}

// The placeholders that the handler sets for the rest of the handler chain and the access log.
const (
	placeholderHub      = "http.chat_broadcast.hub"       // the hub's name
	placeholderClientID = "http.chat_broadcast.client_id" // once it has joined
	placeholderRefused  = "http.chat_broadcast.refused"   // the reason of a refusal
)

// upgrade turns r into a client of its hub, or refuses r before the 101 is sent. The client lives on when upgrade
// returns, and touches neither the request nor its context any more.
func (h *Handler) upgrade(w http.ResponseWriter, r *http.Request) error {
	if err := h.tryUpgrade(w, r); err != nil {
		return h.refused(w, r, err, refusedHandshake)
	}
	return nil
}

// tryUpgrade is upgrade, but returns an error for a request that it refuses.
func (h *Handler) tryUpgrade(w http.ResponseWriter, r *http.Request) error {
	repl := replacer(r)
	if err := checkRequest(w.Header(), r); err != nil {
		return err
	}
	name, err := h.hubFor(r, repl)
	if err != nil {
		return err
	}
	user, err := h.userOf(repl)
	if err != nil {
		return err
	}

	c := &client{
		settings: h.settings,
		scope:    h.lease.scope,
		user:     user,
		joined:   time.Now(),
	}
	c.ip, c.prefix = clientIP(r)
	if h.MaxClientsPerIP > 0 && !c.prefix.IsValid() {
		h.warnWithoutAddress("max_clients_per_ip")
	}
	if h.Rate != nil {
		c.limiter = h.Rate.limiter()
	}
	c.wire.client = c
	c.state.Store(stateWriting) // until start
	header, err := c.shake(w, r)
	if err != nil {
		return err
	}
	if c.speaksEvents {
		if err := c.introduce(r.URL.Query()); err != nil {
			return caddyhttp.Error(http.StatusBadRequest, err)
		}
	}
	if err := hubs.join(c, name, h.limits); err != nil {
		return refuseJoin(w.Header(), err)
	}
	c.worked = requestWork
	repl.Set(placeholderClientID, c.id.String())
	if err := c.switchProtocols(w, header); err != nil {
		c.abandon()
		return err
	}
	if r.Context().Err() != nil {
		// The client went away while it was sent the 101, without a word, and net/http has noticed: that cancels the
		// context, too. Started now, the client would not wait for the handler chain.
		c.cut(causeGone)
		c.finish()
		return nil
	}
	// Canceled by net/http when the whole handler chain, logging included, has returned.
	context.AfterFunc(r.Context(), c.start)
	return nil
}

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
	user := repl.ReplaceAll(h.user, "")
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

// checkRequest refuses what gorilla would accept or would answer with a less fitting status. It may set the
// headers that belong to the refusal.
func checkRequest(header http.Header, r *http.Request) error {
	switch {
	case isExtendedConnect(r) || r.ProtoMajor > 1:
		return caddyhttp.Error(http.StatusNotImplemented,
			errors.New("WebSocket over HTTP/2 and HTTP/3 is not implemented: connect with HTTP/1.1"))
	case r.Method != http.MethodGet:
		header.Set("Allow", http.MethodGet)
		return caddyhttp.Error(http.StatusMethodNotAllowed,
			fmt.Errorf("a WebSocket handshake is a GET request, not %s", r.Method))
	case !r.ProtoAtLeast(1, 1):
		return caddyhttp.Error(http.StatusBadRequest, errors.New("a WebSocket handshake needs HTTP/1.1"))
	case r.ContentLength != 0:
		return caddyhttp.Error(http.StatusBadRequest, errors.New("a WebSocket handshake has no body"))
	case !hasToken(r.Header["Sec-Websocket-Version"], "13"):
		header["Sec-WebSocket-Version"] = []string{"13"} // RFC 6455 §4.2.2, in its spelling
		header.Set("Upgrade", "websocket")               // RFC 9110 §15.5.22
		connection := "Upgrade"                          // RFC 9110 §7.8
		if r.Close {
			connection = "Upgrade, close" // net/http would replace a value without close
		}
		header.Set("Connection", connection)
		return caddyhttp.Error(http.StatusUpgradeRequired,
			errors.New("the only supported Sec-WebSocket-Version is 13"))
	case len(r.Header["Sec-Websocket-Key"]) > 1: // RFC 6455 §11.3.1; gorilla would take the first
		return caddyhttp.Error(http.StatusBadRequest, errors.New("a WebSocket handshake has one Sec-WebSocket-Key"))
	}
	return nil
}

// hasToken reports whether one of the comma-separated lists in values contains token.
func hasToken(values []string, token string) bool {
	for _, v := range values {
		for t := range strings.SplitSeq(v, ",") {
			if strings.TrimSpace(t) == token {
				return true
			}
		}
	}
	return false
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

// shake lets gorilla check the handshake and returns the header of the 101 it would send.
func (c *client) shake(w http.ResponseWriter, r *http.Request) (http.Header, error) {
	h := &handshake{ResponseWriter: w, wire: &c.wire}
	c.borrowBuffer() // gorilla keeps a buffer as large as that, and makes itself another one otherwise
	defer c.returnBuffer()
	protocol := http.Header{}
	if c.speaksEvents = hasToken(r.Header["Sec-Websocket-Protocol"], eventsProtocol); c.speaksEvents {
		protocol.Set("Sec-WebSocket-Protocol", eventsProtocol)
	}
	ws, err := upgrader.Upgrade(h, r, protocol)
	if h.refusal != nil {
		return nil, h.refusal
	}
	if err != nil {
		return nil, caddyhttp.Error(http.StatusInternalServerError, fmt.Errorf("upgrading: %w", err))
	}
	c.ws = ws
	ws.SetReadLimit(int64(c.settings.maxMessageSize))
	ws.SetPingHandler(func(payload string) error {
		c.push(websocket.PongMessage, []byte(payload))
		return nil
	})
	ws.SetCloseHandler(func(int, string) error { return nil }) // see readFailed
	response, err := http.ReadResponse(bufio.NewReaderSize(bytes.NewReader(c.wire.response), len(c.wire.response)), r)
	c.wire.response = nil
	if err != nil {
		return nil, caddyhttp.Error(http.StatusInternalServerError, fmt.Errorf("reading the handshake's response: %w", err))
	}
	return response.Header, response.Body.Close()
}

// switchProtocols sends the 101 and takes the connection. The 101 goes through the response writers, not
// straight to the connection, because that is how access logs, metrics and header rules come to see it, and
// net/http writes it before it hands the connection over: nobody else writes at that time.
func (c *client) switchProtocols(w http.ResponseWriter, header http.Header) error {
	for name, values := range header {
		// Spelled as in RFC 6455: some clients compare names with case.
		w.Header()[strings.Replace(name, "Sec-Websocket-", "Sec-WebSocket-", 1)] = values
	}
	// So that a client that does not read cannot hold the handler; hijacking clears it.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(max(c.settings.writeTimeout, time.Second)))
	w.WriteHeader(http.StatusSwitchingProtocols)
	conn, rw, err := hijack(w)
	if err != nil {
		return caddyhttp.Error(http.StatusInternalServerError,
			fmt.Errorf("taking over the connection from %T: %w", w, err))
	}
	// A client may answer the 101 before it is hijacked: the HTTP server has that in its buffer.
	early, _ := rw.Reader.Peek(rw.Reader.Buffered()) // cannot fail: it is buffered
	c.mu.Lock()
	c.wire.attach(conn, bytes.Clone(early))
	c.mu.Unlock()
	return nil
}

// hijack takes the connection from the outermost writer that offers it, but passes Caddy's response recorders
// by. They would wrap it to count bytes for the access log, which is written when the handler returns, that is
// now: the count would be a data race, and the wrapper would keep the request alive and hide TCP from us.
func hijack(w http.ResponseWriter) (net.Conn, *bufio.ReadWriter, error) {
	for {
		_, recorder := w.(caddyhttp.ResponseRecorder)
		if h, ok := w.(http.Hijacker); ok && !recorder {
			return h.Hijack()
		}
		u, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return nil, nil, http.ErrNotSupported
		}
		w = u.Unwrap()
	}
}

// abandon undoes a join whose connection never came to be.
func (c *client) abandon() {
	c.cut(causeGone)
	c.hub.drop(c)
	c.hub.metrics.closed(causeGone)
	hubs.finished(c)
}

// refuseJoin maps a refusal of the registry to its status (design: 429 for an address, 503 for the rest).
func refuseJoin(header http.Header, err error) error {
	header.Set("Retry-After", retryAfter)
	status := http.StatusServiceUnavailable
	if errors.Is(err, errMaxClientsPerIP) || errors.Is(err, errMaxHubsPerIP) {
		status = http.StatusTooManyRequests
	}
	return caddyhttp.Error(status, err) // one of refusalReasons is in it
}

// Interface guards
var (
	_ http.Hijacker = (*handshake)(nil)
	_ io.Reader     = (*wire)(nil)
)
