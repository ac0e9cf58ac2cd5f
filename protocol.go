package chatbroadcast

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/gorilla/websocket"
)

// eventsProtocol is the subprotocol of clients that speak events (PROTOCOL.md). All others are raw.
const eventsProtocol = "chat-broadcast.v1"

// ---- what the server says ----

type helloEvent struct {
	Type    string     `json:"type"`
	Client  string     `json:"client"`
	User    string     `json:"user"`
	Hub     string     `json:"hub"`
	Epoch   string     `json:"epoch"`
	Head    uint64     `json:"head"`
	Clients int        `json:"clients"`
	Replay  uint64     `json:"replay"`
	Resumed *bool      `json:"resumed,omitempty"`
	Missed  *uint64    `json:"missed,omitempty"`
	Token   string     `json:"token,omitempty"`
	Age     int64      `json:"age,omitempty"`
	Rate    *allowance `json:"rate,omitempty"`
}

// An allowance is how fast a client may send: a bucket of messages, and in how many milliseconds it is refilled.
type allowance struct {
	Messages int   `json:"messages"`
	Window   int64 `json:"window"`
}

// allowance returns r as clients are told it, with the window rounded up, or nil for none.
func (r *Rate) allowance() *allowance {
	if r == nil {
		return nil
	}
	window := time.Duration(r.Window)
	a := &allowance{r.Messages, window.Milliseconds()}
	if window%time.Millisecond > 0 {
		a.Window++
	}
	return a
}

type sentEvent struct {
	Type string `json:"type"`
	ID   string `json:"id"`
	Seq  uint64 `json:"seq"`
	Time string `json:"time"`
}

// A userEvent is join or leave.
type userEvent struct {
	Type    string `json:"type"`
	User    string `json:"user"`
	Clients int    `json:"clients"`
}

// A changesEvent is presence, when it was not asked for.
type changesEvent struct {
	Type    string   `json:"type"`
	Clients int      `json:"clients"`
	Joined  []string `json:"joined,omitempty"`
	Left    []string `json:"left,omitempty"`
}

// A rosterEvent is presence, the answer to who.
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
)

// timeLayout is how events have times: RFC 3339 in UTC, with milliseconds.
const timeLayout = "2006-01-02T15:04:05.000Z"

func eventTime(t time.Time) string { return t.UTC().Format(timeLayout) }

// ---- the handshake ----

// A resumption says what the last message was that a client has got before it connected again.
type resumption struct {
	epoch string
	seq   uint64
}

// maxToken and maxSendID bound, in bytes, what a client can make the server remember of a message.
const (
	maxToken  = 64
	maxSendID = 64
)

// sinceParameter is the one part of a query that the server reads. The rest is the application's, so the name is one that
// no application has.
const sinceParameter = "chat_broadcast_since"

// introduce prepares c, which speaks events, with the query of its handshake.
func (c *client) introduce(query url.Values) error {
	c.token = rand.Text() // join adds the epoch
	since, ok := query[sinceParameter]
	if !ok {
		return nil
	}
	if len(since) > 1 {
		return fmt.Errorf("%s: must be there once, got it %d times", sinceParameter, len(since))
	}
	epoch, number, _ := strings.Cut(since[0], ":")
	seq, ok := parseSeq(number)
	if !ok || !validEpoch(epoch) {
		return fmt.Errorf("%s: must be <epoch>:<seq> as hello and message gave them, got %q", sinceParameter, since[0])
	}
	c.since = &resumption{epoch, seq}
	return nil
}

// maxSeq is the largest number that JSON has in every language: 2^53 - 1.
const maxSeq = 1<<53 - 1

// parseSeq parses a plain decimal number up to maxSeq, without a sign and without zeros in front.
func parseSeq(s string) (seq uint64, ok bool) {
	seq, err := strconv.ParseUint(s, 10, 64)
	return seq, err == nil && seq <= maxSeq && (s[0] != '0' || s == "0")
}

// validEpoch reports whether some hub may have this epoch.
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

// completeToken makes the random text of c.token the token of a connection to the hub: one that tells which epoch it is of.
func (b *hub) completeToken(c *client) { c.token = b.epoch + "-" + c.token }

// issued reports whether a token may be of a connection to the hub.
func (b *hub) issued(token string) bool {
	rest, ok := strings.CutPrefix(token, b.epoch)
	return ok && strings.HasPrefix(rest, "-")
}

// hello returns the first event for c, which has just joined.
func (c *client) hello(w welcome) helloEvent {
	e := helloEvent{
		Type:    "hello",
		Client:  c.id.String(),
		User:    c.user,
		Hub:     c.hub.name,
		Epoch:   c.hub.epoch,
		Head:    w.head,
		Clients: w.clients,
		Replay:  w.replay,
		Rate:    c.settings.allowance,
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
	return e
}

// ---- what clients say ----

// errBinary says what is wrong with a binary frame.
var errBinary = errors.New("binary frames are not used: send binary data as data64, in Base64")

// handle does what a frame of a client that speaks events asks for. It returns false when the client is closing.
func (c *client) handle(opcode int, frame []byte) bool {
	var e clientEvent
	err := errBinary
	if opcode == websocket.TextMessage {
		err = e.decode(frame)
	}
	switch {
	case err != nil && c.settings.readOnly:
		c.close(causeReadOnly)
		return false
	case err != nil:
		return c.refuse(frame, errorMalformed, err, &e)
	case e.kind == kindSend:
		return c.handleSend(frame, &e)
	case e.kind == kindWho:
		return c.handleWho(frame, &e)
	}
	c.addOverhead(len(frame))
	return true
}

// sendAllowance is how many bytes of a send may be something else than the text of its payload, before they count as no part
// of a message: enough for the longest id and token, and for the escapes of a short text.
const sendAllowance = 256

// handleSend publishes a message.
func (c *client) handleSend(frame []byte, e *clientEvent) bool {
	if c.settings.readOnly {
		c.close(causeReadOnly)
		return false
	}
	m, err := e.message()
	if err != nil {
		return c.refuse(frame, errorMalformed, err, e)
	}
	m.from, m.sender, m.user = c, c.id, c.user
	if e.id != nil {
		m.key = sendKey{c.user, c.token, string(e.id)}
	}
	if e.token != nil {
		m.key.token, m.again = string(e.token), true
	}
	c.addOverhead(max(0, len(frame)-e.payloadText()-sendAllowance))
	if !c.allowMessage(m.opcode) {
		return !c.isClosing() &&
			c.refuse(nil, errorRateLimited, errors.New("the message is dropped: too many in too short a time"), e)
	}
	r, ok := c.publish(m)
	if r.unknown {
		return c.refuse(nil, errorUnknown, errors.New("the message may have been published before: it is not published now"), e)
	}
	if ok && e.id != nil {
		return c.answer(sentEvent{Type: "sent", ID: m.key.id, Seq: r.seq, Time: eventTime(r.at)})
	}
	return ok
}

// handleWho answers with a page of the hub's roster.
func (c *client) handleWho(frame []byte, e *clientEvent) bool {
	if !c.settings.presence {
		return c.refuse(frame, errorPresenceOff, errors.New("who: presence is off here"), e)
	}
	var after *string
	if e.after != nil {
		name := string(e.after)
		after = &name
	}
	c.addOverhead(len(frame) + pageOverhead*c.hub.who(c, after, e.limit) + requestOverhead)
	c.awaitAnswers()
	return !c.isClosing()
}

// refuse answers with an error. frame is what was received, if it counts as no message.
func (c *client) refuse(frame []byte, code string, err error, e *clientEvent) bool {
	c.addOverhead(len(frame))
	refusal := errorEvent{Type: "error", Code: code, Message: err.Error()}
	if len(e.id) <= maxSendID {
		refusal.ID = string(e.id)
	}
	return c.answer(refusal)
}

// addOverhead notes that n bytes that were received are no part of a message after all, see pace.
func (c *client) addOverhead(n int) { c.overhead += n }

// requestOverhead is what an answer costs besides its bytes, in bytes that are no part of a message, and pageOverhead what a
// byte of a roster's page does: who asks for full ones, which take 280 us each, waits after each.
const (
	requestOverhead = 256
	pageOverhead    = 4
)

// answer sends c an event, and waits where c does not take what it has asked for. It returns false when c is closing.
// Answers but sent count as bytes that are no part of a message, see pace.
func (c *client) answer(event any) bool {
	n := c.tell(event)
	if _, sent := event.(sentEvent); !sent {
		c.addOverhead(n + requestOverhead)
	}
	c.awaitAnswers()
	return !c.isClosing()
}

// tell sends c alone an event, before what its writer takes from the hub next. It returns the event's size. It may be
// called under hub.mu.
func (c *client) tell(event any) int {
	var buf bytes.Buffer
	encodeEvent(&buf, event)
	c.tellEncoded(buf.Bytes())
	return buf.Len()
}

// tellEncoded is tell for an event that is encoded.
func (c *client) tellEncoded(event []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing && !c.broken {
		c.answers = appendFrame(c.answers, websocket.TextMessage, event)
		c.due.Store(true)
	}
}

// maxAnswers is how many bytes of answers may wait for a client before it is not read any more: a page of who is there.
const maxAnswers = 16 << 10

// awaitAnswers lets the writer send the answers, and waits while there are too many. It ends with the connection,
// because every write has a deadline.
func (c *client) awaitAnswers() {
	c.wake()
	for {
		c.mu.Lock()
		if c.broken || len(c.answers) <= maxAnswers {
			c.mu.Unlock()
			return
		}
		if c.answered == nil {
			c.answered = make(chan struct{})
		}
		answered := c.answered
		c.mu.Unlock()
		c.endWork()
		<-answered
	}
}
