package hub

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// dearFrames are frames of about 60 KB, each the dearest of its kind that we know of.
var dearFrames = []struct{ name, frame string }{
	{"plain", `{"type":"send","data":"` + strings.Repeat("x", 60_000) + `"}`},
	{"escapes", `{"type":"send","data":"` + strings.Repeat(`\n`, 30_000) + `"}`},
	{"surrogates", `{"type":"send","data":"` + strings.Repeat(`\ud83d\ude00`, 5_000) + `"}`},
	{"base64", `{"type":"send","data64":"` + strings.Repeat("AAAA", 15_000) + `"}`},
	{"fields", `{"type":"x"` + strings.Repeat(`,"0":0`, 10_000) + `}`},
	{"different fields", `{"type":"x"` + numberedFields(6_000) + `}`},
	{"doubled fields", `{"type":"send"` + strings.Repeat(`,"data":""`, 6_000) + `}`},
	{"escaped names", `{"type":"x"` + strings.Repeat(`,"\u0064\u0061\u0074\u0061":0`, 2_000) + `}`},
	{"levels", `{"type":"x","x":[0` + strings.Repeat(","+strings.Repeat("[", maxLevels-2)+strings.Repeat("]", maxLevels-2), 300) + `]}`},
	{"objects", `{"type":"x","x":[0` + strings.Repeat(`,{}`, 20_000) + `]}`},
	{"space", `{"type":"x"` + strings.Repeat(" ", 60_000) + `}`},
	{"digits", `{"type":"who","limit":1` + strings.Repeat("0", 60_000) + `}`},
	{"malformed levels", strings.Repeat("[", maxLevels)},
	{"too many levels", strings.Repeat("[", 60_000)},
	{"malformed string", `{"type":"` + strings.Repeat(`\"`, 30_000)},
	{"malformed at the end", `{"type":"x","x":[0` + strings.Repeat(`,{}`, 20_000) + `]`},
}

func numberedFields(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `,"%d":0`, i)
	}
	return b.String()
}

// BenchmarkClientEvent shows what a byte of a client's frame costs by its kind. At the pace of 2 MiB/s for bytes that are no
// message, a nanosecond a byte is 0.2 % of a core.
func BenchmarkClientEvent(b *testing.B) {
	for _, bench := range dearFrames {
		b.Run(bench.name, func(b *testing.B) {
			frame, buffer := []byte(bench.frame), make([]byte, len(bench.frame))
			b.SetBytes(int64(len(frame)))
			b.ReportAllocs()
			for b.Loop() {
				copy(buffer, frame) // decode overwrites it
				var e clientEvent
				_ = e.decode(buffer)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(frame)), "ns/byte")
		})
	}
}

// TestClientEvent_SearchFindsNoDearFrame puts frames together by chance and keeps the dearest to change it further. No frame
// may cost more a byte than a fixed multiple of checking plain JSON, because the server charges for bytes.
func TestClientEvent_SearchFindsNoDearFrame(t *testing.T) {
	const most, size, rounds = 50, 8 << 10, 400
	pieces := []string{
		`{"type":"send"`, `{"type":"who"`, `{"type":"x"`, `{"type":"ping"`, `{`, `}`, `[`, `]`, `,`, `:`, `"`, `\`, `\"`, `\u0000`, `\ud83d`, `\ude00`,
		`,"data":"`, `,"data64":"AAAA"`, `,"id":"m"`, `,"after":"`, `,"limit":1e9`, `,"0":0`, `,"\u0064ata":""`, `0`, `1e1`, `-`, `0.0`, `true`,
		`null`, ` `, "\n", `é`, `🙂`, `x`, strings.Repeat("[", 50), strings.Repeat(`{"":`, 30), strings.Repeat("]", 50), strings.Repeat("x", 50),
	}
	random := rand.New(rand.NewPCG(1, 2))
	some := func() string {
		var b strings.Builder
		for range 1 + random.IntN(6) {
			b.WriteString(pieces[random.IntN(len(pieces))])
		}
		return b.String()
	}
	cost := func(frame string, times int, check func(frame []byte)) time.Duration {
		least := time.Hour
		for range times { // what else the machine does only makes it dearer
			buffer := []byte(frame)
			began := time.Now()
			check(buffer)
			least = min(least, time.Since(began))
		}
		return least
	}
	plain := `{"type":"send","data":"` + strings.Repeat("x", size) + `"}`
	allowed := most * cost(plain, 3, func(frame []byte) { json.Valid(frame) })
	decode := func(frame []byte) { _ = new(clientEvent).decode(frame) }
	dearest, head, body := time.Duration(0), `{"type":"x"`, `,"0":0`
	for range rounds {
		h, b := head, body
		switch random.IntN(3) {
		case 0:
			h = pieces[random.IntN(5)]
		case 1:
			b = some()
		default:
			b += pieces[random.IntN(len(pieces))]
		}
		frame := h + strings.Repeat(b, size/len(b))
		if random.IntN(2) == 0 {
			frame += "}"
		}
		took := cost(frame, 3, decode)
		if took > allowed {
			took = cost(frame, 100, decode) // not only something else that the machine did
		}
		if took > allowed {
			t.Errorf("%.100q, of %d bytes: took %v, want at most %v", frame, len(frame), took, allowed)
		}
		if took > dearest {
			dearest, head, body = took, h, b
		}
	}
	t.Logf("the dearest repeats %q after %q: %v for %d bytes, plain JSON takes %v", body, head, dearest, size, allowed/most)
}

func TestClientEvent_DecodingTakesNoMemory(t *testing.T) {
	for _, tc := range dearFrames {
		if strings.HasPrefix(tc.name, "malformed") || tc.name == "too many levels" || tc.name == "digits" {
			continue
		}
		t.Run(tc.name, func(t *testing.T) {
			buffer := make([]byte, len(tc.frame))
			allocs := testing.AllocsPerRun(20, func() {
				copy(buffer, tc.frame)
				var e clientEvent
				if err := e.decode(buffer); err != nil {
					t.Error(err)
				}
			})
			if allocs >= 50 { // the scanner of encoding/json and its stack come from a pool, which may be empty
				t.Errorf("got %v allocations", allocs)
			}
		})
	}
}

func TestClientEvent_WholeNumbers(t *testing.T) {
	for _, tc := range []struct {
		value string
		want  int
		ok    bool
	}{
		{"0", 0, true},
		{"-0", 0, true},
		{"0.0", 0, true},
		{"0e99999999999999999999", 0, true},
		{"0.000e-5", 0, true},
		{"7", 7, true},
		{"-7", -7, true},
		{"70e-1", 7, true},
		{"0.07E+2", 7, true},
		{"7.000", 7, true},
		{"700.0e-2", 7, true},
		{"123456789", 123456789, true},
		{"1e8", 100_000_000, true},
		{"12.5e1", 125, true},
		{"-12.5e1", -125, true},
		{"0.5", 0, false},
		{"70e-2", 0, false},
		{"7.0000000000000000000000000001", 0, false},
		{"1e-99999999999999999999", 0, false},
		{"-1.5", 0, false},
		{"0.07e1", 0, false},
		{`"7"`, 0, false},
		{"null", 0, false},
		{"true", 0, false},
		{"[7]", 0, false},
		{"{}", 0, false},
	} {
		if got, ok := wholeNumber([]byte(tc.value)); got != tc.want || ok != tc.ok {
			t.Errorf("%s: got %d, %v, want %d, %v", tc.value, got, ok, tc.want, tc.ok)
		}
	}
	for _, huge := range []string{"1e9", "1234567890", "1e99999999999999999999", "0.1e11", strings.Repeat("9", 1000)} {
		if got, ok := wholeNumber([]byte(huge)); got < 1e9 || !ok {
			t.Errorf("%.30s: got %d, %v, want a large number", huge, got, ok)
		}
	}
}

func TestClientEvent_DecodesInPlace(t *testing.T) {
	frame := []byte(`{"id":"\u0069\u0064","data":"\\\"x\ud83d\ude00","data64":"","type":"send","token":"t\/"}`)
	var e clientEvent
	if err := e.decode(frame); err != nil {
		t.Fatal(err)
	}
	for _, f := range []struct {
		got  []byte
		want string
	}{{e.id, "id"}, {e.data, `\"x😀`}, {e.data64, ""}, {e.token, "t/"}} {
		if string(f.got) != f.want || f.got == nil {
			t.Errorf("got %q, want %q", f.got, f.want)
		}
		if len(f.got) > 0 && !bytes.Contains(frame, f.got) {
			t.Errorf("%q is not in the frame's memory", f.got)
		}
	}
}
