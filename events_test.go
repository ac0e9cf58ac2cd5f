package chatbroadcast

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/gorilla/websocket"
)

func init() {
	caddy.RegisterModule(new(eventRecorder))
	caddy.RegisterModule(new(badEventHandler))
	caddy.RegisterModule(new(failingHandler))
	httpcaddyfile.RegisterHandlerDirective("test_fails", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return new(failingHandler), nil
	})
	httpcaddyfile.RegisterDirectiveOrder("test_fails", httpcaddyfile.After, "respond")
}

// A badEventHandler panics.
type badEventHandler struct{}

// CaddyModule implements caddy.Module.
func (*badEventHandler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.test_bad", New: func() caddy.Module { return new(badEventHandler) }}
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler: there are no arguments.
func (*badEventHandler) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

// Handle implements caddyevents.Handler.
func (*badEventHandler) Handle(context.Context, caddy.Event) error { panic("a handler's bug") }

// A failingHandler fails in Provision, at the moment that the test chooses.
type failingHandler struct{}

// provisioning passes two values: a failingHandler sends the first when its Provision begins, the test sends the second to
// make it fail.
var provisioning = make(chan struct{})

// CaddyModule implements caddy.Module.
func (*failingHandler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_fails", New: func() caddy.Module { return new(failingHandler) }}
}

// Provision implements caddy.Provisioner.
func (*failingHandler) Provision(caddy.Context) error {
	provisioning <- struct{}{}
	<-provisioning
	return errors.New("as told")
}

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (*failingHandler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(w, r)
}

// An eventRecorder is an event handler that remembers the events that it gets.
type eventRecorder struct{}

// recorded has the events of all recorders. A recorder waits while a test holds gate.
var recorded struct {
	mu     sync.Mutex
	events []string
	gate   sync.RWMutex
}

// CaddyModule implements caddy.Module.
func (*eventRecorder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.test_recorder", New: func() caddy.Module { return new(eventRecorder) }}
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler: there are no arguments.
func (*eventRecorder) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

// Handle implements caddyevents.Handler.
func (*eventRecorder) Handle(_ context.Context, e caddy.Event) error {
	recorded.gate.RLock()
	defer recorded.gate.RUnlock()
	recorded.mu.Lock()
	defer recorded.mu.Unlock()
	recorded.events = append(recorded.events, fmt.Sprint(e.Name(), " ", e.Data))
	return nil
}

// recordedEvents returns what was recorded, once there are n events, and forgets them.
func recordedEvents(t *testing.T, n int) (events []string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d events", n), func() bool {
		recorded.mu.Lock()
		defer recorded.mu.Unlock()
		events = slices.Clone(recorded.events)
		if len(events) < n {
			return false
		}
		recorded.events = nil
		return true
	})
	return events
}

const eventOptions = `
	events {
		on chat_hub_opened test_recorder
		on chat_hub_closed test_recorder
		on chat_client_refused test_recorder
	}`

func TestNotify_HubsAndRefusals(t *testing.T) {
	const site = `http://localhost:9080 {
		chat_broadcast /chat/* {
			hub {path}
			user {header.X-User}
			max_clients_per_hub 1
		}
	}`
	s := startCaddy(t, site)
	quiet := join(t, "/chat/before")
	s.loadWith(eventOptions, site)

	a := join(t, "/chat/a")
	refused(t, http.StatusServiceUnavailable, "/chat/a", "X-User: ada\r\n")
	s.loadWith(eventOptions, site) // the current configuration reports clients of older ones, too
	a.conn.Close()
	want := []string{
		"chat_hub_opened map[hub:/chat/a]",
		"chat_client_refused map[client_ip:127.0.0.1 hub:/chat/a reason:max_clients_per_hub user:ada]",
		"chat_hub_closed map[hub:/chat/a]",
	}
	if got := recordedEvents(t, len(want)); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	quiet.conn.Close()
	if got := recordedEvents(t, 1); !slices.Equal(got, []string{"chat_hub_closed map[hub:/chat/before]"}) {
		t.Errorf("got %q, want the other hub closed", got)
	}
}

func TestNotify_SlowHandlerDelaysNobodyAndTakesNoMemory(t *testing.T) {
	s := startCaddy(t, "")
	s.loadWith(eventOptions, `http://localhost:9080 {
		chat_broadcast /chat/* {
			max_clients 1
		}
	}`)
	recorded.gate.Lock()
	p := join(t, "/chat/a")
	const refusals = maxNotifications + 50
	for range refusals {
		refused(t, http.StatusServiceUnavailable, "/chat/a")
	}
	p.text("still here")
	p.wantText("still here")
	if waiting, _ := waitingNotices(); waiting != maxNotifications {
		t.Errorf("got %d notices waiting, want %d", waiting, maxNotifications)
	}
	recorded.gate.Unlock()
	// The event that was being handled, and those that waited.
	recordedEvents(t, 1+maxNotifications)
	s.logged(moduleID, 1)
	p.conn.Close()
	recordedEvents(t, 1)
}

func TestNotify_PanicOfAHandlerIsLogged(t *testing.T) {
	s := startCaddy(t, "")
	s.loadWith("events {\n\ton chat_hub_opened test_bad\n\ton chat_hub_opened test_recorder\n\ton chat_hub_closed test_recorder\n}",
		"http://localhost:9080 {\n\tchat_broadcast /chat/*\n}")
	p := join(t, "/chat/a")
	if line := s.logged(moduleID, 1)[0]; line["level"] != "error" || line["event"] != notificationNames[hubOpened] {
		t.Errorf("got %v, want an error", line)
	}
	p.text("still here")
	p.wantText("still here")
	p.conn.Close()
	recordedEvents(t, 1) // other handlers get it
}

// TestReload_FailingChangesNothing looks at the logs and the events while a configuration is provisioned that fails, and
// has others.
func TestReload_FailingChangesNothing(t *testing.T) {
	const site = `http://localhost:9080 {
		chat_broadcast /chat/* {path}
		%s
	}`
	s := startCaddy(t, "")
	s.loadWith(eventOptions, fmt.Sprintf(site, ""))
	p := join(t, "/chat/a")
	recordedEvents(t, 1)
	failed := make(chan int)
	go func() {
		config := s.caddyfile("", fmt.Sprintf(site, "test_fails /chat/*"))
		status, _ := s.post("text/caddyfile", strings.Replace(config, "output file "+s.logFile, "output discard", 1))
		failed <- status
	}()
	<-provisioning
	p.conn.Close()
	if got := recordedEvents(t, 1); !slices.Equal(got, []string{"chat_hub_closed map[hub:/chat/a]"}) {
		t.Errorf("got %q, want the hub closed", got)
	}
	s.logged(moduleID, 1)
	provisioning <- struct{}{}
	if status := <-failed; status == http.StatusOK {
		t.Error("the configuration did not fail")
	}
}

func TestReload_CloseLineGoesToTheLogThatIsConfiguredNow(t *testing.T) {
	const site = "http://localhost:9080 {\n\tchat_broadcast\n}"
	s := startCaddy(t, site)
	p := join(t, "/a")
	first, second := s.logFile, filepath.Join(t.TempDir(), "second.log")
	s.logFile = second
	s.load(site)
	p.conn.Close()
	if closed := s.logged(moduleID, 1); closed[0]["hub"] != "http://"+httpAddr+"/a" {
		t.Errorf("got %v", closed)
	}
	if old, err := os.ReadFile(first); err != nil || strings.Contains(string(old), "client closed") {
		t.Errorf("got the line in the log that was configured before, too, or error %v", err)
	}
}

func TestNotify_HubClosedWhenItsValueIsGone(t *testing.T) {
	s := startCaddy(t, "")
	s.loadWith(eventOptions, "http://localhost:9080 {\n\tchat_broadcast {path}\n}")
	p := join(t, "/a")
	recordedEvents(t, 1)
	s.loadWith(eventOptions, "http://localhost:9080 {\n\tchat_broadcast other{path}\n}")
	p.wantClose(websocket.CloseServiceRestart, "hub_removed")
	p.conn.Close()
	if got := recordedEvents(t, 1); !slices.Equal(got, []string{"chat_hub_closed map[hub:/a]"}) {
		t.Errorf("got %q, want the hub closed", got)
	}
}

func TestNotify_CostsNothingWithoutHandlers(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
		chat_broadcast /chat/*
	}`)
	if got := testing.AllocsPerRun(100, func() {
		hubs.lock()
		hubs.notifyLocked(hubOpened, "/a")
		hubs.mu.Unlock()
	}); got > 0 {
		t.Errorf("got %v allocations, want none", got)
	}
	if _, running := waitingNotices(); running {
		t.Error("a notice waits that nobody listens for")
	}
}

func TestUpgrade_Placeholders(t *testing.T) {
	s := startCaddy(t, `http://localhost:9080 {
		log
		log_append hub {http.chat_broadcast.hub}
		log_append client_id {http.chat_broadcast.client_id}
		log_append refused {http.chat_broadcast.refused}
		chat_broadcast /chat/* {
			hub {path}
			max_clients 1
		}
		handle_errors {
			respond "refused: {http.chat_broadcast.refused}"
		}
	}`)
	p := join(t, "/chat/a")
	accesses := s.logged("http.log.access", 1)
	if got := accesses[0]; got["hub"] != "/chat/a" || got["client_id"] == nil || got["refused"] != nil {
		t.Errorf("got hub %q, client_id %q, refused %q", got["hub"], got["client_id"], got["refused"])
	}
	p.conn.Close()
	if closed := s.logged(moduleID, 1)[0]; closed["client_id"] != accesses[0]["client_id"] {
		t.Errorf("got client_id %q in the line of the close, %q in that of the access", closed["client_id"], accesses[0]["client_id"])
	}
	p = join(t, "/chat/a")
	resp := refused(t, http.StatusServiceUnavailable, "/chat/b")
	body := make([]byte, resp.ContentLength)
	if _, err := resp.Body.Read(body); string(body) != "refused: max_clients" {
		t.Errorf("got body %q, error %v", body, err)
	}
	accesses = s.logged("http.log.access", 3) // the line of a join may be later than what follows it
	last := accesses[slices.IndexFunc(accesses, func(line map[string]any) bool { return line["status"] == 503.0 })]
	if last["hub"] != "/chat/b" || last["client_id"] != nil || last["refused"] != "max_clients" {
		t.Errorf("got hub %q, client_id %q, refused %q", last["hub"], last["client_id"], last["refused"])
	}
	p.conn.Close()
}
