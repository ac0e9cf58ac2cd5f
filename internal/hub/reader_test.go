package hub

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// TestReader_RefusesWhatTheProtocolForbids sends faulty frames on connections of every kind.
func TestReader_RefusesWhatTheProtocolForbids(t *testing.T) {
	small := defaults()
	small.MaxMessageSize = 100
	for _, tc := range []struct {
		name  string
		frame []byte
		want  ws.Close
	}{
		{"text that is no UTF-8", clientFrame(finBit|opText, []byte("ab\xff")), ws.InvalidUTF8},
		{"text that ends in the middle of a character", clientFrame(finBit|opText, []byte("ab\xc3")), ws.InvalidUTF8},
		{"a message that is too large", clientFrame(finBit|opText, make([]byte, 101)), ws.TooBig},
		{"a reserved opcode", clientFrame(finBit|3, nil), ws.ProtocolError},
		{"an unmasked frame", []byte{finBit | opText, 1, 'x'}, ws.ProtocolError},
		{"a close frame of one byte", clientFrame(finBit|ws.CloseMessage, []byte{3}), ws.ProtocolError},
		{"a close frame without a code", clientFrame(finBit|ws.CloseMessage, nil), ws.Close{Code: ws.CloseNoStatusReceived}},
	} {
		for _, k := range connKinds {
			t.Run(tc.name+"/"+k.name, func(t *testing.T) {
				bubble(t, func(t *testing.T, b *Hub) {
					c, p := joiner{abilities: k.abilities, room: k.room}.join(t, b, small)
					p.write(tc.frame)
					if tc.want.Code == ws.CloseNoStatusReceived {
						if f := p.next(); f.opcode != ws.CloseMessage || f.payload != "" {
							t.Errorf("got %v, want an empty close", f)
						}
					} else {
						p.wantClose(tc.want)
					}
					p.conn.Close()
					synctest.Wait()
					wantEnd(t, c, tc.want)
				})
			})
		}
	}
}

// TestReader_LargeMessagesTakeFromTheSharedMemory has messages arrive in part while an address has its share.
func TestReader_LargeMessagesTakeFromTheSharedMemory(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		const most = 64 << 10
		b.process.Incoming.SetMost(most)
		join := func(n int) (*Client, *peer) {
			return joiner{address: testAddress(n), abilities: waits, room: 1 << 20}.join(t, b, defaults())
		}
		first, a := join(1)
		half := clientFrame(finBit|ws.BinaryMessage, make([]byte, 30_000))
		a.write(half[:20_000])
		synctest.Wait()
		if got := b.process.Incoming.Used(); got < 16<<10 || got > most/2 {
			t.Errorf("got %d bytes taken, want those of the buffer", got)
		}
		second, c := join(1)
		_, d := join(2)
		began := time.Now()
		go func() { _, _ = c.conn.Write(half) }() // fails when it is closed
		time.Sleep(time.Second)
		go d.write(clientFrame(finBit|ws.BinaryMessage, make([]byte, 10_000)))
		if f := d.next(); len(f.payload) != 10_000 {
			t.Errorf("another address: got %d bytes, want its message", len(f.payload))
		}
		for f := c.next(); ; f = c.next() {
			if f.opcode == ws.BinaryMessage {
				continue
			}
			if f != closeFrame(CloseBusy) {
				t.Errorf("the same address: got %v, want %v", f.opcode, closeFrame(CloseBusy))
			}
			break
		}
		if took := time.Since(began); took < time.Second || took > 5*time.Second {
			t.Errorf("got it closed after %v, want some seconds", took)
		}
		c.conn.Close()
		a.write(half[20_000:])
		for f := a.next(); len(f.payload) != 30_000; f = a.next() {
			if len(f.payload) != 10_000 {
				t.Fatalf("got %d bytes, want a message", len(f.payload))
			}
		}
		synctest.Wait()
		if got := b.process.Incoming.Used(); got != 0 {
			t.Errorf("got %d bytes left, want everything given back", got)
		}
		wantEnd(t, second, CloseBusy)
		if first.hasLeft() {
			t.Errorf("got the first client closed with %v", first.Cause())
		}
	})
}

// TestReader_OverheadIsPaced sends pings as fast as the server reads them.
func TestReader_OverheadIsPaced(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		c, p := joiner{abilities: triesWrites | waits, room: 1 << 20}.join(t, b, defaults())
		go p.drain()
		ping := clientFrame(finBit|ws.PingMessage, []byte(strings.Repeat("x", 120)))
		pings := bytes.Repeat(ping, 10*maxOverhead/len(ping))
		began := time.Now()
		p.write(pings)
		p.write(pings[:len(ping)]) // read when the others have been paid for
		synctest.Wait()
		if took, least := time.Since(began), 9*overheadPause; took < least {
			t.Errorf("got %d bytes of pings read in %v, want at least %v", len(pings), took, least)
		}
		synctest.Wait()
		if c.overhead > maxOverhead {
			t.Errorf("got %d bytes of overhead that are not paid for, want less than %d", c.overhead, maxOverhead)
		}
		began = time.Now()
		message := clientFrame(finBit|opText, []byte(strings.Repeat("x", 10_000)))
		for range 100 {
			p.write(message)
		}
		synctest.Wait()
		if took := time.Since(began); took > overheadPause {
			t.Errorf("got 100 messages read in %v, want no pause for them", took)
		}
	})
}

// TestReader_HasNoBufferBetweenMessages looks at clients that wait, on connections that can be waited for without one.
func TestReader_HasNoBufferBetweenMessages(t *testing.T) {
	for _, k := range connKinds {
		t.Run(k.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				c, p := joiner{abilities: k.abilities, room: k.room}.join(t, b, defaults())
				for _, sent := range [][]byte{
					nil,
					clientFrame(finBit|opText, []byte("hello")),
					clientFrame(finBit|ws.PongMessage, nil),
					append(clientFrame(finBit|ws.PongMessage, nil), clientFrame(finBit|opText, []byte("hello"))...),
				} {
					if len(sent) > 0 {
						p.write(sent)
					}
					synctest.Wait()
					if own := c.waiter == nil; (c.in.Buffered() > 0) || own == (k.abilities&waits != 0) {
						t.Errorf("after % x: got %d bytes buffered, a buffer of its own: %v", sent, c.in.Buffered(), own)
					}
				}
			})
		})
	}
}

// TestReader_SilenceIsCountedOnConnectionsOfEveryKind is TestClient_PingsTheSilentAndCutsTheDead for all of them.
func TestReader_SilenceIsCountedOnConnectionsOfEveryKind(t *testing.T) {
	for _, k := range connKinds {
		t.Run(k.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				c, p := joiner{abilities: k.abilities, room: k.room}.join(t, b, defaults())
				interval, timeout := c.settings.PingInterval, c.settings.PingTimeout
				_ = p.conn.SetReadDeadline(time.Time{})
				last := time.Now()
				for i := range 3 {
					f, err := p.readFrame()
					if err != nil || f.opcode != ws.PingMessage {
						t.Fatalf("got %v, %v, want a ping", f, err)
					}
					if got := time.Since(last); got > interval || i > 0 && got != interval {
						t.Errorf("ping %d: got it after %v, want %v", i, got, interval)
					}
					p.send(ws.PongMessage, f.payload)
					synctest.Wait()
					last = time.Now()
				}
				if f := p.mustRead(); f.opcode != ws.PingMessage {
					t.Fatalf("got %v, want a ping", f)
				}
				asked := time.Now()
				p.wantEOFWithin(2 * timeout)
				if got := time.Since(asked); got != timeout {
					t.Errorf("got cut %v after the ping, want %v", got, timeout)
				}
				synctest.Wait()
				wantEnd(t, c, ClosePingTimeout)
				if !p.conn.wasAborted() {
					t.Error("the connection was closed politely")
				}
			})
		})
	}
}

func (p *peer) mustRead() frame {
	p.t.Helper()
	f, err := p.readFrame()
	if err != nil {
		p.t.Fatal(err)
	}
	return f
}

// wantEOFWithin fails unless the connection ends in time.
func (p *peer) wantEOFWithin(d time.Duration) {
	p.t.Helper()
	_ = p.conn.SetReadDeadline(time.Now().Add(d))
	if f, err := p.readFrame(); err == nil || hasPassed(*p.conn.by) {
		p.t.Fatalf("got %v, %v, want the end", f, err)
	}
}

// TestReader_TrafficIsCounted compares a client's counts, and those of the process, with what was sent.
func TestReader_TrafficIsCounted(t *testing.T) {
	for _, k := range connKinds {
		t.Run(k.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *Hub) {
				c, p := joiner{abilities: k.abilities, room: k.room}.join(t, b, defaults())
				in := 0
				for i := range 10 {
					frame := clientFrame(finBit|opText, fmt.Append(nil, i))
					if i%2 == 1 {
						frame = clientFrame(finBit|ws.BinaryMessage, fmt.Append(nil, i))
					}
					p.write(frame)
					in += len(frame)
					p.next()
				}
				synctest.Wait()
				sent := len(p.conn.sent())
				want := Traffic{MessagesIn: 10, MessagesOut: 10, BytesIn: uint64(in), BytesOut: uint64(sent)}
				if got := c.Traffic(); got != want {
					t.Errorf("got %+v, want %+v", got, want)
				}
				n := &b.process.Counters
				if n.ReceivedTexts.Load() != 5 || n.ReceivedBinaries.Load() != 5 || n.BytesReceived.Load() != uint64(in) {
					t.Errorf("got %d texts, %d binaries and %d bytes received, want 5, 5 and %d",
						n.ReceivedTexts.Load(), n.ReceivedBinaries.Load(), n.BytesReceived.Load(), in)
				}
				if w := n.Written(); w.Messages != 10 || w.Bytes != uint64(sent) {
					t.Errorf("got %d messages and %d bytes written, want 10 and %d", w.Messages, w.Bytes, sent)
				}
			})
		})
	}
}

// TestReader_WaitingIsNoWork has a client wait for a message of a minute's length, beside a client of another address.
func TestReader_WaitingIsNoWork(t *testing.T) {
	bubble(t, func(t *testing.T, b *Hub) {
		other := b.process.Processors.Enter(testAddress(1))
		defer other.Leave()
		settings := defaults()
		settings.PingInterval = 0
		c, p := joiner{address: testAddress(2)}.join(t, b, settings)
		if !b.process.Processors.Shared() {
			t.Fatal("nothing is measured while an address is alone")
		}
		frame := clientFrame(finBit|opText, []byte(strings.Repeat("x", 100)))
		for i := range frame {
			p.write(frame[i : i+1])
			time.Sleep(time.Second / 2)
		}
		p.wantText(strings.Repeat("x", 100))
		p.conn.Close()
		synctest.Wait()
		if got := c.meter.Owed(); got > time.Millisecond {
			t.Errorf("got %v of work, want next to nothing", got)
		}
	})
}
