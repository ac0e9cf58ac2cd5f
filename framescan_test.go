package chatbroadcast

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/gorilla/websocket"
)

// A readerConn is a connection that only reads.
type readerConn struct {
	net.Conn
	io.Reader
}

func (c readerConn) Read(p []byte) (int, error) { return c.Reader.Read(p) }

// newScannedClient returns a client whose reader reads from r, after early.
func newScannedClient(t testing.TB, early []byte, r io.Reader) *client {
	t.Helper()
	c := &client{settings: defaults(), hub: &hub{metrics: hubs.metrics}}
	c.settings.pingInterval = 0
	c.wire.client = c
	c.state.Store(stateWriting) // so that pongs start no writer
	req := httptest.NewRequest(http.MethodGet, "/", nil)
	req.Header = http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="},
	}
	if _, err := c.shake(httptest.NewRecorder(), req); err != nil {
		t.Fatal(err)
	}
	c.wire.conn, c.wire.early = readerConn{Reader: r}, early
	c.borrowBuffer()
	t.Cleanup(c.returnBuffer)
	return c
}

// readToTheEnd reads messages until gorilla/websocket fails, and returns its error.
func (c *client) readToTheEnd() error {
	for {
		_, r, err := c.ws.NextReader()
		if err == nil {
			_, err = io.Copy(io.Discard, r)
		}
		if err != nil {
			return err
		}
	}
}

// FuzzFrameScan has gorilla/websocket read a client's bytes, in several divisions, and compares what it says with what
// the scan says.
func FuzzFrameScan(f *testing.F) {
	text := script{}.text("hello").ping("x")
	for _, s := range []script{
		text,
		text.close(1000, "bye").raw(1, 2, 3),
		text.close(1000, "\xff").text("more"),
		text.close(1014, ""), text.close(1006, ""), text.close(4999, strings.Repeat("x", 123)),
		text.close(4999, strings.Repeat("x", 124)).close(1000, ""),
		text.message(opClose, "").close(1000, ""),
		text.message(opClose, "a").message(opClose, "a"),
		text.raw(finBit|opClose, 0).message(opClose, "a"),
		text.raw(finBit|opClose, 1, 'a').message(opClose, "a"),
		text.frame(opClose, "a").message(opClose, "a"),
		text.frame(0xc0|opClose, "a").message(opClose, "a"),
		text.begin(opText, "a").message(opClose, "a"),
		text.more("a").message(opClose, "a"),
		text.binary(strings.Repeat("x", 70_000)).close(1014, ""),
		text.raw(finBit|opBinary, 0x80|127, 0x80, 0, 0, 0, 0, 0, 0, 0).close(1000, ""),
		text.raw(finBit|opBinary, 127, 0x80, 0, 0, 0, 0, 0, 0, 0).close(1000, ""),
		text.raw(finBit|opClose, 0x80|127, 0x80, 0, 0, 0, 0, 0, 0, 0).close(1000, ""),
		text.raw(finBit|opBinary, 0x80|127, 0x7f, 0, 0, 0, 0, 0, 0, 0).close(1000, ""),
	} {
		f.Add(slices.Concat(s...), uint16(7), uint16(11))
	}
	f.Fuzz(func(t *testing.T, sent []byte, early, size uint16) {
		type result struct {
			why         cause
			goodbye, ok bool
			err         string
		}
		judge := func(early []byte, r io.Reader) result {
			c := newScannedClient(t, early, r)
			err := c.readToTheEnd()
			why, goodbye, ok := c.wire.frames.verdict(c.in.Buffered())
			if peer, isClose := errors.AsType[*websocket.CloseError](err); isClose && peer.Code != websocket.CloseAbnormalClosure {
				want := echoed(peer.Code)
				if !ok || !goodbye || why != want && (peer.Code != websocket.CloseNoStatusReceived || why != causeProtocolError) {
					t.Errorf("got %v, goodbye %v, %v where gorilla says %v", why, goodbye, ok, err)
				}
			} else if ofClose := strings.Contains(err.Error(), "close code") || strings.Contains(err.Error(), "close frame"); ofClose != (ok && goodbye) {
				t.Errorf("got %v, goodbye %v, %v where gorilla says %v", why, goodbye, ok, err)
			} else if ok && !goodbye && !errors.Is(err, websocket.ErrReadLimit) {
				t.Errorf("got %v, %v where gorilla says %v", why, ok, err)
			}
			return result{why, goodbye, ok, err.Error()}
		}
		want := judge(nil, bytes.NewReader(sent))
		at := min(int(early), len(sent))
		for i, got := range []result{
			judge(nil, iotest.OneByteReader(bytes.NewReader(sent))),
			judge(slices.Clip(sent[:at]), bytes.NewReader(sent[at:])),
			judge(nil, &chunkReader{sent, int(size%maxClientHeader) + 1}),
		} {
			if got != want {
				t.Errorf("division %d: got %+v, want %+v", i, got, want)
			}
		}
	})
}

// A chunkReader reads so many bytes at a time.
type chunkReader struct {
	rest []byte
	size int
}

func (r *chunkReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.rest[:min(r.size, len(r.rest))])
	r.rest = r.rest[n:]
	return n, nil
}

func TestFrameScan_KeepsNoBodyOfALongCloseFrame(t *testing.T) {
	var s frameScan
	s.scan(slices.Concat(script{}.frame(finBit|opClose, strings.Repeat("x", 1<<20))...))
	if cap(s.body) > 0 {
		t.Errorf("got %d bytes kept", cap(s.body))
	}
}

// repeatReader reads the same frames n times.
type repeatReader struct {
	frames, rest []byte
	n            int
}

func (r *repeatReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		if r.n == 0 {
			return 0, io.EOF
		}
		r.n--
		r.rest = r.frames
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// BenchmarkReader_Messages measures reading messages, dozens of which come with one read, without publishing them.
func BenchmarkReader_Messages(b *testing.B) {
	for _, size := range []int{16, 128, 4096} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			frame := clientFrame(finBit|opBinary, make([]byte, size))
			some := max(1, readBuffer/len(frame))
			c := newScannedClient(b, nil, &repeatReader{frames: bytes.Repeat(frame, some), n: b.N/some + 1})
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				_, r, err := c.ws.NextReader()
				if err != nil {
					b.Fatal(err)
				}
				m, _ := c.readMessage(opBinary, r)
				m.free()
				c.overhead = 0 // or headers would be paced
			}
		})
	}
}

// BenchmarkFrameScan measures one frame, of dozens that come with one read.
func BenchmarkFrameScan(b *testing.B) {
	for _, size := range []int{16, 128, 1024} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			frame := clientFrame(finBit|opBinary, make([]byte, size))
			n := readBuffer / len(frame)
			p := bytes.Repeat(frame, n)
			var s frameScan
			b.ReportAllocs()
			for range b.N/n + 1 {
				s.scan(p)
			}
		})
	}
}
