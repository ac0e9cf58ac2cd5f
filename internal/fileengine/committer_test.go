package fileengine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"go.etcd.io/bbolt"
)

// A disk decides what becomes of the transactions of a file.
type disk struct {
	commits atomic.Int32
	err     atomic.Pointer[error] // of transactions that are rolled back
	unsure  atomic.Bool           // whether transactions that succeed return an error
	begun   chan struct{}         // gets a value when a transaction is about to begin, if it is not nil
	proceed chan struct{}
}

var errDisk = errors.New("the disk does not work")

// on makes the file use the disk.
func (d *disk) on(f *file) *file {
	f.commit = func(db *bbolt.DB, fn func(*bbolt.Tx) error) error {
		d.commits.Add(1)
		if d.begun != nil {
			d.begun <- struct{}{}
			<-d.proceed
		}
		err := db.Update(func(tx *bbolt.Tx) error {
			err := fn(tx)
			if fails := d.err.Load(); err == nil && fails != nil {
				return *fails
			}
			return err
		})
		if err == nil && d.unsure.Load() {
			return errDisk
		}
		return err
	}
	return f
}

func (d *disk) fail(err error) {
	if err == nil {
		d.err.Store(nil)
		return
	}
	d.err.Store(&err)
}

// A published is the outcome of a call of Publish.
type published struct {
	receipts []engine.Receipt
	err      error
}

// goPublish publishes messages meanwhile.
func goPublish(ctx context.Context, s *Session, hub string, batch engine.Batch) <-chan published {
	done := make(chan published, 1)
	go func() { // ends with the call; the tests that do not wait for it end it with the session
		receipts, err := s.Publish(ctx, hub, batch)
		done <- published{receipts, err}
	}()
	return done
}

func TestPublish_ReturnsAfterTheCommit(t *testing.T) {
	d := &disk{begun: make(chan struct{}), proceed: make(chan struct{})}
	s := startOn(t, d.on(openTestFile(t, t.TempDir())), &monitor{}, time.Now)
	to := &receiver{}
	openHubWith(t, s, "hub", testBounds, to)
	done := goPublish(t.Context(), s, "hub", engine.Batch{Bounds: testBounds, Messages: messages("a")})
	<-d.begun
	returned := false
	select {
	case <-done:
		returned = true
	case <-time.After(50 * time.Millisecond): // there is nothing to wait for
	}
	early := to.received()
	d.proceed <- struct{}{}
	if returned || len(early) != 0 {
		t.Fatalf("before the commit Publish returned: %v, and the receiver got %q", returned, early)
	}
	if p := <-done; p.err != nil {
		t.Error(p.err)
	}
	if got := to.received(); len(got) != 1 {
		t.Errorf("the receiver got %q, want one entry", got)
	}
}

func TestCommit_TakesWhatCameMeanwhile(t *testing.T) {
	const hubs, each = 20, 5
	d := &disk{begun: make(chan struct{}), proceed: make(chan struct{})}
	s := startOn(t, d.on(openTestFile(t, t.TempDir())), &monitor{}, time.Now)
	first := goPublish(t.Context(), s, "hub 0", engine.Batch{Bounds: testBounds, Messages: messages("first")})
	<-d.begun
	var reached, done sync.WaitGroup
	for i := range hubs * each {
		ctx := &countingContext{Context: t.Context(), reached: &reached}
		reached.Add(1)
		done.Go(func() {
			if _, err := s.Publish(ctx, fmt.Sprint("hub ", i%hubs), engine.Batch{Bounds: testBounds, Messages: messages("x")}); err != nil {
				t.Error(err)
			}
		})
	}
	reached.Wait() // all of them are about to hand their batch over
	d.proceed <- struct{}{}
	if p := <-first; p.err != nil {
		t.Error(p.err)
	}
	all := make(chan struct{})
	go func() { // ends with the calls, which this function waits for
		done.Wait()
		close(all)
	}()
	for waiting := true; waiting; {
		select {
		case <-d.begun:
			d.proceed <- struct{}{}
		case <-all:
			waiting = false
		}
	}
	if got := d.commits.Load(); got > hubs*each/5 {
		t.Errorf("%d transactions for %d batches, want few", got, hubs*each)
	}
	if got := look(t, s, "hub 0").Seq; got != each+1 {
		t.Errorf("got number %d, want %d", got, each+1)
	}
}

// A countingContext reports that its Done was asked for.
type countingContext struct {
	context.Context
	reached *sync.WaitGroup
	once    sync.Once
}

func (c *countingContext) Done() <-chan struct{} {
	c.once.Do(c.reached.Done)
	return c.Context.Done()
}

func TestPublish_WithADoneContextPublishesNothing(t *testing.T) {
	d := &disk{begun: make(chan struct{}), proceed: make(chan struct{})}
	s := startOn(t, d.on(openTestFile(t, t.TempDir())), &monitor{}, time.Now)
	batch := engine.Batch{Bounds: testBounds, Messages: messages("never")}
	ctx, cancel := context.WithCancel(t.Context())
	first := goPublish(t.Context(), s, "hub", engine.Batch{Bounds: testBounds, Messages: messages("a")})
	<-d.begun
	waiting := goPublish(ctx, s, "hub", batch)
	cancel()
	mustBeUnavailable(t, (<-waiting).err)
	_, err := s.Publish(ctx, "hub", batch)
	mustBeUnavailable(t, err)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got error %v, want the reason, too", err)
	}
	d.proceed <- struct{}{}
	<-first
	if got, want := dataOf(look(t, s, "hub")), []string{"a"}; !slices.Equal(got, want) {
		t.Errorf("got entries %q, want %q", got, want)
	}
}

func TestPublish_WhenTheContextEndsDuringTheCommit(t *testing.T) {
	d := &disk{begun: make(chan struct{}, 2), proceed: make(chan struct{}, 2)}
	s := startOn(t, d.on(openTestFile(t, t.TempDir())), &monitor{}, time.Now)
	to := &receiver{}
	openHubWith(t, s, "hub", testBounds, to)
	batch := engine.Batch{Bounds: testBounds, Messages: messages("a"), Number: 1}
	ctx, cancel := context.WithCancel(t.Context())
	done := goPublish(ctx, s, "hub", batch)
	<-d.begun
	cancel()
	mustBeUnknown(t, (<-done).err)
	d.proceed <- struct{}{}
	d.proceed <- struct{}{} // of a second transaction, which must not be
	if got := publishBatch(t, s, "hub", batch)[0]; got.Seq != 1 {
		t.Errorf("got %+v for the repeated batch, want the receipt of the first", got)
	}
	if got := to.received(); len(got) != 1 {
		t.Errorf("the receiver got %q, want one entry", got)
	}
}

func TestCommit_OfABatchAndItsRepetitions(t *testing.T) {
	for _, fails := range []bool{false, true} {
		t.Run(fmt.Sprint("fails=", fails), func(t *testing.T) {
			d := &disk{}
			s := startOn(t, d.on(openTestFile(t, t.TempDir())), &monitor{}, time.Now)
			to := &receiver{}
			openHubWith(t, s, "hub", testBounds, to)
			batch := &engine.Batch{Bounds: testBounds, Messages: messages("a"), Number: 1}
			var group []*write
			for range 3 {
				group = append(group, newWrite("hub", batch))
			}
			want := 1
			if fails {
				d.fail(errDisk)
				want = 0
			}
			inCommitter(t, s, func() { s.commit(group) })
			for _, w := range group {
				err := <-w.done
				if fails {
					mustBeUnavailable(t, err)
				} else if err != nil || len(w.receipts) != 1 || w.receipts[0].Seq != 1 {
					t.Errorf("got receipts %+v, %v; want that of number 1", w.receipts, err)
				}
			}
			if got := to.received(); len(got) != want {
				t.Errorf("the receiver got %q, want %d entries", got, want)
			}
		})
	}
}

// newWrite returns a write for the committer.
func newWrite(hub string, batch *engine.Batch) *write {
	return &write{name: hub, batch: batch, done: make(chan error, 1)}
}

func TestPublish_WhenCommitsFail(t *testing.T) {
	d, m := &disk{}, &monitor{}
	s := startOn(t, d.on(openTestFile(t, t.TempDir())), m, time.Now)
	to := &receiver{}
	before := openHubWith(t, s, "hub", testBounds, to)
	publish(t, s, "other", "x")
	d.fail(errDisk)
	keyed := engine.Batch{Bounds: testBounds, Messages: messages("a"), Number: 1}
	keyed.Messages[0].Key = engine.Key{1}
	for range 2 {
		_, err := s.Publish(t.Context(), "hub", keyed)
		mustBeUnavailable(t, err)
		if !errors.Is(err, errDisk) {
			t.Errorf("got error %v, want the reason, too", err)
		}
	}
	mustBeUnavailable(t, s.Forget(t.Context(), "other"))
	if got := m.reported(); len(got) != 2 || got[0] != nil || !errors.Is(got[1], errDisk) {
		t.Errorf("the monitor got %v, want that the session worked, and then the error once", got)
	}
	d.fail(nil)
	got := publishBatch(t, s, "hub", keyed)[0]
	if want := (engine.Position{Epoch: before.Epoch, Seq: 1}); got.Repeated || got.Position != want {
		t.Errorf("got %+v, want the message published at %v", got, want)
	}
	if got := m.reported(); len(got) != 3 || got[2] != nil {
		t.Errorf("the monitor got %v, want that the session works again", got)
	}
	if got, want := to.received(), []string{"a"}; !slices.Equal(got, want) {
		t.Errorf("the receiver got %q, want %q", got, want)
	}
	if got, want := dataOf(look(t, s, "other")), []string{"x"}; !slices.Equal(got, want) {
		t.Errorf("got entries %q of the hub that could not forget, want %q", got, want)
	}
	checkSums(t, s)
}

func TestCommit_FindsOutByItselfWhenTheDiskWorksAgain(t *testing.T) {
	d, m := &disk{}, &monitor{}
	s := startOn(t, d.on(openTestFile(t, t.TempDir())), m, time.Now)
	d.fail(errDisk)
	_, err := s.Publish(t.Context(), "hub", engine.Batch{Bounds: testBounds, Messages: messages("a")})
	mustBeUnavailable(t, err)
	tried := d.commits.Load()
	eventually(t, "the session tries again", func() bool { return d.commits.Load() > tried })
	d.fail(nil)
	eventually(t, "the session works again", func() bool { return len(m.reported()) == 3 })
	if got := m.reported(); got[1] == nil || got[2] != nil {
		t.Errorf("the monitor got %v", got)
	}
	inCommitter(t, s, func() {
		tx, err := s.file.begin()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = tx.Rollback() }()
		if tx.Bucket([]byte(metaBucket)).Get([]byte(probeKey)) != nil {
			t.Error("what the session wrote to find out is still in the file")
		}
	})
}

// TestCommit_WhenOnlyTheLastSyncFails is the case in which bbolt reports an error and the file has the transaction:
// writing the meta pages again settles that it has.
func TestCommit_WhenOnlyTheLastSyncFails(t *testing.T) {
	d, m := &disk{}, &monitor{}
	s := startOn(t, d.on(openTestFile(t, t.TempDir())), m, time.Now)
	to := &receiver{}
	openHubWith(t, s, "hub", testBounds, to)
	d.unsure.Store(true)
	publish(t, s, "hub", "a")
	publish(t, s, "hub", "b")
	if got, want := to.received(), []string{"a", "b"}; !slices.Equal(got, want) {
		t.Errorf("the receiver got %q, want %q", got, want)
	}
	if got := m.reported(); len(got) != 1 {
		t.Errorf("the monitor got %v, want that the session works", got)
	}
}

// makeReadOnly makes writing the meta pages again fail, until it is called again with the handle that it returns.
func makeReadOnly(t *testing.T, s *Session, handle *os.File) (before *os.File) {
	t.Helper()
	inCommitter(t, s, func() {
		before = s.file.handle
		s.file.handle = handle
	})
	return before
}

func TestCommit_InDoubt(t *testing.T) {
	d, m := &disk{}, &monitor{}
	folder := t.TempDir()
	s := startOn(t, d.on(openTestFile(t, folder)), m, time.Now)
	to := &receiver{}
	openHubWith(t, s, "hub", testBounds, to)
	publish(t, s, "hub", "a")
	readOnly, err := os.Open(dbPath(folder))
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()

	d.unsure.Store(true)
	handle := makeReadOnly(t, s, readOnly)
	batch := engine.Batch{Bounds: testBounds, Messages: messages("b"), Number: 1}
	for range 2 {
		_, err := s.Publish(t.Context(), "hub", batch)
		mustBeUnknown(t, err)
	}
	if _, err := s.Open(t.Context(), "hub", testBounds, &receiver{}); err == nil {
		t.Error("a hub was opened with messages that a crash might undo")
	}
	if got, want := to.received(), []string{"a"}; !slices.Equal(got, want) {
		t.Errorf("the receiver got %q, want %q", got, want)
	}
	if got := d.commits.Load(); got != 2 {
		t.Errorf("%d transactions, want none after the one in doubt", got-2)
	}

	d.unsure.Store(false)
	makeReadOnly(t, s, handle)
	if got := publishBatch(t, s, "hub", batch)[0]; got.Seq != 2 {
		t.Errorf("got %+v for the repeated batch, want number 2", got)
	}
	if got := publish(t, s, "hub", "c")[0]; got.Seq != 3 {
		t.Errorf("got %+v, want number 3", got)
	}
	if got, want := to.received(), []string{"a", "b", "c"}; !slices.Equal(got, want) {
		t.Errorf("the receiver got %q, want %q", got, want)
	}
	if got := m.reported(); len(got) != 3 || !errors.Is(got[1], errInDoubt) || got[2] != nil {
		t.Errorf("the monitor got %v, want the doubt and its end", got)
	}
	checkSums(t, s)
}

func TestCommit_EndsTheDoubtByItself(t *testing.T) {
	d, m := &disk{}, &monitor{}
	folder := t.TempDir()
	s := startOn(t, d.on(openTestFile(t, folder)), m, time.Now)
	readOnly, err := os.Open(dbPath(folder))
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	to := &receiver{}
	openHubWith(t, s, "hub", testBounds, to)
	d.unsure.Store(true)
	handle := makeReadOnly(t, s, readOnly)
	if _, err := s.Publish(t.Context(), "hub", engine.Batch{Bounds: testBounds, Messages: messages("a")}); err == nil {
		t.Error("publishing has succeeded")
	}
	makeReadOnly(t, s, handle)
	eventually(t, "the receiver gets the entry", func() bool { return len(to.received()) == 1 })
	eventually(t, "the session works again", func() bool { return len(m.reported()) == 3 })
}

// TestCommit_WhenTheDiskHasLostATransaction is the case in which the system has dropped the meta page that it could not
// sync: bbolt's list of free pages is then wrong.
func TestCommit_WhenTheDiskHasLostATransaction(t *testing.T) {
	d, m := &disk{}, &monitor{}
	folder := t.TempDir()
	s := startOn(t, d.on(openTestFile(t, folder)), m, time.Now)
	publish(t, s, "hub", "a")
	readOnly, err := os.Open(dbPath(folder))
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	meta := make([]byte, 2*pageSize)
	if _, err := readOnly.ReadAt(meta, 0); err != nil {
		t.Fatal(err)
	}
	d.unsure.Store(true)
	handle := makeReadOnly(t, s, readOnly)
	if _, err := s.Publish(t.Context(), "hub", engine.Batch{Bounds: testBounds, Messages: messages("lost")}); err == nil {
		t.Error("publishing has succeeded")
	}
	if _, err := handle.WriteAt(meta, 0); err != nil {
		t.Fatal(err)
	}
	makeReadOnly(t, s, handle)
	d.unsure.Store(false)
	for range 2 {
		_, err := s.Publish(t.Context(), "hub", engine.Batch{Bounds: testBounds, Messages: messages("b")})
		mustBeUnavailable(t, err)
	}
	closeSession(t, s)
	if got, want := dataOf(look(t, open(t, folder), "hub")), []string{"a"}; !slices.Equal(got, want) {
		t.Errorf("got entries %q after a restart, want %q", got, want)
	}
}

func TestSession_RemembersHubsForAWhile(t *testing.T) {
	now := newClock()
	s := openAt(t, t.TempDir(), now.Now)
	publish(t, s, "published", "a")
	openHub(t, s, "open")
	remembered := func() (names []string) {
		inCommitter(t, s, func() {
			s.sweep()
			for name := range s.hubs {
				names = append(names, name)
			}
		})
		slices.Sort(names)
		return names
	}
	if got, want := remembered(), []string{"open", "published"}; !slices.Equal(got, want) {
		t.Errorf("the session remembers %q, want %q", got, want)
	}
	now.advance(idleTime + time.Second)
	if got, want := remembered(), []string{"open"}; !slices.Equal(got, want) {
		t.Errorf("the session remembers %q after a while, want %q", got, want)
	}
}
