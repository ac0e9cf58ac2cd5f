package chatbroadcast

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
)

const checkSite = `{
	chat_broadcast /chat/* {
		max_clients_per_hub 1
		origins https://app.example
	}
	chat_broadcast /hub {
		hub {query.hub}
		user {query.user}
	}
	chat_broadcast /address address {
		max_clients_per_ip 1
	}
	chat_broadcast /everywhere everywhere {
		max_clients 1
		origins *
	}
	chat_broadcast /hubs/* {
		hub hubs{path}
		max_hubs 2
	}
	respond "a page"
}`

// asked returns the target of a check of a hub.
func asked(target string) string {
	if strings.Contains(target, "?") {
		return target + "&chat_broadcast_check"
	}
	return target + "?chat_broadcast_check"
}

// checkAt checks a hub. header are names and values.
func checkAt(t *testing.T, target string, header ...string) answer {
	t.Helper()
	return request(t, http.MethodGet, "http://"+httpAddr+asked(target), nil, header...)
}

// TestCheck_AnswersAsAHandshake compares the answer to a check with the answer to a handshake of the same page.
func TestCheck_AnswersAsAHandshake(t *testing.T) {
	startCaddy(t, "http://localhost:9080 "+checkSite)
	join(t, "/chat/full")
	join(t, "/address")
	join(t, "/everywhere")
	join(t, "/hubs/a") // of two hubs, one address may open one
	const own, listed, foreign = "http://localhost:9080", "https://app.example", "https://evil.example"
	for _, tc := range []struct {
		name, target string
		header       []string // of the handshake; the check has it, too, except the origin of a page that is its own
		want         int
	}{
		{"a hub", "/chat/a", nil, 101},
		{"a hub with a query", "/chat/a?page=1", nil, 101},
		{"an own page", "/chat/a", []string{"Origin", own}, 101},
		{"a listed page", "/chat/a", []string{"Origin", listed}, 101},
		{"a foreign page", "/chat/a", []string{"Origin", foreign}, 403},
		{"a sandboxed page", "/chat/a", []string{"Origin", "null"}, 403},
		{"a foreign page without its origin", "/chat/a", []string{"Sec-Fetch-Site", "cross-site"}, 403},
		{"a sandboxed page, where all may connect", "/everywhere", []string{"Origin", "null"}, 503},
		{"a full hub", "/chat/full", nil, 503},
		{"a full hub for a listed page", "/chat/full", []string{"Origin", listed}, 503},
		{"a full hub for a foreign page", "/chat/full", []string{"Origin", foreign}, 403},
		{"a full directive", "/everywhere", nil, 503},
		{"an address with enough clients", "/address", nil, 429},
		{"an address with enough hubs", "/hubs/b", nil, 429},
		{"the hub that the address has", "/hubs/a", nil, 101},
		{"no hub", "/hub", nil, 400},
		{"a hub's name with a control character", "/chat/%07", nil, 400},
		{"a user too long", "/hub?hub=a&user=" + strings.Repeat("x", 1025), nil, 400},
		{"a resumption", "/chat/a?chat_broadcast_since=abc:1", nil, 101},
		{"a malformed resumption", "/chat/a?chat_broadcast_since=abc", nil, 400},
		{"a replay", "/chat/a?chat_broadcast_replay=bundles", nil, 101},
		{"a malformed replay", "/chat/a?chat_broadcast_replay=all", nil, 400},
		{"two resumptions", "/chat/a?chat_broadcast_since=abc:1&chat_broadcast_since=abc:2", nil, 400},
	} {
		t.Run(tc.name, func(t *testing.T) {
			header := eventsHeader
			for pair := range slices.Chunk(tc.header, 2) {
				header += pair[0] + ": " + pair[1] + "\r\n"
			}
			p, resp := handshakeOn(t, (&peer{t: t}).dial(), handshakeRequest(httpAddr, tc.target, ported(header)))
			status, body := resp.StatusCode, make([]byte, max(0, resp.ContentLength))
			if status != tc.want {
				t.Fatalf("the handshake: got %d, want %d", status, tc.want)
			}
			if status == http.StatusSwitchingProtocols {
				status, body = http.StatusNoContent, nil
				p.conn.Close()
				eventually(t, "the client of the handshake to be gone", func() bool { return allClients() == 4 })
			} else if _, err := io.ReadFull(p.r, body); err != nil {
				t.Fatal(err)
			}
			got := checkAt(t, tc.target, tc.header...)
			if got.status != status || got.body != string(body) {
				t.Errorf("got %d %q, the handshake got %d %q", got.status, got.body, status, body)
			}
			for name, want := range map[string]string{
				"Retry-After":   resp.Header.Get("Retry-After"),
				"Cache-Control": "no-store",
				"Vary":          "Origin",
			} {
				if got := got.header.Get(name); got != want {
					t.Errorf("%s: got %q, want %q", name, got, want)
				}
			}
			if got := allClients(); got != 4 {
				t.Errorf("got %d clients, want the 4 that have joined", got)
			}
		})
	}
}

// TestCheck_OnlyPagesThatMayConnectCanReadIt looks at the headers that let a page of another origin read an answer.
func TestCheck_OnlyPagesThatMayConnectCanReadIt(t *testing.T) {
	startCaddy(t, "http://localhost:9080 "+checkSite)
	join(t, "/chat/full")
	for _, tc := range []struct {
		target, origin string
		want           bool
	}{
		{"/chat/a", "https://app.example", true},
		{"/chat/full", "https://app.example", true},
		{"/chat/%07", "https://app.example", true},
		{"/chat/a", ported("http://localhost:9080"), true},
		{"/everywhere", "https://evil.example", true},
		{"/everywhere", "null", true},
		{"/chat/a", "https://evil.example", false},
		{"/chat/full", "https://evil.example", false},
		{"/chat/a", "null", false},
	} {
		got := checkAt(t, tc.target, "Origin", tc.origin)
		origin, credentials, exposed := "", "", ""
		if tc.want {
			origin, credentials, exposed = tc.origin, "true", "Retry-After"
		}
		for name, want := range map[string]string{
			"Access-Control-Allow-Origin":      origin,
			"Access-Control-Allow-Credentials": credentials,
			"Access-Control-Expose-Headers":    exposed,
			"Cross-Origin-Resource-Policy":     "same-origin",
			"Vary":                             "Origin",
		} {
			if got := got.header.Get(name); got != want {
				t.Errorf("%s for %s, %s: got %q, want %q", tc.target, tc.origin, name, got, want)
			}
		}
	}
	for name := range checkAt(t, "/everywhere").header {
		if strings.HasPrefix(name, "Access-Control-") {
			t.Errorf("got %s for a page of the same origin", name)
		}
	}
}

// TestCheck_PageOfTheSameOriginIsKnownByItsReferer has a proxy in front that does not pass on the Host. A browser sends no
// Origin with a GET by the page of the same origin, but with the handshake.
func TestCheck_PageOfTheSameOriginIsKnownByItsReferer(t *testing.T) {
	startCaddy(t, "http://localhost:9080 "+checkSite)
	for _, tc := range []struct {
		referer string
		want    int
	}{
		{"http://localhost:9080/page?x=1", http.StatusNoContent},
		{"https://app.example/", http.StatusNoContent},
		{"https://public.example/chat/page", http.StatusForbidden},
		{"about:blank", http.StatusNoContent},
		{"%", http.StatusNoContent},
	} {
		got := checkAt(t, "/chat/a", "Referer", tc.referer, "Sec-Fetch-Site", "same-origin")
		if got.status != tc.want {
			t.Errorf("from %s: got %d %q, want %d", tc.referer, got.status, got.body, tc.want)
		}
		if origin := got.header.Get("Access-Control-Allow-Origin"); origin != "" {
			t.Errorf("from %s: got Access-Control-Allow-Origin %q, want none", tc.referer, origin)
		}
	}
}

func TestCheck_WhatIsACheck(t *testing.T) {
	startCaddy(t, "http://localhost:9080 "+checkSite)
	const page = "a page"
	for _, tc := range []struct {
		method, query string
		header        []string
		want          string // the body, or "" for a check
	}{
		{http.MethodGet, "?chat_broadcast_check", nil, ""},
		{http.MethodGet, "?chat_broadcast_check=", nil, ""},
		{http.MethodGet, "?a=1&chat_broadcast_check=anything&b=2", nil, ""},
		{http.MethodGet, "?chat_broadcast_check=1&chat_broadcast_check=2", nil, ""},
		{http.MethodGet, "", []string{"Chat-Broadcast-Check", "1"}, ""},
		{http.MethodGet, "", []string{"chat-broadcast-check", ""}, ""},
		{http.MethodGet, "", nil, page},
		{http.MethodGet, "?check", nil, page},
		{http.MethodGet, "?a=chat_broadcast_check", nil, page},
		{http.MethodGet, "?chat_broadcast_checked", nil, page},
		{http.MethodPost, "?chat_broadcast_check", nil, page},
	} {
		got := request(t, tc.method, "http://"+httpAddr+"/chat/a"+tc.query, nil, tc.header...)
		status := http.StatusOK
		if tc.want == "" {
			status = http.StatusNoContent
		}
		if got.status != status || got.body != tc.want {
			t.Errorf("%s %s with %v: got %d %q, want %d %q", tc.method, tc.query, tc.header, got.status, got.body, status, tc.want)
		}
	}
	if got := request(t, http.MethodHead, "http://"+httpAddr+"/hub?chat_broadcast_check", nil); got.status != http.StatusBadRequest || got.body != "" {
		t.Errorf("HEAD: got %d %q, want 400 without a body", got.status, got.body)
	}
	p := join(t, "/chat/a?chat_broadcast_check") // a handshake stays one
	p.text("hello")
	p.wantText("hello")
}

// TestCheck_OverEveryVersionOfHTTP asks as browsers do: over TLS their requests come over HTTP/2, their handshakes over
// HTTP/1.1.
func TestCheck_OverEveryVersionOfHTTP(t *testing.T) {
	startCaddy(t, "https://localhost:9443 "+checkSite)
	joinTLS(t, "/chat/full")
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			// A transport with HTTP/2 adds its protocol to the TLS configuration, so each has a configuration of its own.
			transport := &http.Transport{
				TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
				DisableKeepAlives: true,
				ForceAttemptHTTP2: http2,
			}
			for target, want := range map[string]int{"/chat/a": http.StatusNoContent, "/chat/full": http.StatusServiceUnavailable} {
				got := requestBy(t, transport, http.MethodGet, "https://"+httpsAddr+asked(target), nil)
				if got.status != want {
					t.Errorf("%s: got %d %q, want %d", target, got.status, got.body, want)
				}
			}
		})
	}
}

// TestCheck_ErrorRoutesRenderTheRefusal also lets a page of another origin read what they render.
func TestCheck_ErrorRoutesRenderTheRefusal(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	basic_auth /members {
		ada $2a$14$BaaBpYJ.LJ5KcGZ8GN7XAuTzuMN9IA4kYcJ5pV7iNV7xcfg2sCqVi
	}
	chat_broadcast /members members
	chat_broadcast /chat/* {
		hub {query.hub}
		origins https://app.example
	}
	handle_errors {
		respond "sorry: {err.message}"
	}
}`)
	got := checkAt(t, "/chat/a", "Origin", "https://app.example")
	if got.status != http.StatusBadRequest || got.body != "sorry: the hub's name is empty" ||
		got.header.Get("Access-Control-Allow-Origin") != "https://app.example" || got.header.Get("Cache-Control") != "no-store" {
		t.Errorf("got %d %q with %v", got.status, got.body, got.header)
	}
	if got := checkAt(t, "/members"); got.status != http.StatusUnauthorized {
		t.Errorf("without a password: got %d, want the 401 of the route before", got.status)
	}
}

// TestCheck_LeavesNoTraceButALogLine checks beside a hub that is kept for its history and would make room for another.
func TestCheck_LeavesNoTraceButALogLine(t *testing.T) {
	s := startCaddy(t, `http://localhost:9080 {
	log_append refused {http.chat_broadcast.refused}
	log
	chat_broadcast /chat/* {
		max_clients 1
		max_hubs 2
		history 10
		user {query.name}
	}
}`)
	p := joinEvents(t, "/chat/kept?name=ada")
	p.sendText("m1", "hello")
	p.conn.Close()
	eventually(t, "the hub to be kept", func() bool { return allClients() == 0 && openHubs() == 1 })
	p = joinEvents(t, "/chat/other?name=ada")
	p.conn.Close()
	eventually(t, "both hubs to be kept", func() bool { return allClients() == 0 && openHubs() == 2 })
	before := scrape(t)
	for i := range 20 {
		if got := checkAt(t, fmt.Sprintf("/chat/new%d?name=eve", i)); got.status != http.StatusNoContent {
			t.Fatalf("got %d %q, want 204", got.status, got.body)
		}
	}
	if got := openHubs(); got != 2 || hubs.hub("http://localhost:"+portOf(httpAddr)+"/chat/kept") == nil {
		t.Errorf("got %d hubs, want the 2 that are kept", got)
	}
	p = joinEvents(t, "/chat/kept?name=ada")
	p.wantMessages(1, "hello")
	for range 5 {
		if got := checkAt(t, "/chat/kept?name=eve"); got.status != http.StatusServiceUnavailable {
			t.Fatalf("got %d %q, want 503", got.status, got.body)
		}
	}
	after := scrape(t)
	for _, reason := range refusalReasons {
		if got := value(after["refusals_total"], reason) - value(before["refusals_total"], reason); got != 0 {
			t.Errorf("refusals_total of %s grew by %v, want 0", reason, got)
		}
	}
	told := 0
	eventually(t, "the log to tell of 5 checks", func() bool {
		told = 0
		for _, line := range s.logged(moduleID, 0) {
			switch line["msg"] {
			case "check refused":
				told += 1 + int(line["omitted"].(float64))
				if line["reason"] != "max_clients" || line["level"] != "info" || line["status"] != 503.0 || line["user"] != "eve" ||
					!strings.HasSuffix(line["hub"].(string), "/chat/kept") {
					t.Errorf("got %v", line)
				}
			case "request refused":
				t.Errorf("got %v, but no handshake was refused", line)
			}
		}
		return told >= 5
	})
	if told != 5 {
		t.Errorf("the log tells of %d checks, want 5", told)
	}
	if line := s.logged("http.log.access", 25)[24]; line["refused"] != "max_clients" {
		t.Errorf("access log: got %v, want refused max_clients", line)
	}
}

// TestCheck_EngineIsUnavailable has nodes share their hubs on a Redis that there is not.
func TestCheck_EngineIsUnavailable(t *testing.T) {
	s := startCaddy(t, plainChat)
	s.loadWith(withEngine(fmt.Sprintf("redis redis://127.0.0.1:%d", freePort())), plainChat)
	resp := refused(t, http.StatusServiceUnavailable, "/chat/a")
	got := checkAt(t, "/chat/a")
	if got.status != http.StatusServiceUnavailable || !strings.Contains(got.body, "the engine is unavailable") ||
		got.header.Get("Retry-After") != resp.Header.Get("Retry-After") {
		t.Errorf("got %d %q with Retry-After %q", got.status, got.body, got.header.Get("Retry-After"))
	}
}

// TestCheck_InABrowser has a page of another origin ask hubs that let it in and hubs that do not, and a page of the same
// origin.
func TestCheck_InABrowser(t *testing.T) {
	browser := startBrowser(t)
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /open/* {
		origins http://localhost:9081
		max_clients_per_hub 1
	}
	chat_broadcast /closed/* {
		max_clients_per_hub 1
	}
	respond "a page"
}
http://localhost:9081 {
	header Content-Type text/html
	respond "<!doctype html><title>a page of another origin</title><body></body>"
}`)
	join(t, "/open/full")
	join(t, "/closed/full")
	const full = "503 5 the directive's max_clients_per_hub is reached\n"
	ask := `(path) => fetch("http://localhost:9080" + path + "?chat_broadcast_check", { credentials: "include" })
		.then(async (r) => [r.status, r.headers.get("Retry-After") ?? "-", await r.text()].join(" "), (e) => e.name)`
	for _, page := range []struct {
		url  string
		want map[string]string
	}{
		{"http://localhost:9081/", map[string]string{
			"/open/a": "204 - ", "/open/full": full, "/closed/a": "TypeError", "/closed/full": "TypeError",
		}},
		{"http://localhost:9080/", map[string]string{
			"/open/a": "204 - ", "/open/full": full, "/closed/a": "204 - ", "/closed/full": full,
		}},
	} {
		p := openTab(t, browser, ported(page.url))
		for path, want := range page.want {
			if got := evaluate[string](p, ported("("+ask+")("+jsString(path)+")")); got != want {
				t.Errorf("a page at %s asks %s: got %q, want %q", page.url, path, got, want)
			}
		}
	}
	p := openTab(t, browser, ported("http://localhost:9081/"))
	for _, path := range []string{"/open/a", "/open/full", "/closed/a", "/closed/full"} {
		for _, kind := range []string{"script", "img"} {
			got := evaluate[string](p, ported(`new Promise((resolve) => {
				const element = document.createElement(`+jsString(kind)+`);
				element.onload = element.onerror = (e) => resolve(e.type);
				element.src = "http://localhost:9080`+path+`?chat_broadcast_check";
				document.body.append(element);
			})`))
			if got != "error" {
				t.Errorf("a page of another origin loads %s as <%s>: got the event %q, want error", path, kind, got)
			}
		}
	}
}

// TestCheck_FloodDisturbsNobody checks as fast as it goes, beside a conversation.
func TestCheck_FloodDisturbsNobody(t *testing.T) {
	startCaddy(t, plainChat)
	c := newConversation(t, "/chat/a")
	before := heap()
	conn := c.peers[0].dial()
	defer conn.Close()
	done := make(chan error, 1)
	const checks = 5000
	go func() { // ends when everything is answered, or with the connection
		r := bufio.NewReader(conn)
		for range checks {
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				done <- err
				return
			}
			_ = resp.Body.Close() // 204 has none
			if resp.StatusCode != http.StatusNoContent {
				done <- fmt.Errorf("got %s", resp.Status)
				return
			}
		}
		done <- nil
	}()
	for i := range checks {
		if _, err := fmt.Fprintf(conn, "GET /chat/%d?chat_broadcast_check HTTP/1.1\r\nHost: %s\r\n\r\n", i, httpAddr); err != nil {
			t.Fatal(err)
		}
		if i%100 == 0 {
			c.exchange(1, "meanwhile")
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := openHubs(); got != 1 {
		t.Errorf("got %d hubs, want 1", got)
	}
	if grown := int64(heap()) - int64(before); grown > 4<<20 {
		t.Errorf("memory grew by %d bytes, want at most 4 MiB", grown)
	}
}
