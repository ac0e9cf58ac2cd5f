package chatbroadcast

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// presenceOf returns settings with presence.
func presenceOf(joinLeave bool) *settings {
	s := defaults()
	s.presence, s.joinLeave = true, joinLeave
	return s
}

// TestPresence_ToldWhileTheOnlyListenerIsBroken has something to tell when the only client that speaks events can be
// written to no more, and is still read.
func TestPresence_ToldWhileTheOnlyListenerIsBroken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		ada := s.join("ada", presenceOf(true), true, nil)
		s.serve()
		time.Sleep(time.Minute)
		s.serve()
		s.hub.drop(ada.client)
		bob := s.join("bob", defaults(), false, nil)
		time.Sleep(time.Minute)
		s.serve()
		s.publish(bob, "hello")
		if got := bob.frames(); len(got) != 1 || got[0] != "hello" {
			t.Errorf("got %q, want the message", got)
		}
		s.leave(ada)
		s.leave(bob)
	})
}

// TestPresence_ToldAfterAListenerLeftBeforeItWas has a listener go while something is still to be told, and only somebody
// stay who may ask but is not told.
func TestPresence_ToldAfterAListenerLeftBeforeItWas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.join("ada", presenceOf(false), true, nil)
		bob := s.join("bob", presenceOf(true), true, nil)
		s.leave(bob)
		time.Sleep(time.Minute)
		cid := s.join("cid", presenceOf(true), true, nil)
		time.Sleep(time.Minute)
		s.serve()
		if e := cid.events(); len(e) != 2 || e[1].Type != "join" || *e[1].User != "cid" {
			t.Errorf("got %+v, want hello and the join of cid", e)
		}
	})
}

// TestPresence_NotToldBesideABrokenListener has a listener that reads no more, and somebody who is to be told nothing.
func TestPresence_NotToldBesideABrokenListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		ada := s.join("ada", presenceOf(true), true, nil)
		bob := s.join("bob", presenceOf(false), true, nil)
		s.serve()
		time.Sleep(time.Minute)
		s.serve()
		s.hub.drop(ada.client)
		s.join("cid", defaults(), false, nil)
		time.Sleep(time.Minute)
		s.serve()
		if e := bob.events(); len(e) != 1 {
			t.Errorf("got %+v, want hello alone", e)
		}
		s.leave(ada)
	})
}

// TestPresence_NotToldOfAUserWhoCameAndLeftBetween has a visitor whose coming the server has not told of yet, because it tells
// of changes once a second.
func TestPresence_NotToldOfAUserWhoCameAndLeftBetween(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		ada := s.join("ada", presenceOf(true), true, nil)
		s.serve()
		ada.events() // hello and her own join
		visitor := s.join("visitor", presenceOf(false), false, nil)
		s.serve()
		s.leave(visitor)
		time.Sleep(time.Minute)
		s.serve()
		for _, e := range ada.events() {
			if strings.Contains(e.raw, "visitor") {
				t.Errorf("got %s, want nothing of the visitor", e.raw)
			}
		}
	})
}

// TestPresence_OfAQuietHubTakesNoMemory is about a hub with history whose messages are all too old.
func TestPresence_OfAQuietHubTakesNoMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		settings := presenceOf(true)
		settings.historyMessages, settings.historyAge = 10, time.Minute
		ada := s.join("ada", settings, true, nil)
		s.publish(ada, "x")
		time.Sleep(time.Hour)
		for i := range 100 {
			bob := s.join(fmt.Sprint("bob", i), settings, false, nil)
			time.Sleep(2 * time.Second)
			s.serve()
			s.leave(bob)
		}
		if n := s.hub.events.bytes; n > 0 {
			t.Errorf("got %d bytes of frames kept that everybody has", n)
		}
	})
}

func TestPresence_DisplacesNoMessageOfTheHistory(t *testing.T) {
	for _, bufferBytes := range []int{defaultBufferSize, 6000} {
		t.Run(fmt.Sprint(bufferBytes), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(t)
				settings := presenceOf(true)
				settings.bufferMessages, settings.historyMessages, settings.historyAge = 10, 10, time.Hour
				settings.bufferBytes = bufferBytes
				ada := s.join("ada", settings, true, nil)
				var want []string
				come := func(i int) {
					bob := s.join(fmt.Sprint("bob", i), settings, false, nil)
					time.Sleep(2 * time.Second)
					s.serve()
					s.leave(bob)
				}
				for i := range 10 {
					s.publish(ada, fmt.Sprint(i))
					want = append(want, fmt.Sprint(i))
					come(i)
				}
				for i := range 100 {
					come(i)
				}
				cid := s.join("cid", settings, true, nil)
				s.serve()
				var got []string
				for _, e := range cid.events() {
					if e.Type == "message" {
						got = append(got, *e.Data)
						if e.Seq != len(got) {
							t.Errorf("got %s, want number %d", e.raw, len(got))
						}
					}
				}
				if !slices.Equal(got, want) {
					t.Errorf("got %q, want %q", got, want)
				}
			})
		})
	}
}

// TestPresence_DisplacesNoMessageOfTheHistoryByItsSize has many come and go, with the longest names.
func TestPresence_DisplacesNoMessageOfTheHistoryByItsSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		settings := presenceOf(true)
		settings.historyMessages, settings.historyAge = 10, time.Hour
		ada := s.join("ada", settings, true, nil)
		for i := range 100 {
			if i%10 == 0 {
				s.publish(ada, fmt.Sprint(i/10))
			}
			var others []*actor
			for j := range 12 {
				others = append(others, s.join(fmt.Sprint(i, j, strings.Repeat("x", 1000)), settings, false, nil))
			}
			time.Sleep(4 * time.Second)
			s.serve()
			for _, other := range others {
				s.leave(other)
			}
		}
		ada.events()
		s.publish(ada, "10")
		if got := ada.events(); got[len(got)-1].Seq != 11 {
			t.Errorf("got %+v, want message 11", got)
		}
		bob := s.join("bob", settings, true, nil)
		s.serve()
		got := bob.events()
		if got[0].Replay != 10 {
			t.Fatalf("got %s, want 10 messages", got[0].raw)
		}
		for i, e := range got[1:11] {
			if e.Seq != 2+i || e.text() != fmt.Sprint(1+i) {
				t.Errorf("got %s, want message %d", e.raw, 2+i)
			}
		}
	})
}

func TestPresence_IsNotCountedAsMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		settings := presenceOf(true)
		settings.bufferMessages, settings.skip = 10, true
		ada := s.join("ada", settings, true, nil)
		bob := s.join("bob", settings, true, nil)
		s.serve()
		time.Sleep(2 * time.Second)
		s.serve()
		ada.stuck = true
		s.publish(bob, "in the middle of a write")
		for i := range 10 {
			cid := s.join(fmt.Sprint("cid", i), settings, false, nil)
			time.Sleep(2 * time.Second)
			s.serve()
			s.leave(cid)
			s.publish(bob, fmt.Sprint(i))
		}
		for i := range 10 {
			s.publish(bob, fmt.Sprint(i))
		}
		ada.take()
		got := ada.events()
		i := slices.IndexFunc(got, func(e incoming) bool { return e.Type == "lagged" })
		if i < 0 || got[i].Missed == 0 || got[i].Next != 2+got[i].Missed || got[i+1].Seq != got[i].Next {
			t.Errorf("got %+v, want to be told the number of messages between", got)
		}
	})
}

// TestPresence_CountIsToldToWhoKnowsAnother has one client of a user come and another one go at once: the number of clients
// is what it was before, but not what the one that has come was told.
func TestPresence_CountIsToldToWhoKnowsAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, test := range []struct {
			name   string
			change func(s *stage, ada *actor) (told *actor)
		}{
			{"by hello", func(s *stage, ada *actor) *actor {
				again := s.join("ada", presenceOf(true), true, nil)
				s.leave(ada)
				return again
			}},
			{"by an answer to who", func(s *stage, ada *actor) *actor {
				s.join("dan", defaults(), false, nil)
				s.serve() // all are told, and of what follows not before a second has passed
				raw := s.join("ada", defaults(), false, nil)
				s.hub.who(ada.client, nil, maxPage)
				s.publish(nil, "has the answer sent, too")
				s.leave(raw)
				return ada
			}},
			{"before a client left that was broken when the roster began", func(s *stage, ada *actor) *actor {
				raw := s.join("bob", defaults(), false, nil)
				s.hub.drop(raw.client)
				s.leave(ada)
				again := s.join("ada", presenceOf(true), true, nil)
				time.Sleep(time.Minute)
				s.leave(raw)
				return again
			}},
		} {
			s := newStage(t)
			s.join("cid", defaults(), false, nil)
			ada := s.join("ada", presenceOf(true), true, nil)
			time.Sleep(time.Minute)
			s.serve()
			told := test.change(s, ada)
			time.Sleep(time.Minute)
			s.serve()
			got := told.events()
			if last := got[len(got)-1]; last.Clients != s.hub.members {
				t.Errorf("%s: got %s last, want %d clients", test.name, last.raw, s.hub.members)
			}
		}
	})
}
