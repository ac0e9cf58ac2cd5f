package chatbroadcast

import (
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/gorilla/websocket"
)

func TestAppendFrame_HeaderAtTheLengthBoundaries(t *testing.T) {
	for _, tc := range []struct {
		name   string
		length int
		header []byte
	}{
		{"empty", 0, []byte{0x81, 0}},
		{"longest 7-bit length", 125, []byte{0x81, 125}},
		{"shortest 16-bit length", 126, []byte{0x81, 126, 0, 126}},
		{"longest 16-bit length", 65535, []byte{0x81, 126, 0xff, 0xff}},
		{"shortest 64-bit length", 65536, []byte{0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			payload := bytes.Repeat([]byte("x"), tc.length)
			got := appendFrame(nil, websocket.TextMessage, payload)
			if want := append(tc.header, payload...); !bytes.Equal(got, want) {
				t.Errorf("got % x…, want % x…", got[:min(len(got), 12)], want[:min(len(want), 12)])
			}
			if got, want := frameSize(tc.length), len(got); got != want {
				t.Errorf("frameSize: got %d, want %d", got, want)
			}
		})
	}
}

// FuzzAppendFrame lets gorilla's client read what the server writes.
func FuzzAppendFrame(f *testing.F) {
	f.Add(websocket.TextMessage, 0)
	f.Add(websocket.BinaryMessage, 125)
	f.Add(websocket.TextMessage, 126)
	f.Add(websocket.BinaryMessage, 65536)
	f.Fuzz(func(t *testing.T, opcode, length int) {
		opcode = websocket.TextMessage + opcode&1
		payload := make([]byte, uint(length)%(1<<17))
		for i := range payload {
			payload[i] = byte(rand.Int())
		}
		wire := appendFrame(appendFrame(nil, opcode, payload), websocket.BinaryMessage, []byte("next"))
		conn := gorillaClient(t, bytes.NewReader(wire))
		for _, want := range []frame{{opcode, string(payload)}, {websocket.BinaryMessage, "next"}} {
			gotOpcode, got, err := conn.ReadMessage()
			if err != nil || gotOpcode != want.opcode || string(got) != want.payload {
				t.Fatalf("got opcode %d, %d bytes, error %v, want opcode %d, %d bytes",
					gotOpcode, len(got), err, want.opcode, len(want.payload))
			}
		}
	})
}

// gorillaClient returns a client's connection that reads r.
func gorillaClient(t *testing.T, r io.Reader) *websocket.Conn {
	t.Helper()
	// gorilla has no constructor for a connection without a handshake: answer one.
	client, srv := net.Pipe()
	t.Cleanup(func() { client.Close(); srv.Close() })
	go func() { // ends with the pipe
		buf := make([]byte, 1024)
		var request strings.Builder
		for !strings.Contains(request.String(), "\r\n\r\n") {
			n, err := srv.Read(buf)
			if err != nil {
				return
			}
			request.Write(buf[:n])
		}
		_, key, _ := strings.Cut(request.String(), "Sec-WebSocket-Key: ")
		key, _, _ = strings.Cut(key, "\r\n")
		_, _ = io.WriteString(srv, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
			"Sec-WebSocket-Accept: "+acceptKey(key)+"\r\n\r\n")
		_, _ = io.Copy(srv, r)
	}()
	dialer := websocket.Dialer{NetDial: func(string, string) (net.Conn, error) { return client, nil }}
	conn, resp, err := dialer.Dial("ws://localhost/", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return conn
}

func TestValidUTF8_FindsTheFirstBadByte(t *testing.T) {
	for _, tc := range []struct {
		name  string
		text  string
		whole int
		ok    bool
	}{
		{"empty", "", 0, true},
		{"ascii", "abc", 3, true},
		{"whole characters", "κόσμε𐍈", len("κόσμε𐍈"), true},
		{"half a character", "aκ"[:2], 1, true},
		{"three quarters of a character", "a𐍈"[:4], 1, true},
		{"a continuation first", "\x80", 1, false},
		{"beyond U+10FFFF, unfinished", "\xf4\x90", 2, false},
		{"a surrogate, unfinished", "\xed\xa0", 2, false},
		{"overlong, unfinished", "\xe0\x80", 2, false},
		{"an impossible byte", "a\xff", 2, false},
		{"a start instead of a continuation", "\xf0\x9f\x41", 3, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			whole, ok := validUTF8([]byte(tc.text))
			if ok != tc.ok || ok && whole != tc.whole {
				t.Errorf("got %d, %v, want %d, %v", whole, ok, tc.whole, tc.ok)
			}
		})
	}
}

// FuzzValidUTF8 compares the check of pieces with the check of the whole, and makes sure that nothing which
// can still become valid is refused.
func FuzzValidUTF8(f *testing.F) {
	f.Add([]byte("Hello-µ@ßöäüàá-UTF-8!!"), uint8(1))
	f.Add([]byte("\xf4\x90\x80\x80"), uint8(2))
	f.Add([]byte("\xed\xa0\x80edited"), uint8(1))
	f.Fuzz(func(t *testing.T, text []byte, step uint8) {
		valid, refused := 0, false
		for end := 0; end < len(text) && !refused; {
			end = min(end+int(step)+1, len(text))
			whole, ok := validUTF8(text[valid:end])
			valid += whole
			refused = !ok
			if refused && canBecomeValid(text[:end]) {
				t.Fatalf("% x was refused, but can become valid", text[:end])
			}
			if !refused && !canBecomeValid(text[:end]) {
				t.Fatalf("% x was let through, but cannot become valid", text[:end])
			}
		}
		if got, want := !refused && valid == len(text), utf8.Valid(text); got != want {
			t.Fatalf("% x: got %v, want %v", text, got, want)
		}
	})
}

// canBecomeValid tries what could follow.
func canBecomeValid(p []byte) bool {
	for _, tail := range []string{
		"", "\x80", "\x80\x80", "\x80\x80\x80", "\xbf", "\xbf\xbf", "\xbf\xbf\xbf", "\x9f\x80", "\x9f\x80\x80", "\x8f\x80\x80",
		"\xa0\x80", "\x90\x80\x80",
	} {
		if utf8.Valid(append(bytes.Clone(p), tail...)) {
			return true
		}
	}
	return false
}

// acceptKey answers a handshake's key (RFC 6455 §4.2.2).
func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}
