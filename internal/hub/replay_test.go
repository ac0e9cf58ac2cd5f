package hub

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestReplay_ComesInBundles has a history with large messages, small ones, and changes of presence between them.
func TestReplay_ComesInBundles(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		s := historyOfTen()
		s.HistoryMessages, s.Presence, s.JoinLeave = 1000, true, true
		s.BufferMessages, s.BufferBytes = 1000, 4<<20
		const messages = 300
		_, stays := joiner{user: "ada", events: true}.join(t, b, s)
		go stays.drain()
		for seq := range messages {
			switch seq % 50 {
			case 10:
				publishIn(b, textMessage(strings.Repeat("x", maxBundle)))
			case 20:
				_, comes := joiner{user: fmt.Sprint("user ", seq)}.join(t, b, s)
				time.Sleep(2 * presenceInterval)
				comes.conn.Close()
				fallthrough
			default:
				publishIn(b, textMessage(fmt.Sprint(seq+1)))
			}
			synctest.Wait()
		}
		_, single := joiner{events: true}.join(t, b, s)
		_, bundled := joiner{events: true, bundles: true}.join(t, b, s)
		if got := bundled.wantEvent("hello"); got.Replay != messages {
			t.Errorf("got %s, want a replay of %d", got.raw, messages)
		}
		single.wantEvent("hello")
		var want, got []string
		for range messages {
			want = append(want, single.wantEvent("message").raw)
		}
		frames := 0
		for len(got) < messages {
			e := bundled.event()
			if frames++; e.Type == "replay" && len(e.raw) > maxBundle+100 {
				t.Errorf("got a bundle of %d bytes, want at most about %d", len(e.raw), maxBundle)
			}
			for _, m := range e.apart(t) {
				got = append(got, m.raw)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("got other messages in bundles than without: %.300q", got)
		}
		if most := 2*messages/50 + 10; frames > most {
			t.Errorf("got %d messages in %d frames, want at most %d", messages, frames, most)
		}

		publishIn(b, textMessage("live"))
		publishIn(b, textMessage("live, too"))
		for _, want := range []string{"live", "live, too"} {
			for _, p := range []*peer{single, bundled} {
				e := p.event()
				for e.Type != "message" {
					e = p.event()
				}
				if e.text() != want {
					t.Errorf("got %s, want %s", e.raw, want)
				}
			}
		}
		for _, p := range []*peer{stays, single, bundled} {
			p.conn.Close()
		}
		synctest.Wait()
		b.Close()
	})
}

// TestReplay_EndsWhereTheClientJoined has clients whose connections are stuck while they take a replay. Meanwhile newer
// messages come, and push more and more of it out.
func TestReplay_EndsWhereTheClientJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManual(t)
		m.bundles = true
		s := historyOfTen()
		s.BufferMessages, s.SkipLag = 10, true
		m.hub.Grow(s)
		for seq := range 20 {
			m.publish(nil, fmt.Sprint(seq+1))
		}
		for _, later := range []int{1, 10, 15, 40} {
			a := m.join("ada", s, true, nil)
			a.stuck = true
			head := int(m.sent)
			for range later {
				m.publish(nil, fmt.Sprint(m.sent+1))
			}
			a.take()
			next := head - 9
			for _, raw := range a.frames()[1:] {
				for _, e := range parseEvent(t, raw).apart(t) {
					switch {
					case e.Type == "lagged" && e.Next-e.Missed == next:
						next = e.Next
					case e.Type != "message" || e.Seq != next || e.text() != fmt.Sprint(next) || e.raw != raw && e.Seq > head:
						t.Errorf("%d later: got %s in %.80s, want message %d", later, e.raw, raw, next)
					default:
						next++
					}
				}
			}
			if next != int(m.sent)+1 {
				t.Errorf("%d later: got everything before message %d, of %d", later, next, m.sent)
			}
			m.leave(a)
		}
		m.hub.Close()
	})
}
