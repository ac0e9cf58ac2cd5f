package feed

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

// schemaFile describes the events for clients.
const schemaFile = "../../docs/protocol.schema.json"

// serverSchema returns the schema of events that the server may send.
func serverSchema(t testing.TB) *jsonschema.Schema {
	t.Helper()
	compiler := jsonschema.NewCompiler()
	compiler.AssertFormat()
	schema, err := compiler.Compile(schemaFile + "#/$defs/strictFromServer")
	if err != nil {
		t.Fatal(err)
	}
	return schema
}

// checkSchema fails the test if an event breaks the schema.
func checkSchema(t testing.TB, schema *jsonschema.Schema, event string) {
	t.Helper()
	value, err := jsonschema.UnmarshalJSON(strings.NewReader(event))
	if err == nil {
		err = schema.Validate(value)
	}
	if err != nil {
		t.Fatalf("%.200q: %v", event, err)
	}
}

// encodeJSON encodes a value with encoding/json, without escapes for HTML.
func encodeJSON(t testing.TB, value any) string {
	t.Helper()
	var buf bytes.Buffer
	e := json.NewEncoder(&buf)
	e.SetEscapeHTML(false)
	if err := e.Encode(value); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(buf.String(), "\n")
}

var jsonEscape = regexp.MustCompile(`\\(u[0-9a-f]{4}|.)`)

// fewerEscapes turns JSON of encoding/json into JSON of this package, which writes control characters but the line feed by
// their number and leaves the separators U+2028 and U+2029 as they are.
func fewerEscapes(s string) string {
	return jsonEscape.ReplaceAllStringFunc(s, func(escape string) string {
		switch escape {
		case `\b`:
			return `\u0008`
		case `\t`:
			return `\u0009`
		case `\f`:
			return `\u000c`
		case `\r`:
			return `\u000d`
		case `\u2028`:
			return "\u2028"
		case `\u2029`:
			return "\u2029"
		}
		return escape
	})
}

// wantEvent returns the message event for m, as encoding/json makes it.
func wantEvent(t testing.TB, m *Message) string {
	t.Helper()
	event := struct {
		Type   string  `json:"type"`
		Seq    uint64  `json:"seq"`
		Time   string  `json:"time"`
		Client string  `json:"client,omitempty"`
		User   string  `json:"user"`
		Data64 *string `json:"data64,omitempty"`
		Data   *string `json:"data,omitempty"`
	}{Type: "message", Seq: m.Seq, Time: m.At.UTC().Format("2006-01-02T15:04:05.000Z"), User: m.User}
	if m.Sender != 0 {
		event.Client = m.Sender.String()
	}
	text := string(m.Payload)
	if m.Opcode == ws.BinaryMessage {
		text = base64.StdEncoding.EncodeToString(m.Payload)
		event.Data64 = &text
	} else {
		event.Data = &text
	}
	return fewerEscapes(encodeJSON(t, event))
}

// wantFrame fails the test unless head and body are a text frame with the given event.
func wantFrame(t testing.TB, head, body []byte, event string) {
	t.Helper()
	if string(body) != event {
		t.Errorf("got  %s\nwant %s", body, event)
	}
	if want := ws.AppendFrame(nil, ws.TextMessage, []byte(event)); !bytes.Equal(append(bytes.Clone(head), body...), want) {
		t.Errorf("got header %x for %d bytes, want a text frame", head, len(body))
	}
}

var noon = time.Date(2026, 11, 23, 12, 0, 0, 7_999_999, time.FixedZone("", 3600))

func TestEvents_MessageIsWrittenByteForByte(t *testing.T) {
	schema := serverSchema(t)
	e := NewEvents()
	for _, tc := range []struct {
		name string
		m    Message
		want string
	}{
		{
			"text",
			Message{Seq: 42, At: noon, Sender: 123456789, User: "ada", Opcode: ws.TextMessage, Payload: []byte("hello")},
			`{"type":"message","seq":42,"time":"2026-11-23T11:00:00.007Z","client":"21i3v9","user":"ada","data":"hello"}`,
		},
		{
			"no sender, no user, empty text",
			Message{Seq: 1, At: noon, Opcode: ws.TextMessage},
			`{"type":"message","seq":1,"time":"2026-11-23T11:00:00.007Z","user":"","data":""}`,
		},
		{
			"binary",
			Message{Seq: 1, At: noon, Sender: 1, Opcode: ws.BinaryMessage, Payload: []byte{0, 255, '"', '\n'}},
			`{"type":"message","seq":1,"time":"2026-11-23T11:00:00.007Z","client":"1","user":"","data64":"AP8iCg=="}`,
		},
		{
			"empty binary",
			Message{Seq: 1, At: noon, Opcode: ws.BinaryMessage},
			`{"type":"message","seq":1,"time":"2026-11-23T11:00:00.007Z","user":"","data64":""}`,
		},
		{
			"quotes and control characters",
			Message{Seq: 1, At: noon, User: `"\/`, Opcode: ws.TextMessage, Payload: []byte("\x00\b\t\n\f\r\x1f\x7f")},
			`{"type":"message","seq":1,"time":"2026-11-23T11:00:00.007Z","user":"\"\\/",` +
				`"data":"\u0000\u0008\u0009\n\u000c\u000d\u001f` + "\x7f\"}",
		},
		{
			"separators, other scripts, HTML",
			Message{Seq: 1, At: noon, User: "\u2028é", Opcode: ws.TextMessage, Payload: []byte("\u2029🙂<b>&")},
			`{"type":"message","seq":1,"time":"2026-11-23T11:00:00.007Z","user":"` + "\u2028é\",\"data\":\"\u2029🙂<b>&\"}",
		},
		{
			"the largest number and id",
			Message{Seq: 1<<53 - 1, At: noon, Sender: 1<<64 - 1, Opcode: ws.TextMessage, Payload: []byte("x")},
			`{"type":"message","seq":9007199254740991,"time":"2026-11-23T11:00:00.007Z","client":"3w5e11264sgsf","user":"","data":"x"}`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			head, body := e.Message(&tc.m)
			wantFrame(t, head, body, tc.want)
			if want := wantEvent(t, &tc.m); tc.want != want {
				t.Errorf("encoding/json makes\n%s, want\n%s", want, tc.want)
			}
			checkSchema(t, schema, tc.want)
		})
	}
}

func TestEvents_NoticeIsWrittenByteForByte(t *testing.T) {
	schema := serverSchema(t)
	e := NewEvents()
	for _, tc := range []struct {
		name string
		n    Notice
		want string
	}{
		{"join", Notice{Clients: 3, Joined: []string{"ada"}}, `{"type":"join","user":"ada","clients":3}`},
		{"leave", Notice{Clients: 2, Left: []string{"ada"}}, `{"type":"leave","user":"ada","clients":2}`},
		{"anonymous", Notice{Clients: 1, Joined: []string{""}}, `{"type":"join","user":"","clients":1}`},
		{"only the number", Notice{Clients: 9}, `{"type":"presence","clients":9}`},
		{
			"one of each",
			Notice{Clients: 2, Joined: []string{"ada"}, Left: []string{"bob"}},
			`{"type":"presence","clients":2,"joined":["ada"],"left":["bob"]}`,
		},
		{
			"several that come",
			Notice{Clients: 5, Joined: []string{"ada", "bob"}},
			`{"type":"presence","clients":5,"joined":["ada","bob"]}`,
		},
		{
			"several that go",
			Notice{Clients: 1, Left: []string{"ada", "bob"}},
			`{"type":"presence","clients":1,"left":["ada","bob"]}`,
		},
		{
			"quotes, control characters, separators, HTML",
			Notice{Clients: 1, Joined: []string{"\"\\\x00\b\t\n\f\r\x1f\x7f\u2028\u2029é🙂<b>&"}},
			`{"type":"join","user":"\"\\\u0000\b\t\n\f\r\u001f` + "\x7f" + `\u2028\u2029é🙂<b>&","clients":1}`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			head, body, ok := e.Notice(&tc.n)
			if !ok {
				t.Fatal("got no notice")
			}
			wantFrame(t, head, body, tc.want)
			checkSchema(t, schema, tc.want)
			var event struct {
				Type    string   `json:"type"`
				User    *string  `json:"user,omitempty"`
				Clients int      `json:"clients"`
				Joined  []string `json:"joined,omitempty"`
				Left    []string `json:"left,omitempty"`
			}
			if err := json.Unmarshal(body, &event); err != nil {
				t.Fatal(err)
			}
			if want := encodeJSON(t, event); tc.want != want {
				t.Errorf("encoding/json makes\n%s, want\n%s", want, tc.want)
			}
			changed := Notice{event.Clients, event.Joined, event.Left}
			switch event.Type {
			case "join":
				changed.Joined = []string{*event.User}
			case "leave":
				changed.Left = []string{*event.User}
			}
			if !reflect.DeepEqual(changed, tc.n) {
				t.Errorf("the event says %+v, want %+v", changed, tc.n)
			}
		})
	}
}

func TestEvents_ReplayHasTheMessagesWithoutTheNotices(t *testing.T) {
	schema := serverSchema(t)
	f := New(NewEvents(), 0)
	f.Grow(1000, 1<<20)
	var want []string
	for i, size := range []int{0, 1, 20, 60_000, 10} {
		f.AppendNotice(&Notice{Clients: 1 + i, Joined: []string{`{"type":"message","seq":`}})
		m := Message{Seq: uint64(i + 1), At: noon, User: "ada", Opcode: ws.TextMessage, Payload: bytes.Repeat([]byte("é"), size/2)}
		f.AppendMessage(&m)
		want = append(want, wantEvent(t, &m))
		f.AppendNotice(&Notice{Clients: 1 + i})

		var frames []byte
		for position := f.Tail(); position < f.Head(); position++ {
			frames = append(frames, f.frame(position)...)
		}
		event := `{"type":"replay","messages":[` + strings.Join(want, ",") + "]}"
		if got, want := AppendReplay([]byte("before"), frames), ws.AppendFrame([]byte("before"), ws.TextMessage, []byte(event)); !bytes.Equal(got, want) {
			t.Errorf("%d messages: got %.200q, want %.200q", i+1, got, want)
		}
		checkSchema(t, schema, event)
	}
}

func TestEvents_ReplayFitsIntoItsBuffer(t *testing.T) {
	var frames []byte
	for range 1000 {
		frames = ws.AppendFrame(frames, ws.TextMessage, []byte(messageStart+`1}`))
	}
	buffer := make([]byte, 0, len(frames)+ReplayOverhead)
	if got := testing.AllocsPerRun(100, func() { AppendReplay(buffer, frames) }); got > 0 {
		t.Errorf("got %v allocations, want none", got)
	}
}

// FuzzMessageEvent has messages encoded, and compares them with what encoding/json writes and reads.
func FuzzMessageEvent(f *testing.F) {
	f.Add("ada", "hello", uint64(1), false)
	f.Add("", "\x00\x1f \"quoted\" C:\\ \n\r\t\u2028 é 🙂 <b>", uint64(0), false)
	f.Add("\"\\\n", "\x00\xff", uint64(1<<63), true)
	schema := serverSchema(f)
	const maxUser = 1024
	f.Fuzz(func(t *testing.T, user, payload string, sender uint64, binary bool) {
		if !utf8.ValidString(user) || len(user) > maxUser || !binary && !utf8.ValidString(payload) {
			return
		}
		m := Message{Seq: 42, At: noon, Sender: ClientID(sender), User: user, Opcode: ws.TextMessage, Payload: []byte(payload)}
		if binary {
			m.Opcode = ws.BinaryMessage
		}
		frame := string(appendMessage([]byte("before"), &m)[len("before"):])
		checkSchema(t, schema, frame)
		if want := wantEvent(t, &m); frame != want {
			t.Errorf("got  %s\nwant %s", frame, want)
		}
		var got struct {
			Type, Time, Client, User string
			Seq                      int
			Data                     *string
			Data64                   []byte
		}
		if err := json.Unmarshal([]byte(frame), &got); err != nil {
			t.Fatalf("%q: %v", frame, err)
		}
		if got.Type != "message" || got.Seq != 42 || got.Time != "2026-11-23T11:00:00.007Z" || got.User != user {
			t.Errorf("got %s", frame)
		}
		if want := m.Sender.String(); got.Client != want && (sender != 0 || got.Client != "") {
			t.Errorf("got client %q, want %q", got.Client, want)
		}
		switch {
		case binary && (got.Data != nil || string(got.Data64) != payload), !binary && (got.Data == nil || *got.Data != payload):
			t.Errorf("got %s, want %q", frame, payload)
		}
	})
}

func TestEvents_LargeEventLeavesNoLargeBuffer(t *testing.T) {
	e := NewEvents().(*events)
	for _, size := range []int{100, maxEventBuffer - 1000, maxEventBuffer, 1 << 20, 100} {
		m := Message{Seq: 1, Opcode: ws.TextMessage, Payload: bytes.Repeat([]byte("x"), size)}
		head, body := e.Message(&m)
		wantFrame(t, head, body, wantEvent(t, &m))
		if got := cap(e.buf); got > maxEventBuffer {
			t.Errorf("a message of %d bytes: got a buffer of %d kept, want %d at most", size, got, maxEventBuffer)
		}
	}
	names := make([]string, 2000)
	for i := range names {
		names[i] = fmt.Sprintf("user %d", i)
	}
	if _, _, ok := e.Notice(&Notice{Joined: names}); !ok || cap(e.buf) > maxEventBuffer {
		t.Errorf("a large notice: got a buffer of %d kept, want %d at most", cap(e.buf), maxEventBuffer)
	}
}

func TestAppendEvent_AppendsJSONWithoutALineFeed(t *testing.T) {
	got := AppendEvent([]byte("before "), map[string]string{"a": "<\u2028>"})
	if want := `before {"a":"<\u2028>"}`; string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
	defer func() {
		if recover() == nil {
			t.Error("encoded what JSON does not have")
		}
	}()
	AppendEvent(nil, func() {})
}

func TestEventTime_IsCutToMilliseconds(t *testing.T) {
	if got, want := EventTime(noon), "2026-11-23T11:00:00.007Z"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestClientID_IsLowerCaseLettersAndDigits(t *testing.T) {
	for id, want := range map[ClientID]string{0: "0", 35: "z", 36: "10", 1<<64 - 1: "3w5e11264sgsf"} {
		if got := id.String(); got != want {
			t.Errorf("%d: got %s, want %s", uint64(id), got, want)
		}
		if got := string(id.Append([]byte("id "))); got != "id "+want {
			t.Errorf("%d: got %s appended, want %s", uint64(id), got, want)
		}
	}
}

func TestJSONSize_IsAtLeastWhatAppendJSONStringAppends(t *testing.T) {
	for _, tc := range []struct {
		s     string
		spare int // how much larger the size is
	}{
		{"", 0},
		{"ada", 0},
		{"\"\\", 0},
		{"\x00\t\r\x1f", 0},
		{"\n\n", 2 * 4},
		{"é🙂\u2028\x7f", 0},
	} {
		want := len(AppendJSONString(nil, tc.s)) + len(",") + tc.spare
		if got := JSONSize(tc.s); got != want {
			t.Errorf("%q: got %d, want %d", tc.s, got, want)
		}
		if asBytes := AppendJSONString(nil, []byte(tc.s)); string(asBytes) != string(AppendJSONString(nil, tc.s)) {
			t.Errorf("%q: got %s for its bytes", tc.s, asBytes)
		}
	}
}
