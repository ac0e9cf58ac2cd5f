package chatbroadcast

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// The opcodes of RFC 6455 §5.2.
const (
	opContinuation = 0
	opText         = websocket.TextMessage
	opBinary       = websocket.BinaryMessage
	opClose        = websocket.CloseMessage
	opPing         = websocket.PingMessage
	opPong         = websocket.PongMessage
)

// conformanceLimit is the largest message of the suite's group 9, and so the hubs' max_message_size.
const conformanceLimit = 16 << 20

// promptly is how soon a connection must end once the closing handshake is done. It is generous to a loaded
// machine and yet tells an end from giving up the wait for a peer, which takes closeTimeout.
const promptly = closeTimeout / 2

// TestConformance plays the server's cases of the Autobahn WebSocket test suite, groups 1 to 7, 9 and 10, under
// their numbers there. A hub is the suite's echo server: its client gets back what it sends. A second client must
// notice nothing but the good messages. A case that the suite's group lacks has the group's number alone.
func TestConformance(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /TestConformance/* {
		max_message_size 16MiB
	}
}`)
	for _, group := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"1 framing", conformFraming},
		{"2 pings and pongs", conformPings},
		{"3 reserved bits", conformReservedBits},
		{"4 reserved opcodes", conformOpcodes},
		{"5 fragmentation", conformFragmentation},
		{"6 UTF-8", conformUTF8},
		{"6.4 UTF-8, fail fast", conformFailFast},
		{"7 closing", conformClosing},
		{"9 large messages", conformLargeMessages},
		{"9.7 round trips", conformRoundTrips},
		{"10 fragments of odd size", conformOddFragments},
	} {
		t.Run(group.name, group.run)
	}
}

// ---- the means ----

// A script is the frames that a client sends.
type script [][]byte

func (s script) raw(b ...byte) script { return append(s, b) }

func (s script) frame(first byte, payload string) script {
	return append(s, clientFrame(first, []byte(payload)))
}

// message adds a whole message or control frame.
func (s script) message(opcode byte, payload string) script { return s.frame(finBit|opcode, payload) }

func (s script) text(payload string) script   { return s.message(opText, payload) }
func (s script) binary(payload string) script { return s.message(opBinary, payload) }
func (s script) ping(payload string) script   { return s.message(opPing, payload) }
func (s script) pong(payload string) script   { return s.message(opPong, payload) }

// begin adds the first fragment of a message, more one in its middle and finish the last.
func (s script) begin(opcode byte, payload string) script { return s.frame(opcode, payload) }

func (s script) more(payload string) script { return s.frame(opContinuation, payload) }

func (s script) finish(payload string) script { return s.message(opContinuation, payload) }

// fragments adds a message in fragments of n bytes, the last of which may be shorter.
func (s script) fragments(opcode byte, payload string, n int) script {
	for len(payload) > n {
		s, payload, opcode = s.begin(opcode, payload[:n]), payload[n:], opContinuation
	}
	return s.message(opcode, payload)
}

// close adds a close frame, whatever the code.
func (s script) close(code int, reason string) script {
	return s.message(opClose, string(binary.BigEndian.AppendUint16(nil, uint16(code)))+reason)
}

// closes reports whether the client says goodbye itself.
func (s script) closes() bool {
	return slices.ContainsFunc(s, func(frame []byte) bool { return frame[0] == finBit|opClose })
}

// The ways to write a script; a positive number is the size of a write.
const (
	atOnce  = 0
	byFrame = -1
	byOctet = 1
)

// writes returns the script as it is to be written.
func (s script) writes(way int) [][]byte {
	switch way {
	case byFrame:
		return s
	case atOnce:
		if len(s) == 1 {
			return s // not a copy, it may be large
		}
		return [][]byte{slices.Concat(s...)}
	default:
		return slices.Collect(slices.Chunk(slices.Concat(s...), way))
	}
}

func wayName(way int) string {
	switch way {
	case atOnce:
		return "at once"
	case byFrame:
		return "frame by frame"
	default:
		return fmt.Sprintf("by %d", way)
	}
}

// An exchange is a case without a pause: the frames that a client sends, and every frame that it gets back.
type exchange struct {
	name  string
	ways  []int // the client sends in each of these; if empty, at once
	send  script
	want  []frame
	codes []int // the server closes with one of them; if empty, it does not close
	alone bool  // without another client, which would need the socket buffers for large messages
}

func (x exchange) run(t *testing.T) {
	if len(x.ways) == 0 {
		x.ways = []int{atOnce}
	}
	for _, way := range x.ways {
		name := x.name
		if way != atOnce {
			name += ", " + wayName(way)
		}
		t.Run(name, func(t *testing.T) {
			c := newConformance(t, x.alone)
			c.write(x.send.writes(way)...)
			c.wants(x.want...)
			if len(x.codes) == 0 {
				c.goodbye()
			} else {
				c.closed(x.codes...)
				if !x.send.closes() {
					c.answer()
				}
				c.ended()
			}
			c.undisturbed()
		})
	}
}

func runExchanges(t *testing.T, exchanges []exchange) {
	for _, x := range exchanges {
		x.run(t)
	}
}

// A conformance is one case: a hub with a client that tests the server, and another client that must notice nothing else.
type conformance struct {
	t        *testing.T
	client   *peer
	other    *peer
	messages []frame // what the hub has published
}

func newConformance(t *testing.T, alone bool) *conformance {
	t.Helper()
	path := "/" + url.PathEscape(t.Name())
	path = strings.ReplaceAll(path, "%2F", "/")
	c := &conformance{t: t, client: join(t, path)}
	if !alone {
		c.other = join(t, path)
	}
	return c
}

// write writes each of the chunks by itself. That the server has closed is for the reading to find out.
func (c *conformance) write(chunks ...[]byte) {
	_ = c.client.conn.SetWriteDeadline(time.Now().Add(patience))
	for _, chunk := range chunks {
		if _, err := c.client.conn.Write(chunk); err != nil {
			return
		}
	}
}

func (c *conformance) send(s script) { c.write(s.writes(atOnce)...) }

// next returns p's next frame, whose length must be encoded in the fewest bytes (RFC 6455 §5.2).
func (c *conformance) next(p *peer) frame {
	c.t.Helper()
	p.patient()
	var got int
	if head, err := p.r.Peek(2); err == nil {
		got = int(head[1])
	}
	f := p.next()
	want := len(f.payload)
	switch {
	case want > 0xffff:
		want = 127
	case want > 125:
		want = 126
	}
	if got != want {
		c.t.Fatalf("got %d as the 7-bit length of %d bytes, want %d", got, len(f.payload), want)
	}
	return f
}

// wants fails unless the next frames are these.
func (c *conformance) wants(frames ...frame) {
	c.t.Helper()
	for i, want := range frames {
		if got := c.next(c.client); got != want {
			c.t.Fatalf("frame %d: got %.80v, want %.80v", i, got, want)
		}
		if want.opcode == opText || want.opcode == opBinary {
			c.messages = append(c.messages, want)
		}
	}
}

// closed fails unless the next frame is a close frame with one of codes, of which 1005 is none (RFC 6455 §7.1.5).
func (c *conformance) closed(codes ...int) int {
	c.t.Helper()
	f := c.next(c.client)
	code := websocket.CloseNoStatusReceived
	if len(f.payload) >= 2 {
		code = int(binary.BigEndian.Uint16([]byte(f.payload)))
	}
	if f.opcode != opClose || len(f.payload) == 1 || !slices.Contains(codes, code) {
		c.t.Fatalf("got %.80v, want a close frame with a code of %v", f, codes)
	}
	return code
}

// answer is the client's half of a close that the server began.
func (c *conformance) answer() { c.send(script{}.close(websocket.CloseNormalClosure, "")) }

// ended fails unless the connection ends now, without another frame and without a reset: a reset can overtake the
// close frame, and the peer would take the close for an abnormal one.
func (c *conformance) ended() {
	c.t.Helper()
	_ = c.client.conn.SetReadDeadline(time.Now().Add(promptly))
	if f, err := c.client.readFrame(); !errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		c.t.Fatalf("after the close frame: got %.80v, %v, want the end of the connection within %v", f, err, promptly)
	}
}

// goodbye ends a connection that the case has left open.
func (c *conformance) goodbye() {
	c.t.Helper()
	c.send(script{}.close(websocket.CloseNormalClosure, "bye"))
	c.closed(websocket.CloseNormalClosure)
	c.ended()
}

// undisturbed fails unless the other client got what was published and nothing else, and is still in the hub.
func (c *conformance) undisturbed() {
	c.t.Helper()
	if c.other == nil {
		return
	}
	c.other.text("still here")
	for i, want := range append(c.messages, frame{opText, "still here"}) {
		if got := c.next(c.other); got != want {
			c.t.Fatalf("the other client's frame %d: got %.80v, want %.80v", i, got, want)
		}
	}
}

// mixedText returns n bytes of text with characters of one to four bytes, so that reads end within them.
func mixedText(n int) string {
	const some = "aµ€𤭢"
	s := strings.Repeat(some, n/len(some))
	return s + strings.Repeat("x", n-len(s))
}

// ---- the cases ----

func conformFraming(t *testing.T) {
	var cases []exchange
	for group, opcode := range []byte{opText, opBinary} {
		for i, size := range []int{0, 125, 126, 127, 128, 65535, 65536} {
			payload := mixedText(size)
			ways := []int{atOnce, byOctet}
			if size > 128 {
				ways = []int{atOnce, 997}
			}
			cases = append(cases, exchange{
				name: fmt.Sprintf("1.%d.%d %d bytes", group+1, i+1, size),
				ways: ways,
				send: script{}.message(opcode, payload),
				want: []frame{{int(opcode), payload}},
			})
		}
	}
	before := script{}.text("before")
	echo := []frame{{opText, "before"}}
	protocolError := []int{websocket.CloseProtocolError}
	tooBig := []int{websocket.CloseMessageTooBig}
	cases = append(cases,
		exchange{
			name: "1 a masking key of zeros",
			send: script{}.raw(finBit|opText, 0x80|2, 0, 0, 0, 0, 'h', 'i'),
			want: []frame{{opText, "hi"}},
		},
		exchange{name: "1 unmasked text", send: before.raw(finBit|opText, 1, 'a'), want: echo, codes: protocolError},
		exchange{name: "1 unmasked empty text", send: before.raw(finBit|opText, 0), want: echo, codes: protocolError},
		exchange{name: "1 unmasked ping", send: before.raw(finBit|opPing, 0), want: echo, codes: protocolError},
		exchange{name: "1 unmasked pong", send: before.raw(finBit|opPong, 0), want: echo, codes: protocolError},
		exchange{name: "1 unmasked close", send: before.raw(finBit|opClose, 2, 3, 232), want: echo, codes: protocolError},
		exchange{
			name:  "1 unmasked continuation",
			send:  before.begin(opText, "fragment").raw(finBit|opContinuation, 1, 'a'),
			want:  echo,
			codes: protocolError,
		},
		exchange{
			name: "1 the top bit of a 64-bit length",
			send: before.raw(finBit|opBinary, 0x80|127, 0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 'a'),
			ways: []int{atOnce, byOctet},
			want: echo, codes: protocolError,
		},
		exchange{
			name:  "1 the largest 64-bit length",
			send:  before.raw(finBit|opBinary, 0x80|127, 0x7f, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 'a'),
			want:  echo,
			codes: tooBig,
		},
		exchange{
			name: "1 fragments whose lengths overflow",
			send: before.begin(opBinary, "a").
				raw(finBit|opContinuation, 0x80|127, 0x7f, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 'a'),
			want:  echo,
			codes: tooBig,
		},
		exchange{
			name:  "1 a ping with a 16-bit length",
			send:  before.raw(finBit|opPing, 0x80|126, 0, 1, 0, 0, 0, 0, 'a'),
			want:  echo,
			codes: protocolError,
		},
		exchange{
			name:  "1 a ping with a 64-bit length",
			send:  before.raw(finBit|opPing, 0x80|127, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 'a'),
			want:  echo,
			codes: protocolError,
		},
	)
	runExchanges(t, cases)

	// A sender must encode a length in the fewest bytes. The RFC does not say how a receiver handles a longer
	// encoding. Either is good: the message as if nothing were wrong, or a protocol error.
	for name, head := range map[string][]byte{
		"1 1 byte with a 16-bit length": {finBit | opText, 0x80 | 126, 0, 1},
		"1 1 byte with a 64-bit length": {finBit | opText, 0x80 | 127, 0, 0, 0, 0, 0, 0, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			c := newConformance(t, false)
			c.write(head, []byte{0, 0, 0, 0, 'a'})
			if head, err := c.client.r.Peek(1); err == nil && head[0] == finBit|opClose {
				c.closed(websocket.CloseProtocolError)
				c.answer()
				c.ended()
			} else {
				c.wants(frame{opText, "a"})
				c.goodbye()
			}
			c.undisturbed()
		})
	}
}

func conformPings(t *testing.T) {
	var tenPings script
	var tenPongs []frame
	for i := range 10 {
		payload := fmt.Sprintf("payload-%d", i)
		tenPings, tenPongs = tenPings.ping(payload), append(tenPongs, frame{opPong, payload})
	}
	full := strings.Repeat("\xfe", 125)
	runExchanges(t, []exchange{
		{name: "2.1 without payload", send: script{}.ping(""), want: []frame{{opPong, ""}}},
		{name: "2.2 text", send: script{}.ping("Hello, world!"), want: []frame{{opPong, "Hello, world!"}}},
		{
			name: "2.3 binary", send: script{}.ping("\x00\xff\xfe\xfd\xfc\xfb\x00\xff"),
			want: []frame{{opPong, "\x00\xff\xfe\xfd\xfc\xfb\x00\xff"}},
		},
		{name: "2.4 125 bytes", send: script{}.ping(full), want: []frame{{opPong, full}}},
		{name: "2.5 126 bytes", send: script{}.ping(full + "\xfe"), codes: []int{websocket.CloseProtocolError}},
		{name: "2.6 125 bytes", ways: []int{byOctet}, send: script{}.ping(full), want: []frame{{opPong, full}}},
		{name: "2.7 unsolicited pong without payload", send: script{}.pong("")},
		{name: "2.8 unsolicited pong", send: script{}.pong("unsolicited")},
		{
			name: "2.9 unsolicited pong, then ping", send: script{}.pong("unsolicited").ping("ping"),
			want: []frame{{opPong, "ping"}},
		},
		{name: "2.10 ten pings", ways: []int{atOnce, byFrame}, send: tenPings, want: tenPongs},
		{name: "2.11 ten pings", ways: []int{byOctet}, send: tenPings, want: tenPongs},
		{name: "2 pong of 126 bytes", send: script{}.pong(full + "\xfe"), codes: []int{websocket.CloseProtocolError}},
		{
			name: "2 ping, then text", send: script{}.ping("ping").text("text"),
			want: []frame{{opPong, "ping"}, {opText, "text"}},
		},
	})
}

func conformReservedBits(t *testing.T) {
	var cases []exchange
	for rsv := byte(1); rsv <= 7; rsv++ {
		for name, opcode := range map[string]byte{
			"text": opText, "binary": opBinary, "continuation": opContinuation,
			"ping": opPing, "pong": opPong, "close": opClose,
		} {
			payload := "refused"
			send := script{}.text("before")
			switch opcode {
			case opContinuation:
				send = send.begin(opText, "unfinished")
			case opClose:
				payload = "\x03\xe8"
			}
			cases = append(cases, exchange{
				name:  fmt.Sprintf("3.%d RSV %03b on %s", rsv, rsv, name),
				ways:  []int{atOnce, byOctet},
				send:  send.frame(finBit|rsv<<4|opcode, payload).ping("after"),
				want:  []frame{{opText, "before"}},
				codes: []int{websocket.CloseProtocolError},
			})
		}
		cases = append(cases, exchange{
			name:  fmt.Sprintf("3.%d RSV %03b on the first frame", rsv, rsv),
			send:  script{}.frame(finBit|rsv<<4|opText, "refused"),
			codes: []int{websocket.CloseProtocolError},
		})
	}
	runExchanges(t, cases)
}

func conformOpcodes(t *testing.T) {
	var cases []exchange
	for group, first := range []byte{3, 11} {
		for i := range byte(5) {
			name := fmt.Sprintf("4.%d.%d opcode %d", group+1, i+1, first+i)
			for _, payload := range []string{"", "reserved"} {
				cases = append(cases,
					exchange{
						name:  fmt.Sprintf("%s with %d bytes", name, len(payload)),
						send:  script{}.message(first+i, payload),
						codes: []int{websocket.CloseProtocolError},
					},
					exchange{
						name:  fmt.Sprintf("%s with %d bytes after text", name, len(payload)),
						ways:  []int{atOnce, byOctet},
						send:  script{}.text("before").message(first+i, payload).ping("after"),
						want:  []frame{{opText, "before"}},
						codes: []int{websocket.CloseProtocolError},
					},
				)
			}
		}
	}
	runExchanges(t, cases)
}

func conformFragmentation(t *testing.T) {
	protocolError := []int{websocket.CloseProtocolError}
	everyWay := []int{atOnce, byFrame, byOctet}
	whole := []frame{{opText, "fragment1fragment2"}}
	twoFragments := script{}.begin(opText, "fragment1").finish("fragment2")
	runExchanges(t, []exchange{
		{
			name: "5.1 ping in two fragments", ways: everyWay,
			send: script{}.begin(opPing, "fragment1").finish("fragment2"), codes: protocolError,
		},
		{
			name: "5.2 pong in two fragments", ways: everyWay,
			send: script{}.begin(opPong, "fragment1").finish("fragment2"), codes: protocolError,
		},
		{
			name: "5 close in two fragments", ways: everyWay,
			send: script{}.begin(opClose, "\x03\xe8").finish("bye"), codes: protocolError,
		},
		{name: "5.3-5 text in two fragments", ways: everyWay, send: twoFragments, want: whole},
		{
			name: "5.6-8 ping between two fragments", ways: everyWay,
			send: script{}.begin(opText, "fragment1").ping("ping").finish("fragment2"),
			want: []frame{{opPong, "ping"}, {opText, "fragment1fragment2"}},
		},
		{
			name: "5.9-11 last fragment of nothing", ways: everyWay,
			send: script{}.finish("nothing").text("text"), codes: protocolError,
		},
		{
			name: "5.12-14 fragment of nothing", ways: everyWay,
			send: script{}.more("nothing").text("text"), codes: protocolError,
		},
		{
			name: "5.15 text in two fragments, then a fragment of nothing",
			send: slices.Concat(twoFragments, script{}.more("fragment3").text("fragment4")),
			want: whole, codes: protocolError,
		},
		{
			name: "5.16 fragment of nothing, then two fragments, twice", ways: everyWay,
			send:  slices.Concat(script{}.more("0"), twoFragments, script{}.more("0"), twoFragments),
			codes: protocolError,
		},
		{
			name: "5.17 last fragment of nothing, then two fragments, twice", ways: everyWay,
			send:  slices.Concat(script{}.finish("0"), twoFragments, script{}.finish("0"), twoFragments),
			codes: protocolError,
		},
		{
			name: "5.18 two fragments that both begin", ways: everyWay,
			send: script{}.begin(opText, "fragment1").text("fragment2"), codes: protocolError,
		},
		{
			name: "5 binary within unfinished text", ways: everyWay,
			send: script{}.begin(opText, "fragment1").binary("binary").finish("fragment2"), codes: protocolError,
		},
		{
			name: "5.19 five fragments and two pings", ways: everyWay,
			send: script{}.begin(opText, "fragment1").more("fragment2").ping("ping1").
				more("fragment3").more("fragment4").ping("ping2").finish("fragment5"),
			want: []frame{
				{opPong, "ping1"},
				{opPong, "ping2"},
				{opText, "fragment1fragment2fragment3fragment4fragment5"},
			},
		},
		{
			name: "5 pong between two fragments", ways: everyWay,
			send: script{}.begin(opText, "fragment1").pong("pong").finish("fragment2"), want: whole,
		},
		{
			name: "5 binary in two fragments", ways: everyWay,
			send: script{}.begin(opBinary, "\x00\xff").finish("\xfe"), want: []frame{{opBinary, "\x00\xff\xfe"}},
		},
		{
			name: "5 ping while text is unfinished, then a fragment that begins", ways: everyWay,
			send: script{}.begin(opText, "fragment1").ping("ping").begin(opText, "again"),
			want: []frame{{opPong, "ping"}}, codes: protocolError,
		},
	})

	t.Run("5.20 five fragments and two pings, each pong awaited", func(t *testing.T) {
		c := newConformance(t, false)
		c.send(script{}.begin(opText, "fragment1").more("fragment2").ping("ping1"))
		c.wants(frame{opPong, "ping1"})
		c.send(script{}.more("fragment3").more("fragment4").ping("ping2"))
		c.wants(frame{opPong, "ping2"})
		c.send(script{}.finish("fragment5"))
		c.wants(frame{opText, "fragment1fragment2fragment3fragment4fragment5"})
		c.goodbye()
		c.undisturbed()
	})
}

// kosme is the Greek word for "world" with an accent, of which the suite makes many of its cases.
const kosme = "\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5"

// A utf8Case is one sequence for a text message.
type utf8Case struct {
	number   string
	what     string
	valid    bool
	sequence string
}

// utf8Cases are the suite's, most of which are those of Markus Kuhn's "UTF-8 decoder capability and stress test".
func utf8Cases() (cases []utf8Case) {
	truncated := []string{
		"\xc0", "\xe0\x80", "\xf0\x80\x80", "\xf8\x80\x80\x80", "\xfc\x80\x80\x80\x80",
		"\xdf", "\xef\xbf", "\xf7\xbf\xbf", "\xfb\xbf\xbf\xbf", "\xfd\xbf\xbf\xbf\xbf",
	}
	allContinuations := ""
	for b := 0x80; b <= 0xbf; b++ {
		allContinuations += string([]byte{byte(b)})
	}
	// lonely is each start byte of a range with a space behind it.
	lonely := func(from, to int) (s string) {
		for b := from; b <= to; b++ {
			s += string([]byte{byte(b), ' '})
		}
		return s
	}
	var nonCharacters []string
	for plane := rune(0); plane <= 0x10; plane++ {
		nonCharacters = append(nonCharacters, string(plane<<16|0xfffe), string(plane<<16|0xffff))
	}
	for _, group := range []struct {
		number, what string
		valid        bool
		sequences    []string
		numbers      []int // if they are not 1, 2, 3 and so on
	}{
		{"6.5", "characters of every length", true, []string{
			kosme, "hello$world", "hello¢world", "hello€world", "hello𤭢world",
		}, nil},
		{"6.6", "beginnings that end with a character", true, []string{
			kosme[:2], kosme[:5], kosme[:7], kosme[:9], kosme[:11],
		}, []int{2, 5, 7, 9, 11}},
		{"6.6", "beginnings that end within one", false, []string{
			kosme[:1], kosme[:3], kosme[:4], kosme[:6], kosme[:8], kosme[:10],
		}, []int{1, 3, 4, 6, 8, 10}},
		{"6.7", "first of a length", true, []string{"\x00", "\xc2\x80", "\xe0\xa0\x80", "\xf0\x90\x80\x80"}, nil},
		{"6.8", "first of 5 and 6 bytes", false, []string{"\xf8\x88\x80\x80\x80", "\xfc\x84\x80\x80\x80\x80"}, nil},
		{"6.9", "last of a length", true, []string{"\x7f", "\xdf\xbf", "\xef\xbf\xbf", "\xf4\x8f\xbf\xbf"}, nil},
		{"6.10", "last of 4, 5 and 6 bytes", false, []string{
			"\xf7\xbf\xbf\xbf", "\xfb\xbf\xbf\xbf\xbf", "\xfd\xbf\xbf\xbf\xbf\xbf",
		}, nil},
		{"6.11", "other boundaries", true, []string{
			"\xed\x9f\xbf", "\xee\x80\x80", "\xef\xbf\xbd", "\xf4\x8f\xbf\xbf",
		}, nil},
		{"6.11", "beyond U+10FFFF", false, []string{"\xf4\x90\x80\x80"}, []int{5}},
		{"6.12", "unexpected continuations", false, []string{
			"\x80", "\xbf", "\x80\xbf", "\x80\xbf\x80", "\x80\xbf\x80\xbf", "\x80\xbf\x80\xbf\x80",
			"\x80\xbf\x80\xbf\x80\xbf", allContinuations,
		}, nil},
		{"6.13", "lonely start bytes", false, []string{
			lonely(0xc0, 0xdf), lonely(0xe0, 0xef), lonely(0xf0, 0xf7), lonely(0xf8, 0xfb), lonely(0xfc, 0xfd),
		}, nil},
		{"6.14", "last byte missing", false, truncated, nil},
		{"6.15", "last bytes missing", false, []string{strings.Join(truncated, "")}, nil},
		{"6.16", "impossible bytes", false, []string{"\xfe", "\xff", "\xfe\xfe\xff\xff"}, nil},
		{"6.17", "overlong solidus", false, []string{
			"\xc0\xaf", "\xe0\x80\xaf", "\xf0\x80\x80\xaf", "\xf8\x80\x80\x80\xaf", "\xfc\x80\x80\x80\x80\xaf",
		}, nil},
		{"6.18", "longest of the overlong", false, []string{
			"\xc1\xbf", "\xe0\x9f\xbf", "\xf0\x8f\xbf\xbf", "\xf8\x87\xbf\xbf\xbf", "\xfc\x83\xbf\xbf\xbf\xbf",
		}, nil},
		{"6.19", "overlong NUL", false, []string{
			"\xc0\x80", "\xe0\x80\x80", "\xf0\x80\x80\x80", "\xf8\x80\x80\x80\x80", "\xfc\x80\x80\x80\x80\x80",
		}, nil},
		{"6.20", "surrogates", false, []string{
			"\xed\xa0\x80", "\xed\xad\xbf", "\xed\xae\x80", "\xed\xaf\xbf", "\xed\xb0\x80", "\xed\xbe\x80", "\xed\xbf\xbf",
		}, nil},
		{"6.21", "surrogate pairs", false, []string{
			"\xed\xa0\x80\xed\xb0\x80", "\xed\xa0\x80\xed\xbf\xbf", "\xed\xad\xbf\xed\xb0\x80", "\xed\xad\xbf\xed\xbf\xbf",
			"\xed\xae\x80\xed\xb0\x80", "\xed\xae\x80\xed\xbf\xbf", "\xed\xaf\xbf\xed\xb0\x80", "\xed\xaf\xbf\xed\xbf\xbf",
		}, nil},
		{"6.22", "non-characters", true, nonCharacters, nil},
		{"6.23", "specials", true, []string{"\uFFF9", "\uFFFA", "\uFFFB", "\uFFFC", "\uFFFD", "\uFFFE", "\uFFFF"}, nil},
	} {
		for i, sequence := range group.sequences {
			number := i + 1
			if group.numbers != nil {
				number = group.numbers[i]
			}
			cases = append(cases, utf8Case{
				fmt.Sprintf("%s.%d", group.number, number), group.what, group.valid, sequence,
			})
		}
	}
	return cases
}

// firstBad returns where text that begins with s stops being valid, whatever may follow, by the grammar of RFC 3629
// §4. It returns the index of the first bad byte, or len(s) if s can begin a valid text.
func firstBad(s string) int {
	tails, low, high := 0, byte(0x80), byte(0xbf) // what the next bytes must be
	for i, b := range []byte(s) {
		if tails > 0 {
			if b < low || b > high {
				return i
			}
			tails, low, high = tails-1, 0x80, 0xbf
			continue
		}
		switch {
		case b <= 0x7f:
		case b >= 0xc2 && b <= 0xdf:
			tails = 1
		case b == 0xe0:
			tails, low = 2, 0xa0
		case b == 0xed:
			tails, high = 2, 0x9f
		case b >= 0xe1 && b <= 0xef:
			tails = 2
		case b == 0xf0:
			tails, low = 3, 0x90
		case b == 0xf4:
			tails, high = 3, 0x8f
		case b >= 0xf1 && b <= 0xf3:
			tails = 3
		default:
			return i
		}
	}
	return len(s)
}

func conformUTF8(t *testing.T) {
	invalid := []int{websocket.CloseInvalidFramePayloadData}
	const hello = "Hello-µ@ßöäüàá-UTF-8!!"
	border := strings.Index(hello, "@")
	surrogate := kosme + "\xed\xa0\x80edited"
	runExchanges(t, []exchange{
		{name: "6.1.1 empty", send: script{}.text(""), want: []frame{{opText, ""}}},
		{
			name: "6.1.2 three empty fragments", send: script{}.begin(opText, "").more("").finish(""),
			want: []frame{{opText, ""}},
		},
		{
			name: "6.1.3 three fragments, the outer ones empty", send: script{}.begin(opText, "").more("middle").finish(""),
			want: []frame{{opText, "middle"}},
		},
		{name: "6.2.1 in one frame", send: script{}.text(hello), want: []frame{{opText, hello}}},
		{
			name: "6.2.2 fragments between characters", send: script{}.begin(opText, hello[:border]).finish(hello[border:]),
			want: []frame{{opText, hello}},
		},
		{
			name: "6.2.3 fragments of one byte", ways: []int{atOnce, byFrame},
			send: script{}.fragments(opText, hello, 1), want: []frame{{opText, hello}},
		},
		{
			name: "6.2.4 fragments of one byte", ways: []int{atOnce, byFrame},
			send: script{}.fragments(opText, kosme, 1), want: []frame{{opText, kosme}},
		},
		{
			name: "6.2 ping within a character", ways: []int{atOnce, byFrame, byOctet},
			send: script{}.begin(opText, kosme[:1]).ping("ping").more("").finish(kosme[1:]),
			want: []frame{{opPong, "ping"}, {opText, kosme}},
		},
		{name: "6.3.1 in one frame", ways: []int{atOnce, byOctet}, send: script{}.text(surrogate), codes: invalid},
		{
			name: "6.3.2 fragments of one byte", ways: []int{atOnce, byFrame, byOctet},
			send: script{}.fragments(opText, surrogate, 1), codes: invalid,
		},
		{
			name: "6.3 character unfinished before an empty last fragment",
			send: script{}.begin(opText, kosme[:1]).finish(""), codes: invalid,
		},
		{
			name: "6.3 character finished by the next message",
			send: script{}.text(kosme[:1]).text(kosme[1:]), codes: invalid,
		},
	})
	for _, tt := range utf8Cases() {
		// As binary every sequence is good.
		x := exchange{name: tt.number + " " + tt.what, want: []frame{{opBinary, tt.sequence}}}
		if tt.valid {
			x.want = append(x.want, frame{opText, tt.sequence})
		} else {
			x.codes = invalid
		}
		x.send = script{}.binary(tt.sequence).text(tt.sequence)
		x.run(t)
		x.name += ", in fragments of one byte"
		x.send = script{}.binary(tt.sequence).fragments(opText, tt.sequence, 1)
		x.run(t)
	}
}

// conformFailFast has text refused at the first bad byte, while the message is unfinished.
func conformFailFast(t *testing.T) {
	// The suite's four: a fence of ping and pong shows that nothing was wrong before. There is none within a frame.
	for _, tt := range []struct{ name, good, bad string }{
		{"6.4.1 second fragment", kosme, "\xf4\x90\x80\x80"},
		{"6.4.2 first byte of the second fragment", kosme + "\xf4", "\x90"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newConformance(t, false)
			c.send(script{}.begin(opText, tt.good).ping("so far"))
			c.wants(frame{opPong, "so far"})
			c.send(script{}.more(tt.bad))
			c.closed(websocket.CloseInvalidFramePayloadData)
			c.answer()
			c.ended()
			c.undisturbed()
		})
	}
	// unfinished writes a text frame up to and including its bad byte.
	unfinished := func(name string, chunks ...string) {
		t.Run(name, func(t *testing.T) {
			c := newConformance(t, false)
			const missing = 100
			sent := strings.Join(chunks, "")
			whole := clientFrame(finBit|opText, []byte(sent+strings.Repeat("x", missing)))
			at := len(whole) - missing - len(sent)
			c.write(whole[:at])
			for _, chunk := range chunks {
				c.write(whole[at : at+len(chunk)])
				at += len(chunk)
			}
			c.closed(websocket.CloseInvalidFramePayloadData)
			c.undisturbed()
		})
	}
	unfinished("6.4.3 within a frame", kosme, "\xf4\x90\x80\x80")
	unfinished("6.4.4 within a frame, first byte of the second write", kosme+"\xf4", "\x90")

	// A long message is read piece by piece: around the ends of pieces and of the buffers they go to.
	for _, at := range []int{511, 512, 513, 1023, 1024, 4095, 4096, 65535, 65536, 1<<20 + 1} {
		text := mixedText(at)
		unfinished(fmt.Sprintf("6.4 bad byte at %d", at), text+"\xff")
		unfinished(fmt.Sprintf("6.4 bad byte at %d, after a pause within a character", at), text+"\xe2\x82", "(")
	}
	for _, tt := range utf8Cases() {
		bad := firstBad(tt.sequence)
		if bad == len(tt.sequence) {
			continue // valid, or refused at its end only
		}
		good, first := tt.sequence[:bad], tt.sequence[bad:bad+1]
		unfinished("6.4 with "+tt.number+" within a frame", good, first)
		t.Run("6.4 with "+tt.number+" in a fragment", func(t *testing.T) {
			c := newConformance(t, false)
			c.send(script{}.begin(opText, good).ping("so far"))
			c.wants(frame{opPong, "so far"})
			c.send(script{}.more(first))
			c.closed(websocket.CloseInvalidFramePayloadData)
			c.undisturbed()
		})
	}
}

func conformClosing(t *testing.T) {
	normal, protocolError := []int{websocket.CloseNormalClosure}, []int{websocket.CloseProtocolError}
	bye := script{}.close(websocket.CloseNormalClosure, "")
	large := mixedText(256 << 10)
	runExchanges(t, []exchange{
		{
			name: "7.1.1 close after a message", ways: []int{atOnce, byFrame, byOctet},
			send: script{}.text("Hello World!").close(websocket.CloseNormalClosure, ""),
			want: []frame{{opText, "Hello World!"}}, codes: normal,
		},
		{name: "7.1.2 two closes", send: slices.Concat(bye, bye), codes: normal},
		{name: "7.1.3 ping after close", send: bye.ping("ping"), codes: normal},
		{name: "7.1.4 text after close", send: bye.text("text"), codes: normal},
		{
			name:  "7.1.5 close between two fragments",
			send:  script{}.begin(opText, "fragment1").close(websocket.CloseNormalClosure, "").finish("fragment2"),
			codes: normal,
		},
		{
			name: "7.1.6 256 KiB, text, close and ping",
			send: script{}.text(large).text("Hello World!").close(websocket.CloseNormalClosure, "").ping(""),
			want: []frame{{opText, large}, {opText, "Hello World!"}}, codes: normal,
		},
		{
			name: "7.1 close after a ping", ways: []int{atOnce, byFrame},
			send: script{}.ping("ping").close(websocket.CloseNormalClosure, ""),
			want: []frame{{opPong, "ping"}}, codes: normal,
		},
		{name: "7.1 garbage after close", send: bye.raw(0xff, 0xff, 0xff, 0xff), codes: normal},

		{name: "7.3.1 no payload", send: script{}.message(opClose, ""), codes: []int{websocket.CloseNoStatusReceived}},
		{
			name: "7.3.2 one byte", ways: []int{atOnce, byOctet}, send: script{}.message(opClose, "a"),
			codes: protocolError,
		},
		{name: "7.3.3 code alone", ways: []int{atOnce, byOctet}, send: bye, codes: normal},
		{
			name: "7.3.4 code and reason", ways: []int{atOnce, byOctet},
			send: script{}.close(websocket.CloseNormalClosure, "Hello World!"), codes: normal,
		},
		{
			name: "7.3.5 125 bytes", send: script{}.close(websocket.CloseNormalClosure, strings.Repeat("*", 123)),
			codes: normal,
		},
		{
			name: "7.3.6 126 bytes", send: script{}.close(websocket.CloseNormalClosure, strings.Repeat("*", 124)),
			codes: protocolError,
		},

		{
			name: "7.5.1 reason that is not UTF-8", ways: []int{atOnce, byOctet},
			send:  script{}.close(websocket.CloseNormalClosure, kosme+"\xce"),
			codes: []int{websocket.CloseInvalidFramePayloadData},
		},
		{
			name:  "7.5 close between two fragments, reason that is not UTF-8",
			send:  script{}.begin(opText, "fragment1").close(websocket.CloseNormalClosure, "\xff").finish("fragment2"),
			codes: []int{websocket.CloseInvalidFramePayloadData},
		},
		{
			name: "7.5 protocol error before a close whose reason is not UTF-8",
			send: script{}.more("of nothing").close(websocket.CloseNormalClosure, "\xff"), codes: protocolError,
		},
	})
	for i, code := range []int{1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999, 1012, 1013, 1014} {
		exchange{
			name:  fmt.Sprintf("7.7.%d code %d", i+1, code),
			send:  script{}.text("before").close(code, "reason"),
			want:  []frame{{opText, "before"}},
			codes: []int{code},
		}.run(t)
	}
	for i, code := range []int{0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 1015, 5000, 65535} {
		for _, reason := range []string{"", "reason"} {
			exchange{
				name:  fmt.Sprintf("7.9.%d code %d %s", i+1, code, reason),
				send:  script{}.text("before").close(code, reason),
				want:  []frame{{opText, "before"}},
				codes: protocolError,
			}.run(t)
		}
	}
}

func conformLargeMessages(t *testing.T) {
	// echoed runs one case. The payloads are made only now, or they would all be in memory together.
	echoed := func(name string, way int, opcode byte, size, fragment int) {
		payload := mixedText(size)
		exchange{
			name:  name,
			ways:  []int{way},
			send:  script{}.fragments(opcode, payload, fragment),
			want:  []frame{{int(opcode), payload}},
			alone: true,
		}.run(t)
	}
	for i, size := range []int{64 << 10, 256 << 10, 1 << 20, 4 << 20, 8 << 20, conformanceLimit} {
		echoed(fmt.Sprintf("9.1.%d text of %d KiB", i+1, size>>10), atOnce, opText, size, size)
		echoed(fmt.Sprintf("9.2.%d binary of %d KiB", i+1, size>>10), atOnce, opBinary, size, size)
	}
	// Text and binary take turns: what else there is to see of either shows above, and each takes its time.
	for i, fragment := range []int{64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20} {
		if i%2 == 0 {
			echoed(fmt.Sprintf("9.3.%d text of 4 MiB in fragments of %d", i+1, fragment), atOnce, opText, 4<<20, fragment)
		} else {
			echoed(fmt.Sprintf("9.4.%d binary of 4 MiB in fragments of %d", i+1, fragment), atOnce, opBinary, 4<<20, fragment)
		}
	}
	for i, chop := range []int{64, 128, 256, 512, 1 << 10, 2 << 10} {
		if i%2 == 0 {
			echoed(fmt.Sprintf("9.5.%d text of 1 MiB", i+1), chop, opText, 1<<20, 1<<20)
		} else {
			echoed(fmt.Sprintf("9.6.%d binary of 1 MiB", i+1), chop, opBinary, 1<<20, 1<<20)
		}
	}
	exchange{
		name:  "9 a byte more than max_message_size, in one frame",
		send:  script{}.text("before").binary(mixedText(conformanceLimit + 1)),
		want:  []frame{{opText, "before"}},
		codes: []int{websocket.CloseMessageTooBig},
	}.run(t)
	exchange{
		name:  "9 a byte more than max_message_size, in two fragments",
		send:  script{}.text("before").fragments(opText, mixedText(conformanceLimit+1), conformanceLimit),
		want:  []frame{{opText, "before"}},
		codes: []int{websocket.CloseMessageTooBig},
	}.run(t)
}

func conformRoundTrips(t *testing.T) {
	for group, opcode := range []byte{opText, opBinary} {
		for i, size := range []int{0, 16, 64, 256, 1024, 4096} {
			t.Run(fmt.Sprintf("9.%d.%d 1000 messages of %d bytes", group+7, i+1, size), func(t *testing.T) {
				c := newConformance(t, true)
				payload := mixedText(size)
				message := script{}.message(opcode, payload)
				for range 1000 {
					c.send(message)
					c.wants(frame{int(opcode), payload})
				}
				c.goodbye()
			})
		}
	}
}

func conformOddFragments(t *testing.T) {
	payload := mixedText(65536)
	exchange{
		name: "10.1.1 65536 bytes in fragments of 1300",
		ways: []int{atOnce, byFrame},
		send: script{}.fragments(opText, payload, 1300),
		want: []frame{{opText, payload}},
	}.run(t)
}
