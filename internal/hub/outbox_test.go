package hub

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
)

// errDown is why the engine of a test cannot be reached.
var errDown = errors.New("down")

// speak joins a client of the events protocol, and returns its hello.
func speak(t *testing.T, b *Hub, s *Settings, since *Resumption) (*Client, *peer, incoming) {
	t.Helper()
	c, p := joiner{events: true, room: 1 << 20, since: since}.join(t, b, s)
	return c, p, p.wantEvent("hello")
}

// answer returns the next event that is no message.
func (p *peer) answer() incoming {
	p.t.Helper()
	for {
		if e := p.event(); e.Type != "message" {
			return e
		}
	}
}

// send returns a send event.
func sendEvent(id, token, data string) string {
	if token != "" {
		return fmt.Sprintf(`{"type":"send","id":%q,"token":%q,"data":%q}`, id, token, data)
	}
	return fmt.Sprintf(`{"type":"send","id":%q,"data":%q}`, id, data)
}

// TestOutbox_HubThatOpensAgainPublishesAtOnce publishes in a hub that the same session has had open before.
func TestOutbox_HubThatOpensAgainPublishesAtOnce(t *testing.T) {
	twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, _ *enginetest.Server, a, _ *node) {
		for range 20 {
			publishIn(a.hub, textMessage("before"))
		}
		a.hub.Close()
		a.open(t, unpinged(historyOfTen()))
		began := time.Now()
		r, err := a.hub.Publish(t.Context(), textMessage("after"))
		if err != nil || r.Seq != 21 || r.Repeated {
			t.Errorf("got %+v, %v, want message 21", r, err)
		}
		if took := time.Since(began); took > firstRetry/2 {
			t.Errorf("took %v, want the first attempt to succeed", took)
		}
	})
}

// TestOutbox_AnswersComeInTheOrderOfFrames sends frames that the hub can answer by itself after one that it cannot.
func TestOutbox_AnswersComeInTheOrderOfFrames(t *testing.T) {
	for name, down := range map[string]bool{"slow": false, "down": true} {
		t.Run(name, func(t *testing.T) {
			twoNodes(t, unpinged(presenceOf(false)), func(t *testing.T, server *enginetest.Server, a, _ *node) {
				_, ada, _ := speak(t, a.hub, unpinged(presenceOf(false)), nil)
				release := server.HoldPublish()
				if down {
					server.Down(errDown)
				}
				go func() { // ends when the server has read everything, at the end of the test
					for _, frame := range []string{
						sendEvent("1", "", "a"), sendEvent("2", "", "b"), "no JSON", sendEvent("3", "", "c"), `{"type":"who"}`,
						`{"type":"send","id":"4"}`,
					} {
						_, _ = ada.conn.Write(clientFrame(finBit|opText, []byte(frame)))
					}
				}()
				time.Sleep(time.Second)
				release()
				want := []string{"sent 1", "sent 2", "error ", "sent 3", "presence ", "error 4"}
				if down {
					want = []string{"error 1", "error 2", "error ", "error 3", "presence ", "error 4"}
				}
				for i, w := range want {
					e := ada.answer()
					id := ""
					if e.ID != nil {
						id = *e.ID
					}
					if got := e.Type + " " + id; got != w {
						t.Errorf("answer %d: got %s, want %s", i, e.raw, w)
					}
				}
			})
		})
	}
}

// TestOutbox_PingWaitsForNoEngine pings behind a message whose outcome is open for longer than a client waits for a pong.
func TestOutbox_PingWaitsForNoEngine(t *testing.T) {
	twoNodes(t, unpinged(defaults()), func(t *testing.T, server *enginetest.Server, a, _ *node) {
		_, ada, _ := speak(t, a.hub, unpinged(defaults()), nil)
		release := server.HoldPublish()
		ada.text(sendEvent("1", "", "a"))
		began := time.Now()
		ada.text(`{"type":"ping"}`)
		ada.wantEvent("pong")
		if took := time.Since(began); took > 0 {
			t.Errorf("got the pong after %v, want it at once", took)
		}
		release()
		if e := ada.answer(); e.Type != "sent" {
			t.Errorf("got %s, want sent", e.raw)
		}
	})
}

// TestOutbox_RepetitionIsNeverCalledUnpublished has a client send a message on one node, whose engine is slow, and again
// on another one, whose engine is down. The first one publishes it.
func TestOutbox_RepetitionIsNeverCalledUnpublished(t *testing.T) {
	twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, _ *enginetest.Server, a, b *node) {
		first, ada, hello := speak(t, a.hub, unpinged(historyOfTen()), nil)
		a.session.Down(errDown)
		ada.text(sendEvent("1", "", "hello"))
		synctest.Wait()
		first.Cut(CloseGone)
		c, again, _ := speak(t, b.hub, unpinged(historyOfTen()), nil)
		b.session.Down(errDown)
		time.Sleep(time.Second)
		again.text(sendEvent("1", hello.Token, "hello"))
		time.Sleep(5 * time.Second)
		a.session.Up()
		time.Sleep(2 * engineTimeout)
		synctest.Wait()
		if head := a.hub.Known().Seq; head != 1 {
			t.Fatalf("got head %d, want the message to be published", head)
		}
		if why := c.Cause(); why != CloseUnavailable {
			t.Errorf("got %v, want %v, because nobody can know", why, CloseUnavailable)
		}
		again.wantClose(CloseUnavailable)
	})
}

// TestOutbox_SentNamesAnotherEpoch sends a message that the engine publishes in an epoch that is not the hub's. The hub learns
// that from the receipt.
func TestOutbox_SentNamesAnotherEpoch(t *testing.T) {
	twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, server *enginetest.Server, a, _ *node) {
		_, ada, hello := speak(t, a.hub, unpinged(historyOfTen()), nil)
		for range 3 {
			publishIn(a.hub, textMessage("before"))
		}
		server.Wipe()
		a.session.LosePushes(1)
		ada.text(sendEvent("1", "", "after"))
		e := ada.answer()
		if e.Type != "sent" || e.Seq != 1 || e.Epoch == "" || e.Epoch == hello.Epoch {
			t.Errorf("got %s, want number 1 of another epoch", e.raw)
		}
		ada.wantClose(CloseHubReset)
	})
}

// TestOutbox_MessageWaitsNoLongerThanItMay fills the outbox, so that further messages first wait for room in it.
func TestOutbox_MessageWaitsNoLongerThanItMay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := enginetest.NewServer()
		a := newNode(t, server, unpinged(defaults()))
		server.Down(errDown)
		var all sync.WaitGroup
		for i := range 3 * maxOutbox {
			all.Go(func() {
				m := textMessage("")
				m.Address = testAddress(i)
				time.Sleep(time.Duration(i) * 10 * time.Millisecond)
				began := time.Now()
				if _, err := a.hub.Publish(t.Context(), m); !errors.Is(err, ErrUnavailable) {
					t.Errorf("message %d: got %v, want %v", i, err, ErrUnavailable)
				}
				if took := time.Since(began); took < engineTimeout || took > engineTimeout+2*lastRetry {
					t.Errorf("message %d: took %v, want %v", i, took, engineTimeout)
				}
			})
		}
		all.Wait()
	})
}

// TestOutbox_LastAttemptHasTime lets the engine come back, slowly, just before the oldest message expires. If the attempt had
// only the rest of the time, its outcome would be unknown, for all messages of the batch.
func TestOutbox_LastAttemptHasTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := enginetest.NewServer()
		a := newNode(t, server, unpinged(defaults()))
		server.Down(errDown)
		outcome := make(chan error, 1)
		go func() { // ends with the message's outcome, for which the test waits
			_, err := a.hub.Publish(t.Context(), textMessage("old"))
			outcome <- err
		}()
		time.Sleep(engineTimeout - lastRetry)
		release := server.HoldPublish()
		server.Up()
		time.Sleep(lastRetry + leastAttempt/10)
		release()
		if err := <-outcome; err != nil {
			t.Errorf("got %v, want the message to be published", err)
		}
	})
}

// TestOutbox_MessagesAreNotPublishedAfterOneThatTheirSenderRepeats loses a message whose sender has sent others after it.
func TestOutbox_MessagesAreNotPublishedAfterOneThatTheirSenderRepeats(t *testing.T) {
	const messages = 30
	small := unpinged(historyOfTen())
	small.BufferMessages = 4 // batches have one message
	for name, leaves := range map[string]bool{"closed": false, "left": true} {
		t.Run(name, func(t *testing.T) {
			twoNodes(t, small, func(t *testing.T, server *enginetest.Server, a, b *node) {
				c, ada, hello := speak(t, a.hub, small, nil)
				_, bob := connect(t, b.hub, unpinged(defaults()))
				if leaves {
					a.session.Down(errDown)
				} else {
					server.LoseRequests(1000)
				}
				for i := range messages {
					ada.text(sendEvent(fmt.Sprint(i), "", fmt.Sprint(i)))
					time.Sleep(100 * time.Millisecond)
				}
				if leaves {
					c.Cut(CloseGone)
				}
				time.Sleep(engineTimeout - messages/2*100*time.Millisecond) // until half of them are overdue
				server.LoseRequests(0)
				a.session.Up()
				synctest.Wait()
				time.Sleep(2 * lastRetry)
				_, again, _ := speak(t, b.hub, small, nil)
				for i := range messages {
					again.text(sendEvent(fmt.Sprint(i), hello.Token, fmt.Sprint(i)))
				}
				for i := range messages {
					bob.wantText(fmt.Sprint(i))
				}
			})
		})
	}
}

// A shortEngine answers with too few receipts.
type shortEngine struct{ engine.Session }

func (s shortEngine) Publish(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
	receipts, err := s.Session.Publish(ctx, hub, batch)
	return receipts[:max(len(receipts)-1, 0)], err
}

// TestOutbox_TooFewReceiptsAreAnUnknownOutcome has a faulty engine.
func TestOutbox_TooFewReceiptsAreAnUnknownOutcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		session := enginetest.NewServer().Session()
		b, err := Load(t.Context(), NewProcess(), "hub", shortEngine{session}, unpinged(historyOfTen()))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.Publish(t.Context(), textMessage("hello")); !errors.Is(err, ErrUnknown) {
			t.Errorf("got %v, want %v", err, ErrUnknown)
		}
		b.Close()
		synctest.Wait()
		if err := session.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestOutbox_OneAddressLeavesRoomForOthers has one address send as much as it can while the engine is down, and another
// one send a little.
func TestOutbox_OneAddressLeavesRoomForOthers(t *testing.T) {
	for name, size := range map[string]int{"small": 10, "large": 60 << 10} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server := enginetest.NewServer()
				a := newNode(t, server, unpinged(defaults()))
				server.Down(errDown)
				var all sync.WaitGroup
				defer all.Wait()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				publish := func(address, n int) {
					m := textMessage(strings.Repeat("x", n))
					m.Address = testAddress(address)
					all.Go(func() { _, _ = a.hub.Publish(ctx, m) })
					synctest.Wait()
				}
				for range 2 * maxOutbox {
					publish(1, size)
				}
				queued := func() int { return locked(a.hub, func() int { return len(a.hub.outbox.queue) }) }
				before := queued()
				for i := range 5 {
					publish(2, 10)
					if got, want := queued(), before+i+1; got != want {
						t.Errorf("got %d messages in the outbox, want %d with the other address's", got, want)
					}
				}
			})
		})
	}
}
