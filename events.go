package chatbroadcast

import (
	"runtime/debug"
	"slices"
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

// An emitter tells the events app of one configuration, as something of ours in it.
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

// An event is one that waits.
type event struct {
	name string
	data map[string]any
}

// events are told one after the other, in a goroutine that there is only while some wait: a handler may take its time,
// and nothing in a hub waits for it. They are for the configuration that runs when their turn comes, never for one
// that is only provisioned: its events app has not started, and may never.
type events struct {
	mu      sync.Mutex
	leases  []*lease
	waiting []event
	running bool
	dropped int // since the last that was not
}

// add notes that l's configuration has an emitter, until remove.
func (e *events) add(l *lease) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.leases = append(e.leases, l)
}

func (e *events) remove(l *lease) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.leases = slices.DeleteFunc(e.leases, func(other *lease) bool { return other == l })
}

// runningApp returns the events app of the configuration that runs, or nil.
func runningApp() (caddy.Context, *caddyevents.App) {
	ctx := caddy.ActiveContext()
	app, err := ctx.AppIfConfigured("events")
	if err != nil {
		return ctx, nil
	}
	return ctx, app.(*caddyevents.App)
}

// emit tells whoever listens for events of that name, later. Where nobody does it does nothing. data must not be changed
// any more.
func (e *events) emit(name string, data map[string]any) {
	if _, app := runningApp(); app == nil || !app.ShouldEmit(name) {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.waiting) == maxEvents {
		e.dropped++
		return
	}
	e.waiting = append(e.waiting, event{name, data})
	if !e.running {
		e.running = true
		go e.run() // ends when none waits; nobody waits for it
	}
}

// run tells the events that wait until there are none.
func (e *events) run() {
	for {
		ctx, app := runningApp()
		e.mu.Lock()
		if len(e.waiting) == 0 {
			e.waiting, e.running = nil, false
			e.mu.Unlock()
			return
		}
		next, dropped := e.waiting[0], e.dropped
		e.waiting, e.dropped = e.waiting[1:], 0
		for _, l := range e.leases {
			if l.emitter.app == app {
				ctx = l.emitter.ctx // it says where the event comes from
			}
		}
		e.mu.Unlock()
		if dropped > 0 {
			processLogger().Warn("events dropped: their handlers are too slow", zap.Int("events", dropped))
		}
		if app != nil {
			tell(ctx, app, next)
		}
	}
}

// tell runs the handlers of an event, of which one may have a bug: above our goroutine nobody would recover it.
func tell(ctx caddy.Context, app *caddyevents.App, e event) {
	defer func() {
		if v := recover(); v != nil {
			processLogger().Error("panic in a handler of an event",
				zap.String("event", e.name), zap.Any("panic", v), zap.ByteString("stack", debug.Stack()))
		}
	}()
	app.Emit(ctx, e.name, e.data)
}

// processLogger returns the logger for what belongs to no configuration.
func processLogger() *zap.Logger { return caddy.Log().Named(moduleID) }
