package hub

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
)

// A lateSession holds calls of Announce.
type lateSession struct {
	*enginetest.Session
	held chan struct{}
}

func (s *lateSession) Announce(ctx context.Context, hub string, users []engine.UserCount) error {
	<-s.held
	return s.Session.Announce(ctx, hub, users)
}

// TestRemote_LateAnnouncementIsCorrected closes a hub while it announces a user, and opens it again. The announcement
// arrives after that.
func TestRemote_LateAnnouncementIsCorrected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := enginetest.NewServer()
		other := newNode(t, server, unpinged(presenceOf(true)))
		late := &lateSession{server.Session(), make(chan struct{})}
		p := NewProcess()
		load := func() *Hub {
			b, err := Load(t.Context(), p, "hub", late, unpinged(presenceOf(true)))
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		old := load()
		c := newTestClient(p, "ada", testAddress(1), unpinged(presenceOf(true)))
		if err := old.Join(c, 0); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		old.Close()
		c.Abandon()
		b := load()
		close(late.held)
		synctest.Wait()
		time.Sleep(2 * announceInterval)
		synctest.Wait()
		if n := locked(other.hub, func() int { return len(other.hub.remote.users) }); n != 0 {
			t.Errorf("got %d users, want none", n)
		}
		b.Close()
		synctest.Wait()
		_ = late.Close()
	})
}

// userCounts returns n users with one client each, in no order.
func userCounts(n int, prefix string) []engine.UserCount {
	users := make([]engine.UserCount, 0, n)
	for _, i := range rand.Perm(n) {
		users = append(users, engine.UserCount{User: fmt.Sprintf("%s%08d", prefix, i), Clients: 1})
	}
	return users
}

// BenchmarkRemote measures for how long the hub's lock is held while many users of other nodes become known, or a roster
// begins that has them.
func BenchmarkRemote(b *testing.B) {
	for _, n := range []int{1000, 10_000, 100_000} {
		snapshot := &engine.Snapshot{Users: map[engine.NodeID][]engine.UserCount{"x": userCounts(n/2, "a"), "y": userCounts(n/2, "b")}}
		known := new(Hub).othersIn(snapshot)
		session := enginetest.NewServer().Session()
		defer func() { _ = session.Close() }()
		load := func(b *testing.B) *Hub {
			h, err := Load(b.Context(), NewProcess(), "hub", session, presenceOf(true))
			if err != nil {
				b.Fatal(err)
			}
			return h
		}
		join := func(b *testing.B, h *Hub, user string) *Client {
			c := newTestClient(h.process, user, testAddress(1), presenceOf(true))
			c.SpeakEvents(nil)
			if err := h.Join(c, 0); err != nil {
				b.Fatal(err)
			}
			return c
		}
		b.Run(fmt.Sprintf("snapshot/users=%d", n), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				h := load(b)
				c := join(b, h, "me")
				b.StartTimer()
				locked(h, func() bool { h.replaceUsersLocked(snapshot, known); return true })
				b.StopTimer()
				c.Abandon()
				h.Close()
				b.StartTimer()
			}
		})
		b.Run(fmt.Sprintf("again/users=%d", n), func(b *testing.B) {
			h := load(b)
			c := join(b, h, "me")
			h.mu.Lock()
			h.replaceUsersLocked(snapshot, known)
			for b.Loop() {
				h.replaceUsersLocked(snapshot, known)
			}
			h.mu.Unlock()
			c.Abandon()
			h.Close()
		})
		b.Run(fmt.Sprintf("gone/users=%d", n), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				h := load(b)
				c := join(b, h, "me")
				h.mu.Lock()
				h.replaceUsersLocked(snapshot, known)
				b.StartTimer()
				h.replaceUsersLocked(&engine.Snapshot{}, others{})
				b.StopTimer()
				h.mu.Unlock()
				c.Abandon()
				h.Close()
				b.StartTimer()
			}
		})
		b.Run(fmt.Sprintf("roster/users=%d", n), func(b *testing.B) {
			h := load(b)
			locked(h, func() bool { h.replaceUsersLocked(snapshot, known); return true })
			others := make([]*Client, 0, n)
			for i := range min(n, 10_000) {
				c := newTestClient(h.process, fmt.Sprintf("a%08dx", i), testAddress(1), defaults())
				if err := h.Join(c, 0); err != nil {
					b.Fatal(err)
				}
				others = append(others, c)
			}
			for b.Loop() {
				c := join(b, h, "me")
				b.StopTimer()
				c.Abandon()
				b.StartTimer()
			}
			for _, c := range others {
				c.Abandon()
			}
			h.Close()
		})
	}
}
