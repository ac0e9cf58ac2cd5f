package hub

import (
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestBudget_BoundIsAsConfiguredOrFourOfTheLargestBuffer(t *testing.T) {
	var b Budget
	b.SetMost(1000)
	if b.Bound() != 1000 || b.Goal() != 875 || b.Left() != 1250 {
		t.Errorf("got bound %d, goal %d and %d left, want 1000, 875 and 1250", b.Bound(), b.Goal(), b.Left())
	}
	b.raise(500)
	b.raise(300) // less changes nothing
	if b.Bound() != 2000 || b.Goal() != 1750 || b.Left() != 2500 {
		t.Errorf("got bound %d, goal %d and %d left, want 2000, 1750 and 2500", b.Bound(), b.Goal(), b.Left())
	}
	b.Add(3000)
	if b.Used() != 3000 || b.Left() != 0 {
		t.Errorf("got %d used and %d left, want 3000 and none", b.Used(), b.Left())
	}
	b.Add(-3000)
	b.SetMost(1 << 40)
	if b.Left() != math.MaxInt32 {
		t.Errorf("got %d left, want no more than an int has everywhere", b.Left())
	}
}

func TestBudget_RestsAfterASearchInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b Budget
		b.SetMost(10)
		if b.Add(10); b.Exceeded() {
			t.Error("got it exceeded at its bound")
		}
		if b.Add(1); !b.Exceeded() {
			t.Error("got it not exceeded beyond its bound")
		}
		b.Rest(time.Second)
		if b.Exceeded() {
			t.Error("got it exceeded while it rests")
		}
		time.Sleep(time.Second + time.Nanosecond)
		if !b.Exceeded() {
			t.Error("got it not exceeded after the rest")
		}
	})
}

// TestMemory_TrimGivesBackWhatNobodyNeeds has clients of both feeds behind by different amounts.
func TestMemory_TrimGivesBackWhatNobodyNeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := defaults()
		settings.WriteTimeout = time.Hour
		reader := s.join("reader", settings, false, nil)
		early, late := s.join("early", settings, false, nil), s.join("late", settings, true, nil)
		s.serve()
		payload := strings.Repeat("x", 3000)
		early.stuck = true
		s.publish(nil, payload)
		s.publish(nil, payload)
		late.stuck = true
		for range 10 {
			s.publish(nil, payload)
		}
		holders := s.hub.Trim()
		byClient := map[*Client]Holder{}
		for _, h := range holders {
			byClient[h.Client] = h
		}
		if len(holders) != 2 || byClient[early.Client].Bytes == 0 || byClient[late.Client].Bytes == 0 {
			t.Fatalf("got %+v, want the two that are behind", holders)
		}
		for _, h := range holders {
			if h.Stuck || h.Bytes < 10*3000 {
				t.Errorf("got %+v, want not stuck at the first look, and what it holds back", h)
			}
		}
		used := s.hub.process.Memory.Buffers.Used()
		if want := int64(s.hub.raw.Memory() + eventsFeed(s.hub).Memory()); used != want || used == 0 {
			t.Errorf("got %d bytes charged, want %d", used, want)
		}
		if tail, cursor := eventsFeed(s.hub).Tail(), late.cursor; tail != cursor {
			t.Errorf("got the feed of events from %d on, want from the cursor %d on", tail, cursor)
		}
		if tail, cursor := s.hub.raw.Tail(), early.cursor; tail != cursor {
			t.Errorf("got the raw feed from %d on, want from the cursor %d on", tail, cursor)
		}
		early.take()
		for _, h := range s.hub.Trim() {
			if h.Client != late.Client || !h.Stuck {
				t.Errorf("got %+v, want the client that has not gone on, and it is stuck", h)
			}
		}
		if got := s.hub.process.Memory.Buffers.Used(); got >= used {
			t.Errorf("got %d bytes charged when one has everything, want less than %d", got, used)
		}
		late.take()
		if got := s.hub.Trim(); got != nil {
			t.Errorf("got %+v when all have everything", got)
		}
		if got := s.hub.process.Memory.Buffers.Used(); got != 0 {
			t.Errorf("got %d bytes charged when all have everything", got)
		}
		for _, a := range []*manualClient{reader, early, late} {
			s.leave(a)
		}
	})
}

// TestMemory_FeedsShrinkWhileOthersTakeEverything has the budget of buffers used up by other hubs.
func TestMemory_FeedsShrinkWhileOthersTakeEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := defaults()
		settings.SkipLag = true
		ada := s.join("ada", settings, false, nil)
		s.serve()
		ada.stuck = true
		fill := func() int {
			for range 30 {
				s.publish(nil, strings.Repeat("x", 30_000))
			}
			return s.hub.raw.Bytes()
		}
		if got := fill(); got < 800_000 {
			t.Errorf("got %d bytes kept, want almost all", got)
		}
		s.hub.process.Memory.Buffers.Add(1 << 40)
		if got := fill(); got > 160_000 || got < 100_000 {
			t.Errorf("got %d bytes kept, want about 128 KiB, which each hub may keep", got)
		}
		s.hub.process.Memory.Buffers.Add(-1 << 40)
		ada.take()
		s.leave(ada)
	})
}

// TestMemory_HistoriesGiveBack forgets messages, and then receipts.
func TestMemory_HistoriesGiveBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		b := s.hub
		if b.HasHistory() || b.Forget() != 0 || b.ForgetReceipts() != 0 {
			t.Error("a hub without history has some")
		}
		b.Grow(historyOfTen())
		if !b.HasHistory() || b.KeptFor() != time.Minute {
			t.Errorf("got history %v for %v, want it for a minute", b.HasHistory(), b.KeptFor())
		}
		var last time.Time
		for i := range 3 {
			time.Sleep(time.Second)
			m := textMessage("hello")
			m.Key = Key{"ada", "epoch-t", string(rune('a' + i))}
			r, _ := publishIn(b, m)
			last = r.At
		}
		bytes, newest := b.Remembered()
		if int64(bytes) != b.process.Memory.Histories.Used() || bytes == 0 || !newest.Equal(last) {
			t.Errorf("got %d bytes and %v, want %d and %v", bytes, newest, b.process.Memory.Histories.Used(), last)
		}
		time.Sleep(10 * time.Second)
		if got := b.CloseIfAged(); got != 50*time.Second {
			t.Errorf("got %v remaining, want 50s", got)
		}
		freed := b.Forget()
		left, newest := b.Remembered()
		if freed+left != bytes || freed == 0 || left == 0 || !newest.IsZero() {
			t.Errorf("got %d bytes freed and %d left of %d, newest %v", freed, left, bytes, newest)
		}
		if got := b.ForgetReceipts(); got != left {
			t.Errorf("got %d bytes of receipts freed, want %d", got, left)
		}
		if got := b.process.Memory.Histories.Used(); got != 0 {
			t.Errorf("got %d bytes left", got)
		}
		b.Close()
		if b.Forget() != 0 || b.ForgetReceipts() != 0 {
			t.Error("a closed hub gives something back")
		}
	})
}
