package chatbroadcast

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"go.uber.org/zap"
)

// newOpening returns a registry in which the hub "slow" opens when the test sends what comes of it, and a scope of it.
func newOpening(t *testing.T) (r *registry, s *scope, opened chan error) {
	t.Helper()
	r, opened = newRegistry(), make(chan error)
	inMemory := r.openHub
	r.openHub = func(name string, s *hub.Settings, l *link) (*hub.Hub, error) {
		if name == "slow" {
			if err := <-opened; err != nil {
				return nil, err
			}
		}
		return inMemory(name, s, l)
	}
	l := r.lease("value", zap.NewNop(), emitter{}, processSettings{}, time.Second)
	return r, l.scope, opened
}

// joinNamed joins a client without a connection.
func joinNamed(ctx context.Context, r *registry, s *scope, name string) (*member, error) {
	m := &member{scope: s}
	settings := defaults()
	settings.HistoryMessages, settings.HistoryAge = 10, time.Minute
	m.client.Init(r.process, m, "", netip.MustParsePrefix("192.0.2.1/32"), settings)
	return m, r.join(ctx, m, name, limits{maxClients: 5, maxHubs: 10})
}

// has reports whether the registry has a hub of that name, be it open or opening.
func (r *registry) has(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.named[name] != nil
}

func TestRegistry_OpeningHubHoldsUpOnlyItsOwnClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s, opened := newOpening(t)
		var slow []*member
		joined := make(chan *member)
		for range 3 { // one that opens the hub, two that wait
			go func() {
				m, err := joinNamed(t.Context(), r, s, "slow")
				if err != nil {
					t.Error(err)
				}
				joined <- m
			}()
		}
		synctest.Wait()
		fast, err := joinNamed(t.Context(), r, s, "fast")
		if err != nil {
			t.Fatal(err)
		}
		if _, found, err := r.publish(t.Context(), "fast", message(nil)); !found || err != nil {
			t.Errorf("got %v, %v, want a message published beside a hub that is opening", found, err)
		}
		if clients, hubs := r.count(); clients != 1 || hubs != 1 || r.hub("slow") != nil || len(r.allHubs()) != 1 {
			t.Errorf("got %d clients in %d hubs, want 1 in 1: a hub that is opening is not open", clients, hubs)
		}
		if _, err := joinNamed(t.Context(), r, s, "fast"); err != nil {
			t.Errorf("got %v, want the fifth client to join", err)
		}
		if _, err := joinNamed(t.Context(), r, s, "fast"); !errors.Is(err, errMaxClients) {
			t.Errorf("got %v, want those that wait to count as clients", err)
		}
		published := make(chan hub.Receipt)
		go func() {
			receipt, _, _ := r.publish(t.Context(), "slow", message(nil))
			published <- receipt
		}()
		synctest.Wait()
		opened <- nil
		for range 3 {
			slow = append(slow, <-joined)
		}
		if got := <-published; got.Seq != 1 {
			t.Errorf("got message %d, want the first", got.Seq)
		}
		if got := r.hub("slow").Size(); got != 3 {
			t.Errorf("got %d clients, want 3", got)
		}
		if got := r.hub("slow").Name(); got != "slow" || slow[0].client.Hub() != slow[2].client.Hub() {
			t.Errorf("got hub %q, want one for all", got)
		}
		for _, m := range append(slow, fast) {
			m.abandon()
		}
		r.hub("slow").Close()
		r.hub("fast").Close()
	})
}

func TestRegistry_HubThatCannotBeOpenedLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s, opened := newOpening(t)
		down := errors.New("down")
		failed := make(chan error)
		for range 3 {
			go func() {
				_, err := joinNamed(t.Context(), r, s, "slow")
				failed <- err
			}()
		}
		synctest.Wait()
		opened <- down
		for range 3 {
			if err := <-failed; !errors.Is(err, down) {
				t.Errorf("got %v, want why the hub cannot be opened", err)
			}
		}
		if r.has("slow") || r.live != 0 || s.joining != 0 || len(s.perHub)+len(s.perIP)+len(s.opened) > 0 {
			t.Errorf("got %d live, %d joining, %v, %v, %v, want nothing left", r.live, s.joining, s.perHub, s.perIP, s.opened)
		}
		go func() { opened <- nil }()
		m, err := joinNamed(t.Context(), r, s, "slow")
		if err != nil {
			t.Fatalf("got %v, want the next one to try again", err)
		}
		m.abandon()
		r.hub("slow").Close()
	})
}

func TestRegistry_RequestThatEndsDoesNotWaitForItsHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s, opened := newOpening(t)
		first := make(chan *member)
		go func() {
			m, _ := joinNamed(t.Context(), r, s, "slow")
			first <- m
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := joinNamed(ctx, r, s, "slow"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the end of the request", err)
		}
		if s.joining != 1 || r.live != 1 {
			t.Errorf("got %d joining, %d live, want the first client", s.joining, r.live)
		}
		opened <- nil
		m := <-first
		m.abandon()
		if !r.has("slow") {
			t.Error("the hub is gone, want it kept for its history")
		}
		r.hub("slow").Close()
		time.Sleep(2 * time.Minute) // it expires
		if r.has("slow") {
			t.Error("the hub is still there after its history's age")
		}
	})
}

// TestRegistry_ScopeThatClosesWhileAHubOpensLetsNobodyIn releases the last lease meanwhile.
func TestRegistry_ScopeThatClosesWhileAHubOpensLetsNobodyIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s, opened := newOpening(t)
		failed := make(chan error)
		go func() {
			_, err := joinNamed(t.Context(), r, s, "slow")
			failed <- err
		}()
		synctest.Wait()
		r.release(s.leases[0])
		opened <- nil
		if err := <-failed; !errors.Is(err, errHubRemoved) {
			t.Errorf("got %v, want a refusal", err)
		}
		if r.has("slow") || r.live != 0 || len(r.scopes) != 0 {
			t.Errorf("got %d live, %d scopes, want nothing left", r.live, len(r.scopes))
		}
		time.Sleep(removalStep) // closeUnleased may have seen the client
	})
}
