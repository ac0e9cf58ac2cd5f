package fileengine

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// sweepAll sweeps until nothing is left to do.
func sweepAll(t *testing.T, s *Session) {
	t.Helper()
	for pause := time.Duration(0); pause != sweepInterval; {
		inCommitter(t, s, func() { pause = s.sweep() })
	}
}

// stored returns whether the file has a hub.
func stored(t *testing.T, s *Session, hub string) bool {
	t.Helper()
	tx, err := s.file.db.Begin(false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback() }()
	return tx.Bucket([]byte(hubsBucket)).Get([]byte(hub)) != nil
}

func TestSweep_RemovesHubsAfterTheirAge(t *testing.T) {
	now := newClock()
	s := openAt(t, t.TempDir(), now.Now)
	short, long := testBounds, testBounds
	short.Age, long.Age = time.Minute, time.Hour
	first := publishKeyed(t, s, "short", short, 1, engine.First)
	publishKeyed(t, s, "long", long, 1, engine.First)
	now.advance(time.Minute)
	sweepAll(t, s)
	if !stored(t, s, "short") {
		t.Error("the hub was removed within its age")
	}
	now.advance(time.Second)
	sweepAll(t, s)
	if stored(t, s, "short") || !stored(t, s, "long") {
		t.Errorf("stored: short %v, long %v; want long only", stored(t, s, "short"), stored(t, s, "long"))
	}
	checkSums(t, s)
	again := publishKeyed(t, s, "short", short, 1, engine.Again)
	if again.Repeated || again.Unknown || again.Seq != 1 || again.Epoch == first.Epoch {
		t.Errorf("got %+v after the hub was forgotten, want number 1 in another epoch than %s", again, first.Epoch)
	}
	checkSums(t, s)
}

func TestSweep_KeepsHubsWithNewMessages(t *testing.T) {
	now := newClock()
	s := openAt(t, t.TempDir(), now.Now)
	publish(t, s, "hub", "a")
	for range 5 {
		now.advance(45 * time.Minute)
		publish(t, s, "hub", "b")
		sweepAll(t, s)
	}
	if got := look(t, s, "hub"); got.Seq != 6 {
		t.Errorf("got number %d, want 6", got.Seq)
	}
	checkSums(t, s)
}

func TestSweep_KeepsOpenHubs(t *testing.T) {
	now := newClock()
	s := openAt(t, t.TempDir(), now.Now)
	publish(t, s, "hub", "a")
	to := &receiver{}
	before := openHubWith(t, s, "hub", testBounds, to)
	for range 3 {
		now.advance(2 * time.Hour)
		sweepAll(t, s)
	}
	if old := lookWith(t, s, "hub", engine.Bounds{Messages: 10, Bytes: 100, Age: 100 * time.Hour}); len(old.Entries) != 0 {
		t.Errorf("the file still has %q, which have outlived their age", dataOf(old))
	}
	openHubWith(t, s, "hub", testBounds, to)
	if got := publish(t, s, "hub", "b")[0].Position; got != (engine.Position{Epoch: before.Epoch, Seq: 2}) {
		t.Errorf("got position %v, want number 2 in epoch %s", got, before.Epoch)
	}
	s.Leave("hub", to)
	now.advance(3 * time.Hour)
	sweepAll(t, s)
	if stored(t, s, "hub") {
		t.Error("the hub is still there after its age")
	}
	checkSums(t, s)
}

func TestSweep_UsesAShorterAgeOfALaterMessage(t *testing.T) {
	now := newClock()
	s := openAt(t, t.TempDir(), now.Now)
	publish(t, s, "hub", "a")
	short := testBounds
	short.Age = time.Minute
	publishBatch(t, s, "hub", engine.Batch{Bounds: short, Messages: messages("b")})
	now.advance(2 * time.Minute)
	sweepAll(t, s)
	if stored(t, s, "hub") {
		t.Error("the hub is still there after its age")
	}
}

func TestSweep_TakesBoundedSteps(t *testing.T) {
	now := newClock()
	f := openTestFile(t, t.TempDir())
	f.db.NoSync = true // it takes most of the time
	s := startOn(t, f, &monitor{}, now.Now)
	bounds := testBounds
	bounds.Messages = 2 * sweepItems
	for range 1 + 2*sweepItems/64 {
		batch := engine.Batch{Bounds: bounds}
		for range 64 {
			batch.Messages = append(batch.Messages, engine.Message{Data: []byte("x")})
		}
		publishBatch(t, s, "large", batch)
	}
	fill(t, s, 2*sweepHubs, 1, 10)
	now.advance(2 * time.Hour)
	steps := 0
	for pause := sweepPause; pause != sweepInterval; steps++ {
		inCommitter(t, s, func() { pause = s.sweep() })
		checkSums(t, s)
	}
	if steps < 4 {
		t.Errorf("the sweep took %d steps", steps)
	}
	for i := range 2 * sweepHubs {
		if name := fmt.Sprintf("hub %d", i); stored(t, s, name) {
			t.Errorf("%s is still there after its age", name)
		}
	}
	if stored(t, s, "large") {
		t.Error("the large hub is still there after its age")
	}
}

func TestSweep_WithNothingToDoWritesNothing(t *testing.T) {
	s := open(t, t.TempDir())
	publish(t, s, "hub", "a")
	inCommitter(t, s, func() {
		before := s.file.newest()
		s.sweep()
		if after := s.file.newest(); after != before {
			t.Errorf("the sweep took %d transactions", after-before)
		}
	})
}

func TestSweep_ReportsFailures(t *testing.T) {
	d, m, now := &disk{}, &monitor{}, newClock()
	s := startOn(t, d.on(openTestFile(t, t.TempDir())), m, now.Now)
	publish(t, s, "hub", "a")
	now.advance(2 * time.Hour)
	d.fail(errDisk)
	sweepAll(t, s)
	if got := m.reported(); len(got) != 2 || !errors.Is(got[1], errDisk) {
		t.Errorf("the monitor got %v, want the error", got)
	}
	d.fail(nil)
	sweepAll(t, s)
	if stored(t, s, "hub") {
		t.Error("the hub is still there after its age")
	}
}
