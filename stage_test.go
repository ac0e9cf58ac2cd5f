package chatbroadcast

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net/netip"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// A stage is a hub with clients that have no connections: the test is all of its flushers and writers, so that what a
// client takes, and when, is the test's to say. It runs in a synctest bubble.
type stage struct {
	t      *testing.T
	hub    *hub
	lastID clientID
	sent   uint64   // messages
	actors []*actor // that have not left
	from   string   // the address from which clients join
}

// An actor is a client on the stage, and what it has got.
type actor struct {
	*client
	stage   *stage
	stuck   bool   // takes nothing: its next write does not end
	writing bool   // is in the middle of a write, or about to begin one
	rest    []byte // of that write
	got     []byte
}

func newStage(t *testing.T) *stage {
	b := &hub{name: "hub", epoch: "epoch", metrics: hubs.metrics, turns: turns{flushers: runtime.GOMAXPROCS(0)}}
	return &stage{t: t, hub: b}
}

// join has a client enter.
func (s *stage) join(user string, settings *settings, speaksEvents bool, since *resumption) *actor {
	s.t.Helper()
	s.lastID++
	c := &client{id: s.lastID, user: user, settings: settings, hub: s.hub, speaksEvents: speaksEvents, since: since}
	if s.from != "" {
		c.prefix = netip.MustParsePrefix(s.from)
	}
	c.state.Store(stateWriting)
	c.wire.raw = struct{ syscall.RawConn }{} // not nil, so that flushers serve it; nobody writes
	a := &actor{client: c, stage: s, writing: true}
	s.hub.join(c)
	s.actors = append(s.actors, a)
	return a
}

// leave has a client go, and drop with it what it has not been sent.
func (s *stage) leave(a *actor) {
	s.hub.leave(a.client)
	s.hub.drop(a.client)
	s.actors = slices.DeleteFunc(s.actors, func(b *actor) bool { return a == b })
}

// publish publishes a message of the given client's, or nobody's, and gives everybody a turn. It returns the message's time.
func (s *stage) publish(a *actor, payload string) time.Time {
	s.t.Helper()
	m := message{opcode: websocket.TextMessage, payload: []byte(payload)}
	if a != nil {
		m.from, m.sender, m.user = a.client, a.id, a.user
	}
	published := make(chan receipt, 1)
	go func() { // ends when it has had its turn, for which this waits
		r, _ := s.hub.publish(m)
		published <- r
	}()
	for synctest.Wait(); len(published) == 0; synctest.Wait() {
		s.serve()
		time.Sleep(writerPatience)
	}
	r := <-published
	s.sent++
	if r.seq != s.sent {
		s.t.Fatalf("publishing message %d: got %+v", s.sent, r)
	}
	s.serve()
	return r.at
}

// serve gives everybody a turn who has one.
func (s *stage) serve() {
	s.t.Helper()
	synctest.Wait() // timers of the hub
	var served *client
	for {
		c, frames, _, p := s.hub.serve(served)
		served = nil
		if p == progressIdle {
			break
		}
		a := s.actor(c)
		switch {
		case p != progressFrames:
			a.writing = true
		case a.stuck:
			s.hub.handOver(c)
			a.writing, a.rest = true, frames
		default:
			a.got = append(a.got, frames...)
			served = c
		}
	}
	s.hub.mu.Lock()
	s.hub.flushers++ // serve counts on a flusher's end
	s.hub.mu.Unlock()
	for _, a := range slices.Clone(s.actors) {
		if a.writing && !a.stuck {
			a.write()
		}
	}
}

func (s *stage) actor(c *client) *actor {
	i := slices.IndexFunc(s.actors, func(a *actor) bool { return a.client == c })
	if i < 0 {
		s.t.Fatalf("client %d has left, and has a turn", c.id)
	}
	return s.actors[i]
}

// write is the client's writer, until there is nothing left to write or the client gets stuck.
func (a *actor) write() {
	a.stage.t.Helper()
	a.got = append(a.got, a.rest...)
	a.rest = nil
	for {
		frames, _, p := a.hub.next(a.client)
		switch p {
		case progressFrames:
			a.got = append(a.got, a.takePending()...)
			a.got = append(a.got, frames...)
		case progressIdle:
			if !a.due.Load() || !a.state.CompareAndSwap(stateIdle, stateWriting) {
				a.writing = false
				return
			}
			a.got = append(a.got, a.takePending()...)
		default:
			a.stage.t.Fatalf("client %d: got progress %d", a.id, p)
		}
	}
}

// take has the client take everything again.
func (a *actor) take() {
	a.stage.t.Helper()
	a.stuck = false
	a.stage.serve()
}

// frames returns what the client has got since the last call.
func (a *actor) frames() (texts []string) {
	p := &peer{t: a.stage.t, r: bufio.NewReader(bytes.NewReader(a.got))}
	for {
		f, err := p.readFrame()
		if err != nil {
			a.got = nil
			return texts
		}
		texts = append(texts, f.payload)
	}
}

// events is frames for who speaks events.
func (a *actor) events() (all []incoming) {
	a.stage.t.Helper()
	for _, text := range a.frames() {
		e := incoming{raw: text}
		if err := json.Unmarshal([]byte(text), &e); err != nil {
			a.stage.t.Fatalf("%q: %v", text, err)
		}
		all = append(all, e)
	}
	return all
}
