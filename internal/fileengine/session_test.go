package fileengine

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

func TestOpen_ReturnsWhatWasPublished(t *testing.T) {
	s := open(t, t.TempDir())
	receipts := publish(t, s, "hub", "a", "b")
	publish(t, s, "other", "x")
	publish(t, s, "hub", "c")
	snapshot := openHub(t, s, "hub")
	if got, want := dataOf(snapshot), []string{"a", "b", "c"}; !slices.Equal(got, want) {
		t.Errorf("got entries %q, want %q", got, want)
	}
	if want := (engine.Position{Epoch: receipts[0].Epoch, Seq: 3}); snapshot.Position != want || snapshot.Base != 0 {
		t.Errorf("got position %v and base %d, want %v and 0", snapshot.Position, snapshot.Base, want)
	}
	if got, want := snapshot.Entries[1].At, receipts[1].At; !got.Equal(want) {
		t.Errorf("got time %v, want that of the receipt, %v", got, want)
	}
}

func TestOpen_NewHubHasAnEpochAndNoEntries(t *testing.T) {
	s := open(t, t.TempDir())
	snapshot := openHub(t, s, "hub")
	if snapshot.Epoch == "" || snapshot.Seq != 0 || snapshot.Base != 0 || len(snapshot.Entries) != 0 {
		t.Errorf("got %+v, want an epoch and nothing else", snapshot)
	}
	if got := publish(t, s, "hub", "a")[0].Position; got != (engine.Position{Epoch: snapshot.Epoch, Seq: 1}) {
		t.Errorf("got position %v of the first message, want number 1 in epoch %s", got, snapshot.Epoch)
	}
	if other := openHub(t, s, "other"); other.Epoch == snapshot.Epoch {
		t.Errorf("two hubs have epoch %s", other.Epoch)
	}
}

func TestOpen_EpochOfANewHubOutlivesCallsThatPublishNothing(t *testing.T) {
	s := open(t, t.TempDir())
	snapshot := openHub(t, s, "hub")
	publishKeyed(t, s, "hub", testBounds, 1, engine.Lookup)
	if got := publish(t, s, "hub", "a")[0].Epoch; got != snapshot.Epoch {
		t.Errorf("the first message has epoch %s, want %s", got, snapshot.Epoch)
	}
}

func TestOpen_WithoutMessagesWritesNothing(t *testing.T) {
	f := openTestFile(t, t.TempDir())
	before := f.newest()
	s := startOn(t, f, &monitor{}, time.Now)
	openHub(t, s, "hub")
	inCommitter(t, s, func() {
		if after := f.newest(); after != before {
			t.Errorf("opening a hub has taken %d transactions", after-before)
		}
	})
}

func TestOpen_ReplacesTheReceiver(t *testing.T) {
	s := open(t, t.TempDir())
	first, second := &receiver{}, &receiver{}
	openHubWith(t, s, "hub", testBounds, first)
	openHubWith(t, s, "hub", testBounds, second)
	s.Leave("hub", first) // too late: it has been replaced
	publish(t, s, "hub", "a")
	if got := first.received(); len(got) != 0 {
		t.Errorf("the replaced receiver got %q", got)
	}
	if got, want := second.received(), []string{"a"}; !slices.Equal(got, want) {
		t.Errorf("the receiver got %q, want %q", got, want)
	}
}

func TestOpen_HasNoGapWhileOthersPublish(t *testing.T) {
	s := open(t, t.TempDir())
	ctx, stop := context.WithCancel(t.Context())
	var publishers sync.WaitGroup
	for range 4 {
		publishers.Go(func() {
			for ctx.Err() == nil {
				if _, err := s.Publish(t.Context(), "hub", engine.Batch{Bounds: testBounds, Messages: messages("x", "y")}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 100 {
		to := &receiver{}
		snapshot := openHubWith(t, s, "hub", testBounds, to)
		eventually(t, "the receiver gets something", func() bool { return len(to.received()) > 0 })
		s.Leave("hub", to)
		inCommitter(t, s, func() {}) // no call of the receiver is running any more
		if got := snapshot.Base + uint64(len(snapshot.Entries)); got != snapshot.Seq {
			t.Fatalf("the snapshot ends at %d, and its number is %d", got, snapshot.Seq)
		}
		for i, n := range to.numbers {
			if want := snapshot.Seq + 1 + uint64(i); n != want {
				t.Fatalf("the receiver got number %d, want %d", n, want)
			}
		}
	}
	stop()
	publishers.Wait()
}

func TestLeave_EndsWhatTheReceiverGets(t *testing.T) {
	s := open(t, t.TempDir())
	to := &receiver{}
	openHubWith(t, s, "hub", testBounds, to)
	publish(t, s, "hub", "a")
	s.Leave("hub", to)
	publish(t, s, "hub", "b")
	if got, want := to.received(), []string{"a"}; !slices.Equal(got, want) {
		t.Errorf("the receiver got %q, want %q", got, want)
	}
	s.Leave("unknown", to) // does nothing
}

func TestPublish_NumbersMessagesInTheirOrder(t *testing.T) {
	now := newClock()
	s := openAt(t, t.TempDir(), now.Now)
	publish(t, s, "hub", "a")
	now.advance(1234567 * time.Nanosecond)
	receipts := publish(t, s, "hub", "b", "c")
	for i, r := range receipts {
		if want := uint64(i + 2); r.Seq != want || r.Repeated || r.Unknown {
			t.Errorf("got receipt %+v, want number %d", r, want)
		}
		if want := now.Now().Truncate(time.Millisecond); !r.At.Equal(want) {
			t.Errorf("got time %v, want %v", r.At, want)
		}
	}
}

func TestPublish_PassesEntriesBeforeItReturns(t *testing.T) {
	s := open(t, t.TempDir())
	to := &receiver{}
	snapshot := openHubWith(t, s, "hub", testBounds, to)
	publish(t, s, "hub", "a", "b")
	publish(t, s, "hub", "c")
	if got, want := to.received(), []string{"a", "b", "c"}; !slices.Equal(got, want) {
		t.Errorf("the receiver got %q, want %q", got, want)
	}
	if want := []uint64{1, 2, 3}; !slices.Equal(to.numbers, want) {
		t.Errorf("the receiver got numbers %d, want %d", to.numbers, want)
	}
	if to.epochs[0] != snapshot.Epoch {
		t.Errorf("the receiver got epoch %s, want %s", to.epochs[0], snapshot.Epoch)
	}
}

func TestPublish_CopiesTheData(t *testing.T) {
	s := open(t, t.TempDir())
	data := []byte("before")
	var kept engine.Entry
	openHubWith(t, s, "hub", testBounds, receiverFunc(func(_ string, _ uint64, entries []engine.Entry) { kept = entries[0] }))
	publishBatch(t, s, "hub", engine.Batch{Bounds: testBounds, Messages: []engine.Message{{Data: data}}})
	copy(data, "after!")
	if string(kept.Data) != "before" {
		t.Errorf("the entry has changed to %q with the buffer of the sender", kept.Data)
	}
}

// A receiverFunc is a receiver of entries.
type receiverFunc func(epoch string, first uint64, entries []engine.Entry)

func (f receiverFunc) Entries(epoch string, first uint64, entries []engine.Entry) {
	f(epoch, first, entries)
}
func (f receiverFunc) Users(uint64, engine.NodeID, []engine.UserCount) {}

func TestPublish_KeepsWhatTheBoundsSay(t *testing.T) {
	tests := []struct {
		name      string
		bounds    engine.Bounds
		published int // of 10 bytes each
		least     int // that must be there
		most      int // that may be stored
	}{
		{"all", engine.Bounds{Messages: 100, Bytes: 1000, Age: time.Hour}, 50, 50, 50},
		{"messages", engine.Bounds{Messages: 16, Bytes: 1000, Age: time.Hour}, 50, 16, 18},
		{"one", engine.Bounds{Messages: 1, Bytes: 1000, Age: time.Hour}, 50, 1, 1},
		{"none", engine.Bounds{Messages: 0, Bytes: 1000, Age: time.Hour}, 50, 0, 0},
		{"bytes", engine.Bounds{Messages: 100, Bytes: 160, Age: time.Hour}, 50, 16, 18},
		{"newest is larger", engine.Bounds{Messages: 100, Bytes: 5, Age: time.Hour}, 50, 1, 1},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := open(t, t.TempDir())
			for i := range test.published {
				publishBatch(t, s, "hub", engine.Batch{Bounds: test.bounds, Messages: messages(fmt.Sprintf("%010d", i))})
			}
			snapshot := lookWith(t, s, "hub", test.bounds)
			if got := len(snapshot.Entries); got != test.least {
				t.Errorf("got %d entries, want %d", got, test.least)
			}
			if got := int(snapshot.Seq); got != test.published {
				t.Errorf("got number %d, want %d", got, test.published)
			}
			if n := len(snapshot.Entries); n > 0 && string(snapshot.Entries[n-1].Data) != fmt.Sprintf("%010d", test.published-1) {
				t.Errorf("got newest entry %q", snapshot.Entries[n-1].Data)
			}
			stored := lookWith(t, s, "hub", engine.Bounds{Messages: 1000, Bytes: 10000, Age: time.Hour})
			if got := len(stored.Entries); got < test.least || got > test.most {
				t.Errorf("the file has %d entries, want %d to %d", got, test.least, test.most)
			}
			checkSums(t, s)
		})
	}
}

func TestOpen_LeavesOutWhatIsTooOld(t *testing.T) {
	now := newClock()
	s := openAt(t, t.TempDir(), now.Now)
	publish(t, s, "hub", "a")
	now.advance(40 * time.Minute)
	publish(t, s, "hub", "b")
	now.advance(40 * time.Minute)
	snapshot := look(t, s, "hub")
	if got, want := dataOf(snapshot), []string{"b"}; !slices.Equal(got, want) {
		t.Errorf("got entries %q, want %q", got, want)
	}
	if snapshot.Base != 1 || snapshot.Seq != 2 {
		t.Errorf("got entries after %d up to %d, want after 1 up to 2", snapshot.Base, snapshot.Seq)
	}
	if got, want := dataOf(lookWith(t, s, "hub", engine.Bounds{Messages: 10, Bytes: 100, Age: 2 * time.Hour})), []string{"a", "b"}; !slices.Equal(got, want) {
		t.Errorf("got entries %q with a longer age, want %q", got, want)
	}
}

func TestPublish_RemovesWhatIsTooOld(t *testing.T) {
	now := newClock()
	s := openAt(t, t.TempDir(), now.Now)
	publishKeyed(t, s, "hub", testBounds, 1, engine.First)
	now.advance(2 * time.Hour)
	publishKeyed(t, s, "hub", testBounds, 2, engine.First)
	stored := lookWith(t, s, "hub", engine.Bounds{Messages: 10, Bytes: 100, Age: 10 * time.Hour})
	if got, want := dataOf(stored), []string{"keyed 2"}; !slices.Equal(got, want) {
		t.Errorf("the file has %q, want %q", got, want)
	}
	checkSums(t, s)
}

func TestPublish_PublishesAKeyOnce(t *testing.T) {
	s := open(t, t.TempDir())
	to := &receiver{}
	openHubWith(t, s, "hub", testBounds, to)
	first := publishKeyed(t, s, "hub", testBounds, 1, engine.First)
	for _, attempt := range []engine.Attempt{engine.First, engine.Again, engine.Lookup} {
		again := publishKeyed(t, s, "hub", testBounds, 1, attempt)
		if !again.Repeated || again.Unknown || again.Position != first.Position || !again.At.Equal(first.At) {
			t.Errorf("attempt %d: got receipt %+v, want that of the first one, repeated: %+v", attempt, again, first)
		}
	}
	if got := publishKeyed(t, s, "other", testBounds, 1, engine.First); got.Repeated {
		t.Error("the key of a message in another hub counts as repeated")
	}
	if got := to.received(); len(got) != 1 {
		t.Errorf("the receiver got %q, want one entry", got)
	}
}

func TestPublish_PublishesAKeyOnceInABatch(t *testing.T) {
	s := open(t, t.TempDir())
	to := &receiver{}
	openHubWith(t, s, "hub", testBounds, to)
	batch := engine.Batch{Bounds: testBounds, Messages: messages("a", "b", "c", "d")}
	batch.Messages[0].Key = engine.Key{1}
	batch.Messages[2].Key = engine.Key{1}
	receipts := publishBatch(t, s, "hub", batch)
	if !receipts[2].Repeated || receipts[2].Seq != 1 || receipts[3].Seq != 3 {
		t.Errorf("got receipts %+v, want the third message repeated", receipts)
	}
	if got, want := to.received(), []string{"a", "b", "d"}; !slices.Equal(got, want) {
		t.Errorf("the receiver got %q, want %q", got, want)
	}
}

func TestPublish_AnswersUnknownKeys(t *testing.T) {
	s := open(t, t.TempDir())
	if got := publishKeyed(t, s, "hub", testBounds, 1, engine.Lookup); !got.Unknown {
		t.Errorf("got %+v for a lookup, want unknown", got)
	}
	if got := publishKeyed(t, s, "hub", testBounds, 1, engine.Again); got.Unknown || got.Repeated || got.Seq != 1 {
		t.Errorf("got %+v for another attempt, want the message published", got)
	}
	few := testBounds
	few.Receipts = 8
	for key := range 10 {
		publishKeyed(t, s, "hub", few, byte(key+1), engine.First) // more than 9 are trimmed to 8
	}
	if got := publishKeyed(t, s, "hub", few, 100, engine.Again); !got.Unknown {
		t.Errorf("got %+v for another attempt after a receipt was lost, want unknown", got)
	}
	if got := publishKeyed(t, s, "hub", few, 100, engine.First); got.Unknown || got.Repeated {
		t.Errorf("got %+v for a first attempt, want the message published", got)
	}
	checkSums(t, s)
}

func TestPublish_ReceiptsLastForTheAge(t *testing.T) {
	now := newClock()
	s := openAt(t, t.TempDir(), now.Now)
	publishKeyed(t, s, "hub", testBounds, 1, engine.First)
	now.advance(59 * time.Minute)
	if got := publishKeyed(t, s, "hub", testBounds, 1, engine.First); !got.Repeated {
		t.Errorf("got %+v within the age, want repeated", got)
	}
	now.advance(2 * time.Minute)
	if got := publishKeyed(t, s, "hub", testBounds, 1, engine.Again); got.Repeated || got.Unknown {
		t.Errorf("got %+v after the age, want the message published", got)
	}
	now.advance(59 * time.Minute)
	publishKeyed(t, s, "hub", testBounds, 2, engine.First) // removes the first receipt of key 1
	if got := publishKeyed(t, s, "hub", testBounds, 1, engine.First); !got.Repeated {
		t.Errorf("got %+v within the age of the second message, want repeated", got)
	}
	checkSums(t, s)
}

func TestPublish_LostReceiptsMatterForTheAge(t *testing.T) {
	now := newClock()
	folder := t.TempDir()
	s := openAt(t, folder, now.Now)
	few := testBounds
	few.Receipts = 1
	publishKeyed(t, s, "hub", few, 1, engine.First)
	publishKeyed(t, s, "hub", few, 2, engine.First)
	now.advance(59 * time.Minute)
	closeSession(t, s)
	s = openAt(t, folder, now.Now)
	if got := publishKeyed(t, s, "hub", few, 1, engine.Again); !got.Unknown {
		t.Errorf("got %+v, want unknown", got)
	}
	now.advance(2 * time.Minute)
	if got := publishKeyed(t, s, "hub", few, 1, engine.Again); got.Unknown {
		t.Errorf("got %+v after the age of the lost receipt, want the message published", got)
	}
}

func TestPublish_RepeatsTheReceiptsOfANumber(t *testing.T) {
	s := open(t, t.TempDir())
	to := &receiver{}
	openHubWith(t, s, "hub", testBounds, to)
	batch := engine.Batch{Bounds: testBounds, Messages: messages("a", "b"), Number: 7}
	first := publishBatch(t, s, "hub", batch)
	again := publishBatch(t, s, "hub", batch)
	if !slices.Equal(first, again) {
		t.Errorf("got receipts %+v, want those of the first call, %+v", again, first)
	}
	if got := to.received(); len(got) != 2 {
		t.Errorf("the receiver got %q, want two entries", got)
	}
	batch.Number = 6
	_, err := s.Publish(t.Context(), "hub", batch)
	mustBeUnavailable(t, err)
	if got := publishBatch(t, s, "other", batch)[0]; got.Seq != 1 {
		t.Errorf("got %+v in another hub, want the batch published", got)
	}
}

func TestSession_SurvivesARestart(t *testing.T) {
	folder := t.TempDir()
	s := open(t, folder)
	publish(t, s, "hub", "a", "b")
	keyed := publishKeyed(t, s, "hub", testBounds, 1, engine.First)
	closeSession(t, s)

	s = open(t, folder)
	if got := publishKeyed(t, s, "hub", testBounds, 1, engine.Again); !got.Repeated || got.Position != keyed.Position || !got.At.Equal(keyed.At) {
		t.Errorf("got receipt %+v, want %+v, repeated", got, keyed)
	}
	if got := publish(t, s, "hub", "c")[0].Position; got != (engine.Position{Epoch: keyed.Epoch, Seq: 4}) {
		t.Errorf("got position %v, want number 4 in epoch %s", got, keyed.Epoch)
	}
	if got, want := dataOf(look(t, s, "hub")), []string{"a", "b", "keyed 1", "c"}; !slices.Equal(got, want) {
		t.Errorf("got entries %q, want %q", got, want)
	}
}

func TestForget_BeginsAnEpochAndKeepsReceipts(t *testing.T) {
	folder := t.TempDir()
	s := open(t, folder)
	before := publishKeyed(t, s, "hub", testBounds, 1, engine.First)
	if err := s.Forget(t.Context(), "hub"); err != nil {
		t.Fatal(err)
	}
	snapshot := look(t, s, "hub")
	if snapshot.Epoch == before.Epoch || snapshot.Seq != 0 || len(snapshot.Entries) != 0 {
		t.Errorf("got %+v, want number 0 without entries in another epoch than %s", snapshot, before.Epoch)
	}
	closeSession(t, s)
	s = open(t, folder)
	after := publish(t, s, "hub", "b")[0]
	if want := (engine.Position{Epoch: snapshot.Epoch, Seq: 1}); after.Position != want {
		t.Errorf("got position %v, want %v", after.Position, want)
	}
	if got := publishKeyed(t, s, "hub", testBounds, 1, engine.First); !got.Repeated || got.Position != before.Position {
		t.Errorf("got receipt %+v, want %+v, repeated", got, before)
	}
	checkSums(t, s)
}

func TestForget_OfAHubWithoutMessages(t *testing.T) {
	s := open(t, t.TempDir())
	before := openHub(t, s, "hub")
	if err := s.Forget(t.Context(), "hub"); err != nil {
		t.Fatal(err)
	}
	if after := openHub(t, s, "hub"); after.Epoch == before.Epoch {
		t.Errorf("the epoch is still %s", after.Epoch)
	}
}

func TestSession_RefusesNamesThatNoHubHas(t *testing.T) {
	s := open(t, t.TempDir())
	for _, name := range []string{"", strings.Repeat("x", 256)} {
		_, err := s.Open(t.Context(), name, testBounds, &receiver{})
		mustBeUnavailable(t, err)
		_, err = s.Publish(t.Context(), name, engine.Batch{Bounds: testBounds, Messages: messages("a")})
		mustBeUnavailable(t, err)
		mustBeUnavailable(t, s.Forget(t.Context(), name))
	}
	publish(t, s, strings.Repeat("x", 255), "a")
}

func TestClose_EndsCalls(t *testing.T) {
	m := &monitor{}
	s := startOn(t, openTestFile(t, t.TempDir()), m, time.Now)
	closeSession(t, s)
	_, err := s.Open(t.Context(), "hub", testBounds, &receiver{})
	mustBeUnavailable(t, err)
	_, err = s.Publish(t.Context(), "hub", engine.Batch{Bounds: testBounds, Messages: messages("a")})
	mustBeUnavailable(t, err)
	mustBeUnavailable(t, s.Forget(t.Context(), "hub"))
	if got := m.reported(); len(got) != 1 || got[0] != nil {
		t.Errorf("the monitor got %v, want that the session works", got)
	}
}

func TestClose_WhileOthersPublish(t *testing.T) {
	folder := t.TempDir()
	s := open(t, folder)
	acknowledged := make([]uint64, 8)
	var publishers sync.WaitGroup
	for i := range acknowledged {
		publishers.Go(func() {
			for {
				receipts, err := s.Publish(t.Context(), fmt.Sprint("hub ", i), engine.Batch{Bounds: testBounds, Messages: messages("x")})
				if err != nil {
					mustBeUnavailable(t, err)
					return
				}
				acknowledged[i] = receipts[0].Seq
			}
		})
	}
	eventually(t, "messages are published", func() bool { return look(t, s, "hub 0").Seq > 3 })
	closeSession(t, s)
	publishers.Wait()
	s = open(t, folder)
	for i, want := range acknowledged {
		if got := look(t, s, fmt.Sprint("hub ", i)).Seq; got != want {
			t.Errorf("hub %d has number %d, want %d", i, got, want)
		}
	}
}

// TestSession_ManyHubs opens and publishes in more hubs than one transaction takes.
func TestSession_ManyHubs(t *testing.T) {
	folder := t.TempDir()
	s := open(t, folder)
	fill(t, s, 10_000, 2, 10)
	closeSession(t, s)
	began := time.Now()
	s = open(t, folder)
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("opening a file with 10,000 hubs took %v", took)
	}
	for i := range 10_000 {
		if got := look(t, s, fmt.Sprintf("hub %d", i)); got.Seq != 2 || len(got.Entries) != 2 {
			t.Fatalf("hub %d has %d entries up to %d, want 2", i, len(got.Entries), got.Seq)
		}
	}
	checkSums(t, s)
}

// TestSession_FileStaysSmall publishes so much that each hub replaces what it keeps many times. Only syncing is left
// out, which takes most of the time.
func TestSession_FileStaysSmall(t *testing.T) {
	const hubs, kept, size = 20, 200, 128
	folder := t.TempDir()
	f := openTestFile(t, folder)
	f.db.NoSync = true
	s := startOn(t, f, &monitor{}, time.Now)
	bounds := testBounds
	bounds.Messages = kept
	var publishers sync.WaitGroup
	for h := range hubs {
		publishers.Go(func() {
			for n := range 400 {
				batch := engine.Batch{Bounds: bounds}
				for range 1 + n%5 {
					batch.Messages = append(batch.Messages, engine.Message{Data: make([]byte, size)})
				}
				if _, err := s.Publish(t.Context(), fmt.Sprint("hub ", h), batch); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	publishers.Wait()
	info, err := os.Stat(dbPath(folder))
	if err != nil {
		t.Fatal(err)
	}
	if got, limit := info.Size(), int64(3*hubs*kept*size+1<<20); got > limit {
		t.Errorf("the file has %d bytes, want at most %d", got, limit)
	}
	checkSums(t, s)
}

// checkSums checks that what the records say of hubs is what the file has, and that nothing is left of other hubs.
func checkSums(t *testing.T, s *Session) {
	t.Helper()
	tx, err := s.file.db.Begin(false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback() }()
	for err := range tx.Check() {
		t.Errorf("bbolt: %v", err)
	}
	tables := tablesOf(tx, time.Now())
	entries, receipts, hubs := 0, 0, 0
	err = tables.hubs.ForEach(func(name, value []byte) error {
		r, err := decodeRecord(string(name), value)
		if err != nil {
			return err
		}
		hubs++
		bytes := 0
		for seq := r.entries.base + 1; seq <= r.entries.head; seq++ {
			key := pairKey(r.id, seq)
			e, err := decodeEntry(key, tables.entries.Get(key))
			if err != nil {
				return err
			}
			bytes += len(e.data)
			entries++
		}
		if uint64(bytes) != r.bytes {
			t.Errorf("hub %q has %d bytes, and its record says %d", name, bytes, r.bytes)
		}
		if tables.expiry.Get(pairKey(r.due, r.id)) == nil {
			t.Errorf("hub %q is not scheduled for the sweep", name)
		}
		return tables.eachReceipt(r, func(uint64, storedReceipt) { receipts++ })
	})
	if err != nil {
		t.Error(err)
	}
	for _, count := range []struct {
		what      string
		got, want int
	}{
		{"entries", tables.entries.Stats().KeyN, entries},
		{"receipts", tables.receipts.Stats().KeyN, receipts},
		{"times of sweeps", tables.expiry.Stats().KeyN, hubs},
	} {
		if count.got != count.want {
			t.Errorf("the file has %d %s, and the records say %d", count.got, count.what, count.want)
		}
	}
}
