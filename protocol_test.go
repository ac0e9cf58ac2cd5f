package chatbroadcast

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// ---- the examples of docs/protocol.md ----

// documentedExamples returns the frames of docs/protocol.md by the names of their blocks: kind is "example" for what the server
// sends, "send" for what a client does.
func documentedExamples(t *testing.T, kind string) map[string][]string {
	t.Helper()
	document, err := os.ReadFile("docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?ms)(?:^<!-- (\\w+): ([\\w-]+) -->\n)?^```json\n(.*?)^```$")
	examples := map[string][]string{}
	for _, block := range blocks.FindAllStringSubmatch(string(document), -1) {
		if block[1] == "" {
			t.Errorf("this example has no name:\n%s", block[3])
		}
		if block[1] == kind {
			examples[block[2]] = strings.Split(strings.TrimSpace(block[3]), "\n")
		}
	}
	if len(examples) == 0 {
		t.Fatalf("docs/protocol.md has no block of kind %q", kind)
	}
	return examples
}

func TestProtocol_DocumentedExamplesAreValid(t *testing.T) {
	for kind, definition := range map[string]string{
		"example": "/$defs/strictFromServer",
		"send":    "/$defs/strictFromClient",
	} {
		for name, frames := range documentedExamples(t, kind) {
			for _, frame := range frames {
				if err := validate(protocolSchema(t, definition), frame); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				if err := validate(protocolSchema(t, ""), frame); err != nil {
					t.Errorf("%s, by the schema as a whole: %v", name, err)
				}
			}
		}
	}
}

// A field is a field of a JSON object. The comparison keeps the order of fields.
type field struct {
	name  string
	value any
}

// fieldsOf returns the fields of a frame in their order.
func fieldsOf(t *testing.T, frame string) (fields []field) {
	t.Helper()
	decoder := json.NewDecoder(strings.NewReader(frame))
	if token, err := decoder.Token(); err != nil || token != json.Delim('{') {
		t.Fatalf("%s is no object", frame)
	}
	for decoder.More() {
		name, err := decoder.Token()
		if err != nil {
			t.Fatal(err)
		}
		var value any
		if err := decoder.Decode(&value); err != nil {
			t.Fatal(err)
		}
		fields = append(fields, field{name.(string), value})
	}
	return fields
}

// A documentCheck compares the frames that a test gets with the document. Clients, epochs, tokens and times differ in each
// run, so it compares where they repeat: where the document has the same one twice, so must the frames, and where the
// document has another client, epoch or token, the frames must have another, too.
type documentCheck struct {
	t        *testing.T
	server   string // the address
	examples map[string][]string
	checked  map[string]bool
	stands   map[field]string // the value in the frames for one in the document
	standsIn map[field]string // and the other way round
}

func newDocumentCheck(t *testing.T, server string) *documentCheck {
	return &documentCheck{t, server, documentedExamples(t, "example"), map[string]bool{}, map[field]string{}, map[field]string{}}
}

// want marks the example of that name as checked, and fails the test unless frames match it.
func (s *documentCheck) want(name string, frames ...incoming) {
	s.t.Helper()
	s.checked[name] = true
	documented := s.examples[name]
	if len(frames) != len(documented) {
		s.t.Errorf("%s: got %d frames, the document has %d", name, len(frames), len(documented))
		return
	}
	for i, frame := range frames {
		got, want := fieldsOf(s.t, frame.raw), fieldsOf(s.t, documented[i])
		for j := range got {
			if j < len(want) && got[j].name == want[j].name {
				got[j].value = s.normal(got[j], want[j])
			}
		}
		if !reflect.DeepEqual(got, want) {
			s.t.Errorf("%s:\n got %s\nwant %s", name, frame.raw, documented[i])
		}
	}
}

// normal returns the documented value if the one that was got stands for it.
func (s *documentCheck) normal(got, want field) any {
	if got.name == "messages" {
		return s.normalMessages(got.value, want.value)
	}
	value, isText := got.value.(string)
	documented, _ := want.value.(string)
	switch got.name {
	case "hub": // the document's site has TLS and the default port
		return strings.Replace(value, "http://example.com:"+portOf(s.server)+"/", "https://example.com/", 1)
	case "client", "epoch", "token", "time":
	default:
		return got.value
	}
	if !isText {
		return got.value
	}
	forward, back := field{got.name, documented}, field{got.name, value}
	if got.name == "time" {
		at, err := time.Parse("2006-01-02T15:04:05.000Z", value)
		if err != nil || time.Since(at).Abs() > time.Minute {
			return got.value
		}
		back.value = documented // two messages may have been published in one millisecond
	}
	if known, ok := s.stands[forward]; ok && known != value {
		return "another " + got.name + " than before: " + value
	}
	if known, ok := s.standsIn[back]; ok && known != documented {
		return "the same " + got.name + " as before: " + value
	}
	s.stands[forward], s.standsIn[back] = value, documented
	return documented
}

// normalMessages does for the messages of a replay what normal does for a value.
func (s *documentCheck) normalMessages(got, want any) any {
	messages, _ := got.([]any)
	documented, _ := want.([]any)
	for i := range min(len(messages), len(documented)) {
		message, _ := messages[i].(map[string]any)
		like, _ := documented[i].(map[string]any)
		for name, value := range message {
			message[name] = s.normal(field{name, value}, field{name, like[name]})
		}
	}
	return got
}

func (s *documentCheck) finish() {
	s.t.Helper()
	if got, want := slices.Sorted(maps.Keys(s.checked)), slices.Sorted(maps.Keys(s.examples)); !slices.Equal(got, want) {
		s.t.Errorf("checked the examples %v, the document has %v", got, want)
	}
}

// joinExample joins as in the document: under its host.
func joinExample(s *process, path string) *eventsPeer {
	s.t.Helper()
	return joinEventsOn(s.t, s.dial(), "example.com", path)
}

// TestProtocol_ServerMatchesDocumentedExamples plays the examples of docs/protocol.md: ada comes to a hub in which eve has said
// something, loses her connection, comes back, meets bob and cid, and is away for longer.
func TestProtocol_ServerMatchesDocumentedExamples(t *testing.T) {
	const site = `http://example.com, http://localhost {
	chat_broadcast /chat/* {
		user {http.request.uri.query.name}
		history 10
		presence join_leave
	}
	chat_broadcast /lag/* {
		max_message_size 4MiB
		buffer 1 8MiB
		on_lag skip
	}
	chat_broadcast /rate/* {
		rate 5 10s
	}
}`
	t.Parallel()
	server := startProcess(t, "", site)
	s := newDocumentCheck(t, server.http)
	says := documentedExamples(t, "send")
	say := func(p *eventsPeer, name string) {
		if len(says[name]) != 1 {
			t.Fatalf("the document has %d frames to send under %q", len(says[name]), name)
		}
		p.text(says[name][0])
		delete(says, name)
	}

	eve := joinExample(server, "/chat/lobby?name=eve")
	eve.say(map[string]string{"type": "send", "data": "hello"})
	say(eve, "binary")
	eve.skipTo("sent")
	ada := joinExample(server, "/chat/lobby?name=ada")
	s.want("hello", ada.hello)
	s.want("message", ada.skipTo("message"), ada.skipTo("message"))
	fay := joinExample(server, "/chat/lobby?name=ada&"+bundles)
	replay, err := fay.readWhole()
	if err != nil {
		t.Fatal(err)
	}
	s.want("replay", replay)
	fay.leave()
	say(ada, "who")
	s.want("presence", ada.roster())
	say(ada, "text")
	s.want("sent", ada.skipTo("sent"))
	ada.text(`{"type":"send","id":"m2","data":5}`)
	s.want("error", ada.skipTo("error"))
	eve.skipUntil(func(e incoming) bool { return e.Type == "join" && *e.User == "ada" }) // else one frame may have this change and bob's
	ada.leave()
	token := ada.hello.Token
	const address = "/chat/lobby?name=ada&"

	eventually(t, "ada to be gone", func() bool { return eve.ask(map[string]any{}).Clients == 1 })
	ada = joinExample(server, address+sinceQuery(ada.hello.Epoch, 2))
	s.want("resumed", ada.hello)
	bob := joinExample(server, "/chat/lobby?name=bob")
	s.want("join", ada.skipUntil(func(e incoming) bool { return e.Type == "join" && *e.User == "bob" }))
	bob.leave()
	s.want("leave", ada.skipUntil(func(e incoming) bool { return e.Type == "leave" }))
	bob, cid := joinExample(server, "/chat/lobby?name=bob"), joinExample(server, "/chat/lobby?name=cid")
	s.want("changes", ada.skipUntil(func(e incoming) bool { return e.Joined != nil }))

	bob.leave()
	cid.leave()
	ada.leave()
	for seq := 4; seq <= 15; seq++ {
		eve.sendText(fmt.Sprint("e", seq), "more")
	}
	eventually(t, "the others to be gone", func() bool { return eve.ask(map[string]any{}).Clients == 1 })
	ada = joinExample(server, address+sinceQuery(ada.hello.Epoch, 1))
	s.want("missed", ada.hello)
	again := strings.Replace(says["again"][0], "dq3e5qf4t0xs-x7Fq0mJ3vTn1", token, 1)
	delete(says, "again")
	ada.text(again)
	s.want("again", ada.skipTo("sent"))
	bob = joinExample(server, "/chat/other?name=bob")
	bob.text(again)
	s.want("unknown", bob.skipTo("error"))
	say(bob, "ping")
	s.want("pong", bob.skipTo("pong"))
	say(bob, "ping-with-id")
	s.want("pong-with-id", bob.skipTo("pong"))
	s.want("paced", joinExample(server, "/rate/lobby").hello)

	s.want("lagged", lagging(t, server))
	s.finish()
	for name := range says {
		t.Errorf("%s was not sent", name)
	}
}

// roster returns the next answer to who.
func (p *eventsPeer) roster() incoming {
	p.t.Helper()
	return p.skipUntil(func(e incoming) bool { return e.Type == "presence" && e.Users != nil })
}

// skipUntil returns the next event for which meant returns true.
func (p *eventsPeer) skipUntil(meant func(incoming) bool) incoming {
	p.t.Helper()
	for {
		if e := p.event(); meant(e) {
			return e
		}
	}
}

// lagging returns the "lagged" event of a client that reads message 2, then nothing until there are 15. Its hub keeps only
// the last message.
func lagging(t *testing.T, s *process) incoming {
	t.Helper()
	conn := s.dial()
	_ = conn.(*net.TCPConn).SetReadBuffer(64 << 10)
	slow := joinEventsOn(t, conn, s.http, "/lag/a")
	sender := s.joinEvents("/lag/a")
	sender.sendText("m1", "one")
	slow.wantMessages(1, "one")
	large := strings.Repeat("x", 2<<20) // more than the sockets' buffers take
	sender.sendText("m2", large)
	if _, err := slow.r.Peek(100); err != nil { // it is being written
		t.Fatal(err)
	}
	for range 13 {
		sender.sendText("m", "more")
	}
	slow.wantMessages(2, large)
	lagged := slow.want("lagged")
	slow.wantMessages(15, "more")
	return lagged
}

// ---- the schema ----

func TestProtocol_SchemaKnowsRightFromWrong(t *testing.T) {
	const strict, server, client = "/$defs/strictFromServer", "/$defs/fromServer", "/$defs/fromClient"
	for _, tc := range []struct {
		name, definition, frame string
		want                    bool
	}{
		{"a field of the future", server, `{"type":"join","user":"ada","clients":1,"color":"red"}`, true},
		{"a misspelt field", strict, `{"type":"join","user":"ada","clients":1,"color":"red"}`, false},
		{"a misspelt field of an entry", strict, `{"type":"presence","clients":1,"users":[{"user":"ada","clients":1,"x":1}]}`, false},
		{"a field of another type", strict, `{"type":"join","user":"ada","clients":1,"users":[]}`, false},
		{"a misspelt field of a rate", strict, `{"type":"hello","client":"a","user":"","hub":"a","epoch":"a","head":0,"clients":1,"replay":0,` +
			`"max_message_size":1,"rate":{"messages":1,"window":1,"x":1}}`, false},
		{"no clients", strict, `{"type":"join","user":"ada"}`, false},
		{"a time without milliseconds", strict, `{"type":"sent","id":"m","seq":1,"time":"2026-11-23T12:00:00Z"}`, false},
		{"a time that is none", strict, `{"type":"sent","id":"m","seq":1,"time":"2026-13-23T12:00:00.000Z"}`, false},
		{"a message of two kinds", strict, `{"type":"message","seq":1,"time":"2026-11-23T12:00:00.000Z","user":"","data":"","data64":""}`, false},
		{"a code of the future", server, `{"type":"error","code":"tired","message":"later"}`, true},
		{"a code that there is not", strict, `{"type":"error","code":"tired","message":"later"}`, false},
		{"both kinds of presence", strict, `{"type":"presence","clients":1,"users":[],"joined":["ada"]}`, false},
		{"a type that there is not", server, `{"type":"shout"}`, false},
		{"no object", server, `[]`, false},
		{"sent by a client of the future", client, `{"type":"send","data":"hello","color":"red"}`, true},
		{"both kinds of data", client, `{"type":"send","data":"hello","data64":""}`, false},
		{"no data", client, `{"type":"send","id":"m1"}`, false},
		{"no Base64", client, `{"type":"send","data64":"AP8"}`, false},
		{"an empty id", client, `{"type":"send","id":"","data":""}`, false},
		{"a token", client, `{"type":"send","id":"m1","token":"a-B_9","data":""}`, true},
		{"a token without an id", client, `{"type":"send","token":"a","data":""}`, false},
		{"a token that is none", client, `{"type":"send","id":"m1","token":"a b","data":""}`, false},
		{"a ping", client, `{"type":"ping"}`, true},
		{"a ping with an empty id", client, `{"type":"ping","id":""}`, false},
		{"a pong with a misspelt field", strict, `{"type":"pong","ID":"p1"}`, false},
		{"a hello of an earlier server", server, `{"type":"hello","client":"a","user":"","hub":"a","epoch":"a","head":0,"clients":1,"replay":0}`, true},
		{"a hello for a listener", strict, `{"type":"hello","client":"a","user":"","hub":"a","epoch":"a","head":0,"clients":1,"replay":0,"max_message_size":1,"read_only":true}`, true},
		{"a hello with a false read_only", strict, `{"type":"hello","client":"a","user":"","hub":"a","epoch":"a","head":0,"clients":1,"replay":0,"max_message_size":1,"read_only":false}`, false},
		{"a hello without max_message_size", strict, `{"type":"hello","client":"a","user":"","hub":"a","epoch":"a","head":0,"clients":1,"replay":0}`, false},
		{"a replay", strict, `{"type":"replay","messages":[{"type":"message","seq":1,"time":"2026-11-23T12:00:00.000Z","user":"","data":""}]}`, true},
		{"a replay without messages", server, `{"type":"replay","messages":[]}`, false},
		{"a replay of something else", server, `{"type":"replay","messages":[{"type":"join","user":"ada","clients":1}]}`, false},
		{"a misspelt field in a replay", strict, `{"type":"replay","messages":[` +
			`{"type":"message","seq":1,"time":"2026-11-23T12:00:00.000Z","user":"","data":"","x":1}]}`, false},
		{"a limit of 0", client, `{"type":"who","limit":0}`, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := validate(protocolSchema(t, tc.definition), tc.frame); (err == nil) != tc.want {
				t.Errorf("got %v, want valid: %v", err, tc.want)
			}
		})
	}
}

// ---- connecting ----

// eventsSite has a hub for each path, with users by the query.
const eventsSite = `http://localhost:9080 {
	chat_broadcast /chat/* {
		user {http.request.uri.query.name}
	}
	chat_broadcast /listen/* {
		hub localhost{http.request.uri.path}
		user {http.request.uri.query.name}
		read_only
		presence
	}
	chat_broadcast /who/* {
		user {http.request.uri.query.name}
		presence
	}
	chat_broadcast /rate/* {
		rate 2 1h
	}
	chat_broadcast /silent/* {
		echo off
	}
	chat_broadcast /post/* {
		history 10
		http_publish
	}
}`

func TestEvents_SubprotocolIsChosenAmongOthers(t *testing.T) {
	startCaddy(t, eventsSite)
	for _, offer := range []string{
		"Sec-WebSocket-Protocol: chat-broadcast.v1\r\n",
		"Sec-WebSocket-Protocol: other, chat-broadcast.v1\r\n",
		"Sec-WebSocket-Protocol: chat-broadcast.v2,chat-broadcast.v1\r\n",
		"Sec-WebSocket-Protocol: other\r\nSec-WebSocket-Protocol: chat-broadcast.v1\r\n",
	} {
		t.Run(offer, func(t *testing.T) {
			p := &peer{t: t, conn: (&peer{t: t}).dial()}
			q, resp := handshakeOn(t, p.conn, handshakeRequest(httpAddr, "/chat/a", offer))
			if got := resp.Header.Values("Sec-WebSocket-Protocol"); !slices.Equal(got, []string{"chat-broadcast.v1"}) {
				t.Errorf("got %q", got)
			}
			if f := q.next(); !strings.HasPrefix(f.payload, `{"type":"hello",`) {
				t.Errorf("got %v, want hello", f)
			}
		})
	}
}

func TestEvents_OtherSubprotocolsAreRaw(t *testing.T) {
	startCaddy(t, eventsSite)
	for _, offer := range []string{
		"", "Sec-WebSocket-Protocol: other\r\n", "Sec-WebSocket-Protocol: chat-broadcast.v2\r\n",
		"Sec-WebSocket-Protocol: Chat-Broadcast.v1\r\n", "Sec-WebSocket-Protocol: chat-broadcast.v10\r\n",
	} {
		t.Run(offer, func(t *testing.T) {
			p, resp := handshakeOn(t, (&peer{t: t}).dial(), handshakeRequest(httpAddr, "/chat/a", offer))
			if got := resp.Header.Values("Sec-WebSocket-Protocol"); len(got) > 0 {
				t.Errorf("got %q chosen", got)
			}
			p.text("hello")
			p.wantText("hello")
		})
	}
}

func TestEvents_HelloOfAnEmptyHub(t *testing.T) {
	startCaddy(t, eventsSite)
	h := joinEvents(t, "/chat/a").hello
	if *h.User != "" || h.Hub != "http://"+httpAddr+"/chat/a" || h.Head != 0 || h.Replay != 0 || h.Clients != 1 {
		t.Errorf("got %s", h.raw)
	}
}

func TestEvents_TokensAreSecretsOfTheirOwn(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	a, b := joinEvents(t, "/chat/a"), joinEvents(t, "/chat/a")
	if a.hello.Token == b.hello.Token || len(a.hello.Token) < 16 || *a.hello.Client == *b.hello.Client {
		t.Errorf("got %s and %s", a.hello.raw, b.hello.raw)
	}
	b.sendText("m1", "hello")
	if e := a.want("message"); strings.Contains(e.raw, b.hello.Token) {
		t.Errorf("got %s, with somebody else's token", e.raw)
	}
}

// TestProtocol_ResumesWhereHelloLeftIt has clients without a message since their hello resume at head - replay. If they
// resumed earlier, the server would report as missed messages that were never meant for them.
func TestProtocol_ResumesWhereHelloLeftIt(t *testing.T) {
	for _, tc := range []struct {
		history     string
		reads, want int
	}{
		{"", 0, 5}, {"history 3", 0, 2}, {"history 3", 2, 4},
	} {
		t.Run(fmt.Sprintf("%s, %d read", tc.history, tc.reads), func(t *testing.T) {
			startCaddy(t, "http://localhost:9080 {\nchat_broadcast /chat/* {\n"+tc.history+"\n}\n}")
			keeper := joinEvents(t, "/chat/a")
			for i := range 5 {
				keeper.sendText(fmt.Sprint("m", i), fmt.Sprint(i))
			}
			p := joinEvents(t, "/chat/a")
			at := p.hello.Head - p.hello.Replay
			for range tc.reads {
				at = p.skipTo("message").Seq
			}
			if at != tc.want {
				t.Errorf("got it at %d, want %d", at, tc.want)
			}
			back := joinEvents(t, "/chat/a?"+sinceQuery(p.hello.Epoch, at))
			if h := back.hello; h.Resumed == nil || !*h.Resumed || h.Head-h.Replay != at {
				t.Errorf("got %s, want it resumed at %d", h.raw, at)
			}
		})
	}
}

// ---- messages ----

// odd are texts that JSON must escape, or that are easily broken.
var odd = []string{
	"", `"quoted" \ back/slash`, "\x00\x01\x1f\x7f", "line\nfeed\r\ttab", "\u2028\u2029\ufeff\ufffd",
	"κόσμε 🙂 \U0010ffff", "<script>&amp;</script>", `{"type":"send","data":"x"}`, strings.Repeat("\x01🙂", 5000),
}

func TestEvents_RawTextArrivesAsItWas(t *testing.T) {
	startCaddy(t, eventsSite)
	raw, events := join(t, "/chat/a?name=ada"), joinEvents(t, "/chat/a")
	for i, text := range odd {
		raw.text(text)
		raw.wantText(text)
		events.wantMessages(i+1, text)
	}
}

func TestEvents_TextArrivesRawAsItWas(t *testing.T) {
	startCaddy(t, eventsSite)
	raw, events := join(t, "/chat/a"), joinEvents(t, "/chat/a")
	for i, text := range odd {
		events.say(map[string]string{"type": "send", "data": text})
		raw.wantText(text)
		events.wantMessages(i+1, text)
	}
}

func TestEvents_BinaryArrivesAsItWas(t *testing.T) {
	startCaddy(t, eventsSite)
	raw, events := join(t, "/chat/a"), joinEvents(t, "/chat/a")
	for _, payload := range []string{"", "\x00", "\x00\xff", "\xff\xfe\xfd", strings.Repeat("\x80\x81", 10_000)} {
		raw.send(websocket.BinaryMessage, payload)
		events.say(map[string]string{"type": "send", "data64": base64Of(payload)})
		for range 2 {
			if got, want := raw.next(), (frame{websocket.BinaryMessage, payload}); got != want {
				t.Fatalf("raw: got %.80v, want %.80v", got, want)
			}
			if e := events.want("message"); e.Data64 == nil || *e.Data64 != base64Of(payload) {
				t.Fatalf("events: got %.200s, want %.80q", e.raw, base64Of(payload))
			}
		}
	}
}

func TestEvents_RawClientsSeeNothingOfTheProtocol(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /chat/* {
		history 10
		presence join_leave
	}
}`)
	raw := join(t, "/chat/a")
	for i := range 3 {
		events := joinEvents(t, "/chat/a")
		events.skipUntil(func(e incoming) bool { return e.Type == "join" || e.Type == "presence" })
		events.ask(map[string]any{})
		events.text("no event at all")
		events.skipTo("error")
		events.sendText("m1", fmt.Sprint(i))
		raw.wantText(fmt.Sprint(i))
		events.leave()
	}
	join(t, "/chat/a").wantText("0")
}

func TestEvents_NamesCannotBeForged(t *testing.T) {
	startCaddy(t, eventsSite)
	ada, eve := joinEvents(t, "/chat/a?name=ada"), joinEvents(t, "/chat/a?name=eve")
	eve.text(`{"type":"send","data":"x","user":"ada","client":"` + *ada.hello.Client + `","seq":77,"time":"2000-01-01T00:00:00.000Z"}`)
	if e := ada.want("message"); *e.User != "eve" || *e.Client != *eve.hello.Client || e.Seq != 1 || strings.HasPrefix(e.Time, "2000") {
		t.Errorf("got %s, want user eve and client %s", e.raw, *eve.hello.Client)
	}
	join(t, "/chat/a?name=rob").text(`{"type":"message","seq":1,"user":"ada","client":"x","data":"forged"}`)
	if e := ada.want("message"); *e.User != "rob" || e.Client == nil || *e.Client == "x" || !strings.Contains(e.text(), "forged") {
		t.Errorf("got %s, want it of rob", e.raw)
	}
}

func TestEvents_MessageOverHTTPHasNoClient(t *testing.T) {
	startCaddy(t, eventsSite)
	p := joinEvents(t, "/post/a")
	publish(t, "/post/a", "news").wantPublished(t, 1, 1)
	if e := p.want("message"); e.Client != nil || *e.User != "" || e.text() != "news" {
		t.Errorf("got %s, want it without a client", e.raw)
	}
}

func TestEvents_EchoOffAnswersWithoutTheMessage(t *testing.T) {
	startCaddy(t, eventsSite)
	a, b := joinEvents(t, "/silent/a"), joinEvents(t, "/silent/a")
	a.say(map[string]string{"type": "send", "id": "m1", "data": "mine"})
	if e := a.want("sent"); e.Seq != 1 {
		t.Errorf("got %s", e.raw)
	}
	b.wantMessages(1, "mine")
	b.sendText("m1", "yours")
	a.wantMessages(2, "yours")
	a.say(map[string]string{"type": "send", "id": "m2", "data": "mine again"})
	a.want("sent")
	if h := joinEvents(t, "/silent/a?"+sinceQuery(a.hello.Epoch, 2)).hello; *h.Resumed || h.Missed != 1 {
		t.Errorf("got %s, want its own message missed, since there is no history", h.raw)
	}
}

func TestEvents_SentHasTheNumberAndTimeOfTheMessage(t *testing.T) {
	startCaddy(t, eventsSite)
	a, b := joinEvents(t, "/chat/a"), joinEvents(t, "/chat/a")
	for _, id := range []string{"m1", "κ\u2028\"", strings.Repeat("x", 64)} {
		sent, message := a.sendText(id, "hello"), b.want("message")
		if sent.Seq != message.Seq || sent.Time != message.Time {
			t.Errorf("got %s for %s", sent.raw, message.raw)
		}
	}
}

// ---- what is wrong with a frame ----

func TestEvents_MalformedFramesAreAnsweredAndTheConnectionLives(t *testing.T) {
	startCaddy(t, eventsSite)
	p := joinEvents(t, "/who/a")
	for _, tc := range []struct{ name, frame, id string }{
		{"nothing", ``, ""},
		{"no JSON", `hello`, ""},
		{"half an object", `{"type":"send"`, ""},
		{"an object and more", `{"type":"send","data":"x"} x`, ""},
		{"null", `null`, ""},
		{"an array", `[{"type":"send","data":"x"}]`, ""},
		{"a string", `"send"`, ""},
		{"no type", `{"data":"x"}`, ""},
		{"a type that is a number", `{"type":1,"data":"x"}`, ""},
		{"no data", `{"type":"send","id":"m1"}`, "m1"},
		{"both kinds of data", `{"type":"send","id":"m2","data":"x","data64":"AP8="}`, "m2"},
		{"data that is no string", `{"type":"send","data":{},"id":"m3"}`, "m3"},
		{"no Base64", `{"type":"send","id":"m4","data64":"???"}`, "m4"},
		{"Base64 without padding", `{"type":"send","id":"m5","data64":"AP8"}`, "m5"},
		{"Base64 for URLs", `{"type":"send","id":"m6","data64":"_-8="}`, "m6"},
		{"an empty id", `{"type":"send","id":"","data":"x"}`, ""},
		{"a long id", `{"type":"send","id":"` + strings.Repeat("x", 65) + `","data":"x"}`, ""},
		{"an id of too many bytes", `{"type":"send","id":"` + strings.Repeat("κ", 33) + `","data":"x"}`, ""},
		{"an id that is a number", `{"type":"send","id":1,"data":"x"}`, ""},
		{"an id without a type", `{"id":"m7","data":"x"}`, ""},
		{"an id of another type", `{"type":"who","id":"m8","limit":0}`, ""},
		{"a limit of 0", `{"type":"who","limit":0}`, ""},
		{"a limit too high", `{"type":"who","limit":1001}`, ""},
		{"a limit that is not whole", `{"type":"who","limit":1.5}`, ""},
		{"a limit of null", `{"type":"who","limit":null}`, ""},
		{"a limit that is a string", `{"type":"who","limit":"1"}`, ""},
		{"a limit that is huge", `{"type":"who","limit":1e999999999}`, ""},
		{"a limit that is tiny", `{"type":"who","limit":1e-999999999}`, ""},
		{"an after that is no string", `{"type":"who","after":1}`, ""},
		{"an after of null", `{"type":"who","after":null}`, ""},
		{"an after of half a character", `{"type":"who","after":"\ud800"}`, ""},
		{"a type of null", `{"type":null,"data":"x"}`, ""},
		{"a type of half a character", `{"type":"\udfff","data":"x"}`, ""},
		{"an id of null", `{"type":"send","id":null,"data":"x"}`, ""},
		{"an id of half a character", `{"type":"send","id":"\ud83d","data":"x"}`, ""},
		{"an id of the other half", `{"type":"send","id":"\ude00","data":"x"}`, ""},
		{"an id of two first halves", `{"type":"send","id":"\ud83d\ud83d","data":"x"}`, ""},
		{"a token of null", `{"type":"send","id":"m9","token":null,"data":"x"}`, "m9"},
		{"data of null", `{"type":"send","id":"m10","data":null}`, "m10"},
		{"data of null beside data64", `{"type":"send","id":"m11","data":null,"data64":"AP8="}`, "m11"},
		{"data64 of null", `{"type":"send","id":"m12","data64":null}`, "m12"},
		{"data of half a character", `{"type":"send","id":"m13","data":"x\uD83Dy"}`, "m13"},
		{"Base64 with a line break", `{"type":"send","id":"m14","data64":"AP8=\r\n"}`, "m14"},
		{"Base64 with a line break within", `{"type":"send","id":"m15","data64":"AA\nAA"}`, "m15"},
		{"Base64 with bits left over", `{"type":"send","id":"m16","data64":"AP9="}`, "m16"},
		{"Base64 with a space", `{"type":"send","id":"m17","data64":"AA AA"}`, "m17"},
		{"an id that is not the last", `{"type":"send","id":"m18","id":5,"data":"x"}`, ""},
		{"too many levels", `{"type":"typing","x":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}`, ""},
		{"a number that JSON does not have", `{"type":"typing","x":01}`, ""},
		{"an escape that JSON does not have", `{"type":"typing","x":"\x41"}`, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p.t = t
			p.text(tc.frame)
			p.wantError("malformed", tc.id)
		})
	}
	p.t = t
	p.say(map[string]string{"type": "send", "data": "still here"})
	p.wantMessages(1, "still here")
}

// TestEvents_ErrorsNameTheField is about the text of errors, which is for people.
func TestEvents_ErrorsNameTheField(t *testing.T) {
	startCaddy(t, eventsSite)
	p := joinEvents(t, "/who/a")
	for _, tc := range []struct{ frame, want string }{
		{"\ufeff" + `{"type":"send","data":"x"}`, "byte order mark"},
		{`{"type":"send",}`, "must be a JSON object: invalid character '}'"},
		{`[]`, "must be a JSON object"},
		{`{"type":null}`, "type: must be a string"},
		{`{"type":"send","id":"\udead","data":"x"}`, "id: has a \\u escape of half a surrogate pair"},
		{`{"type":"send","id":"m1","token":"","data":"x"}`, "token: must be"},
		{`{"type":"send","data":null}`, "data: must be a string"},
		{`{"type":"send","data64":"AP9="}`, "data64: must be Base64"},
		{`{"type":"who","after":0}`, "after: must be a string"},
		{`{"type":"who","limit":0.5}`, "limit: must be a whole number"},
	} {
		p.text(tc.frame)
		if e := p.want("error"); !strings.Contains(e.Message, tc.want) {
			t.Errorf("%q: got %q, want %q", tc.frame, e.Message, tc.want)
		}
	}
}

func TestEvents_EscapesAreDecoded(t *testing.T) {
	startCaddy(t, eventsSite)
	p := joinEvents(t, "/chat/a")
	for i, tc := range []struct{ frame, want string }{
		{
			`{"type":"send","data":"\ud83d\ude00 \uD83D\uDE00 \u00e9\u00E9 \ufffd \\ \/ \" \b\f\n\r\t \u0000"}`,
			"😀 😀 éé \ufffd \\ / \" \b\f\n\r\t \x00",
		},
		{`{"\u0074ype":"\u0073end","\u0064\u0061\u0074\u0061":"escaped names"}`, "escaped names"},
		{" \t\r\n{ \"type\" : \"send\" , \"data\" : \"space\" } \n", "space"},
		{`{"data":"first","type":"send","data":"last"}`, "last"},
		{`{"x":{"data":"deep","y":["}",{"type":"who"}]},"type":"send","z":"\\","data":"top","w":-1.5e3,"v":null}`, "top"},
		{`{"type":"send","data":"a name that is no text","\ud800":1}`, "a name that is no text"},
	} {
		p.text(tc.frame)
		p.wantMessages(i+1, tc.want)
	}
}

func TestEvents_IDsOfDifferentTextsAreDifferent(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	p := joinEvents(t, "/chat/a")
	p.sendText("\ufffd", "one")
	for _, id := range []string{`\ud83d`, `\ud83e`} {
		p.text(`{"type":"send","id":"` + id + `","data":"lost"}`)
		p.skipTo("error")
	}
	if got := p.sendText("m1", "two").Seq; got != 2 {
		t.Errorf("got number %d, want 2", got)
	}
}

func TestPresence_LimitIsAnyWholeNumber(t *testing.T) {
	startCaddy(t, eventsSite)
	p := joinEvents(t, "/who/a?name=ada")
	joinEvents(t, "/who/a?name=bob")
	for limit, want := range map[string]int{
		"1": 1, "1.0": 1, "10e-1": 1, "0.01e2": 1, "1000e-3": 1, "1e0": 1, "1E+0": 1, "2.00": 2, "1e2": 2, "100.0": 2, "1000": 2,
	} {
		p.text(`{"type":"who","limit":` + limit + `}`)
		if page := p.roster(); len(page.Users) != want {
			t.Errorf("limit %s: got %s, want %d users", limit, page.raw, want)
		}
	}
}

func TestEvents_BinaryFrameIsMalformed(t *testing.T) {
	startCaddy(t, eventsSite)
	p := joinEvents(t, "/chat/a")
	p.send(websocket.BinaryMessage, `{"type":"send","data":"x"}`)
	p.wantError("malformed", "")
	p.say(map[string]string{"type": "send", "data": "text"})
	p.wantMessages(1, "text")
}

func TestEvents_UnknownTypesAreIgnored(t *testing.T) {
	startCaddy(t, eventsSite)
	p := joinEvents(t, "/chat/a")
	for i, unknown := range []string{
		`{"type":"typing","x":` + strings.Repeat("[", 99) + `"` + strings.Repeat("[", 2000) + `"` + strings.Repeat("]", 99) + `}`,
		`{"type":"typing"}`, `{"type":"typing","id":"m1","data":5,"limit":"many"}`, `{"type":""}`, `{"type":"Send","data":"x"}`,
		`{"type":"hello"}`, `{"type":"message","data":"x"}`,
	} {
		p.text(unknown)
		p.say(map[string]string{"type": "send", "data": "known"})
		p.wantMessages(i+1, "known")
	}
}

func TestEvents_UnknownFieldsAreIgnored(t *testing.T) {
	startCaddy(t, eventsSite)
	for i, unknown := range []string{
		`{"type":"send","data":"x","color":{"deep":[1]}}`, `{"type":"send","data":"x","limit":"many","after":1}`,
		`{"type":"send","data":"x","Data":"y","ID":5,"DATA64":"AP8="}`,
	} {
		p := joinEvents(t, fmt.Sprint("/chat/", i))
		p.text(unknown)
		p.wantMessages(1, "x")
	}
	p := joinEvents(t, "/who/a")
	p.text(`{"type":"who","data":5,"data64":5,"color":"red"}`)
	p.want("presence")
}

func TestEvents_TooBigAFrameClosesWith1009(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\nchat_broadcast /chat/* {\nmax_message_size 100\n}\n}")
	p := joinEvents(t, "/chat/a")
	if p.hello.MaxMessageSize != 100 {
		t.Fatalf("got %s, want max_message_size 100", p.hello.raw)
	}
	const envelope = len(`{"type":"send","data":""}`)
	p.text(`{"type":"send","data":"` + strings.Repeat("x", 100-envelope) + `"}`)
	p.wantMessages(1, strings.Repeat("x", 100-envelope))
	p.text(`{"type":"send","data":"` + strings.Repeat("x", 101-envelope) + `"}`)
	p.wantClose(websocket.CloseMessageTooBig, "too_big")
}

func TestEvents_TextThatIsNotUTF8ClosesWith1007(t *testing.T) {
	startCaddy(t, eventsSite)
	p, other := joinEvents(t, "/chat/a"), joinEvents(t, "/chat/a")
	p.text("{\"type\":\"send\",\"data\":\"\xff\"}")
	p.wantClose(websocket.CloseInvalidFramePayloadData, "invalid_utf8")
	other.sendText("m1", "undisturbed")
}

// ---- rights and limits ----

func TestEvents_ReadOnlyMayAskButNotSend(t *testing.T) {
	startCaddy(t, eventsSite)
	p := joinEvents(t, "/listen/a?name=ada")
	if page := p.ask(map[string]any{}); len(page.Users) != 1 || page.Users[0].User != "ada" {
		t.Errorf("got %s, want ada", page.raw)
	}
	p.text(`{"type":"typing"}`)
	p.say(map[string]string{"type": "send", "id": "m1", "data": "me too"})
	p.wantClose(websocket.ClosePolicyViolation, "read_only")
}

func TestEvents_ReadOnlyClientIsClosedForAMalformedFrame(t *testing.T) {
	startCaddy(t, eventsSite)
	for _, send := range []func(*eventsPeer){
		func(p *eventsPeer) { p.text(`{"type":"send","data":5}`) },
		func(p *eventsPeer) { p.text(`{`) },
		func(p *eventsPeer) { p.send(websocket.BinaryMessage, `{"type":"who"}`) },
	} {
		p := joinEvents(t, "/listen/a?name=ada")
		p.text(`{"type":"typing","data":5}`)
		p.ask(map[string]any{})
		send(p)
		p.wantClose(websocket.ClosePolicyViolation, "read_only")
	}
}

// TestEvents_RateCountsEachValidSend has a bucket of two messages that fills in an hour.
func TestEvents_RateCountsEachValidSend(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /rate/* {
		rate 2 1h
		history 10
		presence
	}
}`)
	p := joinEvents(t, "/rate/a")
	for _, free := range []string{`{"type":"who"}`, `{"type":"typing"}`, `{"type":"send","data":5}`, `no JSON`} {
		p.text(free)
	}
	p.send(websocket.BinaryMessage, "x")
	for range 3 {
		p.skipTo("error")
	}
	first := p.sendText("m1", "one")
	if again := p.sendText("m1", "one"); again.raw != first.raw { // takes the second
		t.Errorf("got %s, want %s", again.raw, first.raw)
	}
	if e := p.sendAgain(p.hello.Token, "m1", "one"); e.Code != "rate_limited" {
		t.Errorf("got %s, want a repetition over the rate dropped", e.raw)
	}
	q := joinEvents(t, "/rate/a")
	for _, want := range []string{"unknown", "unknown", "rate_limited"} {
		if e := q.sendAgain("another-token", "m1", "one"); e.Code != want {
			t.Errorf("got %s, want %s", e.raw, want)
		}
	}
}

func TestEvents_RateDropsWithAnErrorThenCloses(t *testing.T) {
	startCaddy(t, eventsSite)
	p, other := joinEvents(t, "/rate/a"), joinEvents(t, "/rate/a")
	for i := range 2 {
		p.sendText(fmt.Sprint("m", i), fmt.Sprint(i))
	}
	other.wantMessages(1, "0", "1")
	p.say(map[string]string{"type": "send", "id": "m3", "data": "dropped"})
	if e := p.skipTo("error"); e.Code != "rate_limited" || e.ID == nil || *e.ID != "m3" {
		t.Errorf("got %s", e.raw)
	}
	p.say(map[string]string{"type": "send", "id": "m4", "data": "dropped"})
	p.wantClose(websocket.ClosePolicyViolation, "rate_limited")
	other.sendText("m1", "the next")
	if e := joinEvents(t, "/rate/a").hello; e.Head != 3 {
		t.Errorf("got %s, want the dropped ones not published", e.raw)
	}
}

// TestEvents_LargeFrameThatIsNoMessageIsPacedByItsSize sends a mebibyte that is no payload in one frame. At 2 MiB a second
// it takes half a second until the server reads the next frame.
func TestEvents_LargeFrameThatIsNoMessageIsPacedByItsSize(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\nchat_broadcast /chat/* {\nmax_message_size 2MiB\n}\n}")
	large := strings.Repeat("x", 1<<20)
	for name, frame := range map[string]string{
		"an unknown type": `{"type":"typing","x":"` + large + `"}`,
		"malformed":       `{"type":"send","data":5,"x":"` + large + `"}`,
		"padding":         `{"type":"send","data":"x","x":"` + large + `"}`,
		"a long name":     `{"type":"send","data":"x","` + large + `":0}`,
		"space":           `{"type":"send","data":"x"` + strings.Repeat(" ", 1<<20) + `}`,
		"escapes":         `{"type":"send","data":"` + strings.Repeat(`\u0041`, 1<<20/5) + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			p := joinEvents(t, "/chat/a")
			began := time.Now()
			p.text(frame)
			p.sendText("m1", "hello")
			if took := time.Since(began); took < 450*time.Millisecond {
				t.Errorf("the next message was published after %v", took)
			}
		})
	}
}

// ---- history ----

// historyOf returns a site whose directive has these settings.
func historyOf(settings string) string {
	return "http://localhost:9080 {\nchat_broadcast /chat/* {\n" + settings + "\n}\n}"
}

func TestHistory_RawClientsGetItAsPlainMessages(t *testing.T) {
	startCaddy(t, historyOf("history 3"))
	a := join(t, "/chat/a")
	for i := range 5 {
		a.text(fmt.Sprint(i))
		a.wantText(fmt.Sprint(i))
	}
	a.send(websocket.BinaryMessage, "\x00\xff")
	if got := a.next(); got.opcode != websocket.BinaryMessage {
		t.Fatalf("got %v", got)
	}
	b := join(t, "/chat/a")
	b.wantText("3")
	b.wantText("4")
	if got, want := b.next(), (frame{websocket.BinaryMessage, "\x00\xff"}); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
	a.text("new")
	b.wantText("new")
}

func TestHistory_RawClientsMessagesHaveTheirNames(t *testing.T) {
	startCaddy(t, historyOf("history 3\nuser {http.request.uri.query.name}"))
	a := join(t, "/chat/a?name=ada")
	a.text("hello")
	a.wantText("hello")
	a.conn.Close()
	p := joinEvents(t, "/chat/a")
	if e := p.want("message"); *e.User != "ada" || e.Client == nil || e.Seq != 1 {
		t.Errorf("got %s, want it of ada", e.raw)
	}
}

func TestHistory_OffByDefault(t *testing.T) {
	startCaddy(t, historyOf("ping off"))
	a := joinEvents(t, "/chat/a")
	a.sendText("m1", "hello")
	if h := joinEvents(t, "/chat/a").hello; h.Replay != 0 || h.Head != 1 {
		t.Errorf("got %s, want no replay", h.raw)
	}
}

func TestHistory_HubOutlivesItsLastClientByItsAge(t *testing.T) {
	startCaddy(t, historyOf("history 10 1s"))
	a := joinEvents(t, "/chat/a")
	sent := a.sendText("m1", "hello")
	a.leave()
	b := joinEvents(t, "/chat/a")
	if h := b.hello; h.Replay != 1 || h.Epoch != a.hello.Epoch {
		t.Fatalf("got %s, want the hub as it was", h.raw)
	}
	b.leave()
	awaitNoHubs(t)
	at, err := time.Parse(time.RFC3339, sent.Time)
	if err != nil {
		t.Fatal(err)
	}
	if lived := time.Since(at); lived < time.Second {
		t.Errorf("the hub was gone %v after its message, want a second", lived)
	}
	if h := joinEvents(t, "/chat/a").hello; h.Replay != 0 || h.Head != 0 || h.Epoch == a.hello.Epoch {
		t.Errorf("got %s, want a new hub", h.raw)
	}
}

func TestHistory_MessagesGrowTooOldWhileClientsStay(t *testing.T) {
	startCaddy(t, historyOf("history 10 200ms"))
	a := joinEvents(t, "/chat/a")
	a.sendText("m1", "hello")
	eventually(t, "the message to be too old", func() bool {
		p := joinEvents(t, "/chat/a")
		defer p.conn.Close()
		if p.hello.Head != 1 {
			t.Fatalf("got %s, want the hub as it was", p.hello.raw)
		}
		return p.hello.Replay == 0
	})
}

func TestHistory_TakesHalfOfTheBuffersBytes(t *testing.T) {
	startCaddy(t, historyOf("history 100\nbuffer 100 100KiB"))
	raw := join(t, "/chat/a")
	for i := range 20 {
		text := fmt.Sprint(i, strings.Repeat("x", 10_000))
		raw.text(text)
		raw.wantText(text)
	}
	p := joinEvents(t, "/chat/a")
	if got := p.hello.Replay; got < 3 || got > 5 {
		t.Errorf("got a replay of %d messages of 10 kB, want 50 KiB", got)
	}
	for seq := 20 - p.hello.Replay + 1; seq <= 20; seq++ {
		if e := p.want("message"); e.Seq != seq {
			t.Errorf("got %.80s, want number %d", e.raw, seq)
		}
	}
}

func TestHistory_KeepsPostedMessagesWithoutClients(t *testing.T) {
	startCaddy(t, eventsSite)
	publish(t, "/post/a", "one").wantPublished(t, 0, 1)
	publish(t, "/post/a", "two").wantPublished(t, 0, 2)
	p := joinEvents(t, "/post/a")
	if p.hello.Replay != 2 {
		t.Errorf("got %s, want 2 messages", p.hello.raw)
	}
	p.wantMessages(1, "one", "two")
	raw := join(t, "/post/a")
	raw.wantText("one")
	raw.wantText("two")
}

func TestHistory_InvalidSettingsAreRefused(t *testing.T) {
	s := startCaddy(t, "")
	for _, line := range []string{
		"history", "history 0", "history -1", "history x", "history 10 0s", "history 10 -1s", "history 10 x", "history 10 1m 1",
		"history 10\nhistory 10", "presence x", "presence join_leave x", "presence\npresence",
	} {
		t.Run(line, func(t *testing.T) {
			status, answer := s.post("text/caddyfile", s.caddyfile("", historyOf(line)))
			if status != http.StatusBadRequest {
				t.Errorf("got %d %s, want 400", status, answer)
			}
		})
	}
}

// ---- presence ----

func TestPresence_OffIsAnError(t *testing.T) {
	startCaddy(t, eventsSite)
	p := joinEvents(t, "/chat/a")
	p.text(`{"type":"who"}`)
	p.wantError("presence_off", "")
}

// users have the names for the tests of "who": more than fit in a page, and in an order that is not alphabetical.
func namesByBytes() []string {
	names := []string{"", "Zoë", "ada", "bob", "zoë", "Ωmega", "🙂"}
	for i := range 20 {
		names = append(names, fmt.Sprintf("user %02d", i))
	}
	slices.Sort(names)
	return names
}

func TestPresence_PagesAreInTheOrderOfBytes(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /chat/* {
		user {header.X-User}
		presence
	}
}`)
	names := namesByBytes()
	var p *eventsPeer
	for _, name := range names {
		p = joinEvents(t, "/chat/a", "X-User: "+name+"\r\n")
	}
	join(t, "/chat/a", "X-User: ada\r\n") // once more, and raw
	var got []string
	after := map[string]any{"limit": 5}
	for range len(names) {
		page := p.ask(maps.Clone(after))
		if page.Clients != len(names)+1 || len(page.Users) > 5 {
			t.Fatalf("got %s, want %d clients, 5 a page", page.raw, len(names)+1)
		}
		for _, u := range page.Users {
			got = append(got, u.User)
			if want := map[bool]int{true: 2, false: 1}[u.User == "ada"]; u.Clients != want {
				t.Errorf("got %d clients of %q, want %d", u.Clients, u.User, want)
			}
		}
		if page.After == nil {
			break
		}
		after["after"] = *page.After
	}
	if !slices.Equal(got, names) {
		t.Errorf("got %q, want %q", got, names)
	}
}

func TestPresence_PageAfterAnAbsentUser(t *testing.T) {
	startCaddy(t, eventsSite)
	p := joinEvents(t, "/who/a?name=ada")
	joinEvents(t, "/who/a?name=eve")
	if page := p.ask(map[string]any{"after": "bob"}); len(page.Users) != 1 || page.Users[0].User != "eve" {
		t.Errorf("got %s, want eve", page.raw)
	}
	if page := p.ask(map[string]any{"after": "zoe"}); len(page.Users) != 0 || page.After != nil {
		t.Errorf("got %s, want nobody", page.raw)
	}
}

func TestPresence_OneUserWithManyClientsIsOne(t *testing.T) {
	startCaddy(t, eventsSite)
	p := joinEvents(t, "/who/a?name=ada")
	second := join(t, "/who/a?name=ada")
	if page := p.ask(map[string]any{}); len(page.Users) != 1 || page.Users[0].Clients != 2 {
		t.Errorf("got %s, want ada twice", page.raw)
	}
	second.leave()
	eventually(t, "one to be gone", func() bool { return p.ask(map[string]any{}).Users[0].Clients == 1 })
}

func TestPresence_LongNamesMakeShorterPages(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /chat/* {
		user {header.X-User}
		presence
	}
}`)
	var p *eventsPeer
	for i := range 40 {
		p = joinEvents(t, "/chat/a", fmt.Sprintf("X-User: %02d%s\r\n", i, strings.Repeat("x", 1000)))
	}
	seen, after := 0, map[string]any{}
	for {
		page := p.ask(maps.Clone(after))
		if len(page.raw) > 20<<10 {
			t.Errorf("got a page of %d bytes, want about 16 KiB at most", len(page.raw))
		}
		seen += len(page.Users)
		if page.After == nil {
			break
		}
		after["after"] = *page.After
	}
	if seen != 40 {
		t.Errorf("got %d users, want 40", seen)
	}
}

// TestPresence_PageIsBoundedByItsBytes asks for more users than fit in a page.
func TestPresence_PageIsBoundedByItsBytes(t *testing.T) {
	startCaddy(t, eventsSite)
	const users = 700
	var p *eventsPeer
	for i := range users {
		p = joinEvents(t, fmt.Sprintf("/who/a?name=user%05d", i))
	}
	page := p.ask(map[string]any{"limit": 1000})
	if n := len(page.Users); n < 400 || n > 600 || len(page.raw) > 17<<10 || page.After == nil || *page.After != page.Users[n-1].User {
		t.Fatalf("got %d users in %d bytes, want about 510 in 16 KiB and a next", n, len(page.raw))
	}
	rest := p.ask(map[string]any{"limit": 1000, "after": *page.After})
	if got := len(page.Users) + len(rest.Users); got != users || rest.After != nil {
		t.Errorf("got %d users in two pages, want %d", got, users)
	}
}

// watchedSite tells of joins and leaves.
const watchedSite = `http://localhost:9080 {
	chat_broadcast /chat/* {path} {
		user {http.request.uri.query.name}
		presence join_leave
		history 10
	}
	chat_broadcast /silent/* /chat/4 {
		user {http.request.uri.query.name}
		presence join_leave
		ping 1s 1s
	}
}`

// TestPresence_JoinLeave has parts, each with its own hub. Each takes seconds, because the server waits before it sends a
// change. They run beside each other, when all the other tests are done.
func TestPresence_JoinLeave(t *testing.T) {
	t.Parallel()
	startCaddy(t, watchedSite)
	for i, part := range []struct {
		name string
		test func(t *testing.T, hub string)
	}{
		{"a client gets its own join", clientGetsItsOwnJoin},
		{"a quick reconnect shows no leave and no join", quickReconnectIsNoChange},
		{"a second connection of a user is no join", secondConnectionIsNoJoin},
		{"raw clients join and leave", rawClientsJoinAndLeave},
		{"a silent client is gone after the ping timeout", silentClientIsGone},
		{"a roster begun while somebody is away for a moment", rosterBegunDuringAnAbsence},
		{"a roster begun before a join is sent", rosterBegunBeforeAJoinIsSent},
	} {
		t.Run(part.name, func(t *testing.T) {
			t.Parallel()
			part.test(t, fmt.Sprint("/chat/", i))
		})
	}
}

func clientGetsItsOwnJoin(t *testing.T, hub string) {
	if e := joinEvents(t, hub+"?name=ada").event(); e.Type != "join" || *e.User != "ada" || e.Clients != 1 {
		t.Errorf("got %s, want the join of ada", e.raw)
	}
}

func quickReconnectIsNoChange(t *testing.T, hub string) {
	ada := joinEvents(t, hub+"?name=ada")
	ada.skipTo("join")
	bob := joinEvents(t, hub+"?name=bob")
	ada.skipUntil(func(e incoming) bool { return e.Type == "join" && *e.User == "bob" })
	for range 5 {
		bob.conn.Close()
		bob = joinEvents(t, hub+"?name=bob")
	}
	eve := joinEvents(t, hub+"?name=eve") // the server sends changes in order
	for {
		e := ada.event()
		if e.Type == "join" && *e.User == "eve" {
			break
		}
		if e.Type == "leave" || e.Type == "join" || e.Left != nil || slices.Contains(e.Joined, "bob") {
			t.Fatalf("got %s, want nothing of bob", e.raw)
		}
		if slices.Contains(e.Joined, "eve") {
			break
		}
	}
	eve.conn.Close()
	if e := ada.skipUntil(func(e incoming) bool { return e.Type == "leave" || e.Left != nil }); e.Type != "leave" || *e.User != "eve" {
		t.Errorf("got %s, want nobody to leave but eve", e.raw)
	}
}

func secondConnectionIsNoJoin(t *testing.T, hub string) {
	ada := joinEvents(t, hub+"?name=ada")
	ada.skipTo("join")
	second := join(t, hub+"?name=ada")
	if e := ada.event(); e.Type != "presence" || e.Clients != 2 || e.Joined != nil {
		t.Errorf("got %s, want just the number of clients", e.raw)
	}
	second.conn.Close()
	if e := ada.event(); e.Type != "presence" || e.Clients != 1 || e.Left != nil {
		t.Errorf("got %s, want just the number of clients", e.raw)
	}
}

func rawClientsJoinAndLeave(t *testing.T, hub string) {
	ada := joinEvents(t, hub+"?name=ada")
	ada.skipTo("join")
	raw := join(t, hub+"?name=raw")
	if e := ada.event(); e.Type != "join" || *e.User != "raw" || e.Clients != 2 {
		t.Errorf("got %s, want the join of raw", e.raw)
	}
	raw.conn.Close()
	if e := ada.skipTo("leave"); *e.User != "raw" || e.Clients != 1 {
		t.Errorf("got %s, want the leave of raw", e.raw)
	}
}

func TestPresence_WithoutJoinLeaveNoChangesAreSent(t *testing.T) {
	startCaddy(t, eventsSite)
	ada := joinEvents(t, "/who/a?name=ada")
	bob := joinEvents(t, "/who/a?name=bob")
	bob.sendText("m1", "hello")
	bob.leave()
	joinEvents(t, "/who/a?name=cid").sendText("m1", "hello")
	ada.wantMessages(1, "hello", "hello")
}

func silentClientIsGone(t *testing.T, hub string) {
	ada := joinEvents(t, hub+"?name=ada")
	joinEvents(t, "/silent/?name=silent") // answers no ping
	if e := ada.skipTo("leave"); *e.User != "silent" {
		t.Errorf("got %s, want the leave of silent", e.raw)
	}
}

// rosterBegunDuringAnAbsence has a client ask for the roster while a user is away for a moment. The server sends no
// change for such a short absence.
func rosterBegunDuringAnAbsence(t *testing.T, hub string) {
	ada := joinEvents(t, hub+"?name=ada")
	ada.skipTo("join")
	bob := joinEvents(t, hub+"?name=bob")
	ada.skipUntil(func(e incoming) bool { return e.Type == "join" && *e.User == "bob" })
	bob.leave()
	eventually(t, "bob to be gone", func() bool { return ada.ask(map[string]any{}).Clients == 1 })
	cid := joinEvents(t, hub+"?name=cid")
	r := newRoster(cid.ask(map[string]any{}))
	joinEvents(t, hub+"?name=bob")
	joinEvents(t, hub+"?name=eve")
	r.followUntil(t, cid, "ada", "bob", "cid", "eve")
}

// rosterBegunBeforeAJoinIsSent has a client ask for the roster when a user has joined. The user leaves again before the
// server sends the change.
func rosterBegunBeforeAJoinIsSent(t *testing.T, hub string) {
	ada := joinEvents(t, hub+"?name=ada")
	ada.skipTo("join") // the server sends the next change a second later
	bob := joinEvents(t, hub+"?name=bob")
	r := newRoster(ada.ask(map[string]any{}))
	bob.leave()
	eventually(t, "bob to be gone", func() bool { return ada.ask(map[string]any{}).Clients == 1 })
	joinEvents(t, hub+"?name=eve")
	r.followUntil(t, ada, "ada", "eve")
}

// A roster has the users that are present as far as a client knows.
type roster map[string]bool

func newRoster(page incoming) roster {
	r := roster{}
	for _, u := range page.Users {
		r[u.User] = true
	}
	return r
}

// apply changes the roster as a presence event says. It reports whether e is a presence event.
func (r roster) apply(e incoming) bool {
	switch {
	case e.Type == "join":
		r[*e.User] = true
	case e.Type == "leave":
		delete(r, *e.User)
	case e.Type == "presence" && e.Users == nil:
		for _, user := range e.Joined {
			r[user] = true
		}
		for _, user := range e.Left {
			delete(r, user)
		}
	default:
		return false
	}
	return true
}

// followUntil applies the events of p until the roster has exactly these users.
func (r roster) followUntil(t *testing.T, p *eventsPeer, users ...string) {
	t.Helper()
	for !slices.Equal(slices.Sorted(maps.Keys(r)), users) {
		e, err := p.read()
		if err != nil {
			t.Fatalf("got the roster %q, want %q; then %v", slices.Sorted(maps.Keys(r)), users, err)
		}
		r.apply(e)
	}
}

// TestPresence_ChangeLeavesRawClientsWhereTheyAre has frames that are for some of the idle clients only.
func TestPresence_ChangeLeavesRawClientsWhereTheyAre(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /chat/* {
		user {http.request.uri.query.name}
		presence join_leave
	}
}`)
	raw := []*peer{join(t, "/chat/a"), join(t, "/chat/a"), join(t, "/chat/a")}
	watcher := joinEvents(t, "/chat/a?name=ada")
	watcher.skipUntil(func(e incoming) bool { return e.Type == "join" && *e.User == "ada" })
	for _, text := range []string{"one", "two"} {
		watcher.say(map[string]string{"type": "send", "data": text})
		for _, p := range raw {
			p.wantText(text)
		}
	}
}
