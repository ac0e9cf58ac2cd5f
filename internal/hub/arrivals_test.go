package hub

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
)

// A loneSession is a session of an engine for one node alone.
type loneSession struct{ engine.Session }

// A spySession counts the calls of Read.
type spySession struct {
	*enginetest.Session
	reads atomic.Int32
}

func (s *spySession) Read(ctx context.Context, hub string, after engine.Position) (engine.Snapshot, error) {
	s.reads.Add(1)
	return s.Session.Read(ctx, hub, after)
}

// TestArrivals_NewEpochNeverGoesOnUnderOldNumbers gives a number to another message in a new epoch. A node that lacked the
// first message with that number must not pass the second one to clients that know the old epoch.
func TestArrivals_NewEpochNeverGoesOnUnderOldNumbers(t *testing.T) {
	twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, server *enginetest.Server, a, b *node) {
		c, ada, hello := speak(t, b.hub, unpinged(historyOfTen()), nil)
		publishIn(a.hub, textMessage("1"))
		synctest.Wait()
		b.session.LosePushes(2)
		publishIn(a.hub, textMessage("2"))
		synctest.Wait()
		publishIn(a.hub, textMessage("3 of the old epoch"))
		synctest.Wait()
		server.Rewind("hub", 2)
		publishIn(a.hub, textMessage("3 of the new epoch"))
		synctest.Wait()
		b.renew(t)
		if why := c.Cause(); why != CloseHubReset {
			t.Fatalf("got %v, want %v", why, CloseHubReset)
		}
		// What its node lacked of the old epoch it gets, as far as the engine still has it.
		for i := range 2 {
			if e := ada.event(); e.Type != "message" || e.Seq != i+1 || e.text() != fmt.Sprint(i+1) {
				t.Errorf("got %s, want message %d of epoch %s", e.raw, i+1, hello.Epoch)
			}
		}
		if f := ada.next(); f != closeFrame(CloseHubReset) {
			t.Errorf("got %v, want a close frame", f)
		}
	})
}

// TestArrivals_LoneHubEndsWithItsEpoch has an engine that has nothing to read from begin a new epoch.
func TestArrivals_LoneHubEndsWithItsEpoch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := enginetest.NewServer()
		session := server.Session()
		p := NewProcess()
		resets := 0
		p.Reset = func(b *Hub) { resets++ }
		b, err := Load(t.Context(), p, "hub", loneSession{session}, unpinged(historyOfTen()))
		if err != nil {
			t.Fatal(err)
		}
		publishIn(b, textMessage("1"))
		server.NewEpoch("hub")
		publishIn(b, textMessage("2"))
		publishIn(b, textMessage("3"))
		synctest.Wait()
		if resets != 1 {
			t.Errorf("got %d resets, want 1", resets)
		}
		b.Close()
		synctest.Wait()
		_ = session.Close()
	})
}

// TestArrivals_ClientThatIsAheadOfItsNodeMissesNothing resumes a client on a node that does not have its last message yet.
func TestArrivals_ClientThatIsAheadOfItsNodeMissesNothing(t *testing.T) {
	twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, _ *enginetest.Server, a, b *node) {
		publishIn(a.hub, textMessage("1"))
		synctest.Wait()
		b.session.LosePushes(2)
		publishIn(a.hub, textMessage("2"))
		synctest.Wait()
		publishIn(a.hub, textMessage("3"))
		synctest.Wait()
		_, ada, hello := speak(t, b.hub, unpinged(historyOfTen()), &Resumption{a.hub.Known().Epoch, 3})
		if !*hello.Resumed || hello.Replay != 0 || hello.Head != 3 {
			t.Errorf("got %s, want resumed after message 3", hello.raw)
		}
		publishIn(a.hub, textMessage("4"))
		if e := ada.event(); e.Seq != 4 {
			t.Errorf("got %s, want message 4", e.raw)
		}
		// A client that claims what cannot be waits for nothing. Without the engine nobody knows whether it can be: with an answer,
		// a client that is right would get messages again.
		began := time.Now()
		if _, _, e := speak(t, b.hub, unpinged(historyOfTen()), &Resumption{hello.Epoch, 99}); *e.Resumed || e.Missed != 0 || e.Replay != 4 {
			t.Errorf("got %s, want the whole history", e.raw)
		}
		a.session.Down(errDown)
		b.session.Down(errDown)
		c := newTestClient(b.hub.process, "", netip.Prefix{}, unpinged(historyOfTen()))
		shake(t, c)
		c.SpeakEvents(&Resumption{hello.Epoch, 99})
		if err := b.hub.Join(c, 0); !errors.Is(err, ErrUnavailable) {
			t.Errorf("got error %v without the engine, want ErrUnavailable", err)
		}
		if took := time.Since(began); took > time.Millisecond {
			t.Errorf("took %v", took)
		}
	})
}

// TestArrivals_MissedInANewEpochCountsFromItsBeginning has an epoch that goes on counting.
func TestArrivals_MissedInANewEpochCountsFromItsBeginning(t *testing.T) {
	for published, missed := range map[int]int{0: 0, 5: 0, 12: 2} {
		twoNodes(t, unpinged(historyOfTen()), func(t *testing.T, server *enginetest.Server, a, b *node) {
			for i := range 50 {
				publishIn(a.hub, textMessage(fmt.Sprint(i)))
			}
			old := a.hub.Known().Epoch
			server.NewEpoch("hub")
			a.hub.Close()
			a.open(t, unpinged(historyOfTen()))
			for i := range published {
				publishIn(a.hub, textMessage(fmt.Sprint(i)))
			}
			synctest.Wait()
			_, _, e := speak(t, a.hub, unpinged(historyOfTen()), &Resumption{old, 3})
			if *e.Resumed || e.Missed != missed || e.Replay != 10 || e.Head != 50+published {
				t.Errorf("got %s, want %d messages of the new epoch missed", e.raw, missed)
			}
		})
	}
}

// newSpyNode returns a node whose session counts the calls of Read.
func newSpyNode(t *testing.T, server *enginetest.Server, s *Settings) (*Hub, *spySession) {
	t.Helper()
	spy := &spySession{Session: server.Session()}
	b, err := Load(t.Context(), NewProcess(), "hub", spy, s)
	if err != nil {
		t.Fatal(err)
	}
	joined.Store(b, new([]*Client))
	t.Cleanup(func() {
		b.Close()
		time.Sleep(3 * engineTimeout) // in the bubble
		synctest.Wait()
		checkOwners(t, b)
		if err := spy.Close(); err != nil {
			t.Error(err)
		}
	})
	return b, spy
}

// TestArrivals_RenewalOfTheLatestFetchesNothing renews with what was the newest message a moment ago.
func TestArrivals_RenewalOfWhatWasTheLatestFetchesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, spy := newSpyNode(t, enginetest.NewServer(), unpinged(defaults()))
		publishIn(b, textMessage("1"))
		synctest.Wait()
		old := b.Known()
		publishIn(b, textMessage("2"))
		synctest.Wait()
		b.Renewed(old)
		b.Renewed(b.Known())
		synctest.Wait()
		if n := spy.reads.Load(); n > 0 {
			t.Errorf("got %d reads, want none", n)
		}
	})
}

// TestArrivals_LargeBatchOfAnotherNodeMakesNoReaderLag has clients with small buffers on one node alone.
func TestArrivals_LargeBatchOfAnotherNodeMakesNoReaderLag(t *testing.T) {
	for _, buffer := range []int{1, 2, 10, 100} {
		t.Run(fmt.Sprint(buffer), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server := enginetest.NewServer()
				small := unpinged(defaults())
				small.BufferMessages = buffer
				a, b := newNode(t, server, unpinged(defaults())), newNode(t, server, small)
				_, ada := connect(t, b.hub, small)
				release := server.HoldPublish()
				for i := range 200 {
					go publishIn(a.hub, textMessage(fmt.Sprint(i))) // ends when the message is published
					synctest.Wait()
				}
				release()
				for i := range 200 {
					ada.wantText(fmt.Sprint(i))
				}
			})
		})
	}
}

// TestArrivals_NobodyJoinsAHubWhoseEpochIsOver ends the epoch of a hub before the process knows the hub.
func TestArrivals_NobodyJoinsAHubWhoseEpochIsOver(t *testing.T) {
	twoNodes(t, unpinged(defaults()), func(t *testing.T, server *enginetest.Server, a, _ *node) {
		server.NewEpoch("hub")
		a.renew(t)
		c := newTestClient(a.process, "", testAddress(1), defaults())
		if err := a.hub.Join(c, 0); !errors.Is(err, ErrClosed) {
			t.Errorf("got %v, want %v", err, ErrClosed)
		}
		if a.resets != 2 {
			t.Errorf("got %d resets, want another one", a.resets)
		}
	})
}

// A shortCluster leaves out an entry of each snapshot.
type shortCluster struct{ *enginetest.Session }

func (s shortCluster) Read(ctx context.Context, hub string, after engine.Position) (engine.Snapshot, error) {
	snapshot, err := s.Session.Read(ctx, hub, after)
	snapshot.Entries = snapshot.Entries[:max(len(snapshot.Entries)-1, 0)]
	return snapshot, err
}

func (s shortCluster) Open(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
	snapshot, err := s.Session.Open(ctx, hub, bounds, to)
	snapshot.Entries = snapshot.Entries[:max(len(snapshot.Entries)-1, 0)]
	return snapshot, err
}

// TestArrivals_IncompleteSnapshotIsAnError has a faulty engine.
func TestArrivals_IncompleteSnapshotIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		session := enginetest.NewServer().Session()
		b, err := Load(t.Context(), NewProcess(), "hub", shortCluster{session}, unpinged(defaults()))
		if err != nil {
			t.Fatal(err)
		}
		session.LosePushes(2)
		publishIn(b, textMessage("1"))
		k := b.Known()
		k.Seq = 1
		b.Renewed(k)
		synctest.Wait()
		if got := b.Known().Seq; got != 0 {
			t.Errorf("got message %d, want none", got)
		}
		if _, err := Load(t.Context(), NewProcess(), "hub", shortCluster{session}, unpinged(defaults())); err == nil {
			t.Error("got no error")
		}
		b.Close()
		synctest.Wait()
		_ = session.Close()
	})
}
