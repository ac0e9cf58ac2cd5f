package ws

import (
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"

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
			got := AppendFrame([]byte("before"), TextMessage, payload)
			if want := slices.Concat([]byte("before"), tc.header, payload); !bytes.Equal(got, want) {
				t.Errorf("got % x…, want % x…", got[:min(len(got), 18)], want[:min(len(want), 18)])
			}
			got = got[len("before"):]
			if got, want := FrameSize(tc.length), len(got); got != want {
				t.Errorf("FrameSize: got %d, want %d", got, want)
			}
			if got := AppendHeader(nil, TextMessage, tc.length); !bytes.Equal(got, tc.header) {
				t.Errorf("AppendHeader: got % x, want % x", got, tc.header)
			}
			if opcode, p := Parts(got); opcode != TextMessage || !bytes.Equal(p, payload) {
				t.Errorf("Parts: got opcode %d, %d bytes, want opcode %d, %d bytes", opcode, len(p), TextMessage, tc.length)
			}
			if p, rest := Cut(append(got, "after"...)); !bytes.Equal(p, payload) || string(rest) != "after" {
				t.Errorf("Cut: got %d bytes and %.9q, want %d bytes and the frames after them", len(p), rest, tc.length)
			}
		})
	}
}

func TestOpcodes_AreThoseOfGorilla(t *testing.T) {
	got := []int{TextMessage, BinaryMessage, CloseMessage, PingMessage, PongMessage}
	want := []int{
		websocket.TextMessage, websocket.BinaryMessage, websocket.CloseMessage, websocket.PingMessage, websocket.PongMessage,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// FuzzAppendFrame lets gorilla's client read what the server writes.
func FuzzAppendFrame(f *testing.F) {
	f.Add(TextMessage, 0)
	f.Add(BinaryMessage, 125)
	f.Add(TextMessage, 126)
	f.Add(BinaryMessage, 65536)
	f.Fuzz(func(t *testing.T, opcode, length int) {
		opcode = TextMessage + opcode&1
		payload := make([]byte, uint(length)%(1<<17))
		for i := range payload {
			payload[i] = byte(rand.Int())
		}
		wire := AppendFrame(AppendFrame(nil, opcode, payload), BinaryMessage, []byte("next"))
		conn := gorillaClient(t, bytes.NewReader(wire))
		for _, want := range []struct {
			opcode  int
			payload []byte
		}{{opcode, payload}, {BinaryMessage, []byte("next")}} {
			gotOpcode, got, err := conn.ReadMessage()
			if err != nil || gotOpcode != want.opcode || !bytes.Equal(got, want.payload) {
				t.Fatalf("got opcode %d, %d bytes, error %v, want opcode %d, %d bytes",
					gotOpcode, len(got), err, want.opcode, len(want.payload))
			}
		}
	})
}

// gorillaClient returns a client's connection that reads r.
func gorillaClient(t *testing.T, r io.Reader) *websocket.Conn {
	t.Helper()
	// gorilla makes no connection without a handshake: answer one.
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

// acceptKey answers a handshake's key (RFC 6455 §4.2.2).
func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// A script is the frames that a client sends.
type script [][]byte

func (s script) raw(b ...byte) script { return append(slices.Clip(s), b) }

// frame adds a masked frame with the given first byte.
func (s script) frame(first byte, payload string) script {
	frame := []byte{first}
	switch n := len(payload); {
	case n < length16:
		frame = append(frame, maskBit|byte(n))
	case n <= 0xffff:
		frame = binary.BigEndian.AppendUint16(append(frame, maskBit|length16), uint16(n))
	default:
		frame = binary.BigEndian.AppendUint64(append(frame, maskBit|length64), uint64(n))
	}
	mask := [maskSize]byte{0x12, 0x34, 0x56, 0x78}
	frame = append(frame, mask[:]...)
	for i := range len(payload) {
		frame = append(frame, payload[i]^mask[i%maskSize])
	}
	return s.raw(frame...)
}

// message adds a whole message or control frame.
func (s script) message(opcode byte, payload string) script { return s.frame(finBit|opcode, payload) }

func (s script) text(payload string) script   { return s.message(TextMessage, payload) }
func (s script) binary(payload string) script { return s.message(BinaryMessage, payload) }
func (s script) ping(payload string) script   { return s.message(PingMessage, payload) }
func (s script) pong(payload string) script   { return s.message(PongMessage, payload) }

// begin adds the first fragment of a message, more one in its middle and finish the last.
func (s script) begin(opcode byte, payload string) script { return s.frame(opcode, payload) }

func (s script) more(payload string) script { return s.frame(0, payload) }

func (s script) finish(payload string) script { return s.frame(finBit, payload) }

// close adds a close frame, whatever the code.
func (s script) close(code int, reason string) script {
	return s.message(CloseMessage, string(binary.BigEndian.AppendUint16(nil, uint16(code)))+reason)
}

func (s script) bytes() []byte { return slices.Concat(s...) }
