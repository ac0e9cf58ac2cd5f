package main

import (
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

func shortRun(url string) options {
	return options{
		target:  target{url: "ws" + strings.TrimPrefix(url, "http") + "/{hub}", insecure: true, header: http.Header{}},
		clients: 20, hubs: 4, senders: 2, size: 200, window: 8,
		warmup: 20 * time.Millisecond, duration: 100 * time.Millisecond, drain: 10 * time.Second,
	}
}

// largeDuration is how long large messages are measured.
func largeDuration() time.Duration {
	if testing.Short() {
		return 200 * time.Millisecond
	}
	return time.Second
}

func TestRun_FindsNoFaultsInTheFloors(t *testing.T) {
	for name, server := range map[string]*httptest.Server{
		"floor":         httptest.NewServer(&floor{}),
		"floor batched": httptest.NewServer(&floor{batched: true}),
		"floor TLS":     httptest.NewTLSServer(&floor{batched: true}),
		"gorilla":       httptest.NewServer(&gorillaChat{}),
	} {
		t.Run(name, func(t *testing.T) {
			defer server.Close()
			for load, set := range map[string]func(*options){
				"closed loop":    func(*options) {},
				"at a rate":      func(o *options) { o.rateLow, o.rateHigh = 100, 400 },
				"large messages": func(o *options) { o.size, o.duration = 100_000, largeDuration() },
				"spinning":       func(o *options) { o.rateLow, o.rateHigh, o.spin = 100, 400, runtime.GOOS == "linux" },
			} {
				o := shortRun(server.URL)
				set(&o)
				r, err := measure(t.Context(), o)
				if err != nil {
					t.Fatalf("%s: %v", load, err)
				}
				if r.Faults.any() || r.Deliveries == 0 || r.Latency.Max == 0 {
					t.Errorf("%s: got %+v", load, r)
				}
			}
		})
	}
}

func TestRun_FindsNoFaultsWithTheEngineForAllSystems(t *testing.T) {
	for name, server := range map[string]*httptest.Server{
		"plain": httptest.NewServer(&floor{}),
		"TLS":   httptest.NewTLSServer(&floor{}),
	} {
		defer server.Close()
		o := shortRun(server.URL)
		l, err := newLoad(o)
		if err != nil {
			t.Fatal(err)
		}
		l.engine.close()
		l.engine = newConnEngine(l)
		defer l.engine.close()
		if err := l.connect(t.Context(), 0, o.clients, o.place); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		l.chooseSenders()
		l.sending = true
		l.runFor(10*time.Second, "", func() bool { return l.deliveries >= 1000 })
		l.sending = false
		l.runFor(o.drain, "", func() bool { return !l.underWay() })
		if l.finish(l.hubs); l.faults.any() || l.deliveries < 1000 {
			t.Errorf("%s: got %+v after %d deliveries", name, l.faults, l.deliveries)
		}
	}
}

// A relay is a server with one hub. It delivers each message to all clients, the n-th delivery times(n) times; a negative
// number closes the client. Clients that speak events receive it as an event, the others as it is.
type relay struct {
	times func(n int) int
	mu    sync.Mutex
	n     int
	conns []*websocket.Conn
	spoke int // how many of them speak events
}

func (s *relay) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	bilingual := upgrader
	bilingual.Subprotocols = []string{eventsProtocol}
	// A client that has seen its 101 must receive every later message, so messages wait for the handshake.
	s.mu.Lock()
	conn, err := bilingual.Upgrade(w, r, nil)
	if err != nil {
		s.mu.Unlock()
		return
	}
	defer conn.Close()
	if conn.Subprotocol() == eventsProtocol {
		s.spoke++
		conn.WriteJSON(map[string]string{"type": "hello", "hub": "one"})
	}
	s.conns = append(s.conns, conn)
	s.mu.Unlock()
	for {
		_, message, err := conn.ReadMessage()
		if err != nil {
			return
		}
		s.mu.Lock()
		for _, c := range s.conns {
			s.n++
			times := s.times(s.n)
			if times < 0 {
				c.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(1013, "lagged"), time.Now().Add(time.Second))
				c.Close()
			}
			for range times {
				if c.Subprotocol() == eventsProtocol {
					c.WriteJSON(map[string]any{"type": "message", "data": string(message), "seq": s.n})
				} else {
					c.WriteMessage(websocket.TextMessage, message)
				}
			}
		}
		s.mu.Unlock()
	}
}

func TestRun_FindsTheFaultsOfABadServer(t *testing.T) {
	for name, test := range map[string]struct {
		times func(n int) int
		found func(r result) bool
	}{
		"loses":       {func(n int) int { return min(1, n%50) }, func(r result) bool { return r.Faults.Lost > 0 && r.Faults.Doubled == 0 }},
		"doubles":     {func(n int) int { return 1 + max(0, n%50-48) }, func(r result) bool { return r.Faults.Doubled > 0 && r.Faults.Lost == 0 }},
		"disconnects": {func(n int) int { return 1 - 2*max(0, n-99)*max(0, 101-n) }, func(r result) bool { return r.Faults.Disconnected == 1 && r.Closes["1013 lagged"] == 1 }},
	} {
		t.Run(name, func(t *testing.T) {
			for _, events := range []float64{0, 50, 100} {
				server := httptest.NewServer(&relay{times: test.times})
				defer server.Close()
				o := shortRun(server.URL)
				o.hubs, o.senders, o.events = 1, 1, events
				if name == "loses" {
					o.drain = 100 * time.Millisecond // all of it passes, because a lost message never comes
				}
				r, err := measure(t.Context(), o)
				if err != nil || !test.found(r) {
					t.Errorf("with %v %% events: got %+v, %v", events, r, err)
				}
			}
		})
	}
}

func TestRun_SendsRawAndReceivesEvents(t *testing.T) {
	for events, want := range map[float64]int{0: 0, 50: 9, 100: 18} {
		for load, set := range map[string]func(*options){
			"small messages": func(*options) {},
			"large messages": func(o *options) { o.size, o.duration = 100_000, largeDuration() },
		} {
			s := relay{times: func(int) int { return 1 }}
			server := httptest.NewServer(&s)
			defer server.Close()
			o := shortRun(server.URL)
			o.hubs, o.events = 1, events
			set(&o)
			r, err := measure(t.Context(), o)
			if err != nil || r.Faults.any() || r.Deliveries == 0 || r.Others != 0 {
				t.Errorf("with %v %% events, %s: got %+v, %v", events, load, r, err)
			}
			s.mu.Lock()
			if s.spoke != want {
				t.Errorf("%d of 20 clients, of which 2 send, speak events, want %d", s.spoke, want)
			}
			s.mu.Unlock()
		}
	}
}

func TestRun_SpreadsEventsEvenly(t *testing.T) {
	o := options{clients: 300, hubs: 3, senders: 2, events: 25}
	for i := range o.clients {
		hub, events := o.place(i)
		rank := i / o.hubs // in its hub
		if want := rank >= o.senders && (rank-o.senders)%4 == 3; hub != i%3 || events != want {
			t.Errorf("client %d is in hub %d and speaks events: %t, want %d and %t", i, hub, events, i%3, want)
		}
	}
}

func TestRun_ReportsServerWithoutEvents(t *testing.T) {
	server := httptest.NewServer(&floor{})
	defer server.Close()
	o := shortRun(server.URL)
	o.events = 50
	if _, err := measure(t.Context(), o); err == nil || !strings.Contains(err.Error(), eventsProtocol) {
		t.Errorf("got %v, want an error that it does not speak %s", err, eventsProtocol)
	}
}

func TestRun_ReportsWhyItCannotConnect(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	_, err := measure(t.Context(), shortRun(server.URL))
	if err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("got %v, want a 404", err)
	}
}

func TestDial_UsesMoreThanOneSourceAddress(t *testing.T) {
	if runtime.GOOS != "linux" {
		return // elsewhere the loopback interface has only one address
	}
	server := httptest.NewServer(&floor{})
	defer server.Close()
	o := shortRun(server.URL)
	for client, want := range map[int]string{0: "127.0.0.1", perSourceAddress - 1: "127.0.0.1", perSourceAddress: "127.0.0.2"} {
		conn, _, err := o.dial(t.Context(), client, 0, false)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got := conn.LocalAddr().(*net.TCPAddr).IP.String(); got != want {
			t.Errorf("client %d connects from %s, want %s", client, got, want)
		}
	}
}

func TestSlowClients_RejoinWhenTheyAreClosed(t *testing.T) {
	closed := make(chan struct{}, 1000)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if conn, err := upgrader.Upgrade(w, r, nil); err == nil {
			conn.Close()
			closed <- struct{}{}
		}
	}))
	defer server.Close()
	o := shortRun(server.URL)
	o.slow, o.slowRate = 5, 1000 // one client, which reads
	slow := startSlow(o)
	for range 3 {
		<-closed
	}
	slow.close()
	if slow.rejoins.Load() < 2 {
		t.Errorf("%d rejoins, want 2", slow.rejoins.Load())
	}
}

func TestCompare_ComparesWithScenariosThatExist(t *testing.T) {
	for _, s := range scenarios {
		bases := words(s.against)
		if s.against == "" {
			bases = []string{s.name}
			if !slices.ContainsFunc(contenders, func(c contender) bool { return c.name == s.floor }) {
				t.Errorf("%s compares with %q, which is no server", s.name, s.floor)
			}
			if s.tls && !slices.ContainsFunc(contenders, func(c contender) bool { return c.tls && c.name == s.floor+"-tls" }) {
				t.Errorf("%s compares with %s-tls, which is no server", s.name, s.floor)
			}
		}
		for _, base := range bases {
			if !slices.ContainsFunc(scenarios, func(s scenario) bool { return s.name == base }) {
				t.Errorf("%s compares with %s, which is no scenario", s.name, base)
			}
		}
	}
	row := comparison{Scenario: "rate-1000-events", Server: "caddy"}
	if bases, server := basesOf(&row); !slices.Equal(bases, []string{"rate-1000-233"}) || server != "caddy" {
		t.Errorf("the ratios of events are against %v of %s", bases, server)
	}
}

func TestCompare_TakesMedians(t *testing.T) {
	got := median([]measurement{{PerSecond: 3, P99: 1}, {PerSecond: 1, P99: 5}, {PerSecond: 2, P99: 4}})
	if want := (measurement{PerSecond: 2, P99: 4}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got, want := mean([]measurement{{PerSecond: 2, P99: 1}, {PerSecond: 6, P99: 4}}), (measurement{PerSecond: 3, P99: 2.5}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := ratio(measurement{PerSecond: 3, P99: 1}, measurement{PerSecond: 2}); got != (measurement{PerSecond: 1.5}) {
		t.Errorf("got %+v, want 1.5", got)
	}
}
