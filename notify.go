package chatbroadcast

import (
	"runtime/debug"
	"slices"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"
)

// The kinds of notifications for Caddy's events app, with their data.
const (
	hubOpened     = iota // hub
	hubClosed            // hub
	clientRefused        // hub, user, client_ip, reason: by one of the limits
	notificationKinds
)

// notificationNames are the names of notifications in the events app.
var notificationNames = [notificationKinds]string{
	hubOpened:     "chat_hub_opened",
	hubClosed:     "chat_hub_closed",
	clientRefused: "chat_client_refused",
}

// listeners has for each kind of notification whether a handler listens for it.
type listeners [notificationKinds]bool

// maxNotifications is how many notifications may wait for slow handlers. The notifier drops more, so that a client that
// hammers at a limit cannot make memory grow.
const maxNotifications = 256

// An emitter hands notifications to the events app of one configuration, as a module of that configuration.
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

// A notification waits to be passed on.
type notification struct {
	name string
	data map[string]any
}

// A notifier passes notifications on, one after the other, in a goroutine that runs only while some wait. A handler may
// take long; nothing in a hub waits for it. The running configuration gets each notification when its turn comes. A
// configuration that is only provisioned gets none, because its events app has not started and may never start.
type notifier struct {
	mu      sync.Mutex
	leases  []*lease
	waiting []notification
	running bool
	dropped int // since the last one that was passed on
}

// add lets the notifier use the emitter of l's configuration, until remove.
func (n *notifier) add(l *lease) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.leases = append(n.leases, l)
}

func (n *notifier) remove(l *lease) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.leases = slices.DeleteFunc(n.leases, func(other *lease) bool { return other == l })
}

// runningApp returns the events app of the running configuration, or nil.
func runningApp() (caddy.Context, *caddyevents.App) {
	ctx := caddy.ActiveContext()
	app, err := ctx.AppIfConfigured("events")
	if err != nil {
		return ctx, nil
	}
	return ctx, app.(*caddyevents.App)
}

// currentListeners asks Caddy which notifications have handlers. It must not be called under a lock.
func currentListeners() (l listeners) {
	if _, app := runningApp(); app != nil {
		for kind, name := range notificationNames {
			l[kind] = app.ShouldEmit(name)
		}
	}
	return l
}

// queue has a notification passed on later. It may be called under any lock. The caller must not change data any more.
func (n *notifier) queue(name string, data map[string]any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.waiting) == maxNotifications {
		n.dropped++
		return
	}
	n.waiting = append(n.waiting, notification{name, data})
	if !n.running {
		n.running = true
		go n.run() // ends when none waits; nobody waits for it
	}
}

// run passes on the notifications until none waits.
func (n *notifier) run() {
	for {
		ctx, app := runningApp()
		n.mu.Lock()
		if len(n.waiting) == 0 {
			n.waiting, n.running = nil, false
			n.mu.Unlock()
			return
		}
		next, dropped := n.waiting[0], n.dropped
		n.waiting, n.dropped = n.waiting[1:], 0
		for _, l := range n.leases {
			if l.emitter.app == app {
				ctx = l.emitter.ctx // so the notification names a handler as its origin
			}
		}
		n.mu.Unlock()
		if dropped > 0 {
			processLogger().Warn("events dropped: their handlers are too slow", zap.Int("events", dropped))
		}
		if app != nil {
			emit(ctx, app, next)
		}
	}
}

// emit runs the handlers of a notification. It recovers a panic in them, because no HTTP server above this goroutine
// would.
func emit(ctx caddy.Context, app *caddyevents.App, n notification) {
	defer func() {
		if v := recover(); v != nil {
			processLogger().Error("panic in a handler of an event",
				zap.String("event", n.name), zap.Any("panic", v), zap.ByteString("stack", debug.Stack()))
		}
	}()
	app.Emit(ctx, n.name, n.data)
}

// processLogger returns the logger for lines that belong to no configuration.
func processLogger() *zap.Logger { return caddy.Log().Named(moduleID) }
