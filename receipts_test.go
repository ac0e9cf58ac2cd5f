package chatbroadcast

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// A receiptStage is a hub with a history of one minute, and clients that send with ids.
type receiptStage struct{ *stage }

func newReceiptStage(t *testing.T) receiptStage { return receiptStage{newStage(t)} }

func (s receiptStage) enter(user string) *client {
	c := s.join(user, historyOfTen(), true, nil).client
	c.token = "epoch-" + c.id.String()
	c.joined = time.Now()
	return c
}

// send has c send a message for the first time, or again with the token of another client.
func (s receiptStage) send(c *client, id string, first *client) receipt {
	m := message{from: c, user: c.user, opcode: websocket.TextMessage, key: sendKey{c.user, c.token, id}}
	if first != nil {
		m.key.token, m.again = first.token, true
	}
	r, _ := s.hub.publish(m)
	s.serve()
	return r
}

func (s receiptStage) forgetEarly() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.hub.receipts.forgetEarly()
}

func TestReceipts_ForgettingEarlyMakesIDsUnknownForTheirAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newReceiptStage(t)
		defer s.hub.close()
		ada := s.enter("ada")
		s.send(ada, "m1", nil)
		time.Sleep(10 * time.Second)
		s.forgetEarly()
		time.Sleep(time.Second)
		after := s.enter("ada")
		if r := s.send(after, "m1", ada); !r.unknown {
			t.Errorf("got %+v, want a message unknown whose id was forgotten", r)
		}
		// What is new is published, and known from then on.
		for _, c := range []*client{ada, after} {
			if r := s.send(c, "new", nil); r.unknown || r.repeated {
				t.Errorf("got %+v, want it published", r)
			}
			if r := s.send(after, "new", c); !r.repeated {
				t.Errorf("got %+v, want it repeated", r)
			}
		}
		// The first connection has lost an id, the second cannot have.
		if r := s.send(after, "m2", ada); !r.unknown {
			t.Errorf("got %+v, want a message unknown whose token has lost an id", r)
		}
		if r := s.send(s.enter("ada"), "m2", after); r.unknown || r.repeated {
			t.Errorf("got %+v, want a message published whose token has lost nothing", r)
		}
		time.Sleep(49 * time.Second) // a minute after m1
		if r := s.send(after, "m2", ada); r.unknown || r.repeated {
			t.Errorf("after the age: got %+v, want it published", r)
		}
	})
}

func TestReceipts_TokenThatHasLostNothingIsComplete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newReceiptStage(t)
		defer s.hub.close()
		ada, eve := s.enter("ada"), s.enter("eve")
		ada.prefix, eve.prefix = testPrefix(1), testPrefix(2)
		s.send(ada, "m1", nil)
		for i := range maxReceipts + 1 {
			s.send(eve, fmt.Sprint(i), nil)
		}
		back := s.enter("ada")
		if r := s.send(back, "m2", ada); r.unknown || r.repeated {
			t.Errorf("got %+v, want it published", r)
		}
		if r := s.send(eve, "another", eve); !r.unknown {
			t.Errorf("got %+v, want it unknown", r)
		}
	})
}

// liveBytes returns how many bytes are in use by Go, without those that pools and finalizers of earlier tests still held.
func liveBytes() int {
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

func TestReceipts_SizeIsWhatTheyTake(t *testing.T) {
	for _, tc := range []struct {
		name    string
		clients int
	}{{"of one client", 1}, {"each of another client and address", maxReceipts}} {
		t.Run(tc.name, func(t *testing.T) {
			clients := make([]*client, tc.clients)
			for i := range clients {
				clients[i] = &client{prefix: testPrefix(0)}
				if tc.clients > 1 {
					clients[i].prefix = numberedPrefix(i)
				}
			}
			var r receipts
			before := liveBytes()
			for i := range maxReceipts {
				c := clients[i%tc.clients]
				if c.token == "" {
					c.token = strings.Repeat("x", 32) + fmt.Sprintf("%07d", i)
				}
				r.add(&message{from: c, key: sendKey{"", c.token, fmt.Sprintf("%07d", i)}}, receipt{at: time.Now()})
			}
			took, want := liveBytes()-before, r.size()
			if took > want*13/10 || took < want/2 {
				t.Errorf("%d receipts take %d bytes, want about %d", r.queue.len(), took, want)
			}
			t.Logf("%d receipts take %d bytes, counted as %d", r.queue.len(), took, want)
			runtime.KeepAlive(clients)
			r.forgetUntil(time.Now())
			if r.size() != 0 || len(r.known) != 0 {
				t.Errorf("got %d bytes and %d receipts, want none", r.size(), len(r.known))
			}
		})
	}
}
