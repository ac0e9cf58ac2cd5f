package chatbroadcast

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// The members of these lists wrap the response writer, the request or both, each in its own way.
var wrappers = []struct{ name, directives string }{
	{"nothing", ""},
	{"log", "log"},
	{"encode", "encode"},
	{"header, immediate", "header X-Site yes\nheader -Server"},
	{"header, deferred", "header >X-Site yes"},
	{"request_body", "request_body {\nmax_size 1KB\n}"},
	{"basic_auth", "basic_auth {\nada $2a$04$9aBQmv5R.QsqmruI6ZyCC.mngoaloyKD8UYmQ5Z0z/bsN1Vx0RRkG\n}"},
	{"forward_auth", "forward_auth 127.0.0.1:9081 {\nuri /\ncopy_headers X-User\n}"},
	{"handle_path", ""},
	{"tracing", "tracing {\nspan test\n}"},
	{"everything", "log\nencode\nheader X-Site yes\nheader >X-Late yes\nrequest_body {\nmax_size 1KB\n}\n" +
		"forward_auth 127.0.0.1:9081 {\nuri /\n}"},
}

func init() {
	caddy.RegisterModule(new(brokenWrapper))
	httpcaddyfile.RegisterHandlerDirective("test_broken_wrapper", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return new(brokenWrapper), nil
	})
	httpcaddyfile.RegisterDirectiveOrder("test_broken_wrapper", httpcaddyfile.Before, "header")
}

// A brokenWrapper has response writers that panic with the header, or with the hijacking, if the path says so.
type brokenWrapper struct{}

// CaddyModule implements caddy.Module.
func (*brokenWrapper) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_broken_wrapper", New: func() caddy.Module { return new(brokenWrapper) }}
}

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (*brokenWrapper) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(&brokenWriter{w, r.URL.Path}, r)
}

type brokenWriter struct {
	http.ResponseWriter
	path string
}

func (w *brokenWriter) WriteHeader(status int) {
	if w.path == "/chat/header" {
		panic("a bug in WriteHeader")
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *brokenWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	switch w.path {
	case "/chat/hijack":
		panic("a bug in Hijack")
	case "/chat/refused":
		return nil, nil, errors.New("not today")
	}
	return http.NewResponseController(w.ResponseWriter).Hijack()
}

// TestUpgrade_WriterThatFailsLeavesNoClient has response writers of other plugins that panic or fail after the client has joined.
func TestUpgrade_WriterThatFailsLeavesNoClient(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\ntest_broken_wrapper\nchat_broadcast /chat/*\n}")
	for _, path := range []string{"/chat/header", "/chat/hijack", "/chat/refused"} {
		for range 10 {
			conn, err := net.Dial("tcp", httpAddr)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Write([]byte(handshakeRequest(httpAddr, path, eventsHeader))); err != nil {
				t.Fatal(err)
			}
			p := &peer{t: t, conn: conn, r: bufio.NewReader(conn)}
			p.patient()
			_, _ = p.r.ReadByte() // an answer, or the end: the handler is done
			_ = conn.Close()
		}
		eventually(t, "the client to be gone", func() bool { return allClients() == 0 && openHubs() == 0 })
	}
	p := join(t, "/chat/works")
	p.text("hello")
	p.wantText("hello")
}

func TestUpgrade_BehindEveryWrapper(t *testing.T) {
	for _, tc := range wrappers {
		for _, scheme := range []string{"http", "https"} {
			t.Run(tc.name+"/"+scheme, func(t *testing.T) {
				open := "route {"
				if tc.name == "handle_path" {
					open = "handle_path /x/* {"
				}
				s := startCaddy(t, fmt.Sprintf(`http://localhost:9080, https://localhost:9443 {
	%s
	%s
		chat_broadcast /chat/*
		respond "a page"
	}
}
http://127.0.0.1:9081 {
	respond 204
}`, tc.directives, open))
				path := "/chat/a"
				if tc.name == "handle_path" {
					path = "/x/chat/a"
				}
				const auth = "Authorization: Basic YWRhOmxvdmVsYWNl\r\n" // ada:lovelace
				connect := join
				if scheme == "https" {
					connect = joinTLS
				}
				a, b := connect(t, path, auth), connect(t, path, auth)
				a.text("hello")
				a.wantText("hello")
				b.wantText("hello")
				// Something large enough that it does not go in one piece.
				large := strings.Repeat("x", 60_000)
				b.text(large)
				a.wantText(large)
				b.wantText(large)
				if strings.Contains(tc.directives, "log") {
					for _, entry := range s.logged("http.log.access", 2) {
						if got := entry["status"]; got != 101.0 {
							t.Errorf("access log: got status %v, want 101", got)
						}
					}
				}
				a.conn.Close()
				b.conn.Close()
				s.logged(moduleID, 2)
			})
		}
	}
}

func TestUpgrade_ResponseHasTheHeadersOfTheSite(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	header X-Site yes
	header >X-Late yes
	header -Server
	chat_broadcast
}`)
	conn, err := net.Dial("tcp", httpAddr)
	if err != nil {
		t.Fatal(err)
	}
	_, resp := handshakeOn(t, conn, handshakeRequest(httpAddr, "/", ""))
	for name, want := range map[string]string{
		"Upgrade":              "websocket",
		"Connection":           "Upgrade",
		"Sec-Websocket-Accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", // the example of RFC 6455 §1.3
		"X-Site":               "yes",
		"X-Late":               "yes",
		"Server":               "",
	} {
		if got := resp.Header.Get(name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

func TestUpgrade_HeadersAreSpelledAsInTheRFC(t *testing.T) {
	startCaddy(t, plainChat)
	request := handshakeRequest(httpAddr, "/chat/a", "Sec-WebSocket-Protocol: "+hub.EventsProtocol+"\r\n")
	version := strings.Replace(request, "Version: 13", "Version: 8", 1)
	for _, tc := range []struct {
		name, request string
		want          []string
	}{
		{"101", request, []string{
			"HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", "Upgrade: websocket",
			"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", "Sec-WebSocket-Protocol: " + hub.EventsProtocol,
		}},
		{"426", version, []string{
			"HTTP/1.1 426 Upgrade Required", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
		}},
		{"426 on a connection that ends", strings.Replace(version, "Connection: ", "Connection: close, ", 1), []string{
			"HTTP/1.1 426 Upgrade Required", "Connection: Upgrade, close", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := &peer{t: t}
			conn := p.dial()
			t.Cleanup(func() { conn.Close() })
			_ = conn.SetDeadline(time.Now().Add(patience))
			if _, err := conn.Write([]byte(tc.request)); err != nil {
				t.Fatal(err)
			}
			var got []string
			r := bufio.NewReader(conn)
			for {
				line, err := r.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				if line = strings.TrimSpace(line); line == "" {
					break
				}
				got = append(got, line)
			}
			for _, want := range tc.want {
				if !slices.Contains(got, want) {
					t.Errorf("got %q, want %q among them", got, want)
				}
			}
			if i := slices.IndexFunc(got, func(line string) bool { return strings.Contains(line, "Websocket") }); i >= 0 {
				t.Errorf("got %q", got[i])
			}
		})
	}
}

func TestUpgrade_MetricsSay101(t *testing.T) {
	s := startCaddy(t, "")
	s.loadWith("metrics", `http://localhost:9080 {
	metrics /metrics
	chat_broadcast /chat/*
}`)
	join(t, "/chat/a")
	const want = `caddy_http_request_duration_seconds_count{code="101"`
	eventually(t, "the metrics to say 101", func() bool {
		return strings.Contains(request(t, http.MethodGet, "http://"+httpAddr+"/metrics", nil).body, want)
	})
}

func TestUpgrade_Refusals(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /chat/*
	chat_broadcast /named {header.X-Hub}
	chat_broadcast /user hub {
		user {header.X-User}
	}
	respond "a page"
	handle_errors {
		header X-Handled yes
		respond "{err.status_code}: {err.message}"
	}
}`)
	request := handshakeRequest(httpAddr, "/chat/a", "")
	for _, tc := range []struct {
		name    string
		request string
		status  int
		header  map[string]string
	}{
		{"another method", strings.Replace(request, "GET", "POST", 1), 405, map[string]string{"Allow": "GET"}},
		{
			"another version of the protocol", strings.Replace(request, "Version: 13", "Version: 8", 1), 426,
			map[string]string{"Sec-WebSocket-Version": "13", "Upgrade": "websocket", "Connection": "Upgrade"},
		},
		{
			"no version", strings.Replace(request, "Sec-WebSocket-Version: 13\r\n", "", 1), 426,
			map[string]string{"Sec-WebSocket-Version": "13"},
		},
		{"no key", strings.Replace(request, "Sec-WebSocket-Key", "X-Key", 1), 400, nil},
		{"two keys", handshakeRequest(httpAddr, "/chat/a", "Sec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA==\r\n"), 400, nil},
		{"a short key", strings.Replace(request, "dGhl", "", 1), 400, nil},
		{"HTTP/1.0", strings.Replace(request, "HTTP/1.1", "HTTP/1.0", 1), 400, nil},
		{"a body", strings.Replace(request, "\r\n\r\n", "\r\nContent-Length: 2\r\n\r\nhi", 1), 400, nil},
		{"a foreign origin", handshakeRequest(httpAddr, "/chat/a", "Origin: https://evil.example\r\n"), 403, nil},
		{"a sandboxed page", handshakeRequest(httpAddr, "/chat/a", "Origin: null\r\n"), 403, nil},
		{"a hub without a name", handshakeRequest(httpAddr, "/named", ""), 400, nil},
		{"a hub's name too long", handshakeRequest(httpAddr, "/named", "X-Hub: "+strings.Repeat("x", 256)+"\r\n"), 400, nil},
		{"a hub's name with a control character", handshakeRequest(httpAddr, "/chat/%07", ""), 400, nil},
		{"a hub's name with a C1 control character", handshakeRequest(httpAddr, "/chat/%C2%85", ""), 400, nil},
		{"a hub's name that is not UTF-8", handshakeRequest(httpAddr, "/chat/%FF", ""), 400, nil},
		{"a hub named as the parent directory", handshakeRequest(httpAddr, "/named", "X-Hub: ..\r\n"), 400, nil},
		{"a user too long", handshakeRequest(httpAddr, "/user", "X-User: "+strings.Repeat("x", 1025)+"\r\n"), 400, nil},
		{"a user that is not UTF-8", handshakeRequest(httpAddr, "/user", "X-User: \xff\r\n"), 400, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", httpAddr)
			if err != nil {
				t.Fatal(err)
			}
			_, resp := handshakeOn(t, conn, tc.request)
			if resp.StatusCode != tc.status {
				t.Errorf("status: got %d, want %d", resp.StatusCode, tc.status)
			}
			if got := resp.Header.Get("X-Handled"); got != "yes" {
				t.Error("handle_errors did not get the refusal")
			}
			for name, want := range tc.header {
				if got := resp.Header.Get(name); got != want {
					t.Errorf("%s: got %q, want %q", name, got, want)
				}
			}
		})
	}
}

func TestUpgrade_LongestHubName(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast * {header.X-Hub}
}`)
	header := "X-Hub: " + strings.Repeat("x", 255) + "\r\n"
	a, b := join(t, "/a", header), join(t, "/b", header)
	a.text("hello")
	b.wantText("hello")
}

func TestUpgrade_OtherRequestsGoToTheNextHandler(t *testing.T) {
	s := startCaddy(t, `http://localhost:9080 {
	chat_broadcast
	respond "a page"
}`)
	s.tester.AssertGetResponse("http://"+httpAddr+"/chat", 200, "a page")
	s.tester.AssertPostResponseBody("http://"+httpAddr+"/chat", nil, bytes.NewBufferString("x"), 200, "a page")
}

func TestUpgrade_ExtendedConnectOverHTTP3IsRefusedWith501(t *testing.T) {
	startCaddy(t, `https://localhost:9443 {
	chat_broadcast
	respond "a page"
}`)
	dialTLS(t) // the certificate is there
	transport := &http3.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"}}
	defer transport.Close()
	r, err := http.NewRequest(http.MethodConnect, "https://"+httpsAddr+"/chat/a", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Proto = "websocket" // quic-go's client also takes the protocol of RFC 9220 from here
	r.Header.Set("Sec-WebSocket-Version", "13")
	resp, err := transport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, want := resp.StatusCode, http.StatusNotImplemented; got != want {
		t.Errorf("got %d, want %d", got, want)
	}
}

// extendedConnect asks for WebSocket over HTTP/2 (RFC 8441), and returns whether the server offers that, and its answer: a
// status, or the code of a stream that it resets.
func extendedConnect(t *testing.T, addr string) (offered bool, answer string) {
	t.Helper()
	conn := dialTLSAt(t, addr, "h2")
	_ = conn.SetDeadline(time.Now().Add(patience))
	var block bytes.Buffer
	fields := hpack.NewEncoder(&block)
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: http.MethodConnect},
		{Name: ":protocol", Value: "websocket"},
		{Name: ":scheme", Value: "https"},
		{Name: ":path", Value: "/chat/a"},
		{Name: ":authority", Value: addr},
		{Name: "sec-websocket-version", Value: "13"},
	} {
		if err := fields.WriteField(f); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	request := http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true}
	if err := framer.WriteHeaders(request); err != nil {
		t.Fatal(err)
	}
	for {
		f, err := framer.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if v, ok := f.Value(http2.SettingEnableConnectProtocol); ok {
				offered = v == 1
			}
		case *http2.RSTStreamFrame:
			return offered, f.ErrCode.String()
		case *http2.MetaHeadersFrame:
			return offered, f.PseudoValue("status")
		}
	}
}

func TestUpgrade_CaddyDoesNotOfferExtendedConnectOverHTTP2(t *testing.T) {
	startCaddy(t, "https://localhost:9443 {\nchat_broadcast\n}")
	if offered, answer := extendedConnect(t, httpsAddr); offered || answer != "PROTOCOL_ERROR" {
		t.Errorf("got %s, offered %v, want PROTOCOL_ERROR, not offered", answer, offered)
	}
}

func TestUpgrade_ExtendedConnectOverHTTP2IsRefusedWith501(t *testing.T) {
	t.Setenv("GODEBUG", "http2xconnect=1")
	p := startProcess(t, "", "https://localhost {\nchat_broadcast\n}")
	if offered, answer := extendedConnect(t, p.https); !offered || answer != "501" {
		t.Errorf("got %s, offered %v, want 501, offered", answer, offered)
	}
}

func TestUpgrade_EveryKindOfUpgradeIsRecognized(t *testing.T) {
	h1 := http.Header{"Connection": {"keep-alive, Upgrade"}, "Upgrade": {"WebSocket"}}
	for _, tc := range []struct {
		name      string
		r         *http.Request
		isUpgrade bool
		status    int // of the refusal by version
	}{
		{"HTTP/1.1", &http.Request{Method: http.MethodGet, ProtoMajor: 1, ProtoMinor: 1, Header: h1}, true, 426},
		{"HTTP/1.1 in HTTP/2's clothes", &http.Request{Method: http.MethodGet, ProtoMajor: 2, Header: h1}, true, 501},
		{"HTTP/2, RFC 8441", &http.Request{
			Method: http.MethodConnect, Proto: "HTTP/2.0", ProtoMajor: 2, Header: http.Header{":protocol": {"websocket"}},
		}, true, 501},
		{"HTTP/3, RFC 9220", &http.Request{Method: http.MethodConnect, Proto: "websocket", ProtoMajor: 3, Header: http.Header{}}, true, 501},
		{"a plain CONNECT", &http.Request{Method: http.MethodConnect, Proto: "HTTP/2.0", ProtoMajor: 2, Header: http.Header{}}, false, 0},
		{"a plain GET", &http.Request{Method: http.MethodGet, ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}}, false, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := isUpgrade(tc.r); got != tc.isUpgrade {
				t.Fatalf("isUpgrade: got %v, want %v", got, tc.isUpgrade)
			}
			if !tc.isUpgrade {
				return
			}
			var refusal caddyhttp.HandlerError
			if err := checkRequest(http.Header{}, tc.r); !errors.As(err, &refusal) || refusal.StatusCode != tc.status {
				t.Errorf("checkRequest: got %v, want status %d", err, tc.status)
			}
		})
	}
}

// TestUpgrade_ClientMayAnswerThe101AtOnce sends the first message together with the handshake, which is the
// earliest that the server can see it.
func TestUpgrade_ClientMayAnswerThe101AtOnce(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	log
	chat_broadcast
}`)
	conn, err := net.Dial("tcp", httpAddr)
	if err != nil {
		t.Fatal(err)
	}
	p, _ := handshakeOn(t, conn, handshakeRequest(httpAddr, "/", "")+string(clientFrame(0x81, []byte("early"))))
	p.wantText("early")
}

// TestUpgrade_MemberBeforeThe101 publishes as soon as somebody else has seen its 101.
func TestUpgrade_MemberBeforeThe101(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	log
	chat_broadcast
}`)
	sender := join(t, "/")
	for i := range 200 {
		p := join(t, "/")
		want := fmt.Sprint(i)
		sender.text(want)
		p.wantText(want)
		p.conn.Close()
		for sender.next().payload != want {
			t.Fatal("the sender got another message")
		}
	}
}

// TestUpgrade_ClientThatLeavesAtOnceIsLogged closes connections at the moment of the 101, when the HTTP server
// may still be the first to notice.
func TestUpgrade_ClientThatLeavesAtOnceIsLogged(t *testing.T) {
	s := startCaddy(t, plainChat)
	const clients = 300
	for range clients {
		join(t, "/chat/a").conn.Close()
	}
	if got := len(s.logged(moduleID, clients)); got != clients {
		t.Errorf("got %d lines, want %d", got, clients)
	}
}

func TestUpgrade_ServerTimeoutsDoNotReachTheSocket(t *testing.T) {
	s := startCaddy(t, "")
	s.loadWith("servers {\ntimeouts {\nread_body 300ms\nread_header 300ms\nwrite 300ms\nidle 300ms\n}\n}", `http://localhost:9080 {
	log
	chat_broadcast * {
		ping 1s 1s
	}
}`)
	p := join(t, "/")
	// Two pings are two seconds: well past all of them.
	for range 2 {
		if f := p.next(); f.opcode != 9 {
			t.Fatalf("got frame %v, want a ping", f)
		}
		p.send(10, "")
	}
	p.text("still here")
	p.wantText("still here")
}
