package hub

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A numberedProtocol is a third protocol: its messages begin with their number and their sender, and it has notices.
type numberedProtocol struct{ rawProtocol }

func (numberedProtocol) encoder() feed.Encoder { return new(numberedEncoder) }

// joined and lagged tell the client what happened, as frames of its own.
func (numberedProtocol) joined(c *Client, w welcome) {
	c.tell(ws.TextMessage, fmt.Appendf(nil, "joined at %d, %d to come", w.head, w.replay))
}

func (numberedProtocol) lagged(c *Client, missed, next uint64) {
	c.tell(ws.TextMessage, fmt.Appendf(nil, "missed %d, next %d", missed, next))
}

type numberedEncoder struct{ frame []byte }

func (e *numberedEncoder) Message(m *feed.Message) (head, body []byte) {
	e.frame = ws.AppendFrame(nil, m.Opcode, fmt.Appendf(nil, "%d %s: %s", m.Seq, m.User, m.Payload))
	return e.frame, nil
}

func (e *numberedEncoder) Notice(n *feed.Notice) (head, body []byte, ok bool) {
	e.frame = ws.AppendFrame(nil, ws.TextMessage, fmt.Appendf(nil, "%d clients", n.Clients))
	return e.frame, nil, true
}

func feedOf(b *Hub, p protocol) *hubFeed {
	i := slices.IndexFunc(b.feeds, func(f *hubFeed) bool { return f.protocol == p })
	if i < 0 {
		return nil
	}
	return b.feeds[i]
}

// TestFeeds_ThirdProtocolGetsEverythingOnceInOrder has clients of three protocols join, with a history and without, before and
// after each other's messages.
func TestFeeds_ThirdProtocolGetsEverythingOnceInOrder(t *testing.T) {
	for _, history := range []bool{false, true} {
		t.Run(fmt.Sprintf("history=%v", history), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newManual(t)
				settings := defaults()
				if history {
					settings = historyOfTen()
				}
				ada := s.join("ada", settings, false, nil)
				for i := range 5 {
					s.publish(ada, fmt.Sprint(i+1))
				}
				numbered := s.joinAs(numberedProtocol{}, "nan", settings, nil)
				eve := s.join("eve", settings, true, nil)
				late := s.joinAs(numberedProtocol{}, "ned", settings, nil)
				if n := len(s.hub.feeds); n != 3 {
					t.Errorf("got %d feeds, want 3", n)
				}
				for i := range 5 {
					s.publish([]*manualClient{ada, eve, numbered, late, nil}[i], fmt.Sprint(i+6))
				}
				first, replay := 6, 0
				if history {
					first, replay = 1, 5
				}
				users := []string{"ada", "ada", "ada", "ada", "ada", "ada", "eve", "nan", "ned", ""}
				want := []string{fmt.Sprintf("joined at 5, %d to come", replay)}
				for seq := first; seq <= 10; seq++ {
					want = append(want, fmt.Sprintf("%d %s: %d", seq, users[seq-1], seq))
				}
				for _, c := range []*manualClient{numbered, late} {
					if got := c.frames(); !slices.Equal(got, want) {
						t.Errorf("%s: got %q, want %q", c.user, got, want)
					}
				}
				if got := len(ada.frames()); got != 10 {
					t.Errorf("the raw client: got %d messages, want 10", got)
				}
				if got := eve.events(); len(got) != 1+10-first+1 || got[len(got)-1].Seq != 10 {
					t.Errorf("the events client: got %+v, want hello and the messages from %d on", got, first)
				}
				for _, c := range []*manualClient{numbered, late, eve} {
					s.leave(c)
				}
				s.publish(ada, "for ada")
				if history {
					if len(s.hub.feeds) != 3 {
						t.Errorf("got %d feeds, want 3 for the history's age", len(s.hub.feeds))
					}
					for range 15 {
						time.Sleep(10 * time.Second)
						s.publish(ada, "meanwhile")
					}
				}
				if n := len(s.hub.feeds); n != 1 || s.hub.feeds[0] != s.hub.raw {
					t.Errorf("got %d feeds when nobody reads the others, want the raw one", n)
				}
				s.leave(ada)
				s.hub.Close()
				if used := s.hub.process.Memory.Buffers.Used() + s.hub.process.Memory.Histories.Used(); used != 0 {
					t.Errorf("got %d bytes counted for a closed hub", used)
				}
			})
		})
	}
}

// TestFeeds_ThirdProtocolSkipsAndLags has a client of it send with echo off, fall behind, and go on.
func TestFeeds_ThirdProtocolSkipsAndLags(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := defaults()
		settings.Echo, settings.SkipLag, settings.BufferMessages = false, true, 10
		nan := s.joinAs(numberedProtocol{}, "nan", settings, nil)
		s.publish(nil, "one")
		s.publish(nan, "own")
		s.publish(nil, "three")
		if got, want := nan.frames(), []string{"joined at 0, 0 to come", "1 : one", "3 : three"}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		nan.stuck = true
		s.publish(nil, "being written")
		for range 20 {
			s.publish(nil, "x")
		}
		nan.take()
		got := nan.frames()
		if len(got) != 12 || got[0] != "4 : being written" || got[1] != "missed 10, next 15" || got[2] != "15 : x" || got[11] != "24 : x" {
			t.Errorf("got %q, want message 4, the gap, and messages 15 to 24", got)
		}
		if got := s.hub.process.Counters.DroppedByLag.Load(); got != 10 {
			t.Errorf("got %d messages counted as dropped, want 10", got)
		}
		s.leave(nan)
	})
}

// TestFeeds_NoticesReachTheFeedsThatHaveThem has a listener of events cause notices beside clients of the other protocols.
func TestFeeds_NoticesReachTheFeedsThatHaveThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		raw := s.join("raw", defaults(), false, nil)
		nan := s.joinAs(numberedProtocol{}, "nan", presenceOf(true), nil)
		not := s.joinAs(numberedProtocol{}, "not", presenceOf(false), nil)
		ada := s.join("ada", presenceOf(true), true, nil)
		s.serve()
		time.Sleep(time.Minute)
		s.serve()
		s.publish(raw, "after the notice")
		if got, want := nan.frames(), []string{"joined at 0, 0 to come", "4 clients", "1 raw: after the notice"}; !slices.Equal(got, want) {
			t.Errorf("a client with notices: got %q, want %q", got, want)
		}
		if got, want := not.frames(), []string{"joined at 0, 0 to come", "1 raw: after the notice"}; !slices.Equal(got, want) {
			t.Errorf("a client without: got %q, want %q", got, want)
		}
		if got := raw.frames(); len(got) != 1 {
			t.Errorf("a raw client: got %q, want the message alone", got)
		}
		if got := ada.events(); len(got) != 3 || got[1].Type != "join" || got[2].Seq != 1 {
			t.Errorf("the listener: got %+v, want hello, its own join and message 1", got)
		}
		for _, c := range []*manualClient{raw, nan, not, ada} {
			s.leave(c)
		}
	})
}

// TestFeeds_EndWithTheirLastReader counts feeds while clients of three protocols come and go over connections.
func TestFeeds_EndWithTheirLastReader(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		_, a := connect(t, b, defaults())
		go a.drain()
		for range 3 {
			for _, p := range []protocol{numberedProtocol{}, eventsProtocol{}} {
				_, n := joiner{protocol: p}.join(t, b, defaults())
				go n.drain()
				a.text("x")
				synctest.Wait()
				if got := locked(b, func() *hubFeed { return feedOf(b, p) }); got == nil || got.Clients != 1 {
					t.Errorf("%T: got %+v, want a feed with one client", p, got)
				}
				n.conn.Close()
				synctest.Wait()
				if got := locked(b, func() int { return len(b.feeds) }); got != 1 {
					t.Errorf("%T: got %d feeds after its last client, want the raw one", p, got)
				}
			}
		}
	})
}

// TestFeeds_ClientThatHasLeftSkipsNothing has a client leave with everything written but its close frame, and then a frame come
// that it would have skipped as a member: a notice, or a message of its own that is applied late.
func TestFeeds_ClientThatHasLeftSkipsNothing(t *testing.T) {
	for _, frame := range []string{"a notice", "a message of its own"} {
		t.Run(frame, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newManual(t)
				listener := s.join("listener", presenceOf(true), true, nil)
				settings := presenceOf(false)
				settings.Echo = false
				ada := s.join("ada", settings, true, nil)
				s.serve()
				time.Sleep(time.Minute)
				s.serve()
				if !ada.startWriting() { // its writer runs, and has yet to find out that it has left
					t.Fatal("the client is written to")
				}
				s.publish(listener, "x")
				if _, _, p := s.hub.next(ada.Client); p != progressFrames {
					t.Fatalf("got progress %d, want the message", p)
				}
				s.hub.leave(ada.Client, Closing, CloseKicked)
				if frame == "a notice" {
					time.Sleep(time.Minute)
					synctest.Wait()
				} else {
					m := ada.message(ws.TextMessage, []byte("late"))
					publishIn(s.hub, m)
				}
				if ada.feed.Head() == ada.until {
					t.Fatal("no frame has come")
				}
				if _, _, p := s.hub.next(ada.Client); p != progressFlushed {
					t.Errorf("got progress %d, want everything flushed", p)
				}
				s.forget(ada)
				s.leave(listener)
			})
		})
	}
}

// A lineProtocol is that of clients without WebSocket: they get each message as a line of text.
type lineProtocol struct{ rawProtocol }

func (lineProtocol) encoder() feed.Encoder { return lineEncoder{} }

func (lineProtocol) goodbye(why ws.Close) []byte { return fmt.Appendf(nil, "bye: %s\n", why.Reason) }

type lineEncoder struct{}

func (lineEncoder) Message(m *feed.Message) (head, body []byte) {
	return fmt.Appendf(nil, "%d ", m.Seq), fmt.Appendf(nil, "%s\n", m.Payload)
}

func (lineEncoder) Notice(*feed.Notice) (head, body []byte, ok bool) { return nil, nil, false }

// TestFeeds_ClientWithoutWebSocketListens has such a client on connections of every kind. It gets its history and what comes
// after, its input is ignored, nothing pings it, and it ends as others do.
func TestFeeds_ClientWithoutWebSocketListens(t *testing.T) {
	for _, a := range []ability{0, halfCloses, triesWrites, waits, waits | readsAhead, triesWrites | waits | halfCloses} {
		t.Run(fmt.Sprintf("abilities=%b", a), func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				b.Grow(historyOfTen())
				publishIn(b, textMessage("before"))
				m, server := newMemoryConn(a, 1<<20)
				c := newTestClient(b.process, "", testAddress(1), historyOfTen())
				c.protocol = lineProtocol{}
				if err := b.Join(c, 0); err != nil {
					t.Fatal(err)
				}
				c.Attach(server)
				c.Start()
				synctest.Wait()
				publishIn(b, textMessage("after"))
				peer := m.peer()
				if _, err := peer.Write([]byte("is ignored")); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Hour) // nobody pings
				publishIn(b, textMessage("an hour later"))
				synctest.Wait()
				c.Close(CloseKicked)
				synctest.Wait()
				if got, want := string(m.sent()), "1 before\n2 after\n3 an hour later\nbye: kicked\n"; got != want {
					t.Errorf("got %q, want %q", got, want)
				}
				if got := c.Traffic(); got.BytesIn != 10 || got.MessagesIn != 0 || got.MessagesOut != 3 {
					t.Errorf("got traffic %+v", got)
				}
				peer.Close()
				synctest.Wait()
				wantEnd(t, c, CloseKicked)
				b.Close()
			})
		})
	}
}
