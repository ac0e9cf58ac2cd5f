package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
)

// parseAll gives a parser the stream in pieces that end at the cuts, and lists its findings.
func parseAll(stream []byte, cuts ...int) (found []string, err error) {
	return parseWith(&parser{}, stream, cuts...)
}

func parseWith(p *parser, stream []byte, cuts ...int) (found []string, err error) {
	from := 0
	for _, to := range append(cuts, len(stream)) {
		for rest := stream[from:to]; ; {
			var f finding
			if rest, f, err = p.next(rest); err != nil {
				return found, err
			}
			if f == foundNothing {
				break
			}
			switch f {
			case foundMessage:
				found = append(found, fmt.Sprintf("message %s", p.id[:p.idN]))
			default:
				found = append(found, fmt.Sprintf("%d %s", f, p.controlData))
			}
		}
		from = to
	}
	return found, nil
}

// stream returns frames of each kind and each size of header, with control frames within a fragmented message, and the
// expected findings.
func stream() (stream []byte, want []string) {
	id := bytes.Repeat([]byte("0123456789abcdef!"), 8000)
	for _, size := range []int{0, 1, 15, 16, 17, 125, 126, 127, 65535, 65536} {
		stream = appendFrame(stream, opText, false, id[:size])
		want = append(want, fmt.Sprintf("message %s", id[:min(idSize, size)]))
	}
	stream = append(stream, opText, 3, '0', '1', '2') // FIN is not set
	stream = appendFrame(stream, opPing, false, []byte("ping"))
	stream = append(stream, opContinuation, 0)
	stream = appendFrame(stream, opPong, false, nil)
	stream = appendFrame(stream, opContinuation, false, id[3:300])
	want = append(want, fmt.Sprintf("%d ping", foundPing), fmt.Sprintf("%d ", foundPong), "message "+string(id[:idSize]))
	stream = appendFrame(stream, opBinary, false, id[5:50])
	stream = appendFrame(stream, opClose, false, []byte("\x03\xe8bye"))
	return stream, append(want, "message "+string(id[5:5+idSize]), fmt.Sprintf("%d \x03\xe8bye", foundClose))
}

func TestParser_FindsTheSameWhereverTheStreamIsCut(t *testing.T) {
	stream, want := stream()
	for cut := range len(stream) {
		// Most of the stream is uniform payload: there a sample of the cuts is enough.
		if cut > 1000 && cut < len(stream)-1000 && cut%61 != 0 {
			continue
		}
		if got, err := parseAll(stream, cut); err != nil || !slices.Equal(got, want) {
			t.Fatalf("cut at %d: got %q, %v, want %q", cut, got, err, want)
		}
	}
	bytewise := make([]int, len(stream))
	for i := range bytewise {
		bytewise[i] = i
	}
	if got, err := parseAll(stream, bytewise...); err != nil || !slices.Equal(got, want) {
		t.Fatalf("byte by byte: got %q, %v, want %q", got, err, want)
	}
}

func TestParser_FindsTheTextOfEventsWhereverTheStreamIsCut(t *testing.T) {
	var stream []byte
	for _, frame := range []string{
		`{"type":"hello","client":"c","user":"\"data\":\"","hub":"h","head":0}`,
		`{"type":"message","seq":1,"time":"2026-11-23T12:00:00.000Z","client":"c","user":"\"data\":\"","data":"]]]]]]]]aaaaaaaaxxxx"}`,
		`{"type":"message","seq":2,"data":"]]]]]]]]aaaaaaaa"}`,
		`{"type":"message","seq":3,"data":"]]]]]]]aaaaaaaa"}`,
		`{"type":"message","seq":4,"data64":"AP8="}`,
		`{"type":"leave","user":"data","clients":2}`,
	} {
		stream = appendFrame(stream, opText, false, []byte(frame))
	}
	stream = append(stream, opText, 12)
	stream = append(stream, `{"type":"mes`...)
	stream = append(stream, 0x80|opContinuation, 34)
	stream = append(stream, `sage","data":"bbbbbbbbccccccccxx"}`...)
	want := []string{"message ]]]]]]]]aaaaaaaa", "message ]]]]]]]]aaaaaaaa", "message ]]]]]]]aaaaaaaa\"", "message bbbbbbbbcccccccc"}
	for cut := range len(stream) {
		for next := cut; next < len(stream); next += 5 {
			if got, err := parseWith(&parser{events: true}, stream, cut, next); err != nil || !slices.Equal(got, want) {
				t.Fatalf("cut at %d and %d: got %q, %v, want %q", cut, next, got, err, want)
			}
		}
	}
}

func TestParser_KeepsLittleOfAnEventWithoutText(t *testing.T) {
	p := parser{events: true}
	event := appendFrame(nil, opText, false, bytes.Repeat([]byte(" "), 100_000))
	if found, err := parseWith(&p, event, 1000, 50_000, 70_000); err != nil || len(found) > 0 || len(p.envelope) != maxEnvelope {
		t.Errorf("found %q, %v, and kept %d bytes, want nothing and %d", found, err, len(p.envelope), maxEnvelope)
	}
}

// BenchmarkParser parses the bytes that a client of a busy hub reads at once.
func BenchmarkParser(b *testing.B) {
	message := bytes.Repeat([]byte("x"), 128)
	putID(message, 1<<30, 1<<20)
	event := fmt.Sprintf(`{"type":"message","seq":123456,"time":"2026-11-23T12:00:00.000Z","client":"dq3e5qf4t0xs","user":"","data":"%s"}`, message)
	for kind, frame := range map[string][]byte{"raw": message, "events": []byte(event)} {
		b.Run(kind, func(b *testing.B) {
			var stream []byte
			for range 32 {
				stream = appendFrame(stream, opText, false, frame)
			}
			p := parser{events: kind == "events"}
			for b.Loop() {
				for rest, f, _ := p.next(stream); f == foundMessage; rest, f, _ = p.next(rest) {
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/32, "ns/message")
		})
	}
}

func TestParser_RefusesIllegalFrames(t *testing.T) {
	for name, stream := range map[string][]byte{
		"a mask":                     {0x81, 0x81, 0, 0, 0, 0, 'x'},
		"a reserved bit":             {0xC1, 0},
		"a reserved opcode":          {0x83, 0},
		"a continuation of nothing":  {0x80, 0},
		"a message within a message": {0x01, 0, 0x81, 0},
		"a fragmented ping":          {0x09, 0},
		"a long ping":                {0x89, 126, 0, 126},
		"a negative length":          {0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0},
		"the most negative length":   {0x82, 127, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := parseAll(stream); err == nil {
				t.Errorf("got %q, want an error", got)
			}
		})
	}
}

func FuzzParser(f *testing.F) {
	stream, _ := stream()
	f.Add(stream[:400], uint16(3), uint16(250))
	f.Add(stream[len(stream)-400:], uint16(1), uint16(399))
	f.Fuzz(func(t *testing.T, stream []byte, a, b uint16) {
		want, wantErr := parseAll(stream)
		cuts := []int{min(int(a), len(stream)), min(int(b), len(stream))}
		slices.Sort(cuts)
		got, err := parseAll(stream, cuts...)
		if !slices.Equal(got, want) || (err == nil) != (wantErr == nil) {
			t.Errorf("cut at %v: got %q, %v, in one piece: %q, %v", cuts, got, err, want, wantErr)
		}
	})
}

func TestID_SurvivesJSONAndParsing(t *testing.T) {
	const top = 1<<idBits - 1
	for _, n := range []uint64{0, 1, 31, 32, 1 << 20, 0x8864204531, top} {
		var id [idSize]byte
		putID(id[:], n, top-n)
		if inJSON, err := json.Marshal(string(id[:])); err != nil || string(inJSON[1:len(inJSON)-1]) != string(id[:]) {
			t.Errorf("id of %d: JSON turns %q into %s, %v", n, id, inJSON, err)
		}
		if sender, seq, ok := parseID(&id); sender != n || seq != top-n || !ok {
			t.Errorf("got %d, %d, %t, want %d, %d", sender, seq, ok, n, top-n)
		}
	}
	for i := range idSize {
		id := [idSize]byte([]byte("]]]]]]]]]]]]]]]]"))
		id[i] = '}'
		if _, _, ok := parseID(&id); ok {
			t.Errorf("%q is taken for an id", id)
		}
	}
}

func TestReadMessage_Unmasks(t *testing.T) {
	for _, size := range []int{0, 5, 125, 126, 65535, 65536} {
		want := bytes.Repeat([]byte("x"), size)
		frame := appendFrame(nil, opPing, true, nil)
		frame = appendFrame(frame, opText, true, want)
		mask := frame[len(frame)-size-4:][:4]
		copy(mask, "\x01\x02\x03\x04")
		for i := range size {
			frame[len(frame)-size+i] ^= mask[i%4]
		}
		if got, err := readMessage(bufio.NewReader(bytes.NewReader(frame))); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes: got %d bytes, %v", size, len(got), err)
		}
	}
}
