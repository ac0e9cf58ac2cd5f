package hub

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/conn"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// TestTurns_BurstLagsNoReader sends many times the buffer as fast as the hub takes it, to clients that read as fast as they
// can, on connections of every kind. In a bubble no reader is starved of the processor: time stands still while one runs.
func TestTurns_BurstLagsNoReader(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name                    string
		abilities               ability
		room                    int
		clients, messages, size int
	}{
		{"with attempts", triesWrites | waits, 64 << 10, 60, 1500, 0},
		{"without", waits | readsAhead, 64 << 10, 60, 1500, 0},
		{"with attempts, more than connections hold", triesWrites | waits, 16 << 10, 4, 200, 20_000},
		{"without, more than connections hold", 0, 16 << 10, 4, 200, 20_000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, b *Hub) {
				var readers sync.WaitGroup
				var peers []*peer
				for i := range tc.clients {
					_, p := joiner{abilities: tc.abilities, room: tc.room}.join(t, b, defaults())
					peers = append(peers, p)
					readers.Go(func() {
						for j := range tc.messages {
							p.patient()
							f, err := p.readFrame()
							if err != nil || strings.TrimLeft(f.payload, " ") != fmt.Sprint(j) {
								t.Errorf("client %d: got %.60q, error %v, want message %d", i, strings.TrimLeft(f.payload, " "), err, j)
								return
							}
						}
					})
				}
				var burst []byte
				for j := range tc.messages {
					burst = append(burst, clientFrame(finBit|opText, fmt.Appendf(nil, "%*d", tc.size, j))...)
				}
				began := time.Now()
				peers[0].write(burst)
				readers.Wait()
				if took := time.Since(began); took > 0 {
					t.Errorf("the sender waited %v, want no wait: everybody reads", took)
				}
			})
		})
	}
}

// TestTurns_BurstOverSocketsLagsNoReader is TestTurns_BurstLagsNoReader with sockets, in real time. What separates the readers
// is only which of them gets the processor when.
//
// A client whose socket is full for writerPatience counts as slow, and that may befall a reader of this process when others
// keep the processors busy. So a reader that is cut must have had much to read, and not have read it, for about as long. Then
// the burst is sent again. Once, all readers must get all of it.
func TestTurns_BurstOverSocketsLagsNoReader(t *testing.T) {
	for _, tc := range []struct {
		name                    string
		tls                     bool
		clients, messages, size int
	}{
		{"plain", false, 60, 1500, 0},
		{"TLS", true, 60, 1500, 0},
		{"plain, more than sockets hold", false, 4, 400, 20_000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var burst []byte
			for j := range tc.messages {
				burst = append(burst, clientFrame(finBit|opText, fmt.Appendf(nil, "%*d", tc.size, j))...)
			}
			for range 20 {
				if sendsToAll(t, newSockets(t, tc.tls, tc.clients), burst, tc.messages) || t.Failed() {
					return
				}
				t.Log("a reader was starved of the processor: once more")
			}
			t.Error("some reader was starved of the processor each time")
		})
	}
}

// sendsToAll reports whether the burst, sent by the first of the clients, reaches all of them.
func sendsToAll(t *testing.T, clients []*lateReader, burst []byte, messages int) bool {
	t.Helper()
	var readers sync.WaitGroup
	var failed sync.Once
	all := true
	closeAll := func() {
		for _, c := range clients {
			c.Close()
		}
	}
	for i, late := range clients {
		r := bufio.NewReaderSize(late, muchToRead)
		_ = late.SetDeadline(time.Now().Add(patience))
		readers.Go(func() {
			for j := range messages {
				f, err := readFrame(r)
				if err == nil && strings.TrimLeft(f.payload, " ") == fmt.Sprint(j) {
					continue
				}
				failed.Do(func() {
					all = false
					if f != closeFrame(CloseLagged) || late.longest < writerPatience {
						t.Errorf("client %d: got %.60q, error %v, want message %d; it was late by %v at most",
							i, strings.TrimLeft(f.payload, " "), err, j, late.longest)
					}
					closeAll() // the others may wait in vain: this may be the sender
				})
				return
			}
		})
	}
	_, _ = clients[0].Write(burst) // the readers notice what is not sent
	readers.Wait()
	closeAll()
	return all
}

// muchToRead is so many bytes, more than the server sends in one write, that they only come together while nobody reads. A read
// over TLS returns less, so there no reader counts as late.
const muchToRead = 2 * feed.MaxWrite

// A lateReader notes how late it was to read what had come.
type lateReader struct {
	net.Conn
	last    time.Time     // when it had read before, or began
	longest time.Duration // after that, that it came back and found much to read
}

func (l *lateReader) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	now := time.Now()
	if n >= muchToRead {
		l.longest = max(l.longest, now.Sub(l.last))
	}
	l.last = now
	return n, err
}

// newSockets joins clients of a new hub over TCP or TLS, and returns their peers. At the end of the test all must be finished.
func newSockets(t *testing.T, overTLS bool, n int) []*lateReader {
	t.Helper()
	if overTLS {
		return newSocketsOver(t, n, func(server net.Conn, _ int) net.Conn { return server })
	}
	return newSocketsOver(t, n, nil)
}

// newSocketsOver is newSockets over TLS above what below returns, or over TCP where below is nil.
func newSocketsOver(t *testing.T, n int, below func(server net.Conn, i int) net.Conn) []*lateReader {
	t.Helper()
	b := newHub(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	var serverTLS *tls.Config
	if below != nil {
		serverTLS = &tls.Config{Certificates: []tls.Certificate{selfSigned(t)}}
	}
	var peers []*lateReader
	var clients []*Client
	for i := range n {
		nc, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = nc.(*net.TCPConn).SetReadBuffer(2 * muchToRead) // or so much would not fit at first
		server, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if below != nil {
			s, c := tls.Server(below(server, i), serverTLS), tls.Client(nc, &tls.Config{InsecureSkipVerify: true})
			shaken := make(chan error)
			go func() { shaken <- s.Handshake() }()
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			if err := <-shaken; err != nil {
				t.Fatal(err)
			}
			server, nc = s, c
		}
		c := joiner{address: testAddress(1)}.member(t, b, defaults())
		c.Attach(conn.Wrap(server, nil))
		c.Start()
		peers, clients = append(peers, &lateReader{Conn: nc, last: time.Now()}), append(clients, c)
	}
	t.Cleanup(func() {
		for _, p := range peers {
			p.Close()
		}
		eventually(t, "all clients to finish", func() bool {
			for _, c := range clients {
				if c.State() != Finished {
					return false
				}
			}
			return true
		})
	})
	return peers
}

// TestTurns_FlusherThatMustWaitIsRelieved has a client's attempt wait, and then its peer read.
func TestTurns_FlusherThatMustWaitIsRelieved(t *testing.T) {
	for _, reads := range []bool{true, false} {
		t.Run(fmt.Sprintf("reads=%v", reads), func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				settings := unpinged(defaults())
				stuck, p := joiner{abilities: triesWrites | mayWait, room: 100}.join(t, b, settings)
				_, other := connect(t, b, settings)
				synctest.Wait()
				large := strings.Repeat("x", 1000)
				began := time.Now()
				publishIn(b, textMessage(large))
				other.wantText(large)
				if took := time.Since(began); took > 2*flusherPatience {
					t.Errorf("the other client waited %v, want %v at most", took, 2*flusherPatience)
				}
				time.Sleep(2 * flusherPatience) // by now the flusher is relieved, whomever it has served first
				for range 3 {
					began := time.Now()
					publishIn(b, textMessage("next"))
					other.wantText("next")
					if took := time.Since(began); took > 0 {
						t.Errorf("the other client waited %v, want no wait", took)
					}
				}
				if reads {
					p.wantText(large)
					for range 3 {
						p.wantText("next")
					}
					time.Sleep(2 * settings.WriteTimeout) // no deadline is left of the relief
					publishIn(b, textMessage("last"))
					p.wantText("last")
					other.wantText("last")
					return
				}
				time.Sleep(settings.WriteTimeout + 2*flusherPatience)
				synctest.Wait()
				wantEnd(t, stuck, CloseWriteTimeout)
			})
		})
	}
}

// TestTurns_ManyThatMakeFlushersWaitHoldUpOthersOnce has the attempts of more and more clients wait.
func TestTurns_ManyThatMakeFlushersWaitHoldUpOthersOnce(t *testing.T) {
	for _, n := range []int{1, 10, 1000} {
		bubble(t, func(t *testing.T, b *Hub) {
			settings := unpinged(defaults())
			for range n {
				joiner{abilities: triesWrites | mayWait, room: 100}.join(t, b, settings)
			}
			_, other := connect(t, b, settings)
			synctest.Wait()
			large := strings.Repeat("x", 1000)
			began := time.Now()
			publishIn(b, textMessage(large))
			other.wantText(large)
			if took := time.Since(began); took > 2*flusherPatience {
				t.Errorf("beside %d such clients another one waited %v, want at most %v", n, took, 2*flusherPatience)
			}
			time.Sleep(3 * settings.WriteTimeout) // until they are cut
		})
	}
}

// selfSigned returns a certificate that nobody trusts.
func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestFlush_StuckClientDelaysNobody measures, in the bubble's time, how fast messages go round beside clients that take
// nothing, some of which get stuck again and again.
func TestFlush_StuckClientDelaysNobody(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, b *Hub) {
		skip := defaults()
		skip.SkipLag, skip.WriteTimeout = true, time.Hour
		for i := range 40 {
			abilities := triesWrites | waits
			if i%2 == 0 {
				abilities = waits | readsAhead
			}
			joiner{abilities: abilities, room: 256 << 10}.join(t, b, skip)
		}
		_, a := joiner{abilities: triesWrites | waits, room: 256 << 10}.join(t, b, skip)
		_, c := joiner{abilities: waits | readsAhead, room: 256 << 10}.join(t, b, skip)
		payload := strings.Repeat("x", 60_000)
		began := time.Now()
		for range 100 { // 6 MB: more than the connections hold, and the buffer
			a.text(payload)
			a.wantText(payload)
			c.wantText(payload)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("100 messages took %v, want less than a second", took)
		}
	})
}

// TestTurns_SenderWaitsForReadersOnly has a client that reads a little later than others, and one that does not read.
func TestTurns_SenderWaitsForReadersOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := defaults()
		settings.BufferMessages = 40
		ada := s.join("ada", settings, false, nil)
		s.serve()
		for range 11 { // a quarter of the buffer, and one more
			publishIn(s.hub, textMessage("x"))
		}
		published := make(chan time.Duration, 1)
		go func() {
			began := time.Now()
			r, _ := publishIn(s.hub, textMessage("one too many"))
			if r.waited != time.Since(began) {
				t.Errorf("got %v as the wait, want %v", r.waited, time.Since(began))
			}
			published <- r.waited
		}()
		time.Sleep(3*writerPatience + time.Millisecond)
		synctest.Wait()
		if len(published) > 0 {
			t.Fatal("the sender does not wait for a client that has its turn")
		}
		s.serve()
		if waited := <-published; waited != 3*writerPatience+time.Millisecond {
			t.Errorf("got the sender let go after %v, want when the turn ended", waited)
		}
		if got := len(ada.frames()); got != 11 {
			t.Errorf("got %d messages, want 11", got)
		}

		// Its own writer serves ada now, and gets stuck.
		s.serve()
		ada.stuck = true
		for range 11 {
			publishIn(s.hub, textMessage("x"))
		}
		s.serve()
		go func() {
			r, _ := publishIn(s.hub, textMessage("one too many"))
			published <- r.waited
		}()
		if waited := <-published; waited != 2*writerPatience {
			t.Errorf("got the sender let go after %v, want after two looks, %v", waited, 2*writerPatience)
		}
		ada.take()
		s.leave(ada)
	})
}

// TestTurns_LooksAreBounded has a client that always says it could be written to, and is not.
func TestTurns_LooksAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := defaults()
		settings.BufferMessages = 4
		ada := s.join("ada", settings, false, nil)
		s.serve()
		ada.Attach(alwaysWritable{})
		ada.stuck = true
		for range 2 {
			publishIn(s.hub, textMessage("x"))
		}
		s.serve()
		r, _ := publishIn(s.hub, textMessage("one too many"))
		if want := maxLooks * writerPatience; r.waited != want {
			t.Errorf("got a wait of %v, want %v", r.waited, want)
		}
		s.leave(ada)
	})
}

// An alwaysWritable connection says that it has room.
type alwaysWritable struct{ nowhere }

func (alwaysWritable) Writable() bool { return true }

// TestTurns_PongsComeBeforeLaterMessages has pings answered while messages are on their way, on connections of every kind.
func TestTurns_PongsComeBeforeLaterMessages(t *testing.T) {
	for _, k := range connKinds {
		t.Run(k.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				_, p := joiner{abilities: k.abilities, room: k.room}.join(t, b, defaults())
				for i := range 10 {
					p.send(ws.PingMessage, fmt.Sprint("ping ", i))
					p.text(fmt.Sprint("text ", i))
					if f, want := p.next(), (frame{ws.PongMessage, fmt.Sprint("ping ", i)}); f != want {
						t.Fatalf("got %v, want %v", f, want)
					}
					p.wantText(fmt.Sprint("text ", i))
				}
				for i := range 3 { // and pongs of the client, alone and before a message
					p.send(ws.PongMessage, "")
					synctest.Wait()
					p.write(bytes.Join([][]byte{
						clientFrame(finBit|ws.PongMessage, []byte("x")),
						clientFrame(finBit|ws.PongMessage, nil),
						clientFrame(finBit|opText, fmt.Append(nil, i)),
					}, nil))
					p.wantText(fmt.Sprint(i))
				}
				_ = p.conn.SetReadDeadline(time.Now())
				if rest, _ := io.ReadAll(p.r); len(rest) > 0 {
					t.Errorf("got % x behind the last message", rest)
				}
			})
		})
	}
}

// TestTurns_QueuedClientThatLagsIsClosed has so many messages appended while a client waits for a flusher that the client lags.
func TestTurns_QueuedClientThatLagsIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := defaults()
		settings.BufferMessages = 4
		ada := s.join("ada", settings, false, nil)
		s.serve() // idle
		b := s.hub
		b.mu.Lock()
		for range 6 {
			m := textMessage("x")
			b.submitLocked(nil, &m, new(Receipt))
			b.applyLocked(&m, new(work))
		}
		b.mu.Unlock()
		if ada.turn != turnQueued {
			t.Fatalf("got turn %d, want the client queued", ada.turn)
		}
		b.flush() // and the client's own writer says goodbye
		synctest.Wait()
		if left, _, _ := ownerOf(ada.Client).counts(); left != 1 || ada.Cause() != CloseLagged || ada.State() != Goodbye {
			t.Errorf("got Left %d times, cause %v and state %s, want it lagged, once", left, ada.Cause(), nameOf(ada.State()))
		}
		ada.end()
		wantEnd(t, ada.Client, CloseLagged)
	})
}

// TestTurns_ControlFrameDuringATurnIsSent has a pong become due after a flusher has looked for one, when it has the right to
// write.
func TestTurns_ControlFrameDuringATurnIsSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		ada := s.join("ada", defaults(), false, nil)
		s.serve()
		publishIn(s.hub, textMessage("x"))
		c, frames, n, p := s.hub.serve(nil)
		if c != ada.Client || len(frames) == 0 || n != 1 || p != progressFrames {
			t.Fatalf("got %v, %q, %d, %d, want the client's message", c, frames, n, p)
		}
		ada.push(ws.PongMessage, []byte("due"))
		c, frames, _, p = s.hub.serve(c)
		if c != ada.Client || frames != nil || p != progressIdle || !ada.isWriting() {
			t.Errorf("got %v, %q, %d, want the client again, for a writer of its own", c, frames, p)
		}
		ada.write()
		if got := ada.frames(); len(got) != 1 || got[0] != "due" {
			t.Errorf("got %q, want the pong", got)
		}
		if c, _, _, _ := s.hub.serve(nil); c != nil {
			t.Errorf("got a turn for %v, want none", c.id)
		}
		s.leave(ada)
	})
}

// TestTurns_ClientWithAWriterGetsNoSecondOne publishes while an idle client's writer runs for a pong.
func TestTurns_ClientWithAWriterGetsNoSecondOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		ada := s.join("ada", defaults(), false, nil)
		s.serve()
		if !ada.startWriting() {
			t.Fatal("the client is written to")
		}
		publishIn(s.hub, textMessage("x"))
		if ada.turn != turnWriter || s.hub.turns.open != 1 || s.hub.turns.queued != 0 || s.hub.idle != 0 {
			t.Errorf("got turn %d, %+v, %d idle, want a turn for the client's own writer", ada.turn, s.hub.turns, s.hub.idle)
		}
		ada.write()
		if got := ada.frames(); len(got) != 1 || ada.turn != turnNone || s.hub.turns.open != 0 || s.hub.idle != 1 {
			t.Errorf("got %q, turn %d, %d open turns, %d idle, want the message, and the client idle", got, ada.turn, s.hub.turns.open, s.hub.idle)
		}
		s.leave(ada)
	})
}
