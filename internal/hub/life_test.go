package hub

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// states are all states, and their names.
var states = []State{Joining, Open, Deaf, Closing, Goodbye, Cut, Finished}

func nameOf(s State) string {
	return []string{"joining", "open", "deaf", "closing", "goodbye", "cut", "finished"}[s]
}

// TestLife_MovesAlongTheArrowsOnly tries every pair of states.
func TestLife_MovesAlongTheArrowsOnly(t *testing.T) {
	type arrow struct{ from, to State }
	want := map[arrow]bool{
		{Joining, Open}: true, {Joining, Closing}: true, {Joining, Cut}: true,
		{Open, Deaf}: true, {Open, Closing}: true, {Open, Cut}: true,
		{Deaf, Cut}:        true,
		{Closing, Goodbye}: true, {Closing, Cut}: true,
		{Goodbye, Cut}: true, {Goodbye, Finished}: true,
		{Cut, Finished}: true,
	}
	for _, from := range states {
		for _, to := range states {
			var l life
			l.state.Store(uint32(from))
			moved := l.to(to)
			if moved != want[arrow{from, to}] {
				t.Errorf("from %s to %s: got %v, want %v", nameOf(from), nameOf(to), moved, !moved)
			}
			if after := map[bool]State{true: to, false: from}[moved]; l.now() != after {
				t.Errorf("from %s to %s: got %s afterwards, want %s", nameOf(from), nameOf(to), nameOf(l.now()), nameOf(after))
			}
		}
	}
	var l life
	l.state.Store(uint32(Finished) + 1)
	for _, to := range states {
		if l.to(to) {
			t.Errorf("a state that there is not leads to %s", nameOf(to))
		}
	}
}

func TestLife_StatesSayWhatAClientMay(t *testing.T) {
	for _, tc := range []struct {
		state                       State
		isMember, takesMore, isMute bool
	}{
		{Joining, true, true, false},
		{Open, true, true, false},
		{Deaf, true, false, true},
		{Closing, false, false, false},
		{Goodbye, false, false, false},
		{Cut, false, false, true},
		{Finished, false, false, true},
	} {
		s := tc.state
		if s.isMember() != tc.isMember || s.takesMore() != tc.takesMore || s.isMute() != tc.isMute {
			t.Errorf("%s: got member %v, takes more %v, mute %v, want %v, %v, %v",
				nameOf(s), s.isMember(), s.takesMore(), s.isMute(), tc.isMember, tc.takesMore, tc.isMute)
		}
	}
}

// clientIn returns a client in the given state, and its connection. No goroutine works for it. Where it has left, its cause is
// CloseKicked.
func clientIn(t *testing.T, s State) (*Client, *memoryConn) {
	t.Helper()
	b := newHub(t)
	c := newTestClient(b.process, "", testAddress(1), defaults())
	if err := b.Join(c, 0); err != nil {
		t.Fatal(err)
	}
	m, server := newMemoryConn(0, 0)
	c.Attach(server)
	if s > Joining {
		b.open(c)
	}
	switch s {
	case Joining, Open:
	case Deaf:
		b.mute(c)
	case Closing:
		c.Close(CloseKicked)
	case Goodbye:
		c.Close(CloseKicked)
		b.farewell(c, false)
	case Cut:
		c.Cut(CloseKicked)
	case Finished:
		c.Cut(CloseKicked)
		c.finish()
	}
	if c.State() != s {
		t.Fatalf("got state %s, want %s", nameOf(c.State()), nameOf(s))
	}
	return c, m
}

// TestLife_EachVerbFromEachState calls each verb for a client in each state.
func TestLife_EachVerbFromEachState(t *testing.T) {
	verbs := []struct {
		name string
		do   func(c *Client)
		want [7]State // by the state before
	}{
		//                                                      joining  open     deaf     closing  goodbye  cut       finished
		{"open", func(c *Client) { c.hub.open(c) }, [...]State{Open, Open, Deaf, Closing, Goodbye, Cut, Finished}},
		{"Close", func(c *Client) { c.Close(CloseMaxAge) }, [...]State{Closing, Closing, Cut, Closing, Goodbye, Cut, Finished}},
		{"Cut", func(c *Client) { c.Cut(CloseMaxAge) }, [...]State{Cut, Cut, Cut, Cut, Cut, Cut, Finished}},
		{"gone", func(c *Client) { c.gone(CloseMaxAge) }, [...]State{Cut, Cut, Cut, Closing, Goodbye, Cut, Finished}},
		{"mute", func(c *Client) { c.hub.mute(c) }, [...]State{Joining, Deaf, Deaf, Cut, Goodbye, Cut, Finished}},
		{"farewell", func(c *Client) { c.hub.farewell(c, false) }, [...]State{Joining, Open, Deaf, Goodbye, Goodbye, Cut, Finished}},
		{"gone, end", func(c *Client) { c.gone(CloseMaxAge); c.end() }, [...]State{Cut, Cut, Cut, Cut, Cut, Cut, Finished}},
	}
	for _, v := range verbs {
		for _, s := range states {
			t.Run(fmt.Sprintf("%s/%s", v.name, nameOf(s)), func(t *testing.T) {
				c, _ := clientIn(t, s)
				v.do(c)
				want := v.want[s]
				if got := c.State(); got != want {
					t.Errorf("got %s, want %s", nameOf(got), nameOf(want))
				}
				left, finished, _ := ownerOf(c).counts()
				if wantLeft := map[bool]int{true: 0, false: 1}[want.isMember()]; left != wantLeft || c.hub.Size() != 1-wantLeft {
					t.Errorf("got Left %d times and %d members, want %d and %d", left, c.hub.Size(), wantLeft, 1-wantLeft)
				}
				if wantFinished := map[bool]int{true: 1, false: 0}[want == Finished]; finished != wantFinished {
					t.Errorf("got Finished %d times, want %d", finished, wantFinished)
				}
				cause := ws.Close{}
				switch {
				case !s.isMember():
					cause = CloseKicked // the first
				case !want.isMember():
					cause = CloseMaxAge
				}
				if got := c.Cause(); got != cause {
					t.Errorf("got cause %v, want %v", got, cause)
				}
			})
		}
	}
}

// TestLife_FirstCauseHolds calls each pair of verbs that make a client leave.
func TestLife_FirstCauseHolds(t *testing.T) {
	verbs := map[string]func(c *Client, why ws.Close) bool{
		"Close": (*Client).Close,
		"Cut":   func(c *Client, why ws.Close) bool { c.Cut(why); return false },
		"gone":  func(c *Client, why ws.Close) bool { c.gone(why); return false },
	}
	for first, do := range verbs {
		for second, again := range verbs {
			c, m := clientIn(t, Open)
			if was := do(c, CloseMaxAge); was != (first == "Close") {
				t.Errorf("%s: got %v", first, was)
			}
			if again(c, CloseLagged) {
				t.Errorf("%s after %s: got true, want false", second, first)
			}
			if got := c.Cause(); got != CloseMaxAge {
				t.Errorf("%s after %s: got cause %v, want the first", second, first, got)
			}
			if left, _, _ := ownerOf(c).counts(); left != 1 {
				t.Errorf("%s after %s: got Left %d times, want once", second, first, left)
			}
			if want := first == "Cut" || second == "Cut"; m.wasAborted() != want {
				t.Errorf("%s after %s: got the connection aborted %v, want %v", second, first, m.wasAborted(), want)
			}
		}
	}
}

// TestLife_FinishesOnce has the reader end while nobody writes, while a writer runs, and before the writer ends.
func TestLife_FinishesOnce(t *testing.T) {
	for _, s := range []State{Joining, Open, Deaf, Closing, Goodbye, Cut} {
		for _, writes := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/writes=%v", nameOf(s), writes), func(t *testing.T) {
				c, _ := clientIn(t, s)
				if !writes {
					c.stopWriting()
				}
				c.gone(CloseGone)
				c.end()
				if _, finished, _ := ownerOf(c).counts(); (finished == 1) == writes {
					t.Errorf("after the reader's end: got Finished %d times", finished)
				}
				if writes {
					c.endWriting()
				}
				if left, finished, _ := ownerOf(c).counts(); left != 1 || finished != 1 || c.State() != Finished {
					t.Errorf("got Left %d times, Finished %d times and state %s, want each once", left, finished, nameOf(c.State()))
				}
				if c.startWriting() {
					t.Error("a client that has finished is written to")
				}
			})
		}
	}
}

func TestLife_AbandonedClientFinishes(t *testing.T) {
	b := newHub(t)
	c := newTestClient(b.process, "", testAddress(1), defaults())
	if err := b.Join(c, 0); err != nil {
		t.Fatal(err)
	}
	if c.IsConnected() || c.Writable() {
		t.Error("a client is connected before Attach")
	}
	c.Abandon()
	wantEnd(t, c, CloseGone)
	if n := len(b.Clients()); n != 0 {
		t.Errorf("got %d clients left", n)
	}
}

// TestLife_DeadlinesFollowTheState checks until when a connection is waited for.
func TestLife_DeadlinesFollowTheState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		for _, tc := range []struct {
			name        string
			do          func(c *Client)
			read, write time.Time
		}{
			{"opening clears what the HTTP server has left", func(c *Client) { c.hub.open(c) }, time.Time{}, time.Time{}},
			{"a deaf client is read for a while", func(c *Client) { c.hub.open(c); c.hub.mute(c) }, now.Add(closeTimeout), time.Time{}},
			{"a close has its time", func(c *Client) { c.hub.open(c); c.Close(CloseMaxAge) }, now.Add(closeTimeout), now.Add(closeTimeout)},
			{"also before the start", func(c *Client) { c.Close(CloseMaxAge); c.hub.open(c) }, now.Add(closeTimeout), now.Add(closeTimeout)},
			{"and the answer its own", func(c *Client) {
				c.Close(CloseMaxAge)
				time.Sleep(time.Second)
				c.hub.farewell(c, true)
			}, now.Add(time.Second + closeTimeout), now.Add(time.Second + closeTimeout)},
		} {
			now := time.Since(now)
			c, m := clientIn(t, Joining)
			_ = m.SetReadDeadline(longAgo)
			_ = m.SetWriteDeadline(longAgo)
			tc.do(c)
			for _, d := range []struct{ got, want time.Time }{{m.readBy, tc.read}, {m.writeBy, tc.write}} {
				if !d.want.IsZero() {
					d.want = d.want.Add(now)
				}
				if !d.got.Equal(d.want) {
					t.Errorf("%s: got deadlines %v and %v, want %v and %v", tc.name, m.readBy, m.writeBy, tc.read, tc.write)
				}
			}
		}
	})
}

// TestLife_LateAttachedConnectionHasTheDeadlineOfTheClose has a client leave before it has a connection.
func TestLife_LateAttachedConnectionHasTheDeadlineOfTheClose(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		c := joiner{address: testAddress(1)}.member(t, b, defaults())
		c.Close(CloseMaxAge)
		time.Sleep(time.Second)
		m, server := newMemoryConn(0, 0)
		c.Attach(server)
		began := time.Now()
		c.Start()
		synctest.Wait()
		time.Sleep(time.Minute)
		synctest.Wait()
		wantEnd(t, c, CloseMaxAge)
		if sent := m.sent(); len(sent) > 0 {
			t.Errorf("got % x, which nobody has read", sent)
		}
		if c.deadline.After(began.Add(closeTimeout)) {
			t.Errorf("got the deadline %v after the start, want %v", c.deadline.Sub(began), closeTimeout-time.Second)
		}
	})
}

// TestLife_CutDuringTheHandshakeAbortsWhenItStarts cuts a client that has no connection yet.
func TestLife_CutDuringTheHandshakeAbortsWhenItStarts(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		c := joiner{address: testAddress(1)}.member(t, b, defaults())
		c.Cut(CloseKicked)
		m, server := newMemoryConn(0, 0)
		c.Attach(server)
		began := time.Now()
		c.Start()
		synctest.Wait()
		if !m.wasAborted() || len(m.sent()) > 0 || time.Since(began) > 0 {
			t.Errorf("got aborted %v and % x sent, want a reset at once", m.wasAborted(), m.sent())
		}
		wantEnd(t, c, CloseKicked)
	})
}

// TestLife_FinishesBeforeItsOwnerLearnsThatItLeft has the goroutine that ends a client held up behind the client's reader.
func TestLife_FinishesBeforeItsOwnerLearnsThatItLeft(t *testing.T) {
	c, _ := clientIn(t, Open)
	c.stopWriting()
	if !c.hub.leave(c, Closing, CloseShuttingDown) {
		t.Fatal("the client has left before")
	}
	c.gone(CloseGone)
	c.end()
	if left, finished, _ := ownerOf(c).counts(); left != 0 || finished != 1 {
		t.Errorf("got Left %d times and Finished %d times, want it finished", left, finished)
	}
	c.departed()
	c.wake()
	wantEnd(t, c, CloseShuttingDown)
}

// TestLife_EndsOnceHoweverItEnds has clients of every kind end at random in every way: closed, cut, silent, or with their
// connections closed, reset or broken by their peers, several ways at once, while messages go round. The bubble checks that each
// has left once and finished once, and that no goroutine is left.
func TestLife_EndsOnceHoweverItEnds(t *testing.T) {
	t.Parallel()
	for seed := range uint64(30) {
		bubble(t, func(t *testing.T, b *Hub) {
			random := rand.New(rand.NewPCG(seed, 1))
			type pair struct {
				c *Client
				p *peer

				drains bool
			}
			var there []pair
			for range 200 {
				if len(there) == 0 || random.IntN(3) == 0 {
					k := connKinds[random.IntN(len(connKinds))]
					s := presenceOf(random.IntN(2) == 0)
					s.Echo, s.SkipLag, s.BufferMessages = random.IntN(2) == 0, random.IntN(2) == 0, 1+random.IntN(20)
					s.MaxAge = time.Duration(random.IntN(2)) * time.Minute
					c, p := joiner{events: random.IntN(2) == 0, abilities: k.abilities, room: k.room}.join(t, b, s)
					drains := random.IntN(2) == 0
					there = append(there, pair{c, p, drains})
					if drains {
						go p.drain() // ends with the connection
					}
					continue
				}
				i := random.IntN(len(there))
				c, p := there[i].c, there[i].p
				for range 1 + random.IntN(2) {
					switch random.IntN(12) {
					case 0:
						go c.Close(CloseKicked)
					case 1:
						go c.Cut(CloseLagged)
					case 2:
						p.conn.Close()
					case 3:
						p.conn.CloseWrite()
					case 4:
						p.conn.breakWrites()
					case 5:
						go func() { _, _ = p.conn.Write(clientFrame(finBit|ws.CloseMessage, []byte{3, 232})) }()
					case 6:
						go func() { _, _ = p.conn.Write(clientFrame(finBit|opText, []byte("\xff"))) }()
					case 7:
						go func() { _, _ = p.conn.Write(clientFrame(finBit|ws.PingMessage, nil)) }()
					case 8:
						time.Sleep(time.Duration(random.IntN(20_000)) * time.Millisecond)
					default:
						go publishIn(b, textMessage("hello"))
					}
				}
				if c.State() == Finished {
					there = append(there[:i], there[i+1:]...)
				}
			}
			for _, x := range there {
				if !x.drains {
					go x.p.drain()
				}
			}
			time.Sleep(time.Minute)
			for _, x := range there {
				x.p.conn.Close()
			}
		})
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}
