package hub

import (
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A stopwatch counts the deliveries that a process has timed.
type stopwatch struct {
	timed   atomic.Int64
	longest atomic.Int64
}

// timedProcess returns a process and what it times.
func timedProcess() (*Process, *stopwatch) {
	p, s := NewProcess(), new(stopwatch)
	p.Delivered = func(d time.Duration) {
		s.timed.Add(1)
		s.longest.Store(max(s.longest.Load(), int64(d)))
	}
	return p, s
}

func TestSample_WaitsForTheOthersOfABrokenClient(t *testing.T) {
	for _, echo := range []bool{true, false} {
		t.Run(fmt.Sprintf("echo=%v", echo), func(t *testing.T) {
			p, timed := timedProcess()
			s := newManualOf(t, p)
			b := s.hub
			settings := defaults()
			settings.Echo = echo
			broken := s.join("", settings, false, nil)
			a, slow := s.join("", defaults(), false, nil), s.join("", defaults(), false, nil)
			if echo {
				publishIn(b, textMessage("one"))
				b.next(broken.Client) // its write fails:
				b.drop(broken.Client)
				b.next(broken.Client) // a writer that has yet to see that
			} else {
				b.drop(broken.Client)
				m := broken.message(ws.TextMessage, []byte("one")) // sent before, and read now
				b.publish(broken.Client, &m)
			}
			b.next(a.Client)
			b.next(a.Client)
			if n := timed.timed.Load(); n != 0 || b.sample.owed != 1 {
				t.Errorf("got %d deliveries timed, %d clients that owe, want one that owes", n, b.sample.owed)
			}
			b.next(slow.Client)
			b.next(slow.Client)
			if n := timed.timed.Load(); n != 1 || b.sample.owed != 0 {
				t.Errorf("got %d deliveries timed, %d clients that owe, want it timed", n, b.sample.owed)
			}
		})
	}
}

// TestSample_IsNotPaidByClientsOfANewFeed has clients of events come while another client has yet to take the sample, in a hub
// that has had no feed of events before, or whose feed has ended.
func TestSample_IsNotPaidByClientsOfANewFeed(t *testing.T) {
	for _, ended := range []bool{false, true} {
		for _, breaks := range []bool{false, true} {
			t.Run(fmt.Sprintf("ended=%v/breaks=%v", ended, breaks), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p, timed := timedProcess()
					s := newManualOf(t, p)
					ada := s.join("ada", defaults(), false, nil)
					if ended {
						bob := s.join("bob", defaults(), true, nil)
						s.publish(nil, "before")
						s.leave(bob)
					}
					before := timed.timed.Load()
					ada.stuck = true
					s.publish(nil, "sample")
					cid := s.join("cid", defaults(), true, nil)
					s.serve()
					s.publish(nil, "for cid")
					s.publish(nil, "for cid")
					if breaks {
						s.hub.drop(cid.Client)
					}
					if got := timed.timed.Load(); got != before || s.hub.sample.owed != 1 {
						t.Errorf("got %d deliveries timed, %d clients that owe, want %d and one", got, s.hub.sample.owed, before)
					}
					ada.take()
					if got := timed.timed.Load(); got != before+1 || s.hub.sample.owed != 0 {
						t.Errorf("got %d deliveries timed, %d clients that owe, want %d and none", got, s.hub.sample.owed, before+1)
					}
					s.leave(cid)
					s.leave(ada)
				})
			})
		}
	}
}

// TestSample_IsNotPaidByClientsThatGetItAsHistory has clients join after the sample was published, and take it or break.
func TestSample_IsNotPaidByClientsThatGetItAsHistory(t *testing.T) {
	for _, speaksEvents := range []bool{false, true} {
		for _, breaks := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				p, timed := timedProcess()
				s := newManualOf(t, p)
				first := s.join("first", historyOfTen(), speaksEvents, nil)
				ada := s.join("ada", historyOfTen(), speaksEvents, nil)
				ada.stuck = true
				s.publish(nil, "sample")
				bob := s.join("bob", historyOfTen(), speaksEvents, nil)
				if breaks {
					s.breakOff(bob)
				} else if s.serve(); len(bob.frames()) == 0 {
					t.Error("the client did not get the history")
				}
				if n := timed.timed.Load(); n != 0 || s.hub.sample.owed != 1 {
					t.Errorf("got %d deliveries timed, %d clients that owe, want none and one", n, s.hub.sample.owed)
				}
				ada.take()
				if n := timed.timed.Load(); n != 1 || s.hub.sample.owed != 0 {
					t.Errorf("got %d deliveries timed, %d clients that owe, want one and none", n, s.hub.sample.owed)
				}
				for _, a := range []*manualClient{first, ada, bob} {
					s.leave(a)
				}
				s.hub.Close()
			})
		}
	}
}

// TestSample_SenderWithoutEchoOwesNothing has a client with everything send a message that it does not get itself.
func TestSample_SenderWithoutEchoOwesNothing(t *testing.T) {
	for _, speaksEvents := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			p, timed := timedProcess()
			s := newManualOf(t, p)
			quiet := defaults()
			quiet.Echo = false
			ada, bob := s.join("ada", quiet, speaksEvents, nil), s.join("bob", defaults(), false, nil)
			s.serve()
			for i := range 3 {
				s.publish(ada, "for bob")
				if n := timed.timed.Load(); n != int64(i+1) || s.hub.sample.owed != 0 {
					t.Errorf("got %d deliveries timed, %d clients that owe, want %d and none", n, s.hub.sample.owed, i+1)
				}
			}
			s.leave(ada)
			s.leave(bob)
		})
	}
}

// TestSample_IsGivenUpAfterASecond has a stuck client owe a sample for longer than that.
func TestSample_IsGivenUpAfterASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, timed := timedProcess()
		s := newManualOf(t, p)
		ada, bob := s.join("ada", defaults(), false, nil), s.join("bob", defaults(), false, nil)
		ada.stuck = true
		s.publish(bob, "sample")
		time.Sleep(maxSample)
		for range clockEvery - 1 {
			s.publish(bob, "more")
		}
		if n := timed.timed.Load(); n != 0 {
			t.Errorf("got %d deliveries timed before the hub has looked at the clock, want none", n)
		}
		s.publish(bob, "the new sample")
		if n, longest := timed.timed.Load(), time.Duration(timed.longest.Load()); n != 1 || longest != maxSample {
			t.Errorf("got %d deliveries timed, the longest %v, want one of %v", n, longest, maxSample)
		}
		time.Sleep(maxSample / 2)
		ada.take()
		if n := timed.timed.Load(); n != 2 || s.hub.sample.owed != 0 {
			t.Errorf("got %d deliveries timed, %d clients that owe, want 2 and none", n, s.hub.sample.owed)
		}
		s.leave(ada)
		s.leave(bob)
	})
}

// TestSample_Ends has clients of every kind come, go, send and lag, and checks that no sample waits for a client that owes it
// nothing.
func TestSample_Ends(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		bubble(t, func(t *testing.T, hub *Hub) {
			random := rand.New(rand.NewPCG(seed, 0))
			kinds := []*Settings{defaults(), defaults(), defaults()}
			kinds[1].Echo = false
			kinds[2].SkipLag = true
			type member struct {
				c *Client
				p *peer
			}
			var members []member
			var late []*peer
			var readers sync.WaitGroup
			read := func(p *peer) { readers.Go(func() { _, _ = io.Copy(io.Discard, p.conn) }) }
			for range 300 {
				switch n := random.IntN(10); {
				case n < 2 || len(members) == 0:
					c, p := joiner{events: random.IntN(3) == 0}.join(t, hub, kinds[random.IntN(len(kinds))])
					members = append(members, member{c, p})
					if random.IntN(4) == 0 {
						late = append(late, p)
					} else {
						read(p)
					}
				case n < 8:
					from := members[random.IntN(len(members))].c
					m := from.message(ws.TextMessage, []byte("hello"))
					hub.publish(from, &m)
				case n < 9:
					i := random.IntN(len(members))
					members[i].c.Close(CloseHubRemoved)
					members = append(members[:i], members[i+1:]...)
				default:
					synctest.Wait()
				}
				time.Sleep(time.Duration(random.IntN(2)) * time.Millisecond)
			}
			for _, p := range late {
				read(p)
			}
			synctest.Wait()
			hub.mu.Lock()
			if owed, leaving := hub.sample.owed, hub.sample.leaving; owed != 0 || leaving != 0 {
				t.Errorf("seed %d: got %d that owe the sample and %d that leave, want none", seed, owed, leaving)
			}
			hub.mu.Unlock()
			for _, m := range members {
				m.p.conn.Close()
			}
			readers.Wait()
		})
	}
}

func TestTally_SortsWritesByTheirMessages(t *testing.T) {
	var total written
	var flusher Tally
	for _, n := range []int{0, 1, 2, 3, 4, 5, 8, 9, 512, 513, 10_000} {
		flusher.wrote(n, 100)
	}
	if flusher.pending != 11 {
		t.Errorf("got %d writes pending, want 11", flusher.pending)
	}
	total.add(&flusher)
	total.wrote(1, 7)
	want := [perWriteBuckets + 1]uint64{0: 2, 1: 1, 2: 2, 3: 2, 4: 1, 9: 1, 10: 2}
	if total.total.Writes != want {
		t.Errorf("got %v, want %v", total.total.Writes, want)
	}
	if got, want := total.total.Messages, uint64(1+2+3+4+5+8+9+512+513+10_000+1); got != want {
		t.Errorf("got %d messages, want %d", got, want)
	}
	if got, want := total.total.Bytes, uint64(11*100+7); got != want {
		t.Errorf("got %d bytes, want %d", got, want)
	}
	if flusher != (Tally{}) {
		t.Errorf("got %+v left in the tally that was added, want nothing", flusher)
	}
}
