package hub

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
)

// A node is one process with one hub, in a test of several.
type node struct {
	process *Process
	session *enginetest.Session
	hub     *Hub
	resets  int
}

// unpinged returns s without pings, so that a peer that waits long gets none.
func unpinged(s *Settings) *Settings {
	s.PingInterval = 0
	return s
}

// newNode returns a node of a server with the hub "hub" open.
func newNode(t *testing.T, server *enginetest.Server, s *Settings) *node {
	t.Helper()
	n := &node{process: NewProcess(), session: server.Session()}
	n.process.Reset = func(b *Hub) {
		n.resets++
		for _, c := range b.Clients() {
			c.Close(CloseHubReset)
		}
	}
	n.open(t, s)
	t.Cleanup(func() {
		n.hub.Close()
		time.Sleep(3 * engineTimeout) // in the bubble
		synctest.Wait()
		if err := n.session.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func (n *node) open(t *testing.T, s *Settings) {
	t.Helper()
	b, err := Load(t.Context(), n.process, "hub", n.session, s)
	if err != nil {
		t.Fatal(err)
	}
	n.hub = b
	joined.Store(b, new([]*Client))
	t.Cleanup(func() { checkOwners(t, b) })
}

// renew does what the process does every engine.RenewInterval.
func (n *node) renew(t *testing.T) {
	t.Helper()
	r, err := n.session.Renew(t.Context(), engine.Status{}, []engine.Known{n.hub.Known()})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range r.Changed {
		n.hub.Renewed(k)
	}
	if r.Forgotten {
		n.hub.AnnounceAgain()
	}
	synctest.Wait()
}

// twoNodes runs a test in a bubble with two nodes of one server.
func twoNodes(t *testing.T, s *Settings, test func(t *testing.T, server *enginetest.Server, a, b *node)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		server := enginetest.NewServer()
		a, b := newNode(t, server, s), newNode(t, server, s)
		test(t, server, a, b)
	})
}

// TestEngine_MessageReachesClientsOfAllNodes sends messages of each kind of client, on both nodes.
func TestEngine_MessageReachesClientsOfAllNodes(t *testing.T) {
	twoNodes(t, unpinged(defaults()), func(t *testing.T, _ *enginetest.Server, a, b *node) {
		_, ada := connect(t, a.hub, unpinged(defaults()))
		_, bob := connect(t, b.hub, unpinged(defaults()))
		for i := range 10 {
			ada.text(fmt.Sprint("from ada ", i))
			ada.wantText(fmt.Sprint("from ada ", i))
			bob.wantText(fmt.Sprint("from ada ", i))
			bob.text(fmt.Sprint("from bob ", i))
			ada.wantText(fmt.Sprint("from bob ", i))
			bob.wantText(fmt.Sprint("from bob ", i))
		}
		r, err := a.hub.Publish(t.Context(), textMessage("from outside"))
		if err != nil || r.Seq != 21 || r.Members != 2 {
			t.Errorf("got %+v, %v, want message 21 for two clients", r, err)
		}
		bob.wantText("from outside")
	})
}

// TestEngine_NobodyGetsAMessageBeforeItIsPublished holds the engine up.
func TestEngine_NobodyGetsAMessageBeforeItIsPublished(t *testing.T) {
	twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, server *enginetest.Server, a, _ *node) {
		_, ada := joiner{events: true, room: 1 << 20}.join(t, a.hub, unpinged(historyOfTen()))
		if e := ada.event(); e.Type != "hello" {
			t.Fatalf("got %+v, want hello", e)
		}
		release := server.HoldPublish()
		ada.text(`{"type":"send","id":"1","data":"hello"}`)
		synctest.Wait()
		if n := ada.r.Buffered(); n > 0 || a.hub.Known().Seq > 0 {
			t.Errorf("got %d bytes and message %d before the engine has the message", n, a.hub.Known().Seq)
		}
		release()
		seen := map[string]bool{}
		for range 2 {
			seen[ada.event().Type] = true
		}
		if !seen["sent"] || !seen["message"] {
			t.Errorf("got %v, want sent and message", seen)
		}
	})
}

// TestEngine_LostReplyIsPublishedOnce loses the engine's answers.
func TestEngine_LostReplyIsPublishedOnce(t *testing.T) {
	twoNodes(t, unpinged(defaults()), func(t *testing.T, server *enginetest.Server, a, b *node) {
		_, bob := connect(t, b.hub, unpinged(defaults()))
		server.LoseReplies(3)
		if r, err := a.hub.Publish(t.Context(), textMessage("one")); err != nil || r.Seq != 1 {
			t.Errorf("got %+v, %v, want message 1", r, err)
		}
		if r, err := a.hub.Publish(t.Context(), textMessage("two")); err != nil || r.Seq != 2 {
			t.Errorf("got %+v, %v, want message 2", r, err)
		}
		bob.wantText("one")
		bob.wantText("two")
	})
}

// TestEngine_GapIsFetched loses what the engine passes to one node.
func TestEngine_GapIsFetched(t *testing.T) {
	for _, next := range []string{"message", "renewal"} {
		t.Run(next, func(t *testing.T) {
			twoNodes(t, unpinged(defaults()), func(t *testing.T, server *enginetest.Server, a, b *node) {
				_, bob := connect(t, b.hub, unpinged(defaults()))
				synctest.Wait()
				b.session.LosePushes(5)
				for i := range 5 {
					publishIn(a.hub, textMessage(fmt.Sprint(i)))
					synctest.Wait() // or several would be one push
				}
				if next == "message" {
					publishIn(a.hub, textMessage("5"))
				} else {
					b.renew(t)
				}
				for i := range 5 {
					bob.wantText(fmt.Sprint(i))
				}
				if n := b.process.Counters.Repaired.Load(); n < 5 {
					t.Errorf("got %d messages counted as fetched, want 5 or more", n)
				}
			})
		})
	}
}

// TestEngine_GapThatTheEngineHasNoMoreCountsAsLag publishes more than the engine keeps while a node gets nothing.
func TestEngine_GapThatTheEngineHasNoMoreCountsAsLag(t *testing.T) {
	skipping := unpinged(defaults())
	skipping.SkipLag = true
	twoNodes(t, unpinged(defaults()), func(t *testing.T, server *enginetest.Server, a, b *node) {
		closed, _ := connect(t, b.hub, unpinged(defaults()))
		_, skips := joiner{events: true, room: 1 << 20}.join(t, b.hub, skipping)
		if e := skips.event(); e.Type != "hello" {
			t.Fatalf("got %+v, want hello", e)
		}
		synctest.Wait()
		lost := repairMessages*2 + 10
		b.session.LosePushes(lost)
		for i := range lost {
			publishIn(a.hub, textMessage(fmt.Sprint(i+1)))
			synctest.Wait()
		}
		b.renew(t)
		e := skips.event()
		if e.Type != "lagged" {
			t.Fatalf("got %+v, want lagged", e)
		}
		missed, next := e.Missed, e.Next
		if missed == 0 || next != missed+1 {
			t.Errorf("got %d missed and next %d", missed, next)
		}
		for seq := next; seq <= lost; seq++ {
			if e := skips.event(); e.Type != "message" || e.Seq != seq || *e.Data != fmt.Sprint(seq) {
				t.Fatalf("got %+v, want message %d", e, seq)
			}
		}
		synctest.Wait()
		if why := closed.Cause(); why != CloseLagged {
			t.Errorf("got %v, want %v", why, CloseLagged)
		}
	})
}

// TestEngine_Down has the engine be unreachable for longer than a message may wait.
func TestEngine_Down(t *testing.T) {
	twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, server *enginetest.Server, a, b *node) {
		_, events := joiner{events: true, room: 1 << 20}.join(t, a.hub, unpinged(historyOfTen()))
		raw, r := connect(t, a.hub, unpinged(historyOfTen()))
		_, bob := connect(t, b.hub, unpinged(defaults()))
		events.event()
		server.Down(errors.New("down"))
		began := time.Now()
		events.text(`{"type":"send","id":"1","data":"hello"}`)
		if e := events.event(); e.Type != "error" || e.Code != "unavailable" || e.ID == nil || *e.ID != "1" {
			t.Errorf("got %+v, want an error: unavailable", e)
		}
		if took := time.Since(began); took < engineTimeout || took > engineTimeout+2*lastRetry {
			t.Errorf("took %v, want %v", took, engineTimeout)
		}
		r.text("lost")
		if _, err := a.hub.Publish(t.Context(), textMessage("lost, too")); !errors.Is(err, ErrUnavailable) {
			t.Errorf("got %v, want %v", err, ErrUnavailable)
		}
		synctest.Wait()
		if why := raw.Cause(); why != CloseUnavailable {
			t.Errorf("got %v, want %v", why, CloseUnavailable)
		}
		events.text(`{"type":"send","id":"2","data":"late"}`)
		time.Sleep(engineTimeout / 2)
		server.Up()
		seen := map[string]bool{}
		for range 2 {
			seen[events.event().Type] = true
		}
		if !seen["sent"] || !seen["message"] {
			t.Errorf("got %v, want sent and message", seen)
		}
		b.renew(t)
		bob.wantText("late")
	})
}

// TestEngine_UnknownOutcomeClosesTheSender has every answer be lost.
func TestEngine_UnknownOutcomeClosesTheSender(t *testing.T) {
	twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, server *enginetest.Server, a, b *node) {
		c, ada := joiner{events: true, room: 1 << 20}.join(t, a.hub, unpinged(historyOfTen()))
		token := ada.event().Token
		server.LoseReplies(1000)
		ada.text(`{"type":"send","id":"1","data":"hello"}`)
		time.Sleep(engineTimeout + 2*lastRetry)
		synctest.Wait()
		if why := c.Cause(); why != CloseUnavailable {
			t.Fatalf("got %v, want %v", why, CloseUnavailable)
		}
		server.LoseReplies(0)
		_, again := joiner{events: true, room: 1 << 20}.join(t, b.hub, unpinged(historyOfTen()))
		if e := again.event(); e.Type != "hello" || e.Replay != 1 {
			t.Fatalf("got %+v, want hello with one message to come", e)
		}
		again.event()
		again.text(fmt.Sprintf(`{"type":"send","id":"1","token":%q,"data":"hello"}`, token))
		if e := again.event(); e.Type != "sent" || e.Seq != 1 {
			t.Errorf("got %+v, want message 1 to be sent", e)
		}
	})
}

// TestEngine_ClientResumesOnAnotherNode reconnects a client with the position that it had on the other node.
func TestEngine_ClientResumesOnAnotherNode(t *testing.T) {
	twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, _ *enginetest.Server, a, b *node) {
		for i := range 5 {
			publishIn(a.hub, textMessage(fmt.Sprint(i+1)))
		}
		synctest.Wait() // the other node has them, too
		_, ada := joiner{events: true, room: 1 << 20}.join(t, a.hub, unpinged(historyOfTen()))
		epoch := ada.event().Epoch
		_, again := joiner{events: true, room: 1 << 20, since: &Resumption{Epoch: epoch, Seq: 3}}.join(t, b.hub, unpinged(historyOfTen()))
		if e := again.event(); !*e.Resumed || e.Replay != 2 {
			t.Fatalf("got %+v, want resumed with two messages", e)
		}
		if e := again.event(); e.Seq != 4 || *e.Data != "4" {
			t.Errorf("got %+v, want message 4", e)
		}
	})
}

// TestEngine_HubLoadsWhatTheEngineHas opens a hub after the last node has left it.
func TestEngine_HubLoadsWhatTheEngineHas(t *testing.T) {
	twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, _ *enginetest.Server, a, b *node) {
		for i := range 15 {
			publishIn(a.hub, textMessage(fmt.Sprint(i+1)))
		}
		epoch := a.hub.Known().Epoch
		a.hub.Close()
		b.hub.Close()
		a.open(t, unpinged(historyOfTen()))
		_, ada := joiner{events: true, room: 1 << 20, since: &Resumption{Epoch: epoch, Seq: 14}}.join(t, a.hub, unpinged(historyOfTen()))
		if e := ada.event(); e.Head != 15 || !*e.Resumed || e.Replay != 1 {
			t.Errorf("got %+v, want to go on from message 14 of 15", e)
		}
		_, raw := connect(t, a.hub, unpinged(historyOfTen()))
		for i := range 10 {
			raw.wantText(fmt.Sprint(i + 6))
		}
	})
}

// TestEngine_NewEpochEndsTheHub has the engine lose messages.
func TestEngine_NewEpochEndsTheHub(t *testing.T) {
	faults := map[string]func(*enginetest.Server){
		"new epoch": func(s *enginetest.Server) { s.NewEpoch("hub") },
		"rewound":   func(s *enginetest.Server) { s.Rewind("hub", 2) },
		"wiped":     func(s *enginetest.Server) { s.Wipe() },
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, server *enginetest.Server, a, b *node) {
				ada, _ := connect(t, a.hub, unpinged(historyOfTen()))
				bob, p := connect(t, b.hub, unpinged(historyOfTen()))
				for i := range 4 {
					publishIn(a.hub, textMessage(fmt.Sprint(i+1)))
				}
				fault(server)
				publishIn(a.hub, textMessage("after"))
				synctest.Wait()
				for i := range 4 {
					p.wantText(fmt.Sprint(i + 1))
				}
				a.renew(t)
				b.renew(t)
				for _, c := range []*Client{ada, bob} {
					if why := c.Cause(); why != CloseHubReset {
						t.Errorf("got %v, want %v", why, CloseHubReset)
					}
				}
				if a.resets != 1 || b.resets != 1 {
					t.Errorf("got %d and %d resets, want one each", a.resets, b.resets)
				}
			})
		})
	}
}

// TestEngine_PresenceCoversAllNodes has users join and leave on another node.
func TestEngine_PresenceCoversAllNodes(t *testing.T) {
	twoNodes(t, unpinged(presenceOf(true)), func(t *testing.T, server *enginetest.Server, a, b *node) {
		bob, _ := joiner{user: "bob", room: 1 << 20}.join(t, b.hub, unpinged(presenceOf(true)))
		synctest.Wait()
		_, ada := joiner{user: "ada", events: true, room: 1 << 20}.join(t, a.hub, unpinged(presenceOf(true)))
		if e := ada.event(); e.Clients != 2 {
			t.Errorf("got %+v, want hello with two clients", e)
		}
		ada.text(`{"type":"who"}`)
		e := ada.event()
		for e.Type != "presence" || e.Users == nil {
			e = ada.event()
		}
		if len(e.Users) != 2 || e.Users[0].User != "ada" || e.Users[1].User != "bob" {
			t.Errorf("got %+v, want ada and bob", e)
		}
		joiner{user: "cid", room: 1 << 20}.join(t, b.hub, unpinged(presenceOf(true)))
		for e = ada.event(); e.Type != "join" || *e.User != "cid"; {
			e = ada.event()
		}
		if e.Clients != 3 {
			t.Errorf("got %+v, want three clients", e)
		}
		bob.Cut(CloseGone)
		for e = ada.event(); e.Type != "leave"; {
			e = ada.event()
		}
		if *e.User != "bob" || e.Clients != 2 {
			t.Errorf("got %+v, want bob to leave two", e)
		}
		b.session.Kill()
		for range 5 {
			time.Sleep(engine.RenewInterval)
			a.renew(t)
		}
		for e = ada.event(); e.Type != "leave"; {
			e = ada.event()
		}
		if *e.User != "cid" || e.Clients != 1 {
			t.Errorf("got %+v, want cid to leave one", e)
		}
	})
}
