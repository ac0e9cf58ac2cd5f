package chatbroadcast

import (
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
