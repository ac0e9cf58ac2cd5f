package ws

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/gorilla/websocket"
)

// defaultLimit is the largest message of the readers under test, in bytes.
const defaultLimit = 1 << 20

// hijacked is a response writer that gives away the connection of its Reader.
type hijacked struct {
	http.ResponseWriter
	*Reader
}

// upgrade lets gorilla make the handshake with r.
func upgrade(t testing.TB, r *Reader) *websocket.Conn {
	t.Helper()
	request := httptest.NewRequest(http.MethodGet, "/", nil)
	request.Header = http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="},
	}
	upgrader := websocket.Upgrader{WriteBufferPool: noBuffers{}}
	conn, err := upgrader.Upgrade(hijacked{httptest.NewRecorder(), r}, request, nil)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// noBuffers keeps none.
type noBuffers struct{}

func (noBuffers) Get() any { return nil }
func (noBuffers) Put(any)  {}

// newReader returns an open Reader of src. A nil onPing ignores pings.
func newReader(t testing.TB, src io.Reader, maxMessage int, onPing func([]byte)) *Reader {
	t.Helper()
	if onPing == nil {
		onPing = func([]byte) {}
	}
	r := new(Reader)
	r.Init(src)
	conn := upgrade(t, r)
	r.TakeResponse()
	if r.IsOpen() {
		t.Error("the Reader is open before Open")
	}
	r.Open(conn, maxMessage, onPing)
	if !r.IsOpen() {
		t.Error("the Reader is not open after Open")
	}
	return r
}

// readToTheEnd reads messages until r fails, and returns its error.
func readToTheEnd(r *Reader) error {
	for {
		_, body, err := r.Next()
		if err == nil {
			_, err = io.Copy(io.Discard, body)
		}
		if err != nil {
			return err
		}
	}
}

// next reads one message.
func next(t *testing.T, r *Reader) (opcode int, payload string) {
	t.Helper()
	opcode, body, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	p, err := io.ReadAll(body)
	if err != nil {
		t.Fatal(err)
	}
	return opcode, string(p)
}

func TestReader_KeepsTheResponseOfTheHandshake(t *testing.T) {
	var r Reader
	r.Init(iotest.ErrReader(errors.New("read during the handshake")))
	conn := upgrade(t, &r)
	got := string(r.TakeResponse())
	if !strings.HasPrefix(got, "HTTP/1.1 101 ") || !strings.Contains(got, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n") { // RFC 6455 §1.3
		t.Errorf("got %q, want a 101 with the key's answer", got)
	}
	if got := r.TakeResponse(); got != nil {
		t.Errorf("taken twice: got %q", got)
	}
	r.Open(conn, 0, nil)
	if r.borrowed != nil {
		t.Error("the handshake's buffer is not returned")
	}
}

func TestReader_ReadsMessagesBetweenControlFrames(t *testing.T) {
	sent := script{}.ping("one").text("hello").pong("").begin(BinaryMessage, "frag").ping("two").more("men").finish("ts").text("")
	for _, tc := range []struct {
		name  string
		src   io.Reader
		begin func(*Reader)
	}{
		{"in one piece", bytes.NewReader(sent.bytes()), (*Reader).Borrow},
		{"byte by byte", iotest.OneByteReader(bytes.NewReader(sent.bytes())), (*Reader).Borrow},
		{"with its own buffer", bytes.NewReader(sent.bytes()), (*Reader).Own},
		{"frame by frame", &pieces{rest: append(script{}, sent...)}, (*Reader).Own},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var pings []string
			r := newReader(t, tc.src, defaultLimit, func(payload []byte) { pings = append(pings, string(payload)) })
			tc.begin(r)
			for _, want := range []struct {
				opcode  int
				payload string
			}{{TextMessage, "hello"}, {BinaryMessage, "fragments"}, {TextMessage, ""}} {
				if opcode, payload := next(t, r); opcode != want.opcode || payload != want.payload {
					t.Fatalf("got %d %q, want %d %q", opcode, payload, want.opcode, want.payload)
				}
			}
			if got := strings.Join(pings, " "); got != "one two" {
				t.Errorf("got the pings %q, want one and two", got)
			}
			_, _, err := r.Next()
			if err == nil {
				t.Fatal("got a message beyond the end")
			}
			if why, goodbye, known := r.Why(err); known {
				t.Errorf("got %v, goodbye %v for a connection that has failed", why, goodbye)
			}
		})
	}
}

func TestReader_NeedsNoBufferBetweenMessages(t *testing.T) {
	r := newReader(t, &pieces{rest: script{}.text("one").text("two").text(strings.Repeat("x", 3*pooledBuffer))}, defaultLimit, nil)
	for _, want := range []string{"one", "two", strings.Repeat("x", 3*pooledBuffer)} {
		r.Borrow()
		if _, got := next(t, r); got != want {
			t.Errorf("got %.20q, want %.20q", got, want)
		}
		if n := r.Buffered(); n != 0 {
			t.Errorf("got %d bytes buffered, want none", n)
		}
		r.Return()
		if r.borrowed != nil || r.Buffered() != 0 || r.in.Size() != 0 {
			t.Error("the buffer is not returned")
		}
	}
}

func TestReader_PeekReadsOnceAndKeepsNoError(t *testing.T) {
	src := &pieces{rest: script{}.text("hello"), err: os.ErrDeadlineExceeded}
	r := newReader(t, src, defaultLimit, nil)
	r.Own()
	for range 2 {
		if err := r.Peek(); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := r.Buffered(), len(script{}.text("hello").bytes()); got != want {
		t.Errorf("got %d bytes buffered, want %d", got, want)
	}
	if _, got := next(t, r); got != "hello" {
		t.Errorf("got %q", got)
	}
	if err := r.Peek(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want the source's error", err)
	}
	src.rest = script{}.text("again")
	if _, got := next(t, r); got != "again" {
		t.Errorf("after an error: got %q", got)
	}
}

func TestReader_DropPongTakesWholePongsOnly(t *testing.T) {
	text := script{}.text("hello")
	for _, tc := range []struct {
		name string
		sent script
		want bool
	}{
		{"a pong", script{}.pong("life"), true},
		{"an empty pong", script{}.pong(""), true},
		{"the longest pong", script{}.pong(strings.Repeat("x", 125)), true},
		{"half a header", script{}.raw(finBit | PongMessage), false},
		{"half a pong", script{}.raw(script{}.pong("life")[0][:7]...), false},
		{"a message", text, false},
		{"a ping", script{}.ping("life"), false},
		{"nothing", nil, false},
		{"unmasked", script{}.raw(finBit|PongMessage, 0), false},
		{"fragmented", script{}.raw(PongMessage, maskBit, 1, 2, 3, 4), false},
		{"reserved bits", script{}.raw(finBit|0x40|PongMessage, maskBit, 1, 2, 3, 4), false},
		{"too long", script{}.pong(strings.Repeat("x", 126)), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			first := bytes.Clone(tc.sent.bytes())
			r := newReader(t, &pieces{rest: append([][]byte{first}, text...)}, defaultLimit, nil)
			r.Own()
			if len(first) == 0 {
				r.Init(iotest.ErrReader(io.EOF))
			}
			if got := r.DropPong(); got != tc.want {
				t.Fatalf("got %v, want %v", got, tc.want)
			}
			if left := r.Buffered(); tc.want && left != 0 || !tc.want && left != len(first) {
				t.Errorf("got %d bytes left of %d", left, len(first))
			}
		})
	}
}

func TestReader_DropsPongsOneByOne(t *testing.T) {
	sent := script{}.pong("one").pong("two").text("hello").pong("three")
	r := newReader(t, bytes.NewReader(sent.bytes()), defaultLimit, nil)
	r.Borrow()
	defer r.Return()
	for i, want := range []bool{true, true, false} {
		if got := r.DropPong(); got != want {
			t.Fatalf("call %d: got %v, want %v", i+1, got, want)
		}
	}
	if _, got := next(t, r); got != "hello" {
		t.Errorf("got %q", got)
	}
	if !r.DropPong() || r.Buffered() != 0 {
		t.Error("want the pong behind the message dropped")
	}
}

func TestReader_WhySaysWhatThePeerHasDone(t *testing.T) {
	const limit = 100
	hello := script{}.text("hello")
	for _, tc := range []struct {
		name    string
		sent    script
		why     Close
		goodbye bool
		known   bool
	}{
		{"a goodbye", hello.close(1000, "bye"), Close{Code: 1000}, true, true},
		{"a goodbye and more", hello.close(4000, "").text("more"), Close{Code: 4000}, true, true},
		{"a goodbye without a code", hello.message(CloseMessage, ""), Close{Code: CloseNoStatusReceived}, true, true},
		{"a goodbye of one byte", hello.message(CloseMessage, "x"), ProtocolError, true, true},
		{"a goodbye with a reserved code", hello.close(1006, ""), ProtocolError, true, true},
		{"a goodbye with a code that gorilla does not know", hello.close(1014, ""), Close{Code: 1014}, true, true},
		{"a goodbye with a bad reason", hello.close(1000, "\xff"), InvalidUTF8, true, true},
		{"a goodbye that is too long", hello.close(1000, strings.Repeat("x", 124)), ProtocolError, false, true},
		{"a goodbye within a message", hello.begin(TextMessage, "x").close(1001, ""), Close{Code: 1001}, true, true},
		{"half a goodbye", hello.raw(script{}.close(1000, "")[0][:7]...), Close{}, false, false},
		{"a message that is too long", hello.text(strings.Repeat("x", limit+1)), TooBig, false, true},
		{"fragments that are too long", hello.begin(TextMessage, strings.Repeat("x", limit)).finish("x"), TooBig, false, true},
		{
			"a length beyond any limit",
			hello.raw(finBit|BinaryMessage, maskBit|length64, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4),
			TooBig, false, true,
		},
		{
			"a length with its top bit set",
			hello.raw(finBit|BinaryMessage, maskBit|length64, 0x80, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4), ProtocolError, false, true,
		},
		{"an unmasked frame", hello.raw(finBit|TextMessage, 1, 'x'), ProtocolError, false, true},
		{"a reserved opcode", hello.message(3, ""), ProtocolError, false, true},
		{"a reserved bit", hello.frame(finBit|0x40|TextMessage, "x"), ProtocolError, false, true},
		{"a continuation of nothing", hello.finish("x"), ProtocolError, false, true},
		{"an unfinished message", hello.begin(TextMessage, "x").text("y"), ProtocolError, false, true},
		{"a malformed frame before a goodbye", hello.message(3, "").close(1000, ""), ProtocolError, false, true},
		{"the end", hello, Close{}, false, false},
		{"the end within a frame", hello.raw(finBit|TextMessage, maskBit|5, 1, 2), Close{}, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for name, src := range map[string]io.Reader{
				"in one piece": bytes.NewReader(tc.sent.bytes()),
				"byte by byte": iotest.OneByteReader(bytes.NewReader(tc.sent.bytes())),
			} {
				r := newReader(t, src, limit, nil)
				r.Borrow()
				if _, got := next(t, r); got != "hello" {
					t.Fatalf("%s: got %q", name, got)
				}
				why, goodbye, known := r.Why(readToTheEnd(r))
				if why != tc.why || goodbye != tc.goodbye || known != tc.known {
					t.Errorf("%s: got %v, goodbye %v, known %v, want %v, %v, %v",
						name, why, goodbye, known, tc.why, tc.goodbye, tc.known)
				}
				r.Return()
			}
		})
	}
}

func TestReader_PassesOnErrorsOfTheSource(t *testing.T) {
	want := errors.New("nothing heard")
	for name, sent := range map[string]script{
		"between messages":  script{}.text("hello"),
		"within a header":   script{}.text("hello").raw(finBit | TextMessage),
		"within a message":  script{}.text("hello").raw(finBit|TextMessage, maskBit|5, 1, 2, 3, 4, 'x'),
		"between fragments": script{}.text("hello").begin(TextMessage, "x"),
	} {
		t.Run(name, func(t *testing.T) {
			r := newReader(t, &pieces{rest: [][]byte{sent.bytes()}, err: want}, defaultLimit, nil)
			r.Own()
			err := readToTheEnd(r)
			if !errors.Is(err, want) {
				t.Errorf("got %v, want the source's error", err)
			}
			if why, _, known := r.Why(err); known {
				t.Errorf("got %v for an error of the source", why)
			}
		})
	}
}

func TestReader_HidesEOFAndTimeoutsOfTheSource(t *testing.T) {
	for name, failed := range map[string]error{"EOF": io.EOF, "timeout": os.ErrDeadlineExceeded} {
		r := newReader(t, iotest.ErrReader(failed), defaultLimit, nil)
		r.Own()
		if err := r.Peek(); !errors.Is(err, failed) {
			t.Errorf("%s: Peek: got %v, want it as it is", name, err)
		}
		_, _, err := r.Next()
		if err == nil || errors.Is(err, failed) {
			t.Errorf("%s: Next: got %v, want another error", name, err)
		}
		if errors.Is(failed, io.EOF) && !websocket.IsCloseError(err, CloseAbnormalClosure) {
			t.Errorf("%s: Next: got %v, want a close error with code 1006", name, err)
		}
	}
}

// TestConnection_LeavesDeadlinesAndTheEndToTheSource calls what gorilla could call, and what must change nothing.
func TestConnection_LeavesDeadlinesAndTheEndToTheSource(t *testing.T) {
	r := newReader(t, bytes.NewReader(script{}.text("hello").bytes()), defaultLimit, nil)
	r.Own()
	c := (*connection)(r)
	past := time.Unix(1, 0)
	for name, err := range map[string]error{
		"Close": c.Close(), "SetDeadline": c.SetDeadline(past), "SetReadDeadline": c.SetReadDeadline(past),
		"SetWriteDeadline": c.SetWriteDeadline(past),
	} {
		if err != nil {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if l, r := c.LocalAddr(), c.RemoteAddr(); l != nil || r != nil {
		t.Errorf("got the addresses %v and %v", l, r)
	}
	if _, got := next(t, r); got != "hello" {
		t.Errorf("got %q", got)
	}
}

// repeated is a source of the same frames, n times.
type repeated struct {
	frames, rest []byte
	n            int
}

func (s *repeated) Read(p []byte) (int, error) {
	if len(s.rest) == 0 {
		if s.n == 0 {
			return 0, io.EOF
		}
		s.n--
		s.rest = s.frames
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

// BenchmarkReader_Messages measures reading messages, dozens of which come with one read.
func BenchmarkReader_Messages(b *testing.B) {
	for _, size := range []int{16, 128, 4096} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			frame := script{}.binary(strings.Repeat("x", size)).bytes()
			some := max(1, pooledBuffer/len(frame))
			r := newReader(b, &repeated{frames: bytes.Repeat(frame, some), n: b.N/some + 1}, defaultLimit, nil)
			r.Borrow()
			defer r.Return()
			payload := make([]byte, size)
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				_, body, err := r.Next()
				if err == nil {
					_, err = io.ReadFull(body, payload)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
