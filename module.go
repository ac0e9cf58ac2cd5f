// Package chatbroadcast is a Caddy HTTP handler that joins WebSocket clients to named, in-process broadcast hubs. A hub
// sends each message of a client to all its clients.
package chatbroadcast

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
)

const (
	moduleID      = "http.handlers.chat_broadcast"
	clientFilesID = "http.handlers.chat_broadcast_client"
)

func init() {
	caddy.RegisterModule(new(Handler))
	caddy.RegisterModule(new(ClientFiles))
	httpcaddyfile.RegisterDirective("chat_broadcast", parseCaddyfile)
	httpcaddyfile.RegisterDirective("chat_broadcast_client", parseClientFiles)
	// The one that comes first here runs first.
	httpcaddyfile.RegisterDirectiveOrder("chat_broadcast_client", httpcaddyfile.Before, "respond")
	httpcaddyfile.RegisterDirectiveOrder("chat_broadcast", httpcaddyfile.Before, "respond")
}

// The defaults. Each is safe for a small server that strangers can reach.
const (
	defaultHub            = "https://{site}{path}" // identifies the scope of default hubs; no configured value can equal it
	defaultUser           = "{http.auth.user.id}"
	defaultMaxMessageSize = 64 << 10 // a long chat message is 2 KiB; an inline thumbnail fits
	defaultMaxHubs        = 10_000
	defaultBufferMessages = 256
	defaultBufferSize     = 1 << 20
	defaultPingInterval   = caddy.Duration(25 * time.Second) // NATs forget idle connections after 30 s
	defaultPingTimeout    = caddy.Duration(10 * time.Second)
	defaultWriteTimeout   = caddy.Duration(10 * time.Second)
	defaultHistoryAge     = caddy.Duration(10 * time.Minute)
	defaultDrain          = caddy.Duration(3 * time.Second) // Caddy's systemd unit kills the process after 5 s
)

// The upper bounds. They leave room for arithmetic in 32-bit integers.
const (
	maxCount       = 1 << 24
	maxMessageSize = 256 << 20 // its event may be six times as large, if JSON escapes every byte
	maxBufferSize  = 512 << 20 // a log holds twice that

	maxDuration = caddy.Duration(365 * 24 * time.Hour)
	maxDrain    = caddy.Duration(10 * time.Minute) // a service manager has killed the process by then
)

// The values of OnLag.
const (
	onLagClose = "close"
	onLagSkip  = "skip"
)

// Handler joins clients that ask for WebSocket to a named broadcast hub. The hub sends each message of a client to all
// its clients. All other requests go to the next handler, so the same URL can serve a page. With `http_publish` a POST
// publishes. A GET with `chat_broadcast_check` in its query, or with the header `Chat-Broadcast-Check`, asks whether the
// hub would accept a client now, and why not: browsers tell a page nothing about a handshake that was refused.
//
// The zero value of every field is the safe default. A reload never drops a client whose `hub` value is still
// configured. The client keeps the settings it joined with, unless a field says otherwise.
type Handler struct {
	// The name of the hub that a client joins. Default: a hub for each path of each site, such as
	// `https://example.com/chat/lobby`. Only requests that pass the routes of that site reach such a hub.
	//
	// Placeholders are allowed. Caddy resolves them once, at the handshake; an unset placeholder is empty. The result
	// must be 1 to 255 bytes of valid UTF-8 without control characters, and not "." or ".."; otherwise the client gets
	// 400. It must not begin with `http://` or `https://`: such names belong to default hubs.
	//
	// Handlers whose hub resolves to the same name share that hub, so routes can give rights. After a reload the server
	// closes the clients of a value that is no longer configured, with 1012. It compares values as written here, with
	// their placeholders.
	Hub string `json:"hub,omitempty"`

	// Who the client is: in the log, in events and in the admin API, which can close the clients of a user.
	// Placeholders are allowed. At most 1024 bytes of valid UTF-8; otherwise the client gets 400. Empty means
	// anonymous. Default: `{http.auth.user.id}`, the user that Caddy's authentication has found. A reload changes it
	// for new clients.
	User string `json:"user,omitempty"`

	// The pages that may connect, and publish with `http_publish`, besides those of the request's own host. All other
	// pages get 403. Default: none, so only pages of the request's own host. A reload changes it for new clients and
	// new POSTs.
	//
	// A pattern is `[scheme://]host[:port]`. The host may begin with `*.` for one or more labels. A missing port is the
	// default of the page's scheme. An internationalized host may have either form. Placeholders are allowed. `file://`
	// stands for pages that an app opens from files; other apps have a scheme of their own, as in `app://localhost`. A
	// pattern that can never match, such as `null`, is an error.
	//
	// A single `*` allows every page, even a sandboxed one: any site that a visitor opens can then connect with the
	// visitor's cookies.
	//
	// Over TLS only pages with the scheme https belong to the request's own host. Without TLS pages with http and https
	// do, because Caddy cannot tell whether a proxy in front of it ends TLS.
	//
	// A request without an Origin passes, because programs send none. If its Sec-Fetch-Site is other than `same-origin`
	// and `none`, a browser sent it for a page of another site, and it passes only with `*`.
	Origins []string `json:"origins,omitempty"`

	// Whether clients may only listen. The first data frame closes its sender with 1008 `read_only`. POSTs may still
	// publish, see `http_publish`. Default: false. A reload changes it for new clients.
	ReadOnly bool `json:"read_only,omitempty"`

	// Whether a client receives its own messages. Default: true. A reload changes it for new clients.
	Echo *bool `json:"echo,omitempty"`

	// The largest message that a client may send, in bytes: 1 to 256 MiB. A larger one closes its sender with 1009
	// `too_big`. A larger message over `http_publish` or the admin API gets 413. Default: 64 KiB. A reload changes it
	// for new clients and new POSTs.
	MaxMessageSize int64 `json:"max_message_size,omitempty"`

	// How fast each client may send, and how fast each address may publish with `http_publish`. Default: no limit. A
	// reload changes it for new clients; a changed rate gives every address a full bucket.
	Rate *Rate `json:"rate,omitempty"`

	// The most clients of all handlers with the same `hub` value. More get 503. At most 16,777,216. Default: no limit.
	// A reload changes it at once, but closes nobody.
	MaxClients int `json:"max_clients,omitempty"`

	// The most clients in one hub, through whichever handlers they joined. More get 503. At most 16,777,216. Default:
	// no limit. A reload changes it at once, but closes nobody.
	MaxClientsPerHub int `json:"max_clients_per_hub,omitempty"`

	// The most clients from one address, of all handlers with the same `hub` value. More get 429. The address is
	// Caddy's client IP; an IPv6 address counts by its /64. All clients without an address count as one address. At
	// most 16,777,216. Default: no limit. A reload changes it at once, but closes nobody.
	MaxClientsPerIP int `json:"max_clients_per_ip,omitempty"`

	// The most open hubs of all handlers with the same `hub` value. To open another, the server closes a hub without
	// clients that it keeps for its history: the one that has been empty for longest, of the address that opened most
	// of them. Without such a hub, opening another gets 503. At most 16,777,216. Default: 10000. A reload changes it at
	// once, but closes no hub with clients.
	//
	// One address, by /64 for IPv6, may have opened at most as many hubs with clients as are left for others. Beyond
	// that it gets 429.
	MaxHubs int `json:"max_hubs,omitempty"`

	// How far behind a client may fall. A hub has the largest buffer of the handlers through which its clients joined.
	// After a reload, a larger buffer holds for a hub as soon as its next client joins, and a smaller one for hubs that
	// are opened from then on.
	Buffer *Buffer `json:"buffer,omitempty"`

	// What happens to a client that falls further behind than `buffer`. `close` closes it with 1013 `lagged`. With
	// `skip` it stays connected, loses the gap and goes on with the oldest message that is left. In either case the
	// server closes a client that is so stuck that it holds back more of the past than the hub's buffer. Default:
	// `close`. A reload changes it for new clients.
	OnLag string `json:"on_lag,omitempty"`

	// When the server pings silent clients, and when it gives them up. A reload changes it for new clients.
	Ping *Ping `json:"ping,omitempty"`

	// How long one write to a client, of at most 64 KiB (over TLS at most 16 KiB), may make no progress. Then the
	// server closes the client with 1013 `write_timeout`. At most a year. Default: 10s. A reload changes it for new
	// clients.
	WriteTimeout caddy.Duration `json:"write_timeout,omitempty"`

	// How long a connection may last. Then the server closes it with 1012 `max_age`, and the client may connect again.
	// The server spreads the time by ±10 %, so that clients that joined together do not return together. At most a
	// year. Default: no limit. A reload changes it for new clients.
	MaxAge caddy.Duration `json:"max_age,omitempty"`

	// How long shutdown waits for clients. It waits until every client has taken all published messages, has received
	// its 1001 `shutting_down` and, without TLS, has closed its connection; one dead client uses all of that time. The
	// longest value of all handlers counts. At most 10 minutes. Default: 3s. Caddy's systemd unit kills the process
	// after 5 s, so more than 4s does not fit there. A reload changes it at once.
	Drain caddy.Duration `json:"drain,omitempty"`

	// Which messages a hub keeps in memory, and sends to a joining client before live ones. It also says for how long a
	// hub outlives its last client. Default: off.
	//
	// A hub keeps messages of at most half of `buffer`'s bytes. A client may be behind by `buffer`'s messages besides
	// them. A hub has the largest history of the handlers through which its clients joined, or through which
	// `http_publish` opened it. All hubs of the process together keep at most `max_history` of the global option.
	// Beyond it hubs forget history early, first those of the address whose hubs take the most.
	//
	// After a reload, a larger history holds for a hub as soon as its next client joins, and a smaller one for hubs
	// that are opened from then on.
	History *History `json:"history,omitempty"`

	// Whether clients of the events protocol may ask which users are in the hub. Default: off. A reload changes it for
	// new clients.
	Presence *Presence `json:"presence,omitempty"`

	// Whether a POST that does not ask for WebSocket publishes its body in the hub. Every POST that the routes let
	// through may publish, so guard it with a matcher or with authentication. Default: false; then a POST goes to the
	// next handler. A reload changes it for new requests.
	//
	// A body with `Content-Type: application/octet-stream` is a binary message. Everything else is text and must be
	// UTF-8, otherwise it gets 400; a compressed body or another charset gets 415. `max_message_size` (413) and
	// `origins` (403) hold, and so does `rate` for each address, by /64 for IPv6 (429).
	//
	// The answer is 202 with `{"clients":n,"seq":n}`: how many clients receive the message, and its number in the hub.
	// In a hub without clients, `history` keeps the message; without `history` both numbers are 0. `read_only` concerns
	// WebSocket clients only: with both, only the server can publish.
	HTTPPublish bool `json:"http_publish,omitempty"`

	// The values that result from the fields above; Provision sets them.
	hubValue, userValue string
	placement           func() *placement // where the Handler stands in its server, computed at the first call
	limits              limits
	settings            *hub.Settings
	lease               *lease
}

// Rate is how fast a client may send. Each client has a bucket of messages that refills evenly. The server drops a
// message that finds the bucket empty. It closes a client with 1008 `rate_limited` when it has dropped as many of its
// messages as the bucket holds, since the bucket was last full.
//
// Each address has another such bucket for its POSTs with `http_publish`. Handlers with the same `hub` value and rate
// share it. A POST that finds it empty gets 429, and Retry-After says when there will be room.
type Rate struct {
	// How many messages the bucket holds: 1 to 16,777,216. Required.
	Messages int `json:"messages,omitempty"`

	// How long an empty bucket takes to refill: more than 0, at most a year. Required.
	Window caddy.Duration `json:"window,omitempty"`
}

// Buffer is how far behind a client may fall: in messages and in bytes, whichever bound it reaches first. A hub always
// keeps its newest message.
type Buffer struct {
	// How many messages: 1 to 16,777,216. Default: 256.
	Messages int `json:"messages,omitempty"`

	// How many bytes, with frame headers and 4 bytes for each message: 1 to 512 MiB. A hub's memory is at most twice
	// that. Default: 1 MiB.
	Size int64 `json:"size,omitempty"`
}

// Ping is how the server finds dead clients. Any bytes from a client are a sign of life.
type Ping struct {
	// How long a client may be silent before the server pings it: more than 0, at most a year. Default: 25s. The first
	// ping comes after a random time of half to all of it, so that the server does not ping clients that joined
	// together at the same moment. A client that keeps sending gets a ping at least every other interval,
	// unless it sends pings of the events protocol, which the server answers.
	Interval caddy.Duration `json:"interval,omitempty"`

	// How long the server waits for any bytes after the ping before it cuts the connection: more than 0, at most a
	// year. Default: 10s.
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// Whether the server sends no pings. Then it notices a vanished client only when writing to it fails. Default:
	// false.
	Off bool `json:"off,omitempty"`
}

// History is how many messages, and of what age, a hub keeps for clients that join.
type History struct {
	// How many messages: 1 to 16,777,216. Required.
	Messages int `json:"messages,omitempty"`

	// How old a message may be: more than 0, at most a year. The hub also stays open for so long after its last client
	// has left, or after its last message if that is later. Default: 10m.
	Age caddy.Duration `json:"age,omitempty"`
}

// Presence is what clients of the events protocol can learn about the users in the hub.
type Presence struct {
	// Whether the server also tells them which users come and go, at most once a second. Default: false.
	JoinLeave bool `json:"join_leave,omitempty"`
}

// orDefault returns v, or def for the zero value.
func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

// CaddyModule implements caddy.Module.
func (*Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: moduleID, New: func() caddy.Module { return new(Handler) }}
}

// Provision implements caddy.Provisioner.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.hubValue = orDefault(h.Hub, defaultHub)
	h.userValue = orDefault(h.User, defaultUser)
	h.limits = limits{
		maxClients:       h.MaxClients,
		maxClientsPerHub: h.MaxClientsPerHub,
		maxClientsPerIP:  h.MaxClientsPerIP,
		maxHubs:          orDefault(h.MaxHubs, defaultMaxHubs),
	}
	h.settings = h.newSettings()
	if err := hubs.metrics.register(ctx); err != nil {
		return fmt.Errorf("registering metrics: %w", err)
	}
	emitter, err := newEmitter(ctx)
	if err != nil {
		return fmt.Errorf("loading the events app: %w", err)
	}
	process, err := newProcessSettings(ctx, h.settings.MaxMessageSize)
	if err != nil {
		return fmt.Errorf("loading the chat_broadcast app: %w", err)
	}
	hubs.process.Incoming.Raise(h.settings.MaxMessageSize)
	h.lease = hubs.lease(h.hubValue, ctx.Logger(), emitter, process, time.Duration(orDefault(h.Drain, defaultDrain)))
	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	// The server's routes are complete once it has requests.
	h.placement = sync.OnceValue(func() *placement { return newPlacement(h, server) })
	if ok {
		server.RegisterConnContext(withConnection)
		// Caddy's shutdown of a server ignores upgraded connections and waits for all others. Do not wait for those
		// before closing the clients.
		server.RegisterOnShutdown(func() {
			if caddy.Exiting() {
				hubs.beginExit()
			}
		})
	}
	return nil
}

// newSettings returns the settings of clients that come in through the handler. Those of new(Handler) are the defaults.
func (h *Handler) newSettings() *hub.Settings {
	buffer := orDefault(h.Buffer, new(Buffer))
	ping := orDefault(h.Ping, new(Ping))
	s := &hub.Settings{
		ReadOnly:       h.ReadOnly,
		Echo:           h.Echo == nil || *h.Echo,
		MaxMessageSize: int(orDefault(h.MaxMessageSize, defaultMaxMessageSize)),
		BufferMessages: orDefault(buffer.Messages, defaultBufferMessages),
		BufferBytes:    int(orDefault(buffer.Size, defaultBufferSize)),
		SkipLag:        h.OnLag == onLagSkip,
		PingInterval:   time.Duration(orDefault(ping.Interval, defaultPingInterval)),
		PingTimeout:    time.Duration(orDefault(ping.Timeout, defaultPingTimeout)),
		WriteTimeout:   time.Duration(orDefault(h.WriteTimeout, defaultWriteTimeout)),
		MaxAge:         time.Duration(h.MaxAge),
	}
	if h.Rate != nil {
		s.Rate = hub.Rate{Messages: h.Rate.Messages, Window: time.Duration(h.Rate.Window)}
	}
	if ping.Off {
		s.PingInterval = 0
	}
	if h.History != nil {
		s.HistoryMessages = h.History.Messages
		s.HistoryAge = time.Duration(orDefault(h.History.Age, defaultHistoryAge))
	}
	if h.Presence != nil {
		s.Presence, s.JoinLeave = true, h.Presence.JoinLeave
	}
	return s
}

// Validate implements caddy.Validator. The parser of Caddyfiles makes the same checks, in order to name the line.
func (h *Handler) Validate() error {
	return errors.Join(
		checkHub(h.Hub),
		named("origins", checkOrigins(h.Origins)),
		checkRange("max_message_size", h.MaxMessageSize, 0, maxMessageSize),
		h.Rate.validate(),
		checkRange("max_clients", h.MaxClients, 0, maxCount),
		checkRange("max_clients_per_hub", h.MaxClientsPerHub, 0, maxCount),
		checkRange("max_clients_per_ip", h.MaxClientsPerIP, 0, maxCount),
		checkRange("max_hubs", h.MaxHubs, 0, maxCount),
		h.Buffer.validate(),
		checkOnLag(h.OnLag),
		h.Ping.validate(),
		checkDuration("write_timeout", h.WriteTimeout, 0, maxDuration),
		checkDuration("max_age", h.MaxAge, 0, maxDuration),
		checkDuration("drain", h.Drain, 0, maxDrain),
		h.History.validate(),
	)
}

func (r *Rate) validate() error {
	if r == nil {
		return nil
	}
	return errors.Join(
		checkRange("rate: messages", r.Messages, 1, maxCount),
		checkDuration("rate: window", r.Window, 1, maxDuration),
	)
}

func (b *Buffer) validate() error {
	if b == nil {
		return nil
	}
	return errors.Join(
		checkRange("buffer: messages", b.Messages, 0, maxCount),
		checkRange("buffer: size", b.Size, 0, maxBufferSize),
	)
}

func (h *History) validate() error {
	if h == nil {
		return nil
	}
	return errors.Join(
		checkRange("history: messages", h.Messages, 1, maxCount),
		checkDuration("history: age", h.Age, 0, maxDuration),
	)
}

func (p *Ping) validate() error {
	if p == nil {
		return nil
	}
	if p.Off && (p.Interval != 0 || p.Timeout != 0) {
		return errors.New("ping: off has neither interval nor timeout")
	}
	return errors.Join(
		checkDuration("ping: interval", p.Interval, 0, maxDuration),
		checkDuration("ping: timeout", p.Timeout, 0, maxDuration),
	)
}

// checkHub checks a hub value. It cannot check a value with placeholders, which depends on the request, except its
// beginning.
func checkHub(value string) error {
	switch {
	case value == "":
		return nil
	case isDefaultHubName(value):
		return named("hub", errDefaultHubName)
	case strings.Contains(value, "{"):
		return nil
	}
	return named("hub", checkHubName(value))
}

func checkOnLag(v string) error {
	switch v {
	case "", onLagClose, onLagSkip:
		return nil
	}
	return fmt.Errorf("on_lag: want %s or %s, got %q", onLagClose, onLagSkip, v)
}

// checkRange checks a count, or a size in bytes.
func checkRange[T int | int64](name string, v, least, most T) error {
	if v < least || v > most {
		return fmt.Errorf("%s: must be %d to %d, got %d", name, max(least, 1), most, v)
	}
	return nil
}

func checkDuration(name string, d, least, most caddy.Duration) error {
	switch {
	case d < least:
		return fmt.Errorf("%s: must be longer than 0, got %s", name, time.Duration(d))
	case d > most:
		return fmt.Errorf("%s: must be at most %s, got %s", name, time.Duration(most), time.Duration(d))
	}
	return nil
}

// named returns err with the name of the field in front, or nil.
func named(field string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", field, err)
}

// Cleanup implements caddy.CleanerUpper. Caddy also calls it after a failed Provision or Validate.
func (h *Handler) Cleanup() error {
	if h.lease != nil {
		hubs.release(h.lease) // the lease stays set, because requests may still be on their way through h
	}
	return nil
}

// ServeHTTP implements caddyhttp.MiddlewareHandler. It returns as soon as the connection is upgraded.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	switch {
	case isUpgrade(r):
		return h.upgrade(w, r)
	case isCheck(r):
		return h.check(w, r)
	case h.HTTPPublish && r.Method == http.MethodPost:
		return h.publish(w, r)
	}
	return next.ServeHTTP(w, r)
}

// Interface guards
var (
	_ caddy.Module                = (*Handler)(nil)
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.Validator             = (*Handler)(nil)
	_ caddy.CleanerUpper          = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
	_ caddyfile.Unmarshaler       = (*Handler)(nil)
)
