package chatbroadcast

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
)

// keptSettings returns settings with a history of a minute.
func keptSettings() *hub.Settings {
	s := defaults()
	s.HistoryMessages, s.HistoryAge = 10, time.Minute
	return s
}

// TestRegistry_HubsThatPostsOpenAtOnceKeepTheLimit has more POSTs open hubs at the same time than max_hubs allows.
func TestRegistry_HubsThatPostsOpenAtOnceKeepTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, open := newRegistry(), make(chan struct{})
		inMemory := r.openHub
		r.openHub = func(name string) (*hub.Hub, error) {
			<-open
			return inMemory(name)
		}
		l := r.lease("value", zap.NewNop(), emitter{}, bounds{}, time.Second)
		done := make(chan error)
		names := []string{"a", "b", "c", "d"}
		for i, name := range names {
			address := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 32)
			go func() {
				m := hub.Message{Source: hub.FromHTTP, Address: address, Opcode: 1}
				_, _, err := r.publishOpening(t.Context(), name, m, "value", keptSettings(), limits{maxHubs: 2})
				done <- err
			}()
		}
		synctest.Wait()
		close(open)
		for range names {
			if err := <-done; err != nil {
				t.Errorf("got %v, want each message published: a kept hub makes room", err)
			}
		}
		if _, hubs := r.count(); hubs > 2 || l.scope.kept.Len() != hubs {
			t.Errorf("got %d hubs, %d kept, want 2 at most", hubs, l.scope.kept.Len())
		}
		r.release(l)
	})
}
