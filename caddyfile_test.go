package chatbroadcast

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// TestCaddyfile_Adapts compares each file in testdata with its JSON, which stands below the dashes.
func TestCaddyfile_Adapts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatalf("got files %v, error %v", files, err)
	}
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			input, want, _ := strings.Cut(string(data), "----------\n")
			adapted, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(input), nil)
			if err != nil || len(warnings) > 0 {
				t.Fatalf("got error %v, warnings %v", err, warnings)
			}
			var got bytes.Buffer
			if err := json.Indent(&got, adapted, "", "\t"); err != nil {
				t.Fatal(err)
			}
			if strings.TrimSpace(got.String()) != strings.TrimSpace(want) {
				t.Errorf("got:\n%s\nwant:\n%s", &got, want)
			}
		})
	}
}

func TestCaddyfile_ErrorsNameTheLineAndTheFix(t *testing.T) {
	for _, tc := range []struct{ name, line, want string }{
		{"an unknown subdirective", "colour blue", `unrecognized subdirective "colour"`},
		{"no max_age", "max_age", "max_age: missing <duration>"},
		{"max_age off", "max_age off", `max_age: <duration> must be a duration such as 10s, got "off"`},
		{"max_age 0", "max_age 0s", "max_age: <duration>: must be longer than 0, got 0s"},
		{"drain twice", "drain 1s 2s", `drain: unexpected argument "2s"`},
		{"history without a number", "history", "history: missing <messages>"},
		{"history 0", "history 0", "history: <messages>: must be 1 to 16777216, got 0"},
		{"history off", "history off", `history: <messages> must be a whole number from 1 to 16777216, got "off"`},
		{"history age", "history 10 0s", "history: <age>: must be longer than 0, got 0s"},
		{"history thrice", "history 10 1m 2m", `history: unexpected argument "2m"`},
		{"presence of something else", "presence on", `presence: want join_leave or nothing, got "on"`},
		{"presence off", "presence off", `presence: want join_leave or nothing, got "off"`},
		{"an empty presence", `presence ""`, "presence: join_leave must not be empty"},
		{"a block of presence", "presence {\njoin_leave\n}", "presence: takes no block"},
		{"a negative history", "history -1", "history: <messages>: must be 1 to 16777216, got -1"},
		{"a history too large", "history 16777217", "history: <messages>: must be 1 to 16777216, got 16777217"},
		{"history's age first", "history 10m 100", `history: <messages> must be a whole number from 1 to 16777216, got "10m"`},
		{"history's age without a unit", "history 10 10", `history: <age> must be a duration such as 10s, got "10"`},
		{"history twice", "history 10\nhistory 20", "history: given more than once"},
		{"presence twice", "presence join_leave join_leave", `presence: unexpected argument "join_leave"`},
		{"one that there is not", "topic 10", `unrecognized subdirective "topic"`},
		{"a repeated one", "read_only\nread_only", `read_only: given more than once`},
		{"an argument too many", "read_only yes", `read_only: takes no value, got "yes"; leave the line out to turn it off`},
		{"read_only switched off", "read_only off", `read_only: takes no value, got "off"`},
		{"a misspelled subdirective", "historie 100", `unrecognized subdirective "historie": did you mean history?`},
		{"a forgotten underscore", "readonly", `unrecognized subdirective "readonly": did you mean read_only?`},
		{"a forgotten plural", "max_clients_per_hubs 1", `unrecognized subdirective "max_clients_per_hubs": did you mean max_clients_per_hub?`},
		{"capitals", "Origins *", `unrecognized subdirective "Origins": did you mean origins?`},
		{"a short subdirective that resembles none", "name x", `unrecognized subdirective "name", at`},
		{"no hub", "hub", "hub: missing <name>"},
		{"an empty hub", `hub ""`, "hub: <name> must not be empty"},
		{"two hubs", "hub a b", `hub: unexpected argument "b"`},
		{"a hub's name too long", "hub " + strings.Repeat("x", 256), "hub: the hub's name is longer than 255 bytes"},
		{"an empty user", `user ""`, "user: <value> must not be empty"},
		{"no origins", "origins", "origins: missing <pattern...> or *"},
		{"an origin among all", "origins * example.com", "origins: * allows every origin and stands alone"},
		{"an origin with a path", "origins https://example.com/chat", `origins: pattern "https://example.com/chat": want [scheme://]host[:port]`},
		{"an origin with a star in the middle", "origins a.*.com", `origins: pattern "a.*.com": * can only stand for the first labels of a host, as in *.example.com`},
		{"an origin of nothing but a star", "origins *.", `origins: pattern "*.": want [scheme://]host[:port]`},
		{"an origin with a bad port", "origins example.com:http", `origins: pattern "example.com:http": parse "//example.com:http": invalid port ":http" after host`},
		{"the null origin", "origins null", "origins: pattern null: only * allows the origin null"},
		{"origins with commas", "origins a.example,b.example", `origins: pattern "a.example,b.example": patterns are separated by spaces, not by commas`},
		{"origins with commas and spaces", "origins a.example, b.example", `origins: pattern "a.example,": patterns are separated by spaces, not by commas`},
		{"an origin without a host", "origins https://", `origins: pattern "https://": want [scheme://]host[:port]`},
		{"an origin without a scheme", "origins ://example.com", `origins: pattern "://example.com": parse "://example.com": missing protocol scheme`},
		{"an origin with a scheme that is none", "origins *://example.com", `origins: pattern "*://example.com": `},
		{"an origin with a host that is none", "origins a_$.example", `origins: pattern "a_$.example": no host contains '$'`},
		{"an origin with a port that is none", "origins example.com:65536", `origins: pattern "example.com:65536": no Origin has the port 65536`},
		{"an origin with a port that no browser writes", "origins example.com:0443", `origins: pattern "example.com:0443": no Origin has the port 0443`},
		{"an origin with a label that is none", "origins ü-.example", `origins: pattern "ü-.example": the host is not an internationalized domain name: `},
		{"echo maybe", "echo maybe", `echo: want on or off, got "maybe"`},
		{"no echo", "echo", "echo: missing on or off"},
		{"no size", "max_message_size", "max_message_size: missing <size>"},
		{"a size that is none", "max_message_size big", `max_message_size: <size> must be a size such as 64KiB, got "big"`},
		{"a size of 0", "max_message_size 0", "max_message_size: <size>: must be 1 to 268435456, got 0"},
		{"a size too large", "max_message_size 257MiB", "max_message_size: <size>: must be 1 to 268435456, got 269484032"},
		{"a size beyond everything", "max_message_size 17EB", "max_message_size: <size>: must be 1 to 268435456, got 9223372036854775807"},
		{"a buffer too large", "buffer 1 513MiB", "buffer: <size>: must be 1 to 536870912, got 537919488"},
		{"a max_age of centuries", "max_age 2331697h", "max_age: <duration>: must be at most 8760h0m0s, got 2331697h0m0s"},
		{"a max_age beyond everything", "max_age 9999999h", `max_age: <duration> must be a duration such as 10s, got "9999999h"`},
		{"a drain of weeks", "drain 1000h", "drain: <duration>: must be at most 10m0s, got 1000h0m0s"},
		{"a write_timeout too long", "write_timeout 366d", "write_timeout: <duration>: must be at most 8760h0m0s, got 8784h0m0s"},
		{"a history's age too long", "history 1 366d", "history: <age>: must be at most 8760h0m0s, got 8784h0m0s"},
		{"a window too long", "rate 1 366d", "rate: <window>: must be at most 8760h0m0s, got 8784h0m0s"},
		{"a ping's interval too long", "ping 366d", "ping: <interval> or off: must be at most 8760h0m0s, got 8784h0m0s"},
		{"a ping's timeout too long", "ping 1m 366d", "ping: <timeout>: must be at most 8760h0m0s, got 8784h0m0s"},
		{"half a rate", "rate 10", "rate: missing <window>"},
		{"a rate of 0", "rate 0 1s", "rate: <messages>: must be 1 to 16777216, got 0"},
		{"a window of 0", "rate 1 0s", "rate: <window>: must be longer than 0, got 0s"},
		{"a negative window", "rate 1 -1s", "rate: <window>: must be longer than 0, got -1s"},
		{"a limit that is none", "max_clients many", `max_clients: <n> must be a whole number from 1 to 16777216, got "many"`},
		{"a limit of 0", "max_clients_per_hub 0", "max_clients_per_hub: <n>: must be 1 to 16777216, got 0"},
		{"a negative limit", "max_clients_per_ip -1", "max_clients_per_ip: <n>: must be 1 to 16777216, got -1"},
		{"a limit too large", "max_hubs 99999999", "max_hubs: <n>: must be 1 to 16777216, got 99999999"},
		{"no buffer", "buffer", "buffer: missing <messages>"},
		{"a buffer's size before its messages", "buffer 1MiB", `buffer: <messages> must be a whole number from 1 to 16777216, got "1MiB"`},
		{"a buffer of too much", "buffer 1 1MiB 2", `buffer: unexpected argument "2"`},
		{"on_lag panic", "on_lag panic", `on_lag: want close or skip, got "panic"`},
		{"no ping", "ping", "ping: missing <interval> or off"},
		{"a ping that is none", "ping often", `ping: <interval> or off must be a duration such as 10s, got "often"`},
		{"a ping that is off and on", "ping off 10s", `ping: unexpected argument "10s"`},
		{"a ping's timeout of 0", "ping 10s 0s", "ping: <timeout>: must be longer than 0, got 0s"},
		{"a timeout without unit", "write_timeout 10", `write_timeout: <duration> must be a duration such as 10s, got "10"`},
		{"an argument to http_publish", "http_publish POST", `http_publish: takes no value, got "POST"`},
		{"http_publish twice", "http_publish\nhttp_publish", "http_publish: given more than once"},
		{"a block", "echo on {\nloud\n}", "echo: takes no block"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const before = "example.com {\n\tchat_broadcast {\n"
			_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(before+tc.line+"\n\t}\n}\n"), map[string]any{"filename": "Caddyfile"})
			if err == nil {
				t.Fatalf("%s: got no error, want %s", tc.line, tc.want)
			}
			line := strings.Count(before+tc.line, "\n") + 1
			if strings.HasSuffix(tc.line, "}") {
				line-- // the error is found within the block
			}
			if got := err.Error(); !strings.Contains(got, tc.want) || !strings.Contains(got, "Caddyfile:"+string(rune('0'+line))) {
				t.Errorf("%s: got %s, want %s at line %d", tc.line, got, tc.want, line)
			}
		})
	}
}

func TestCaddyfile_WarnsOfAHubThatMayBeMeantAsAPath(t *testing.T) {
	s := startCaddy(t, "") // the log of this configuration has the warnings about the next one
	s.load(`&(named) {
	chat_broadcast in-a-named-route
}
http://localhost:9080 {
	chat_broadcast chat {
		echo off
	}
	chat_broadcast /path path
	chat_broadcast * all
	chat_broadcast
	chat_broadcast {path}
	chat_broadcast {
		hub block
	}
	@members header X-Member yes
	chat_broadcast @members members
	handle /handled {
		chat_broadcast handled
	}
	invoke named
}`)
	hubsWarnedOf := map[any]bool{}
	for _, entry := range s.logged("caddyfile", 3) {
		if text, _ := entry["msg"].(string); !strings.Contains(text, "as in /chat/*") || entry["level"] != "warn" || entry["line"] == nil {
			t.Errorf("got %v", entry)
		}
		hubsWarnedOf[entry["hub"]] = true
	}
	if want := map[any]bool{"chat": true, "handled": true, "in-a-named-route": true}; !maps.Equal(hubsWarnedOf, want) {
		t.Errorf("got warnings of %v, want %v", hubsWarnedOf, want)
	}
	join(t, "/elsewhere")
}

func TestCaddyfile_HubAsArgumentAndSubdirective(t *testing.T) {
	d := caddyfile.NewTestDispenser("chat_broadcast lobby {\n\thub garden\n}")
	err := new(Handler).UnmarshalCaddyfile(d)
	if err == nil || !strings.Contains(err.Error(), "hub: given more than once") || !strings.Contains(err.Error(), "Testfile:2") {
		t.Errorf("got %v, want an error for line 2", err)
	}
	d = caddyfile.NewTestDispenser("chat_broadcast lobby garden")
	if err := new(Handler).UnmarshalCaddyfile(d); err == nil || !strings.Contains(err.Error(), `hub: unexpected argument "garden"`) {
		t.Errorf("got %v, want an error for the second name", err)
	}
}
