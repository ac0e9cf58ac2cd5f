package chatbroadcast

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

// eventsHeader offers the events protocol.
const eventsHeader = "Sec-WebSocket-Protocol: chat-broadcast.v1\r\n"

// ---- the schema ----

// protocolSchema returns a definition of docs/protocol.schema.json.
var protocolSchema = func() func(t testing.TB, definition string) *jsonschema.Schema {
	var mu sync.Mutex
	compiler := jsonschema.NewCompiler()
	compiler.AssertFormat()
	compiled := map[string]*jsonschema.Schema{}
	return func(t testing.TB, definition string) *jsonschema.Schema {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if compiled[definition] == nil {
			schema, err := compiler.Compile("docs/protocol.schema.json#" + definition)
			if err != nil {
				t.Fatal(err)
			}
			compiled[definition] = schema
		}
		return compiled[definition]
	}
}()

// validFrames remembers frames that a schema has accepted: a message is the same to each of its many readers.
type validFrames struct {
	mu   sync.Mutex
	seen map[string]bool
}

var validFromServer = validFrames{seen: map[string]bool{}}

// check returns an error unless the frame is one that the server may send.
func (v *validFrames) check(schema *jsonschema.Schema, payload string) error {
	v.mu.Lock()
	seen := v.seen[payload]
	v.mu.Unlock()
	if seen {
		return nil
	}
	if err := validate(schema, payload); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.seen) > 10_000 {
		clear(v.seen)
	}
	v.seen[payload] = true
	return nil
}

func validate(schema *jsonschema.Schema, payload string) error {
	value, err := jsonschema.UnmarshalJSON(strings.NewReader(payload))
	if err != nil {
		return fmt.Errorf("%.200q: %w", payload, err)
	}
	if err := schema.Validate(value); err != nil {
		return fmt.Errorf("%.200q: %w", payload, err)
	}
	return nil
}

// ---- the peer ----

// An incoming is a frame of the events protocol as a client gets it. Which of its fields are set goes by its type; the
// schema has seen to that.
type incoming struct {
	Type    string  `json:"type"`
	Client  *string `json:"client"`
	User    *string `json:"user"`
	Hub     string  `json:"hub"`
	Epoch   string  `json:"epoch"`
	Head    int     `json:"head"`
	Clients int     `json:"clients"`
	Replay  int     `json:"replay"`
	Resumed *bool   `json:"resumed"`
	Missed  int     `json:"missed"`
	Token   string  `json:"token"`
	Age     int     `json:"age"`
	Seq     int     `json:"seq"`
	Time    string  `json:"time"`
	Data    *string `json:"data"`
	Data64  *string `json:"data64"`
	ID      *string `json:"id"`
	Users   []struct {
		User    string `json:"user"`
		Clients int    `json:"clients"`
	} `json:"users"`
	After   *string  `json:"next"` // of presence: what to ask for next
	Next    int      `json:"-"`    // of lagged
	Joined  []string `json:"joined"`
	Left    []string `json:"left"`
	Code    string   `json:"code"`
	Message string   `json:"message"`

	MaxMessageSize int `json:"max_message_size"`

	Messages []json.RawMessage `json:"messages"`

	raw string
}

// UnmarshalJSON keeps the two kinds of `next` apart.
func (e *incoming) UnmarshalJSON(b []byte) error {
	type fields incoming
	var next struct {
		*fields
		Next json.RawMessage `json:"next"`
	}
	next.fields = (*fields)(e)
	if err := json.Unmarshal(b, &next); err != nil {
		return err
	}
	switch {
	case len(next.Next) == 0:
		return nil
	case e.Type == "lagged":
		return json.Unmarshal(next.Next, &e.Next)
	default:
		return json.Unmarshal(next.Next, &e.After)
	}
}

// text returns the payload of a text message.
func (e *incoming) text() string {
	if e.Data == nil {
		return "no text: " + e.raw
	}
	return *e.Data
}

// An eventsPeer is a peer that speaks the events protocol. Each frame that it reads is validated.
type eventsPeer struct {
	*peer
	hello  incoming
	schema *jsonschema.Schema
	bundle []incoming // the messages of the last replay that read has yet to return
}

// joinEvents connects a peer that speaks the events protocol, and reads its hello.
func joinEvents(t testing.TB, path string, header ...string) *eventsPeer {
	t.Helper()
	conn, err := net.Dial("tcp", httpAddr)
	if err != nil {
		t.Fatal(err)
	}
	return joinEventsOn(t, conn, httpAddr, path, header...)
}

func joinEventsOn(t testing.TB, conn net.Conn, host, path string, header ...string) *eventsPeer {
	t.Helper()
	t.Cleanup(func() { conn.Close() })
	p, err := handshakeEvents(t, conn, host, path, header...)
	if err != nil {
		t.Fatalf("joining %s: %v", path, err)
	}
	return p
}

// handshakeEvents is for goroutines other than the test's, which close conn themselves.
func handshakeEvents(t testing.TB, conn net.Conn, host, path string, header ...string) (*eventsPeer, error) {
	p := &eventsPeer{
		peer:   newPeer(t, conn),
		schema: protocolSchema(t, "/$defs/strictFromServer"),
	}
	resp, err := p.handshake(host, path, eventsHeader+strings.Join(header, ""))
	if err != nil {
		return nil, err
	}
	if got := resp.Header.Get("Sec-WebSocket-Protocol"); got != "chat-broadcast.v1" {
		return nil, fmt.Errorf("got the subprotocol %q", got)
	}
	if p.hello, err = p.read(); err != nil {
		return nil, err
	}
	if p.hello.Type != "hello" {
		return nil, fmt.Errorf("got %s, want hello", p.hello.raw)
	}
	return p, nil
}

// newPeer is for goroutines other than the test's, which close conn themselves.
func newPeer(t testing.TB, conn net.Conn) *peer {
	return &peer{t: t, conn: conn, r: bufio.NewReader(conn)}
}

// errUnanswered is that of a handshake without any response.
var errUnanswered = errors.New("the handshake was not answered")

// dial is for goroutines other than the test's, which close the connection themselves.
func dial(addr string) (net.Conn, error) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnanswered, err)
	}
	return conn, nil
}

// handshake is for goroutines other than the test's.
func (p *peer) handshake(host, path, header string) (*http.Response, error) {
	p.patient()
	if _, err := p.conn.Write([]byte(handshakeRequest(host, path, header))); err != nil {
		return nil, fmt.Errorf("%w: %w", errUnanswered, err)
	}
	resp, err := http.ReadResponse(p.r, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnanswered, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, fmt.Errorf("got status %s, want 101", resp.Status)
	}
	return resp, nil
}

// errClosed is that of a connection with a close frame.
var errClosed = errors.New("closed")

// read returns the next event: of a replay, the next message.
func (p *eventsPeer) read() (incoming, error) {
	if len(p.bundle) == 0 {
		e, err := p.readWhole()
		if err != nil || e.Type != "replay" {
			return e, err
		}
		for _, raw := range e.Messages {
			m := incoming{raw: string(raw)}
			if err := json.Unmarshal(raw, &m); err != nil {
				return incoming{}, err
			}
			p.bundle = append(p.bundle, m)
		}
	}
	next := p.bundle[0]
	p.bundle = p.bundle[1:]
	return next, nil
}

// readWhole returns the next event, also a replay, and answers pings on the way.
func (p *eventsPeer) readWhole() (incoming, error) {
	for {
		p.patient()
		f, err := p.readFrame()
		if err != nil {
			return incoming{}, err
		}
		switch f.opcode {
		case websocket.PingMessage:
			if _, err := p.conn.Write(clientFrame(finBit|websocket.PongMessage, []byte(f.payload))); err != nil {
				return incoming{}, err
			}
		case websocket.CloseMessage:
			return incoming{}, fmt.Errorf("%w: %q", errClosed, f.payload)
		case websocket.TextMessage:
			if err := validFromServer.check(p.schema, f.payload); err != nil {
				return incoming{}, err
			}
			e := incoming{raw: f.payload}
			err := json.Unmarshal([]byte(f.payload), &e)
			return e, err
		default:
			return incoming{}, fmt.Errorf("got frame %.80v", f)
		}
	}
}

// event returns the next event.
func (p *eventsPeer) event() incoming {
	p.t.Helper()
	e, err := p.read()
	if err != nil {
		p.t.Fatalf("reading an event: %v", err)
	}
	return e
}

// want returns the next event, which must be of that type.
func (p *eventsPeer) want(kind string) incoming {
	p.t.Helper()
	e := p.event()
	if e.Type != kind {
		p.t.Fatalf("got %.200s, want %s", e.raw, kind)
	}
	return e
}

// skipTo returns the next event of that type.
func (p *eventsPeer) skipTo(kind string) incoming {
	p.t.Helper()
	for {
		if e := p.event(); e.Type == kind {
			return e
		}
	}
}

// wantMessages fails unless the next events are text messages with the given payloads, numbered from first.
func (p *eventsPeer) wantMessages(first int, payloads ...string) {
	p.t.Helper()
	for i, want := range payloads {
		e := p.want("message")
		if e.Seq != first+i || e.text() != want {
			p.t.Fatalf("got message %d %q, want %d %q", e.Seq, e.text(), first+i, want)
		}
	}
}

// wantError fails unless the next event is an error with that code, about the send with that id, if it is not empty.
func (p *eventsPeer) wantError(code, id string) {
	p.t.Helper()
	e := p.want("error")
	got := ""
	if e.ID != nil {
		got = *e.ID
	}
	if e.Code != code || got != id {
		p.t.Fatalf("got %s, want %s about %q", e.raw, code, id)
	}
}

// say sends a frame: a map or a struct is made to JSON.
func (p *eventsPeer) say(frame any) {
	p.t.Helper()
	p.text(jsonOf(frame))
}

// ask returns the answer to who.
func (p *eventsPeer) ask(fields map[string]any) incoming {
	p.t.Helper()
	fields["type"] = "who"
	p.say(fields)
	for {
		if e := p.skipTo("presence"); e.Users != nil {
			return e
		}
	}
}

// sendText publishes a text with an id and returns the answer.
func (p *eventsPeer) sendText(id, data string) incoming {
	p.t.Helper()
	p.say(map[string]string{"type": "send", "id": id, "data": data})
	sent := p.skipTo("sent")
	if *sent.ID != id {
		p.t.Fatalf("got %s, want it for %q", sent.raw, id)
	}
	return sent
}

// sendAgain sends a text that was first sent on the connection of that token, and returns the answer: sent or error.
func (p *eventsPeer) sendAgain(token, id, data string) incoming {
	p.t.Helper()
	p.say(map[string]string{"type": "send", "id": id, "token": token, "data": data})
	answer := p.skipUntil(func(e incoming) bool { return e.Type == "sent" || e.Type == "error" })
	if answer.ID == nil || *answer.ID != id {
		p.t.Fatalf("got %s, want it for %q", answer.raw, id)
	}
	return answer
}

// joinEventsFrom is joinEvents for a peer at another address of this machine.
func joinEventsFrom(t testing.TB, ip, path string) *eventsPeer {
	t.Helper()
	conn, err := dialFrom(ip, httpAddr)
	if err != nil {
		t.Fatal(err)
	}
	return joinEventsOn(t, conn, httpAddr, path)
}

// leave closes the connection politely and waits until the server has done so, too.
func (p *peer) leave() {
	p.t.Helper()
	p.send(websocket.CloseMessage, "\x03\xe8")
	p.wantEOF()
	p.conn.Close()
}

// bundles is the query of a client that takes replayed messages in bundles.
const bundles = "chat_broadcast_replay=bundles"

// sinceQuery is the query of a client that has got everything up to seq.
func sinceQuery(epoch string, seq int) string {
	return fmt.Sprintf("chat_broadcast_since=%s:%d", epoch, seq)
}

func jsonOf(v any) string {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		panic(err) // a test's own value
	}
	return strings.TrimSuffix(b.String(), "\n")
}

func base64Of(b string) string { return base64.StdEncoding.EncodeToString([]byte(b)) }
