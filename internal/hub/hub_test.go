package hub

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

func TestHub_JoinRefusesWhenFullOrClosed(t *testing.T) {
	b := newHub(t)
	first, second := newTestClient(b.process, "", testAddress(1), defaults()), newTestClient(b.process, "", testAddress(1), defaults())
	if err := b.Join(first, 1); err != nil {
		t.Fatal(err)
	}
	if err := b.Join(second, 1); !errors.Is(err, ErrFull) {
		t.Errorf("the second of one: got %v, want %v", err, ErrFull)
	}
	first.Close(CloseKicked) // leaves at once, whatever its connection does
	if err := b.Join(second, 1); err != nil {
		t.Errorf("when the first has left: got %v", err)
	}
	b.Close()
	if err := b.Join(newTestClient(b.process, "", testAddress(1), defaults()), 0); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed hub: got %v, want %v", err, ErrClosed)
	}
	first.Abandon()
	second.Abandon()
}

// TestHub_PublishesNothingAfterItsLastClient publishes between the moment at which the last client has left and the one at
// which the owner closes the hub, or somebody joins, or a history is wanted.
func TestHub_PublishesNothingAfterItsLastClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		s.leave(s.join("ada", defaults(), false, nil))
		if r, published := publishIn(s.hub, textMessage("for nobody")); published || r.Seq != 0 {
			t.Errorf("got %+v, %v, want nothing published", r, published)
		}
		s.join("bob", defaults(), false, nil)
		if r, published := publishIn(s.hub, textMessage("for bob")); !published || r.Seq != 1 {
			t.Errorf("got %+v, %v, want message 1", r, published)
		}
		s.serve()
		s.leave(s.clients[0])
		s.hub.Grow(historyOfTen())
		if r, published := publishIn(s.hub, textMessage("for the history")); !published || r.Seq != 2 {
			t.Errorf("got %+v, %v, want message 2", r, published)
		}
		s.hub.Close()
	})
}

func TestHub_TellsOperatorsWhatItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		opened := time.Now()
		small, large := defaults(), defaults()
		small.MaxMessageSize, large.MaxMessageSize = 100, 1000
		a := s.join("ada", large, false, nil)
		s.join("bob", small, false, nil)
		a.stuck = true
		for range 3 {
			s.publish(nil, "hello")
		}
		info, open := s.hub.Info()
		if want := (Info{2, 3, 3, 3 * (2 + 5 + 4), opened}); info != want || !open {
			t.Errorf("got %+v, %v, want %+v, true", info, open, want)
		}
		if got := s.hub.MessageLimit(); got != 1000 {
			t.Errorf("got a limit of %d bytes, want the largest of the clients", got)
		}
		if c := s.clients[0]; c.User() != "ada" || c.Hub() != s.hub || c.Settings() != large || c.Owner() != c.owner || c.Began().After(time.Now()) {
			t.Errorf("got %q, %v, %v, %v", c.User(), c.Hub(), c.Settings(), c.Owner())
		}
		a.take()
		if info, _ := s.hub.Info(); info.RetainedMessages != 0 || info.RetainedBytes != 0 {
			t.Errorf("got %+v, want nothing retained when everybody has everything", info)
		}
		s.hub.Close()
		if _, open := s.hub.Info(); open {
			t.Error("a closed hub says that it is open")
		}
	})
}

func TestHub_LagCountsMessagesOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		ada := s.join("ada", presenceOf(true), true, nil)
		time.Sleep(time.Minute)
		s.serve()
		ada.stuck = true
		s.publish(nil, "taken, and not written")
		bob := s.join("bob", defaults(), false, nil)
		time.Sleep(time.Minute) // ada gets a notice about bob
		s.publish(nil, "one")
		s.publish(nil, "two")
		if got := s.hub.Lags([]*Client{ada.Client, bob.Client}); got[0] != 2 || got[1] != 0 {
			t.Errorf("got %v, want 2 messages, and none", got)
		}
		s.leave(ada)
		if got := s.hub.Lags([]*Client{ada.Client, bob.Client}); got[0] != -1 || got[1] != 0 {
			t.Errorf("got %v, want -1 for the client that has left", got)
		}
		s.leave(bob)
	})
}

func TestHub_HeirIsAMemberThatCounts(t *testing.T) {
	s := newManual(t)
	one, two, three := netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("192.0.2.2/32"), netip.MustParsePrefix("192.0.2.3/32")
	everybody := func(*Client) bool { return true }
	if got := s.hub.Heir(one, everybody); got != one {
		t.Errorf("an empty hub: got %v, want %v", got, one)
	}
	s.from = two.String()
	bob := s.join("bob", defaults(), false, nil)
	s.from = three.String()
	cid := s.join("cid", defaults(), false, nil)
	if got := s.hub.Heir(three, everybody); got != three {
		t.Errorf("got %v, want %v, which is there", got, three)
	}
	if got := s.hub.Heir(one, everybody); got != two {
		t.Errorf("got %v, want that of a member", got)
	}
	if got := s.hub.Heir(one, func(c *Client) bool { return c == cid.Client }); got != three {
		t.Errorf("got %v, want that of the member that counts", got)
	}
	if got := s.hub.Heir(two, func(c *Client) bool { return c == cid.Client }); got != three {
		t.Errorf("got %v, want that of the member that counts", got)
	}
	bob.Close(CloseKicked)
	if got := s.hub.Heir(two, everybody); got != three {
		t.Errorf("got %v, want that of the client that has not left", got)
	}
}

// TestHub_PublishAllocatesNothingAClient allows one object a message, for what others in this process do meanwhile, and
// because the race detector makes pools forget. One a client would be a thousand.
func TestHub_PublishAllocatesNothingAClient(t *testing.T) {
	const clients, messages = 1000, 200
	for _, size := range []int{128, 4096} {
		for _, state := range []string{"idle", "slow"} {
			for _, events := range []int{0, 2} {
				t.Run(fmt.Sprintf("size=%d/state=%s/events=%d", size, state, events), func(t *testing.T) {
					b := newSocketlessHub(clients, events, state == "slow", defaults())
					m := Message{Message: feed.Message{Opcode: ws.BinaryMessage, Payload: make([]byte, size)}}
					got := testing.AllocsPerRun(messages, func() {
						publishIn(b, m)
						serveQueue(b)
					})
					if got > 1+3*float64(events) { // an event's Base64 and time
						t.Errorf("got %v objects a message to %d clients, want at most 1", got, clients)
					}
					if got, want := b.raw.Head(), uint64(messages+1); got != want { // the first is to warm up
						t.Errorf("got %d messages published, want %d", got, want)
					}
				})
			}
		}
	}
}

// newSocketlessHub returns a hub of clients without connections, some of which speak events. Slow ones are busy and never come
// back, so publish only appends; the others are idle. The caller of publish is all of the hub's flushers: it calls serveQueue,
// and no other goroutine runs.
func newSocketlessHub(clients, events int, slow bool, s *Settings) *Hub {
	b := New(NewProcess(), "hub")
	b.turns.flushers = runtime.GOMAXPROCS(0)
	for i := range clients {
		c := newTestClient(b.process, "ada", netip.Prefix{}, s)
		if i < events {
			c.SpeakEvents(nil)
		}
		c.Attach(nowhere{})
		if err := b.Join(c, 0); err != nil {
			panic(err)
		}
		b.open(c)
		c.takePending() // hello
		if slow {
			b.endTurnLocked(c) // nobody else has the hub yet
		} else {
			b.next(c) // nothing: idle
		}
	}
	return b
}

// serveQueue gives every woken client its turn, as a flusher does whose attempts all succeed.
func serveQueue(b *Hub) {
	var served *Client
	for {
		c, _, _, _ := b.serve(served)
		if c == nil {
			break
		}
		served = c
	}
	b.turns.flushers++ // serve counts on a flusher's end
}

// BenchmarkHub_Publish publishes into hubs without connections. It measures a message before anything is written. With idle
// clients that includes waking each of them and taking its turn. With events one of the idle clients speaks events, so each
// message has two encodings.
func BenchmarkHub_Publish(b *testing.B) {
	for _, clients := range []int{10, 1000} {
		for _, size := range []int{128, 4096, 65536} {
			for _, state := range []string{"idle", "slow", "events"} {
				b.Run(fmt.Sprintf("clients=%d/size=%d/state=%s", clients, size, state), func(b *testing.B) {
					events := 0
					if state == "events" {
						events = 1
					}
					h := newSocketlessHub(clients, events, state == "slow", defaults())
					m := Message{Message: feed.Message{Opcode: ws.TextMessage, Payload: bytes.Repeat([]byte("x"), size)}}
					b.ReportAllocs()
					for b.Loop() {
						publishIn(h, m)
						serveQueue(h)
					}
				})
			}
		}
	}
}

// BenchmarkHub_PublishEvents is BenchmarkHub_Publish, with messages of 128 bytes, for hubs whose members are raw, speak events,
// or every other one of them does, without and with history.
func BenchmarkHub_PublishEvents(b *testing.B) {
	for _, clients := range []int{10, 1000} {
		for _, state := range []string{"idle", "slow"} {
			for _, history := range []int{0, 100} {
				for _, members := range []string{"raw", "both", "events"} {
					b.Run(fmt.Sprintf("clients=%d/state=%s/history=%d/members=%s", clients, state, history, members), func(b *testing.B) {
						s := defaults()
						s.HistoryMessages, s.HistoryAge = history, time.Minute
						events := map[string]int{"both": clients / 2, "events": clients}[members]
						h := newSocketlessHub(clients, events, state == "slow", s)
						defer h.Close()
						payload := []byte(strings.Repeat("x", 128))
						m := Message{Message: feed.Message{Sender: 1e15, User: "ada", Opcode: ws.TextMessage, Payload: payload}}
						b.ReportAllocs()
						for b.Loop() {
							publishIn(h, m)
							serveQueue(h)
						}
					})
				}
			}
		}
	}
}

// BenchmarkSample_Write measures counting and the sample for each write to a client.
func BenchmarkSample_Write(b *testing.B) {
	h := newSocketlessHub(1, 0, false, defaults())
	c := h.clients[0]
	var t Tally
	b.ReportAllocs()
	for b.Loop() {
		c.feed.sampled, h.sample.owed = c.cursor, 2 // in the middle of a sample
		h.writtenLocked(c)
		t.wrote(1, 130)
		if t.pending == tallySize {
			h.process.Counters.written.add(&t)
		}
	}
}

// BenchmarkSample_Message measures both for each message that a client sends, beyond its writes.
func BenchmarkSample_Message(b *testing.B) {
	h := newSocketlessHub(1000, 0, false, defaults())
	b.ReportAllocs()
	for b.Loop() {
		h.process.Counters.BytesReceived.Add(136)
		h.process.Counters.received(ws.TextMessage)
		h.process.Counters.Published[FromClient].Add(1)
		h.sampleLocked(nil, notInFeed)
	}
}

// TestProcess_IDsAreNeverTheSame asks from several goroutines at once, while the clock stands still and when it goes back.
func TestProcess_IDsAreNeverTheSame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewProcess()
		const askers, each = 4, 1000
		ids := make(chan []uint64, askers)
		for range askers {
			go func() {
				var own []uint64
				for range each {
					own = append(own, uint64(p.NextID()))
				}
				ids <- own
			}()
		}
		var all []uint64
		for range askers {
			own := <-ids
			if !slices.IsSorted(own) {
				t.Error("a later id is lower")
			}
			all = append(all, own...)
		}
		slices.Sort(all)
		if n := len(slices.Compact(all)); n != askers*each {
			t.Errorf("got %d different ids, want %d", n, askers*each)
		}
	})
}

// TestCloses_AreDifferent also checks that every close that the server begins is listed.
func TestCloses_AreDifferent(t *testing.T) {
	seen := map[ws.Close]bool{}
	for _, c := range Closes() {
		if seen[c] {
			t.Errorf("got %v twice", c)
		}
		seen[c] = true
		if c.Code != ws.CloseAbnormalClosure && !ws.LegalCloseCode(c.Code) {
			t.Errorf("got %v, which no frame may carry", c)
		}
	}
	for _, c := range []ws.Close{
		CloseShuttingDown, CloseReadOnly, CloseRateLimited, CloseKicked, CloseInternal, CloseHubRemoved, CloseMaxAge, CloseLagged,
		CloseWriteTimeout, CloseBusy, ClosePingTimeout, CloseGone, ws.ProtocolError, ws.InvalidUTF8, ws.TooBig,
	} {
		if !seen[c] {
			t.Errorf("%v is not listed", c)
		}
	}
}
