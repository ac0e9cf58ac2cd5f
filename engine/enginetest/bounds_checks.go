package enginetest

import (
	"bytes"
	"fmt"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// boundsChecks are what every session has to pass about what it keeps. Within the bounds is what it must keep, and
// twice as much is what it may keep.
func boundsChecks() []check {
	return []check{
		{"Bounds_Messages", checkMessagesBound},
		{"Bounds_NoMessages", checkNoMessages},
		{"Bounds_Bytes", checkBytesBound},
		{"Bounds_NewestEntryIsKept", checkLargeEntry},
		{"Bounds_Age", checkAgeBound},
		{"Bounds_AgeOfReceipts", checkReceiptAge},
		{"Bounds_Receipts", checkReceiptsBound},
		{"Bounds_AgainIsPublishedWhenTheAgeIsOver", checkAgainAfterAge},
		{"Bounds_OldHubHasNothing", checkOldHub},
		{"Bounds_OpenHubIsNotForgotten", checkOldOpenHub},
	}
}

// shortAge is the age in the checks that wait for its end. A busy machine may need this long for a call.
const shortAge = time.Second / 2

func checkMessagesBound(s *suite) {
	c := s.connect()
	bounds := roomy
	bounds.Messages = 10
	for i, sizes := range [][]int{{1}, {3}, {64}, {7, 1, 12}} {
		hub := fmt.Sprint("hub ", i)
		published := 0
		for published < 70 {
			n := sizes[published%len(sizes)]
			c.publishBatch(hub, engine.Batch{Bounds: bounds, Messages: s.messages(n)})
			published += n
			snapshot := c.open(hub, bounds).snapshot
			if kept := len(snapshot.Entries); kept < min(published, 10) || kept > 20 {
				s.Errorf("of %d messages the hub has %d, want 10 to 20", published, kept)
			}
			if snapshot.Seq != uint64(published) {
				s.Errorf("after %d messages the hub is at number %d", published, snapshot.Seq)
			}
		}
	}
}

func checkNoMessages(s *suite) {
	c := s.connect()
	bounds := roomy
	bounds.Messages = 0
	f := c.open("hub", bounds)
	s.awaitReceipts(f, c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: texts("a", "b")}))
	s.wantTexts(f, "a", "b")
	if got := c.open("hub", bounds).snapshot; got.Base != 2 || len(got.Entries) != 0 {
		s.Errorf("a hub that keeps nothing has %d entries after number %d, want none after 2", len(got.Entries), got.Base)
	}
}

func checkBytesBound(s *suite) {
	c := s.connect()
	bounds := roomy
	bounds.Bytes = 1000
	for published := 1; published <= 50; published++ {
		c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: []engine.Message{{Data: make([]byte, 100)}}})
		if kept := len(c.open("hub", bounds).snapshot.Entries); kept < min(published, 10) || kept > 20 {
			s.Errorf("of %d messages of 100 bytes the hub has %d, want 10 to 20", published, kept)
		}
	}
}

func checkLargeEntry(s *suite) {
	c := s.connect()
	bounds := roomy
	bounds.Bytes = 10
	large := bytes.Repeat([]byte("x"), 100)
	c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: []engine.Message{{Data: []byte("a")}, {Data: large}}})
	f := c.open("hub", bounds)
	s.wantTexts(f, string(large))
	c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: texts("b")})
	s.wantTexts(c.open("hub", bounds), "b")
}

// An ageing is something that happened between two times, and what the engine remembers of it for shortAge.
type ageing struct{ began, ended time.Time }

// during notes when a call runs.
func during(call func()) ageing {
	began := time.Now()
	call()
	return ageing{began, time.Now()}
}

// awaitForgotten asks until the engine has forgotten something, which must neither be too early nor too late.
func (s *suite) awaitForgotten(a ageing, what string, remembers func() bool) {
	s.Helper()
	const rounding = 5 * time.Millisecond
	for {
		var remembered bool
		asked := during(func() { remembered = remembers() })
		if !remembered {
			if age := asked.ended.Sub(a.began); age < shortAge-rounding {
				s.Errorf("the engine has forgotten %s after %v, want it kept for %v", what, age, shortAge)
			}
			return
		}
		if age := asked.began.Sub(a.ended); age > 2*shortAge+rounding {
			s.Fatalf("the engine has %s after %v, want it forgotten after %v to %v", what, age, shortAge, 2*shortAge)
		}
		time.Sleep(shortAge / 50)
	}
}

func checkAgeBound(s *suite) {
	c := s.connect()
	bounds := roomy
	bounds.Age = shortAge
	var last engine.Position
	published := during(func() {
		last = c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: texts("a", "b")})[1].Position
	})
	s.awaitForgotten(published, "an entry", func() bool {
		snapshot := c.open("hub", bounds).snapshot
		if snapshot.Position != last {
			s.Fatalf("an open hub went from %v to %v by itself", last, snapshot.Position)
		}
		return len(snapshot.Entries) > 0
	})
}

func checkReceiptAge(s *suite) {
	c := s.connect()
	bounds := roomy
	bounds.Age = shortAge
	c.open("hub", bounds)
	messages := s.keyed(1)
	published := during(func() { c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: messages}) })
	messages[0].Attempt = engine.Lookup
	s.awaitForgotten(published, "a receipt", func() bool {
		r := c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: messages})[0]
		return r.Repeated
	})
	messages[0].Attempt = engine.First
	if r := c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: messages})[0]; r.Repeated || r.Seq != 2 {
		s.Errorf("the receipt of a message whose key was forgotten is %+v, want number 2", r)
	}
}

// checkReceiptsBound publishes more messages with keys than the engine remembers.
func checkReceiptsBound(s *suite) {
	c := s.connect()
	bounds := roomy
	bounds.Receipts = 10
	messages := s.keyed(45)
	for i := range messages {
		c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: messages[i : i+1]})
	}
	remembered := 0
	for i, m := range messages {
		for _, attempt := range []engine.Attempt{engine.Lookup, engine.Again} {
			m.Attempt = attempt
			r := c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: []engine.Message{m}})[0]
			switch {
			case r.Repeated && r.Seq == uint64(i)+1 && attempt == engine.Lookup:
				remembered++
			case r.Repeated && r.Seq == uint64(i)+1:
			case r.Unknown && i < len(messages)-10:
			default:
				s.Errorf("the receipt of message %d of %d, sent again, is %+v", i+1, len(messages), r)
			}
		}
	}
	if remembered < 10 || remembered > 20 {
		s.Errorf("the engine remembers %d receipts, want 10 to 20", remembered)
	}
	// The engine cannot know of a key that it may have forgotten. A first attempt is published nevertheless.
	fresh := s.keyed(1)
	fresh[0].Attempt = engine.Again
	if r := c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: fresh})[0]; !r.Unknown {
		s.Errorf("the receipt of a key that may be forgotten is %+v, want Unknown", r)
	}
	fresh[0].Attempt = engine.First
	if r := c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: fresh})[0]; r.Unknown || r.Repeated || r.Seq != 46 {
		s.Errorf("the receipt of a first attempt is %+v, want number 46", r)
	}
}

func checkAgainAfterAge(s *suite) {
	c := s.connect()
	bounds := roomy
	bounds.Receipts, bounds.Age = 1, shortAge
	c.open("hub", bounds)
	published := during(func() { c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: s.keyed(3)}) })
	fresh := s.keyed(1)
	fresh[0].Attempt = engine.Again
	s.awaitForgotten(published, "the note that it has forgotten receipts", func() bool {
		return c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: fresh})[0].Unknown
	})
}

// checkOldHub lets a hub grow old that is not open. The engine may then still have its epoch and its number, to forget
// many hubs at once, but nothing else.
func checkOldHub(s *suite) {
	c := s.connect()
	bounds := roomy
	bounds.Age = shortAge
	messages := s.keyed(1)
	old := c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: messages})[0]
	time.Sleep(2*shortAge + shortAge/10) // asking could keep the hub
	got := c.open("hub", bounds).snapshot
	if len(got.Entries) != 0 || got.Epoch == old.Epoch && got.Seq != old.Seq || got.Epoch != old.Epoch && got.Seq != 0 {
		s.Errorf("a hub that was at %v is after twice its age at %v with %d entries, want no entries and the same number, or a new hub",
			old.Position, got.Position, len(got.Entries))
	}
	want := engine.Position{Epoch: got.Epoch, Seq: got.Seq + 1}
	if r := c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: messages})[0]; r.Repeated || r.Position != want {
		s.Errorf("the receipt of a message, repeated after twice its age, is %+v, want %v", r, want)
	}
}

func checkOldOpenHub(s *suite) {
	c := s.connect()
	bounds := roomy
	bounds.Age = shortAge
	f := c.open("hub", bounds)
	old := c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: s.keyed(1)})[0]
	time.Sleep(3 * shortAge) // asking could keep the hub
	next := c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: s.messages(1)})[0]
	if want := (engine.Position{Epoch: old.Epoch, Seq: old.Seq + 1}); next.Position != want {
		s.Errorf("a message in a hub that was open for three times its age is at %v, want %v", next.Position, want)
	}
	s.await(f, next.Position)
}
