package chatbroadcast

import (
	"testing"

	"github.com/gorilla/websocket"
)

func TestHandler_RelaysToEveryClientOfAHub(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /chat/*
	respond "a page"
}`)
	a, b, c := join(t, "/chat/a"), join(t, "/chat/a"), join(t, "/chat/a")
	a.text("hello")
	b.send(websocket.BinaryMessage, "\x00\xff")
	// b's message may overtake a's; the order is the same for all.
	first, second := a.next(), a.next()
	for _, p := range []*peer{b, c} {
		if f1, f2 := p.next(), p.next(); f1 != first || f2 != second {
			t.Errorf("got %v, %v, want %v, %v as the first client", f1, f2, first, second)
		}
	}
	want := map[frame]bool{{websocket.TextMessage, "hello"}: true, {websocket.BinaryMessage, "\x00\xff"}: true}
	if !want[first] || !want[second] || first == second {
		t.Errorf("got %v and %v, want each of %v", first, second, want)
	}
}
