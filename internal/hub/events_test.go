package hub

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

func TestEvents_HelloTellsEverything(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		settings := historyOfTen()
		settings.Rate = Rate{5, 1500*time.Microsecond + time.Nanosecond}
		c, p := joiner{user: "ada", events: true}.join(t, b, settings)
		e := p.wantEvent("hello")
		if *e.Client != c.ID().String() || *e.User != "ada" || e.Hub != b.Name() || e.Epoch != b.epoch || e.Clients != 1 ||
			e.Head != 0 || e.Replay != 0 || e.Resumed != nil || e.Age != 60_000 || e.MaxMessageSize != settings.MaxMessageSize {
			t.Errorf("got %s", e.raw)
		}
		if e.Rate == nil || e.Rate.Messages != 5 || e.Rate.Window != 2 {
			t.Errorf("got %s, want the rate with its window rounded up", e.raw)
		}
		if !b.issued(e.Token) || !validToken(e.Token) || b.issued(b.epoch) || b.issued("x"+e.Token) {
			t.Errorf("got token %q, want one of this hub", e.Token)
		}
		_, without := joiner{events: true}.join(t, b, defaults())
		if e := without.wantEvent("hello"); e.Rate != nil || e.Clients != 2 {
			t.Errorf("without a rate: got %s", e.raw)
		}
		b.Close()
	})
}

// TestEvents_RequestsAreAnswered sends each kind of frame, and compares the answers.
func TestEvents_RequestsAreAnswered(t *testing.T) {
	long := strings.Repeat("x", maxSendID+1)
	for _, tc := range []struct {
		name, frame string
		binary      bool
		want        []string // parts of the answer
	}{
		{"a binary frame", `{}`, true, []string{`"malformed"`, "binary frames are not used"}},
		{"no JSON", `hello`, false, []string{`"malformed"`, "must be a JSON object"}},
		{"no object", `[]`, false, []string{`"malformed"`, "must be a JSON object"}},
		{"a byte order mark", "\ufeff{}", false, []string{`"malformed"`, "byte order mark"}},
		{"too many levels", strings.Repeat("[", maxLevels+1), false, []string{`"malformed"`, "100 levels"}},
		{"no type", `{"x":1}`, false, []string{`"malformed"`, "type: is missing"}},
		{"a type that is no string", `{"type":1}`, false, []string{`"malformed"`, "type: must be a string"}},
		{"half a surrogate pair", `{"type":"send","id":"\ud800","data":""}`, false, []string{`"malformed"`, "half a surrogate pair"}},
		{"half a pair before another escape", `{"type":"send","id":"\ud800\u0041","data":""}`, false, []string{`"malformed"`, "half a surrogate pair"}},
		{"no payload", `{"type":"send","id":"m1"}`, false, []string{`"malformed"`, "data or data64", `"id":"m1"`}},
		{"two payloads", `{"type":"send","data":"","data64":""}`, false, []string{`"malformed"`, "either data or data64"}},
		{"bad Base64", `{"type":"send","data64":"A"}`, false, []string{`"malformed"`, "must be Base64"}},
		{"Base64 with a line break", `{"type":"send","data64":"AA\n=="}`, false, []string{`"malformed"`, "must be Base64"}},
		{"an empty id", `{"type":"send","id":"","data":""}`, false, []string{`"malformed"`, "id: must be 1 to 64 bytes"}},
		{"a long id", `{"type":"send","id":"` + long + `","data":""}`, false, []string{`"malformed"`, "id: must be 1 to 64 bytes"}},
		{"a bad token", `{"type":"send","id":"1","token":"é","data":""}`, false, []string{`"malformed"`, "token: must be 1 to 64"}},
		{"a token alone", `{"type":"send","token":"x","data":""}`, false, []string{`"malformed"`, "id: is missing beside token"}},
		{"a bad limit", `{"type":"who","limit":1001}`, false, []string{`"malformed"`, "limit: must be a whole number from 1 to 1000"}},
		{"a limit that is no number", `{"type":"who","limit":"7"}`, false, []string{`"malformed"`, "limit: must be"}},
		{"who without presence", `{"type":"who","limit":10}`, false, []string{`"presence_off"`}},
		{"a ping", `{"type":"ping"}`, false, []string{`{"type":"pong"}`}},
		{"a ping with an id", `{"type":"ping","id":"p\u0031"}`, false, []string{`{"type":"pong","id":"p1"}`}},
		{"a ping with an empty id", `{"type":"ping","id":""}`, false, []string{`"malformed"`, "id: must be 1 to 64 bytes"}},
		{"a ping with a long id", `{"type":"ping","id":"` + long + `"}`, false, []string{`"malformed"`, "id: must be 1 to 64 bytes"}},
		{"a ping with an id that is no string", `{"type":"ping","id":1}`, false, []string{`"malformed"`, "id: must be a string"}},
		{"a message sent again", `{"type":"send","id":"m1","token":"x","data":""}`, false, []string{`"unknown"`, `"id":"m1"`}},
		{"escapes", `{"type":"send","data":"\"\\\/\b\f\n\r\t\u00e9\ud83d\ude00"}`, false, []string{`"message"`, `"data":"\"\\/\u0008\u000c\n\u000d\u0009é😀"`}},
		{"a message with an id", `{"type":"send","id":"m1","data":"x"}`, false, []string{`"message"`}},
		{"binary data", `{"type":"send","data64":"AP8="}`, false, []string{`"message"`, `"data64":"AP8="`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				_, p := joiner{events: true}.join(t, b, defaults())
				p.wantEvent("hello")
				opcode := ws.TextMessage
				if tc.binary {
					opcode = ws.BinaryMessage
				}
				p.text(`{"type":"shout","x":[true,false,null,-1.5e3]}`) // no answer
				p.send(opcode, tc.frame)
				got := p.next().payload
				if strings.Contains(got, `"sent"`) { // which of the two comes first is open
					got = p.next().payload
				}
				for _, part := range tc.want {
					if !strings.Contains(got, part) {
						t.Errorf("got %s, want it to have %s", got, part)
					}
				}
			})
		})
	}
}

func TestEvents_SendsAreAcknowledgedAndNotRepeated(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		_, p := joiner{events: true, user: "ada"}.join(t, b, historyOfTen())
		token := p.wantEvent("hello").Token
		wantSent := func() {
			t.Helper()
			if e := p.wantEvent("sent"); *e.ID != "m1" || e.Seq != 1 {
				t.Errorf("got %s, want m1 sent as 1", e.raw)
			}
		}
		p.text(`{"type":"send","id":"m1","data":"hello"}`)
		for range 2 {
			if e := p.event(); e.Type == "sent" && e.Seq != 1 || e.Type == "message" && e.text() != "hello" {
				t.Errorf("got %s", e.raw)
			}
		}
		p.text(`{"type":"send","id":"m1","data":"hello"}`)
		wantSent()
		p.conn.Close()
		_, again := joiner{events: true, user: "ada"}.join(t, b, historyOfTen())
		p = again
		p.wantEvent("hello")
		p.wantEvent("message")
		p.text(`{"type":"send","id":"m1","token":"` + token + `","data":"hello"}`)
		wantSent()
		p.text(`{"type":"send","id":"m2","token":"` + token + `","data":"new"}`)
		synctest.Wait()
		if got := b.raw.Head(); got != 2 {
			t.Errorf("got %d messages, want 2", got)
		}
		b.Close()
	})
}

func TestEvents_RateIsToldAndThenCloses(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		settings := defaults()
		settings.Rate = Rate{2, time.Hour}
		c, p := joiner{events: true}.join(t, b, settings)
		p.wantEvent("hello")
		for range 2 {
			p.text(`{"type":"send","data":"within"}`)
			p.wantEvent("message")
		}
		p.text(`{"type":"send","id":"m3","data":"over"}`)
		if e := p.wantEvent("error"); e.Code != "rate_limited" || *e.ID != "m3" {
			t.Errorf("got %s", e.raw)
		}
		p.text(`{"type":"send","data":"over"}`)
		p.wantClose(CloseRateLimited)
		p.conn.Close()
		synctest.Wait()
		wantEnd(t, c, CloseRateLimited)
		if got := b.process.Counters.DroppedByRate.Load(); got != 2 {
			t.Errorf("got %d messages counted as dropped, want 2", got)
		}
	})
}

// TestEvents_ListenersMayAskAndNotSend has clients of a directive with read_only.
func TestEvents_ListenersMayAskAndNotSend(t *testing.T) {
	for _, frame := range []string{`{"type":"send","data":"x"}`, `nonsense`} {
		bubble(t, func(t *testing.T, b *Hub) {
			settings := presenceOf(false)
			settings.ReadOnly = true
			c, p := joiner{events: true, user: "ada"}.join(t, b, settings)
			if e := p.wantEvent("hello"); !strings.Contains(e.raw, `"read_only":true`) {
				t.Errorf("got %s, want read_only", e.raw)
			}
			p.text(`{"type":"who"}`)
			if e := p.wantEvent("presence"); e.Clients != 1 || len(e.Users) != 1 || e.Users[0].User != "ada" {
				t.Errorf("got %s, want ada alone", e.raw)
			}
			p.text(`{"type":"ping"}`)
			p.wantEvent("pong")
			p.text(frame)
			p.wantClose(CloseReadOnly)
			p.conn.Close()
			synctest.Wait()
			wantEnd(t, c, CloseReadOnly)
		})
	}
}

// TestEvents_PingIsNeitherMessageNorRated pings beside another client, which must notice nothing, with a rate of one message.
func TestEvents_PingIsNeitherMessageNorRated(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		settings := defaults()
		settings.Rate = Rate{1, time.Hour}
		c, p := joiner{events: true}.join(t, b, settings)
		p.wantEvent("hello")
		_, other := joiner{events: true}.join(t, b, defaults())
		other.wantEvent("hello")
		for i := range 20 {
			p.text(fmt.Sprintf(`{"type":"ping","id":"p%d"}`, i))
			if e, want := p.wantEvent("pong"), fmt.Sprint("p", i); *e.ID != want {
				t.Errorf("got %s, want the id %s", e.raw, want)
			}
		}
		p.text(`{"type":"send","data":"within the rate"}`)
		p.wantEvent("message")
		if e := other.wantEvent("message"); e.Seq != 1 {
			t.Errorf("got %s, want message 1", e.raw)
		}
		if got := c.Traffic().MessagesIn; got != 1 {
			t.Errorf("got %d messages counted, want 1", got)
		}
		b.Close()
	})
}

// TestEvents_ClientThatPingsIsNotPinged has a client that sends a ping in each interval, and then no more.
func TestEvents_ClientThatPingsIsNotPinged(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		c, p := joiner{events: true}.join(t, b, defaults())
		p.wantEvent("hello")
		_ = p.conn.SetReadDeadline(time.Time{})
		every := c.settings.PingInterval * 2 / 5 // the first ping of the server may come after half an interval
		for range 50 {
			time.Sleep(every)
			p.text(`{"type":"ping"}`)
			if got, want := p.mustRead(), (frame{ws.TextMessage, `{"type":"pong"}`}); got != want {
				t.Fatalf("got %v, want %v", got, want)
			}
		}
		asked := time.Now()
		if f := p.mustRead(); f.opcode != ws.PingMessage {
			t.Fatalf("got %v, want a ping", f)
		}
		if got, most := time.Since(asked), 2*c.settings.PingInterval; got < c.settings.PingInterval || got > most {
			t.Errorf("got a ping %v after the client's last, want from %v to %v", got, c.settings.PingInterval, most)
		}
		b.Close()
	})
}

// TestEvents_PingsArePaced sends pings as fast as the server reads them: 224 of the smallest make one pause.
func TestEvents_PingsArePaced(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		c, p := joiner{events: true, abilities: triesWrites | waits, room: 16 << 20}.join(t, b, defaults())
		p.wantEvent("hello")
		go p.drain()
		const pings = 5000
		ping := clientFrame(finBit|opText, []byte(`{"type":"ping"}`))
		began := time.Now()
		p.write(bytes.Repeat(ping, pings))
		synctest.Wait()
		eventually(t, "all pings to be read", func() bool { return c.Traffic().BytesIn == uint64(pings*len(ping)) })
		each := len(ping) + len(`{"type":"pong"}`) + requestOverhead
		if took, least := time.Since(began), time.Duration(pings*each/maxOverhead*9/10)*overheadPause; took < least {
			t.Errorf("got %d pings answered in %v, want at least %v", pings, took, least)
		}
	})
}

// TestEvents_RosterComesInPages has more users than a page holds, by their number and by their bytes.
func TestEvents_RosterComesInPages(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		const users = 120
		for i := range users {
			c := newTestClient(b.process, fmt.Sprintf("%03d%s", i, strings.Repeat("x", 300)), testAddress(i), defaults())
			if err := b.Join(c, 0); err != nil {
				t.Fatal(err)
			}
			defer c.Abandon()
		}
		_, p := joiner{events: true, user: "zoe"}.join(t, b, presenceOf(true))
		p.wantEvent("hello")
		seen, pages := 0, 0
		for after := ""; ; pages++ {
			p.text(`{"type":"who","limit":70` + after + `}`)
			e := p.event()
			for e.Type != "presence" || e.Users == nil {
				e = p.event() // a change that is told meanwhile
			}
			seen += len(e.Users)
			if len(e.raw) > maxNamesSize+1000 || len(e.Users) > 70 {
				t.Errorf("got a page of %d users in %d bytes", len(e.Users), len(e.raw))
			}
			if e.After == nil {
				break
			}
			name, _ := json.Marshal(*e.After)
			after = `,"after":` + string(name)
		}
		if seen != users+1 || pages < 2 {
			t.Errorf("got %d users in %d pages, want %d in several", seen, pages+1, users+1)
		}
	})
}

// TestEvents_ClientThatTakesNoAnswersIsNotRead asks for more than a peer takes.
func TestEvents_ClientThatTakesNoAnswersIsNotRead(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		settings := presenceOf(false)
		settings.WriteTimeout = time.Hour
		c, p := joiner{events: true, user: strings.Repeat("x", 1000)}.join(t, b, settings)
		go func() { // ends with the connection
			for {
				if _, err := p.conn.Write(clientFrame(finBit|opText, []byte(`{"type":"who"}`))); err != nil {
					return
				}
			}
		}()
		time.Sleep(time.Minute / 2)
		synctest.Wait()
		isWaiting := func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.answered != nil
		}
		c.mu.Lock()
		n := len(c.answers)
		c.mu.Unlock()
		if waits := isWaiting(); !waits || n <= maxAnswers || n > 2*maxAnswers {
			t.Errorf("got %d bytes of answers, and the reader waits: %v, want about %d, and it waits", n, waits, maxAnswers)
		}
		bytesIn := c.bytesIn.Load()
		time.Sleep(time.Second)
		if bytesIn != c.bytesIn.Load() {
			t.Error("the client is read on")
		}
		p.patient()
		for range 100 { // it takes some
			if _, err := p.readFrame(); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if c.bytesIn.Load() == bytesIn {
			t.Error("the client is not read when it has taken its answers")
		}
		time.Sleep(time.Minute / 4)
		synctest.Wait()
		if !isWaiting() {
			t.Error("the reader does not wait again")
		}
		p.conn.Close() // and the reader ends
	})
}

func TestEvents_Resumptions(t *testing.T) {
	for _, tc := range []struct {
		s    string
		want *Resumption
	}{
		{"abc:0", &Resumption{"abc", 0}},
		{"0z:9007199254740991", &Resumption{"0z", 1<<53 - 1}},
		{"abc:9007199254740992", nil},
		{"abc:18446744073709551616", nil},
		{"abc:01", nil},
		{"abc:+1", nil},
		{"abc:-1", nil},
		{"abc:", nil},
		{"abc", nil},
		{":1", nil},
		{"ABC:1", nil},
		{"a-b:1", nil},
		{"abcdefghijklmnopq:1", nil},
		{"", nil},
	} {
		got, ok := ParseResumption(tc.s)
		if ok != (tc.want != nil) || ok && *got != *tc.want {
			t.Errorf("%q: got %+v, %v, want %+v", tc.s, got, ok, tc.want)
		}
	}
}

func TestEvents_ResumeGoesOnWhereTheClientWas(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		b.Grow(historyOfTen())
		for i := range 15 {
			publishIn(b, textMessage(fmt.Sprint(i+1)))
		}
		for _, tc := range []struct {
			name                  string
			since                 Resumption
			resumed               bool
			missed, replay, first int
		}{
			{"with everything", Resumption{b.epoch, 15}, true, 0, 0, 0},
			{"within the history", Resumption{b.epoch, 7}, true, 0, 8, 8},
			{"before it", Resumption{b.epoch, 3}, false, 2, 10, 6},
			{"further than the hub", Resumption{b.epoch, 20}, false, 0, 10, 6},
			{"of another hub", Resumption{"other", 7}, false, 5, 10, 6},
		} {
			_, p := joiner{events: true, since: &tc.since}.join(t, b, historyOfTen())
			e := p.wantEvent("hello")
			if e.Resumed == nil || *e.Resumed != tc.resumed || e.Missed != tc.missed || e.Replay != tc.replay || e.Head != 15 {
				t.Errorf("%s: got %s, want %+v", tc.name, e.raw, tc)
			}
			for i := range tc.replay {
				if e := p.wantEvent("message"); e.Seq != tc.first+i || e.text() != fmt.Sprint(tc.first+i) {
					t.Errorf("%s: got %s, want message %d", tc.name, e.raw, tc.first+i)
				}
			}
			p.conn.Close()
			synctest.Wait()
		}
		b.Close()
	})
}

// schemaFile is the schema of the protocol.
const schemaFile = "../../docs/protocol.schema.json"

// FuzzClientEvent accepts a client's frame exactly when the schema does, and compares the fields with those that encoding/json
// reads. The schema counts characters where the server counts bytes, and does not know doubled names and half surrogate pairs.
func FuzzClientEvent(f *testing.F) {
	for _, frame := range []string{
		`{"type":"send","id":"m1","data":"hello"}`,
		`{"type":"send","data64":"AP8="}`,
		`{"type":"who","after":"ada","limit":10}`,
		`{"type":"who","limit":1001}`,
		`{"type":"ping"}`,
		`{"type":"ping","id":"p1"}`,
		`{"type":"send","id":"","data":"\ud800"}`,
		`{"type":"send","id":"m\u0031","token":"a-b","data":"\ud83d\ude00\n"}`,
		`{"type":"who","limit":0.1e+2,"x":[{"y":"]\\\""},null]}`,
		`{"type":"send","TYPE":"who","data":""}`,
		`{"type":"shout"}`,
		`{}`,
	} {
		f.Add(frame)
	}
	compiler := jsonschema.NewCompiler()
	compiler.AssertFormat()
	schema, err := compiler.Compile(schemaFile + "#/$defs/fromClient")
	if err != nil {
		f.Fatal(err)
	}
	validate := func(frame string) error {
		value, err := jsonschema.UnmarshalJSON(strings.NewReader(frame))
		if err != nil {
			return fmt.Errorf("%.200q: %w", frame, err)
		}
		if err := schema.Validate(value); err != nil {
			return fmt.Errorf("%.200q: %w", frame, err)
		}
		return nil
	}
	f.Fuzz(func(t *testing.T, frame string) {
		if !utf8.ValidString(frame) || utf8.RuneCountInString(frame) > 5000 {
			return
		}
		var e clientEvent
		err := e.decode([]byte(frame))
		var opcode int
		var payload []byte
		if err == nil && e.kind == kindSend {
			opcode, payload, err = e.message()
		}
		if err == nil && e.kind == kindPing {
			err = e.checkID()
		}
		if err == nil && e.kind == "" {
			return
		}
		invalid := validate(frame)
		if err == nil && invalid != nil {
			t.Fatal(invalid)
		}
		var fields map[string]any
		if json.Unmarshal([]byte(frame), &fields) != nil || err != nil {
			if err != nil && invalid == nil && !strings.Contains(frame, `\u`) && !strings.Contains(err.Error(), "bytes") {
				t.Fatalf("%q: got %v, which the schema allows", frame, err)
			}
			return
		}
		text := func(name string) string { s, _ := fields[name].(string); return s }
		switch {
		case e.kind != text("type"), e.kind == kindSend && (string(e.id) != text("id") || string(e.token) != text("token")),
			e.kind == kindWho && string(e.after) != text("after"),
			e.kind == kindPing && string(e.id) != text("id"),
			opcode == ws.TextMessage && string(payload) != text("data"),
			opcode == ws.BinaryMessage && base64.StdEncoding.EncodeToString(payload) != text("data64"):
			t.Errorf("%q: got %+v with opcode %d and payload %q", frame, e, opcode, payload)
		}
	})
}

// TestClientEvent_RandomFieldsAreFound puts fields in any order, with white space and escapes between and in them.
func TestClientEvent_RandomFieldsAreFound(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	space := func() string { return []string{"", " ", "\t", "\r\n"}[random.IntN(4)] }
	for range 500 {
		fields := []string{`"type":"send"`, `"id":"m1"`, `"d\u0061ta":"x"`, `"other":{"data":"no","x":[1,2]}`, `"n":-1.5E+3`, `"type2":null`}
		random.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
		var b strings.Builder
		b.WriteString(space() + "{" + space())
		for i, f := range fields {
			if i > 0 {
				b.WriteString(space() + "," + space())
			}
			name, value, _ := strings.Cut(f, ":")
			b.WriteString(name + space() + ":" + space() + value)
		}
		b.WriteString(space() + "}" + space())
		var e clientEvent
		if err := e.decode([]byte(b.String())); err != nil || e.kind != kindSend || string(e.id) != "m1" || string(e.data) != "x" {
			t.Errorf("%q: got %+v, %v", b.String(), e, err)
		}
	}
}
