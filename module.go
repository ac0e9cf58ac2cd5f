// Package chatbroadcast is a Caddy HTTP handler that joins WebSocket clients to named, in-process broadcast
// hubs: what one client sends, every client of its hub receives.
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

const moduleID = "http.handlers.chat_broadcast"

func init() {
	caddy.RegisterModule(new(Handler))
	httpcaddyfile.RegisterDirective("chat_broadcast", parseCaddyfile)
	httpcaddyfile.RegisterDirectiveOrder("chat_broadcast", httpcaddyfile.Before, "respond")
}

// The defaults. Each is what a small server with strangers on it is safe with.
const (
	defaultHub            = "https://{site}{path}" // what a reload and limits go by; an explicit value cannot be it
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
	maxMessageSize = 256 << 20 // an event of it may be six times as large, if JSON escapes every byte
	maxBufferSize  = 512 << 20 // a log holds twice that

	maxDuration = caddy.Duration(365 * 24 * time.Hour)
	maxDrain    = caddy.Duration(10 * time.Minute) // a service manager has killed the process by then
)

// The values of OnLag.
const (
	onLagClose = "close"
	onLagSkip  = "skip"
)

// Handler joins clients that ask for WebSocket to a named broadcast hub: what one client sends, every client of
// that hub receives. All other requests go to the next handler, so the same URL can serve a page; with `http_publish`
// a POST publishes.
//
// The zero value of every field is the safe default. A reload never drops a client whose `hub` value is still
// configured; it keeps the settings it joined with unless a field says otherwise.
type Handler struct {
	// The name of the hub that a client joins: 1 to 255 bytes of valid UTF-8 without control characters, not "." or "..", else
	// the client is refused with 400. Placeholders are allowed, an unset one is empty; they are resolved once,
	// at the handshake. Handlers whose hub resolves to the same name share that hub, so that routes give
	// rights. Default: a hub for each path of each site, such as `https://example.com/chat/lobby`, which only requests
	// that pass the routes of that site reach. A value must not begin with `http://` or `https://`. The value as written here is what a
	// reload goes by: the clients of one that is gone from the configuration are closed with 1012.
	Hub string `json:"hub,omitempty"`

	// Who the client is, for the log, events and the admin API, which can close the clients of a user; placeholders are
	// allowed. At most 1024 bytes of UTF-8, else the client is refused
	// with 400; empty is anonymous. Default: `{http.auth.user.id}`, what Caddy's authentication has found.
	// After a reload it holds for new clients.
	User string `json:"user,omitempty"`

	// The pages that may connect, and publish with `http_publish`, besides those of the request's own host: patterns `[scheme://]host[:port]`,
	// where the host may begin with `*.` for one or more labels and a missing port is the default of the
	// page's scheme. Placeholders are allowed. `file://` stands for pages that an app opens from files; other apps have a
	// scheme of their own, as in `app://localhost`. An internationalized host is taken in either form. A pattern that can
	// never match, such as `null`, is an error. A single `*` allows every page, sandboxed ones too: any site
	// that a visitor opens can then connect with the visitor's cookies. Over TLS the pages of the request's own host are
	// those with the scheme https; where a proxy ends TLS before Caddy, Caddy cannot tell, and takes both schemes. A
	// request without an Origin passes, unless it has a Sec-Fetch-Site other than `same-origin` and `none`: then a browser
	// made it for a page of another site, and only `*` lets it pass. Default: the request's own host only; refused with
	// 403. After a reload it holds for new clients.
	Origins []string `json:"origins,omitempty"`

	// Whether clients may only listen: the first data frame closes its sender with 1008 `read_only`. Default:
	// false. After a reload it holds for new clients.
	ReadOnly bool `json:"read_only,omitempty"`

	// Whether a client receives its own messages. Default: true. After a reload it holds for new clients.
	Echo *bool `json:"echo,omitempty"`

	// The largest message a client may send, in bytes, 1 to 256 MiB; a larger one closes its sender with 1009
	// `too_big`, a larger one by `http_publish` or the admin API is refused with 413. Default: 64 KiB. After a reload it
	// holds for new clients and new requests.
	MaxMessageSize int64 `json:"max_message_size,omitempty"`

	// How fast each client may send, and each address publish with `http_publish`. Default: no limit. After a reload
	// it holds for new clients; addresses have a full bucket again if it was changed.
	Rate *Rate `json:"rate,omitempty"`

	// The most clients that may be connected through handlers with the same `hub` value; more are refused with
	// 503. At most 16,777,216. Default: no limit. After a reload it holds at once, but closes nobody.
	MaxClients int `json:"max_clients,omitempty"`

	// The most clients in one hub, whichever handler they came through; more are refused with 503. At most
	// 16,777,216. Default: no limit. After a reload it holds at once, but closes nobody.
	MaxClientsPerHub int `json:"max_clients_per_hub,omitempty"`

	// The most clients from one address, counted over handlers with the same `hub` value; more are refused with
	// 429. The address is Caddy's client IP; IPv6 addresses count by /64. At most 16,777,216. Default: no
	// limit. After a reload it holds at once, but closes nobody.
	MaxClientsPerIP int `json:"max_clients_per_ip,omitempty"`

	// The most hubs that may be open at a time through handlers with the same `hub` value. Beyond it the one closes
	// that has been without clients, kept for its history, for the longest time, of the address that opened most of them; if
	// no such hub is left, opening another is refused with 503. One address, by /64 for IPv6, may have opened at most as many
	// hubs as are left for others, else 429. At most 16,777,216. Default: 10000. After a reload it holds at once,
	// but closes nobody.
	MaxHubs int `json:"max_hubs,omitempty"`

	// How far behind a client may fall. A hub keeps the largest buffer of the handlers through which its clients
	// joined. After a reload a larger one holds for a hub as soon as a new client joins, a smaller one for hubs that are
	// opened from then on.
	Buffer *Buffer `json:"buffer,omitempty"`

	// What happens to a client that falls behind further than `buffer`: `close` closes it with 1013 `lagged`,
	// `skip` lets it go on with the oldest message there still is. A client so stuck that it holds on to more of
	// the past than the hub's buffer is closed in either case. Default: `close`. After a reload it holds for
	// new clients.
	OnLag string `json:"on_lag,omitempty"`

	// When silent clients are pinged and given up. After a reload it holds for new clients.
	Ping *Ping `json:"ping,omitempty"`

	// How long one write to a client, of at most 64 KiB (over TLS at most 16 KiB), may make no progress; the
	// client is then closed with 1013 `write_timeout`. At most a year. Default: 10s. After a reload it holds for new clients.
	WriteTimeout caddy.Duration `json:"write_timeout,omitempty"`

	// How long a connection may last; it is then closed with 1012 `max_age`, which asks the client to come again. Spread
	// by ±10 %, so that clients that joined together do not come again together. At most a year. Default: no limit. After a reload it
	// holds for new clients.
	MaxAge caddy.Duration `json:"max_age,omitempty"`

	// How long Caddy's exit may be held up until every client has taken what was published, got its 1001
	// `shutting_down` and, without TLS, has closed its connection. Of several handlers the longest counts. At most 10 minutes. Default:
	// 3s; more than 4s does not fit in the 5 s that Caddy's systemd unit allows. After a reload it holds at once.
	Drain caddy.Duration `json:"drain,omitempty"`

	// What a hub keeps of its messages, in memory, and sends to who joins before anything newer; and for how long it
	// outlives its last client. Messages of at most half of `buffer`'s bytes are kept, and a client may be behind by
	// `buffer`'s messages besides these. A hub has the largest history of the handlers through which its clients joined
	// or through which it was opened by `http_publish`. All hubs of the process together keep at most `max_history` of the
	// global option: the address whose hubs take the most loses some first. Default:
	// off. After a reload a larger one holds for a hub as soon as a new client joins, a smaller one for hubs that are opened
	// from then on.
	History *History `json:"history,omitempty"`

	// Whether clients that speak the events protocol may ask who is in the hub. Default: off. After a reload it holds for
	// new clients.
	Presence *Presence `json:"presence,omitempty"`

	// Whether a POST that does not ask for WebSocket publishes its body in the hub, for whoever the routes let
	// through: guard it with a matcher or with authentication. `Content-Type: application/octet-stream` is a binary
	// message, everything else is text and must be UTF-8 (400, or 415 for another charset or a compressed body). `max_message_size` (413) and `origins` (403) hold, and
	// `rate` for each address, by /64 for IPv6 (429). The answer is 202 with `{"clients":n,"seq":n}`: how many clients
	// the message is for, and its number in the hub. A message for a hub without clients is kept by `history`; without
	// that both are 0. Other methods go to the next handler, as POST does without this. `read_only` concerns WebSocket
	// clients only: with both, the server alone speaks. Default: false. After a reload it holds for new requests.
	HTTPPublish bool `json:"http_publish,omitempty"`

	// What the fields above come to; set by Provision.
	hubValue, userValue string
	placement           func() *placement // in its server, computed when first called
	limits              limits
	settings            *hub.Settings
	lease               *lease
}

// Rate is how fast a client may send: a bucket of messages that is refilled evenly. A message that finds it
// empty is dropped, and a client that has had as many dropped as the bucket holds since it was last full is
// closed with 1008 `rate_limited`. Each address has another such bucket for what it publishes with `http_publish`,
// shared by the handlers with the same `hub` value and rate; a message that finds that one empty is refused with 429,
// and Retry-After says when there will be room.
type Rate struct {
	// How many messages the bucket holds: 1 to 16,777,216. Required.
	Messages int `json:"messages,omitempty"`

	// How long an empty bucket takes to be full again; more than 0, at most a year. Required.
	Window caddy.Duration `json:"window,omitempty"`
}

// Buffer is how far behind a client may fall, whichever bound is reached first. The newest message is always
// kept.
type Buffer struct {
	// In messages: 1 to 16,777,216. Default: 256.
	Messages int `json:"messages,omitempty"`

	// In bytes, frame headers and 4 bytes a message included: 1 to 512 MiB. Default: 1 MiB. A hub's memory is at most twice that.
	Size int64 `json:"size,omitempty"`
}

// Ping is how a dead client is found. Anything received counts as life.
type Ping struct {
	// How long a client may be silent before it is pinged; more than 0, at most a year. The first ping comes after half of that
	// at the earliest, so that clients that joined together are pinged apart. A client that keeps sending gets a ping at
	// least every other interval. Default: 25s.
	Interval caddy.Duration `json:"interval,omitempty"`

	// How long after the ping something must be heard, else the connection is cut; more than 0, at most a year. Default: 10s.
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// Whether no pings are sent; a client that vanished without a word is then noticed when writing to it fails.
	// Default: false.
	Off bool `json:"off,omitempty"`
}

// History is what a hub keeps for clients that join.
type History struct {
	// How many messages: 1 to 16,777,216. Required.
	Messages int `json:"messages,omitempty"`

	// How old a message may be, and for how long the hub is kept after its last client has left; more than 0, at most a year. Default:
	// 10m.
	Age caddy.Duration `json:"age,omitempty"`
}

// Presence is what clients that speak the events protocol may know of who is in the hub.
type Presence struct {
	// Whether they are told when users come and go, at most once a second. Default: false.
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
	buffer := orDefault(h.Buffer, new(Buffer))
	ping := orDefault(h.Ping, new(Ping))
	h.settings = &hub.Settings{
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
		h.settings.Rate = hub.Rate{Messages: h.Rate.Messages, Window: time.Duration(h.Rate.Window)}
	}
	if ping.Off {
		h.settings.PingInterval = 0
	}
	if h.History != nil {
		h.settings.HistoryMessages = h.History.Messages
		h.settings.HistoryAge = time.Duration(orDefault(h.History.Age, defaultHistoryAge))
	}
	if h.Presence != nil {
		h.settings.Presence, h.settings.JoinLeave = true, h.Presence.JoinLeave
	}
	if err := hubs.metrics.register(ctx); err != nil {
		return fmt.Errorf("registering metrics: %w", err)
	}
	emitter, err := newEmitter(ctx)
	if err != nil {
		return fmt.Errorf("loading the events app: %w", err)
	}
	bounds, err := newBounds(ctx)
	if err != nil {
		return fmt.Errorf("loading the chat_broadcast app: %w", err)
	}
	hubs.process.Incoming.Raise(h.settings.MaxMessageSize)
	h.lease = hubs.lease(h.hubValue, ctx.Logger(), emitter, bounds, time.Duration(orDefault(h.Drain, defaultDrain)))
	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	// The server's routes are complete once it has requests.
	h.placement = sync.OnceValue(func() *placement { return newPlacement(h, server) })
	if ok {
		// Shutting a server down ignores upgraded connections, and waits for all others: do not wait for these.
		server.RegisterOnShutdown(func() {
			if caddy.Exiting() {
				hubs.beginExit()
			}
		})
	}
	return nil
}

// Validate implements caddy.Validator. The Caddyfile's parser checks the same, to name the line.
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

// checkHub checks a hub value as far as it does not depend on a request.
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

// named says which field err is about.
func named(field string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", field, err)
}

// Cleanup implements caddy.CleanerUpper. Caddy calls it also after a Provision or Validate that failed.
func (h *Handler) Cleanup() error {
	if h.lease != nil {
		hubs.release(h.lease) // requests may still be on their way through the handler: it stays as it is
	}
	return nil
}

// ServeHTTP implements caddyhttp.MiddlewareHandler. It returns as soon as the connection is upgraded.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	switch {
	case isUpgrade(r):
		return h.upgrade(w, r)
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
