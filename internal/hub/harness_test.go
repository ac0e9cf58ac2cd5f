package hub

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"github.com/gorilla/websocket"
)

// patience is how long a peer waits for a frame: longer than it takes on a machine that is not overloaded.
const patience = 20 * time.Second

// Settings of the tests: those of a directive without options.
const (
	testBufferMessages = 256
	testBufferBytes    = 1 << 20
	testMessageSize    = 64 << 10
)

// defaults returns settings as a directive without options has them.
func defaults() *Settings {
	return &Settings{
		Echo:           true,
		MaxMessageSize: testMessageSize,
		BufferMessages: testBufferMessages,
		BufferBytes:    testBufferBytes,
		PingInterval:   25 * time.Second,
		PingTimeout:    10 * time.Second,
		WriteTimeout:   10 * time.Second,
	}
}

// historyOfTen returns settings with a history of ten messages, for a minute.
func historyOfTen() *Settings {
	s := defaults()
	s.HistoryMessages, s.HistoryAge = 10, time.Minute
	return s
}

// presenceOf returns settings with presence.
func presenceOf(joinLeave bool) *Settings {
	s := defaults()
	s.Presence, s.JoinLeave = true, joinLeave
	return s
}

func testAddress(n int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, byte(n >> 8), byte(n)}), 32)
}

func textMessage(payload string) Message {
	return Message{Message: feed.Message{Opcode: ws.TextMessage, Payload: []byte(payload)}, Source: FromHTTP}
}

// ---- owners ----

// An owner records what happens to a client.
type owner struct {
	mu             sync.Mutex
	left, finished int
	panics         []any
}

func (o *owner) Left() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.left++
}

func (o *owner) Finished() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.finished++
}

func (o *owner) Panicked(v any, _ []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.panics = append(o.panics, v)
}

func (o *owner) counts() (left, finished, panics int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.left, o.finished, len(o.panics)
}

func ownerOf(c *Client) *owner { return c.owner.(*owner) }

// wantEnd fails unless c has finished, and has left once, with the given cause.
func wantEnd(t *testing.T, c *Client, want ws.Close) {
	t.Helper()
	left, finished, _ := ownerOf(c).counts()
	if left != 1 || finished != 1 || c.State() != Finished {
		t.Errorf("got Left %d times, Finished %d times, state %d, want each once", left, finished, c.State())
	}
	if got := c.Cause(); got != want {
		t.Errorf("got cause %v, want %v", got, want)
	}
}

// ---- hubs with connections ----

// newHub returns a hub of a process of its own, with flushers and writers of its own. At the end of the test the clients that
// joiner.join has made must have left and finished at most once each.
func newHub(t testing.TB) *Hub {
	t.Helper()
	b := New(NewProcess(), t.Name())
	joined.Store(b, new([]*Client))
	t.Cleanup(func() { checkOwners(t, b) })
	return b
}

// bubble runs a test in a synctest bubble, with a hub. At its end, when the peers have closed their connections, every client
// must have left once and finished once.
func bubble(t *testing.T, test func(t *testing.T, b *Hub)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := newHub(t)
		t.Cleanup(func() {
			synctest.Wait()
			time.Sleep(3 * closeTimeout) // in the bubble
			synctest.Wait()
			for _, c := range madeFor(b) {
				if left, finished, _ := ownerOf(c).counts(); left != 1 || finished != 1 || c.State() != Finished {
					t.Errorf("client %v: got Left %d times, Finished %d times, state %d, want each once", c.id, left, finished, c.State())
				}
			}
			if n := len(b.Clients()) + b.Size(); n > 0 {
				t.Errorf("got %d clients left in the hub", n)
			}
			if shared := b.process.Incoming.Used(); shared != 0 {
				t.Errorf("got %d bytes left that messages took while they arrived", shared)
			}
		})
		test(t, b)
	})
}

// newTestClient returns a client that has not joined.
func newTestClient(p *Process, user string, address netip.Prefix, s *Settings) *Client {
	c := new(Client)
	c.Init(p, new(owner), user, address, s)
	return c
}

// joined has the clients that joiner.join has made, by hub.
var joined sync.Map // *Hub to *[]*Client

func madeFor(b *Hub) []*Client {
	all, ok := joined.Load(b)
	if !ok {
		return nil
	}
	return *all.(*[]*Client)
}

func checkOwners(t testing.TB, b *Hub) {
	for _, c := range madeFor(b) {
		left, finished, panics := ownerOf(c).counts()
		if left > 1 || finished > 1 {
			t.Errorf("client %v: got Left %d times and Finished %d times", c.id, left, finished)
		}
		if panics > 0 && c.Cause() != CloseInternal {
			t.Errorf("client %v: panicked: %v", c.id, ownerOf(c).panics)
		}
	}
	joined.Delete(b)
}

// A joiner says how a client joins. The zero value is a raw client whose connection has no optional abilities and no buffer.
type joiner struct {
	user      string
	address   netip.Prefix
	events    bool
	since     *Resumption
	bundles   bool
	protocol  protocol // if it is neither raw nor events
	abilities ability
	room      int
}

// connect joins a raw client over a connection without abilities or buffers.
func connect(t testing.TB, b *Hub, s *Settings) (*Client, *peer) {
	t.Helper()
	return joiner{}.join(t, b, s)
}

// member makes a client that has done its handshake a member of b. It has no connection yet.
func (j joiner) member(t testing.TB, b *Hub, s *Settings) *Client {
	t.Helper()
	c := newTestClient(b.process, j.user, j.address, s)
	shake(t, c)
	if j.events {
		c.SpeakEvents(j.since)
		c.bundles = j.bundles
	}
	if j.protocol != nil {
		c.protocol = j.protocol
	}
	if err := b.Join(c, 0); err != nil {
		t.Fatal(err)
	}
	if all, ok := joined.Load(b); ok {
		clients := all.(*[]*Client)
		*clients = append(*clients, c)
	}
	return c
}

// join makes a client a member of b, starts it, and returns its peer.
func (j joiner) join(t testing.TB, b *Hub, s *Settings) (*Client, *peer) {
	t.Helper()
	c := j.member(t, b, s)
	m, server := newMemoryConn(j.abilities, j.room)
	c.Attach(server)
	p := &peer{t: t, conn: m.peer()}
	p.r = bufio.NewReader(p.conn)
	t.Cleanup(func() { p.conn.Close() })
	c.Start()
	return c, p
}

// shake makes c's WebSocket handshake.
func shake(t testing.TB, c *Client) {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	for name, value := range map[string]string{
		"Connection": "Upgrade", "Upgrade": "websocket",
		"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
	} {
		r.Header.Set(name, value)
	}
	upgrader := websocket.Upgrader{CheckOrigin: func(*http.Request) bool { return true }}
	conn, err := upgrader.Upgrade(hijacker{httptest.NewRecorder(), c.Reader()}, r, nil)
	if err != nil {
		t.Fatal(err)
	}
	c.Reader().TakeResponse()
	c.Reader().Open(conn, c.settings.MaxMessageSize, c.Pong)
}

// A hijacker is a response writer whose connection is a client's ws.Reader.
type hijacker struct {
	*httptest.ResponseRecorder
	*ws.Reader
}

// ---- peers ----

// The bits and opcodes of frames that peers write (RFC 6455 §5.2).
const (
	finBit = 0x80
	opText = 0x1
)

// A peer is the client's side of a connection.
type peer struct {
	t    testing.TB
	conn memoryPeer
	r    *bufio.Reader
}

// A frame is one that the server sent.
type frame struct {
	opcode  int
	payload string
}

// patient gives the next reads a deadline.
func (p *peer) patient() { _ = p.conn.SetReadDeadline(time.Now().Add(patience)) }

// write sends raw bytes.
func (p *peer) write(b []byte) {
	p.t.Helper()
	if _, err := p.conn.Write(b); err != nil {
		p.t.Fatalf("writing: %v", err)
	}
}

// clientFrame returns a frame as a client sends it. first is the byte with FIN, RSV and opcode.
func clientFrame(first byte, payload []byte) []byte {
	frame := []byte{first}
	switch n := len(payload); {
	case n <= 125:
		frame = append(frame, 0x80|byte(n))
	case n <= 0xffff:
		frame = binary.BigEndian.AppendUint16(append(frame, 0x80|126), uint16(n))
	default:
		frame = binary.BigEndian.AppendUint64(append(frame, 0x80|127), uint64(n))
	}
	mask := [4]byte{0x12, 0x34, 0x56, 0x78}
	frame = append(frame, mask[:]...)
	for i, b := range payload {
		frame = append(frame, b^mask[i%4])
	}
	return frame
}

// send sends a frame.
func (p *peer) send(opcode int, payload string) {
	p.t.Helper()
	p.write(clientFrame(finBit|byte(opcode), []byte(payload)))
}

// text sends a text message.
func (p *peer) text(payload string) {
	p.t.Helper()
	p.send(ws.TextMessage, payload)
}

// readFrame reads one frame. An error is the connection's.
func (p *peer) readFrame() (frame, error) { return readFrame(p.r) }

func readFrame(r io.Reader) (frame, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return frame{}, err
	}
	if head[0]&0xf0 != finBit || head[1]&0x80 != 0 {
		return frame{}, fmt.Errorf("a server's frame is final, without RSV bits and unmasked, got % x", head)
	}
	length := uint64(head[1])
	var extended [8]byte
	switch length {
	case 126:
		if _, err := io.ReadFull(r, extended[6:]); err != nil {
			return frame{}, err
		}
		length = binary.BigEndian.Uint64(extended[:])
	case 127:
		if _, err := io.ReadFull(r, extended[:]); err != nil {
			return frame{}, err
		}
		length = binary.BigEndian.Uint64(extended[:])
	}
	payload := make([]byte, length)
	_, err := io.ReadFull(r, payload)
	return frame{int(head[0] & 0xf), string(payload)}, err
}

// next returns the next frame.
func (p *peer) next() frame {
	p.t.Helper()
	p.patient()
	f, err := p.readFrame()
	if err != nil {
		p.t.Fatalf("reading a frame: %v", err)
	}
	return f
}

// wantText fails unless the next frame is a text message with the given payload.
func (p *peer) wantText(payload string) {
	p.t.Helper()
	if got, want := p.next(), (frame{ws.TextMessage, payload}); got != want {
		p.t.Fatalf("got frame %.80v, want %.80v", got, want)
	}
}

// wantClose fails unless the next frame, except messages, is a close frame for the given reason.
func (p *peer) wantClose(why ws.Close) {
	p.t.Helper()
	for {
		f := p.next()
		if f.opcode == ws.TextMessage || f.opcode == ws.BinaryMessage {
			continue
		}
		if want := closeFrame(why); f != want {
			p.t.Fatalf("got frame %.80v, want %.80v", f, want)
		}
		return
	}
}

// closeFrame returns the close frame for a reason.
func closeFrame(why ws.Close) frame {
	return frame{ws.CloseMessage, string(websocket.FormatCloseMessage(why.Code, why.Reason))}
}

// wantEOF fails unless the connection ends.
func (p *peer) wantEOF() {
	p.t.Helper()
	p.patient()
	for {
		_, err := p.readFrame()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			p.t.Fatal("the connection is still open")
		}
		if err != nil {
			return
		}
	}
}

// drain reads and discards until the connection ends.
func (p *peer) drain() {
	_ = p.conn.SetReadDeadline(time.Time{})
	_, _ = io.Copy(io.Discard, p.r)
}

// event reads the next frame as an event.
func (p *peer) event() incoming {
	p.t.Helper()
	return parseEvent(p.t, p.next().payload)
}

// wantEvent fails unless the next event is of the given type. It returns the event.
func (p *peer) wantEvent(kind string) incoming {
	p.t.Helper()
	e := p.event()
	if e.Type != kind {
		p.t.Fatalf("got %s, want %s", e.raw, kind)
	}
	return e
}

// An incoming is an event as a client gets it. Its type says which of its fields are set.
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
	Rate *struct {
		Messages int `json:"messages"`
		Window   int `json:"window"`
	} `json:"rate"`
	MaxMessageSize int `json:"max_message_size"`

	RawNext json.RawMessage `json:"next"`
	After   *string         `json:"-"` // next of presence: what to ask for next
	Next    int             `json:"-"` // next of lagged
	Joined  []string        `json:"joined"`
	Left    []string        `json:"left"`
	Code    string          `json:"code"`
	Message string          `json:"message"`

	Messages []json.RawMessage `json:"messages"`

	raw string
}

func parseEvent(t testing.TB, raw string) incoming {
	t.Helper()
	e := incoming{raw: raw}
	err := json.Unmarshal([]byte(raw), &e)
	if err == nil && len(e.RawNext) > 0 {
		if e.Type == "lagged" {
			err = json.Unmarshal(e.RawNext, &e.Next)
		} else {
			err = json.Unmarshal(e.RawNext, &e.After)
		}
	}
	if err != nil {
		t.Fatalf("%q: %v", raw, err)
	}
	return e
}

// apart returns the messages of a replay, and any other event as it is.
func (e incoming) apart(t testing.TB) []incoming {
	t.Helper()
	if e.Type != "replay" {
		return []incoming{e}
	}
	var messages []incoming
	for _, raw := range e.Messages {
		messages = append(messages, parseEvent(t, string(raw)))
	}
	return messages
}

// text returns the payload of a text message.
func (e *incoming) text() string {
	if e.Data == nil {
		return "no text: " + e.raw
	}
	return *e.Data
}

// A roster is the users that a client takes for present.
type roster map[string]bool

func newRoster(page incoming) roster {
	r := roster{}
	for _, u := range page.Users {
		r[u.User] = true
	}
	return r
}

// apply enters a change. It reports whether e is one.
func (r roster) apply(e incoming) bool {
	switch {
	case e.Type == "join":
		r[*e.User] = true
	case e.Type == "leave":
		delete(r, *e.User)
	case e.Type == "presence" && e.Users == nil:
		for _, name := range e.Joined {
			r[name] = true
		}
		for _, name := range e.Left {
			delete(r, name)
		}
	default:
		return false
	}
	return true
}

// eventually polls until done returns true.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// locked runs f with the hub's lock.
func locked[T any](b *Hub, f func() T) T {
	b.mu.Lock()
	defer b.mu.Unlock()
	return f()
}

// eventsFeed returns the hub's feed of events, or nil.
func eventsFeed(b *Hub) *hubFeed {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.IndexFunc(b.feeds, func(f *hubFeed) bool { return f.protocol == protocol(eventsProtocol{}) })
	if i < 0 {
		return nil
	}
	return b.feeds[i]
}

// Interface guards
var (
	_ Owner               = (*owner)(nil)
	_ http.Hijacker       = hijacker{}
	_ feed.Encoder        = feed.NewRaw()
	_ http.ResponseWriter = hijacker{}
)

// publishIn publishes m in a hub, and reports whether the hub took it.
func publishIn(b *Hub, m Message) (Receipt, bool) {
	r, err := b.Publish(context.Background(), m)
	return r, err == nil
}
