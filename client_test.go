package chatbroadcast

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/time/rate"
)

// defaults returns the settings of the bare directive.
func defaults() *settings {
	return &settings{
		echo:           true,
		maxMessageSize: defaultMaxMessageSize,
		bufferMessages: defaultBufferMessages,
		bufferBytes:    defaultBufferSize,
		pingInterval:   time.Duration(defaultPingInterval),
		pingTimeout:    time.Duration(defaultPingTimeout),
		writeTimeout:   time.Duration(defaultWriteTimeout),
	}
}

// connect starts a client of the hub named after the test on an in-memory connection without buffers, and
// returns it and its peer. In a synctest bubble its time is the bubble's, and its goroutines must end there.
func connect(t *testing.T, settings *settings) (*client, *peer) {
	t.Helper()
	c := shakenClient(t, settings)
	if err := hubs.join(c, t.Name(), limits{}); err != nil {
		t.Fatal(err)
	}
	local, remote := net.Pipe()
	c.wire.attach(local, nil)
	go c.start() // ends with the connection
	t.Cleanup(func() { remote.Close() })
	return c, &peer{t: t, conn: remote, r: bufio.NewReader(remote)}
}

// shakenClient returns a client that has made its handshake and not joined.
func shakenClient(t *testing.T, settings *settings) *client {
	t.Helper()
	l := hubs.lease(t.Name(), testLogger(t), emitter{}, bounds{}, time.Duration(defaultDrain))
	t.Cleanup(func() {
		synctest.Wait() // connections that the test has closed are gone first
		hubs.release(l)
	})
	c := &client{settings: settings, scope: l.scope, joined: time.Now()}
	c.wire.client = c
	c.state.Store(stateWriting)
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	for _, line := range strings.Split(strings.TrimSpace(handshakeRequest("example.com", "/", "")), "\r\n")[1:] {
		name, value, _ := strings.Cut(line, ": ")
		r.Header.Set(name, value)
	}
	if _, err := c.shake(httptest.NewRecorder(), r); err != nil {
		t.Fatal(err)
	}
	return c
}

// causeOf returns why c is closing.
func causeOf(c *client) cause {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause
}

// drain reads and discards until the connection ends.
func (p *peer) drain() {
	_ = p.conn.SetReadDeadline(time.Time{})
	_, _ = io.Copy(io.Discard, p.r)
}

func TestClient_FragmentsArriveAsOneFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a := connect(t, defaults())
		_, b := connect(t, defaults())
		go a.drain()
		a.write(clientFrame(byte(websocket.TextMessage), []byte("one, ")))
		a.write(clientFrame(0, []byte("two, ")))
		a.write(clientFrame(finBit|websocket.PingMessage, nil)) // may come between
		a.write(clientFrame(finBit, []byte("three")))
		b.wantText("one, two, three")
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_EchoOffSparesTheSenderAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quiet := defaults()
		quiet.echo = false
		_, a := connect(t, quiet)
		_, b := connect(t, defaults())
		got := make(chan frame, 10)
		go func() {
			for {
				f, err := b.readFrame()
				if err != nil {
					close(got)
					return
				}
				got <- f
			}
		}()
		for range 3 {
			a.text("mine")
			b.text("yours")
		}
		synctest.Wait()
		for range 3 {
			a.wantText("yours")
		}
		a.conn.Close()
		synctest.Wait()
		b.conn.Close()
		counts := map[string]int{}
		for f := range got {
			counts[f.payload]++
		}
		if counts["mine"] != 3 || counts["yours"] != 3 {
			t.Errorf("the other client: got %v, want 3 of each", counts)
		}
	})
}

func TestClient_EchoOffIsNotLaggedByItsOwnMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quiet := defaults()
		quiet.echo, quiet.bufferMessages = false, 4
		c, a := connect(t, quiet)
		_, b := connect(t, quiet)
		go b.drain()
		b.text("being written") // nobody reads: the writer of a is stuck from here on
		synctest.Wait()
		for range 50 {
			a.text("mine")
		}
		synctest.Wait()
		a.wantText("being written")
		b.text("next")
		a.wantText("next")
		if got := causeOf(c); got != (cause{}) {
			t.Errorf("got closed with %v", got)
		}
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_ReadOnlyIsClosedAtItsFirstDataFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		listener := defaults()
		listener.readOnly = true
		_, a := connect(t, listener)
		_, b := connect(t, defaults())
		go b.drain()
		a.write(clientFrame(finBit|websocket.PongMessage, nil)) // no data frame
		a.write(clientFrame(byte(websocket.TextMessage), nil))  // not even ended, not even a byte
		a.wantClose(websocket.ClosePolicyViolation, "read_only")
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_RateDropsThenCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := connect(t, defaults())
		_, b := connect(t, defaults())
		c.limiter = rate.NewLimiter(3, 3) // 3 messages a second
		go a.drain()
		send := func(n int) {
			for i := range n {
				a.text(fmt.Sprint(i))
			}
		}
		go send(5) // two too many
		for i := range 3 {
			b.wantText(fmt.Sprint(i))
		}
		synctest.Wait()
		time.Sleep(time.Second) // in the bubble: the bucket is full again, the dropped are forgotten
		go send(5)
		for i := range 3 {
			b.wantText(fmt.Sprint(i))
		}
		synctest.Wait()
		if got := causeOf(c); got != (cause{}) {
			t.Fatalf("after 2 of 3 dropped messages: closed with %v", got)
		}
		a.text("the third too many")
		synctest.Wait()
		if got, want := causeOf(c), causeRateLimited; got != want {
			t.Fatalf("after 3 dropped messages: got %v, want %v", got, want)
		}
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_RateRefillsEvenly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := connect(t, defaults())
		c.limiter = rate.NewLimiter(2, 4) // 4 in 2 s
		go func() {
			for i := range 5 {
				a.text(fmt.Sprint(i))
			}
			time.Sleep(500 * time.Millisecond) // one more fits
			a.text("5")
			a.text("6")
		}()
		for _, want := range []string{"0", "1", "2", "3", "5"} {
			a.wantText(want)
		}
		synctest.Wait()
		a.conn.Close()
	})
}

func TestClient_PingsTheSilentAndCutsTheDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := connect(t, defaults())
		interval, timeout := c.settings.pingInterval, c.settings.pingTimeout
		began := time.Now()
		_ = a.conn.SetReadDeadline(time.Time{})
		expectPing := func() {
			t.Helper()
			if f, err := a.readFrame(); err != nil || f.opcode != websocket.PingMessage {
				t.Fatalf("got frame %v, error %v, want a ping", f, err)
			}
		}
		expectPing()
		if got := time.Since(began); got < interval/2 || got > interval {
			t.Errorf("first ping: got after %v, want between %v and %v", got, interval/2, interval)
		}
		a.write(clientFrame(finBit|websocket.PongMessage, nil))
		synctest.Wait()
		began = time.Now()
		expectPing()
		if got := time.Since(began); got != interval {
			t.Errorf("next ping: got %v after the last sign of life, want %v", got, interval)
		}
		time.Sleep(timeout - time.Millisecond)
		if got := causeOf(c); got != (cause{}) {
			t.Fatalf("before the timeout: closed with %v", got)
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if got, want := causeOf(c), causePingTimeout; got != want {
			t.Errorf("after the timeout: got %v, want %v", got, want)
		}
		a.wantEOF()
	})
}

func TestClient_AnythingReceivedCountsAsLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := connect(t, defaults())
		go a.drain()
		frame := clientFrame(finBit|websocket.TextMessage, bytes.Repeat([]byte("x"), 30))
		for _, b := range frame[:len(frame)-1] { // one byte of one message now and then
			time.Sleep(c.settings.pingTimeout - time.Second) // a ping comes in between, and no pong
			a.write([]byte{b})
		}
		synctest.Wait()
		if got := causeOf(c); got != (cause{}) {
			t.Errorf("got closed with %v, want alive", got)
		}
		a.conn.Close()
	})
}

func TestClient_IsPingedWhileItSends(t *testing.T) {
	for _, every := range []time.Duration{time.Second, 8 * time.Second, 24 * time.Second} {
		for _, answers := range []bool{true, false} {
			if every > time.Duration(defaultPingTimeout) && !answers {
				continue // it may be cut
			}
			t.Run(fmt.Sprintf("every %v, answers pings %v", every, answers), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					c, a := connect(t, defaults())
					interval := c.settings.pingInterval
					_ = a.conn.SetReadDeadline(time.Time{})
					gaps, pings, last := []time.Duration{}, make(chan time.Time, 1000), time.Now()
					go func() { // ends with the connection
						defer close(pings)
						for {
							f, err := a.readFrame()
							if err != nil {
								return
							}
							if f.opcode != websocket.PingMessage {
								continue
							}
							pings <- time.Now()
							if answers {
								a.send(websocket.PongMessage, "")
							}
						}
					}()
					for began := time.Now(); time.Since(began) < 40*interval; {
						time.Sleep(every)
						a.text("still here")
					}
					a.conn.Close()
					for at := range pings {
						gaps = append(gaps, at.Sub(last))
						last = at
					}
					if slices.Max(gaps) > 2*interval || slices.Min(gaps[1:]) < interval {
						t.Errorf("got pings after %v, want %v to %v between them", gaps, interval, 2*interval)
					}
				})
			})
		}
	}
}

func TestClient_PingOffLeavesTheSilentAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		off := defaults()
		off.pingInterval = 0
		c, a := connect(t, off)
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if got := causeOf(c); got != (cause{}) || c.messagesOut.Load()+c.bytesOut.Load() > 0 {
			t.Errorf("got cause %v and %d bytes, want nothing", got, c.bytesOut.Load())
		}
		a.conn.Close()
	})
}

func TestClient_MaxAgeIsSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		aging := defaults()
		aging.maxAge = time.Hour
		const clients = 200
		ended := make(chan time.Duration, clients)
		began := time.Now()
		for range clients {
			_, p := connect(t, aging)
			go func() {
				for { // pings, until the end
					f, err := p.readFrame()
					if err != nil {
						t.Errorf("got %v, want a close", err)
						return
					}
					if f.opcode == websocket.PingMessage {
						p.send(websocket.PongMessage, "")
						continue
					}
					if want := string(websocket.FormatCloseMessage(1012, "max_age")); f.opcode != websocket.CloseMessage || f.payload != want {
						t.Errorf("got %v, want a close with 1012 max_age", f)
					}
					ended <- time.Since(began)
					p.send(websocket.CloseMessage, f.payload)
					return
				}
			}()
		}
		early, late := 0, 0
		for range clients {
			switch age := <-ended; {
			case age < 54*time.Minute || age > 66*time.Minute:
				t.Errorf("got closed after %v, want an hour, give or take a tenth", age)
			case age < time.Hour:
				early++
			default:
				late++
			}
		}
		if early < clients/4 || late < clients/4 {
			t.Errorf("got %d closed early and %d late, want them spread", early, late)
		}
	})
}

func TestClient_MaxAgeKeepsNoTimerOfWhoIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		aging := defaults()
		aging.maxAge = time.Hour
		c, p := connect(t, aging)
		synctest.Wait()
		p.conn.Close()
		synctest.Wait()
		if c.expiry.Stop() {
			t.Error("the timer of a client that is gone still ran")
		}
	})
}

func TestClient_StuckWriterIsCutAfterTheWriteTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := connect(t, defaults())
		a.text("never read back")
		time.Sleep(c.settings.writeTimeout - time.Millisecond)
		if got := causeOf(c); got != (cause{}) {
			t.Fatalf("before the timeout: closed with %v", got)
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if got, want := causeOf(c), causeWriteTimeout; got != want {
			t.Errorf("after the timeout: got %v, want %v", got, want)
		}
	})
}

func TestClient_LaggedIsClosedWith1013(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		small := defaults()
		small.bufferMessages = 8
		c, a := connect(t, small)
		_, b := connect(t, small)
		go b.drain()
		for i := range 20 {
			b.text(fmt.Sprint(i))
			synctest.Wait()
		}
		// The first was being written; then the client learns what it missed.
		a.wantText("0")
		if got, want := a.next(), (frame{websocket.CloseMessage, string(websocket.FormatCloseMessage(1013, "lagged"))}); got != want {
			t.Errorf("got %.60v, want %.60v", got, want)
		}
		if got, want := causeOf(c), causeLagged; got != want {
			t.Errorf("got %v, want %v", got, want)
		}
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_OnLagSkipGoesOnWithTheOldestThereIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		small := defaults()
		small.bufferMessages, small.skip = 8, true
		c, a := connect(t, small)
		_, b := connect(t, small)
		go b.drain()
		for i := range 20 {
			b.text(fmt.Sprint(i))
			synctest.Wait()
		}
		a.wantText("0")
		for i := 12; i < 20; i++ {
			a.wantText(fmt.Sprint(i))
		}
		synctest.Wait()
		c.hub.mu.Lock()
		got := c.missed
		c.hub.mu.Unlock()
		if want := uint64(11); got != want {
			t.Errorf("missed: got %d, want %d", got, want)
		}
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_StuckClientsCannotHoldMoreThanTheBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		small := defaults()
		small.bufferBytes, small.skip, small.writeTimeout = 64<<10, true, time.Hour
		sender, a := connect(t, small)
		go a.drain()
		var stuck []*client
		payload := strings.Repeat("x", 8000)
		for range 40 { // each gets stuck in another segment, and would stay so for an hour
			c, _ := connect(t, small)
			stuck = append(stuck, c)
			synctest.Wait()
			a.text(payload)
			a.text(payload)
			synctest.Wait()
		}
		held := map[*segment]int{}
		b := sender.hub
		b.mu.Lock()
		for _, c := range b.clients {
			if c.pinned != nil {
				held[c.pinned] = cap(c.pinned.buf)
			}
		}
		for _, s := range b.log.segments {
			held[s] = cap(s.buf)
		}
		b.mu.Unlock()
		total := 0
		for _, n := range held {
			total += n
		}
		if most := 2 * small.bufferBytes; total > most {
			t.Errorf("the hub holds %d bytes, want at most %d", total, most)
		}
		cut := 0
		for _, c := range stuck {
			if causeOf(c) == causeLagged {
				cut++
			}
		}
		if cut == 0 || cut == len(stuck) || causeOf(stuck[len(stuck)-1]) != (cause{}) {
			t.Errorf("got %d of %d stuck clients cut, want the oldest ones", cut, len(stuck))
		}
		for _, c := range stuck {
			c.cut(causeGone)
		}
		a.conn.Close()
	})
}

func TestClient_CloseFlushesWhatWasPublishedBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := connect(t, defaults())
		_, b := connect(t, defaults())
		go b.drain()
		for i := range 5 {
			b.text(fmt.Sprint(i))
		}
		synctest.Wait()
		c.close(causeHubRemoved)
		b.text("after")
		for i := range 5 {
			a.wantText(fmt.Sprint(i))
		}
		if got, want := a.next(), (frame{websocket.CloseMessage, string(websocket.FormatCloseMessage(1012, "hub_removed"))}); got != want {
			t.Errorf("got %v, want %v", got, want)
		}
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_SilentPeerIsNotAwaitedForLongAfterAClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := connect(t, defaults())
		began := time.Now()
		c.close(causeHubRemoved)
		a.wantClose(1012, "hub_removed")
		a.drain()
		if got := time.Since(began); got != closeTimeout {
			t.Errorf("got the end after %v, want %v", got, closeTimeout)
		}
	})
}

func TestClient_AnswerToTheCloseEndsTheConnectionAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := connect(t, defaults())
		began := time.Now()
		c.close(causeHubRemoved)
		a.wantClose(1012, "hub_removed")
		a.send(websocket.CloseMessage, string(websocket.FormatCloseMessage(1012, "")))
		a.wantEOF()
		if got := time.Since(began); got > 0 {
			t.Errorf("got the end after %v, want at once", got)
		}
	})
}

func TestClient_PongsAreBoundedAndTheNewestIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a := connect(t, defaults())
		for i := range 1000 { // the first pong blocks the writer: nobody reads
			a.send(websocket.PingMessage, strings.Repeat("x", 120)+fmt.Sprint(i%1000+1000))
		}
		synctest.Wait()
		var last frame
		n := 0
		_ = a.conn.SetReadDeadline(time.Now().Add(time.Second))
		for {
			f, err := a.readFrame()
			if err != nil {
				break
			}
			last = f
			n++
		}
		if n > 2*maxPending/120 {
			t.Errorf("got %d pongs queued, want at most what %d bytes hold", n, maxPending)
		}
		if want := "1999"; !strings.HasSuffix(last.payload, want) {
			t.Errorf("last pong: got %q, want it to end in %s", last.payload, want)
		}
		a.conn.Close()
	})
}

func TestClient_PanicClosesWith1011AndTheOthersGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := connect(t, defaults())
		_, b := connect(t, defaults())
		_, d := connect(t, defaults())
		c.ws.SetPingHandler(func(string) error { panic("a bug") })
		a.send(websocket.PingMessage, "")
		a.wantClose(websocket.CloseInternalServerErr, "internal")
		a.conn.Close()
		go b.text("still here")
		d.wantText("still here")
		b.conn.Close()
		d.conn.Close()
	})
}

// TestHub_OneOrderForAll lets four clients send at once and compares what eight received.
func TestHub_OneOrderForAll(t *testing.T) {
	const senders, messages = 4, 500
	var mu sync.Mutex
	got := map[int][]string{}
	synctest.Test(t, func(t *testing.T) {
		big := defaults()
		big.bufferMessages = senders * messages
		var readers sync.WaitGroup
		var peers []*peer
		for i := range 8 {
			_, p := connect(t, big)
			peers = append(peers, p)
			readers.Go(func() {
				_ = p.conn.SetReadDeadline(time.Time{})
				for range senders * messages {
					f, err := p.readFrame()
					if err != nil {
						t.Errorf("client %d: %v", i, err)
						return
					}
					mu.Lock()
					got[i] = append(got[i], f.payload)
					mu.Unlock()
				}
			})
		}
		for i := range senders {
			go func() {
				for j := range messages {
					peers[i].text(fmt.Sprintf("%d/%d", i, j))
				}
			}()
		}
		readers.Wait()
		for _, p := range peers {
			p.conn.Close()
		}
	})
	for i := range got {
		if strings.Join(got[i], " ") != strings.Join(got[0], " ") {
			t.Errorf("clients %d and 0 saw different orders", i)
		}
	}
	next := map[string]int{}
	for _, s := range got[0] {
		sender, n, _ := strings.Cut(s, "/")
		if n != fmt.Sprint(next[sender]) {
			t.Fatalf("sender %s: got message %s, want %d", sender, n, next[sender])
		}
		next[sender]++
	}
}
