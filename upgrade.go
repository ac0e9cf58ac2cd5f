package chatbroadcast

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/conn"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"github.com/gorilla/websocket"
)

// retryAfter is the Retry-After of a handshake or a POST over a limit, in seconds. refusePublish computes the one of
// `rate`.
const retryAfter = "5"

// upgrader does the handshake of RFC 6455 §4.2. The handler checks the Origin before.
var upgrader = websocket.Upgrader{
	WriteBufferPool: new(sync.Pool), // gorilla writes no messages here; with a pool it keeps no buffer for them
	CheckOrigin:     func(*http.Request) bool { return true },
	Error: func(w http.ResponseWriter, _ *http.Request, status int, reason error) {
		h := w.(*handshake)
		h.refusal = caddyhttp.Error(status, reason)
	},
}

// handshake is the response writer that gorilla upgrades. It hands gorilla a connection that sends nothing and keeps
// gorilla's response, so that the handler can still refuse the request.
type handshake struct {
	http.ResponseWriter
	reader  *ws.Reader
	refusal error
}

// Hijack implements http.Hijacker.
func (h *handshake) Hijack() (net.Conn, *bufio.ReadWriter, error) { return h.reader.Hijack() }

// isUpgrade reports whether r asks for WebSocket, in any version of HTTP.
func isUpgrade(r *http.Request) bool {
	return websocket.IsWebSocketUpgrade(r) || isExtendedConnect(r)
}

// isExtendedConnect reports whether r asks for WebSocket with the CONNECT method, over HTTP/2 (RFC 8441), where Go
// passes the protocol as a header, or over HTTP/3 (RFC 9220), where quic-go passes it as the request's protocol.
func isExtendedConnect(r *http.Request) bool {
	return r.Method == http.MethodConnect && (r.Header.Get(":protocol") == "websocket" || r.Proto == "websocket")
}

// upgrade makes r a client of its hub, or refuses r before it sends the 101. The client lives on when upgrade returns.
// From then on it uses neither the request nor its context.
func (h *Handler) upgrade(w http.ResponseWriter, r *http.Request) error {
	var m *member
	err := hubs.handshakers.run(func() (err error) {
		m, err = h.accept(w, r)
		return err
	})
	if err == nil {
		err = m.takeOver(w, r)
	}
	if err != nil {
		return h.refused(w, r, err, refusedHandshake)
	}
	return nil
}

// accept makes r a member of its hub and sends the 101. It returns an error for a request that it refuses.
func (h *Handler) accept(w http.ResponseWriter, r *http.Request) (*member, error) {
	repl := replacer(r)
	if err := checkRequest(w.Header(), r); err != nil {
		return nil, err
	}
	name, err := h.hubFor(r, repl)
	if err != nil {
		return nil, err
	}
	user, err := h.userOf(repl)
	if err != nil {
		return nil, err
	}

	m := &member{scope: h.lease.scope}
	var address netip.Prefix
	m.ip, address = clientIP(r)
	if h.MaxClientsPerIP > 0 && !address.IsValid() {
		h.warnWithoutAddress("max_clients_per_ip")
	}
	m.client.Init(hubs.process, m, user, address, h.settings)
	response, err := h.shake(&m.client, w, r)
	if err != nil {
		return nil, err
	}
	if err := hubs.join(r.Context(), m, name, h.limits); err != nil {
		return nil, refuseJoin(w.Header(), err)
	}
	sent := false
	defer func() {
		if !sent { // a response writer has panicked
			m.abandon()
		}
	}()
	repl.Set(placeholderClientID, m.client.ID().String())
	if nc, ok := r.Context().Value(connectionKey{}).(net.Conn); ok && m.client.HasFrames() {
		m.client.Held(conn.Hold(nc)) // the 101 leaves with them, in one segment
	}
	switchProtocols(w, response, h.settings.WriteTimeout)
	sent = true
	return m, nil
}

// connectionKey is the key of a request's connection in its context.
type connectionKey struct{}

// withConnection puts a new connection of a server into the context of its requests.
func withConnection(ctx context.Context, nc net.Conn) context.Context {
	if ctx.Value(connectionKey{}) != nil { // another handler of the server has done it
		return ctx
	}
	return context.WithValue(ctx, connectionKey{}, nc)
}

// takeOver hijacks the connection of r, on which the 101 has been sent, for m.
func (m *member) takeOver(w http.ResponseWriter, r *http.Request) error {
	taken := false
	defer func() {
		if !taken {
			m.abandon()
		}
	}()
	cn, err := hijack(w)
	if err != nil {
		return err
	}
	taken = true
	m.client.Attach(cn)
	if r.Context().Err() != nil {
		// The client vanished while it was sent the 101. net/http has noticed and canceled the context. If it started now, it would
		// not wait for the handler chain.
		m.client.Abandon()
		return nil
	}
	// net/http cancels the context when the whole handler chain, logging included, has returned.
	context.AfterFunc(r.Context(), m.client.Start)
	return nil
}

// checkRequest refuses requests that gorilla would accept, or would refuse with a less fitting status. It may set
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
	case len(r.Header["Sec-Websocket-Key"]) > 1: // RFC 6455 §11.3.1; gorilla would take the first one
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

// sinceParameter, replayParameter and checkParameter are the only parameters of the query that the server reads. The others
// belong to the application, so these have a prefix that no application uses.
const (
	sinceParameter  = "chat_broadcast_since"
	replayParameter = "chat_broadcast_replay"
)

// replayOf returns what the query of a client of the events protocol says about its replay: where the client wants to go on,
// or nil, and whether it takes bundles.
func replayOf(query url.Values) (since *hub.Resumption, bundles bool, err error) {
	if since, err = sinceOf(query); err != nil {
		return nil, false, err
	}
	replay, ok := query[replayParameter]
	if ok && !slices.Equal(replay, []string{"bundles"}) {
		return nil, false, fmt.Errorf("%s: must be \"bundles\", once, got %q", replayParameter, replay)
	}
	return since, ok, nil
}

// sinceOf returns where a client of the events protocol wants to go on, or nil if the query does not say.
func sinceOf(query url.Values) (*hub.Resumption, error) {
	since, ok := query[sinceParameter]
	if !ok {
		return nil, nil
	}
	if len(since) > 1 {
		return nil, fmt.Errorf("%s: must be there once, got it %d times", sinceParameter, len(since))
	}
	parsed, ok := hub.ParseResumption(since[0])
	if !ok {
		return nil, fmt.Errorf("%s: must be <epoch>:<seq> as hello and message gave them, got %q", sinceParameter, since[0])
	}
	return parsed, nil
}

// shake lets gorilla check the handshake for c, and chooses the protocol of c. It returns gorilla's response, the 101.
func (h *Handler) shake(c *hub.Client, w http.ResponseWriter, r *http.Request) (response string, err error) {
	shaken := &handshake{ResponseWriter: w, reader: c.Reader()}
	protocol := http.Header{}
	events := hasToken(r.Header["Sec-Websocket-Protocol"], hub.EventsProtocol)
	if events {
		protocol.Set("Sec-WebSocket-Protocol", hub.EventsProtocol)
	}
	conn, err := upgrader.Upgrade(shaken, r, protocol)
	if shaken.refusal != nil {
		return "", shaken.refusal
	}
	if err != nil {
		return "", caddyhttp.Error(http.StatusInternalServerError, fmt.Errorf("upgrading: %w", err))
	}
	c.Reader().Open(conn, h.settings.MaxMessageSize, c.Pong)
	response = string(c.Reader().TakeResponse())
	if events {
		since, bundles, err := replayOf(r.URL.Query())
		if err != nil {
			return "", caddyhttp.Error(http.StatusBadRequest, err)
		}
		c.SpeakEvents(since)
		if bundles {
			c.TakeBundles()
		}
	}
	return response, nil
}

// switchProtocols sends gorilla's response. It sends it through the response writers and not straight to the connection, so that
// access logs, metrics and header rules see it. The names of the header keep gorilla's spelling, which is that of RFC 6455, because
// some clients compare them with case.
func switchProtocols(w http.ResponseWriter, response string, timeout time.Duration) {
	for line := range strings.SplitSeq(response, "\r\n") {
		if name, value, ok := strings.Cut(line, ": "); ok {
			w.Header()[name] = []string{value}
		}
	}
	// With a deadline, a client that does not read cannot hold the handler. Hijacking clears it.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(max(timeout, time.Second)))
	w.WriteHeader(http.StatusSwitchingProtocols)
	if f, ok := hijackable(w).(http.Flusher); ok {
		f.Flush() // otherwise Hijack does it
	}
}

// hijack takes the connection over.
func hijack(w http.ResponseWriter) (conn.Conn, error) {
	var hijacked net.Conn
	var rw *bufio.ReadWriter
	err := error(http.ErrNotSupported)
	if h, ok := hijackable(w).(http.Hijacker); ok {
		hijacked, rw, err = h.Hijack()
	}
	if err != nil {
		return nil, caddyhttp.Error(http.StatusInternalServerError, fmt.Errorf("taking over the connection from %T: %w", w, err))
	}
	// A client may answer the 101 before the connection is hijacked. Then the HTTP server has the answer in its buffer.
	early, _ := rw.Reader.Peek(rw.Reader.Buffered()) // cannot fail: it is buffered
	return conn.Wrap(hijacked, bytes.Clone(early)), nil
}

// hijackable returns the outermost writer that offers to be hijacked, but goes past Caddy's response recorders. They
// would wrap the connection to count bytes for the access log. Caddy writes that log when the handler returns, which is
// now, so the count would be a data race. The wrapper would also keep the request alive and hide the TCP connection.
func hijackable(w http.ResponseWriter) http.ResponseWriter {
	for {
		_, recorder := w.(caddyhttp.ResponseRecorder)
		if _, ok := w.(http.Hijacker); ok && !recorder {
			return w
		}
		u, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return nil
		}
		w = u.Unwrap()
	}
}

// refuseJoin maps a refusal of the registry to its HTTP status: 429 if it is about the client's address, and 503
// otherwise.
func refuseJoin(header http.Header, err error) error {
	header.Set("Retry-After", retryAfter)
	status := http.StatusServiceUnavailable
	if errors.Is(err, errMaxClientsPerIP) || errors.Is(err, errMaxHubsPerIP) {
		status = http.StatusTooManyRequests
	}
	return caddyhttp.Error(status, err) // err has the reason
}

// Interface guards
var _ http.Hijacker = (*handshake)(nil)
