package chatbroadcast

import (
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"
)

// The events that Caddy's events app is told of.
const (
	eventHubOpened     = "chat_hub_opened"     // hub
	eventHubClosed     = "chat_hub_closed"     // hub
	eventClientRefused = "chat_client_refused" // hub, user, client_ip, reason: by one of the limits
)

// maxEvents is how many events may wait for a slow handler of them. More are dropped: who hammers at a limit must not
// make memory grow.
const maxEvents = 256

// An emitter tells the events app of one configuration.
type emitter struct {
	ctx caddy.Context
	app *caddyevents.App
}

func newEmitter(ctx caddy.Context) (emitter, error) {
	app, err := ctx.App("events")
	if err != nil {
		return emitter{}, err
	}
	return emitter{ctx, app.(*caddyevents.App)}, nil
}

// An event is one that waits. It is for the configuration that has the scope when its turn comes.
type event struct {
	scope *scope
	name  string
	data  map[string]any
}

// events are told one after the other, in a goroutine that there is only while some wait: a handler may take its time,
// and nothing in a hub waits for it.
type events struct {
	mu      sync.Mutex
	waiting []event
	running bool
	dropped int // since the last that was not
}

// emit tells whoever listens for events of that name in the current configuration, later. Where nobody does it
// does nothing. data must not be changed any more.
func (e *events) emit(s *scope, name string, data map[string]any) {
	l := s.newest.Load()
	if l == nil || l.emitter.app == nil || !l.emitter.app.ShouldEmit(name) {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.waiting) == maxEvents {
		e.dropped++
		return
	}
	e.waiting = append(e.waiting, event{s, name, data})
	if !e.running {
		e.running = true
		go e.run() // ends when none waits; nobody waits for it
	}
}

// run tells the events that wait until there are none.
func (e *events) run() {
	for {
		e.mu.Lock()
		if len(e.waiting) == 0 {
			e.waiting, e.running = nil, false
			e.mu.Unlock()
			return
		}
		next, dropped := e.waiting[0], e.dropped
		e.waiting, e.dropped = e.waiting[1:], 0
		e.mu.Unlock()
		if dropped > 0 {
			next.scope.logger().Warn("events dropped: their handlers are too slow", zap.Int("events", dropped))
		}
		if l := next.scope.newest.Load(); l != nil {
			l.emitter.app.Emit(l.emitter.ctx, next.name, next.data)
		}
	}
}
