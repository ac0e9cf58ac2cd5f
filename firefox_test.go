package chatbroadcast

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// A firefox is a Firefox without a window, which shows one page. The tests drive it over WebDriver BiDi.
type firefox struct {
	t    *testing.T
	conn *websocket.Conn
	tab  string // its id
	sent int    // how many commands
}

// startFirefox returns a Firefox that ends with the test.
func startFirefox(t *testing.T) *firefox {
	t.Helper()
	home := t.TempDir()
	cmd := exec.Command(findProgram(t, "firefox-esr", "firefox"), "--headless", "--no-remote", "--profile", t.TempDir(), "--remote-debugging-port", "0")
	cmd.Env = append(os.Environ(), "HOME="+home, "MOZ_CRASHREPORTER_DISABLE=1")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	address := make(chan string, 1)
	read := make(chan struct{})
	go func() { // ends with the process
		defer close(read)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			if found := regexp.MustCompile(`WebDriver BiDi listening on (ws://\S+)`).FindStringSubmatch(lines.Text()); found != nil {
				address <- found[1]
			}
		}
	}()
	f := &firefox{t: t}
	t.Cleanup(func() {
		kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		if f.conn != nil {
			_ = f.conn.WriteJSON(map[string]any{"id": 0, "method": "browser.close", "params": map[string]any{}}) // else it is killed
			defer f.conn.Close()
		}
		<-read
		_ = cmd.Wait() // its status does not matter
	})
	select {
	case url := <-address:
		f.conn, _, err = websocket.DefaultDialer.Dial(url+"/session", nil)
	case <-time.After(patience):
		t.Fatal("Firefox does not say where it listens")
	}
	if err != nil {
		t.Fatal(err)
	}
	f.call("session.new", map[string]any{"capabilities": map[string]any{}}, nil)
	var tree struct{ Contexts []struct{ Context string } }
	f.call("browsingContext.getTree", map[string]any{}, &tree)
	f.tab = tree.Contexts[0].Context
	return f
}

// call sends a command and decodes its result.
func (f *firefox) call(method string, params map[string]any, result any) {
	f.t.Helper()
	f.sent++
	if err := f.conn.WriteJSON(map[string]any{"id": f.sent, "method": method, "params": params}); err != nil {
		f.t.Fatalf("%s: %v", method, err)
	}
	for {
		_ = f.conn.SetReadDeadline(time.Now().Add(patience))
		var answer struct {
			ID      int
			Result  json.RawMessage
			Error   string
			Message string
		}
		if err := f.conn.ReadJSON(&answer); err != nil {
			f.t.Fatalf("%s: %v", method, err)
		}
		if answer.ID != f.sent {
			continue
		}
		if answer.Error != "" {
			f.t.Fatalf("%s: %s: %s", method, answer.Error, answer.Message)
		}
		if result != nil {
			if err := json.Unmarshal(answer.Result, result); err != nil {
				f.t.Fatalf("%s: %v in %s", method, err, answer.Result)
			}
		}
		return
	}
}

// open shows a page.
func (f *firefox) open(url string) {
	f.t.Helper()
	f.call("browsingContext.navigate", map[string]any{"context": f.tab, "url": url, "wait": "complete"}, nil)
}

// waitFor waits until a JavaScript condition holds about the element, which is room, and its shadow root, root.
func (f *firefox) waitFor(condition string) {
	f.t.Helper()
	eventually(f.t, condition, func() bool {
		var answer struct {
			Result           struct{ Value any }
			ExceptionDetails struct{ Text string }
		}
		f.call("script.evaluate", map[string]any{
			"expression":   `((room, root) => Boolean(` + condition + `))(document.querySelector("chat-room"), document.querySelector("chat-room")?.shadowRoot)`,
			"target":       map[string]any{"context": f.tab},
			"awaitPromise": true,
		}, &answer)
		if answer.ExceptionDetails.Text != "" {
			f.t.Fatalf("%s: %s", condition, answer.ExceptionDetails.Text)
		}
		return answer.Result.Value == true
	})
}

// typeKeys presses keys one after the other.
func (f *firefox) typeKeys(text string) {
	f.t.Helper()
	var actions []map[string]any
	for key := range strings.SplitSeq(text, "") {
		actions = append(actions, map[string]any{"type": "keyDown", "value": key}, map[string]any{"type": "keyUp", "value": key})
	}
	f.call("input.performActions", map[string]any{
		"context": f.tab,
		"actions": []any{map[string]any{"type": "key", "id": "keyboard", "actions": actions}},
	}, nil)
}

// TestElement_InFirefox has a conversation in another browser.
func TestElement_InFirefox(t *testing.T) {
	t.Parallel()
	f := startFirefox(t)
	s := startPage(t, "page with names", "<!doctype html>"+docBlock(t, "html: page with names"))
	eve := s.join("/chat/lobby?name=Eve")
	eve.text("from before")
	f.open(s.url)
	f.waitFor(`root?.querySelector(".message .text")?.textContent === "from before"`)
	f.waitFor(`root.querySelector("#name")?.checkVisibility() && [...root.querySelectorAll("#people .name")].some((name) => name.textContent === "Eve")`)
	eve.next() // its own message
	f.waitFor(`(room.focus(), true)`)
	const enterKey = "\ue007"
	f.typeKeys("hello, Eve" + enterKey)
	f.waitFor(`root.querySelector(".mine.sent .text")?.textContent === "hello, Eve"`)
	eve.wantText("hello, Eve")
	eve.text("hello, https://example.com")
	f.waitFor(`[...root.querySelectorAll(".text a")].at(-1)?.href === "https://example.com/"`)

	// It comes back by itself.
	s.unload()
	f.waitFor(`["connecting", "waiting"].includes(root.querySelector(".state").dataset.state) && root.querySelector("#why").checkVisibility()`)
	f.typeKeys("still there?" + enterKey)
	f.waitFor(`root.querySelector(".pending")`)
	f.waitFor(`(root.querySelector("#bell").click(), true)`) // its module does not come
	s.load(strings.NewReplacer("example.com", "http://localhost", "/srv", t.TempDir()).Replace(docBlock(t, "recipe: page with names")))
	f.waitFor(`root.querySelector(".state").dataset.state === "open" && !root.querySelector(".pending, .gone")`)
	f.waitFor(`(root.querySelector("#bell").click(), true)`)
	f.waitFor(`root.querySelector("#alerts.open")`)
}
