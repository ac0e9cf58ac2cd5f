package chatbroadcast

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
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
	wait := chromedp.Evaluate[bool](`new Promise((resolve) => {
		const check = () => {
			if (!(`+condition+`)) return;
			observer.disconnect();
			resolve(true);
		};
		const observer = new MutationObserver(check);
		observer.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
		check();
	})`, chromedp.EvalAwaitPromise)
	_, err := chromedp.Run(ctx, wait)
	for err != nil && ctx.Err() == nil && strings.Contains(err.Error(), "navigated") { // a page that was about to be left
		_, err = chromedp.Run(ctx, wait)
	}
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

// setName types a name over the one that the page has made up, and waits until the page is connected with it.
func (p *tab) setName(name string) {
	p.t.Helper()
	evaluate[bool](p, `(document.querySelector("#name").select(), true)`)
	p.do(typeInto("#name", name), enter)
	p.waitPeople(name)
	p.waitState("open")
}

// waitPeople waits until the page lists people, whoever else is here.
func (p *tab) waitPeople(names ...string) {
	p.t.Helper()
	p.waitFor(jsString(names) + `.every((name) => [...document.querySelectorAll("#people .name")].some((n) => n.textContent === name))`)
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
	sameGarden.waitFor(`document.querySelector(".text")?.textContent === "in the garden"`)
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
	p.waitFor(`document.querySelector("#messages").innerText.includes(` + jsString(long+" joined") + `)`)
	if got := evaluate[[]int](p, `[log.scrollWidth - log.clientWidth, people.scrollWidth - people.clientWidth]`); got[0] > 0 || got[1] > 0 {
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
		{"q" + strings.Repeat("\u0301", 6), "q\u0301\u0301\u0301\u0301U+0301U+0301"},
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
	b.waitMessage(b.nameOf(a), "before")

	s.unload()
	for _, p := range tabs {
		p.waitState("connecting", "waiting")
		p.waitFor(`document.querySelector("#state").textContent === "Reconnecting"`)
		p.waitFor(`document.querySelector("#why").textContent.includes("connection is lost")`)
	}
	// What is written in the meantime waits.
	a.send("first, in patience")
	a.send("second, in patience")
	a.waitFor(`document.querySelectorAll(".pending").length === 2`)
	if got := a.draft(); got != "" {
		t.Errorf("got %q in the box after a message that waits, want it empty", got)
	}

	s.load(exampleSite(t))
	for _, p := range tabs {
		p.waitState("open")
		p.waitFor(`document.querySelector("#trouble").hidden`)
	}
	a.waitFor(`!document.querySelector(".pending")`)
	b.waitMessage(b.nameOf(a), "second, in patience")
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

// nameOf returns the name under which p sees what other sends.
func (p *tab) nameOf(other *tab) string {
	p.t.Helper()
	return evaluate[string](other, `document.querySelector("#name").value`)
}

func testSaysWhyItDoesNotReconnect(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t, "chat_broadcast /chat/news {\n\t\tread_only\n\t}"))
	p := openTabs(t, browser, s, "?room=news")[0]
	p.send("may I?")
	p.waitState("closed")
	p.waitFor(`document.querySelector("#why").textContent.includes("(1008 read_only)")`)
	p.waitFor(`document.querySelector(".gone .text").textContent === "may I?"`)
	p.send("and now?")
	p.waitFor(`document.querySelector("#hint").textContent.startsWith("Not sent")`)
	if got, want := p.draft(), "and now?"; got != want {
		t.Errorf("got %q in the box after a message that was not taken, want %q", got, want)
	}
	p.do(chromedp.Click(chromedp.CSS("#connect")))
	p.waitState("open")
}

func testShowsTheHistory(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	a := openTabs(t, browser, s, "")[0]
	a.setName("Ada")
	a.send("first")
	a.send("second")
	a.waitMessage("You", "second")
	a.waitFor(`!document.querySelector(".pending")`)

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
		p.waitFor(`document.querySelector("#messages").innerText.includes("Cid")`)
	}
	second := s.join("/chat/lobby?name=Cid")
	a.waitFor(`document.querySelector("#people").innerText.includes("2 windows")`)
	second.conn.Close()
	cid.conn.Close()
	for _, p := range tabs {
		p.waitFor(`document.querySelector("#people").textContent.includes("Cid") === false`)
		p.waitFor(`document.querySelector("#present").textContent === "2"`)
	}
	b.setName("Grace")
	a.waitPeople("Ada", "Grace")
	a.waitFor(`document.querySelector("#present").textContent === "2"`)
	b.waitFor(`document.querySelector("#people li:nth-child(2)").textContent.endsWith("Graceyou")`)
	// Grace was Bob, so her page does not report that Bob has left.
	b.waitFor(`!document.querySelector("#people").textContent.includes("Bob")`)
	if got := evaluate[string](b, `document.querySelector("#messages").textContent`); strings.Contains(got, "Bob") {
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
	p.waitFor(`document.querySelector(".pending")`)
	for i := range 103 {
		peer.text(fmt.Sprint("message ", i+1))
		peer.next()
	}
	line.restore()
	p.waitFor(`document.querySelector(".missed")?.innerText.startsWith("3 messages missed")`)
	p.waitFor(`!document.querySelector(".pending")`)
	p.waitMessage("You", "hello from nowhere")
	got := p.messages()
	if want := 1 + 100 + 1; len(got) != want {
		t.Fatalf("got %d messages, want %d", len(got), want)
	}
	if want := (shownMessage{"Eve", "message 4"}); got[1] != want {
		t.Errorf("got %v first after what was missed, want %v", got[1], want)
	}
	if got, want := evaluate[string](p, `document.querySelector(".missed").previousElementSibling.querySelector(".text").textContent`),
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
	p.waitFor(`document.querySelector("#why").textContent.includes("connection is lost")`)
	evaluate[int](p, `window.hour = 13`)
	s.load(exampleSite(t))
	p.waitFor(`document.querySelector(".missed")?.innerText.includes("started anew")`)
	if got := evaluate[string](p, `document.querySelector(".missed").innerText`); !strings.Contains(got, "since "+lost) {
		t.Errorf("got %q, want it since %s", got, lost)
	}
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
	if got, want := p.draft(), "what I always wanted to"; got != want {
		t.Errorf("got %q in the box after a reconnect, want %q", got, want)
	}

	p.do(chromedp.Reload())
	p.waitState("open")
	if got, want := p.draft(), "what I always wanted to"; got != want {
		t.Errorf("got %q in the box after a reload of the page, want %q", got, want)
	}

	// What waits to be sent when the page is left is not lost, either.
	line.refuseUpgrades()
	p.waitState("connecting", "waiting")
	p.do(typeInto("#text", " say"), enter)
	p.waitFor(`document.querySelector(".pending")`)
	p.do(chromedp.Reload())
	p.waitFor(`document.querySelector("#text")?.value === "what I always wanted to say"`)
	line.restore()
	p.waitState("open")
	p.send("")
	p.waitMessage("You", "what I always wanted to say")
	// Other rooms have their own.
	p.do(typeInto("#text", "for the lobby"))
	evaluate[bool](p, `(location.hash = "garden", location.search = "?room=garden", true)`)
	p.waitFor(`document.querySelector("#room")?.textContent === "garden"`)
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
	p.waitFor(`document.querySelector(".gone")?.innerText.includes("too much in too short a time")`)
	if got, want := evaluate[string](p, `document.querySelector(".gone .text").textContent`), "three"; got != want {
		t.Errorf("got %q as the message that was dropped, want %q", got, want)
	}
	p.do(chromedp.Click(chromedp.CSS(".gone button")))
	p.waitFor(`document.querySelectorAll(".message").length === 3`)
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
	p.waitFor(`document.querySelector(".gone .failed span")?.textContent`)
	if got := evaluate[float64](p, `new Promise((resolve) => requestAnimationFrame(() => setTimeout(() =>
		resolve(log.scrollHeight - log.clientHeight - log.scrollTop))))`); got > 1 {
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
	evaluate[bool](p, `(document.querySelector("#name").select(), true)`)
	p.do(typeInto("#name", "Ada"), enter)
	p.waitFor(`document.querySelector(".gone .failed span").textContent === "This may not have arrived."`)
	line.restore()
	p.waitState("open")
	peer.text("hello!")
	p.waitMessage("Eve", "hello!")
	if got := evaluate[int](p, `document.querySelectorAll(".gone").length`); got != 0 || len(p.messages()) != 2 {
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
	if got, limit := evaluate[int](p, `messages.childElementCount`), 500; got > limit {
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
	evaluate[bool](p, `document.querySelector("#text").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", isComposing: true }))`)
	if got, want := p.draft(), "日本"; got != want {
		t.Fatalf("got %q in the box after an Enter that ends a word, want %q", got, want)
	}
	p.do(enter)
	p.waitFor(`document.querySelector(".pending")`)
	evaluate[bool](p, `(document.querySelector("#name").select(), true)`)
	p.do(typeInto("#name", "Ada"), enter)
	line.restore()
	peer.wantText("日本")
	p.waitFor(`!document.querySelector(".pending, .gone")`)
	p.waitPeople("Ada", "Eve")
}

func testDrawsInBothWindows(t *testing.T, browser context.Context) {
	s := startProcess(t, "", exampleSite(t))
	a, b := openTab(t, browser, s.url+"canvas.html"), openTab(t, browser, s.url+"canvas.html")
	for _, p := range []*tab{a, b} {
		p.waitFor(`document.querySelector("#state").textContent.startsWith("2 here")`)
	}
	const lines = `[...document.querySelectorAll("polyline")].map((l) => l.getAttribute("points") + l.style.stroke).join()`
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
	c.waitFor(`document.querySelector("#state").textContent.startsWith("Disconnected")`)
}

// TestExample_Sizes holds the example to what docs/clients.md says about it.
func TestExample_Sizes(t *testing.T) {
	module, err := os.ReadFile("example/chat.js")
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

// moduleSite has hubs of several kinds.
func moduleSite(t *testing.T) string {
	t.Helper()
	return exampleSite(t, `chat_broadcast /hub/plain/*
	chat_broadcast /hub/history/* {
		history 1000
		presence
		user {query.name}
		http_publish
	}
	chat_broadcast /hub/short/* {
		history 5
		http_publish
	}
	chat_broadcast /hub/close/* {
		history 5
		buffer 8
		http_publish
	}
	chat_broadcast /hub/skip/* {
		buffer 8
		on_lag skip
		http_publish
	}
	chat_broadcast /hub/rate/* {
		rate 2 1h
	}
	chat_broadcast /hub/pace/* {
		rate 4 1s
	}
	chat_broadcast /hub/listen/* {
		read_only
	}`)
}

// openModule opens a tab that has chat.js and listens to what it says.
func openModule(t *testing.T, browser context.Context, url string) *tab {
	t.Helper()
	p := openTab(t, browser, url)
	evaluate[bool](p, `import("/chat.js").then(({ Chat }) => {
		window.Chat = Chat;
		// A Chat whose events are kept in events, and change the document, so that one can wait for them.
		window.open = (url, options) => {
			const chat = new Chat(url, { base: 50, ...options });
			chat.events = [];
			for (const type of ["open", "message", "sent", "failed", "missed", "join", "leave", "presence", "error", "close", "state"]) {
				chat.addEventListener(type, (event) => {
					chat.events.push(Object.assign({}, event, { type }));
					document.body.dataset.events = chat.events.length;
				});
			}
			chat.all = (type, field) => chat.events.filter((e) => e.type === type).map((e) => field ? e[field] : e);
			return window.chat = chat;
		};
		// The number of a message's id, which begins with text that nobody can guess.
		window.short = (id) => id?.replace(/^([0-9]+-){4}/, "m");
		return true;
	})`)
	return p
}

// connect makes the tab's chat, and waits until it is open.
func (p *tab) connect(path, options string) {
	p.t.Helper()
	evaluate[bool](p, fmt.Sprintf(`(window.chat?.close(), open(%s, %s), true)`, jsString(path), options))
	p.waitFor(`chat.all("open").length > 0`)
}

// TestExample_ChatRecovers has chat.js lose its connection in every way.
func TestExample_ChatRecovers(t *testing.T) {
	t.Parallel()
	browser := startBrowser(t)
	for _, row := range []struct {
		name string
		test func(*testing.T, *process, *line, *tab)
	}{
		{"resumes without a gap or a double", testResumesWithoutAGapOrADouble},
		{"says how many are missed", testSaysHowManyAreMissed},
		{"sends once what was on its way", testSendsOnceWhatWasOnItsWay},
		{"sends once what waits", testSendsOnceWhatWaits},
		{"does not double as another user", testDoesNotDoubleAsAnotherUser},
		{"does not double in a new hub", testDoesNotDoubleInANewHub},
		{"notices that no answer comes", testNoticesThatNoAnswerComes},
		{"starved with on_lag close", testStarved("/hub/close/x")},
		{"starved with on_lag skip", testStarved("/hub/skip/x")},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s := startProcess(t, "", moduleSite(t))
			l := startLine(t, s.http)
			row.test(t, s, l, openModule(t, browser, l.url))
		})
	}
}

func testResumesWithoutAGapOrADouble(t *testing.T, s *process, l *line, p *tab) {
	peer := s.join("/hub/history/x")
	p.connect("/hub/history/x", "{}")
	var want []string
	for i := range 200 {
		text := fmt.Sprint(i)
		peer.text(text)
		peer.wantText(text)
		want = append(want, text)
		switch {
		case i%50 == 40:
			s.load(strings.Replace(moduleSite(t), "history 1000", fmt.Sprint("history ", 1001+i), 1))
		case i%20 == 10:
			l.cut()
		case i%20 == 15:
			l.restore()
		case i%20 == 19:
			l.blink()
			p.waitFor(`chat.state === "open" && chat.all("message").length > 0`)
		}
	}
	p.waitFor(`chat.all("message", "data").at(-1) === "199"`)
	if got := evaluate[[]string](p, `chat.all("message", "data")`); !slices.Equal(got, want) {
		t.Errorf("got %v, want 0 to 199", got)
	}
	if got := evaluate[int](p, `chat.all("missed").length`); got != 0 {
		t.Errorf("got %d times that messages were missed, want 0", got)
	}
	if got := evaluate[int](p, `chat.all("open").length`); got < 5 {
		t.Errorf("got %d connections, want some", got)
	}
}

func testSaysHowManyAreMissed(t *testing.T, s *process, l *line, p *tab) {
	keeper := s.join("/hub/short/x")
	p.connect("/hub/short/x", "{}")
	s.publish("/hub/short/x", "before")
	p.waitFor(`chat.all("message").length === 1`)
	l.cut()
	p.waitFor(`chat.state !== "open"`)
	for i := range 8 {
		s.publish("/hub/short/x", fmt.Sprint(i))
	}
	l.restore()
	p.waitFor(`chat.all("message").length === 6`)
	want := []string{"message before", "missed 3 false", "message 3", "message 4", "message 5", "message 6", "message 7"}
	if got := evaluate[[]string](p, `chat.events.filter(({ type }) => type === "message" || type === "missed")
		.map((e) => e.type === "missed" ? "missed " + e.count + " " + e.restarted : "message " + e.data)`); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	keeper.conn.Close()
}

// A connection breaks after a message was published and before the answer has come.
func testSendsOnceWhatWasOnItsWay(t *testing.T, s *process, l *line, p *tab) {
	peer := s.join("/hub/history/x")
	p.connect("/hub/history/x", "{}")
	for i := range 10 {
		text := fmt.Sprint(i)
		l.silence()
		evaluate[bool](p, `(chat.send("`+text+`"), true)`)
		peer.wantText(text)
		l.cut()
		p.waitFor(`chat.state !== "open"`)
		evaluate[bool](p, `(chat.send("then `+text+`"), true)`)
		l.restore()
		peer.wantText("then " + text) // and not the other again
		p.waitFor(fmt.Sprintf(`chat.all("sent").length === %d && chat.all("message").length === %[1]d`, 2*(i+1)))
	}
	if got := evaluate[bool](p, `String(chat.all("sent", "id").map(short)) === String([...Array(20).keys()].map((i) => "m" + (i + 1)))
		&& String(chat.all("sent", "seq")) === String(chat.all("message", "seq")) && chat.all("message", "own").every((own) => own)
		&& chat.all("failed").length === 0`); !got {
		t.Errorf("got %v, want each sent once", evaluate[[]any](p, `chat.events`))
	}
}

func testSendsOnceWhatWaits(t *testing.T, s *process, l *line, p *tab) {
	peer := s.join("/hub/history/x")
	p.connect("/hub/history/x", "{ queue: 50 }")
	l.cut()
	p.waitFor(`chat.state !== "open"`)
	if got, want := evaluate[int](p, `[...Array(60).keys()].filter((i) => chat.send(String(i)) === null).length`), 10; got != want {
		t.Errorf("got %d messages refused, want %d", got, want)
	}
	l.restore()
	for i := range 50 {
		peer.wantText(fmt.Sprint(i))
	}
	p.waitFor(`chat.all("sent").length === 50`)
	l.blink()
	p.waitFor(`chat.all("open").length > 2`)
	evaluate[bool](p, `(chat.send("the end"), true)`)
	peer.wantText("the end")
}

// The server remembers messages by their user: a client that has become another user must not send them again.
func testDoesNotDoubleAsAnotherUser(t *testing.T, s *process, l *line, p *tab) {
	peer := s.join("/hub/history/x")
	p.connect("/hub/history/x?name=Ada", "{}")
	l.silence()
	evaluate[bool](p, `(chat.url.searchParams.set("name", "Grace"), chat.send("on its way"), true)`)
	peer.wantText("on its way")
	l.cut()
	p.waitFor(`chat.state !== "open"`)
	evaluate[bool](p, `(chat.send("not yet sent"), true)`)
	l.restore()
	peer.wantText("not yet sent")
	p.waitFor(`chat.all("sent").length === 1`)
	got := evaluate[[]string](p, `[...chat.all("failed").map((e) => short(e.id) + e.data + e.code), ...chat.all("sent", "id").map(short)]`)
	if want := []string{"m1on its wayunknown", "m2"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func testDoesNotDoubleInANewHub(t *testing.T, s *process, l *line, p *tab) {
	p.connect("/hub/history/x", "{}")
	l.deafen()
	evaluate[bool](p, `(chat.send("on its way"), true)`)
	s.unload()
	p.waitFor(`chat.state !== "open"`)
	evaluate[bool](p, `(chat.send("not yet sent"), true)`)
	s.load(moduleSite(t))
	peer := s.join("/hub/history/x")
	l.restore()
	peer.wantText("not yet sent")
	p.waitFor(`chat.all("sent").length === 1`)
	got := evaluate[[]string](p, `[...chat.all("failed").map((e) => short(e.id) + e.data + e.code), ...chat.all("sent", "id").map(short),
		...chat.all("missed", "restarted").map(String)]`)
	if want := []string{"m1on its wayunknown", "m2", "true"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func testNoticesThatNoAnswerComes(t *testing.T, s *process, l *line, p *tab) {
	p.connect("/hub/history/x", "{ timeout: 100 }")
	l.deafen()
	evaluate[bool](p, `(chat.send("hello?"), true)`)
	p.waitFor(`chat.all("close", "code").includes(1006)`)
	l.restore()
	p.waitFor(`chat.all("sent").length === 1 && chat.all("message").length === 1`)
}

// testStarved publishes more than the network holds while nothing reaches the browser. Afterward the messages that it has
// got and those that the server has reported as missed must add up to all that were published.
func testStarved(path string) func(*testing.T, *process, *line, *tab) {
	return func(t *testing.T, s *process, l *line, p *tab) {
		keeper := s.join(path)
		go keeper.drain()
		p.connect(path, "{}")
		l.silence()
		const all = 150 // 9 MB: more than the network between them holds
		for i := range all {
			s.publish(path, fmt.Sprint(i, " ", strings.Repeat("x", 60_000)))
		}
		l.restore()
		s.publish(path, "the end")
		p.waitFor(`chat.all("message", "data").at(-1) === "the end"`)
		got := evaluate[map[string]int](p, `{
			const seqs = chat.all("message", "seq");
			({
				messages: seqs.length,
				missed: chat.all("missed", "count").reduce((a, b) => a + b, 0),
				disorder: seqs.filter((seq, i) => i > 0 && seq <= seqs[i - 1]).length,
			});
		}`)
		if got["messages"]+got["missed"] != all+1 || got["missed"] == 0 || got["disorder"] != 0 {
			t.Errorf("got %v, want %d messages in all, some of them missed", got, all+1)
		}
	}
}

// TestExample_ChatInNode runs chat.js where there is no page.
func TestExample_ChatInNode(t *testing.T) {
	t.Parallel()
	node := findProgram(t, "node")
	s := startProcess(t, "", moduleSite(t))
	peer := s.join("/hub/history/x")
	module, err := os.ReadFile("example/chat.js")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	// Node 20 has WebSocket with this flag only; later ones take it, too.
	cmd := exec.CommandContext(ctx, node, "--experimental-websocket", "--input-type=module")
	cmd.Stdin = strings.NewReader(string(module) + `
		let chat;
		try { new Chat("/hub/history/x"); } catch ({ name }) { console.log(name); }
		chat = new Chat("ws://` + s.http + `/hub/history/x?name=node");
		chat.addEventListener("message", ({ data, user, own }) => console.log(data, user, own));
		chat.url = "http://` + s.http + `/hub/history/x?name=node#top";
		let once = 0;
		chat.addEventListener("sent", ({ seq }) => {
			console.log(seq);
			chat.close();
			if (once++) return;
			chat.connect();
			chat.send("again");
		});
		chat.addEventListener("state", ({ state }) => state === "connecting" || console.log(state));
		chat.send("from node");
	`)
	got, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, got)
	}
	var lines []string
	for line := range strings.Lines(string(got)) {
		if !strings.HasSuffix(line, " node true\n") { // what it has sent, before or after the answer
			lines = append(lines, strings.TrimSuffix(line, "\n"))
		}
	}
	if want := []string{"TypeError", "open", "1", "closed", "open", "2", "closed"}; !slices.Equal(lines, want) {
		t.Errorf("got %q, want %q", lines, want)
	}
	peer.wantText("from node")
	peer.wantText("again")
}

// TestExample_ChatRaw runs chat.js against a server that knows nothing of the protocol.
func TestExample_ChatRaw(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	conns := map[*websocket.Conn]bool{}
	mux := http.NewServeMux()
	mux.Handle("/", http.FileServer(http.Dir("example")))
	mux.HandleFunc("/raw", func(w http.ResponseWriter, r *http.Request) {
		conn, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
		if err != nil {
			return
		}
		defer conn.Close()
		mu.Lock()
		conns[conn] = true
		mu.Unlock()
		for {
			opcode, payload, err := conn.ReadMessage()
			mu.Lock()
			if err != nil {
				delete(conns, conn)
				mu.Unlock()
				return
			}
			for c := range conns {
				_ = c.WriteMessage(opcode, payload) // the reader of a connection notices its end
			}
			mu.Unlock()
		}
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	p := openModule(t, startBrowser(t), s.URL)

	evaluate[bool](p, `(open("/raw", { raw: true }), chat.send("early"), true)`)
	p.waitFor(`chat.all("message").length === 1`)
	evaluate[bool](p, `(chat.send("text"), chat.send(new Uint8Array([0, 255])), true)`)
	p.waitFor(`chat.all("message").length === 3`)
	evaluate[bool](p, `(chat.addEventListener("state", ({ state }) => {
		if (state === "waiting" && chat.all("message").length === 3) chat.send("late");
	}), true)`)
	mu.Lock()
	for c := range conns {
		c.Close()
	}
	mu.Unlock()
	p.waitFor(`chat.all("close").length === 1`)
	p.waitFor(`chat.all("message").length === 4`)
	got := evaluate[string](p, `JSON.stringify([chat.all("message").map(({ data, seq }) => [typeof data === "string" ? data : [...data], seq ?? null]),
		chat.events.filter(({ type }) => !["message", "open", "state", "close"].includes(type)), chat.all("open").length])`)
	if want := `[[["early",null],["text",null],[[0,255],null],["late",null]],[],2]`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := evaluate[bool](p, `chat.who().then((answer) => { chat.close(); return answer === null; })`); !got {
		t.Error("got an answer to who, want none")
	}
}

// TestExample_ChatModule runs chat.js without the page, as applications do that copy it.
func TestExample_ChatModule(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "", moduleSite(t))
	p := openModule(t, startBrowser(t), s.url)

	t.Run("sends and goes", func(t *testing.T) {
		p := &tab{t, p.ctx}
		got := evaluate[map[string]any](p, `(async () => {
			const chat = new Chat("hub/plain/x#y");
			const next = (type) => new Promise((resolve) => chat.addEventListener(type, resolve, { once: true }));
			const sent = new Promise((resolve) => chat.addEventListener("sent", ({ id }) => short(id) === "m2" && resolve()));
			const got = { connecting: short(chat.send("a")) };
			got.first = (await next("message")).data;
			got.open = short(chat.send("b"));
			got.second = (await next("message")).data;
			await sent;
			const closed = next("close");
			chat.close();
			got.code = (await closed).code;
			got.closed = chat.send("c");
			chat.connect();
			await next("open");
			got.again = short(chat.send("d"));
			got.third = (await next("message")).data;
			const failed = next("failed");
			chat.send("e");
			chat.close();
			got.failed = (await failed).code;
			return got;
		})()`)
		want := map[string]any{
			"connecting": "m1", "first": "a", "open": "m2", "second": "b", "code": 1000.0,
			"closed": nil, "again": "m3", "third": "d", "failed": "unknown",
		}
		if !maps.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})

	t.Run("tells who said what and when", func(t *testing.T) {
		p := &tab{t, p.ctx}
		p.connect("/hub/history/y?name=Ada", "{}")
		peer := s.in(t).join("/hub/history/y?name=Bob")
		peer.text("from Bob")
		p.waitFor(`chat.all("message").length === 1`)
		evaluate[bool](p, `(chat.send("from Ada"), chat.send(new Uint8Array([0, 128, 255])), true)`)
		p.waitFor(`chat.all("message").length === 3 && chat.all("sent").length === 2`)
		s.in(t).publish("/hub/history/y", "from the site")
		p.waitFor(`chat.all("message").length === 4`)
		got := evaluate[string](p, `JSON.stringify(chat.all("message").map((m) => [typeof m.data === "string" ? m.data : [...m.data],
			m.seq, m.time instanceof Date && Math.abs(Date.now() - m.time) < 60000, Boolean(m.client), m.user, m.own, m.replayed]))`)
		want := `[["from Bob",1,true,true,"Bob",false,false],["from Ada",2,true,true,"Ada",true,false],` +
			`[[0,128,255],3,true,true,"Ada",true,false],["from the site",4,true,false,"",false,false]]`
		if got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		p.connect("/hub/history/y", "{}")
		p.waitFor(`chat.all("message").length === 4`)
		if got, want := evaluate[string](p, `JSON.stringify([...chat.all("message", "replayed"), ...chat.all("message", "own")])`),
			`[true,true,true,true,false,false,false,false]`; got != want {
			t.Errorf("got replayed and own %s, want %s", got, want)
		}
		peer.conn.Close()
	})

	t.Run("asks who is here", func(t *testing.T) {
		p := &tab{t, p.ctx}
		p.connect("/hub/history/z?name=Ada", "{}")
		for _, name := range []string{"Bob", "Cid", "Cid"} {
			s.in(t).join("/hub/history/z?name=" + name)
		}
		got := evaluate[string](p, `(async () => {
			const first = await chat.who({ limit: 2 });
			return JSON.stringify([first, await chat.who({ after: first.next }), await chat.who({ limit: -1 })]);
		})()`)
		want := `[{"clients":4,"users":[{"user":"Ada","clients":1},{"user":"Bob","clients":1}],"next":"Bob"},` +
			`{"clients":4,"users":[{"user":"Cid","clients":2}]},null]`
		if got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		p.connect("/hub/plain/z", "{}")
		if got := evaluate[bool](p, `chat.who().then((answer) => answer === null)`); !got {
			t.Error("got an answer to who without presence, want none")
		}
	})

	t.Run("says that a message was dropped", func(t *testing.T) {
		p := &tab{t, p.ctx}
		p.connect("/hub/rate/x", "{}")
		got := evaluate[string](p, `new Promise((resolve) => {
			performance.now = () => Infinity; // for which every bucket is full
			chat.addEventListener("failed", ({ id, data, code }) => resolve(short(id) + data + code));
			chat.send("a");
			chat.send("b");
			chat.send("c");
		})`)
		if want := "m3crate_limited"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})

	t.Run("keeps to the rate", func(t *testing.T) {
		p := openModule(t, p.ctx, s.url)
		peer := s.in(t).join("/hub/pace/x")
		p.connect("/hub/pace/x", "{}")
		evaluate[bool](p, `([...Array(12).keys()].forEach((i) => chat.send(String(i))), true)`)
		for i := range 12 {
			peer.wantText(fmt.Sprint(i))
		}
		p.waitFor(`chat.all("sent").length === 12`)
		if got := evaluate[bool](p, `chat.all("failed").length === 0 && chat.state === "open"`); !got {
			t.Errorf("got %v, want all sent", evaluate[[]any](p, `chat.events`))
		}
	})

	t.Run("gives up where it may not send", func(t *testing.T) {
		p := &tab{t, p.ctx}
		p.connect("/hub/listen/x", "{}")
		evaluate[bool](p, `(chat.send("a"), true)`)
		p.waitFor(`chat.all("failed").length === 1`)
		if got, want := evaluate[string](p, `chat.state + chat.all("failed", "code") + chat.all("close", "reason")`),
			"closedunknownread_only"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})

	// A wait of minutes is cut short by the network's return.
	t.Run("reconnects at once when online", func(t *testing.T) {
		p := &tab{t, p.ctx}
		evaluate[bool](p, `new Promise((resolve) => {
			Math.random = () => 1;
			window.patient = new Chat("/hub/plain/x", { base: 600_000, cap: 600_000 });
			patient.addEventListener("open", () => resolve(true));
		})`)
		evaluate[bool](p, `(window.lost = new Promise((resolve) =>
			patient.addEventListener("close", ({ code }) => resolve(code))), true)`)
		s.unload()
		if got, want := evaluate[int](p, `lost`), hub.CloseHubRemoved.Code; got != want {
			t.Errorf("got close code %d, want %d", got, want)
		}
		if got, want := evaluate[string](p, `patient.state`), "waiting"; got != want {
			t.Errorf("got state %q without the server, want %q", got, want)
		}
		s.load(moduleSite(t))
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
		protocol = "";
		static refuses = false;
		constructor(url) {
			if (WebSocket.refuses) throw new SyntaxError("refused");
			WebSocket.last = this;
			this.url = url;
		}
		open() { this.readyState = 1; this.onopen?.({}); }
		hear(data) { this.onmessage?.({ data }); }
		end(code) { this.readyState = 3; this.onclose?.({ code, reason: "" }); }
		sent = [];
		send(data) { this.sent.push(data); }
		close() {}
	}, true)`)

	for _, row := range []struct {
		code int
		want string
	}{
		{websocket.CloseNormalClosure, "closed"},
		{hub.CloseShuttingDown.Code, "waiting"},
		{ws.ProtocolError.Code, "closed"},
		{websocket.CloseNoStatusReceived, "waiting"},
		{hub.ClosePingTimeout.Code, "waiting"},
		{ws.InvalidUTF8.Code, "closed"},
		{hub.CloseReadOnly.Code, "closed"},
		{ws.TooBig.Code, "closed"},
		{hub.CloseInternal.Code, "waiting"},
		{hub.CloseHubRemoved.Code, "waiting"},
		{hub.CloseLagged.Code, "waiting"},
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

	// What a connection says after it was left, or given up, is not heard.
	t.Run("hears the current connection only", func(t *testing.T) {
		got := evaluate[[]string](&tab{t, p.ctx}, `(() => {
			const chat = open("/hub/plain/x");
			const first = WebSocket.last;
			first.open();
			first.hear("1");
			chat.close();
			chat.connect();
			const second = WebSocket.last;
			second.open();
			first.hear("2");
			first.end(1008);
			second.hear("3");
			first.open();
			const { state } = chat;
			chat.close();
			return [state, ...chat.all("message", "data"), String(chat.all("open").length)];
		})()`)
		if want := []string{"open", "1", "3", "2"}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})

	// With a server that says what the test has it say, and timers that run when the test has them.
	for _, row := range []struct{ name, script, want string }{
		{
			"takes each message once", `
			greet({ head: 3, replay: 1 });
			for (const seq of [2, 3, 3, 5, 4]) hear({ type: "message", seq, user: "", data: String(seq) });
			hear({ type: "lagged", missed: 4, next: 10 });
			for (const seq of [9, 10]) hear({ type: "message", seq, user: "", data: String(seq) });
			WebSocket.last.end(1006);
			chat.connect();
			return [chat.all("message", "data"), new URL(WebSocket.last.url).searchParams.get("chat_broadcast_since")];`,
			`[["3","5","10"],"e:10"]`,
		},
		{
			"sends what it was given", `
			const data = new Uint8Array([0, 1, 2, 3]);
			const wide = new Uint16Array([300, 2, 3]);
			const given = [data.subarray(1, 3), data.buffer, wide, wide.subarray(1, 2), new DataView(wide.buffer, 1, 2), "a\ud800z"];
			for (const message of given) chat.send(message);
			data.fill(9);
			wide.fill(9);
			greet();
			return WebSocket.last.sent.map((frame) => JSON.parse(frame)).map(({ data, data64 }) => data ?? data64);`,
			`["AQI=","AAECAw==","LAECAAMA","AgA=","AQI=","a�z"]`,
		},
		{
			"throws what is no message back", `
			greet();
			return [42, {}, null, undefined, [1], new Blob(["x"]), new String("x")].map((message) => {
				try { return chat.send(message); } catch ({ name }) { return name; }
			}).concat(WebSocket.last.sent.length);`,
			`["TypeError","TypeError","TypeError","TypeError","TypeError","TypeError","TypeError",0]`,
		},
		{
			"has ids that nobody can guess", `
			const ids = [chat.send("a"), chat.send("b")], other = open("/chat/y"), id = other.send("a");
			other.close();
			return [ids.map(short), /^[0-9-]{8,58}$/.test(ids[0]), ids[0] !== id, short(id)];`,
			`[["m1","m2"],true,true,"m1"]`,
		},
		{
			"is closed where WebSocket does not take the URL", `
			chat.url = "http+x://y/";
			window.WebSocket.refuses = true;
			WebSocket.last.end(1006);
			timers.forEach(([f, due]) => due > 0 && due < 15_000 && f());
			window.WebSocket.refuses = false;
			const { state, code, reason } = chat.events.at(-1);
			chat.url = new URL("/chat/x", location);
			chat.connect();
			return [state, code, reason, chat.state];`,
			`["closed",1006,"refused","connecting"]`,
		},
		{
			"gives up who does not say hello", `
			WebSocket.last.protocol = "chat-broadcast.v1";
			WebSocket.last.open();
			expire(15_000);
			return chat.state;`,
			`"waiting"`,
		},
		{
			"waits for no more than it has asked", `
			greet();
			chat.send("a");
			hear({ type: "join", user: "Ada", clients: 2 });
			hear({ type: "sent", id: JSON.parse(WebSocket.last.sent[0]).id, seq: 1 });
			expire(15_000);
			return chat.state;`,
			`"open"`,
		},
		{
			"asks whether the connection is there when online", `
			greet();
			dispatchEvent(new Event("online"));
			expire(15_000);
			return [WebSocket.last.sent, chat.state];`,
			`[["{\"type\":\"who\",\"limit\":1}"],"waiting"]`,
		},
		{
			"answers who asks when the connection ends", `
			greet();
			const answers = [chat.who(), chat.who()];
			hear({ type: "error", code: "presence_off", message: "off" });
			WebSocket.last.end(1006);
			return Promise.all(answers);`,
			`[null,null]`,
		},
		{
			"has a full bucket with each connection", `
			performance.now = () => 0;
			const rate = { messages: 1, window: 1000 };
			greet({ rate });
			chat.send("a");
			chat.send("b");
			hear({ type: "sent", id: JSON.parse(WebSocket.last.sent[0]).id, seq: 1 });
			const sent = [WebSocket.last.sent.length];
			WebSocket.last.end(1006);
			chat.connect();
			greet({ rate });
			return [...sent, WebSocket.last.sent.length];`,
			`[1,1]`,
		},
		{
			"sends again with the token of the first time", `
			greet({ token: "e-t", age: 1000 });
			chat.send("a");
			for (const token of ["e-u", "e-v"]) {
				WebSocket.last.end(1006);
				chat.connect();
				Date.now = () => now + 800;
				greet({ token, age: 1000 });
			}
			const id = JSON.parse(WebSocket.last.sent[0]).id;
			hear({ type: "error", code: "unknown", message: "may be there", id });
			return [WebSocket.last.sent.join().replace(id, "ID"), chat.all("failed", "code")];`,
			`["{\"type\":\"send\",\"id\":\"ID\",\"token\":\"e-t\",\"data\":\"a\"}",["unknown"]]`,
		},
		{
			"does not send again what was sent without a token", `
			greet();
			chat.send("a");
			WebSocket.last.end(1006);
			chat.connect();
			greet({ token: "e-u", age: 1000 });
			return [WebSocket.last.sent, chat.all("failed", "code")];`,
			`[[],["unknown"]]`,
		},
		{
			"does not send again what the server has forgotten", `
			greet({ token: "e-t", age: 1000 });
			chat.send("a");
			WebSocket.last.end(1006);
			chat.connect();
			Date.now = () => now + 950;
			greet({ token: "e-u", age: 1000 });
			return [WebSocket.last.sent, chat.all("failed", "code")];`,
			`[[],["unknown"]]`,
		},
		{
			"leaves the page's query as it is", `
			greet();
			hear({ type: "message", seq: 1, user: "", data: "x" });
			const queries = [];
			for (const query of ["?since=2026-11-01&token=a.b%20c+d&x", "?token=b&chat_broadcast_since=f:9", ""]) {
				chat.url.search = query;
				WebSocket.last.end(1006);
				chat.connect();
				queries.push(new URL(WebSocket.last.url).search, chat.url.search);
			}
			return queries;`,
			`["?since=2026-11-01&token=a.b%20c+d&x&chat_broadcast_since=e:1","?since=2026-11-01&token=a.b%20c+d&x",` +
				`"?token=b&chat_broadcast_since=e:1","?token=b&chat_broadcast_since=f:9","?chat_broadcast_since=e:1",""]`,
		},
		{
			"starts its waits over when it was closed", `
			Math.random = () => 1;
			for (let i = 0; i < 5; i++, chat.connect()) WebSocket.last.end(1006);
			chat.close();
			chat.connect();
			WebSocket.last.end(1006);
			return chat.events.filter(({ state }) => state === "waiting").map(({ retryIn }) => retryIn);`,
			`[50,100,200,400,800,50]`,
		},
		{
			"may be closed while it opens", `
			chat.addEventListener("state", () => chat.state === "open" && chat.close());
			greet();
			return [chat.state, chat.all("open").length];`,
			`["closed",0]`,
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			got := evaluate[string](&tab{t, p.ctx}, `(async () => {
				const { setTimeout, clearTimeout } = window, dateNow = Date.now, now = dateNow();
				Date.now = () => now;
				const timers = new Map();
				window.setTimeout = (f, ms) => timers.set(timers.size + 1, [f, ms]).size;
				window.clearTimeout = (id) => { if (timers.has(id)) timers.set(id, []); };
				const expire = (ms) => timers.forEach(([f, due]) => due === ms && f());
				const hear = (frame) => WebSocket.last.hear(JSON.stringify(frame));
				const greet = (fields) => {
					WebSocket.last.protocol = "chat-broadcast.v1";
					WebSocket.last.open();
					hear({ type: "hello", client: "a", user: "", hub: "x", epoch: "e", head: 0, clients: 1, replay: 0, ...fields });
				};
				const chat = open("/chat/x");
				try {
					return JSON.stringify(await (async () => {`+row.script+`})());
				} finally {
					chat.close();
					Object.assign(window, { setTimeout, clearTimeout });
					Date.now = dateNow;
				}
			})()`)
			if got != row.want {
				t.Errorf("got %s, want %s", got, row.want)
			}
		})
	}

	// A later server may say more: of other types, and in other fields, whatever these are called.
	t.Run("ignores what it does not know", func(t *testing.T) {
		got := evaluate[string](&tab{t, p.ctx}, `(async () => {
			const chat = open("/chat/x");
			WebSocket.last.protocol = "chat-broadcast.v1";
			WebSocket.last.open();
			const hear = (frame) => WebSocket.last.hear(JSON.stringify(frame));
			hear({ type: "hello", client: "a", user: "", hub: "x", epoch: "e", head: 0, clients: 1, replay: 0, target: 1 });
			const answer = chat.who();
			hear({ type: "typing", users: ["Eve"] });
			hear({ type: "message", seq: 1, time: "2026-11-23T12:00:00.000Z", user: "", data: "hello", target: 7, bubbles: true });
			hear({ type: "presence", clients: 1, users: [], next: "", composed: 1 });
			const { users } = await answer;
			chat.close();
			return JSON.stringify([users, chat.all("message", "data"), chat.all("open").length]);
		})()`)
		if want := `[[],["hello"],1]`; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})

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
			chat.addEventListener("state", ({ state, retryIn }) => state === "waiting" && waits.push(retryIn));
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
