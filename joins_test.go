package chatbroadcast

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/conn"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/zap"
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
		r.openHub = func(name string, s *hub.Settings, l *link) (*hub.Hub, error) {
			<-open
			return inMemory(name, s, l)
		}
		l := r.lease("value", zap.NewNop(), emitter{}, processSettings{}, time.Second)
		done := make(chan error)
		names := []string{"a", "b", "c", "d"}
		for i, name := range names {
			address := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 32)
			go func() {
				m := message(nil)
				m.Source, m.Address = hub.FromHTTP, address
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

// TestRegistry_MessageOfARequestThatHasEndedIsPublished has a client send a POST and go away without waiting for the answer,
// as a page does that is closed.
func TestRegistry_MessageOfARequestThatHasEndedIsPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry()
		l := r.lease("value", zap.NewNop(), emitter{}, processSettings{}, time.Second)
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		for seq := range uint64(100) {
			m := message(nil)
			m.Source = hub.FromHTTP
			got, found, err := r.publishOpening(ended, "hub", m, "value", keptSettings(), limits{})
			if err != nil || !found || got.Seq != seq+1 {
				t.Fatalf("got message %d, %v, %v, want message %d published", got.Seq, found, err, seq+1)
			}
		}
		r.release(l)
	})
}

// shakeHands makes the WebSocket handshake of a client that has no HTTP server.
func shakeHands(t *testing.T, c *hub.Client) {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header = http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="},
	}
	ws, err := upgrader.Upgrade(&handshake{ResponseWriter: httptest.NewRecorder(), reader: c.Reader()}, r, nil)
	if err != nil {
		t.Fatal(err)
	}
	c.Reader().TakeResponse()
	c.Reader().Open(ws, c.Settings().MaxMessageSize, c.Pong)
}

// TestRegistry_JoinsThatRaceKeepTheLimitsAndLeaveNothing has clients of two hub values join, fail to join, connect, vanish
// and be kicked, all at the same time, while hubs open slowly or not at all, POSTs open others and configurations come and
// go. No limit may be exceeded at any moment, and at the end nothing may be counted.
func TestRegistry_JoinsThatRaceKeepTheLimitsAndLeaveNothing(t *testing.T) {
	for seed := range uint64(8) {
		synctest.Test(t, func(t *testing.T) { raceJoins(t, seed) })
	}
}

// A joinRace has the state that the goroutines of one such test share.
type joinRace struct {
	*testing.T
	*registry
	limits  limits
	running sync.WaitGroup
}

func raceJoins(t *testing.T, seed uint64) {
	race := &joinRace{
		T: t, registry: newRegistry(),
		limits: limits{maxClients: 12, maxClientsPerHub: 4, maxClientsPerIP: 5, maxHubs: 4},
	}
	down, inMemory := errors.New("down"), race.openHub
	race.openHub = func(name string, s *hub.Settings, l *link) (*hub.Hub, error) {
		time.Sleep(rand.N(20 * time.Millisecond))
		if rand.IntN(10) == 0 {
			return nil, down
		}
		return inMemory(name, s, l)
	}
	done := make(chan struct{})
	for i, key := range []string{"one", "two"} {
		race.running.Go(func() { race.reload(key) })
		for j := range 6 {
			rng := rand.New(rand.NewPCG(seed, uint64(10*i+j)))
			race.running.Go(func() { race.visit(rng, key) })
		}
	}
	go func() {
		race.running.Wait()
		close(done)
	}()
	for ended := false; !ended; {
		select {
		case <-done:
			ended = true
		case <-time.After(time.Millisecond):
		}
		race.checkLimits()
	}
	for _, m := range race.allMembers() {
		m.client.Close(hub.CloseKicked)
	}
	time.Sleep(5 * time.Minute) // histories expire
	synctest.Wait()
	race.checkNothingLeft()
}

// reload releases the lease of key, sometimes before there is a new one.
func (race *joinRace) reload(key string) {
	lease := func() *lease { return race.lease(key, zap.NewNop(), emitter{}, processSettings{}, time.Second) }
	old := lease()
	for range 10 {
		time.Sleep(rand.N(200 * time.Millisecond))
		if rand.IntN(3) == 0 {
			race.release(old)
			time.Sleep(rand.N(100 * time.Millisecond))
			old = lease()
			continue
		}
		next := lease()
		race.release(old)
		old = next
	}
	race.release(old)
}

// visit joins hubs and publishes in them.
func (race *joinRace) visit(rng *rand.Rand, key string) {
	for range 40 {
		settings := defaults()
		if rng.IntN(2) == 0 {
			settings.HistoryMessages, settings.HistoryAge = 10, 300*time.Millisecond
		}
		name := key + string(rune('a'+rng.IntN(6)))
		address := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(rng.IntN(3))}), 32)
		ctx, cancel := context.WithTimeout(race.Context(), time.Duration(1+rng.IntN(60))*time.Millisecond)
		if rng.IntN(4) == 0 {
			m := message([]byte("hi"))
			m.Source, m.Address = hub.FromHTTP, address
			_, _, _ = race.publishOpening(ctx, name, m, key, settings, race.limits)
		} else if m := race.tryJoin(ctx, name, key, address, settings); m != nil {
			race.connect(rng, m)
		}
		cancel()
		time.Sleep(time.Duration(rng.IntN(30)) * time.Millisecond)
	}
}

// tryJoin joins a client, and returns nil if that is refused.
func (race *joinRace) tryJoin(ctx context.Context, name, key string, address netip.Prefix, settings *hub.Settings) *member {
	m := &member{scope: &scope{key: key}}
	m.client.Init(race.process, m, "", address, settings)
	shakeHands(race.T, &m.client)
	if race.join(ctx, m, name, race.limits) != nil {
		return nil
	}
	return m
}

// connect gives m a connection, or none. Its peer reads for a while.
func (race *joinRace) connect(rng *rand.Rand, m *member) {
	if rng.IntN(4) == 0 {
		m.abandon()
		return
	}
	server, peer := net.Pipe()
	m.client.Attach(conn.Wrap(server, nil))
	if rng.IntN(8) == 0 {
		m.client.Abandon()
		return
	}
	stay, kick := time.Duration(rng.IntN(300))*time.Millisecond, rng.IntN(3) == 0
	m.client.Start()
	race.running.Go(func() {
		_ = peer.SetReadDeadline(time.Now().Add(stay))
		_, _ = io.Copy(io.Discard, peer)
		if kick {
			m.client.Close(hub.CloseKicked)
			_ = peer.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			_, _ = io.Copy(io.Discard, peer)
		}
		_ = peer.Close()
	})
}

// checkLimits checks that no limit is exceeded at this moment.
func (race *joinRace) checkLimits() {
	race.mu.Lock()
	defer race.mu.Unlock()
	for _, s := range race.scopes {
		if n := len(s.members) + s.joining; n > race.limits.maxClients {
			race.Errorf("got %d clients in a scope, want %d at most", n, race.limits.maxClients)
		}
		if n := len(s.perHub) + s.kept.Len(); n > race.limits.maxHubs {
			race.Errorf("got %d hubs in a scope, want %d at most", n, race.limits.maxHubs)
		}
		for address, n := range s.perIP {
			if n > race.limits.maxClientsPerIP {
				race.Errorf("got %d clients of %v, want %d at most", n, address, race.limits.maxClientsPerIP)
			}
		}
		opened := 0
		for _, n := range s.opened {
			opened += n
		}
		if opened != len(s.perHub) {
			race.Errorf("got %d hubs by address, want %d", opened, len(s.perHub))
		}
	}
	for name, n := range race.named {
		if n.isOpen() && n.hub.Size() > race.limits.maxClientsPerHub {
			race.Errorf("got %d clients in %s, want %d at most", n.hub.Size(), name, race.limits.maxClientsPerHub)
		}
	}
}

// checkNothingLeft checks that everything that was counted is counted down.
func (race *joinRace) checkNothingLeft() {
	r := race.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.live != 0 || len(r.scopes)+len(r.named)+len(r.leases) > 0 {
		race.Errorf("got %d live clients, %d scopes, %d hubs, %d leases, want none", r.live, len(r.scopes), len(r.named), len(r.leases))
	}
	if h, b := r.process.Memory.Histories.Used(), r.process.Memory.Buffers.Used(); h != 0 || b != 0 {
		race.Errorf("got %d bytes of histories and %d of buffers in use, want none", h, b)
	}
	if r.process.Processors.Shared() {
		race.Error("addresses share the processors, want none left")
	}
	joins, closes := valueOf(r.metrics.joins), 0.0
	for _, c := range r.metrics.known {
		closes += valueOf(r.metrics.closes.WithLabelValues(strconv.Itoa(c.Code), c.Reason))
	}
	if joins == 0 || joins != closes {
		race.Errorf("got %v joins and %v closes, want as many", joins, closes)
	}
}

// valueOf returns the value of a counter.
func valueOf(c prometheus.Counter) float64 {
	var m dto.Metric
	_ = c.Write(&m)
	return m.GetCounter().GetValue()
}
