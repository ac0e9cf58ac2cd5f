package chatbroadcast

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// keptHubs has the given number of hubs, named by number, opened and kept for a message of 1500 bytes each, one after the
// other, through one hub value.
func keptHubs(t *testing.T, n int, limits limits) {
	t.Helper()
	const value = "value"
	l := hubs.lease(value, testLogger(t), emitter{}, time.Duration(defaultDrain))
	t.Cleanup(func() { hubs.release(l) })
	settings := defaults()
	settings.historyMessages, settings.historyAge = 10, time.Minute
	settings.bufferBytes = 4 << 10
	for i := range n {
		time.Sleep(time.Millisecond) // of the bubble's time: each is younger than the one before
		m := message{opcode: websocket.TextMessage, payload: []byte(strings.Repeat("x", 1500))}
		r, found, err := hubs.publishOpening(strconv.Itoa(i), m, value, settings, limits)
		if err != nil || !found || r.seq != 1 {
			t.Fatalf("hub %d: got %+v, %v, %v", i, r, found, err)
		}
	}
}

func TestHistory_AllOfThemTogetherAreBounded(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		hubs.budget.most.Store(0) // as little as the buffers allow: four of them
		const n = 50
		keptHubs(t, n, limits{})
		if used, most := hubs.budget.used.Load(), int64(4*4<<10); used > most || used < most/2 {
			t.Errorf("got %d bytes kept, want at most %d, and about that", used, most)
		}
		if hubs.hub("0") != nil || hubs.hub(strconv.Itoa(n-1)) == nil {
			t.Error("want the oldest forgotten, and not the newest")
		}
	})
}

func TestHistory_KeptHubsMakeRoomUnderMaxHubs(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		keptHubs(t, 5, limits{maxHubs: 3})
		for i := range 5 {
			if got, want := hubs.hub(strconv.Itoa(i)) != nil, i >= 2; got != want {
				t.Errorf("hub %d: got it kept: %v, want %v", i, got, want)
			}
		}
	})
}

func TestHistory_KeptHubOutlivesItsLastMessageByItsAge(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		keptHubs(t, 1, limits{})
		time.Sleep(59 * time.Second)
		if _, found := hubs.publish("0", message{opcode: websocket.TextMessage, payload: []byte("late")}); !found {
			t.Fatal("the hub is gone before its time")
		}
		time.Sleep(59 * time.Second)
		if hubs.hub("0") == nil {
			t.Error("the hub is gone, and with it a message that is not old")
		}
		time.Sleep(2 * time.Second)
		if hubs.hub("0") != nil {
			t.Error("the hub is there, with a message that is too old")
		}
	})
}

func TestHistory_KeptHubsCloseAfterTheirAge(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		keptHubs(t, 5, limits{})
		time.Sleep(time.Minute)
		synctest.Wait()
		if n, used := len(hubs.allHubs()), hubs.budget.used.Load(); n != 0 || used != 0 {
			t.Errorf("got %d hubs and %d bytes left, want none", n, used)
		}
	})
}

func TestHistory_IsAllThatIsKeptOfEventsThatNobodyReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		settings := defaults()
		settings.historyMessages, settings.historyAge = 10, time.Minute
		ada := s.join("ada", settings, false, nil)
		bob := s.join("bob", settings, true, nil)
		s.publish(ada, "for bob")
		s.leave(bob)
		for i := range 1000 {
			s.publish(ada, fmt.Sprint(i))
		}
		if n := s.hub.events.head - s.hub.events.tail; n != 10 {
			t.Errorf("got %d events kept, want the history", n)
		}
	})
}

// TestHistory_IsNotEncodedForEachWhoComesAlone has somebody come and go again and again, who would keep the server busy
// if that took the whole history each time.
func TestHistory_IsNotEncodedForEachWhoComesAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		settings := defaults()
		settings.historyMessages, settings.historyAge = 10, time.Minute
		comeAndGo := func() *eventLog {
			t.Helper()
			ada := s.join("ada", settings, true, nil)
			s.serve()
			if got := ada.events(); len(got) != 1+int(s.sent) {
				t.Errorf("got %d frames, want hello and %d messages", len(got), s.sent)
			}
			s.leave(ada)
			return s.hub.events
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
		if s.hub.events != nil {
			t.Error("the events are there, which nobody has read for longer than the history's age")
		}
		s.leave(bob)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
	})
}

// TestHistory_HubsOfWhoIsLeavingMakeNoRoom has a client that has left its hub, and whose connection is not closed yet.
func TestHistory_HubsOfWhoIsLeavingMakeNoRoom(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		l := hubs.lease("value", testLogger(t), emitter{}, time.Duration(defaultDrain))
		settings := defaults()
		settings.historyMessages, settings.historyAge = 10, time.Minute
		one := limits{maxHubs: 1}
		leaving, next := &client{settings: settings, scope: l.scope}, &client{settings: settings, scope: l.scope}
		if err := hubs.join(leaving, "a", one); err != nil {
			t.Fatal(err)
		}
		hubs.leave(leaving)
		if err := hubs.join(next, "b", one); !errors.Is(err, errMaxHubs) {
			t.Errorf("got %v, want %v", err, errMaxHubs)
		}
		if hubs.hub("a") == nil {
			t.Error("the history of the other hub is gone, for nothing")
		}
		leaving.abandon()
		if err := hubs.join(next, "b", one); err != nil {
			t.Errorf("got %v when it has left", err)
		}
		next.abandon()
		hubs.release(l)
	})
}

func TestHistory_LowerMaxHubsHoldsForKeptHubs(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		keptHubs(t, 5, limits{})
		c := &client{settings: defaults(), scope: hubs.scopes["value"]}
		if err := hubs.join(c, "another", limits{maxHubs: 2}); err != nil {
			t.Fatal(err)
		}
		if got := len(hubs.allHubs()); got != 2 {
			t.Errorf("got %d hubs, want 2", got)
		}
		c.abandon()
	})
}

func TestHistory_RemembersWhatWasSentForItsAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		settings := defaults()
		settings.historyMessages, settings.historyAge = 10, time.Minute
		s.join("ada", settings, false, nil)
		send := func(id string) receipt {
			r, _ := s.hub.publish(message{opcode: websocket.TextMessage, key: sendKey{"ada", "token", id}})
			s.serve()
			return r
		}
		first := send("first")
		time.Sleep(59 * time.Second)
		if r := send("first"); !r.repeated || r.seq != first.seq || !r.at.Equal(first.at) {
			t.Errorf("got %+v, want %+v repeated", r, first)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if r := send("first"); r.repeated {
			t.Errorf("after its age: got %+v, want it published", r)
		}
		for i := range maxReceipts - 1 {
			send(fmt.Sprint(i))
		}
		if r := send("first"); !r.repeated {
			t.Errorf("before %d others: got %+v, want it repeated", maxReceipts, r)
		}
		send("one more")
		if r := send("first"); r.repeated {
			t.Errorf("after %d others: got %+v, want it published", maxReceipts, r)
		}
		s.hub.close()
	})
}
