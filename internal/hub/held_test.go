package hub

import (
	"testing"
	"testing/synctest"
)

// TestHeld_IsReleasedWhateverBecomesOfTheClient holds clients for which a history or hello waits.
func TestHeld_IsReleasedWhateverBecomesOfTheClient(t *testing.T) {
	for _, row := range []struct {
		name   string
		events bool
		then   func(b *Hub, c *Client) // before it starts
	}{
		{"a raw client", false, func(*Hub, *Client) {}},
		{"a client of the events protocol", true, func(*Hub, *Client) {}},
		{"one that is closed while it joins", true, func(_ *Hub, c *Client) { c.Close(CloseKicked) }},
		{"one that is cut while it joins", true, func(_ *Hub, c *Client) { c.Cut(CloseKicked) }},
		{"one that lags while it joins", false, func(b *Hub, c *Client) {
			c.settings.SkipLag = false
			for range testBufferMessages + 50 {
				publishIn(b, textMessage("x"))
			}
		}},
		{"one whose messages are gone when it starts", false, func(b *Hub, _ *Client) { b.skipTo(b.raw.Head() + 5) }},
	} {
		t.Run(row.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				s := historyOfTen()
				s.SkipLag = true
				b.Grow(s)
				publishIn(b, textMessage("before"))
				c := joiner{address: testAddress(1), events: row.events}.member(t, b, s)
				if !c.HasFrames() {
					t.Fatal("nothing waits for it")
				}
				released := 0
				c.Held(func() { released++ })
				row.then(b, c)
				m, server := newMemoryConn(triesWrites|waits, 1<<20)
				c.Attach(server)
				c.Start()
				synctest.Wait()
				if released != 1 {
					t.Errorf("released %d times, want once", released)
				}
				publishIn(b, textMessage("after"))
				synctest.Wait()
				if released != 1 {
					t.Errorf("released %d times with the next message, want once", released)
				}
				c.Close(CloseKicked)
				_ = m.peer().Close()
				synctest.Wait()
			})
		})
	}
}

func TestHeld_IsReleasedWhenItIsAbandoned(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		c := joiner{address: testAddress(1), events: true}.member(t, b, defaults())
		released := false
		c.Held(func() { released = true })
		c.Abandon()
		if !released {
			t.Error("it was not released")
		}
	})
}

func TestHasFrames_IsFalseWhereNothingWaits(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		c := joiner{address: testAddress(1)}.member(t, b, defaults())
		if c.HasFrames() {
			t.Error("something waits for a raw client without a history")
		}
		c.Abandon()
	})
}
