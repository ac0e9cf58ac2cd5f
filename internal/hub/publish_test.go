package hub

import (
	"bytes"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// TestPublish_IsTheOnlyDoor sends messages in every way that there is, to an open hub and to a closed one.
func TestPublish_IsTheOnlyDoor(t *testing.T) {
	for _, closed := range []bool{false, true} {
		t.Run(fmt.Sprintf("closed=%v", closed), func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				var published atomic.Int64
				b.process.Published = func() {
					published.Add(1)
					for range 1000 { // a writer may have it for a moment
						if b.mu.TryLock() {
							b.mu.Unlock()
							return
						}
						runtime.Gosched()
					}
					t.Error("Published runs under the hub's lock")
				}
				raw, r := connect(t, b, defaults())
				events, e := joiner{events: true}.join(t, b, defaults())
				_, listener := connect(t, b, defaults())
				go r.drain()
				go e.drain()
				go listener.drain()
				synctest.Wait()
				if closed {
					b.Close()
				}
				ways := []struct {
					name   string
					source Source
					send   func() (accepted bool)
				}{
					{"a raw client", FromClient, func() bool { r.text("one"); return !closed }},
					{"a raw client, binary", FromClient, func() bool { r.send(ws.BinaryMessage, "\x00"); return !closed }},
					{"an events client", FromClient, func() bool { e.text(`{"type":"send","data":"two"}`); return !closed }},
					{"an events client, binary", FromClient, func() bool { e.text(`{"type":"send","data64":"AA=="}`); return !closed }},
					{"HTTP", FromHTTP, func() bool { _, ok := publishIn(b, textMessage("three")); return ok }},
					{"the admin API", FromAdmin, func() bool {
						m := textMessage("four")
						m.Source = FromAdmin
						_, ok := publishIn(b, m)
						return ok
					}},
				}
				for _, way := range ways {
					head, before := b.raw.Head(), published.Load()
					counted := b.process.Counters.Published[way.source].Load()
					ok := way.send()
					synctest.Wait()
					want := uint64(1)
					if closed {
						want = 0
					}
					if ok == closed {
						t.Errorf("%s: got accepted %v", way.name, ok)
					}
					if got := b.process.Counters.Published[way.source].Load() - counted; got != want {
						t.Errorf("%s: got %d messages counted for its source, want %d", way.name, got, want)
					}
					if got := uint64(published.Load() - before); got != want {
						t.Errorf("%s: got Published called %d times, want %d", way.name, got, want)
					}
					if got := b.raw.Head() - head; got != want {
						t.Errorf("%s: got %d messages appended, want %d", way.name, got, want)
					}
				}
				for _, c := range []*Client{raw, events} {
					c.Close(CloseHubRemoved)
				}
				listener.conn.Close()
			})
		})
	}
}

// TestPublish_RepeatedMessagesCountOnce sends a message with a key twice.
func TestPublish_RepeatedMessagesCountOnce(t *testing.T) {
	b := newHub(t)
	b.Grow(historyOfTen())
	var published atomic.Int64
	b.process.Published = func() { published.Add(1) }
	m := textMessage("once")
	m.Key = Key{"ada", b.epoch + "-token", "m1"}
	first, ok := publishIn(b, m)
	if !ok || first.Seq != 1 || first.Repeated || first.At.IsZero() {
		t.Errorf("got %+v, %v, want message 1 with its time", first, ok)
	}
	if again, ok := publishIn(b, m); !ok || !again.Repeated || again.Seq != 1 || !again.At.Equal(first.At) {
		t.Errorf("got %+v, %v, want message 1 repeated", again, ok)
	}
	if n, counted := published.Load(), b.process.Counters.Published[FromHTTP].Load(); n != 1 || counted != 1 || b.raw.Head() != 1 {
		t.Errorf("got %d calls, %d counted, head %d, want one each", n, counted, b.raw.Head())
	}
	b.Close()
}

// TestPublish_NoMessageOfAClientThatHasLeft has messages arrive after their sender was closed.
func TestPublish_NoMessageOfAClientThatHasLeft(t *testing.T) {
	for _, s := range states {
		c, _ := clientIn(t, s)
		m := c.message(ws.TextMessage, []byte("late"))
		r, ok := c.hub.publish(c, &m)
		if ok != s.isMember() || ok != (r.Seq == 1) || c.hub.raw.Head() != r.Seq {
			t.Errorf("%s: got %+v, %v", nameOf(s), r, ok)
		}
	}
}

// TestPublish_ReceiptsHaveTimesWhereSomebodySeesThem publishes in hubs with and without readers of a message's time.
func TestPublish_ReceiptsHaveTimesWhereSomebodySeesThem(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prepare func(s *manual)
		key     Key
		want    bool
	}{
		{"raw clients alone", func(s *manual) { s.join("", defaults(), false, nil) }, Key{}, false},
		{"with a history", func(s *manual) { s.join("", historyOfTen(), false, nil) }, Key{}, true},
		{"with a client of events", func(s *manual) { s.join("", defaults(), true, nil) }, Key{}, true},
		{"with a key", func(s *manual) { s.join("", defaults(), false, nil) }, Key{"", "epoch-x", "1"}, true},
	} {
		s := newManual(t)
		tc.prepare(s)
		m := textMessage("x")
		m.Key = tc.key
		r, _ := publishIn(s.hub, m)
		if r.Seq != 1 || r.Members != 1 || r.At.IsZero() == tc.want {
			t.Errorf("%s: got %+v, want message 1 to 1 member, its time known: %v", tc.name, r, tc.want)
		}
		s.hub.Close()
	}
}

// TestSubmit_AppliesLaterAndInOrder submits messages one by one, as an engine between the two steps would, and applies each
// when the next has been prepared.
func TestSubmit_AppliesLaterAndInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		ada := s.join("ada", historyOfTen(), true, nil)
		bob := s.join("bob", historyOfTen(), false, nil)
		s.serve()
		ada.events()
		b := s.hub
		for i := range 3 {
			m := ada.message(ws.TextMessage, fmt.Append(nil, i))
			m.Key = Key{"ada", "epoch-t", fmt.Sprint(i)}
			b.mu.Lock()
			var r Receipt
			verdict := b.submitLocked(ada.Client, &m, &r)
			b.mu.Unlock()
			if verdict != apply || r.Seq != uint64(i+1) || r.Members != 2 {
				t.Fatalf("submitting %d: got %+v, %v", i, r, verdict)
			}
			s.serve()
			if got := bob.frames(); len(got) > 0 {
				t.Errorf("got %q before message %d was applied", got, i)
			}
			if b.raw.Head() != uint64(i) {
				t.Errorf("got head %d before message %d was applied", b.raw.Head(), i)
			}
			time.Sleep(time.Second) // the message's time is that of its submission
			b.mu.Lock()
			var w work
			b.applyLocked(&m, &w)
			b.mu.Unlock()
			b.deliver(&w)
			s.sent++
			s.serve()
			if got := bob.frames(); len(got) != 1 || got[0] != fmt.Sprint(i) {
				t.Errorf("got %q, want message %d", got, i)
			}
			e := ada.events()
			if len(e) != 1 || e[0].Seq != i+1 || e[0].text() != fmt.Sprint(i) || *e[0].Client != ada.id.String() {
				t.Errorf("got %+v, want message %d of ada", e, i+1)
			} else if at, err := time.Parse(time.RFC3339Nano, e[0].Time); err != nil || !at.Equal(r.At.Truncate(time.Millisecond)) {
				t.Errorf("got time %v, want %v", e[0].Time, r.At)
			}
			b.mu.Lock()
			var again Receipt
			verdict = b.submitLocked(ada.Client, &m, &again)
			b.mu.Unlock()
			if verdict != known || !again.Repeated || again.Seq != r.Seq {
				t.Errorf("submitting %d again: got %+v, %v, want it known", i, again, verdict)
			}
		}
		b.Close()
		s.leave(ada)
		s.leave(bob)
	})
}

// TestApply_RefusesGapsAndDuplicates applies numbers other than the next one.
func TestApply_RefusesGapsAndDuplicates(t *testing.T) {
	s := newManual(t)
	s.join("", defaults(), false, nil)
	for range 2 {
		publishIn(s.hub, textMessage("x"))
	}
	for _, seq := range []uint64{0, 1, 2, 4, 1 << 40} {
		func() {
			defer func() {
				got := fmt.Sprint(recover())
				if want := fmt.Sprintf("message %d applied where 3 is next", seq); !strings.Contains(got, want) {
					t.Errorf("got %q, want a panic that says %q", got, want)
				}
			}()
			m := textMessage("x")
			s.hub.mu.Lock()
			defer s.hub.mu.Unlock()
			m.Seq = seq
			s.hub.applyLocked(&m, new(work))
		}()
	}
	m := textMessage("x")
	s.hub.mu.Lock()
	m.Seq = 3
	s.hub.applyLocked(&m, new(work))
	s.hub.mu.Unlock()
	if got := s.hub.raw.Head(); got != 3 {
		t.Errorf("got head %d, want 3", got)
	}
}

// TestApply_KnowsTheSenderByItsID has a message come back that names its sender by id alone, as it would from an engine.
func TestApply_KnowsTheSenderByItsID(t *testing.T) {
	for _, speaksEvents := range []bool{false, true} {
		for _, echo := range []bool{false, true} {
			t.Run(fmt.Sprintf("events=%v/echo=%v", speaksEvents, echo), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newManual(t)
					settings := defaults()
					settings.Echo = echo
					ada := s.join("ada", settings, speaksEvents, nil)
					bob := s.join("bob", settings, speaksEvents, nil)
					s.serve()
					ada.got, bob.got = nil, nil
					for _, sender := range []*manualClient{ada, bob, nil} {
						m := textMessage("hello")
						if sender != nil {
							m.Sender, m.User = sender.id, sender.user
						}
						publishIn(s.hub, m)
						s.serve()
					}
					want := 3
					if !echo {
						want = 2
					}
					if a, b := len(ada.frames()), len(bob.frames()); a != want || b != want {
						t.Errorf("got %d and %d messages, want %d each", a, b, want)
					}
					s.leave(ada)
					s.leave(bob)
				})
			})
		}
	}
}

// TestApply_FlushersServeManyClients lets the hub's own flushers run, with clients whose sockets take everything.
func TestApply_FlushersServeManyClients(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		const clients, messages = 3 * clientsPerFlusher, 20
		var all []*peer
		for range clients {
			_, p := joiner{abilities: triesWrites | waits, room: 64 << 10}.join(t, b, defaults())
			all = append(all, p)
		}
		synctest.Wait()
		var want bytes.Buffer
		for i := range messages {
			payload := fmt.Sprint(i)
			want.Write(ws.AppendFrame(nil, ws.TextMessage, []byte(payload)))
			if _, ok := publishIn(b, textMessage(payload)); !ok {
				t.Fatal("the hub is closed")
			}
		}
		synctest.Wait()
		for i, p := range all {
			if got := p.conn.sent(); !bytes.Equal(got, want.Bytes()) {
				t.Fatalf("client %d: got %q, want %q", i, got, want.Bytes())
			}
		}
		written := b.process.Counters.Written()
		if written.Messages != clients*messages || written.Bytes != uint64(clients*want.Len()) {
			t.Errorf("got %d messages and %d bytes counted, want %d and %d", written.Messages, written.Bytes, clients*messages, clients*want.Len())
		}
		locked(b, func() any {
			if b.turns.open != 0 || b.turns.queued != 0 || b.turns.flushers != 0 {
				t.Errorf("got %+v left, want no turns", b.turns)
			}
			return nil
		})
	})
}
