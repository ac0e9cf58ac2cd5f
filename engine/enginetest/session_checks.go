package enginetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// sessionChecks are what every session has to pass.
func sessionChecks() []check {
	return []check{
		{"Open_NewHubHasAnEpochOfItsOwn", checkNewHub},
		{"Open_ReturnsWhatWasPublished", checkOpenReturns},
		{"Open_PassesWhatIsPublishedLater", checkOpenPasses},
		{"Open_WhilePublishingPassesEachEntryOnce", checkOpenWhilePublishing},
		{"Open_AgainReplacesTheReceiver", checkReplacement},
		{"Leave_EndsDelivery", checkLeave},
		{"Leave_OfAReplacedReceiverDoesNothing", checkLateLeave},
		{"Leave_OfAHubThatIsNotOpenDoesNothing", checkNeedlessLeave},
		{"Publish_NumbersMessagesFrom1", checkNumbers},
		{"Publish_NumbersEachHubByItself", checkHubsAreSeparate},
		{"Publish_ConcurrentBatchesStayTogether", checkBatches},
		{"Publish_AllReceiversSeeTheSame", checkEverything},
		{"Publish_KeepsDataAsItIs", checkData},
		{"Publish_TakesEveryNameOfAHub", checkNames},
		{"Publish_RepeatedNumberReturnsTheSameReceipts", checkNumber},
		{"Publish_RepeatedAfterADeadlinePublishesOnce", checkDeadlines},
		{"Publish_KeyIsPublishedOnce", checkKeys},
		{"Publish_KeyIsPublishedOnceByConcurrentSenders", checkConcurrentKeys},
		{"Publish_AgainPublishesWhatIsNew", checkAgain},
		{"Publish_LookupPublishesNothing", checkLookup},
		{"Forget_BeginsANewEpoch", checkForget},
		{"Forget_KeepsReceipts", checkForgetKeepsReceipts},
		{"Forget_WhilePublishing", checkForgetWhilePublishing},
		{"Context_CallsReturnWhenItIsDone", checkContext},
		{"Close_EndsAllCalls", checkClose},
	}
}

func checkNewHub(s *suite) {
	c := s.connect()
	seen := map[string]bool{}
	for i := range 5 {
		f := c.open(fmt.Sprint("hub ", i), roomy)
		if want := (engine.Position{Epoch: f.snapshot.Epoch}); f.snapshot.Position != want || f.snapshot.Base != 0 {
			s.Errorf("a new hub is at %v after %d, want number 0 after 0", f.snapshot.Position, f.snapshot.Base)
		}
		if seen[f.snapshot.Epoch] {
			s.Errorf("two hubs have the epoch %s", f.snapshot.Epoch)
		}
		seen[f.snapshot.Epoch] = true
	}
}

func checkOpenReturns(s *suite) {
	c := s.connect()
	var ledger ledger
	batch := s.messages(2)
	receipts := c.publish("hub", batch...)
	batch = append(batch, s.messages(1)...)
	receipts = append(receipts, c.publish("hub", batch[2])...)

	f := c.open("hub", roomy)
	s.wantTexts(f, string(batch[0].Data), string(batch[1].Data), string(batch[2].Data))
	if want := receipts[2].Position; f.snapshot.Position != want {
		s.Errorf("the snapshot is at %v, want %v as in the newest receipt", f.snapshot.Position, want)
	}
	if err := errors.Join(ledger.noteReceipts(batch, receipts), ledger.noteEntries(f.log())); err != nil {
		s.Error(err)
	}
}

func checkOpenPasses(s *suite) {
	c := s.connect()
	f := c.open("hub", roomy)
	var ledger ledger
	var want []string
	for n := 1; n <= 5; n++ {
		batch := s.messages(n)
		receipts := c.publish("hub", batch...)
		s.awaitReceipts(f, receipts)
		if err := ledger.noteReceipts(batch, receipts); err != nil {
			s.Error(err)
		}
		for _, m := range batch {
			want = append(want, string(m.Data))
		}
	}
	s.wantTexts(f, want...)
	if err := ledger.noteEntries(f.log()); err != nil {
		s.Error(err)
	}
}

// checkOpenWhilePublishing opens a hub many times while others publish in it, and looks for entries that fall between
// the snapshot and the first call, or that are in both.
func checkOpenWhilePublishing(s *suite) {
	callers := s.connectAll(2)
	opener, publisher := callers[0], callers[len(callers)-1]
	bounds := roomy
	bounds.Messages = 20
	ctx, stop := context.WithCancel(s.Context())
	defer stop()
	var ledger ledger

	publish := func() error {
		for ctx.Err() == nil {
			batch := engine.Batch{Bounds: bounds, Messages: s.messages(1 + rand.IntN(3))}
			receipts, err := publisher.tryPublish("hub", batch)
			if err == nil {
				err = ledger.noteReceipts(batch.Messages, receipts)
			}
			if err != nil {
				return err
			}
			s.pause()
		}
		return nil
	}
	open := func() error {
		defer stop()
		for range 100 {
			f, err := opener.tryOpen("hub", bounds)
			if err != nil {
				return err
			}
			for range rand.IntN(4) {
				s.pause()
			}
			opener.Leave("hub", f)
			// The receipt of an entry may come later than the entry.
			if err := errors.Join(f.verify(), ledger.noteEntries(f.log())); err != nil {
				return err
			}
		}
		return nil
	}
	s.parallel(publish, open)

	last := publisher.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: s.messages(1)})[0]
	if err := ledger.wantDense(last.Epoch, last.Seq-1); err != nil {
		s.Error(err)
	}
}

func checkReplacement(s *suite) {
	c := s.connect()
	first := c.open("hub", roomy)
	s.awaitReceipts(first, c.publish("hub", texts("a")...))
	second := c.open("hub", roomy)
	s.awaitReceipts(second, c.publish("hub", texts("b")...))
	s.wantTexts(first, "a")
	s.wantTexts(second, "a", "b")
}

func checkLeave(s *suite) {
	c := s.connect()
	for i := range 20 {
		hub := fmt.Sprint("hub ", i)
		first := c.open(hub, roomy)
		before := c.publish(hub, texts("a")...)
		if i%2 == 0 {
			s.awaitReceipts(first, before)
		}
		c.Leave(hub, first)
		c.publish(hub, texts("b")...)
		if i%3 == 0 { // time for a call that must not come
			s.pause()
		}
		second := c.open(hub, roomy)
		s.awaitReceipts(second, c.publish(hub, texts("c")...))
		s.wantTexts(second, "a", "b", "c")
		if got := first.position(); got.Seq > 1 {
			s.Errorf("a receiver got number %d, which was published after it had left", got.Seq)
		}
	}
}

func checkLateLeave(s *suite) {
	c := s.connect()
	first := c.open("hub", roomy)
	second := c.open("hub", roomy)
	c.Leave("hub", first)
	s.awaitReceipts(second, c.publish("hub", texts("a")...))
	c.Leave("hub", second)
	third := c.open("hub", roomy)
	c.Leave("hub", second)
	s.awaitReceipts(third, c.publish("hub", texts("b")...))
	s.wantTexts(first)
	s.wantTexts(second, "a")
	s.wantTexts(third, "a", "b")
}

func checkNeedlessLeave(s *suite) {
	c := s.connect()
	f := &follower{hub: "hub"}
	c.Leave("hub", f)
	f = c.open("hub", roomy)
	c.Leave("hub", f)
	c.Leave("hub", f)
	f = c.open("hub", roomy)
	s.awaitReceipts(f, c.publish("hub", texts("a")...))
}

func checkNumbers(s *suite) {
	c := s.connect()
	next, epoch := uint64(1), ""
	for _, n := range []int{1, 2, 64, 1, 63, 3} {
		for _, r := range c.publish("hub", s.messages(n)...) {
			if epoch == "" {
				epoch = r.Epoch
			}
			if want := (engine.Position{Epoch: epoch, Seq: next}); r.Position != want {
				s.Fatalf("a message is at %v, want %v", r.Position, want)
			}
			if r.Repeated {
				s.Errorf("the receipt of a message without a key is %+v, want Repeated false", r)
			}
			next++
		}
	}
}

func checkHubsAreSeparate(s *suite) {
	c := s.connect()
	one := c.open("one", roomy)
	for n := range uint64(5) {
		receipts := append(c.publish("one", texts("a")...), c.publish("two", texts("b")...)...)
		if receipts[0].Seq != n+1 || receipts[1].Seq != n+1 {
			s.Errorf("the next messages of two hubs have numbers %d and %d, want %d", receipts[0].Seq, receipts[1].Seq, n+1)
		}
		s.await(one, receipts[0].Position)
	}
	s.wantTexts(one, "a", "a", "a", "a", "a")
}

func checkBatches(s *suite) {
	callers := s.connectAll(2)
	f := callers[0].open("hub", roomy)
	var ledger ledger
	var senders []func() error
	for i := range 6 {
		senders = append(senders, func() error {
			c := callers[i%len(callers)]
			var last uint64
			for range 10 {
				messages := s.messages(1 + rand.IntN(10))
				receipts, err := c.tryPublish("hub", engine.Batch{Bounds: roomy, Messages: messages})
				if err == nil {
					err = ledger.noteReceipts(messages, receipts)
				}
				if err != nil {
					return err
				}
				if receipts[0].Seq <= last {
					return fmt.Errorf("a sender's batch begins with number %d, and the one before ended with %d", receipts[0].Seq, last)
				}
				for i, r := range receipts {
					if r.Seq != receipts[0].Seq+uint64(i) {
						return fmt.Errorf("message %d of a batch that begins with number %d has number %d", i, receipts[0].Seq, r.Seq)
					}
				}
				last = receipts[len(receipts)-1].Seq
				s.pause()
			}
			return nil
		})
	}
	s.parallel(senders...)

	last := callers[0].publish("hub", texts("last")...)[0]
	s.await(f, last.Position)
	err := errors.Join(ledger.wantDense(last.Epoch, last.Seq-1), ledger.noteEntries(f.log()), ledger.wantDense(last.Epoch, last.Seq))
	if err != nil {
		s.Error(err)
	}
}

func checkData(s *suite) {
	c := s.connect()
	f := c.open("hub", roomy)
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	large := make([]byte, s.MaxMessageSize)
	_, _ = rand.NewChaCha8([32]byte{}).Read(large) // never fails
	data := [][]byte{{}, all, {0}, []byte("\r\n"), []byte("\xff\xfe"), large, bytes.Repeat([]byte("é"), 1000), {}}
	for _, d := range data {
		message := engine.Message{Data: slices.Clone(d)}
		s.awaitReceipts(f, c.publish("hub", message))
		if !bytes.Equal(message.Data, d) {
			s.Errorf("Publish changed its message from %s to %s", quote(d), quote(message.Data))
		}
	}
	check := func(where string, got []passedEntry) {
		if len(got) != len(data) {
			s.Fatalf("%s has %d entries, want %d", where, len(got), len(data))
		}
		for i, e := range got {
			if !bytes.Equal(e.Data, data[i]) {
				s.Errorf("%s has %s, want %s", where, quote(e.Data), quote(data[i]))
			}
		}
	}
	check("the receiver", f.log())
	check("the snapshot", c.open("hub", roomy).log())
}

func checkNames(s *suite) {
	c := s.connect()
	names := []string{
		"a", "A", "a ", " a", "a b", "a/b", "a//b", "/", "../a", ".", "..", "a:b", "a.b", "a,b", "a;b", "a=b", "a&b",
		"{a}", "{a}b", "a{b}", "}{", "{", "}", "{}", "*", "?", "[a]", "a*", "^a", `\`, `"`, "'", "`", "$a", "%61", "%", "#",
		"\u00e9", "e\u0301", "日本語", "🙂", "a\nb", "a\tb", "a\x00b", "\x00", "\x01", "\x1fhub", "\x7f",
		strings.Repeat("x", 255), strings.Repeat("x", 254), strings.Repeat("é", 127),
	}
	followers := make([]*follower, len(names))
	for i, name := range names {
		followers[i] = c.open(name, roomy)
	}
	for i, name := range names {
		s.await(followers[i], c.publish(name, texts("1 in "+name)...)[0].Position)
		s.await(followers[i], c.publish(name, texts("2 in "+name)...)[0].Position)
	}
	for i, name := range names {
		s.wantTexts(followers[i], "1 in "+name, "2 in "+name)
		s.wantTexts(c.open(name, roomy), "1 in "+name, "2 in "+name)
	}
}

func checkNumber(s *suite) {
	c := s.connect()
	f := c.open("hub", roomy)
	messages := append(s.messages(2), s.keyed(1)...)
	batch := engine.Batch{Bounds: roomy, Messages: messages, Number: 7}
	first := c.publishBatch("hub", batch)
	for range 3 {
		if got := c.publishBatch("hub", batch); !slices.EqualFunc(got, first, sameReceipt) {
			s.Errorf("the repeated batch has receipts %+v, want %+v", got, first)
		}
	}
	// The number counts for this hub only.
	other := c.publishBatch("other", engine.Batch{Bounds: roomy, Messages: texts("other"), Number: 7})
	if other[0].Seq != 1 {
		s.Errorf("the first message of another hub has number %d, want 1", other[0].Seq)
	}
	// What is published without a number does not change the last one.
	between := c.publish("hub", texts("x", "x")...)
	if got := c.publishBatch("hub", batch); !slices.EqualFunc(got, first, sameReceipt) {
		s.Errorf("the batch, repeated after another without a number, has receipts %+v, want %+v", got, first)
	}
	// A batch with the next number is another one, even with the same data.
	batch.Number, batch.Messages = 8, messages[:1]
	next := c.publishBatch("hub", batch)
	if want := between[1].Seq + 1; next[0].Seq != want {
		s.Errorf("a batch with the next number has number %d, want %d", next[0].Seq, want)
	}
	// A lower number was given up.
	if receipts, err := c.tryPublish("hub", engine.Batch{Bounds: roomy, Messages: texts("late"), Number: 6}); err == nil {
		s.Errorf("batch 6 after batch 8 has receipts %+v, want an error", receipts)
	}
	s.awaitReceipts(f, c.publish("hub", texts("last")...))
	s.wantTexts(f, string(messages[0].Data), string(messages[1].Data), string(messages[2].Data), "x", "x",
		string(messages[0].Data), "last")
}

func sameReceipt(a, b engine.Receipt) bool {
	return a.Position == b.Position && a.At.Equal(b.At) && a.Repeated == b.Repeated && a.Unknown == b.Unknown
}

// checkDeadlines publishes with deadlines that often end during a call, and repeats each batch as the contract says.
func checkDeadlines(s *suite) {
	c := s.connect()
	f := c.open("hub", roomy)
	began := time.Now()
	c.publish("hub", texts("first")...)
	usual := min(max(time.Since(began), 100*time.Microsecond), 10*time.Millisecond)

	want := []string{"first"}
	for number := uint64(1); number <= 100; number++ {
		batch := engine.Batch{Bounds: roomy, Messages: s.messages(1 + rand.IntN(3)), Number: number}
		receipts, err := c.publishPersistently("hub", batch, func() time.Duration {
			return rand.N(2 * usual)
		})
		if err != nil {
			s.Fatal(err)
		}
		if receipts == nil { // nothing was published, and the next messages have a new number
			continue
		}
		for _, m := range batch.Messages {
			want = append(want, string(m.Data))
		}
	}
	s.awaitReceipts(f, c.publish("hub", texts("last")...))
	s.wantTexts(f, append(want, "last")...)
}

func checkKeys(s *suite) {
	c := s.connect()
	f := c.open("hub", roomy)
	messages := s.keyed(2)
	first := c.publish("hub", messages...)
	wantRepeated := func(got, want engine.Receipt) {
		s.Helper()
		want.Repeated = true
		if !sameReceipt(got, want) {
			s.Errorf("the receipt of a repeated message is %+v, want %+v", got, want)
		}
	}
	for _, attempt := range []engine.Attempt{engine.First, engine.Again, engine.Lookup} {
		repeated := messages[0]
		repeated.Attempt = attempt
		wantRepeated(c.publish("hub", repeated)[0], first[0])
	}

	// One batch may have old, new and equal messages.
	fresh := s.keyed(1)[0]
	mixed := c.publish("hub", fresh, messages[1], fresh, engine.Message{Data: []byte("x")})
	if mixed[0].Repeated || mixed[0].Seq != 3 || mixed[3].Repeated || mixed[3].Seq != 4 {
		s.Errorf("the receipts of the new messages are %+v and %+v, want numbers 3 and 4", mixed[0], mixed[3])
	}
	wantRepeated(mixed[1], first[1])
	wantRepeated(mixed[2], mixed[0])

	// Another hub has its own keys. A message without a key is never repeated.
	if r := c.publish("other", messages[0])[0]; r.Repeated || r.Seq != 1 {
		s.Errorf("the receipt of a key that another hub has is %+v, want number 1", r)
	}
	for _, r := range c.publish("hub", texts("x", "x")...) {
		if r.Repeated {
			s.Errorf("the receipt of a message without a key is %+v, want Repeated false", r)
		}
	}
	s.awaitReceipts(f, c.publish("hub", texts("last")...))
	s.wantTexts(f, string(messages[0].Data), string(messages[1].Data), string(fresh.Data), "x", "x", "x", "last")
}

func checkConcurrentKeys(s *suite) {
	callers := s.connectAll(3)
	f := callers[0].open("hub", roomy)
	messages := s.keyed(20)
	receipts := make([][]engine.Receipt, 6)
	var senders []func() error
	for i := range receipts {
		senders = append(senders, func() error {
			for _, m := range messages {
				r, err := callers[i%len(callers)].tryPublish("hub", engine.Batch{Bounds: roomy, Messages: []engine.Message{m}})
				if err != nil {
					return err
				}
				receipts[i] = append(receipts[i], r...)
			}
			return nil
		})
	}
	s.parallel(senders...)

	for i := range messages {
		published := 0
		for _, r := range receipts {
			if !r[i].Repeated {
				published++
			}
			if r[i].Position != receipts[0][i].Position || !r[i].At.Equal(receipts[0][i].At) {
				s.Errorf("receipts of one key are %+v and %+v", receipts[0][i], r[i])
			}
		}
		if published != 1 {
			s.Errorf("%d receipts of one key say that it was published, want 1", published)
		}
	}
	last := callers[0].publish("hub", texts("last")...)[0]
	s.await(f, last.Position)
	if want := uint64(len(messages)) + 1; last.Seq != want {
		s.Errorf("after %d messages, sent six times each, the next has number %d, want %d", len(messages), last.Seq, want)
	}
}

func checkAgain(s *suite) {
	c := s.connect()
	c.publish("hub", s.keyed(1)...)
	messages := s.keyed(1)
	messages[0].Attempt = engine.Again
	if r := c.publish("hub", messages...)[0]; r.Unknown || r.Repeated || r.Seq != 2 {
		s.Errorf("the receipt of a message that was not published before is %+v, want number 2", r)
	}
	if r := c.publish("hub", messages...)[0]; !r.Repeated || r.Seq != 2 {
		s.Errorf("the receipt of a message that was published before is %+v, want number 2, repeated", r)
	}
}

func checkLookup(s *suite) {
	c := s.connect()
	f := c.open("hub", roomy)
	messages := s.keyed(1)
	messages[0].Attempt = engine.Lookup
	for range 2 {
		if r := c.publish("hub", messages...)[0]; !r.Unknown {
			s.Errorf("the receipt of a message that was not published is %+v, want Unknown", r)
		}
	}
	messages[0].Attempt = engine.First
	if r := c.publish("hub", messages...)[0]; r.Unknown || r.Repeated || r.Seq != 1 {
		s.Errorf("the receipt after a look-up is %+v, want number 1", r)
	}
	s.awaitReceipts(f, c.publish("hub", texts("last")...))
	s.wantTexts(f, string(messages[0].Data), "last")
}

func checkForget(s *suite) {
	c := s.connect()
	seen := map[string]bool{}
	for i := range 5 {
		old := c.open("hub", roomy)
		if seen[old.snapshot.Epoch] {
			s.Errorf("the hub returned to epoch %s", old.snapshot.Epoch)
		}
		seen[old.snapshot.Epoch] = true
		s.awaitReceipts(old, c.publish("hub", s.messages(i+1)...))
		c.forget("hub")
		if i%2 == 0 { // the receiver goes on, in the new epoch
			r := c.publish("hub", texts("later")...)[0]
			if seen[r.Epoch] {
				s.Errorf("a message after Forget is in the old epoch %s", r.Epoch)
			}
			s.await(old, r.Position)
			c.forget("hub")
			seen[r.Epoch] = true
		}
		f := c.open("hub", roomy)
		if len(f.snapshot.Entries) != 0 {
			s.Errorf("after Forget the hub has %d entries", len(f.snapshot.Entries))
		}
		if seen[f.snapshot.Epoch] {
			s.Errorf("after Forget the hub is in the old epoch %s", f.snapshot.Epoch)
		}
		seen[f.snapshot.Epoch] = true
		if r := c.publish("hub", texts("next")...)[0]; r.Epoch != f.snapshot.Epoch || r.Seq != f.snapshot.Seq+1 {
			s.Errorf("the first message after Forget is at %v, want the number after %v", r.Position, f.snapshot.Position)
		}
		c.forget("hub")
	}
	c.forget("new hub")
}

func checkForgetKeepsReceipts(s *suite) {
	c := s.connect()
	messages := s.keyed(1)
	batch := engine.Batch{Bounds: roomy, Messages: append(s.messages(1), messages...), Number: 1}
	first := c.publishBatch("hub", batch)
	c.forget("hub")
	if got := c.publishBatch("hub", batch); !slices.EqualFunc(got, first, sameReceipt) {
		s.Errorf("the last batch, repeated after Forget, has receipts %+v, want %+v", got, first)
	}
	want := first[1]
	want.Repeated = true
	if got := c.publish("hub", messages...)[0]; !sameReceipt(got, want) {
		s.Errorf("the receipt of a message, repeated after Forget, is %+v, want %+v", got, want)
	}
	if f := c.open("hub", roomy); len(f.snapshot.Entries) != 0 {
		s.Errorf("repeated messages became %d entries after Forget", len(f.snapshot.Entries))
	}
}

// checkForgetWhilePublishing looks for messages of two epochs with one position.
func checkForgetWhilePublishing(s *suite) {
	callers := s.connectAll(2)
	followers := make([]*follower, len(callers))
	for i, c := range callers {
		followers[i] = c.open("hub", roomy)
	}
	var ledger ledger
	var work []func() error
	for _, c := range callers {
		work = append(work, func() error {
			for range 100 {
				batch := engine.Batch{Bounds: roomy, Messages: s.messages(1 + rand.IntN(3))}
				receipts, err := c.tryPublish("hub", batch)
				if err == nil {
					err = ledger.noteReceipts(batch.Messages, receipts)
				}
				if err != nil {
					return err
				}
				s.pause()
			}
			return nil
		}, func() error {
			for range 10 {
				ctx, cancel := c.context()
				err := c.Forget(ctx, "hub")
				cancel()
				if err != nil {
					return fmt.Errorf("Forget returned %w", err)
				}
				for range 5 {
					s.pause()
				}
			}
			return nil
		})
	}
	s.parallel(work...)

	last := callers[0].publish("hub", texts("last")...)[0]
	for _, f := range followers {
		s.await(f, last.Position)
		log := f.log()
		if err := ledger.noteEntries(log); err != nil {
			s.Error(err)
		}
		if got, want := len(log), ledger.len(); got != want {
			s.Errorf("a receiver got %d messages, want %d", got, want)
		}
	}
}

func checkContext(s *suite) {
	c := s.connect()
	ctx, cancel := context.WithCancel(s.Context())
	cancel()
	for name, call := range c.calls() {
		s.returns(name+" with a context that is done", promptly, func() { _ = call(ctx) })
	}
	s.awaitReceipts(c.open("opened", roomy), c.publish("opened", texts("a")...))
}

// calls returns a call of each method that has a context.
func (c *caller) calls() map[string]func(context.Context) error {
	calls := map[string]func(context.Context) error{
		"Open": func(ctx context.Context) error {
			_, err := c.Open(ctx, "opened", roomy, &follower{hub: "opened"})
			return err
		},
		"Publish": func(ctx context.Context) error {
			_, err := c.Publish(ctx, "hub", engine.Batch{Bounds: roomy, Messages: c.messages(1)})
			return err
		},
		"Forget": func(ctx context.Context) error { return c.Forget(ctx, "hub") },
	}
	cluster, ok := c.Session.(engine.Cluster)
	if !ok {
		return calls
	}
	c.open("announced", roomy)
	calls["Read"] = func(ctx context.Context) error {
		_, err := cluster.Read(ctx, "hub", engine.Position{})
		return err
	}
	calls["Announce"] = func(ctx context.Context) error {
		return cluster.Announce(ctx, "announced", []engine.UserCount{{User: "ann", Clients: 1}})
	}
	calls["Renew"] = func(ctx context.Context) error {
		_, err := cluster.Renew(ctx, engine.Status{}, nil)
		return err
	}
	calls["Nodes"] = func(ctx context.Context) error {
		_, err := cluster.Nodes(ctx)
		return err
	}
	return calls
}

// promptly is how long a call may take to return when it has to return at once.
const promptly = 3 * time.Second

// returns fails the test if a call takes too long.
func (s *suite) returns(what string, within time.Duration, call func()) {
	s.Helper()
	returned := make(chan struct{})
	go func() { // ends with the call, for which this function waits
		defer close(returned)
		call()
	}()
	timeout := time.NewTimer(within)
	defer timeout.Stop()
	select {
	case <-returned:
	case <-timeout.C:
		s.Fatalf("%s did not return within %v", what, within)
	}
}

// checkClose closes sessions while they publish and deliver.
func checkClose(s *suite) {
	for range 10 {
		s.closeOnce()
	}
}

func (s *suite) closeOnce() {
	closing := s.connect()
	publisher := closing
	if _, cluster := closing.Session.(engine.Cluster); cluster {
		publisher = s.connect()
	}
	closing.open("hub", roomy)
	ctx, stop := context.WithCancel(s.Context())
	defer stop()
	stopped := make(chan struct{})
	go func() { // ends after stop, and is waited for below
		defer close(stopped)
		for ctx.Err() == nil {
			_, _ = publisher.tryPublish("hub", engine.Batch{Bounds: roomy, Messages: s.messages(1)})
			s.pause()
		}
	}()
	for range rand.IntN(10) {
		s.pause()
	}
	s.returns("Close", patience, closing.close) // from now on each call of the receiver is an error
	time.Sleep(10 * time.Millisecond)
	stop()
	s.returns("Publish during Close", patience, func() { <-stopped })
	s.returns("Publish after Close", patience, func() {
		if _, err := closing.tryPublish("hub", engine.Batch{Bounds: roomy, Messages: s.messages(1)}); err == nil {
			s.Error("Publish returned no error after Close")
		}
	})
	s.returns("Leave after Close", patience, func() { closing.Leave("hub", closing.followers[0]) })
	publisher.close()
}
