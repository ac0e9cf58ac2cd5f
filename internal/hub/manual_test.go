package hub

import (
	"bytes"
	"io"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A manual is a hub that a test works by hand: the test is all of its flushers and writers, so the test decides what a client
// takes, and when. It runs in a synctest bubble.
type manual struct {
	t       *testing.T
	hub     *Hub
	sent    uint64          // messages
	clients []*manualClient // that have not left
	from    string          // the address from which clients join
	bundles bool            // clients that join take replayed messages in bundles
}

// A manualClient is a client of a manual, and what it has got.
type manualClient struct {
	*Client
	server  *manual
	stuck   bool   // takes nothing: its next write does not end
	writing bool   // is in the middle of a write, or about to begin one
	rest    []byte // of that write
	got     []byte
	missed  uint64 // messages that it has missed under on_lag skip
}

// A nowhere is the connection of a manualClient.
type nowhere struct{}

func (nowhere) Read([]byte) (int, error)         { return 0, io.EOF }
func (nowhere) Write(p []byte) (int, error)      { return len(p), nil }
func (nowhere) Close() error                     { return nil }
func (nowhere) SetReadDeadline(time.Time) error  { return nil }
func (nowhere) SetWriteDeadline(time.Time) error { return nil }
func (nowhere) CloseWrite() bool                 { return false }
func (nowhere) Abort()                           {}
func (nowhere) Writable() bool                   { return false }
func (nowhere) TryWrite(p []byte) int            { return len(p) }
func (nowhere) Exact() bool                      { return true }

// newManual returns a hub of a process of its own.
func newManual(t *testing.T) *manual { return newManualOf(t, NewProcess()) }

func newManualOf(t *testing.T, p *Process) *manual {
	b := New(p, "hub")
	b.epoch = "epoch"
	b.turns.flushers = runtime.GOMAXPROCS(0) // so that publish starts none
	return &manual{t: t, hub: b}
}

// join makes a new client a member.
func (m *manual) join(user string, s *Settings, speaksEvents bool, since *Resumption) *manualClient {
	m.t.Helper()
	if speaksEvents {
		return m.joinAs(eventsProtocol{}, user, s, since)
	}
	return m.joinAs(rawProtocol{}, user, s, since)
}

// joinAs is join for any protocol.
func (m *manual) joinAs(p protocol, user string, s *Settings, since *Resumption) *manualClient {
	m.t.Helper()
	var address netip.Prefix
	if m.from != "" {
		address = netip.MustParsePrefix(m.from)
	}
	c := newTestClient(m.hub.process, user, address, s)
	c.protocol, c.since, c.bundles = p, since, m.bundles && p != protocol(rawProtocol{})
	c.Attach(nowhere{})
	if err := m.hub.Join(c, 0); err != nil {
		m.t.Fatal(err)
	}
	m.hub.open(c)
	a := &manualClient{Client: c, server: m, writing: true}
	m.clients = append(m.clients, a)
	return a
}

// speaksEvents reports whether a is a client of the events protocol.
func (a *manualClient) speaksEvents() bool { return a.protocol == protocol(eventsProtocol{}) }

// leave makes a client leave, and drops with it the frames that it has not been sent.
func (m *manual) leave(a *manualClient) {
	m.hub.leave(a.Client, Cut, CloseGone)
	m.hub.drop(a.Client)
	m.forget(a)
}

// breakOff makes every write to a client fail. It stays a member.
func (m *manual) breakOff(a *manualClient) {
	m.hub.drop(a.Client)
	m.hub.mute(a.Client)
	m.forget(a)
}

func (m *manual) forget(a *manualClient) {
	m.clients = slices.DeleteFunc(m.clients, func(b *manualClient) bool { return a == b })
}

// publish publishes a message of the given client, or of none, and gives every client a turn. It returns the message's time.
func (m *manual) publish(a *manualClient, payload string) time.Time {
	m.t.Helper()
	msg := textMessage(payload)
	var from *Client
	if a != nil {
		from = a.Client
		msg = from.message(ws.TextMessage, []byte(payload))
	}
	published := make(chan Receipt, 1)
	go func() { // ends when it has had its turn, for which this waits
		r, _ := m.hub.publish(from, &msg)
		published <- r
	}()
	for synctest.Wait(); len(published) == 0; synctest.Wait() {
		m.serve()
		time.Sleep(writerPatience)
	}
	r := <-published
	m.sent++
	if r.Seq != m.sent {
		m.t.Fatalf("publishing message %d: got %+v", m.sent, r)
	}
	m.serve()
	return r.At
}

// serve gives a turn to every client that has one.
func (m *manual) serve() {
	m.t.Helper()
	synctest.Wait() // timers of the hub
	before := m.hub.process.Counters.DroppedByLag.Load()
	var served *Client
	for {
		c, frames, _, p := m.hub.serve(served)
		served = nil
		if c == nil {
			break
		}
		a := m.client(c)
		if a == nil { // a timer of the hub woke it just before it left
			m.hub.drop(c)
			continue
		}
		switch {
		case p != progressFrames || frames == nil:
			a.writing = true
		case a.stuck:
			m.hub.handOver(c)
			a.writing, a.rest = true, frames
		default:
			a.got = append(a.got, frames...)
			served = c
		}
	}
	if m.hub.process.Counters.DroppedByLag.Load() != before {
		m.t.Fatal("a client lagged that was only queued")
	}
	m.hub.mu.Lock()
	m.hub.turns.flushers++ // serve counts on a flusher's end
	m.hub.mu.Unlock()
	for _, a := range slices.Clone(m.clients) {
		if a.writing && !a.stuck {
			a.write()
		}
	}
}

// client returns the peer of c, or nil if c has left.
func (m *manual) client(c *Client) *manualClient {
	m.t.Helper()
	i := slices.IndexFunc(m.clients, func(a *manualClient) bool { return a.Client == c })
	if i >= 0 {
		return m.clients[i]
	}
	if c.State().isMember() {
		m.t.Fatalf("client %v is a member that nobody knows", c.id)
	}
	return nil
}

// write is the client's writer, until there is nothing left to write or the client gets stuck.
func (a *manualClient) write() {
	a.server.t.Helper()
	a.got = append(a.got, a.rest...)
	a.rest = nil
	dropped := &a.process.Counters.DroppedByLag
	for {
		before := dropped.Load()
		frames, _, p := a.hub.next(a.Client)
		a.missed += dropped.Load() - before
		switch p {
		case progressFrames:
			a.got = append(a.got, a.takePending()...)
			a.got = append(a.got, frames...)
		case progressReplay:
			a.got = append(a.got, a.takePending()...)
			a.got = append(a.got, feed.AppendReplay(nil, frames)...)
		case progressIdle:
			if !a.due.Load() || !a.startWriting() {
				a.writing = false
				return
			}
			a.got = append(a.got, a.takePending()...)
		default:
			a.server.t.Fatalf("client %v: got progress %d", a.id, p)
		}
	}
}

// take makes the client take everything again.
func (a *manualClient) take() {
	a.server.t.Helper()
	a.stuck = false
	a.server.serve()
}

// frames returns the payloads that the client has got since the last call.
func (a *manualClient) frames() (texts []string) {
	r := bytes.NewReader(a.got)
	for {
		f, err := readFrame(r)
		if err != nil {
			a.got = nil
			return texts
		}
		texts = append(texts, f.payload)
	}
}

// events is frames for a client that speaks events. It takes bundles apart.
func (a *manualClient) events() (all []incoming) {
	a.server.t.Helper()
	for _, raw := range a.frames() {
		all = append(all, parseEvent(a.server.t, raw).apart(a.server.t)...)
	}
	return all
}
