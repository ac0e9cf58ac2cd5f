package chatbroadcast

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// keptHubs has the given number of hubs, named by number, opened and kept for a message of 1500 bytes each, one after the
// other, through one hub value.
func keptHubs(t *testing.T, n int, bounds bounds, limits limits) {
	t.Helper()
	const value = "value"
	l := hubs.lease(value, testLogger(t), emitter{}, bounds, time.Duration(defaultDrain))
	t.Cleanup(func() { hubs.release(l) })
	settings := historyOfTen()
	settings.bufferBytes = 4 << 10
	for i := range n {
		time.Sleep(time.Millisecond) // of the bubble's time: each is younger than the one before
		m := message{opcode: websocket.TextMessage, payload: []byte(strings.Repeat("x", 1500))}
		r, found, err := hubs.publishOpening(strconv.Itoa(i), m, testPrefix(1), value, settings, limits)
		if err != nil || !found || r.seq != 1 {
			t.Fatalf("hub %d: got %+v, %v, %v", i, r, found, err)
		}
	}
}

func TestHistory_AllOfThemTogetherAreBounded(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		const n = 50 // with as little memory as the buffers allow: four of them
		keptHubs(t, n, bounds{history: 1}, limits{})
		if used, most := hubs.memory.histories.used.Load(), int64(4*4<<10); used > most || used < most/2 {
			t.Errorf("got %d bytes kept, want at most %d, and about that", used, most)
		}
		if hubs.hub("0") != nil || hubs.hub(strconv.Itoa(n-1)) == nil {
			t.Error("want the oldest forgotten, and not the newest")
		}
	})
}

// TestHistory_WarnsThatSomeAreForgotten also is about the bound through Caddy: of 6 MB, with a buffer of 1 MiB, 4 MiB may stay.
func TestHistory_WarnsThatSomeAreForgotten(t *testing.T) {
	s := startCaddy(t, "http://localhost:9080 {\nchat_broadcast /chat/* {\nhistory 10\nhttp_publish\n}\n}")
	hubs.shedWarning = occasionalWarning{}
	most, raised := hubs.memory.histories.most.Swap(0), hubs.memory.histories.raised.Swap(0)
	defer func() {
		hubs.memory.histories.most.Store(most)
		hubs.memory.histories.raise(int(raised / 4))
	}()
	for i := range 100 {
		publish(t, "/chat/"+strconv.Itoa(i), strings.Repeat("x", 60_000))
	}
	if got := joinEvents(t, "/chat/0").hello.Replay; got != 0 {
		t.Errorf("got %d messages of the oldest hub, want them forgotten", got)
	}
	if got := joinEvents(t, "/chat/99").hello.Replay; got != 1 {
		t.Errorf("got %d messages of the newest hub, want 1", got)
	}
	log, err := os.ReadFile(s.logFile)
	if err != nil {
		t.Fatal(err)
	}
	if got := bytes.Count(log, []byte("histories forgotten")); got != 1 {
		t.Errorf("got %d warnings in the log, want 1 a minute", got)
	}
}

func TestHistory_KeptHubsMakeRoomUnderMaxHubs(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		keptHubs(t, 5, bounds{}, limits{maxHubs: 3})
		for i := range 5 {
			if got, want := hubs.hub(strconv.Itoa(i)) != nil, i >= 2; got != want {
				t.Errorf("hub %d: got it kept: %v, want %v", i, got, want)
			}
		}
	})
}

func TestHistory_KeptHubOutlivesItsLastMessageByItsAge(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		keptHubs(t, 1, bounds{}, limits{})
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
		keptHubs(t, 5, bounds{}, limits{})
		time.Sleep(time.Minute)
		synctest.Wait()
		if n, used := len(hubs.allHubs()), hubs.memory.histories.used.Load(); n != 0 || used != 0 {
			t.Errorf("got %d hubs and %d bytes left, want none", n, used)
		}
	})
}

func TestHistory_IsAllThatIsKeptOfEventsThatNobodyReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		settings := historyOfTen()
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

// TestHub_EncodesNoEventsWhenTheirLastReaderHasGone has another client that is always behind, in a hub without history.
func TestHub_EncodesNoEventsWhenTheirLastReaderHasGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.join("ada", defaults(), false, nil).stuck = true
		bob := s.join("bob", defaults(), true, nil)
		s.publish(nil, "for both")
		s.leave(bob)
		s.publish(nil, "for ada")
		if s.hub.events != nil {
			t.Error("the message was encoded for nobody")
		}
	})
}

// TestHistory_IsNotEncodedForEachWhoComesAlone has somebody come and go again and again, who would keep the server busy
// if that took the whole history each time.
func TestHistory_IsNotEncodedForEachWhoComesAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		settings := historyOfTen()
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
		l := hubs.lease("value", testLogger(t), emitter{}, bounds{}, time.Duration(defaultDrain))
		settings := historyOfTen()
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

// TestHistory_HubOfWhoIsLeavingCountsOnce has room for one more hub than the one that is kept while its last client's
// connection is being closed, and then for none.
func TestHistory_HubOfWhoIsLeavingCountsOnce(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		l := hubs.lease("value", testLogger(t), emitter{}, bounds{}, time.Duration(defaultDrain))
		settings := historyOfTen()
		addresses := 0
		join := func(name string) *client {
			t.Helper()
			addresses++
			c := &client{settings: settings, scope: l.scope, prefix: testPrefix(addresses)}
			if err := hubs.join(c, name, limits{maxHubs: 2}); err != nil {
				t.Fatal(err)
			}
			return c
		}
		leaving := join("leaving")
		hubs.leave(leaving)
		join("kept").abandon()
		if hubs.hub("leaving") == nil || hubs.hub("kept") == nil {
			t.Error("a history is gone, for nothing")
		}
		other := join("other")
		if hubs.hub("leaving") == nil || hubs.hub("kept") != nil {
			t.Error("want room made by the hub whose end makes some")
		}
		other.abandon()
		leaving.abandon()
		hubs.release(l)
	})
}

func TestHistory_LowerMaxHubsHoldsForKeptHubs(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		keptHubs(t, 5, bounds{}, limits{})
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
		settings := historyOfTen()
		s.join("ada", settings, false, nil)
		send := func(id string) receipt {
			r, _ := s.hub.publish(message{opcode: websocket.TextMessage, key: sendKey{"ada", "epoch-token", id}})
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
		again := message{opcode: websocket.TextMessage, key: sendKey{"ada", "epoch-token", "first"}, again: true}
		if r, _ := s.hub.publish(again); !r.unknown {
			t.Errorf("after %d others: got %+v, want it unknown", maxReceipts, r)
		}
		if r := send("first"); r.repeated || r.unknown {
			t.Errorf("after %d others: got %+v, want it published", maxReceipts, r)
		}
		s.hub.close()
	})
}

func TestHistory_RecordsAreBoundedWhileAClientIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		settings := defaults()
		settings.bufferMessages, settings.historyMessages, settings.historyAge, settings.skip = 10, 10, time.Minute, true
		s.join("ada", settings, false, nil).stuck = true
		for range 1000 {
			s.publish(nil, "x")
		}
		if got := len(s.hub.records); got > 20 {
			t.Errorf("got records of %d messages, want those of the 20 that are there", got)
		}
		s.hub.close()
	})
}

// historyOfTen keeps ten messages for a minute.
func historyOfTen() *settings {
	s := defaults()
	s.historyMessages, s.historyAge = 10, time.Minute
	return s
}

// TestHistory_BudgetCountsBothLogs wants the encoding for clients that speak events counted, too.
func TestHistory_BudgetCountsBothLogs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.hub.memory = newMemory()
		settings := historyOfTen()
		s.join("ada", settings, true, nil)
		s.publish(nil, "x")
		used := s.hub.memory.histories.used.Load()
		if least := int64(s.hub.log.bytes + s.hub.events.bytes); s.hub.events.bytes == 0 || used < least {
			t.Errorf("got %d bytes counted, want at least %d", used, least)
		}
		s.hub.close()
		if used := s.hub.memory.histories.used.Load(); used != 0 {
			t.Errorf("got %d bytes of a closed hub counted", used)
		}
	})
}

// TestHistory_BudgetCountsEventsOfWhoIsStuck has the history encoded for somebody who takes nothing of it.
func TestHistory_BudgetCountsEventsOfWhoIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.hub.memory = newMemory()
		settings := historyOfTen()
		s.join("ada", settings, false, nil)
		s.publish(nil, strings.Repeat("x", 1000))
		s.join("bob", settings, true, nil).stuck = true
		if used, least := s.hub.memory.histories.used.Load(), int64(s.hub.log.bytes+s.hub.events.bytes); used < least {
			t.Errorf("got %d bytes counted, want at least %d", used, least)
		}
		s.hub.close()
	})
}

// TestHistory_IsKeptByTheDirectiveThatHasOne has the last client come through another one, with the same hub.
func TestHistory_IsKeptByTheDirectiveThatHasOne(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		with, without := hubs.lease("with", testLogger(t), emitter{}, bounds{}, 0), hubs.lease("without", testLogger(t), emitter{}, bounds{}, 0)
		settings := historyOfTen()
		first := &client{settings: settings, scope: with.scope}
		last := &client{settings: defaults(), scope: without.scope}
		for _, c := range []*client{first, last} {
			if err := hubs.join(c, "hub", limits{}); err != nil {
				t.Fatal(err)
			}
		}
		first.abandon()
		last.abandon()
		hubs.release(without)
		if hubs.hub("hub") == nil {
			t.Error("the hub is gone with the other directive")
		}
		hubs.release(with)
		if hubs.hub("hub") != nil {
			t.Error("the hub outlives its directives")
		}
	})
}

func TestHistory_IsNotKeptWithoutADirective(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		l := hubs.lease("value", testLogger(t), emitter{}, bounds{}, 0)
		settings := historyOfTen()
		c := &client{settings: settings, scope: l.scope}
		if err := hubs.join(c, "hub", limits{}); err != nil {
			t.Fatal(err)
		}
		hubs.release(l)
		c.abandon()
		if n := len(hubs.allHubs()) + len(hubs.scopes); n != 0 {
			t.Errorf("got %d hubs and scopes left", n)
		}
		time.Sleep(removalSpread) // who closes clients of the value looks once more
	})
}

// TestEventLog_KnowsNumbersAndPositions has more frames between messages than are remembered, and forgets some at times.
func TestEventLog_KnowsNumbersAndPositions(t *testing.T) {
	l := &eventLog{base: 7}
	l.grow(50, 1<<20)
	seq, numbers := uint64(7), []uint64{}
	for i := range 5 * maxPassed {
		numbers = append(numbers, seq) // of the message here, or of the next
		if i%3 == 0 {
			l.appendMessage(&message{}, seq+1, time.Time{})
			seq++
		} else {
			l.appendBetween("between")
		}
		if i%1000 == 999 {
			l.retain(l.head - 10)
			l.forgetBetween()
		}
		if l.head-l.tail > 3*50+3 {
			t.Fatalf("got %d frames kept, want 50 messages and what stands between them", l.head-l.tail)
		}
		for at := l.head - min(l.head, maxPassed); at < l.head; at += 7 {
			if got := l.seq(at); got != numbers[at] {
				t.Fatalf("at %d of %d: got number %d, want %d", at, l.head, got, numbers[at])
			}
			if at >= l.tail && at%3 == 0 && l.position(numbers[at]) != at {
				t.Fatalf("message %d: got position %d, want %d", numbers[at], l.position(numbers[at]), at)
			}
		}
	}
}

// TestHistory_FramesCountForTheBytes fills half of the buffer with messages that, without their frames, would just fit.
func TestHistory_FramesCountForTheBytes(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast {
		history 100
		http_publish
	}
}`)
	const messages = 8 // of 64 KiB: 512 KiB
	for i := range messages {
		publish(t, "/", strconv.Itoa(i)+strings.Repeat("x", defaultMaxMessageSize-1)).wantPublished(t, 0, i+1)
	}
	p := join(t, "/")
	for i := 1; i < messages; i++ {
		if got := p.next().payload; got[0] != '0'+byte(i) {
			t.Fatalf("got message %c, want %d", got[0], i)
		}
	}
	publish(t, "/", "live").wantPublished(t, 1, messages+1)
	p.wantText("live")
}
