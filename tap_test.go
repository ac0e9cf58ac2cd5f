package chatbroadcast

import (
	"fmt"
	"sync"
	"testing"

	"github.com/gorilla/websocket"
)

func TestTap_KeepsTheOldestAndCountsTheRest(t *testing.T) {
	for _, tc := range []struct {
		name          string
		size, offered int
		queued        int
	}{
		{"few", 1, 10, 10},
		{"as many as fit", 1, maxTapMessages, maxTapMessages},
		{"too many", 0, maxTapMessages + 5, maxTapMessages},
		{"as large as fits", maxTapBytes / 4, 4, 4},
		{"too large together", maxTapBytes/4 + 1, 5, 3},
		{"one that is too large", maxTapBytes + 1, 3, 1},
	} {
		tap := newTap()
		for range 2 {
			for i := range tc.offered {
				tap.offer(uint64(i+1), nil, websocket.TextMessage, make([]byte, tc.size))
			}
			messages, missed := tap.take()
			if len(messages) != tc.queued || missed != uint64(tc.offered-tc.queued) {
				t.Errorf("%s: got %d messages and %d missed", tc.name, len(messages), missed)
			}
			for i, m := range messages {
				if m.seq != uint64(i+1) {
					t.Fatalf("%s: got number %d in place %d", tc.name, m.seq, i)
				}
			}
		}
	}
}

func TestTap_CopiesTheMessage(t *testing.T) {
	tap, payload := newTap(), []byte("hello")
	tap.offer(1, &client{id: 7}, websocket.BinaryMessage, payload)
	copy(payload, "xxxxx")
	messages, _ := tap.take()
	if m := messages[0]; string(m.payload) != "hello" || m.from != 7 || !m.binary {
		t.Errorf("got %+v", m)
	}
}

// TestTap_SeesEveryMessageOnceWhileOthersComeAndGo has four senders and a hub whose taps change all the time.
func TestTap_SeesEveryMessageOnceWhileOthersComeAndGo(t *testing.T) {
	const senders, messages, visitors = 4, 2000, 3
	b := crowd(t, 1)
	tap, remove := hubs.tap("crowd")
	var sending, visiting sync.WaitGroup
	for range senders {
		sending.Go(func() {
			for i := range messages {
				b.publish(message{opcode: websocket.TextMessage, payload: fmt.Append(nil, i)})
			}
		})
	}
	sent := make(chan struct{})
	for range visitors {
		visiting.Go(func() {
			for {
				select {
				case <-sent:
					return
				default:
				}
				_, remove := hubs.tap("crowd")
				remove()
			}
		})
	}
	seen := uint64(0)
	for seen < senders*messages {
		<-tap.news
		queued, missed := tap.take()
		for _, m := range queued {
			if m.seq != seen+1 {
				t.Fatalf("got message %d after %d", m.seq, seen)
			}
			seen++
		}
		seen += missed
	}
	sending.Wait()
	close(sent)
	visiting.Wait()
	remove()
	if hubs.taps["crowd"] != nil || len(b.taps) != 0 {
		t.Errorf("got %d taps in the registry and %d in the hub that are left", len(hubs.taps["crowd"]), len(b.taps))
	}
}
