package hub

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

func TestHistory_UnreadFeedKeepsTheHistoryOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := historyOfTen()
		ada := s.join("ada", settings, false, nil)
		bob := s.join("bob", settings, true, nil)
		s.publish(ada, "for bob")
		s.leave(bob)
		for i := range 1000 {
			s.publish(ada, fmt.Sprint(i))
		}
		if n := eventsFeed(s.hub).Head() - eventsFeed(s.hub).Tail(); n != 10 {
			t.Errorf("got %d events kept, want the history", n)
		}
	})
}

// TestHistory_NoEventsAreEncodedWithoutReaders has another client that is always behind, in a hub without history.
func TestHistory_NoEventsAreEncodedWithoutReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		s.join("ada", defaults(), false, nil).stuck = true
		bob := s.join("bob", defaults(), true, nil)
		s.publish(nil, "for both")
		s.leave(bob)
		s.publish(nil, "for ada")
		if eventsFeed(s.hub) != nil {
			t.Error("the message was encoded for nobody")
		}
	})
}

// TestHistory_IsEncodedOnceForClientsThatComeAndGo has a client come and go again and again. It would keep the server busy if
// the server encoded the whole history each time.
func TestHistory_IsEncodedOnceForClientsThatComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := historyOfTen()
		comeAndGo := func() *hubFeed {
			t.Helper()
			ada := s.join("ada", settings, true, nil)
			s.serve()
			if got := ada.events(); len(got) != 1+int(s.sent) {
				t.Errorf("got %d frames, want hello and %d messages", len(got), s.sent)
			}
			s.leave(ada)
			return eventsFeed(s.hub)
		}
		bob := s.join("bob", settings, false, nil)
		s.publish(bob, "one")
		s.publish(bob, "two")
		s.leave(bob)
		first := comeAndGo()
		if first == nil || comeAndGo() != first {
			t.Error("the history was encoded again")
		}
		time.Sleep(50 * time.Second)
		bob = s.join("bob", settings, false, nil)
		s.publish(bob, "three")
		if comeAndGo() != first {
			t.Error("the history was encoded again")
		}
		for range 15 {
			time.Sleep(10 * time.Second)
			s.publish(bob, "more")
		}
		if eventsFeed(s.hub) != nil {
			t.Error("the events are there, which nobody has read for longer than the history's age")
		}
		s.leave(bob)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
	})
}

func TestHistory_RemembersIDsForItsAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := historyOfTen()
		s.join("ada", settings, false, nil)
		send := func(id string) Receipt {
			r, _ := publishIn(s.hub, Message{Message: feed.Message{Opcode: ws.TextMessage}, Key: Key{"ada", "epoch-token", id}})
			s.serve()
			return r
		}
		first := send("first")
		time.Sleep(59 * time.Second)
		if r := send("first"); !r.Repeated || r.Seq != first.Seq || !r.At.Equal(first.At) {
			t.Errorf("got %+v, want %+v repeated", r, first)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if r := send("first"); r.Repeated {
			t.Errorf("after its age: got %+v, want it published", r)
		}
		for i := range maxReceipts - 1 {
			send(fmt.Sprint(i))
		}
		if r := send("first"); !r.Repeated {
			t.Errorf("before %d others: got %+v, want it repeated", maxReceipts, r)
		}
		send("one more")
		again := Message{Message: feed.Message{Opcode: ws.TextMessage}, Key: Key{"ada", "epoch-token", "first"}, Again: true}
		if r, _ := publishIn(s.hub, again); !r.Unknown {
			t.Errorf("after %d others: got %+v, want it unknown", maxReceipts, r)
		}
		if r := send("first"); r.Repeated || r.Unknown {
			t.Errorf("after %d others: got %+v, want it published", maxReceipts, r)
		}
		s.hub.Close()
	})
}

func TestHistory_RecordsAreBoundedWhileAClientIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := defaults()
		settings.BufferMessages, settings.HistoryMessages, settings.HistoryAge, settings.SkipLag = 10, 10, time.Minute, true
		s.join("ada", settings, false, nil).stuck = true
		for range 1000 {
			s.publish(nil, "x")
		}
		if got := len(s.hub.history.records); got > 20 {
			t.Errorf("got records of %d messages, want those of the 20 that are there", got)
		}
		s.hub.Close()
	})
}

// TestHistory_BudgetCountsEveryFeed wants the encoding for clients that speak events counted, too.
func TestHistory_BudgetCountsEveryFeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := historyOfTen()
		s.join("ada", settings, true, nil)
		s.publish(nil, "x")
		used := s.hub.process.Memory.Histories.Used()
		if least := int64(s.hub.raw.Bytes() + eventsFeed(s.hub).Bytes()); eventsFeed(s.hub).Bytes() == 0 || used < least {
			t.Errorf("got %d bytes counted, want at least %d", used, least)
		}
		s.hub.Close()
		if used := s.hub.process.Memory.Histories.Used(); used != 0 {
			t.Errorf("got %d bytes of a closed hub counted", used)
		}
	})
}

// TestHistory_BudgetCountsEventsOfStuckClients has the history encoded for a client that takes nothing of it.
func TestHistory_BudgetCountsEventsOfStuckClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := historyOfTen()
		s.join("ada", settings, false, nil)
		s.publish(nil, strings.Repeat("x", 1000))
		s.join("bob", settings, true, nil).stuck = true
		if used, least := s.hub.process.Memory.Histories.Used(), int64(s.hub.raw.Bytes()+eventsFeed(s.hub).Bytes()); used < least {
			t.Errorf("got %d bytes counted, want at least %d", used, least)
		}
		s.hub.Close()
	})
}
