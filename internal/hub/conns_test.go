package hub

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// connKinds are the kinds of connections that a hub meets.
var connKinds = []struct {
	name      string
	abilities ability
	room      int
}{
	{"neither, unbuffered", 0, 0},
	{"neither", 0, 4 << 10},
	{"TryWriter", triesWrites, 4 << 10},
	{"Waiter", waits, 4 << 10},
	{"Waiter that reads ahead", waits | readsAhead | halfCloses, 4 << 10},
	{"both", triesWrites | waits | halfCloses, 4 << 10},
	{"both, small", triesWrites | waits, 7},
	{"attempts that wait", triesWrites | mayWait | waits | readsAhead | halfCloses, 4 << 10},
}

// TestConns_SameBytesArrive has peers on connections of every kind send and receive, and compares what each has received.
func TestConns_SameBytesArrive(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		const rounds = 20
		var peers []*peer
		got := make([][]frame, len(connKinds))
		var readers sync.WaitGroup
		for i, k := range connKinds {
			_, p := joiner{abilities: k.abilities, room: k.room}.join(t, b, defaults())
			peers = append(peers, p)
			readers.Go(func() {
				for {
					f, err := p.readFrame()
					if err != nil {
						return
					}
					got[i] = append(got[i], f)
				}
			})
		}
		var want []frame
		for round := range rounds {
			for i, p := range peers {
				payload := fmt.Sprintf("%d/%d/%s", round, i, strings.Repeat("x", round*round*round))
				p.text(payload)
				synctest.Wait()
				want = append(want, frame{ws.TextMessage, payload})
			}
		}
		synctest.Wait()
		for _, p := range peers {
			p.conn.Close()
		}
		readers.Wait()
		for i, k := range connKinds {
			if !slices.Equal(got[i], want) {
				t.Errorf("%s: got %d messages, want the %d that were sent, in order", k.name, len(got[i]), len(want))
			}
		}
		if tried := peers[5].conn.tries; tried == 0 {
			t.Error("no attempt was made on a connection that can")
		}
	})
}

// TestConns_StuckPeersHoldUpNobody has a peer that reads nothing on a connection of each kind, and measures in the bubble's
// time how long messages take to the others.
func TestConns_StuckPeersHoldUpNobody(t *testing.T) {
	t.Parallel()
	for _, k := range connKinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, b *Hub) {
				settings := defaults()
				settings.SkipLag, settings.WriteTimeout, settings.BufferBytes = true, time.Hour, 16<<10
				stuck, _ := joiner{abilities: k.abilities, room: k.room}.join(t, b, settings)
				var readers []*peer
				for _, other := range connKinds {
					_, p := joiner{abilities: other.abilities, room: other.room}.join(t, b, settings)
					readers = append(readers, p)
				}
				began := time.Now()
				const messages = 100
				payload := strings.Repeat("x", 500) // all together three times the buffer
				var reading sync.WaitGroup
				for i, p := range readers {
					reading.Go(func() {
						for n := range messages {
							if got, want := p.next(), fmt.Sprint(n, payload); got.payload != want {
								t.Errorf("%s: got %.20q, want %.20q", connKinds[i].name, got.payload, want)
								return
							}
						}
					})
				}
				for n := range messages {
					if _, ok := publishIn(b, textMessage(fmt.Sprint(n, payload))); !ok {
						t.Fatal("the hub is closed")
					}
				}
				reading.Wait()
				// Whoever publishes far ahead finds out once, within two looks, that the client is blocked. Before that its flusher
				// may have to be relieved.
				most := 2 * writerPatience
				if k.abilities&mayWait != 0 {
					most += 2 * flusherPatience
				}
				if took := time.Since(began); took > most {
					t.Errorf("got %v for %d messages, want at most %v", took, messages, most)
				}
				if stuck.hasLeft() {
					t.Errorf("got the stuck client closed with %v, want it there until its write timeout", stuck.Cause())
				}
			})
		})
	}
}

// TestConns_ClosesArePolite ends clients on connections of each kind in each way that has a close frame.
func TestConns_ClosesArePolite(t *testing.T) {
	for _, k := range connKinds {
		t.Run(k.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				join := joiner{abilities: k.abilities, room: k.room}
				for _, first := range []string{"server", "client"} {
					c, p := join.join(t, b, defaults())
					publishIn(b, textMessage("before"))
					began := time.Now()
					if first == "server" {
						c.Close(CloseKicked)
						publishIn(b, textMessage("after"))
						p.wantText("before")
						p.wantClose(CloseKicked)
						p.send(ws.CloseMessage, "\x03\xf0")
						p.wantEOF()
						p.conn.Close()
					} else {
						p.send(ws.CloseMessage, "\x03\xe8bye")
						p.wantText("before")
						if f := p.next(); f.opcode != ws.CloseMessage || f.payload[:2] != "\x03\xe8" {
							t.Errorf("got %v, want a close with 1000", f)
						}
						p.wantEOF() // it waits for the server to close (RFC 6455 §7.1.1)
						p.conn.Close()
					}
					synctest.Wait()
					if took := time.Since(began); took > 0 {
						t.Errorf("closed by the %s: got the end after %v, want at once", first, took)
					}
					want := CloseKicked
					if first == "client" {
						want = ws.Close{Code: ws.CloseNormalClosure}
					}
					wantEnd(t, c, want)
				}
			})
		})
	}
}

// TestConns_PeerThatHasClosedItsHalfGetsWhatIsDue has a peer stop sending, without a close frame, while messages are on their
// way to it.
func TestConns_PeerThatHasClosedItsHalfGetsWhatIsDue(t *testing.T) {
	for _, k := range connKinds {
		t.Run(k.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				c, p := joiner{abilities: k.abilities, room: k.room}.join(t, b, defaults())
				synctest.Wait()
				payload := strings.Repeat("x", 10_000)
				publishIn(b, textMessage(payload))
				p.send(ws.CloseMessage, "\x03\xe8")
				p.conn.CloseWrite()
				synctest.Wait()
				p.wantText(payload)
				if f := p.next(); f.opcode != ws.CloseMessage {
					t.Errorf("got %v, want a close", f)
				}
				p.wantEOF()
				synctest.Wait()
				wantEnd(t, c, ws.Close{Code: ws.CloseNormalClosure})
			})
		})
	}
}

// TestConns_DeafClientIsStillRead breaks the writes of connections whose peers have sent something before they went.
func TestConns_DeafClientIsStillRead(t *testing.T) {
	for _, k := range connKinds {
		t.Run(k.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				c, p := joiner{abilities: k.abilities, room: k.room}.join(t, b, defaults())
				_, other := connect(t, b, defaults())
				synctest.Wait()
				p.conn.breakWrites()
				go publishIn(b, textMessage("not for the broken"))
				other.wantText("not for the broken")
				synctest.Wait()
				if c.State() != Deaf || b.Size() != 2 {
					t.Fatalf("got state %s and %d members, want deaf and 2", nameOf(c.State()), b.Size())
				}
				go p.text("sent before") // ends when it is read
				other.wantText("sent before")
				p.send(ws.CloseMessage, "\x03\xe9")
				p.conn.CloseWrite()
				synctest.Wait()
				wantEnd(t, c, ws.Close{Code: ws.CloseGoingAway})
			})
		})
	}
}

// TestConns_DeafClientIsNotReadForLong breaks the writes of a connection and leaves the rest open.
func TestConns_DeafClientIsNotReadForLong(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		c, p := joiner{abilities: triesWrites | waits, room: 4 << 10}.join(t, b, defaults())
		synctest.Wait()
		p.conn.breakWrites()
		publishIn(b, textMessage("x"))
		time.Sleep(closeTimeout - time.Millisecond)
		if c.State() != Deaf {
			t.Errorf("got state %s, want deaf", nameOf(c.State()))
		}
		time.Sleep(closeTimeout + 2*time.Millisecond) // what comes after the cause is decided is read, too
		synctest.Wait()
		wantEnd(t, c, CloseGone)
	})
}

// TestConns_SlowPeerIsNotCut has a peer take a little at a time, in each case before the write timeout.
func TestConns_SlowPeerIsNotCut(t *testing.T) {
	for _, k := range connKinds {
		if k.abilities&triesWrites == 0 || k.abilities&mayWait != 0 {
			continue // a write that has timed out cannot go on
		}
		t.Run(k.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				settings := defaults()
				settings.PingInterval = 0
				c, p := joiner{abilities: k.abilities, room: k.room}.join(t, b, settings)
				payload := strings.Repeat("x", 10*k.room)
				publishIn(b, textMessage(payload))
				var got []byte
				for range 10 {
					time.Sleep(settings.WriteTimeout - time.Second)
					some := make([]byte, k.room)
					n, err := p.conn.Read(some)
					if err != nil {
						t.Fatalf("got cut: %v", err)
					}
					got = append(got, some[:n]...)
				}
				rest := make([]byte, k.room)
				synctest.Wait()
				n, _ := p.conn.Read(rest)
				got = append(got, rest[:n]...)
				if want := ws.AppendFrame(nil, ws.TextMessage, []byte(payload)); !bytes.Equal(got, want) {
					t.Errorf("got %d bytes, want the %d of the frame", len(got), len(want))
				}
				synctest.Wait()
				if c.hasLeft() {
					t.Errorf("got %v, want the client there", c.Cause())
				}
			})
		})
	}
}

// TestConns_PanicWhileWritingCutsTheClientAlone has the connection panic, in an attempt and in a write.
func TestConns_PanicWhileWritingCutsTheClientAlone(t *testing.T) {
	for _, k := range connKinds {
		t.Run(k.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				c, p := joiner{abilities: k.abilities, room: k.room}.join(t, b, defaults())
				_, other := connect(t, b, defaults())
				synctest.Wait()
				p.conn.mu.Lock()
				p.conn.bug = true
				p.conn.mu.Unlock()
				go publishIn(b, textMessage("x"))
				other.wantText("x")
				synctest.Wait()
				wantEnd(t, c, CloseInternal)
				if _, _, panics := ownerOf(c).counts(); panics == 0 {
					t.Error("nobody learned of the panic")
				}
				if !p.conn.wasAborted() {
					t.Error("the connection goes on in the middle of a frame, for all we know")
				}
			})
		})
	}
}
