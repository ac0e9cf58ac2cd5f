package hub

import (
	"crypto/rand"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// EventsProtocol is the WebSocket subprotocol of clients that speak JSON events (docs/protocol.md). All other clients
// are raw.
const EventsProtocol = "chat-broadcast.v1"

// An eventsProtocol is the protocol of clients that speak JSON events.
type eventsProtocol struct{}

func (eventsProtocol) encoder() feed.Encoder { return feed.NewEvents() }

func (eventsProtocol) knowsPresence() bool { return true }

// goodbye returns a close frame.
func (eventsProtocol) goodbye(why ws.Close) []byte { return why.Frame() }

// mayBegin returns true: even a client that may only listen may ask for the roster.
func (eventsProtocol) mayBegin(*Client) bool { return true }

// ---- from the server ----

type helloEvent struct {
	Type    string  `json:"type"`
	Client  string  `json:"client"`
	User    string  `json:"user"`
	Hub     string  `json:"hub"`
	Epoch   string  `json:"epoch"`
	Head    uint64  `json:"head"`
	Clients int     `json:"clients"`
	Replay  uint64  `json:"replay"`
	Resumed *bool   `json:"resumed,omitempty"`
	Missed  *uint64 `json:"missed,omitempty"`
	Token   string  `json:"token,omitempty"`
	Age     int64   `json:"age,omitempty"`

	MaxMessageSize int        `json:"max_message_size"`
	ReadOnly       bool       `json:"read_only,omitempty"`
	Rate           *allowance `json:"rate,omitempty"`
}

// An allowance is a rate in a hello: the bucket holds Messages, and refills in Window milliseconds.
type allowance struct {
	Messages int   `json:"messages"`
	Window   int64 `json:"window"`
}

// allowance returns r for a hello, with the window rounded up, or nil for no limit.
func (r Rate) allowance() *allowance {
	if r.Messages == 0 {
		return nil
	}
	a := &allowance{r.Messages, r.Window.Milliseconds()}
	if r.Window%time.Millisecond > 0 {
		a.Window++
	}
	return a
}

type sentEvent struct {
	Type string `json:"type"`
	ID   string `json:"id"`
	Seq  uint64 `json:"seq"`
	Time string `json:"time"`

	Epoch string `json:"epoch,omitempty"`
}

// A rosterEvent is a presence event that answers a who event.
type rosterEvent struct {
	Type    string        `json:"type"`
	Clients int           `json:"clients"`
	Users   []rosterEntry `json:"users"`
	Next    *string       `json:"next,omitempty"`
}

type rosterEntry struct {
	User    string `json:"user"`
	Clients int    `json:"clients"`
}

// A pongEvent answers a ping with an id; barePong answers others.
type pongEvent struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

type laggedEvent struct {
	Type   string `json:"type"`
	Missed uint64 `json:"missed"`
	Next   uint64 `json:"next"`
}

type errorEvent struct {
	Type    string `json:"type"`
	Code    string `json:"code"`
	Message string `json:"message"`
	ID      string `json:"id,omitempty"`
}

// The codes of errors.
const (
	errorMalformed   = "malformed"
	errorRateLimited = "rate_limited"
	errorPresenceOff = "presence_off"
	errorUnknown     = "unknown"
	errorUnavailable = "unavailable"
)

// joined sends c its hello.
func (eventsProtocol) joined(c *Client, w welcome) {
	c.token = c.hub.epoch + "-" + rand.Text()
	e := helloEvent{
		Type:    "hello",
		Client:  c.id.String(),
		User:    c.user,
		Hub:     c.hub.name,
		Epoch:   c.hub.epoch,
		Head:    w.head,
		Clients: w.clients,
		Replay:  w.replay,

		MaxMessageSize: c.settings.MaxMessageSize,
		ReadOnly:       c.settings.ReadOnly,
		Rate:           c.settings.Rate.allowance(),
	}
	if w.remembers > 0 {
		e.Token, e.Age = c.token, max(w.remembers.Milliseconds(), 1)
	}
	if c.since != nil {
		e.Resumed = &w.resumed
		if !w.resumed {
			e.Missed = &w.missed
		}
	}
	c.tellEvent(e)
}

// lagged sends c how many messages it has missed, and the number of the next one.
func (eventsProtocol) lagged(c *Client, missed, next uint64) {
	c.tellEvent(laggedEvent{"lagged", missed, next})
}

// tellEvent encodes an event and passes it to tell. It returns the event's size in bytes.
func (c *Client) tellEvent(event any) int {
	encoded := feed.AppendEvent(nil, event)
	c.tell(ws.TextMessage, encoded)
	return len(encoded)
}

// issued reports whether token can be the token of a connection to this hub.
func (b *Hub) issued(token string) bool {
	rest, ok := strings.CutPrefix(token, b.epoch)
	return ok && strings.HasPrefix(rest, "-")
}

// ---- from clients ----

// maxToken and maxSendID bound the token and the id of a send, in bytes, because the hub remembers them.
const (
	maxToken  = 64
	maxSendID = 64
)

// ParseResumption parses a resumption, <epoch>:<seq>, with the values from hello and message events.
func ParseResumption(s string) (*Resumption, bool) {
	epoch, number, _ := strings.Cut(s, ":")
	seq, ok := parseSeq(number)
	if !ok || !validEpoch(epoch) {
		return nil, false
	}
	return &Resumption{epoch, seq}, true
}

// maxSeq is the largest integer that JSON parsers of all languages read exactly: 2^53 - 1.
const maxSeq = 1<<53 - 1

// parseSeq parses a plain decimal number up to maxSeq, without a sign and without zeros in front.
func parseSeq(s string) (seq uint64, ok bool) {
	seq, err := strconv.ParseUint(s, 10, 64)
	return seq, err == nil && seq <= maxSeq && (s[0] != '0' || s == "0")
}

// validEpoch reports whether some hub can have this epoch.
func validEpoch(epoch string) bool {
	const most = 16 // a 64-bit number to the base of 36 has 13
	return consistsOf(epoch, "abcdefghijklmnopqrstuvwxyz0123456789", most)
}

func validToken(token string) bool {
	return consistsOf(token, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", maxToken)
}

// consistsOf reports whether s is 1 to most of the given characters.
func consistsOf(s, characters string, most int) bool {
	return s != "" && len(s) <= most && strings.Trim(s, characters) == ""
}

// errBinary answers a binary frame.
var errBinary = errors.New("binary frames are not used: send binary data as data64, in Base64")

// received handles a frame of c.
func (eventsProtocol) received(c *Client, opcode int, frame []byte) bool {
	var e clientEvent
	err := errBinary
	if opcode == ws.TextMessage {
		err = e.decode(frame)
	}
	switch {
	case err != nil && c.settings.ReadOnly:
		c.Close(CloseReadOnly)
		return false
	case err != nil:
		return c.refuse(frame, errorMalformed, err, &e)
	case e.kind == kindSend:
		return c.handleSend(frame, &e)
	case e.kind == kindWho:
		return c.handleWho(frame, &e)
	case e.kind == kindPing:
		return c.handlePing(frame, &e)
	}
	c.addOverhead(len(frame))
	return true
}

// sendAllowance is how many bytes of a send may be something else than the text of its payload. Further such bytes
// count as overhead, see pace. It is enough for the longest id and token, and for the escapes of a short text.
const sendAllowance = 256

// handleSend publishes a message.
func (c *Client) handleSend(frame []byte, e *clientEvent) bool {
	if c.settings.ReadOnly {
		c.Close(CloseReadOnly)
		return false
	}
	opcode, payload, err := e.message()
	if err != nil {
		return c.refuse(frame, errorMalformed, err, e)
	}
	m := c.message(opcode, payload)
	if e.id != nil {
		m.Key = Key{c.user, c.token, string(e.id)}
	}
	if e.token != nil {
		m.Key.Token, m.Again = string(e.token), true
	}
	c.addOverhead(max(0, len(frame)-e.payloadText()-sendAllowance))
	if !c.allowMessage(opcode) {
		return !c.hasLeft() &&
			c.refuse(nil, errorRateLimited, errors.New("the message is dropped: too many in too short a time"), e)
	}
	if c.hub.session != nil {
		c.awaitAnswers()
		return c.submit(&m)
	}
	r, ok := c.publish(&m)
	if r.Unknown {
		return c.refuse(nil, errorUnknown, errUnknownBefore, e)
	}
	if ok && e.id != nil {
		return c.answer(sentOf(m.Key, r))
	}
	return ok
}

// errUnknownBefore answers a message that is sent again when nobody can know whether it was published before.
var errUnknownBefore = errors.New("the message may have been published before: it is not published now")

func sentOf(key Key, r Receipt) sentEvent {
	return sentEvent{Type: "sent", ID: key.ID, Seq: r.Seq, Time: feed.EventTime(r.At), Epoch: r.Epoch}
}

// answered sends c a sent event, or an error event for a message that is certainly not published. When the outcome is
// unknown it closes c instead: on its next connection c sends the message again, and learns whether it was published.
func (eventsProtocol) answered(c *Client, key Key, r Receipt, err error) {
	switch {
	case errors.Is(err, ErrUnavailable):
		c.tellEvent(errorEvent{"error", errorUnavailable, "the message is not published: the engine is unavailable", key.ID})
	case err != nil:
		c.Close(CloseUnavailable)
		return
	case r.Unknown:
		c.tellEvent(errorEvent{"error", errorUnknown, errUnknownBefore.Error(), key.ID})
	case key.ID != "":
		c.tellEvent(sentOf(key, r))
	}
	c.wake()
}

// handleWho answers with a page of the hub's roster.
func (c *Client) handleWho(frame []byte, e *clientEvent) bool {
	if !c.settings.Presence {
		return c.refuse(frame, errorPresenceOff, errors.New("who: presence is off here"), e)
	}
	c.awaitSent()
	var after *string
	if e.after != nil {
		name := string(e.after)
		after = &name
	}
	c.addOverhead(len(frame) + pageOverhead*c.hub.sendRoster(c, after, e.limit) + requestOverhead)
	c.awaitAnswers()
	return !c.hasLeft()
}

// handlePing answers a ping. It does not wait for the outcome of earlier messages (awaitSent): an engine may take 10 s to
// fail, and meanwhile the client would take its connection for dead.
func (c *Client) handlePing(frame []byte, e *clientEvent) bool {
	if err := e.checkID(); err != nil {
		return c.refuse(frame, errorMalformed, err, e)
	}
	c.spared = false // the answer stands for the server's next ping, see onSilence
	encoded := []byte(barePong)
	if e.id != nil {
		encoded = feed.AppendEvent(nil, pongEvent{"pong", string(e.id)})
	}
	c.tell(ws.TextMessage, encoded)
	c.addOverhead(len(frame) + len(encoded) + requestOverhead)
	c.awaitAnswers()
	return !c.hasLeft()
}

// barePong is the pong to a ping without an id. Quiet clients send hardly anything else, so it is not encoded each time.
const barePong = `{"type":"pong"}`

// refuse answers with an error event. frame is the received frame if it counts as no message, and otherwise nil.
func (c *Client) refuse(frame []byte, code string, err error, e *clientEvent) bool {
	c.addOverhead(len(frame))
	c.awaitSent()
	refusal := errorEvent{Type: "error", Code: code, Message: err.Error()}
	if len(e.id) <= maxSendID {
		refusal.ID = string(e.id)
	}
	return c.answer(refusal)
}

// addOverhead counts n received bytes as no part of a message, see pace.
func (c *Client) addOverhead(n int) { c.overhead += n }

// requestOverhead is the cost of an answer besides its bytes, counted in bytes of overhead. pageOverhead is the cost of
// each byte of a roster's page: a full page takes 280 us, so a client that asks for one waits after it.
const (
	requestOverhead = 256
	pageOverhead    = 4
)

// answer sends c an event, and waits while c does not take its answers. It returns false when c is closing. All answers
// except sent events count as overhead, see pace.
func (c *Client) answer(event any) bool {
	n := c.tellEvent(event)
	if _, sent := event.(sentEvent); !sent {
		c.addOverhead(n + requestOverhead)
	}
	c.awaitAnswers()
	return !c.hasLeft()
}
