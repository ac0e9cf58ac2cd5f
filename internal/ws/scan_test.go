package ws

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/gorilla/websocket"
)

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
		text.message(CloseMessage, "").close(1000, ""),
		text.message(CloseMessage, "a").message(CloseMessage, "a"),
		text.raw(finBit|CloseMessage, 0).message(CloseMessage, "a"),
		text.raw(finBit|CloseMessage, 1, 'a').message(CloseMessage, "a"),
		text.frame(CloseMessage, "a").message(CloseMessage, "a"),
		text.frame(0xc0|CloseMessage, "a").message(CloseMessage, "a"),
		text.begin(TextMessage, "a").message(CloseMessage, "a"),
		text.more("a").message(CloseMessage, "a"),
		text.binary(strings.Repeat("x", 70_000)).close(1014, ""),
		text.raw(finBit|BinaryMessage, 0x80|127, 0x80, 0, 0, 0, 0, 0, 0, 0).close(1000, ""),
		text.raw(finBit|BinaryMessage, 127, 0x80, 0, 0, 0, 0, 0, 0, 0).close(1000, ""),
		text.raw(finBit|CloseMessage, 0x80|127, 0x80, 0, 0, 0, 0, 0, 0, 0).close(1000, ""),
		text.raw(finBit|BinaryMessage, 0x80|127, 0x7f, 0, 0, 0, 0, 0, 0, 0).close(1000, ""),
	} {
		f.Add(s.bytes(), uint16(7), uint16(11))
	}
	f.Fuzz(func(t *testing.T, sent []byte, early, size uint16) {
		type result struct {
			why         Close
			goodbye, ok bool
			err         string
		}
		judge := func(src io.Reader) result {
			r := newReader(t, src, defaultLimit, nil)
			r.Borrow()
			defer r.Return()
			err := readToTheEnd(r)
			why, goodbye, ok := r.frames.verdict(r.Buffered())
			if peer, isClose := errors.AsType[*websocket.CloseError](err); isClose && peer.Code != CloseAbnormalClosure {
				want := Close{Code: peer.Code}
				if !ok || !goodbye || why != want && (peer.Code != CloseNoStatusReceived || why != ProtocolError) {
					t.Errorf("got %v, goodbye %v, %v where gorilla says %v", why, goodbye, ok, err)
				}
			} else if ofClose := strings.Contains(err.Error(), "close code") || strings.Contains(err.Error(), "close frame"); ofClose != (ok && goodbye) {
				t.Errorf("got %v, goodbye %v, %v where gorilla says %v", why, goodbye, ok, err)
			} else if ok && !goodbye && !errors.Is(err, websocket.ErrReadLimit) {
				t.Errorf("got %v, %v where gorilla says %v", why, ok, err)
			}
			return result{why, goodbye, ok, err.Error()}
		}
		want := judge(bytes.NewReader(sent))
		at := min(int(early), len(sent))
		for i, got := range []result{
			judge(iotest.OneByteReader(bytes.NewReader(sent))),
			judge(&pieces{rest: [][]byte{slices.Clip(sent[:at]), sent[at:]}}),
			judge(&pieces{rest: slices.Collect(slices.Chunk(sent, int(size%MaxClientHeader)+1))}),
		} {
			if got != want {
				t.Errorf("division %d: got %+v, want %+v", i, got, want)
			}
		}
	})
}

// pieces are a source that returns at most one of them at a time.
type pieces struct {
	rest [][]byte
	err  error // at the end; nil means io.EOF
}

func (s *pieces) Read(p []byte) (int, error) {
	for len(s.rest) > 0 && len(s.rest[0]) == 0 {
		s.rest = s.rest[1:]
	}
	if len(s.rest) == 0 {
		if s.err != nil {
			return 0, s.err
		}
		return 0, io.EOF
	}
	n := copy(p, s.rest[0])
	s.rest[0] = s.rest[0][n:]
	return n, nil
}

func TestFrameScan_KeepsNoBodyOfALongCloseFrame(t *testing.T) {
	var s frameScan
	s.scan(script{}.message(CloseMessage, strings.Repeat("x", 1<<20)).bytes())
	if cap(s.body) > 0 {
		t.Errorf("got %d bytes kept", cap(s.body))
	}
}

// BenchmarkFrameScan measures one frame, of dozens that come with one read.
func BenchmarkFrameScan(b *testing.B) {
	for _, size := range []int{16, 128, 1024} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			frame := script{}.binary(strings.Repeat("x", size)).bytes()
			n := pooledBuffer / len(frame)
			p := bytes.Repeat(frame, n)
			var s frameScan
			b.ReportAllocs()
			for range b.N/n + 1 {
				s.scan(p)
			}
		})
	}
}
