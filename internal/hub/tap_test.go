package hub

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
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
		tap := NewTap()
		for range 2 {
			for i := range tc.offered {
				tap.offer(&Message{Message: feed.Message{Seq: uint64(i + 1), Opcode: ws.TextMessage, Payload: make([]byte, tc.size)}})
			}
			messages, missed := tap.Take()
			if len(messages) != tc.queued || missed != uint64(tc.offered-tc.queued) {
				t.Errorf("%s: got %d messages and %d missed", tc.name, len(messages), missed)
			}
			for i, m := range messages {
				if m.Seq != uint64(i+1) {
					t.Fatalf("%s: got number %d in place %d", tc.name, m.Seq, i)
				}
			}
		}
	}
}

func TestTap_CopiesTheMessage(t *testing.T) {
	tap, payload := NewTap(), []byte("hello")
	tap.offer(&Message{Message: feed.Message{Seq: 1, Sender: 7, Opcode: ws.BinaryMessage, Payload: payload}})
	copy(payload, "xxxxx")
	messages, _ := tap.Take()
	if m := messages[0]; string(m.Payload) != "hello" || m.Sender != 7 || !m.Binary {
		t.Errorf("got %+v", m)
	}
}

// TestTap_SeesEveryMessageOnceWhileOthersComeAndGo has four senders, and a hub whose taps change all the time.
func TestTap_SeesEveryMessageOnceWhileOthersComeAndGo(t *testing.T) {
	const senders, messages, visitors = 4, 2000, 3
	b := newHub(t)
	tap := NewTap()
	var mu sync.Mutex
	taps := []*Tap{tap}
	set := func(change func()) {
		mu.Lock()
		defer mu.Unlock()
		change()
		b.SetTaps(slices.Clone(taps))
	}
	set(func() {})
	var sending, visiting sync.WaitGroup
	for range senders {
		sending.Go(func() {
			for i := range messages {
				publishIn(b, textMessage(fmt.Sprint(i)))
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
				visitor := NewTap()
				set(func() { taps = append(taps, visitor) })
				set(func() { taps = slices.DeleteFunc(taps, func(t *Tap) bool { return t == visitor }) })
			}
		})
	}
	seen := uint64(0)
	for seen < senders*messages {
		<-tap.News()
		queued, missed := tap.Take()
		for _, m := range queued {
			if m.Seq != seen+1 {
				t.Fatalf("got message %d after %d", m.Seq, seen)
			}
			seen++
		}
		seen += missed
	}
	sending.Wait()
	close(sent)
	visiting.Wait()
	set(func() { taps = nil })
	publishIn(b, textMessage("for nobody"))
	if messages, missed := tap.Take(); len(messages)+int(missed) > 0 {
		t.Errorf("got %d messages after the tap was removed", len(messages)+int(missed))
	}
}
