package chatbroadcast

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/gorilla/websocket"
)

// pushSite lets anybody publish.
const pushSite = `http://localhost:9080 {
	chat_broadcast /feed/* {
		http_publish
	}
	respond "next: {method}"
}`

// publish posts a message to path.
func publish(t testing.TB, path, body string, header ...string) answer {
	t.Helper()
	return request(t, http.MethodPost, "http://"+httpAddr+path, strings.NewReader(body), header...)
}

// wantPublished fails unless a message was published for so many clients under the given number.
func (a answer) wantPublished(t testing.TB, clients, seq int) {
	t.Helper()
	want := fmt.Sprintf("{\"clients\":%d,\"seq\":%d}\n", clients, seq)
	if a.status != http.StatusAccepted || a.body != want || a.header.Get("Content-Type") != "application/json" {
		t.Fatalf("got %d %q as %q, want 202 %q", a.status, a.body, a.header.Get("Content-Type"), want)
	}
}

func TestPublish_ReachesEveryClientWithItsOpcode(t *testing.T) {
	startCaddy(t, pushSite)
	peers := []*peer{join(t, "/feed/a"), join(t, "/feed/a")}
	join(t, "/feed/b")
	for i, tc := range []struct {
		contentType string
		want        frame
	}{
		{"", frame{websocket.TextMessage, "hello"}},
		{"text/plain", frame{websocket.TextMessage, ""}},
		{"application/json", frame{websocket.TextMessage, `{"κόσμε": "🙂"}`}},
		{"application/x-www-form-urlencoded", frame{websocket.TextMessage, "\x00\n"}}, // curl --data
		{"no type at all", frame{websocket.TextMessage, "text"}},
		{"application/octet-stream", frame{websocket.BinaryMessage, "\x00\xff"}},
		{"Application/Octet-Stream; charset=binary", frame{websocket.BinaryMessage, ""}},
		{"application/octet-stream", frame{websocket.BinaryMessage, strings.Repeat("\xff", defaultMaxMessageSize)}},
	} {
		publish(t, "/feed/a", tc.want.payload, "Content-Type", tc.contentType).wantPublished(t, len(peers), i+1)
		for _, p := range peers {
			if got := p.next(); got != tc.want {
				t.Fatalf("%s: got %.80v, want %.80v", tc.contentType, got, tc.want)
			}
		}
	}
	peers[0].text("from a client")
	peers[1].wantText("from a client")
	publish(t, "/feed/a", "after it").wantPublished(t, len(peers), 10)
}

func TestPublish_HubWithoutClientsKeepsNothing(t *testing.T) {
	startCaddy(t, pushSite)
	publish(t, "/feed/a", "lost").wantPublished(t, 0, 0)
	if openHubs() > 0 {
		t.Error("a hub was opened for a message")
	}
	p := join(t, "/feed/a")
	publish(t, "/feed/a", "found").wantPublished(t, 1, 1)
	p.wantText("found")
}

// historySite is pushSite with a history and room for one hub.
const historySite = `http://localhost:9080 {
	chat_broadcast /feed/* {
		http_publish
		history 10
		max_hubs 1
	}
	respond "next: {method}"
}`

func TestPublish_HubWithoutClientsKeepsItsHistory(t *testing.T) {
	startCaddy(t, historySite)
	publish(t, "/feed/a", "kept").wantPublished(t, 0, 1)
	publish(t, "/feed/a", "\xff", "Content-Type", "application/octet-stream").wantPublished(t, 0, 2)
	p := join(t, "/feed/a")
	p.wantText("kept")
	if got, want := p.next(), (frame{websocket.BinaryMessage, "\xff"}); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
	publish(t, "/feed/a", "live").wantPublished(t, 1, 3)
	p.wantText("live")
}

func TestPublish_OpensHubsWithinMaxHubs(t *testing.T) {
	startCaddy(t, historySite)
	publish(t, "/feed/a", "one").wantPublished(t, 0, 1)
	publish(t, "/feed/b", "makes room").wantPublished(t, 0, 1)
	p := join(t, "/feed/b")
	p.wantText("makes room")
	if a := publish(t, "/feed/a", "another"); a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
		t.Errorf("got %d with the header %v, want 503 with Retry-After", a.status, a.header)
	}
	publish(t, "/feed/b", "in the hub that there is").wantPublished(t, 1, 2)
	p.wantText("in the hub that there is")
}

func TestPublish_Refusals(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /feed/* {
		hub {query.hub}
		max_message_size 5
		origins friend.example
		http_publish
	}
	chat_broadcast /small/* {
		hub feed
		http_publish
	}
	request_body /small/* {
		max_size 5
	}
	handle_errors {
		respond "dressed {err.status_code}"
	}
}`)
	p := joinOn(t, (&peer{t: t}).dial(), "localhost", "/feed/?hub=feed")
	announced := func(body string) io.Reader { return strings.NewReader(body) }
	chunked := func(body string) io.Reader { return io.MultiReader(strings.NewReader(body)) } // of unknown length
	for _, tc := range []struct {
		name   string
		path   string
		body   io.Reader
		header []string
		want   int
	}{
		{"text that is not UTF-8", "/feed/?hub=feed", announced("a\xff"), nil, 400},
		{"text that ends within a character", "/feed/?hub=feed", announced("\xf0\x9f"), nil, 400},
		{"a message too large", "/feed/?hub=feed", announced("123456"), nil, 413},
		{"a message too large, of unknown length", "/feed/?hub=feed", chunked("123456"), nil, 413},
		{"a message too large for request_body", "/small/", announced("123456"), nil, 413},
		{"the same, of unknown length", "/small/", chunked("123456"), nil, 413},
		{"another site's page", "/feed/?hub=feed", announced("x"), []string{"Origin", "http://evil.example"}, 403},
		{"a page of no site", "/feed/?hub=feed", announced("x"), []string{"Origin", "null"}, 403},
		{"a compressed message", "/feed/?hub=feed", announced("x"), []string{"Content-Encoding", "gzip"}, 415},
		{"one that is encoded twice", "/feed/?hub=feed", announced("x"), []string{"Content-Encoding", "identity, br"}, 415},
		{"a compressed binary message", "/feed/?hub=feed", announced("x"), []string{"Content-Encoding", "gzip", "Content-Type", "application/octet-stream"}, 415},
		{"text in UTF-16", "/feed/?hub=feed", announced("x\x00"), []string{"Content-Type", "text/plain; charset=utf-16"}, 415},
		{"text in Latin-1", "/feed/?hub=feed", announced("x"), []string{"Content-Type", `text/plain; charset="ISO-8859-1"`}, 415},
		{"JSON in UTF-32", "/feed/?hub=feed", announced("x"), []string{"Content-Type", "application/json;charset=utf-32"}, 415},
		{"no hub", "/feed/", announced("x"), nil, 400},
		{"a hub's name too long", "/feed/?hub=" + strings.Repeat("x", 256), announced("x"), nil, 400},
		{"a hub's name with a control character", "/feed/?hub=a%0ab", announced("x"), nil, 400},
	} {
		got := request(t, http.MethodPost, "http://"+httpAddr+tc.path, tc.body, tc.header...)
		if want := fmt.Sprintf("dressed %d", tc.want); got.status != tc.want || got.body != want {
			t.Errorf("%s: got %d %q, want %d %q", tc.name, got.status, got.body, tc.want, want)
		}
	}
	publish(t, "/feed/?hub=feed", "12345", "Origin", "https://friend.example").wantPublished(t, 1, 1)
	publish(t, "/feed/?hub=feed", "own", "Origin", "http://"+httpAddr).wantPublished(t, 1, 2)
	publish(t, "/feed/?hub=feed", "utf-8", "Content-Type", `text/plain; charset="UTF-8"`).wantPublished(t, 1, 3)
	publish(t, "/feed/?hub=feed", "ascii", "Content-Type", "text/plain; charset=us-ascii").wantPublished(t, 1, 4)
	publish(t, "/feed/?hub=feed", "as is", "Content-Encoding", "Identity").wantPublished(t, 1, 5)
	p.wantText("12345") // nothing of what was refused
	for _, want := range []string{"own", "utf-8", "ascii", "as is"} {
		p.wantText(want)
	}
}

func TestPublish_TooLargeBodyIsRefusedBeforeItIsSent(t *testing.T) {
	startCaddy(t, pushSite)
	_, resp := handshakeOn(t, (&peer{t: t}).dial(), fmt.Sprintf(
		"POST /feed/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", defaultMaxMessageSize+1))
	if resp.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("got %s, want 413", resp.Status)
	}
}

// TestPublish_RefusalOfALargeBodyArrives posts bodies that are refused while they are sent. Without luck, a client that
// meets a reset sees no answer.
func TestPublish_RefusalOfALargeBodyArrives(t *testing.T) {
	startCaddy(t, `http://localhost:9080, https://localhost:9443 {
	chat_broadcast {
		hub lobby
		max_message_size 1KiB
		http_publish
	}
}`)
	join(t, "/")
	site, admin := "http://"+httpAddr+"/", "http://"+adminAddr+"/chat_broadcast/hubs/lobby/messages"
	body := strings.Repeat("x", 5<<20)
	sized := func(s string) io.Reader { return strings.NewReader(s) }
	chunked := func(s string) io.Reader { return io.MultiReader(strings.NewReader(s)) }
	for _, tc := range []struct {
		name   string
		by     http.RoundTripper
		url    string
		reader func(string) io.Reader
		header []string
		want   int
	}{
		{"too large", http.DefaultTransport, site, sized, nil, 413},
		{"too large, of unknown length", http.DefaultTransport, site, chunked, nil, 413},
		{"too large, over HTTP/2", transportTLS(), "https://" + httpsAddr + "/", sized, nil, 413},
		{"another site's page", http.DefaultTransport, site, sized, []string{"Origin", "https://evil.example"}, 403},
		{"compressed", http.DefaultTransport, site, sized, []string{"Content-Encoding", "gzip"}, 415},
		{"too large for the admin API", http.DefaultTransport, admin, sized, nil, 413},
		{"too large for the admin API, of unknown length", http.DefaultTransport, admin, chunked, nil, 413},
		{"for no hub", http.DefaultTransport, strings.Replace(admin, "lobby", "none", 1), sized, nil, 404},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if strings.HasPrefix(tc.url, "https:") {
				dialTLS(t) // there is a certificate
			}
			const tries = 30
			for i := range tries {
				size := 300<<10 + i*(len(body)-300<<10)/(tries-1)
				got := requestBy(t, tc.by, http.MethodPost, tc.url, tc.reader(body[:size]), tc.header...)
				if got.status != tc.want || got.body == "" {
					t.Fatalf("%d bytes: got %d %q, want %d", size, got.status, got.body, tc.want)
				}
			}
		})
	}
}

func TestPublish_ConnectionLastsIfTheRefusedBodyWasRead(t *testing.T) {
	startCaddy(t, pushSite)
	conn := (&peer{t: t}).dial()
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	r := bufio.NewReader(conn)
	for _, length := range []int{defaultMaxMessageSize + 1, 2} {
		fmt.Fprintf(conn, "POST /feed/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", length, strings.Repeat("x", length))
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.Close {
			t.Fatalf("%d bytes: got %s, %v, the connection ends: %v", length, resp.Status, err, resp.Close)
		}
	}
}

func TestPublish_RefusedBodyIsNotReadForever(t *testing.T) {
	startCaddy(t, pushSite)
	for _, header := range []string{fmt.Sprintf("Content-Length: %d", maxDiscardedBody+1), "Transfer-Encoding: chunked"} {
		p := &peer{t: t}
		conn := p.dial()
		_ = conn.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(conn, "POST /feed/a HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n", header)
		chunk := []byte("10000\r\n" + strings.Repeat("x", 1<<16) + "\r\n")
		sent := 0
		for sent < 8*maxDiscardedBody {
			n, err := conn.Write(chunk)
			sent += n
			if err != nil {
				break
			}
		}
		conn.Close()
		if sent >= 8*maxDiscardedBody {
			t.Errorf("%s: the server took %d bytes of a body that it refused", header, sent)
		}
	}
}

func TestPublish_OtherRequestsGoToTheNextHandler(t *testing.T) {
	startCaddy(t, pushSite+`
http://127.0.0.1:9080 {
	chat_broadcast
	respond "next: {method}"
}`)
	p := join(t, "/feed/a")
	for _, tc := range []struct{ name, method, url string }{
		{"GET", http.MethodGet, "http://localhost:9080/feed/a"},
		{"PUT", http.MethodPut, "http://localhost:9080/feed/a"},
		{"OPTIONS", http.MethodOptions, "http://localhost:9080/feed/a"},
		{"POST elsewhere", http.MethodPost, "http://localhost:9080/elsewhere"},
		{"POST without the subdirective", http.MethodPost, "http://127.0.0.1:9080/feed/a"},
	} {
		got := request(t, tc.method, tc.url, strings.NewReader("x"))
		if want := "next: " + tc.method; got.status != http.StatusOK || got.body != want {
			t.Errorf("%s: got %d %q, want 200 %q", tc.name, got.status, got.body, want)
		}
	}
	publish(t, "/feed/a", "first").wantPublished(t, 1, 1)
	p.wantText("first")
	handshake := strings.Replace(handshakeRequest(httpAddr, "/feed/a", ""), http.MethodGet, http.MethodPost, 1)
	if _, resp := handshakeOn(t, p.dial(), handshake); resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("a handshake by POST: got %s, want 405", resp.Status)
	}
}

func TestPublish_ReadOnlyHubTakesPostsOnly(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast {
		read_only
		http_publish
	}
}`)
	p, q := join(t, "/news"), join(t, "/news")
	publish(t, "/news", "news").wantPublished(t, 2, 1)
	p.wantText("news")
	q.wantText("news")
	p.text("me too")
	p.wantClose(websocket.ClosePolicyViolation, "read_only")
	q.send(websocket.PingMessage, "alive")
	if got, want := q.next(), (frame{websocket.PongMessage, "alive"}); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestPublish_SharesTheHubWithOtherDirectives(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /in {
		hub {http.request.header.X-Hub}
		http_publish
	}
	chat_broadcast /out lobby
}`)
	p := join(t, "/out")
	publish(t, "/in", "hello", "X-Hub", "lobby").wantPublished(t, 1, 1)
	p.wantText("hello")
	publish(t, "/in", "hello", "X-Hub", "elsewhere").wantPublished(t, 0, 0)
}

func TestPublish_OverHTTP2(t *testing.T) {
	startCaddy(t, "localhost:9443 {\nchat_broadcast {\nhttp_publish\n}\n}")
	p := joinTLS(t, "/a")
	h2 := transportTLS()
	publishTLS := func(header ...string) answer {
		return requestBy(t, h2, http.MethodPost, "https://"+httpsAddr+"/a", strings.NewReader("hello"), header...)
	}
	publishTLS().wantPublished(t, 1, 1)
	p.wantText("hello")
	if got := publishTLS("Origin", "https://evil.example"); got.status != http.StatusForbidden {
		t.Errorf("another site's page: got %d, want 403", got.status)
	}
}

// transportTLS speaks HTTP/2 to the Caddy under test.
func transportTLS() *http.Transport {
	return &http.Transport{
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"},
		ForceAttemptHTTP2: true,
		DisableKeepAlives: true,
	}
}

func TestPublish_RateByAddress(t *testing.T) {
	const site = `http://localhost:9080 {
	chat_broadcast {
		hub feed
		http_publish
		rate %s
	}
}`
	const trust = "servers {\ntrusted_proxies static 127.0.0.0/8 ::1/128\n}"
	s := startCaddy(t, "")
	s.loadWith(trust, fmt.Sprintf(site, "2 1h"))
	p := join(t, "/")
	from := func(ip string) answer {
		t.Helper()
		return publish(t, "/", ip, "X-Forwarded-For", ip)
	}
	limited := func(ip, wait string) {
		t.Helper()
		got := from(ip)
		if got.status != http.StatusTooManyRequests || got.header.Get("Retry-After") != wait {
			t.Fatalf("%s: got %d, Retry-After %q, want 429 and %q", ip, got.status, got.header.Get("Retry-After"), wait)
		}
	}
	from("203.0.113.1").wantPublished(t, 1, 1)
	from("203.0.113.1").wantPublished(t, 1, 2)
	limited("203.0.113.1", "1800")
	limited("203.0.113.1", "1800") // what is refused costs nothing
	from("203.0.113.2").wantPublished(t, 1, 3)
	from("2001:db8::1").wantPublished(t, 1, 4)
	from("2001:db8::2").wantPublished(t, 1, 5) // the same /64
	limited("2001:db8::3", "1800")
	from("2001:db8:0:1::1").wantPublished(t, 1, 6)
	if got := publish(t, "/", "\xff", "X-Forwarded-For", "203.0.113.3"); got.status != http.StatusBadRequest {
		t.Fatalf("got %d, want 400", got.status)
	}
	from("203.0.113.3").wantPublished(t, 1, 7)
	limited("203.0.113.3", "1800") // the body that was refused has had its turn
	p.text("another bucket")
	p.text("another bucket")

	s.loadWith(trust, fmt.Sprintf(site, "2 1h")+"\n# a reload")
	limited("203.0.113.1", "1800")
	s.loadWith(trust, fmt.Sprintf(site, "1 2h"))
	from("203.0.113.1").wantPublished(t, 1, 10)
	limited("203.0.113.1", "7200")
}

func TestBuckets_FullBucketsAreForgotten(t *testing.T) {
	now := time.Now()
	var b buckets
	address := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
	}
	take := func(i int, r hub.Rate) bool {
		_, ok := b.take(now, address(i), r)
		return ok
	}
	r := hub.Rate{Messages: 2, Window: time.Minute}
	slow := hub.Rate{Messages: 1, Window: time.Hour}
	take(100, r)
	take(0, slow)
	for i := range 100 {
		take(i, r)
	}
	for range 5 { // what is used is kept, however old
		if !take(0, r) {
			t.Fatal("a bucket was not refilled in its time")
		}
		if take(0, r) {
			t.Fatal("a bucket was refilled before its time")
		}
		now = now.Add(30 * time.Second)
	}
	if take(0, slow) {
		t.Error("the slow bucket was forgotten before it was full")
	}
	for range 3 {
		now = now.Add(time.Hour)
		take(1, r)
	}
	if got := len(b.recent) + len(b.old); got > 2 {
		t.Errorf("got %d buckets, want only those of the last hours", got)
	}
}

func TestBuckets_AreBounded(t *testing.T) {
	now := time.Now()
	var b buckets
	r := hub.Rate{Messages: 1, Window: time.Hour}
	mine := netip.MustParsePrefix("2001:db8::/64")
	b.take(now, mine, r)
	for i := range 5 * maxBuckets {
		prefix := netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, byte(i >> 16), byte(i >> 8), byte(i)}), 64)
		if _, ok := b.take(now, prefix, r); !ok {
			t.Fatal("an address has no bucket of its own")
		}
		if len(b.recent) > maxBuckets || len(b.old) > maxBuckets {
			t.Fatalf("got %d recent and %d old buckets, want at most %d", len(b.recent), len(b.old), maxBuckets)
		}
		// An address that keeps publishing is not forgotten to make room for others.
		if i%1000 == 0 {
			if _, ok := b.take(now, mine, r); ok {
				t.Fatal("a bucket in use was forgotten")
			}
		}
	}
}

func TestPublish_SlowBodyDelaysNobody(t *testing.T) {
	startCaddy(t, pushSite)
	p := join(t, "/feed/a")
	slow := p.dial()
	defer slow.Close()
	fmt.Fprintf(slow, "POST /feed/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nsl")
	publish(t, "/feed/a", "quick").wantPublished(t, 1, 1)
	p.wantText("quick")
	p.text("from a client")
	p.wantText("from a client")
	fmt.Fprint(slow, "ow")
	p.wantText("slow")
	gone := p.dial()
	fmt.Fprintf(gone, "POST /feed/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nha")
	gone.Close() // half a message is none
	publish(t, "/feed/a", "last").wantPublished(t, 1, 4)
	p.wantText("last")
}

// TestPublish_BodyThatOutlivesTheHubValueIsRefused sends half a body before a reload removes the directive.
func TestPublish_BodyThatOutlivesTheHubValueIsRefused(t *testing.T) {
	s := startCaddy(t, pushSite)
	slow := half(t, httpAddr)
	s.load("http://localhost:9080 {\nrespond gone\n}")
	if got := slow(); got.StatusCode != http.StatusServiceUnavailable || got.Header.Get("Retry-After") == "" {
		t.Errorf("got %s, Retry-After %q, want 503", got.Status, got.Header.Get("Retry-After"))
	}
}

// half sends a POST with half its body, and returns when the handler has read that half. The returned function sends the
// rest and returns the response.
func half(t *testing.T, addr string) (rest func() *http.Response) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "POST /feed/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
	r := bufio.NewReader(conn)
	line, err := r.ReadString('\n') // net/http asks for the body when the handler does
	if err != nil || !strings.HasPrefix(line, "HTTP/1.1 100 ") {
		t.Fatalf("got %q, %v, want 100", line, err)
	}
	if line, err = r.ReadString('\n'); line != "\r\n" {
		t.Fatalf("got %q, %v after the 100, want an empty line", line, err)
	}
	fmt.Fprint(conn, "ha")
	return func() *http.Response {
		t.Helper()
		fmt.Fprint(conn, "lf")
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
}

// TestPublish_WhileCaddyExitsIsRefused has a Caddy exit, but not before a delay in which
// it still listens.
func TestPublish_WhileCaddyExitsIsRefused(t *testing.T) {
	p := startProcess(t, "shutdown_delay 1m", strings.Replace(pushSite, ":9080", "", 1))
	reading := half(t, p.http)
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	var got answer
	eventually(t, "a refusal", func() bool {
		got = request(t, http.MethodPost, "http://"+p.http+"/feed/a", strings.NewReader("late"))
		return got.status != http.StatusAccepted
	})
	if got.status != http.StatusServiceUnavailable || got.header.Get("Retry-After") == "" {
		t.Errorf("before the body: got %d, Retry-After %q, want 503", got.status, got.header.Get("Retry-After"))
	}
	if got := reading(); got.StatusCode != http.StatusServiceUnavailable || got.Header.Get("Retry-After") == "" {
		t.Errorf("after the body: got %s, Retry-After %q, want 503", got.Status, got.Header.Get("Retry-After"))
	}
}
