package main

import (
	"bufio"
	"bytes"
	"fmt"
	"slices"
	"testing"
)

// parseAll gives p the stream in pieces that end at the cuts, and lists what it finds.
func parseAll(stream []byte, cuts ...int) (found []string, err error) {
	var p parser
	from := 0
	for _, to := range append(cuts, len(stream)) {
		for rest := stream[from:to]; ; {
			var ev event
			if rest, ev, err = p.next(rest); err != nil {
				return found, err
			}
			if ev == eventNone {
				break
			}
			switch ev {
			case eventMessage:
				found = append(found, fmt.Sprintf("message %s", p.id[:p.idN]))
			default:
				found = append(found, fmt.Sprintf("%d %s", ev, p.controlData))
			}
		}
		from = to
	}
	return found, nil
}

// stream has frames of each kind and each size of header, with control frames within a fragmented message.
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
	want = append(want, fmt.Sprintf("%d ping", eventPing), fmt.Sprintf("%d ", eventPong), "message "+string(id[:idSize]))
	stream = appendFrame(stream, opBinary, false, id[5:50])
	stream = appendFrame(stream, opClose, false, []byte("\x03\xe8bye"))
	return stream, append(want, "message "+string(id[5:5+idSize]), fmt.Sprintf("%d \x03\xe8bye", eventClose))
}

func TestParser_FindsTheSameWhereverTheStreamIsCut(t *testing.T) {
	stream, want := stream()
	for cut := range len(stream) {
		// Most of the stream is payload, which is alike.
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

func TestParser_RefusesWhatNoServerMaySend(t *testing.T) {
	for name, stream := range map[string][]byte{
		"a mask":                        {0x81, 0x81, 0, 0, 0, 0, 'x'},
		"a reserved bit":                {0xC1, 0},
		"a reserved opcode":             {0x83, 0},
		"a continuation of nothing":     {0x80, 0},
		"a message within a message":    {0x01, 0, 0x81, 0},
		"a fragmented ping":             {0x09, 0},
		"a long ping":                   {0x89, 126, 0, 126},
		"a length that is negative":     {0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0},
		"a length that is negative yet": {0x82, 127, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF},
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

func TestID_SurvivesTheWay(t *testing.T) {
	for _, n := range []uint64{0, 1, 63, 64, 1 << 24, 1<<48 - 1} {
		var id [idSize]byte
		putID(id[:], n, 1<<48-1-n)
		for _, b := range id {
			if b < '0' || b > 'o' {
				t.Errorf("id of %d: %q is not printable", n, id)
			}
		}
		if sender, seq, ok := parseID(&id); sender != n || seq != 1<<48-1-n || !ok {
			t.Errorf("got %d, %d, %t, want %d, %d", sender, seq, ok, n, 1<<48-1-n)
		}
	}
	for i := range idSize {
		id := [idSize]byte([]byte("0000000000000000"))
		id[i] = '{'
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
