package chatbroadcast

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// faultSite has a hub with a history that outlives the faults, and the client's files.
func faultSite(t *testing.T) string {
	t.Helper()
	return exampleSite(t, `chat_broadcast /chat/fault {
		history 1000
		user {query.name}
		presence
	}`)
}

// TestElement_Faults has a page whose connection, server or network fails in the middle of a conversation.
func TestElement_Faults(t *testing.T) {
	t.Parallel()
	browser := startBrowser(t)
	for _, row := range []struct {
		name string
		test func(*testing.T, context.Context)
	}{
		{"a stopped server", testElementStoppedServer},
		{"a reload", testElementReload},
		{"a restart", testElementRestart},
		{"no network", testElementNoNetwork},
		{"no network in the developer tools", testElementDeveloperTools},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			row.test(t, browser)
		})
	}
}

func testElementStoppedServer(t *testing.T, browser context.Context) {
	s := startProcess(t, "", faultSite(t))
	t.Cleanup(func() { continueProcess(s, nil) }) // before it is killed
	p := openTab(t, browser, s.frame("/chat/fault&name=Ada"))
	p.waitState("open")
	p.send("before")
	p.waitFor(`inside().querySelector(".sent")`)
	stopProcess(s, nil)
	began := time.Now()
	p.waitState("connecting", "waiting")
	if took := time.Since(began); took > 45*time.Second {
		t.Errorf("the page showed after %v that the server does not answer, want within 45 s", took)
	}
	p.send("meanwhile")
	p.waitFor(`inside().querySelector(".pending")`)
	continueProcess(s, nil)
	p.wantGoesOn(s, "meanwhile")
}

// wantGoesOn waits until the page is connected again, and wants what the visitor sent before and meanwhile, and then a message of
// another.
func (p *tab) wantGoesOn(s *process, meanwhile string) {
	p.t.Helper()
	p.waitState("open")
	p.waitFor(`!inside().querySelector(".pending, .gone, .missed")`)
	s.join("/chat/fault?name=Eve").text("after")
	p.waitMessage("Eve", "after")
	want := []shownMessage{{"You", "before"}, {"You", meanwhile}, {"Eve", "after"}}
	if got := p.messages(); !slices.Equal(got, want) {
		p.t.Errorf("got %v, want %v", got, want)
	}
}

// A page does not notice a reload.
func testElementReload(t *testing.T, browser context.Context) {
	s := startProcess(t, "", faultSite(t))
	p := openTab(t, browser, s.frame("/chat/fault&name=Ada"))
	p.waitState("open")
	eve := s.join("/chat/fault?name=Eve")
	eve.text("before")
	p.waitMessage("Eve", "before")
	element[bool](p, `(window.states = [], room.addEventListener("state", ({ state }) => states.push(state)), true)`)
	element[bool](p, `(window.notices = 0, new MutationObserver(() => notices += root.querySelectorAll(".missed, #trouble:not([hidden])").length)
		.observe(root, { subtree: true, childList: true, attributes: true }), true)`)
	if err := s.reload("", strings.Replace(faultSite(t), "history 1000", "history 900", 1)); err != nil {
		t.Fatal(err)
	}
	eve.text("after")
	p.waitMessage("Eve", "after")
	p.send("hello, Eve")
	p.waitFor(`inside().querySelector(".sent")`)
	if got := evaluate[string](p, `states.join() + notices`); got != "0" {
		t.Errorf("got states and notices %s, want none", got)
	}
	want := []shownMessage{{"Eve", "before"}, {"Eve", "after"}, {"You", "hello, Eve"}}
	if got := p.messages(); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// With an engine that keeps messages, a restart is only a pause.
func testElementRestart(t *testing.T, browser context.Context) {
	options := "chat_broadcast {\nengine file " + filepath.Join(t.TempDir(), "messages") + "\n}"
	s := startProcess(t, options, faultSite(t))
	p := openTab(t, browser, s.frame("/chat/fault&name=Ada"))
	p.waitState("open")
	p.send("before")
	p.waitFor(`inside().querySelector(".sent")`)
	s.terminate()
	p.waitState("connecting", "waiting")
	p.send("meanwhile: https://example.com/")
	p.waitFor(`inside().querySelector(".pending") && inside().querySelector("#why").textContent.startsWith("The connection is lost.")`)
	s = s.startAgain(options, faultSite(t))
	p.wantGoesOn(s, "meanwhile: https://example.com/")
	p.waitFor(`inside().querySelector(".text a")?.href === "https://example.com/"`) // its module did not come before
}

// The browser says that there is no network, and that it is back. It may be wrong: a message from the server shows that there
// is one.
func testElementNoNetwork(t *testing.T, browser context.Context) {
	s := startProcess(t, "", faultSite(t))
	p := openTab(t, browser, s.frame("/chat/fault"))
	evaluate[bool](p, `(Object.defineProperty(navigator, "onLine", { get: () => !window.gone, configurable: true }), dispatchEvent(new Event("online")), true)`)
	p.waitState("open")
	p.silence(s)
	began := time.Now()
	evaluate[bool](p, `(window.gone = true, dispatchEvent(new Event("offline")), true)`)
	p.waitOffline(began)
	const connected = `inside().querySelector("#state").textContent === "Connected" && inside().querySelector("#trouble").hidden`
	evaluate[bool](p, `(window.gone = false, dispatchEvent(new Event("online")), true)`)
	p.waitFor(connected)
	evaluate[bool](p, `(window.gone = true, dispatchEvent(new Event("offline")), true)`)
	p.waitFor(`!inside().querySelector("#trouble").hidden`)
	continueProcess(s, nil)
	s.join("/chat/fault?name=Eve").text("there is a network")
	p.waitFor(connected)
}

// The developer tools take the network away. A machine that has none can only lose it once: see the test above.
func testElementDeveloperTools(t *testing.T, browser context.Context) {
	s := startProcess(t, "", faultSite(t))
	p := openTab(t, browser, s.frame("/chat/fault"))
	p.waitState("open")
	if !evaluate[bool](p, `navigator.onLine`) {
		t.Log("this machine has no network")
		return
	}
	p.silence(s)
	began := time.Now()
	p.do(setOffline(true))
	p.waitOffline(began)
	p.do(setOffline(false))
	p.waitFor(`inside().querySelector("#state").textContent === "Connected" && inside().querySelector("#trouble").hidden`)
}

// silence stops the server when nothing is on its way to the page that would show that there is a network.
func (p *tab) silence(s *process) {
	p.t.Helper()
	p.send("before")
	p.waitFor(`inside().querySelector(".mine") && !inside().querySelector(".pending")`)
	stopProcess(s, nil)
	p.t.Cleanup(func() { continueProcess(s, nil) })
}

// waitOffline waits until the page shows that there is no network, which it must do at once.
func (p *tab) waitOffline(began time.Time) {
	p.t.Helper()
	p.waitFor(`inside().querySelector("#state").textContent === "Offline" && inside().querySelector(".state").dataset.state !== "open"`)
	if took := time.Since(began); took > 5*time.Second {
		p.t.Errorf("got Offline after %v, want it at once", took)
	}
}

// TestElement_LosesNothingSilently is TestChat_LosesNothingSilently for pages with the element. Each of them must show each
// message once, in one order, and its own ones as sent or as not sent.
func TestElement_LosesNothingSilently(t *testing.T) {
	t.Parallel()
	browser := startBrowser(t)
	for left := *cuts; left > 0; left -= mostCuts {
		t.Run(fmt.Sprint(left), func(t *testing.T) { testElementLosesNothingSilently(t, browser, min(left, mostCuts)) })
	}
}

func testElementLosesNothingSilently(t *testing.T, browser context.Context, cuts int) {
	options := "chat_broadcast {\nengine file " + filepath.Join(t.TempDir(), "messages") + "\n}"
	s := startProcess(t, options, faultSite(t))
	l := startLine(t, s.http)
	var pages []*tab
	for i := range 4 {
		p := openTab(t, browser, fmt.Sprintf("%schat-client/chat.html?src=/chat/fault&name=%d", l.url, i))
		p.waitState("open")
		element[bool](p, fmt.Sprintf(`(window.texts = [], window.ticker = setInterval(() => {
			const text = "%d " + texts.length;
			if (room.send(text) !== null) texts.push(text);
		}, 200), true)`, i))
		pages = append(pages, p)
	}
	s = breakAtRandom(s, l, options, faultSite(t), cuts)
	for _, p := range pages {
		evaluate[bool](p, `(clearInterval(ticker), true)`)
		p.waitState("open")
		p.waitFor(`!inside().querySelector(".pending")`)
	}
	s.join("/chat/fault?name=Eve").text("the end")
	var want []string
	for i, p := range pages {
		p.waitMessage("Eve", "the end")
		got := p.readAll()
		if missed := evaluate[int](p, `window.missed`); missed > 0 {
			t.Errorf("page %d: got %d notices of messages that are lost, want none", i, missed)
		}
		if own := evaluate[int](p, `texts.length`); own != len(slices.DeleteFunc(slices.Clone(got), func(m seenMessage) bool { return !m.Own })) {
			t.Errorf("page %d: got other messages of its own than the %d it has sent: %v", i, own, got)
		}
		var published []string
		for _, m := range got {
			if !m.Gone {
				published = append(published, m.Text)
			}
		}
		if distinct := slices.Compact(slices.Sorted(slices.Values(published))); len(distinct) != len(published) {
			t.Errorf("page %d: got messages twice: %v", i, published)
		}
		if i == 0 {
			want = published
		} else if !slices.Equal(published, want) {
			t.Errorf("page %d: got %v, want those of page 0: %v", i, published, want)
		}
	}
	t.Logf("%d messages", len(want))
}

// A seenMessage is a message as somebody sees it who scrolls through all of them.
type seenMessage struct {
	Text      string
	Own, Gone bool
}

// readAll scrolls from the first message to the last. It leaves the number of notices about lost messages in missed.
func (p *tab) readAll() []seenMessage {
	p.t.Helper()
	return element[[]seenMessage](p, `(async () => {
		const log = root.querySelector("#log"), seen = new Map();
		const frame = () => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
		log.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
		for (;;) {
			await frame();
			const before = seen.size;
			for (const item of root.querySelectorAll("#messages > *")) {
				if (!seen.has(item)) seen.set(item, item.matches(".message") && {
					Text: item.querySelector(".text").textContent, Own: item.matches(".mine"), Gone: item.matches(".gone"),
				});
			}
			if (seen.size === before && log.scrollTop + log.clientHeight > log.scrollHeight - 2) break;
			log.scrollTop = log.scrollHeight;
		}
		window.missed = [...seen.keys()].filter((item) => item.matches(".missed")).length;
		return [...seen.values()].filter(Boolean);
	})()`)
}
