package chatbroadcast

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"
	"github.com/gorilla/websocket"
)

// TestChat_Size holds chat.js to what docs/clients.md says about it.
func TestChat_Size(t *testing.T) {
	if got, limit := packedSize(t, "client/chat.js"), 6<<10; got >= limit {
		t.Errorf("got chat.js of %d bytes with gzip, want less than %d", got, limit)
	}
}

// packedSize returns how many bytes a file has with gzip.
func packedSize(t *testing.T, path string) int {
	t.Helper()
	var packed bytes.Buffer
	w, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write([]byte(readDocument(t, path))) // into memory
	_ = w.Close()
	return packed.Len()
}

// moduleSite has hubs of several kinds, an empty page, and the files of the client.
func moduleSite(t *testing.T) string {
	t.Helper()
	return `http://localhost {
	chat_broadcast /hub/plain/*
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
	}
	chat_broadcast_client /chat-client/*
	handle / {
		header Content-Type text/html
		respond "` + emptyPage + `"
	}
}`
}

// emptyPage is a page without a script.
const emptyPage = "<!doctype html><title>Empty</title><body></body>"

// openModule opens a tab that has chat.js and listens to what it says.
func openModule(t *testing.T, browser context.Context, url string) *tab {
	t.Helper()
	p := openTab(t, browser, url)
	evaluate[bool](p, `import("/chat-client/chat.js").then(({ Chat }) => {
		window.Chat = Chat;
		// A Chat whose events are kept in events, and change the document, so that one can wait for them.
		window.open = (url, options) => {
			const chat = new Chat(url, { base: 50, ...options });
			chat.events = [];
			for (const type of ["open", "message", "sent", "failed", "missed", "join", "leave", "presence", "error", "refused", "close", "state"]) {
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

// TestChat_Recovers has chat.js lose its connection in every way.
func TestChat_Recovers(t *testing.T) {
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

// nodeProgram returns the path of Node.js 22 or newer, which has a WebSocket of its own. Without it the test is skipped.
func nodeProgram(t *testing.T) string {
	t.Helper()
	skipShort(t)
	node := filepath.Join(clientModules(t), ".bin", "node")
	if _, err := os.Stat(node); err != nil {
		node = findProgram(t, "node")
	}
	out, err := exec.Command(node, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	var major int
	if _, err := fmt.Sscanf(string(out), "v%d.", &major); err != nil {
		t.Fatalf("%s --version says %q: %v", node, out, err)
	}
	if major < 22 {
		t.Skipf("%s is %s, and the client needs 22: run \"npm ci\" in client/", node, strings.TrimSpace(string(out)))
	}
	return node
}

// clientModules returns the folder of the packages that "npm ci" installs for client/, which is elsewhere if the environment
// variable CLIENT_NODE_MODULES says so.
func clientModules(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs(cmp.Or(os.Getenv("CLIENT_NODE_MODULES"), filepath.Join("client", "node_modules")))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// needClientModules skips the test if they are not there.
func needClientModules(t *testing.T) string {
	t.Helper()
	skipShort(t)
	modules := clientModules(t)
	if _, err := os.Stat(modules); err != nil {
		t.Skip(`the packages of the client are not installed: run "npm ci" in client/`)
	}
	return modules
}

// runNode runs a module in the folder client/ and returns its output.
func runNode(t *testing.T, script string) string { return runModule(t, script, nodeCommand(t)...) }

// nodeCommand returns the command that has Node.js run a module from its standard input.
func nodeCommand(t *testing.T) []string { return []string{nodeProgram(t), "--input-type=module", "-"} }

// runModule has a command run a module in the folder client/, and returns its output.
func runModule(t *testing.T, script string, command ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Dir = "client"
	cmd.Env = append(os.Environ(), "DENO_DIR="+t.TempDir(), "DENO_NO_UPDATE_CHECK=1")
	cmd.Stdin = strings.NewReader(script)
	got, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, got)
	}
	return string(got)
}

// inEachRuntime runs a test for each program that can run chat.js without a browser. The test calls run with a module.
func inEachRuntime(t *testing.T, test func(t *testing.T, name string, run func(script string) string)) {
	installed := func(program string, args ...string) func(*testing.T) []string {
		return func(t *testing.T) []string {
			return append([]string{filepath.Join(needClientModules(t), ".bin", program)}, args...)
		}
	}
	for name, command := range map[string]func(*testing.T) []string{
		"node": nodeCommand,
		"deno": installed("deno", "run", "--allow-net", "-"),
		"bun":  installed("bun", "run", "-"),
	} {
		t.Run(name, func(t *testing.T) {
			test(t, name, func(script string) string { return runModule(t, script, command(t)...) })
		})
	}
}

// TestChat_OutsideABrowser runs chat.js where there is no page, and nothing has a location.
func TestChat_OutsideABrowser(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "", moduleSite(t))
	inEachRuntime(t, func(t *testing.T, name string, run func(string) string) {
		hub := "/hub/history/" + name
		peer := s.join(hub)
		got := run(`
			import { Chat } from "./chat.js";
			Object.defineProperty(globalThis, "location", { get() { throw new Error("location was read"); }, configurable: true });
			let chat = new Chat("ws://` + s.http + hub + `?name=me");
			chat.addEventListener("message", ({ data, user, own }) => console.log(data, user, own));
			chat.url = "http://` + s.http + hub + `?name=me#top";
			let once = 0;
			chat.addEventListener("sent", ({ seq }) => {
				console.log(seq);
				chat.close();
				if (once++) return;
				chat.connect();
				chat.send(new Blob(["again"]));
			});
			chat.addEventListener("state", ({ state }) => state === "connecting" || console.log(state));
			chat.send("from a program");
			delete globalThis.location;
			try { new Chat("/hub/history/x"); } catch ({ name }) { console.log(name); }
		`)
		var lines []string
		for line := range strings.Lines(got) {
			if !strings.HasSuffix(line, " me true\n") { // what it has sent, before or after the answer
				lines = append(lines, strings.TrimSuffix(line, "\n"))
			}
		}
		if want := []string{"TypeError", "open", "1", "closed", "open", "2", "closed"}; !slices.Equal(lines, want) {
			t.Errorf("got %q, want %q", lines, want)
		}
		peer.wantText("from a program")
		if got, want := peer.next(), (frame{websocket.BinaryMessage, "again"}); got != want {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

// TestChat_TellsARefusalOutsideABrowser is quick only if the client does not wait for an event that only browsers send.
func TestChat_TellsARefusalOutsideABrowser(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "", refusingSite(t))
	inEachRuntime(t, func(t *testing.T, _ string, run func(string) string) {
		got := run(`
			import { Chat } from "./chat.js";
			for (const status of [401, 302, 403]) {
				const chat = new Chat("ws://` + s.http + `/refused/" + status, { base: 20, timeout: 2 ** 30 });
				chat.addEventListener("refused", ({ status, reason, final }) => console.log(status, reason, final, chat.state));
				await new Promise((resolve) => chat.addEventListener("refused", resolve));
			}
		`)
		if want := "401  true closed\n401  true closed\n403 Members only true closed\n"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// TestChat_NoticesADeadConnection has pages that only listen, and connections that die without a word.
func TestChat_NoticesADeadConnection(t *testing.T) {
	t.Parallel()
	browser := startBrowser(t)
	for _, row := range []struct {
		name   string
		die    func(*process, *line)
		revive func(*process, *line)
		event  string // what the page notices, if anything
		within time.Duration
	}{
		{"a silent network", func(_ *process, l *line) { l.silence() }, func(_ *process, l *line) { l.restore() }, "", 45 * time.Second},
		{"a network that takes nothing", func(_ *process, l *line) { l.deafen() }, func(_ *process, l *line) { l.restore() }, "", 45 * time.Second},
		{"a stopped server", stopProcess, continueProcess, "", 45 * time.Second},
		{"a silent network, the page returns", func(_ *process, l *line) { l.silence() }, func(_ *process, l *line) { l.restore() }, "pageshow", 5 * time.Second},
		{"a stopped server, the network returns", stopProcess, continueProcess, "online", 5 * time.Second},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s := startProcess(t, "", moduleSite(t))
			t.Cleanup(func() { continueProcess(s, nil) }) // before it is killed
			l := startLine(t, s.http)
			p := openModule(t, browser, l.url)
			p.connect("/hub/history/x", "{}")
			row.die(s, l)
			began := time.Now()
			if row.event != "" {
				evaluate[bool](p, `new Promise((resolve) => setTimeout(resolve, 1100, true))`) // nothing is heard
				began = time.Now()
				evaluate[bool](p, `dispatchEvent(new Event("`+row.event+`"))`)
			}
			p.waitFor(`chat.state !== "open"`)
			if took := time.Since(began); took > row.within {
				t.Errorf("the page noticed after %v, want within %v", took, row.within)
			}
			row.revive(s, l)
			p.waitFor(`chat.state === "open"`)
			s.publish("/hub/history/x", "later")
			p.waitFor(`chat.all("message", "data").join() === "later"`)
		})
	}
}

func stopProcess(s *process, _ *line) { _ = s.cmd.Process.Signal(syscall.SIGSTOP) }

func continueProcess(s *process, _ *line) { _ = s.cmd.Process.Signal(syscall.SIGCONT) }

// TestChat_KeepsALivingConnection runs a client whose clock is a hundred times as fast, so that it asks often.
func TestChat_KeepsALivingConnection(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "", moduleSite(t))
	p := openModule(t, startBrowser(t), s.url)
	evaluate[bool](p, `{
		const { setTimeout } = window, { send } = WebSocket.prototype;
		window.setTimeout = (f, ms) => setTimeout(f, ms === 20_000 ? 200 : ms);
		window.asked = 0;
		WebSocket.prototype.send = function (frame) {
			document.body.dataset.asked = ++asked;
			send.call(this, frame);
		};
		true;
	}`)
	for _, hub := range []string{"/hub/history/x", "/hub/plain/x"} {
		p.connect(hub, "{}")
		evaluate[bool](p, `{ window.asked = 0; true }`)
		p.waitFor(`asked > 9`)
		got := evaluate[string](p, `JSON.stringify([chat.state, chat.all("open").length, chat.events.filter(({ type }) => !["open", "state"].includes(type))])`)
		if want := `["open",1,[]]`; got != want {
			t.Errorf("%s: got %s, want %s", hub, got, want)
		}
	}
}

// TestChat_ShowsThatThereIsNoNetwork takes the browser's network away, as the developer tools do.
func TestChat_ShowsThatThereIsNoNetwork(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "", moduleSite(t))
	p := openModule(t, startBrowser(t), s.url)
	p.connect("/hub/history/x", "{}")
	p.do(setOffline(true))
	if !evaluate[bool](p, `(chat.close(), chat.connect(), chat.all("state").at(-1).offline === true)`) {
		t.Error("got an attempt that does not show that there is no network")
	}
	p.waitFor(`chat.state === "open"`)
	if evaluate[bool](p, `"offline" in chat.all("state").at(-1)`) {
		t.Error("got no network, want the connection to show that there is one")
	}
	p.do(setOffline(false))
}

// setOffline has the browser say to a page that there is no network, or that there is one again.
func setOffline(offline bool) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, network.OverrideNetworkState, network.OverrideNetworkStateParams{
			Offline: offline, DownloadThroughput: -1, UploadThroughput: -1,
		})
		return err
	})
}

// adaHash lets ada in with the password lovelace.
const adaHash = "ada $2a$04$9aBQmv5R.QsqmruI6ZyCC.mngoaloyKD8UYmQ5Z0z/bsN1Vx0RRkG"

// refusingSite refuses handshakes in all ways that Caddy has itself.
func refusingSite(t *testing.T) string {
	t.Helper()
	return strings.Replace(moduleSite(t), "{\n", `{
	basic_auth /refused/401 {
		`+adaHash+`
	}
	chat_broadcast /refused/401 {
		origins *
	}
	redir /refused/302 /login 302
	respond /refused/403 "Members only" 403
	header /refused/503 Retry-After 1
	respond /refused/503 "Back soon" 503
	respond /refused/page "<p>Welcome</p>" 200
	respond /refused/404 404
`, 1)
}

func TestChat_TellsARefusal(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "", refusingSite(t))
	p := openModule(t, startBrowser(t), s.url)
	for _, row := range []struct{ path, want string }{
		{"/refused/401", `[401,"",true,"closed",["closed"]]`},
		{"/refused/302", `[401,"",true,"closed",["closed"]]`},
		{"/refused/403", `[403,"Members only",true,"closed",["closed"]]`},
		{"/refused/503", `[503,"Back soon",false,"waiting",[]]`},
		{"/refused/404", `[404,"",true,"closed",["closed"]]`},
		{"/refused/page", `[404,"",true,"closed",["closed"]]`},
	} {
		t.Run(row.path, func(t *testing.T) {
			p := &tab{t, p.ctx}
			evaluate[bool](p, fmt.Sprintf(`(window.chat?.close(), open(%s), chat.send("waits"), true)`, jsString(row.path)))
			p.waitFor(`chat.all("refused").length > 0`)
			got := evaluate[string](p, `{
				const { status, reason, final, retryIn = 1000 } = chat.all("refused")[0], text = retryIn < 1000 ? retryIn : reason;
				JSON.stringify([status, text, final, chat.state, chat.all("failed", "code")]);
			}`)
			if got != row.want {
				t.Errorf("got %s, want %s", got, row.want)
			}
		})
	}

	t.Run("where the page needs a password, too", func(t *testing.T) {
		s := startProcess(t, "", "http://localhost {\n\tbasic_auth {\n\t\t"+adaHash+"\n\t}\n\trespond /refused 429\n"+
			strings.TrimPrefix(moduleSite(t), "http://localhost {"))
		p := openModule(t, p.ctx, strings.Replace(s.url, "//", "//ada:lovelace@", 1))
		p.connect("/hub/history/x", "{}")
		evaluate[bool](p, `(window.chat?.close(), open("/refused"), true)`)
		p.waitFor(`chat.all("refused").length > 0`)
		if got := evaluate[int](p, `chat.all("refused")[0].status`); got != 429 {
			t.Errorf("got status %d, want 429", got)
		}
	})

	t.Run("comes again when the server lets it", func(t *testing.T) {
		p := &tab{t, p.ctx}
		evaluate[bool](p, `(window.chat?.close(), open("/refused/503"), true)`)
		p.waitFor(`chat.all("refused").length > 0`)
		s.load(strings.Replace(refusingSite(t), "respond /refused/503", "chat_broadcast /refused/503\n\trespond /gone", 1))
		p.waitFor(`chat.state === "open"`)
	})

	t.Run("connects after a login", func(t *testing.T) {
		p := &tab{t, p.ctx}
		evaluate[bool](p, `(window.chat?.close(), open("/refused/401"), true)`)
		p.waitFor(`chat.state === "closed"`)
		s.load(strings.Replace(refusingSite(t), "basic_auth /refused/401", "basic_auth /gone", 1)) // as a cookie would do
		evaluate[bool](p, `(chat.connect(), true)`)
		p.waitFor(`chat.state === "open"`)
	})
}

// TestChat_TellsARefusalOfAHub has hubs refuse the page, also one of another site.
func TestChat_TellsARefusalOfAHub(t *testing.T) {
	t.Parallel()
	const limited = `
	chat_broadcast /one/* one {
		max_clients_per_ip 1
		origins *
	}
	chat_broadcast /full/* full {
		max_clients 1
	}
`
	s := startProcess(t, "", strings.Replace(moduleSite(t), "{\n", "{"+limited, 1)+"\nhttp://127.0.0.1 {"+limited+"}")
	p := openModule(t, startBrowser(t), s.url)
	other := "127.0.0.1:" + portOf(s.http)
	for _, row := range []struct {
		url, taken string // the page's URL, and the path through which another client has taken the only place
		want       string
		final      bool
	}{
		{"//127.0.0.1/one/x", "/one/a", `429 the directive's max_clients_per_ip is reached`, false}, // another origin
		{"/full/x", "/full/a", `503 the directive's max_clients is reached`, false},
		{"/hub/plain/x?chat_broadcast_since=no", "/one/b", `400 chat_broadcast_since: must be`, true},
	} {
		t.Run(row.url, func(t *testing.T) {
			p := &tab{t, p.ctx}
			peer := joinFrom(t, "127.0.0.1", other, row.taken)
			url := strings.Replace(row.url, "127.0.0.1", other, 1)
			evaluate[bool](p, fmt.Sprintf(`(window.chat?.close(), open(%s), true)`, jsString(url)))
			p.waitFor(`chat.all("refused").length > 0`)
			got := evaluate[string](p, `chat.all("refused").map(({ status, reason }) => status + " " + reason)[0]`)
			if !strings.HasPrefix(got, row.want) {
				t.Errorf("got %q, want %q", got, row.want)
			}
			if got := evaluate[bool](p, `chat.all("refused")[0].final`); got != row.final {
				t.Errorf("got final %t, want %t", got, row.final)
			}
			peer.conn.Close()
			if !row.final {
				p.waitFor(`chat.state === "open"`)
			}
			evaluate[bool](p, `(chat.close(), true)`)
		})
	}
}

func TestChat_FailsAMessageThatIsTooBigAlone(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "", moduleSite(t))
	peer := s.join("/hub/history/x")
	p := openModule(t, startBrowser(t), s.url)
	p.connect("/hub/history/x", "{}")
	evaluate[bool](p, `{
		const room = chat.maxMessageSize - JSON.stringify({ type: "send", id: chat.send("a"), data: "" }).length;
		for (const message of ["x".repeat(1 << 20), "x".repeat(room), "x".repeat(room + 1), new Blob(["x".repeat(1 << 20)]), "b"]) chat.send(message);
		true;
	}`)
	p.waitFor(`chat.all("sent").length === 3 && chat.all("failed").length === 3`)
	got := evaluate[string](p, `chat.all("failed", "code") + " " + chat.all("sent", "id").map(short) + " " + chat.all("open").length`)
	if want := "too_big,too_big,too_big m1,m3,m6 1"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	peer.wantText("a")
	peer.next()
	peer.wantText("b")
}

// cuts is how often TestChat_LosesNothingSilently and TestElement_LosesNothingSilently break something.
var cuts = flag.Int("cuts", 15, "how often a test breaks the connections of four pages that send")

// TestChat_LosesNothingSilently breaks the connections of four pages that send, reloads the server and starts it again, in any
// order. In the end all pages must show the same messages in one order, and each page must know of each of its messages whether
// it was sent.
func TestChat_LosesNothingSilently(t *testing.T) {
	t.Parallel()
	browser := startBrowser(t)
	for left := *cuts; left > 0; left -= mostCuts { // a tab does not last for ever
		t.Run(fmt.Sprint(left), func(t *testing.T) { testLosesNothingSilently(t, browser, min(left, mostCuts)) })
	}
}

const mostCuts = 50

func testLosesNothingSilently(t *testing.T, browser context.Context, cuts int) {
	options := "chat_broadcast {\nengine file " + filepath.Join(t.TempDir(), "messages") + "\n}"
	s := startProcess(t, options, moduleSite(t))
	l := startLine(t, s.http)
	const hub = "/hub/history/cuts"
	var pages []*tab
	for i := range 4 {
		p := openModule(t, browser, l.url)
		p.connect(fmt.Sprintf("%s?name=%d", hub, i), "{ timeout: 2000 }")
		evaluate[bool](p, `{
			window.sending = new Map();
			let n = 0;
			window.ticker = setInterval(() => {
				const text = "`+fmt.Sprint(i)+` " + n, id = chat.send(text);
				if (id !== null) sending.set(id, text), n++;
			}, 40);
			true;
		}`)
		pages = append(pages, p)
	}
	s = breakAtRandom(s, l, options, moduleSite(t), cuts)
	for _, p := range pages {
		evaluate[bool](p, `(clearInterval(ticker), true)`)
		p.waitFor(`chat.state === "open" && chat.all("sent").length + chat.all("failed").length === sending.size`)
	}
	s.publish(hub, "the end")
	var want string
	for i, p := range pages {
		p.waitFor(`chat.all("message", "data").at(-1) === "the end"`)
		got := evaluate[string](p, `{
			const shown = chat.all("message", "data"), has = new Set(shown), texts = (type) => chat.all(type, "id").map((id) => sending.get(id));
			const failed = chat.all("failed").filter(({ code }) => code !== "unknown").map(({ data }) => data);
			JSON.stringify({
				doubled: shown.length - has.size,
				lost: texts("sent").filter((text) => !has.has(text)),
				notSent: failed.filter((text) => has.has(text)),
				twice: sending.size - new Set([...texts("sent"), ...texts("failed")]).size,
				missed: chat.all("missed"),
			});
		}`)
		if want := `{"doubled":0,"lost":[],"notSent":[],"twice":0,"missed":[]}`; got != want {
			t.Errorf("page %d: got %s, want %s", i, got, want)
		}
		all := evaluate[string](p, `chat.all("message", "data").join()`)
		if i == 0 {
			want = all
		} else if all != want {
			t.Errorf("page %d shows other messages than page 0", i)
		}
	}
	t.Logf("%d messages, %v", strings.Count(want, ",")+1, evaluate[[]string](pages[0], `chat.all("failed", "code")`))
}

// breakAtRandom breaks the connections of a line, reloads the site and starts the server again, in any order. The site has a
// "history 1000". It returns the server of the end.
func breakAtRandom(s *process, l *line, options, site string, times int) *process {
	s.t.Helper()
	pause := func(most time.Duration) { // for pages to send: nothing is waited for
		<-time.After(rand.N(most))
	}
	for range times {
		switch rand.IntN(8) {
		case 0, 1, 2:
			l.blink()
		case 3:
			l.cut()
			pause(300 * time.Millisecond)
			l.restore()
		case 4:
			l.silence()
			pause(300 * time.Millisecond)
			l.breakAll(func() { l.silent = false })
		case 5:
			l.deafen()
			pause(300 * time.Millisecond)
			l.breakAll(func() { l.deaf = false })
		case 6:
			if err := s.post(options, strings.Replace(site, "history 1000", fmt.Sprint("history ", 1001+rand.IntN(100)), 1)); err != nil {
				s.t.Fatal(err)
			}
		case 7:
			s.terminate()
			s = s.startAgain(options, site)
		}
		pause(200 * time.Millisecond)
	}
	return s
}

// TestChat_Raw runs chat.js against a server that knows nothing of the protocol.
func TestChat_Raw(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	conns := map[*websocket.Conn]bool{}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, emptyPage) })
	mux.Handle("/chat-client/", http.StripPrefix("/chat-client", http.FileServer(http.Dir("client"))))
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

// TestChat_Module runs chat.js in a browser without any other script.
func TestChat_Module(t *testing.T) {
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
			const { now } = performance;
			performance.now = () => Infinity; // for which every bucket is full
			chat.addEventListener("failed", ({ id, data, code }) => {
				performance.now = now;
				resolve(short(id) + data + code);
			});
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
	evaluate[bool](p, `(fetch = async () => { throw new TypeError("this network is down"); }, WebSocket = class {
		static OPEN = 1;
		static last;
		readyState = 0;
		protocol = "";
		static refuses = false;
		constructor(url) {
			if (WebSocket.refuses) throw new SyntaxError("refused");
			WebSocket.last = this;
			this.url = String(url);
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
			return [42, {}, null, undefined, [1], new Response("x"), new String("x"), new URL("x:y"), Symbol(), () => "x"].map((message) => {
				try { return chat.send(message); } catch ({ name }) { return name; }
			}).concat(WebSocket.last.sent.length);`,
			`[` + strings.Repeat(`"TypeError",`, 10) + `0]`,
		},
		{
			"sends a Blob in its turn", `
			greet();
			const ids = ["a", new Blob(["b", new Uint8Array([255])]), "c", new Blob(), "d"].map((message) => chat.send(message));
			const sent = [WebSocket.last.sent.length];
			await new Promise(turn);
			const frames = WebSocket.last.sent.map((frame) => JSON.parse(frame));
			return [...sent, frames.map(({ data, data64 }) => data ?? data64), String(frames.map(({ id }) => id)) === String(ids)];`,
			`[1,["a","Yv8=","c","","d"],true]`,
		},
		{
			"says that a Blob cannot be read", `
			greet();
			const gone = new Blob(["x"]);
			gone.arrayBuffer = async () => { throw new DOMException("gone", "NotReadableError"); };
			chat.send(gone);
			chat.send("a");
			await new Promise(turn);
			return [chat.all("failed").map(({ id, data, code }) => [short(id), data === gone, code]), WebSocket.last.sent.length];`,
			`[[["m1",true,"unreadable"]],1]`,
		},
		{
			"fails a message that is too big before it is sent", `
			const size = 200, before = chat.maxMessageSize;
			const early = chat.send("x".repeat(size));
			greet({ max_message_size: size });
			const room = size - JSON.stringify({ type: "send", id: early, data: "" }).length;
			const ids = ["x".repeat(room), "x".repeat(room + 1), "ü".repeat(room / 2 + 1), "\n".repeat(room / 2), new Uint8Array(room), "y"]
				.map((message) => chat.send(message));
			const told = chat.all("failed").length; // "send" returns the id first
			await new Promise(turn);
			const sent = WebSocket.last.sent.map((frame) => JSON.parse(frame).data[0]);
			return [before, chat.maxMessageSize, told, chat.all("failed").map(({ id, code }) => short(id) + code), sent, chat.state];`,
			`[null,200,0,["m1too_big","m3too_big","m4too_big","m6too_big"],["x","\n","y"],"open"]`,
		},
		{
			"asks after a silence", `
			greet({ max_message_size: 1000 });
			const sent = WebSocket.last.sent;
			expire(20_000);
			const asked = [sent.length];
			hear({ type: "pong" });
			expire(15_000);
			asked.push(chat.state);
			expire(20_000);
			expire(15_000);
			return [...asked, sent, chat.state, chat.all("close", "code")];`,
			`[1,"open",["{\"type\":\"ping\"}","{\"type\":\"ping\"}"],"waiting",[1006]]`,
		},
		{
			"asks an earlier server otherwise", `
			greet();
			expire(20_000);
			hear({ type: "error", code: "presence_off", message: "off" });
			expire(15_000);
			return [WebSocket.last.sent, chat.state, chat.all("error").length];`,
			`[["{\"type\":\"who\",\"limit\":1}"],"open",0]`,
		},
		{
			"does not ask while it hears something", `
			greet({ max_message_size: 1000 });
			for (let seq = 1; seq < 10; seq++) {
				performance.now = () => seq * 15_000;
				hear({ type: "message", seq, user: "", data: "x" });
			}
			performance.now = () => 9 * 15_000 + 900;
			dispatchEvent(new Event("online"));
			document.dispatchEvent(new Event("resume"));
			return [WebSocket.last.sent.length, [...timers.values()].filter(([, due]) => due === 20_000).length];`,
			`[0,1]`,
		},
		{
			"hurries when something has happened", `
			const states = [];
			for (const type of ["online", "offline", "pageshow", "visibilitychange", "resume"]) {
				greet({ max_message_size: 1000 });
				performance.now = () => 100_000;
				const target = /^[vr]/.test(type) ? document : window;
				target.dispatchEvent(new Event(type));
				expire(4000);
				states.push(WebSocket.last.sent.length + chat.state);
				performance.now = () => 0;
				chat.connect();
			}
			return states;`,
			`["1waiting","1waiting","1waiting","1waiting","1waiting"]`,
		},
		{
			"does not ask for a page that is hidden", `
			greet({ max_message_size: 1000 });
			performance.now = () => 100_000;
			Object.defineProperty(document, "hidden", { value: true, configurable: true });
			document.dispatchEvent(new Event("visibilitychange"));
			delete document.hidden;
			return WebSocket.last.sent.length;`,
			`0`,
		},
		{
			"shows at once that there is no network", `
			const network = (onLine) => {
				Object.defineProperty(navigator, "onLine", { value: onLine, configurable: true });
				dispatchEvent(new Event(onLine ? "online" : "offline"));
			};
			network(true);
			greet({ max_message_size: 1000 });
			performance.now = () => 1;
			network(false);
			network(true);
			network(false);
			Math.random = () => 1;
			WebSocket.last.end(1006);
			network(false);
			network(true);
			delete navigator.onLine;
			return chat.all("state").map(({ state, offline, retryIn }) => [state, offline ?? false, retryIn ?? 0].join());`,
			`["connecting,false,0","open,false,0","open,true,0","open,false,0","open,true,0","waiting,true,50","waiting,true,50","connecting,false,0"]`,
		},
		{
			"takes the server's word for the network, not the browser's", `
			Object.defineProperty(navigator, "onLine", { value: false, configurable: true });
			chat.close();
			const before = chat.all("state").length;
			chat.connect();
			greet({ max_message_size: 1000 });
			dispatchEvent(new Event("offline"));
			hear({ type: "message", seq: 1, user: "", data: "x" });
			hear({ type: "message", seq: 2, user: "", data: "y" });
			WebSocket.last.end(1006);
			chat.connect();
			delete navigator.onLine;
			return chat.all("state").slice(before).map(({ state, offline }) => state + (offline ? " offline" : ""));`,
			`["connecting offline","open","open offline","open","waiting","connecting"]`,
		},
		{
			"takes a replay apart", `
			greet({ head: 3, replay: 3 });
			const message = (seq) => ({ type: "message", seq, time: "2026-11-23T12:00:00.000Z", client: "b", user: "Eve", data: String(seq) });
			hear({ type: "replay", messages: [message(1), { ...message(2), data: undefined, data64: "AP8=" }] });
			hear(message(3));
			hear({ type: "replay", messages: [message(3), message(4)] });
			return chat.all("message").map(({ seq, data, time, user, own, replayed }) =>
				[seq, typeof data === "string" ? data : [...data].join("-"), time.getTime() % 1000, user, own, replayed].join());`,
			`["1,1,0,Eve,false,true","2,0-255,0,Eve,false,true","3,3,0,Eve,false,true","4,4,0,Eve,false,false"]`,
		},
		{
			"takes nothing from a replay after it is closed", `
			greet({ head: 3, replay: 3 });
			chat.addEventListener("message", ({ seq }) => seq === 2 && chat.close());
			hear({ type: "replay", messages: [1, 2, 3].map((seq) => ({ type: "message", seq, user: "", data: "" })) });
			return [chat.all("message", "seq"), chat.state];`,
			`[[1,2],"closed"]`,
		},
		{
			"tells why it is refused", `
			const answers = [];
			for (const [status, body, headers] of [
				[204], [401, "sign in", { "Content-Type": "text/plain; charset=utf-8" }], [403, "no\nyes", { "Content-Type": "text/plain" }],
				[400, "<p>no", { "Content-Type": "text/html" }], [404], [426], [405], [200, "a page"], [0],
				[408], [425], [429, "", { "Retry-After": "5" }], [503, "", { "Retry-After": "1000000" }], [502], [504, "", { "Retry-After": "soon" }],
			]) {
				const refused = open("/chat/y");
				let asked = 0;
				window.fetch = async (url, { redirect }) => {
					asked++;
					if (redirect !== "manual" || String(url) !== location.origin + "/chat/y?chat_broadcast_replay=bundles&chat_broadcast_check") throw new Error(url);
					const answer = status ? new Response(status === 204 ? null : body, { status, headers }) : Response.error();
					return answer;
				};
				WebSocket.last.end(1006);
				refused.connect();
				await new Promise(turn);
				WebSocket.last.end(1006);
				await new Promise(turn);
				const [told] = refused.all("refused"), last = refused.all("state").at(-1);
				const { retryIn, ...rest } = told ?? {};
				answers.push([status, asked, told && [told.status, told.reason, told.final], refused.state, last.status, last.code,
					last.retryIn === retryIn && (retryIn ?? 0) >= 5000 && retryIn]);
				refused.close();
			}
			return answers;`,
			`[[204,2,null,"waiting",null,1006,false],[401,2,[401,"sign in",true],"closed",401,1006,false],[403,2,[403,"no",true],"closed",403,1006,false],` +
				`[400,2,[400,"",true],"closed",400,1006,false],[404,2,[404,"",true],"closed",404,1006,false],[426,2,[426,"",true],"closed",426,1006,false],` +
				`[405,2,[405,"",true],"closed",405,1006,false],[200,2,[404,"",true],"closed",404,1006,false],[0,2,[401,"",true],"closed",401,1006,false],` +
				`[408,2,[408,"",false],"waiting",408,1006,false],[425,2,[425,"",false],"waiting",425,1006,false],[429,2,[429,"",false],"waiting",429,1006,5000],` +
				`[503,2,[503,"",false],"waiting",503,1006,3600000],[502,2,[502,"",false],"waiting",502,1006,false],[504,2,[504,"",false],"waiting",504,1006,false]]`,
		},
		{
			"goes on where it has worked before", `
			const states = [];
			for (const status of [404, 200, 400, 401]) {
				greet();
				window.fetch = async () => new Response("", { status });
				for (let i = 0; i < 3; i++, chat.connect()) WebSocket.last.end(1006);
				await new Promise(turn);
				states.push(chat.state);
				chat.connect();
			}
			return [states, chat.all("refused", "final")];`,
			`[["waiting","waiting","waiting","closed"],[false,false,false,true]]`,
		},
		{
			"keeps to the wait that the server asks for", `
			window.fetch = async () => new Response("", { status: 429, headers: { "Retry-After": "7" } });
			chat.send("a");
			for (let i = 0; i < 2; i++) {
				if (i) chat.connect();
				WebSocket.last.end(1006);
			}
			await new Promise(turn);
			for (const type of ["online", "pageshow"]) dispatchEvent(new Event(type));
			const states = [chat.state];
			expire(7000);
			greet();
			return [...states, chat.state, WebSocket.last.sent.length, chat.all("refused").length];`,
			`["waiting","open",1,1]`,
		},
		{
			"does not ask why what was open has ended", `
			let asked = 0;
			window.fetch = async () => { asked++; return new Response("", { status: 403 }); };
			for (let i = 0; i < 4; i++) {
				greet();
				WebSocket.last.end(1006);
				chat.connect();
			}
			WebSocket.last.end(1006);
			await new Promise(turn);
			return [asked, chat.state];`,
			`[0,"waiting"]`,
		},
		{
			"forgets an answer that comes when it is open or closed", `
			let answer;
			window.fetch = () => new Promise((resolve) => { answer = () => resolve(new Response("", { status: 403 })); });
			const states = [];
			for (const now of [() => greet(), () => chat.close()]) {
				for (let i = 0; i < 2; i++, chat.connect()) WebSocket.last.end(1006);
				now();
				answer();
				await new Promise(turn);
				states.push(chat.state);
				chat.connect();
			}
			return [states, chat.all("refused").length];`,
			`[["open","closed"],0]`,
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
			greet({ max_message_size: 1000 });
			performance.now = () => 100_000;
			dispatchEvent(new Event("online"));
			expire(4000);
			return [WebSocket.last.sent, chat.state];`,
			`[["{\"type\":\"ping\"}"],"waiting"]`,
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
			const queries = ["?a&chat_broadcast_since=f:9", "?chat_broadcast_replay=all"].map((query) => {
				open("/chat/y" + query).close();
				return new URL(WebSocket.last.url).search;
			});
			window.chat = chat;
			chat.close();
			chat.connect();
			greet();
			hear({ type: "message", seq: 1, user: "", data: "x" });
			for (const query of ["?since=2026-11-01&token=a.b%20c+d&x", "?token=b&chat_broadcast_since=f:9", ""]) {
				chat.url.search = query;
				WebSocket.last.end(1006);
				chat.connect();
				queries.push(new URL(WebSocket.last.url).search, chat.url.search);
			}
			return queries;`,
			`["?a&chat_broadcast_since=f:9&chat_broadcast_replay=bundles","?chat_broadcast_replay=bundles",` +
				`"?since=2026-11-01&token=a.b%20c+d&x&chat_broadcast_since=e:1&chat_broadcast_replay=bundles","?since=2026-11-01&token=a.b%20c+d&x",` +
				`"?token=b&chat_broadcast_since=e:1&chat_broadcast_replay=bundles","?token=b&chat_broadcast_since=f:9",` +
				`"?chat_broadcast_since=e:1&chat_broadcast_replay=bundles",""]`,
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
				const { setTimeout, clearTimeout, fetch } = window, dateNow = Date.now, now = dateNow(), { random } = Math;
				const performanceNow = performance.now;
				const turn = (f) => setTimeout(f, 20);
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
					Object.assign(window, { setTimeout, clearTimeout, fetch });
					Date.now = dateNow;
					performance.now = performanceNow;
					Math.random = random;
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

// ---- the documents ----

// TestDocs_JavaScript runs the first lines of a page with chat.js.
func TestDocs_JavaScript(t *testing.T) {
	startCaddy(t, plainChat)
	page := strings.NewReplacer("/chat-client/chat.js", "./chat.js", "'/chat/lobby'", "'ws://"+httpAddr+"/chat/lobby'").
		Replace(docBlock(t, "javascript: chat"))
	got := runNode(t, page+"chat.addEventListener('message', () => chat.close());")
	if want := " hello\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestDocs_JavaScriptReference runs the lines of client/README.md.
func TestDocs_JavaScriptReference(t *testing.T) {
	startCaddy(t, plainChat)
	page := strings.ReplaceAll(docBlock(t, "javascript: reference"), "https://example.com", "http://"+httpAddr)
	got := runNode(t, page+`
		let heard = 0;
		const hear = () => ++heard === 2 && chat.close();
		chat.addEventListener('message', hear);
		chat.addEventListener('sent', (sent) => { console.log(sent.id === id); hear(); });
	`)
	if !strings.Contains(got, "true\n") || !strings.Contains(got, "I hello\n") {
		t.Errorf("got %q, want the message and its id", got)
	}
}

// TestDocs_Bots runs each bot and talks to it, also while it is away.
func TestDocs_Bots(t *testing.T) {
	for _, row := range []struct {
		name  string
		start func(t *testing.T, folder, url string) *exec.Cmd
	}{
		{"Go", goBot},
		{"Node", nodeBot},
		{"Python", pythonBot},
	} {
		t.Run(row.name, func(t *testing.T) { testBot(t, row.start) })
	}
}

func goBot(t *testing.T, folder, url string) *exec.Cmd {
	program := filepath.Join(folder, "bot")
	source := writeBlock(t, "go: bot", folder, "main.go")
	if out, err := exec.Command("go", "build", "-o", program, source).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return exec.Command(program, url)
}

func nodeBot(t *testing.T, folder, url string) *exec.Cmd {
	copyFiles(t, "client/chat.js", folder)
	return exec.Command(nodeProgram(t), writeBlock(t, "javascript: bot", folder, "bot.mjs"), url)
}

func pythonBot(t *testing.T, folder, url string) *exec.Cmd {
	for _, python := range []string{findProgram(t, "python3"), "/usr/bin/python3"} {
		if exec.Command(python, "-c", "import websockets").Run() == nil {
			return exec.Command(python, writeBlock(t, "python: bot", folder, "bot.py"), url)
		}
	}
	t.Skip("no Python has the library websockets: install Debian's python3-websockets")
	return nil
}

// writeBlock writes a block of the documents to a file, and returns its path.
func writeBlock(t *testing.T, comment, folder, name string) string {
	t.Helper()
	path := filepath.Join(folder, name)
	if err := os.WriteFile(path, []byte(docBlock(t, comment)), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func testBot(t *testing.T, start func(t *testing.T, folder, url string) *exec.Cmd) {
	skipShort(t)
	cmd := start(t, t.TempDir(), "ws://"+httpAddr+"/bot")
	s := startCaddy(t, `http://localhost:9080 {
	chat_broadcast /chat hub {
		history 100
	}
	chat_broadcast /bot hub {
		history 100
		max_age 2s
	}
}`)
	clients := func() int {
		var page clientsPage
		s.ask("GET", "/hubs/hub", "", "", &page)
		return len(page.Clients)
	}
	p := join(t, "/chat")
	p.text("!ping")
	p.wantText("!ping") // it is older than the bot, which must not answer it

	var log output
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the bot
	defer func() { _ = cmd.Process.Kill() }()
	eventually(t, "the bot", func() bool { return clients() == 2 })
	p.text("!ping")
	p.wantText("!ping")
	p.wantText("pong")

	eventually(t, "the end of its connection", func() bool { return strings.Contains(log.String(), "max_age") })
	p.text("!ping")
	p.wantText("!ping")
	p.wantText("pong")

	s.ask("DELETE", "/hubs/hub", "", "", nil)
	p.wantClose(websocket.ClosePolicyViolation, "kicked")
	if err := <-ended; err == nil || !strings.Contains(log.String(), "kicked") {
		t.Errorf("got %v, %s, want that it ends with a final close code", err, log.String())
	}
}

// ---- types ----

// runTSC runs TypeScript's compiler in a folder.
func runTSC(t *testing.T, folder string, args ...string) {
	t.Helper()
	if out, err := tsc(t, folder, args...); err != nil {
		t.Fatalf("tsc %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func tsc(t *testing.T, folder string, args ...string) ([]byte, error) {
	t.Helper()
	cmd := exec.Command(filepath.Join(needClientModules(t), ".bin", "tsc"), args...)
	cmd.Dir = folder
	return cmd.CombinedOutput()
}

// copyFiles copies the files that match a pattern to a folder.
func copyFiles(t *testing.T, pattern, folder string) {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		t.Fatalf("%s: got %d files and the error %v", pattern, len(paths), err)
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(folder)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := root.WriteFile(filepath.Base(path), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestClient_TypesAreThoseOfTheSource checks the types of the client's code, and that its .d.ts files are up to date.
func TestClient_TypesAreThoseOfTheSource(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	copyFiles(t, "client/*.js", folder)
	copyFiles(t, "client/tsconfig.json", folder)
	runTSC(t, folder)
	declared := func(folder string) map[string]string {
		files := map[string]string{}
		paths, err := filepath.Glob(filepath.Join(folder, "*.d.ts"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			files[filepath.Base(path)] = readDocument(t, path)
		}
		return files
	}
	got, want := declared("client"), declared(folder)
	for name := range maps.Keys(want) {
		if got[name] != want[name] {
			t.Errorf("client/%s is not up to date: run \"npm run types\" in client/", name)
		}
	}
	if len(got) != len(want) {
		t.Errorf("client/ has %d .d.ts files, and %d .js files", len(got), len(want))
	}
}

// TestDocs_TypeScript compiles the documents' code as strictly as TypeScript can.
func TestDocs_TypeScript(t *testing.T) {
	t.Parallel()
	folder := typeScriptFolder(t)
	for name, block := range map[string]string{"types": "typescript: types", "react": "typescript: react", "vue": "typescript: vue"} {
		writeBlock(t, block, folder, name+".ts")
	}
	for name, block := range map[string]string{"chat": "javascript: chat", "reference": "javascript: reference", "refused": "javascript: refused"} {
		text := strings.ReplaceAll(docBlock(t, block), "./chat.js", "/chat-client/chat.js")
		if !strings.Contains(text, "import") { // it follows the first lines
			text = docBlock(t, "javascript: chat") + text
		}
		if err := os.WriteFile(filepath.Join(folder, name+".ts"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	runTSC(t, folder, "--noEmit")

	wrong := map[string]string{
		"number":     `chat.send(5);`,
		"misspelled": `chat.addEventListener("mesage", ({ data }) => data);`,
		"missing":    `chat.addEventListener("join", ({ data }) => data);`,
	}
	for name, line := range wrong {
		text := docBlock(t, "javascript: chat") + line
		if err := os.WriteFile(filepath.Join(folder, name+".ts"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, _ := tsc(t, folder, "--noEmit")
	for name, line := range wrong {
		if !strings.Contains(string(out), name+".ts") {
			t.Errorf("got no error in %s:\n%s", line, out)
		}
	}
}

// typeScriptFolder returns a folder that is set up as docs/clients.md says, with the types of React and Vue.
func typeScriptFolder(t *testing.T) string {
	t.Helper()
	modules := needClientModules(t)
	folder := t.TempDir()
	copyFiles(t, "client/chat*.d.ts", filepath.Join(folder, "chat-client"))
	writeBlock(t, "json: paths", folder, "tsconfig.json")
	if err := os.Symlink(modules, filepath.Join(folder, "node_modules")); err != nil {
		t.Fatal(err)
	}
	return folder
}

// TestDocs_ReactAndVue runs what the documents show for both, in a browser.
func TestDocs_ReactAndVue(t *testing.T) {
	t.Parallel()
	folder := typeScriptFolder(t)
	for _, name := range []string{"react", "vue"} {
		writeBlock(t, "typescript: "+name, folder, name+".ts")
	}
	runTSC(t, folder, "--outDir", "built", "--rootDir", ".")
	s := startProcess(t, "", strings.Replace(moduleSite(t), "{\n", `{
	handle_path /built/* {
		root * `+filepath.Join(folder, "built")+`
		file_server
	}
	handle_path /modules/* {
		root * `+clientModules(t)+`
		file_server
	}
`, 1))
	browser := startBrowser(t)
	for _, row := range []struct{ name, imports, script string }{
		{
			"react",
			// React comes as a script, which sets window.React.
			`{ react: "data:text/javascript,export const { useEffect, useState } = React" }`,
			`for (const src of ["/modules/react/umd/react.production.min.js", "/modules/react-dom/umd/react-dom.production.min.js"]) {
				await new Promise((onload) => document.head.append(Object.assign(document.createElement("script"), { src, onload })));
			}
			const { useChat } = await import("/built/react.js"), { createElement } = React;
			const Room = ({ url }) => {
				const { messages, send } = useChat(url);
				window.say = send;
				return createElement("ul", null, messages.map(({ seq, data }) => createElement("li", { key: seq }, data)));
			};
			const root = ReactDOM.createRoot(document.querySelector("main"));
			window.show = (url) => root.render(url && createElement(Room, { url }));`,
		},
		{
			"vue",
			`{ vue: "/modules/vue/dist/vue.esm-browser.prod.js" }`,
			`const { createApp, h } = await import("vue"), { useChat } = await import("/built/vue.js");
			let app;
			const Room = (url) => ({
				setup() {
					const { messages, send } = useChat(url);
					window.say = send;
					return () => h("ul", messages.value.map(({ seq, data }) => h("li", { key: seq }, data)));
				},
			});
			window.show = (url) => {
				app?.unmount();
				app = url && createApp(Room(url));
				app?.mount("main");
			};`,
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := openTab(t, browser, s.url)
			evaluate[bool](p, `(async () => {
				const imports = Object.assign(document.createElement("script"), { type: "importmap" });
				imports.textContent = JSON.stringify({ imports: `+row.imports+` });
				document.head.append(imports);
				document.body.append(document.createElement("main"));
				`+row.script+`
				show("/hub/history/`+row.name+`1");
				return true;
			})()`)
			const shown = `[...document.querySelectorAll("li")].map((item) => item.textContent).join()`
			first, second := s.in(t).join("/hub/history/"+row.name+"1"), s.in(t).join("/hub/history/"+row.name+"2")
			first.text("from outside")
			first.wantText("from outside")
			p.waitFor(shown + ` === "from outside"`)
			evaluate[bool](p, `(say("from the page"), true)`)
			first.wantText("from the page")
			p.waitFor(shown + ` === "from outside,from the page"`)

			evaluate[bool](p, `(show("/hub/history/`+row.name+`2"), true)`)
			second.text("elsewhere")
			p.waitFor(shown + ` === "elsewhere"`)
			evaluate[bool](p, `(show(null), true)`)
			eventually(t, "the page to leave", func() bool {
				return strings.Count(request(t, http.MethodGet, "http://"+s.admin+"/chat_broadcast/hubs", nil).body, `"clients":1`) == 2
			})
		})
	}
}
