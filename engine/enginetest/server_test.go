package enginetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

var bounds = engine.Bounds{Messages: 10, Bytes: 1 << 20, Age: time.Minute, Receipts: 10}

// A log is a receiver and a monitor that notes what it gets.
type log []string

func (l *log) Entries(epoch string, first uint64, entries []engine.Entry) {
	for i, e := range entries {
		*l = append(*l, fmt.Sprintf("%d:%s", first+uint64(i), e.Data))
	}
}

func (l *log) Users(version uint64, _ engine.NodeID, users []engine.UserCount) {
	*l = append(*l, fmt.Sprintf("%d:%v", version, users))
}

func (l *log) State(err error)  { *l = append(*l, fmt.Sprint(err)) }
func (l *log) Warn(text string) { *l = append(*l, text) }

func (l *log) want(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	if !slices.Equal(*l, want) {
		t.Errorf("the receiver got %q, want %q", *l, want)
	}
}

func open(t *testing.T, s *Session) *log {
	t.Helper()
	l := &log{}
	if _, err := s.Open(t.Context(), "hub", bounds, l); err != nil {
		t.Fatal(err)
	}
	return l
}

func publish(t *testing.T, s *Session, data ...string) ([]engine.Receipt, error) {
	t.Helper()
	batch := engine.Batch{Bounds: bounds}
	for _, d := range data {
		m := engine.Message{Data: []byte(d)}
		copy(m.Key[:], d)
		batch.Messages = append(batch.Messages, m)
	}
	return s.Publish(t.Context(), "hub", batch)
}

func TestDown_CallsFailAndTheMonitorLearnsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		monitor := &log{}
		session, err := server.Connect(monitor)
		if err != nil {
			t.Fatal(err)
		}
		defer session.Close()
		node := session.(*Session)
		got := open(t, node)
		other := server.Session()
		defer other.Close()

		node.Down(errors.New("partition"))
		if _, err := publish(t, node, "a"); !errors.Is(err, engine.ErrUnavailable) {
			t.Errorf("Publish on the side that is cut off returned %v, want ErrUnavailable", err)
		}
		if _, err := publish(t, other, "b"); err != nil {
			t.Error(err)
		}
		node.Up()
		if _, err := publish(t, other, "c"); err != nil {
			t.Error(err)
		}
		got.want(t, "2:c")
		server.Down(errors.New("crash"))
		if _, err := publish(t, other, "d"); !errors.Is(err, engine.ErrUnavailable) {
			t.Errorf("Publish without a server returned %v, want ErrUnavailable", err)
		}
		monitor.want(t, "<nil>", "partition", "<nil>", "crash")
	})
}

func TestConnect_SessionHasNoNumberBeforeTheServerIsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		server.Down(errors.New("crash"))
		s := server.Session()
		defer s.Close()
		before := s.Number()
		server.Up()
		if after := s.Number(); before != 0 || after != 1 {
			t.Errorf("the number was %d, then %d; want 0, then 1", before, after)
		}
	})
}

func TestLoseReplies_PublishesAndFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		s := server.Session()
		defer s.Close()
		got := open(t, s)
		server.LoseReplies(1)
		if _, err := publish(t, s, "a"); err == nil || errors.Is(err, engine.ErrUnavailable) {
			t.Errorf("Publish returned %v, want an error that leaves the outcome open", err)
		}
		got.want(t, "1:a")
		receipts, err := publish(t, s, "a")
		if err != nil || !receipts[0].Repeated || receipts[0].Seq != 1 {
			t.Errorf("the repetition returned %+v, %v; want number 1, repeated", receipts, err)
		}
		got.want(t, "1:a")
	})
}

func TestLoseRequests_FailsWithoutPublishing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		s := server.Session()
		defer s.Close()
		got := open(t, s)
		server.LoseRequests(1)
		if _, err := publish(t, s, "a"); err == nil || errors.Is(err, engine.ErrUnavailable) {
			t.Errorf("Publish returned %v, want an error that leaves the outcome open", err)
		}
		got.want(t)
	})
}

func TestLosePushes_LeavesAGap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		one, two := server.Session(), server.Session()
		defer one.Close()
		defer two.Close()
		gotOne, gotTwo := open(t, one), open(t, two)
		one.LosePushes(1)
		publish(t, one, "a")
		publish(t, one, "b")
		gotOne.want(t, "2:b")
		gotTwo.want(t, "1:a", "2:b")
	})
}

func TestHoldPublish_NothingHappensBeforeItsRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		s := server.Session()
		defer s.Close()
		got := open(t, s)
		release := server.HoldPublish()
		returned := make(chan struct{})
		go func() { // ends after release; the test waits for returned
			defer close(returned)
			if _, err := publish(t, s, "a"); err != nil {
				t.Error(err)
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		batch := engine.Batch{Bounds: bounds, Messages: []engine.Message{{}}}
		if _, err := s.Publish(ctx, "hub", batch); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Publish returned %v, want the deadline's error", err)
		}
		got.want(t)
		select {
		case <-returned:
			t.Error("Publish returned while it was held")
		default:
		}
		release()
		<-returned
		got.want(t, "1:a")
	})
}

func TestHoldPushes_ReceiverGetsEverythingAfterItsRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		s := server.Session()
		defer s.Close()
		got := open(t, s)
		release := s.HoldPushes()
		publish(t, s, "a")
		got.want(t)
		release()
		got.want(t, "1:a")
	})
}

func TestNewEpochAndRewind_ChangeThePosition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		s := server.Session()
		defer s.Close()
		open(t, s)
		publish(t, s, "a", "b", "c")
		read := func() engine.Snapshot {
			snapshot, err := s.Read(t.Context(), "hub", engine.Position{})
			if err != nil {
				t.Fatal(err)
			}
			return snapshot
		}
		first := read()
		server.NewEpoch("hub")
		second := read()
		if second.Epoch == first.Epoch || second.Seq != 3 || len(second.Entries) != 3 {
			t.Errorf("the new epoch has %+v, want three entries of another epoch", second)
		}
		server.Rewind("hub", 1)
		third := read()
		if third.Epoch == second.Epoch || third.Seq != 1 || len(third.Entries) != 1 {
			t.Errorf("after going back there is %+v, want one entry of another epoch", third)
		}
		server.Wipe()
		fourth := read()
		if fourth.Epoch == third.Epoch || fourth.Seq != 0 || len(fourth.Entries) != 0 {
			t.Errorf("after the loss there is %+v, want no entry of another epoch", fourth)
		}
		renewal, err := s.Renew(t.Context(), engine.Status{}, []engine.Known{{Hub: "hub", Position: third.Position, Bounds: bounds}})
		if err != nil || !renewal.Forgotten || len(renewal.Changed) != 1 || renewal.Changed[0].Position != fourth.Position {
			t.Errorf("Renew after the loss returned %+v, %v", renewal, err)
		}
		if s.Number() == 1 {
			t.Error("the number did not change after the loss")
		}
	})
}

func TestForgetReceipts_LaterAttemptsAreUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		s := server.Session()
		defer s.Close()
		publish(t, s, "a")
		server.ForgetReceipts("hub")
		again := engine.Batch{Bounds: bounds, Messages: []engine.Message{{Key: engine.Key{'a'}, Attempt: engine.Again}}}
		receipts, err := s.Publish(t.Context(), "hub", again)
		if err != nil || !receipts[0].Unknown {
			t.Errorf("the second attempt returned %+v, %v; want unknown", receipts, err)
		}
		time.Sleep(bounds.Age)
		receipts, err = s.Publish(t.Context(), "hub", again)
		if err != nil || receipts[0].Unknown {
			t.Errorf("after the age the second attempt returned %+v, %v; want it published", receipts, err)
		}
	})
}

func TestKill_UsersLeaveWhenTheLeaseIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		one, two := server.Session(), server.Session()
		defer two.Close()
		left, got := open(t, one), open(t, two)
		if err := one.Announce(t.Context(), "hub", []engine.UserCount{{User: "ann", Clients: 2}}); err != nil {
			t.Fatal(err)
		}
		one.Kill()
		one.Leave("hub", left) // a process that was killed does nothing
		if _, err := two.Renew(t.Context(), engine.Status{}, nil); err != nil {
			t.Fatal(err)
		}
		got.want(t, "1:[{ann 2}]")
		time.Sleep(engine.Lease)
		if _, err := two.Renew(t.Context(), engine.Status{}, nil); err != nil {
			t.Fatal(err)
		}
		got.want(t, "1:[{ann 2}]", "2:[{ann 0}]")
	})
}

func TestPublish_RefusesARepeatedNumberWithOtherMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer().Session()
		defer s.Close()
		got := open(t, s)
		for i, data := range []string{"a", "b"} {
			batch := engine.Batch{Bounds: bounds, Number: 1, Messages: []engine.Message{{Data: []byte(data)}}}
			if _, err := s.Publish(t.Context(), "hub", batch); (err != nil) != (i == 1) {
				t.Errorf("batch 1 with %s returned %v", data, err)
			}
		}
		got.want(t, "1:a")
	})
}

func TestLeave_TakesBackAnnouncementsOnceTheServerIsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		one, two := server.Session(), server.Session()
		defer one.Close()
		defer two.Close()
		left, got := open(t, one), open(t, two)
		if err := one.Announce(t.Context(), "hub", []engine.UserCount{{User: "ann", Clients: 1}}); err != nil {
			t.Fatal(err)
		}
		one.Down(errors.New("partition"))
		one.Leave("hub", left)
		got.want(t, "1:[{ann 1}]")
		one.Up()
		got.want(t, "1:[{ann 1}]", "2:[{ann 0}]")
	})
}

func TestPublish_RefusesWhatNoHubMayHave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer().Session()
		defer s.Close()
		message := engine.Message{Data: []byte("a")}
		batches := map[string][]engine.Message{
			"":                       {message},
			strings.Repeat("x", 256): {message},
			"\xff":                   {message},
			"no message":             nil,
			"too many":               slices.Repeat([]engine.Message{message}, 65),
		}
		for hub, messages := range batches {
			_, err := s.Publish(t.Context(), hub, engine.Batch{Bounds: bounds, Messages: messages})
			if !errors.Is(err, engine.ErrUnavailable) {
				t.Errorf("Publish of %d messages in hub %q returned %v, want ErrUnavailable", len(messages), hub, err)
			}
		}
	})
}
