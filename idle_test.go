package chatbroadcast

import (
	"bytes"
	"runtime/pprof"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
)

// readers counts the goroutines that read for a client, and those of them that do nothing but wait: on a stack that has
// not grown, without a buffer.
func readers(t *testing.T) (all, waiting int) {
	t.Helper()
	var profile bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&profile, 2); err != nil {
		t.Fatal(err)
	}
	for stack := range strings.SplitSeq(profile.String(), "\n\n") {
		if !strings.Contains(stack, "(*client).listen(") {
			continue
		}
		all++
		if !strings.Contains(stack, "(*client).read(") {
			waiting++
		}
	}
	return all, waiting
}

func TestClient_WaitsWithoutABufferBetweenMessages(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
		chat_broadcast /chat/*
	}`)
	waits := func(after string) {
		t.Helper()
		eventually(t, "the reader to wait after "+after, func() bool {
			all, waiting := readers(t)
			return all == 1 && waiting == 1
		})
	}
	p := join(t, "/chat/a")
	waits("joining")

	pong := clientFrame(finBit|websocket.PongMessage, []byte("life"))
	p.text("one")
	p.wantText("one")
	waits("a message")
	p.write(pong)
	waits("a pong")

	p.write(append(append(append(pong, pong...), clientFrame(finBit|websocket.TextMessage, []byte("two"))...), pong...))
	p.wantText("two")
	waits("a message among pongs")

	for _, b := range pong { // each byte by itself
		p.write([]byte{b})
	}
	p.text("three")
	p.wantText("three")
	waits("a pong in pieces")

	large := strings.Repeat("x", 3*readBuffer)
	p.text(large)
	p.wantText(large)
	waits("a message larger than a buffer")
}

func TestClient_MalformedPongsAreRefused(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
		chat_broadcast /chat/*
	}`)
	for name, frame := range map[string][]byte{
		"unmasked":      {finBit | websocket.PongMessage, 0},
		"fragmented":    {websocket.PongMessage, maskBit, 1, 2, 3, 4},
		"reserved bits": {finBit | 0x40 | websocket.PongMessage, maskBit, 1, 2, 3, 4},
		"too long":      append([]byte{finBit | websocket.PongMessage, maskBit | 126, 0, 126, 1, 2, 3, 4}, make([]byte, 126)...),
	} {
		t.Run(name, func(t *testing.T) {
			p := join(t, "/chat/a")
			p.write(frame)
			p.wantClose(websocket.CloseProtocolError, "")
		})
	}
}
