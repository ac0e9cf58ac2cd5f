package chatbroadcast

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/input"
	cdplog "github.com/chromedp/cdproto/log"
	cdppage "github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/gorilla/websocket"
)

const exampleURL = "http://" + httpAddr + "/"

// exampleSite is example.Caddyfile's site on the harness's port, preceded by directives.
func exampleSite(t *testing.T, directives ...string) string {
	t.Helper()
	root, err := filepath.Abs("example")
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`http://%s {
	%s
	chat_broadcast /chat/*
	root * %s
	file_server
}`, httpAddr, strings.Join(directives, "\n\t"), root)
}

// startBrowser starts a browser without a window, which ends with the test.
func startBrowser(t *testing.T) context.Context {
	t.Helper()
	ctx, stop := chromedp.NewExecAllocator(t.Context(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(findProgram(t, "chromium", "chromium-browser", "google-chrome")),
		chromedp.NoSandbox, // containers seldom allow one; all that is opened is our own page
		chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true),
		chromedp.Flag("disable-component-update", true),
		chromedp.Flag("no-proxy-server", true),
	)...)
	t.Cleanup(stop) // waits until the browser has ended
	ctx, cancel := chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	if err := chromedp.Do(ctx); err != nil {
		t.Fatal(err)
	}
	return ctx
}

// A tab shows the example's page.
type tab struct {
	t   *testing.T
	ctx context.Context
}

// openTabs opens a tab of the browser for each of the queries that follow the page's URL, and waits until all are
// connected.
func openTabs(t *testing.T, browser context.Context, queries ...string) []*tab {
	t.Helper()
	var tabs []*tab
	for _, query := range queries {
		ctx, closeTab := chromedp.NewContext(browser)
		t.Cleanup(closeTab)
		ctx, cancel := context.WithTimeout(ctx, 3*patience) // for what is not waited for with patience
		t.Cleanup(cancel)
		p := &tab{t, ctx}
		p.open(exampleURL + query)
		tabs = append(tabs, p)
	}
	for _, p := range tabs {
		p.waitState("open")
	}
	return tabs
}

// do fails the test unless the browser does all steps.
func (p *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	if err := chromedp.Do(p.ctx, steps...); err != nil {
		p.t.Fatal(err)
	}
}

// open opens the page for the first time. What the page should not have done fails the test at its end.
func (p *tab) open(url string) {
	p.t.Helper()
	var mu sync.Mutex
	var complaints []string
	complain := func(what string) {
		mu.Lock()
		defer mu.Unlock()
		complaints = append(complaints, what)
	}
	p.t.Cleanup(func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range complaints {
			p.t.Errorf("the page at %s: %s", url, c)
		}
	})
	p.do() // creates the tab
	if err := chromedp.Listen(p.ctx, func(ev any) {
		switch ev := ev.(type) {
		case *runtime.EventExceptionThrown:
			complain((&chromedp.ExceptionError{ExceptionDetails: ev.ExceptionDetails}).Error())
		case *cdplog.EventEntryAdded:
			if ev.Entry.Source == cdplog.EntrySourceSecurity {
				complain(ev.Entry.Text) // it violates its own policy
			}
		}
	}); err != nil {
		p.t.Fatal(err)
	}
	p.do(
		// The page waits a random time before it reconnects. Here it is the same and short.
		beforeLoad(`Math.random = () => 0.02`),
		chromedp.Navigate(url),
	)
}

// beforeLoad runs a script in each page that a tab will load, before its own ones.
func beforeLoad(script string) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, cdppage.AddScriptToEvaluateOnNewDocument,
			cdppage.AddScriptToEvaluateOnNewDocumentParams{Source: script})
		return err
	})
}

// evaluate returns the value of a JavaScript expression, and of a promise what it comes to.
func evaluate[T any](p *tab, expression string) T {
	p.t.Helper()
	v, err := chromedp.Run(p.ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		p.t.Fatalf("evaluating %s: %v", expression, err)
	}
	return v
}

// waitFor waits until a JavaScript condition about the page's document holds.
func (p *tab) waitFor(condition string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	_, err := chromedp.Run(ctx, chromedp.Evaluate[bool](`new Promise((resolve) => {
		const check = () => {
			if (!(`+condition+`)) return;
			observer.disconnect();
			resolve(true);
		};
		const observer = new MutationObserver(check);
		observer.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
		check();
	})`, chromedp.EvalAwaitPromise))
	if err != nil {
		shown, _ := chromedp.Run(p.ctx, chromedp.Evaluate[string](`document.body.innerText`))
		p.t.Fatalf("waiting for %s: %v; the page shows:\n%s", condition, err, shown)
	}
}

// waitState waits until the page shows one of the states of the connection.
func (p *tab) waitState(states ...string) {
	p.t.Helper()
	p.waitFor(jsString(states) + `.includes(document.querySelector(".state").dataset.state)`)
}

// A shownMessage is a message as a tab shows it.
type shownMessage struct {
	Name string `json:"name"`
	Text string `json:"text"`
}

// jsMessages is the tab's messages, as an array of shownMessage.
const jsMessages = `[...document.querySelectorAll(".message")].map((m) => ({
	name: m.querySelector(".name").textContent,
	text: m.querySelector(".text").textContent,
}))`

func (p *tab) messages() []shownMessage {
	p.t.Helper()
	return evaluate[[]shownMessage](p, jsMessages)
}

// waitMessage waits until the tab shows a message last.
func (p *tab) waitMessage(name, text string) {
	p.t.Helper()
	p.waitFor(fmt.Sprintf(`(({ name, text } = {}) => name === %s && text === %s)(%s.at(-1))`,
		jsString(name), jsString(text), jsMessages))
}

// setName types a name over the one that the page has made up.
func (p *tab) setName(name string) {
	p.t.Helper()
	evaluate[bool](p, `(document.querySelector("#name").select(), true)`)
	p.do(typeInto("#name", name), enter)
}

// send types a message and sends it.
func (p *tab) send(text string) {
	p.t.Helper()
	p.do(typeInto("#text", text), enter)
}

// typeInto writes text into a field, all at once as on-screen keyboards do.
func typeInto(selector, text string) chromedp.Action[chromedp.Void] {
	return chromedp.Steps(
		chromedp.Focus(chromedp.CSS(selector)),
		chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
			_, err := cdp.Call(ctx, t, input.InsertText, input.InsertTextParams{Text: text})
			return err
		}),
	)
}

// enter presses Enter as keyboards do: in one event, which the page can keep from becoming a character.
var enter = chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
	down := *kb.Encode('\r')[0]
	up := down
	down.Text, up.Type = "\r", kb.KeyUp
	for _, key := range []input.DispatchKeyEventParams{down, up} {
		if _, err := cdp.Call(ctx, t, input.DispatchKeyEvent, key); err != nil {
			return err
		}
	}
	return nil
})

// draft returns what is in the box for the message.
func (p *tab) draft() string {
	p.t.Helper()
	return evaluate[string](p, `document.querySelector("#text").value`)
}

// jsString returns v as a JavaScript literal.
func jsString(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // v is made of strings
	}
	return string(b)
}

// TestExample_Page has the page do in one browser what its visitors do.
func TestExample_Page(t *testing.T) {
	browser := startBrowser(t)
	for _, row := range []struct {
		name string
		test func(*testing.T, context.Context)
	}{
		{"message appears in both windows", testMessageAppearsInBothWindows},
		{"rooms are apart", testRoomsAreApart},
		{"switches rooms", testSwitchesRooms},
		{"shows whatever comes as text", testShowsWhateverComesAsText},
		{"reconnects by itself", testReconnectsByItself},
		{"says why it does not reconnect", testSaysWhyItDoesNotReconnect},
	} {
		t.Run(row.name, func(t *testing.T) { row.test(t, browser) })
	}
}

func testMessageAppearsInBothWindows(t *testing.T, browser context.Context) {
	startCaddy(t, exampleSite(t))
	tabs := openTabs(t, browser, "", "")
	ada, grace := tabs[0], tabs[1]
	ada.setName("Ada")
	grace.setName("Grace")

	ada.send("hello, Grace")
	ada.waitMessage("You", "hello, Grace")
	grace.waitMessage("Ada", "hello, Grace")
	grace.send("hello, Ada")
	grace.waitMessage("You", "hello, Ada")
	ada.waitMessage("Grace", "hello, Ada")

	if got, want := len(ada.messages()), 2; got != want {
		t.Errorf("got %d messages, want %d", got, want)
	}
	if got := ada.draft(); got != "" {
		t.Errorf("got %q in the box of a sent message, want it empty", got)
	}
}

func testRoomsAreApart(t *testing.T, browser context.Context) {
	startCaddy(t, exampleSite(t))
	tabs := openTabs(t, browser, "?room=garden", "#garden", "")
	garden, sameGarden, lobby := tabs[0], tabs[1], tabs[2]

	garden.send("in the garden")
	sameGarden.waitFor(`document.querySelector(".text")?.textContent === "in the garden"`)
	// Had it come to the lobby, it would stand before what is said there later.
	lobby.send("in the lobby")
	lobby.waitMessage("You", "in the lobby")
	if got, want := len(lobby.messages()), 1; got != want {
		t.Errorf("got %d messages in the lobby, want %d", got, want)
	}
}

func testSwitchesRooms(t *testing.T, browser context.Context) {
	startCaddy(t, exampleSite(t))
	p := openTabs(t, browser, "")[0]
	p.send("in the lobby")
	p.waitMessage("You", "in the lobby")

	p.do(
		chromedp.Click(chromedp.CSS("#switch")),
		typeInto("#target", "rosé & räder/50%"),
		enter,
	)
	p.waitFor(`document.querySelector("#room").textContent === "rosé & räder-50%"`)
	p.waitState("open")
	if got := p.messages(); len(got) != 0 {
		t.Errorf("got %v in the new room, want no messages", got)
	}
	there := join(t, "/chat/ros%C3%A9%20&%20r%C3%A4der-50%25")
	there.text(`{"name":"Ada","text":"the URL names the hub"}`)
	p.waitMessage("Ada", "the URL names the hub")

	p.do(chromedp.NavigateBack())
	p.waitFor(`document.querySelector("#room").textContent === "lobby"`)
	p.waitState("open")
}

func testShowsWhateverComesAsText(t *testing.T, browser context.Context) {
	startCaddy(t, exampleSite(t))
	p := openTabs(t, browser, "")[0]
	peer := join(t, "/chat/lobby")
	const markup = `<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>`
	p.setName("Ada")

	p.send(markup)
	p.waitMessage("You", markup)
	peer.next()
	for _, row := range []struct{ sent, name, text string }{
		{"no JSON " + markup, "Somebody", "no JSON " + markup},
		{`"a string"`, "Somebody", `"a string"`},
		{`null`, "Somebody", `null`},
		{`{"name":"no text"}`, "Somebody", `{"name":"no text"}`},
		{`{"text":"no name"}`, "Somebody", `no name`},
		{`{"name":["x"],"text":"odd name"}`, "Somebody", `odd name`},
		{jsString(map[string]string{"name": "<b>Eve</b>", "text": markup}), "<b>Eve</b>", markup},
		{`{"name":"You","text":"not me"}`, "You", "not me"},
		{`{"name":"Ada","text":"see https://example.com/a?b=<i>."}`, "Ada", "see https://example.com/a?b=<i>."},
	} {
		peer.text(row.sent)
		p.waitMessage(row.name, row.text)
	}
	// What is no text has no place in the page; what follows it has.
	peer.send(websocket.BinaryMessage, "\x00\xff")
	peer.text(`{"name":"Eve","text":""}`)
	peer.text(`{"name":"Eve","text":"the end"}`)
	p.waitMessage("Eve", "the end")

	if got, want := len(p.messages()), 11; got != want {
		t.Errorf("got %d messages, want %d", got, want)
	}
	if got, want := evaluate[int](p, `document.querySelectorAll("#log :is(img, script, b, i)").length`), 0; got != want {
		t.Errorf("got %d elements from messages, want %d", got, want)
	}
	if got, want := evaluate[[]string](p, `[...document.querySelectorAll("#log a")].map((a) => a.href)`),
		"https://example.com/a?b="; len(got) != 1 || got[0] != want {
		t.Errorf("got links %q, want %q", got, want)
	}
	if got, want := evaluate[int](p, `document.querySelectorAll(".mine").length`), 1; got != want {
		t.Errorf("got %d messages as one's own, want %d", got, want)
	}
	if got, want := evaluate[string](p, `document.title`), "lobby"; !strings.Contains(got, want) {
		t.Errorf("got title %q, want one with %q", got, want)
	}
}

func testReconnectsByItself(t *testing.T, browser context.Context) {
	s := startCaddy(t, exampleSite(t))
	tabs := openTabs(t, browser, "", "")
	a, b := tabs[0], tabs[1]
	a.send("before")
	b.waitMessage(b.nameOf(a), "before")

	s.post("application/json", `{"admin":{"listen":"`+adminAddr+`"}}`)
	for _, p := range tabs {
		p.waitState("connecting", "waiting")
		p.waitFor(`document.querySelector("#state").textContent === "Reconnecting"`)
		p.waitFor(`document.querySelector("#why").textContent.includes("connection is lost")`)
	}
	// Nothing of what is written in the meantime is lost.
	a.send("patience")
	a.waitFor(`document.querySelector("#hint").textContent.startsWith("Not sent")`)
	if got, want := a.draft(), "patience"; got != want {
		t.Errorf("got %q in the box without a connection, want %q", got, want)
	}

	s.load(exampleSite(t))
	for _, p := range tabs {
		p.waitState("open")
		p.waitFor(`document.querySelector("#trouble").hidden`)
	}
	a.send("")
	a.waitMessage("You", "patience")
	b.waitMessage(b.nameOf(a), "patience")
	if got, want := len(b.messages()), 2; got != want {
		t.Errorf("got %d messages, want %d", got, want)
	}
}

// nameOf returns the name under which p sees what other sends.
func (p *tab) nameOf(other *tab) string {
	p.t.Helper()
	return evaluate[string](other, `document.querySelector("#name").value`)
}

func testSaysWhyItDoesNotReconnect(t *testing.T, browser context.Context) {
	startCaddy(t, exampleSite(t, "chat_broadcast /chat/news {\n\t\tread_only\n\t}"))
	p := openTabs(t, browser, "?room=news")[0]
	p.send("may I?")
	p.waitState("closed")
	p.waitFor(`document.querySelector("#why").textContent.includes("(1008 read_only)")`)
	if got, want := p.draft(), "may I?"; got != want {
		t.Errorf("got %q in the box after a refused message, want %q", got, want)
	}
	p.do(chromedp.Click(chromedp.CSS("#connect")))
	p.waitState("open")
}

// TestExample_ChatModule runs chat.js without the page's help: what those rely on who copy it.
func TestExample_ChatModule(t *testing.T) {
	s := startCaddy(t, exampleSite(t))
	p := openTabs(t, startBrowser(t), "")[0]
	evaluate[bool](p, `import("/chat.js").then(({ Chat }) => { window.Chat = Chat; return true; })`)

	t.Run("sends only when connected", func(t *testing.T) {
		p := &tab{t, p.ctx}
		got := evaluate[map[string]any](p, `(async () => {
			const chat = new Chat("chat/x#y");
			const next = (type) => new Promise((resolve) => chat.addEventListener(type, resolve, { once: true }));
			const got = { connecting: chat.send("a") };
			await next("open");
			got.open = chat.send("b");
			got.message = (await next("message")).data;
			const closed = next("close");
			chat.close();
			got.code = (await closed).code;
			got.closed = chat.send("c");
			chat.connect();
			await next("open");
			got.again = chat.send("d");
			got.messageAgain = (await next("message")).data;
			chat.close();
			return got;
		})()`)
		want := map[string]any{
			"connecting": false, "open": true, "message": "b", "code": 1000.0,
			"closed": false, "again": true, "messageAgain": "d",
		}
		if !maps.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})

	// A wait of minutes is cut short by the network's return.
	t.Run("reconnects at once when online", func(t *testing.T) {
		p := &tab{t, p.ctx}
		evaluate[bool](p, `new Promise((resolve) => {
			Math.random = () => 1;
			window.patient = new Chat("/chat/x", { base: 600_000, cap: 600_000 });
			patient.addEventListener("open", () => resolve(true));
		})`)
		evaluate[bool](p, `(window.lost = new Promise((resolve) =>
			patient.addEventListener("close", ({ code }) => resolve(code))), true)`)
		s.post("application/json", `{"admin":{"listen":"`+adminAddr+`"}}`)
		if got, want := evaluate[int](p, `lost`), causeHubRemoved.code; got != want {
			t.Errorf("got close code %d, want %d", got, want)
		}
		if got, want := evaluate[string](p, `patient.state`), "waiting"; got != want {
			t.Errorf("got state %q without the server, want %q", got, want)
		}
		s.load(exampleSite(t))
		got := evaluate[string](p, `new Promise((resolve) => {
			patient.addEventListener("open", () => resolve(patient.state));
			dispatchEvent(new Event("online"));
		})`)
		if want := "open"; got != want {
			t.Errorf("got state %q, want %q", got, want)
		}
		evaluate[bool](p, `(patient.close(), true)`)
	})

	// From here on with a WebSocket that does nothing by itself.
	evaluate[bool](p, `(WebSocket = class {
		static OPEN = 1;
		static last;
		readyState = 0;
		constructor() { WebSocket.last = this; }
		open() { this.readyState = 1; this.onopen({}); }
		end(code) { this.readyState = 3; this.onclose({ code, reason: "", wasClean: code !== 1006 }); }
		close() {}
	}, true)`)

	for _, row := range []struct {
		code int
		want string
	}{
		{websocket.CloseNormalClosure, "closed"},
		{causeShuttingDown.code, "waiting"},
		{causeProtocolError.code, "closed"},
		{websocket.CloseNoStatusReceived, "waiting"},
		{causePingTimeout.code, "waiting"},
		{causeInvalidUTF8.code, "closed"},
		{causeReadOnly.code, "closed"},
		{causeTooBig.code, "closed"},
		{causeInternal.code, "waiting"},
		{causeHubRemoved.code, "waiting"},
		{causeLagged.code, "waiting"},
		{4000, "waiting"},
	} {
		t.Run(fmt.Sprintf("close code %d", row.code), func(t *testing.T) {
			got := evaluate[string](&tab{t, p.ctx}, fmt.Sprintf(`(() => {
				const chat = new Chat("/chat/x");
				WebSocket.last.open();
				WebSocket.last.end(%d);
				const { state } = chat;
				chat.close();
				return state;
			})()`, row.code))
			if got != row.want {
				t.Errorf("got state %q, want %q", got, row.want)
			}
		})
	}

	// The waits are drawn from 0 up to a bound that doubles, is capped, and starts over after a connection that
	// was stable.
	t.Run("backs off", func(t *testing.T) {
		got := evaluate[[]float64](&tab{t, p.ctx}, `(() => {
			const { setTimeout } = window;
			let timer;
			window.setTimeout = (f) => { timer = f; };
			Math.random = () => 0.5;
			const chat = new Chat("/chat/x", { base: 100, cap: 1000 });
			const waits = [];
			chat.addEventListener("state", ({ detail }) => detail.state === "waiting" && waits.push(detail.retryIn));
			const fail = (times) => {
				for (let i = 0; i < times; i++) {
					WebSocket.last.end(1006);
					timer(); // the wait
				}
			};
			fail(6);
			WebSocket.last.open();
			fail(1); // open, but not for long: the waits stay
			WebSocket.last.open();
			timer(); // stable
			fail(2);
			chat.close();
			window.setTimeout = setTimeout;
			return waits;
		})()`)
		if want := []float64{50, 100, 200, 400, 500, 500, 500, 50, 100}; !slices.Equal(got, want) {
			t.Errorf("got waits %v, want %v", got, want)
		}
	})
}
