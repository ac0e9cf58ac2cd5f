package chatbroadcast

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	cdplog "github.com/chromedp/cdproto/log"
	cdppage "github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/gorilla/websocket"
)

// exampleSite is example.Caddyfile's site at http://localhost, preceded by directives.
func exampleSite(t *testing.T, directives ...string) string {
	t.Helper()
	root, err := filepath.Abs("example")
	if err != nil {
		t.Fatal(err)
	}
	site, err := os.ReadFile("example.Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	return strings.NewReplacer(
		":8080 {\n", fmt.Sprintf("http://localhost {\n\t%s\n", strings.Join(directives, "\n\t")),
		"root * example\n", fmt.Sprintf("root * %s\n", root),
	).Replace(string(site))
}

// The browser of all tests, since starting one takes seconds of processor time. stopBrowser ends it and waits for that.
var (
	theBrowser   context.Context
	errBrowser   error
	browserStart sync.Once
	stopBrowser  = func() {}
)

// startBrowser returns a browser without a window, which ends with the tests. The first test that needs it starts it.
func startBrowser(t *testing.T) context.Context {
	t.Helper()
	path := findProgram(t, "chromium", "chromium-browser", "google-chrome")
	browserStart.Do(func() {
		ctx, stop := chromedp.NewExecAllocator(context.Background(), append(chromedp.DefaultExecAllocatorOptions[:],
			chromedp.ExecPath(path),
			chromedp.NoSandbox, // containers seldom allow one; all that is opened is our own page
			chromedp.DisableGPU,
			chromedp.Flag("disable-quic", true),
			chromedp.Flag("disable-component-update", true),
			chromedp.Flag("no-proxy-server", true),
		)...)
		ctx, cancel := chromedp.NewContext(ctx)
		theBrowser, errBrowser = ctx, chromedp.Do(ctx)
		stopBrowser = func() {
			cancel()
			stop()
		}
	})
	if errBrowser != nil {
		t.Fatal(errBrowser)
	}
	return theBrowser
}

// A tab shows the example's page.
type tab struct {
	t   *testing.T
	ctx context.Context
}

// openTabs opens a tab of the browser for each of the queries that follow the page's URL, and waits until all are
// connected.
func openTabs(t *testing.T, browser context.Context, s *process, queries ...string) []*tab {
	t.Helper()
	var tabs []*tab
	for _, query := range queries {
		tabs = append(tabs, openTab(t, browser, s.url+query))
	}
	for _, p := range tabs {
		p.waitState("open")
	}
	return tabs
}

// openTab opens one tab of the browser.
func openTab(t *testing.T, browser context.Context, url string) *tab {
	t.Helper()
	ctx, closeTab := chromedp.NewContext(browser)
	t.Cleanup(closeTab)
	ctx, cancel := context.WithTimeout(ctx, 3*patience) // for what is not waited for with patience
	t.Cleanup(cancel)
	p := &tab{t, ctx}
	p.open(url)
	return p
}

// do fails the test unless the browser does all steps.
func (p *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	if err := chromedp.Do(p.ctx, steps...); err != nil {
		p.t.Fatal(err)
	}
}

// open opens the page for the first time. If the page throws an exception or violates its own policy, the test fails at
// its end.
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
		beforeLoad(`Math.random = () => 0.02; `+inside),
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

// inside is a function of each page: it returns what has the elements of the chat, which is the shadow root of <chat-room>.
const inside = `var inside = () => document.querySelector("chat-room")?.shadowRoot ?? document;`

// shown selects an element of the chat, or of the page around it.
func shown(selector string) chromedp.JSPath {
	s := jsString(selector)
	return chromedp.JSPath(`inside().querySelector(` + s + `) ?? document.querySelector(` + s + `)`)
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
	wait := chromedp.Evaluate[bool](`new Promise((resolve) => {
		const check = () => {
			if (!(`+condition+`)) return;
			observer.disconnect();
			resolve(true);
		};
		const observer = new MutationObserver(check);
		for (const root of new Set([document, inside()])) {
			observer.observe(root, { subtree: true, childList: true, attributes: true, characterData: true });
		}
		check();
	})`, chromedp.EvalAwaitPromise)
	_, err := chromedp.Run(ctx, wait)
	for err != nil && ctx.Err() == nil && strings.Contains(err.Error(), "navigated") { // a page that was about to be left
		_, err = chromedp.Run(ctx, wait)
	}
	if err != nil {
		shown, _ := chromedp.Run(p.ctx, chromedp.Evaluate[string](`(inside().querySelector("#room") ?? document.body).innerText`))
		p.t.Fatalf("waiting for %s: %v; the page shows:\n%s", condition, err, shown)
	}
}

// waitState waits until the page shows one of the states of the connection.
func (p *tab) waitState(states ...string) {
	p.t.Helper()
	p.waitFor(jsString(states) + `.includes(inside().querySelector(".state").dataset.state)`)
}

// A shownMessage is a message as a tab shows it.
type shownMessage struct {
	Name string `json:"name"`
	Text string `json:"text"`
}

// jsMessages is the tab's messages, as an array of shownMessage.
const jsMessages = `[...inside().querySelectorAll(".message")].map((m) => ({
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

// setName types a name over the one that the page has made up, and waits until the page is connected with it.
func (p *tab) setName(name string) {
	p.t.Helper()
	p.typeName(name)
	p.waitPeople(name)
	p.waitState("open")
}

// typeName types a name over the one that the page has made up.
func (p *tab) typeName(name string) {
	p.t.Helper()
	p.waitFor(`inside().querySelector("#name")?.checkVisibility()`)
	evaluate[bool](p, `(inside().querySelector("#name").select(), true)`)
	p.do(typeInto("#name", name), enter)
}

// waitPeople waits until the page lists people, whoever else is here.
func (p *tab) waitPeople(names ...string) {
	p.t.Helper()
	p.waitFor(jsString(names) + `.every((name) => [...inside().querySelectorAll("#people .name")].some((n) => n.textContent === name))`)
}

// send types a message and sends it.
func (p *tab) send(text string) {
	p.t.Helper()
	p.do(typeInto("#text", text), enter)
}

// typeInto writes text into a field, all at once as on-screen keyboards do.
func typeInto(selector, text string) chromedp.Action[chromedp.Void] {
	return chromedp.Steps(
		chromedp.Focus(shown(selector)),
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
	return evaluate[string](p, `inside().querySelector("#text").value`)
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
	t.Parallel()
	browser := startBrowser(t)
	for _, row := range []struct {
		name string
		test func(*testing.T, context.Context)
	}{
		{"message appears in both windows", testMessageAppearsInBothWindows},
		{"rooms are apart", testRoomsAreApart},
		{"switches rooms", testSwitchesRooms},
		{"shows whatever comes as text", testShowsWhateverComesAsText},
		{"shows whatever name as one", testShowsWhateverNameAsOne},
		{"shows a name like no other", testShowsANameLikeNoOther},
		{"reconnects by itself", testReconnectsByItself},
		{"says why it does not reconnect", testSaysWhyItDoesNotReconnect},
		{"shows the history", testShowsTheHistory},
		{"shows who is here", testShowsWhoIsHere},
		{"says how many messages were missed", testSaysHowManyWereMissed},
		{"says that the room has started anew", testSaysThatTheRoomHasStartedAnew},
		{"keeps the draft", testKeepsTheDraft},
		{"says that a message was dropped", testSaysThatAMessageWasDropped},
		{"shows that a message was not sent", testShowsThatAMessageWasNotSent},
		{"shows that a message has arrived after all", testShowsThatAMessageHasArrivedAfterAll},
		{"shows as much as it can", testShowsAsMuchAsItCan},
		{"sends under a new name what waits", testSendsUnderANewNameWhatWaits},
		{"draws in both windows", testDrawsInBothWindows},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			row.test(t, browser)
		})
	}
}

func testMessageAppearsInBothWindows(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	tabs := openTabs(t, browser, s, "", "")
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
	s := startProcess(t, "", exampleSite(t))
	tabs := openTabs(t, browser, s, "?room=garden", "#garden", "")
	garden, sameGarden, lobby := tabs[0], tabs[1], tabs[2]

	garden.send("in the garden")
	sameGarden.waitFor(`inside().querySelector(".text")?.textContent === "in the garden"`)
	// Had it come to the lobby, it would stand before what is said there later.
	lobby.send("in the lobby")
	lobby.waitMessage("You", "in the lobby")
	if got, want := len(lobby.messages()), 1; got != want {
		t.Errorf("got %d messages in the lobby, want %d", got, want)
	}
}

func testSwitchesRooms(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	p := openTabs(t, browser, s, "")[0]
	stays := s.joinEvents("/chat/lobby?name=Eve")
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
	eventually(t, "the page to have left the lobby", func() bool { return stays.ask(map[string]any{}).Clients == 1 })
	there := s.join("/chat/ros%C3%A9%20&%20r%C3%A4der-50%25?name=Ada")
	there.text("the URL names the hub")
	p.waitMessage("Ada", "the URL names the hub")

	p.do(chromedp.NavigateBack())
	p.waitFor(`document.querySelector("#room").textContent === "lobby"`)
	p.waitState("open")
	p.waitMessage("You", "in the lobby")
}

func testShowsWhateverComesAsText(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	p := openTabs(t, browser, s, "")[0]
	const markup = `<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>`
	p.setName("Ada")

	p.send(markup)
	p.waitMessage("You", markup)
	for _, row := range []struct{ user, text, name string }{
		{"", "nobody in particular", "Somebody"},
		{"", `{"name":"Ada","text":"no more than text"}`, "Somebody"},
		{"<b>Eve</b>", markup, "<b>Eve</b>"},
		{"You", "not me", "You"},
		{"\u202eevE\n\n", "odd name", "U+202EevEU+000AU+000A"},
		{"Ada", "see https://example.com/a?b=<i>.", "Ada"}, // of that name, but not the one in this window
	} {
		peer := s.join("/chat/lobby?name=" + url.QueryEscape(row.user))
		peer.text(row.text)
		p.waitMessage(row.name, row.text)
	}
	// What is no text has no place in the page; what follows it has.
	peer := s.join("/chat/lobby?name=Eve")
	peer.send(websocket.BinaryMessage, "\x00\xff")
	peer.text("")
	peer.text("the end")
	p.waitMessage("Eve", "the end")

	if got, want := len(p.messages()), 8; got != want {
		t.Errorf("got %d messages, want %d", got, want)
	}
	if got, want := evaluate[int](p, `inside().querySelectorAll("#log :is(img, script, b, i)").length`), 0; got != want {
		t.Errorf("got %d elements from messages, want %d", got, want)
	}
	if got, want := evaluate[[]string](p, `[...inside().querySelectorAll("#log a")].map((a) => a.href)`),
		"https://example.com/a?b="; len(got) != 1 || got[0] != want {
		t.Errorf("got links %q, want %q", got, want)
	}
	if got, want := evaluate[int](p, `inside().querySelectorAll(".mine").length`), 1; got != want {
		t.Errorf("got %d messages as one's own, want %d", got, want)
	}
	if got, want := evaluate[string](p, `document.title`), "lobby"; !strings.Contains(got, want) {
		t.Errorf("got title %q, want one with %q", got, want)
	}
}

// A name is as long as it likes, and may turn around what stands beside it.
func testShowsWhateverNameAsOne(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	p := openTabs(t, browser, s, "")[0]
	p.do(chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetDeviceMetricsOverride,
			emulation.SetDeviceMetricsOverrideParams{Width: 360, Height: 640, DeviceScaleFactor: 1, Mobile: true})
		return err
	}))
	long := strings.Repeat("W", 31) + "…"
	s.join("/chat/lobby?name=\u202eevE")
	p.waitPeople("U+202EevE")
	s.join("/chat/lobby?name=" + strings.Repeat("W", 1000))
	p.waitPeople(long)
	p.waitFor(`inside().querySelector("#messages").innerText.includes(` + jsString(long+" joined") + `)`)
	if got := evaluate[[]int](p, `["#log", "#people"].map((id) => inside().querySelector(id)).map((e) => e.scrollWidth - e.clientWidth)`); got[0] > 0 || got[1] > 0 {
		t.Errorf("got messages and people %v pixels wider than their place", got)
	}
}

// testShowsANameLikeNoOther has names with characters that show nothing, or that cover what stands beside them.
func testShowsANameLikeNoOther(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	p := openTabs(t, browser, s, "")[0]
	rows := []struct{ user, name string }{
		{"Ada", "Ada"},
		{"A\u200bda", "AU+200Bda"},
		{"Ada\ufe0f", "AdaU+FE0F"},
		{"Ada\u034f", "AdaU+034F"},
		{"Ada\u00a0", "AdaU+00A0"},
		{"Ada ", "AdaU+0020"},
		{" Ada", "U+0020Ada"},
		{"Ada  L", "Ada U+0020L"},
		{"Ada\x00", "AdaU+0000"},
		{"\u3164", "U+3164"},
		{"\u2800", "U+2800"},
		{"\U000e0041", "U+E0041"},
		{"\u0301a", "U+0301a"},
		{"a\u0301", "á"},
		{"q" + strings.Repeat("\u0301", 6), "q\u0301\u0301U+0301U+0301U+0301U+0301"},
		{"👩\u200d💻❤\ufe0f1\ufe0f\u20e3", "👩\u200d💻❤\ufe0f1\ufe0f\u20e3"},
		{"👩\ufe0f", "👩U+FE0F"},
		{"Zoë & Дмитрий, 李 (2)", "Zoë & Дмитрий, 李 (2)"},
		{"นี้ हिन्दी", "นี้ हिन्दी"},
	}
	var peers []*peer
	for _, row := range rows {
		peers = append(peers, s.join("/chat/lobby?name="+url.QueryEscape(row.user)))
	}
	for i, row := range rows {
		peers[i].text("hello")
		p.waitMessage(row.name, "hello")
	}
	for _, row := range rows {
		p.waitPeople(row.name)
	}
	eve := s.join("/chat/lobby?name=Eve")
	eve.text("q" + strings.Repeat("\u0301", 50) + " end")
	p.waitMessage("Eve", "q"+strings.Repeat("\u0301", 4)+" end")
}

func testReconnectsByItself(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	tabs := openTabs(t, browser, s, "", "")
	a, b := tabs[0], tabs[1]
	a.send("before")
	b.waitMessage("You", "before") // the windows have one user

	s.unload()
	for _, p := range tabs {
		p.waitState("connecting", "waiting")
		p.waitFor(`inside().querySelector("#state").textContent === "Reconnecting"`)
		p.waitFor(`inside().querySelector("#why").textContent.includes("connection is lost")`)
	}
	// What is written in the meantime waits.
	a.send("first, in patience")
	a.send("second, in patience")
	a.waitFor(`inside().querySelectorAll(".pending").length === 2`)
	if got := a.draft(); got != "" {
		t.Errorf("got %q in the box after a message that waits, want it empty", got)
	}

	s.load(exampleSite(t))
	for _, p := range tabs {
		p.waitState("open")
		p.waitFor(`inside().querySelector("#trouble").hidden`)
	}
	a.waitFor(`!inside().querySelector(".pending")`)
	b.waitMessage("You", "second, in patience")
	for _, p := range tabs {
		var got []string
		for _, m := range p.messages() {
			got = append(got, m.Text)
		}
		if want := []string{"before", "first, in patience", "second, in patience"}; !slices.Equal(got, want) {
			t.Errorf("got messages %q, want %q", got, want)
		}
	}
}

func testSaysWhyItDoesNotReconnect(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t, "chat_broadcast /chat/news {\n\t\tread_only\n\t}"))
	p := openTabs(t, browser, s, "?room=news")[0]
	p.waitFor(`document.querySelector("chat-room").readOnly`)
	evaluate[bool](p, `(document.querySelector("chat-room").readOnly = false, true)`) // or it would have no text box
	p.send("may I?")
	p.waitState("closed")
	p.waitFor(`inside().querySelector("#why").textContent.includes("(1008 read_only)")`)
	p.waitFor(`inside().querySelector(".gone .text").textContent === "may I?"`)
	p.send("and now?")
	p.waitFor(`inside().querySelector("#hint").textContent.startsWith("Not sent")`)
	if got, want := p.draft(), "and now?"; got != want {
		t.Errorf("got %q in the box after a message that was not taken, want %q", got, want)
	}
	p.do(chromedp.Click(shown("#connect")))
	p.waitState("open")
}

func testShowsTheHistory(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	a := openTabs(t, browser, s, "")[0]
	a.setName("Ada")
	a.send("first")
	a.send("second")
	a.waitMessage("You", "second")
	a.waitFor(`!inside().querySelector(".pending")`)

	evaluate[bool](a, `(localStorage.clear(), true)`) // so that the next page has another user
	b := openTabs(t, browser, s, "")[0]
	b.waitMessage("Ada", "second")
	if got, want := b.messages(), []shownMessage{{"Ada", "first"}, {"Ada", "second"}}; !slices.Equal(got, want) {
		t.Errorf("the page that joins: got %v, want %v", got, want)
	}
	if got, want := evaluate[string](b, `document.title`), "lobby · chat"; got != want {
		t.Errorf("got title %q, want %q: old messages are not unread", got, want)
	}
	// A user that comes back sees the same messages, and the page marks their own.
	a.do(chromedp.Reload())
	a.waitMessage("You", "second")
	if got, want := a.messages(), []shownMessage{{"You", "first"}, {"You", "second"}}; !slices.Equal(got, want) {
		t.Errorf("got %v after a reload of the page, want %v", got, want)
	}
}

func testShowsWhoIsHere(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	tabs := openTabs(t, browser, s, "", "")
	a, b := tabs[0], tabs[1]
	a.setName("Ada")
	b.setName("Bob")
	a.waitPeople("Ada", "Bob")

	cid := s.join("/chat/lobby?name=Cid")
	for _, p := range tabs {
		p.waitPeople("Ada", "Bob", "Cid")
		p.waitFor(`inside().querySelector("#messages").innerText.includes("Cid")`)
	}
	second := s.join("/chat/lobby?name=Cid")
	a.waitFor(`inside().querySelector("#people").innerText.includes("2 windows")`)
	second.conn.Close()
	cid.conn.Close()
	for _, p := range tabs {
		p.waitFor(`inside().querySelector("#people").textContent.includes("Cid") === false`)
		p.waitFor(`inside().querySelector("#present").textContent === "2"`)
	}
	b.setName("Grace")
	a.waitPeople("Ada", "Grace")
	a.waitFor(`inside().querySelector("#present").textContent === "2"`)
	b.waitFor(`inside().querySelector("#people li:nth-child(2)").textContent.endsWith("Graceyou")`)
	// Grace was Bob, so her page does not report that Bob has left.
	b.waitFor(`!inside().querySelector("#people").textContent.includes("Bob")`)
	if got := evaluate[string](b, `inside().querySelector("#messages").textContent`); strings.Contains(got, "Bob") {
		t.Errorf("got %q, want no word of Bob on the page of Grace", got)
	}
}

func testSaysHowManyWereMissed(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	line := startLine(t, s.http)
	p := openTab(t, browser, line.url)
	p.waitState("open")
	p.setName("Ada")
	peer := s.join("/chat/lobby?name=Eve")
	p.waitPeople("Eve") // the page says that she has joined, before what comes next
	peer.text("before")
	p.waitMessage("Eve", "before")

	line.cut()
	p.waitState("connecting", "waiting")
	p.send("hello from nowhere")
	p.waitFor(`inside().querySelector(".pending")`)
	for i := range 103 {
		peer.text(fmt.Sprint("message ", i+1))
		peer.next()
	}
	line.restore()
	p.waitFor(`inside().querySelector(".missed")?.innerText.startsWith("3 messages missed")`)
	p.waitFor(`!inside().querySelector(".pending")`)
	p.waitMessage("You", "hello from nowhere")
	got := p.messages()
	if want := 1 + 100 + 1; len(got) != want {
		t.Fatalf("got %d messages, want %d", len(got), want)
	}
	if want := (shownMessage{"Eve", "message 4"}); got[1] != want {
		t.Errorf("got %v first after what was missed, want %v", got[1], want)
	}
	if got, want := evaluate[string](p, `inside().querySelector(".missed").previousElementSibling.querySelector(".text").textContent`),
		"before"; got != want {
		t.Errorf("got the notice below %q, want it below %q", got, want)
	}
}

func testSaysThatTheRoomHasStartedAnew(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	p := openTabs(t, browser, s, "")[0]
	p.send("before")
	p.waitMessage("You", "before")
	evaluate[bool](p, `{ // it is twelve o'clock
		window.hour = 12;
		Date = class extends Date { constructor(...at) { super(...at.length ? at : [2026, 10, 23, hour]); } };
		true;
	}`)
	s.unload()
	p.waitState("connecting", "waiting")
	lost := evaluate[string](p, `new Date().toLocaleString([], { hour: "numeric", minute: "2-digit" })`)
	p.waitFor(`inside().querySelector("#why").textContent.includes("connection is lost")`)
	evaluate[int](p, `window.hour = 13`)
	s.load(exampleSite(t))
	p.waitFor(`(({ innerText = "" } = {}) => innerText.includes("started anew") && innerText.includes(` + jsString("since "+lost) + `))(inside().querySelector(".missed") ?? undefined)`)
	p.send("after")
	p.waitMessage("You", "after")
	if got, want := p.messages(), []shownMessage{{"You", "before"}, {"You", "after"}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func testKeepsTheDraft(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	line := startLine(t, s.http)
	p := openTab(t, browser, line.url)
	p.waitState("open")
	p.do(typeInto("#text", "what I always wanted to"))

	line.cut()
	p.waitState("connecting", "waiting")
	line.restore()
	p.waitState("open")
	p.waitFor(`inside()?.querySelector("#text")`)
	if got, want := p.draft(), "what I always wanted to"; got != want {
		t.Errorf("got %q in the box after a reconnect, want %q", got, want)
	}

	p.do(chromedp.Reload())
	p.waitState("open")
	p.waitFor(`inside()?.querySelector("#text")`)
	if got, want := p.draft(), "what I always wanted to"; got != want {
		t.Errorf("got %q in the box after a reload of the page, want %q", got, want)
	}

	// What waits to be sent when the page is left is not lost, either.
	line.refuseUpgrades()
	p.waitState("connecting", "waiting")
	p.do(typeInto("#text", " say"), enter)
	p.waitFor(`inside().querySelector(".pending")`)
	p.do(chromedp.Reload())
	p.waitFor(`inside().querySelector("#text")?.value === "what I always wanted to say"`)
	line.restore()
	p.waitState("open")
	p.send("")
	p.waitMessage("You", "what I always wanted to say")
	// Other rooms have their own.
	p.do(typeInto("#text", "for the lobby"))
	evaluate[bool](p, `(location.hash = "garden", location.search = "?room=garden", true)`)
	p.waitFor(`document.querySelector("#room")?.textContent === "garden"`)
	p.waitFor(`inside()?.querySelector("#text")`)
	if got := p.draft(); got != "" {
		t.Errorf("got %q in the box in another room, want it empty", got)
	}
}

func testSaysThatAMessageWasDropped(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t, "chat_broadcast /chat/slow {\n\t\trate 2 1h\n\t}"))
	p := openTabs(t, browser, s, "?room=slow")[0]
	evaluate[bool](p, `(performance.now = () => Infinity, true)`) // for which every bucket is full
	for _, text := range []string{"one", "two", "three"} {
		p.send(text)
	}
	p.waitFor(`inside().querySelector(".gone")?.innerText.includes("too much in too short a time")`)
	if got, want := evaluate[string](p, `inside().querySelector(".gone .text").textContent`), "three"; got != want {
		t.Errorf("got %q as the message that was dropped, want %q", got, want)
	}
	p.do(chromedp.Click(shown(".gone button")))
	p.waitFor(`inside().querySelectorAll(".message").length === 3`)
}

// The notices after the last message are in sight.
func testShowsThatAMessageWasNotSent(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t, "chat_broadcast /chat/slow {\n\t\trate 2 1h\n\t}"))
	p := openTabs(t, browser, s, "?room=slow")[0]
	evaluate[bool](p, `(performance.now = () => Infinity, true)`) // for which every bucket is full
	p.send(strings.Repeat("many\n", 40) + "lines")
	for _, text := range []string{"two", "three"} {
		p.send(text)
	}
	p.waitFor(`inside().querySelector(".gone .failed span")?.textContent`)
	if got := evaluate[float64](p, `new Promise((resolve) => requestAnimationFrame(() => setTimeout(() => {
			const log = inside().querySelector("#log");
			resolve(log.scrollHeight - log.clientHeight - log.scrollTop);
		})))`); got > 1 {
		t.Errorf("got the end of the messages %v pixels out of sight", got)
	}
}

// A message may be in the history although its answer got lost.
func testShowsThatAMessageHasArrivedAfterAll(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	line := startLine(t, s.http)
	p := openTab(t, browser, line.url)
	p.waitState("open")
	peer := s.join("/chat/lobby?name=Eve")
	line.silence()
	p.send("hello?")
	peer.wantText("hello?")
	p.typeName("Ada")
	p.waitFor(`inside().querySelector(".gone .failed span").textContent === "This may not have arrived."`)
	line.restore()
	p.waitState("open")
	peer.text("hello!")
	p.waitMessage("Eve", "hello!")
	if got := evaluate[int](p, `inside().querySelectorAll(".gone").length`); got != 0 || len(p.messages()) != 2 {
		t.Errorf("got %v, %d of them as if they had not arrived", p.messages(), got)
	}
}

// Neither a long message nor many make the page slow.
func testShowsAsMuchAsItCan(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	p := openTabs(t, browser, s, "")[0]
	peer := s.join("/chat/lobby?name=Eve")
	go peer.drain()
	for range 510 {
		peer.text("more")
	}
	peer.text(strings.Repeat("x", 10_000))
	p.waitMessage("Eve", strings.Repeat("x", 4000)+"…")
	if got, limit := evaluate[int](p, `inside().querySelector("#messages").childElementCount`), 500; got > limit {
		t.Errorf("got %d messages shown, want at most %d", got, limit)
	}
}

func testSendsUnderANewNameWhatWaits(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	line := startLine(t, s.http)
	p := openTab(t, browser, line.url)
	p.waitState("open")
	peer := s.join("/chat/lobby?name=Eve")
	line.cut()
	p.waitState("connecting", "waiting")
	p.do(typeInto("#text", "日本"))
	evaluate[bool](p, `inside().querySelector("#text").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", isComposing: true }))`)
	if got, want := p.draft(), "日本"; got != want {
		t.Fatalf("got %q in the box after an Enter that ends a word, want %q", got, want)
	}
	p.do(enter)
	p.waitFor(`inside().querySelector(".pending")`)
	p.typeName("Ada")
	line.restore()
	peer.wantText("日本")
	p.waitFor(`!inside().querySelector(".pending, .gone")`)
	p.waitPeople("Ada", "Eve")
}

func testDrawsInBothWindows(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	a, b := openTab(t, browser, s.url+"canvas.html"), openTab(t, browser, s.url+"canvas.html")
	for _, p := range []*tab{a, b} {
		p.waitFor(`inside().querySelector("#state").textContent.startsWith("2 here")`)
	}
	const lines = `[...inside().querySelectorAll("polyline")].map((l) => l.getAttribute("points") + l.style.stroke).join()`
	for _, event := range []input.DispatchMouseEventParams{
		{Type: input.DispatchMouseEventTypeMousePressed, X: 200, Y: 200, Button: input.MouseButtonLeft, Buttons: 1, ClickCount: 1},
		{Type: input.DispatchMouseEventTypeMouseMoved, X: 250, Y: 220, Button: input.MouseButtonLeft, Buttons: 1},
		{Type: input.DispatchMouseEventTypeMouseMoved, X: 300, Y: 300, Button: input.MouseButtonLeft, Buttons: 1},
		{Type: input.DispatchMouseEventTypeMouseReleased, X: 300, Y: 300, Button: input.MouseButtonLeft, ClickCount: 1},
	} {
		a.do(chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
			_, err := cdp.Call(ctx, t, input.DispatchMouseEvent, event)
			return err
		}))
	}
	drawn := evaluate[string](a, lines)
	if drawn == "" {
		t.Fatal("got no line where it is drawn")
	}
	b.waitFor(lines + " === " + jsString(drawn))
	c := openTab(t, browser, s.url+"canvas.html")
	c.waitFor(lines + " === " + jsString(drawn))

	request(t, http.MethodDelete, "http://"+s.admin+"/chat_broadcast/hubs/http:%2F%2F"+s.http+"%2Fcanvas%2Fsheet", nil) // they are kicked, for good
	c.waitFor(`inside().querySelector("#state").textContent.startsWith("Disconnected")`)
}

// TestExample_Sizes holds the example to what docs/clients.md says about it.
func TestExample_Sizes(t *testing.T) {
	module, err := os.ReadFile("client/chat.js")
	if err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	if _, err := w.Write(module); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if got, limit := packed.Len(), 6<<10; got >= limit {
		t.Errorf("got chat.js of %d bytes with gzip, want less than %d", got, limit)
	}
	canvas, err := os.ReadFile("example/canvas.html")
	if err != nil {
		t.Fatal(err)
	}
	if got, limit := strings.Count(string(canvas), "\n"), 60; got >= limit {
		t.Errorf("got canvas.html of %d lines, want less than %d", got, limit)
	}
}

// A line is the network between a browser and Caddy.
type line struct {
	server string // where Caddy listens
	url    string // of the site, through the line

	mu       sync.Mutex // guards what follows
	conns    map[net.Conn]bool
	down     bool          // nothing gets through
	upgrades bool          // nothing that asks for WebSocket does
	silent   bool          // what Caddy sends does not
	deaf     bool          // what the browser sends does not
	changed  chan struct{} // closed with the next change
}

func startLine(t *testing.T, server string) *line {
	t.Helper()
	listener, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &line{
		server:  server,
		url:     fmt.Sprintf("http://localhost:%d/", listener.Addr().(*net.TCPAddr).Port),
		conns:   map[net.Conn]bool{},
		changed: make(chan struct{}),
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // the test is over
			}
			running.Go(func() { l.serve(conn) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		l.cut()
		running.Wait()
	})
	return l
}

func (l *line) serve(browser net.Conn) {
	defer browser.Close()
	server, err := net.Dial("tcp", l.server)
	if err != nil {
		return
	}
	defer server.Close()
	_ = server.(*net.TCPConn).SetReadBuffer(64 << 10) // what is held up here holds up Caddy, too
	if !l.set(func() { l.conns[browser], l.conns[server] = true, true }) {
		return
	}
	defer l.set(func() {
		delete(l.conns, browser)
		delete(l.conns, server)
	})
	var both sync.WaitGroup
	both.Go(func() { l.copy(server, browser, &l.deaf) })
	both.Go(func() { l.copy(browser, server, &l.silent) })
	both.Wait()
}

// copy relays until one end is gone, and waits while *held.
func (l *line) copy(to, from net.Conn, held *bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		for {
			l.mu.Lock()
			wait, gone, changed := *held, !l.conns[from], l.changed
			refused := l.upgrades && strings.Contains(string(buf[:n]), "Upgrade: websocket")
			l.mu.Unlock()
			if gone || refused {
				return
			}
			if !wait {
				break
			}
			<-changed
		}
		if err != nil {
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// set changes the line. It returns whether the line is up.
func (l *line) set(change func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	close(l.changed)
	l.changed = make(chan struct{})
	return !l.down
}

// cut breaks all connections and lets no new one through.
func (l *line) cut() { l.breakAll(func() { l.down = true }) }

// blink breaks all connections.
func (l *line) blink() { l.breakAll(func() {}) }

// refuseUpgrades breaks all connections and lets no WebSocket through.
func (l *line) refuseUpgrades() { l.breakAll(func() { l.upgrades = true }) }

func (l *line) breakAll(change func()) {
	l.set(func() {
		change()
		for conn := range l.conns {
			conn.Close()
			delete(l.conns, conn)
		}
	})
}

func (l *line) silence() { l.set(func() { l.silent = true }) }
func (l *line) deafen()  { l.set(func() { l.deaf = true }) }

// restore ends all of that.
func (l *line) restore() {
	l.set(func() { l.down, l.upgrades, l.silent, l.deaf = false, false, false, false })
}
