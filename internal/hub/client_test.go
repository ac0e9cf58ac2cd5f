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

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"golang.org/x/time/rate"
)

func TestClient_FragmentsArriveAsOneFrame(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		_, a := connect(t, hub, defaults())
		_, b := connect(t, hub, defaults())
		go a.drain()
		a.write(clientFrame(byte(ws.TextMessage), []byte("one, ")))
		a.write(clientFrame(0, []byte("two, ")))
		a.write(clientFrame(finBit|ws.PingMessage, nil)) // may come between
		a.write(clientFrame(finBit, []byte("three")))
		b.wantText("one, two, three")
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_EchoOffSparesTheSenderAlone(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		quiet := defaults()
		quiet.Echo = false
		_, a := connect(t, hub, quiet)
		_, b := connect(t, hub, defaults())
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
	bubble(t, func(t *testing.T, hub *Hub) {
		quiet := defaults()
		quiet.Echo, quiet.BufferMessages = false, 4
		c, a := connect(t, hub, quiet)
		_, b := connect(t, hub, quiet)
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
		if got := c.Cause(); got != (ws.Close{}) {
			t.Errorf("got closed with %v", got)
		}
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_ReadOnlyIsClosedAtItsFirstDataFrame(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		listener := defaults()
		listener.ReadOnly = true
		_, a := connect(t, hub, listener)
		_, b := connect(t, hub, defaults())
		go b.drain()
		a.write(clientFrame(finBit|ws.PongMessage, nil)) // no data frame
		a.write(clientFrame(byte(ws.TextMessage), nil))  // not even ended, not even a byte
		a.wantClose(CloseReadOnly)
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_RateDropsThenCloses(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		c, a := connect(t, hub, defaults())
		_, b := connect(t, hub, defaults())
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
		if got := c.Cause(); got != (ws.Close{}) {
			t.Fatalf("after 2 of 3 dropped messages: closed with %v", got)
		}
		a.text("the third too many")
		synctest.Wait()
		if got, want := c.Cause(), CloseRateLimited; got != want {
			t.Fatalf("after 3 dropped messages: got %v, want %v", got, want)
		}
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_RateRefillsEvenly(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		c, a := connect(t, hub, defaults())
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
	bubble(t, func(t *testing.T, hub *Hub) {
		c, a := connect(t, hub, defaults())
		interval, timeout := c.settings.PingInterval, c.settings.PingTimeout
		began := time.Now()
		_ = a.conn.SetReadDeadline(time.Time{})
		expectPing := func() {
			t.Helper()
			if f, err := a.readFrame(); err != nil || f.opcode != ws.PingMessage {
				t.Fatalf("got frame %v, error %v, want a ping", f, err)
			}
		}
		expectPing()
		if got := time.Since(began); got < interval/2 || got > interval {
			t.Errorf("first ping: got after %v, want between %v and %v", got, interval/2, interval)
		}
		a.write(clientFrame(finBit|ws.PongMessage, nil))
		synctest.Wait()
		began = time.Now()
		expectPing()
		if got := time.Since(began); got != interval {
			t.Errorf("next ping: got %v after the last sign of life, want %v", got, interval)
		}
		time.Sleep(timeout - time.Millisecond)
		if got := c.Cause(); got != (ws.Close{}) {
			t.Fatalf("before the timeout: closed with %v", got)
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if got, want := c.Cause(), ClosePingTimeout; got != want {
			t.Errorf("after the timeout: got %v, want %v", got, want)
		}
		a.wantEOF()
	})
}

func TestClient_EachByteCountsAsLife(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		c, a := connect(t, hub, defaults())
		go a.drain()
		frame := clientFrame(finBit|ws.TextMessage, bytes.Repeat([]byte("x"), 30))
		for _, b := range frame[:len(frame)-1] { // one byte of one message now and then
			time.Sleep(c.settings.PingTimeout - time.Second) // a ping comes in between, and no pong
			a.write([]byte{b})
		}
		synctest.Wait()
		if got := c.Cause(); got != (ws.Close{}) {
			t.Errorf("got closed with %v, want alive", got)
		}
		a.conn.Close()
	})
}

func TestClient_IsPingedWhileItSends(t *testing.T) {
	for _, every := range []time.Duration{time.Second, 8 * time.Second, 24 * time.Second} {
		for _, answers := range []bool{true, false} {
			if every > defaults().PingTimeout && !answers {
				continue // it may be cut
			}
			t.Run(fmt.Sprintf("every %v, answers pings %v", every, answers), func(t *testing.T) {
				bubble(t, func(t *testing.T, hub *Hub) {
					c, a := connect(t, hub, defaults())
					interval := c.settings.PingInterval
					_ = a.conn.SetReadDeadline(time.Time{})
					gaps, pings, last := []time.Duration{}, make(chan time.Time, 1000), time.Now()
					go func() { // ends with the connection
						defer close(pings)
						for {
							f, err := a.readFrame()
							if err != nil {
								return
							}
							if f.opcode != ws.PingMessage {
								continue
							}
							pings <- time.Now()
							if answers {
								a.send(ws.PongMessage, "")
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
	bubble(t, func(t *testing.T, hub *Hub) {
		off := defaults()
		off.PingInterval = 0
		c, a := connect(t, hub, off)
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if got := c.Cause(); got != (ws.Close{}) || c.messagesOut.Load()+c.bytesOut.Load() > 0 {
			t.Errorf("got cause %v and %d bytes, want nothing", got, c.bytesOut.Load())
		}
		a.conn.Close()
	})
}

func TestClient_MaxAgeIsSpread(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, hub *Hub) {
		aging := defaults()
		aging.MaxAge, aging.PingInterval = time.Hour, 10*time.Minute
		const clients = 200
		ended := make(chan time.Duration, clients)
		began := time.Now()
		for range clients {
			_, p := connect(t, hub, aging)
			go func() {
				for { // pings, until the end
					f, err := p.readFrame()
					if err != nil {
						t.Errorf("got %v, want a close", err)
						return
					}
					if f.opcode == ws.PingMessage {
						p.send(ws.PongMessage, "")
						continue
					}
					if want := closeFrame(CloseMaxAge); f != want {
						t.Errorf("got %v, want a close with 1012 max_age", f)
					}
					ended <- time.Since(began)
					p.send(ws.CloseMessage, f.payload)
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

func TestClient_MaxAgeTimerStopsWithItsClient(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		aging := defaults()
		aging.MaxAge = time.Hour
		c, p := connect(t, hub, aging)
		synctest.Wait()
		p.conn.Close()
		synctest.Wait()
		if c.expiry.Stop() {
			t.Error("the timer of a client that is gone still ran")
		}
	})
}

func TestClient_StuckWriterIsCutAfterTheWriteTimeout(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		c, a := connect(t, hub, defaults())
		a.text("never read back")
		time.Sleep(c.settings.WriteTimeout - time.Millisecond)
		if got := c.Cause(); got != (ws.Close{}) {
			t.Fatalf("before the timeout: closed with %v", got)
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if got, want := c.Cause(), CloseWriteTimeout; got != want {
			t.Errorf("after the timeout: got %v, want %v", got, want)
		}
	})
}

func TestClient_LaggedIsClosedWith1013(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		small := defaults()
		small.BufferMessages = 8
		c, a := connect(t, hub, small)
		_, b := connect(t, hub, small)
		go b.drain()
		for i := range 20 {
			b.text(fmt.Sprint(i))
			synctest.Wait()
		}
		// The first message was being written. Then the client learns that it has lagged.
		a.wantText("0")
		if got, want := a.next(), closeFrame(CloseLagged); got != want {
			t.Errorf("got %.60v, want %.60v", got, want)
		}
		if got, want := c.Cause(), CloseLagged; got != want {
			t.Errorf("got %v, want %v", got, want)
		}
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_OnLagSkipGoesOnWithTheOldestThereIs(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		small := defaults()
		small.BufferMessages, small.SkipLag = 8, true
		_, a := connect(t, hub, small)
		_, b := connect(t, hub, small)
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
		if got, want := hub.process.Counters.DroppedByLag.Load(), uint64(11); got != want {
			t.Errorf("missed: got %d, want %d", got, want)
		}
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_StuckClientsCannotHoldMoreThanTheBuffer(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		small := defaults()
		small.BufferBytes, small.SkipLag, small.WriteTimeout = 64<<10, true, time.Hour
		_, a := connect(t, hub, small)
		go a.drain()
		var stuck []*Client
		payload := strings.Repeat("x", 8000)
		for range 40 { // each gets stuck in another segment, and would stay so for an hour
			c, _ := connect(t, hub, small)
			stuck = append(stuck, c)
			synctest.Wait()
			a.text(payload)
			a.text(payload)
			synctest.Wait()
		}
		held := map[*feed.Segment]int{}
		hub.mu.Lock()
		for _, c := range hub.clients {
			if c.pinned != nil {
				held[c.pinned] = c.pinned.Capacity()
			}
		}
		for position := hub.raw.Tail(); position < hub.raw.Head(); {
			s, _, n := hub.raw.Next(position, hub.raw.Head())
			held[s] = s.Capacity()
			hub.raw.Unpin(s)
			position += uint64(n)
		}
		memory := hub.raw.Memory()
		hub.mu.Unlock()
		total := 0
		for _, n := range held {
			total += n
		}
		if most := 2 * small.BufferBytes; total > most {
			t.Errorf("the hub holds %d bytes, want at most %d", total, most)
		}
		if memory != total {
			t.Errorf("the feed counts %d bytes, want the %d that it holds", memory, total)
		}
		cut := 0
		for _, c := range stuck {
			if c.Cause() == CloseLagged {
				cut++
			}
		}
		if cut == 0 || cut == len(stuck) || stuck[len(stuck)-1].Cause() != (ws.Close{}) {
			t.Errorf("got %d of %d stuck clients cut, want the oldest ones", cut, len(stuck))
		}
		for _, c := range stuck {
			c.Cut(CloseGone)
		}
		a.conn.Close()
	})
}

func TestClient_CloseFlushesEarlierMessages(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		c, a := connect(t, hub, defaults())
		_, b := connect(t, hub, defaults())
		go b.drain()
		for i := range 5 {
			b.text(fmt.Sprint(i))
		}
		synctest.Wait()
		c.Close(CloseHubRemoved)
		b.text("after")
		for i := range 5 {
			a.wantText(fmt.Sprint(i))
		}
		if got, want := a.next(), closeFrame(CloseHubRemoved); got != want {
			t.Errorf("got %v, want %v", got, want)
		}
		a.conn.Close()
		b.conn.Close()
	})
}

func TestClient_CloseWaitsFiveSecondsForASilentPeer(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		c, a := connect(t, hub, defaults())
		began := time.Now()
		c.Close(CloseHubRemoved)
		a.wantClose(CloseHubRemoved)
		a.drain()
		if got := time.Since(began); got != closeTimeout {
			t.Errorf("got the end after %v, want %v", got, closeTimeout)
		}
	})
}

func TestClient_AnswerToTheCloseEndsTheConnectionAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		c, a := connect(t, hub, defaults())
		began := time.Now()
		c.Close(CloseHubRemoved)
		a.wantClose(CloseHubRemoved)
		a.send(ws.CloseMessage, "\x03\xf4")
		a.wantEOF()
		if got := time.Since(began); got > 0 {
			t.Errorf("got the end after %v, want at once", got)
		}
	})
}

func TestClient_PongsAreBoundedAndTheNewestIsKept(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		_, a := connect(t, hub, defaults())
		for i := range 1000 { // the first pong blocks the writer: nobody reads
			a.send(ws.PingMessage, strings.Repeat("x", 120)+fmt.Sprint(i%1000+1000))
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

// A buggyProtocol is raw, except that it panics over each message.
type buggyProtocol struct{ rawProtocol }

func (buggyProtocol) received(*Client, int, []byte) bool { panic("a bug") }

func TestClient_PanicClosesWith1011AndTheOthersGoOn(t *testing.T) {
	bubble(t, func(t *testing.T, hub *Hub) {
		c, a := joiner{protocol: buggyProtocol{}}.join(t, hub, defaults())
		_, b := connect(t, hub, defaults())
		_, d := connect(t, hub, defaults())
		a.text(strings.Repeat("x", 20_000)) // which takes shared memory
		a.wantClose(CloseInternal)
		a.conn.Close()
		go b.text("still here")
		d.wantText("still here")
		b.conn.Close()
		d.conn.Close()
		synctest.Wait()
		if _, _, panics := ownerOf(c).counts(); panics != 1 || ownerOf(c).panics[0] != "a bug" {
			t.Errorf("got the panics %v reported, want the one", ownerOf(c).panics)
		}
	})
}

// TestHub_OneOrderForAll lets four clients send at once and compares what eight received.
func TestHub_OneOrderForAll(t *testing.T) {
	const senders, messages = 4, 500
	var mu sync.Mutex
	got := map[int][]string{}
	bubble(t, func(t *testing.T, hub *Hub) {
		big := defaults()
		big.BufferMessages = senders * messages
		var readers sync.WaitGroup
		var peers []*peer
		for i := range 8 {
			_, p := connect(t, hub, big)
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
