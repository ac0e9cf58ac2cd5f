package hub

import (
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A receiptHub is a hub with a history of one minute, and clients that send with ids.
type receiptHub struct{ *manual }

func newReceiptHub(t *testing.T) receiptHub { return receiptHub{newManual(t)} }

func (s receiptHub) enter(user string) *Client {
	c := s.join(user, historyOfTen(), true, nil).Client
	c.token = "epoch-" + c.id.String()
	return c
}

// send makes c send a message for the first time, or again with the token of another client.
func (s receiptHub) send(c *Client, id string, first *Client) Receipt {
	m := c.message(ws.TextMessage, nil)
	m.Key = Key{c.user, c.token, id}
	if first != nil {
		m.Key.Token, m.Again = first.token, true
	}
	r, _ := s.hub.publish(c, &m)
	s.serve()
	return r
}

func (s receiptHub) forgetEarly() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.hub.history.receipts.forgetEarly()
}

func TestReceipts_ForgettingEarlyMakesIDsUnknownForTheirAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newReceiptHub(t)
		defer s.hub.Close()
		ada := s.enter("ada")
		s.send(ada, "m1", nil)
		time.Sleep(10 * time.Second)
		s.forgetEarly()
		time.Sleep(time.Second)
		after := s.enter("ada")
		if r := s.send(after, "m1", ada); !r.Unknown {
			t.Errorf("got %+v, want a message unknown whose id was forgotten", r)
		}
		// A new message is published, and known from then on.
		for _, c := range []*Client{ada, after} {
			if r := s.send(c, "new", nil); r.Unknown || r.Repeated {
				t.Errorf("got %+v, want it published", r)
			}
			if r := s.send(after, "new", c); !r.Repeated {
				t.Errorf("got %+v, want it repeated", r)
			}
		}
		// The first connection has lost an id, the second cannot have.
		if r := s.send(after, "m2", ada); !r.Unknown {
			t.Errorf("got %+v, want a message unknown whose token has lost an id", r)
		}
		if r := s.send(s.enter("ada"), "m2", after); r.Unknown || r.Repeated {
			t.Errorf("got %+v, want a message published whose token has lost nothing", r)
		}
		time.Sleep(49 * time.Second) // a minute after m1
		if r := s.send(after, "m2", ada); r.Unknown || r.Repeated {
			t.Errorf("after the age: got %+v, want it published", r)
		}
	})
}

func TestReceipts_TokenThatHasLostNothingIsComplete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newReceiptHub(t)
		defer s.hub.Close()
		ada, eve := s.enter("ada"), s.enter("eve")
		ada.address, eve.address = testAddress(1), testAddress(2)
		s.send(ada, "m1", nil)
		for i := range maxReceipts + 1 {
			s.send(eve, fmt.Sprint(i), nil)
		}
		back := s.enter("ada")
		if r := s.send(back, "m2", ada); r.Unknown || r.Repeated {
			t.Errorf("got %+v, want it published", r)
		}
		if r := s.send(eve, "another", eve); !r.Unknown {
			t.Errorf("got %+v, want it unknown", r)
		}
	})
}

// liveBytes returns how many bytes Go uses, without those that pools and finalizers of earlier tests still held.
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
			addresses, tokens := make([]netip.Prefix, tc.clients), make([]string, tc.clients)
			for i := range addresses {
				addresses[i] = testAddress(i)
			}
			var r receipts
			before := liveBytes()
			for i := range maxReceipts {
				c := i % tc.clients
				if tokens[c] == "" {
					tokens[c] = strings.Repeat("x", 32) + fmt.Sprintf("%07d", i)
				}
				m := Message{Address: addresses[c], Joined: time.Now(), Key: Key{"", tokens[c], fmt.Sprintf("%07d", i)}}
				m.At = time.Now()
				r.add(&m, tc.clients)
			}
			took, want := liveBytes()-before, r.size()
			if took > want*13/10 || took < want/2 {
				t.Errorf("%d receipts take %d bytes, want about %d", r.queue.Len(), took, want)
			}
			t.Logf("%d receipts take %d bytes, counted as %d", r.queue.Len(), took, want)
			runtime.KeepAlive(addresses)
			runtime.KeepAlive(tokens)
			r.forgetUntil(time.Now())
			if r.size() != 0 || len(r.known) != 0 {
				t.Errorf("got %d bytes and %d receipts, want none", r.size(), len(r.known))
			}
		})
	}
}
