package chatbroadcast

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
)

func init() { caddy.RegisterModule(new(testEngine)) }

// A testEngine is a module of the tests: an engine in memory, with faults. Engines of the same name share their messages.
type testEngine struct {
	Name string `json:"name,omitempty"`
}

// testServers has the server of each testEngine, by name.
var testServers sync.Map

func testServer(name string) *enginetest.Server {
	s, _ := testServers.LoadOrStore(name, enginetest.NewServer())
	return s.(*enginetest.Server)
}

func (*testEngine) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: engineNamespace + ".test", New: func() caddy.Module { return new(testEngine) }}
}

func (e *testEngine) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.Args(&e.Name) {
		return d.ArgErr()
	}
	return nil
}

func (e *testEngine) Key() string { return e.Name }

func (e *testEngine) Connect(m engine.Monitor) (engine.Session, error) {
	return testServer(e.Name).Connect(m)
}

// withEngine returns the global option with an engine.
func withEngine(line string) string { return "chat_broadcast {\n\tengine " + line + "\n}" }

// links returns how many sessions of engines there are.
func links() int {
	hubs.linking.Lock()
	defer hubs.linking.Unlock()
	return len(hubs.links)
}

const linkedSite = `http://localhost:9080 {
	chat_broadcast /chat/* {
		history 10
		http_publish
	}
}`

// TestLink_ReloadKeepsTheSessionAndTheClients reloads with the same engine while a client is there.
func TestLink_ReloadKeepsTheSessionAndTheClients(t *testing.T) {
	s := startCaddy(t, "")
	s.loadWith(withEngine("test "+t.Name()), linkedSite)
	ada := join(t, "/chat/lobby")
	before := hubs.current.Load()
	for i := range 5 {
		s.loadWith(withEngine("test "+t.Name()), linkedSite+fmt.Sprintf("\n# %d", i))
		ada.text(fmt.Sprint(i))
		ada.wantText(fmt.Sprint(i))
	}
	if hubs.current.Load() != before || links() != 1 {
		t.Errorf("got another of %d sessions, want the one from before", links())
	}
}

// TestLink_RequestWaitsForTheStart has a client come before Caddy has started the engine.
func TestLink_RequestWaitsForTheStart(t *testing.T) {
	for _, starts := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			e := enginetest.NewServer()
			n := newUnstartedNode(t, e)
			if starts {
				time.AfterFunc(connectPatience/2, func() {
					if err := n.startLink("test", e); err != nil {
						t.Error(err)
					}
				})
			}
			m, err := n.tryJoin(t.Context(), "x", "ada", defaults())
			if !starts {
				if why, ok := errors.AsType[*refusal](err); !ok || why.reason != refusedUnavailable {
					t.Errorf("joining returned %v, want that the engine is unavailable", err)
				}
				return
			}
			if err != nil {
				t.Fatalf("joining returned %v, want a client of the engine that has started meanwhile", err)
			}
			n.members = append(n.members, m)
			if n.named["x"].link == nil {
				t.Error("got a hub without the engine")
			}
		})
	}
}

// TestLink_ReloadToAnotherEngineMovesClients reloads from memory to an engine, to another one, and back.
func TestLink_ReloadToAnotherEngineMovesClients(t *testing.T) {
	s := startCaddy(t, linkedSite)
	for _, options := range []string{withEngine("test " + t.Name()), withEngine("test another-" + t.Name()), withEngine("memory")} {
		ada := join(t, "/chat/lobby")
		began := time.Now()
		s.loadWith(options, linkedSite)
		bob := join(t, "/chat/lobby") // a new hub
		ada.wantClose(1012, "hub_reset")
		if took := time.Since(began); took > removalSpread+5*time.Second {
			t.Errorf("the client was closed after %v, want %v at most", took, removalSpread)
		}
		bob.text("hello")
		bob.wantText("hello")
		bob.conn.Close()
	}
	eventually(t, "the sessions to be closed", func() bool { return links() == 0 })
}

// TestLink_EngineThatIsDownRefusesNewClients takes the engine away while clients are there.
func TestLink_EngineThatIsDownRefusesNewClients(t *testing.T) {
	s := startCaddy(t, "")
	s.loadWith(withEngine("test "+t.Name()), linkedSite)
	ada := join(t, "/chat/lobby")
	testServer(t.Name()).Down(errors.New("the cable is out"))
	eventually(t, "the engine to be down", func() bool { return hubs.engineUp() == 0 })
	for _, path := range []string{"/chat/lobby", "/chat/another"} {
		resp := refused(t, http.StatusServiceUnavailable, path)
		if got := resp.Header.Get("Retry-After"); got != retryAfter {
			t.Errorf("got Retry-After %q, want %q", got, retryAfter)
		}
	}
	a := request(t, http.MethodPost, "http://"+httpAddr+"/chat/another", strings.NewReader("x"))
	if a.status != http.StatusServiceUnavailable || !strings.Contains(a.body, "the cable is out") {
		t.Errorf("got %d %q, want 503 with the reason", a.status, a.body)
	}
	ada.text("waits")
	testServer(t.Name()).Up()
	ada.wantText("waits")
	join(t, "/chat/another").conn.Close()
	var told []string
	for _, line := range s.logged(moduleID, 0) {
		if strings.Contains(line["msg"].(string), "engine") {
			told = append(told, line["msg"].(string))
		}
	}
	if len(told) != 2 {
		t.Errorf("got lines %q, want one when the engine goes and one when it is back", told)
	}
}

// TestLink_HubThatGetsHistoryMovesToTheEngine joins a hub first through a directive without history, under an engine that
// only takes hubs with history.
func TestLink_HubThatGetsHistoryMovesToTheEngine(t *testing.T) {
	s := startCaddy(t, "")
	s.loadWith(withEngine("file "+t.TempDir()), `http://localhost:9080 {
	chat_broadcast /now lobby
	chat_broadcast /old lobby {
		history 10
	}
}`)
	ada := join(t, "/now")
	ada.text("in memory")
	ada.wantText("in memory")
	bob := join(t, "/old")
	ada.wantClose(1012, "hub_reset")
	bob.text("on the disk")
	bob.wantText("on the disk")
	join(t, "/now").conn.Close()
}

// TestLink_ErrorsOfEnginesNameTheLine adapts options that are wrong.
func TestLink_ErrorsOfEnginesNameTheLine(t *testing.T) {
	for _, tc := range []struct{ line, want string }{
		{"engine", "engine: missing <name>"},
		{"engine disk", `engine: unknown engine "disk": there are file, memory, redis`},
		{"engine memory 64MiB", `engine memory: unexpected argument "64MiB"`},
		{"engine memory {\nx\n}", "engine memory: takes no block"},
		{"engine file a b", `engine file: unexpected argument "b"`},
		{`engine file ""`, "engine file: <folder> must not be empty"},
		{"engine redis localhost", "engine redis: <url>: "},
		{"engine redis {\nprefixes x\n}", `unrecognized subdirective "prefixes": did you mean prefix?`},
		{"engine memory\nengine memory", "engine: given more than once"},
	} {
		t.Run(tc.line, func(t *testing.T) {
			d := caddyfile.NewTestDispenser("chat_broadcast {\n" + tc.line + "\n}")
			_, err := parseGlobalOption(d, nil)
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "Testfile:") {
				t.Errorf("got %v, want %q and the line", err, tc.want)
			}
		})
	}
}

// TestRedis_PlaceholdersInTheURL replaces placeholders, and escapes what stands for a login.
func TestRedis_PlaceholdersInTheURL(t *testing.T) {
	t.Setenv("CHAT_PASSWORD", "p@ss:w/rd?#%")
	t.Setenv("CHAT_REDIS", "redis://:secret@redis.example:7000/3")
	for _, tc := range []struct{ url, want string }{
		{"redis://127.0.0.1:6379", "redis://127.0.0.1:6379"},
		{"redis://ada:{env.CHAT_PASSWORD}@redis.example/1", "redis://ada:p%40ss%3Aw%2Frd%3F%23%25@redis.example/1"},
		{"{env.CHAT_REDIS}", "redis://:secret@redis.example:7000/3"},
	} {
		if got, err := replaceInURL(tc.url); got != tc.want || err != nil {
			t.Errorf("%s: got %q, %v, want %q", tc.url, got, err, tc.want)
		}
	}
	if _, err := replaceInURL("redis://:{env.CHAT_NOT_SET}@redis.example"); err == nil {
		t.Error("a placeholder that stands for nothing is no error")
	}
}
