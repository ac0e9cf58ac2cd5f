package chatbroadcast

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"github.com/gorilla/websocket"
)

func TestHandler_RelaysUnchangedToEveryClient(t *testing.T) {
	startCaddy(t, plainChat)
	peers := []*peer{join(t, "/chat/a"), join(t, "/chat/a"), join(t, "/chat/a")}
	for _, want := range []frame{
		{websocket.TextMessage, "hello"},
		{websocket.TextMessage, ""},
		{websocket.TextMessage, "κόσμε 🙂 \x00 \n"},
		{websocket.BinaryMessage, "\x00\xff\xfe"},
		{websocket.BinaryMessage, strings.Repeat("\xff", 125)},
		{websocket.BinaryMessage, strings.Repeat("\xff", 126)},
		{websocket.BinaryMessage, strings.Repeat("\xff", 65535)},
		{websocket.BinaryMessage, strings.Repeat("\xff", 65536)},
	} {
		peers[0].send(want.opcode, want.payload)
		for i, p := range peers {
			if got := p.next(); got != want {
				t.Fatalf("client %d: got %.80v, want %.80v", i, got, want)
			}
		}
	}
}

func TestHandler_EightClientsSeeOneOrderWhileFourSend(t *testing.T) {
	const senders, messages = 4, 500
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast * {
		buffer 2000
	}
}`)
	var peers []*peer
	for range 8 {
		peers = append(peers, join(t, "/"))
	}
	for i, p := range peers[:senders] {
		go func() { // ends with its messages
			for j := range messages {
				p.text(fmt.Sprintf("%d/%d", i, j))
			}
		}()
	}
	for range senders * messages {
		want := peers[0].next()
		for i, p := range peers[1:] {
			if got := p.next(); got != want {
				t.Fatalf("client %d: got %v, want %v as the first client", i+1, got, want)
			}
		}
	}
}

func TestHandler_BareDirectiveIsolatesByHostAndPath(t *testing.T) {
	startCaddy(t, `http://localhost:9080, http://127.0.0.1:9080 {
	chat_broadcast
}`)
	a := join(t, "/a")
	others := []*peer{
		join(t, "/b"), join(t, "/a/"), join(t, "/A"),
		joinOn(t, a.dial(), ported("127.0.0.1:9080"), "/a"),
	}
	same := join(t, "/a?query=1")
	a.text("for /a alone")
	same.wantText("for /a alone")
	for i, p := range others {
		want := fmt.Sprint("for ", i)
		p.text(want)
		p.wantText(want)
	}
}

func TestHandler_RoutesThatNameOneHubShareIt(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	@members header Authorization secret
	chat_broadcast @members lobby
	chat_broadcast lobby {
		read_only
	}
}`)
	member, reader := join(t, "/", "Authorization: secret\r\n"), join(t, "/elsewhere")
	member.text("hello")
	reader.wantText("hello")
	member.wantText("hello")
	reader.text("me too")
	reader.wantClose(websocket.ClosePolicyViolation, "read_only")
	member.text("alone again")
	member.wantText("alone again")
}

func TestHandler_Limits(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /clients/* {
		hub clients{path}
		max_clients 2
	}
	chat_broadcast /per-hub/* {
		max_clients_per_hub 2
	}
	chat_broadcast /per-ip/* {
		hub per-ip
		max_clients_per_ip 2
	}
	chat_broadcast /hubs/* {
		hub hubs{path}
		max_hubs 2
	}
}`)
	for _, tc := range []struct {
		name   string
		fill   []string
		from   [2]string // addresses
		over   string
		status int
		other  string // where there is still room, if anywhere
	}{
		{"max_clients", []string{"/clients/a", "/clients/b"}, [2]string{"127.0.0.1", "127.0.0.1"}, "/clients/c", 503, ""},
		{"max_clients_per_hub", []string{"/per-hub/a", "/per-hub/a"}, [2]string{"127.0.0.1", "127.0.0.1"}, "/per-hub/a", 503, "/per-hub/b"},
		{"max_clients_per_ip", []string{"/per-ip/a", "/per-ip/b"}, [2]string{"127.0.0.1", "127.0.0.1"}, "/per-ip/c", 429, ""},
		{"max_hubs", []string{"/hubs/a", "/hubs/b"}, [2]string{"127.0.0.1", "127.0.0.2"}, "/hubs/c", 503, "/hubs/b"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var peers []*peer
			for i, path := range tc.fill { // one address may open only as many hubs as are left for others
				peers = append(peers, joinFrom(t, tc.from[i], httpAddr, path))
			}
			if got := refused(t, tc.status, tc.over).Header.Get("Retry-After"); got == "" {
				t.Error("Retry-After is missing")
			}
			if tc.other != "" {
				join(t, tc.other)
			}
			peers[0].conn.Close() // makes room
			eventually(t, "room for another", func() bool {
				_, resp := handshakeOn(t, peers[1].dial(), handshakeRequest(httpAddr, tc.over, ""))
				return resp.StatusCode == http.StatusSwitchingProtocols
			})
		})
	}
}

func TestHandler_Rate(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast * {
		rate 3 1h
	}
}`)
	p := join(t, "/")
	for i := range 6 {
		p.text(fmt.Sprint(i))
	}
	for i := range 3 {
		p.wantText(fmt.Sprint(i))
	}
	p.wantClose(websocket.ClosePolicyViolation, "rate_limited")
}

func TestHandler_User(t *testing.T) {
	s := startCaddy(t, `http://localhost:9080 {
	basic_auth /default {
		ada $2a$04$9aBQmv5R.QsqmruI6ZyCC.mngoaloyKD8UYmQ5Z0z/bsN1Vx0RRkG
	}
	chat_broadcast /default
	chat_broadcast /anonymous
	chat_broadcast /header {
		user "header {header.X-User}"
	}
}`)
	for i, tc := range []struct{ path, header, want string }{
		{"/default", "Authorization: Basic YWRhOmxvdmVsYWNl\r\n", "ada"},
		{"/anonymous", "", ""},
		{"/header", "X-User: eve\r\n", "header eve"},
	} {
		join(t, tc.path, tc.header).conn.Close()
		if got := s.logged(moduleID, i+1)[i]["user"]; got != tc.want {
			t.Errorf("%s: got user %q, want %q", tc.path, got, tc.want)
		}
	}
}

func TestHandler_LogsOneLineForEachClosedConnection(t *testing.T) {
	s := startCaddy(t, plainChat)
	p := join(t, "/chat/a")
	p.text("hello")
	p.wantText("hello")
	p.send(websocket.CloseMessage, string(websocket.FormatCloseMessage(4000, "see you")))
	p.wantClose(4000, "")
	p.conn.Close()
	entry := s.logged(moduleID, 1)[0]
	duration, ok := entry["duration"].(float64)
	if !ok || duration <= 0 || duration > 20 {
		t.Errorf("duration: got %v, want a few milliseconds, in seconds", entry["duration"])
	}
	for field, want := range map[string]any{
		"level": "info", "msg": "client closed", "hub": "http://" + httpAddr + "/chat/a", "user": "", "client_ip": "127.0.0.1",
		"code": 4000.0, "reason": "", "messages_in": 1.0, "messages_out": 1.0,
		"bytes_in":  float64(len(clientFrame(0x81, []byte("hello"))) + 6 + 2 + len("see you")),
		"bytes_out": float64(ws.FrameSize(5) + ws.FrameSize(2)),
	} {
		if got := entry[field]; got != want {
			t.Errorf("%s: got %v, want %v", field, got, want)
		}
	}
}

func TestHandler_LogsMessagesAndBytes(t *testing.T) {
	s := startCaddy(t, plainChat)
	for i, tc := range []struct {
		name string
		end  func(p *peer)
		want float64
	}{
		{"a bare close", func(p *peer) { p.send(websocket.CloseMessage, ""); p.wantClose(1005, "") }, 1005},
		{"no close", func(*peer) {}, 1006},
		{"a close and gone at once", func(p *peer) { p.send(websocket.CloseMessage, "\x03\xe9") }, 1001},
	} {
		p := join(t, "/chat/a")
		tc.end(p)
		p.conn.Close()
		if got := s.logged(moduleID, i+1)[i]["code"]; got != tc.want {
			t.Errorf("%s: got code %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestHandler_ReloadKeepsSocketsAndAppliesToNewOnes(t *testing.T) {
	const config = `http://localhost:9080 {
	%s
	chat_broadcast /chat/* {
		%s
	}
	respond "%s"
}`
	s := startCaddy(t, fmt.Sprintf(config, "", "max_message_size 10", "first"))
	a, b := join(t, "/chat/a"), join(t, "/chat/a")
	for i := range 5 {
		s.load(fmt.Sprintf(config, "log", "max_message_size 5", fmt.Sprint(i)))
		status, answer := s.post("text/caddyfile", s.caddyfile("", fmt.Sprintf(config, "", "max_message_size none", "bad")))
		if status != http.StatusBadRequest || !strings.Contains(answer, "max_message_size") {
			t.Errorf("a bad configuration: got status %d, %s", status, answer)
		}
		want := fmt.Sprint("hello ", i)
		a.text(want)
		a.wantText(want)
		b.wantText(want)
	}
	c := join(t, "/chat/a") // under the new settings
	c.text("too big")
	c.wantClose(websocket.CloseMessageTooBig, "too_big")
	a.text("still")
	b.wantText("still")
}

func TestHandler_RemovedHubIsClosedWith1012(t *testing.T) {
	const site = "http://localhost:9080 {\n%s\n}"
	s := startCaddy(t, fmt.Sprintf(site, "chat_broadcast /a hub-a\nchat_broadcast /b hub-b"))
	a, b := join(t, "/a"), join(t, "/b")
	began := time.Now()
	s.load(fmt.Sprintf(site, "chat_broadcast /b hub-b"))
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the reload took %v", took)
	}
	a.wantClose(websocket.CloseServiceRestart, "hub_removed")
	b.text("still here")
	b.wantText("still here")
}

func TestRegistry_ReturningValueKeepsClientsNotYetClosed(t *testing.T) {
	const site = "http://localhost:9080 {\n%s\n}"
	s := startCaddy(t, fmt.Sprintf(site, "chat_broadcast"))
	const clients = 50
	var peers []*peer
	for range clients {
		peers = append(peers, join(t, "/a"))
	}
	s.load(fmt.Sprintf(site, "respond gone"))
	s.load(fmt.Sprintf(site, "chat_broadcast"))
	if got := members(); got == 0 || got > clients {
		t.Fatalf("got %d of %d clients after the value came back", got, clients)
	}
	before := members()
	sender := join(t, "/a")
	sender.text("who is here?")
	sender.wantText("who is here?")
	got := 0
	for _, p := range peers {
		p.patient()
		if f, err := p.readFrame(); err == nil && f.opcode == websocket.TextMessage {
			got++
		}
	}
	if got != before {
		t.Errorf("got %d clients that still hear, want %d", got, before)
	}
}

func TestHandler_HistoryAgeIsTenMinutesByDefault(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /a a {
		history 10
	}
	chat_broadcast /b b {
		history 10 20m
	}
}`)
	for name, want := range map[string]time.Duration{"a": 10 * time.Minute, "b": 20 * time.Minute} {
		join(t, "/"+name)
		if got := historyAge(name); got != want {
			t.Errorf("hub %s: got %v, want %v", name, got, want)
		}
	}
}

func TestHandler_ValidatesJSON(t *testing.T) {
	s := startCaddy(t, plainChat)
	for _, tc := range []struct{ handler, want string }{
		{`"max_message_size": -1`, "max_message_size: must be 1 to 268435456, got -1"},
		{`"max_clients": -1`, "max_clients: must be 1 to 16777216, got -1"},
		{`"max_hubs": 16777217`, "max_hubs: must be 1 to 16777216, got 16777217"},
		{`"rate": {"messages": 5}`, "rate: window: must be longer than 0, got 0s"},
		{`"rate": {"window": "1s"}`, "rate: messages: must be 1 to 16777216, got 0"},
		{`"buffer": {"messages": -5}`, "buffer: messages: must be 1 to 16777216, got -5"},
		{`"buffer": {"size": 536870913}`, "buffer: size: must be 1 to 536870912, got 536870913"},
		{`"max_message_size": 268435457`, "max_message_size: must be 1 to 268435456, got 268435457"},
		{`"max_age": "2331697h"`, "max_age: must be at most 8760h0m0s, got 2331697h0m0s"},
		{`"max_age": "366d"`, "max_age: must be at most 8760h0m0s, got 8784h0m0s"},
		{`"drain": "1000h"`, "drain: must be at most 10m0s, got 1000h0m0s"},
		{`"write_timeout": "8761h"`, "write_timeout: must be at most 8760h0m0s, got 8761h0m0s"},
		{`"history": {"messages": 1, "age": "8761h"}`, "history: age: must be at most 8760h0m0s, got 8761h0m0s"},
		{`"rate": {"messages": 1, "window": "8761h"}`, "rate: window: must be at most 8760h0m0s, got 8761h0m0s"},
		{`"ping": {"interval": "8761h"}`, "ping: interval: must be at most 8760h0m0s, got 8761h0m0s"},
		{`"ping": {"timeout": "8761h"}`, "ping: timeout: must be at most 8760h0m0s, got 8761h0m0s"},
		{`"ping": {"interval": -1}`, "ping: interval: must be longer than 0, got -1ns"},
		{`"ping": {"off": true, "interval": "1s"}`, "ping: off has neither interval nor timeout"},
		{`"write_timeout": -1`, "write_timeout: must be longer than 0, got -1ns"},
		{`"history": {}`, "history: messages: must be 1 to 16777216, got 0"},
		{`"history": {"messages": 16777217}`, "history: messages: must be 1 to 16777216, got 16777217"},
		{`"history": {"messages": 5, "age": "-1s"}`, "history: age: must be longer than 0, got -1s"},
		{`"presence": {"join": true}`, `unknown field "join"`},
		{`"on_lag": "panic"`, `on_lag: want close or skip, got "panic"`},
		{`"hub": "a\u0000b"`, "hub: the hub's name contains a control character"},
		{`"origins": ["*", "a"]`, "origins: * allows every origin and stands alone"},
		{`"colour": "blue"`, `unknown field "colour"`},
	} {
		config := `{"admin":{"listen":"` + adminAddr + `"},"apps":{"http":{"servers":{"s":{"listen":[":` + portOf(httpAddr) + `"],"routes":[
			{"handle":[{"handler":"chat_broadcast",` + tc.handler + `}]}]}}}}}`
		status, answer := s.post("application/json", config)
		var message struct{ Error string }
		if err := json.Unmarshal([]byte(answer), &message); err != nil {
			t.Fatal(err)
		}
		if status != http.StatusBadRequest || !strings.Contains(message.Error, tc.want) {
			t.Errorf("%s: got status %d, %s, want %s", tc.handler, status, message.Error, tc.want)
		}
	}
	p := join(t, "/chat/a") // none of them has left a trace
	p.text("hello")
	p.wantText("hello")
	if got := allScopes(); got != 1 {
		t.Errorf("got %d scopes, want the one of the running configuration", got)
	}
}

// TestDocs_CloseCodes compares the table in docs/clients.md with the causes, and with the codes that chat.js takes as final.
func TestDocs_CloseCodes(t *testing.T) {
	rows := tableRows(t, "docs/clients.md", "| code | reason | when | reconnect? |")
	for _, why := range []ws.Close{
		hub.CloseShuttingDown, ws.ProtocolError, ws.InvalidUTF8, hub.CloseReadOnly, hub.CloseRateLimited, hub.CloseKicked, ws.TooBig, hub.CloseInternal,
		hub.CloseHubRemoved, hub.CloseMaxAge, hub.CloseLagged, hub.CloseWriteTimeout, hub.CloseBusy, hub.ClosePingTimeout,
	} {
		beginning := fmt.Sprintf(`^\| %d[^|]*\|[^|]*`, why.Code)
		if why.Reason != "" {
			beginning += "`" + why.Reason + "`"
		}
		row := regexp.MustCompile(beginning)
		if !slices.ContainsFunc(rows, row.MatchString) {
			t.Errorf("the table has no row for %d %s", why.Code, why.Reason)
		}
	}
	_, codes, _ := strings.Cut(readDocument(t, "client/chat.js"), "const FINAL = [")
	codes, _, _ = strings.Cut(codes, "]")
	if !strings.Contains(docBlock(t, "go: bot"), "var final = []int{"+codes+"}") {
		t.Errorf("the bot's final codes are not those of chat.js, %s", codes)
	}
	for _, row := range rows {
		cells := strings.Split(row, "|")
		code, _, _ := strings.Cut(strings.TrimSpace(cells[1]), " ")
		final := slices.Contains(strings.Split(codes, ", "), code)
		if again := strings.TrimSpace(cells[4]); again != "" && final != (again == "no") {
			t.Errorf("%s: chat.js does not do as the table says", row)
		}
	}
}

func TestHandler_PeerThatClosesItsHalfIsAnswered(t *testing.T) {
	startCaddy(t, plainChat)
	for range 50 {
		p := join(t, "/chat/a")
		p.text("hello")
		p.send(websocket.CloseMessage, string(websocket.FormatCloseMessage(1000, "")))
		if err := p.conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		p.wantText("hello")
		p.wantClose(1000, "")
	}
}

// TestHandler_ReloadBesideHandshakesInFlight holds handshakes in forward_auth while the configuration is replaced.
func TestHandler_ReloadBesideHandshakesInFlight(t *testing.T) {
	arrived, answer := make(chan struct{}), make(chan struct{})
	auth := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		arrived <- struct{}{}
		<-answer
	}))
	defer auth.Close()
	site := func(directive string) string {
		return fmt.Sprintf("http://localhost:9080 {\nroute {\nforward_auth %s {\nuri /\nheader_up -Connection\nheader_up -Upgrade\n}\n%s\n}\n}",
			auth.Listener.Addr(), directive)
	}
	s := startCaddy(t, site("chat_broadcast"))
	for _, tc := range []struct {
		name, directive string
		status          int
	}{
		{"the hub value stays", "chat_broadcast {\nmax_hubs 5\n}", http.StatusSwitchingProtocols},
		{"the hub value goes", "respond gone", http.StatusServiceUnavailable},
	} {
		status := make(chan int)
		go func() {
			conn, err := net.Dial("tcp", httpAddr)
			if err != nil {
				t.Error(err)
			}
			_, resp := handshakeOn(t, conn, handshakeRequest(httpAddr, "/a", ""))
			status <- resp.StatusCode
		}()
		<-arrived
		s.load(site(tc.directive))
		answer <- struct{}{}
		if got := <-status; got != tc.status {
			t.Errorf("%s: got %d, want %d", tc.name, got, tc.status)
		}
	}
}

func TestHandler_WrappedListener(t *testing.T) {
	s := startCaddy(t, "")
	s.loadWith("servers {\nlistener_wrappers {\nproxy_protocol {\nallow 127.0.0.1/32 ::1/128\n}\n}\n}", plainChat)
	p := join(t, "/chat/a")
	p.text("bad \xff")
	p.wantClose(1007, "invalid_utf8")
	began := time.Now()
	p.send(websocket.CloseMessage, string(websocket.FormatCloseMessage(1007, "")))
	p.wantEOF()
	if took := time.Since(began); took > closeTimeout/2 {
		t.Errorf("the connection ended %v after the answer to the close", took)
	}
}
